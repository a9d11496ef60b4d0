//! One linear layer.

use candle_core::quantized::k_quants::{BlockQ8_0, GgmlType};
use kvoyant_kernels::Kernels;
use rayon::prelude::*;

use super::gemm::{Mat, Threads, product};

/// Batches up to this size multiply with Q8_0, larger ones with f32. `examples/linear_speed.rs` on two EPYC cores, 1536 × 576: Q8_0 takes
/// half of f32's time for one row, as much for four, twice as much for sixteen (its products are computed row by row).
const Q8_MAX_BATCH: usize = 4;

/// Outputs that one task computes: some microseconds of work.
const TASK_OUTPUTS: usize = 64;

/// Columns that one task transposes: a cache line of each row.
const TRANSPOSE_COLUMNS: usize = 16;

/// Rows that one task quantises.
const QUANTISE_ROWS: usize = 256;

/// Which of its copies a layer multiplies with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Precision {
    /// f32: what a prefill does, where products are large and what they compute is kept.
    F32,
    /// Q8_0 for small batches, if there is Q8_0: what a decode step does, which waits for memory.
    Fast,
}

/// `y = x Wᵀ + b` with `W: [outputs, inputs]`.
pub struct Linear {
    outputs: usize,
    inputs: usize,
    /// Transposed, `[inputs, outputs]`: so the product reads it as it lies, without packing, which is what small batches live by.
    transposed: Vec<f32>,
    /// `weight` in blocks of 32 values with one scale, row by row.
    q8: Option<Vec<BlockQ8_0>>,
    bias: Option<Vec<f32>>,
}

impl std::fmt::Debug for Linear {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Linear")
            .field("outputs", &self.outputs)
            .field("inputs", &self.inputs)
            .field("q8_0", &self.q8.is_some())
            .field("bias", &self.bias.is_some())
            .finish_non_exhaustive()
    }
}

impl Linear {
    /// Takes `weight: [outputs, inputs]`. With `q8` it is requantised too, unless `inputs` is no multiple of a block.
    ///
    /// # Panics
    /// When the lengths do not fit.
    pub fn new(weight: &[f32], bias: Option<Vec<f32>>, outputs: usize, inputs: usize, q8: bool) -> Self {
        assert_eq!(weight.len(), outputs * inputs);
        assert!(bias.as_ref().is_none_or(|bias| bias.len() == outputs));
        let q8 = (q8 && inputs.is_multiple_of(BlockQ8_0::BLCK_SIZE)).then(|| quantise(weight, inputs));
        Self { outputs, inputs, transposed: transpose(weight, inputs), q8, bias }
    }

    /// Values of one output row.
    pub fn outputs(&self) -> usize {
        self.outputs
    }

    /// Whether small batches use Q8_0.
    pub fn is_quantised(&self) -> bool {
        self.q8.is_some()
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
        self.multiply(x, rows, out, precision == Precision::Fast && rows <= Q8_MAX_BATCH);
    }

    /// The product with Q8_0 at any batch size, if there is Q8_0; to measure where that stops paying.
    ///
    /// # Panics
    /// When the lengths do not fit.
    pub fn forward_as_stored(&self, x: &[f32], rows: usize, out: &mut [f32]) {
        self.multiply(x, rows, out, true);
    }

    fn multiply(&self, x: &[f32], rows: usize, out: &mut [f32], q8: bool) {
        assert_eq!(x.len(), rows * self.inputs);
        assert_eq!(out.len(), rows * self.outputs);
        match &self.q8 {
            Some(blocks) if q8 => {
                q8_product(x, rows, blocks, self.inputs, out);
            }
            _ => {
                let x = Mat::new(x, rows, self.inputs, self.inputs);
                let weight = Mat::new(&self.transposed, self.inputs, self.outputs, self.outputs);
                product(x, weight, 1.0, out, self.outputs, Threads::All);
            }
        }
        if let Some(bias) = &self.bias {
            let kernels = Kernels::best();
            out.chunks_exact_mut(self.outputs).for_each(|row| kernels.add(row, bias));
        }
    }
}

