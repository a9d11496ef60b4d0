//! Binary codes of keys and queries: how they are made, and how far they are from one another (HATA, Gong et al., ACL 2025).

use super::score::{check_out, columns};
use super::{Kernels, dispatch};

impl Kernels {
    /// In how many bits each binary code differs from each query: `out[h * out_stride + t] = |queries[h] xor codes[t]|`.
    ///
    /// `queries` is `[group][words]`, `codes` is `[rows][words]`, `out` has one distance per row for each query, one query every
    /// `out_stride` values. Exact; the same on every path. Fastest where codes have 2 words.
    ///
    /// # Panics
    /// When `group` is 0 or does not divide `queries`, a code has no words, or a slice has the wrong length.
    pub fn hamming(self, queries: &[u64], group: usize, codes: &[u64], out: &mut [u32], out_stride: usize) {
        in_bytes(codes, |codes| self.hamming_bytes(queries, group, codes, out, out_stride));
    }

    /// [`Kernels::hamming`] of codes as bytes, at any alignment: words are little endian.
    ///
    /// # Panics
    /// As [`Kernels::hamming`].
    pub fn hamming_bytes(
        self,
        queries: &[u64],
        group: usize,
        codes: &[u8],
        out: &mut [u32],
        out_stride: usize,
    ) {
        let rows = check_codes("hamming", queries, group, codes);
        check_out("hamming", group, rows, out, out_stride);
        if rows > 0 {
            dispatch!(self, hamming(queries, group, codes, out, out_stride));
        }
    }

    /// In how many bits each binary code differs from all queries together: `out[t] = Σ_h |queries[h] xor codes[t]|`, in one pass over
    /// the codes.
    ///
    /// `queries` is `[group][words]`, `codes` is `[rows][words]`, `out` is `[rows]`. Exact; the same on every path. Fastest where codes
    /// have 2 words.
    ///
    /// # Panics
    /// When `group` is 0 or does not divide `queries`, a code has no words, or a slice has the wrong length.
    pub fn hamming_sum(self, queries: &[u64], group: usize, codes: &[u64], out: &mut [u32]) {
        in_bytes(codes, |codes| self.hamming_sum_bytes(queries, group, codes, out));
    }

    /// [`Kernels::hamming_sum`] of codes as bytes, at any alignment: words are little endian.
    ///
    /// # Panics
    /// As [`Kernels::hamming_sum`].
    pub fn hamming_sum_bytes(self, queries: &[u64], group: usize, codes: &[u8], out: &mut [u32]) {
        let rows = check_codes("hamming_sum", queries, group, codes);
        assert_eq!(out.len(), rows, "hamming_sum: one sum per code");
        if rows > 0 {
            dispatch!(self, hamming_sum(queries, group, codes, out));
        }
    }

    /// The binary code of a projected key or query: bit c of word w is 1 where `projected[64·w + c] > 0`; words are little endian.
    /// Neither 0 nor a NaN is positive; bits past the last value are 0. The same on every path.
    ///
    /// # Panics
    /// Unless `out` has 8 bytes for every 64 values begun.
    pub fn sign_bits(self, projected: &[f32], out: &mut [u8]) {
        let bytes = projected.len().div_ceil(64) * 8;
        assert_eq!(out.len(), bytes, "sign_bits: bytes of a code of {} bits", projected.len());
        dispatch!(self, sign_bits(projected, out));
    }
}

/// Codes as little-endian bytes.
fn in_bytes(codes: &[u64], then: impl FnOnce(&[u8])) {
    if cfg!(target_endian = "little") {
        then(bytemuck::cast_slice(codes));
    } else {
        let codes: Vec<u64> = codes.iter().map(|word| word.to_le()).collect();
        then(bytemuck::cast_slice(&codes));
    }
}

/// How many codes there are.
fn check_codes(what: &str, queries: &[u64], group: usize, codes: &[u8]) -> usize {
    let words = columns(what, queries, group);
    assert!(words > 0 && codes.len().is_multiple_of(8 * words), "{what}: codes are [rows][{words}] words");
    codes.len() / (8 * words)
}
