//! Weights of rows from their scores, some pages at a time, while these are near and memory is busy with the next ones.

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

    /// The weights of pages side by side, whose scores are there.
    ///
    /// # Safety
    /// `out` has them for as many queries as there are totals, at the first of the pages; before the first page of all, there are weights of
    /// so many rows.
    #[inline(always)]
    pub(super) unsafe fn pages(&mut self, s: S, pages: Range<usize>, out: Out) {
        let (first, rows) = (self.first + pages.start * self.page_rows, pages.len() * self.page_rows);
        let whole = self.rows.start <= first && first + rows <= self.rows.end;
        for h in 0..self.totals.len() {
            // SAFETY: passed on to the caller; a page has a whole number of registers of rows.
            unsafe {
                let scores = out.scores.add(h * out.stride);
                let reference = self.totals[h].reference;
                let limit = s.splat(reference + ROOM_ABOVE);
                if whole && reference > f32::NEG_INFINITY && s.above(top(s, scores, rows), limit) == 0 {
                    self.weigh(s, h, scores, rows);
                    continue;
                }
                for row in (0..rows).step_by(self.page_rows) {
                    self.page(s, h, first + row, scores.add(row));
                }
            }
        }
    }

    /// The weights of one query and page, which may have rows that do not count, and scores far above the reference.
    ///
    /// # Safety
    /// A page's scores are there, and `first` weights before them.
    #[inline(always)]
    unsafe fn page(&mut self, s: S, h: usize, first: usize, scores: *mut f32) {
        // SAFETY: passed on to the caller.
        unsafe {
            if first < self.rows.start || first + self.page_rows > self.rows.end {
                self.leave_out(first, scores);
            }
            let limit = s.splat(self.totals[h].reference + ROOM_ABOVE);
            if s.above(top(s, scores, self.page_rows), limit) != 0 {
                self.raise(s, h, first, scores);
            }
            if self.totals[h].reference == f32::NEG_INFINITY {
                // No row counted so far.
                scores.write_bytes(0, self.page_rows);
            } else {
                self.weigh(s, h, scores, self.page_rows);
            }
        }
    }

    /// Weights of so many rows, in the place of their scores.
    ///
    /// # Safety
    /// They are there.
    #[inline(always)]
    unsafe fn weigh(&mut self, s: S, h: usize, scores: *mut f32, rows: usize) {
        let reference = s.splat(self.totals[h].reference);
        // What lies in memory waits for each sum before the next one: not these.
        let mut sum = s.splat(0.0);
        for t in (0..rows).step_by(S::LANES) {
            // SAFETY: passed on to the caller.
            unsafe {
                let at = scores.add(t).cast::<u8>();
                let weights = s.exp_of_small(s.sub(s.load_f32(at), reference));
                sum = s.add(sum, weights);
                s.store_f32(weights, at);
            }
        }
        self.sums[h] = s.add(self.sums[h], sum);
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
        let before = self.totals[h].reference;
        // SAFETY: passed on to the caller.
        let reference = s.max_lane(unsafe { top(s, scores, self.page_rows) });
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

/// The largest score, lane by lane.
///
/// # Safety
/// So many scores are there, a whole number of registers.
#[inline(always)]
unsafe fn top<S: Simd>(s: S, scores: *const f32, rows: usize) -> S::V {
    let mut top = s.splat(f32::NEG_INFINITY);
    for t in (0..rows).step_by(S::LANES) {
        // SAFETY: passed on to the caller.
        top = s.max(unsafe { s.load_f32(scores.add(t).cast()) }, top);
    }
    top
}
