//! Speculations that a stream makes and waits for, while the engine's CPU thread goes on.

use std::sync::Arc;
use std::time::Duration;

use kvoyant_cuda::Stream;
use kvoyant_protocol::device::{TIMELINE, TIMELINE_32};
use kvoyant_protocol::layout::c2d;
use kvoyant_protocol::wire::{BatchEntry, Completion, Status};

use super::session::{DeviceSession, Signalled};
use crate::error::Error;
use crate::model::{Inner, Model};
use crate::ready::Answer;
use crate::rings::StreamRelease;
use crate::sequence::Sequence;

/// One member of a batch whose hints lie on the device.
#[derive(Debug, Clone, Copy)]
pub struct StreamMember<'a> {
    /// Its sequence.
    pub sequence: &'a Sequence,
    /// Position of the token that is being computed: `position` rows precede it.
    pub position: usize,
}

/// What an attention kernel needs to read an answer by itself: addresses on the device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TableRef {
    /// The block table: head entries `[members][KV heads]`, then runs.
    pub table: u64,
    /// The answer's status word, 64 bits.
    pub status: u64,
    /// What the status word holds once the answer is there. Anything else: read none of it.
    pub expected: u64,
    /// The slab's first row.
    pub slab: u64,
    /// Addresses of the session's extents, 64 bits each.
    pub extents: u64,
}

/// A speculation that a stream has made. Dropping it gives the answer up.
#[derive(Debug)]
pub struct StreamPending {
    inner: Arc<Inner>,
    device: Arc<DeviceSession>,
    ticket: u64,
    /// Released in stream order: the rings need not be told.
    released: bool,
}

impl Model {
    /// The session's device memory; `None` unless the daemon's device is a GPU.
    #[must_use]
    pub fn device_session(&self) -> Option<&Arc<DeviceSession>> {
        self.inner().memory.device()
    }

    /// As [`Model::speculate`], with hints that a stream has yet to compute: `hints` is the device address of
    /// `[members][query heads][head dim]` f32. In stream order the hints are copied to the daemon and its doorbell is
    /// rung; the calling thread does not wait.
    ///
    /// # Errors
    /// [`Error::NoDevice`] if the daemon's device is no GPU; [`Error::Capturing`] if the stream is being captured;
    /// [`Error::TooManyInFlight`] if as many answers as the ring has slots are held or under way; [`Error::NotSelected`] of a layer
    /// that is attended whole.
    ///
    /// # Safety
    /// `hints` is device memory of that size, of the context of [`Model::device_session`], and stays until the stream
    /// has copied it. `stream` is of that context.
    pub unsafe fn submit_on_stream(
        &self,
        layer: usize,
        members: &[StreamMember<'_>],
        hints: u64,
        stream: &Stream,
    ) -> Result<StreamPending, Error> {
        let inner = self.inner();
        let device = Arc::clone(inner.memory.device().ok_or_else(|| no_gpu(&inner.device))?);
        refuse_capture(stream)?;
        let hint_bytes = inner.geometry.query_heads * inner.geometry.head_dim * 4;
        let entries = members.iter().enumerate().map(|(index, member)| BatchEntry {
            sequence: member.sequence.id(),
            position: member.position as u32,
            value: (index * hint_bytes) as u32,
        });
        let narrowed = self.layer(layer)?;
        inner.usage.selected(layer)?;
        let of = |member: &StreamMember<'_>| (member.sequence.method(), member.position);
        inner.usage.work(&members.iter().map(of).collect::<Vec<_>>(), 1, false)?;
        let bytes = members.len() * hint_bytes;
        let mut failed = Ok(());
        let ticket = inner.rings.speculate_by_doorbell(&inner.control, narrowed, entries, bytes, |slot| {
            let brought = device.c2d_mapping.address(slot.hints, bytes).map_err(Error::from).and_then(|to| {
                // SAFETY: the caller vouches for the source; the destination is the request's own hint area in the
                // registered mapping.
                Ok(unsafe { stream.copy_d2h(to, hints, bytes) }?)
            });
            failed = brought.and_then(|()| device.write_word(stream, slot.doorbell, slot.ticket as u32));
            // The request is in the ring: whatever failed, its doorbell must ring, or the lane waits for ever.
            if failed.is_err() {
                slot.ring_now();
            }
        })?;
        let pending = StreamPending { inner: Arc::clone(inner), device, ticket, released: false };
        failed.map(|()| pending)
    }
}

pub(super) fn no_gpu(device: &str) -> Error {
    Error::NoDevice(format!("the daemon's device is {device}, which has no streams"))
}

/// A graph would repeat with every replay what belongs to one ticket.
fn refuse_capture(stream: &Stream) -> Result<(), Error> {
    if stream.is_capturing()? { Err(Error::Capturing) } else { Ok(()) }
}

impl DeviceSession {
    /// Writes a word of the client → daemon memory in stream order.
    fn write_word(&self, stream: &Stream, offset: usize, value: u32) -> Result<(), Error> {
        if self.context().info().abilities.memops_32 {
            // SAFETY: an aligned word of the registered mapping.
            return Ok(unsafe { stream.write_value32(self.c2d.device_ptr() + offset as u64, value) }?);
        }
        let mapping = Arc::clone(&self.c2d_mapping);
        Ok(stream.host_func(Box::new(move || mapping.store_u32(offset, value)))?)
    }
}

impl StreamPending {
    /// Takes a ticket over whose request is in the ring.
    pub(crate) fn of_ticket(inner: &Arc<Inner>, ticket: u64) -> Result<Self, Error> {
        let device = inner.memory.device().ok_or_else(|| no_gpu(&inner.device))?;
        Ok(Self { inner: Arc::clone(inner), device: Arc::clone(device), ticket, released: false })
    }

