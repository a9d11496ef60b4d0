//! Low-rank factors of a prompt's keys: what stays on the device in place of the keys themselves.
//!
//! The keys of a layer *before* RoPE, all KV heads side by side, are `K ∈ [n, Hkv·d]`. Of its singular value decomposition
//! `K = U Σ Vᵀ` the first `r` terms are kept, as `A = K V_r = U_r Σ_r ∈ [n, r]` and `V_rᵀ ∈ [r, Hkv·d]`: no other matrix of rank `r`
//! is closer (Eckart and Young, 1936), and the error is the root of the squared singular values that are left out.

use nalgebra::{DMatrix, SymmetricEigen};

use crate::budget::Budget;

/// The factors of one layer of one sequence.
#[derive(Debug, Clone, PartialEq)]
pub struct Factors {
    rank: usize,
    head_dim: usize,
    width: usize,
    /// `A`, `[n][rank]`.
    left: Vec<f32>,
    /// `V_rᵀ`, `[rank][width]`.
    right: Vec<f32>,
    /// Every singular value of the keys, largest first.
    singular_values: Vec<f64>,
}

impl Factors {
    /// Factors of `keys` before RoPE, `[n][Hkv·d]`, of the rank that `rank` makes of `Hkv·d`: at least 1, at most all.
    ///
    /// # Panics
    /// Where `width` does not divide the keys, `head_dim` not the width, or either is 0.
    #[must_use]
    pub fn new(keys: &[f32], width: usize, head_dim: usize, rank: Budget) -> Self {
        assert!(width > 0 && keys.len().is_multiple_of(width), "{} values in rows of {width}", keys.len());
        assert!(head_dim > 0 && width.is_multiple_of(head_dim), "rows of {width} for heads of {head_dim}");
        let rank = rank.rows_of(width).clamp(1, width);
        // KᵀK has K's right singular vectors, and as many rows as K has columns: far fewer than tokens.
        let mut gram = vec![0.0_f64; width * width];
        let mut row = vec![0.0_f64; width];
        for key in keys.chunks_exact(width) {
            row.iter_mut().zip(key).for_each(|(wide, value)| *wide = f64::from(*value));
            for (i, sums) in gram.chunks_exact_mut(width).enumerate() {
                let factor = row[i];
                sums[i..].iter_mut().zip(&row[i..]).for_each(|(sum, value)| *sum += factor * value);
            }
        }
        let gram = DMatrix::from_fn(width, width, |i, j| gram[i.min(j) * width + i.max(j)]);
        let eigen = SymmetricEigen::new(gram);
        let mut order: Vec<usize> = (0..width).collect();
        order.sort_by(|a, b| eigen.eigenvalues[*b].total_cmp(&eigen.eigenvalues[*a]));
        let singular_values = order.iter().map(|at| eigen.eigenvalues[*at].max(0.0).sqrt()).collect();
        let right: Vec<f32> = order[..rank]
            .iter()
            .flat_map(|column| {
                eigen.eigenvectors.column(*column).iter().map(|x| *x as f32).collect::<Vec<_>>()
            })
            .collect();
        let kernels = kvoyant_kernels::Kernels::best();
        let left = keys
            .chunks_exact(width)
            .flat_map(|key| right.chunks_exact(width).map(move |vector| kernels.dot(key, vector)))
            .collect();
        Self { rank, head_dim, width, left, right, singular_values }
    }

    /// Terms kept.
    #[must_use]
    pub fn rank(&self) -> usize {
        self.rank
    }

    /// Tokens that it has keys of.
    #[must_use]
    pub fn tokens(&self) -> usize {
        self.left.len() / self.rank
    }

    /// Bytes on the device, at two for each value.
    #[must_use]
    pub fn device_bytes(&self) -> usize {
        2 * (self.left.len() + self.right.len())
    }

    /// Root of the sum of the squared errors of all values, which no other factors of this rank fall below.
    #[must_use]
    pub fn error(&self) -> f64 {
        self.singular_values[self.rank..].iter().map(|value| value * value).sum::<f64>().sqrt()
    }

