//! Keys of a whole page in codes of 4 or 6 bits, with what is needed to estimate attention over the page without its rows, and to bound
//! how far the estimate is off.
//!
//! A page is cut into *groups* of rows. In a group a key is `k̂_j = offset_j + step_j · code_j`, offset and step being the channel's own,
//! in f16. The offset is rounded down and the step up, so that no key lies outside and no code is off by more than half a step, however
//! large the offset and however small the range. Values are kept as means over *spans* of up to 32 rows, with the distance of each row's
//! value from its mean.
//!
//! | part of a block | bytes | |
//! |---|---|---|
//! | for each group: offsets | `2·D` | f16 `[D]`, `D` being `d` up to a multiple of 16; what is filled up is 0 |
//! | steps | `2·D` | f16 `[D]` |
//! | for each tile of 16 rows: low codes | `8·D` | byte `64·i + 4·row + j`: channels `8i + j` in the low half, `8i + 4 + j` in the high |
//! | high codes (6 bits) | `4·D` | byte `64·i + 4·row + j`: two bits each of channels `16i + j`, `16i + 4 + j`, `16i + 8 + j`, `16i + 12 + j` |
//! | offset norms | `4·groups` | f32, at least `‖offset‖` |
//! | errors | `4·groups` | f32, at least `‖(k − k̂)/step‖` of every row; `+∞` where that is not known |
//! | mean norms | `4·spans` | f32, at least `‖v̄‖` |
//! | spread unit | 4 | f32; `+∞` where spreads are not known |
//! | spreads | `rows` | a byte each: `‖v − v̄‖` is at most this times the unit |
//! | means | `2·spans·dv` | f16 `[spans][dv]` |
//!
//! then up to a multiple of 64 bytes. All numbers are little endian.

use half::f16;

/// Rows that codes stand side by side for.
pub(crate) const TILE: usize = 16;
/// Most rows of a span.
const SPAN: usize = 32;
/// Values that a key may have at most: sums of codes and weights stay whole numbers of 31 bits.
pub(crate) const DIM_MAX: usize = 1024;
/// Rows that a page may have at most.
pub(crate) const ROWS_MAX: usize = 1 << 12;

/// Bits of a code.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum CodeBits {
    /// 16 levels.
    Four,
    /// 64 levels.
    Six,
}

impl CodeBits {
    /// The largest code.
    #[must_use]
    pub const fn levels(self) -> u8 {
        match self {
            Self::Four => 15,
            Self::Six => 63,
        }
    }
}

/// The shape of pages and how they are digested.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct CodeLayout {
    d: usize,
    value_dim: usize,
    rows: usize,
    bits: CodeBits,
    group: usize,
}

/// A shape that there are no codes for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "there are no digests of pages of {rows} rows in groups of {group} with keys of {d} values: rows and group are multiples of 16, \
     the group divides the rows, rows above 32 are a multiple of 32 (at most {ROWS_MAX}), and keys and values have 1 to {DIM_MAX} numbers each"
)]
pub struct NoCodes {
    /// Rows of a page.
    pub rows: usize,
    /// Rows of a group.
    pub group: usize,
    /// Values of a key.
    pub d: usize,
}

impl CodeLayout {
    /// Digests of pages of `rows` rows, keys `[d]` and values `[value_dim]`, whose channels share an offset and a step over `group` rows.
    ///
    /// # Errors
    /// Where there is no such digest.
    pub fn new(
        d: usize,
        value_dim: usize,
        rows: usize,
        bits: CodeBits,
        group: usize,
    ) -> Result<Self, NoCodes> {
        let span = rows.min(SPAN);
        let fits = (1..=DIM_MAX).contains(&d)
            && (1..=DIM_MAX).contains(&value_dim)
            && (TILE..=ROWS_MAX).contains(&rows)
            && group >= TILE
            && group.is_multiple_of(TILE)
            && rows.is_multiple_of(group)
            && rows.is_multiple_of(span)
            && (group.is_multiple_of(span) || span.is_multiple_of(group));
        if fits { Ok(Self { d, value_dim, rows, bits, group }) } else { Err(NoCodes { rows, group, d }) }
    }

