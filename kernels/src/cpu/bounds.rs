//! Quest's bounds (Tang et al., ICML 2024) of many pages in one call, from digests as they are stored or in 8 bits a value.
//!
//! A page's 8-bit digest is cut into blocks of up to 256 channels (filled up with zeros to a multiple of 64); a block of `64·m` channels
//! is `[scale(s)] [minima(64·m)] [maxima(64·m)]`: s scales (f32, little endian), then codes `c + 128` in a byte each. Channel `j` of a
//! block stands in *lane* `j % 64 / 4`; a lane's channels share a scale with those of its neighbours, so that each scale serves 12 or 16
//! channels (s = 4, 8, 16, 16 for m = 1 to 4): an outlier costs its own lanes their precision, no others. The two channels of a rotary
//! pair `(j, j + d/2)`, which are outliers together, share a lane wherever d is a multiple of 128.

use super::score::{check_out, columns};
use super::{Kernels, dispatch};
use crate::dtype::Dtype;

/// Channels of one register of codes.
pub(super) const STRIPE: usize = 64;
/// Sums of products that are kept apart, so that each can have its own scale: four adjacent channels of every stripe.
pub(super) const LANES: usize = 16;
/// Most stripes of a block: sums of a lane stay below 2^24, so that they are whole numbers in f32, too.
const MOST_STRIPES: usize = 4;
/// Most channels of a block.
pub(super) const BLOCK: usize = MOST_STRIPES * STRIPE;
/// Largest magnitude of a code.
const CODE_MAX: f32 = 127.0;
/// What a code is stored with, so that it is no negative number.
const OFFSET: i32 = 128;
/// An f64 near which neighbours are 1 apart.
const NEAREST: f64 = 6_755_399_441_055_744.0;
/// 2⁻¹²⁰, added to every bound: more than all that products below the smallest normal number can have lost.
pub(super) const FLOOR: f32 = f32::from_bits((127 - 120) << 23);

/// Where a block's parts are.
#[derive(Clone, Copy)]
pub(super) struct Block {
    /// Its first byte within a page's digest.
    pub(super) at: usize,
    /// Its first channel, and how many it has.
    pub(super) channel: usize,
    pub(super) channels: usize,
    /// 64 channels each, 1 to 4.
    pub(super) stripes: usize,
}

impl Block {
    /// The blocks of a digest of `d` channels.
    pub(super) fn all(d: usize) -> impl Iterator<Item = Self> {
        let mut at = 0;
        (0..d).step_by(BLOCK).map(move |channel| {
            let channels = (d - channel).min(BLOCK);
            let block = Self { at, channel, channels, stripes: channels.div_ceil(STRIPE) };
            at += block.bytes();
            block
        })
    }

    pub(super) fn scales(self) -> usize {
        (4 * self.stripes.next_power_of_two()).min(LANES)
    }

    /// The lane's scale.
    pub(super) fn scale_of(self, lane: usize) -> usize {
        lane * self.scales() / LANES
    }

    /// Bytes of the scales; the minima follow.
    pub(super) fn head(self) -> usize {
        4 * self.scales()
    }

    pub(super) fn bytes(self) -> usize {
        self.head() + 2 * self.stripes * STRIPE
    }
}

/// The lane of a channel of a block.
pub(super) fn lane(channel: usize) -> usize {
    channel % STRIPE / 4
}

/// A query's part for one block, in whole numbers: see [`Kernels::page_bounds_i8`] for what they are and why.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
pub(super) struct Query8 {
    /// The channels, each a whole number of its lane's steps.
    pub(super) codes: [i8; BLOCK],
    /// All bits where the maximum is to be taken, none where the minimum.
    pub(super) upper: [u8; BLOCK],
    /// What each lane's sum starts from: takes the codes' offset back, and adds the slack.
    pub(super) start: [i32; LANES],
    /// What a lane's codes are multiples of.
    pub(super) step: [f32; LANES],
}

impl Query8 {
    /// Nothing yet.
    pub(super) const EMPTY: Self =
        Self { codes: [0; BLOCK], upper: [0xff; BLOCK], start: [0; LANES], step: [0.0; LANES] };

