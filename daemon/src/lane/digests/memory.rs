//! Memories: made with a sequence's digests, told of selections, attention rows and truncations; and the marks that methods
//! cut by.

use kvoyant_methods::{FeedbackRow, Truncated};
use kvoyant_protocol::memory::MemoryError;
use kvoyant_protocol::wire::SequenceId;

use super::{DigestSet, part};
use crate::lane::model::ModelState;
use crate::tiers::heap::Region;

impl ModelState {
    pub(super) fn new_memory(
        &mut self,
        method: usize,
        capacity: usize,
    ) -> Result<(Option<Region>, Option<Region>), MemoryError> {
        let heads = self.total_heads();
        let method = &self.methods[method];
        let needs = method.needs();
        let bytes = method.memory_bytes(capacity * self.shape.page_rows);
        let memory = needs.memory.then(|| self.meta.allocate(heads * bytes)).transpose()?;
        let dead = needs.drops_rows.then(|| self.meta.allocate(heads * capacity * 4)).transpose()?;
        Ok((memory, dead))
    }

    /// Tells a pool which rows have just been selected.
    pub(crate) fn note_selected(&mut self, id: SequenceId, layer: usize) {
        let (heads, total) = (self.shape.kv_heads, self.total_heads());
        let Ok(sequence) = self.sequence(id) else { return };
        let method = sequence.method;
        let Some(key) = self.methods[method].digest_key() else { return };
        let Some(set) = sequence.digests.iter().find(|set| set.serves(key, method)) else { return };
        let (Some(memory), Some(_)) = (set.memory, set.dead) else { return };
        for kv_head in 0..heads {
            let bytes = self.meta.get_mut(part(memory, layer * heads + kv_head, memory.len / total));
            self.methods[method].on_selected(self.buffers.selection.head(kv_head), bytes);
        }
    }

    /// Gives attention rows, `[KV head][blocks]` over the first `tokens` tokens, to the methods that learn from them.
    pub(crate) fn feedback(&mut self, id: SequenceId, layer: usize, tokens: usize, rows: &[f32], full: bool) {
        let (heads, total) = (self.shape.kv_heads, self.total_heads());
        let Ok(sequence) = self.sequence(id) else { return };
        let method = sequence.method;
        let Some(key) = self.methods[method].digest_key() else { return };
        let Some(set) = sequence.digests.iter().find(|set| set.serves(key, method)) else { return };
        let Some(memory) = set.memory else { return };
        for (kv_head, blocks) in rows.chunks_exact(rows.len() / heads).enumerate() {
            let bytes = self.meta.get_mut(part(memory, layer * heads + kv_head, memory.len / total));
            let row = FeedbackRow { layer, kv_head, tokens, blocks, full };
            self.methods[method].on_feedback(&row, bytes);
        }
    }

    /// Keeps marks of tokens from `first` on, which have room.
    pub(crate) fn mark(&mut self, id: SequenceId, first: usize, marks: &[u8]) -> Result<(), MemoryError> {
        let rows = self.shape.page_rows;
        let Ok(sequence) = self.sequence(id) else { return Ok(()) };
        let region = match sequence.marks {
            Some(region) => region,
            None => self.meta.allocate(sequence.capacity * rows)?,
        };
        self.meta.get_mut(region)[first..first + marks.len()].copy_from_slice(marks);
        if let Ok(sequence) = self.sequence_mut(id) {
            sequence.marks = Some(region);
        }
        Ok(())
    }

    /// Tells one layer's memories of a truncation; true where one of them has to be made anew, for which it is zeroed. The
    /// others stay: what they have learnt cannot be made from rows, and rows that come again they know already.
    pub(super) fn cut_memory(
        &mut self,
        set: &DigestSet,
        layer: usize,
        capacity: usize,
        tokens: usize,
    ) -> bool {
        let (heads, total) = (self.shape.kv_heads, self.total_heads());
        let Some(memory) = set.memory else { return false };
        let mut rebuild = false;
        for head in layer * heads..(layer + 1) * heads {
            let bytes = self.meta.get_mut(part(memory, head, memory.len / total));
            if self.methods[set.method].on_truncate(tokens, bytes) != Truncated::Rebuild {
                continue;
            }
            rebuild = true;
            bytes.fill(0);
            // A pool that is made anew drops its rows anew.
            if let Some(dead) = set.dead {
                self.meta.get_mut(part(dead, head, capacity * 4)).fill(0);
            }
        }
        rebuild
    }
}
