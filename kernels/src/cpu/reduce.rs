//! Many values to one.

use super::{Kernels, dispatch};

impl Kernels {
    /// `Σ_j a_j·b_j`, in the order of [`Kernels::scores`].
    ///
    /// # Panics
    /// When the lengths differ.
    #[must_use]
    pub fn dot(self, a: &[f32], b: &[f32]) -> f32 {
        assert_eq!(a.len(), b.len(), "dot: two vectors of one length");
        dispatch!(self, dot(a, b))
    }

    /// The largest value; NaNs are passed over; `-inf` of nothing. The same on every path.
    #[must_use]
    pub fn max(self, values: &[f32]) -> f32 {
        dispatch!(self, max(values))
    }

    /// How many values are strictly above `threshold`; NaNs are not. The same on every path.
    #[must_use]
    pub fn count_above(self, values: &[f32], threshold: f32) -> usize {
        dispatch!(self, count_above(values, threshold))
    }

    /// `Σ_t exp(scores_t − max)`, to be called with the largest score; 0 if that is `-inf` (or of nothing). `-inf` entries add 0.
    #[must_use]
    pub fn exp_sum(self, scores: &[f32], max: f32) -> f32 {
        if max == f32::NEG_INFINITY {
            return 0.0;
        }
        dispatch!(self, exp_sum(scores, max))
    }
}
