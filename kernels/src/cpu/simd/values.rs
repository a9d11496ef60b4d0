//! Weighted sums of the values of scattered rows.

use super::Simd;
use super::rows::Ahead;
use super::stored::Loaded;
use crate::layout::RowShape;

/// Registers of columns of a tile.
const WIDE: usize = 4;

/// `added[h] ← factors[h] · added[h] + Σ_t weights[h][t] · v_t` over a chunk's rows, in order; meanwhile half of what is ahead is asked for.
///
/// # Safety
/// The rows are readable; `added` is `[group][d, up to whole registers]`; `weights` holds one per row for each query, one query every
/// `stride` values; `factors` is `[group][lanes]`.
#[inline(always)]
#[allow(clippy::too_many_arguments)]
pub(super) unsafe fn add_chunk<S: Simd, E: Loaded>(
    s: S,
    rows: &[*const u8],
    ahead: &mut Ahead,
    shape: RowShape,
    group: usize,
    weights: *const f32,
    stride: usize,
    factors: *const f32,
    added: *mut f32,
) {
    let d = shape.values;
    // A wide tile, a narrow one and the last columns each go through all rows once, and ask for their share.
    let tiles =
        d / (WIDE * S::LANES) + d % (WIDE * S::LANES) / S::LANES + usize::from(!d.is_multiple_of(S::LANES));
    let lines = ahead.lines().div_ceil(2 * tiles.max(1));
    let mut values = Values { rows, lines, d, stride, column: shape.column };
    let mut h = 0;
    while h < group {
        let heads = super::tile(group - h, S::HEADS);
        // SAFETY: the rows are readable; weights, factors and sums from h on are those of `heads` queries.
        unsafe {
            let sums = Sums {
                weights: weights.add(h * stride),
                factors: factors.add(h * S::LANES),
                added: added.add(h * d.next_multiple_of(S::LANES)),
            };
            match heads {
                1 => value_row::<S, E, 1>(s, &values, ahead, sums),
                2 => value_row::<S, E, 2>(s, &values, ahead, sums),
                3 => value_row::<S, E, 3>(s, &values, ahead, sums),
                _ => value_row::<S, E, 4>(s, &values, ahead, sums),
            }
        }
        // Once is enough for what is to come.
        values.lines = 0;
        h += heads;
    }
}

/// A chunk of values.
struct Values<'a> {
    rows: &'a [*const u8],
    /// How many lines are asked for with every row of a tile.
    lines: usize,
    d: usize,
    /// From one query's weights to the next one's.
    stride: usize,
    /// Where in a row the values begin, in bytes.
    column: usize,
}

/// Where some queries' weights, factors and sums are.
#[derive(Clone, Copy)]
struct Sums {
    weights: *const f32,
    factors: *const f32,
    added: *mut f32,
}

/// All columns for `H` queries, in tiles of as many registers as there is room for.
///
/// # Safety
/// The rows are readable; `weights` is `[H][rows]`, `values.stride` apart; `factors` is `[H][lanes]`; `added` is `[H][d, up to whole
/// registers]`.
#[inline(always)]
unsafe fn value_row<S: Simd, E: Loaded, const H: usize>(
    s: S,
    values: &Values,
    ahead: &mut Ahead,
    sums: Sums,
) {
    let d = values.d;
    let mut j = 0;
    // SAFETY: each tile takes no more columns than are left.
    unsafe {
        while d - j >= WIDE * S::LANES {
            value_tile::<S, E, H, WIDE>(s, values, ahead, j, sums);
            j += WIDE * S::LANES;
        }
        while d - j >= S::LANES {
            value_tile::<S, E, H, 1>(s, values, ahead, j, sums);
            j += S::LANES;
        }
        if j < d {
            last_value_tile::<S, E, H>(s, values, ahead, j, sums);
        }
    }
}

/// `H` queries, `N` registers of columns from `j` on.
///
/// # Safety
/// As [`value_row`]; the columns are within d.
#[inline(always)]
unsafe fn value_tile<S: Simd, E: Loaded, const H: usize, const N: usize>(
    s: S,
    values: &Values,
    ahead: &mut Ahead,
    j: usize,
    Sums { weights, factors, added }: Sums,
) {
    let d = values.d.next_multiple_of(S::LANES);
    let mut sums = [[s.splat(0.0); N]; H];
    // SAFETY: the caller promises the shapes.
    unsafe {
        for h in 0..H {
            let factor = s.load_f32(factors.add(h * S::LANES).cast());
            for i in 0..N {
                sums[h][i] = s.mul(factor, s.load_f32(added.add(h * d + j + i * S::LANES).cast()));
            }
        }
        for (r, row) in values.rows.iter().enumerate() {
            ahead.ask(values.lines);
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
                s.store_f32(sums[h][i], added.add(h * d + j + i * S::LANES).cast());
            }
        }
    }
}

/// `H` queries, the last columns from `j` on, fewer than a register.
///
/// # Safety
/// As [`value_row`].
#[inline(always)]
unsafe fn last_value_tile<S: Simd, E: Loaded, const H: usize>(
    s: S,
    values: &Values,
    ahead: &mut Ahead,
    j: usize,
    Sums { weights, factors, added }: Sums,
) {
    let (d, left) = (values.d.next_multiple_of(S::LANES), values.d - j);
    let mut sums = [s.splat(0.0); H];
    // SAFETY: the caller promises the shapes.
    unsafe {
        for h in 0..H {
            let factor = s.load_f32(factors.add(h * S::LANES).cast());
            sums[h] = s.mul(factor, s.load_f32(added.add(h * d + j).cast()));
        }
        for (r, row) in values.rows.iter().enumerate() {
            ahead.ask(values.lines);
            let v = E::load_part(s, row.add(values.column + j * E::BYTES), left);
            for h in 0..H {
                sums[h] = s.fma(s.splat(*weights.add(h * values.stride + r)), v, sums[h]);
            }
        }
        for h in 0..H {
            s.store_f32(sums[h], added.add(h * d + j).cast());
        }
    }
}
