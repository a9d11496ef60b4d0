//! What is kept of a group of rows: a box and a ball around its keys, both rounded outward.
//!
//! A group is `[2][d]` in the storage type of the rows (the box's lower corner, then its upper one), then two f32: the radius of
//! the ball around the box's centre, and the norm of the box's farthest corner, which is at least that of every key.
//!
//! *Upper bound of a score.* With `c = (lo + hi)/2`: `U = min(q·c + ‖q‖·r, Σ_j max(q_j·lo_j, q_j·hi_j)) + slack`. In real numbers
//! both are bounds (Cauchy and Schwarz; channel by channel). In floating point a sum of `d` products, in any order and with or
//! without fused multiply-add, is off by at most `γ_d·Σ_j |x_j·y_j| ≤ γ_d·‖x‖·‖y‖`, `γ_d = d·u/(1 − d·u)`, `u = 2⁻²⁴`, and by half
//! the smallest denormal for every product that underflows (Higham, Accuracy and Stability, 3.1). The score is off once and the
//! bound once, so `slack = 2·γ·‖q‖·‖corner‖ + 2·d·2⁻¹⁴⁹` covers both; norms and the radius are taken in f64 and rounded up.
//! A sum that overflows tells nothing: it counts as no bound.

use kvoyant_kernels::{Dtype, Kernels};

/// Where a group's numbers lie, and how a bound is made from them.
#[derive(Debug, Clone, Copy)]
pub(super) struct Groups {
    pub(super) head_dim: usize,
    /// Rows of a group.
    pub(super) rows: usize,
    pub(super) dtype: Dtype,
    pub(super) kernels: Kernels,
}

const F32: usize = size_of::<f32>();

impl Groups {
    /// Bytes of one group.
    pub(super) fn bytes(&self) -> usize {
        2 * self.head_dim * self.dtype.bytes() + 2 * F32
    }

    /// Widens the groups of a page by `keys` (`[rows][d]`), which become its rows from `first_row` on.
    pub(super) fn append(&self, keys: &[f32], first_row: usize, digest: &mut [u8], buffer: &mut Vec<f32>) {
        let d = self.head_dim;
        buffer.resize(4 * d, 0.0);
        let (minmax, centres) = buffer.split_at_mut(2 * d);
        let (centre, before) = centres.split_at_mut(d);
        let mut row = first_row;
        let end = row + keys.len() / d;
        let mut rest = keys;
        while row < end {
            let group = row / self.rows;
            let count = ((group + 1) * self.rows).min(end) - row;
            let (keys, later) = rest.split_at(count * d);
            let block = &mut digest[group * self.bytes()..][..self.bytes()];
            let (corners, numbers) = block.split_at_mut(2 * d * self.dtype.bytes());
            let fresh = row.is_multiple_of(self.rows);
            if fresh {
                minmax[..d].fill(f32::INFINITY);
                minmax[d..].fill(f32::NEG_INFINITY);
            } else {
                self.kernels.to_f32(self.dtype, corners, minmax);
                middle(minmax, before);
            }
            self.kernels.min_max_update(keys, d, minmax);
            self.store(minmax, corners);
            middle(minmax, centre);

            // The rows before are not here any more: they are as far from the new centre as from the old one, and as the
            // centre has moved.
            let mut radius = 0.0_f64;
            if !fresh {
                radius = f64::from(read(&numbers[..F32])) + distance(before, centre);
            }
            for key in keys.chunks_exact(d) {
                radius = at_least(radius, distance(key, centre));
            }
            let (lo, hi) = minmax.split_at(d);
            let square = |(lo, hi): (&f32, &f32)| f64::from(lo.abs().max(hi.abs())).powi(2);
            let corner = lo.iter().zip(hi).map(square).sum::<f64>().sqrt();
            numbers[..F32].copy_from_slice(&round_up(radius, d).to_le_bytes());
            numbers[F32..].copy_from_slice(&round_up(corner, d).to_le_bytes());
            row += count;
            rest = later;
        }
    }

    /// Stores a box so that what is stored holds it, and puts into `minmax` what is stored.
    fn store(&self, minmax: &mut [f32], corners: &mut [u8]) {
        let d = self.head_dim;
        self.kernels.from_f32(self.dtype, minmax, corners);
        if self.dtype != Dtype::F32 {
            let mut back = [0.0];
            for (at, (bytes, wanted)) in corners.as_chunks_mut().0.iter_mut().zip(&*minmax).enumerate() {
                self.kernels.to_f32(self.dtype, bytes, &mut back);
                let (lower, upper) = (at < d && back[0] > *wanted, at >= d && back[0] < *wanted);
                if lower || upper {
                    *bytes = neighbour(u16::from_le_bytes(*bytes), upper).to_le_bytes();
                }
            }
        }
        self.kernels.to_f32(self.dtype, corners, minmax);
    }

    /// Upper bounds of the scores of one group's keys, one per query of `queries` (`[g][d]`) with norms `norms`. `buffer` keeps
    /// nothing.
    pub(super) fn bounds(
        &self,
        block: &[u8],
        queries: &[f32],
        norms: &[f64],
        buffer: &mut Vec<f32>,
        out: &mut [f64],
    ) {
        let (d, g) = (self.head_dim, norms.len());
        buffer.resize(3 * d + g, 0.0);
        let (minmax, rest) = buffer.split_at_mut(2 * d);
        let (centre, boxes) = rest.split_at_mut(d);
        let (radius, corner) = self.open(block, minmax, centre);
        self.kernels.page_bounds(queries, g, minmax, boxes);
        let gamma = 2.0 * gamma(d);
        let denormals = 2.0 * d as f64 * f64::from(f32::from_bits(1));
        for (query, ((out, norm), of_box)) in
            queries.chunks_exact(d).zip(out.iter_mut().zip(norms).zip(&*boxes))
        {
            let of_ball = finite(self.kernels.dot(query, centre)) + norm * radius;
            *out = finite(*of_box).min(of_ball) + gamma * norm * corner + denormals;
        }
    }

