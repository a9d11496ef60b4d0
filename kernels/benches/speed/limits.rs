//! What one core can do at most: read in order, and sum products.

use std::hint::black_box;

use kvoyant_kernels::Path;

/// Products that [`products`] sums.
pub(crate) const PRODUCTS: f64 = (ROUNDS * CHAINS * 16) as f64;
const ROUNDS: usize = 20_000;
/// Enough sums side by side to hide how long one takes.
const CHAINS: usize = 16;

/// Reads all bytes, in order.
pub(crate) fn read(bytes: &[u8]) {
    #[cfg(target_arch = "x86_64")]
    {
        if Path::Avx512.is_available() {
            // SAFETY: the instructions are there.
            return unsafe { x86::read_512(bytes) };
        }
        if Path::Avx2.is_available() {
            // SAFETY: the instructions are there.
            return unsafe { x86::read_256(bytes) };
        }
    }
    let (words, _) = bytes.as_chunks::<8>();
    black_box(words.iter().fold(0, |all, word| all ^ u64::from_ne_bytes(*word)));
}

/// Sums [`PRODUCTS`] products of f32.
pub(crate) fn products() {
    #[cfg(target_arch = "x86_64")]
    {
        if Path::Avx512.is_available() {
            // SAFETY: the instructions are there.
            return unsafe { x86::products_512() };
        }
        if Path::Avx2.is_available() {
            // SAFETY: the instructions are there.
            return unsafe { x86::products_256() };
        }
    }
    let (mut sums, factor) = ([[1.0_f32; 16]; CHAINS], black_box(0.5_f32));
    for _ in 0..ROUNDS {
        sums.iter_mut().flatten().for_each(|sum| *sum = *sum * factor + factor);
    }
    black_box(sums);
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::*;
    use std::hint::black_box;

    use super::{CHAINS, ROUNDS};

    #[target_feature(enable = "avx512f")]
    pub(super) fn read_512(bytes: &[u8]) {
        let mut all = [_mm512_setzero_si512(); 8];
        for block in bytes.chunks_exact(512) {
            for (i, all) in all.iter_mut().enumerate() {
                // SAFETY: a block has eight registers' bytes.
                *all =
                    _mm512_xor_si512(*all, unsafe { _mm512_loadu_si512(block.as_ptr().add(64 * i).cast()) });
            }
        }
        black_box(all);
    }

    #[target_feature(enable = "avx2")]
    pub(super) fn read_256(bytes: &[u8]) {
        let mut all = [_mm256_setzero_si256(); 8];
        for block in bytes.chunks_exact(256) {
            for (i, all) in all.iter_mut().enumerate() {
                // SAFETY: a block has eight registers' bytes.
                *all =
                    _mm256_xor_si256(*all, unsafe { _mm256_loadu_si256(block.as_ptr().add(32 * i).cast()) });
            }
        }
        black_box(all);
    }

    #[target_feature(enable = "avx512f")]
    pub(super) fn products_512() {
        let (mut sums, factor) = ([_mm512_set1_ps(1.0); CHAINS], _mm512_set1_ps(black_box(0.5)));
        for _ in 0..ROUNDS {
            for sum in &mut sums {
                *sum = _mm512_fmadd_ps(*sum, factor, factor);
            }
        }
        black_box(sums);
    }

    #[target_feature(enable = "avx2,fma")]
    pub(super) fn products_256() {
        // Sixteen lanes are two registers; as many sums as there are registers for.
        let (mut sums, factor) = ([_mm256_set1_ps(1.0); 8], _mm256_set1_ps(black_box(0.5)));
        for _ in 0..ROUNDS * CHAINS / 4 {
            for sum in &mut sums {
                *sum = _mm256_fmadd_ps(*sum, factor, factor);
            }
        }
        black_box(sums);
    }
}
