//! Attention over digests in codes. Sums are in the order of 16 lanes, so that every path can have the same.

use crate::codes::{CodeLayout, TILE, read_f16, read_f32};
use crate::cpu::codes::CodeSums;

/// Sums that run side by side: what one register of the widest path holds.
const LANES: usize = 16;
/// A weight is a whole number of at most this size: seven bits and a sign, and seven bits more.
const WEIGHT_MAX: f32 = 16256.0;
/// In the place of a score that is no number.
pub(in crate::cpu) const LOWEST: f32 = -3e38;
/// A margin beyond which nothing is known: sums of weights up to its exponential, times that once more, stay within f32.
const MARGIN_MAX: f32 = 36.0;

/// `Σ_j term(j)`: lanes that are 8 apart first, then 4, 2 and 1. `n` is a multiple of [`LANES`].
fn sum_lanes(n: usize, term: impl Fn(usize) -> f32) -> f32 {
    let mut lanes = [0.0_f32; LANES];
    for j in 0..n {
        lanes[j % LANES] += term(j);
    }
    let mut half = LANES / 2;
    while half > 0 {
        for i in 0..half {
            lanes[i] += lanes[i + half];
        }
        half /= 2;
    }
    lanes[0]
}

/// A query as one group's codes see it.
pub(in crate::cpu) struct GroupQuery {
    /// `q·offset`.
    pub(in crate::cpu) base: f32,
    /// What a weight of 1 stands for.
    pub(in crate::cpu) unit: f32,
    /// At least how far a score may be off.
    pub(in crate::cpu) margin: f32,
}

/// At least how far a score of `scale·(base + unit·Σ weight·code)` may be off, from the norms of the query, of the weights before they
/// were rounded, and of the group.
pub(in crate::cpu) fn margin(
    layout: &CodeLayout,
    scale: f32,
    (query_norm, weight_norm, unit): (f32, f32, f32),
    (offset_norm, error): (f32, f32),
) -> f32 {
    let (d, levels) = (layout.padded() as f32, f32::from(layout.bits().levels()));
    // Of the sum with offsets: a product and up to d/16 + 4 sums, each within 2⁻²⁴. Of the codes': the weights' own rounding by half a
    // unit, that of products and of the last sums.
    let lost = f32::EPSILON
        * ((d / 16.0 + 8.0) * query_norm * offset_norm + 4.0 * levels * d.sqrt() * weight_norm)
        + 0.52 * unit * levels * d;
    let margin = (weight_norm * error + lost) * scale * (1.0 + 1e-5);
    if margin < MARGIN_MAX { margin } else { f32::INFINITY }
}

/// Weights of a group's codes: `q·step` in whole numbers.
pub(in crate::cpu) fn group_query(
    layout: &CodeLayout,
    scale: f32,
    (query, query_norm): (&[f32], f32),
    group: &[u8],
    (offset_norm, error): (f32, f32),
    weights: &mut [i16],
) -> GroupQuery {
    let width = layout.padded();
    let (offsets, steps) = (&group[..2 * width], &group[2 * width..4 * width]);
    let of = |j: usize| query.get(j).copied().unwrap_or(0.0);
    let base = sum_lanes(width, |j| of(j) * read_f16(offsets, 2 * j));
    let product = |j: usize| of(j) * read_f16(steps, 2 * j);
    let weight_norm = sum_lanes(width, |j| product(j) * product(j)).sqrt();
    let largest = (0..width).map(|j| product(j).abs()).fold(0.0, f32::max);
    let unit = largest / WEIGHT_MAX;
    let inverse = if unit > 0.0 && unit.is_finite() { 1.0 / unit } else { 0.0 };
    for (j, weight) in weights.iter_mut().enumerate() {
        *weight = (product(j) * inverse).round_ties_even() as i16;
    }
    let unit = if inverse > 0.0 && inverse.is_finite() { unit } else { 0.0 };
    let margin = margin(layout, scale, (query_norm, weight_norm, unit), (offset_norm, error));
    // Without a unit the codes count for nothing: nothing is known, unless they are all alike.
    let margin = if unit > 0.0 || largest == 0.0 { margin } else { f32::INFINITY };
    GroupQuery { base, unit, margin }
}

/// At least a query's norm.
pub(in crate::cpu) fn query_norm(query: &[f32]) -> f32 {
    (query.iter().map(|q| f64::from(*q) * f64::from(*q)).sum::<f64>().sqrt() * (1.0 + 1e-6)) as f32
}

/// A score from a whole sum; never NaN.
pub(in crate::cpu) fn score(query: &GroupQuery, sum: i32, scale: f32) -> f32 {
    let score = (query.base + query.unit * sum as f32) * scale;
    if score >= LOWEST { score } else { LOWEST }
}

