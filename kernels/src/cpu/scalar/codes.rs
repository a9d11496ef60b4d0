//! Attention over digests in codes. Sums are in the order of 16 lanes, so that every path can have the same.

use crate::codes::{CodeLayout, ROWS_MAX, TILE, read_f16, read_f32};
use crate::cpu::codes::{CodeOut, CodeScan, CodeSums, CodeTaken, CodeTotal, CodeWeighing, CodeWeights};

/// Sums that run side by side: what one register of the widest path holds.
const LANES: usize = 16;
/// A weight is a whole number of at most this size: seven bits and a sign, and seven bits more.
pub(in crate::cpu) const WEIGHT_MAX: f32 = 16256.0;
/// How far above what weights are relative to a score may be: weights and what they are multiplied by stay far from the largest f32.
pub(in crate::cpu) const ROOM_ABOVE: f32 = 20.0;
/// Below this, products are not worth weights.
pub(in crate::cpu) const PRODUCT_MIN: f32 = 1e-30;
/// Added to squares before the root is drawn: more than what squares and products too small for f32 can have lost.
pub(in crate::cpu) const SQUARES_MIN: f32 = f32::MIN_POSITIVE;
/// How far the weights' rounding, and that of the products which they stand for, takes one off, in units.
pub(in crate::cpu) const WEIGHT_OFF: f32 = 0.52;
/// No `q·offset·scale` is beyond this on either side, and one that is no number is the lowest.
pub(in crate::cpu) const BASE_MAX: f32 = 1.5e38;
/// No unit of scores is above this, so that no score is infinite.
pub(in crate::cpu) const UNIT_MAX: f32 = 1e28;
/// A margin beyond which nothing is known: weights up to its exponential, times that once more, stay within f32.
pub(in crate::cpu) const MARGIN_MAX: f32 = 36.0;

/// `Σ_j a_j·b_j` in 16 lanes, every product and sum rounded together: within each four lanes, those that are 2 apart first, then the
/// neighbours; then what is 8 lanes apart, then 4. `n` is a multiple of [`LANES`].
#[inline(always)]
fn dot_lanes(n: usize, a: impl Fn(usize) -> f32, b: impl Fn(usize) -> f32) -> f32 {
    let mut lanes = [0.0_f32; LANES];
    for first in (0..n).step_by(LANES) {
        for (lane, sum) in lanes.iter_mut().enumerate() {
            *sum = a(first + lane).mul_add(b(first + lane), *sum);
        }
    }
    let four = |i: usize| (lanes[4 * i] + lanes[4 * i + 2]) + (lanes[4 * i + 1] + lanes[4 * i + 3]);
    (four(0) + four(2)) + (four(1) + four(3))
}

/// At least a query's norm; too small for f32, it is a little more.
#[inline(always)]
pub(in crate::cpu) fn query_norm(query: &[f32]) -> f32 {
    let of = |j: usize| query.get(j).copied().unwrap_or(0.0);
    (dot_lanes(query.len().next_multiple_of(LANES), of, of) + SQUARES_MIN).sqrt() * (1.0 + 1e-5)
}

/// What the margins of all groups are made of.
///
/// With `p_j = q_j·step_j` a score is `scale·(Σ q_j·offset_j + unit·Σ w_j·code_j)`, `|w_j − p_j/unit| ≤ 0.52`. It is off by
/// `scale·‖p‖·‖(k − k̂)/step‖`, by what the sums over channels have lost, and by `0.52·unit·Σ code_j`.
#[derive(Clone, Copy)]
pub(in crate::cpu) struct Margins {
    /// Times both norms: what the sum with the offsets loses. Up to `D/16 + 4` sums, each within 2⁻²⁴; and the score's own.
    pub(in crate::cpu) base: f32,
    /// Times the norm of `p`: what products and the whole sum lose when they become f32.
    pub(in crate::cpu) codes: f32,
    /// The largest sum of codes.
    pub(in crate::cpu) most: f32,
    /// The scores' scale.
    pub(in crate::cpu) score_scale: f32,
    /// The same, and a little more for the roundings of margins themselves.
    pub(in crate::cpu) scale: f32,
}

