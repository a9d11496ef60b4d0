//! Attention over rows of any layout: plain ones and pairs in 8 bits where they lie, others a chunk at a time, dequantised to memory that
//! stays in the second-level cache.

use super::Simd;
use super::attend::{Attention, all_scores, attend_rows};
use super::dequantise::dequantise;
use super::rows::{Ahead, Chunk, Rows, chunk_rows};
use super::stored::{F32, Int8, by_dtype};
use crate::layout::RowLayout;
use crate::run::{AttendScratch, Run};

/// Goes through the rows of all runs, a chunk of dequantised ones at a time.
struct Decoded<'a> {
    layout: RowLayout,
    row_bytes: usize,
    rows: Rows<'a>,
    now: Chunk,
    coming: Chunk,
}

impl<'a> Decoded<'a> {
    #[inline(always)]
    fn new(layout: RowLayout, runs: &'a [Run]) -> Self {
        let row_bytes = layout.checked_row_bytes("attend_layout");
        let mut rows = Rows::new(runs, row_bytes, chunk_rows(layout.decoded().row_bytes));
        let mut coming = Chunk::EMPTY;
        rows.fill(&mut coming);
        Self { layout, row_bytes, rows, now: Chunk::EMPTY, coming }
    }

    /// The next chunk's rows, as they are read from `to`; of none after the last one.
    ///
    /// # Safety
    /// Each run's rows are readable.
    #[inline(always)]
    unsafe fn next<S: Simd>(&mut self, s: S, to: &mut [f32]) -> Run {
        std::mem::swap(&mut self.now, &mut self.coming);
        self.rows.fill(&mut self.coming);
        for (row, to) in self.now.rows().iter().zip(to.chunks_exact_mut(self.layout.decoded().row_bytes / 4))
        {
            // SAFETY: the caller promises that the runs' rows, of which this is one, are readable.
            let row = unsafe { std::slice::from_raw_parts(*row, self.row_bytes) };
            self.layout.decode_row(row, to, |format, row, to| dequantise(s, format, row, to));
        }
        Run::new(to.as_ptr().cast(), self.now.rows().len())
    }

    /// The rows after those.
    #[inline(always)]
    fn ahead(&self) -> Ahead<'_> {
        Ahead::new(&self.coming, self.row_bytes)
    }
}

/// Memory for a chunk of dequantised rows.
#[inline(always)]
fn chunk_of(layout: RowLayout, rows: &mut Vec<f32>) -> &mut [f32] {
    let row_bytes = layout.decoded().row_bytes;
    let values = chunk_rows(row_bytes) * row_bytes / 4;
    if rows.len() < values {
        rows.resize(values, 0.0);
    }
    &mut rows[..values]
}

/// # Safety
/// As [`Kernels::attend_layout`](crate::Kernels::attend_layout).
#[inline(always)]
#[allow(clippy::too_many_arguments)]
pub(super) unsafe fn attend_layout<S: Simd>(
    s: S,
    layout: RowLayout,
    queries: &[f32],
    scale: f32,
    runs: &[Run],
    scratch: &mut AttendScratch,
    out: &mut [f32],
    lse: &mut [f32],
) {
    if let Some((dtype, shape)) = layout.plain() {
        // SAFETY: passed on to the caller.
        return unsafe { by_dtype!(dtype, attend_rows(s, shape, queries, scale, runs, scratch, out, lse)) };
    }
    if let Some(shape) = layout.pairs_in_8_bits() {
        // SAFETY: as above.
        return unsafe { attend_rows::<S, Int8>(s, shape, queries, scale, runs, scratch, out, lse) };
    }
    let shape = layout.decoded();
    let mut memory = std::mem::take(&mut scratch.rows);
    let rows = chunk_of(layout, &mut memory);
    let mut attention = Attention::new::<S>(shape, scale, scratch, lse);
    let (mut decoded, mut chunk) = (Decoded::new(layout, runs), Chunk::EMPTY);
    loop {
        // SAFETY: passed on to the caller; the dequantised rows are read before the next ones take their place.
        unsafe {
            let run = [decoded.next(s, rows)];
            if run[0].rows == 0 {
                break;
            }
            Rows::new(&run, shape.row_bytes, attention.chunk).fill(&mut chunk);
            let mut ahead = decoded.ahead();
            attention.keys::<S, F32>(s, queries, &chunk, &mut ahead, 0);
            attention.values::<S, F32>(s, &chunk, &mut ahead, 0);
        }
    }
    attention.finish(s, out);
    scratch.rows = memory;
}

/// # Safety
/// As [`Kernels::scores_layout`](crate::Kernels::scores_layout).
#[inline(always)]
pub(super) unsafe fn scores_layout<S: Simd>(
    s: S,
    layout: RowLayout,
    queries: &[f32],
    runs: &[Run],
    scratch: &mut AttendScratch,
    out: &mut [f32],
    out_stride: usize,
) {
    if let Some((dtype, shape)) = layout.plain() {
        // SAFETY: passed on to the caller.
        unsafe { by_dtype!(dtype, all_scores(s, shape, queries, runs, out.as_mut_ptr(), out_stride)) };
        return;
    }
    if let Some(shape) = layout.pairs_in_8_bits() {
        // SAFETY: as above.
        unsafe { all_scores::<S, Int8>(s, shape, queries, runs, out.as_mut_ptr(), out_stride) };
        return;
    }
    let rows = chunk_of(layout, &mut scratch.rows);
    let (mut decoded, mut t) = (Decoded::new(layout, runs), 0);
    loop {
        // SAFETY: passed on to the caller; `out` has room for a score per row, and the dequantised rows are read before the next ones
        // take their place.
        unsafe {
            let run = [decoded.next(s, rows)];
            if run[0].rows == 0 {
                break;
            }
            let shape = layout.decoded();
            all_scores::<S, F32>(s, shape, queries, &run, out.as_mut_ptr().add(t), out_stride);
            t += run[0].rows;
        }
    }
}
