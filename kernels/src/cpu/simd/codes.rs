//! Scores of pages from their digests in codes. Memory is read in order, once: all queries of a group are served by a page while it is
//! near.

use std::arch::x86_64::*;
use std::mem::MaybeUninit;

use super::code_room::{HEADS, Places, Room, STEP, fill};
use super::code_sums::{Halves, Sums, Vnni, Words};
use super::code_weights::Weighing;
use super::lanes::{LANES, Lanes};
use super::{Simd, prefetch};
use crate::codes::{CodeBits, CodeLayout, TILE};
use crate::cpu::codes::{CodeOut, CodeScan, CodeWeighing};
use crate::cpu::scalar::codes::{
    BASE_MAX, MARGIN_MAX, Margins, PRODUCT_MIN, SQUARES_MIN, UNIT_MAX, WEIGHT_MAX, WEIGHT_OFF,
};

/// Bytes of blocks that several rounds of queries go over, one after the other: they stay in the second-level cache.
const ROUND: usize = 128 << 10;
/// Most pages of a round.
const ROUND_PAGES: usize = 256;
/// Pages whose scores become weights at once: few enough for the first-level cache.
const WEIGHED: usize = 8;
/// How far ahead memory is asked for, in bytes.
const AHEAD: usize = 8192;

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
pub(super) struct Out {
    pub(super) scores: *mut f32,
    pub(super) stride: usize,
    margins: *mut f32,
    margin_stride: usize,
}

impl Out {
    #[inline(always)]
    fn new(out: &mut CodeOut<'_>) -> Self {
        Self {
            scores: out.rows.as_mut_ptr(),
            stride: out.stride,
            margins: out.margins.as_mut_ptr(),
            margin_stride: out.margin_stride,
        }
    }

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
fn code_scores<W: Sums>(w: W, scan: &CodeScan<'_>, out: &mut CodeOut<'_>) {
    // SAFETY: the public method checked queries, blocks and the room for scores and margins.
    unsafe { all(w, scan, Out::new(out), None) };
}

#[inline(always)]
fn code_weights<W: Sums>(w: W, scan: &CodeScan<'_>, weighing: &mut CodeWeighing<'_>, out: &mut CodeOut<'_>) {
    // SAFETY: the public method checked queries, blocks and the room for weights and margins, those of the pages before included.
    unsafe { all(w, scan, Out::new(out), Some(weighing)) };
}

/// Scores, or weights, of all pages for all queries.
///
/// # Safety
/// The blocks are whole, there is a query for each of the group, and `out` has room for their scores and margins: where weights are asked
/// for, those of the pages before included.
#[inline(always)]
unsafe fn all<W: Sums>(w: W, scan: &CodeScan<'_>, out: Out, mut asked: Option<&mut CodeWeighing<'_>>) {
    let CodeScan { layout, queries, group, scale, blocks } = *scan;
    let (d, shape, terms) = (layout.head_dim(), Shape::new(layout), Margins::new(layout, scale));
    let pages = blocks.len() / shape.bytes;
    // Weights' sums are brought together after each round.
    let round = if group <= W::HEADS { ROUND_PAGES } else { ROUND.div_ceil(shape.bytes).min(ROUND_PAGES) };
    let mut room = MaybeUninit::<Room>::uninit();
    let (room, mut filled) = (Places::new(&mut room), None);
    for first in (0..pages).step_by(round) {
        let count = round.min(pages - first);
        let mut h = 0;
        while h < group {
            let heads = super::tile(group - h, W::HEADS);
            // SAFETY: passed on to the caller; `room` has as much as any layout needs.
            unsafe {
                let norms = match filled {
                    Some(norms) if heads == group => norms,
                    _ => fill(shape.width, &queries[h * d..][..heads * d], d, room),
                };
                filled = Some(norms);
                let blocks = blocks.as_ptr().add(first * shape.bytes);
                let page = first + if let Some(asked) = &asked { asked.before } else { 0 };
                let out = out.at(&shape, page, h);
                // No closures: the compiler may leave them out of line, and with them the instruction set.
                let mut weighing = match &mut asked {
                    Some(CodeWeighing { rows, totals, .. }) => {
                        let totals = &mut totals[h..h + heads];
                        Some(Weighing::new(w.lanes(), shape.rows, page * shape.rows, rows, totals))
                    }
                    None => None,
                };
                let pages = Pages { shape, terms, norms, blocks, count };
                match (layout.bits(), heads) {
                    (CodeBits::Four, 1) => pages.score::<W, false, 1>(w, room, out, weighing.as_mut()),
                    (CodeBits::Four, 2) => pages.score::<W, false, 2>(w, room, out, weighing.as_mut()),
                    (CodeBits::Four, 3) => pages.score::<W, false, 3>(w, room, out, weighing.as_mut()),
                    (CodeBits::Four, _) => pages.score::<W, false, 4>(w, room, out, weighing.as_mut()),
                    (CodeBits::Six, 1) => pages.score::<W, true, 1>(w, room, out, weighing.as_mut()),
                    (CodeBits::Six, 2) => pages.score::<W, true, 2>(w, room, out, weighing.as_mut()),
                    (CodeBits::Six, 3) => pages.score::<W, true, 3>(w, room, out, weighing.as_mut()),
                    (CodeBits::Six, _) => pages.score::<W, true, 4>(w, room, out, weighing.as_mut()),
                }
                if let Some(weighing) = weighing {
                    weighing.finish(w.lanes());
                }
            }
            h += heads;
        }
    }
}

/// Some queries and the pages they are to score.
struct Pages {
    shape: Shape,
    terms: Margins,
    norms: [f32; HEADS],
    blocks: *const u8,
    count: usize,
}

/// What queries are to a group, one lane each: as [`GroupQuery`](crate::cpu::scalar::codes::GroupQuery).
#[derive(Clone, Copy)]
struct Group {
    base: [f32; HEADS],
    unit: [f32; HEADS],
    margin: [f32; HEADS],
    /// What products are multiplied by to become weights.
    inverse: [f32; HEADS],
}

impl Pages {
    /// Scores, or weights, of all pages. While one group's sums are on their way, what is known of the next one's weights is found: each
    /// waits for many instructions before, and the processor does not look as far ahead by itself.
    ///
    /// # Safety
    /// The blocks are readable, there is at least one, the room has `H` queries, `out` has room for `H` scores of each row and as many
    /// margins of each group; weighing is for as many.
    #[inline(always)]
    unsafe fn score<W: Sums, const SIX: bool, const H: usize>(
        &self,
        w: W,
        room: Places,
        pages: Out,
        mut weighing: Option<&mut Weighing<'_, W::L>>,
    ) {
        let shape = &self.shape;
        // SAFETY: passed on to the caller.
        unsafe {
            let mut group = self.look::<W, H>(w, self.blocks, 0, room);
            self.weigh::<W, H>(w, &group, room);
            for page in 0..self.count {
                let block = self.blocks.add(page * shape.bytes);
                let out = pages.at(shape, page, 0);
                for g in 0..shape.groups {
                    let (next_block, next_g) = if g + 1 < shape.groups {
                        (block, g + 1)
                    } else if page + 1 < self.count {
                        (block.add(shape.bytes), 0)
                    } else {
                        // There is none: this one again.
                        (block, g)
                    };
                    let next = self.look::<W, H>(w, next_block, next_g, room);
                    for h in 0..H {
                        out.margins.add(h * out.margin_stride + g).write(group.margin[h]);
                    }
                    let codes = block.add(g * shape.group_bytes + 4 * shape.width);
                    let scores = out.scores.add(g * shape.tiles * TILE);
                    for tile in 0..shape.tiles {
                        let out = Out { scores: scores.add(tile * TILE), ..out };
                        self.tile::<W, SIX, H>(w, codes.add(tile * shape.tile_bytes), room, &group, out);
                    }
                    self.weigh::<W, H>(w, &next, room);
                    group = next;
                }
                if let Some(weighing) = &mut weighing
                    && (page + 1 == self.count || (page + 1).is_multiple_of(WEIGHED))
                {
                    let first = page / WEIGHED * WEIGHED;
                    weighing.pages(w.lanes(), first..page + 1, pages.at(shape, first, 0));
                }
            }
        }
    }

