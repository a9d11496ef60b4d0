//! A sequence's page table where kernels read it: of one shape and at one address for as long as a graph may be replayed.

use std::sync::{Mutex, PoisonError};

use kvoyant_cuda::{Context, Event, HostToDevice, PinnedBuffer, Stream};
use kvoyant_protocol::control::NO_PAGE;

use super::local_event;
use crate::error::Error;
use crate::sequence::Sequence;

/// What is on the device, and what new pages are copied from.
#[derive(Debug)]
struct Staged {
    /// `[layer][KV head][capacity]`.
    known: Vec<u32>,
    now: Vec<u32>,
    memory: PinnedBuffer,
    /// Behind the last copy out of `memory`.
    copied: Event,
}

/// See the module.
#[derive(Debug)]
pub(super) struct PageTable {
    address: u64,
    heads: usize,
    capacity: usize,
    staged: Mutex<Staged>,
}

impl PageTable {
    /// A table at a zeroed address on the device; `heads`: those of all layers.
    pub(super) fn new(context: &Context, address: u64, heads: usize, capacity: usize) -> Result<Self, Error> {
        // The device has zeros, which are pages: so everything is copied once.
        let (known, now) = (vec![0; heads * capacity], vec![NO_PAGE; heads * capacity]);
        let memory = context.pinned(heads * capacity * 4)?;
        let staged = Mutex::new(Staged { known, now, memory, copied: local_event(context)? });
        Ok(Self { address, heads, capacity, staged })
    }

    /// Pages that each KV head has room for.
    pub(super) fn capacity(&self) -> usize {
        self.capacity
    }

    /// Copies what has changed, in stream order.
    pub(super) fn refresh(&self, sequence: &Sequence, stream: &Stream) -> Result<(), Error> {
        let mut staged = self.staged.lock().unwrap_or_else(PoisonError::into_inner);
        let Staged { known, now, memory, copied } = &mut *staged;
        sequence.copy_pages(self.capacity, now);
        // An earlier copy may still read the pinned memory.
        copied.synchronize()?;
        let mut copies = Vec::new();
        for head in 0..self.heads {
            let range = head * self.capacity..(head + 1) * self.capacity;
            let (old, new) = (&known[range.clone()], &now[range.clone()]);
            let differs = |index: &usize| old[*index] != new[*index];
            let Some(first) = (0..self.capacity).find(differs) else { continue };
            let end = (0..self.capacity).rfind(differs).map_or(first, |last| last + 1);
            let offset = (range.start + first) * 4;
            let bytes = (end - first) * 4;
            let src = memory.as_ptr().wrapping_add(offset);
            // SAFETY: the pinned memory has as many words as `now`, and no copy reads it any more.
            unsafe { std::ptr::copy_nonoverlapping(new[first..end].as_ptr().cast::<u8>(), src, bytes) };
            copies.push(HostToDevice { dst: self.address + offset as u64, src: src.cast_const(), bytes });
        }
        if copies.is_empty() {
            return Ok(());
        }
        // SAFETY: out of pinned memory that is not written before `copied` has happened, into this sequence's own table.
        unsafe { stream.copy_batch_h2d(&copies) }?;
        copied.record(stream)?;
        std::mem::swap(known, now);
        Ok(())
    }
}
