//! The regression: sums over a calibration text, and a linear system per layer.

use nalgebra::{Cholesky, DMatrix, DMatrixView};

use crate::error::MethodError;
use crate::shape::Shape;

/// How strongly corrections are drawn to zero, as a share of the mean square of an input: what a few thousand tokens of one text
/// say about rare directions of the residual stream does not hold in another.
pub const RIDGE: f64 = 0.03;

/// Rows whose products are summed in f32 before they are added in f64: few enough that rounding stays at that of one product.
const BLOCK_ROWS: usize = 512;

/// Collects inputs and errors of a model's hints, layer by layer, and solves for the corrections.
///
/// It keeps `XᵀX` and `XᵀE` of each layer in f64, so that the text may come in chunks of any length and its memory does not grow
/// with it: `hidden·(hidden + query_width)` f64 a layer.
#[derive(Debug)]
pub struct HintBuilder {
    hidden: usize,
    query_width: usize,
    ridge: f64,
    /// Of layers 1, 2, …: the first layer's hint is nobody's.
    layers: Vec<Sums>,
}

#[derive(Debug, Clone)]
struct Sums {
    /// `XᵀX`, `[hidden][hidden]`.
    gram: DMatrix<f64>,
    /// `XᵀE`, `hidden` rows and `query_width` columns.
    cross: DMatrix<f64>,
    rows: usize,
}

impl HintBuilder {
    /// For a model of that shape whose residual stream has `hidden` values; `ridge` is λ over the mean diagonal of `XᵀX`
    /// ([`RIDGE`]).
    ///
    /// # Errors
    /// A shape that is none, no width, or a ridge that is negative or no number.
    pub fn new(shape: &Shape, hidden: usize, ridge: f64) -> Result<Self, MethodError> {
        shape.check()?;
        if hidden == 0 {
            return Err(MethodError::BadShape { reason: "its residual stream has 0 values".into() });
        }
        if !(ridge.is_finite() && ridge >= 0.0) {
            return Err(MethodError::BadShape { reason: format!("a ridge of {ridge} is no share") });
        }
        let query_width = shape.query_heads * shape.head_dim;
        let none = Sums {
            gram: DMatrix::zeros(hidden, hidden),
            cross: DMatrix::zeros(hidden, query_width),
            rows: 0,
        };
        Ok(Self { hidden, query_width, ridge, layers: vec![none; shape.layers - 1] })
    }

    /// Takes in some tokens of a layer: `inputs` is `norm_i(x_{i−1})`, `[T][hidden]`, `errors` is
    /// `q_i − W_Q·norm_i(x_{i−1})` before RoPE, `[T][query_width]`.
    ///
    /// # Errors
    /// [`MethodError::LayerCalibration`]: there is no hint for that layer, the values are no whole number of tokens, or inputs and
    /// errors are not of the same ones.
    pub fn observe(&mut self, layer: usize, inputs: &[f32], errors: &[f32]) -> Result<(), MethodError> {
        let failed = |reason: String| MethodError::LayerCalibration { layer, reason };
        let (hidden, width) = (self.hidden, self.query_width);
        let layers = self.layers.len();
        let sums = layer
            .checked_sub(1)
            .and_then(|at| self.layers.get_mut(at))
            .ok_or_else(|| failed(format!("hints are made for layers 1 to {layers}")))?;
        let tokens = inputs.len() / hidden;
        if inputs.len() != tokens * hidden || errors.len() != tokens * width {
            return Err(failed(format!(
                "{} inputs and {} errors are not [T][{hidden}] and [T][{width}]",
                inputs.len(),
                errors.len()
            )));
        }
        for (inputs, errors) in inputs.chunks(BLOCK_ROWS * hidden).zip(errors.chunks(BLOCK_ROWS * width)) {
            let rows = inputs.len() / hidden;
            // Rows as they lie are the columns of the transpose.
            let x = DMatrixView::from_slice(inputs, hidden, rows);
            let e = DMatrixView::from_slice(errors, width, rows);
            for (sum, product) in [(&mut sums.gram, x * x.transpose()), (&mut sums.cross, x * e.transpose())]
            {
                sum.zip_apply(&product, |sum, value| *sum += f64::from(value));
            }
            sums.rows += rows;
        }
        Ok(())
    }