    /// The part for a block of a query of `d` channels: `query` is the block's own.
    ///
    /// Sums go channel by channel of a stripe, and to lanes at the end, so that a compiler has whole registers to work with.
    #[inline(always)]
    pub(super) fn set(&mut self, query: &[f32], d: usize) {
        *self = Self::EMPTY;
        let mut channels = [0_f32; BLOCK];
        channels[..query.len()].copy_from_slice(query);
        let stripes = &channels.as_chunks::<STRIPE>().0[..query.len().div_ceil(STRIPE)];
        let mut largest = [0_f32; STRIPE];
        for stripe in stripes {
            for (largest, q) in largest.iter_mut().zip(stripe) {
                // A NaN stays: nothing is larger.
                *largest = if q.abs() > *largest || q.is_nan() { q.abs() } else { *largest };
            }
        }
        let mut inverse = [0_f64; STRIPE];
        for (lane, largest) in largest.as_chunks::<4>().0.iter().enumerate() {
            let finite = largest.iter().all(|size| *size <= f32::MAX);
            let largest = largest.iter().copied().fold(0.0, f32::max);
            let step = (largest / CODE_MAX).max(f32::MIN_POSITIVE);
            self.step[lane] = if finite { step } else { f32::NAN };
            inverse[4 * lane..][..4].fill(1.0 / f64::from(self.step[lane]));
        }
        let rounding = f64::from(2.0 * d as f32 + 32.0) * f64::from(f32::EPSILON / 2.0);
        let (mut sums, mut slack) = ([0_i32; STRIPE], [0_f64; STRIPE]);
        for (i, stripe) in stripes.iter().enumerate() {
            let codes = &mut self.codes[i * STRIPE..][..STRIPE];
            let upper = &mut self.upper[i * STRIPE..][..STRIPE];
            for j in 0..STRIPE {
                let steps = f64::from(stripe[j]) * inverse[j];
                // Nearest, ties to even, as every sum is rounded; the whole number is in the last bits, then.
                let near = steps.clamp(-127.0, 127.0) + NEAREST;
                let code = near - NEAREST;
                codes[j] = near.to_bits() as i8;
                upper[j] = if stripe[j] >= 0.0 { 0xff } else { 0 };
                sums[j] += i32::from(codes[j]);
                slack[j] += (steps - code).abs() + steps.abs() * rounding;
            }
        }
        let lanes = sums.as_chunks::<4>().0.iter().zip(slack.as_chunks::<4>().0);
        for (start, (sums, slack)) in self.start.iter_mut().zip(lanes) {
            // Rounded up, and a little more for the roundings of these sums themselves, which are of 2⁻⁵³.
            let slack = (f64::from(CODE_MAX) * slack.iter().sum::<f64>() * (1.0 + 1e-9)) as i32 + 1;
            *start = slack - OFFSET * sums.iter().sum::<i32>();
        }
    }
}

impl Kernels {
    /// [`Kernels::page_bounds`] of many pages: `out[h * out_stride + p]` is query h's bound of page p, to the last bit what
    /// `page_bounds` gives for the page's `[2][d]` as values.
    ///
    /// `queries` is `[group][d]`, `blocks` is `[pages][2][d]` in `dtype` (minima, then maxima) at any alignment, `out` has one bound per
    /// page for each query, one query every `out_stride` values.
    ///
    /// # Panics
    /// When `group` is 0 or does not divide `queries`, `d` is 0, or a slice has the wrong length.
    #[allow(clippy::too_many_arguments)]
    pub fn page_bounds_many(
        self,
        dtype: Dtype,
        queries: &[f32],
        group: usize,
        blocks: &[u8],
        pages: usize,
        out: &mut [f32],
        out_stride: usize,
    ) {
        let d = columns("page_bounds_many", queries, group);
        assert!(d > 0, "page_bounds_many: queries without channels");
        let needed = (2 * d * dtype.bytes()).checked_mul(pages);
        assert_eq!(Some(blocks.len()), needed, "page_bounds_many: blocks are [{pages}][2][{d}] in {dtype}");
        check_out("page_bounds_many", group, pages, out, out_stride);
        if pages > 0 {
            dispatch!(self, page_bounds_many(dtype, queries, group, blocks, pages, out, out_stride));
        }
    }

