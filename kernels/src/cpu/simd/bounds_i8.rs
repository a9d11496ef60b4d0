//! Bounds of pages from digests in 8 bits: whole numbers up to the last step, so that every path gives the same.

use super::Simd;
use super::bounds::write;
use super::stream::{self, LINE, Stream};
use super::whole::{Halves, Vnni, Whole};
use crate::cpu::bounds::{Block, FLOOR, LANES, Query8, STRIPE};

/// The plain code, compiled once more with the path's instructions.
#[inline(always)]
pub(super) fn prepare_bounds_i8<S: Simd>(_: S, query: &[f32], d: usize, to: &mut Query8) {
    to.set(query, d);
}

/// Two or four pages at a time, for the reasons that [`bounds`](super::bounds) has.
#[inline(always)]
fn page_bounds_i8<W: Whole, const PAGES: usize>(
    w: W,
    block: Block,
    queries: &[Query8],
    digests: &[u8],
    pages: usize,
    out: &mut [f32],
    out_stride: usize,
) {
    let page_bytes = digests.len() / pages;
    // Where a page has several blocks, this one is no stretch of memory: the processor is left to itself.
    let stream = if page_bytes == block.bytes() { Stream::new(digests) } else { Stream::NOTHING };
    let all = Digests { at: digests.as_ptr().wrapping_add(block.at), page_bytes, pages, stream };
    let bounds = Bounds { at: out.as_mut_ptr(), stride: out_stride };
    // SAFETY: the public method checked that there are as many digests as pages, all with this block, and room for every bound.
    unsafe {
        match (block.stripes, block.channel) {
            (1, 0) => all_pages::<W, PAGES, 1, true>(w, queries, all, bounds),
            (2, 0) => all_pages::<W, PAGES, 2, true>(w, queries, all, bounds),
            (3, 0) => all_pages::<W, PAGES, 3, true>(w, queries, all, bounds),
            (_, 0) => all_pages::<W, PAGES, 4, true>(w, queries, all, bounds),
            (1, _) => all_pages::<W, PAGES, 1, false>(w, queries, all, bounds),
            (2, _) => all_pages::<W, PAGES, 2, false>(w, queries, all, bounds),
            (3, _) => all_pages::<W, PAGES, 3, false>(w, queries, all, bounds),
            _ => all_pages::<W, PAGES, 4, false>(w, queries, all, bounds),
        }
    }
}

/// The same block of all pages.
#[derive(Clone, Copy)]
struct Digests {
    /// The first page's, and from one page's to the next.
    at: *const u8,
    page_bytes: usize,
    pages: usize,
    stream: Stream,
}

/// Where bounds go: one query every `stride` values.
#[derive(Clone, Copy)]
struct Bounds {
    at: *mut f32,
    stride: usize,
}

/// A block of all pages; FIRST, if bounds begin with it, and are not there yet.
///
/// # Safety
/// Each page has a block of so many stripes; `bounds` has room for one per page for each query.
#[inline(always)]
unsafe fn all_pages<W: Whole, const PAGES: usize, const STRIPES: usize, const FIRST: bool>(
    w: W,
    queries: &[Query8],
    digests: Digests,
    bounds: Bounds,
) {
    // As many as have four sums together.
    let at_once = 4 / PAGES;
    // Asked for with each of them, evenly.
    let lines = if digests.stream.is_nothing() {
        0
    } else {
        (PAGES * digests.page_bytes).div_ceil(LINE).div_ceil(queries.len().div_ceil(at_once))
    };
    for first in (0..digests.pages).step_by(PAGES) {
        let count = PAGES.min(digests.pages - first);
        // SAFETY: passed on to the caller; where the pages end, the last one once more.
        unsafe {
            let mut places = [digests.at; PAGES];
            for p in 0..PAGES {
                places[p] = digests.at.add((first + p.min(count - 1)) * digests.page_bytes);
            }
            let mut ahead = digests.stream.ahead(places[0]);
            let held = Pages::<W, PAGES, STRIPES>::load(w, places);
            for (i, queries) in queries.chunks(at_once).enumerate() {
                stream::ask(ahead, lines);
                ahead = ahead.wrapping_add(lines * LINE);
                let at = bounds.at.add(i * at_once * bounds.stride + first);
                held.write::<FIRST>(w, queries, count, Bounds { at, ..bounds });
            }
        }
    }
}

