//! Answers that are not read any more: by a request's word, or by that of the client's streams.

use kvoyant_protocol::layout::c2d;
use kvoyant_protocol::wire::{Operation, Request};

use super::LaneSession;
use crate::lane::error::SessionError;

impl LaneSession {
    pub(super) fn release(&mut self, through: u64) -> Result<(), SessionError> {
        // An answer can only be let go of once it has been given. A client with streams is given it by the device, before
        // its lane knows; then the release counts once the lane does.
        if through > if self.streams { self.last_ticket } else { self.posted } {
            return Err(SessionError::Ticket {
                ticket: self.last_ticket,
                released: through,
                last: self.last_ticket,
                released_before: self.released_through,
            });
        }
        self.asked_release = self.asked_release.max(through);
        let through = self.asked_release.min(self.posted);
        if through > self.released_through {
            self.released_through = through;
            if let Some(model) = &mut self.model {
                model.settle(through);
            }
        }
        Ok(())
    }

    /// Whether a request takes a slot that the client's streams have let go of and the lane has not: it has yet to hear
    /// that the answer there was given.
    pub(super) fn must_catch_up(&self, request: &Request) -> bool {
        let Operation::Speculate(speculate) = request.operation else { return false };
        let slots = u64::from(self.layout.limits.ring_slots);
        let asked = self.asked_release.max(request.release_through).min(self.last_ticket);
        let beyond = |released: u64| speculate.ticket.saturating_sub(released) > slots;
        beyond(self.released_through) && !beyond(asked)
    }

    /// Lets go of what a stream of the client's has let go of, as far as it has been posted.
    pub(super) fn release_by_stream(&mut self) -> Result<(), SessionError> {
        // The word has a ticket's low 32 bits, and no more tickets than ring slots lie between what is released and the
        // last one asked for.
        let word = self.c2d.load_u32(c2d::RELEASED);
        let ahead = word.wrapping_sub(self.stream_released as u32).cast_signed();
        if ahead > 0 {
            self.stream_released += u64::from(ahead.unsigned_abs());
            if self.stream_released > self.last_ticket {
                return Err(SessionError::Ticket {
                    ticket: self.last_ticket,
                    released: self.stream_released,
                    last: self.last_ticket,
                    released_before: self.released_through,
                });
            }
        }
        self.release(self.stream_released)
    }
}
