//! Attention over scattered rows: scores of all rows, then weights of all rows, then the sum of values.
//!
//! The passes are apart so that nothing depends on where runs begin and end. Within a pass rows go by in blocks of pointers, whatever
//! runs they come from, and while one block is worked on, the next one's lines are on their way.

use super::Simd;
use super::elementwise::multiply;
use super::reduce::{exp_in_place, max};
use super::stored::{Stored, by_dtype};
use crate::cpu::scalar::merge_weights;
use crate::dtype::Dtype;
use crate::run::Run;

/// Rows of a block: far enough ahead to hide memory, few enough not to fill the queue of outstanding lines.
const BLOCK: usize = 16;
/// Rows of a tile of scores: as many as [`Simd::sum4`] sums.
const TILE: usize = 4;
const LINE: usize = 64;

/// Hands out pointers to the rows of all runs, in order.
struct Rows<'a> {
    runs: std::slice::Iter<'a, Run>,
    at: *const u8,
    left: usize,
    row_bytes: usize,
}

impl<'a> Rows<'a> {
    #[inline(always)]
    fn new(runs: &'a [Run], row_bytes: usize) -> Self {
        Self { runs: runs.iter(), at: std::ptr::null(), left: 0, row_bytes }
    }

    /// The next rows, up to a block, and how many they are; the last one stands in all places after it.
    #[inline(always)]
    fn next(&mut self, block: &mut [*const u8; BLOCK]) -> usize {
        let mut n = 0;
        while n < BLOCK {
            if self.left == 0 {
                let Some(run) = self.runs.next() else { break };
                (self.at, self.left) = (run.rows_ptr, run.rows);
                continue;
            }
            let take = self.left.min(BLOCK - n);
            for row in &mut block[n..n + take] {
                *row = self.at;
                self.at = self.at.wrapping_add(self.row_bytes);
            }
            self.left -= take;
            n += take;
        }
        if n > 0 {
            let last = block[n - 1];
            block[n..].fill(last);
        }
        n
    }
}

/// Asks for `bytes` bytes from `at` on.
#[inline(always)]
fn prefetch(at: *const u8, bytes: usize) {
    let skew = at.addr() % LINE;
    let first = at.wrapping_sub(skew);
    for line in (0..bytes + skew).step_by(LINE) {
        super::prefetch(first.wrapping_add(line));
    }
}

/// # Safety
/// As [`Kernels::scores`](crate::Kernels::scores); each score is multiplied by `scale`.
#[inline(always)]
#[allow(clippy::too_many_arguments)]
pub(super) unsafe fn scores<S: Simd>(
    s: S,
    dtype: Dtype,
    queries: &[f32],
    d: usize,
    scale: f32,
    runs: &[Run],
    out: &mut [f32],
    out_stride: usize,
) {
    // SAFETY: passed on to the caller.
    unsafe { by_dtype!(dtype, score_rows(s, queries, d, scale, runs, out.as_mut_ptr(), out_stride)) }
}