    /// Values of a key.
    #[must_use]
    pub const fn head_dim(&self) -> usize {
        self.d
    }

    /// Values of a value.
    #[must_use]
    pub const fn value_dim(&self) -> usize {
        self.value_dim
    }

    /// Rows of a page.
    #[must_use]
    pub const fn rows(&self) -> usize {
        self.rows
    }

    /// Bits of a code.
    #[must_use]
    pub const fn bits(&self) -> CodeBits {
        self.bits
    }

    /// Rows that share an offset and a step.
    #[must_use]
    pub const fn group(&self) -> usize {
        self.group
    }

    /// Groups of a page: so many margins has each query there.
    #[must_use]
    pub const fn groups(&self) -> usize {
        self.rows / self.group
    }

    /// Rows that share a mean value.
    #[must_use]
    pub const fn span(&self) -> usize {
        if self.rows < SPAN { self.rows } else { SPAN }
    }

    /// Spans of a page.
    #[must_use]
    pub const fn spans(&self) -> usize {
        self.rows / self.span()
    }

    /// Bytes of a page's block.
    #[must_use]
    pub const fn bytes(&self) -> usize {
        (self.means_at() + 2 * self.spans() * self.value_dim).next_multiple_of(64)
    }

    /// `D`.
    pub(crate) const fn padded(&self) -> usize {
        self.d.next_multiple_of(16)
    }

    /// Bytes of a tile's codes.
    pub(crate) const fn tile_bytes(&self) -> usize {
        match self.bits {
            CodeBits::Four => 8 * self.padded(),
            CodeBits::Six => 12 * self.padded(),
        }
    }

    pub(crate) const fn group_bytes(&self) -> usize {
        4 * self.padded() + self.group / TILE * self.tile_bytes()
    }

    pub(crate) const fn norms_at(&self) -> usize {
        self.groups() * self.group_bytes()
    }

    pub(crate) const fn errors_at(&self) -> usize {
        self.norms_at() + 4 * self.groups()
    }

    pub(crate) const fn mean_norms_at(&self) -> usize {
        self.errors_at() + 4 * self.groups()
    }

    pub(crate) const fn unit_at(&self) -> usize {
        self.mean_norms_at() + 4 * self.spans()
    }

    pub(crate) const fn spreads_at(&self) -> usize {
        self.unit_at() + 4
    }

    pub(crate) const fn means_at(&self) -> usize {
        self.spreads_at() + self.rows
    }

    /// Digests a whole page: `keys` is `[rows][d]`, `values` is `[rows][value_dim]`.
    ///
    /// Numbers that are none, or too large for f16, make the group's error or the page's spreads unknown; nothing else of the block is
    /// worth anything then.
    ///
    /// # Panics
    /// When a slice has the wrong length.
    pub fn encode(&self, keys: &[f32], values: &[f32], block: &mut [u8]) {
        assert_eq!(keys.len(), self.rows * self.d, "encode: keys are [{}][{}]", self.rows, self.d);
        assert_eq!(
            values.len(),
            self.rows * self.value_dim,
            "encode: values are [{}][{}]",
            self.rows,
            self.value_dim
        );
        assert_eq!(block.len(), self.bytes(), "encode: bytes of a block");
        block[self.means_at()..].fill(0);
        let mut scratch = GroupScratch::new(self.padded());
        for group in 0..self.groups() {
            let keys = &keys[group * self.group * self.d..][..self.group * self.d];
            let bytes = &mut block[group * self.group_bytes()..][..self.group_bytes()];
            let (norm, error) = self.encode_group(keys, bytes, &mut scratch);
            write_f32(block, self.norms_at() + 4 * group, norm);
            write_f32(block, self.errors_at() + 4 * group, error);
        }
        self.encode_values(values, block);
    }

