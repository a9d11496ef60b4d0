//! Binary codes of 128 bits, several to a register; a group of queries at once.
//!
//! For a sum over queries the codes need not be compared with each. Of `2^k − 1` queries, `n` have a 1 at some bit; a code with a 0
//! there differs from `n` of them, one with a 1 from `2^k − 1 − n`, which is `n` with all its k binary digits turned over. So with
//! *planes* (the digits of n, bit by bit) the sum is `Σ_i 2^i · |plane_i xor code|`: two counts instead of three, three instead of
//! seven. Other groups are cut into such parts.

use std::arch::x86_64::*;

use super::Simd;
use super::stream::{LINE, Stream};
use crate::cpu::scalar;

/// Queries whose sums are taken in one pass: counts of a byte's bits, times 8, stay within a byte.
const MOST: usize = 8;
/// Codes whose sums are taken for all queries before going on to the next ones, where there are more than [`MOST`]: 16 KiB.
const BLOCK: usize = 1024;
/// Bytes of a code.
const CODE: usize = 16;

type Code = [u64; 2];

/// Registers that hold whole codes.
trait Codes: Copy {
    type R: Copy;
    /// Codes in a register.
    const HELD: usize;

    /// One code over and over.
    fn splat(self, code: Code) -> Self::R;
    /// # Safety
    /// `HELD` codes are readable at `at`, at any alignment.
    unsafe fn load(self, at: *const u8) -> Self::R;
    fn xor(self, a: Self::R, b: Self::R) -> Self::R;
    /// How many bits are set, for each part of a register.
    fn count(self, v: Self::R) -> Self::R;
    /// The sum of counts, part by part.
    fn add(self, a: Self::R, b: Self::R) -> Self::R;
    /// The counts of four registers' codes, one u32 per code, in order.
    fn per_code(self, counts: [Self::R; 4]) -> Self::R;
    fn add_u32(self, a: Self::R, b: Self::R) -> Self::R;
    /// # Safety
    /// A register's bytes are readable at `at`.
    unsafe fn load_u32(self, at: *const u32) -> Self::R;
    /// # Safety
    /// A register's bytes are writable at `at`.
    unsafe fn store_u32(self, v: Self::R, at: *mut u32);
}

/// # Safety
/// As for [`Codes::load`], of four registers.
#[inline(always)]
unsafe fn load4<C: Codes>(c: C, at: *const u8) -> [C::R; 4] {
    // SAFETY: passed on to the caller.
    unsafe {
        let register = C::HELD * CODE;
        [c.load(at), c.load(at.add(register)), c.load(at.add(2 * register)), c.load(at.add(3 * register))]
    }
}

#[inline(always)]
fn hamming<C: Codes>(c: C, queries: &[Code], codes: &[u8], out: &mut [u32], out_stride: usize) {
    let (rows, tile) = (codes.len() / CODE, 4 * C::HELD);
    let (whole, stream) = (rows - rows % tile, Stream::new(codes));
    for t in (0..whole).step_by(tile) {
        stream.ask(codes[t * CODE..].as_ptr(), tile * CODE / LINE);
        // SAFETY: `codes` has a tile's codes from t on, and `out` room for as many distances for each query.
        unsafe {
            let codes = load4(c, codes.as_ptr().add(t * CODE));
            for (h, query) in queries.iter().enumerate() {
                let query = c.splat(*query);
                let mut counts = codes;
                for i in 0..4 {
                    counts[i] = c.count(c.xor(codes[i], query));
                }
                c.store_u32(c.per_code(counts), out.as_mut_ptr().add(h * out_stride + t));
            }
        }
    }
    if whole < rows {
        let queries = bytemuck::cast_slice(queries);
        let (group, codes) = (queries.len() / 2, &codes[whole * CODE..]);
        scalar::hamming(queries, group, codes, &mut out[whole..], out_stride);
    }
}

