//! The offline part: an orthogonal matrix `A` per layer and KV head that packs queries into few columns.
//!
//! With the stacked queries of a KV head's group over a calibration text, `Q = U_q·Σ_q·V_qᵀ` (after RoPE for
//! models that have it), `A` is `V_q` with its columns in falling order of `σ_q,j·σ_k,j`, the products of the
//! singular values of Q and of the head's keys K (InfiniGen, OSDI'24, section 4.2; one matrix per *group* is
//! what keeps the identity under GQA). `A` is orthogonal, so `(QA)(KA)ᵀ = QKᵀ`.

use nalgebra::{DMatrix, SymmetricEigen};

use crate::error::MethodError;
use crate::infinigen::artifact::SkewArtifact;
use crate::shape::Shape;

/// The rows of some neighbouring heads in a layer's `[T][heads][d]`.
#[derive(Debug, Clone, Copy)]
pub struct HeadRows<'a> {
    values: &'a [f32],
    stride: usize,
    first: usize,
    width: usize,
    head_dim: usize,
}

impl<'a> HeadRows<'a> {
    /// The query heads of KV head `kv_head` in `queries`, `[T][Hq][d]`.
    ///
    /// # Panics
    /// Where `queries` is not a whole number of tokens, or there is no such head.
    #[must_use]
    pub fn queries(queries: &'a [f32], shape: &Shape, kv_head: usize) -> Self {
        Self::new(queries, shape.query_heads, kv_head * shape.group(), shape.group(), shape.head_dim)
    }

    /// KV head `kv_head` in `keys`, `[T][Hkv][d]`.
    ///
    /// # Panics
    /// As [`Self::queries`].
    #[must_use]
    pub fn keys(keys: &'a [f32], shape: &Shape, kv_head: usize) -> Self {
        Self::new(keys, shape.kv_heads, kv_head, 1, shape.head_dim)
    }

    fn new(values: &'a [f32], heads: usize, first: usize, count: usize, head_dim: usize) -> Self {
        assert!(first + count <= heads, "heads {first}..{} of {heads}", first + count);
        let stride = heads * head_dim;
        assert!(
            values.len().is_multiple_of(stride),
            "{} values are not [T][{heads}][{head_dim}]",
            values.len()
        );
        Self { values, stride, first: first * head_dim, width: count * head_dim, head_dim }
    }

    /// Every row `[d]`, token by token, within a token head by head.
    pub fn rows(&self) -> impl Iterator<Item = &'a [f32]> + use<'a> {
        let Self { first, width, head_dim, .. } = *self;
        self.values
            .chunks_exact(self.stride)
            .flat_map(move |token| token[first..first + width].chunks_exact(head_dim))
    }
}

/// Adds `Σ_rows |row · A|_j` to `sums` (`[d]`): prefill statistics of the partial index.
///
/// `a` is `[d][d]` row-major, or empty for the identity (`skew=off`). Call it with the queries of a KV head's
/// group, and for the index rule `both` with its keys too; chunks of a prompt add up.
///
/// # Panics
/// Where `sums` has not one value per column.
pub fn column_sums(a: &[f32], rows: &HeadRows<'_>, sums: &mut [f32]) {
    let d = rows.head_dim;
    assert_eq!(sums.len(), d, "one sum per column");
    if a.is_empty() {
        for row in rows.rows() {
            sums.iter_mut().zip(row).for_each(|(sum, value)| *sum += value.abs());
        }
        return;
    }
    let kernels = kvoyant_kernels::Kernels::best();
    let mut turned = vec![0.0; d];
    for row in rows.rows() {
        kernels.project(row, a, &mut turned);
        sums.iter_mut().zip(&turned).for_each(|(sum, value)| *sum += value.abs());
    }
}