    /// The norm of the group's offsets and the largest error of its rows.
    fn encode_group(&self, keys: &[f32], bytes: &mut [u8], scratch: &mut GroupScratch) -> (f32, f32) {
        let (d, width, levels) = (self.d, self.padded(), f32::from(self.bits.levels()));
        let GroupScratch { low, high, offset, step, inverse, row } = scratch;
        low.fill(f32::INFINITY);
        high.fill(f32::NEG_INFINITY);
        let mut special = 0;
        for key in keys.chunks_exact(d) {
            for ((low, high), k) in low.iter_mut().zip(&mut *high).zip(key) {
                *low = if *k < *low { *k } else { *low };
                *high = if *k > *high { *k } else { *high };
                // A NaN is neither smaller nor larger.
                special |= u32::from(k.to_bits() & f32::INFINITY.to_bits() == f32::INFINITY.to_bits());
            }
        }
        let mut known = special == 0;
        for j in 0..width {
            let (low, high) = if known && j < d { (low[j], high[j]) } else { (0.0, 0.0) };
            let from = below(low);
            offset[j] = from.to_f32();
            let by = above((high - offset[j]) / levels);
            step[j] = by.to_f32();
            known &= from.is_finite() && by.is_finite();
            bytes[2 * j..][..2].copy_from_slice(&from.to_le_bytes());
            bytes[2 * (width + j)..][..2].copy_from_slice(&by.to_le_bytes());
            inverse[j] = if step[j] > 0.0 { 1.0 / step[j] } else { 0.0 };
        }
        if !known {
            bytes.fill(0);
            return (0.0, f32::INFINITY);
        }
        let mut worst = 0.0_f32;
        for (tile, keys) in
            bytes[4 * width..].chunks_exact_mut(self.tile_bytes()).zip(keys.chunks_exact(TILE * d))
        {
            for (r, key) in keys.chunks_exact(d).enumerate() {
                row[..d].copy_from_slice(key);
                let squares = self.encode_row(row, (&*offset, &*step, &*inverse), r, tile);
                worst = if squares > worst { squares } else { worst };
            }
        }
        let norm = offset.iter().map(|o| f64::from(*o) * f64::from(*o)).sum::<f64>().sqrt();
        // What differences and products above have lost, in steps: at most 2⁻²³ of `levels` a channel.
        let lost = (d as f32).sqrt() * levels * f32::EPSILON * 4.0;
        ((norm * (1.0 + 1e-6)) as f32, worst.sqrt() * (1.0 + 1e-5) + lost)
    }

    /// Puts a row's codes where they belong in its tile; how far the row is from them, squared, in steps. All channels are `[D]`.
    fn encode_row(
        &self,
        key: &[f32],
        (offset, step, inverse): (&[f32], &[f32], &[f32]),
        row: usize,
        tile: &mut [u8],
    ) -> f32 {
        /// An f32 near which neighbours are 1 apart: the last bits of a sum with it are the nearest whole number.
        const NEAREST: f32 = 8_388_608.0;
        const LOW: u32 = 0x0f0f_0f0f;
        const HIGH: u32 = 0x0303_0303;
        let levels = f32::from(self.bits.levels());
        let (low, high) = tile.split_at_mut(8 * self.padded());
        let mut squares = [0.0_f32; 16];
        let ranges = offset.as_chunks::<16>().0.iter().zip(step.as_chunks::<16>().0);
        let ranges = ranges.zip(inverse.as_chunks::<16>().0);
        for (i, (key, ((offset, step), inverse))) in key.as_chunks::<16>().0.iter().zip(ranges).enumerate() {
            let mut code = [0_u8; 16];
            for j in 0..16 {
                let above = key[j] - offset[j];
                let steps = above * inverse[j];
                let steps = if steps < levels { steps } else { levels };
                let near = steps + NEAREST;
                let off = (above - (near - NEAREST) * step[j]) * inverse[j];
                squares[j] += off * off;
                code[j] = near.to_bits() as u8;
            }
            let four = |q: usize| {
                u32::from_le_bytes([code[4 * q], code[4 * q + 1], code[4 * q + 2], code[4 * q + 3]])
            };
            let codes = [four(0), four(1), four(2), four(3)];
            for half in 0..2 {
                let both = codes[2 * half] & LOW | (codes[2 * half + 1] & LOW) << 4;
                low[128 * i + 64 * half + 4 * row..][..4].copy_from_slice(&both.to_le_bytes());
            }
            if self.bits == CodeBits::Six {
                let two = |q: usize| (codes[q] >> 4 & HIGH) << (2 * q);
                let all = two(0) | two(1) | two(2) | two(3);
                high[64 * i + 4 * row..][..4].copy_from_slice(&all.to_le_bytes());
            }
        }
        squares.iter().sum()
    }

