//! Bounds of pages from digests in 8 bits: whole numbers up to the last step, so that every path gives the same.

use std::arch::x86_64::*;

use super::{Simd, write2};
use crate::cpu::bounds::{Block, FLOOR, LANES, Query8, STRIPE};

/// Pages at a time: no more, so that memory is read nearly in order, as in [`bounds`](super::bounds).
const PAGES: usize = 2;

/// The plain code, compiled once more with the path's instructions.
#[inline(always)]
pub(super) fn prepare_bounds_i8<S: Simd>(_: S, query: &[f32], d: usize, to: &mut Query8) {
    to.set(query, d);
}

/// What an instruction set has to offer here.
trait Whole: Copy {
    /// 64 bytes.
    type B: Copy;
    /// Sums of products, not yet one per lane.
    type Sums: Copy;
    /// 16 lanes of f32.
    type F: Copy;

    /// Where sums begin.
    fn start(self, start: &[i32; LANES]) -> Self::Sums;
    /// # Safety
    /// 64 bytes are readable at `at`, at any alignment.
    unsafe fn load(self, at: *const u8) -> Self::B;
    /// `high` where the bits of `upper` are set, else `low`.
    fn choose(self, upper: Self::B, low: Self::B, high: Self::B) -> Self::B;
    /// Adds the products of signed codes with unsigned ones.
    fn dot(self, sums: Self::Sums, codes: Self::B, ends: Self::B) -> Self::Sums;
    /// Each lane's sum as f32.
    fn lanes(self, sums: Self::Sums) -> Self::F;
    fn steps(self, step: &[f32; LANES]) -> Self::F;
    /// Each lane's scale, where a block has that many.
    ///
    /// # Safety
    /// So many f32 are readable at `at`: 4, 8 or 16.
    unsafe fn scales(self, at: *const u8, scales: usize) -> Self::F;
    fn mul(self, a: Self::F, b: Self::F) -> Self::F;
    /// Four sums over lanes: those that are 8 apart first, then 4, 2 and 1.
    fn sum4(self, terms: [Self::F; 4]) -> [f32; 4];
}

