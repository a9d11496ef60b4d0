//! Many values to one.

use super::Simd;

/// In the order of a row's score in `attend`: one register of partial sums, 0 where the last one is not filled.
#[inline(always)]
pub(super) fn dot<S: Simd>(s: S, a: &[f32], b: &[f32]) -> f32 {
    let mut sum = s.splat(0.0);
    for (a, b) in a.chunks(S::LANES).zip(b.chunks(S::LANES)) {
        sum = s.fma(s.load(a), s.load(b), sum);
    }
    s.sum(sum)
}

#[inline(always)]
pub(super) fn max<S: Simd>(s: S, values: &[f32]) -> f32 {
    let lowest = s.splat(f32::NEG_INFINITY);
    // Several at once, because one comparison waits for the one before.
    let mut tops = [lowest; 4];
    let mut whole = values.chunks_exact(4 * S::LANES);
    for values in &mut whole {
        for (top, values) in tops.iter_mut().zip(values.chunks_exact(S::LANES)) {
            *top = s.max(s.load(values), *top);
        }
    }
    let mut top = s.max(s.max(tops[0], tops[1]), s.max(tops[2], tops[3]));
    for values in whole.remainder().chunks(S::LANES) {
        let v = s.load(values);
        let v = if values.len() < S::LANES { s.first(v, values.len(), lowest) } else { v };
        top = s.max(v, top);
    }
    s.max_lane(top)
}

#[inline(always)]
pub(super) fn count_above<S: Simd>(s: S, values: &[f32], threshold: f32) -> usize {
    let threshold_v = s.splat(threshold);
    let mut whole = values.chunks_exact(S::LANES);
    let mut count = 0;
    for values in &mut whole {
        count += s.above(s.load(values), threshold_v).count_ones() as usize;
    }
    count + whole.remainder().iter().filter(|value| **value > threshold).count()
}

/// `Σ_t exp(scale · values_t − max)`.
#[inline(always)]
pub(super) fn scaled_exp_sum<S: Simd>(s: S, values: &[f32], scale: f32, max: f32) -> f32 {
    let (scale, max, zero) = (s.splat(scale), s.splat(max), s.splat(0.0));
    let mut sum = zero;
    for values in values.chunks(S::LANES) {
        let weights = s.exp(s.sub(s.mul(s.load(values), scale), max));
        sum =
            s.add(sum, if values.len() < S::LANES { s.first(weights, values.len(), zero) } else { weights });
    }
    s.sum(sum)
}

#[inline(always)]
pub(super) fn exp_sum<S: Simd>(s: S, values: &[f32], max: f32) -> f32 {
    scaled_exp_sum(s, values, 1.0, max)
}

/// Each value becomes `exp(value − max)`; their sum.
#[inline(always)]
pub(super) fn exp_in_place<S: Simd>(s: S, values: &mut [f32], max: f32) -> f32 {
    let (max, zero) = (s.splat(max), s.splat(0.0));
    let mut sum = zero;
    for values in values.chunks_mut(S::LANES) {
        let weights = s.exp(s.sub(s.load(values), max));
        s.store(weights, values);
        sum =
            s.add(sum, if values.len() < S::LANES { s.first(weights, values.len(), zero) } else { weights });
    }
    s.sum(sum)
}