#[allow(clippy::too_many_arguments)]
pub(in crate::cpu) fn code_scores(
    layout: &CodeLayout,
    queries: &[f32],
    group: usize,
    scale: f32,
    blocks: &[u8],
    out: &mut [f32],
    out_stride: usize,
    margins: &mut [f32],
    margin_stride: usize,
) {
    let (d, rows, groups) = (layout.head_dim(), layout.rows(), layout.groups());
    let mut weights = vec![0_i16; layout.padded()];
    for (h, query) in queries.chunks_exact(d).enumerate().take(group) {
        let norm = query_norm(query);
        for (page, block) in blocks.chunks_exact(layout.bytes()).enumerate() {
            for g in 0..groups {
                let bytes = &block[g * layout.group_bytes()..][..layout.group_bytes()];
                let of_group =
                    (read_f32(block, layout.norms_at() + 4 * g), read_f32(block, layout.errors_at() + 4 * g));
                let query = group_query(layout, scale, (query, norm), bytes, of_group, &mut weights);
                margins[h * margin_stride + page * groups + g] = query.margin;
                for (t, tile) in bytes[4 * layout.padded()..].chunks_exact(layout.tile_bytes()).enumerate() {
                    let at = h * out_stride + page * rows + g * layout.group() + t * TILE;
                    for (row, out) in out[at..at + TILE].iter_mut().enumerate() {
                        let term = |j: usize| i32::from(weights[j]) * i32::from(layout.code(tile, row, j));
                        *out = score(&query, (0..d).map(term).sum(), scale);
                    }
                }
            }
        }
    }
}

pub(in crate::cpu) fn exp_in_place(scores: &mut [f32], max: f32) -> f32 {
    let mut lanes = [0.0_f32; LANES];
    for (t, score) in scores.iter_mut().enumerate() {
        *score = (*score - max).exp();
        lanes[t % LANES] += *score;
    }
    lanes.iter().sum()
}

pub(in crate::cpu) fn indices_above(values: &[f32], threshold: f32, ids: &mut Vec<u32>) {
    ids.clear();
    let above = values.iter().enumerate().filter(|(_, value)| **value > threshold);
    ids.extend(above.map(|(id, _)| id as u32));
}

#[allow(clippy::too_many_arguments)]
pub(in crate::cpu) fn code_rest(
    layout: &CodeLayout,
    blocks: &[u8],
    group: usize,
    weights: &[f32],
    stride: usize,
    margins: &[f32],
    margin_stride: usize,
    sums: &mut [CodeSums],
    means: &mut [f32],
) {
    let (dv, span, groups) = (layout.value_dim(), layout.span(), layout.groups());
    // Rows that share both a margin and a mean.
    let cell = span.min(layout.group());
    for (page, block) in blocks.chunks_exact(layout.bytes()).enumerate() {
        let unit = read_f32(block, layout.unit_at());
        let spreads = &block[layout.spreads_at()..][..layout.rows()];
        for h in 0..group {
            let weights = &weights[h * stride + page * layout.rows()..][..layout.rows()];
            let (sums, mean) = (&mut sums[h], &mut means[h * dv..][..dv]);
            for (s, weights) in weights.chunks_exact(span).enumerate() {
                let norm = f64::from(read_f32(block, layout.mean_norms_at() + 4 * s));
                let mut whole = 0.0;
                for (c, weights) in weights.chunks_exact(cell).enumerate() {
                    let first = s * span + c * cell;
                    let margin =
                        f64::from(margins[h * margin_stride + page * groups + first / layout.group()]);
                    let weight: f64 = weights.iter().map(|w| f64::from(*w)).sum();
                    if weight == 0.0 {
                        continue;
                    }
                    let apart: f64 = weights
                        .iter()
                        .zip(&spreads[first..])
                        .map(|(w, spread)| f64::from(*w) * f64::from(*spread))
                        .sum();
                    let (up, down) = (margin.exp(), (-margin).exp());
                    sums.weight += weight;
                    sums.upper += weight * up;
                    sums.lower += weight * down;
                    sums.scatter += weight * margin.exp_m1() * norm;
                    sums.spread += up * apart * f64::from(unit);
                    whole += weight;
                }
                if whole > 0.0 {
                    let stored = &block[layout.means_at() + 2 * s * dv..][..2 * dv];
                    for (j, mean) in mean.iter_mut().enumerate() {
                        *mean += whole as f32 * read_f16(stored, 2 * j);
                    }
                }
            }
        }
    }
}