    /// What queries are to a group of a block; their products with its steps go to the room.
    ///
    /// # Safety
    /// The block is readable, the room has `H` queries.
    #[inline(always)]
    unsafe fn look<W: Sums, const H: usize>(&self, w: W, block: *const u8, g: usize, room: Places) -> Group {
        let (l, shape, width) = (w.lanes(), &self.shape, self.shape.width);
        let zero = l.splat_16(0.0);
        let (mut base, mut squares, mut largest) = ([zero; HEADS], [zero; HEADS], [zero; HEADS]);
        // SAFETY: offsets and steps are as many as the queries are wide; norms and errors are as many as groups.
        unsafe {
            let at = block.add(g * shape.group_bytes);
            for i in 0..width / LANES {
                let (from, to) = (room.queries.add(i * STEP), room.products.add(i * STEP));
                prefetch::<false>(at.wrapping_add(64 * i + AHEAD));
                let offset = l.load_f16_16(at.add(32 * i));
                let step = l.load_f16_16(at.add(2 * width + 32 * i));
                for h in 0..H {
                    let q = l.load_f32_16(from.add(h * LANES));
                    base[h] = l.fma_16(q, offset, base[h]);
                    let product = l.mul_16(q, step);
                    squares[h] = l.fma_16(product, product, squares[h]);
                    largest[h] = l.larger(product, largest[h]);
                    l.store_16(product, to.add(h * LANES));
                }
            }
            let norm = block.add(shape.norms_at + 4 * g).cast::<f32>().read_unaligned();
            let error = block.add(shape.errors_at + 4 * g).cast::<f32>().read_unaligned();
            self.finish(l.sum4_16(base), l.sum4_16(squares), l.max4_16(largest), norm, error)
        }
    }

