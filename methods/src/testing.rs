//! What several modules' tests need: numbers from a seed and naive linear algebra.

use crate::infinigen::{HeadRows, SkewArtifact};
use crate::shape::Shape;

pub(crate) use crate::replay::Replay as Store;

/// Numbers from a seed (xorshift64*).
pub(crate) struct Rng(u64);

impl Rng {
    pub(crate) fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    pub(crate) fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    /// About normal: the sum of twelve uniform numbers.
    pub(crate) fn normal(&mut self, count: usize) -> Vec<f32> {
        (0..count)
            .map(|_| (0..12).map(|_| (self.next() >> 40) as f32 / (1 << 24) as f32).sum::<f32>() - 6.0)
            .collect()
    }

    /// A random orthogonal matrix `[d][d]`, by Gram-Schmidt.
    pub(crate) fn orthogonal(&mut self, d: usize) -> Vec<f32> {
        let mut rows: Vec<Vec<f64>> = Vec::new();
        while rows.len() < d {
            let mut row: Vec<f64> = self.normal(d).into_iter().map(f64::from).collect();
            // Twice is enough (Kahan).
            for _ in 0..2 {
                for other in &rows {
                    let dot: f64 = row.iter().zip(other).map(|(x, y)| x * y).sum();
                    row.iter_mut().zip(other).for_each(|(x, y)| *x -= dot * y);
                }
            }
            let norm = row.iter().map(|x| x * x).sum::<f64>().sqrt();
            if norm > 1e-3 {
                rows.push(row.into_iter().map(|x| x / norm).collect());
            }
        }
        rows.into_iter().flatten().map(|x| x as f32).collect()
    }
}

/// `a · b` for `a` `[rows][inner]`, `b` `[inner][columns]`, summed in f64.
pub(crate) fn matmul(a: &[f32], b: &[f32], rows: usize, inner: usize, columns: usize) -> Vec<f32> {
    let at = |i: usize, j: usize| {
        (0..inner).map(|k| f64::from(a[i * inner + k]) * f64::from(b[k * columns + j])).sum::<f64>() as f32
    };
    (0..rows * columns).map(|index| at(index / columns, index % columns)).collect()
}

/// `a · bᵀ` for `a` `[rows][inner]`, `b` `[columns][inner]`, summed in f64.
pub(crate) fn matmul_t(a: &[f32], b: &[f32], rows: usize, inner: usize, columns: usize) -> Vec<f32> {
    let at = |i: usize, j: usize| {
        (0..inner).map(|k| f64::from(a[i * inner + k]) * f64::from(b[j * inner + k])).sum::<f64>() as f32
    };
    (0..rows * columns).map(|index| at(index / columns, index % columns)).collect()
}

/// `‖x − y‖ / ‖y‖`.
pub(crate) fn relative_error(x: &[f32], y: &[f32]) -> f64 {
    assert_eq!(x.len(), y.len());
    let square = |value: f32| f64::from(value).powi(2);
    let error: f64 = x.iter().zip(y).map(|(x, y)| square(x - y)).sum();
    (error / y.iter().map(|y| square(*y)).sum::<f64>()).sqrt()
}

/// Random orthogonal matrices for that shape.
pub(crate) fn random_artifact(shape: &Shape, seed: u64) -> SkewArtifact {
    let mut rng = Rng::new(seed);
    let matrices = (0..shape.layers * shape.kv_heads).flat_map(|_| rng.orthogonal(shape.head_dim)).collect();
    SkewArtifact::new(shape, matrices).unwrap()
}

/// True logits `[g][n]` of the query heads of a KV head: `hint` is `[Hq][d]`, `keys` `[T][Hkv][d]`.
pub(crate) fn logits(shape: &Shape, hint: &[f32], keys: &[f32], kv_head: usize) -> Vec<f32> {
    let (d, g) = (shape.head_dim, shape.group());
    let keys: Vec<f32> = HeadRows::keys(keys, shape, kv_head).rows().flatten().copied().collect();
    let tokens = keys.len() / d;
    let mut scores = matmul_t(&hint[kv_head * g * d..][..g * d], &keys, g, d, tokens);
    scores.iter_mut().for_each(|score| *score /= (d as f32).sqrt());
    scores
}

/// Mean over the rows of `scores` (`[g][n]`) of their softmax.
pub(crate) fn mean_softmax(scores: &[f32], n: usize) -> Vec<f32> {
    let mut mean = vec![0.0_f64; n];
    for row in scores.chunks_exact(n) {
        let max = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let weights: Vec<f64> = row.iter().map(|score| f64::from(score - max).exp()).collect();
        let sum: f64 = weights.iter().sum();
        let rows = (scores.len() / n) as f64;
        mean.iter_mut().zip(weights).for_each(|(mean, weight)| *mean += weight / sum / rows);
    }
    mean.into_iter().map(|value| value as f32).collect()
}

/// Whether `chosen` are best by `scores`, up to a relative rounding of `1e-4`.
pub(crate) fn are_best(scores: &[f32], chosen: &[usize]) -> bool {
    let worst = chosen.iter().map(|id| scores[*id]).fold(f32::INFINITY, f32::min);
    let left_out = (0..scores.len()).filter(|id| !chosen.contains(id));
    left_out.map(|id| scores[id]).all(|score| score <= worst * 1.0001)
}
