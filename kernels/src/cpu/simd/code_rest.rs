//! What rows that are not attended amount to, from their weights and digests.
//!
//! Rows that share a margin and a mean are a *cell*. Some dozen cells at a time are first summed row by row, then weighed against their
//! margins, many cells to a register, and last their means are added. Where rows are to be taken by their shares, that is decided in the
//! first step, while their weights are near.

use std::ops::Range;

use super::stored::{F16, Loaded};
use super::{Simd, prefetch};
use crate::codes::CodeLayout;
use crate::cpu::codes::{CodeSums, CodeTaken, CodeWeights};

/// Cells at a time.
const CELLS: usize = 64;
/// Queries at a time.
const HEADS: usize = 8;
/// Spans whose means are added at a time.
const SPANS: usize = 4;
/// Pages that are asked for ahead.
const AHEAD: usize = 6;
const LINE: usize = 64;
/// More than what products too small for f32 can have lost in as many cells.
const LOST: f64 = 1e-42;
/// `e^m` and a little more, for `e^m − 1` not to be too small.
const UP: f32 = 1.0 + 5e-7;

#[inline(always)]
pub(super) fn indices_above<S: Simd>(s: S, values: &[f32], threshold: f32, ids: &mut Vec<u32>) {
    ids.clear();
    ids.reserve(values.len() + S::LANES);
    let (to, above, mut count) = (ids.as_mut_ptr(), s.splat(threshold), 0);
    let whole = values.len() - values.len() % S::LANES;
    for at in (0..whole).step_by(S::LANES) {
        // SAFETY: the values have a register from `at` on; there is room for as many ids as values and a register.
        unsafe {
            let lanes = s.above(s.load_f32(values.as_ptr().add(at).cast()), above);
            s.compress_i32(s.ids(at as u32), lanes, to.add(count).cast());
            count += lanes.count_ones() as usize;
        }
    }
    for (id, value) in values.iter().enumerate().skip(whole) {
        // SAFETY: as above.
        unsafe { to.add(count).write(id as u32) };
        count += usize::from(*value > threshold);
    }
    // SAFETY: so many were written.
    unsafe { ids.set_len(count) };
}

/// What the cells at hand have, `[queries][cells]` and `[cells]`; beyond the last one their weights are 0.
struct Cells {
    weights: [[f32; CELLS]; HEADS],
    /// `Σ w·spread`.
    apart: [[f32; CELLS]; HEADS],
    /// Of the mean.
    norms: [f32; CELLS],
    /// Of the spreads.
    units: [f32; CELLS],
    /// Where the spreads begin.
    spreads: [*const u8; CELLS],
    /// Where the mean of each span begins.
    means: [*const u8; CELLS],
}

#[inline(always)]
pub(super) fn code_rest<S: Simd>(
    s: S,
    layout: &CodeLayout,
    blocks: &[u8],
    of: &CodeWeights<'_>,
    sums: &mut [CodeSums],
    means: &mut [f32],
) {
    let (mut none, factors) = (Vec::new(), [].as_slice());
    let mut taken = CodeTaken { factors, threshold: f32::INFINITY, first: 0, ids: &mut none };
    rest::<S, false>(s, layout, blocks, of, &mut taken, sums, means);
}

#[inline(always)]
pub(super) fn code_rest_below<S: Simd>(
    s: S,
    layout: &CodeLayout,
    blocks: &[u8],
    of: &CodeWeights<'_>,
    taken: &mut CodeTaken<'_>,
    sums: &mut [CodeSums],
    means: &mut [f32],
) {
    rest::<S, true>(s, layout, blocks, of, taken, sums, means);
}

