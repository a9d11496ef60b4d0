//! Scores of pages from their digests in codes. Memory is read in order, once: all queries of a group are served by a page while it is
//! near.

use std::arch::x86_64::*;
use std::mem::MaybeUninit;

use super::code_room::{HEADS, Places, Room, STEP, fill};
use super::code_sums::{Pairs, Step, Sums, Vnni, Words};
use super::code_weights::Weighing;
use super::lanes::{LANES, Lanes};
use super::prefetch;
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
/// How far ahead memory is asked for, in bytes. Where it is fast, half of that leaves it idle: it takes its time when much is asked for.
const AHEAD: usize = 16 << 10;

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
    /// Where those norms and errors are that are as far ahead as other memory that is asked for.
    norms_ahead: usize,
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
            norms_ahead: AHEAD.next_multiple_of(layout.bytes()) + layout.norms_at(),
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
    let round = if group <= HEADS { ROUND_PAGES } else { ROUND.div_ceil(shape.bytes).min(ROUND_PAGES) };
    let mut room = MaybeUninit::<Room>::uninit();
    let (room, mut filled) = (Places::new(&mut room), None);
    for first in (0..pages).step_by(round) {
        let count = round.min(pages - first);
        let mut h = 0;
        while h < group {
            let heads = super::tile(group - h, HEADS);
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

/// The groups of some pages, in order.
#[derive(Clone, Copy)]
struct Walk {
    block: *const u8,
    /// Of the block.
    group: usize,
    /// How many there are from here on; at the end, the last one stays.
    left: usize,
}

impl Walk {
    /// To the next one.
    ///
    /// # Safety
    /// The blocks are of the shape, and as many groups as are left from here on.
    #[inline(always)]
    unsafe fn step(&mut self, shape: &Shape) {
        if self.left > 1 {
            self.left -= 1;
            self.group += 1;
            if self.group == shape.groups {
                self.group = 0;
                // SAFETY: passed on to the caller; there is a group left.
                self.block = unsafe { self.block.add(shape.bytes) };
            }
        }
    }
}

/// Groups that are prepared together: from sums to margins each number waits for the one before, and two groups side by side take as long as one.
const PAIR: usize = 2;

/// Sums over a group's offsets and steps, in lanes.
struct Looked<L: Lanes> {
    base: [L::F; HEADS],
    squares: [L::F; HEADS],
    largest: [L::Top; HEADS],
    offset_norm: f32,
    error: f32,
}

/// What queries are to the groups of a pair, a lane for each query of the first one, then of the second one: as
/// [`GroupQuery`](crate::cpu::scalar::codes::GroupQuery).
#[derive(Clone, Copy)]
struct Pair {
    base: [f32; PAIR * HEADS],
    unit: [f32; PAIR * HEADS],
    margin: [f32; PAIR * HEADS],
    /// What products are multiplied by to become weights.
    inverse: [f32; PAIR * HEADS],
}

impl Pages {
    /// Scores, or weights, of all pages. While one pair's sums are on their way, what is known of the next one's weights is found: each
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
        let groups = self.count * shape.groups;
        let mut here = Walk { block: self.blocks, group: 0, left: groups };
        let mut ahead = here;
        // SAFETY: passed on to the caller.
        unsafe {
            let mut pair = self.look::<W, H>(w, &mut ahead, room);
            self.weigh::<W, H>(w, &pair, room);
            for first in (0..groups).step_by(PAIR) {
                let next = self.look::<W, H>(w, &mut ahead, room);
                let both = PAIR.min(groups - first);
                for i in 0..both {
                    let (g, lane) = (first + i, i * HEADS);
                    for h in 0..H {
                        pages.margins.add(h * pages.margin_stride + g).write(pair.margin[lane + h]);
                    }
                    let codes = here.block.add(here.group * shape.group_bytes + 4 * shape.width);
                    let weights = room.weights.add(i * Places::WEIGHTS);
                    let scores = pages.scores.add(g * shape.tiles * TILE);
                    for tile in 0..shape.tiles {
                        let out = Out { scores: scores.add(tile * TILE), ..pages };
                        self.tile::<W, SIX, H>(
                            w,
                            codes.add(tile * shape.tile_bytes),
                            weights,
                            (&pair, lane),
                            out,
                        );
                    }
                    here.step(shape);
                }
                self.weigh::<W, H>(w, &next, room);
                pair = next;
                // Eight pages are a whole number of pairs.
                let done = first + both;
                if let Some(weighing) = &mut weighing
                    && (done == groups || done.is_multiple_of(WEIGHED * shape.groups))
                {
                    let page = done.div_ceil(shape.groups);
                    let from = (page - 1) / WEIGHED * WEIGHED;
                    weighing.pages(w.lanes(), from..page, pages.at(shape, from, 0));
                }
            }
        }
    }

    /// What queries are to the next pair of groups; their products with its steps go to the room.
    ///
    /// # Safety
    /// As [`Walk::step`]; the blocks are readable, the room has `H` queries.
    #[inline(always)]
    unsafe fn look<W: Sums, const H: usize>(&self, w: W, ahead: &mut Walk, room: Places) -> Pair {
        let l = w.lanes();
        // SAFETY: passed on to the caller.
        unsafe {
            let first = self.look_at::<W::L, H>(l, *ahead, room.queries, room.products);
            ahead.step(&self.shape);
            let second =
                self.look_at::<W::L, H>(l, *ahead, room.queries, room.products.add(Places::PRODUCTS));
            ahead.step(&self.shape);
            self.finish(l, &[first, second])
        }
    }

    /// The sums over a group's offsets and steps; the queries' products with its steps.
    ///
    /// # Safety
    /// The block is readable; there are `H` queries, and room for as many products.
    #[inline(always)]
    unsafe fn look_at<L: Lanes, const H: usize>(
        &self,
        l: L,
        Walk { block, group, .. }: Walk,
        queries: *const f32,
        products: *mut f32,
    ) -> Looked<L> {
        let (shape, width) = (&self.shape, self.shape.width);
        let zero = [l.splat_16(0.0); HEADS];
        let (mut base, mut squares, mut largest) = (zero, zero, [l.no_top(); HEADS]);
        // SAFETY: offsets and steps are as many as the queries are wide; norms and errors are as many as groups.
        unsafe {
            let at = block.add(group * shape.group_bytes);
            // One loop each: for both, few processors have the registers.
            for i in 0..width / LANES {
                let from = queries.add(i * STEP);
                prefetch::<false>(at.wrapping_add(64 * i + AHEAD));
                let offset = l.load_f16_16(at.add(32 * i));
                for h in 0..H {
                    base[h] = l.fma_16(l.load_f32_16(from.add(h * LANES)), offset, base[h]);
                }
            }
            for i in 0..width / LANES {
                let (from, to) = (queries.add(i * STEP), products.add(i * STEP));
                let step = l.load_f16_16(at.add(2 * width + 32 * i));
                for h in 0..H {
                    let product = l.mul_16(l.load_f32_16(from.add(h * LANES)), step);
                    squares[h] = l.fma_16(product, product, squares[h]);
                    largest[h] = l.larger(product, largest[h]);
                    l.store_16(product, to.add(h * LANES));
                }
            }
            if group == 0 {
                prefetch::<false>(block.wrapping_add(shape.norms_ahead));
            }
            let offset_norm = block.add(shape.norms_at + 4 * group).cast::<f32>().read_unaligned();
            let error = block.add(shape.errors_at + 4 * group).cast::<f32>().read_unaligned();
            Looked { base, squares, largest, offset_norm, error }
        }
    }

    /// The room's weights, from its products.
    ///
    /// # Safety
    /// The room has those of `H` queries.
    #[inline(always)]
    unsafe fn weigh<W: Sums, const H: usize>(&self, w: W, pair: &Pair, room: Places) {
        for i in 0..PAIR {
            for j in (0..self.shape.width).step_by(W::L::STRIPE) {
                for h in 0..H {
                    // SAFETY: passed on to the caller.
                    unsafe {
                        let products = room.products.add(i * Places::PRODUCTS + HEADS * j + h * LANES);
                        let to = room.weights.add(i * Places::WEIGHTS + HEADS * 2 * j + h * 2 * W::L::STRIPE);
                        w.lanes().weights(products, STEP, pair.inverse[i * HEADS + h], to);
                    }
                }
            }
        }
    }

    /// What the sums come to, as the scalar twin has it.
    #[inline(always)]
    fn finish<L: Lanes>(&self, l: L, [a, b]: &[Looked<L>; PAIR]) -> Pair {
        let terms = &self.terms;
        let base = [l.sum4_16(a.base), l.sum4_16(b.base)];
        let squares = [l.sum4_16(a.squares), l.sum4_16(b.squares)];
        let largest = [l.max4_16(a.largest), l.max4_16(b.largest)];
        let offset_norms = [[a.offset_norm; HEADS], [b.offset_norm; HEADS]];
        let errors = [[a.error; HEADS], [b.error; HEADS]];
        // SAFETY: every path has AVX, and `l` is the proof of one; eight f32 and __m256 have one layout.
        unsafe {
            let [base, squares, largest, norms, offset_norms, errors] =
                std::mem::transmute::<[[[f32; HEADS]; PAIR]; 6], [__m256; 6]>([
                    base,
                    squares,
                    largest,
                    [self.norms; PAIR],
                    offset_norms,
                    errors,
                ]);
            let (scale, most) = (_mm256_set1_ps(terms.score_scale), _mm256_set1_ps(BASE_MAX));
            // The second one where the first is NaN.
            let base =
                _mm256_min_ps(_mm256_max_ps(_mm256_mul_ps(base, scale), _mm256_set1_ps(-BASE_MAX)), most);
            let norm = _mm256_sqrt_ps(_mm256_add_ps(squares, _mm256_set1_ps(SQUARES_MIN)));
            let enough = _mm256_cmp_ps::<_CMP_GE_OS>(largest, _mm256_set1_ps(PRODUCT_MIN));
            let usable =
                _mm256_and_ps(enough, _mm256_cmp_ps::<_CMP_LE_OS>(largest, _mm256_set1_ps(f32::MAX)));
            let unit = _mm256_and_ps(usable, _mm256_mul_ps(largest, _mm256_set1_ps(1.0 / WEIGHT_MAX)));
            let inverse = _mm256_and_ps(usable, _mm256_div_ps(_mm256_set1_ps(WEIGHT_MAX), largest));
            let off = _mm256_or_ps(
                _mm256_mul_ps(unit, _mm256_set1_ps(WEIGHT_OFF)),
                _mm256_andnot_ps(usable, largest),
            );
            let of_codes = _mm256_mul_ps(norm, _mm256_add_ps(errors, _mm256_set1_ps(terms.codes)));
            let of_base = _mm256_mul_ps(_mm256_mul_ps(norms, _mm256_set1_ps(terms.base)), offset_norms);
            let of_weights = _mm256_mul_ps(off, _mm256_set1_ps(terms.most));
            let sum = _mm256_add_ps(_mm256_add_ps(of_codes, of_base), of_weights);
            let margin = _mm256_mul_ps(sum, _mm256_set1_ps(terms.scale));
            // Not where it is NaN, either.
            let known = _mm256_cmp_ps::<_CMP_LT_OS>(margin, _mm256_set1_ps(MARGIN_MAX));
            let unknown = _mm256_andnot_ps(known, _mm256_set1_ps(f32::INFINITY));
            let unit = _mm256_min_ps(_mm256_mul_ps(unit, scale), _mm256_set1_ps(UNIT_MAX));
            let margin = _mm256_or_ps(_mm256_and_ps(known, margin), unknown);
            let [base, unit, margin, inverse] =
                std::mem::transmute::<[__m256; 4], [[f32; PAIR * HEADS]; 4]>([base, unit, margin, inverse]);
            Pair { base, unit, margin, inverse }
        }
    }

    /// Scores of 16 rows.
    ///
    /// # Safety
    /// A tile's codes are readable, there are weights for `H` queries, `out` has room for 16 scores of each.
    #[inline(always)]
    unsafe fn tile<W: Sums, const SIX: bool, const H: usize>(
        &self,
        w: W,
        codes: *const u8,
        weights: *const i8,
        (pair, lane): (&Pair, usize),
        out: Out,
    ) {
        // SAFETY: passed on to the caller.
        unsafe {
            let mut sums = [w.zero(); H];
            for step in 0..self.shape.width / LANES {
                let (low, high) =
                    (codes.add(128 * step), codes.wrapping_add(8 * self.shape.width + 64 * step));
                prefetch::<false>(low.wrapping_add(AHEAD));
                prefetch::<false>(low.wrapping_add(AHEAD + 64));
                if SIX {
                    prefetch::<false>(high.wrapping_add(AHEAD));
                }
                let (stripe, at) = W::L::weights_at(step);
                let weights = weights.add(stripe * HEADS * 2 * W::L::STRIPE + at);
                w.add::<SIX, H>(&mut sums, Step { low, high, weights });
            }
            for h in 0..H {
                let scores = w.scores::<SIX>(sums[h], pair.base[lane + h], pair.unit[lane + h]);
                w.lanes().store_16(scores, out.scores.add(h * out.stride));
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

path!(pairs, "avx2,fma,f16c", Pairs);
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
