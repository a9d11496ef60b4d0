//! Attention over scattered rows: chunk by chunk the scores, the weights, the sum of values.
//!
//! A chunk is a fixed number of rows of the sequence, whatever runs they come from, so that nothing depends on where runs begin and
//! end. It stays in the second-level cache, so that memory is read once; between chunks the softmax goes on as in Milakov &
//! Gimelshein's online softmax (2018): a new maximum scales down what was summed.

use super::elementwise::multiply;
use super::reduce::{exp_in_place, max};
use super::rows::{BLOCK, Blocks, prefetch};
use super::stored::{Stored, by_dtype};
use super::values::add_block;
use super::{Simd, write4};
use crate::cpu::scalar::merge_weights;
use crate::dtype::Dtype;
use crate::layout::RowShape;
use crate::run::{AttendScratch, Run};

/// Rows of a tile of scores: as many as [`Simd::sum4`] sums.
const TILE: usize = 4;
/// Bytes of a chunk: half of a small second-level cache.
const CHUNK_BYTES: usize = 128 << 10;

/// Rows of a chunk, whole blocks.
pub(super) fn chunk_rows(row_bytes: usize) -> usize {
    (CHUNK_BYTES / row_bytes).next_multiple_of(BLOCK).clamp(4 * BLOCK, 64 * BLOCK)
}

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
pub(super) unsafe fn all_scores<S: Simd, E: Stored>(
    s: S,
    shape: RowShape,
    queries: &[f32],
    runs: &[Run],
    out: *mut f32,
    out_stride: usize,
) {
    // Nobody is going to read the values.
    let shape = RowShape { values: 0, ..shape };
    let mut blocks = Blocks::new(runs, shape.row_bytes);
    let mut t = 0;
    while !blocks.rows().is_empty() {
        // SAFETY: passed on to the caller; the block's scores are a part of the whole.
        unsafe { score_block::<S, E>(s, shape, queries, 1.0, &blocks, out.add(t), out_stride) };
        t += blocks.rows().len();
        blocks.advance();
    }
}