#[inline(always)]
fn hamming_sum<C: Codes>(c: C, queries: &[Code], codes: &[u8], out: &mut [u32]) {
    let rows = out.len();
    let (whole, stream) = (rows - rows % (4 * C::HELD), Stream::new(codes));
    if queries.len() <= MOST {
        sums_of(c, queries, &codes[..whole * CODE], stream, &mut out[..whole], false);
    } else {
        for (codes, out) in codes[..whole * CODE].chunks(BLOCK * CODE).zip(out[..whole].chunks_mut(BLOCK)) {
            for (part, queries) in queries.chunks(MOST - 1).enumerate() {
                let stream = if part == 0 { stream } else { Stream::NOTHING };
                sums_of(c, queries, codes, stream, out, part > 0);
            }
        }
    }
    if whole < rows {
        let queries = bytemuck::cast_slice(queries);
        scalar::hamming_sum(queries, queries.len() / 2, &codes[whole * CODE..], &mut out[whole..]);
    }
}

/// Sums over at most [`MOST`] queries for whole tiles of codes, added to what is there or put in its place.
#[inline(always)]
fn sums_of<C: Codes>(c: C, queries: &[Code], codes: &[u8], stream: Stream, out: &mut [u32], add: bool) {
    match queries.len() {
        1 => sums::<C, 0, 0, 1>(c, queries, codes, stream, out, add),
        2 => sums::<C, 0, 0, 2>(c, queries, codes, stream, out, add),
        3 => sums::<C, 0, 1, 1>(c, queries, codes, stream, out, add),
        4 => sums::<C, 0, 1, 2>(c, queries, codes, stream, out, add),
        5 => sums::<C, 0, 1, 3>(c, queries, codes, stream, out, add),
        6 => sums::<C, 0, 2, 2>(c, queries, codes, stream, out, add),
        7 => sums::<C, 1, 1, 1>(c, queries, codes, stream, out, add),
        _ => sums::<C, 1, 1, 2>(c, queries, codes, stream, out, add),
    }
}

/// The planes of at most [`MOST`] queries, cut into parts of 7, 3 and 1: those that count four times, twice, once.
fn planes(mut queries: &[Code]) -> [([Code; 3], usize); 3] {
    let mut planes = [([[0; 2]; 3], 0); 3];
    while !queries.is_empty() {
        let digits = (queries.len() + 1).ilog2().min(3) as usize;
        let (part, rest) = queries.split_at((1 << digits) - 1);
        let mut sum = [[0_u64; 2]; 3];
        for query in part {
            for word in 0..2 {
                let mut carry = query[word];
                for digit in &mut sum {
                    (digit[word], carry) = (digit[word] ^ carry, digit[word] & carry);
                }
            }
        }
        for (digit, plane) in sum[..digits].iter().enumerate() {
            let (places, used) = &mut planes[2 - digit];
            places[*used] = *plane;
            *used += 1;
        }
        queries = rest;
    }
    planes
}

/// With so many planes that count four times, twice, and once.
#[inline(always)]
fn sums<C: Codes, const FOURS: usize, const TWOS: usize, const ONES: usize>(
    c: C,
    queries: &[Code],
    codes: &[u8],
    stream: Stream,
    out: &mut [u32],
    add: bool,
) {
    let [(fours, _), (twos, _), (ones, _)] = planes(queries);
    let (mut four, mut two, mut one) =
        ([c.splat([0; 2]); FOURS], [c.splat([0; 2]); TWOS], [c.splat([0; 2]); ONES]);
    for i in 0..FOURS {
        four[i] = c.splat(fours[i]);
    }
    for i in 0..TWOS {
        two[i] = c.splat(twos[i]);
    }
    for i in 0..ONES {
        one[i] = c.splat(ones[i]);
    }
    let tile = 4 * C::HELD;
    for t in (0..out.len()).step_by(tile) {
        stream.ask(codes[t * CODE..].as_ptr(), tile * CODE / LINE);
        // SAFETY: `codes` and `out` hold whole tiles, so one from t on.
        unsafe {
            let mut counts = load4(c, codes.as_ptr().add(t * CODE));
            for codes in &mut counts {
                let (held, mut sum) = (*codes, c.splat([0; 2]));
                for i in 0..FOURS {
                    sum = c.add(sum, c.count(c.xor(held, four[i])));
                }
                if FOURS > 0 {
                    sum = c.add(sum, sum);
                }
                for i in 0..TWOS {
                    sum = c.add(sum, c.count(c.xor(held, two[i])));
                }
                if TWOS > 0 {
                    sum = c.add(sum, sum);
                }
                for i in 0..ONES {
                    sum = c.add(sum, c.count(c.xor(held, one[i])));
                }
                *codes = sum;
            }
            let (sums, to) = (c.per_code(counts), out.as_mut_ptr().add(t));
            let sums = if add { c.add_u32(sums, c.load_u32(to)) } else { sums };
            c.store_u32(sums, to);
        }
    }
}

