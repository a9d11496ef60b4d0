//! Bounds of many pages, two at a time, so that a query is loaded, and its signs are found, once for both of them.
//!
//! No more than two, and nothing asked for ahead: so memory is read nearly in order, and the processor's own prefetcher keeps up with
//! it. Four pages at a time, or software's prefetches between, took half as long again (measured on Zen 4).

use super::stored::{Stored, by_dtype};
use super::{Simd, write2};
use crate::dtype::Dtype;

/// Pages at a time.
const PAGES: usize = 2;

#[inline(always)]
#[allow(clippy::too_many_arguments)]
pub(super) fn page_bounds_many<S: Simd>(
    s: S,
    dtype: Dtype,
    queries: &[f32],
    group: usize,
    blocks: &[u8],
    pages: usize,
    out: &mut [f32],
    out_stride: usize,
) {
    let d = queries.len() / group;
    // SAFETY: the public method checked that there are as many blocks as pages, and room for every bound.
    unsafe {
        let (queries, blocks, out) = (queries.as_ptr(), blocks.as_ptr(), out.as_mut_ptr());
        by_dtype!(dtype, all_pages(s, queries, group, d, blocks, pages, out, out_stride));
    }
}

/// # Safety
/// `queries` is `[group][d]`, `blocks` is `[pages][2][d]`, `out` has room for a bound per page every `out_stride` values.
#[inline(always)]
#[allow(clippy::too_many_arguments)]
unsafe fn all_pages<S: Simd, E: Stored>(
    s: S,
    queries: *const f32,
    group: usize,
    d: usize,
    blocks: *const u8,
    pages: usize,
    out: *mut f32,
    out_stride: usize,
) {
    let page_bytes = 2 * d * E::BYTES;
    for first in (0..pages).step_by(PAGES) {
        let count = PAGES.min(pages - first);
        // Where the pages end, the last one twice.
        let places = [0, count - 1].map(|i| blocks.wrapping_add((first + i) * page_bytes));
        let mut h = 0;
        while h < group {
            let heads = super::tile(group - h, S::HEADS);
            // SAFETY: the pages are readable; queries from h on are [heads][d]; `out` has room for `count` bounds of each.
            unsafe {
                let (queries, out) = (queries.add(h * d), out.add(h * out_stride + first));
                match heads {
                    1 => tile::<S, E, 1>(s, queries, d, places, count, out, out_stride),
                    2 => tile::<S, E, 2>(s, queries, d, places, count, out, out_stride),
                    3 => tile::<S, E, 3>(s, queries, d, places, count, out, out_stride),
                    _ => tile::<S, E, 4>(s, queries, d, places, count, out, out_stride),
                }
            }
            h += heads;
        }
    }
}

/// `H` queries' bounds of two pages, of which the first `count` are wanted.
///
/// # Safety
/// `queries` is `[H][d]`, the pages are `[2][d]` each, `out` has room for `count` bounds every `out_stride` values.
#[inline(always)]
unsafe fn tile<S: Simd, E: Stored, const H: usize>(
    s: S,
    queries: *const f32,
    d: usize,
    pages: [*const u8; PAGES],
    count: usize,
    out: *mut f32,
    out_stride: usize,
) {
    let mut sums = [[s.splat(0.0); PAGES]; H];
    let whole = d - d % S::LANES;
    // SAFETY: the caller promises the shapes; parts are as long as what is left of d.
    unsafe {
        for j in (0..whole).step_by(S::LANES) {
            let (mut low, mut high) = ([s.splat(0.0); PAGES], [s.splat(0.0); PAGES]);
            for p in 0..PAGES {
                low[p] = E::load(s, pages[p].add(j * E::BYTES));
                high[p] = E::load(s, pages[p].add((d + j) * E::BYTES));
            }
            for h in 0..H {
                let q = s.load_f32(queries.add(h * d + j).cast());
                for p in 0..PAGES {
                    sums[h][p] = s.fma(q, s.where_positive(q, high[p], low[p]), sums[h][p]);
                }
            }
        }
        if whole < d {
            let left = d - whole;
            for p in 0..PAGES {
                let low = E::load_part(s, pages[p].add(whole * E::BYTES), left);
                let high = E::load_part(s, pages[p].add((d + whole) * E::BYTES), left);
                for h in 0..H {
                    let q = s.load_f32_part(queries.add(h * d + whole).cast(), left);
                    sums[h][p] = s.fma(q, s.where_positive(q, high, low), sums[h][p]);
                }
            }
        }
        for h in (0..H).step_by(2) {
            // Two queries' sums at once; where there is no second one, the first once more.
            let other = (h + 1).min(H - 1);
            let [a, b, c, d] = s.sum4([sums[h][0], sums[h][1], sums[other][0], sums[other][1]]);
            write2([a, b], count, out.add(h * out_stride));
            write2([c, d], count, out.add(other * out_stride));
        }
    }
}