/// Scores of a block's rows; meanwhile the next block's keys are asked for, and its values, where they lie elsewhere.
///
/// # Safety
/// The rows are readable; `out` has room for a score per row for each query, one query every `out_stride` values.
#[inline(always)]
unsafe fn score_block<S: Simd, E: Stored>(
    s: S,
    shape: RowShape,
    queries: &[f32],
    scale: f32,
    blocks: &Blocks,
    out: *mut f32,
    out_stride: usize,
) {
    let d = shape.keys;
    let (group, n) = (queries.len() / d, blocks.rows().len());
    let values = if shape.column > 0 { shape.values * E::BYTES } else { 0 };
    for first in (0..n).step_by(TILE) {
        for row in blocks.ahead().iter().skip(first).take(TILE) {
            prefetch::<true>(*row, d * E::BYTES);
            if values > 0 {
                prefetch::<false>(row.wrapping_add(shape.column), values);
            }
        }
        let (rows, count) = (blocks.tile(first), TILE.min(n - first));
        let mut h = 0;
        while h < group {
            let heads = super::tile(group - h, S::HEADS);
            // SAFETY: the rows are readable; queries from h on are [heads][d]; `out` has room for `count` scores of each.
            unsafe {
                let (queries, out) = (queries.as_ptr().add(h * d), out.add(h * out_stride + first));
                match heads {
                    1 => score_tile::<S, E, 1>(s, queries, d, scale, rows, count, out, out_stride),
                    2 => score_tile::<S, E, 2>(s, queries, d, scale, rows, count, out, out_stride),
                    3 => score_tile::<S, E, 3>(s, queries, d, scale, rows, count, out, out_stride),
                    _ => score_tile::<S, E, 4>(s, queries, d, scale, rows, count, out, out_stride),
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
unsafe fn score_tile<S: Simd, E: Stored, const H: usize>(
    s: S,
    queries: *const f32,
    d: usize,
    scale: f32,
    rows: [*const u8; TILE],
    count: usize,
    out: *mut f32,
    out_stride: usize,
) {
    let mut sums = [[s.splat(0.0); TILE]; H];
    let whole = d - d % S::LANES;
    // SAFETY: the caller promises the shapes; parts are as long as what is left of d.
    unsafe {
        for j in (0..whole).step_by(S::LANES) {
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
        for h in 0..H {
            let mut scores = s.sum4(sums[h]);
            for score in &mut scores {
                *score *= scale;
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
pub(super) unsafe fn attend_rows<S: Simd, E: Stored>(
    s: S,
    shape: RowShape,
    queries: &[f32],
    scale: f32,
    runs: &[Run],
    scratch: &mut AttendScratch,
    out: &mut [f32],
    lse: &mut [f32],
) {
    let chunk = chunk_rows(shape.row_bytes);
    let room = scratch.room(lse.len() * (chunk + 1));
    let mut attention = Attention::new(shape, scale, chunk, room, out, lse);
    let [mut keys, mut values, mut coming] = [(); 3].map(|()| Blocks::new(runs, shape.row_bytes));
    for _ in 0..chunk / BLOCK {
        coming.advance();
    }
    while !keys.rows().is_empty() {
        // SAFETY: passed on to the caller.
        unsafe { attention.add::<S, E>(s, queries, &mut keys, &mut values, &mut coming) };
    }
    attention.finish(s);
}

/// Attention under way: what is kept from chunk to chunk.
pub(super) struct Attention<'a> {
    shape: RowShape,
    scale: f32,
    /// Rows of a chunk, whole blocks.
    chunk: usize,
    /// `[group][chunk]`.
    weights: &'a mut [f32],
    /// `[group]`: the weights so far, added.
    sums: &'a mut [f32],
    /// `[group][values]`: the weighted values so far, added.
    out: &'a mut [f32],
    /// `[group]`: until the end, the largest score so far.
    lse: &'a mut [f32],
}

impl<'a> Attention<'a> {
    /// Nothing yet; `room` has a place for each query and row of a chunk, and one more for each query.
    #[inline(always)]
    pub(super) fn new(
        shape: RowShape,
        scale: f32,
        chunk: usize,
        room: &'a mut [f32],
        out: &'a mut [f32],
        lse: &'a mut [f32],
    ) -> Self {
        let (weights, sums) = room.split_at_mut(lse.len() * chunk);
        lse.fill(f32::NEG_INFINITY);
        sums.fill(0.0);
        out.fill(0.0);
        Self { shape, scale, chunk, weights, sums, out, lse }
    }

    /// Adds the next chunk: `keys` and `values` stand at its first row, and then at the next one's; `coming` at the first row of the
    /// chunk after it, whose keys are asked for while values are summed, so that memory never rests.
    ///
    /// # Safety
    /// The rows are readable, of the shape and the type.
    #[inline(always)]
    pub(super) unsafe fn add<S: Simd, E: Stored>(
        &mut self,
        s: S,
        queries: &[f32],
        keys: &mut Blocks,
        values: &mut Blocks,
        coming: &mut Blocks,
    ) {
        let (group, d, chunk) = (self.lse.len(), self.shape.values, self.chunk);
        let mut n = 0;
        while n < chunk && !keys.rows().is_empty() {
            // SAFETY: passed on to the caller; a chunk is whole blocks, and `weights` has room for a chunk of each query.
            unsafe {
                let weights = self.weights.as_mut_ptr().add(n);
                score_block::<S, E>(s, self.shape, queries, self.scale, keys, weights, chunk);
            };
            n += keys.rows().len();
            keys.advance();
        }
        for h in 0..group {
            let weights = &mut self.weights[h * chunk..][..n];
            let (top, lse) = (max(s, weights), &mut self.lse[h]);
            if top > *lse {
                let factor = (*lse - top).exp();
                multiply(s, &mut self.out[h * d..][..d], factor);
                self.sums[h] *= factor;
                *lse = top;
            }
            if *lse == f32::NEG_INFINITY {
                weights.fill(0.0);
            } else {
                self.sums[h] += exp_in_place(s, weights, *lse);
            }
        }
        let mut t = 0;
        while t < n {
            // SAFETY: passed on to the caller; `weights` holds this chunk's, `out` is [group][d].
            unsafe {
                let weights = self.weights.as_ptr().add(t);
                let out = self.out.as_mut_ptr();
                add_block::<S, E>(s, values, coming.rows(), self.shape, group, weights, chunk, out);
            };
            t += values.rows().len();
            values.advance();
            coming.advance();
        }
    }

    /// Divides by the sum of weights.
    #[inline(always)]
    pub(super) fn finish<S: Simd>(self, s: S) {
        let d = self.shape.values;
        for (h, lse) in self.lse.iter_mut().enumerate() {
            if *lse != f32::NEG_INFINITY {
                multiply(s, &mut self.out[h * d..][..d], 1.0 / self.sums[h]);
                *lse += self.sums[h].ln();
            }
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
