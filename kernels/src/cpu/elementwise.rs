//! Value by value, and the normalisations.

use super::score::check_out;
use super::{Kernels, dispatch};

impl Kernels {
    /// `acc_t += softmax(scale · scores)_t`. `scale` is positive and finite. `-inf` scores add 0, also if all are; empty is fine.
    ///
    /// # Panics
    /// When the lengths differ.
    pub fn softmax_add(self, scores: &[f32], scale: f32, acc: &mut [f32]) {
        assert_eq!(scores.len(), acc.len(), "softmax_add: two vectors of one length");
        debug_assert!(scale > 0.0 && scale.is_finite(), "softmax_add: a scale of {scale}");
        dispatch!(self, softmax_add(scores, scale, acc));
    }

    /// `values ← softmax(values)`; all 0 if all are `-inf`.
    pub fn softmax_in_place(self, values: &mut [f32]) {
        dispatch!(self, softmax_in_place(values));
    }

    /// `out_j = x_j · weight_j / √(mean(x²) + eps)` (Zhang & Sennrich, 2019).
    ///
    /// # Panics
    /// When the lengths differ.
    pub fn rms_norm(self, x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) {
        assert!(x.len() == weight.len() && x.len() == out.len(), "rms_norm: three vectors of one length");
        if !x.is_empty() {
            dispatch!(self, rms_norm(x, weight, eps, out));
        }
    }

    /// `gate_j ← gate_j · sigmoid(gate_j) · up_j`, the gated unit of Llama's MLP.
    ///
    /// # Panics
    /// When the lengths differ.
    pub fn silu_mul(self, gate: &mut [f32], up: &[f32]) {
        assert_eq!(gate.len(), up.len(), "silu_mul: two vectors of one length");
        dispatch!(self, silu_mul(gate, up));
    }

    /// Rotary embedding as in Hugging Face's Llama, in place: within each head of `x` (`[heads][d]`) the pair `(j, j + d/2)` turns by
    /// the angle whose cosine and sine are `cos[j]` and `sin[j]` (each `[d/2]`).
    ///
    /// # Panics
    /// When `d` is 0, odd or does not divide `x`, or `cos` and `sin` are not `[d/2]`.
    pub fn rope_halves(self, x: &mut [f32], d: usize, cos: &[f32], sin: &[f32]) {
        assert!(
            d > 0 && d.is_multiple_of(2) && x.len().is_multiple_of(d),
            "rope_halves: {} values in heads of {d}",
            x.len()
        );
        assert!(cos.len() == d / 2 && sin.len() == d / 2, "rope_halves: cos and sin are [{}]", d / 2);
        dispatch!(self, rope_halves(x, d, cos, sin));
    }

    /// `acc_j += x_j`.
    ///
    /// # Panics
    /// When the lengths differ.
    pub fn add(self, acc: &mut [f32], x: &[f32]) {
        assert_eq!(acc.len(), x.len(), "add: two vectors of one length");
        dispatch!(self, add(acc, x));
    }

    /// `acc_j += a · x_j`.
    ///
    /// # Panics
    /// When the lengths differ.
    pub fn axpy(self, acc: &mut [f32], a: f32, x: &[f32]) {
        assert_eq!(acc.len(), x.len(), "axpy: two vectors of one length");
        dispatch!(self, axpy(acc, a, x));
    }

    /// `out_t = Σ_h factors_h · rows[h·stride + t]`.
    ///
    /// # Panics
    /// When there are no factors, or `rows` is too short for as many rows as there are factors.
    pub fn mix_rows(self, rows: &[f32], stride: usize, factors: &[f32], out: &mut [f32]) {
        assert!(!factors.is_empty(), "mix_rows: no rows");
        check_out("mix_rows", factors.len(), out.len(), rows, stride);
        dispatch!(self, mix_rows(rows, stride, factors, out));
    }
}