/// Sums over all rows, or in case of TAKES over those that are not taken.
#[inline(always)]
fn rest<S: Simd, const TAKES: bool>(
    s: S,
    layout: &CodeLayout,
    blocks: &[u8],
    of: &CodeWeights<'_>,
    taken: &mut CodeTaken<'_>,
    sums: &mut [CodeSums],
    means: &mut [f32],
) {
    let CodeWeights { rows: weights, stride, margins, margin_stride } = *of;
    let group = sums.len();
    let cell = layout.span().min(layout.group());
    let count = blocks.len() / layout.bytes() * (layout.rows() / cell);
    let (mut place, dv) = (Place { layout, cell, block: blocks.as_ptr(), row: 0 }, layout.value_dim());
    let mut cells = Cells {
        weights: [[0.0; CELLS]; HEADS],
        apart: [[0.0; CELLS]; HEADS],
        norms: [0.0; CELLS],
        units: [0.0; CELLS],
        spreads: [std::ptr::null(); CELLS],
        means: [std::ptr::null(); CELLS],
    };
    for first in (0..count).step_by(CELLS) {
        let part = Part { layout, cell, first, n: CELLS.min(count - first) };
        // SAFETY: there are so many cells in the blocks.
        unsafe { place.find(part.n, &mut cells) };
        if TAKES {
            taken.ids.reserve(part.n * cell + S::LANES);
        }
        for h in (0..group).step_by(HEADS) {
            let heads = h..group.min(h + HEADS);
            let of_part = Weights { rows: &weights[first * cell..], stride };
            // SAFETY: the cells were found; the public method checked that there are weights for all rows and a factor for each query.
            unsafe {
                match cell / S::LANES {
                    1 => part.sum::<S, 1, TAKES>(s, of_part, heads.clone(), taken, &mut cells),
                    2 => part.sum::<S, 2, TAKES>(s, of_part, heads.clone(), taken, &mut cells),
                    _ => part.sum::<S, 4, TAKES>(s, of_part, heads.clone(), taken, &mut cells),
                }
            }
            let heads = heads.len();
            for i in 0..heads {
                part.weigh(s, &margins[(h + i) * margin_stride..], i, &cells, &mut sums[h + i]);
            }
            // SAFETY: as above.
            unsafe { part.add_means(s, heads, &mut cells, &mut means[h * dv..(h + heads) * dv]) };
        }
    }
}

/// Goes through the cells of all blocks.
struct Place<'a> {
    layout: &'a CodeLayout,
    /// Rows of a cell.
    cell: usize,
    /// The block that the next cell is in, and its first row there.
    block: *const u8,
    row: usize,
}

impl Place<'_> {
    /// The next `n` cells.
    ///
    /// # Safety
    /// There are so many, in blocks that are readable.
    #[inline(always)]
    unsafe fn find(&mut self, n: usize, cells: &mut Cells) {
        let (layout, block) = (self.layout, self.layout.bytes());
        let ahead = AHEAD * block + layout.mean_norms_at() / LINE * LINE;
        let mean_bytes = 2 * layout.value_dim();
        // Spans have 16 rows or 32.
        let span = layout.span().trailing_zeros();
        let cells_of_span = (layout.span() / self.cell).trailing_zeros();
        for c in 0..n {
            if self.row == layout.rows() {
                (self.block, self.row) = (self.block.wrapping_add(block), 0);
            }
            if self.row == 0 {
                for at in (ahead..(AHEAD + 1) * block).step_by(LINE) {
                    prefetch::<true>(self.block.wrapping_add(at));
                }
            }
            // SAFETY: passed on to the caller; all of them are within the block.
            unsafe {
                let norm = self.block.add(layout.mean_norms_at() + 4 * (self.row >> span));
                cells.norms[c] = norm.cast::<f32>().read_unaligned();
                cells.units[c] = self.block.add(layout.unit_at()).cast::<f32>().read_unaligned();
                cells.spreads[c] = self.block.add(layout.spreads_at() + self.row);
                cells.means[c >> cells_of_span] =
                    self.block.add(layout.means_at() + mean_bytes * (self.row >> span));
            }
            self.row += self.cell;
        }
    }
}

/// Weights from some row on, one query every `stride` values.
#[derive(Clone, Copy)]
struct Weights<'a> {
    rows: &'a [f32],
    stride: usize,
}

/// Some cells of all.
struct Part<'a> {
    layout: &'a CodeLayout,
    /// Rows of a cell.
    cell: usize,
    /// The first one, and how many there are.
    first: usize,
    n: usize,
}

