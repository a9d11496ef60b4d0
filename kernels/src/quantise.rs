//! Rows in fewer bytes: the formats of tiers that keep them quantised, and the scalar twins of `kernels/cuda/dequantise.cu`.
//!
//! A quantised row stands for `n` values:
//!
//! | format | bytes | layout | a value |
//! |---|---|---|---|
//! | [`Format::Plain`] | `n` times those of the type | values | as stored |
//! | [`Format::Fp8`] | `n` | one byte each: sign, 4 bits of exponent (bias 7), 3 of mantissa; no infinities | as stored |
//! | [`Format::Int8`] | `n + 4` | `n` signed codes, then an f32 scale | `code · scale` |
//! | [`Format::Int4`] | `n/2 + 4·n/group` | codes, the even one in the low half of a byte; then for each group an f16 scale and an f16 zero | `code · scale + zero` |
//!
//! All numbers are little endian. Dequantisation is exact to the last bit on every processor: a product and a sum, each rounded to f32.

use std::fmt;
use std::str::FromStr;

use half::f16;

use crate::{Dtype, Kernels};

/// Largest value of an fp8 number.
const FP8_MAX: f32 = 448.0;

/// How the values of a row are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Format {
    /// Not quantised.
    Plain(Dtype),
    /// 8-bit floating point, e4m3: relative error at most 1/16 down to 2⁻⁶. Values beyond ±448 become ±448.
    Fp8,
    /// 8-bit integers with one scale per row: error at most 1/254 of the row's largest magnitude.
    Int8,
    /// 4-bit integers with a scale and a zero for each group of this many values, 32 or 64: error about 1/30 of the group's range.
    Int4 {
        /// Values that share a scale and a zero.
        group: usize,
    },
}

impl From<Dtype> for Format {
    fn from(dtype: Dtype) -> Self {
        Self::Plain(dtype)
    }
}

impl Format {
    /// Every format, in the order of their codes.
    pub const ALL: [Self; 7] = [
        Self::Plain(Dtype::F32),
        Self::Plain(Dtype::F16),
        Self::Plain(Dtype::Bf16),
        Self::Fp8,
        Self::Int8,
        Self::Int4 { group: 32 },
        Self::Int4 { group: 64 },
    ];

    /// The number that stands for the format in binary formats: for plain values that of their type; never changes. An `Int4` of a group
    /// that there is not has the code of 64.
    #[must_use]
    pub const fn code(self) -> u8 {
        match self {
            Self::Plain(dtype) => dtype.code(),
            Self::Fp8 => 3,
            Self::Int8 => 4,
            Self::Int4 { group: 32 } => 5,
            Self::Int4 { .. } => 6,
        }
    }

    /// The inverse of [`Format::code`]; `None` for a code that stands for nothing.
    #[must_use]
    pub fn from_code(code: u8) -> Option<Self> {
        Self::ALL.get(usize::from(code)).copied()
    }

    /// The number that stands for the format in GPU kernels, which are told the group besides: for plain values that of their type.
    #[must_use]
    pub const fn kernel_code(self) -> u8 {
        match self {
            Self::Int4 { .. } => 5,
            _ => self.code(),
        }
    }

    /// Values that share a scale; 0 where there is no scale, or one per row.
    #[must_use]
    pub const fn group(self) -> usize {
        match self {
            Self::Int4 { group } => group,
            _ => 0,
        }
    }

    /// Bytes of a row of `n` values. `None` where the format has no such rows: `n` must be a multiple of 4, and of the group, which is 32
    /// or 64.
    #[must_use]
    pub const fn row_bytes(self, n: usize) -> Option<usize> {
        if !n.is_multiple_of(4) {
            return None;
        }
        match self {
            Self::Plain(dtype) => Some(n * dtype.bytes()),
            Self::Fp8 => Some(n),
            Self::Int8 => Some(n + 4),
            Self::Int4 { group: group @ (32 | 64) } if n.is_multiple_of(group) => Some(n / 2 + n / group * 4),
            Self::Int4 { .. } => None,
        }
    }

    fn checked_row_bytes(self, what: &str, n: usize, bytes: usize) {
        assert_eq!(self.row_bytes(n), Some(bytes), "{what}: bytes of a row of {n} values as {self:?}");
    }

