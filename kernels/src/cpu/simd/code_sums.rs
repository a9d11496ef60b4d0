//! Whole sums of codes and weights: what each instruction set has to offer for them.

use std::arch::x86_64::*;

use super::Simd;
use super::avx2::Avx2;
use super::avx512::Avx512;
use super::lanes::Lanes;

/// Where a step of 16 channels has its codes, of the sixteen rows of a tile, and its weights.
#[derive(Clone, Copy)]
pub(super) struct Step {
    /// Two lines of 64 bytes, one after the other.
    pub(super) low: *const u8,
    /// One line, of codes of six bits only.
    pub(super) high: *const u8,
    /// Those of the first query, as [`Lanes::weights`] left them; the next one's are two stripes' bytes further.
    pub(super) weights: *const i8,
}

/// Products of codes and weights, of the sixteen rows of a tile at once. A value of such a type is the proof that this machine has the
/// instructions.
pub(super) trait Sums: Copy {
    /// What is used for f32.
    type L: Lanes + Simd;
    /// The sums of a tile's rows for one query, so far.
    type S: Copy;

    fn lanes(self) -> Self::L;
    fn zero(self) -> Self::S;
    /// Adds the products of a step, for `H` queries.
    ///
    /// # Safety
    /// The step's lines are readable, and its weights for so many queries.
    unsafe fn add<const SIX: bool, const H: usize>(self, sums: &mut [Self::S; H], at: Step);
    /// `base + unit·Σ` of each row, as the scalar twin has it.
    fn scores<const SIX: bool>(self, sums: Self::S, base: f32, unit: f32) -> <Self::L as Lanes>::F;
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
pub(super) struct Pairs(Avx2);

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

impl Pairs {
    /// # Safety
    /// The machine has the instructions.
    #[inline(always)]
    pub(super) unsafe fn new() -> Self {
        // SAFETY: passed on to the caller.
        Self(unsafe { Avx2::new() })
    }
}

/// Codes of 16 channels, one byte each: four times four.
///
/// # Safety
/// As [`Sums::add`].
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
/// As [`Sums::add`].
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

/// As [`Sums::scores`], of sums `128·hi + lo`.
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
    /// Of hi and of lo, two sums each, for one addition waits for the one before. Of codes of four bits, the second one is of those in high
    /// halves, which stay there: it is 16 times what it stands for.
    type S = [[__m512i; 2]; 2];

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
    unsafe fn add<const SIX: bool, const H: usize>(self, sums: &mut [Self::S; H], at: Step) {
        // SAFETY: see above.
        unsafe {
            let codes = if SIX { unpack_16::<true>(at.low, at.high) } else { halves_16(at.low) };
            for h in 0..H {
                for i in 0..4 {
                    let hi = at.weights.add(h * 2 * Avx512::STRIPE + Avx512::four_at(i));
                    sums[h][0][i % 2] = dot_16(sums[h][0][i % 2], codes[i], weight(hi));
                    sums[h][1][i % 2] = dot_16(sums[h][1][i % 2], codes[i], weight(hi.add(Avx512::STRIPE)));
                }
            }
        }
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
    /// Of hi and of lo.
    type S = [__m512i; 2];

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
    unsafe fn add<const SIX: bool, const H: usize>(self, sums: &mut [Self::S; H], at: Step) {
        // SAFETY: see above.
        unsafe {
            let codes = unpack_16::<SIX>(at.low, at.high);
            for h in 0..H {
                let (his, los) = all_weights(at.weights.add(h * 2 * Avx512::STRIPE));
                sums[h][0] = dot_words_16::<SIX>(sums[h][0], codes, his);
                sums[h][1] = dot_words_16::<SIX>(sums[h][1], codes, los);
            }
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
/// They are readable.
#[inline(always)]
unsafe fn all_weights(at: *const i8) -> ([i32; 4], [i32; 4]) {
    let (mut hi, mut lo) = ([0; 4], [0; 4]);
    for i in 0..4 {
        // SAFETY: passed on to the caller.
        unsafe {
            hi[i] = weight(at.add(Avx512::four_at(i)));
            lo[i] = weight(at.add(Avx512::four_at(i) + Avx512::STRIPE));
        }
    }
    (hi, lo)
}

/// Adds the products of a code of each of two channels for `H` queries; codes are words, of eight rows each.
///
/// # Safety
/// The two weights of each query are readable.
#[inline]
#[target_feature(enable = "avx2")]
unsafe fn add_pair<const H: usize>(sums: &mut [[__m256i; 2]; H], codes: [__m256i; 2], weights: *const i8) {
    for h in 0..H {
        // SAFETY: passed on to the caller.
        let weights = _mm256_set1_epi32(unsafe { weight(weights.add(h * 2 * Avx2::STRIPE)) });
        for half in 0..2 {
            sums[h][half] = _mm256_add_epi32(sums[h][half], _mm256_madd_epi16(codes[half], weights));
        }
    }
}

/// Adds the products of eight channels' codes of four bits, of one line.
///
/// # Safety
/// The line is readable; `weights` are those of the line's first two channels, and others where [`Lanes::weights`] left them.
#[inline]
#[target_feature(enable = "avx2")]
unsafe fn add_fours<const H: usize>(sums: &mut [[__m256i; 2]; H], low: *const u8, weights: *const i8) {
    // SAFETY: passed on to the caller.
    unsafe {
        let lines = [_mm256_loadu_si256(low.cast()), _mm256_loadu_si256(low.add(32).cast())];
        let mask = _mm256_set1_epi16(15);
        add_pair(sums, lines.map(|line| _mm256_and_si256(line, mask)), weights);
        let codes = lines.map(|line| _mm256_and_si256(_mm256_srli_epi16::<4>(line), mask));
        add_pair(sums, codes, weights.add(16));
        let codes = lines.map(|line| _mm256_and_si256(_mm256_srli_epi16::<8>(line), mask));
        add_pair(sums, codes, weights.add(4));
        add_pair(sums, lines.map(|line| _mm256_srli_epi16::<12>(line)), weights.add(20));
    }
}

/// The same of four channels' codes of six bits, one byte each.
///
/// # Safety
/// As [`add_fours`].
#[inline]
#[target_feature(enable = "avx2")]
unsafe fn add_bytes<const H: usize>(sums: &mut [[__m256i; 2]; H], codes: [__m256i; 2], weights: *const i8) {
    let low = _mm256_set1_epi16(255);
    // SAFETY: passed on to the caller.
    unsafe {
        add_pair(sums, codes.map(|codes| _mm256_and_si256(codes, low)), weights);
        add_pair(sums, codes.map(|codes| _mm256_srli_epi16::<8>(codes)), weights.add(4));
    }
}

/// The same of sixteen channels' codes of six bits.
///
/// # Safety
/// As [`Sums::add`].
#[inline]
#[target_feature(enable = "avx2")]
unsafe fn add_sixes<const H: usize>(sums: &mut [[__m256i; 2]; H], Step { low, high, weights }: Step) {
    let (fours, twos) = (_mm256_set1_epi8(15), _mm256_set1_epi8(0x30));
    let both = |low: __m256i, high: __m256i| {
        _mm256_or_si256(_mm256_and_si256(low, fours), _mm256_and_si256(high, twos))
    };
    // SAFETY: passed on to the caller.
    unsafe {
        let high = [_mm256_loadu_si256(high.cast()), _mm256_loadu_si256(high.add(32).cast())];
        let lines = [_mm256_loadu_si256(low.cast()), _mm256_loadu_si256(low.add(32).cast())];
        let codes = [0, 1].map(|i| both(lines[i], _mm256_slli_epi16::<4>(high[i])));
        add_bytes(sums, codes, weights);
        let codes = [0, 1].map(|i| both(_mm256_srli_epi16::<4>(lines[i]), _mm256_slli_epi16::<2>(high[i])));
        add_bytes(sums, codes, weights.add(16));
        let lines = [_mm256_loadu_si256(low.add(64).cast()), _mm256_loadu_si256(low.add(96).cast())];
        let codes = [0, 1].map(|i| both(lines[i], high[i]));
        add_bytes(sums, codes, weights.add(8));
        let codes = [0, 1].map(|i| both(_mm256_srli_epi16::<4>(lines[i]), _mm256_srli_epi16::<2>(high[i])));
        add_bytes(sums, codes, weights.add(24));
    }
}

/// As [`Sums::scores`], of eight rows.
#[inline]
#[target_feature(enable = "avx2,fma")]
fn scores_8(sums: __m256i, base: f32, unit: f32) -> __m256 {
    _mm256_fmadd_ps(_mm256_set1_ps(unit), _mm256_cvtepi32_ps(sums), _mm256_set1_ps(base))
}

impl Sums for Pairs {
    type L = Avx2;
    /// Of the first eight rows and of the others.
    type S = [__m256i; 2];

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
    unsafe fn add<const SIX: bool, const H: usize>(self, sums: &mut [Self::S; H], at: Step) {
        // SAFETY: see above.
        unsafe {
            if SIX {
                add_sixes(sums, at);
            } else {
                add_fours(sums, at.low, at.weights);
                add_fours(sums, at.low.add(64), at.weights.add(8));
            }
        }
    }
    #[inline(always)]
    fn scores<const SIX: bool>(self, sums: Self::S, base: f32, unit: f32) -> [__m256; 2] {
        // SAFETY: see above.
        unsafe { [scores_8(sums[0], base, unit), scores_8(sums[1], base, unit)] }
    }
}
