//! Bounds of many pages, two or four at a time, so that a query is loaded, and its signs are found, once for all of them.
//!
//! Four only where memory is [asked for ahead](super::stream) and there are registers for them. Otherwise no more than two, so that
//! memory is read nearly in order, and the processor's own prefetcher keeps up with it.

use super::stored::{Stored, by_dtype};
use super::stream::{self, LINE, Stream};
use super::{Simd, write2, write4};
use crate::dtype::Dtype;

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
    // SAFETY: the public method checked that there are as many blocks as pages, and room for every bound.
    unsafe { by_dtype!(dtype, any_pages(s, queries, group, blocks, pages, out.as_mut_ptr(), out_stride)) }
}

/// As many pages at a time as suit the processor.
///
/// # Safety
/// `blocks` is `[pages][2][d]`, `out` has room for a bound per page every `out_stride` values.
#[inline(always)]
unsafe fn any_pages<S: Simd, E: Stored>(
    s: S,
    queries: &[f32],
    group: usize,
    blocks: &[u8],
    pages: usize,
    out: *mut f32,
    out_stride: usize,
) {
    let (d, stream) = (queries.len() / group, Stream::new(blocks));
    let (queries, blocks) = (queries.as_ptr(), blocks.as_ptr());
    // SAFETY: passed on to the caller.
    unsafe {
        if !stream::asks() {
            all_pages::<S, E, 2, false>(s, queries, group, d, blocks, stream, pages, out, out_stride);
        } else if S::LANES < 16 {
            all_pages::<S, E, 2, true>(s, queries, group, d, blocks, stream, pages, out, out_stride);
        } else {
            all_pages::<S, E, 4, true>(s, queries, group, d, blocks, stream, pages, out, out_stride);
        }
    }
}

/// PAGES at a time; ASK, if for what is ahead, too.
///
/// # Safety
/// `queries` is `[group][d]`, `blocks` is `[pages][2][d]`, `out` has room for a bound per page every `out_stride` values.
#[inline(always)]
#[allow(clippy::too_many_arguments)]
unsafe fn all_pages<S: Simd, E: Stored, const PAGES: usize, const ASK: bool>(
    s: S,
    queries: *const f32,
    group: usize,
    d: usize,
    blocks: *const u8,
    stream: Stream,
    pages: usize,
    out: *mut f32,
    out_stride: usize,
) {
    let page_bytes = 2 * d * E::BYTES;
    for first in (0..pages).step_by(PAGES) {
        let count = PAGES.min(pages - first);
        // Where the pages end, the last one once more.
        let mut places = [blocks; PAGES];
        for p in 0..PAGES {
            places[p] = blocks.wrapping_add((first + p.min(count - 1)) * page_bytes);
        }
        let mut h = 0;
        while h < group {
            let heads = super::tile(group - h, S::HEADS);
            // The first queries ask for all of them; the others once more for what they read themselves.
            let ahead = if h == 0 { stream.ahead(places[0]) } else { places[0] };
            // SAFETY: the pages are readable; queries from h on are [heads][d]; `out` has room for `count` bounds of each.
            unsafe {
                let (queries, out) = (queries.add(h * d), out.add(h * out_stride + first));
                match heads {
                    1 => tile::<S, E, 1, PAGES, ASK>(s, queries, d, places, ahead, count, out, out_stride),
                    2 => tile::<S, E, 2, PAGES, ASK>(s, queries, d, places, ahead, count, out, out_stride),
                    3 => tile::<S, E, 3, PAGES, ASK>(s, queries, d, places, ahead, count, out, out_stride),
                    _ => tile::<S, E, 4, PAGES, ASK>(s, queries, d, places, ahead, count, out, out_stride),
                }
            }
            h += heads;
        }
    }
}

