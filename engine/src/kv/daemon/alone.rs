//! Going on without the daemon, once it is dead or has been silent for the engine's deadline: every token attends to all rows, which this
//! process reads in the session's extents (they stay mapped, whoever made them) and, from where the daemon gave no more room, in memory of
//! its own. That is slower and never wrong. [`DaemonKv::alone`] and [`StepStats::fallbacks`](super::StepStats) say so.
//!
//! There is no way back: a daemon that wakes up finds a session that asks for nothing more, and keeps its extents until it ends.

use std::ops::Range;
use std::sync::Arc;

use rayon::prelude::*;

use super::attention::attend_alone;
use super::own::Own;
use super::{DaemonError, DaemonKv, DaemonSequence};

impl DaemonError {
    /// Whether the daemon is gone, or has not answered by the deadline. What the session's extents hold can still be read.
    #[must_use]
    pub fn is_daemon_lost(&self) -> bool {
        match self {
            Self::Client(error) => error.is_daemon_lost(),
            Self::Stuck { .. } => true,
            _ => false,
        }
    }
}

impl DaemonKv {
    /// Why the daemon is not asked any more, if it is not: it is dead, or was silent for as long as this engine waits.
    #[must_use]
    pub fn alone(&self) -> Option<&str> {
        self.alone.as_deref()
    }

    /// Whether calls are to be tried with the daemon.
    pub(super) fn is_served(&self) -> bool {
        self.alone.is_none()
    }

    /// What a call with the daemon came to: none where the daemon was lost over it, and the call is to be made again without.
    pub(super) fn or_alone<T>(&mut self, called: Result<T, DaemonError>) -> Option<Result<T, DaemonError>> {
        match called {
            Err(error) if error.is_daemon_lost() => {
                self.alone = Some(Arc::from(error.to_string()));
                self.still = None;
                self.pending.iter_mut().for_each(Vec::clear);
                self.chosen.iter_mut().for_each(Vec::clear);
                self.rows.clear();
                self.named.clear();
                None
            }
            called => Some(called),
        }
    }

    /// Gives up what a step that failed has left.
    pub(super) fn end_of_step(&mut self) {
        self.in_step = false;
        self.pending.iter_mut().for_each(Vec::clear);
    }

    /// What a sequence needs without the daemon.
    pub(super) fn own_of(&self, sequence: &DaemonSequence) -> Own {
        let page_rows = self.model.spills().then(|| self.model.page_rows());
        Own::of(sequence.inner(), &self.shape, sequence.tokens(), page_rows)
    }

    /// Gives it that.
    fn make_own(&self, sequence: &mut DaemonSequence) {
        if sequence.own().is_none() {
            let own = self.own_of(sequence);
            sequence.set_own(own);
        }
    }

    /// The same for each of a batch; refuses those with rows that have to be computed again first.
    pub(super) fn begin_alone(&self, batch: &mut [&mut DaemonSequence]) -> Result<(), DaemonError> {
        for sequence in batch {
            self.make_own(sequence);
            if let Some(token) = sequence.own().and_then(Own::lost) {
                return Err(kvoyant_client::Error::Lost { token }.into());
            }
        }
        Ok(())
    }

    /// Writes `k` and `v`, `[T][Hkv][d]`, of one sequence from `start` on.
    pub(super) fn store_alone(
        &self,
        layer: usize,
        sequence: &mut DaemonSequence,
        start: usize,
        k: &[f32],
        v: &[f32],
    ) -> Result<(), DaemonError> {
        self.make_own(sequence);
        let (kv_heads, d, row_bytes) = (self.shape.kv_heads, self.shape.head_dim, self.shape.row_bytes());
        let (layout, tokens) = (self.shape.layout(), k.len() / (kv_heads * d));
        let mut rows = vec![0; tokens * row_bytes];
        for head in 0..kv_heads {
            for (t, row) in rows.chunks_exact_mut(row_bytes).enumerate() {
                let at = (t * kv_heads + head) * d;
                layout.encode(&k[at..at + d], &v[at..at + d], row);
            }
            sequence.write_own((layer, head, kv_heads), start, &rows, row_bytes)?;
        }
        Ok(())
    }

    /// The new tokens' rows, `[batch][Hkv][d]`.
    pub(super) fn append_alone(
        &self,
        layer: usize,
        batch: &mut [&mut DaemonSequence],
        positions: &[usize],
        k: &[f32],
        v: &[f32],
    ) -> Result<(), DaemonError> {
        let width = self.shape.kv_heads * self.shape.head_dim;
        let rows = k.chunks_exact(width).zip(v.chunks_exact(width));
        for ((sequence, position), (k, v)) in batch.iter_mut().zip(positions).zip(rows) {
            self.store_alone(layer, sequence, *position, k, v)?;
        }
        Ok(())
    }

    /// See [`crate::KvBackend::read`].
    pub(super) fn read_alone(
        &self,
        layer: usize,
        sequence: &DaemonSequence,
        tokens: Range<usize>,
        k: &mut [f32],
        v: &mut [f32],
    ) -> Result<(), DaemonError> {
        let made;
        let own = match sequence.own() {
            Some(own) => own,
            None => {
                made = self.own_of(sequence);
                &made
            }
        };
        let (layout, row_bytes, kv_heads) =
            (self.shape.layout(), self.shape.row_bytes(), self.shape.kv_heads);
        let head_values = tokens.len() * self.shape.head_dim;
        k.par_chunks_mut(head_values).zip(v.par_chunks_mut(head_values)).enumerate().try_for_each(
            |(head, (k, v))| {
                let mut rows = vec![0; tokens.len() * row_bytes];
                let at = (layer, head, kv_heads);
                own.read(sequence.inner(), at, tokens.clone(), row_bytes, &mut rows)?;
                layout.decode_keys(&rows, k);
                layout.decode_values(&rows, v);
                Ok(())
            },
        )
    }

    /// Attention over all rows.
    pub(super) fn attend_alone(
        &mut self,
        layer: usize,
        batch: &mut [&mut DaemonSequence],
        positions: &[usize],
        queries: &[f32],
        out: &mut [f32],
    ) -> Result<(), DaemonError> {
        self.begin_alone(batch)?;
        let shared: Vec<_> = batch.iter().map(|sequence| &**sequence).collect();
        attend_alone(&self.pass(layer, false), &shared, positions, queries, out);
        self.stats.fallbacks.alone += batch.len() as u64;
        self.check_missed(layer, &shared)
    }

    /// Drops the tokens at and after `tokens`.
    pub(super) fn truncate_alone(&self, sequence: &mut DaemonSequence, tokens: usize) {
        self.make_own(sequence);
        sequence.truncate_own(tokens, self.shape.row_bytes());
    }
}
