//! What dense attention does at every step of a trace: the truth that selections are judged by.

use kvoyant_kernels::Kernels;

use crate::trace::Trace;

/// Dense attention of one layer.
#[derive(Debug, Clone, PartialEq)]
pub struct LayerTruth {
    /// Step by step.
    pub steps: Vec<StepTruth>,
}

/// Dense attention of one layer and step.
#[derive(Debug, Clone, PartialEq)]
pub struct StepTruth {
    /// Attention probabilities per query head, `[Hq]` of `[tokens]`.
    pub probabilities: Vec<Vec<f32>>,
    /// Attention outputs, `[Hq][d]`.
    pub outputs: Vec<f32>,
}

impl LayerTruth {
    /// Of a layer of a trace.
    #[must_use]
    pub fn of(trace: &Trace, layer: usize) -> Self {
        let shape = &trace.shape;
        let steps = (0..shape.steps)
            .map(|step| StepTruth::of(trace, layer, trace.query(layer, step), shape.prompt() + step + 1))
            .collect();
        Self { steps }
    }
}

impl StepTruth {
    fn of(trace: &Trace, layer: usize, queries: &[f32], tokens: usize) -> Self {
        let d = trace.shape.head_dim;
        let probabilities = attention(trace, layer, queries, tokens);
        let mut outputs = vec![0.0; queries.len()];
        for (head, row) in probabilities.iter().enumerate() {
            let values = trace.values(layer, kv_head_of(trace, head));
            output(row, values, d, 0..tokens, &mut outputs[head * d..][..d]);
        }
        Self { probabilities, outputs }
    }
}

/// The KV head of a query head.
pub(crate) fn kv_head_of(trace: &Trace, query_head: usize) -> usize {
    query_head / (trace.shape.query_heads / trace.shape.kv_heads)
}

/// Attention probabilities of queries `[Hq][d]` over the first `tokens` tokens.
pub(crate) fn attention(trace: &Trace, layer: usize, queries: &[f32], tokens: usize) -> Vec<Vec<f32>> {
    let d = trace.shape.head_dim;
    let scale = 1.0 / (d as f32).sqrt();
    let kernels = Kernels::best();
    queries
        .chunks_exact(d)
        .enumerate()
        .map(|(head, query)| {
            let keys = &trace.keys(layer, kv_head_of(trace, head))[..tokens * d];
            let mut row: Vec<f32> = keys.chunks_exact(d).map(|key| scale * kernels.dot(query, key)).collect();
            kernels.softmax_in_place(&mut row);
            row
        })
        .collect()
}

/// Adds to `out` the values of `tokens` with their weights; the sum of the weights.
pub(crate) fn output(
    weights: &[f32],
    values: &[f32],
    d: usize,
    tokens: impl Iterator<Item = usize>,
    out: &mut [f32],
) -> f64 {
    let kernels = Kernels::best();
    let mut total = 0.0;
    for token in tokens {
        total += f64::from(weights[token]);
        kernels.axpy(out, weights[token], &values[token * d..][..d]);
    }
    total
}

/// The mean of rows of equal length: a group's attention from its query heads'.
#[must_use]
pub fn mean_of_group(rows: &[Vec<f32>]) -> Vec<f32> {
    let mut mean = rows.first().cloned().unwrap_or_default();
    for row in rows.iter().skip(1) {
        Kernels::best().add(&mut mean, row);
    }
    mean.iter_mut().for_each(|value| *value /= rows.len().max(1) as f32);
    mean
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::generate::{Generator, Kind};

    #[test]
    fn probabilities_sum_to_one_and_outputs_are_their_means_of_values() {
        let trace = Generator { tokens: 120, steps: 3, ..Generator::new(Kind::Drift, 1) }.trace();
        let truth = LayerTruth::of(&trace, 1);
        assert_eq!(truth.steps.len(), 3);
        for (at, step) in truth.steps.iter().enumerate() {
            for (head, row) in step.probabilities.iter().enumerate() {
                assert_eq!(row.len(), 118 + at);
                assert!((row.iter().sum::<f32>() - 1.0).abs() < 1e-4);
                let values = trace.values(1, kv_head_of(&trace, head));
                let first: f32 = row.iter().zip(values.chunks(64)).map(|(p, v)| p * v[0]).sum();
                assert!((first - step.outputs[head * 64]).abs() < 1e-4);
            }
        }
    }
}
