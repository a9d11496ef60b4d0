//! Attention over rows of any layout: plain ones where they lie, quantised ones a chunk at a time, dequantised to memory that stays in
//! the second-level cache.

use super::Simd;
use super::attend::{Attention, all_scores, attend_rows, chunk_rows};
use super::dequantise::dequantise;
use super::rows::Blocks;
use super::stored::{F32, by_dtype};
use crate::layout::RowLayout;
use crate::run::{AttendScratch, Run};

/// Goes through the rows of all runs, a chunk of dequantised ones at a time.
struct Decoded<'a> {
    layout: RowLayout,
    row_bytes: usize,
    runs: &'a [Run],
    /// How many rows of the first run are done.
    done: usize,
}

impl<'a> Decoded<'a> {
    #[inline(always)]
    fn new(layout: RowLayout, runs: &'a [Run]) -> Self {
        Self { layout, row_bytes: layout.checked_row_bytes("attend_layout"), runs, done: 0 }
    }

    /// The next rows, at most as many as `to` has room for; of none after the last one.
    ///
    /// # Safety
    /// Each run's rows are readable.
    #[inline(always)]
    unsafe fn next<S: Simd>(&mut self, s: S, to: &mut [f32]) -> Run {
        let mut n = 0;
        for to in to.chunks_exact_mut(self.layout.decoded().row_bytes / 4) {
            while self.runs.first().is_some_and(|run| run.rows == self.done) {
                (self.runs, self.done) = (&self.runs[1..], 0);
            }
            let Some(run) = self.runs.first() else { break };
            // SAFETY: the caller promises `run.rows` rows, of which this is one.
            let row = unsafe {
                std::slice::from_raw_parts(run.rows_ptr.add(self.done * self.row_bytes), self.row_bytes)
            };
            self.layout.decode_row(row, to, |format, row, to| dequantise(s, format, row, to));
            self.done += 1;
            n += 1;
        }
        Run::new(to.as_ptr().cast(), n)
    }
}

/// Memory for a chunk of dequantised rows, and how many they are.
#[inline(always)]
fn chunk_of(layout: RowLayout, rows: &mut Vec<f32>) -> (&mut [f32], usize) {
    let row_bytes = layout.decoded().row_bytes;
    let chunk = chunk_rows(row_bytes);
    let values = chunk * row_bytes / 4;
    if rows.len() < values {
        rows.resize(values, 0.0);
    }
    (&mut rows[..values], chunk)
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
    let shape = layout.decoded();
    let mut memory = std::mem::take(&mut scratch.rows);
    let (rows, chunk) = chunk_of(layout, &mut memory);
    let room = scratch.room(lse.len() * (chunk + 1));
    let mut attention = Attention::new(shape, scale, chunk, room, out, lse);
    let mut decoded = Decoded::new(layout, runs);
    loop {
        // SAFETY: passed on to the caller; the dequantised rows are read before the next ones take their place.
        unsafe {
            let run = [decoded.next(s, rows)];
            if run[0].rows == 0 {
                break;
            }
            let [mut keys, mut values] = [(); 2].map(|()| Blocks::new(&run, shape.row_bytes));
            // The next chunk's rows are dequantised before they are attended: nothing to ask for.
            attention.add::<S, F32>(s, queries, &mut keys, &mut values, &mut Blocks::new(&[], 0));
        }
    }
    attention.finish(s);
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
    let (rows, _) = chunk_of(layout, &mut scratch.rows);
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
