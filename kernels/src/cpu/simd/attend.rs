//! Attention over scattered rows: chunk by chunk the scores, the weights, the sum of values.
//!
//! A chunk is a fixed number of rows of the sequence, whatever runs they come from, so that nothing depends on where runs begin and
//! end. Between chunks the softmax goes on as in Milakov & Gimelshein's online softmax (2018): a new maximum scales down what was
//! summed. Values are summed a chunk later than their keys are scored, so that a chunk's weights, each waiting for the one before, are
//! found while there are sums of another one to do.

use super::rows::{Ahead, Chunk, Rows, chunk_rows};
use super::stored::{Loaded, by_dtype};
use super::values::add_chunk;
use super::{Simd, write4};
use crate::cpu::scalar::merge_weights;
use crate::dtype::Dtype;
use crate::layout::RowShape;
use crate::run::{AttendScratch, Run};

/// Rows of a tile of scores: as many as [`Simd::sum4`] sums.
const TILE: usize = 4;

/// # Safety
/// As [`Kernels::scores`](crate::Kernels::scores).
#[inline(always)]
pub(super) unsafe fn scores<S: Simd>(
    s: S,
    dtype: Dtype,
    queries: &[f32],
    d: usize,
    runs: &[Run],
    out: &mut [f32],
    out_stride: usize,
) {
    let shape = RowShape::pairs(d, dtype);
    // SAFETY: passed on to the caller.
    unsafe { by_dtype!(dtype, all_scores(s, shape, queries, runs, out.as_mut_ptr(), out_stride)) }
}

/// # Safety
/// Every row is readable; `out` has room for a score per row for each query, one query every `out_stride` values.
#[inline(always)]
pub(super) unsafe fn all_scores<S: Simd, E: Loaded>(
    s: S,
    shape: RowShape,
    queries: &[f32],
    runs: &[Run],
    out: *mut f32,
    out_stride: usize,
) {
    let mut rows = Rows::new(runs, shape.row_bytes, chunk_rows(shape.row_bytes));
    let (mut now, mut coming) = (Chunk::EMPTY, Chunk::EMPTY);
    rows.fill(&mut now);
    let mut t = 0;
    while !now.rows().is_empty() {
        rows.fill(&mut coming);
        // Nobody is going to read the values.
        let key_bytes = shape.keys * E::BYTES + if E::SCALED { size_of::<f32>() } else { 0 };
        let mut ahead = Ahead::new(&coming, key_bytes);
        let lines = TILE * ahead.lines();
        // SAFETY: passed on to the caller; the chunk's scores are a part of the whole.
        unsafe {
            score_chunk::<S, E>(s, shape, queries, 1.0, &now, &mut ahead, lines, out.add(t), out_stride);
        };
        t += now.rows().len();
        std::mem::swap(&mut now, &mut coming);
    }
}

/// Scores of a chunk's rows; meanwhile so many lines are asked for with every four of them.
///
/// # Safety
/// The rows are readable; `out` has room for a score per row for each query, one query every `out_stride` values.
#[inline(always)]
#[allow(clippy::too_many_arguments)]
unsafe fn score_chunk<S: Simd, E: Loaded>(
    s: S,
    shape: RowShape,
    queries: &[f32],
    scale: f32,
    chunk: &Chunk,
    ahead: &mut Ahead,
    lines: usize,
    out: *mut f32,
    out_stride: usize,
) {
    let d = shape.keys;
    let (group, n) = (queries.len() / d, chunk.rows().len());
    let lines = lines.div_ceil((d / S::LANES).max(1));
    for first in (0..n).step_by(TILE) {
        let (rows, count) = (chunk.tile(first), TILE.min(n - first));
        let mut h = 0;
        while h < group {
            let heads = super::tile(group - h, S::HEADS);
            // Once is enough for what is to come.
            let lines = if h == 0 { lines } else { 0 };
            // SAFETY: the rows are readable; queries from h on are [heads][d]; `out` has room for `count` scores of each.
            unsafe {
                let (queries, out) = (queries.as_ptr().add(h * d), out.add(h * out_stride + first));
                match heads {
                    1 => score_tile::<S, E, 1>(
                        s, queries, d, scale, rows, count, ahead, lines, out, out_stride,
                    ),
                    2 => score_tile::<S, E, 2>(
                        s, queries, d, scale, rows, count, ahead, lines, out, out_stride,
                    ),
                    3 => score_tile::<S, E, 3>(
                        s, queries, d, scale, rows, count, ahead, lines, out, out_stride,
                    ),
                    _ => score_tile::<S, E, 4>(
                        s, queries, d, scale, rows, count, ahead, lines, out, out_stride,
                    ),
                }
            }
            h += heads;
        }
    }
}