/// Collects queries and keys of a calibration text and makes the artifact from them.
///
/// It keeps the Gram matrices `QᵀQ` and `KᵀK` (their eigenvectors are the right singular vectors of Q and K,
/// their eigenvalues the squares of the singular values), so the text may come in chunks of any length and its
/// memory does not grow with it: `2·d²` f64 per layer and KV head.
#[derive(Debug)]
pub struct SkewBuilder {
    shape: Shape,
    heads: Vec<Grams>,
}

#[derive(Debug, Clone)]
struct Grams {
    queries: Vec<f64>,
    keys: Vec<f64>,
    rows: usize,
}

impl SkewBuilder {
    /// For a model of that shape; its fingerprint goes into the artifact.
    ///
    /// # Errors
    /// A shape that is none.
    pub fn new(shape: &Shape) -> Result<Self, MethodError> {
        shape.check()?;
        let gram = vec![0.0; shape.head_dim * shape.head_dim];
        let head = Grams { queries: gram.clone(), keys: gram, rows: 0 };
        Ok(Self { shape: *shape, heads: vec![head; shape.layers * shape.kv_heads] })
    }

    /// Takes in a chunk of the text: `queries` is `[T][Hq][d]`, `keys` is `[T][Hkv][d]`, both after RoPE for
    /// models that have it.
    ///
    /// # Panics
    /// Where there is no such layer, or queries and keys are not of the same tokens.
    pub fn observe(&mut self, layer: usize, queries: &[f32], keys: &[f32]) {
        let shape = self.shape;
        assert_eq!(
            queries.len() * shape.kv_heads,
            keys.len() * shape.query_heads,
            "queries and keys are of different numbers of tokens"
        );
        let mut wide = vec![0.0; shape.head_dim];
        for kv_head in 0..shape.kv_heads {
            let head = &mut self.heads[layer * shape.kv_heads + kv_head];
            for row in HeadRows::queries(queries, &shape, kv_head).rows() {
                add_outer(row, &mut wide, &mut head.queries);
                head.rows += 1;
            }
            for row in HeadRows::keys(keys, &shape, kv_head).rows() {
                add_outer(row, &mut wide, &mut head.keys);
            }
        }
    }

    /// Makes the artifact.
    ///
    /// # Errors
    /// [`MethodError::Calibration`] where a layer saw no token or values that are not finite.
    pub fn finish(&self) -> Result<SkewArtifact, MethodError> {
        let d = self.shape.head_dim;
        let mut matrices = Vec::with_capacity(self.heads.len() * d * d);
        for (at, head) in self.heads.iter().enumerate() {
            let failed = |reason: &str| MethodError::Calibration {
                layer: at / self.shape.kv_heads,
                kv_head: at % self.shape.kv_heads,
                reason: reason.into(),
            };
            if head.rows == 0 {
                return Err(failed("it saw no token"));
            }
            if !head.queries.iter().chain(&head.keys).all(|value| value.is_finite()) {
                return Err(failed("a query or key is not finite"));
            }
            let (a, _) = skew(&head.queries, &head.keys, d)
                .ok_or_else(|| failed("the decomposition did not converge"))?;
            matrices.extend(a);
        }
        SkewArtifact::new(&self.shape, matrices)
    }
}

/// Adds `rowᵀ·row`, upper triangle only, to `gram` (`[d][d]`).
fn add_outer(row: &[f32], wide: &mut [f64], gram: &mut [f64]) {
    let d = row.len();
    wide.iter_mut().zip(row).for_each(|(wide, value)| *wide = f64::from(*value));
    for (i, &x) in wide.iter().enumerate() {
        gram[i * d + i..(i + 1) * d].iter_mut().zip(&wide[i..]).for_each(|(sum, y)| *sum += x * y);
    }
}

