//! The k best scores.

use crate::run::TopKScratch;

/// An integer that orders as the score does; NaN as -inf, -0 as 0.
fn key(score: f32) -> i32 {
    if score.is_nan() {
        return key(f32::NEG_INFINITY);
    }
    let bits = (score + 0.0).to_bits().cast_signed();
    bits ^ ((bits >> 31) & i32::MAX)
}

pub(in crate::cpu) fn top_k(scores: &[f32], k: usize, scratch: &mut TopKScratch, out: &mut Vec<u32>) {
    if k == 0 {
        return;
    }
    // Upside down, so that the best come first, and of equals the lower id.
    let pair = |(id, score): (usize, &f32)| {
        (u64::from((!key(*score)).cast_unsigned() ^ (1 << 31)) << 32) | id as u64
    };
    scratch.pairs.clear();
    scratch.pairs.extend(scores.iter().enumerate().map(pair));
    scratch.pairs.select_nth_unstable(k - 1);
    out.extend(scratch.pairs[..k].iter().map(|pair| *pair as u32));
    out.sort_unstable();
}
