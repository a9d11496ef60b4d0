//! Scores of digests, and the digests themselves.

use super::convert::{read, write};
use super::reduce::sum_by;
use crate::dtype::Dtype;

pub(in crate::cpu) fn score_columns(
    dtype: Dtype,
    queries: &[f32],
    group: usize,
    block: &[u8],
    tokens: usize,
    out: &mut [f32],
    out_stride: usize,
) {
    let dims = queries.len() / group;
    let size = dtype.bytes();
    for (h, query) in queries.chunks_exact(dims).enumerate() {
        let out = &mut out[h * out_stride..][..tokens];
        out.fill(0.0);
        for (q, values) in query.iter().zip(block.chunks_exact(tokens * size)) {
            for (score, bytes) in out.iter_mut().zip(values.chunks_exact(size)) {
                *score += q * read(dtype, bytes);
            }
        }
    }
}

pub(in crate::cpu) fn page_bounds(queries: &[f32], group: usize, minmax: &[f32], out: &mut [f32]) {
    let d = queries.len() / group;
    let (min, max) = minmax.split_at(d);
    for (query, bound) in queries.chunks_exact(d).zip(out) {
        // One factor is chosen instead of the larger of two products: the same value, and each term is then rounded as in `dot`.
        *bound = sum_by(d, |j| query[j] * if query[j] >= 0.0 { max[j] } else { min[j] });
    }
}

pub(in crate::cpu) fn min_max_update(rows: &[f32], d: usize, minmax: &mut [f32]) {
    let (min, max) = minmax.split_at_mut(d);
    for row in rows.chunks_exact(d) {
        for (j, value) in row.iter().enumerate() {
            min[j] = min[j].min(*value);
            max[j] = max[j].max(*value);
        }
    }
}

pub(in crate::cpu) fn project(x: &[f32], a: &[f32], out: &mut [f32]) {
    out.fill(0.0);
    for (x, row) in x.iter().zip(a.chunks_exact(out.len())) {
        for (sum, a) in out.iter_mut().zip(row) {
            *sum += x * a;
        }
    }
}

#[allow(clippy::too_many_arguments)]
pub(in crate::cpu) fn project_columns(
    rows: &[f32],
    a: &[f32],
    d_out: usize,
    dtype: Dtype,
    block: &mut [u8],
    tokens: usize,
    first: usize,
) {
    let d_in = a.len() / d_out;
    let size = dtype.bytes();
    let most = most(dtype);
    for (i, row) in rows.chunks_exact(d_in).enumerate() {
        for j in 0..d_out {
            let value = row.iter().enumerate().fold(0.0, |sum, (c, x)| sum + x * a[c * d_out + j]);
            write(dtype, value.clamp(-most, most), &mut block[(j * tokens + first + i) * size..][..size]);
        }
    }
}

/// What digests have of larger values: an infinity would leave nothing of the row's score.
pub(in crate::cpu) fn most(dtype: Dtype) -> f32 {
    match dtype {
        Dtype::F16 => half::f16::MAX.to_f32(),
        Dtype::Bf16 => half::bf16::MAX.to_f32(),
        Dtype::F32 => f32::MAX,
    }
}

/// A query against a stored row, in the order of `dot`.
pub(super) fn dot_stored(dtype: Dtype, query: &[f32], row: &[u8]) -> f32 {
    match dtype {
        Dtype::F32 => sum_by(query.len(), |j| query[j] * read(Dtype::F32, &row[j * 4..][..4])),
        Dtype::F16 => sum_by(query.len(), |j| query[j] * read(Dtype::F16, &row[j * 2..][..2])),
        Dtype::Bf16 => sum_by(query.len(), |j| query[j] * read(Dtype::Bf16, &row[j * 2..][..2])),
    }
}

#[cfg(test)]
mod tests {
    use super::super::reduce::dot;
    use super::*;

    #[test]
    fn a_stored_row_gives_the_same_dot_as_its_values() {
        let query: Vec<f32> = (0_u8..13).map(|j| f32::from(j) * 0.37 - 2.0).collect();
        let row: Vec<f32> = (0_u8..13).map(|j| 1.5 - f32::from(j) * 0.21).collect();
        let bytes: Vec<u8> = row.iter().flat_map(|value| value.to_le_bytes()).collect();
        assert_eq!(dot_stored(Dtype::F32, &query, &bytes), dot(&query, &row));
    }
}
