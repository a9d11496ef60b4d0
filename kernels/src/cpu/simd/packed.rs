//! Products of quantised matrices: a lane for each row of a panel, whole numbers within a block.

use std::arch::x86_64::*;
use std::ops::Range;

use super::Simd;
use crate::packed::{BLOCK, Codes, Line, OFFSET, PANEL, PackedMatrix, Parts, QuantisedRows, STEP};

/// Vectors that a panel is multiplied with at once: so many sums have registers.
const VECTORS: usize = 4;

/// How far ahead memory is asked for: as far as a core reads in the time that memory takes. What the processor would ask for on its own
/// ends with each page, and comes too late: it halves the speed.
const AHEAD_LINES: usize = 32;

/// The plain code, compiled once more with the path's instructions.
#[inline(always)]
pub(super) fn quantise_rows<S: Simd>(_: S, x: &[f32], columns: usize, to: &mut QuantisedRows) {
    to.set(x, columns);
}

/// What an instruction set has to offer here.
trait Lanes: Copy {
    /// 16 lanes of f32.
    type F: Copy;
    /// 16 lanes of i32.
    type I: Copy;

    fn zeros(self) -> Self::F;
    /// Sums of the products of a block's codes, for `T` vectors: `x[t]` is where a vector's codes are, `sums[t]` what they add up to.
    ///
    /// # Safety
    /// At `lines` are those of a block, at each `x[t]` 32 codes.
    unsafe fn products<const T: usize, const FOUR: bool>(
        self,
        lines: *const Line,
        x: [*const i8; T],
        sums: [i32; T],
    ) -> [Self::I; T];
    fn to_f32(self, v: Self::I) -> Self::F;
    fn splat(self, value: f32) -> Self::F;
    /// # Safety
    /// 16 f16 are readable.
    unsafe fn halves(self, at: *const u16) -> Self::F;
    fn mul(self, a: Self::F, b: Self::F) -> Self::F;
    fn fma(self, a: Self::F, b: Self::F, c: Self::F) -> Self::F;
    fn lanes(self, v: Self::F) -> [f32; PANEL];
}

#[inline(always)]
fn multiply_packed<L: Lanes>(
    l: L,
    matrix: &PackedMatrix,
    panels: Range<usize>,
    x: &QuantisedRows,
    out: &mut [f32],
) {
    let (rows, parts) = (x.rows(), matrix.parts());
    for (panel, out) in panels.zip(out.chunks_mut(PANEL * rows)) {
        let mut t = 0;
        while t < rows {
            let vectors = VECTORS.min(rows - t);
            // SAFETY: the public method checked that there are such panels, and that vectors have the matrix's columns; so many
            // vectors are left.
            unsafe {
                match (matrix.codes(), vectors) {
                    (Codes::Four, 1) => tile::<L, 1, true>(l, parts, panel, x, t, out),
                    (Codes::Four, 2) => tile::<L, 2, true>(l, parts, panel, x, t, out),
                    (Codes::Four, 3) => tile::<L, 3, true>(l, parts, panel, x, t, out),
                    (Codes::Four, _) => tile::<L, 4, true>(l, parts, panel, x, t, out),
                    (Codes::Eight, 1) => tile::<L, 1, false>(l, parts, panel, x, t, out),
                    (Codes::Eight, 2) => tile::<L, 2, false>(l, parts, panel, x, t, out),
                    (Codes::Eight, 3) => tile::<L, 3, false>(l, parts, panel, x, t, out),
                    (Codes::Eight, _) => tile::<L, 4, false>(l, parts, panel, x, t, out),
                }
            }
            t += vectors;
        }
    }
}

