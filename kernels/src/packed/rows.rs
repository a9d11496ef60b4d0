//! The other side of a product: a few vectors, in 8 bits.

use super::{BLOCK, NEAREST, steps};

/// Vectors `[rows][columns]` in blocks of 32 values of 8 bits: `x ≈ scale · code`.
#[derive(Clone, Debug, Default)]
pub struct QuantisedRows {
    pub(crate) columns: usize,
    /// `[rows][columns]`, −127 to 127.
    pub(crate) codes: Vec<i8>,
    /// `[rows][blocks]`.
    pub(crate) scales: Vec<f32>,
    /// `[rows][blocks]`: the codes of a block, added.
    pub(crate) sums: Vec<i32>,
    /// `[rows][blocks]`: the same times the scale.
    pub(crate) totals: Vec<f32>,
}

impl QuantisedRows {
    /// Vectors.
    #[must_use]
    pub fn rows(&self) -> usize {
        self.codes.len().checked_div(self.columns).unwrap_or(0)
    }

    /// Values of a vector.
    #[must_use]
    pub fn columns(&self) -> usize {
        self.columns
    }

    /// Takes the vectors. The specification, and what every path compiles for itself.
    #[inline(always)]
    pub(crate) fn set(&mut self, x: &[f32], columns: usize) {
        let blocks = x.len() / BLOCK;
        self.columns = columns;
        self.codes.resize(x.len(), 0);
        self.scales.resize(blocks, 0.0);
        self.sums.resize(blocks, 0);
        self.totals.resize(blocks, 0.0);
        let parts = x.as_chunks::<BLOCK>().0.iter().zip(self.codes.as_chunks_mut::<BLOCK>().0);
        let told = self.scales.iter_mut().zip(&mut self.sums).zip(&mut self.totals);
        for ((values, codes), ((scale, sum), total)) in parts.zip(told) {
            let (step, inverse) = steps(values);
            let mut added = 0;
            for (code, value) in codes.iter_mut().zip(values) {
                *code = (value * inverse + NEAREST).to_bits() as i8;
                added += i32::from(*code);
            }
            (*scale, *sum, *total) = (step, added, step * added as f32);
        }
    }
}
