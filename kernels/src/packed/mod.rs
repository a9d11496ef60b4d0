//! Quantised matrices for products with a few rows, and those rows in 8 bits.
//!
//! Weights are coded as GGUF codes them, in blocks of 32 of a row, and lie as a product reads them: 16 rows side by side (a *panel*), so
//! that each lane of a register belongs to one of them, and nothing is summed across lanes. A panel has, block by block, lines of 64
//! bytes, four for each row; and a scale for each row.

mod memory;
mod rows;

use std::sync::Arc;

use half::f16;

pub use memory::gather;
pub use rows::QuantisedRows;

pub(crate) use memory::Line;
use memory::Memory;

/// Weights of a row that share a scale.
pub const BLOCK: usize = 32;
/// Rows that lie side by side.
pub const PANEL: usize = 16;
/// Bytes of one row in a line.
pub(crate) const STEP: usize = 4;
/// What an 8-bit code is stored with, so that it is no negative number.
pub(crate) const OFFSET: i32 = 128;
/// Largest magnitude of an activation's code, and of a weight's that is coded here.
const CODE_MAX: f32 = 127.0;
/// A block with nothing larger counts as zeros: the inverse of its scale would not be finite.
const SMALLEST: f32 = 1e-35;
/// An f32 near which neighbours are 1 apart: added to a small number, it leaves the nearest integer in the lowest bits.
const NEAREST: f32 = 12_582_912.0;

/// How the weights of a matrix are coded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Codes {
    /// 4 bits: `w = d·c + m`, with `c` in 0..16 and f16 `d` and `m` for each block. GGUF's Q4_1, and Q4_0 with `m = −8·d`.
    Four,
    /// 8 bits: `w = d·c`, with `c` in −128..128 and an f16 `d` for each block. GGUF's Q8_0.
    Eight,
}

impl Codes {
    /// Lines of a panel's block.
    pub(crate) const fn lines(self) -> usize {
        match self {
            Self::Four => BLOCK / STEP / 2,
            Self::Eight => BLOCK / STEP,
        }
    }
}

/// A quantised matrix `[rows][columns]`, packed for products with a few vectors.
#[derive(Clone, Debug)]
pub struct PackedMatrix {
    codes: Codes,
    rows: usize,
    columns: usize,
    /// Lines, scales, minima; each from a line's beginning on.
    memory: Arc<Memory>,
    /// The first line.
    at: usize,
}

/// What a matrix is made of, and read from.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Parts<'a> {
    /// `[panels][blocks][lines]`. Four: byte i of a row in line s has column 4s + i low and column 16 + 4s + i high. Eight: column
    /// 4s + i, plus [`OFFSET`].
    pub(crate) lines: &'a [Line],
    /// `[panels][blocks][PANEL]`, f16.
    pub(crate) scales: &'a [u16],
    /// The same of the m; none with [`Codes::Eight`].
    pub(crate) mins: &'a [u16],
}

/// How many lines the parts of a matrix take: codes, scales, minima.
#[derive(Clone, Copy, Debug)]
struct Sizes([usize; 3]);

impl Sizes {
    fn of(codes: Codes, rows: usize, columns: usize) -> Self {
        let blocks = rows.div_ceil(PANEL) * columns / BLOCK;
        let heads = (blocks * PANEL * size_of::<u16>()).div_ceil(size_of::<Line>());
        Self([blocks * codes.lines(), heads, if codes == Codes::Four { heads } else { 0 }])
    }

    fn lines(self) -> usize {
        self.0.iter().sum()
    }
}

/// A matrix while it is written.
struct Writer {
    codes: Codes,
    rows: usize,
    columns: usize,
    sizes: Sizes,
    memory: Vec<Line>,
}

impl Writer {
    /// Zeros.
    fn new(codes: Codes, rows: usize, columns: usize) -> Self {
        assert!(columns > 0 && columns.is_multiple_of(BLOCK), "packed rows of {columns} values");
        let sizes = Sizes::of(codes, rows, columns);
        Self { codes, rows, columns, sizes, memory: vec![Line::ZEROS; sizes.lines()] }
    }

    /// Writes block `b` of a row, its codes as GGUF has them.
    fn put(&mut self, row: usize, b: usize, (scale, min): (f16, f16), codes: &[u8]) {
        let block = row / PANEL * (self.columns / BLOCK) + b;
        let lane = row % PANEL;
        let (lines, heads) = self.memory.split_at_mut(self.sizes.0[0]);
        let (scales, mins) = heads.split_at_mut(self.sizes.0[1]);
        bytemuck::cast_slice_mut::<Line, u16>(scales)[block * PANEL + lane] = scale.to_bits();
        let offset = match self.codes {
            Codes::Four => {
                bytemuck::cast_slice_mut::<Line, u16>(mins)[block * PANEL + lane] = min.to_bits();
                0
            }
            Codes::Eight => OFFSET as u8,
        };
        let lines = &mut lines[block * self.codes.lines()..][..self.codes.lines()];
        for (line, codes) in lines.iter_mut().zip(codes.chunks_exact(STEP)) {
            for (to, code) in line.0[lane * STEP..][..STEP].iter_mut().zip(codes) {
                *to = code.wrapping_add(offset);
            }
        }
    }

