//! One linear layer.

use kvoyant_kernels::Kernels;
use kvoyant_kernels::packed::PackedMatrix;
use rayon::prelude::*;

use super::gemm::{Mat, Threads, product};
use super::packed;

/// Batches up to this size multiply with quantised weights, larger ones with f32. Speed would want more: `examples/linear_speed.rs`
/// has products in 4 and 8 bits ahead of f32 up to 32 rows and beyond. But batches are what methods are compared with, and rounding
/// activations to 8 bits makes of the last bit's difference a KL that can be as large as what is to be told apart: attention over the
/// same rows in two parts instead of one is such a difference.
const PACKED_MAX_BATCH: usize = 4;

/// Columns that one task transposes: a cache line of each row.
const TRANSPOSE_COLUMNS: usize = 16;

/// Which of its copies a layer multiplies with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Precision {
    /// f32: what a prefill does, where products are large and what they compute is kept.
    F32,
    /// Quantised weights for small batches, if there are any: what a decode step does, which waits for memory.
    Fast,
}

/// `y = x Wᵀ + b` with `W: [outputs, inputs]`.
pub struct Linear {
    outputs: usize,
    inputs: usize,
    /// Transposed, `[inputs, outputs]`: so the product reads it as it lies, without packing, which is what small batches live by.
    transposed: Vec<f32>,
    /// The same, quantised.
    packed: Option<PackedMatrix>,
    bias: Option<Vec<f32>>,
}

impl std::fmt::Debug for Linear {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Linear")
            .field("outputs", &self.outputs)
            .field("inputs", &self.inputs)
            .field("packed", &self.packed.as_ref().map(PackedMatrix::codes))
            .field("bias", &self.bias.is_some())
            .finish_non_exhaustive()
    }
}

impl Linear {
    /// Takes `weight: [outputs, inputs]`, and for small batches a quantised form of the same.
    ///
    /// # Panics
    /// When the lengths do not fit.
    pub fn new(
        weight: &[f32],
        bias: Option<Vec<f32>>,
        outputs: usize,
        inputs: usize,
        packed: Option<PackedMatrix>,
    ) -> Self {
        assert_eq!(weight.len(), outputs * inputs);
        assert!(bias.as_ref().is_none_or(|bias| bias.len() == outputs));
        assert!(packed.as_ref().is_none_or(|packed| (packed.rows(), packed.columns()) == (outputs, inputs)));
        Self { outputs, inputs, transposed: transpose(weight, inputs), packed, bias }
    }

    /// Values of one output row.
    pub fn outputs(&self) -> usize {
        self.outputs
    }

    /// Whether small batches use quantised weights.
    pub fn is_quantised(&self) -> bool {
        self.packed.is_some()
    }

    /// The quantised weights.
    pub(crate) fn packed_mut(&mut self) -> Option<&mut PackedMatrix> {
        self.packed.as_mut()
    }

    /// Values of one input row.
    pub fn inputs(&self) -> usize {
        self.inputs
    }

    /// A copy of the weights in f32, `[outputs, inputs]`.
    pub fn weight(&self) -> Vec<f32> {
        transpose(&self.transposed, self.outputs)
    }

    /// The bias, `[outputs]`.
    pub fn bias(&self) -> Option<&[f32]> {
        self.bias.as_deref()
    }

    /// `out[t] = W x[t] + b` for `rows` rows: `x` is `[rows][inputs]`, `out` `[rows][outputs]`.
    ///
    /// # Panics
    /// When the lengths do not fit.
    pub fn forward(&self, x: &[f32], rows: usize, out: &mut [f32], precision: Precision) {
        forward_all([(self, out)], x, rows, precision);
    }

    /// The product with quantised weights at any batch size, if there are any; to measure where that stops paying.
    ///
    /// # Panics
    /// When the lengths do not fit.
    pub fn forward_as_stored(&self, x: &[f32], rows: usize, out: &mut [f32]) {
        multiply([(self, out)], x, rows, true);
    }
}

/// Several layers of one input, so that threads meet once for all of them: `outs[i][t] = W_i x[t] + b_i`.
///
/// # Panics
/// When the lengths do not fit.
pub(crate) fn forward_all<const N: usize>(
    layers: [(&Linear, &mut [f32]); N],
    x: &[f32],
    rows: usize,
    precision: Precision,
) {
    multiply(layers, x, rows, precision == Precision::Fast && rows <= PACKED_MAX_BATCH);
}

