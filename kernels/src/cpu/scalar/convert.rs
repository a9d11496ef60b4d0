//! Storage types to f32 and back.

use half::f16;

use crate::dtype::Dtype;

/// One stored value as f32; `bytes` holds exactly one.
#[inline]
pub(super) fn read(dtype: Dtype, bytes: &[u8]) -> f32 {
    match dtype {
        Dtype::F32 => f32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]),
        Dtype::F16 => f16::from_le_bytes([bytes[0], bytes[1]]).to_f32(),
        Dtype::Bf16 => f32::from_bits(u32::from(u16::from_le_bytes([bytes[0], bytes[1]])) << 16),
    }
}

/// An f32 rounded to the nearest bf16, ties to even; a NaN stays one.
#[inline]
fn to_bf16(value: f32) -> u16 {
    let bits = value.to_bits();
    if value.is_nan() {
        return (bits >> 16) as u16 | 0x40;
    }
    // Half a step less one, plus the last bit that stays: rounds up from above half, and at half only to even.
    ((bits + 0x7fff + ((bits >> 16) & 1)) >> 16) as u16
}

/// Stores one value; `bytes` holds exactly one.
#[inline]
pub(super) fn write(dtype: Dtype, value: f32, bytes: &mut [u8]) {
    match dtype {
        Dtype::F32 => bytes.copy_from_slice(&value.to_le_bytes()),
        Dtype::F16 => bytes.copy_from_slice(&f16::from_f32(value).to_le_bytes()),
        Dtype::Bf16 => bytes.copy_from_slice(&to_bf16(value).to_le_bytes()),
    }
}

pub(in crate::cpu) fn to_f32(dtype: Dtype, src: &[u8], dst: &mut [f32]) {
    for (value, bytes) in dst.iter_mut().zip(src.chunks_exact(dtype.bytes())) {
        *value = read(dtype, bytes);
    }
}

pub(in crate::cpu) fn from_f32(dtype: Dtype, src: &[f32], dst: &mut [u8]) {
    for (value, bytes) in src.iter().zip(dst.chunks_exact_mut(dtype.bytes())) {
        write(dtype, *value, bytes);
    }
}
