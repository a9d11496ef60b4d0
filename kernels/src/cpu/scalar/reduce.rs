//! Many values to one.

/// Partial sums that run side by side, so that a compiler may use vector registers without changing the result.
const LANES: usize = 8;

/// Sums `LANES` partial sums as a tree.
fn sum_lanes(lanes: [f32; LANES]) -> f32 {
    let [a, b, c, d, e, f, g, h] = lanes;
    ((a + e) + (c + g)) + ((b + f) + (d + h))
}

/// `sum_j value(j)`, in an order that depends on `n` alone.
#[inline]
pub(super) fn sum_by(n: usize, value: impl Fn(usize) -> f32) -> f32 {
    let mut lanes = [0.0; LANES];
    let whole = n - n % LANES;
    for j in (0..whole).step_by(LANES) {
        for (lane, sum) in lanes.iter_mut().enumerate() {
            *sum += value(j + lane);
        }
    }
    for (lane, j) in (whole..n).enumerate() {
        lanes[lane] += value(j);
    }
    sum_lanes(lanes)
}

pub(in crate::cpu) fn dot(a: &[f32], b: &[f32]) -> f32 {
    sum_by(a.len(), |j| a[j] * b[j])
}

pub(in crate::cpu) fn max(values: &[f32]) -> f32 {
    values.iter().fold(f32::NEG_INFINITY, |max, value| max.max(*value))
}

pub(in crate::cpu) fn count_above(values: &[f32], threshold: f32) -> usize {
    values.iter().filter(|value| **value > threshold).count()
}

pub(in crate::cpu) fn exp_sum(values: &[f32], max: f32) -> f32 {
    sum_by(values.len(), |j| (values[j] - max).exp())
}
