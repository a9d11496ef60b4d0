//! What has to be in memory before a request can be done at all: rows that the lane itself reads.

use kvoyant_protocol::control::{PageWord, SelectedBy, ToDaemon};
use kvoyant_protocol::wire::{BatchEntry, HeadEntry, Operation, SequenceId, Status};

use crate::lane::model::ModelState;
use crate::lane::select::Answer;

/// Whether a request can be done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Before {
    /// Now.
    Ready,
    /// Once operations that are under way have ended.
    Later,
    /// Once rows that have fallen behind are digested.
    Again,
}

impl ModelState {
    /// Has everything brought back that the lane reads for a request of the rings.
    pub(crate) fn before_request(&mut self, operation: &Operation, batch: &[BatchEntry]) -> Before {
        let Some(state) = &mut self.spill else { return Before::Ready };
        state.held.clear();
        let layer = match operation {
            Operation::Speculate(speculate) if !speculate.fetch => usize::from(speculate.layer),
            Operation::Observe(observe) => usize::from(observe.layer),
            _ => return Before::Ready,
        };
        if layer >= self.shape.layers {
            return Before::Ready;
        }
        let observes = matches!(operation, Operation::Observe(_));
        let mut before = Before::Ready;
        for id in batch.iter().map(|entry| entry.sequence) {
            let reads = if observes { self.observes(id) } else { self.reads_rows(id, layer) };
            if !reads {
                continue;
            }
            if let Some(state) = &mut self.spill {
                state.held.push((id, layer));
            }
            // What cannot come back now is for the request itself to refuse.
            if self.bring_layer(id, layer, 0..usize::MAX) == Ok(Before::Later) {
                before = Before::Later;
            }
        }
        before
    }

    /// A request is done: pages may leave again.
    pub(crate) fn after_request(&mut self) {
        if let Some(state) = &mut self.spill {
            state.held.clear();
        }
    }

    fn observes(&self, id: SequenceId) -> bool {
        self.sequence(id).is_ok_and(|sequence| !sequence.digests.is_empty())
    }

    /// Whether a speculation reads rows of this layer on the lane: its method looks at them, or attends to them, or they have yet to
    /// be digested.
    fn reads_rows(&self, id: SequenceId, layer: usize) -> bool {
        let Ok(sequence) = self.sequence(id) else { return false };
        let needs = self.methods[sequence.method].needs();
        needs.rows || needs.cpu_attention.is_some() || self.is_behind(id, layer)
    }

    /// Whether a speculation cannot be done because rows are not there that the lane reads.
    pub(crate) fn misses_rows(&self, id: SequenceId, layer: usize) -> Option<Status> {
        self.spill.as_ref()?;
        if !self.reads_rows(id, layer) {
            return None;
        }
        let sequence = self.sequence(id).ok()?;
        let pages = (sequence.lens[layer] as usize).div_ceil(self.shape.page_rows);
        let first = layer * self.shape.kv_heads;
        let word = |head: usize, page: usize| self.page_word(sequence.table, head * sequence.capacity + page);
        let words = (first..first + self.shape.kv_heads)
            .flat_map(|head| (0..pages.min(sequence.capacity)).map(move |page| word(head, page)));
        words.fold(None, |found, word| match word {
            PageWord::Lost => Some(Status::RowsLost),
            PageWord::Spilled => found.or(Some(Status::HostFull)),
            PageWord::Page(_) | PageWord::None => found,
        })
    }

    /// Reads what is on disk of a layer's pages.
    pub(crate) fn bring_layer(
        &mut self,
        id: SequenceId,
        layer: usize,
        pages: std::ops::Range<usize>,
    ) -> Result<Before, Status> {
        let mut answer = Answer::default();
        match self.fetch_layer(id, layer, pages, &mut answer) {
            Ok(()) if answer.reads.is_empty() => Ok(Before::Ready),
            Ok(()) => Ok(Before::Later),
            // What is being written or read may make room.
            Err(Status::HostFull)
                if self.spill.as_ref().is_some_and(|state| state.is_busy() || state.awaits_cover()) =>
            {
                Ok(Before::Later)
            }
            Err(status) => Err(status),
        }
    }

    /// Pages of a layer, all heads together, of a sequence's first tokens.
    pub(crate) fn pages_of(&self, id: SequenceId, layer: usize, tokens: usize) -> usize {
        let Ok(sequence) = self.sequence(id) else { return 0 };
        let tokens = tokens.min(sequence.lens.get(layer).copied().unwrap_or(0) as usize);
        tokens.div_ceil(self.shape.page_rows) * self.shape.kv_heads
    }

    /// Brings all of a layer's pages of a member's first tokens back, for its client to read. It names no rows.
    pub(crate) fn fetch(
        &mut self,
        layer: usize,
        entry: &BatchEntry,
        ticket: u64,
        answer: &mut Answer,
    ) -> Result<(), Status> {
        let id = entry.sequence;
        let pages = 0..(entry.position as usize).div_ceil(self.shape.page_rows);
        if let Some(state) = &mut self.spill {
            state.held.push((id, layer));
        }
        self.fetch_layer(id, layer, pages, answer)?;
        self.sequence_mut(id).map_err(|_| Status::NoSuchSequence)?.residency[layer].last_ticket = ticket;
        let nothing = HeadEntry { first_run: answer.runs.len() as u32, runs: 0, rows: 0, resident: 0 };
        answer.heads.extend(std::iter::repeat_n(nothing, self.shape.kv_heads));
        Ok(())
    }