/// Scales of a block.
const fn scales(stripes: usize) -> usize {
    let scales = 4 * stripes.next_power_of_two();
    if scales < LANES { scales } else { LANES }
}

/// A block of some pages in registers.
struct Pages<W: Whole, const PAGES: usize, const STRIPES: usize> {
    low: [[W::B; STRIPES]; PAGES],
    high: [[W::B; STRIPES]; PAGES],
    scales: [W::F; PAGES],
}

impl<W: Whole, const PAGES: usize, const STRIPES: usize> Pages<W, PAGES, STRIPES> {
    /// # Safety
    /// At each place a block of so many stripes is readable.
    #[inline(always)]
    unsafe fn load(w: W, places: [*const u8; PAGES]) -> Self {
        let nothing = zeros(w);
        let ends = [[nothing.0; STRIPES]; PAGES];
        let mut held = Self { low: ends, high: ends, scales: [nothing.1; PAGES] };
        for p in 0..PAGES {
            // SAFETY: a block is its scales, then 64 bytes of minima and of maxima for each stripe.
            unsafe {
                let codes = places[p].add(4 * scales(STRIPES));
                held.scales[p] = w.scales(places[p], scales(STRIPES));
                for i in 0..STRIPES {
                    held.low[p][i] = w.load(codes.add(i * STRIPE));
                    held.high[p][i] = w.load(codes.add((STRIPES + i) * STRIPE));
                }
            }
        }
        held
    }

    /// Writes or adds to the first `count` pages' bounds: of one query where four pages are held, of one or two where two are.
    ///
    /// # Safety
    /// `bounds` has room for so many of each.
    #[inline(always)]
    unsafe fn write<const FIRST: bool>(&self, w: W, queries: &[Query8], count: usize, bounds: Bounds) {
        let last = queries.len() - 1;
        let mut terms = [zeros(w).1; 4];
        for i in 0..4 / PAGES {
            // Where there is no second query, the first once more.
            let of_query = self.terms(w, &queries[i.min(last)]);
            terms[i * PAGES..][..PAGES].copy_from_slice(&of_query);
        }
        let mut sums = w.sum4(terms);
        // SAFETY: passed on to the caller.
        unsafe {
            for i in 0..4 {
                let before =
                    bounds.at.add((i / PAGES).min(last) * bounds.stride + (i % PAGES).min(count - 1));
                sums[i] += if FIRST { FLOOR } else { before.read() };
            }
            write::<PAGES>(sums, queries.len(), count, bounds.at, bounds.stride);
        }
    }

    /// What the lanes of each page come to.
    #[inline(always)]
    fn terms(&self, w: W, query: &Query8) -> [W::F; PAGES] {
        let nothing = zeros(w).0;
        let (mut codes, mut upper) = ([nothing; STRIPES], [nothing; STRIPES]);
        for i in 0..STRIPES {
            // SAFETY: both have 64 bytes for each of four stripes.
            unsafe {
                codes[i] = w.load(query.codes.as_ptr().add(i * STRIPE).cast());
                upper[i] = w.load(query.upper.as_ptr().add(i * STRIPE));
            }
        }
        let (start, steps) = (w.start(&query.start), w.steps(&query.step));
        // No closures: the compiler may leave them out of line, and with them the instruction set.
        let mut terms = [steps; PAGES];
        for p in 0..PAGES {
            let mut sums = start;
            for i in 0..STRIPES {
                sums = w.dot(sums, codes[i], w.choose(upper[i], self.low[p][i], self.high[p][i]));
            }
            terms[p] = w.mul(w.lanes(sums), w.mul(self.scales[p], steps));
        }
        terms
    }
}

