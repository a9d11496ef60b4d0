//! Weights of rows from their scores, a page at a time, while its scores are near and memory is busy with the next page.

use std::ops::Range;

use super::Simd;
use super::codes::Out;
use crate::cpu::codes::CodeTotal;
use crate::cpu::scalar::codes::ROOM_ABOVE;

/// Queries at a time, at most.
const HEADS: usize = 4;

/// Turns scores into weights.
pub(super) struct Weighing<'a, S: Simd> {
    /// Rows of a page.
    page_rows: usize,
    /// Rows before the first page.
    first: usize,
    /// Rows that count, of all.
    rows: &'a Range<usize>,
    /// One for each query.
    totals: &'a mut [CodeTotal],
    /// What came to the totals since.
    sums: [S::V; HEADS],
}

impl<'a, S: Simd> Weighing<'a, S> {
    #[inline(always)]
    pub(super) fn new(
        s: S,
        page_rows: usize,
        first: usize,
        rows: &'a Range<usize>,
        totals: &'a mut [CodeTotal],
    ) -> Self {
        Self { page_rows, first, rows, totals, sums: [s.splat(0.0); HEADS] }
    }

    /// The weights of a page, whose scores are there.
    ///
    /// # Safety
    /// `out` has them for as many queries as there are totals, at the page; before the first page, there are weights of so many rows.
    #[inline(always)]
    pub(super) unsafe fn page(&mut self, s: S, page: usize, out: Out) {
        let first = self.first + page * self.page_rows;
        let whole = self.rows.start <= first && first + self.page_rows <= self.rows.end;
        for h in 0..self.totals.len() {
            // SAFETY: passed on to the caller; a page has a whole number of registers of rows.
            unsafe {
                let scores = out.scores.add(h * out.stride);
                if !whole {
                    self.leave_out(first, scores);
                }
                let limit = s.splat(self.totals[h].reference + ROOM_ABOVE);
                let mut above = 0;
                for t in (0..self.page_rows).step_by(S::LANES) {
                    above |= s.above(s.load_f32(scores.add(t).cast()), limit);
                }
                if above != 0 {
                    self.raise(s, h, first, scores);
                }
                let reference = self.totals[h].reference;
                if reference == f32::NEG_INFINITY {
                    // No row counted so far.
                    scores.write_bytes(0, self.page_rows);
                    continue;
                }
                let reference = s.splat(reference);
                for t in (0..self.page_rows).step_by(S::LANES) {
                    let at = scores.add(t).cast::<u8>();
                    let weights = s.exp_of_small(s.sub(s.load_f32(at), reference));
                    self.sums[h] = s.add(self.sums[h], weights);
                    s.store_f32(weights, at);
                }
            }
        }
    }

    /// Rows that do not count get a weight of 0.
    ///
    /// # Safety
    /// A page's scores are there.
    #[inline(always)]
    unsafe fn leave_out(&self, first: usize, scores: *mut f32) {
        for row in 0..self.page_rows {
            if !self.rows.contains(&(first + row)) {
                // SAFETY: passed on to the caller.
                unsafe { scores.add(row).write(f32::NEG_INFINITY) };
            }
        }
    }

    /// Takes the page's largest score as reference, and all weights so far with it.
    ///
    /// # Safety
    /// A page's scores are there, and `first` weights before them.
    #[inline(always)]
    unsafe fn raise(&mut self, s: S, h: usize, first: usize, scores: *mut f32) {
        let mut top = s.splat(f32::NEG_INFINITY);
        for t in (0..self.page_rows).step_by(S::LANES) {
            // SAFETY: passed on to the caller.
            top = s.max(unsafe { s.load_f32(scores.add(t).cast()) }, top);
        }
        let before = self.totals[h].reference;
        let reference = s.max_lane(top);
        self.totals[h].reference = reference;
        if before == f32::NEG_INFINITY {
            return;
        }
        let factor = (before - reference).exp();
        // SAFETY: passed on to the caller.
        let weights = unsafe { std::slice::from_raw_parts_mut(scores.sub(first), first) };
        super::elementwise::multiply(s, weights, factor);
        self.sums[h] = s.mul(self.sums[h], s.splat(factor));
        self.totals[h].sum *= f64::from(factor);
    }

    /// Brings the totals up to date.
    #[inline(always)]
    pub(super) fn finish(self, s: S) {
        for (total, sum) in self.totals.iter_mut().zip(self.sums) {
            total.sum += f64::from(s.sum(sum));
        }
    }
}