/// `H` queries against four rows, of whose scores the first `count` are wanted.
///
/// # Safety
/// `queries` is `[H][d]`, the rows hold d values each, `out` has room for `count` scores every `out_stride` values.
#[inline(always)]
#[allow(clippy::too_many_arguments)]
unsafe fn score_tile<S: Simd, E: Loaded, const H: usize>(
    s: S,
    queries: *const f32,
    d: usize,
    scale: f32,
    rows: [*const u8; TILE],
    count: usize,
    ahead: &mut Ahead,
    lines: usize,
    out: *mut f32,
    out_stride: usize,
) {
    let mut sums = [[s.splat(0.0); TILE]; H];
    let whole = d - d % S::LANES;
    // SAFETY: the caller promises the shapes; parts are as long as what is left of d.
    unsafe {
        for j in (0..whole).step_by(S::LANES) {
            ahead.ask(lines);
            let mut q = [s.splat(0.0); H];
            for h in 0..H {
                q[h] = s.load_f32(queries.add(h * d + j).cast());
            }
            for r in 0..TILE {
                let k = E::load(s, rows[r].add(j * E::BYTES));
                for h in 0..H {
                    sums[h][r] = s.fma(q[h], k, sums[h][r]);
                }
            }
        }
        if whole < d {
            let left = d - whole;
            ahead.ask(lines);
            let mut q = [s.splat(0.0); H];
            for h in 0..H {
                q[h] = s.load_f32_part(queries.add(h * d + whole).cast(), left);
            }
            for r in 0..TILE {
                let k = E::load_part(s, rows[r].add(whole * E::BYTES), left);
                for h in 0..H {
                    sums[h][r] = s.fma(q[h], k, sums[h][r]);
                }
            }
        }
        let mut scales = [scale; TILE];
        if E::SCALED {
            for r in 0..TILE {
                scales[r] *= E::factor(rows[r], d);
            }
        }
        for h in 0..H {
            let mut scores = s.sum4(sums[h]);
            for r in 0..TILE {
                scores[r] *= scales[r];
            }
            write4(scores, count, out.add(h * out_stride));
        }
    }
}

/// # Safety
/// As [`Kernels::attend`](crate::Kernels::attend).
#[inline(always)]
#[allow(clippy::too_many_arguments)]
pub(super) unsafe fn attend<S: Simd>(
    s: S,
    dtype: Dtype,
    queries: &[f32],
    d: usize,
    scale: f32,
    runs: &[Run],
    scratch: &mut AttendScratch,
    out: &mut [f32],
    lse: &mut [f32],
) {
    let shape = RowShape::pairs(d, dtype);
    // SAFETY: passed on to the caller.
    unsafe { by_dtype!(dtype, attend_rows(s, shape, queries, scale, runs, scratch, out, lse)) }
}

