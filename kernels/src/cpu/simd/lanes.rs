//! Sixteen f32 at once, in one register or in two: sums over them are in one order on every path.

use std::arch::x86_64::*;

use super::avx2::Avx2;
use super::avx512::Avx512;

/// Values that are worked on at once.
pub(super) const LANES: usize = 16;

/// What an instruction set has to offer for sixteen f32. A value of such a type is the proof that this machine has it.
pub(super) trait Lanes: Copy {
    /// 16 lanes.
    type F: Copy;
    /// The largest of such lanes, in one register.
    type Top: Copy;
    /// Channels whose weights are found together: see [`Lanes::weights`].
    const STRIPE: usize;

    fn splat_16(self, value: f32) -> Self::F;
    /// `a·b + c`, rounded once.
    fn fma_16(self, a: Self::F, b: Self::F, c: Self::F) -> Self::F;
    fn mul_16(self, a: Self::F, b: Self::F) -> Self::F;
    /// Zeros.
    fn no_top(self) -> Self::Top;
    /// `max(|a|, b)`; `b` where `a` is NaN.
    fn larger(self, a: Self::F, b: Self::Top) -> Self::Top;
    /// The sums of four: within each four lanes those that are 2 apart first, then neighbours; then what is 8 apart, then 4.
    fn sum4_16(self, v: [Self::F; 4]) -> [f32; 4];
    /// The largest lanes of four, none of which has a NaN.
    fn max4_16(self, v: [Self::Top; 4]) -> [f32; 4];
    /// # Safety
    /// 16 f32 are readable at `at`, at any alignment.
    unsafe fn load_f32_16(self, at: *const f32) -> Self::F;
    /// # Safety
    /// 16 f16 are readable at `at`, at any alignment.
    unsafe fn load_f16_16(self, at: *const u8) -> Self::F;
    /// # Safety
    /// 16 f32 are writable at `at`.
    unsafe fn store_16(self, v: Self::F, at: *mut f32);

    /// `products · inverse` of a stripe as whole numbers, in a form of the path's own, two bytes each.
    ///
    /// # Safety
    /// A stripe of products is readable, 16 every so many values; twice as many bytes are writable at `to`.
    unsafe fn weights(self, products: *const f32, apart: usize, inverse: f32, to: *mut i8);
    /// In which stripe a step of 16 channels is, and where in the stripe's weights its own begin.
    fn weights_at(step: usize) -> (usize, usize);
}

#[inline]
#[target_feature(enable = "avx2,avx512f,avx512bw,avx512vl,avx512dq")]
fn sum4_of_16([a, b, c, d]: [__m512; 4]) -> __m128 {
    // Within each quarter: lanes 0 + 2 and 1 + 3 of a and b, of c and d; then their sums, one per register summed.
    let ab = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
    let cd = _mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
    let (ab, cd) = (_mm512_castps_pd(ab), _mm512_castps_pd(cd));
    let low = _mm512_castpd_ps(_mm512_unpacklo_pd(ab, cd));
    let high = _mm512_castpd_ps(_mm512_unpackhi_pd(ab, cd));
    let quarters = _mm512_add_ps(low, high);
    let halves = _mm256_add_ps(_mm512_castps512_ps256(quarters), _mm512_extractf32x8_ps::<1>(quarters));
    _mm_add_ps(_mm256_castps256_ps128(halves), _mm256_extractf128_ps::<1>(halves))
}

#[inline]
#[target_feature(enable = "avx2,avx512f,avx512bw,avx512vl,avx512dq")]
fn max4_of_16([a, b, c, d]: [__m512; 4]) -> __m128 {
    let ab = _mm512_max_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
    let cd = _mm512_max_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
    let (ab, cd) = (_mm512_castps_pd(ab), _mm512_castps_pd(cd));
    let low = _mm512_castpd_ps(_mm512_unpacklo_pd(ab, cd));
    let high = _mm512_castpd_ps(_mm512_unpackhi_pd(ab, cd));
    let quarters = _mm512_max_ps(low, high);
    let halves = _mm256_max_ps(_mm512_castps512_ps256(quarters), _mm512_extractf32x8_ps::<1>(quarters));
    _mm_max_ps(_mm256_castps256_ps128(halves), _mm256_extractf128_ps::<1>(halves))
}