fn multiply<const N: usize>(mut layers: [(&Linear, &mut [f32]); N], x: &[f32], rows: usize, quantised: bool) {
    let mut products = Vec::with_capacity(N);
    for (layer, out) in &mut layers {
        assert_eq!(x.len(), rows * layer.inputs);
        assert_eq!(out.len(), rows * layer.outputs);
        match &layer.packed {
            Some(packed) if quantised => products.push((packed, &mut **out)),
            _ => {
                let x = Mat::new(x, rows, layer.inputs, layer.inputs);
                let weight = Mat::new(&layer.transposed, layer.inputs, layer.outputs, layer.outputs);
                product(x, weight, 1.0, out, layer.outputs, Threads::All);
            }
        }
    }
    packed::products(products, x, rows);
    let kernels = Kernels::best();
    for (layer, out) in layers {
        if let Some(bias) = &layer.bias {
            out.chunks_exact_mut(layer.outputs).for_each(|row| kernels.add(row, bias));
        }
    }
}

/// The transpose of rows of `columns` values.
fn transpose(matrix: &[f32], columns: usize) -> Vec<f32> {
    let rows = matrix.len() / columns;
    let mut out = vec![0.0; matrix.len()];
    out.par_chunks_mut(TRANSPOSE_COLUMNS * rows).enumerate().for_each(|(task, out)| {
        let first = task * TRANSPOSE_COLUMNS;
        for (r, row) in matrix.chunks_exact(columns).enumerate() {
            let block = &row[first..columns.min(first + TRANSPOSE_COLUMNS)];
            block.iter().enumerate().for_each(|(c, value)| out[c * rows + r] = *value);
        }
    });
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use kvoyant_kernels::SplitMix64;

    #[test]
    fn quantised_weights_are_near_f32_and_large_batches_use_f32() {
        let (outputs, inputs) = (12, 96);
        let mut random = SplitMix64::new(7);
        let weight: Vec<f32> = (0..outputs * inputs).map(|_| random.normal()).collect();
        let bias: Vec<f32> = (0..outputs).map(|_| random.normal()).collect();
        let exact = Linear::new(&weight, Some(bias.clone()), outputs, inputs, None);
        let quantised =
            Linear::new(&weight, Some(bias), outputs, inputs, Some(PackedMatrix::quantise(&weight, inputs)));
        assert_eq!(exact.weight(), weight);
        for rows in [1, 3, PACKED_MAX_BATCH + 1] {
            let x: Vec<f32> = (0..rows * inputs).map(|_| random.normal()).collect();
            let (mut a, mut b) = (vec![0.0; rows * outputs], vec![0.0; rows * outputs]);
            exact.forward(&x, rows, &mut a, Precision::Fast);
            quantised.forward(&x, rows, &mut b, Precision::Fast);
            let worst = a.iter().zip(&b).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
            assert!(worst < 0.5, "{worst}");
            assert_eq!(worst == 0.0, rows > PACKED_MAX_BATCH);
            quantised.forward(&x, rows, &mut b, Precision::F32);
            assert_eq!(a, b);
        }
    }

    #[test]
    fn layers_of_one_input_get_what_each_gets_alone_whatever_the_number_of_threads() {
        let (outputs, inputs) = ([200, 40, 23], 64);
        let mut random = SplitMix64::new(8);
        let mut draw = |n: usize| -> Vec<f32> { (0..n).map(|_| random.normal()).collect() };
        let layers = outputs.map(|outputs| {
            let (weight, bias) = (draw(outputs * inputs), draw(outputs));
            let packed = Some(PackedMatrix::quantise(&weight, inputs));
            Linear::new(&weight, Some(bias), outputs, inputs, packed)
        });
        for rows in [1, 2, 3, PACKED_MAX_BATCH] {
            let x = draw(rows * inputs);
            let alone: Vec<Vec<f32>> = layers
                .iter()
                .map(|layer| {
                    let mut out = vec![0.0; rows * layer.outputs()];
                    layer.forward(&x, rows, &mut out, Precision::Fast);
                    out
                })
                .collect();
            for threads in [1, 2, 5] {
                let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
                let [mut a, mut b, mut c] = outputs.map(|outputs| vec![f32::NAN; rows * outputs]);
                let all = [(&layers[0], &mut a[..]), (&layers[1], &mut b[..]), (&layers[2], &mut c[..])];
                pool.install(|| forward_all(all, &x, rows, Precision::Fast));
                assert_eq!(alone, [a, b, c], "{rows} rows on {threads} threads");
            }
        }
    }
}