/// Something to fill arrays of registers with.
#[inline(always)]
fn zeros<W: Whole>(w: W) -> (W::B, W::F) {
    const ZEROS: [u8; STRIPE] = [0; STRIPE];
    // SAFETY: the constant has 64 bytes.
    (unsafe { w.load(ZEROS.as_ptr()) }, w.steps(&[0.0; LANES]))
}

macro_rules! path {
    ($module:ident, $features:literal, $whole:ident, $four:expr) => {
        /// Calling it is unsafe outside functions with the same features: the machine must have them.
        pub(in crate::cpu) mod $module {
            use super::*;

            #[target_feature(enable = $features)]
            pub(in crate::cpu) fn page_bounds_i8(
                block: Block,
                queries: &[Query8],
                digests: &[u8],
                pages: usize,
                out: &mut [f32],
                out_stride: usize,
            ) {
                // SAFETY: this function's own features say that the instructions are there.
                let w = unsafe { $whole::new() };
                // Four pages of more than two stripes would not fit into registers.
                if $four && block.stripes <= 2 {
                    super::page_bounds_i8::<_, 4>(w, block, queries, digests, pages, out, out_stride);
                } else {
                    super::page_bounds_i8::<_, 2>(w, block, queries, digests, pages, out, out_stride);
                }
            }
        }
    };
}

path!(halves, "avx2", Halves, false);
path!(vnni, "avx2,avx512f,avx512bw,avx512dq,avx512vnni", Vnni, stream::asks());

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpu::scalar;
    use crate::{Kernels, Path, SplitMix64};

    #[test]
    fn bounds_are_the_twins_with_two_pages_at_a_time_and_with_four() {
        for (group, d, pages) in [(1, 5, 1), (2, 64, 2), (3, 140, 7), (4, 128, 45), (5, 320, 10), (2, 256, 3)]
        {
            let mut random = SplitMix64::new(3);
            let mut values = |n: usize| -> Vec<f32> { (0..n).map(|_| random.normal()).collect() };
            let queries = values(group * d);
            let page_bytes = Kernels::bounds_i8_bytes(d);
            let mut digests = vec![0; page_bytes * pages];
            for digest in digests.chunks_exact_mut(page_bytes) {
                Kernels::best().encode_bounds_i8(&values(2 * d), digest);
            }
            let mut expected = vec![0.0; group * pages];
            let [mut two, mut four, mut two_of_16, mut four_of_16] = [(); 4].map(|()| expected.clone());
            let (halves, vnni) = (
                Path::Avx2.is_available(),
                Path::Avx512.is_available() && is_x86_feature_detected!("avx512vnni"),
            );
            for block in Block::all(d) {
                let mut prepared = vec![Query8::EMPTY; group];
                for (query, prepared) in queries.chunks_exact(d).zip(&mut prepared) {
                    prepared.set(&query[block.channel..][..block.channels], d);
                }
                scalar::page_bounds_i8(block, &prepared, &digests, pages, &mut expected, pages);
                if halves {
                    // SAFETY: the instructions were just found.
                    let w = unsafe { Halves::new() };
                    page_bounds_i8::<_, 2>(w, block, &prepared, &digests, pages, &mut two, pages);
                    page_bounds_i8::<_, 4>(w, block, &prepared, &digests, pages, &mut four, pages);
                }
                if vnni {
                    // SAFETY: the instructions were just found.
                    let w = unsafe { Vnni::new() };
                    page_bounds_i8::<_, 2>(w, block, &prepared, &digests, pages, &mut two_of_16, pages);
                    page_bounds_i8::<_, 4>(w, block, &prepared, &digests, pages, &mut four_of_16, pages);
                }
            }
            let what = format!("group {group}, d {d}, {pages} pages");
            for (found, there) in [(two, halves), (four, halves), (two_of_16, vnni), (four_of_16, vnni)] {
                assert!(!there || found == expected, "{what}: {found:?}, not {expected:?}");
            }
        }
    }
}