#[inline(always)]
fn page_bounds_i8<W: Whole>(
    w: W,
    block: Block,
    queries: &[Query8],
    digests: &[u8],
    pages: usize,
    out: &mut [f32],
    out_stride: usize,
) {
    let (page_bytes, bounds) = (digests.len() / pages, Bounds { at: out.as_mut_ptr(), stride: out_stride });
    // SAFETY: the public method checked that there are as many digests as pages, all with this block, and room for every bound.
    unsafe {
        let digests = digests.as_ptr().add(block.at);
        match (block.stripes, block.channel) {
            (1, 0) => all_pages::<W, 1, true>(w, queries, digests, page_bytes, pages, bounds),
            (2, 0) => all_pages::<W, 2, true>(w, queries, digests, page_bytes, pages, bounds),
            (3, 0) => all_pages::<W, 3, true>(w, queries, digests, page_bytes, pages, bounds),
            (_, 0) => all_pages::<W, 4, true>(w, queries, digests, page_bytes, pages, bounds),
            (1, _) => all_pages::<W, 1, false>(w, queries, digests, page_bytes, pages, bounds),
            (2, _) => all_pages::<W, 2, false>(w, queries, digests, page_bytes, pages, bounds),
            (3, _) => all_pages::<W, 3, false>(w, queries, digests, page_bytes, pages, bounds),
            _ => all_pages::<W, 4, false>(w, queries, digests, page_bytes, pages, bounds),
        }
    }
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
/// At `digests` and every `page_bytes` bytes further a block of so many stripes is readable; `bounds` has room for one per page for each
/// query.
#[inline(always)]
unsafe fn all_pages<W: Whole, const STRIPES: usize, const FIRST: bool>(
    w: W,
    queries: &[Query8],
    digests: *const u8,
    page_bytes: usize,
    pages: usize,
    bounds: Bounds,
) {
    for first in (0..pages).step_by(PAGES) {
        let count = PAGES.min(pages - first);
        // SAFETY: passed on to the caller; where the pages end, the last one twice.
        unsafe {
            let places = [0, count - 1].map(|i| digests.add((first + i) * page_bytes));
            let two = TwoPages::<W, STRIPES>::load(w, places);
            let bounds = Bounds { at: bounds.at.add(first), ..bounds };
            let (pairs, last) = queries.as_chunks::<2>();
            for (i, [one, other]) in pairs.iter().enumerate() {
                let bounds = Bounds { at: bounds.at.add(2 * i * bounds.stride), ..bounds };
                two.write::<FIRST>(w, one, other, count, bounds);
            }
            if let [query] = last {
                // The same twice, and written twice.
                let at = bounds.at.add(2 * pairs.len() * bounds.stride);
                two.write::<FIRST>(w, query, query, count, Bounds { at, stride: 0 });
            }
        }
    }
}

/// A block of two pages in registers.
struct TwoPages<W: Whole, const STRIPES: usize> {
    low: [[W::B; STRIPES]; PAGES],
    high: [[W::B; STRIPES]; PAGES],
    scales: [W::F; PAGES],
}

impl<W: Whole, const STRIPES: usize> TwoPages<W, STRIPES> {
    /// # Safety
    /// At both places a block of so many stripes is readable.
    #[inline(always)]
    unsafe fn load(w: W, places: [*const u8; PAGES]) -> Self {
        let nothing = zeros(w);
        let ends = [[nothing.0; STRIPES]; PAGES];
        let mut two = Self { low: ends, high: ends, scales: [nothing.1; PAGES] };
        let scale_count = (4 * STRIPES.next_power_of_two()).min(LANES);
        for p in 0..PAGES {
            // SAFETY: a block is its scales, then 64 bytes of minima and of maxima for each stripe.
            unsafe {
                let codes = places[p].add(4 * scale_count);
                two.scales[p] = w.scales(places[p], scale_count);
                for i in 0..STRIPES {
                    two.low[p][i] = w.load(codes.add(i * STRIPE));
                    two.high[p][i] = w.load(codes.add((STRIPES + i) * STRIPE));
                }
            }
        }
        two
    }

    /// Writes or adds to two queries' bounds of the first `count` pages.
    ///
    /// # Safety
    /// `bounds` has room for so many of both.
    #[inline(always)]
    unsafe fn write<const FIRST: bool>(
        &self,
        w: W,
        one: &Query8,
        other: &Query8,
        count: usize,
        bounds: Bounds,
    ) {
        let ([a, b], [c, d]) = (self.terms(w, one), self.terms(w, other));
        let sums = w.sum4([a, b, c, d]);
        // SAFETY: passed on to the caller. All is read before anything is written: both may be one.
        unsafe {
            let (at, at_other) = (bounds.at, bounds.at.add(bounds.stride));
            let before = if FIRST {
                [FLOOR; 4]
            } else {
                let last = count - 1;
                [at.read(), at.add(last).read(), at_other.read(), at_other.add(last).read()]
            };
            write2([sums[0] + before[0], sums[1] + before[1]], count, at);
            write2([sums[2] + before[2], sums[3] + before[3]], count, at_other);
        }
    }

    /// What the lanes of both pages come to.
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

/// The proof that this machine has AVX2.
#[derive(Clone, Copy)]
struct Halves(());

/// One register of 16 words per quarter of a stripe, products of two channels added.
#[inline]
#[target_feature(enable = "avx2")]
fn dot_halves(sums: [__m256i; 4], codes: [__m256i; 2], ends: [__m256i; 2]) -> [__m256i; 4] {
    let quarter = |i: usize| {
        let (codes, ends) = (codes[i / 2], ends[i / 2]);
        let (codes, ends) = if i.is_multiple_of(2) {
            (_mm256_castsi256_si128(codes), _mm256_castsi256_si128(ends))
        } else {
            (_mm256_extracti128_si256::<1>(codes), _mm256_extracti128_si256::<1>(ends))
        };
        _mm256_madd_epi16(_mm256_cvtepi8_epi16(codes), _mm256_cvtepu8_epi16(ends))
    };
    [
        _mm256_add_epi32(sums[0], quarter(0)),
        _mm256_add_epi32(sums[1], quarter(1)),
        _mm256_add_epi32(sums[2], quarter(2)),
        _mm256_add_epi32(sums[3], quarter(3)),
    ]
}

#[inline]
#[target_feature(enable = "avx2")]
fn lanes_of_halves(start: [__m256i; 2], sums: [__m256i; 4]) -> [__m256; 2] {
    // Neighbours added, and back into order.
    let joined = |a, b| _mm256_permute4x64_epi64::<0b11_01_10_00>(_mm256_hadd_epi32(a, b));
    [
        _mm256_cvtepi32_ps(_mm256_add_epi32(start[0], joined(sums[0], sums[1]))),
        _mm256_cvtepi32_ps(_mm256_add_epi32(start[1], joined(sums[2], sums[3]))),
    ]
}

/// # Safety
/// As [`Whole::scales`].
#[inline]
#[target_feature(enable = "avx2")]
unsafe fn scales_of_halves(at: *const u8, scales: usize) -> [__m256; 2] {
    // SAFETY: passed on to the caller.
    unsafe {
        match scales {
            4 => {
                let all = _mm256_castps128_ps256(_mm_loadu_ps(at.cast()));
                [
                    _mm256_permutevar8x32_ps(all, _mm256_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1)),
                    _mm256_permutevar8x32_ps(all, _mm256_setr_epi32(2, 2, 2, 2, 3, 3, 3, 3)),
                ]
            }
            8 => {
                let all = _mm256_loadu_ps(at.cast());
                [
                    _mm256_permutevar8x32_ps(all, _mm256_setr_epi32(0, 0, 1, 1, 2, 2, 3, 3)),
                    _mm256_permutevar8x32_ps(all, _mm256_setr_epi32(4, 4, 5, 5, 6, 6, 7, 7)),
                ]
            }
            _ => [_mm256_loadu_ps(at.cast()), _mm256_loadu_ps(at.add(32).cast())],
        }
    }
}

/// Four registers whose lanes 8 apart have been added.
#[inline]
#[target_feature(enable = "avx2")]
fn sum4_of_8([a, b, c, d]: [__m256; 4]) -> __m128 {
    let fours =
        |a, b| _mm256_add_ps(_mm256_permute2f128_ps::<0x20>(a, b), _mm256_permute2f128_ps::<0x31>(a, b));
    let (ab, cd) = (_mm256_castps_pd(fours(a, b)), _mm256_castps_pd(fours(c, d)));
    let low = _mm256_castpd_ps(_mm256_unpacklo_pd(ab, cd));
    let high = _mm256_castpd_ps(_mm256_unpackhi_pd(ab, cd));
    // a, a, c, c | b, b, d, d
    let twos = _mm256_add_ps(low, high);
    let (ac, bd) = (_mm256_castps256_ps128(twos), _mm256_extractf128_ps::<1>(twos));
    let sums = _mm_add_ps(_mm_shuffle_ps::<0b10_00_10_00>(ac, bd), _mm_shuffle_ps::<0b11_01_11_01>(ac, bd));
    // a, c, b, d
    _mm_shuffle_ps::<0b11_01_10_00>(sums, sums)
}

impl Whole for Halves {
    type B = [__m256i; 2];
    /// Where lanes begin, and the products so far, two lanes' parts for each.
    type Sums = ([__m256i; 2], [__m256i; 4]);
    type F = [__m256; 2];

    // SAFETY, here and in every block below: the value `self` is the proof that the instructions are there; where a pointer is
    // used, the caller promises the memory behind it.
    #[inline(always)]
    fn start(self, start: &[i32; LANES]) -> Self::Sums {
        let at = start.as_ptr();
        // SAFETY: see above; 16 i32.
        unsafe {
            let start = [_mm256_loadu_si256(at.cast()), _mm256_loadu_si256(at.add(8).cast())];
            (start, [_mm256_setzero_si256(); 4])
        }
    }
    #[inline(always)]
    unsafe fn load(self, at: *const u8) -> Self::B {
        // SAFETY: see above.
        unsafe { [_mm256_loadu_si256(at.cast()), _mm256_loadu_si256(at.add(32).cast())] }
    }
    #[inline(always)]
    fn choose(self, upper: Self::B, low: Self::B, high: Self::B) -> Self::B {
        // SAFETY: see above.
        unsafe {
            [_mm256_blendv_epi8(low[0], high[0], upper[0]), _mm256_blendv_epi8(low[1], high[1], upper[1])]
        }
    }
    #[inline(always)]
    fn dot(self, sums: Self::Sums, codes: Self::B, ends: Self::B) -> Self::Sums {
        // SAFETY: see above.
        unsafe { (sums.0, dot_halves(sums.1, codes, ends)) }
    }
    #[inline(always)]
    fn lanes(self, sums: Self::Sums) -> Self::F {
        // SAFETY: see above.
        unsafe { lanes_of_halves(sums.0, sums.1) }
    }
    #[inline(always)]
    fn steps(self, step: &[f32; LANES]) -> Self::F {
        // SAFETY: see above; 16 f32.
        unsafe { [_mm256_loadu_ps(step.as_ptr()), _mm256_loadu_ps(step.as_ptr().add(8))] }
    }
    #[inline(always)]
    unsafe fn scales(self, at: *const u8, scales: usize) -> Self::F {
        // SAFETY: see above.
        unsafe { scales_of_halves(at, scales) }
    }
    #[inline(always)]
    fn mul(self, a: Self::F, b: Self::F) -> Self::F {
        // SAFETY: see above.
        unsafe { [_mm256_mul_ps(a[0], b[0]), _mm256_mul_ps(a[1], b[1])] }
    }
    #[inline(always)]
    fn sum4(self, terms: [Self::F; 4]) -> [f32; 4] {
        // SAFETY: see above; __m128 and [f32; 4] have one layout.
        unsafe {
            let halves = terms.map(|[low, high]| _mm256_add_ps(low, high));
            std::mem::transmute::<__m128, [f32; 4]>(sum4_of_8(halves))
        }
    }
}

/// The proof that this machine has AVX-512 F, BW, DQ and VNNI.
#[derive(Clone, Copy)]
struct Vnni(());

#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
fn choose(upper: __m512i, low: __m512i, high: __m512i) -> __m512i {
    _mm512_mask_blend_epi8(_mm512_movepi8_mask(upper), low, high)
}

#[inline]
#[target_feature(enable = "avx512f,avx512vnni")]
fn dot_bytes(sums: __m512i, codes: __m512i, ends: __m512i) -> __m512i {
    _mm512_dpbusd_epi32(sums, ends, codes)
}

/// # Safety
/// As [`Whole::scales`].
#[inline]
#[target_feature(enable = "avx512f")]
unsafe fn scales_of_bytes(at: *const u8, scales: usize) -> __m512 {
    // SAFETY: passed on to the caller.
    unsafe {
        match scales {
            4 => {
                let lanes = _mm512_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3);
                _mm512_permutexvar_ps(lanes, _mm512_castps128_ps512(_mm_loadu_ps(at.cast())))
            }
            8 => {
                let lanes = _mm512_setr_epi32(0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7);
                _mm512_permutexvar_ps(lanes, _mm512_castps256_ps512(_mm256_loadu_ps(at.cast())))
            }
            _ => _mm512_loadu_ps(at.cast()),
        }
    }
}