    /// The code of a channel of a row of a tile.
    pub(crate) fn code(&self, tile: &[u8], row: usize, j: usize) -> u8 {
        let low = tile[j / 8 * 64 + 4 * row + j % 4] >> (j / 4 % 2 * 4) & 15;
        match self.bits {
            CodeBits::Four => low,
            CodeBits::Six => {
                let high = tile[8 * self.padded() + j / 16 * 64 + 4 * row + j % 4];
                low | (high >> (j / 4 % 4 * 2) & 3) << 4
            }
        }
    }

    fn encode_values(&self, values: &[f32], block: &mut [u8]) {
        let (dv, span) = (self.value_dim, self.span());
        let mut distances = vec![0.0_f32; self.rows];
        let (mut mean, mut known) = (vec![0.0_f32; dv], true);
        for (s, rows) in values.chunks_exact(span * dv).enumerate() {
            mean.fill(0.0);
            for value in rows.chunks_exact(dv) {
                mean.iter_mut().zip(value).for_each(|(mean, v)| *mean += v);
            }
            let stored = &mut block[self.means_at() + 2 * s * dv..][..2 * dv];
            let mut norm = 0.0_f64;
            for (mean, stored) in mean.iter_mut().zip(stored.chunks_exact_mut(2)) {
                let rounded = f16::from_f32(*mean / span as f32);
                // A mean is finite whatever the values, so that it may be weighed with 0.
                let rounded = if rounded.is_finite() { rounded } else { f16::ZERO };
                stored.copy_from_slice(&rounded.to_le_bytes());
                *mean = rounded.to_f32();
                norm += f64::from(*mean) * f64::from(*mean);
            }
            write_f32(block, self.mean_norms_at() + 4 * s, (norm.sqrt() * (1.0 + 1e-6)) as f32);
            for (distance, value) in distances[s * span..].iter_mut().zip(rows.chunks_exact(dv)) {
                *distance = distance_of(value, &mean);
                known &= distance.is_finite();
            }
        }
        let largest = distances.iter().copied().fold(0.0, f32::max);
        let unit = if known { largest / 255.0 * (1.0 + 1e-6) + f32::MIN_POSITIVE } else { f32::INFINITY };
        write_f32(block, self.unit_at(), unit);
        let spreads = &mut block[self.spreads_at()..][..self.rows];
        for (spread, distance) in spreads.iter_mut().zip(&distances) {
            // Of what is not known there is something, for it not to vanish beside a weight.
            *spread = if known { (distance / unit).ceil().min(255.0) as u8 } else { 255 };
        }
    }

    /// The keys that a block's codes stand for, `[rows][d]`.
    ///
    /// # Panics
    /// When a slice has the wrong length.
    pub fn decode_keys(&self, block: &[u8], keys: &mut [f32]) {
        assert_eq!(block.len(), self.bytes(), "decode_keys: bytes of a block");
        assert_eq!(keys.len(), self.rows * self.d, "decode_keys: keys are [{}][{}]", self.rows, self.d);
        for (row, key) in keys.chunks_exact_mut(self.d).enumerate() {
            let group = &block[row / self.group * self.group_bytes()..][..self.group_bytes()];
            let (steps, codes) = (&group[2 * self.padded()..], &group[4 * self.padded()..]);
            let tile = &codes[row % self.group / TILE * self.tile_bytes()..][..self.tile_bytes()];
            for (j, k) in key.iter_mut().enumerate() {
                *k = read_f16(group, 2 * j)
                    + read_f16(steps, 2 * j) * f32::from(self.code(tile, row % TILE, j));
            }
        }
    }

    /// At least `‖(k − k̂)/step‖` of each row of a group of a block; `+∞` where it is not known.
    #[must_use]
    pub fn error(&self, block: &[u8], group: usize) -> f32 {
        read_f32(block, self.errors_at() + 4 * group)
    }
}

