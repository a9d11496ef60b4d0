//! A session's board as the daemon's stream writes it: block tables, then words, in stream order behind the copies.

use std::sync::Arc;

use kvoyant_cuda::{Context, CudaError, Event, EventKind, PinnedBuffer, Stream};
use kvoyant_protocol::device::{Signal, TIMELINE, TIMELINE_32};
use kvoyant_protocol::layout::{Layout, d2c};
use kvoyant_protocol::memory::SharedMapping;

use super::pin::{Pinned, Registered};
use crate::device::AnswerWords;

/// How clients' streams are signalled.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum SignalKind {
    Timeline64,
    Timeline32,
    Events,
}

impl SignalKind {
    pub(super) const ALL: [Self; 3] = [Self::Timeline64, Self::Timeline32, Self::Events];

    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Timeline64 => "timeline64",
            Self::Timeline32 => "timeline32",
            Self::Events => "events",
        }
    }
}

/// See the module.
#[derive(Debug)]
pub(super) struct Board {
    /// Address of the board on the device.
    base: u64,
    layout: Layout,
    signal: SignalKind,
    d2c: Arc<SharedMapping>,
    /// One per ring slot, if streams are signalled by events.
    events: Vec<Event>,
    /// Words of each ring slot on their way to the device where it has no stream memory operations: status word and
    /// timeline, then the 32-bit timeline.
    words: PinnedBuffer,
    /// The block tables are copied from the daemon → client memfd.
    _tables: Pinned,
}

/// Bytes of one slot's words in `words`.
const WORDS: usize = 16;

impl Board {
    pub(super) fn new(
        context: &Context,
        known: &Arc<Registered>,
        signal: SignalKind,
        base: u64,
        layout: Layout,
        d2c: &Arc<SharedMapping>,
    ) -> Result<Self, CudaError> {
        let slots = layout.limits.ring_slots as usize;
        let events = match signal {
            SignalKind::Events => {
                (0..slots).map(|_| context.event(EventKind::Interprocess)).collect::<Result<_, _>>()?
            }
            _ => Vec::new(),
        };
        let words = context.pinned(slots * WORDS)?;
        let tables = Pinned::new(context, known, d2c)?;
        Ok(Self { base, layout, signal, d2c: Arc::clone(d2c), events, words, _tables: tables })
    }

    /// Whether the client opens events of it.
    pub(super) fn has_events(&self) -> bool {
        !self.events.is_empty()
    }

    /// What the client has to know of it.
    pub(super) fn signal(&self) -> Result<Signal, CudaError> {
        Ok(match self.signal {
            SignalKind::Timeline64 => Signal::Timeline64,
            SignalKind::Timeline32 => Signal::Timeline32,
            SignalKind::Events => {
                let handles = self.events.iter().map(|event| Ok(event.ipc_handle()?.into()));
                Signal::Events(handles.collect::<Result<_, CudaError>>()?)
            }
        })
    }

    /// Enqueues what makes an answer known, behind its copies.
    pub(super) fn publish(&self, ticket: u64, words: AnswerWords, stream: &Stream) -> Result<(), CudaError> {
        let AnswerWords { word, table_bytes } = words;
        let slot = self.layout.answer_slot(ticket);
        let at = |offset: usize| self.base + offset as u64;
        if table_bytes > 0
            && let Ok(table) = self.d2c.address(self.layout.table(ticket), table_bytes as usize)
        {
            // SAFETY: the table lies in a registered mapping that `self` keeps, and is not rewritten before the client
            // has released the ticket; its destination lies in the board, which outlives the stream's work.
            unsafe { stream.copy_h2d(at(self.layout.board_table(ticket)), table, table_bytes as usize) }?;
        }
        let (status, timeline, low) = (self.layout.board_word(ticket), TIMELINE, TIMELINE_32);
        match self.signal {
            SignalKind::Timeline64 => {
                // SAFETY: aligned words of the board, as above.
                unsafe { stream.write_value64(at(status), word) }?;
                // SAFETY: as above.
                unsafe { stream.write_value64(at(timeline), word) }?;
            }
            SignalKind::Timeline32 | SignalKind::Events => {
                let words = self.words.as_ptr().wrapping_add(slot * WORDS);
                // SAFETY: the slot's own words of a pinned buffer; nothing reads them before the copy below, and the
                // copy of the slot's ticket before has ended, since that ticket has been released.
                unsafe {
                    words.cast::<u64>().write_volatile(word);
                    words.add(8).cast::<u32>().write_volatile(ticket as u32);
                }
                // SAFETY: from the pinned buffer to words of the board; both outlive the stream's work.
                unsafe { stream.copy_h2d(at(status), words, 8) }?;
                // SAFETY: as above.
                unsafe { stream.copy_h2d(at(timeline), words, 8) }?;
                if self.signal == SignalKind::Timeline32 {
                    // SAFETY: an aligned word of the board.
                    unsafe { stream.write_value32(at(low), ticket as u32) }?;
                } else {
                    // SAFETY: as for the other words.
                    unsafe { stream.copy_h2d(at(low), words.wrapping_add(8), 4) }?;
                    self.events[slot].record(stream)?;
                }
            }
        }
        self.d2c.store_u64(d2c::PLANNED, ticket);
        Ok(())
    }
}
