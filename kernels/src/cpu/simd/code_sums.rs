//! Whole sums of codes and weights: what each instruction set has to offer for them.

use std::arch::x86_64::*;

use super::Simd;
use super::avx2::Avx2;
use super::avx512::Avx512;
use super::lanes::Lanes;

/// Products of four channels' codes, of several rows at once. A value of such a type is the proof that this machine has the instructions.
pub(super) trait Sums: Copy {
    /// What is used for f32.
    type L: Lanes + Simd;
    /// Four codes, one byte each, of each of [`Sums::ROWS`] rows.
    type C: Copy;
    /// The sums of hi and of lo, so far.
    type S: Copy;
    /// Rows in a register: as many as f32.
    const ROWS: usize = <Self::L as Simd>::LANES;
    /// Queries that are served at once.
    const HEADS: usize;

    fn lanes(self) -> Self::L;
    fn zero(self) -> Self::S;
    /// Codes of 16 channels: four times four, as [`Sums::add`] wants them. The two lines of low codes are 64 bytes apart; high codes are read in case of SIX only.
    ///
    /// # Safety
    /// At each, the rows' bytes are readable.
    unsafe fn unpack<const SIX: bool>(self, low: *const u8, high: *const u8) -> [Self::C; 4];
    /// Adds the products of 16 channels.
    ///
    /// # Safety
    /// At `weights` are those of the channels, as [`Lanes::weights`] left them.
    unsafe fn add<const SIX: bool>(self, sums: Self::S, codes: [Self::C; 4], weights: *const i8) -> Self::S;
    /// `base + unit·(128·hi + lo)` of each row, as the scalar twin has it.
    fn scores<const SIX: bool>(self, sums: Self::S, base: f32, unit: f32) -> <Self::L as Simd>::V;
}

/// Four weights.
///
/// # Safety
/// They are readable.
#[inline(always)]
unsafe fn weight(at: *const i8) -> i32 {
    // SAFETY: passed on to the caller.
    unsafe { at.cast::<i32>().read_unaligned() }
}

/// The proof that this machine has AVX-512 with VNNI.
#[derive(Clone, Copy)]
pub(super) struct Vnni(Avx512);

/// The proof that this machine has AVX-512.
#[derive(Clone, Copy)]
pub(super) struct Words(Avx512);

/// The proof that this machine has AVX2.
#[derive(Clone, Copy)]
pub(super) struct Halves(Avx2);

impl Vnni {
    /// # Safety
    /// The machine has the instructions.
    #[inline(always)]
    pub(super) unsafe fn new() -> Self {
        // SAFETY: passed on to the caller.
        Self(unsafe { Avx512::new() })
    }
}

impl Words {
    /// # Safety
    /// The machine has the instructions.
    #[inline(always)]
    pub(super) unsafe fn new() -> Self {
        // SAFETY: passed on to the caller.
        Self(unsafe { Avx512::new() })
    }
}

impl Halves {
    /// # Safety
    /// The machine has the instructions.
    #[inline(always)]
    pub(super) unsafe fn new() -> Self {
        // SAFETY: passed on to the caller.
        Self(unsafe { Avx2::new() })
    }
}

/// # Safety
/// As [`Sums::unpack`].
#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
unsafe fn unpack_16<const SIX: bool>(low: *const u8, high: *const u8) -> [__m512i; 4] {
    // SAFETY: passed on to the caller.
    let lines = unsafe { [_mm512_loadu_si512(low.cast()), _mm512_loadu_si512(low.add(64).cast())] };
    let mask = _mm512_set1_epi8(15);
    let mut codes = [
        _mm512_and_si512(lines[0], mask),
        _mm512_and_si512(_mm512_srli_epi16::<4>(lines[0]), mask),
        _mm512_and_si512(lines[1], mask),
        _mm512_and_si512(_mm512_srli_epi16::<4>(lines[1]), mask),
    ];
    if SIX {
        // SAFETY: passed on to the caller.
        let high = unsafe { _mm512_loadu_si512(high.cast()) };
        let shifted =
            [_mm512_slli_epi16::<4>(high), _mm512_slli_epi16::<2>(high), high, _mm512_srli_epi16::<2>(high)];
        let mask = _mm512_set1_epi8(0x30);
        for i in 0..4 {
            codes[i] = _mm512_or_si512(codes[i], _mm512_and_si512(shifted[i], mask));
        }
    }
    codes
}

/// Codes of four bits, those in high halves where they are.
///
/// # Safety
/// As [`Sums::unpack`].
#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
unsafe fn halves_16(low: *const u8) -> [__m512i; 4] {
    // SAFETY: passed on to the caller.
    let lines = unsafe { [_mm512_loadu_si512(low.cast()), _mm512_loadu_si512(low.add(64).cast())] };
    let (low, high) = (_mm512_set1_epi8(15), _mm512_set1_epi8(!15));
    [
        _mm512_and_si512(lines[0], low),
        _mm512_and_si512(lines[0], high),
        _mm512_and_si512(lines[1], low),
        _mm512_and_si512(lines[1], high),
    ]
}