    /// Bytes of a page's digest in 8 bits a value: 144 for 64 channels, 288 for 128.
    #[must_use]
    pub fn bounds_i8_bytes(d: usize) -> usize {
        Block::all(d).map(Block::bytes).sum()
    }

    /// Stores a page's `[2][d]` minima and maxima in 8 bits a value, minima rounded down and maxima up: what
    /// [`Kernels::decode_bounds_i8`] reads is never a narrower range, in f32 and as real numbers.
    ///
    /// Each scale is the largest magnitude of its channels / 127, rounded up to 16 significant bits, so that every end has a code, and
    /// what [`Kernels::decode_bounds_i8`] read is stored as the same bytes again. Infinite ends are stored as the largest finite ones; a NaN stands for an arbitrary one.
    ///
    /// # Panics
    /// Unless `minmax` is `[2][d]` and `out` has the bytes that [`Kernels::bounds_i8_bytes`] gives for d.
    pub fn encode_bounds_i8(self, minmax: &[f32], out: &mut [u8]) {
        let d = minmax.len() / 2;
        assert_eq!(minmax.len(), 2 * d, "encode_bounds_i8: minmax is [2][d]");
        assert_eq!(out.len(), Self::bounds_i8_bytes(d), "encode_bounds_i8: bytes of {d} channels");
        let (min, max) = minmax.split_at(d);
        for block in Block::all(d) {
            let to = &mut out[block.at..][..block.bytes()];
            encode(block, &min[block.channel..], &max[block.channel..], to);
        }
    }

    /// Reads what [`Kernels::encode_bounds_i8`] stored: `[2][d]`, minima, then maxima.
    ///
    /// # Panics
    /// Unless `minmax` is `[2][d]` and `digest` has the bytes that [`Kernels::bounds_i8_bytes`] gives for d.
    pub fn decode_bounds_i8(self, digest: &[u8], minmax: &mut [f32]) {
        let d = minmax.len() / 2;
        assert_eq!(minmax.len(), 2 * d, "decode_bounds_i8: minmax is [2][d]");
        assert_eq!(digest.len(), Self::bounds_i8_bytes(d), "decode_bounds_i8: bytes of {d} channels");
        let (min, max) = minmax.split_at_mut(d);
        for block in Block::all(d) {
            let (head, codes) = digest[block.at..][..block.bytes()].split_at(block.head());
            let (low, high) = codes.split_at(block.stripes * STRIPE);
            for j in 0..block.channels {
                let scale = read_scale(head, block.scale_of(lane(j)));
                min[block.channel + j] = (i32::from(low[j]) - OFFSET) as f32 * scale;
                max[block.channel + j] = (i32::from(high[j]) - OFFSET) as f32 * scale;
            }
        }
    }