    /// Its ticket.
    #[must_use]
    pub fn ticket(&self) -> u64 {
        self.ticket
    }

    /// Makes a stream wait until the answer is there, or will never be: what is enqueued after this must check the
    /// status word ([`StreamPending::table`]). The calling thread does not wait, except where the device has no stream
    /// memory operations: then until the answer's completion has come, for `deadline` at most.
    ///
    /// # Errors
    /// [`Error::Capturing`] if the stream is being captured; without stream memory operations [`Error::Deadline`] and
    /// [`Error::DaemonGone`] too.
    pub fn wait_on_stream(&self, stream: &Stream, deadline: Duration) -> Result<(), Error> {
        refuse_capture(stream)?;
        let board = self.device.board.ptr();
        match &self.device.signalled {
            Signalled::Timeline64 => {
                // SAFETY: an aligned word of the board, which outlives the session's streams: see `DeviceSession::drop`.
                Ok(unsafe { stream.wait_value64(board + TIMELINE as u64, self.ticket << 8) }?)
            }
            Signalled::Timeline32 => {
                // SAFETY: as above.
                Ok(unsafe { stream.wait_value32(board + TIMELINE_32 as u64, self.ticket as u32) }?)
            }
            Signalled::Events(events) => {
                // An event that a daemon died before reaching would hold the stream for ever, and no word lets it go.
                self.completion(deadline)?;
                Ok(stream.wait_event(&events[self.device.layout.answer_slot(self.ticket)])?)
            }
        }
    }

    /// Where a kernel finds the answer.
    #[must_use]
    pub fn table(&self) -> TableRef {
        let (board, layout) = (self.device.board.ptr(), self.device.layout);
        TableRef {
            table: board + layout.board_table(self.ticket) as u64,
            status: board + layout.board_word(self.ticket) as u64,
            expected: self.ticket << 8 | Status::Ready as u64,
            slab: self.device.slab_address(),
            extents: self.device.extent_addresses(),
        }
    }

    /// Lets go of the answer in stream order, behind whatever reads it.
    ///
    /// # Errors
    /// [`Error::Capturing`] if the stream is being captured; then the answer is given up at once, as by dropping it.
    /// Else what the driver says; then the answer is held until the session ends.
    pub fn release_on_stream(mut self, stream: &Stream) -> Result<(), Error> {
        refuse_capture(stream)?;
        self.released = true;
        let ticket = self.ticket;
        match self.inner.rings.released_by_stream(ticket, stream.raw().addr()) {
            StreamRelease::Word => self.device.write_word(stream, c2d::RELEASED, ticket as u32),
            // The closure owns nothing of the session, which must not end on the driver's thread, and takes no lock
            // under which the driver is called.
            StreamRelease::Late(late) => Ok(stream.host_func(Box::new(move || late.add(ticket)))?),
        }
    }

    /// Waits on the CPU for the answer's completion: its status, rows, bytes and times. The answer stays.
    ///
    /// # Errors
    /// [`Error::Deadline`] if it does not come in time, [`Error::DaemonGone`] if it never will.
    pub fn completion(&self, deadline: Duration) -> Result<Completion, Error> {
        Ok(self.inner.rings.peek(&self.inner.control, self.ticket, deadline)?.0)
    }

    /// Waits on the CPU for the answer, and copies its block table out: which rows it is made of. The answer stays.
    ///
    /// # Errors
    /// As [`StreamPending::completion`], and [`Error::NotReady`] with the daemon's reason.
    pub fn answer(&self, deadline: Duration) -> Result<Answer, Error> {
        let (completion, of) = self.inner.rings.peek(&self.inner.control, self.ticket, deadline)?;
        Answer::of(&self.inner, completion, &of)
    }
}

impl Drop for StreamPending {
    fn drop(&mut self) {
        if !self.released {
            self.inner.rings.abandon(self.ticket);
        }
    }
}