    /// Scores of one group's centre, one per query.
    pub(super) fn centres(&self, block: &[u8], queries: &[f32], buffer: &mut Vec<f32>, out: &mut [f64]) {
        let d = self.head_dim;
        buffer.resize(3 * d, 0.0);
        let (minmax, centre) = buffer.split_at_mut(2 * d);
        self.open(block, minmax, centre);
        for (query, out) in queries.chunks_exact(d).zip(out) {
            *out = f64::from(self.kernels.dot(query, centre));
        }
    }

    /// Reads a group's box and centre; gives its radius and its corner's norm.
    fn open(&self, block: &[u8], minmax: &mut [f32], centre: &mut [f32]) -> (f64, f64) {
        let (corners, numbers) = block.split_at(2 * self.head_dim * self.dtype.bytes());
        self.kernels.to_f32(self.dtype, corners, minmax);
        middle(minmax, centre);
        (f64::from(read(&numbers[..F32])), f64::from(read(&numbers[F32..])))
    }
}

/// `γ_d`, and a little more for the operations around the sum.
fn gamma(d: usize) -> f64 {
    let unit = (d as f64 + 8.0) * f64::from(f32::EPSILON) / 2.0;
    unit / (1.0 - unit)
}

/// `‖x‖`, rounded up.
pub(super) fn norm(x: &[f32]) -> f64 {
    let norm = x.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>().sqrt();
    norm * (1.0 + (x.len() as f64 + 8.0) * f64::EPSILON)
}

/// The box's centre. Halves are summed, since a sum could overflow.
fn middle(minmax: &[f32], centre: &mut [f32]) {
    let (lo, hi) = minmax.split_at(centre.len());
    centre.iter_mut().zip(lo.iter().zip(hi)).for_each(|(c, (lo, hi))| *c = 0.5 * lo + 0.5 * hi);
}

fn distance(x: &[f32], y: &[f32]) -> f64 {
    x.iter().zip(y).map(|(x, y)| (f64::from(*x) - f64::from(*y)).powi(2)).sum::<f64>().sqrt()
}

/// The larger one; of something that is no number, infinity.
fn at_least(x: f64, y: f64) -> f64 {
    if x.is_nan() || y.is_nan() { f64::INFINITY } else { x.max(y) }
}

/// A length that was summed over `d` channels in f64, as an f32 that is no smaller.
fn round_up(value: f64, d: usize) -> f32 {
    let value = value * (1.0 + (d as f64 + 8.0) * f64::EPSILON);
    let single = value as f32;
    match f64::from(single) {
        back if back.is_nan() => f32::INFINITY,
        back if back < value => single.next_up(),
        _ => single,
    }
}

/// A sum, or infinity where it overflowed on its way.
fn finite(sum: f32) -> f64 {
    if sum.is_finite() { f64::from(sum) } else { f64::INFINITY }
}

/// The next value of a 16-bit float with a sign bit, up or down. Infinities stay.
fn neighbour(bits: u16, up: bool) -> u16 {
    const SIGN: u16 = 0x8000;
    let negative = bits & SIGN != 0;
    match bits & !SIGN {
        0 if up => 1,
        0 => SIGN | 1,
        // Away from zero where the sign points that way, else towards it.
        _ if negative != up => bits + 1,
        _ => bits - 1,
    }
}

fn read(bytes: &[u8]) -> f32 {
    bytes.first_chunk().map_or(f32::INFINITY, |bytes| f32::from_le_bytes(*bytes))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_neighbour_of_a_half_is_the_next_one_in_order() {
        let half = |bits: u16| {
            let mut out = [0.0];
            Kernels::best().to_f32(Dtype::F16, &bits.to_le_bytes(), &mut out);
            out[0]
        };
        for bits in [0, 0x8000, 1, 0x8001, 0x3c00, 0xbc00, 0x7bff, 0xfbff, 0x0400, 0x8400] {
            assert!(half(neighbour(bits, true)) > half(bits), "{bits:#x}");
            assert!(half(neighbour(bits, false)) < half(bits), "{bits:#x}");
        }
    }

    #[test]
    fn what_is_stored_of_a_box_holds_it() {
        for dtype in Dtype::ALL {
            let groups = Groups { head_dim: 4, rows: 8, dtype, kernels: Kernels::best() };
            let wanted = [0.1, -0.3, 1e-9, -1e-30, 0.1, -0.3, 1e-9, 70000.0];
            let (mut stored, mut bytes) = (wanted, vec![0; 8 * dtype.bytes()]);
            groups.store(&mut stored, &mut bytes);
            assert!(stored[..4].iter().zip(&wanted[..4]).all(|(stored, wanted)| stored <= wanted));
            assert!(stored[4..].iter().zip(&wanted[4..]).all(|(stored, wanted)| stored >= wanted));
        }
    }

    #[test]
    fn lengths_are_never_rounded_down() {
        for value in [0.0, 1.0, 1.0 + 1e-9, 1e-46, 3e38, 1e300] {
            assert!(f64::from(round_up(value, 64)) >= value, "{value}");
        }
        assert_eq!(round_up(f64::NAN, 64), f32::INFINITY);
        assert!(norm(&[3.0, 4.0]) >= 5.0 && norm(&[]) == 0.0);
    }
}
