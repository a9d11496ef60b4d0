//! AVX2 with FMA and F16C: 8 lanes, 16 registers.

use std::arch::x86_64::*;

use super::Simd;

/// The proof that this machine has AVX2, FMA and F16C.
#[derive(Clone, Copy)]
pub(super) struct Avx2(());

impl Avx2 {
    /// # Safety
    /// The machine has the instructions.
    #[inline(always)]
    pub(super) unsafe fn new() -> Self {
        Self(())
    }
}

const NEAREST: i32 = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;

/// For every set of lanes, where each kept lane comes from, one byte each from the lowest up.
static COMPRESS: [u64; 256] = {
    let mut table = [0; 256];
    let mut lanes = 0;
    while lanes < 256 {
        let (mut lane, mut kept) = (0, 0);
        while lane < 8 {
            if lanes >> lane & 1 == 1 {
                table[lanes] |= (lane as u64) << (8 * kept);
                kept += 1;
            }
            lane += 1;
        }
        lanes += 1;
    }
    table
};

/// All bits set in the first `n` lanes.
#[inline]
#[target_feature(enable = "avx2")]
fn mask(n: usize) -> __m256i {
    _mm256_cmpgt_epi32(_mm256_set1_epi32(n as i32), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7))
}

/// Eight u16, the first `n` from memory.
///
/// # Safety
/// `n < 8` u16 are readable at `at`.
#[inline]
#[target_feature(enable = "avx2")]
unsafe fn load_u16_part(at: *const u8, n: usize) -> __m128i {
    debug_assert!(n < 8);
    let mut values = [0_u16; 8];
    // SAFETY: the caller promises n values; the buffer holds more.
    unsafe {
        std::ptr::copy_nonoverlapping(at, values.as_mut_ptr().cast(), 2 * n);
        _mm_loadu_si128(values.as_ptr().cast())
    }
}

/// The first `n` of eight u16 to memory.
///
/// # Safety
/// `n < 8` u16 are writable at `at`.
#[inline]
#[target_feature(enable = "avx2")]
unsafe fn store_u16_part(v: __m128i, at: *mut u8, n: usize) {
    debug_assert!(n < 8);
    let mut values = [0_u16; 8];
    // SAFETY: the caller promises room for n values; the buffer holds more.
    unsafe {
        _mm_storeu_si128(values.as_mut_ptr().cast(), v);
        std::ptr::copy_nonoverlapping(values.as_ptr().cast(), at, 2 * n);
    }
}

/// The upper halves after rounding to nearest, ties to even; NaNs stay NaN.
#[inline]
#[target_feature(enable = "avx2")]
fn to_bf16(v: __m256) -> __m128i {
    let bits = _mm256_castps_si256(v);
    let high = _mm256_srli_epi32::<16>(bits);
    let odd = _mm256_and_si256(high, _mm256_set1_epi32(1));
    let rounded = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd);
    let nan = _mm256_castps_si256(_mm256_cmp_ps::<_CMP_UNORD_Q>(v, v));
    let quiet = _mm256_or_si256(high, _mm256_set1_epi32(0x40));
    let words = _mm256_blendv_epi8(_mm256_srli_epi32::<16>(rounded), quiet, nan);
    _mm_packus_epi32(_mm256_castsi256_si128(words), _mm256_extracti128_si256::<1>(words))
}

#[inline]
#[target_feature(enable = "avx2")]
fn from_bf16(v: __m128i) -> __m256 {
    _mm256_castsi256_ps(_mm256_slli_epi32::<16>(_mm256_cvtepu16_epi32(v)))
}

#[inline]
#[target_feature(enable = "avx2")]
fn sum4([a, b, c, d]: [__m256; 4]) -> __m128 {
    // Within each half: lanes 0 + 2 and 1 + 3 of a and b, of c and d; then their sums, one per register summed.
    let ab = _mm256_add_ps(_mm256_unpacklo_ps(a, b), _mm256_unpackhi_ps(a, b));
    let cd = _mm256_add_ps(_mm256_unpacklo_ps(c, d), _mm256_unpackhi_ps(c, d));
    let (ab, cd) = (_mm256_castps_pd(ab), _mm256_castps_pd(cd));
    let low = _mm256_castpd_ps(_mm256_unpacklo_pd(ab, cd));
    let high = _mm256_castpd_ps(_mm256_unpackhi_pd(ab, cd));
    let halves = _mm256_add_ps(low, high);
    _mm_add_ps(_mm256_castps256_ps128(halves), _mm256_extractf128_ps::<1>(halves))
}