/// Weights as `128·hi + lo`, lo from 0 to 127: first the bytes of all hi, then of all lo, four channels side by side.
///
/// # Safety
/// As [`Lanes::weights`].
#[inline]
#[target_feature(enable = "avx2,avx512f,avx512bw,avx512vl,avx512dq")]
unsafe fn weights_of_64(products: *const f32, apart: usize, inverse: f32, to: *mut i8) {
    let inverse = _mm512_set1_ps(inverse);
    let (low, mut words) = (_mm512_set1_epi16(127), [_mm512_setzero_si512(); 2]);
    for (i, words) in words.iter_mut().enumerate() {
        // SAFETY: the caller promises 64 products.
        let (a, b) = unsafe {
            (_mm512_loadu_ps(products.add(2 * i * apart)), _mm512_loadu_ps(products.add((2 * i + 1) * apart)))
        };
        *words = _mm512_packs_epi32(
            _mm512_cvtps_epi32(_mm512_mul_ps(a, inverse)),
            _mm512_cvtps_epi32(_mm512_mul_ps(b, inverse)),
        );
    }
    let hi = [_mm512_srai_epi16::<7>(words[0]), _mm512_srai_epi16::<7>(words[1])];
    let lo = [_mm512_and_si512(words[0], low), _mm512_and_si512(words[1], low)];
    // SAFETY: the caller promises room for 128 bytes.
    unsafe {
        _mm512_storeu_si512(to.cast(), _mm512_packs_epi16(hi[0], hi[1]));
        _mm512_storeu_si512(to.add(64).cast(), _mm512_packs_epi16(lo[0], lo[1]));
    }
}

impl Avx512 {
    /// From the hi of a step's first four channels to those of the `four`-th; each one's lo are a stripe further.
    #[inline(always)]
    pub(super) fn four_at(four: usize) -> usize {
        16 * four
    }
}

impl Lanes for Avx512 {
    type F = __m512;
    type Top = __m512;
    const STRIPE: usize = 64;

    // SAFETY, here and in every block below: the value `self` is the proof that the instructions are there; where a pointer is
    // used, the caller promises the memory behind it.
    #[inline(always)]
    fn splat_16(self, value: f32) -> __m512 {
        // SAFETY: see above.
        unsafe { _mm512_set1_ps(value) }
    }
    #[inline(always)]
    fn fma_16(self, a: __m512, b: __m512, c: __m512) -> __m512 {
        // SAFETY: see above.
        unsafe { _mm512_fmadd_ps(a, b, c) }
    }
    #[inline(always)]
    fn mul_16(self, a: __m512, b: __m512) -> __m512 {
        // SAFETY: see above.
        unsafe { _mm512_mul_ps(a, b) }
    }
    #[inline(always)]
    fn no_top(self) -> __m512 {
        self.splat_16(0.0)
    }
    #[inline(always)]
    fn larger(self, a: __m512, b: __m512) -> __m512 {
        // SAFETY: see above.
        // The larger magnitude without its sign, in one instruction.
        unsafe { _mm512_range_ps::<0b10_11>(a, b) }
    }
    #[inline(always)]
    fn sum4_16(self, v: [__m512; 4]) -> [f32; 4] {
        // SAFETY: see above; __m128 and [f32; 4] have one layout.
        unsafe { std::mem::transmute::<__m128, [f32; 4]>(sum4_of_16(v)) }
    }
    #[inline(always)]
    fn max4_16(self, v: [__m512; 4]) -> [f32; 4] {
        // SAFETY: see above; __m128 and [f32; 4] have one layout.
        unsafe { std::mem::transmute::<__m128, [f32; 4]>(max4_of_16(v)) }
    }
    #[inline(always)]
    unsafe fn load_f32_16(self, at: *const f32) -> __m512 {
        // SAFETY: see above.
        unsafe { _mm512_loadu_ps(at) }
    }
    #[inline(always)]
    unsafe fn load_f16_16(self, at: *const u8) -> __m512 {
        // SAFETY: see above.
        unsafe { _mm512_cvtph_ps(_mm256_loadu_si256(at.cast())) }
    }
    #[inline(always)]
    unsafe fn store_16(self, v: __m512, at: *mut f32) {
        // SAFETY: see above.
        unsafe { _mm512_storeu_ps(at, v) }
    }

