//! Binary codes: distances and signs.

/// In how many bits two codes differ.
#[inline(always)]
fn distance(query: &[u64], code: impl Iterator<Item = u64>) -> u32 {
    query.iter().zip(code).map(|(a, b)| (a ^ b).count_ones()).sum()
}

/// The words of a code as it is stored.
#[inline(always)]
fn words(code: &[u8]) -> impl Iterator<Item = u64> + '_ {
    let (words, _) = code.as_chunks();
    words.iter().map(|word| u64::from_le_bytes(*word))
}

// Inlined, so that a caller with an instruction for counts makes use of it.
#[inline(always)]
pub(in crate::cpu) fn hamming(
    queries: &[u64],
    group: usize,
    codes: &[u8],
    out: &mut [u32],
    out_stride: usize,
) {
    let width = queries.len() / group;
    for (h, query) in queries.chunks_exact(width).enumerate() {
        for (distances, code) in out[h * out_stride..].iter_mut().zip(codes.chunks_exact(8 * width)) {
            *distances = distance(query, words(code));
        }
    }
}

#[inline(always)]
pub(in crate::cpu) fn hamming_sum(queries: &[u64], group: usize, codes: &[u8], out: &mut [u32]) {
    let width = queries.len() / group;
    for (sum, code) in out.iter_mut().zip(codes.chunks_exact(8 * width)) {
        *sum = queries.chunks_exact(width).map(|query| distance(query, words(code))).sum();
    }
}

pub(in crate::cpu) fn sign_bits(projected: &[f32], out: &mut [u8]) {
    out.fill(0);
    for (byte, values) in out.iter_mut().zip(projected.chunks(8)) {
        for (bit, value) in values.iter().enumerate() {
            *byte |= u8::from(*value > 0.0) << bit;
        }
    }
}