#[inline]
#[target_feature(enable = "avx2,avx512f,avx512dq")]
fn sum4_of_16(terms: [__m512; 4]) -> __m128 {
    let halves = terms.map(|v| _mm256_add_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps::<1>(v)));
    sum4_of_8(halves)
}

impl Whole for Vnni {
    type B = __m512i;
    type Sums = __m512i;
    type F = __m512;

    #[inline(always)]
    fn start(self, start: &[i32; LANES]) -> __m512i {
        // SAFETY: see above; 16 i32.
        unsafe { _mm512_loadu_si512(start.as_ptr().cast()) }
    }
    #[inline(always)]
    unsafe fn load(self, at: *const u8) -> __m512i {
        // SAFETY: see above.
        unsafe { _mm512_loadu_si512(at.cast()) }
    }
    #[inline(always)]
    fn choose(self, upper: __m512i, low: __m512i, high: __m512i) -> __m512i {
        // SAFETY: see above.
        unsafe { choose(upper, low, high) }
    }
    #[inline(always)]
    fn dot(self, sums: __m512i, codes: __m512i, ends: __m512i) -> __m512i {
        // SAFETY: see above.
        unsafe { dot_bytes(sums, codes, ends) }
    }
    #[inline(always)]
    fn lanes(self, sums: __m512i) -> __m512 {
        // SAFETY: see above.
        unsafe { _mm512_cvtepi32_ps(sums) }
    }
    #[inline(always)]
    fn steps(self, step: &[f32; LANES]) -> __m512 {
        // SAFETY: see above; 16 f32.
        unsafe { _mm512_loadu_ps(step.as_ptr()) }
    }
    #[inline(always)]
    unsafe fn scales(self, at: *const u8, scales: usize) -> __m512 {
        // SAFETY: see above.
        unsafe { scales_of_bytes(at, scales) }
    }
    #[inline(always)]
    fn mul(self, a: __m512, b: __m512) -> __m512 {
        // SAFETY: see above.
        unsafe { _mm512_mul_ps(a, b) }
    }
    #[inline(always)]
    fn sum4(self, terms: [__m512; 4]) -> [f32; 4] {
        // SAFETY: see above; __m128 and [f32; 4] have one layout.
        unsafe { std::mem::transmute::<__m128, [f32; 4]>(sum4_of_16(terms)) }
    }
}

macro_rules! path {
    ($module:ident, $features:literal, $whole:ident) => {
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
                super::page_bounds_i8($whole(()), block, queries, digests, pages, out, out_stride);
            }
        }
    };
}

path!(halves, "avx2", Halves);
path!(vnni, "avx2,avx512f,avx512bw,avx512dq,avx512vnni", Vnni);