/// # Safety
/// As [`Kernels::attend_layout`](crate::Kernels::attend_layout), of plain rows.
#[inline(always)]
#[allow(clippy::too_many_arguments)]
pub(super) unsafe fn attend_rows<S: Simd, E: Loaded>(
    s: S,
    shape: RowShape,
    queries: &[f32],
    scale: f32,
    runs: &[Run],
    scratch: &mut AttendScratch,
    out: &mut [f32],
    lse: &mut [f32],
) {
    let mut attention = Attention::new::<S>(shape, scale, scratch, lse);
    let mut rows = Rows::new(runs, shape.row_bytes, attention.chunk);
    let [mut before, mut now, mut coming] = [Chunk::EMPTY; 3];
    rows.fill(&mut now);
    // Nothing was worked on meanwhile: the first ones at once.
    Ahead::new(&now, shape.row_bytes).ask(usize::MAX);
    let mut turn = 0;
    while !now.rows().is_empty() || !before.rows().is_empty() {
        rows.fill(&mut coming);
        let mut ahead = Ahead::new(&coming, shape.row_bytes);
        // SAFETY: passed on to the caller; values are those whose keys came last.
        unsafe {
            attention.keys::<S, E>(s, queries, &now, &mut ahead, turn);
            attention.values::<S, E>(s, &before, &mut ahead, 1 - turn);
        }
        std::mem::swap(&mut before, &mut now);
        std::mem::swap(&mut now, &mut coming);
        turn = 1 - turn;
    }
    attention.finish(s, out);
}

/// Attention under way: what is kept from chunk to chunk.
pub(super) struct Attention<'a> {
    shape: RowShape,
    scale: f32,
    /// Rows of a chunk.
    pub(super) chunk: usize,
    /// `[2][group][chunk]`: of two chunks, whose turns are 0 and 1.
    weights: &'a mut [f32],
    /// `[2][group][lanes]`: what each chunk's maximum scales down by all that was summed before it.
    factors: &'a mut [f32],
    /// `[group][lanes]`: the weights so far, added.
    sums: &'a mut [f32],
    /// `[group][values, up to whole registers]`: the weighted values so far, added.
    added: &'a mut [f32],
    /// `[group]`: until the end, the largest score so far.
    lse: &'a mut [f32],
}

impl<'a> Attention<'a> {
    /// Nothing yet.
    ///
    /// All that is summed stands in the scratch, at whole cache lines: registers that are stored across two of them, and read again,
    /// cost a third of the time.
    #[inline(always)]
    pub(super) fn new<S: Simd>(
        shape: RowShape,
        scale: f32,
        scratch: &'a mut AttendScratch,
        lse: &'a mut [f32],
    ) -> Self {
        let (group, chunk) = (lse.len(), chunk_rows(shape.row_bytes));
        let columns = shape.values.next_multiple_of(S::LANES);
        let room = scratch.room(group * (2 * chunk + 3 * S::LANES + columns));
        let (weights, rest) = room.split_at_mut(2 * group * chunk);
        let (factors, rest) = rest.split_at_mut(2 * group * S::LANES);
        let (sums, added) = rest.split_at_mut(group * S::LANES);
        lse.fill(f32::NEG_INFINITY);
        sums.fill(0.0);
        added.fill(0.0);
        Self { shape, scale, chunk, weights, factors, sums, added, lse }
    }

    /// The weights of a chunk's rows, times what their values are multiples of, kept as those of its turn; meanwhile half of what is ahead is asked for.
    ///
    /// # Safety
    /// The rows are readable, of the shape and the type.
    #[inline(always)]
    pub(super) unsafe fn keys<S: Simd, E: Loaded>(
        &mut self,
        s: S,
        queries: &[f32],
        rows: &Chunk,
        ahead: &mut Ahead,
        turn: usize,
    ) {
        let (group, chunk, n) = (self.lse.len(), self.chunk, rows.rows().len());
        if n == 0 {
            return;
        }
        let weights = &mut self.weights[turn * group * chunk..][..group * chunk];
        let lines = ahead.lines() * TILE / 2;
        // SAFETY: passed on to the caller; `weights` has room for a chunk of each query.
        unsafe {
            let out = weights.as_mut_ptr();
            score_chunk::<S, E>(s, self.shape, queries, self.scale, rows, ahead, lines, out, chunk);
        }
        let mut factors = [0.0; Chunk::MOST];
        if E::SCALED {
            for (factor, row) in factors.iter_mut().zip(rows.rows()) {
                // SAFETY: passed on to the caller.
                *factor = unsafe { E::factor(row.add(self.shape.column), self.shape.values) };
            }
        }
        for h in 0..group {
            let weights = &mut weights[h * chunk..][..n.next_multiple_of(S::LANES)];
            weights[n..].fill(f32::NEG_INFINITY);
            let before = self.lse[h];
            let mut top = s.splat(before);
            for scores in weights.chunks_exact(S::LANES) {
                top = s.max(s.load(scores), top);
            }
            let top = s.max_lane(top);
            // Where there is nothing but -inf, every weight is 0, and so is the factor.
            let zero = s.splat(if top == f32::NEG_INFINITY { 0.0 } else { top });
            let factor = s.exp(s.sub(s.splat(before), zero));
            s.store(factor, &mut self.factors[(turn * group + h) * S::LANES..][..S::LANES]);
            let sums = &mut self.sums[h * S::LANES..][..S::LANES];
            let mut sum = s.mul(s.load(sums), factor);
            for (weights, factors) in weights.chunks_exact_mut(S::LANES).zip(factors.chunks_exact(S::LANES)) {
                let weight = s.exp(s.sub(s.load(weights), zero));
                sum = s.add(sum, weight);
                // Values are added with their factor.
                s.store(if E::SCALED { s.mul(weight, s.load(factors)) } else { weight }, weights);
            }
            s.store(sum, sums);
            self.lse[h] = top;
        }
    }

