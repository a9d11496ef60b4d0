//! Attention over scattered rows, and the merge of partial answers.

use super::convert::read;
use super::dequantise::dequantise;
use super::reduce::{exp_sum, max};
use super::score::dot_stored;
use crate::dtype::Dtype;
use crate::layout::{RowLayout, RowShape};
use crate::run::{AttendScratch, Run};

/// Every row of the runs, in order, as bytes.
///
/// # Safety
/// Each run's rows must be readable for as long as the iterator's items are used.
unsafe fn rows(runs: &[Run], row_bytes: usize) -> impl Iterator<Item = &[u8]> {
    runs.iter().flat_map(move |run| {
        (0..run.rows).map(move |row| {
            // SAFETY: the caller promises that `run.rows` rows of `row_bytes` bytes are readable from `rows_ptr`.
            unsafe { std::slice::from_raw_parts(run.rows_ptr.add(row * row_bytes), row_bytes) }
        })
    })
}

/// # Safety
/// As [`Kernels::scores`](crate::Kernels::scores).
pub(in crate::cpu) unsafe fn scores(
    dtype: Dtype,
    queries: &[f32],
    d: usize,
    runs: &[Run],
    out: &mut [f32],
    out_stride: usize,
) {
    // SAFETY: passed on to the caller.
    unsafe { shaped_scores(dtype, RowShape::pairs(d, dtype), queries, runs, out, out_stride) }
}

/// # Safety
/// As [`Kernels::scores_layout`](crate::Kernels::scores_layout), of plain rows.
unsafe fn shaped_scores(
    dtype: Dtype,
    shape: RowShape,
    queries: &[f32],
    runs: &[Run],
    out: &mut [f32],
    out_stride: usize,
) {
    // SAFETY: passed on to the caller.
    for (t, row) in unsafe { rows(runs, shape.row_bytes) }.enumerate() {
        for (h, query) in queries.chunks_exact(shape.keys).enumerate() {
            out[h * out_stride + t] = dot_stored(dtype, query, row);
        }
    }
}

/// # Safety
/// As [`Kernels::scores_layout`](crate::Kernels::scores_layout).
pub(in crate::cpu) unsafe fn scores_layout(
    layout: RowLayout,
    queries: &[f32],
    runs: &[Run],
    scratch: &mut AttendScratch,
    out: &mut [f32],
    out_stride: usize,
) {
    // SAFETY: passed on to the caller; dequantised rows live until the end.
    unsafe {
        if let Some((dtype, shape)) = layout.plain() {
            return shaped_scores(dtype, shape, queries, runs, out, out_stride);
        }
        let run = decoded(layout, runs, &mut scratch.rows);
        shaped_scores(Dtype::F32, layout.decoded(), queries, &[run], out, out_stride);
    }
}

/// All rows in f32, one after the other.
///
/// # Safety
/// Each run's rows are readable.
unsafe fn decoded(layout: RowLayout, runs: &[Run], to: &mut Vec<f32>) -> Run {
    let (bytes, values) = (layout.checked_row_bytes("decoded"), layout.decoded().row_bytes / 4);
    let n: usize = runs.iter().map(|run| run.rows).sum();
    to.resize(n * values, 0.0);
    // SAFETY: passed on to the caller.
    for (row, to) in unsafe { rows(runs, bytes) }.zip(to.chunks_exact_mut(values)) {
        layout.decode_row(row, to, dequantise);
    }
    Run::new(to.as_ptr().cast(), n)
}

/// # Safety
/// As [`Kernels::attend_layout`](crate::Kernels::attend_layout), of one row at least.
pub(in crate::cpu) unsafe fn attend_layout(
    layout: RowLayout,
    queries: &[f32],
    scale: f32,
    runs: &[Run],
    scratch: &mut AttendScratch,
    out: &mut [f32],
    lse: &mut [f32],
) {
    // SAFETY: passed on to the caller; dequantised rows live until the end.
    unsafe {
        if let Some((dtype, shape)) = layout.plain() {
            return shaped_attend(dtype, shape, queries, scale, runs, scratch, out, lse);
        }
        let mut rows = std::mem::take(&mut scratch.rows);
        let run = decoded(layout, runs, &mut rows);
        shaped_attend(Dtype::F32, layout.decoded(), queries, scale, &[run], scratch, out, lse);
        scratch.rows = rows;
    }
}

