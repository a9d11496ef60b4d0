//! Quantised rows to f32.

use super::convert;
use crate::quantise::{Format, from_fp8, group_scale};

pub(in crate::cpu) fn dequantise(format: Format, row: &[u8], values: &mut [f32]) {
    match format {
        Format::Plain(dtype) => convert::to_f32(dtype, row, values),
        Format::Fp8 => values.iter_mut().zip(row).for_each(|(value, code)| *value = from_fp8(*code)),
        Format::Int8 => {
            let (codes, scale) = row.split_at(values.len());
            let scale = f32::from_le_bytes([scale[0], scale[1], scale[2], scale[3]]);
            for (value, code) in values.iter_mut().zip(codes) {
                *value = f32::from(code.cast_signed()) * scale;
            }
        }
        Format::Int4 { group } => {
            let (codes, scales) = row.split_at(values.len() / 2);
            for (j, value) in values.iter_mut().enumerate() {
                let code = codes[j / 2] >> (j % 2 * 4) & 15;
                let (scale, zero) = group_scale(&scales[j / group * 4..][..4]);
                *value = f32::from(code) * scale + zero;
            }
        }
    }
}