    /// Names a layer's pages of these indices to an answer, so that it waits for those on disk.
    pub(crate) fn fetch_layer(
        &mut self,
        id: SequenceId,
        layer: usize,
        pages: std::ops::Range<usize>,
        answer: &mut Answer,
    ) -> Result<(), Status> {
        let sequence = self.sequence(id).map_err(|_| Status::NoSuchSequence)?;
        let end = (sequence.lens[layer] as usize).div_ceil(self.shape.page_rows).min(sequence.capacity);
        for head in layer * self.shape.kv_heads..(layer + 1) * self.shape.kv_heads {
            for page in pages.start..pages.end.min(end) {
                self.page_for(id, (head, page), answer)?;
            }
        }
        Ok(())
    }

    /// Has everything brought back, and as much room made, as a control request needs.
    pub(crate) fn before_control(&mut self, message: &ToDaemon) -> Before {
        match message {
            ToDaemon::Fork { parent, method, by } => self.before_fork(*parent, *method, *by),
            _ if self.spill.is_none() => Before::Ready,
            ToDaemon::Truncate { sequence, tokens } => self.before_truncation(*sequence, *tokens as usize),
            ToDaemon::Open { .. } | ToDaemon::Reserve { .. } => match self.pages_for(message) {
                Ok(pages) if !self.make_frames(pages) => Before::Later,
                _ => Before::Ready,
            },
            _ => Before::Ready,
        }
    }

    /// The parent gets the digests that the fork will need, layer by layer, so that its other forks find them made.
    fn before_fork(&mut self, parent: SequenceId, method: Option<u16>, by: SelectedBy) -> Before {
        let Ok(sequence) = self.sequence(parent) else { return Before::Ready };
        let capacity = sequence.capacity;
        let method = match method {
            Some(method) => self.method_index(method),
            None => Ok(sequence.method),
        };
        // What cannot be is for the fork itself to refuse.
        let method = method.ok().filter(|method| self.check_fork(parent, *method, by).is_ok());
        let Some(method) = method.and_then(|method| self.digested_here(method, by)) else {
            return Before::Ready;
        };
        if !self.has_digests(parent, method) {
            let room = self.check_tables(self.tables_of([method], capacity));
            if room.is_err() || self.ensure_digests(parent, method).is_err() {
                return Before::Ready;
            }
        }
        if !self.behind.is_empty() {
            return Before::Again;
        }
        if self.spill.is_none() {
            return Before::Ready;
        }
        for layer in 0..self.shape.layers {
            if !self.is_behind_for(parent, method, layer) {
                continue;
            }
            if let Some(state) = &mut self.spill {
                state.kept = Some((parent, layer..layer + 1));
            }
            if self.bring_layer(parent, layer, 0..usize::MAX) == Ok(Before::Later) {
                return Before::Later;
            }
            if self.build_layer(parent, layer).is_err() {
                break;
            }
        }
        if let Some(state) = &mut self.spill {
            state.kept = None;
        }
        Before::Ready
    }

    /// The window before the cut, and the page that is cut, are read and written by the client from then on.
    fn before_truncation(&mut self, id: SequenceId, tokens: usize) -> Before {
        let rows = self.shape.page_rows;
        if self.sequence(id).is_err() {
            return Before::Ready;
        }
        let layers = self.shape.layers;
        if let Some(state) = &mut self.spill {
            state.kept = Some((id, 0..layers));
        }
        let first = tokens.saturating_sub(self.shape.window + rows) / rows;
        let mut before = Before::Ready;
        for layer in 0..self.shape.layers {
            if self.bring_layer(id, layer, first..tokens.div_ceil(rows)) == Ok(Before::Later) {
                before = Before::Later;
            }
        }
        if before == Before::Ready
            && let Some(state) = &mut self.spill
        {
            state.kept = None;
        }
        before
    }

    /// The first token of the window before a cut of which some head's rows are not in memory, and whether they are lost.
    pub(crate) fn first_away(&self, id: SequenceId, tokens: usize) -> Option<(usize, PageWord)> {
        let rows = self.shape.page_rows;
        let sequence = self.sequence(id).ok()?;
        self.spill.as_ref()?;
        let first = tokens.saturating_sub(self.shape.window + rows) / rows;
        let word = |page: usize, head: usize| self.page_word(sequence.table, head * sequence.capacity + page);
        (first..tokens.div_ceil(rows).min(sequence.capacity))
            .flat_map(|page| (0..self.heads()).map(move |head| (page * rows, word(page, head))))
            .find(|(_, word)| matches!(word, PageWord::Spilled | PageWord::Lost))
    }
}