/// # Safety
/// As [`Kernels::attend`](crate::Kernels::attend), of one row at least.
#[allow(clippy::too_many_arguments)]
pub(in crate::cpu) unsafe fn attend(
    dtype: Dtype,
    queries: &[f32],
    d: usize,
    scale: f32,
    runs: &[Run],
    scratch: &mut AttendScratch,
    out: &mut [f32],
    lse: &mut [f32],
) {
    // SAFETY: passed on to the caller.
    unsafe { shaped_attend(dtype, RowShape::pairs(d, dtype), queries, scale, runs, scratch, out, lse) }
}

/// # Safety
/// As [`Kernels::attend_layout`](crate::Kernels::attend_layout), of one plain row at least.
#[allow(clippy::too_many_arguments)]
unsafe fn shaped_attend(
    dtype: Dtype,
    shape: RowShape,
    queries: &[f32],
    scale: f32,
    runs: &[Run],
    scratch: &mut AttendScratch,
    out: &mut [f32],
    lse: &mut [f32],
) {
    let n: usize = runs.iter().map(|run| run.rows).sum();
    let (weights, norms) = scratch.room(lse.len() * (n + 1)).split_at_mut(lse.len() * n);
    // SAFETY: passed on to the caller.
    unsafe { shaped_scores(dtype, shape, queries, runs, weights, n) };
    out.fill(0.0);
    for ((weights, lse), norm) in weights.chunks_exact_mut(n).zip(lse.iter_mut()).zip(norms.iter_mut()) {
        weights.iter_mut().for_each(|weight| *weight *= scale);
        let top = max(weights);
        if top == f32::NEG_INFINITY {
            weights.fill(0.0);
            (*lse, *norm) = (top, 0.0);
            continue;
        }
        let sum = exp_sum(weights, top);
        weights.iter_mut().for_each(|weight| *weight = (*weight - top).exp());
        *lse = top + sum.ln();
        *norm = 1.0 / sum;
    }
    let (size, d) = (dtype.bytes(), shape.values);
    // SAFETY: passed on to the caller.
    for (t, row) in unsafe { rows(runs, shape.row_bytes) }.enumerate() {
        for (j, bytes) in row[shape.column..][..d * size].chunks_exact(size).enumerate() {
            let value = read(dtype, bytes);
            for h in 0..lse.len() {
                out[h * d + j] += weights[h * n + t] * value;
            }
        }
    }
    for (out, norm) in out.chunks_exact_mut(d).zip(norms) {
        out.iter_mut().for_each(|value| *value *= *norm);
    }
}

pub(in crate::cpu) fn merge(o: &mut [f32], lse: &mut [f32], other_o: &[f32], other_lse: &[f32]) {
    let d = o.len() / lse.len();
    for (h, (lse, other)) in lse.iter_mut().zip(other_lse).enumerate() {
        let Some((kept, added, merged)) = merge_weights(*lse, *other) else { continue };
        for (o, other) in o[h * d..][..d].iter_mut().zip(&other_o[h * d..][..d]) {
            *o = *o * kept + other * added;
        }
        *lse = merged;
    }
}

/// The weights of two partial answers and the lse of their union; `None` where the second one covers nothing.
pub(in crate::cpu) fn merge_weights(lse: f32, other: f32) -> Option<(f32, f32, f32)> {
    if other == f32::NEG_INFINITY {
        return None;
    }
    let top = lse.max(other);
    let (a, b) = ((lse - top).exp(), (other - top).exp());
    let sum = a + b;
    Some((a / sum, b / sum, top + sum.ln()))
}
