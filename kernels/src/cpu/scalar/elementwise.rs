//! Value by value, and the normalisations.

use super::reduce::{exp_sum, max, sum_by};

pub(in crate::cpu) fn softmax_add(scores: &[f32], scale: f32, acc: &mut [f32]) {
    let top = max(scores) * scale;
    if top == f32::NEG_INFINITY {
        return;
    }
    let inverse = 1.0 / sum_by(scores.len(), |j| (scores[j] * scale - top).exp());
    for (sum, score) in acc.iter_mut().zip(scores) {
        *sum += (score * scale - top).exp() * inverse;
    }
}

pub(in crate::cpu) fn softmax_in_place(values: &mut [f32]) {
    let top = max(values);
    if top == f32::NEG_INFINITY {
        values.fill(0.0);
        return;
    }
    let inverse = 1.0 / exp_sum(values, top);
    for value in values {
        *value = (*value - top).exp() * inverse;
    }
}

pub(in crate::cpu) fn rms_norm(x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) {
    let mean = sum_by(x.len(), |j| x[j] * x[j]) / x.len() as f32;
    let inverse = 1.0 / (mean + eps).sqrt();
    for ((out, x), weight) in out.iter_mut().zip(x).zip(weight) {
        *out = x * inverse * weight;
    }
}

pub(in crate::cpu) fn silu_mul(gate: &mut [f32], up: &[f32]) {
    for (gate, up) in gate.iter_mut().zip(up) {
        *gate = *gate / (1.0 + (-*gate).exp()) * up;
    }
}

pub(in crate::cpu) fn rope_halves(x: &mut [f32], d: usize, cos: &[f32], sin: &[f32]) {
    for head in x.chunks_exact_mut(d) {
        let (low, high) = head.split_at_mut(d / 2);
        for j in 0..d / 2 {
            let (a, b) = (low[j], high[j]);
            low[j] = a * cos[j] - b * sin[j];
            high[j] = b * cos[j] + a * sin[j];
        }
    }
}

pub(in crate::cpu) fn add(acc: &mut [f32], x: &[f32]) {
    for (sum, x) in acc.iter_mut().zip(x) {
        *sum += x;
    }
}

pub(in crate::cpu) fn axpy(acc: &mut [f32], a: f32, x: &[f32]) {
    for (sum, x) in acc.iter_mut().zip(x) {
        *sum += a * x;
    }
}

pub(in crate::cpu) fn mix_rows(rows: &[f32], stride: usize, factors: &[f32], out: &mut [f32]) {
    for (t, out) in out.iter_mut().enumerate() {
        // Rounded once, as where shares are found and compared in one pass.
        *out = factors
            .iter()
            .enumerate()
            .fold(0.0, |sum, (h, factor)| factor.mul_add(rows[h * stride + t], sum));
    }
}
