//! Pinned buffers that the device reads while the next one is filled.

use kvoyant_cuda::{Context, CudaError, Event, EventKind, PinnedBuffer, Stream};

/// Buffers of one size, used in turn. Each is free again when the device has passed the mark behind its last use.
#[derive(Debug)]
pub(super) struct PinnedRing {
    slots: Vec<Slot>,
    next: usize,
}

#[derive(Debug)]
struct Slot {
    memory: PinnedBuffer,
    done: Event,
    in_flight: bool,
}

impl PinnedRing {
    pub(super) fn new(context: &Context, slots: usize, bytes: usize) -> Result<Self, CudaError> {
        let slot = || {
            Ok(Slot {
                memory: context.pinned(bytes)?,
                done: context.event(EventKind::Local)?,
                in_flight: false,
            })
        };
        Ok(Self { slots: (0..slots).map(|_| slot()).collect::<Result<_, _>>()?, next: 0 })
    }

    /// The next buffer, which the device does not read: waits for that if it must. Until [`PinnedRing::pass_on`] the caller
    /// alone uses it.
    pub(super) fn claim(&mut self) -> Result<&PinnedBuffer, CudaError> {
        let slot = &mut self.slots[self.next];
        if slot.in_flight {
            slot.done.synchronize()?;
            slot.in_flight = false;
        }
        Ok(&slot.memory)
    }

    /// Gives the claimed buffer to the device: what is on `stream` up to here may read it.
    pub(super) fn pass_on(&mut self, stream: &Stream) -> Result<(), CudaError> {
        let slots = self.slots.len();
        let slot = &mut self.slots[self.next];
        self.next = (self.next + 1) % slots;
        let recorded = slot.done.record(stream);
        if recorded.is_err() {
            // Without a mark, the end of the stream is the first moment that is known to be late enough.
            stream.synchronize()?;
        }
        slot.in_flight = recorded.is_ok();
        recorded
    }
}

impl Drop for PinnedRing {
    fn drop(&mut self) {
        for slot in self.slots.iter().filter(|slot| slot.in_flight) {
            if let Err(error) = slot.done.synchronize() {
                tracing::warn!("a transfer's buffer is released unseen: {error}");
            }
        }
    }
}
