//! Rows that are not digested yet. Whoever appends may append as many as a sequence holds, and a method may take its time over each: they are
//! digested in pieces, for a turn at a time, before anything else is done for their session. Those whose pages are on disk are when somebody
//! asks for them.

use std::collections::{HashSet, VecDeque};

use kvoyant_protocol::control::PageWord;
use kvoyant_protocol::memory::MemoryError;
use kvoyant_protocol::wire::SequenceId;

use crate::lane::model::ModelState;
use crate::lane::sequences::Sequence;

/// Sequences and layers with rows that are not digested yet, in the order in which they came, each once.
#[derive(Debug, Default)]
pub(crate) struct Behind {
    queue: VecDeque<(SequenceId, usize)>,
    all: HashSet<(SequenceId, usize)>,
}

impl Behind {
    fn add(&mut self, id: SequenceId, layer: usize) {
        if self.all.insert((id, layer)) {
            self.queue.push_back((id, layer));
        }
    }

    fn first(&self) -> Option<(SequenceId, usize)> {
        self.queue.front().copied()
    }

    fn done_with_first(&mut self) {
        if let Some(first) = self.queue.pop_front() {
            self.all.remove(&first);
        }
    }

    /// Whether there are none.
    pub(crate) fn is_empty(&self) -> bool {
        self.queue.is_empty()
    }

    /// Whether a layer of a sequence is among them: asked for each frame that is looked at.
    pub(crate) fn holds(&self, id: SequenceId, layer: usize) -> bool {
        self.all.contains(&(id, layer))
    }
}

impl ModelState {
    /// Rows of a layer are to be digested.
    pub(crate) fn falls_behind(&mut self, id: SequenceId, layer: usize) {
        let digests = self.sequence(id).is_ok_and(|sequence| !sequence.digests.is_empty());
        if digests && self.speculates(layer) {
            self.behind.add(id, layer);
        }
    }

    /// Digests rows that have fallen behind, until there are none, which it says, or `enough` says so.
    pub(crate) fn work_off(&mut self, enough: impl Fn() -> bool) -> Result<bool, MemoryError> {
        while let Some((id, layer)) = self.behind.first() {
            if !self.build_some(id, layer)? {
                self.behind.done_with_first();
                if let Some(state) = &mut self.spill {
                    state.changed();
                }
            }
            if !self.behind.is_empty() && enough() {
                return Ok(false);
            }
        }
        Ok(true)
    }

    fn build_some(&mut self, id: SequenceId, layer: usize) -> Result<bool, MemoryError> {
        let sets = self.sequence(id).map_or(0, |sequence| sequence.digests.len());
        for index in 0..sets {
            if self.build(id, index, layer)? {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// Digests all rows of a layer that can be now.
    pub(crate) fn build_layer(&mut self, id: SequenceId, layer: usize) -> Result<(), MemoryError> {
        while self.build_some(id, layer)? {}
        Ok(())
    }

    /// Tokens of `from..to` before the first of which a page of the layer is on disk.
    pub(super) fn in_memory_to(&self, sequence: &Sequence, layer: usize, from: usize, to: usize) -> usize {
        if self.spill.is_none() {
            return to;
        }
        let rows = self.shape.page_rows;
        let heads = layer * self.shape.kv_heads..(layer + 1) * self.shape.kv_heads;
        let away = |page: &usize| {
            heads.clone().any(|head| {
                let word = self.page_word(sequence.table, head * sequence.capacity + page);
                matches!(word, PageWord::Spilled | PageWord::Lost)
            })
        };
        let first = (from / rows..to.div_ceil(rows)).find(away);
        first.map_or(to, |page| (page * rows).max(from))
    }

    /// Whether rows of a layer wait to be digested for the sequence's method.
    pub(crate) fn is_behind(&self, id: SequenceId, layer: usize) -> bool {
        self.sequence(id).is_ok_and(|sequence| self.is_behind_for(id, sequence.method, layer))
    }

    /// The same for a method that may be another one's.
    pub(crate) fn is_behind_for(&self, id: SequenceId, method: usize, layer: usize) -> bool {
        let Ok(sequence) = self.sequence(id) else { return false };
        let Some(key) = self.methods[method].digest_key() else { return false };
        let Some(set) = sequence.digests.iter().find(|set| set.serves(key, method)) else { return false };
        let end = self.methods[set.method].needs().digestible(sequence.lens[layer] as usize);
        self.speculates(layer) && set.ready[layer] && (set.built[layer] as usize) < end
    }

    /// Digests rows of a layer that have come back from disk.
    pub(crate) fn catch_up(&mut self, id: SequenceId, layer: usize) -> Result<(), MemoryError> {
        if self.spill.is_some() && self.is_behind(id, layer) {
            return self.build_layer(id, layer);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_layer_waits_once_and_can_wait_again_when_it_is_done() {
        let id = |slot| SequenceId { slot, generation: 1 };
        let mut behind = Behind::default();
        for (slot, layer) in [(1, 0), (1, 1), (2, 0), (1, 0), (1, 1)] {
            behind.add(id(slot), layer);
        }
        assert!(behind.holds(id(1), 1) && !behind.holds(id(2), 1));
        let mut order = Vec::new();
        while let Some(first) = behind.first() {
            order.push((first.0.slot, first.1));
            behind.done_with_first();
        }
        assert_eq!(order, [(1, 0), (1, 1), (2, 0)]);
        assert!(behind.is_empty() && !behind.holds(id(1), 0));
        behind.add(id(1), 0);
        assert!(behind.holds(id(1), 0) && behind.first() == Some((id(1), 0)));
    }
}
