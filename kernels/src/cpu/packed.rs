//! Products of quantised matrices with a few rows.

use std::ops::Range;

use super::{Kernels, dispatch};
use crate::packed::{BLOCK, PANEL, PackedMatrix, QuantisedRows};

impl Kernels {
    /// Quantises vectors `x: [rows][columns]`. The same on every path.
    ///
    /// # Panics
    /// When `columns` is no multiple of [`BLOCK`], or does not divide `x`.
    pub fn quantise_rows(self, x: &[f32], columns: usize, to: &mut QuantisedRows) {
        assert!(columns > 0 && columns.is_multiple_of(BLOCK), "quantise_rows: rows of {columns} values");
        assert!(x.len().is_multiple_of(columns), "quantise_rows: {} values in rows of {columns}", x.len());
        dispatch!(self, quantise_rows(x, columns, to));
    }

    /// `out[r][t] = W_r · x_t` for the rows `r` of some panels of the matrix: `out` is `[rows of these panels][rows of x]`.
    ///
    /// Codes of a block are multiplied and added as integers; block after block, `out = fma(d, dx·Σ, out)`, and then with 4-bit codes
    /// `out = fma(m, dx·Σx, out)`. The same on every path, to the last bit; which panels are asked for together changes nothing.
    ///
    /// # Panics
    /// When there are no such panels, vectors have not the matrix's columns, or `out` has the wrong length.
    pub fn multiply_packed(
        self,
        matrix: &PackedMatrix,
        panels: Range<usize>,
        x: &QuantisedRows,
        out: &mut [f32],
    ) {
        assert!(panels.start <= panels.end && panels.end <= matrix.panels(), "multiply_packed: {panels:?}");
        let rows = (panels.end * PANEL).min(matrix.rows()).saturating_sub(panels.start * PANEL);
        assert_eq!(out.len(), rows * x.rows(), "multiply_packed: out is [{rows}][{}]", x.rows());
        if out.is_empty() {
            return;
        }
        assert_eq!(x.columns(), matrix.columns(), "multiply_packed: columns differ");
        dispatch!(self, multiply_packed(matrix, panels, x, out));
    }
}