#[inline]
#[target_feature(enable = "avx2")]
fn max_lane(v: __m256) -> f32 {
    let v = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps::<1>(v));
    let v = _mm_max_ps(v, _mm_movehl_ps(v, v));
    _mm_cvtss_f32(_mm_max_ss(v, _mm_shuffle_ps::<1>(v, v)))
}

#[inline]
#[target_feature(enable = "avx2")]
fn scale_exp(p: __m256, n: __m256, x: __m256) -> __m256 {
    // The exponent field moves by n: p · 2^n is a normal number wherever x is not below -86.5.
    let shift = _mm256_slli_epi32::<23>(_mm256_cvtps_epi32(n));
    let scaled = _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(p), shift));
    _mm256_and_ps(scaled, _mm256_cmp_ps::<_CMP_NLT_UQ>(x, _mm256_set1_ps(-86.5)))
}

#[inline]
#[target_feature(enable = "avx2")]
fn keys(v: __m256) -> __m256i {
    let bits = _mm256_castps_si256(_mm256_add_ps(v, _mm256_setzero_ps()));
    let flip = _mm256_srli_epi32::<1>(_mm256_srai_epi32::<31>(bits));
    let nan = _mm256_castps_si256(_mm256_cmp_ps::<_CMP_UNORD_Q>(v, v));
    let lowest = _mm256_set1_epi32(super::top_k::LOWEST);
    _mm256_blendv_epi8(_mm256_xor_si256(bits, flip), lowest, nan)
}

/// Eight fp8 as f16 of a 256th of their value: the same fields, seven bits further up, of a smaller bias.
#[inline]
#[target_feature(enable = "avx2,f16c")]
fn from_fp8(bytes: __m128i) -> __m256 {
    let words = _mm_cvtepu8_epi16(bytes);
    let magnitude = _mm_and_si128(words, _mm_set1_epi16(0x7f));
    let sign = _mm_slli_epi16::<8>(_mm_xor_si128(words, magnitude));
    // The one code that is no number gets all bits, and so is none in f16.
    let nan = _mm_cmpeq_epi16(magnitude, _mm_set1_epi16(0x7f));
    let half = _mm_or_si128(
        _mm_slli_epi16::<7>(magnitude),
        _mm_or_si128(sign, _mm_and_si128(nan, _mm_set1_epi16(0x7fff))),
    );
    _mm256_mul_ps(_mm256_cvtph_ps(half), _mm256_set1_ps(256.0))
}

impl Simd for Avx2 {
    type V = __m256;
    type I = __m256i;
    type M = __m256;
    const LANES: usize = 8;
    const HEADS: usize = 3;