    /// Adds the values of the rows whose weights are those of `turn`; meanwhile the other half of what is ahead is asked for.
    ///
    /// # Safety
    /// As [`Attention::keys`], which came before, with the same rows and turn.
    #[inline(always)]
    pub(super) unsafe fn values<S: Simd, E: Loaded>(
        &mut self,
        s: S,
        rows: &Chunk,
        ahead: &mut Ahead,
        turn: usize,
    ) {
        let (group, chunk) = (self.lse.len(), self.chunk);
        if rows.rows().is_empty() {
            return;
        }
        let weights = &self.weights[turn * group * chunk..][..group * chunk];
        let factors = &self.factors[turn * group * S::LANES..][..group * S::LANES];
        // SAFETY: passed on to the caller; `weights` and `factors` are this chunk's, `added` is as wide as it has to be.
        unsafe {
            let (weights, factors, added) = (weights.as_ptr(), factors.as_ptr(), self.added.as_mut_ptr());
            add_chunk::<S, E>(s, rows.rows(), ahead, self.shape, group, weights, chunk, factors, added);
        }
    }

    /// Divides by the sum of weights: `out` is `[group][values]`.
    #[inline(always)]
    pub(super) fn finish<S: Simd>(self, s: S, out: &mut [f32]) {
        let d = self.shape.values;
        let added = self.added.chunks_exact(d.next_multiple_of(S::LANES));
        for (h, (lse, added)) in self.lse.iter_mut().zip(added).enumerate() {
            let out = &mut out[h * d..][..d];
            if *lse == f32::NEG_INFINITY {
                out.fill(0.0);
                continue;
            }
            let sum = s.sum(s.load(&self.sums[h * S::LANES..][..S::LANES]));
            let inverse = s.splat(1.0 / sum);
            for (out, added) in out.chunks_mut(S::LANES).zip(added.chunks_exact(S::LANES)) {
                s.store(s.mul(s.load(added), inverse), out);
            }
            *lse += sum.ln();
        }
    }
}

#[inline(always)]
pub(super) fn merge<S: Simd>(s: S, o: &mut [f32], lse: &mut [f32], other_o: &[f32], other_lse: &[f32]) {
    let d = o.len() / lse.len();
    if d == 0 {
        return;
    }
    let parts = o.chunks_exact_mut(d).zip(other_o.chunks_exact(d));
    for ((o, other_o), (lse, other)) in parts.zip(lse.iter_mut().zip(other_lse)) {
        let Some((kept, added, merged)) = merge_weights(*lse, *other) else { continue };
        *lse = merged;
        let (kept, added) = (s.splat(kept), s.splat(added));
        for (o, other) in o.chunks_mut(S::LANES).zip(other_o.chunks(S::LANES)) {
            s.store(s.fma(s.load(o), kept, s.mul(s.load(other), added)), o);
        }
    }
}