    /// The room's weights, from its products.
    ///
    /// # Safety
    /// The room has those of `H` queries.
    #[inline(always)]
    unsafe fn weigh<W: Sums, const H: usize>(&self, w: W, group: &Group, room: Places) {
        for j in (0..self.shape.width).step_by(W::L::STRIPE) {
            for h in 0..H {
                // SAFETY: passed on to the caller.
                unsafe {
                    let products = room.products.add(HEADS * j + h * LANES);
                    let to = room.weights.add(HEADS * 2 * j + h * 2 * W::L::STRIPE);
                    w.lanes().weights(products, STEP, group.inverse[h], to);
                }
            }
        }
    }

    /// What the sums come to, as the scalar twin has it.
    #[inline(always)]
    fn finish(
        &self,
        base: [f32; HEADS],
        squares: [f32; HEADS],
        largest: [f32; HEADS],
        offset_norm: f32,
        error: f32,
    ) -> Group {
        let terms = &self.terms;
        // SAFETY: SSE is part of x86-64; __m128 and [f32; 4] have one layout.
        unsafe {
            let [base, squares, largest, norms] =
                std::mem::transmute::<[[f32; 4]; 4], [__m128; 4]>([base, squares, largest, self.norms]);
            let (scale, most) = (_mm_set1_ps(terms.score_scale), _mm_set1_ps(BASE_MAX));
            // The second one where the first is NaN.
            let base = _mm_min_ps(_mm_max_ps(_mm_mul_ps(base, scale), _mm_set1_ps(-BASE_MAX)), most);
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
            let unknown = _mm_andnot_ps(known, _mm_set1_ps(f32::INFINITY));
            let unit = _mm_min_ps(_mm_mul_ps(unit, scale), _mm_set1_ps(UNIT_MAX));
            let margin = _mm_or_ps(_mm_and_ps(known, margin), unknown);
            let [base, unit, margin, inverse] =
                std::mem::transmute::<[__m128; 4], [[f32; 4]; 4]>([base, unit, margin, inverse]);
            Group { base, unit, margin, inverse }
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
        room: Places,
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
                    prefetch::<false>(low.wrapping_add(AHEAD));
                    prefetch::<false>(low.wrapping_add(AHEAD + 64));
                    if SIX {
                        prefetch::<false>(high.wrapping_add(AHEAD));
                    }
                    let codes = w.unpack::<SIX>(low, high);
                    let (stripe, at) = W::L::weights_at(step);
                    let weights = room.weights.add(stripe * HEADS * 2 * W::L::STRIPE + at);
                    for h in 0..H {
                        sums[h] = w.add::<SIX>(sums[h], codes, weights.add(h * 2 * W::L::STRIPE));
                    }
                }
                for h in 0..H {
                    let scores = w.scores::<SIX>(sums[h], group.base[h], group.unit[h]);
                    w.lanes().store_f32(scores, out.scores.add(h * out.stride + first).cast());
                }
            }
        }
    }
}

macro_rules! path {
    ($module:ident, $features:literal, $sums:ident) => {
        /// Calling these is unsafe outside functions with the same features: the machine must have them.
        pub(in crate::cpu) mod $module {
            use super::*;

            #[target_feature(enable = $features)]
            pub(in crate::cpu) fn code_scores(scan: &CodeScan<'_>, out: &mut CodeOut<'_>) {
                // SAFETY: this function's own features say that the instructions are there.
                let sums = unsafe { $sums::new() };
                super::code_scores(sums, scan, out);
            }

            #[target_feature(enable = $features)]
            pub(in crate::cpu) fn code_weights(
                scan: &CodeScan<'_>,
                weighing: &mut CodeWeighing<'_>,
                out: &mut CodeOut<'_>,
            ) {
                // SAFETY: as above.
                let sums = unsafe { $sums::new() };
                super::code_weights(sums, scan, weighing, out);
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
        for (d, bits) in
            [(64, CodeBits::Four), (70, CodeBits::Six), (16, CodeBits::Six), (144, CodeBits::Four)]
        {
            let layout = CodeLayout::new(d, 8, 32, bits, 16).unwrap();
            let mut blocks = vec![0; 3 * layout.bytes()];
            for block in blocks.chunks_exact_mut(layout.bytes()) {
                layout.encode(&values(32 * d), &values(32 * 8), block);
            }
            let queries = values(5 * d);
            let (mut out, mut margins) =
                ([vec![0.0; 5 * 96], vec![0.0; 5 * 96]], [vec![0.0; 30], vec![0.0; 30]]);
            let scan = CodeScan { layout: &layout, queries: &queries, group: 5, scale: 0.5, blocks: &blocks };
            let mut runs = out.iter_mut().zip(&mut margins).map(|(rows, margins)| CodeOut {
                rows,
                stride: 96,
                margins,
                margin_stride: 6,
            });
            let [mut twin, mut by_words] = std::array::from_fn(|_| runs.next().unwrap());
            scalar::code_scores(&scan, &mut twin);
            // SAFETY: the machine has the instructions.
            unsafe { words::code_scores(&scan, &mut by_words) };
            assert_eq!(out[0], out[1], "{d} {bits:?}");
            assert_eq!(margins[0], margins[1], "{d} {bits:?}");
        }
    }
}