    fn finish(self) -> PackedMatrix {
        let Self { codes, rows, columns, memory, .. } = self;
        PackedMatrix { codes, rows, columns, memory: Arc::new(Memory::from(memory)), at: 0 }
    }
}

impl PackedMatrix {
    /// Blocks of GGUF's Q8_0, row by row: an f16 scale, 32 codes.
    ///
    /// # Panics
    /// When `columns` is no multiple of a block, or the bytes are not those of whole rows.
    #[must_use]
    pub fn from_q8_0(bytes: &[u8], columns: usize) -> Self {
        Self::from_blocks(Codes::Eight, 2, bytes, columns, |block| (half_at(block, 0), f16::ZERO))
    }

    /// Blocks of GGUF's Q4_0, row by row: an f16 scale, 32 codes, 8 too large each.
    ///
    /// # Panics
    /// As [`PackedMatrix::from_q8_0`].
    #[must_use]
    pub fn from_q4_0(bytes: &[u8], columns: usize) -> Self {
        // Eight times an f16 is one, up to the largest, which no weight's scale is near.
        let min = |scale: f16| f16::from_f32(-8.0 * scale.to_f32());
        Self::from_blocks(Codes::Four, 2, bytes, columns, |block| (half_at(block, 0), min(half_at(block, 0))))
    }

    /// Blocks of GGUF's Q4_1, row by row: an f16 scale, an f16 minimum, 32 codes.
    ///
    /// # Panics
    /// As [`PackedMatrix::from_q8_0`].
    #[must_use]
    pub fn from_q4_1(bytes: &[u8], columns: usize) -> Self {
        Self::from_blocks(Codes::Four, 4, bytes, columns, |block| (half_at(block, 0), half_at(block, 2)))
    }

    /// Rows of blocks that begin with `head` bytes, of which `head_of` makes scale and minimum.
    fn from_blocks(
        codes: Codes,
        head: usize,
        bytes: &[u8],
        columns: usize,
        head_of: impl Fn(&[u8]) -> (f16, f16),
    ) -> Self {
        let block_bytes = head + codes.lines() * STEP;
        let blocks = columns / BLOCK;
        assert!(
            blocks > 0 && bytes.len().is_multiple_of(blocks * block_bytes),
            "packed: bytes of whole rows"
        );
        let mut packed = Writer::new(codes, bytes.len() / (blocks * block_bytes), columns);
        for (i, block) in bytes.chunks_exact(block_bytes).enumerate() {
            let (row, b) = (i / blocks, i % blocks);
            let (head, codes_of) = block.split_at(head);
            let (scale, min) = head_of(head);
            packed.put(row, b, (scale, min), codes_of);
        }
        packed.finish()
    }

    /// Weights `[rows][columns]`, quantised to 8 bits as GGUF's Q8_0 is.
    ///
    /// # Panics
    /// When `columns` is no multiple of a block, or there are not whole rows.
    #[must_use]
    pub fn quantise(weight: &[f32], columns: usize) -> Self {
        assert!(columns > 0 && weight.len().is_multiple_of(columns), "packed: whole rows");
        let mut packed = Writer::new(Codes::Eight, weight.len() / columns, columns);
        let mut codes = [0_u8; BLOCK];
        for (i, values) in weight.chunks_exact(BLOCK).enumerate() {
            let (row, b) = (i / (columns / BLOCK), i % (columns / BLOCK));
            let (step, inverse) = steps(values);
            for (code, value) in codes.iter_mut().zip(values) {
                *code = (value * inverse + NEAREST).to_bits() as u8;
            }
            packed.put(row, b, (f16::from_f32(step), f16::ZERO), &codes);
        }
        packed.finish()
    }

    /// How its weights are coded.
    #[must_use]
    pub fn codes(&self) -> Codes {
        self.codes
    }

    /// Rows.
    #[must_use]
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Values of a row.
    #[must_use]
    pub fn columns(&self) -> usize {
        self.columns
    }

    /// Panels of [`PANEL`] rows, the last perhaps of fewer.
    #[must_use]
    pub fn panels(&self) -> usize {
        self.rows.div_ceil(PANEL)
    }

    /// Bytes that a product reads.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.sizes().lines() * size_of::<Line>()
    }

    fn sizes(&self) -> Sizes {
        Sizes::of(self.codes, self.rows, self.columns)
    }

    /// Where everything is.
    pub(crate) fn parts(&self) -> Parts<'_> {
        let sizes = self.sizes();
        let all = &self.memory.lines()[self.at..][..sizes.lines()];
        let (lines, heads) = all.split_at(sizes.0[0]);
        let (scales, mins) = heads.split_at(sizes.0[1]);
        Parts { lines, scales: bytemuck::cast_slice(scales), mins: bytemuck::cast_slice(mins) }
    }
}

/// What one step of a block's codes stands for, and its inverse: the largest magnitude gets the largest code.
#[inline(always)]
fn steps(values: &[f32]) -> (f32, f32) {
    // Of two magnitudes the larger has the larger bits; NaN has larger ones than all, and stays.
    let bits = values.iter().fold(0, |largest, value| u32::max(largest, value.abs().to_bits()));
    let largest = f32::from_bits(bits);
    if largest < SMALLEST { (0.0, 0.0) } else { (largest / CODE_MAX, CODE_MAX / largest) }
}

fn half_at(block: &[u8], at: usize) -> f16 {
    f16::from_le_bytes([block[at], block[at + 1]])
}
