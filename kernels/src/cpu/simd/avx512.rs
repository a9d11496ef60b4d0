//! AVX-512 (F, BW, VL, DQ): 16 lanes, 32 registers, masks.

use std::arch::x86_64::*;

use super::Simd;

/// The proof that this machine has AVX-512 F, BW, VL and DQ, and what [`Avx2`](super::avx2::Avx2) needs.
#[derive(Clone, Copy)]
pub(super) struct Avx512(());

impl Avx512 {
    /// # Safety
    /// The machine has the instructions.
    #[inline(always)]
    pub(super) unsafe fn new() -> Self {
        Self(())
    }
}

/// The mask of the first `n < 16` lanes.
#[inline(always)]
fn mask(n: usize) -> __mmask16 {
    debug_assert!(n < 16);
    (1_u32 << n) as __mmask16 - 1
}

/// Rounding to nearest, ties to even, without exceptions.
const NEAREST: i32 = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;

/// The upper halves after rounding to nearest, ties to even; NaNs stay NaN.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
fn to_bf16(v: __m512) -> __m256i {
    let bits = _mm512_castps_si512(v);
    let high = _mm512_srli_epi32::<16>(bits);
    let odd = _mm512_and_si512(high, _mm512_set1_epi32(1));
    let rounded = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
    let nan = _mm512_cmp_ps_mask::<_CMP_UNORD_Q>(v, v);
    let quiet = _mm512_or_si512(high, _mm512_set1_epi32(0x40));
    _mm512_cvtepi32_epi16(_mm512_mask_mov_epi32(_mm512_srli_epi32::<16>(rounded), nan, quiet))
}

#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
fn from_bf16(v: __m256i) -> __m512 {
    _mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(v)))
}