/// Right singular vectors (`[d]` each, in falling order of their values) and values of the matrix whose Gram
/// matrix has `upper` as its upper triangle.
fn right_singular(upper: &[f64], d: usize) -> Option<(Vec<Vec<f64>>, Vec<f64>)> {
    // Far more than the few dozen sweeps that a matrix of this size takes.
    const SWEEPS: usize = 100_000;
    let gram = DMatrix::from_fn(d, d, |i, j| upper[i.min(j) * d + i.max(j)]);
    let eigen = SymmetricEigen::try_new(gram, f64::EPSILON, SWEEPS)?;
    let mut order: Vec<usize> = (0..d).collect();
    order.sort_by(|&i, &j| eigen.eigenvalues[j].total_cmp(&eigen.eigenvalues[i]));
    let vectors = order.iter().map(|&j| eigen.eigenvectors.column(j).iter().copied().collect()).collect();
    // Rounding may leave the zero eigenvalues of a rank-deficient matrix a hair below zero.
    let values = order.iter().map(|&j| eigen.eigenvalues[j].max(0.0).sqrt()).collect();
    Some((vectors, values))
}

/// `A` (`[d][d]` row-major) and the products of singular values that order its columns.
fn skew(queries: &[f64], keys: &[f64], d: usize) -> Option<(Vec<f32>, Vec<f64>)> {
    let (vectors, of_queries) = right_singular(queries, d)?;
    let (_, of_keys) = right_singular(keys, d)?;
    let products: Vec<f64> = of_queries.iter().zip(&of_keys).map(|(q, k)| q * k).collect();
    let mut order: Vec<usize> = (0..d).collect();
    order.sort_by(|&i, &j| products[j].total_cmp(&products[i]));
    let mut a = vec![0.0; d * d];
    for (to, &from) in order.iter().enumerate() {
        vectors[from].iter().enumerate().for_each(|(i, value)| a[i * d + to] = *value as f32);
    }
    Some((a, order.iter().map(|&j| products[j]).collect()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::shape::tests::small;
    use crate::testing::{Rng, matmul, relative_error};
    use proptest::prelude::*;

    fn builder(shape: &Shape, queries: &[f32], keys: &[f32]) -> SkewBuilder {
        let mut builder = SkewBuilder::new(shape).unwrap();
        for layer in 0..shape.layers {
            builder.observe(layer, queries, keys);
        }
        builder
    }

    #[test]
    fn the_matrix_is_that_of_a_singular_value_decomposition_of_the_stacked_queries() {
        let shape = small();
        let (d, tokens) = (shape.head_dim, 50);
        let mut rng = Rng::new(1);
        // Columns of very different size, so that singular vectors are well apart.
        let mut queries = rng.normal(tokens * shape.query_heads * d);
        queries.iter_mut().enumerate().for_each(|(at, value)| *value *= 1.5_f32.powi((at % d) as i32));
        let keys = rng.normal(tokens * shape.kv_heads * d);
        let artifact = builder(&shape, &queries, &keys).finish().unwrap();
        for kv_head in 0..shape.kv_heads {
            let stacked: Vec<f64> = HeadRows::queries(&queries, &shape, kv_head)
                .rows()
                .flatten()
                .map(|value| f64::from(*value))
                .collect();
            let svd = DMatrix::from_row_slice(stacked.len() / d, d, &stacked).svd(false, true);
            let v_t = svd.v_t.unwrap();
            let a = artifact.matrix(0, kv_head);
            for column in 0..d {
                // nalgebra's singular values fall too; a vector's sign is free.
                let dot: f64 = (0..d).map(|i| v_t[(column, i)] * f64::from(a[i * d + column])).sum();
                assert!((dot.abs() - 1.0).abs() < 1e-4, "KV head {kv_head}, column {column}: {dot}");
            }
        }
    }

    #[test]
    fn the_first_columns_hold_most_of_the_queries_and_chunks_add_up() {
        let shape = small();
        let (d, tokens) = (shape.head_dim, 60);
        let mut rng = Rng::new(2);
        let queries = rng.normal(tokens * shape.query_heads * d);
        let keys = rng.normal(tokens * shape.kv_heads * d);
        let whole = builder(&shape, &queries, &keys).finish().unwrap();
        let mut chunked = SkewBuilder::new(&shape).unwrap();
        for layer in 0..shape.layers {
            for (queries, keys) in
                queries.chunks(7 * shape.query_heads * d).zip(keys.chunks(7 * shape.kv_heads * d))
            {
                chunked.observe(layer, queries, keys);
            }
        }
        assert_eq!(whole, chunked.finish().unwrap());

        let mut squares = vec![0.0_f64; d];
        for row in HeadRows::queries(&queries, &shape, 1).rows() {
            let turned = matmul(row, whole.matrix(0, 1), 1, d, d);
            squares.iter_mut().zip(turned).for_each(|(sum, value)| *sum += f64::from(value).powi(2));
        }
        assert!(squares.windows(2).all(|pair| pair[0] >= pair[1] * 0.9999), "{squares:?}");
    }

    #[test]
    fn calibration_without_tokens_or_with_bad_numbers_is_refused_and_says_where() {
        let shape = small();
        let mut builder = SkewBuilder::new(&shape).unwrap();
        let message = builder.finish().unwrap_err().to_string();
        assert!(message.contains("layer 0") && message.contains("no token"), "{message}");
        let queries = vec![1.0; shape.query_heads * shape.head_dim];
        let mut keys = vec![1.0; shape.kv_heads * shape.head_dim];
        builder.observe(0, &queries, &keys);
        *keys.last_mut().unwrap() = f32::NAN;
        builder.observe(1, &queries, &keys);
        let message = builder.finish().unwrap_err().to_string();
        assert!(message.contains("layer 1, KV head 1") && message.contains("finite"), "{message}");
    }

    #[test]
    fn column_sums_are_the_absolute_sums_of_the_turned_rows_and_add_up() {
        let shape = small();
        let d = shape.head_dim;
        let mut rng = Rng::new(3);
        let queries = rng.normal(5 * shape.query_heads * d);
        let a = rng.orthogonal(d);
        let mut sums = vec![1.0; d];
        column_sums(&a, &HeadRows::queries(&queries, &shape, 1), &mut sums);
        let mut expected = vec![1.0; d];
        for token in queries.chunks(shape.query_heads * d) {
            for head in 2..4 {
                let turned = matmul(&token[head * d..(head + 1) * d], &a, 1, d, d);
                expected.iter_mut().zip(turned).for_each(|(sum, value)| *sum += value.abs());
            }
        }
        assert!(relative_error(&sums, &expected) < 1e-5);

        let mut plain = vec![0.0; d];
        column_sums(&[], &HeadRows::keys(&[-1.0; 8], &Shape { kv_heads: 1, ..shape }, 0), &mut plain);
        assert_eq!(plain, [1.0; 8]);
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(24))]

        #[test]
        fn the_matrix_is_orthogonal_and_keeps_every_score(seed: u64, tokens in 1_usize..40) {
            let shape = small();
            let d = shape.head_dim;
            let mut rng = Rng::new(seed);
            let queries = rng.normal(tokens * shape.query_heads * d);
            let keys = rng.normal(tokens * shape.kv_heads * d);
            let artifact = builder(&shape, &queries, &keys).finish().unwrap();
            for kv_head in 0..shape.kv_heads {
                let a = artifact.matrix(1, kv_head);
                let q: Vec<f32> = HeadRows::queries(&queries, &shape, kv_head).rows().flatten().copied().collect();
                let k: Vec<f32> = HeadRows::keys(&keys, &shape, kv_head).rows().flatten().copied().collect();
                let (rows, cols) = (q.len() / d, k.len() / d);
                let scores = crate::testing::matmul_t(&q, &k, rows, d, cols);
                let turned = crate::testing::matmul_t(
                    &matmul(&q, a, rows, d, d), &matmul(&k, a, cols, d, d), rows, d, cols);
                prop_assert!(relative_error(&turned, &scores) < 1e-5);
                prop_assert!(crate::infinigen::artifact::orthogonality_error(a, d) < 1e-5);
            }
        }
    }
}
