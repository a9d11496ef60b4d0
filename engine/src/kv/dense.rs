//! Plain attention over everything, in this process's own memory: the reference that all else is compared with.

use std::convert::Infallible;
use std::ops::Range;

use rayon::prelude::*;

use super::attend::attend_heads;
use super::rows::HeadRows;
use super::{KvBackend, KvShape};

/// The dense backend.
#[derive(Debug, Clone)]
pub struct DenseKv {
    shape: KvShape,
}

/// One sequence's K and V, kept by [`DenseKv`].
#[derive(Debug)]
pub struct DenseSequence {
    tokens: usize,
    /// `[layers][Hkv]`.
    heads: Vec<HeadRows>,
}

impl DenseKv {
    /// A backend for caches of a shape.
    ///
    /// # Panics
    /// Where [`KvShape::check`] refuses the shape.
    pub fn new(shape: KvShape) -> Self {
        assert!(shape.check().is_ok(), "there are no rows {}", shape.layout());
        Self { shape }
    }

    /// The shape that its sequences have.
    pub fn shape(&self) -> &KvShape {
        &self.shape
    }

    /// An empty sequence.
    pub fn sequence(&self) -> DenseSequence {
        DenseSequence { tokens: 0, heads: vec![HeadRows::default(); self.shape.layers * self.shape.kv_heads] }
    }

    /// A second sequence with the same tokens: the rows are shared, and either may grow on its own.
    pub fn fork(&self, sequence: &mut DenseSequence) -> DenseSequence {
        let heads = sequence.heads.iter_mut().map(HeadRows::fork).collect();
        DenseSequence { tokens: sequence.tokens, heads }
    }

    /// Drops the tokens at and after `tokens`.
    pub fn truncate(&self, sequence: &mut DenseSequence, tokens: usize) {
        sequence.tokens = sequence.tokens.min(tokens);
        let bytes = sequence.tokens * self.shape.row_bytes();
        sequence.heads.iter_mut().for_each(|head| head.truncate(bytes));
    }

    /// The stretches of memory that hold the rows of `tokens` of a head, in order, in the storage type.
    pub fn rows<'a>(
        &self,
        sequence: &'a DenseSequence,
        layer: usize,
        kv_head: usize,
        tokens: Range<usize>,
    ) -> Vec<&'a [u8]> {
        let bytes = self.shape.row_bytes();
        sequence.head(&self.shape, layer, kv_head).stretches(tokens.start * bytes..tokens.end * bytes)
    }

    /// Writes `k` and `v`, `[T][Hkv][d]`, at `start`.
    fn write(&self, layer: usize, sequence: &mut DenseSequence, start: usize, k: &[f32], v: &[f32]) {
        let KvShape { kv_heads, head_dim: d, .. } = self.shape;
        let (layout, row_bytes) = (self.shape.layout(), self.shape.row_bytes());
        let tokens = k.len() / (kv_heads * d);
        for (h, head) in sequence.heads[layer * kv_heads..(layer + 1) * kv_heads].iter_mut().enumerate() {
            head.truncate(start * row_bytes);
            debug_assert_eq!(head.bytes(), start * row_bytes, "rows follow one another");
            for (t, row) in head.grow(tokens * row_bytes).chunks_exact_mut(row_bytes).enumerate() {
                let at = (t * kv_heads + h) * d;
                layout.encode(&k[at..at + d], &v[at..at + d], row);
            }
        }
    }
}

impl DenseSequence {
    /// Tokens that are committed.
    pub fn tokens(&self) -> usize {
        self.tokens
    }

    fn head(&self, shape: &KvShape, layer: usize, kv_head: usize) -> &HeadRows {
        &self.heads[layer * shape.kv_heads + kv_head]
    }
}

impl KvBackend for DenseKv {
    type Sequence = DenseSequence;
    type Error = Infallible;

    fn shape(&self) -> &KvShape {
        &self.shape
    }

    fn tokens(&self, sequence: &DenseSequence) -> usize {
        sequence.tokens
    }

    fn store(
        &mut self,
        layer: usize,
        sequence: &mut DenseSequence,
        start: usize,
        k: &[f32],
        v: &[f32],
    ) -> Result<(), Infallible> {
        self.write(layer, sequence, start, k, v);
        Ok(())
    }

    fn read(
        &mut self,
        layer: usize,
        sequence: &DenseSequence,
        tokens: Range<usize>,
        k: &mut [f32],
        v: &mut [f32],
    ) -> Result<(), Infallible> {
        let (layout, row_bytes) = (self.shape.layout(), self.shape.row_bytes());
        let d = self.shape.head_dim;
        let head_values = tokens.len() * d;
        k.par_chunks_mut(head_values).zip(v.par_chunks_mut(head_values)).enumerate().for_each(
            |(h, (k, v))| {
                let mut at = 0;
                for stretch in self.rows(sequence, layer, h, tokens.clone()) {
                    let values = stretch.len() / row_bytes * d;
                    layout.decode_keys(stretch, &mut k[at..at + values]);
                    layout.decode_values(stretch, &mut v[at..at + values]);
                    at += values;
                }
            },
        );
        Ok(())
    }

    fn commit(&mut self, sequence: &mut DenseSequence, tokens: usize) -> Result<(), Infallible> {
        sequence.tokens = tokens;
        Ok(())
    }

    fn append(
        &mut self,
        layer: usize,
        batch: &mut [&mut DenseSequence],
        positions: &[usize],
        k: &[f32],
        v: &[f32],
    ) -> Result<(), Infallible> {
        let width = self.shape.kv_heads * self.shape.head_dim;
        for (i, sequence) in batch.iter_mut().enumerate() {
            let range = i * width..(i + 1) * width;
            self.write(layer, sequence, positions[i], &k[range.clone()], &v[range]);
        }
        Ok(())
    }

    fn attend(
        &mut self,
        layer: usize,
        batch: &mut [&mut DenseSequence],
        positions: &[usize],
        queries: &[f32],
        out: &mut [f32],
    ) -> Result<(), Infallible> {
        // Head by head, as `queries` and `out` are laid out.
        let kv_heads = self.shape.kv_heads;
        let heads = (0..batch.len()).flat_map(|i| (0..kv_heads).map(move |head| (i, head)));
        let rows: Vec<Vec<&[u8]>> = heads
            .map(|(i, head)| {
                let tokens = self.shape.first_visible(layer, positions[i])..positions[i] + 1;
                self.rows(batch[i], layer, head, tokens)
            })
            .collect();
        attend_heads(self.shape.layout(), self.shape.group(), queries, &rows, out);
        Ok(())
    }
}