    /// Quest's upper bounds from digests in 8 bits: `out[h * out_stride + p] ≥ Σ_j max(q_j·min_j, q_j·max_j)` of page p.
    ///
    /// `queries` is `[group][d]`, `blocks` holds the digests of `pages` pages one after the other, at any alignment, `out` has one bound
    /// per page for each query, one query every `out_stride` values. The same on every path.
    ///
    /// A bound is never below the one that [`Kernels::page_bounds`] gives for the minima and maxima that were encoded, on any path, nor
    /// below the f32 dot product of the query with a key between them, in any order; for finite values, as long as no product overflows.
    /// It is some hundredths of `Σ_j |q_j|·max(|min_j|, |max_j|)` above it at most. A query that is not finite gets NaN, or rubbish.
    ///
    /// *Proof.* Within a lane of a block the query is `q_j = σ·(c_j + e_j)`, c_j a whole number, |c_j| ≤ 127, and the end taken (the
    /// maximum where q_j ≥ 0, else the minimum) is stored as `s·b_j`, |b_j| ≤ 127, on the far side of the exact one. So
    /// `Σ q_j·end_j ≤ s·σ·(Σ c_j·b_j + 127·Σ |e_j|)`. To the bracket, a whole number once its second term is rounded up, comes
    /// `127·ρ·Σ |q_j|/σ`, ρ = (2d + 32)·2⁻²⁴; all lanes together that adds at least `ρ·M`, `M = Σ_j |q_j|·127·s ≥ Σ_j |q_j·end_j|`.
    /// In f32 the bracket is exact (below 2²⁴). What follows rounds at most 9 + d/256 times: two products, four sums over lanes, one over
    /// blocks, one for the floor; the terms are at most 1.15·M in all, so that this loses less than `(11 + d/128)·2⁻²⁴·M`. The f32 bound
    /// or dot that we compare with is at most `(d + 2)·2⁻²⁴·M` above its exact value, whatever its order. Together that is less than
    /// `ρ·M`. Underflow loses less than 2⁻¹²⁷ per block of lanes, and d·2⁻¹⁴⁹ on the other side: less than the floor of 2⁻¹²⁰ added.
    ///
    /// # Panics
    /// When `group` is 0 or does not divide `queries`, `d` is 0, or a slice has the wrong length.
    pub fn page_bounds_i8(
        self,
        queries: &[f32],
        group: usize,
        blocks: &[u8],
        pages: usize,
        out: &mut [f32],
        out_stride: usize,
    ) {
        let d = columns("page_bounds_i8", queries, group);
        assert!(d > 0, "page_bounds_i8: queries without channels");
        let needed = Self::bounds_i8_bytes(d).checked_mul(pages);
        assert_eq!(Some(blocks.len()), needed, "page_bounds_i8: digests of {pages} pages of {d} channels");
        check_out("page_bounds_i8", group, pages, out, out_stride);
        if pages == 0 {
            return;
        }
        /// Queries that are served at once: 5 KiB of stack.
        const MOST: usize = 8;
        let mut prepared = [Query8::EMPTY; MOST];
        for (part, queries) in queries.chunks(MOST * d).enumerate() {
            let out = &mut out[part * MOST * out_stride..];
            for block in Block::all(d) {
                let heads = queries.len() / d;
                for (query, prepared) in queries.chunks_exact(d).zip(&mut prepared) {
                    let query = &query[block.channel..][..block.channels];
                    dispatch!(self, prepare_bounds_i8(query, d, prepared));
                }
                dispatch!(self, page_bounds_i8(block, &prepared[..heads], blocks, pages, out, out_stride));
            }
        }
    }
}

/// A scale of a block.
pub(super) fn read_scale(head: &[u8], index: usize) -> f32 {
    f32::from_le_bytes([head[4 * index], head[4 * index + 1], head[4 * index + 2], head[4 * index + 3]])
}

/// A block's digest, from the minima and maxima from its first channel on.
fn encode(block: Block, min: &[f32], max: &[f32], to: &mut [u8]) {
    let (head, codes) = to.split_at_mut(block.head());
    let (low, high) = codes.split_at_mut(block.stripes * STRIPE);
    let finite = |value: f32| value.clamp(f32::MIN, f32::MAX);
    let mut largest = [0_f32; LANES];
    for j in 0..block.channels {
        let top = &mut largest[block.scale_of(lane(j))];
        *top = top.max(finite(min[j]).abs()).max(finite(max[j]).abs());
    }
    let mut scales = [0_f32; LANES];
    for (scale, largest) in scales.iter_mut().zip(largest) {
        *scale = largest / CODE_MAX;
        if f64::from(*scale) * f64::from(CODE_MAX) < f64::from(largest) {
            *scale = scale.next_up();
        }
        // With 16 significant bits its products with codes are exact in f32: what was read and is stored again keeps its codes,
        // and a page that grows row by row does not grow wider by the roundings.
        *scale = f32::from_bits((scale.to_bits() + 0xff) & !0xff);
    }
    for (stored, scale) in head.chunks_exact_mut(4).zip(scales) {
        stored.copy_from_slice(&scale.to_le_bytes());
    }
    low.fill(OFFSET as u8);
    high.fill(OFFSET as u8);
    for j in 0..block.channels {
        let scale = f64::from(scales[block.scale_of(lane(j))]);
        // Products of a code and a scale are exact in f64, so that one step sets a quotient right that was rounded.
        let up = |value: f64| {
            let code = if scale > 0.0 { (value / scale).ceil().clamp(-127.0, 127.0) } else { 0.0 };
            if code * scale < value { code + 1.0 } else { code }
        };
        low[j] = (OFFSET - up(-f64::from(finite(min[j]))) as i32) as u8;
        high[j] = (OFFSET + up(f64::from(finite(max[j]))) as i32) as u8;
    }
}