/// As [`Sums::scores`].
#[inline]
#[target_feature(enable = "avx512f")]
fn scores_16(hi: __m512i, lo: __m512i, base: f32, unit: f32) -> __m512 {
    let sums = _mm512_add_epi32(_mm512_slli_epi32::<7>(hi), lo);
    _mm512_fmadd_ps(_mm512_set1_ps(unit), _mm512_cvtepi32_ps(sums), _mm512_set1_ps(base))
}

#[inline]
#[target_feature(enable = "avx512f,avx512vnni")]
fn dot_16(sums: __m512i, codes: __m512i, weights: i32) -> __m512i {
    _mm512_dpbusd_epi32(sums, codes, _mm512_set1_epi32(weights))
}

impl Sums for Vnni {
    type L = Avx512;
    type C = __m512i;
    /// Two sums each, for one addition waits for the one before. Of codes of four bits, the second one is of those in high halves, which
    /// stay there: it is 16 times what it stands for.
    type S = [[__m512i; 2]; 2];
    const HEADS: usize = 4;

    // SAFETY, here and in every block below: the value `self` is the proof that the instructions are there; where a pointer is
    // used, the caller promises the memory behind it.
    #[inline(always)]
    fn lanes(self) -> Avx512 {
        self.0
    }
    #[inline(always)]
    fn zero(self) -> Self::S {
        // SAFETY: see above.
        unsafe { [[_mm512_setzero_si512(); 2]; 2] }
    }
    #[inline(always)]
    unsafe fn unpack<const SIX: bool>(self, low: *const u8, high: *const u8) -> [__m512i; 4] {
        // SAFETY: see above.
        unsafe { if SIX { unpack_16::<true>(low, high) } else { halves_16(low) } }
    }
    #[inline(always)]
    unsafe fn add<const SIX: bool>(
        self,
        mut sums: Self::S,
        codes: [__m512i; 4],
        weights: *const i8,
    ) -> Self::S {
        for i in 0..4 {
            // SAFETY: see above.
            unsafe {
                let at = weights.add(Avx512::four_at(i));
                sums[0][i % 2] = dot_16(sums[0][i % 2], codes[i], weight(at));
                sums[1][i % 2] = dot_16(sums[1][i % 2], codes[i], weight(at.add(Avx512::STRIPE)));
            }
        }
        sums
    }
    #[inline(always)]
    fn scores<const SIX: bool>(self, [hi, lo]: Self::S, base: f32, unit: f32) -> __m512 {
        // SAFETY: see above.
        unsafe {
            let (hi_1, lo_1) = if SIX {
                (hi[1], lo[1])
            } else {
                (_mm512_srai_epi32::<4>(hi[1]), _mm512_srai_epi32::<4>(lo[1]))
            };
            scores_16(_mm512_add_epi32(hi[0], hi_1), _mm512_add_epi32(lo[0], lo_1), base, unit)
        }
    }
}

/// Products with weights of up to 127: two pairs of codes of up to 63 fit into 16 bits, and four of codes of up to 15.
#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
fn dot_words_16<const SIX: bool>(sums: __m512i, codes: [__m512i; 4], weights: [i32; 4]) -> __m512i {
    let ones = _mm512_set1_epi16(1);
    let pair = |i: usize| _mm512_maddubs_epi16(codes[i], _mm512_set1_epi32(weights[i]));
    let (a, b) = (_mm512_add_epi16(pair(0), pair(1)), _mm512_add_epi16(pair(2), pair(3)));
    if !SIX {
        return _mm512_add_epi32(sums, _mm512_madd_epi16(_mm512_add_epi16(a, b), ones));
    }
    _mm512_add_epi32(sums, _mm512_add_epi32(_mm512_madd_epi16(a, ones), _mm512_madd_epi16(b, ones)))
}

impl Sums for Words {
    type L = Avx512;
    type C = __m512i;
    type S = [__m512i; 2];
    const HEADS: usize = 4;

    #[inline(always)]
    fn lanes(self) -> Avx512 {
        self.0
    }
    #[inline(always)]
    fn zero(self) -> Self::S {
        // SAFETY: see above.
        unsafe { [_mm512_setzero_si512(); 2] }
    }
    #[inline(always)]
    unsafe fn unpack<const SIX: bool>(self, low: *const u8, high: *const u8) -> [__m512i; 4] {
        // SAFETY: see above.
        unsafe { unpack_16::<SIX>(low, high) }
    }
    #[inline(always)]
    unsafe fn add<const SIX: bool>(
        self,
        [hi, lo]: Self::S,
        codes: [__m512i; 4],
        weights: *const i8,
    ) -> Self::S {
        // SAFETY: see above.
        unsafe {
            let (his, los) = all_weights::<Avx512>(weights);
            [dot_words_16::<SIX>(hi, codes, his), dot_words_16::<SIX>(lo, codes, los)]
        }
    }
    #[inline(always)]
    fn scores<const SIX: bool>(self, [hi, lo]: Self::S, base: f32, unit: f32) -> __m512 {
        // SAFETY: see above.
        unsafe { scores_16(hi, lo, base, unit) }
    }
}