impl Margins {
    pub(in crate::cpu) fn new(layout: &CodeLayout, scale: f32) -> Self {
        let (d, levels) = (layout.padded() as f32, f32::from(layout.bits().levels()));
        Self {
            base: f32::EPSILON * (d / 16.0 + 8.0),
            codes: f32::EPSILON * 4.0 * levels * d.sqrt(),
            most: levels * d,
            score_scale: scale,
            scale: scale * (1.0 + 1e-5),
        }
    }
}

/// A query as one group's codes see it.
pub(in crate::cpu) struct GroupQuery {
    /// `scale·q·offset`.
    pub(in crate::cpu) base: f32,
    /// What a weight of 1 adds to a score; 0 where there are no weights.
    pub(in crate::cpu) unit: f32,
    /// At least how far a score may be off.
    pub(in crate::cpu) margin: f32,
}

/// Weights of a group's codes: `q·step` in whole numbers. `query` is the query and [its norm](query_norm), `of_group` what the block
/// says of the group: its offsets' norm and its error.
pub(in crate::cpu) fn group_query(
    layout: &CodeLayout,
    margins: &Margins,
    (query, query_norm): (&[f32], f32),
    group: &[u8],
    (offset_norm, error): (f32, f32),
    weights: &mut [i16],
) -> GroupQuery {
    let width = layout.padded();
    let (offsets, steps) = (&group[..2 * width], &group[2 * width..4 * width]);
    let of = |j: usize| query.get(j).copied().unwrap_or(0.0);
    let base = dot_lanes(width, of, |j| read_f16(offsets, 2 * j)) * margins.score_scale;
    let base = if base >= -BASE_MAX { base.min(BASE_MAX) } else { -BASE_MAX };
    let product = |j: usize| of(j) * read_f16(steps, 2 * j);
    let norm = (dot_lanes(width, product, product) + SQUARES_MIN).sqrt();
    let largest = (0..width).map(|j| product(j).abs()).fold(0.0, f32::max);
    let (unit, inverse, off) = if (PRODUCT_MIN..=f32::MAX).contains(&largest) {
        let unit = largest * (1.0 / WEIGHT_MAX);
        (unit, WEIGHT_MAX / largest, unit * WEIGHT_OFF)
    } else {
        // Codes count for nothing, and each product may be missed whole.
        (0.0, 0.0, largest)
    };
    for (j, weight) in weights.iter_mut().enumerate() {
        let steps = product(j) * inverse;
        // What is no number becomes the least weight, as it does in registers.
        *weight = if steps.is_nan() { -(1 << 14) } else { steps.round_ties_even() as i16 };
    }
    let margin =
        (norm * (error + margins.codes) + query_norm * margins.base * offset_norm + off * margins.most)
            * margins.scale;
    // Not where it is NaN, either.
    let margin = if margin < MARGIN_MAX { margin } else { f32::INFINITY };
    GroupQuery { base, unit: (unit * margins.score_scale).min(UNIT_MAX), margin }
}

pub(in crate::cpu) fn code_scores(scan: &CodeScan<'_>, out: &mut CodeOut<'_>) {
    let CodeScan { layout, queries, group, scale, blocks } = *scan;
    let (d, rows, groups) = (layout.head_dim(), layout.rows(), layout.groups());
    let mut weights = vec![0_i16; layout.padded()];
    let terms = Margins::new(layout, scale);
    for (h, query) in queries.chunks_exact(d).enumerate().take(group) {
        let norm = query_norm(query);
        for (page, block) in blocks.chunks_exact(layout.bytes()).enumerate() {
            for g in 0..groups {
                let bytes = &block[g * layout.group_bytes()..][..layout.group_bytes()];
                let of_group =
                    (read_f32(block, layout.norms_at() + 4 * g), read_f32(block, layout.errors_at() + 4 * g));
                let query = group_query(layout, &terms, (query, norm), bytes, of_group, &mut weights);
                out.margins[h * out.margin_stride + page * groups + g] = query.margin;
                for (t, tile) in bytes[4 * layout.padded()..].chunks_exact(layout.tile_bytes()).enumerate() {
                    let at = h * out.stride + page * rows + g * layout.group() + t * TILE;
                    for (row, out) in out.rows[at..at + TILE].iter_mut().enumerate() {
                        let term = |j: usize| i32::from(weights[j]) * i32::from(layout.code(tile, row, j));
                        let sum: i32 = (0..d).map(term).sum();
                        *out = query.unit.mul_add(sum as f32, query.base);
                    }
                }
            }
        }
    }
}

