//! Scores of digests, and the digests themselves.

use super::Simd;
use super::stored::{Stored, by_dtype};
use crate::dtype::Dtype;

/// A dim-major matrix: dim j starts `j * stride` values after `at`.
#[derive(Clone, Copy)]
struct Columns {
    at: *const u8,
    stride: usize,
    dims: usize,
}

#[inline(always)]
#[allow(clippy::too_many_arguments)]
pub(super) fn score_columns<S: Simd>(
    s: S,
    dtype: Dtype,
    queries: &[f32],
    group: usize,
    block: &[u8],
    tokens: usize,
    out: &mut [f32],
    out_stride: usize,
) {
    let columns = Columns { at: block.as_ptr(), stride: tokens, dims: queries.len() / group };
    // SAFETY: the public method checked that the block holds dims · tokens values and that `out` has room for every score.
    unsafe {
        by_dtype!(dtype, multiply(s, queries.as_ptr(), group, columns, tokens, out.as_mut_ptr(), out_stride));
    }
}

/// `out[h][t] = Σ_j queries[h][j] · columns[j][t]` for the first `tokens` columns, tile by tile.
///
/// # Safety
/// `queries` is `[group][dims]`, `columns` has at least `tokens` columns, `out` has `tokens` places every `out_stride` values.
#[inline(always)]
unsafe fn multiply<S: Simd, E: Stored>(
    s: S,
    queries: *const f32,
    group: usize,
    columns: Columns,
    tokens: usize,
    out: *mut f32,
    out_stride: usize,
) {
    let mut h = 0;
    while h < group {
        let heads = super::tile(group - h, S::HEADS);
        // SAFETY: the tile's queries and scores are a part of the whole.
        unsafe {
            let (queries, out) = (queries.add(h * columns.dims), out.add(h * out_stride));
            match heads {
                1 => row_of_tiles::<S, E, 1>(s, queries, columns, tokens, out, out_stride),
                2 => row_of_tiles::<S, E, 2>(s, queries, columns, tokens, out, out_stride),
                3 => row_of_tiles::<S, E, 3>(s, queries, columns, tokens, out, out_stride),
                _ => row_of_tiles::<S, E, 4>(s, queries, columns, tokens, out, out_stride),
            }
        }
        h += heads;
    }
}

/// # Safety
/// As [`multiply`], for H queries.
#[inline(always)]
unsafe fn row_of_tiles<S: Simd, E: Stored, const H: usize>(
    s: S,
    queries: *const f32,
    columns: Columns,
    tokens: usize,
    out: *mut f32,
    out_stride: usize,
) {
    let mut t = 0;
    while t < tokens {
        let left = tokens - t;
        // SAFETY: each tile takes no more columns than are left.
        unsafe {
            let columns = Columns { at: columns.at.add(t * E::BYTES), ..columns };
            let out = out.add(t);
            t += if left >= 4 * S::LANES {
                tile::<S, E, H, 4>(s, queries, columns, out, out_stride);
                4 * S::LANES
            } else if left >= 2 * S::LANES {
                tile::<S, E, H, 2>(s, queries, columns, out, out_stride);
                2 * S::LANES
            } else if left >= S::LANES {
                tile::<S, E, H, 1>(s, queries, columns, out, out_stride);
                S::LANES
            } else {
                last_tile::<S, E, H>(s, queries, columns, left, out, out_stride);
                left
            };
        }
    }
}

/// `H` queries against `N` registers of columns.
///
/// # Safety
/// As [`multiply`], for H queries and N · LANES columns.
#[inline(always)]
unsafe fn tile<S: Simd, E: Stored, const H: usize, const N: usize>(
    s: S,
    queries: *const f32,
    columns: Columns,
    out: *mut f32,
    out_stride: usize,
) {
    let mut sums = [[s.splat(0.0); N]; H];
    // SAFETY: the caller promises the shapes.
    unsafe {
        for j in 0..columns.dims {
            let row = columns.at.add(j * columns.stride * E::BYTES);
            let mut factors = [s.splat(0.0); H];
            for h in 0..H {
                factors[h] = s.splat(*queries.add(h * columns.dims + j));
            }
            for i in 0..N {
                let values = E::load(s, row.add(i * S::LANES * E::BYTES));
                for h in 0..H {
                    sums[h][i] = s.fma(factors[h], values, sums[h][i]);
                }
            }
        }
        for h in 0..H {
            for i in 0..N {
                s.store_f32(sums[h][i], out.add(h * out_stride + i * S::LANES).cast());
            }
        }
    }
}

