//! Weighted sums of the values of scattered rows.

use super::Simd;
use super::rows::{Blocks, prefetch};
use super::stored::Stored;
use crate::layout::RowShape;

/// `out[h] += Σ_t weights[h][t] · v_t` over a block's rows, in order; meanwhile the keys of rows that are coming are asked for.
///
/// # Safety
/// The rows are readable; `out` is `[group][d]`; `weights` holds one per row for each query, one query every `stride` values.
#[inline(always)]
#[allow(clippy::too_many_arguments)]
pub(super) unsafe fn add_block<S: Simd, E: Stored>(
    s: S,
    blocks: &Blocks,
    coming: &[*const u8],
    shape: RowShape,
    group: usize,
    weights: *const f32,
    stride: usize,
    out: *mut f32,
) {
    let (rows, ahead, d) = (blocks.rows(), blocks.ahead(), shape.values);
    let key_bytes = shape.keys * E::BYTES;
    let mut values = Values { rows, ahead, coming, key_bytes, d, stride, column: shape.column };
    let mut h = 0;
    while h < group {
        let heads = super::tile(group - h, S::HEADS);
        // SAFETY: the rows are readable; weights from h on are [heads][rows], `stride` apart; `out` from h on is [heads][d].
        unsafe {
            let (weights, out) = (weights.add(h * stride), out.add(h * d));
            match heads {
                1 => value_row::<S, E, 1>(s, &values, weights, out),
                2 => value_row::<S, E, 2>(s, &values, weights, out),
                3 => value_row::<S, E, 3>(s, &values, weights, out),
                _ => value_row::<S, E, 4>(s, &values, weights, out),
            }
        }
        // Once is enough for what is to come.
        (values.ahead, values.coming) = (&[], &[]);
        h += heads;
    }
}

/// A block of values.
struct Values<'a> {
    rows: &'a [*const u8],
    /// The rows of the next block, to be asked for on the way.
    ahead: &'a [*const u8],
    /// Rows whose keys, of so many bytes, are needed soon.
    coming: &'a [*const u8],
    key_bytes: usize,
    d: usize,
    /// From one query's weights to the next one's.
    stride: usize,
    /// Where in a row the values begin, in bytes.
    column: usize,
}

/// All columns for `H` queries, in tiles of as many registers as there is room for.
///
/// # Safety
/// The rows are readable; `weights` is `[H][rows]`, `values.stride` apart; `out` is `[H][d]`.
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
                prefetch::<true>(row.add(values.column + j * E::BYTES), N * S::LANES * E::BYTES);
            }
            if let Some(row) = values.coming.get(r).filter(|_| j < values.key_bytes) {
                // Each tile of columns asks for its share.
                let share = (values.key_bytes * N * S::LANES).div_ceil(d);
                prefetch::<false>(row.wrapping_add(share * (j / (N * S::LANES))), share);
            }
            let mut w = [s.splat(0.0); H];
            for h in 0..H {
                w[h] = s.splat(*weights.add(h * values.stride + r));
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
                sums[h] = s.fma(s.splat(*weights.add(h * values.stride + r)), v, sums[h]);
            }
        }
        for h in 0..H {
            s.store_f32_part(sums[h], out.add(h * d + j).cast(), left);
        }
    }
}
