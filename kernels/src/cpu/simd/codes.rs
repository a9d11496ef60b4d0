//! Scores of pages from their digests in codes. Memory is read in order, once: all queries of a group are served by a page while it is
//! near.

use std::arch::x86_64::*;
use std::mem::MaybeUninit;

use super::code_sums::{Halves, Sums, Vnni, Words};
use super::lanes::{LANES, Lanes};
use super::prefetch;
use crate::codes::{CodeBits, CodeLayout, DIM_MAX, TILE};
use crate::cpu::scalar::codes::{
    MARGIN_MAX, Margins, PRODUCT_MIN, SQUARES_MIN, WEIGHT_MAX, WEIGHT_OFF, query_norm,
};

/// Queries that share what is read, at most.
const HEADS: usize = 4;
/// Bytes of blocks that several rounds of queries go over, one after the other: they stay in the second-level cache.
const ROUND: usize = 128 << 10;
/// How far ahead memory is asked for, in bytes.
const AHEAD: usize = 4096;

/// What some queries are worked on in.
#[repr(C, align(64))]
struct Room {
    /// `[HEADS][D]`, filled up with 0.
    queries: [[f32; DIM_MAX]; HEADS],
    /// `[HEADS][D]`, then 0 up to a whole stripe: query times step.
    products: [[f32; DIM_MAX]; HEADS],
    /// As [`Lanes::weights`] leaves them.
    weights: [[i8; 2 * DIM_MAX]; HEADS],
}

/// What the loops know of a layout.
#[derive(Clone, Copy)]
struct Shape {
    /// `D`, of which each step takes 16.
    width: usize,
    bytes: usize,
    rows: usize,
    groups: usize,
    group_bytes: usize,
    tiles: usize,
    tile_bytes: usize,
    norms_at: usize,
    errors_at: usize,
}

impl Shape {
    fn new(layout: &CodeLayout) -> Self {
        Self {
            width: layout.padded(),
            bytes: layout.bytes(),
            rows: layout.rows(),
            groups: layout.groups(),
            group_bytes: layout.group_bytes(),
            tiles: layout.group() / TILE,
            tile_bytes: layout.tile_bytes(),
            norms_at: layout.norms_at(),
            errors_at: layout.errors_at(),
        }
    }
}

/// Where scores and margins go, one query every so many values.
#[derive(Clone, Copy)]
struct Out {
    scores: *mut f32,
    stride: usize,
    margins: *mut f32,
    margin_stride: usize,
}

impl Out {
    /// From a page and a query on.
    ///
    /// # Safety
    /// There is room for them.
    #[inline(always)]
    unsafe fn at(self, shape: &Shape, page: usize, head: usize) -> Self {
        // SAFETY: passed on to the caller.
        unsafe {
            Self {
                scores: self.scores.add(head * self.stride + page * shape.rows),
                margins: self.margins.add(head * self.margin_stride + page * shape.groups),
                ..self
            }
        }
    }
}

#[inline(always)]
#[allow(clippy::too_many_arguments)]
fn code_scores<W: Sums>(
    w: W,
    layout: &CodeLayout,
    queries: &[f32],
    group: usize,
    scale: f32,
    blocks: &[u8],
    out: &mut [f32],
    out_stride: usize,
    margins: &mut [f32],
    margin_stride: usize,
) {
    let (d, shape, terms) = (layout.head_dim(), Shape::new(layout), Margins::new(layout, scale));
    let pages = blocks.len() / shape.bytes;
    let out =
        Out { scores: out.as_mut_ptr(), stride: out_stride, margins: margins.as_mut_ptr(), margin_stride };
    let round = if group <= W::HEADS { pages.max(1) } else { ROUND.div_ceil(shape.bytes) };
    let mut room = MaybeUninit::<Room>::uninit();
    let room = room.as_mut_ptr();
    for first in (0..pages).step_by(round) {
        let count = round.min(pages - first);
        let mut h = 0;
        while h < group {
            let heads = super::tile(group - h, W::HEADS);
            // SAFETY: the public method checked queries, blocks and the room for scores and margins; `room` has as much as any layout
            // needs.
            unsafe {
                let norms = fill(&shape, &queries[h * d..][..heads * d], d, room);
                let pages = Pages { shape, terms, scale, norms, blocks: blocks.as_ptr().add(first * shape.bytes), count };
                let out = out.at(&shape, first, h);
                match (layout.bits(), heads) {
                    (CodeBits::Four, 1) => pages.score::<W, false, 1>(w, room, out),
                    (CodeBits::Four, 2) => pages.score::<W, false, 2>(w, room, out),
                    (CodeBits::Four, 3) => pages.score::<W, false, 3>(w, room, out),
                    (CodeBits::Four, _) => pages.score::<W, false, 4>(w, room, out),
                    (CodeBits::Six, 1) => pages.score::<W, true, 1>(w, room, out),
                    (CodeBits::Six, 2) => pages.score::<W, true, 2>(w, room, out),
                    (CodeBits::Six, 3) => pages.score::<W, true, 3>(w, room, out),
                    (CodeBits::Six, _) => pages.score::<W, true, 4>(w, room, out),
                }
            }
            h += heads;
        }
    }
}