/// `out[t] = W x[t]` with `W` in blocks, row by row.
///
/// The dot products are candle's; the loop around them is not, because candle's own waits for a second thread at every product, and that
/// thread may have lost its core to the process that keeps the cache.
fn q8_product(x: &[f32], rows: usize, weight: &[BlockQ8_0], inputs: usize, out: &mut [f32]) {
    let row_blocks = inputs / BlockQ8_0::BLCK_SIZE;
    let mut x8 = vec![BlockQ8_0::zeros(); rows * row_blocks];
    BlockQ8_0::from_float(x, &mut x8);
    let dot = |output: usize, row: usize| {
        let weight = &weight[output * row_blocks..][..row_blocks];
        BlockQ8_0::vec_dot(inputs, weight, &x8[row * row_blocks..][..row_blocks])
    };
    if rows == 1 {
        out.par_chunks_mut(TASK_OUTPUTS).enumerate().for_each(|(task, out)| {
            out.iter_mut().enumerate().for_each(|(i, out)| *out = dot(task * TASK_OUTPUTS + i, 0));
        });
        return;
    }
    // A weight is read once for all rows, so results come by output first.
    let outputs = out.len() / rows;
    let mut by_output = vec![0.0; out.len()];
    by_output.par_chunks_mut(TASK_OUTPUTS * rows).enumerate().for_each(|(task, results)| {
        for (i, results) in results.chunks_exact_mut(rows).enumerate() {
            results.iter_mut().enumerate().for_each(|(row, out)| *out = dot(task * TASK_OUTPUTS + i, row));
        }
    });
    for (row, out) in out.chunks_exact_mut(outputs).enumerate() {
        out.iter_mut().zip(by_output.chunks_exact(rows)).for_each(|(out, results)| *out = results[row]);
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

/// Every row in blocks of 32.
fn quantise(weight: &[f32], inputs: usize) -> Vec<BlockQ8_0> {
    let mut blocks = vec![BlockQ8_0::zeros(); weight.len() / BlockQ8_0::BLCK_SIZE];
    let chunk = QUANTISE_ROWS * inputs;
    weight
        .par_chunks(chunk)
        .zip(blocks.par_chunks_mut(chunk / BlockQ8_0::BLCK_SIZE))
        .for_each(|(values, blocks)| BlockQ8_0::from_float(values, blocks));
    blocks
}

#[cfg(test)]
mod tests {
    use super::*;
    use kvoyant_kernels::SplitMix64;

    #[test]
    fn q8_0_is_near_f32_and_large_batches_use_f32() {
        let (outputs, inputs) = (12, 96);
        let mut random = SplitMix64::new(7);
        let weight: Vec<f32> = (0..outputs * inputs).map(|_| random.normal()).collect();
        let bias: Vec<f32> = (0..outputs).map(|_| random.normal()).collect();
        let exact = Linear::new(&weight, Some(bias.clone()), outputs, inputs, false);
        let quantised = Linear::new(&weight, Some(bias), outputs, inputs, true);
        assert_eq!(exact.weight(), weight);
        for rows in [1, 3, Q8_MAX_BATCH + 1] {
            let x: Vec<f32> = (0..rows * inputs).map(|_| random.normal()).collect();
            let (mut a, mut b) = (vec![0.0; rows * outputs], vec![0.0; rows * outputs]);
            exact.forward(&x, rows, &mut a, Precision::Fast);
            quantised.forward(&x, rows, &mut b, Precision::Fast);
            let worst = a.iter().zip(&b).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
            assert!(worst < 0.5, "{worst}");
            assert_eq!(worst == 0.0, rows > Q8_MAX_BATCH);
            quantised.forward(&x, rows, &mut b, Precision::F32);
            assert_eq!(a, b);
        }
    }

    #[test]
    fn a_width_that_is_no_multiple_of_a_block_stays_f32() {
        let linear = Linear::new(&[1.0; 2 * 20], None, 2, 20, true);
        assert!(!linear.is_quantised());
    }
}