impl Part<'_> {
    /// Sums the rows of each cell, of `N` registers each, for some queries; `weights` begins with those of the first one.
    ///
    /// # Safety
    /// The cells were found; `weights` has one for each of their rows for each query; in case of TAKES there is a factor for each query,
    /// and room for an id of each row and a register.
    #[inline(always)]
    unsafe fn sum<S: Simd, const N: usize, const TAKES: bool>(
        &self,
        s: S,
        weights: Weights<'_>,
        heads: Range<usize>,
        taken: &mut CodeTaken<'_>,
        cells: &mut Cells,
    ) {
        for first in (0..self.n).step_by(4) {
            let mut spreads = [[s.splat(0.0); N]; 4];
            let mut rows = [0; 4];
            for i in 0..4 {
                // Where there are no four, the last one again.
                let cell = (first + i).min(self.n - 1);
                rows[i] = cell * self.cell;
                for j in 0..N {
                    // SAFETY: a cell has N registers of spreads.
                    spreads[i][j] = unsafe { s.load_u8(cells.spreads[cell].add(j * S::LANES)) };
                }
            }
            // SAFETY: passed on to the caller.
            let without = unsafe {
                if TAKES {
                    self.take::<S, N>(s, weights, rows, 4.min(self.n - first), heads.start == 0, taken)
                } else {
                    [[s.lanes_above(s.splat(0.0), s.splat(0.0)); N]; 4]
                }
            };
            for (h, head) in heads.clone().enumerate() {
                let (mut whole, mut apart) = ([s.splat(0.0); 4], [s.splat(0.0); 4]);
                // SAFETY: there are weights for all rows of the cells, and room for whole fours of cells.
                unsafe {
                    for i in 0..4 {
                        let at = weights.rows.as_ptr().add(head * weights.stride + rows[i]);
                        for j in 0..N {
                            let at = at.add(j * S::LANES).cast();
                            let w = if TAKES { s.load_f32_but(without[i][j], at) } else { s.load_f32(at) };
                            if j == 0 {
                                (whole[i], apart[i]) = (w, s.mul(w, spreads[i][0]));
                            } else {
                                (whole[i], apart[i]) =
                                    (s.add(whole[i], w), s.fma(w, spreads[i][j], apart[i]));
                            }
                        }
                    }
                    let to = [&mut cells.weights[h], &mut cells.apart[h]];
                    for (to, sums) in to.into_iter().zip([s.sum4(whole), s.sum4(apart)]) {
                        to.as_mut_ptr().add(first).cast::<[f32; 4]>().write_unaligned(sums);
                    }
                }
            }
        }
        for h in 0..heads.len() {
            cells.weights[h][self.n..].fill(0.0);
            cells.apart[h][self.n..].fill(0.0);
        }
    }

    /// Which lanes of four cells' rows are taken. Those of the first `count` cells are named, if that is asked for.
    ///
    /// # Safety
    /// As [`Part::sum`], at the cells' first `rows`.
    #[inline(always)]
    unsafe fn take<S: Simd, const N: usize>(
        &self,
        s: S,
        weights: Weights<'_>,
        rows: [usize; 4],
        count: usize,
        named: bool,
        taken: &mut CodeTaken<'_>,
    ) -> [[S::M; N]; 4] {
        let (zero, limit) = (s.splat(0.0), s.splat(taken.threshold));
        let mut without = [[s.lanes_above(zero, zero); N]; 4];
        for i in 0..4 {
            let mut shares = [zero; N];
            for (h, factor) in taken.factors.iter().enumerate() {
                let (factor, at) = (s.splat(*factor), h * weights.stride + rows[i]);
                for j in 0..N {
                    // SAFETY: passed on to the caller.
                    let w = unsafe { s.load_f32(weights.rows.as_ptr().add(at + j * S::LANES).cast()) };
                    shares[j] = s.fma(factor, w, shares[j]);
                }
            }
            for j in 0..N {
                without[i][j] = s.lanes_above(shares[j], limit);
            }
            if !named || i >= count {
                continue;
            }
            for j in 0..N {
                let lanes = s.bits(without[i][j]);
                if lanes == 0 {
                    continue;
                }
                let row = self.first * self.cell + rows[i] + j * S::LANES;
                let (id, len) = (taken.first as usize + row, taken.ids.len());
                // SAFETY: passed on to the caller: there is room for these and a register.
                unsafe {
                    s.compress_i32(s.ids(id as u32), lanes, taken.ids.as_mut_ptr().add(len).cast());
                    taken.ids.set_len(len + lanes.count_ones() as usize);
                }
            }
        }
        without
    }

    /// Adds the sums of query h, whose margins are given.
    #[inline(always)]
    fn weigh<S: Simd>(&self, s: S, margins: &[f32], h: usize, cells: &Cells, sums: &mut CodeSums) {
        let each = self.layout.group() / self.cell;
        let mut of_cells = [0.0_f32; CELLS];
        if each == 1 {
            of_cells[..self.n].copy_from_slice(&margins[self.first..][..self.n]);
        } else {
            for (c, margin) in of_cells[..self.n].iter_mut().enumerate() {
                *margin = margins[(self.first + c) / each];
            }
        }
        let zero = s.splat(0.0);
        let (mut whole, mut upper, mut lower, mut scatter, mut spread) = (zero, zero, zero, zero, zero);
        for c in (0..self.n).step_by(S::LANES) {
            let (w, apart) = (s.load(&cells.weights[h][c..]), s.load(&cells.apart[h][c..]));
            let (norm, unit) = (s.load(&cells.norms[c..]), s.load(&cells.units[c..]));
            let margin = s.load(&of_cells[c..]);
            // Infinite where the margin is: no other one is above its power.
            let up = s.max(margin, s.exp_of_small(s.min(margin, s.splat(80.0))));
            let down = s.exp_of_small(s.sub(zero, margin));
            let grown = s.fma(up, s.splat(UP), s.splat(-1.0));
            // 0 times infinity is 0 here.
            whole = s.add(whole, w);
            upper = s.add(upper, s.max(s.mul(w, up), zero));
            lower = s.fma(w, down, lower);
            scatter = s.add(scatter, s.max(s.mul(s.mul(w, norm), grown), zero));
            spread = s.add(spread, s.max(s.mul(s.mul(apart, unit), up), zero));
        }
        let whole = s.sum(whole);
        if whole > 0.0 {
            let [upper, lower, scatter, spread] = s.sum4([upper, lower, scatter, spread]);
            sums.weight += f64::from(whole);
            sums.upper += f64::from(upper);
            sums.lower += f64::from(lower);
            sums.scatter += f64::from(scatter) + LOST;
            sums.spread += f64::from(spread) + LOST;
        }
    }

    /// Adds the means `[heads][value_dim]`, each by the weight of its span.
    ///
    /// # Safety
    /// The cells were found.
    #[inline(always)]
    unsafe fn add_means<S: Simd>(&self, s: S, heads: usize, cells: &mut Cells, means: &mut [f32]) {
        let mut spans = self.n;
        if self.layout.span() > self.cell {
            // Two cells each.
            spans /= 2;
            for weights in &mut cells.weights[..heads] {
                for span in 0..spans {
                    weights[span] = weights[2 * span] + weights[2 * span + 1];
                }
            }
        }
        let mut span = 0;
        while span < spans {
            // SAFETY: passed on to the caller.
            unsafe {
                if spans - span >= SPANS {
                    self.add_some::<S, SPANS>(s, span, heads, cells, means);
                    span += SPANS;
                } else {
                    self.add_some::<S, 1>(s, span, heads, cells, means);
                    span += 1;
                }
            }
        }
    }

    /// The means of `N` spans from `span` on.
    ///
    /// # Safety
    /// The cells were found, and brought together to spans.
    #[inline(always)]
    unsafe fn add_some<S: Simd, const N: usize>(
        &self,
        s: S,
        span: usize,
        heads: usize,
        cells: &Cells,
        means: &mut [f32],
    ) {
        let dv = self.layout.value_dim();
        let mut any = 0.0;
        for weights in &cells.weights[..heads] {
            for i in 0..N {
                any += weights[span + i];
            }
        }
        if any == 0.0 {
            return;
        }
        for j in (0..dv).step_by(S::LANES) {
            let n = (dv - j).min(S::LANES);
            let mut values = [s.splat(0.0); N];
            for i in 0..N {
                // SAFETY: a mean has dv values, of which n are left.
                values[i] = unsafe {
                    let at = cells.means[span + i].add(2 * j);
                    if n == S::LANES { F16::load(s, at) } else { F16::load_part(s, at, n) }
                };
            }
            for h in 0..heads {
                let mean = &mut means[h * dv + j..][..n];
                let weights = &cells.weights[h][span..span + N];
                let mut sum = s.load(mean);
                for i in 0..N {
                    sum = s.fma(s.splat(weights[i]), values[i], sum);
                }
                s.store(sum, mean);
            }
        }
    }
}
