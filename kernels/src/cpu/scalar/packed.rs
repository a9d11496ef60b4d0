//! Products of quantised matrices.

use std::ops::Range;

use half::f16;

use crate::packed::{BLOCK, Codes, OFFSET, PANEL, PackedMatrix, QuantisedRows, STEP};

pub(in crate::cpu) fn quantise_rows(x: &[f32], columns: usize, to: &mut QuantisedRows) {
    to.set(x, columns);
}

pub(in crate::cpu) fn multiply_packed(
    matrix: &PackedMatrix,
    panels: Range<usize>,
    x: &QuantisedRows,
    out: &mut [f32],
) {
    let rows = x.rows();
    for (panel, out) in panels.zip(out.chunks_mut(PANEL * rows)) {
        for (lane, out) in out.chunks_exact_mut(rows).enumerate() {
            out.iter_mut().enumerate().for_each(|(t, out)| *out = dot(matrix, (panel, lane), x, t));
        }
    }
}

/// A row of the matrix, by panel and place in it, with vector `t`.
fn dot(matrix: &PackedMatrix, (panel, lane): (usize, usize), x: &QuantisedRows, t: usize) -> f32 {
    let (blocks, lines, parts) = (matrix.columns() / BLOCK, matrix.codes().lines(), matrix.parts());
    let half = |values: &[u16], block: usize| f16::from_bits(values[block * PANEL + lane]).to_f32();
    let mut sum = 0.0_f32;
    for b in 0..blocks {
        let (block, of_x) = (panel * blocks + b, t * blocks + b);
        let codes = &x.codes[of_x * BLOCK..][..BLOCK];
        let mut products = 0;
        for (s, line) in parts.lines[block * lines..][..lines].iter().enumerate() {
            for (i, byte) in line.0[lane * STEP..][..STEP].iter().enumerate() {
                let (byte, column) = (i32::from(*byte), s * STEP + i);
                products += match matrix.codes() {
                    Codes::Four => {
                        (byte & 15) * i32::from(codes[column])
                            + (byte >> 4) * i32::from(codes[BLOCK / 2 + column])
                    }
                    Codes::Eight => (byte - OFFSET) * i32::from(codes[column]),
                };
            }
        }
        sum = half(parts.scales, block).mul_add(products as f32 * x.scales[of_x], sum);
        if matrix.codes() == Codes::Four {
            sum = half(parts.mins, block).mul_add(x.totals[of_x], sum);
        }
    }
    sum
}