/// A panel with vectors `t..t + T`, into `out: [rows of the panel][rows of x]`.
///
/// # Safety
/// There is such a panel, there are so many vectors, and they have the matrix's columns.
#[inline(always)]
unsafe fn tile<L: Lanes, const T: usize, const FOUR: bool>(
    l: L,
    parts: Parts<'_>,
    panel: usize,
    x: &QuantisedRows,
    t: usize,
    out: &mut [f32],
) {
    let blocks = x.columns() / BLOCK;
    let lines_of_block = if FOUR { Codes::Four.lines() } else { Codes::Eight.lines() };
    let mut added = [l.zeros(); T];
    // No closures: the compiler may leave them out of line, and with them the instruction set.
    for b in 0..blocks {
        let block = panel * blocks + b;
        let (mut codes, mut sums) = ([std::ptr::null(); T], [0; T]);
        // SAFETY: the caller promises the panel and the vectors: all of this lies within their arrays.
        unsafe {
            for i in 0..T {
                let of_x = (t + i) * blocks + b;
                codes[i] = x.codes.as_ptr().add(of_x * BLOCK);
                sums[i] = *x.sums.as_ptr().add(of_x);
            }
            let lines = parts.lines.as_ptr().add(block * lines_of_block);
            let (scales, mins) =
                (parts.scales.as_ptr().add(block * PANEL), parts.mins.as_ptr().wrapping_add(block * PANEL));
            if t == 0 {
                ask_ahead::<FOUR>(lines, scales, mins);
            }
            let products = l.products::<T, FOUR>(lines, codes, sums);
            let scale = l.halves(scales);
            for i in 0..T {
                let step = l.splat(*x.scales.as_ptr().add((t + i) * blocks + b));
                added[i] = l.fma(scale, l.mul(l.to_f32(products[i]), step), added[i]);
            }
            if FOUR {
                let min = l.halves(mins);
                for i in 0..T {
                    let total = l.splat(*x.totals.as_ptr().add((t + i) * blocks + b));
                    added[i] = l.fma(min, total, added[i]);
                }
            }
        }
    }
    for i in 0..T {
        let lanes = l.lanes(added[i]);
        for (row, lane) in out.chunks_exact_mut(x.rows()).zip(lanes) {
            row[t + i] = lane;
        }
    }
}

/// Asks for the block that lies [`AHEAD_LINES`] further on, of this panel or of the next; behind the last one, for whatever is there.
#[inline(always)]
fn ask_ahead<const FOUR: bool>(lines: *const Line, scales: *const u16, mins: *const u16) {
    let lines_of_block = if FOUR { Codes::Four.lines() } else { Codes::Eight.lines() };
    for i in 0..lines_of_block {
        super::prefetch::<true>(lines.wrapping_add(AHEAD_LINES + i).cast());
    }
    let heads = AHEAD_LINES / lines_of_block * PANEL;
    super::prefetch::<true>(scales.wrapping_add(heads).cast());
    if FOUR {
        super::prefetch::<true>(mins.wrapping_add(heads).cast());
    }
}

/// Four codes of a vector in every lane.
///
/// # Safety
/// They are readable.
#[inline(always)]
unsafe fn four(x: *const i8) -> i32 {
    // SAFETY: passed on to the caller; at any alignment.
    unsafe { x.cast::<i32>().read_unaligned() }
}

/// The proof that this machine has AVX2, FMA and F16C.
#[derive(Clone, Copy)]
struct Halves(());

/// Eight rows of a panel, 4-bit codes with `T` vectors.
///
/// # Safety
/// As [`Lanes::products`]; `lines` is where the eight rows begin.
#[inline]
#[target_feature(enable = "avx2")]
unsafe fn half_of_four<const T: usize>(lines: *const u8, x: [*const i8; T]) -> [__m256i; T] {
    let nibble = _mm256_set1_epi8(15);
    // Words hold the products of two columns each: eight times two of 15 · 127 are 30480, which is no overflow.
    let mut words = [_mm256_setzero_si256(); T];
    for s in 0..Codes::Four.lines() {
        // SAFETY: the caller promises lines and codes.
        unsafe {
            let bytes = _mm256_loadu_si256(lines.add(s * size_of::<Line>()).cast());
            let low = _mm256_and_si256(bytes, nibble);
            let high = _mm256_and_si256(_mm256_srli_epi16::<4>(bytes), nibble);
            for t in 0..T {
                let at = x[t].add(s * STEP);
                let (x_low, x_high) =
                    (_mm256_set1_epi32(four(at)), _mm256_set1_epi32(four(at.add(BLOCK / 2))));
                let products =
                    _mm256_add_epi16(_mm256_maddubs_epi16(low, x_low), _mm256_maddubs_epi16(high, x_high));
                words[t] = _mm256_add_epi16(words[t], products);
            }
        }
    }
    let ones = _mm256_set1_epi16(1);
    for words in &mut words {
        *words = _mm256_madd_epi16(*words, ones);
    }
    words
}

