//! Dense attention that shows what passes: for captures, and for calibrating what methods learn offline.

use std::convert::Infallible;
use std::ops::Range;

use super::{DenseKv, DenseSequence, KvBackend, KvShape};

/// Looks on. Shapes are those of [`KvBackend`]; queries and keys are after RoPE.
pub trait Observe: Send {
    /// A prompt's tokens from `start` on in one layer: `queries` is `[T][Hq][d]`, `keys` and `values` are `[T][Hkv][d]`.
    fn prompt(&mut self, layer: usize, start: usize, queries: &[f32], keys: &[f32], values: &[f32]) {
        let _ = (layer, start, queries, keys, values);
    }

    /// Whether [`hint`](Self::hint) is wanted.
    fn wants_hints(&self) -> bool {
        false
    }

    /// A decode step's queries of a layer, `[batch][Hq][d]`, as predicted one layer ahead. Layer 0 has none.
    fn hint(&mut self, layer: usize, positions: &[usize], queries: &[f32]) {
        let _ = (layer, positions, queries);
    }

    /// A decode step's true queries of a layer, `[batch][Hq][d]`.
    fn step(&mut self, layer: usize, positions: &[usize], queries: &[f32]) {
        let _ = (layer, positions, queries);
    }
}

/// [`DenseKv`], and somebody who looks on.
#[derive(Debug)]
pub struct Observed<O> {
    dense: DenseKv,
    /// The chunk's rows of the layer that is under way.
    keys: Vec<f32>,
    values: Vec<f32>,
    /// Who looks on.
    pub observer: O,
}

impl<O: Observe> Observed<O> {
    /// Shows `observer` what passes through `dense`.
    pub fn new(dense: DenseKv, observer: O) -> Self {
        Self { dense, keys: Vec::new(), values: Vec::new(), observer }
    }

    /// The backend that it is.
    pub fn dense(&self) -> &DenseKv {
        &self.dense
    }
}

impl<O: Observe> KvBackend for Observed<O> {
    type Sequence = DenseSequence;
    type Error = Infallible;

    fn shape(&self) -> &KvShape {
        self.dense.shape()
    }

    fn tokens(&self, sequence: &DenseSequence) -> usize {
        sequence.tokens()
    }

    fn store(
        &mut self,
        layer: usize,
        sequence: &mut DenseSequence,
        start: usize,
        k: &[f32],
        v: &[f32],
    ) -> Result<(), Infallible> {
        for (kept, new) in [(&mut self.keys, k), (&mut self.values, v)] {
            kept.clear();
            kept.extend_from_slice(new);
        }
        self.dense.store(layer, sequence, start, k, v)
    }

    fn read(
        &mut self,
        layer: usize,
        sequence: &DenseSequence,
        tokens: Range<usize>,
        k: &mut [f32],
        v: &mut [f32],
    ) -> Result<(), Infallible> {
        self.dense.read(layer, sequence, tokens, k, v)
    }

    fn observe_queries(
        &mut self,
        layer: usize,
        _sequence: &mut DenseSequence,
        start: usize,
        queries: &[f32],
    ) -> Result<(), Infallible> {
        self.observer.prompt(layer, start, queries, &self.keys, &self.values);
        Ok(())
    }

    fn commit(&mut self, sequence: &mut DenseSequence, tokens: usize) -> Result<(), Infallible> {
        self.dense.commit(sequence, tokens)
    }

    fn wants_hint(&self, _layer: usize) -> bool {
        self.observer.wants_hints()
    }

    fn hint(
        &mut self,
        layer: usize,
        _batch: &mut [&mut DenseSequence],
        positions: &[usize],
        queries: &[f32],
    ) -> Result<(), Infallible> {
        self.observer.hint(layer, positions, queries);
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
        self.dense.append(layer, batch, positions, k, v)
    }

    fn attend(
        &mut self,
        layer: usize,
        batch: &mut [&mut DenseSequence],
        positions: &[usize],
        queries: &[f32],
        out: &mut [f32],
    ) -> Result<(), Infallible> {
        self.observer.step(layer, positions, queries);
        self.dense.attend(layer, batch, positions, queries, out)
    }
}
