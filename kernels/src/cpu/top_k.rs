//! The k best scores.

use super::{Kernels, dispatch};
use crate::run::TopKScratch;

impl Kernels {
    /// Puts the ids of the `k` largest scores into `out` (which is cleared), ascending. Of equal scores the lower id comes first; NaN
    /// counts as `-inf`, -0 as 0; `k >= scores.len()` gives every id. Exact, and the same on every path; allocates only while
    /// `scratch` and `out` grow.
    ///
    /// # Panics
    /// With more than `u32::MAX` scores.
    pub fn top_k(self, scores: &[f32], k: usize, scratch: &mut TopKScratch, out: &mut Vec<u32>) {
        let n = u32::try_from(scores.len()).expect("top_k: at most u32::MAX scores");
        out.clear();
        if k >= scores.len() {
            out.extend(0..n);
        } else if k > 0 {
            dispatch!(self, top_k(scores, k, scratch, out));
        }
    }
}