/// `H` queries' bounds of some pages, of which the first `count` are wanted. Asks for as many bytes as it reads, from `ahead` on.
///
/// # Safety
/// `queries` is `[H][d]`, the pages are `[2][d]` each, `out` has room for `count` bounds every `out_stride` values.
#[inline(always)]
#[allow(clippy::too_many_arguments)]
unsafe fn tile<S: Simd, E: Stored, const H: usize, const PAGES: usize, const ASK: bool>(
    s: S,
    queries: *const f32,
    d: usize,
    pages: [*const u8; PAGES],
    ahead: *const u8,
    count: usize,
    out: *mut f32,
    out_stride: usize,
) {
    let mut sums = [[s.splat(0.0); PAGES]; H];
    let whole = d - d % S::LANES;
    // As much as a step reads of all pages together; asked for in the order of addresses, though.
    let step_bytes = 2 * PAGES * S::LANES * E::BYTES;
    // SAFETY: the caller promises the shapes; parts are as long as what is left of d.
    unsafe {
        for j in (0..whole).step_by(S::LANES) {
            if ASK {
                stream::ask(ahead.wrapping_add(j / S::LANES * step_bytes), step_bytes / LINE);
            }
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
            if ASK {
                stream::ask(ahead.wrapping_add(whole / S::LANES * step_bytes), step_bytes / LINE);
            }
            for p in 0..PAGES {
                let low = E::load_part(s, pages[p].add(whole * E::BYTES), left);
                let high = E::load_part(s, pages[p].add((d + whole) * E::BYTES), left);
                for h in 0..H {
                    let q = s.load_f32_part(queries.add(h * d + whole).cast(), left);
                    sums[h][p] = s.fma(q, s.where_positive(q, high, low), sums[h][p]);
                }
            }
        }
        for h in (0..H).step_by(4 / PAGES) {
            // Four sums at once; where there is no second query, the first once more.
            let mut four = [sums[h][0]; 4];
            for i in 0..4 {
                four[i] = sums[(h + i / PAGES).min(H - 1)][i % PAGES];
            }
            write::<PAGES>(s.sum4(four), H - h, count, out.add(h * out_stride), out_stride);
        }
    }
}

/// Writes four bounds as far as they are wanted: one query's of four pages, or two queries' of two, where there are two; of these pages
/// the first `count`.
///
/// # Safety
/// `out` has room for `count` bounds every `stride` values.
#[inline(always)]
pub(super) unsafe fn write<const PAGES: usize>(
    bounds: [f32; 4],
    queries: usize,
    count: usize,
    out: *mut f32,
    stride: usize,
) {
    const { assert!(PAGES == 2 || PAGES == 4) };
    // SAFETY: passed on to the caller.
    unsafe {
        if PAGES == 4 {
            write4(bounds, count, out);
        } else {
            write2([bounds[0], bounds[1]], count, out);
            if queries > 1 {
                write2([bounds[2], bounds[3]], count, out.add(stride));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::avx2::Avx2;
    use super::super::avx512::Avx512;
    use super::super::stored::F16;
    use super::*;
    use crate::{Kernels, Path, SplitMix64};

    /// The bounds with so many pages at a time, whatever suits this processor.
    fn bounds<S: Simd, const PAGES: usize, const ASK: bool>(
        s: S,
        queries: &[f32],
        group: usize,
        blocks: &[u8],
        pages: usize,
    ) -> Vec<u32> {
        let (d, stream) = (queries.len() / group, Stream::new(blocks));
        let mut out = vec![0.0_f32; group * pages];
        let (q, b) = (queries.as_ptr(), blocks.as_ptr());
        // SAFETY: as many queries, blocks and bounds as are said; `s` is the proof of the instructions.
        unsafe { all_pages::<S, F16, PAGES, ASK>(s, q, group, d, b, stream, pages, out.as_mut_ptr(), pages) };
        out.into_iter().map(f32::to_bits).collect()
    }

    #[test]
    fn bounds_do_not_depend_on_how_many_pages_are_taken_at_a_time_to_the_last_bit() {
        for (group, d, pages) in [(1, 5, 1), (2, 64, 2), (3, 40, 7), (4, 128, 45), (7, 70, 10)] {
            let values = |n: usize, seed: u64| -> Vec<f32> {
                let mut random = SplitMix64::new(seed);
                (0..n).map(|_| random.normal()).collect()
            };
            let queries = values(group * d, 1);
            let mut blocks = vec![0; 4 * d * pages];
            Kernels::best().from_f32(Dtype::F16, &values(2 * d * pages, 2), &mut blocks);
            let what = format!("group {group}, d {d}, {pages} pages");
            if Path::Avx2.is_available() {
                // SAFETY: the instructions were just found.
                let s = unsafe { Avx2::new() };
                let two = bounds::<_, 2, false>(s, &queries, group, &blocks, pages);
                assert_eq!(bounds::<_, 2, true>(s, &queries, group, &blocks, pages), two, "{what}");
                assert_eq!(bounds::<_, 4, true>(s, &queries, group, &blocks, pages), two, "{what}");
            }
            if Path::Avx512.is_available() {
                // SAFETY: the instructions were just found.
                let s = unsafe { Avx512::new() };
                let two = bounds::<_, 2, false>(s, &queries, group, &blocks, pages);
                assert_eq!(bounds::<_, 4, true>(s, &queries, group, &blocks, pages), two, "{what}");
            }
        }
    }
}