/// The weights of 16 channels, hi and lo.
///
/// # Safety
/// As [`Sums::add`].
#[inline(always)]
unsafe fn all_weights<L: Lanes>(at: *const i8) -> ([i32; 4], [i32; 4]) {
    let (mut hi, mut lo) = ([0; 4], [0; 4]);
    for i in 0..4 {
        // SAFETY: passed on to the caller.
        unsafe {
            hi[i] = weight(at.add(L::four_at(i)));
            lo[i] = weight(at.add(L::four_at(i) + L::STRIPE));
        }
    }
    (hi, lo)
}

/// # Safety
/// As [`Sums::unpack`].
#[inline]
#[target_feature(enable = "avx2")]
unsafe fn unpack_8<const SIX: bool>(low: *const u8, high: *const u8) -> [__m256i; 4] {
    // SAFETY: passed on to the caller.
    let lines = unsafe { [_mm256_loadu_si256(low.cast()), _mm256_loadu_si256(low.add(64).cast())] };
    let mask = _mm256_set1_epi8(15);
    let mut codes = [
        _mm256_and_si256(lines[0], mask),
        _mm256_and_si256(_mm256_srli_epi16::<4>(lines[0]), mask),
        _mm256_and_si256(lines[1], mask),
        _mm256_and_si256(_mm256_srli_epi16::<4>(lines[1]), mask),
    ];
    if SIX {
        // SAFETY: passed on to the caller.
        let high = unsafe { _mm256_loadu_si256(high.cast()) };
        let shifted =
            [_mm256_slli_epi16::<4>(high), _mm256_slli_epi16::<2>(high), high, _mm256_srli_epi16::<2>(high)];
        let mask = _mm256_set1_epi8(0x30);
        for i in 0..4 {
            codes[i] = _mm256_or_si256(codes[i], _mm256_and_si256(shifted[i], mask));
        }
    }
    codes
}

/// As [`dot_words_16`].
#[inline]
#[target_feature(enable = "avx2")]
fn dot_words_8<const SIX: bool>(sums: __m256i, codes: [__m256i; 4], weights: [i32; 4]) -> __m256i {
    let ones = _mm256_set1_epi16(1);
    let pair = |i: usize| _mm256_maddubs_epi16(codes[i], _mm256_set1_epi32(weights[i]));
    let (a, b) = (_mm256_add_epi16(pair(0), pair(1)), _mm256_add_epi16(pair(2), pair(3)));
    if !SIX {
        return _mm256_add_epi32(sums, _mm256_madd_epi16(_mm256_add_epi16(a, b), ones));
    }
    _mm256_add_epi32(sums, _mm256_add_epi32(_mm256_madd_epi16(a, ones), _mm256_madd_epi16(b, ones)))
}

/// As [`Sums::scores`].
#[inline]
#[target_feature(enable = "avx2,fma")]
fn scores_8(hi: __m256i, lo: __m256i, base: f32, unit: f32) -> __m256 {
    let sums = _mm256_add_epi32(_mm256_slli_epi32::<7>(hi), lo);
    _mm256_fmadd_ps(_mm256_set1_ps(unit), _mm256_cvtepi32_ps(sums), _mm256_set1_ps(base))
}

impl Sums for Halves {
    type L = Avx2;
    type C = __m256i;
    type S = [__m256i; 2];
    const HEADS: usize = 3;

    #[inline(always)]
    fn lanes(self) -> Avx2 {
        self.0
    }
    #[inline(always)]
    fn zero(self) -> Self::S {
        // SAFETY: see above.
        unsafe { [_mm256_setzero_si256(); 2] }
    }
    #[inline(always)]
    unsafe fn unpack<const SIX: bool>(self, low: *const u8, high: *const u8) -> [__m256i; 4] {
        // SAFETY: see above.
        unsafe { unpack_8::<SIX>(low, high) }
    }
    #[inline(always)]
    unsafe fn add<const SIX: bool>(
        self,
        [hi, lo]: Self::S,
        codes: [__m256i; 4],
        weights: *const i8,
    ) -> Self::S {
        // SAFETY: see above.
        unsafe {
            let (his, los) = all_weights::<Avx2>(weights);
            [dot_words_8::<SIX>(hi, codes, his), dot_words_8::<SIX>(lo, codes, los)]
        }
    }
    #[inline(always)]
    fn scores<const SIX: bool>(self, [hi, lo]: Self::S, base: f32, unit: f32) -> __m256 {
        // SAFETY: see above.
        unsafe { scores_8(hi, lo, base, unit) }
    }
}