/// Memory for one group at a time, `[D]` each.
struct GroupScratch {
    low: Vec<f32>,
    high: Vec<f32>,
    offset: Vec<f32>,
    step: Vec<f32>,
    inverse: Vec<f32>,
    /// A row, filled up with 0.
    row: Vec<f32>,
}

impl GroupScratch {
    fn new(width: usize) -> Self {
        let zeros = || vec![0.0; width];
        Self { low: zeros(), high: zeros(), offset: zeros(), step: zeros(), inverse: zeros(), row: zeros() }
    }
}

/// At least the distance of two vectors.
fn distance_of(a: &[f32], b: &[f32]) -> f32 {
    let mut squares = [0.0_f32; 8];
    let ((a, a_rest), (b, b_rest)) = (a.as_chunks::<8>(), b.as_chunks::<8>());
    for (a, b) in a.iter().zip(b) {
        for j in 0..8 {
            squares[j] += (a[j] - b[j]) * (a[j] - b[j]);
        }
    }
    for ((a, b), square) in a_rest.iter().zip(b_rest).zip(&mut squares) {
        *square += (a - b) * (a - b);
    }
    squares.iter().sum::<f32>().sqrt() * (1.0 + 1e-5)
}

/// The largest f16 that is not above `value`; `−∞` below all.
fn below(value: f32) -> f16 {
    let near = f16::from_f32(value);
    if near.to_f32() <= value {
        return near;
    }
    // One less: towards 0 from above, away from it below 0; below +0 comes the smallest negative number.
    match near.to_bits() {
        0 | 0x8000 => f16::from_bits(0x8001),
        bits if bits & 0x8000 == 0 => f16::from_bits(bits - 1),
        bits => f16::from_bits(bits + 1),
    }
}

/// The smallest f16 that is not below `value`, which is not negative; `+∞` above all.
fn above(value: f32) -> f16 {
    let near = f16::from_f32(value);
    if near.to_f32() >= value { near } else { f16::from_bits(near.to_bits() + 1) }
}

pub(crate) fn read_f16(bytes: &[u8], at: usize) -> f32 {
    f16::from_le_bytes([bytes[at], bytes[at + 1]]).to_f32()
}

pub(crate) fn read_f32(bytes: &[u8], at: usize) -> f32 {
    f32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
}