/// Puts queries `[heads][d]` into the room, and zeros where nobody else writes; their norms.
///
/// # Safety
/// The room may be written to.
#[inline(always)]
unsafe fn fill(shape: &Shape, queries: &[f32], d: usize, room: *mut Room) -> [f32; HEADS] {
    let mut norms = [0.0; HEADS];
    for (h, query) in queries.chunks_exact(d).enumerate() {
        norms[h] = query_norm(query);
        // SAFETY: a layout has at most DIM_MAX channels, which is a whole number of stripes.
        unsafe {
            let to = (&raw mut (*room).queries[h]).cast::<f32>();
            to.copy_from_nonoverlapping(query.as_ptr(), d);
            to.add(d).write_bytes(0, shape.width - d);
            let products = (&raw mut (*room).products[h]).cast::<f32>();
            products.add(shape.width).write_bytes(0, shape.width.next_multiple_of(4 * LANES) - shape.width);
        }
    }
    norms
}

/// Some queries and the pages they are to score.
struct Pages {
    shape: Shape,
    terms: Margins,
    scale: f32,
    norms: [f32; HEADS],
    blocks: *const u8,
    count: usize,
}

/// What queries are to a group, one lane each.
#[derive(Clone, Copy)]
struct Group {
    base: [f32; HEADS],
    unit: [f32; HEADS],
    margin: [f32; HEADS],
}

impl Pages {
    /// # Safety
    /// The blocks are readable, the room has `H` queries, `out` has room for `H` scores of each row and as many margins of each group.
    #[inline(always)]
    unsafe fn score<W: Sums, const SIX: bool, const H: usize>(&self, w: W, room: *mut Room, out: Out) {
        let shape = &self.shape;
        for page in 0..self.count {
            // SAFETY: passed on to the caller.
            unsafe {
                let block = self.blocks.add(page * shape.bytes);
                let out = out.at(shape, page, 0);
                for g in 0..shape.groups {
                    let at = block.add(g * shape.group_bytes);
                    let norm = block.add(shape.norms_at + 4 * g).cast::<f32>().read_unaligned();
                    let error = block.add(shape.errors_at + 4 * g).cast::<f32>().read_unaligned();
                    let group = self.weigh::<W, H>(w, at, norm, error, room);
                    for h in 0..H {
                        out.margins.add(h * out.margin_stride + g).write(group.margin[h]);
                    }
                    let scores = out.scores.add(g * shape.tiles * TILE);
                    for tile in 0..shape.tiles {
                        let codes = at.add(4 * shape.width + tile * shape.tile_bytes);
                        let out = Out { scores: scores.add(tile * TILE), ..out };
                        self.tile::<W, SIX, H>(w, codes, room, &group, out);
                    }
                }
            }
        }
    }

