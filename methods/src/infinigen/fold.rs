//! Folding the skew into the weights of models without RoPE.

/// Turns one head's projection so that its outputs come out in the skewed basis: `W ← Aᵀ·W`, `b ← Aᵀ·b`, with
/// `a` `[d][d]`, `weight` `[d][inputs]` (an output per row) and `bias` `[d]`.
///
/// Do it for every query head of a KV head and for the KV head itself, with that head's one matrix: scores stay
/// as they are. **Only without RoPE**: a rotation by position between projection and score does not commute
/// with `A`, so models with RoPE apply `A` to queries and keys after it.
///
/// # Panics
/// Where the lengths do not fit one another.
pub fn fold(a: &[f32], d: usize, weight: &mut [f32], bias: Option<&mut [f32]>) {
    assert!(d > 0 && a.len() == d * d, "a matrix of {} values for heads of {d}", a.len());
    assert!(weight.len().is_multiple_of(d), "{} weights for {d} outputs", weight.len());
    let inputs = weight.len() / d;
    turn(a, d, weight, inputs);
    if let Some(bias) = bias {
        assert_eq!(bias.len(), d, "one bias per output");
        turn(a, d, bias, 1);
    }
}

/// `x ← Aᵀ·x` for `x` `[d][columns]`.
fn turn(a: &[f32], d: usize, x: &mut [f32], columns: usize) {
    if columns == 0 {
        return;
    }
    let old = x.to_vec();
    x.fill(0.0);
    for (i, from) in old.chunks_exact(columns).enumerate() {
        for (j, to) in x.chunks_exact_mut(columns).enumerate() {
            let factor = a[i * d + j];
            to.iter_mut().zip(from).for_each(|(to, from)| *to += factor * from);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{Rng, matmul, matmul_t, relative_error};

    const D: usize = 8;
    const INPUTS: usize = 12;
    const TOKENS: usize = 6;

    struct Layer {
        x: Vec<f32>,
        a: Vec<f32>,
        query: Vec<f32>,
        key: Vec<f32>,
        query_bias: Vec<f32>,
        key_bias: Vec<f32>,
    }

    fn layer(seed: u64) -> Layer {
        let mut rng = Rng::new(seed);
        Layer {
            x: rng.normal(TOKENS * INPUTS),
            a: rng.orthogonal(D),
            query: rng.normal(D * INPUTS),
            key: rng.normal(D * INPUTS),
            query_bias: rng.normal(D),
            key_bias: rng.normal(D),
        }
    }

    fn linear(x: &[f32], weight: &[f32], bias: &[f32]) -> Vec<f32> {
        let mut out = matmul_t(x, weight, TOKENS, INPUTS, D);
        out.chunks_exact_mut(D).for_each(|row| row.iter_mut().zip(bias).for_each(|(y, b)| *y += b));
        out
    }

    /// RoPE (Su et al., 2021) of rows at positions 0, 1, 2, …, halves paired.
    fn rope(rows: &[f32]) -> Vec<f32> {
        let mut out = rows.to_vec();
        for (position, row) in out.chunks_exact_mut(D).enumerate() {
            for pair in 0..D / 2 {
                let angle = position as f32 * 100_f32.powf(-2.0 * pair as f32 / D as f32);
                let (sin, cos) = angle.sin_cos();
                let (x, y) = (row[pair], row[pair + D / 2]);
                (row[pair], row[pair + D / 2]) = (x * cos - y * sin, x * sin + y * cos);
            }
        }
        out
    }

    fn folded(layer: &Layer) -> (Vec<f32>, Vec<f32>) {
        let mut layer = Layer {
            x: layer.x.clone(),
            a: layer.a.clone(),
            query: layer.query.clone(),
            key: layer.key.clone(),
            query_bias: layer.query_bias.clone(),
            key_bias: layer.key_bias.clone(),
        };
        fold(&layer.a, D, &mut layer.query, Some(&mut layer.query_bias));
        fold(&layer.a, D, &mut layer.key, Some(&mut layer.key_bias));
        (linear(&layer.x, &layer.query, &layer.query_bias), linear(&layer.x, &layer.key, &layer.key_bias))
    }

    #[test]
    fn without_rope_folded_weights_give_what_turning_at_run_time_gives() {
        for seed in 0..8 {
            let layer = layer(seed);
            let queries = linear(&layer.x, &layer.query, &layer.query_bias);
            let keys = linear(&layer.x, &layer.key, &layer.key_bias);
            let (folded_queries, folded_keys) = folded(&layer);
            let turned_queries = matmul(&queries, &layer.a, TOKENS, D, D);
            assert!(relative_error(&folded_queries, &turned_queries) < 1e-5);
            assert!(relative_error(&folded_keys, &matmul(&keys, &layer.a, TOKENS, D, D)) < 1e-5);
            let scores = matmul_t(&queries, &keys, TOKENS, D, TOKENS);
            let folded_scores = matmul_t(&folded_queries, &folded_keys, TOKENS, D, TOKENS);
            assert!(relative_error(&folded_scores, &scores) < 1e-5);
        }
    }

    #[test]
    fn with_rope_turning_after_it_keeps_scores_and_folding_before_it_does_not() {
        for seed in 0..8 {
            let layer = layer(seed);
            let queries = rope(&linear(&layer.x, &layer.query, &layer.query_bias));
            let keys = rope(&linear(&layer.x, &layer.key, &layer.key_bias));
            let scores = matmul_t(&queries, &keys, TOKENS, D, TOKENS);
            let turned = matmul_t(
                &matmul(&queries, &layer.a, TOKENS, D, D),
                &matmul(&keys, &layer.a, TOKENS, D, D),
                TOKENS,
                D,
                TOKENS,
            );
            assert!(relative_error(&turned, &scores) < 1e-5);
            let (folded_queries, folded_keys) = folded(&layer);
            let wrong = matmul_t(&rope(&folded_queries), &rope(&folded_keys), TOKENS, D, TOKENS);
            assert!(relative_error(&wrong, &scores) > 0.1, "folding must not be used with RoPE");
        }
    }
}