/// # Safety
/// Every row is readable; `out` has room for a score per row for each query, one query every `out_stride` values.
#[inline(always)]
unsafe fn score_rows<S: Simd, E: Stored>(
    s: S,
    queries: &[f32],
    d: usize,
    scale: f32,
    runs: &[Run],
    out: *mut f32,
    out_stride: usize,
) {
    let group = queries.len() / d;
    let mut rows = Rows::new(runs, 2 * d * E::BYTES);
    let (mut block, mut ahead) = ([std::ptr::null(); BLOCK], [std::ptr::null(); BLOCK]);
    let mut t = 0;
    let mut n = rows.next(&mut block);
    while n > 0 {
        let n_ahead = rows.next(&mut ahead);
        for first in (0..n).step_by(TILE) {
            for row in &ahead[first..(first + TILE).min(n_ahead).max(first)] {
                prefetch(*row, d * E::BYTES);
            }
            let rows = [block[first], block[first + 1], block[first + 2], block[first + 3]];
            let count = TILE.min(n - first);
            let mut h = 0;
            while h < group {
                let heads = super::tile(group - h, S::HEADS);
                // SAFETY: the rows are readable; queries from h on are [heads][d]; `out` has room for `count` scores of each.
                unsafe {
                    let (queries, out) = (queries.as_ptr().add(h * d), out.add(h * out_stride + t + first));
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
        t += n;
        n = n_ahead;
        std::mem::swap(&mut block, &mut ahead);
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
            let out = out.add(h * out_stride);
            if count == TILE {
                out.cast::<[f32; TILE]>().write_unaligned(scores);
            } else {
                std::ptr::copy_nonoverlapping(scores.as_ptr(), out, count);
            }
        }
    }
}

/// # Safety
/// As [`Kernels::attend`](crate::Kernels::attend); `weights` holds `[group][n]` values, n the rows of all runs, not zero; `norms` holds
/// `[group]`.
#[inline(always)]
#[allow(clippy::too_many_arguments)]
pub(super) unsafe fn attend<S: Simd>(
    s: S,
    dtype: Dtype,
    queries: &[f32],
    d: usize,
    scale: f32,
    runs: &[Run],
    weights: &mut [f32],
    norms: &mut [f32],
    out: &mut [f32],
    lse: &mut [f32],
) {
    let n = weights.len() / lse.len();
    // SAFETY: passed on to the caller.
    unsafe { scores(s, dtype, queries, d, scale, runs, weights, n) };
    for ((weights, lse), norm) in weights.chunks_exact_mut(n).zip(lse.iter_mut()).zip(norms.iter_mut()) {
        let top = max(s, weights);
        if top == f32::NEG_INFINITY {
            weights.fill(0.0);
            (*lse, *norm) = (top, 0.0);
        } else {
            let sum = exp_in_place(s, weights, top);
            (*lse, *norm) = (top + sum.ln(), 1.0 / sum);
        }
    }
    out.fill(0.0);
    // SAFETY: passed on to the caller; `weights` is [group][n], `out` is [group][d].
    unsafe { by_dtype!(dtype, add_values(s, weights, n, d, runs, out.as_mut_ptr())) };
    for (out, norm) in out.chunks_exact_mut(d).zip(norms) {
        multiply(s, out, *norm);
    }
}

/// `out[h] += Σ_t weights[h][t] · v_t`, row by row in order.
///
/// # Safety
/// Every row is readable, there are `n` of them; `out` is `[group][d]`, `weights` `[group][n]`.
#[inline(always)]
unsafe fn add_values<S: Simd, E: Stored>(
    s: S,
    weights: &[f32],
    n: usize,
    d: usize,
    runs: &[Run],
    out: *mut f32,
) {
    let group = weights.len() / n;
    let mut rows = Rows::new(runs, 2 * d * E::BYTES);
    let (mut block, mut ahead) = ([std::ptr::null(); BLOCK], [std::ptr::null(); BLOCK]);
    let mut t = 0;
    let mut count = rows.next(&mut block);
    while count > 0 {
        let n_ahead = rows.next(&mut ahead);
        let mut values =
            Values { rows: &block[..count], ahead: &ahead[..n_ahead], d, n, column: d * E::BYTES };
        let mut h = 0;
        while h < group {
            let heads = super::tile(group - h, S::HEADS);
            // SAFETY: the rows are readable; weights from h and t on are [heads][count], n apart; `out` from h on is [heads][d].
            unsafe {
                let (weights, out) = (weights.as_ptr().add(h * n + t), out.add(h * d));
                match heads {
                    1 => value_row::<S, E, 1>(s, &values, weights, out),
                    2 => value_row::<S, E, 2>(s, &values, weights, out),
                    3 => value_row::<S, E, 3>(s, &values, weights, out),
                    _ => value_row::<S, E, 4>(s, &values, weights, out),
                }
            }
            // Once is enough for what is to come.
            values.ahead = &[];
            h += heads;
        }
        t += count;
        count = n_ahead;
        std::mem::swap(&mut block, &mut ahead);
    }
}

/// A block of values.
struct Values<'a> {
    rows: &'a [*const u8],
    /// The rows of the next block, to be asked for on the way.
    ahead: &'a [*const u8],
    d: usize,
    /// Weights of a query.
    n: usize,
    /// Where in a row the values begin, in bytes.
    column: usize,
}

/// All columns for `H` queries, in tiles of as many registers as there is room for.
///
/// # Safety
/// The rows are readable; `weights` is `[H][rows]`, `values.n` apart; `out` is `[H][d]`.
#[inline(always)]
unsafe fn value_row<S: Simd, E: Stored, const H: usize>(
    s: S,
    values: &Values,
    weights: *const f32,
    out: *mut f32,
) {
    let d = values.d;
    let mut j = 0;
    // SAFETY: each tile takes no more columns than are left.
    unsafe {
        while d - j >= 4 * S::LANES {
            value_tile::<S, E, H, 4>(s, values, j, weights, out);
            j += 4 * S::LANES;
        }
        while d - j >= S::LANES {
            value_tile::<S, E, H, 1>(s, values, j, weights, out);
            j += S::LANES;
        }
        if j < d {
            last_value_tile::<S, E, H>(s, values, j, weights, out);
        }
    }
}

/// `H` queries, `N` registers of columns from `j` on.
///
/// # Safety
/// As [`value_row`]; the columns are within d.
#[inline(always)]
unsafe fn value_tile<S: Simd, E: Stored, const H: usize, const N: usize>(
    s: S,
    values: &Values,
    j: usize,
    weights: *const f32,
    out: *mut f32,
) {
    let d = values.d;
    let mut sums = [[s.splat(0.0); N]; H];
    // SAFETY: the caller promises the shapes.
    unsafe {
        for h in 0..H {
            for i in 0..N {
                sums[h][i] = s.load_f32(out.add(h * d + j + i * S::LANES).cast());
            }
        }
        for (r, row) in values.rows.iter().enumerate() {
            if let Some(row) = values.ahead.get(r) {
                prefetch(row.add(values.column + j * E::BYTES), N * S::LANES * E::BYTES);
            }
            let mut w = [s.splat(0.0); H];
            for h in 0..H {
                w[h] = s.splat(*weights.add(h * values.n + r));
            }
            for i in 0..N {
                let v = E::load(s, row.add(values.column + (j + i * S::LANES) * E::BYTES));
                for h in 0..H {
                    sums[h][i] = s.fma(w[h], v, sums[h][i]);
                }
            }
        }
        for h in 0..H {
            for i in 0..N {
                s.store_f32(sums[h][i], out.add(h * d + j + i * S::LANES).cast());
            }
        }
    }
}

/// `H` queries, the last columns from `j` on, fewer than a register.
///
/// # Safety
/// As [`value_row`].
#[inline(always)]
unsafe fn last_value_tile<S: Simd, E: Stored, const H: usize>(
    s: S,
    values: &Values,
    j: usize,
    weights: *const f32,
    out: *mut f32,
) {
    let (d, left) = (values.d, values.d - j);
    let mut sums = [s.splat(0.0); H];
    // SAFETY: the caller promises the shapes.
    unsafe {
        for h in 0..H {
            sums[h] = s.load_f32_part(out.add(h * d + j).cast(), left);
        }
        for (r, row) in values.rows.iter().enumerate() {
            let v = E::load_part(s, row.add(values.column + j * E::BYTES), left);
            for h in 0..H {
                sums[h] = s.fma(s.splat(*weights.add(h * values.n + r)), v, sums[h]);
            }
        }
        for h in 0..H {
            s.store_f32_part(sums[h], out.add(h * d + j).cast(), left);
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