    /// Stores a row. Values are finite; a NaN or an infinity stays one in plain formats only.
    ///
    /// # Panics
    /// Unless `row` has the bytes that [`Format::row_bytes`] gives.
    pub fn quantise(self, values: &[f32], row: &mut [u8]) {
        self.checked_row_bytes("quantise", values.len(), row.len());
        match self {
            Self::Plain(dtype) => Kernels::best().from_f32(dtype, values, row),
            Self::Fp8 => row.iter_mut().zip(values).for_each(|(code, value)| *code = to_fp8(*value)),
            Self::Int8 => {
                let largest = values.iter().fold(0.0_f32, |largest, value| largest.max(value.abs()));
                let scale = largest / 127.0;
                let (codes, stored) = row.split_at_mut(values.len());
                stored.copy_from_slice(&scale.to_le_bytes());
                for (code, value) in codes.iter_mut().zip(values) {
                    let steps = if scale > 0.0 { value / scale } else { 0.0 };
                    *code = (steps.round_ties_even().clamp(-127.0, 127.0) as i8).cast_unsigned();
                }
            }
            Self::Int4 { group } => {
                let (codes, scales) = row.split_at_mut(values.len() / 2);
                for ((values, codes), scales) in values
                    .chunks_exact(group)
                    .zip(codes.chunks_exact_mut(group / 2))
                    .zip(scales.chunks_exact_mut(4))
                {
                    quantise_group(values, codes, scales);
                }
            }
        }
    }

    /// Reads a row.
    ///
    /// # Panics
    /// Unless `row` has the bytes that [`Format::row_bytes`] gives.
    pub fn dequantise(self, row: &[u8], values: &mut [f32]) {
        self.checked_row_bytes("dequantise", values.len(), row.len());
        Kernels::best().dequantise(self, row, values);
    }
}

impl fmt::Display for Format {
    /// `f32`, `f16`, `bf16`, `fp8-e4m3`, `int8`, `int4-g32` or `int4-g64`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Plain(dtype) => f.pad(dtype.name()),
            Self::Fp8 => f.pad("fp8-e4m3"),
            Self::Int8 => f.pad("int8"),
            Self::Int4 { group } => f.pad(&format!("int4-g{group}")),
        }
    }
}

/// A text that names no format.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("'{text}' is no format of rows; use f32, f16, bf16, fp8-e4m3, int8, int4-g32 or int4-g64")]
pub struct UnknownFormat {
    /// What was given.
    pub text: String,
}

impl FromStr for Format {
    type Err = UnknownFormat;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let named = Self::ALL.into_iter().find(|format| format.to_string().eq_ignore_ascii_case(text));
        named.ok_or_else(|| UnknownFormat { text: text.to_owned() })
    }
}

/// Scale and zero of a group.
pub(crate) fn group_scale(bytes: &[u8]) -> (f32, f32) {
    (f16::from_le_bytes([bytes[0], bytes[1]]).to_f32(), f16::from_le_bytes([bytes[2], bytes[3]]).to_f32())
}

fn quantise_group(values: &[f32], codes: &mut [u8], scales: &mut [u8]) {
    let min = values.iter().copied().fold(f32::INFINITY, f32::min);
    let max = values.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    // Codes are chosen for the scale and zero as they are stored; beyond the range of f16 they would be infinite.
    let stored = |value: f32| f16::from_f32(value.clamp(-65504.0, 65504.0)).to_le_bytes();
    scales[..2].copy_from_slice(&stored((max - min) / 15.0));
    scales[2..].copy_from_slice(&stored(min));
    let (scale, zero) = group_scale(scales);
    let code = |value: f32| {
        let steps = if scale > 0.0 { (value - zero) / scale } else { 0.0 };
        steps.round_ties_even().clamp(0.0, 15.0) as u8
    };
    for (pair, values) in codes.iter_mut().zip(values.chunks_exact(2)) {
        *pair = code(values[0]) | code(values[1]) << 4;
    }
}

/// The nearest fp8 number, ties to even; ±448 beyond it, NaN for NaN.
fn to_fp8(value: f32) -> u8 {
    let sign = u8::from(value.is_sign_negative()) << 7;
    if value.is_nan() {
        return sign | 0x7f;
    }
    let magnitude = value.abs().min(FP8_MAX);
    // Steps are 2^-9 below 2^-6, and an eighth of the power of two above; a carry goes on into the exponent, as it should.
    let exponent = ((magnitude.to_bits() >> 23) as i32 - 127).max(-6);
    let steps = (magnitude * 2_f32.powi(3 - exponent)).round_ties_even() as i32;
    sign | (steps + (exponent + 6) * 8) as u8
}

