//! The calls of the decoder: with the daemon, and where it is lost over one, that one and all that follow without it.

use std::ops::Range;

use super::super::{KvBackend, KvShape};
use super::lease::SCARCE_CHUNK;
use super::{DaemonError, DaemonKv, DaemonSequence};

impl KvBackend for DaemonKv {
    type Sequence = DaemonSequence;
    type Error = DaemonError;

    fn shape(&self) -> &KvShape {
        &self.shape
    }

    fn tokens(&self, sequence: &DaemonSequence) -> usize {
        sequence.tokens()
    }

    fn store(
        &mut self,
        layer: usize,
        sequence: &mut DaemonSequence,
        start: usize,
        k: &[f32],
        v: &[f32],
    ) -> Result<(), DaemonError> {
        if self.is_served() {
            let stored = self.store_there(layer, sequence, start, k, v);
            if let Some(stored) = self.or_alone(stored) {
                return stored;
            }
        }
        self.store_alone(layer, sequence, start, k, v)
    }

    fn read(
        &mut self,
        layer: usize,
        sequence: &DaemonSequence,
        tokens: Range<usize>,
        k: &mut [f32],
        v: &mut [f32],
    ) -> Result<(), DaemonError> {
        if self.is_served() {
            let read = self.read_there(layer, sequence, tokens.clone(), k, v);
            if let Some(read) = self.or_alone(read) {
                return read;
            }
        }
        self.read_alone(layer, sequence, tokens, k, v)
    }

    fn observe_queries(
        &mut self,
        layer: usize,
        sequence: &mut DaemonSequence,
        start: usize,
        queries: &[f32],
    ) -> Result<(), DaemonError> {
        // Nobody is told of them any more.
        if self.is_served() { self.observe_queries_there(layer, sequence, start, queries) } else { Ok(()) }
    }

    fn chunk_tokens(&self, most: usize) -> usize {
        if self.model.is_scarce() { most.min(SCARCE_CHUNK) } else { most }
    }

    fn first_lost(&self, sequence: &DaemonSequence) -> Option<usize> {
        match sequence.own() {
            Some(own) => own.lost(),
            None if self.is_served() => sequence.inner().first_lost(),
            // What is on disk is lost with the daemon.
            None => self.own_of(sequence).lost(),
        }
    }

    fn forget_from(&mut self, sequence: &mut DaemonSequence, tokens: usize) -> Result<(), DaemonError> {
        // Answers that a failed step has left would hold up all that come.
        self.end_of_step();
        // What is read again is in its statistics once.
        self.cut(sequence, tokens)
    }

    fn wants_marks(&self) -> bool {
        self.is_served() && self.needs.iter().any(|needs| needs.marks)
    }

    fn mark_tokens(
        &mut self,
        sequence: &mut DaemonSequence,
        start: usize,
        marks: &[u8],
    ) -> Result<(), DaemonError> {
        let marked = self.mark_tokens_there(sequence, start, marks);
        self.or_alone(marked).unwrap_or(Ok(()))
    }

    fn attend_chunk(
        &mut self,
        layer: usize,
        sequence: &mut DaemonSequence,
        start: usize,
        queries: &[f32],
        out: &mut [f32],
    ) -> Result<bool, DaemonError> {
        if !self.is_served() {
            return Ok(false);
        }
        let attended = self.attend_selected(layer, sequence, start, queries, out);
        self.or_alone(attended).unwrap_or(Ok(false))
    }

    fn commit(&mut self, sequence: &mut DaemonSequence, tokens: usize) -> Result<(), DaemonError> {
        if self.is_served() {
            let committed = self.commit_there(sequence, tokens);
            if let Some(committed) = self.or_alone(committed) {
                return committed;
            }
        }
        sequence.set_tokens(tokens);
        Ok(())
    }

    fn begin_step(
        &mut self,
        batch: &mut [&mut DaemonSequence],
        positions: &[usize],
    ) -> Result<(), DaemonError> {
        self.stats.begin(batch.len(), positions);
        if self.is_served() {
            let begun = self.begin_step_there(batch, positions);
            if let Some(begun) = self.or_alone(begun) {
                return begun;
            }
        }
        self.begin_alone(batch)
    }

    fn wants_hint(&self, layer: usize) -> bool {
        self.is_served() && self.hinted && self.speculates(layer)
    }

    fn hint(
        &mut self,
        layer: usize,
        batch: &mut [&mut DaemonSequence],
        positions: &[usize],
        queries: &[f32],
    ) -> Result<(), DaemonError> {
        let hinted = self.hint_there(layer, batch, positions, queries);
        self.or_alone(hinted).unwrap_or(Ok(()))
    }

    fn append(
        &mut self,
        layer: usize,
        batch: &mut [&mut DaemonSequence],
        positions: &[usize],
        k: &[f32],
        v: &[f32],
    ) -> Result<(), DaemonError> {
        if self.is_served() {
            let appended = self.append_there(layer, batch, positions, k, v);
            if let Some(appended) = self.or_alone(appended) {
                return appended;
            }
        }
        self.append_alone(layer, batch, positions, k, v)
    }

    fn attend(
        &mut self,
        layer: usize,
        batch: &mut [&mut DaemonSequence],
        positions: &[usize],
        queries: &[f32],
        out: &mut [f32],
    ) -> Result<(), DaemonError> {
        if self.is_served() {
            let attended = self.attend_there(layer, batch, positions, queries, out);
            if let Some(attended) = self.or_alone(attended) {
                return attended;
            }
        }
        self.attend_alone(layer, batch, positions, queries, out)
    }

    fn end_step(&mut self, batch: &mut [&mut DaemonSequence]) -> Result<(), DaemonError> {
        if self.is_served() {
            let ended = self.end_step_there(batch);
            if let Some(ended) = self.or_alone(ended) {
                return ended;
            }
        }
        Ok(())
    }
}