/// Eight rows of a panel, 8-bit codes with `T` vectors.
///
/// # Safety
/// As [`half_of_four`].
#[inline]
#[target_feature(enable = "avx2")]
unsafe fn half_of_eight<const T: usize>(lines: *const u8, x: [*const i8; T]) -> [__m256i; T] {
    let (sign, ones) = (_mm256_set1_epi8(OFFSET as i8), _mm256_set1_epi16(1));
    let mut sums = [_mm256_setzero_si256(); T];
    for s in 0..Codes::Eight.lines() {
        // SAFETY: the caller promises lines and codes.
        unsafe {
            // As signed bytes again. Magnitudes go to one side and signs to the other: two products of at most 128 · 127 fit a word.
            let codes = _mm256_xor_si256(_mm256_loadu_si256(lines.add(s * size_of::<Line>()).cast()), sign);
            let magnitudes = _mm256_abs_epi8(codes);
            for t in 0..T {
                let x = _mm256_sign_epi8(_mm256_set1_epi32(four(x[t].add(s * STEP))), codes);
                let products = _mm256_madd_epi16(_mm256_maddubs_epi16(magnitudes, x), ones);
                sums[t] = _mm256_add_epi32(sums[t], products);
            }
        }
    }
    sums
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn fma_halves(a: [__m256; 2], b: [__m256; 2], c: [__m256; 2]) -> [__m256; 2] {
    [_mm256_fmadd_ps(a[0], b[0], c[0]), _mm256_fmadd_ps(a[1], b[1], c[1])]
}

/// # Safety
/// 16 f16 are readable.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn halves_of_halves(at: *const u16) -> [__m256; 2] {
    // SAFETY: passed on to the caller.
    unsafe {
        [_mm256_cvtph_ps(_mm_loadu_si128(at.cast())), _mm256_cvtph_ps(_mm_loadu_si128(at.add(8).cast()))]
    }
}

impl Lanes for Halves {
    type F = [__m256; 2];
    type I = [__m256i; 2];

    // SAFETY, here and in every block below: the value `self` is the proof that the instructions are there; where a pointer is
    // used, the caller promises the memory behind it.
    #[inline(always)]
    fn zeros(self) -> Self::F {
        // SAFETY: see above.
        unsafe { [_mm256_setzero_ps(); 2] }
    }
    #[inline(always)]
    unsafe fn products<const T: usize, const FOUR: bool>(
        self,
        lines: *const Line,
        x: [*const i8; T],
        _: [i32; T],
    ) -> [Self::I; T] {
        let lines = lines.cast::<u8>();
        // SAFETY: see above; the second half of each line has the other eight rows.
        unsafe {
            let other = lines.add(size_of::<Line>() / 2);
            let (first, second) = if FOUR {
                (half_of_four(lines, x), half_of_four(other, x))
            } else {
                (half_of_eight(lines, x), half_of_eight(other, x))
            };
            let mut both = [[_mm256_setzero_si256(); 2]; T];
            for t in 0..T {
                both[t] = [first[t], second[t]];
            }
            both
        }
    }
    #[inline(always)]
    fn to_f32(self, v: Self::I) -> Self::F {
        // SAFETY: see above.
        unsafe { [_mm256_cvtepi32_ps(v[0]), _mm256_cvtepi32_ps(v[1])] }
    }
    #[inline(always)]
    fn splat(self, value: f32) -> Self::F {
        // SAFETY: see above.
        unsafe { [_mm256_set1_ps(value); 2] }
    }
    #[inline(always)]
    unsafe fn halves(self, at: *const u16) -> Self::F {
        // SAFETY: see above.
        unsafe { halves_of_halves(at) }
    }
    #[inline(always)]
    fn mul(self, a: Self::F, b: Self::F) -> Self::F {
        // SAFETY: see above.
        unsafe { [_mm256_mul_ps(a[0], b[0]), _mm256_mul_ps(a[1], b[1])] }
    }
    #[inline(always)]
    fn fma(self, a: Self::F, b: Self::F, c: Self::F) -> Self::F {
        // SAFETY: see above.
        unsafe { fma_halves(a, b, c) }
    }
    #[inline(always)]
    fn lanes(self, v: Self::F) -> [f32; PANEL] {
        let mut lanes = [0.0; PANEL];
        // SAFETY: see above; there is room for 16.
        unsafe {
            _mm256_storeu_ps(lanes.as_mut_ptr(), v[0]);
            _mm256_storeu_ps(lanes.as_mut_ptr().add(8), v[1]);
        }
        lanes
    }
}

/// The proof that this machine has AVX-512 F, BW and VNNI.
#[derive(Clone, Copy)]
struct Vnni(());