pub(crate) fn from_fp8(code: u8) -> f32 {
    if code & 0x7f == 0x7f {
        return f32::NAN;
    }
    let (exponent, mantissa) = (i32::from(code >> 3 & 15), f32::from(code & 7));
    let magnitude =
        if exponent == 0 { mantissa * 2_f32.powi(-9) } else { (8.0 + mantissa) * 2_f32.powi(exponent - 10) };
    if code & 0x80 != 0 { -magnitude } else { magnitude }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn round_trip(format: Format, values: &[f32]) -> Vec<f32> {
        let mut row = vec![0; format.row_bytes(values.len()).unwrap()];
        format.quantise(values, &mut row);
        let mut read = vec![f32::NAN; values.len()];
        format.dequantise(&row, &mut read);
        read
    }

    proptest! {
        #[test]
        fn errors_stay_within_half_a_step(values in proptest::collection::vec(-300_f32..300.0, 64)) {
            let largest = values.iter().fold(0_f32, |a, b| a.max(b.abs()));
            for (value, read) in values.iter().zip(round_trip(Format::Int8, &values)) {
                prop_assert!((value - read).abs() <= largest / 127.0 * 0.5001, "{value} became {read}");
            }
            for (value, read) in values.iter().zip(round_trip(Format::Fp8, &values)) {
                prop_assert!((value - read).abs() <= (value.abs() / 16.0).max(2_f32.powi(-10)));
            }
            for group in [32, 64] {
                let format = Format::Int4 { group };
                for (values, read) in values.chunks(group).zip(round_trip(format, &values).chunks(group)) {
                    let min = values.iter().copied().fold(f32::INFINITY, f32::min);
                    let max = values.iter().copied().fold(f32::NEG_INFINITY, f32::max);
                    // Scale and zero are rounded to f16 themselves.
                    let bound = (max - min) / 15.0 * 0.51 + min.abs().max(max.abs()) * 2_f32.powi(-10);
                    for (value, read) in values.iter().zip(read) {
                        prop_assert!((value - read).abs() <= bound, "{value} became {read} in {min}..{max}");
                    }
                }
            }
        }
    }

    #[test]
    fn every_fp8_number_comes_back_as_itself() {
        for code in 0..=u8::MAX {
            let value = from_fp8(code);
            assert!(value.is_nan() || to_fp8(value) == code, "{code:#x} stands for {value}");
        }
        assert_eq!((from_fp8(0x7e), from_fp8(0x38), from_fp8(0x01)), (448.0, 1.0, 2_f32.powi(-9)));
        assert_eq!((to_fp8(1e9), to_fp8(f32::NEG_INFINITY)), (0x7e, 0xfe));
        // A tie goes to the even mantissa, also across a power of two.
        assert_eq!((to_fp8(1.0625), to_fp8(1.1875), to_fp8(1.9375)), (0x38, 0x3a, 0x40));
        assert!(from_fp8(to_fp8(f32::NAN)).is_nan());
    }

    #[test]
    fn rows_of_one_value_and_of_none_are_exact() {
        for format in [Format::Int8, Format::Fp8, Format::Int4 { group: 32 }, Format::Plain(Dtype::Bf16)] {
            for value in [0.0, 2.0, -0.5] {
                assert!(
                    round_trip(format, &[value; 32])
                        .iter()
                        .all(|read| (read - value).abs() <= value.abs() * 1e-6)
                );
            }
            assert_eq!(round_trip(format, &[]), []);
        }
    }

    #[test]
    fn names_and_codes_come_back_as_the_format_they_stand_for() {
        for (code, format) in (0..).zip(Format::ALL) {
            assert_eq!((format.code(), Format::from_code(code)), (code, Some(format)));
            assert_eq!(format.to_string().parse(), Ok(format));
        }
        assert_eq!(Format::from_code(7), None);
        let error = "int4".parse::<Format>().unwrap_err().to_string();
        assert!(error.starts_with("'int4' is no format"), "{error}");
    }

    #[test]
    fn rows_that_a_format_does_not_have_are_told_apart() {
        assert_eq!(Format::Int8.row_bytes(128), Some(132));
        assert_eq!(Format::Int4 { group: 32 }.row_bytes(128), Some(80));
        assert_eq!(Format::Int4 { group: 64 }.row_bytes(96), None);
        assert_eq!(Format::Int4 { group: 16 }.row_bytes(64), None);
        assert_eq!(Format::Fp8.row_bytes(6), None);
    }
}