    // SAFETY, here and in every block below: the value `self` is the proof that the instructions are there; where a pointer is
    // used, the caller promises the memory behind it.
    #[inline(always)]
    fn splat(self, value: f32) -> __m256 {
        // SAFETY: see above.
        unsafe { _mm256_set1_ps(value) }
    }
    #[inline(always)]
    fn add(self, a: __m256, b: __m256) -> __m256 {
        // SAFETY: see above.
        unsafe { _mm256_add_ps(a, b) }
    }
    #[inline(always)]
    fn sub(self, a: __m256, b: __m256) -> __m256 {
        // SAFETY: see above.
        unsafe { _mm256_sub_ps(a, b) }
    }
    #[inline(always)]
    fn mul(self, a: __m256, b: __m256) -> __m256 {
        // SAFETY: see above.
        unsafe { _mm256_mul_ps(a, b) }
    }
    #[inline(always)]
    fn div(self, a: __m256, b: __m256) -> __m256 {
        // SAFETY: see above.
        unsafe { _mm256_div_ps(a, b) }
    }
    #[inline(always)]
    fn fma(self, a: __m256, b: __m256, c: __m256) -> __m256 {
        // SAFETY: see above.
        unsafe { _mm256_fmadd_ps(a, b, c) }
    }
    #[inline(always)]
    fn max(self, a: __m256, b: __m256) -> __m256 {
        // SAFETY: see above.
        unsafe { _mm256_max_ps(a, b) }
    }
    #[inline(always)]
    fn min(self, a: __m256, b: __m256) -> __m256 {
        // SAFETY: see above.
        unsafe { _mm256_min_ps(a, b) }
    }
    #[inline(always)]
    fn where_positive(self, by: __m256, a: __m256, b: __m256) -> __m256 {
        // SAFETY: see above.
        unsafe { _mm256_blendv_ps(b, a, _mm256_cmp_ps::<_CMP_GE_OQ>(by, _mm256_setzero_ps())) }
    }
    #[inline(always)]
    fn lanes_above(self, a: __m256, b: __m256) -> __m256 {
        // SAFETY: see above.
        unsafe { _mm256_cmp_ps::<_CMP_GT_OQ>(a, b) }
    }
    #[inline(always)]
    fn bits(self, lanes: __m256) -> u32 {
        // SAFETY: see above.
        unsafe { _mm256_movemask_ps(lanes).cast_unsigned() }
    }
    #[inline(always)]
    fn first(self, v: __m256, n: usize, rest: __m256) -> __m256 {
        // SAFETY: see above.
        unsafe { _mm256_blendv_ps(rest, v, _mm256_castsi256_ps(mask(n))) }
    }
    #[inline(always)]
    fn round(self, v: __m256) -> __m256 {
        // SAFETY: see above.
        unsafe { _mm256_round_ps::<NEAREST>(v) }
    }
    #[inline(always)]
    fn scale_exp(self, p: __m256, n: __m256, x: __m256) -> __m256 {
        // SAFETY: see above.
        unsafe { scale_exp(p, n, x) }
    }
    #[inline(always)]
    fn sum4(self, v: [__m256; 4]) -> [f32; 4] {
        // SAFETY: see above; __m128 and [f32; 4] have one layout.
        unsafe { std::mem::transmute::<__m128, [f32; 4]>(sum4(v)) }
    }
    #[inline(always)]
    fn max_lane(self, v: __m256) -> f32 {
        // SAFETY: see above.
        unsafe { max_lane(v) }
    }

    #[inline(always)]
    unsafe fn load_f32(self, at: *const u8) -> __m256 {
        // SAFETY: see above.
        unsafe { _mm256_loadu_ps(at.cast()) }
    }
    #[inline(always)]
    unsafe fn load_f32_but(self, lanes: __m256, at: *const u8) -> __m256 {
        // SAFETY: see above.
        unsafe { _mm256_andnot_ps(lanes, _mm256_loadu_ps(at.cast())) }
    }
    #[inline(always)]
    unsafe fn load_f32_part(self, at: *const u8, n: usize) -> __m256 {
        // SAFETY: see above.
        unsafe { _mm256_maskload_ps(at.cast(), mask(n)) }
    }
    #[inline(always)]
    unsafe fn load_f16(self, at: *const u8) -> __m256 {
        // SAFETY: see above.
        unsafe { _mm256_cvtph_ps(_mm_loadu_si128(at.cast())) }
    }
    #[inline(always)]
    unsafe fn load_f16_part(self, at: *const u8, n: usize) -> __m256 {
        // SAFETY: see above.
        unsafe { _mm256_cvtph_ps(load_u16_part(at, n)) }
    }
    #[inline(always)]
    unsafe fn load_bf16(self, at: *const u8) -> __m256 {
        // SAFETY: see above.
        unsafe { from_bf16(_mm_loadu_si128(at.cast())) }
    }
    #[inline(always)]
    unsafe fn load_bf16_part(self, at: *const u8, n: usize) -> __m256 {
        // SAFETY: see above.
        unsafe { from_bf16(load_u16_part(at, n)) }
    }
    #[inline(always)]
    unsafe fn store_f32(self, v: __m256, at: *mut u8) {
        // SAFETY: see above.
        unsafe { _mm256_storeu_ps(at.cast(), v) }
    }
    #[inline(always)]
    unsafe fn store_f32_part(self, v: __m256, at: *mut u8, n: usize) {
        // SAFETY: see above.
        unsafe { _mm256_maskstore_ps(at.cast(), mask(n), v) }
    }
    #[inline(always)]
    unsafe fn store_f16(self, v: __m256, at: *mut u8) {
        // SAFETY: see above.
        unsafe { _mm_storeu_si128(at.cast(), _mm256_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(v)) }
    }
    #[inline(always)]
    unsafe fn store_f16_part(self, v: __m256, at: *mut u8, n: usize) {
        // SAFETY: see above.
        unsafe { store_u16_part(_mm256_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(v), at, n) }
    }
    #[inline(always)]
    unsafe fn store_bf16(self, v: __m256, at: *mut u8) {
        // SAFETY: see above.
        unsafe { _mm_storeu_si128(at.cast(), to_bf16(v)) }
    }
    #[inline(always)]
    unsafe fn store_bf16_part(self, v: __m256, at: *mut u8, n: usize) {
        // SAFETY: see above.
        unsafe { store_u16_part(to_bf16(v), at, n) }
    }