    #[inline(always)]
    unsafe fn weights(self, products: *const f32, apart: usize, inverse: f32, to: *mut i8) {
        // SAFETY: see above.
        unsafe { weights_of_64(products, apart, inverse, to) }
    }
    // Packing puts a quarter of each of four registers side by side, one register being a step.
    #[inline(always)]
    fn weights_at(step: usize) -> (usize, usize) {
        (step / 4, step % 4 * 4)
    }
}

/// Within each four lanes, one of each register summed.
#[inline]
#[target_feature(enable = "avx2")]
fn fours([a, b, c, d]: [__m256; 4]) -> __m256 {
    let ab = _mm256_add_ps(_mm256_unpacklo_ps(a, b), _mm256_unpackhi_ps(a, b));
    let cd = _mm256_add_ps(_mm256_unpacklo_ps(c, d), _mm256_unpackhi_ps(c, d));
    let (ab, cd) = (_mm256_castps_pd(ab), _mm256_castps_pd(cd));
    let low = _mm256_castpd_ps(_mm256_unpacklo_pd(ab, cd));
    _mm256_add_ps(low, _mm256_castpd_ps(_mm256_unpackhi_pd(ab, cd)))
}

#[inline]
#[target_feature(enable = "avx2")]
fn sum4_of_two([a, b, c, d]: [[__m256; 2]; 4]) -> __m128 {
    let halves = _mm256_add_ps(fours([a[0], b[0], c[0], d[0]]), fours([a[1], b[1], c[1], d[1]]));
    _mm_add_ps(_mm256_castps256_ps128(halves), _mm256_extractf128_ps::<1>(halves))
}

#[inline]
#[target_feature(enable = "avx2")]
fn max4_of_8([a, b, c, d]: [__m256; 4]) -> __m128 {
    let ab = _mm256_max_ps(_mm256_unpacklo_ps(a, b), _mm256_unpackhi_ps(a, b));
    let cd = _mm256_max_ps(_mm256_unpacklo_ps(c, d), _mm256_unpackhi_ps(c, d));
    let (ab, cd) = (_mm256_castps_pd(ab), _mm256_castps_pd(cd));
    let low = _mm256_castpd_ps(_mm256_unpacklo_pd(ab, cd));
    let all = _mm256_max_ps(low, _mm256_castpd_ps(_mm256_unpackhi_pd(ab, cd)));
    _mm_max_ps(_mm256_castps256_ps128(all), _mm256_extractf128_ps::<1>(all))
}