    /// The same as a share of the keys' own norm; 0 for keys that are all zero.
    #[must_use]
    pub fn relative_error(&self) -> f64 {
        let all = self.singular_values.iter().map(|value| value * value).sum::<f64>().sqrt();
        if all > 0.0 { self.error() / all } else { 0.0 }
    }

    /// The key of a token before RoPE, `[d]`.
    ///
    /// # Panics
    /// Where there is no such token or head, or `key` is not `[d]`.
    pub fn rebuild(&self, token: usize, kv_head: usize, key: &mut [f32]) {
        assert_eq!(key.len(), self.head_dim, "a key of {} values", self.head_dim);
        key.fill(0.0);
        let weights = &self.left[token * self.rank..(token + 1) * self.rank];
        let columns = kv_head * self.head_dim..(kv_head + 1) * self.head_dim;
        for (weight, vector) in weights.iter().zip(self.right.chunks_exact(self.width)) {
            let vector = &vector[columns.clone()];
            key.iter_mut().zip(vector).for_each(|(sum, value)| *sum += weight * value);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{Rng, matmul};

    const WIDTH: usize = 16;

    fn rank(rank: usize) -> Budget {
        Budget::rows(rank).unwrap()
    }

    fn rebuilt(factors: &Factors) -> Vec<f32> {
        let mut all = vec![0.0; factors.tokens() * WIDTH];
        for (token, row) in all.chunks_exact_mut(WIDTH).enumerate() {
            row.chunks_exact_mut(8).enumerate().for_each(|(head, key)| factors.rebuild(token, head, key));
        }
        all
    }

    fn distance(a: &[f32], b: &[f32]) -> f64 {
        a.iter().zip(b).map(|(a, b)| f64::from(a - b).powi(2)).sum::<f64>().sqrt()
    }

    #[test]
    fn the_error_is_that_of_the_singular_values_left_out_and_falls_with_the_rank() {
        let keys = Rng::new(1).normal(100 * WIDTH);
        let mut last = f64::INFINITY;
        for r in [1, 3, 8, 15, 16] {
            let factors = Factors::new(&keys, WIDTH, 8, rank(r));
            let error = distance(&rebuilt(&factors), &keys);
            assert!((error - factors.error()).abs() < 1e-3, "rank {r}: {error} and {}", factors.error());
            assert!(error < last);
            last = error;
        }
        assert!(last < 1e-3, "the full rank rebuilds every key");
    }

    #[test]
    fn keys_of_low_rank_are_rebuilt_exactly_and_others_are_not() {
        let mut rng = Rng::new(2);
        let keys = matmul(&rng.normal(60 * 4), &rng.normal(4 * WIDTH), 60, 4, WIDTH);
        let exact = Factors::new(&keys, WIDTH, 8, rank(4));
        assert!(exact.relative_error() < 1e-6 && distance(&rebuilt(&exact), &keys) < 1e-3);
        assert!(Factors::new(&keys, WIDTH, 8, rank(3)).relative_error() > 1e-3);
    }

    #[test]
    fn ranks_are_kept_within_the_width_and_odd_keys_do_no_harm() {
        let keys = Rng::new(3).normal(3 * WIDTH);
        assert_eq!(Factors::new(&keys, WIDTH, 8, rank(160)).rank(), WIDTH);
        assert_eq!(Factors::new(&keys, WIDTH, 8, Budget::share(0.5).unwrap()).rank(), WIDTH / 2);
        let zeros = Factors::new(&[0.0; 2 * WIDTH], WIDTH, 8, rank(2));
        assert_eq!((zeros.relative_error(), zeros.tokens()), (0.0, 2));
        assert!(rebuilt(&zeros).iter().all(|value| *value == 0.0));
        let none = Factors::new(&[], WIDTH, 8, rank(2));
        assert_eq!(none.tokens(), 0);
    }
}