/// The proof that this machine has AVX2; counts are per byte, from a table for each half of it.
#[derive(Clone, Copy)]
struct Bytes(());

#[inline]
#[target_feature(enable = "avx2")]
fn bytes_per_code([a, b, c, d]: [__m256i; 4]) -> __m256i {
    let zero = _mm256_setzero_si256();
    let words = [a, b, c, d].map(|v| _mm256_sad_epu8(v, zero));
    // Two registers' codes, their words added: codes 0 and 2 | 1 and 3, as u64.
    let both = |a, b| _mm256_add_epi64(_mm256_unpacklo_epi64(a, b), _mm256_unpackhi_epi64(a, b));
    let ab = _mm256_castsi256_ps(both(words[0], words[1]));
    let cd = _mm256_castsi256_ps(both(words[2], words[3]));
    // 0, 2, 4, 6 | 1, 3, 5, 7.
    let mixed = _mm256_castps_si256(_mm256_shuffle_ps::<0b10_00_10_00>(ab, cd));
    _mm256_permutevar8x32_epi32(mixed, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7))
}

#[inline]
#[target_feature(enable = "avx2")]
fn bits_of_bytes(v: __m256i) -> __m256i {
    let table = _mm256_broadcastsi128_si256(_mm_setr_epi8(0, 1, 1, 2, 1, 2, 2, 3, 1, 2, 2, 3, 2, 3, 3, 4));
    let half = _mm256_set1_epi8(15);
    let low = _mm256_and_si256(v, half);
    let high = _mm256_and_si256(_mm256_srli_epi16::<4>(v), half);
    _mm256_add_epi8(_mm256_shuffle_epi8(table, low), _mm256_shuffle_epi8(table, high))
}

impl Codes for Bytes {
    type R = __m256i;
    const HELD: usize = 2;

    // SAFETY, here and in every block below: the value `self` is the proof that the instructions are there; where a pointer is
    // used, the caller promises the memory behind it.
    #[inline(always)]
    fn splat(self, code: Code) -> __m256i {
        let [a, b] = code.map(u64::cast_signed);
        // SAFETY: see above.
        unsafe { _mm256_setr_epi64x(a, b, a, b) }
    }
    #[inline(always)]
    unsafe fn load(self, at: *const u8) -> __m256i {
        // SAFETY: see above.
        unsafe { _mm256_loadu_si256(at.cast()) }
    }
    #[inline(always)]
    fn xor(self, a: __m256i, b: __m256i) -> __m256i {
        // SAFETY: see above.
        unsafe { _mm256_xor_si256(a, b) }
    }
    #[inline(always)]
    fn count(self, v: __m256i) -> __m256i {
        // SAFETY: see above.
        unsafe { bits_of_bytes(v) }
    }
    #[inline(always)]
    fn add(self, a: __m256i, b: __m256i) -> __m256i {
        // SAFETY: see above.
        unsafe { _mm256_add_epi8(a, b) }
    }
    #[inline(always)]
    fn per_code(self, counts: [__m256i; 4]) -> __m256i {
        // SAFETY: see above.
        unsafe { bytes_per_code(counts) }
    }
    #[inline(always)]
    fn add_u32(self, a: __m256i, b: __m256i) -> __m256i {
        // SAFETY: see above.
        unsafe { _mm256_add_epi32(a, b) }
    }
    #[inline(always)]
    unsafe fn load_u32(self, at: *const u32) -> __m256i {
        // SAFETY: see above.
        unsafe { _mm256_loadu_si256(at.cast()) }
    }
    #[inline(always)]
    unsafe fn store_u32(self, v: __m256i, at: *mut u32) {
        // SAFETY: see above.
        unsafe { _mm256_storeu_si256(at.cast(), v) }
    }
}

/// The proof that this machine has AVX-512 F and VPOPCNTDQ; counts are per word.
#[derive(Clone, Copy)]
struct Words(());