    #[inline(always)]
    unsafe fn load_i8(self, at: *const u8) -> __m256 {
        // SAFETY: see above.
        unsafe { _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(at.cast()))) }
    }
    #[inline(always)]
    unsafe fn load_u8(self, at: *const u8) -> __m256 {
        // SAFETY: see above.
        unsafe { _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64(at.cast()))) }
    }
    #[inline(always)]
    unsafe fn load_u4(self, at: *const u8) -> __m256 {
        // SAFETY: see above.
        unsafe {
            // Each byte in a word of 64 bits; its high half goes to the word's upper 32.
            let bytes = _mm256_cvtepu8_epi64(_mm_cvtsi32_si128(at.cast::<i32>().read_unaligned()));
            let halves = _mm256_or_si256(bytes, _mm256_slli_epi64::<28>(bytes));
            _mm256_cvtepi32_ps(_mm256_and_si256(halves, _mm256_set1_epi32(15)))
        }
    }
    #[inline(always)]
    unsafe fn load_fp8(self, at: *const u8) -> __m256 {
        // SAFETY: see above.
        unsafe { from_fp8(_mm_loadl_epi64(at.cast())) }
    }

    #[inline(always)]
    fn keys(self, v: __m256) -> __m256i {
        // SAFETY: see above.
        unsafe { keys(v) }
    }
    #[inline(always)]
    fn splat_i32(self, value: i32) -> __m256i {
        // SAFETY: see above.
        unsafe { _mm256_set1_epi32(value) }
    }
    #[inline(always)]
    fn ids(self, base: u32) -> __m256i {
        // SAFETY: see above.
        unsafe {
            _mm256_add_epi32(_mm256_set1_epi32(base.cast_signed()), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7))
        }
    }
    #[inline(always)]
    fn above_i32(self, a: __m256i, b: __m256i) -> u32 {
        // SAFETY: see above.
        unsafe { _mm256_movemask_ps(_mm256_castsi256_ps(_mm256_cmpgt_epi32(a, b))).cast_unsigned() }
    }
    #[inline(always)]
    unsafe fn load_i32(self, at: *const i32) -> __m256i {
        // SAFETY: see above.
        unsafe { _mm256_loadu_si256(at.cast()) }
    }
    #[inline(always)]
    unsafe fn store_i32(self, v: __m256i, at: *mut i32) {
        // SAFETY: see above.
        unsafe { _mm256_storeu_si256(at.cast(), v) }
    }
    #[inline(always)]
    unsafe fn compress_i32(self, v: __m256i, lanes: u32, at: *mut i32) {
        // SAFETY: see above.
        unsafe {
            let places =
                _mm256_cvtepu8_epi32(_mm_cvtsi64_si128(COMPRESS[lanes as usize & 255].cast_signed()));
            _mm256_storeu_si256(at.cast(), _mm256_permutevar8x32_epi32(v, places));
        }
    }

    #[inline(always)]
    unsafe fn stream_line(self, from: *const u8, to: *mut u8) {
        // SAFETY: see above.
        unsafe {
            let (low, high) = (_mm256_loadu_si256(from.cast()), _mm256_loadu_si256(from.add(32).cast()));
            _mm256_stream_si256(to.cast(), low);
            _mm256_stream_si256(to.add(32).cast(), high);
        }
    }
    #[inline(always)]
    unsafe fn copy_line(self, from: *const u8, to: *mut u8) {
        // SAFETY: see above.
        unsafe {
            let (low, high) = (_mm256_loadu_si256(from.cast()), _mm256_loadu_si256(from.add(32).cast()));
            _mm256_storeu_si256(to.cast(), low);
            _mm256_storeu_si256(to.add(32).cast(), high);
        }
    }
}