/// A panel's block of 4-bit codes with `T` vectors.
///
/// # Safety
/// As [`Lanes::products`].
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
unsafe fn panel_of_four<const T: usize>(lines: *const Line, x: [*const i8; T]) -> [__m512i; T] {
    let nibble = _mm512_set1_epi8(15);
    // Two chains, so that one need not wait for the other.
    let (mut low_sums, mut high_sums) = ([_mm512_setzero_si512(); T], [_mm512_setzero_si512(); T]);
    for s in 0..Codes::Four.lines() {
        // SAFETY: the caller promises lines and codes.
        unsafe {
            let bytes = _mm512_load_si512(lines.add(s).cast());
            let low = _mm512_and_si512(bytes, nibble);
            let high = _mm512_and_si512(_mm512_srli_epi16::<4>(bytes), nibble);
            for t in 0..T {
                let at = x[t].add(s * STEP);
                low_sums[t] = _mm512_dpbusd_epi32(low_sums[t], low, _mm512_set1_epi32(four(at)));
                high_sums[t] =
                    _mm512_dpbusd_epi32(high_sums[t], high, _mm512_set1_epi32(four(at.add(BLOCK / 2))));
            }
        }
    }
    for t in 0..T {
        low_sums[t] = _mm512_add_epi32(low_sums[t], high_sums[t]);
    }
    low_sums
}

/// A panel's block of 8-bit codes with `T` vectors, whose codes add up to `sums`.
///
/// # Safety
/// As [`Lanes::products`].
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
unsafe fn panel_of_eight<const T: usize>(
    lines: *const Line,
    x: [*const i8; T],
    sums: [i32; T],
) -> [__m512i; T] {
    let (mut even, mut odd) = ([_mm512_setzero_si512(); T], [_mm512_setzero_si512(); T]);
    for t in 0..T {
        even[t] = _mm512_set1_epi32(-OFFSET * sums[t]);
    }
    for s in (0..Codes::Eight.lines()).step_by(2) {
        // SAFETY: the caller promises lines and codes.
        unsafe {
            let (first, second) =
                (_mm512_load_si512(lines.add(s).cast()), _mm512_load_si512(lines.add(s + 1).cast()));
            for t in 0..T {
                let at = x[t].add(s * STEP);
                even[t] = _mm512_dpbusd_epi32(even[t], first, _mm512_set1_epi32(four(at)));
                odd[t] = _mm512_dpbusd_epi32(odd[t], second, _mm512_set1_epi32(four(at.add(STEP))));
            }
        }
    }
    for t in 0..T {
        even[t] = _mm512_add_epi32(even[t], odd[t]);
    }
    even
}

impl Lanes for Vnni {
    type F = __m512;
    type I = __m512i;

    #[inline(always)]
    fn zeros(self) -> __m512 {
        // SAFETY: see above.
        unsafe { _mm512_setzero_ps() }
    }
    #[inline(always)]
    unsafe fn products<const T: usize, const FOUR: bool>(
        self,
        lines: *const Line,
        x: [*const i8; T],
        sums: [i32; T],
    ) -> [__m512i; T] {
        // SAFETY: see above.
        unsafe { if FOUR { panel_of_four(lines, x) } else { panel_of_eight(lines, x, sums) } }
    }
    #[inline(always)]
    fn to_f32(self, v: __m512i) -> __m512 {
        // SAFETY: see above.
        unsafe { _mm512_cvtepi32_ps(v) }
    }
    #[inline(always)]
    fn splat(self, value: f32) -> __m512 {
        // SAFETY: see above.
        unsafe { _mm512_set1_ps(value) }
    }
    #[inline(always)]
    unsafe fn halves(self, at: *const u16) -> __m512 {
        // SAFETY: see above.
        unsafe { _mm512_cvtph_ps(_mm256_loadu_si256(at.cast())) }
    }
    #[inline(always)]
    fn mul(self, a: __m512, b: __m512) -> __m512 {
        // SAFETY: see above.
        unsafe { _mm512_mul_ps(a, b) }
    }
    #[inline(always)]
    fn fma(self, a: __m512, b: __m512, c: __m512) -> __m512 {
        // SAFETY: see above.
        unsafe { _mm512_fmadd_ps(a, b, c) }
    }
    #[inline(always)]
    fn lanes(self, v: __m512) -> [f32; PANEL] {
        let mut lanes = [0.0; PANEL];
        // SAFETY: see above; there is room for 16.
        unsafe { _mm512_storeu_ps(lanes.as_mut_ptr(), v) };
        lanes
    }
}

macro_rules! path {
    ($module:ident, $features:literal, $lanes:ident) => {
        /// Calling it is unsafe outside functions with the same features: the machine must have them.
        pub(in crate::cpu) mod $module {
            use super::*;

            #[target_feature(enable = $features)]
            pub(in crate::cpu) fn multiply_packed(
                matrix: &PackedMatrix,
                panels: Range<usize>,
                x: &QuantisedRows,
                out: &mut [f32],
            ) {
                super::multiply_packed($lanes(()), matrix, panels, x, out);
            }
        }
    };
}

path!(halves, "avx2,fma,f16c", Halves);
path!(vnni, "avx2,fma,f16c,avx512f,avx512bw,avx512vnni", Vnni);