    /// The room's weights for a group whose offsets are at `at`.
    ///
    /// # Safety
    /// The group is readable, the room has `H` queries.
    #[inline(always)]
    unsafe fn weigh<W: Sums, const H: usize>(
        &self,
        w: W,
        at: *const u8,
        offset_norm: f32,
        error: f32,
        room: *mut Room,
    ) -> Group {
        let (l, width) = (w.lanes(), self.shape.width);
        let zero = l.splat(0.0);
        let (mut base, mut squares, mut largest) = ([zero; HEADS], [zero; HEADS], [zero; HEADS]);
        // SAFETY: offsets and steps are as many as the queries are wide.
        unsafe {
            for j in (0..width).step_by(LANES) {
                prefetch::<true>(at.wrapping_add(4 * j + AHEAD));
                let offset = l.load_f16(at.add(2 * j));
                let step = l.load_f16(at.add(2 * (width + j)));
                for h in 0..H {
                    let q = l.load_f32((&raw const (*room).queries[h]).cast::<f32>().add(j));
                    base[h] = l.add(base[h], l.mul(q, offset));
                    let product = l.mul(q, step);
                    squares[h] = l.add(squares[h], l.mul(product, product));
                    largest[h] = l.larger(product, largest[h]);
                    l.store(product, (&raw mut (*room).products[h]).cast::<f32>().add(j));
                }
            }
            let base = l.sum4(base);
            let (unit, inverse, margin) = self.finish(l.sum4(squares), l.max4(largest), offset_norm, error);
            for j in (0..width).step_by(W::L::STRIPE) {
                for h in 0..H {
                    let products = (&raw const (*room).products[h]).cast::<f32>().add(j);
                    l.weights(products, inverse[h], (&raw mut (*room).weights[h]).cast::<i8>().add(2 * j));
                }
            }
            Group { base, unit, margin }
        }
    }

    /// Unit, its inverse and the margin of each query, as the scalar twin has them.
    #[inline(always)]
    fn finish(
        &self,
        squares: [f32; HEADS],
        largest: [f32; HEADS],
        offset_norm: f32,
        error: f32,
    ) -> ([f32; HEADS], [f32; HEADS], [f32; HEADS]) {
        let terms = &self.terms;
        // SAFETY: SSE is part of x86-64; __m128 and [f32; 4] have one layout.
        unsafe {
            let (squares, largest, norms) = (
                std::mem::transmute::<[f32; 4], __m128>(squares),
                std::mem::transmute::<[f32; 4], __m128>(largest),
                std::mem::transmute::<[f32; 4], __m128>(self.norms),
            );
            let norm = _mm_sqrt_ps(_mm_add_ps(squares, _mm_set1_ps(SQUARES_MIN)));
            let enough = _mm_cmpge_ps(largest, _mm_set1_ps(PRODUCT_MIN));
            let usable = _mm_and_ps(enough, _mm_cmple_ps(largest, _mm_set1_ps(f32::MAX)));
            let unit = _mm_and_ps(usable, _mm_mul_ps(largest, _mm_set1_ps(1.0 / WEIGHT_MAX)));
            let inverse = _mm_and_ps(usable, _mm_div_ps(_mm_set1_ps(WEIGHT_MAX), largest));
            let off = _mm_or_ps(_mm_mul_ps(unit, _mm_set1_ps(WEIGHT_OFF)), _mm_andnot_ps(usable, largest));
            let of_codes = _mm_mul_ps(norm, _mm_set1_ps(error + terms.codes));
            let of_base = _mm_mul_ps(_mm_mul_ps(norms, _mm_set1_ps(terms.base)), _mm_set1_ps(offset_norm));
            let of_weights = _mm_mul_ps(off, _mm_set1_ps(terms.most));
            let sum = _mm_add_ps(_mm_add_ps(of_codes, of_base), of_weights);
            let margin = _mm_mul_ps(sum, _mm_set1_ps(terms.scale));
            // Not where it is NaN, either.
            let known = _mm_cmplt_ps(margin, _mm_set1_ps(MARGIN_MAX));
            let margin = _mm_or_ps(
                _mm_and_ps(known, margin),
                _mm_andnot_ps(known, _mm_set1_ps(f32::INFINITY)),
            );
            (
                std::mem::transmute::<__m128, [f32; 4]>(unit),
                std::mem::transmute::<__m128, [f32; 4]>(inverse),
                std::mem::transmute::<__m128, [f32; 4]>(margin),
            )
        }
    }

