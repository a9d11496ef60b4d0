//! Where a sequence stands, told to kernels in stream order.

use std::sync::{Mutex, PoisonError};

use kvoyant_cuda::{Context, Event, PinnedBuffer, Stream};
use kvoyant_kernels::cuda::params::Position;

use super::local_event;
use crate::error::Error;

/// Steps that a thread may be ahead of its device before it waits.
const AHEAD: usize = 64;

/// See the module.
#[derive(Debug)]
pub(super) struct Positions {
    address: u64,
    memory: PinnedBuffer,
    /// Behind the copy out of each place of `memory`.
    copied: Vec<Event>,
    next: Mutex<usize>,
}

impl Positions {
    /// For the position at this address on the device.
    pub(super) fn new(context: &Context, address: u64) -> Result<Self, Error> {
        let memory = context.pinned(AHEAD * size_of::<Position>())?;
        let copied = (0..AHEAD).map(|_| local_event(context)).collect::<Result<_, _>>()?;
        Ok(Self { address, memory, copied, next: Mutex::new(0) })
    }

    pub(super) fn set(
        &self,
        sinks: u32,
        first_window: u32,
        tokens: u32,
        stream: &Stream,
    ) -> Result<(), Error> {
        let mut next = self.next.lock().unwrap_or_else(PoisonError::into_inner);
        let index = *next % AHEAD;
        self.copied[index].synchronize()?;
        let from = self.memory.as_ptr().wrapping_add(index * size_of::<Position>());
        // SAFETY: an aligned place of the pinned memory, which the copy before has been read from.
        unsafe { from.cast::<Position>().write(Position { sinks, first_window, tokens, pad: 0 }) };
        // SAFETY: that place, which is not written before its event has happened, into this sequence's own position.
        unsafe { stream.copy_h2d(self.address, from.cast_const(), size_of::<Position>()) }?;
        self.copied[index].record(stream)?;
        *next = index + 1;
        Ok(())
    }
}
