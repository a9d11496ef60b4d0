//! A part's view of what is kept: as long as it asked for.

use super::Mix;
use crate::method::Method;
use crate::store::Store;

/// The store of a mix, as one part sees it.
pub(super) struct PartStore<'a> {
    pub(super) mix: &'a Mix,
    pub(super) part: &'a dyn Method,
    pub(super) inner: &'a mut dyn Store,
}

impl Store for PartStore<'_> {
    fn page(&self, kv_head: usize, page: usize) -> &[u8] {
        &self.inner.page(kv_head, page)[..self.part.digest_bytes()]
    }

    fn stretch(&self, kv_head: usize, first: usize, most: usize) -> &[u8] {
        // Blocks lie one behind the other only where none is longer than this part's.
        if self.part.digest_bytes() == self.mix.digest_bytes {
            self.inner.stretch(kv_head, first, most)
        } else {
            self.page(kv_head, first)
        }
    }

    fn state(&self, kv_head: usize) -> &[u8] {
        &self.inner.state(kv_head)[..self.part.head_state_bytes()]
    }

    fn memory(&self, kv_head: usize) -> &[u8] {
        let memory = self.inner.memory(kv_head);
        &memory[self.mix.place(self.part, memory.len())]
    }

    fn memory_mut(&mut self, kv_head: usize) -> &mut [u8] {
        let memory = self.inner.memory_mut(kv_head);
        let place = self.mix.place(self.part, memory.len());
        &mut memory[place]
    }

    fn sequence(&mut self) -> &mut [u8] {
        let place = self.mix.place_in_sequence(self.part);
        self.inner.sequence().get_mut(place).unwrap_or_default()
    }

    fn note(&mut self, kv_head: usize) -> &mut [u8] {
        self.inner.note(kv_head).get_mut(..self.part.note_bytes()).unwrap_or_default()
    }
}