    /// The correction `R` of a layer's hint, `[query_width][hidden]` row-major: `(XᵀX + λI)·Rᵀ = XᵀE`, by Cholesky.
    ///
    /// # Errors
    /// [`MethodError::LayerCalibration`]: there is no such layer, it saw no token or values that are not finite, or, without a
    /// ridge, fewer independent inputs than they have values.
    pub fn solve(&self, layer: usize) -> Result<Vec<f32>, MethodError> {
        let failed = |reason: String| MethodError::LayerCalibration { layer, reason };
        let sums = layer
            .checked_sub(1)
            .and_then(|at| self.layers.get(at))
            .ok_or_else(|| failed(format!("hints are made for layers 1 to {}", self.layers.len())))?;
        if sums.rows == 0 {
            return Err(failed("it saw no token".into()));
        }
        if !sums.gram.iter().chain(sums.cross.iter()).all(|value| value.is_finite()) {
            return Err(failed("an input or a query is not finite".into()));
        }
        let lambda = self.ridge * sums.gram.trace() / self.hidden as f64;
        let mut system = sums.gram.clone();
        (0..self.hidden).for_each(|i| system[(i, i)] += lambda);
        let factor = Cholesky::new(system)
            .ok_or_else(|| failed(format!("its {} inputs span too few directions", sums.rows)))?;
        let solved = factor.solve(&sums.cross);
        // A column of `hidden` values is a row of R.
        Ok(solved.as_slice().iter().map(|value| *value as f32).collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::hint::HintArtifact;
    use crate::shape::tests::small;
    use crate::testing::{Rng, matmul_t, relative_error};

    const HIDDEN: usize = 24;
    const TOKENS: usize = 700;

    fn width() -> usize {
        small().query_heads * small().head_dim
    }

    /// Inputs, and what a map makes of them.
    fn rows(map: &[f32], seed: u64) -> (Vec<f32>, Vec<f32>) {
        let inputs = Rng::new(seed).normal(TOKENS * HIDDEN);
        let errors = matmul_t(&inputs, map, TOKENS, HIDDEN, width());
        (inputs, errors)
    }

    fn norm(values: &[f32]) -> f32 {
        values.iter().map(|value| value * value).sum::<f32>().sqrt()
    }

    #[test]
    fn without_a_ridge_a_linear_error_is_found_whole_whatever_the_chunks() {
        let map = Rng::new(1).normal(width() * HIDDEN);
        let (inputs, errors) = rows(&map, 2);
        let mut whole = HintBuilder::new(&small(), HIDDEN, 0.0).unwrap();
        whole.observe(1, &inputs, &errors).unwrap();
        let mut chunked = HintBuilder::new(&small(), HIDDEN, 0.0).unwrap();
        for (inputs, errors) in inputs.chunks(37 * HIDDEN).zip(errors.chunks(37 * width())) {
            chunked.observe(1, inputs, errors).unwrap();
        }
        for builder in [whole, chunked] {
            assert!(relative_error(&builder.solve(1).unwrap(), &map) < 1e-4);
        }
    }

    #[test]
    fn a_ridge_shrinks_the_correction_as_its_formula_says() {
        let map = Rng::new(1).normal(width() * HIDDEN);
        let (inputs, errors) = rows(&map, 2);
        let solve = |ridge| {
            let mut builder = HintBuilder::new(&small(), HIDDEN, ridge).unwrap();
            builder.observe(1, &inputs, &errors).unwrap();
            builder.solve(1).unwrap()
        };
        let (free, light, heavy) = (solve(0.0), solve(RIDGE), solve(1.0));
        assert!(norm(&heavy) < norm(&light) && norm(&light) < norm(&free));
        // Inputs of one size in all directions: `XᵀX` is near a multiple of the identity, and all shrinks by 1 / (1 + ridge).
        assert!((norm(&light) / norm(&free) - 1.0 / (1.0 + RIDGE as f32)).abs() < 5e-3);
        assert!((norm(&heavy) / norm(&free) - 0.5).abs() < 2e-2);
        // It solves the normal equations: what is left is orthogonal to the inputs but for λR.
        let predicted = matmul_t(&inputs, &heavy, TOKENS, HIDDEN, width());
        let left: Vec<f32> = errors.iter().zip(&predicted).map(|(e, p)| e - p).collect();
        let square: f32 = inputs.iter().map(|x| x * x).sum::<f32>() / HIDDEN as f32;
        for (o, i) in [(0, 0), (3, 7), (width() - 1, HIDDEN - 1)] {
            let cross: f32 = (0..TOKENS).map(|t| inputs[t * HIDDEN + i] * left[t * width() + o]).sum();
            let expected = square * heavy[o * HIDDEN + i];
            assert!((cross - expected).abs() < 1e-3 * square, "{cross} {expected}");
        }
    }

    #[test]
    fn with_a_ridge_fewer_tokens_than_values_are_enough_and_without_one_they_are_refused() {
        let inputs = Rng::new(1).normal(3 * HIDDEN);
        let errors = Rng::new(2).normal(3 * width());
        let solve = |ridge| {
            let mut builder = HintBuilder::new(&small(), HIDDEN, ridge).unwrap();
            builder.observe(1, &inputs, &errors).unwrap();
            builder.solve(1)
        };
        assert!(solve(RIDGE).unwrap().iter().all(|value| value.is_finite()));
        // An input that is always zero is a direction that nothing is known of.
        let mut builder = HintBuilder::new(&small(), HIDDEN, 0.0).unwrap();
        let flat: Vec<f32> = (0..3 * HIDDEN).map(|at| if at % HIDDEN == 5 { 0.0 } else { 1.0 }).collect();
        builder.observe(1, &flat, &errors).unwrap();
        let error = builder.solve(1).unwrap_err().to_string();
        assert!(error.contains("layer 1") && error.contains("directions"), "{error}");
    }

    #[test]
    fn what_does_not_fit_is_a_typed_error_that_says_where() {
        let mut builder = HintBuilder::new(&small(), HIDDEN, RIDGE).unwrap();
        let (inputs, errors) = (vec![1.0; 2 * HIDDEN], vec![1.0; 2 * width()]);
        let layer = |error: MethodError| match error {
            MethodError::LayerCalibration { layer, .. } => layer,
            other => panic!("{other}"),
        };
        assert_eq!(layer(builder.observe(0, &inputs, &errors).unwrap_err()), 0);
        assert_eq!(layer(builder.observe(2, &inputs, &errors).unwrap_err()), 2);
        assert_eq!(layer(builder.observe(1, &inputs[1..], &errors).unwrap_err()), 1);
        assert_eq!(layer(builder.observe(1, &inputs, &errors[width()..]).unwrap_err()), 1);
        assert!(builder.solve(1).unwrap_err().to_string().contains("no token"));
        builder.observe(1, &[f32::NAN; HIDDEN], &errors[width()..]).unwrap();
        assert!(builder.solve(1).unwrap_err().to_string().contains("finite"));
        for ridge in [-1.0, f64::NAN, f64::INFINITY] {
            assert!(matches!(HintBuilder::new(&small(), HIDDEN, ridge), Err(MethodError::BadShape { .. })));
        }
        assert!(matches!(HintBuilder::new(&small(), 0, RIDGE), Err(MethodError::BadShape { .. })));
    }

    #[test]
    fn a_folded_correction_predicts_what_the_plain_matrix_misses() {
        let map = Rng::new(1).normal(width() * HIDDEN);
        let (inputs, errors) = rows(&map, 2);
        let mut builder = HintBuilder::new(&small(), HIDDEN, RIDGE).unwrap();
        builder.observe(1, &inputs, &errors).unwrap();
        let artifact = HintArtifact::new(&small(), HIDDEN, [builder.solve(1).unwrap().as_slice()]).unwrap();

        let weight = Rng::new(3).normal(width() * HIDDEN);
        let mut folded = weight.clone();
        artifact.fold(1, &mut folded);
        // Another text with the same truth.
        let (inputs, errors) = rows(&map, 4);
        let plain = matmul_t(&inputs, &weight, TOKENS, HIDDEN, width());
        let truth: Vec<f32> = plain.iter().zip(&errors).map(|(q, e)| q + e).collect();
        let hint = matmul_t(&inputs, &folded, TOKENS, HIDDEN, width());
        assert!(relative_error(&hint, &truth) < 0.2 * relative_error(&plain, &truth));
    }
}
