//! Storage types to f32 and back.

use super::{Kernels, dispatch};
use crate::dtype::Dtype;

impl Kernels {
    /// Reads `dst.len()` stored values from `src`, at any alignment. Exact; the same on every path.
    ///
    /// # Panics
    /// Unless `src.len() == dst.len() * dtype.bytes()`.
    pub fn to_f32(self, dtype: Dtype, src: &[u8], dst: &mut [f32]) {
        assert_eq!(src.len(), dst.len() * dtype.bytes(), "to_f32: bytes of {} values of {dtype}", dst.len());
        dispatch!(self, to_f32(dtype, src, dst));
    }

    /// Stores `src.len()` values to `dst`, at any alignment, each rounded to the nearest, ties to even; too large ones become
    /// infinite, NaNs stay NaN. The same on every path.
    ///
    /// # Panics
    /// Unless `dst.len() == src.len() * dtype.bytes()`.
    pub fn from_f32(self, dtype: Dtype, src: &[f32], dst: &mut [u8]) {
        assert_eq!(
            dst.len(),
            src.len() * dtype.bytes(),
            "from_f32: bytes of {} values of {dtype}",
            src.len()
        );
        dispatch!(self, from_f32(dtype, src, dst));
    }
}
