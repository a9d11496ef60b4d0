//! Sums of products of whole numbers in 8 bits, on each instruction set.

use std::arch::x86_64::*;

use crate::cpu::bounds::LANES;

/// An instruction set. A value of such a type is the proof that this machine has it.
pub(super) trait Whole: Copy {
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

/// The proof that this machine has AVX2.
#[derive(Clone, Copy)]
pub(super) struct Halves(());

impl Halves {
    /// # Safety
    /// The machine has the instructions.
    #[inline(always)]
    pub(super) unsafe fn new() -> Self {
        Self(())
    }
}

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
pub(super) struct Vnni(());

impl Vnni {
    /// # Safety
    /// The machine has the instructions.
    #[inline(always)]
    pub(super) unsafe fn new() -> Self {
        Self(())
    }
}

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
