//! What a selection is worth: attention over it beside the dense one.

use kvoyant_kernels::Kernels;
use kvoyant_methods::Selection;

use super::rest::Beside;
use super::{LayerOutcome, Run};
use crate::truth::{StepTruth, kv_head_of, mean_of_group, output};

impl Run<'_> {
    /// The weights `e^(q̂·k/√d − lse)` of a KV head's rows for a query that is not the true one, `lse` being dense attention's:
    /// `[g][rows]`.
    pub(super) fn weights(
        &self,
        rows: &[usize],
        head: usize,
        (truth, step): (&StepTruth, usize),
        hint: &[f32],
    ) -> Vec<f32> {
        let (trace, shape) = (self.of.trace, &self.of.shape);
        let (d, group, kernels) = (shape.head_dim, shape.group(), Kernels::best());
        let keys = trace.keys(self.layer, head);
        let scale = 1.0 / (d as f32).sqrt();
        let score = |query: &[f32], token: usize| scale * kernels.dot(query, &keys[token * d..][..d]);
        let mut weights = Vec::with_capacity(group * rows.len());
        for query in head * group..(head + 1) * group {
            let lse = self.dense_lse((truth, step), query);
            let hinted = &hint[query * d..][..d];
            weights.extend(rows.iter().map(|token| (score(hinted, *token) - lse).exp()));
        }
        weights
    }

    /// The candidates with the largest true probability per KV head, as many as the budget has, in rising order.
    fn best(&self, truth: &StepTruth, tokens: usize) -> Vec<Vec<u32>> {
        let (shape, group) = (&self.of.shape, self.of.shape.group());
        let budget = self.budget.map_or(0, |budget| budget.rows_of(tokens));
        let candidates = shape.candidates(tokens);
        (0..shape.kv_heads)
            .map(|head| {
                let mean = mean_of_group(&truth.probabilities[head * group..][..group]);
                let mut order: Vec<u32> = candidates.clone().map(|token| token as u32).collect();
                let wanted = budget.min(order.len());
                if wanted > 0 && wanted < order.len() {
                    let by =
                        |a: &u32, b: &u32| mean[*b as usize].total_cmp(&mean[*a as usize]).then(a.cmp(b));
                    order.select_nth_unstable_by(wanted - 1, by);
                }
                order.truncate(wanted);
                order.sort_unstable();
                order
            })
            .collect()
    }

    pub(super) fn best_ids(&self, truth: &StepTruth, tokens: usize) -> Vec<u32> {
        self.best(truth, tokens)
            .into_iter()
            .flat_map(|ids| std::iter::once(ids.len() as u32).chain(ids))
            .collect()
    }

    /// Compares an answer over sinks, window and what was attended beside them with dense attention's; what was attended, per KV head. Rows
    /// of `on_cpu` have the weights of `by_hint` where there are any.
    pub(super) fn judge(
        &self,
        (selection, beside): (&Selection, &Beside),
        (truth, step): (&StepTruth, usize),
        tokens: usize,
        (on_cpu, by_hint): (&[Vec<usize>], &[Vec<f32>]),
        out: &mut LayerOutcome,
    ) -> Vec<Vec<usize>> {
        let (trace, shape) = (self.of.trace, &self.of.shape);
        let d = shape.head_dim;
        let attended = self.attended(&beside.attended, tokens);
        let mut covered = 0.0;
        for (head, row) in truth.probabilities.iter().enumerate() {
            let kv_head = kv_head_of(trace, head);
            let mut got = vec![0.0; d];
            let values = trace.values(self.layer, kv_head);
            let mass = output(row, values, d, attended[kv_head].iter().copied(), &mut got);
            let mut total = mass;
            if let Some(weights) = by_hint.get(kv_head) {
                let rows = &on_cpu[kv_head];
                let own = &weights[head % shape.group() * rows.len()..][..rows.len()];
                for (token, weight) in rows.iter().zip(own) {
                    let instead = weight - row[*token];
                    Kernels::best().axpy(&mut got, instead, &values[token * d..][..d]);
                    total += f64::from(instead);
                }
            }
            if let Some(rest) = beside.rest.as_ref().filter(|rest| rest.heads() > 0) {
                let weight = (rest.sums()[head].lse() - self.dense_lse((truth, step), head)).exp();
                Kernels::best().axpy(&mut got, weight, rest.mean(head));
                total += f64::from(weight);
            }
            got.iter_mut().for_each(|value| *value /= total.max(f64::MIN_POSITIVE) as f32);
            let mass = mass.min(1.0);
            covered += mass;
            out.missed.push(1.0 - mass);
            let wanted = &truth.outputs[head * d..][..d];
            let square =
                |values: &mut dyn Iterator<Item = f32>| values.map(|v| f64::from(v).powi(2)).sum::<f64>();
            let error = square(&mut got.iter().zip(wanted).map(|(a, b)| a - b));
            out.error.push((error / square(&mut wanted.iter().copied()).max(f64::MIN_POSITIVE)).sqrt());
        }
        out.mass_of_steps.push(covered);
        for (head, best) in self.best(truth, tokens).iter().enumerate() {
            if !best.is_empty() {
                let found = selection.tokens(head).filter(|token| best.binary_search(token).is_ok()).count();
                out.recall.push(found as f64 / best.len() as f64);
            }
        }
        attended
    }
}
