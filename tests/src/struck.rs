//! A backend of the reference engine whose calls are announced, for tests that strike between them.

use std::ops::Range;

use kvoyant_engine::{DaemonError, DaemonKv, DaemonSequence, KvBackend, KvShape};

/// The daemon's backend, and what is done before each of its calls.
pub struct Struck {
    /// The backend.
    pub kv: DaemonKv,
    /// Gets the name of each call before it is made.
    pub before: Box<dyn FnMut(&'static str) + Send>,
}

impl std::fmt::Debug for Struck {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Struck").field("kv", &self.kv).finish_non_exhaustive()
    }
}

type Called<T> = Result<T, DaemonError>;

impl KvBackend for Struck {
    type Sequence = DaemonSequence;
    type Error = DaemonError;

    fn shape(&self) -> &KvShape {
        self.kv.shape()
    }

    fn tokens(&self, sequence: &DaemonSequence) -> usize {
        self.kv.tokens(sequence)
    }

    fn store(
        &mut self,
        layer: usize,
        sequence: &mut DaemonSequence,
        start: usize,
        k: &[f32],
        v: &[f32],
    ) -> Called<()> {
        (self.before)("store");
        self.kv.store(layer, sequence, start, k, v)
    }

    fn read(
        &mut self,
        layer: usize,
        sequence: &DaemonSequence,
        tokens: Range<usize>,
        k: &mut [f32],
        v: &mut [f32],
    ) -> Called<()> {
        (self.before)("read");
        self.kv.read(layer, sequence, tokens, k, v)
    }

    fn observe_queries(
        &mut self,
        layer: usize,
        sequence: &mut DaemonSequence,
        start: usize,
        queries: &[f32],
    ) -> Called<()> {
        (self.before)("observe");
        self.kv.observe_queries(layer, sequence, start, queries)
    }

    fn chunk_tokens(&self, most: usize) -> usize {
        self.kv.chunk_tokens(most)
    }

    fn first_lost(&self, sequence: &DaemonSequence) -> Option<usize> {
        self.kv.first_lost(sequence)
    }

    fn forget_from(&mut self, sequence: &mut DaemonSequence, tokens: usize) -> Called<()> {
        self.kv.forget_from(sequence, tokens)
    }

    fn wants_marks(&self) -> bool {
        self.kv.wants_marks()
    }

    fn mark_tokens(&mut self, sequence: &mut DaemonSequence, start: usize, marks: &[u8]) -> Called<()> {
        (self.before)("mark");
        self.kv.mark_tokens(sequence, start, marks)
    }

    fn attend_chunk(
        &mut self,
        layer: usize,
        sequence: &mut DaemonSequence,
        start: usize,
        queries: &[f32],
        out: &mut [f32],
    ) -> Called<bool> {
        self.kv.attend_chunk(layer, sequence, start, queries, out)
    }

    fn commit(&mut self, sequence: &mut DaemonSequence, tokens: usize) -> Called<()> {
        (self.before)("commit");
        self.kv.commit(sequence, tokens)
    }

    fn begin_step(&mut self, batch: &mut [&mut DaemonSequence], positions: &[usize]) -> Called<()> {
        (self.before)("begin");
        self.kv.begin_step(batch, positions)
    }

    fn wants_hint(&self, layer: usize) -> bool {
        self.kv.wants_hint(layer)
    }

    fn hint(
        &mut self,
        layer: usize,
        batch: &mut [&mut DaemonSequence],
        positions: &[usize],
        queries: &[f32],
    ) -> Called<()> {
        (self.before)("hint");
        self.kv.hint(layer, batch, positions, queries)
    }

    fn append(
        &mut self,
        layer: usize,
        batch: &mut [&mut DaemonSequence],
        positions: &[usize],
        k: &[f32],
        v: &[f32],
    ) -> Called<()> {
        (self.before)("append");
        self.kv.append(layer, batch, positions, k, v)
    }

    fn attend(
        &mut self,
        layer: usize,
        batch: &mut [&mut DaemonSequence],
        positions: &[usize],
        queries: &[f32],
        out: &mut [f32],
    ) -> Called<()> {
        (self.before)("attend");
        self.kv.attend(layer, batch, positions, queries, out)
    }

    fn end_step(&mut self, batch: &mut [&mut DaemonSequence]) -> Called<()> {
        (self.before)("end");
        self.kv.end_step(batch)
    }
}
