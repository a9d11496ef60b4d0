//! Storage types to f32 and back.

use super::Simd;
use super::stored::{Stored, by_dtype};
use crate::dtype::Dtype;

#[inline(always)]
pub(super) fn to_f32<S: Simd>(s: S, dtype: Dtype, src: &[u8], dst: &mut [f32]) {
    by_dtype!(dtype, read(s, src, dst));
}

#[inline(always)]
fn read<S: Simd, E: Stored>(s: S, src: &[u8], dst: &mut [f32]) {
    for (dst, src) in dst.chunks_mut(S::LANES).zip(src.chunks(S::LANES * E::BYTES)) {
        let n = dst.len();
        // SAFETY: both chunks hold n values; only a full chunk is loaded whole.
        let v = unsafe {
            if n == S::LANES { E::load(s, src.as_ptr()) } else { E::load_part(s, src.as_ptr(), n) }
        };
        s.store(v, dst);
    }
}

#[inline(always)]
pub(super) fn from_f32<S: Simd>(s: S, dtype: Dtype, src: &[f32], dst: &mut [u8]) {
    by_dtype!(dtype, write(s, src, dst));
}

#[inline(always)]
fn write<S: Simd, E: Stored>(s: S, src: &[f32], dst: &mut [u8]) {
    for (src, dst) in src.chunks(S::LANES).zip(dst.chunks_mut(S::LANES * E::BYTES)) {
        let (n, v) = (src.len(), s.load(src));
        // SAFETY: both chunks hold n values; only a full chunk is stored whole.
        unsafe {
            if n == S::LANES {
                E::store(s, v, dst.as_mut_ptr());
            } else {
                E::store_part(s, v, dst.as_mut_ptr(), n);
            }
        }
    }
}
