//! Quantised rows to f32: the products and sums of the scalar twin, several at once.

use super::Simd;
use crate::cpu::scalar;
use crate::quantise::{Format, group_scale};

#[inline(always)]
pub(super) fn dequantise<S: Simd>(s: S, format: Format, row: &[u8], values: &mut [f32]) {
    let n = values.len();
    match format {
        Format::Plain(dtype) => super::convert::to_f32(s, dtype, row, values),
        Format::Fp8 => {
            let whole = n - n % S::LANES;
            for at in (0..whole).step_by(S::LANES) {
                // SAFETY: the row holds a byte for each value, and a register of them from `at` on.
                let v = unsafe { s.load_fp8(row.as_ptr().add(at)) };
                s.store(v, &mut values[at..]);
            }
            scalar::dequantise(format, &row[whole..], &mut values[whole..]);
        }
        Format::Int8 => {
            let (codes, scale) = row.split_at(n);
            let scale = f32::from_le_bytes([scale[0], scale[1], scale[2], scale[3]]);
            let (whole, scales) = (n - n % S::LANES, s.splat(scale));
            for at in (0..whole).step_by(S::LANES) {
                // SAFETY: as above.
                let v = unsafe { s.load_i8(codes.as_ptr().add(at)) };
                s.store(s.mul(v, scales), &mut values[at..]);
            }
            for (value, code) in values[whole..].iter_mut().zip(&codes[whole..]) {
                *value = f32::from(code.cast_signed()) * scale;
            }
        }
        Format::Int4 { group } => {
            let (codes, scales) = row.split_at(n / 2);
            let groups = values.chunks_exact_mut(group).zip(codes.chunks_exact(group / 2));
            for ((values, codes), scales) in groups.zip(scales.chunks_exact(4)) {
                let (scale, zero) = group_scale(scales);
                let (scale, zero) = (s.splat(scale), s.splat(zero));
                // A group is a whole number of registers.
                for at in (0..group).step_by(S::LANES) {
                    // SAFETY: the group has two codes to a byte, and a register of them from `at` on.
                    let v = unsafe { s.load_u4(codes.as_ptr().add(at / 2)) };
                    s.store(s.add(s.mul(v, scale), zero), &mut values[at..]);
                }
            }
        }
    }
}
