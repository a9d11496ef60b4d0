//! What is seen of a session beside what it asks for: its client's own word, deadlines, and comparisons with exact attention.

use std::sync::atomic::Ordering;

use kvoyant_protocol::futex::now_ns;
use kvoyant_protocol::layout::c2d;
use kvoyant_protocol::wire::{Speculate, Stat, Status, TOLD};

use super::LaneSession;
use crate::lane::check;

impl LaneSession {
    /// Reads what the client says of itself.
    pub(in crate::lane) fn hear(&self) {
        let words: [u64; TOLD] = std::array::from_fn(|told| self.c2d.load_u64(c2d::TOLD + told * 8));
        let rows = self.status.stats[Stat::RowsAppended as usize].load(Ordering::Relaxed);
        self.status.seen.is_told(words, (self.last_ticket, rows), self.layout.limits.ring_slots);
    }

    /// Notes how an answer that is posted now stands to its deadline.
    pub(super) fn note_deadline(&self, layer: u16, deadline_ns: u64) {
        if deadline_ns > 0 {
            self.status.seen.answered(usize::from(layer), deadline_ns, now_ns());
        }
    }

    /// Compares the answer with what its query attends to among all rows, if it is one of those that are looked at. It has been handed over
    /// by now.
    pub(super) fn check(&mut self, request: &Speculate, status: Status) {
        let Some(model) = &mut self.model else { return };
        let (true, Some(draw)) =
            (status == Status::Ready, check::is_due(model.check_every, self.id, request.ticket))
        else {
            return;
        };
        let Some(last) = self.batch.last() else { return };
        let of = (last.sequence, last.position as usize + 1);
        if let Some((query, found)) = model.check(request, of, &self.answer, draw) {
            self.status.seen.checked(query, found);
        }
    }
}