pub(in crate::cpu) fn code_weights(
    scan: &CodeScan<'_>,
    weighing: &mut CodeWeighing<'_>,
    out: &mut CodeOut<'_>,
) {
    let CodeScan { layout, blocks, .. } = *scan;
    let CodeWeighing { before, rows, totals } = weighing;
    let (before, each) = (*before, layout.rows());
    let mut of_pages = CodeOut {
        rows: &mut out.rows[before * each..],
        margins: &mut out.margins[before * layout.groups()..],
        ..*out
    };
    code_scores(scan, &mut of_pages);
    let (weights, stride) = (&mut *out.rows, out.stride);
    for (h, total) in totals.iter_mut().enumerate() {
        for page in before..before + blocks.len() / layout.bytes() {
            let (done, scores) = weights[h * stride..][..(page + 1) * each].split_at_mut(page * each);
            for (t, score) in scores.iter_mut().enumerate() {
                *score = if rows.contains(&(page * each + t)) { *score } else { f32::NEG_INFINITY };
            }
            let top = scores.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            if top > total.reference + ROOM_ABOVE {
                let factor = (total.reference - top).exp();
                done.iter_mut().for_each(|weight| *weight *= factor);
                *total = CodeTotal { reference: top, sum: total.sum * f64::from(factor) };
            }
            for score in scores.iter_mut() {
                let known = *score > f32::NEG_INFINITY;
                *score = if known { (*score - total.reference).exp() } else { 0.0 };
            }
            total.sum += scores.iter().map(|weight| f64::from(*weight)).sum::<f64>();
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

pub(in crate::cpu) fn code_rest(
    layout: &CodeLayout,
    blocks: &[u8],
    of: &CodeWeights<'_>,
    sums: &mut [CodeSums],
    means: &mut [f32],
) {
    rest(layout, blocks, of, sums, means, |_, _| {});
}

pub(in crate::cpu) fn code_rest_below(
    layout: &CodeLayout,
    blocks: &[u8],
    of: &CodeWeights<'_>,
    taken: &mut CodeTaken<'_>,
    sums: &mut [CodeSums],
    means: &mut [f32],
) {
    let CodeTaken { factors, threshold, first, ids } = taken;
    let (rows, threshold) = (layout.rows(), *threshold);
    rest(layout, blocks, of, sums, means, |page, left| {
        for (t, left) in left.iter_mut().enumerate() {
            let weights = |h: usize| of.rows[h * of.stride + page * rows + t];
            let shares = factors.iter().enumerate();
            let share = shares.fold(0.0_f32, |share, (h, factor)| factor.mul_add(weights(h), share));
            let above = share > threshold;
            if above {
                ids.push(*first + (page * rows + t) as u32);
            }
            *left = !above;
        }
    });
}

/// Sums over the rows of each page that `choose` leaves there.
fn rest(
    layout: &CodeLayout,
    blocks: &[u8],
    of: &CodeWeights<'_>,
    sums: &mut [CodeSums],
    means: &mut [f32],
    mut choose: impl FnMut(usize, &mut [bool]),
) {
    let CodeWeights { rows: weights, stride, margins, margin_stride } = *of;
    let group = sums.len();
    let (dv, span, groups) = (layout.value_dim(), layout.span(), layout.groups());
    // Rows that share both a margin and a mean.
    let cell = span.min(layout.group());
    let mut left = [true; ROWS_MAX];
    let left = &mut left[..layout.rows()];
    for (page, block) in blocks.chunks_exact(layout.bytes()).enumerate() {
        choose(page, left);
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
                    let rows = weights.iter().zip(&spreads[first..]).zip(&left[first..]);
                    let rows = rows.filter(|(_, left)| **left).map(|(row, _)| row);
                    let (mut weight, mut apart) = (0.0, 0.0);
                    for (w, spread) in rows {
                        weight += f64::from(*w);
                        apart += f64::from(*w) * f64::from(*spread);
                    }
                    if weight == 0.0 {
                        continue;
                    }
                    let (up, down) = (margin.exp(), (-margin).exp());
                    sums.weight += weight;
                    sums.upper += weight * up;
                    sums.lower += weight * down;
                    // What is not there is not more for a margin that is not known.
                    if norm > 0.0 {
                        sums.scatter += weight * margin.exp_m1() * norm;
                    }
                    if apart > 0.0 {
                        sums.spread += up * apart * f64::from(unit);
                    }
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