    /// Scores of 16 rows.
    ///
    /// # Safety
    /// A tile's codes are readable, the room has weights for `H` queries, `out` has room for 16 scores of each.
    #[inline(always)]
    unsafe fn tile<W: Sums, const SIX: bool, const H: usize>(
        &self,
        w: W,
        codes: *const u8,
        room: *const Room,
        group: &Group,
        out: Out,
    ) {
        // SAFETY: passed on to the caller.
        unsafe {
            for first in (0..TILE).step_by(W::ROWS) {
                let low = codes.add(4 * first);
                let high = low.add(8 * self.shape.width);
                let mut sums = [w.zero(); H];
                for step in 0..self.shape.width / LANES {
                    let (low, high) = (low.add(128 * step), high.wrapping_add(64 * step));
                    prefetch::<true>(low.wrapping_add(AHEAD));
                    prefetch::<true>(low.wrapping_add(AHEAD + 64));
                    if SIX {
                        prefetch::<true>(high.wrapping_add(AHEAD));
                    }
                    let codes = w.unpack::<SIX>(low, high);
                    let at = W::L::weights_at(step);
                    for h in 0..H {
                        let weights = (&raw const (*room).weights[h]).cast::<i8>().add(at);
                        sums[h] = w.add::<SIX>(sums[h], codes, weights);
                    }
                }
                for h in 0..H {
                    let out = out.scores.add(h * out.stride + first);
                    w.write(sums[h], group.base[h], group.unit[h], self.scale, out);
                }
            }
        }
    }
}

macro_rules! path {
    ($module:ident, $features:literal, $sums:ident) => {
        /// Calling it is unsafe outside functions with the same features: the machine must have them.
        pub(in crate::cpu) mod $module {
            use super::*;

            #[target_feature(enable = $features)]
            #[allow(clippy::too_many_arguments)]
            pub(in crate::cpu) fn code_scores(
                layout: &CodeLayout,
                queries: &[f32],
                group: usize,
                scale: f32,
                blocks: &[u8],
                out: &mut [f32],
                out_stride: usize,
                margins: &mut [f32],
                margin_stride: usize,
            ) {
                // SAFETY: this function's own features say that the instructions are there.
                let sums = unsafe { $sums::new() };
                super::code_scores(
                    sums, layout, queries, group, scale, blocks, out, out_stride, margins, margin_stride,
                );
            }
        }
    };
}

path!(halves, "avx2,fma,f16c", Halves);
path!(words, "avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq", Words);
path!(vnni, "avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni", Vnni);

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpu::{Path, scalar};
    use crate::random::SplitMix64;

    #[test]
    fn sums_by_words_are_the_twins_where_the_machine_would_take_better_ones() {
        if !Path::Avx512.is_available() {
            return;
        }
        let mut random = SplitMix64::new(7);
        let mut values = |n: usize| -> Vec<f32> { (0..n).map(|_| random.normal()).collect() };
        for (d, bits) in [(64, CodeBits::Four), (70, CodeBits::Six), (16, CodeBits::Six), (144, CodeBits::Four)] {
            let layout = CodeLayout::new(d, 8, 32, bits, 16).unwrap();
            let mut blocks = vec![0; 3 * layout.bytes()];
            for block in blocks.chunks_exact_mut(layout.bytes()) {
                layout.encode(&values(32 * d), &values(32 * 8), block);
            }
            let queries = values(5 * d);
            let (mut out, mut margins) = ([vec![0.0; 5 * 96], vec![0.0; 5 * 96]], [vec![0.0; 30], vec![0.0; 30]]);
            scalar::code_scores(&layout, &queries, 5, 0.5, &blocks, &mut out[0], 96, &mut margins[0], 6);
            // SAFETY: the machine has the instructions.
            unsafe { words::code_scores(&layout, &queries, 5, 0.5, &blocks, &mut out[1], 96, &mut margins[1], 6) };
            assert_eq!(out[0], out[1], "{d} {bits:?}");
            assert_eq!(margins[0], margins[1], "{d} {bits:?}");
        }
    }
}
