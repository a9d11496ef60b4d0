//! Safe, strided f32 matrix products over the `gemm` crate.
#![allow(unsafe_code)]

/// A read-only matrix in a slice: value `(r, c)` is at `offset + r * row_stride + c * column_stride`.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Mat<'a> {
    data: &'a [f32],
    rows: usize,
    columns: usize,
    row_stride: usize,
    column_stride: usize,
}

/// Values that a strided matrix spans, from its first to its last.
fn span(rows: usize, columns: usize, row_stride: usize, column_stride: usize) -> usize {
    if rows == 0 || columns == 0 { 0 } else { (rows - 1) * row_stride + (columns - 1) * column_stride + 1 }
}

impl<'a> Mat<'a> {
    /// Rows of `columns` contiguous values, `row_stride` apart.
    pub(crate) fn new(data: &'a [f32], rows: usize, columns: usize, row_stride: usize) -> Self {
        assert!(span(rows, columns, row_stride, 1) <= data.len(), "matrix reaches beyond its slice");
        Self { data, rows, columns, row_stride, column_stride: 1 }
    }

    /// The transpose: no value moves.
    pub(crate) fn transposed(self) -> Self {
        Self {
            rows: self.columns,
            columns: self.rows,
            row_stride: self.column_stride,
            column_stride: self.row_stride,
            ..self
        }
    }
}

/// How many threads a product may use.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Threads {
    /// The calling one.
    One,
    /// All of rayon's.
    All,
}

/// `out = scale * a b`, with row `r` of `out` at `r * out_stride`.
///
/// # Panics
/// When the inner dimensions differ or `out` is too short.
pub(crate) fn product(
    a: Mat<'_>,
    b: Mat<'_>,
    scale: f32,
    out: &mut [f32],
    out_stride: usize,
    threads: Threads,
) {
    assert_eq!(a.columns, b.rows, "inner dimensions differ");
    assert!(out_stride >= b.columns, "rows of the result overlap");
    assert!(span(a.rows, b.columns, out_stride, 1) <= out.len(), "result reaches beyond its slice");
    let parallelism = match threads {
        Threads::One => gemm::Parallelism::None,
        Threads::All => gemm::Parallelism::Rayon(0),
    };
    // SAFETY: every index that the product touches is below the span of its matrix: for `a` and `b` checked when
    // the `Mat` was made (a transpose spans the same values), for `out` above. `out` is borrowed mutably, so it
    // overlaps neither, and with a row stride of at least a row's length no two of its values coincide. What was in
    // `out` is not read (`read_dst` is false).
    unsafe {
        gemm::gemm(
            a.rows,
            b.columns,
            a.columns,
            out.as_mut_ptr(),
            1,
            out_stride as isize,
            false,
            a.data.as_ptr(),
            a.column_stride as isize,
            a.row_stride as isize,
            b.data.as_ptr(),
            b.column_stride as isize,
            b.row_stride as isize,
            0.0,
            scale,
            false,
            false,
            false,
            parallelism,
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_strided_product_equals_the_sum_by_hand() {
        let a: Vec<f32> = (0..24).map(|i| i as f32 * 0.5 - 3.0).collect();
        let b: Vec<f32> = (0..35).map(|i| (i as f32).sin()).collect();
        // a: 3 x 5 with rows 8 apart; b: 7 x 5, used transposed.
        let mut out = vec![f32::NAN; 3 * 9];
        product(Mat::new(&a, 3, 5, 8), Mat::new(&b, 7, 5, 5).transposed(), 2.0, &mut out, 9, Threads::One);
        for r in 0..3 {
            for c in 0..7 {
                let by_hand: f32 = (0..5).map(|i| 2.0 * a[r * 8 + i] * b[c * 5 + i]).sum();
                assert!((out[r * 9 + c] - by_hand).abs() < 1e-4);
            }
        }
        assert!(out[7].is_nan(), "what lies between the rows stays");
    }

    #[test]
    #[should_panic(expected = "beyond its slice")]
    fn a_result_that_does_not_fit_is_refused() {
        let a = [0.0; 4];
        product(Mat::new(&a, 2, 2, 2), Mat::new(&a, 2, 2, 2), 1.0, &mut [0.0; 3], 2, Threads::One);
    }
}
