//! Value by value, and the normalisations.

use super::Simd;
use super::reduce::{exp_in_place, max, scaled_exp_sum};

#[inline(always)]
pub(super) fn softmax_add<S: Simd>(s: S, scores: &[f32], scale: f32, acc: &mut [f32]) {
    let top = max(s, scores) * scale;
    if top == f32::NEG_INFINITY {
        return;
    }
    let inverse = s.splat(1.0 / scaled_exp_sum(s, scores, scale, top));
    let (scale, top) = (s.splat(scale), s.splat(top));
    for (acc, scores) in acc.chunks_mut(S::LANES).zip(scores.chunks(S::LANES)) {
        let weights = s.exp(s.sub(s.mul(s.load(scores), scale), top));
        s.store(s.fma(weights, inverse, s.load(acc)), acc);
    }
}

#[inline(always)]
pub(super) fn softmax_in_place<S: Simd>(s: S, values: &mut [f32]) {
    let top = max(s, values);
    if top == f32::NEG_INFINITY {
        values.fill(0.0);
        return;
    }
    let sum = exp_in_place(s, values, top);
    multiply(s, values, 1.0 / sum);
}

/// `values_j ← values_j · factor`.
#[inline(always)]
pub(super) fn multiply<S: Simd>(s: S, values: &mut [f32], factor: f32) {
    let factor = s.splat(factor);
    for values in values.chunks_mut(S::LANES) {
        s.store(s.mul(s.load(values), factor), values);
    }
}

#[inline(always)]
pub(super) fn rms_norm<S: Simd>(s: S, x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) {
    let mean = super::reduce::dot(s, x, x) / x.len() as f32;
    let inverse = s.splat(1.0 / (mean + eps).sqrt());
    for ((out, x), weight) in out.chunks_mut(S::LANES).zip(x.chunks(S::LANES)).zip(weight.chunks(S::LANES)) {
        s.store(s.mul(s.mul(s.load(x), inverse), s.load(weight)), out);
    }
}

#[inline(always)]
pub(super) fn silu_mul<S: Simd>(s: S, gate: &mut [f32], up: &[f32]) {
    let (zero, one) = (s.splat(0.0), s.splat(1.0));
    for (gate, up) in gate.chunks_mut(S::LANES).zip(up.chunks(S::LANES)) {
        let g = s.load(gate);
        let silu = s.div(g, s.add(one, s.exp(s.sub(zero, g))));
        s.store(s.mul(silu, s.load(up)), gate);
    }
}

#[inline(always)]
pub(super) fn rope_halves<S: Simd>(s: S, x: &mut [f32], d: usize, cos: &[f32], sin: &[f32]) {
    for head in x.chunks_exact_mut(d) {
        let (low, high) = head.split_at_mut(d / 2);
        let halves = low.chunks_mut(S::LANES).zip(high.chunks_mut(S::LANES));
        for ((low, high), (cos, sin)) in halves.zip(cos.chunks(S::LANES).zip(sin.chunks(S::LANES))) {
            let (a, b, cos, sin) = (s.load(low), s.load(high), s.load(cos), s.load(sin));
            s.store(s.sub(s.mul(a, cos), s.mul(b, sin)), low);
            s.store(s.add(s.mul(b, cos), s.mul(a, sin)), high);
        }
    }
}

#[inline(always)]
pub(super) fn add<S: Simd>(s: S, acc: &mut [f32], x: &[f32]) {
    for (acc, x) in acc.chunks_mut(S::LANES).zip(x.chunks(S::LANES)) {
        s.store(s.add(s.load(acc), s.load(x)), acc);
    }
}

#[inline(always)]
pub(super) fn axpy<S: Simd>(s: S, acc: &mut [f32], a: f32, x: &[f32]) {
    let a = s.splat(a);
    for (acc, x) in acc.chunks_mut(S::LANES).zip(x.chunks(S::LANES)) {
        s.store(s.fma(a, s.load(x), s.load(acc)), acc);
    }
}

#[inline(always)]
pub(super) fn mix_rows<S: Simd>(s: S, rows: &[f32], stride: usize, factors: &[f32], out: &mut [f32]) {
    let whole = out.len() - out.len() % S::LANES;
    for t in (0..whole).step_by(S::LANES) {
        let mut sum = s.splat(0.0);
        for (h, factor) in factors.iter().enumerate() {
            // SAFETY: each row has as many values as `out`.
            sum =
                s.fma(s.splat(*factor), unsafe { s.load_f32(rows.as_ptr().add(h * stride + t).cast()) }, sum);
        }
        // SAFETY: `out` has a register from t on.
        unsafe { s.store_f32(sum, out.as_mut_ptr().add(t).cast()) };
    }
    if whole < out.len() {
        let (mut sum, left) = (s.splat(0.0), whole..out.len());
        for (h, factor) in factors.iter().enumerate() {
            sum = s.fma(s.splat(*factor), s.load(&rows[h * stride..][left.clone()]), sum);
        }
        s.store(sum, &mut out[whole..]);
    }
}