fn write_f32(bytes: &mut [u8], at: usize, value: f32) {
    bytes[at..at + 4].copy_from_slice(&value.to_le_bytes());
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn layouts() -> impl Strategy<Value = CodeLayout> {
        let bits = prop::sample::select(vec![CodeBits::Four, CodeBits::Six]);
        let shapes = vec![(16, 16), (32, 16), (32, 32), (64, 16), (64, 32), (64, 64), (128, 128)];
        (1_usize..80, 1_usize..40, prop::sample::select(shapes), bits)
            .prop_map(|(d, dv, (rows, group), bits)| CodeLayout::new(d, dv, rows, bits, group).unwrap())
    }

    /// A channel's scale and offset: ordinary ones, large offsets with tiny ranges, constants, the edges of f16.
    fn channel() -> impl Strategy<Value = (f32, f32)> {
        prop_oneof![
            (0.0_f32..3.0, -2.0_f32..2.0),
            (1e-4_f32..1e-2, -3e3_f32..3e3),
            (Just(0.0), -60e3_f32..60e3),
            (0.0_f32..1e-7, -1e-7_f32..1e-7),
            (Just(100.0), -65e3_f32..65e3),
        ]
    }

    proptest! {
        #[test]
        fn no_key_is_further_from_its_code_than_the_group_says_nor_half_a_step(
            layout in layouts(),
            channels in prop::collection::vec(channel(), 80),
            unit in prop::collection::vec(-1.0_f32..1.0, 128 * 80),
        ) {
            let (d, dv, rows) = (layout.head_dim(), layout.value_dim(), layout.rows());
            let key = |i: usize| {
                let (scale, offset) = channels[i % d];
                (offset + scale * unit[i]).clamp(-65000.0, 65000.0)
            };
            let keys: Vec<f32> = (0..rows * d).map(key).collect();
            let values: Vec<f32> = (0..rows * dv).map(|i| unit[i] * 4.0 + channels[i % dv].0).collect();
            let mut block = vec![0xa5; layout.bytes()];
            layout.encode(&keys, &values, &mut block);
            let mut decoded = vec![0.0; keys.len()];
            layout.decode_keys(&block, &mut decoded);
            for row in 0..rows {
                let group = row / layout.group();
                let offsets = &block[group * layout.group_bytes()..][..layout.group_bytes()];
                let (steps, codes) = (&offsets[2 * layout.padded()..], &offsets[4 * layout.padded()..]);
                let tile = &codes[row % layout.group() / TILE * layout.tile_bytes()..];
                let mut squares = 0.0_f64;
                for j in 0..d {
                    let step = f64::from(read_f16(steps, 2 * j));
                    let stands_for = f64::from(read_f16(offsets, 2 * j)) + step * f64::from(layout.code(tile, row % TILE, j));
                    prop_assert_eq!(decoded[row * d + j], stands_for as f32);
                    let off = f64::from(keys[row * d + j]) - stands_for;
                    prop_assert!(off.abs() <= step * 0.5001, "{off} of a step of {step}");
                    if step > 0.0 {
                        squares += (off / step).powi(2);
                    }
                }
                prop_assert!(squares.sqrt() <= f64::from(layout.error(&block, group)));
            }
            for row in 0..rows {
                let span = row / layout.span();
                let mean = |j: usize| f64::from(read_f16(&block, layout.means_at() + 2 * (span * dv + j)));
                let squares: f64 = (0..dv).map(|j| (f64::from(values[row * dv + j]) - mean(j)).powi(2)).sum();
                let spread = f64::from(block[layout.spreads_at() + row]) * f64::from(read_f32(&block, layout.unit_at()));
                prop_assert!(squares.sqrt() <= spread * (1.0 + 1e-12), "{} {spread}", squares.sqrt());
                let norm: f64 = (0..dv).map(|j| mean(j).powi(2)).sum();
                prop_assert!(norm.sqrt() <= f64::from(read_f32(&block, layout.mean_norms_at() + 4 * span)));
            }
        }

        #[test]
        fn f16_is_rounded_to_the_side_that_was_asked_for(value in -70e3_f32..70e3, tiny in -1e-6_f32..1e-6) {
            for value in [value, tiny] {
                prop_assert!(below(value).to_f32() <= value);
                prop_assert!(above(value.abs()).to_f32() >= value.abs());
            }
        }
    }

    #[test]
    fn what_f16_cannot_hold_makes_a_group_unknown_and_no_other() {
        let layout = CodeLayout::new(4, 2, 32, CodeBits::Four, 16).unwrap();
        for bad in [f32::NAN, f32::INFINITY, 1e6, -1e6] {
            let mut keys = vec![1.0; 32 * 4];
            keys[17 * 4 + 2] = bad;
            let mut block = vec![0; layout.bytes()];
            layout.encode(&keys, &[0.5; 64], &mut block);
            assert!(layout.error(&block, 0) < 1e-3, "{bad}");
            assert_eq!(layout.error(&block, 1), f32::INFINITY, "{bad}");
            let mut values = vec![0.5; 64];
            values[3] = bad * 1e34;
            layout.encode(&[1.0; 128], &values, &mut block);
            assert_eq!(read_f32(&block, layout.unit_at()), f32::INFINITY, "{bad}");
        }
    }

    #[test]
    fn shapes_that_there_are_no_digests_of_are_refused_with_their_numbers() {
        let error = CodeLayout::new(64, 64, 32, CodeBits::Six, 24).unwrap_err();
        assert!(error.to_string().contains("groups of 24"), "{error}");
        for (d, rows, group) in [(0, 32, 32), (1025, 32, 32), (64, 8, 8), (64, 48, 16), (64, 32, 64)] {
            assert!(CodeLayout::new(d, 64, rows, CodeBits::Four, group).is_err(), "{d} {rows} {group}");
        }
        // A quarter of 64 values in 6 bits, as f16 pairs of K and V have them.
        let layout = CodeLayout::new(64, 64, 32, CodeBits::Six, 32).unwrap();
        assert_eq!(layout.bytes(), 1984);
    }
}