/// `H` queries against the last `n < LANES` columns.
///
/// # Safety
/// As [`multiply`], for H queries and n columns.
#[inline(always)]
unsafe fn last_tile<S: Simd, E: Stored, const H: usize>(
    s: S,
    queries: *const f32,
    columns: Columns,
    n: usize,
    out: *mut f32,
    out_stride: usize,
) {
    let mut sums = [s.splat(0.0); H];
    // SAFETY: the caller promises the shapes.
    unsafe {
        for j in 0..columns.dims {
            let values = E::load_part(s, columns.at.add(j * columns.stride * E::BYTES), n);
            for h in 0..H {
                sums[h] = s.fma(s.splat(*queries.add(h * columns.dims + j)), values, sums[h]);
            }
        }
        for h in 0..H {
            s.store_f32_part(sums[h], out.add(h * out_stride).cast(), n);
        }
    }
}

/// Each bound is summed as `dot` sums, with the end of each channel's range that gives the larger product in place of the key's value.
#[inline(always)]
pub(super) fn page_bounds<S: Simd>(s: S, queries: &[f32], group: usize, minmax: &[f32], out: &mut [f32]) {
    let d = queries.len() / group;
    let (min, max) = minmax.split_at(d);
    for (queries, out) in queries.chunks(4 * d).zip(out.chunks_mut(4)) {
        let mut sums = [s.splat(0.0); 4];
        for j in (0..d).step_by(S::LANES) {
            let (min, max) = (s.load(&min[j..]), s.load(&max[j..]));
            for h in 0..out.len() {
                let q = s.load(&queries[h * d..][..d][j..]);
                sums[h] = s.fma(q, s.where_positive(q, max, min), sums[h]);
            }
        }
        out.copy_from_slice(&s.sum4(sums)[..out.len()]);
    }
}

#[inline(always)]
pub(super) fn min_max_update<S: Simd>(s: S, rows: &[f32], d: usize, minmax: &mut [f32]) {
    let (min, max) = minmax.split_at_mut(d);
    for (chunk, (min, max)) in min.chunks_mut(S::LANES).zip(max.chunks_mut(S::LANES)).enumerate() {
        let (mut low, mut high) = (s.load(min), s.load(max));
        for row in rows.chunks_exact(d) {
            let v = s.load(&row[chunk * S::LANES..]);
            low = s.min(v, low);
            high = s.max(v, high);
        }
        s.store(low, min);
        s.store(high, max);
    }
}

#[inline(always)]
pub(super) fn project<S: Simd>(s: S, x: &[f32], a: &[f32], out: &mut [f32]) {
    let columns = Columns { at: a.as_ptr().cast(), stride: out.len(), dims: x.len() };
    // SAFETY: the public method checked that `a` is [x.len()][out.len()].
    unsafe { multiply::<S, super::stored::F32>(s, x.as_ptr(), 1, columns, out.len(), out.as_mut_ptr(), 0) }
}

#[inline(always)]
#[allow(clippy::too_many_arguments)]
pub(super) fn project_columns<S: Simd>(
    s: S,
    rows: &[f32],
    a: &[f32],
    d_out: usize,
    dtype: Dtype,
    block: &mut [u8],
    tokens: usize,
    first: usize,
) {
    let most = crate::cpu::scalar::score::most(dtype);
    by_dtype!(dtype, write_columns(s, rows, a, d_out, block, tokens, (first, most)));
}

/// Rows and outputs of a tile of `write_columns`.
const TILE: (usize, usize) = (16, 64);

#[inline(always)]
fn write_columns<S: Simd, E: Stored>(
    s: S,
    rows: &[f32],
    a: &[f32],
    d_out: usize,
    block: &mut [u8],
    tokens: usize,
    (first, most): (usize, f32),
) {
    let d_in = a.len() / d_out;
    let mut projected = [0.0_f32; TILE.0 * TILE.1];
    for (part, rows) in rows.chunks(TILE.0 * d_in).enumerate() {
        let (n, first) = (rows.len() / d_in, first + part * TILE.0);
        for j0 in (0..d_out).step_by(TILE.1) {
            let width = TILE.1.min(d_out - j0);
            let columns = Columns { at: a[j0..].as_ptr().cast(), stride: d_out, dims: d_in };
            // SAFETY: `rows` is [n][d_in], `a` is [d_in][d_out] with `width` columns from j0, and n · TILE.1 scores have room.
            unsafe {
                let out = projected.as_mut_ptr();
                multiply::<S, super::stored::F32>(s, rows.as_ptr(), n, columns, width, out, TILE.1);
            }
            for j in 0..width {
                let mut column = [0.0_f32; TILE.0];
                for i in 0..n {
                    column[i] = projected[i * TILE.1 + j].clamp(-most, most);
                }
                let to = &mut block[((j0 + j) * tokens + first) * E::BYTES..][..n * E::BYTES];
                for (column, to) in column[..n].chunks(S::LANES).zip(to.chunks_mut(S::LANES * E::BYTES)) {
                    let (v, to) = (s.load(column), to.as_mut_ptr());
                    // SAFETY: `to` has room for as many values as `column` holds; only a full chunk is stored whole.
                    unsafe {
                        if column.len() == S::LANES {
                            E::store(s, v, to);
                        } else {
                            E::store_part(s, v, to, column.len());
                        }
                    }
                }
            }
        }
    }
}