#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
fn sum4([a, b, c, d]: [__m512; 4]) -> __m128 {
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
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
fn keys(v: __m512) -> __m512i {
    let bits = _mm512_castps_si512(_mm512_add_ps(v, _mm512_setzero_ps()));
    let flip = _mm512_srli_epi32::<1>(_mm512_srai_epi32::<31>(bits));
    let nan = _mm512_cmp_ps_mask::<_CMP_UNORD_Q>(v, v);
    let lowest = _mm512_set1_epi32(super::top_k::LOWEST);
    _mm512_mask_mov_epi32(_mm512_xor_si512(bits, flip), nan, lowest)
}

/// Sixteen fp8, by way of f16 of a 256th of their value: the same fields, seven bits further up, of a smaller bias.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
fn from_fp8(bytes: __m128i) -> __m512 {
    let words = _mm256_cvtepu8_epi16(bytes);
    let magnitude = _mm256_and_si256(words, _mm256_set1_epi16(0x7f));
    let sign = _mm256_slli_epi16::<8>(_mm256_xor_si256(words, magnitude));
    let half = _mm256_or_si256(_mm256_slli_epi16::<7>(magnitude), sign);
    // The one code that is no number gets all bits, and so is none in f16.
    let nan = _mm256_cmpeq_epi16_mask(magnitude, _mm256_set1_epi16(0x7f));
    let half = _mm256_mask_mov_epi16(half, nan, _mm256_or_si256(sign, _mm256_set1_epi16(0x7fff)));
    _mm512_mul_ps(_mm512_cvtph_ps(half), _mm512_set1_ps(256.0))
}

impl Simd for Avx512 {
    type V = __m512;
    type I = __m512i;
    type M = __mmask16;
    const LANES: usize = 16;
    const HEADS: usize = 4;

    // SAFETY, here and in every block below: the value `self` is the proof that the instructions are there; where a pointer is
    // used, the caller promises the memory behind it.
    #[inline(always)]
    fn splat(self, value: f32) -> __m512 {
        // SAFETY: see above.
        unsafe { _mm512_set1_ps(value) }
    }
    #[inline(always)]
    fn add(self, a: __m512, b: __m512) -> __m512 {
        // SAFETY: see above.
        unsafe { _mm512_add_ps(a, b) }
    }
    #[inline(always)]
    fn sub(self, a: __m512, b: __m512) -> __m512 {
        // SAFETY: see above.
        unsafe { _mm512_sub_ps(a, b) }
    }
    #[inline(always)]
    fn mul(self, a: __m512, b: __m512) -> __m512 {
        // SAFETY: see above.
        unsafe { _mm512_mul_ps(a, b) }
    }
    #[inline(always)]
    fn div(self, a: __m512, b: __m512) -> __m512 {
        // SAFETY: see above.
        unsafe { _mm512_div_ps(a, b) }
    }
    #[inline(always)]
    fn fma(self, a: __m512, b: __m512, c: __m512) -> __m512 {
        // SAFETY: see above.
        unsafe { _mm512_fmadd_ps(a, b, c) }
    }
    #[inline(always)]
    fn max(self, a: __m512, b: __m512) -> __m512 {
        // SAFETY: see above.
        unsafe { _mm512_max_ps(a, b) }
    }
    #[inline(always)]
    fn min(self, a: __m512, b: __m512) -> __m512 {
        // SAFETY: see above.
        unsafe { _mm512_min_ps(a, b) }
    }
    #[inline(always)]
    fn where_positive(self, by: __m512, a: __m512, b: __m512) -> __m512 {
        // SAFETY: see above.
        unsafe { _mm512_mask_mov_ps(b, _mm512_cmp_ps_mask::<_CMP_GE_OQ>(by, _mm512_setzero_ps()), a) }
    }
    #[inline(always)]
    fn lanes_above(self, a: __m512, b: __m512) -> __mmask16 {
        // SAFETY: see above.
        unsafe { _mm512_cmp_ps_mask::<_CMP_GT_OQ>(a, b) }
    }
    #[inline(always)]
    fn bits(self, lanes: __mmask16) -> u32 {
        u32::from(lanes)
    }
    #[inline(always)]
    fn first(self, v: __m512, n: usize, rest: __m512) -> __m512 {
        // SAFETY: see above.
        unsafe { _mm512_mask_mov_ps(rest, mask(n), v) }
    }
    #[inline(always)]
    fn round(self, v: __m512) -> __m512 {
        // SAFETY: see above.
        unsafe { _mm512_roundscale_ps::<NEAREST>(v) }
    }
    #[inline(always)]
    fn scale_exp(self, p: __m512, n: __m512, x: __m512) -> __m512 {
        // SAFETY: see above.
        unsafe {
            let kept = _mm512_cmp_ps_mask::<_CMP_NLT_UQ>(x, _mm512_set1_ps(-86.5));
            _mm512_maskz_scalef_ps(kept, p, n)
        }
    }
    #[inline(always)]
    fn sum4(self, v: [__m512; 4]) -> [f32; 4] {
        // SAFETY: see above; __m128 and [f32; 4] have one layout.
        unsafe { std::mem::transmute::<__m128, [f32; 4]>(sum4(v)) }
    }
    #[inline(always)]
    fn max_lane(self, v: __m512) -> f32 {
        // SAFETY: see above.
        unsafe { _mm512_reduce_max_ps(v) }
    }

    #[inline(always)]
    unsafe fn load_f32(self, at: *const u8) -> __m512 {
        // SAFETY: see above.
        unsafe { _mm512_loadu_ps(at.cast()) }
    }
    #[inline(always)]
    unsafe fn load_f32_but(self, lanes: __mmask16, at: *const u8) -> __m512 {
        // SAFETY: see above.
        unsafe { _mm512_maskz_loadu_ps(!lanes, at.cast()) }
    }
    #[inline(always)]
    unsafe fn load_f32_part(self, at: *const u8, n: usize) -> __m512 {
        // SAFETY: see above.
        unsafe { _mm512_maskz_loadu_ps(mask(n), at.cast()) }
    }
    #[inline(always)]
    unsafe fn load_f16(self, at: *const u8) -> __m512 {
        // SAFETY: see above.
        unsafe { _mm512_cvtph_ps(_mm256_loadu_si256(at.cast())) }
    }
    #[inline(always)]
    unsafe fn load_f16_part(self, at: *const u8, n: usize) -> __m512 {
        // SAFETY: see above.
        unsafe { _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(mask(n), at.cast())) }
    }
    #[inline(always)]
    unsafe fn load_bf16(self, at: *const u8) -> __m512 {
        // SAFETY: see above.
        unsafe { from_bf16(_mm256_loadu_si256(at.cast())) }
    }
    #[inline(always)]
    unsafe fn load_bf16_part(self, at: *const u8, n: usize) -> __m512 {
        // SAFETY: see above.
        unsafe { from_bf16(_mm256_maskz_loadu_epi16(mask(n), at.cast())) }
    }
    #[inline(always)]
    unsafe fn store_f32(self, v: __m512, at: *mut u8) {
        // SAFETY: see above.
        unsafe { _mm512_storeu_ps(at.cast(), v) }
    }
    #[inline(always)]
    unsafe fn store_f32_part(self, v: __m512, at: *mut u8, n: usize) {
        // SAFETY: see above.
        unsafe { _mm512_mask_storeu_ps(at.cast(), mask(n), v) }
    }
    #[inline(always)]
    unsafe fn store_f16(self, v: __m512, at: *mut u8) {
        // SAFETY: see above.
        unsafe { _mm256_storeu_si256(at.cast(), _mm512_cvtps_ph::<NEAREST>(v)) }
    }
    #[inline(always)]
    unsafe fn store_f16_part(self, v: __m512, at: *mut u8, n: usize) {
        // SAFETY: see above.
        unsafe { _mm256_mask_storeu_epi16(at.cast(), mask(n), _mm512_cvtps_ph::<NEAREST>(v)) }
    }
    #[inline(always)]
    unsafe fn store_bf16(self, v: __m512, at: *mut u8) {
        // SAFETY: see above.
        unsafe { _mm256_storeu_si256(at.cast(), to_bf16(v)) }
    }
    #[inline(always)]
    unsafe fn store_bf16_part(self, v: __m512, at: *mut u8, n: usize) {
        // SAFETY: see above.
        unsafe { _mm256_mask_storeu_epi16(at.cast(), mask(n), to_bf16(v)) }
    }

    #[inline(always)]
    unsafe fn load_i8(self, at: *const u8) -> __m512 {
        // SAFETY: see above.
        unsafe { _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(at.cast()))) }
    }
    #[inline(always)]
    unsafe fn load_u8(self, at: *const u8) -> __m512 {
        // SAFETY: see above.
        unsafe { _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128(at.cast()))) }
    }
    #[inline(always)]
    unsafe fn load_u4(self, at: *const u8) -> __m512 {
        // SAFETY: see above.
        unsafe {
            // Each byte in a word of 64 bits; its high half goes to the word's upper 32.
            let bytes = _mm512_cvtepu8_epi64(_mm_loadl_epi64(at.cast()));
            let halves = _mm512_or_si512(bytes, _mm512_slli_epi64::<28>(bytes));
            _mm512_cvtepi32_ps(_mm512_and_si512(halves, _mm512_set1_epi32(15)))
        }
    }
    #[inline(always)]
    unsafe fn load_fp8(self, at: *const u8) -> __m512 {
        // SAFETY: see above.
        unsafe { from_fp8(_mm_loadu_si128(at.cast())) }
    }

    #[inline(always)]
    fn keys(self, v: __m512) -> __m512i {
        // SAFETY: see above.
        unsafe { keys(v) }
    }
    #[inline(always)]
    fn splat_i32(self, value: i32) -> __m512i {
        // SAFETY: see above.
        unsafe { _mm512_set1_epi32(value) }
    }
    #[inline(always)]
    fn ids(self, base: u32) -> __m512i {
        // SAFETY: see above.
        unsafe {
            let lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
            _mm512_add_epi32(_mm512_set1_epi32(base.cast_signed()), lanes)
        }
    }
    #[inline(always)]
    fn above_i32(self, a: __m512i, b: __m512i) -> u32 {
        // SAFETY: see above.
        unsafe { u32::from(_mm512_cmpgt_epi32_mask(a, b)) }
    }
    #[inline(always)]
    unsafe fn load_i32(self, at: *const i32) -> __m512i {
        // SAFETY: see above.
        unsafe { _mm512_loadu_si512(at.cast()) }
    }
    #[inline(always)]
    unsafe fn store_i32(self, v: __m512i, at: *mut i32) {
        // SAFETY: see above.
        unsafe { _mm512_storeu_si512(at.cast(), v) }
    }
    #[inline(always)]
    unsafe fn compress_i32(self, v: __m512i, lanes: u32, at: *mut i32) {
        // To a register first: the form that writes memory is microcoded on some processors.
        // SAFETY: see above.
        unsafe { _mm512_storeu_si512(at.cast(), _mm512_maskz_compress_epi32(lanes as __mmask16, v)) }
    }

    #[inline(always)]
    unsafe fn stream_line(self, from: *const u8, to: *mut u8) {
        // SAFETY: see above.
        unsafe { _mm512_stream_si512(to.cast(), _mm512_loadu_si512(from.cast())) }
    }
    #[inline(always)]
    unsafe fn copy_line(self, from: *const u8, to: *mut u8) {
        // SAFETY: see above.
        unsafe { _mm512_storeu_si512(to.cast(), _mm512_loadu_si512(from.cast())) }
    }
}