/// Weights as words, channels that are 2 apart side by side, as codes are in a tile's words: pairs from 0, 1, 8 and 9 on, then 4, 5, 12 and 13.
///
/// # Safety
/// As [`Lanes::weights`].
#[inline]
#[target_feature(enable = "avx2")]
unsafe fn weights_of_16(products: *const f32, inverse: f32, to: *mut i8) {
    let inverse = _mm256_set1_ps(inverse);
    // SAFETY: the caller promises 16 products.
    let (a, b) = unsafe { (_mm256_loadu_ps(products), _mm256_loadu_ps(products.add(8))) };
    let words = _mm256_packs_epi32(
        _mm256_cvtps_epi32(_mm256_mul_ps(a, inverse)),
        _mm256_cvtps_epi32(_mm256_mul_ps(b, inverse)),
    );
    let order =
        _mm256_broadcastsi128_si256(_mm_setr_epi8(0, 1, 4, 5, 2, 3, 6, 7, 8, 9, 12, 13, 10, 11, 14, 15));
    // What is no number becomes the least weight, as it does in two parts.
    let words = _mm256_max_epi16(_mm256_shuffle_epi8(words, order), _mm256_set1_epi16(-16384));
    // SAFETY: the caller promises room for 32 bytes.
    unsafe { _mm256_storeu_si256(to.cast(), words) };
}

impl Lanes for Avx2 {
    type F = [__m256; 2];
    type Top = __m256;
    const STRIPE: usize = 16;

    #[inline(always)]
    fn splat_16(self, value: f32) -> Self::F {
        // SAFETY: see above.
        unsafe { [_mm256_set1_ps(value); 2] }
    }
    #[inline(always)]
    fn fma_16(self, a: Self::F, b: Self::F, c: Self::F) -> Self::F {
        // SAFETY: see above.
        unsafe { [_mm256_fmadd_ps(a[0], b[0], c[0]), _mm256_fmadd_ps(a[1], b[1], c[1])] }
    }
    #[inline(always)]
    fn mul_16(self, a: Self::F, b: Self::F) -> Self::F {
        // SAFETY: see above.
        unsafe { [_mm256_mul_ps(a[0], b[0]), _mm256_mul_ps(a[1], b[1])] }
    }
    #[inline(always)]
    fn no_top(self) -> __m256 {
        // SAFETY: see above.
        unsafe { _mm256_setzero_ps() }
    }
    #[inline(always)]
    fn larger(self, a: Self::F, b: __m256) -> __m256 {
        // SAFETY: see above.
        unsafe {
            let sign = _mm256_set1_ps(-0.0);
            let b = _mm256_max_ps(_mm256_andnot_ps(sign, a[0]), b);
            _mm256_max_ps(_mm256_andnot_ps(sign, a[1]), b)
        }
    }
    #[inline(always)]
    fn sum4_16(self, v: [Self::F; 4]) -> [f32; 4] {
        // SAFETY: see above; __m128 and [f32; 4] have one layout.
        unsafe { std::mem::transmute::<__m128, [f32; 4]>(sum4_of_two(v)) }
    }
    #[inline(always)]
    fn max4_16(self, v: [__m256; 4]) -> [f32; 4] {
        // SAFETY: see above; __m128 and [f32; 4] have one layout.
        unsafe { std::mem::transmute::<__m128, [f32; 4]>(max4_of_8(v)) }
    }
    #[inline(always)]
    unsafe fn load_f32_16(self, at: *const f32) -> Self::F {
        // SAFETY: see above.
        unsafe { [_mm256_loadu_ps(at), _mm256_loadu_ps(at.add(8))] }
    }
    #[inline(always)]
    unsafe fn load_f16_16(self, at: *const u8) -> Self::F {
        // SAFETY: see above.
        unsafe {
            [_mm256_cvtph_ps(_mm_loadu_si128(at.cast())), _mm256_cvtph_ps(_mm_loadu_si128(at.add(16).cast()))]
        }
    }
    #[inline(always)]
    unsafe fn store_16(self, v: Self::F, at: *mut f32) {
        // SAFETY: see above.
        unsafe {
            _mm256_storeu_ps(at, v[0]);
            _mm256_storeu_ps(at.add(8), v[1]);
        }
    }

    #[inline(always)]
    unsafe fn weights(self, products: *const f32, _: usize, inverse: f32, to: *mut i8) {
        // SAFETY: see above.
        unsafe { weights_of_16(products, inverse, to) }
    }
    #[inline(always)]
    fn weights_at(step: usize) -> (usize, usize) {
        (step, 0)
    }
}