#[inline]
#[target_feature(enable = "avx512f")]
fn words_per_code([a, b, c, d]: [__m512i; 4]) -> __m512i {
    // Two registers' codes, their words added: 0 and 4, 1 and 5, 2 and 6, 3 and 7, as u64.
    let both = |a, b| _mm512_add_epi64(_mm512_unpacklo_epi64(a, b), _mm512_unpackhi_epi64(a, b));
    let order = _mm512_setr_epi32(0, 4, 8, 12, 2, 6, 10, 14, 16, 20, 24, 28, 18, 22, 26, 30);
    _mm512_permutex2var_epi32(both(a, b), order, both(c, d))
}

#[inline]
#[target_feature(enable = "avx512f,avx512vpopcntdq")]
fn bits_of_words(v: __m512i) -> __m512i {
    _mm512_popcnt_epi64(v)
}

impl Codes for Words {
    type R = __m512i;
    const HELD: usize = 4;

    #[inline(always)]
    fn splat(self, code: Code) -> __m512i {
        let [a, b] = code.map(u64::cast_signed);
        // SAFETY: see above.
        unsafe { _mm512_setr_epi64(a, b, a, b, a, b, a, b) }
    }
    #[inline(always)]
    unsafe fn load(self, at: *const u8) -> __m512i {
        // SAFETY: see above.
        unsafe { _mm512_loadu_si512(at.cast()) }
    }
    #[inline(always)]
    fn xor(self, a: __m512i, b: __m512i) -> __m512i {
        // SAFETY: see above.
        unsafe { _mm512_xor_si512(a, b) }
    }
    #[inline(always)]
    fn count(self, v: __m512i) -> __m512i {
        // SAFETY: see above.
        unsafe { bits_of_words(v) }
    }
    #[inline(always)]
    fn add(self, a: __m512i, b: __m512i) -> __m512i {
        // SAFETY: see above.
        unsafe { _mm512_add_epi64(a, b) }
    }
    #[inline(always)]
    fn per_code(self, counts: [__m512i; 4]) -> __m512i {
        // SAFETY: see above.
        unsafe { words_per_code(counts) }
    }
    #[inline(always)]
    fn add_u32(self, a: __m512i, b: __m512i) -> __m512i {
        // SAFETY: see above.
        unsafe { _mm512_add_epi32(a, b) }
    }
    #[inline(always)]
    unsafe fn load_u32(self, at: *const u32) -> __m512i {
        // SAFETY: see above.
        unsafe { _mm512_loadu_si512(at.cast()) }
    }
    #[inline(always)]
    unsafe fn store_u32(self, v: __m512i, at: *mut u32) {
        // SAFETY: see above.
        unsafe { _mm512_storeu_si512(at.cast(), v) }
    }
}

macro_rules! path {
    ($module:ident, $features:literal, $codes:ident) => {
        /// Calling one of these is unsafe outside functions with the same features: the machine must have them.
        pub(in crate::cpu) mod $module {
            use super::*;

            #[target_feature(enable = $features)]
            pub(in crate::cpu) fn hamming(
                queries: &[u64],
                group: usize,
                codes: &[u8],
                out: &mut [u32],
                out_stride: usize,
            ) {
                match bytemuck::try_cast_slice(queries) {
                    Ok(queries) if queries.len() == group => {
                        super::hamming($codes(()), queries, codes, out, out_stride);
                    }
                    _ => scalar::hamming(queries, group, codes, out, out_stride),
                }
            }

            #[target_feature(enable = $features)]
            pub(in crate::cpu) fn hamming_sum(queries: &[u64], group: usize, codes: &[u8], out: &mut [u32]) {
                match bytemuck::try_cast_slice(queries) {
                    Ok(queries) if queries.len() == group => {
                        super::hamming_sum($codes(()), queries, codes, out)
                    }
                    _ => scalar::hamming_sum(queries, group, codes, out),
                }
            }
        }
    };
}

path!(bytes, "avx2,popcnt", Bytes);
path!(words, "avx2,popcnt,avx512f,avx512vpopcntdq", Words);

/// Each register's signs are so many bytes, or half of one.
#[inline(always)]
pub(super) fn sign_bits<S: Simd>(s: S, projected: &[f32], out: &mut [u8]) {
    out.fill(0);
    let zero = s.splat(0.0);
    for (signs, values) in out.chunks_mut(S::LANES / 8).zip(projected.chunks(S::LANES)) {
        // Lanes that the values do not fill are 0, and not above it.
        let bits = s.above(s.load(values), zero).to_le_bytes();
        signs.copy_from_slice(&bits[..signs.len()]);
    }
}
