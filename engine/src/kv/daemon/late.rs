//! Answers that are late, where the engine chose not to wait for them: what is attended instead, and what is said of it.

use std::ops::Range;
use std::time::{Duration, Instant};

use kvoyant_client::{Answer, Error, Fallback};

use super::ask::Waiting;
use super::attention::Named;
use super::{DaemonError, DaemonKv, DaemonSequence};

/// Of members of a batch, the rows of each KV head.
pub(super) type NamedRows = Vec<(usize, Vec<Vec<Range<usize>>>)>;

impl DaemonKv {
    /// An answer is late. A daemon that has been silent for the engine's deadline is lost.
    pub(super) fn late(&mut self, waited: Duration) -> Result<(), DaemonError> {
        self.stats.wait += waited;
        let since = *self.silent.get_or_insert_with(|| Instant::now() - waited);
        let waited = since.elapsed();
        if waited >= self.options.deadline {
            return Err(Error::Deadline { ticket: 0, waited }.into());
        }
        self.last_late = Some(Instant::now());
        Ok(())
    }

    /// A step or a chunk begins. Between two of them nobody is asked, and so nobody is silent.
    pub(super) fn asks_again(&mut self) {
        if let (Some(silent), Some(last)) = (&mut self.silent, self.last_late.take()) {
            *silent += last.elapsed();
        }
    }

    /// Leaves it at none where there was no ticket to ask with, because answers that are late hold all of them.
    pub(super) fn unless_all_late<T>(
        &mut self,
        asked: Result<T, DaemonError>,
    ) -> Result<Option<T>, DaemonError> {
        match asked {
            Err(DaemonError::Client(Error::TooManyInFlight { .. }))
                if self.options.fallback != Fallback::Wait =>
            {
                self.late(Duration::ZERO).map(|()| None)
            }
            asked => asked.map(Some),
        }
    }

    /// Whether an answer that is not waited for on this thread is late.
    pub(super) fn is_late(&mut self, asked: &Waiting) -> Result<bool, DaemonError> {
        match asked {
            Waiting::Nobody => Ok(true),
            // A stream that waits cannot be called back.
            Waiting::Stream(pending) if self.options.fallback != Fallback::Wait => {
                match pending.completion(self.options.late_after) {
                    Ok(_) => {
                        self.silent = None;
                        Ok(false)
                    }
                    Err(Error::Deadline { waited, .. }) => {
                        self.suspect()?;
                        self.late(waited).map(|()| true)
                    }
                    Err(error) => Err(error.into()),
                }
            }
            Waiting::Stream(_) | Waiting::Host(_) => Ok(false),
        }
    }

    /// Keeps the rows of a layer's answer to `members` of the batch, to stand in for one that is late.
    pub(super) fn keep_named_rows(&mut self, layer: usize, answer: &Answer, members: &[usize]) {
        if self.options.fallback == Fallback::Partial && self.speculates(layer) {
            for (at, &member) in members.iter().enumerate() {
                let named = (0..self.shape.kv_heads).map(|head| answer.tokens_of(at, head)).collect();
                self.named.push((member, named));
            }
        }
    }

    /// Attends to what is there of a layer whose answer is late; `queries` and `out` are `[members][Hq][d]`.
    pub(super) fn attend_late(
        &mut self,
        layer: usize,
        batch: &[&DaemonSequence],
        positions: &[usize],
        queries: &[f32],
        out: &mut [f32],
    ) {
        let partial = self.options.fallback == Fallback::Partial;
        let (kv_heads, group) = (self.shape.kv_heads, self.shape.group());
        let values = group * self.shape.head_dim;
        let pass = self.pass(layer, true);
        let mut lse = vec![0.0; group];
        let mut left_out = 0;
        let heads = queries.chunks_exact(values).zip(out.chunks_exact_mut(values));
        for (task, (queries, out)) in heads.enumerate() {
            let (sequence, position, head) =
                (batch[task / kv_heads], positions[task / kv_heads], task % kv_heads);
            let [before, behind] = pass.local(position);
            let candidates = before.end..behind.start.max(before.end);
            let named = sequence.named(layer).get(head).filter(|_| partial);
            // The window has moved on since, and what it has left is no row of the answer.
            let named: Vec<Range<usize>> = named
                .into_iter()
                .flatten()
                .map(|rows| rows.start.max(candidates.start)..rows.end.min(candidates.end))
                .filter(|rows| !rows.is_empty())
                .collect();
            left_out += candidates.len() - named.iter().map(ExactSizeIterator::len).sum::<usize>();
            let rows = std::iter::once(before).chain(named).chain([behind]);
            pass.attend_own(sequence, head, rows, queries, (out, &mut lse));
        }
        // Rows on disk are left out like all others that are not there.
        for sequence in batch {
            let _ = sequence.inner().take_missed();
        }
        let fallbacks = &mut self.stats.fallbacks;
        *(if partial { &mut fallbacks.partial } else { &mut fallbacks.resident_only }) += batch.len() as u64;
        fallbacks.rows_left_out += left_out as u64;
    }
}
