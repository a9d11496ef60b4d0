//! Answers on their way: planned, copied, posted in the order of tickets.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Instant;

use kvoyant_protocol::layout::d2c;
use kvoyant_protocol::quota::Quota;
use kvoyant_protocol::wire::{Completion, Stat, Status};

use super::LaneSession;
use crate::device::{BACKGROUND, Done};
use crate::lane::error::SessionError;
use crate::quota::Account;

/// An answer on its way.
#[derive(Debug)]
pub(super) struct Flight {
    pub(super) completion: Completion,
    pub(super) planned: Instant,
    /// When its own copies could begin: later, where pages had to come from disk first.
    pub(super) sent: Instant,
    /// Its own copies are under way.
    pub(super) waiting: bool,
    /// Background transfers of rows that it names.
    pub(super) after: Vec<u64>,
    /// Whether it counts as one of its user's requests under way.
    pub(super) charged: bool,
    /// When its rows are wanted, on the monotonic clock; 0: as soon as they can be.
    pub(super) deadline_ns: u64,
}

/// Answers on their way, the first one first, each charged to the session's user until it is posted.
#[derive(Debug)]
pub(super) struct Flights {
    pub(super) list: VecDeque<Flight>,
    account: Arc<Account>,
    charged: u64,
}

impl Flights {
    pub(super) fn new(account: Arc<Account>, most: usize) -> Self {
        Self { list: VecDeque::with_capacity(most), account, charged: 0 }
    }

    /// Whether the user may have one more request under way, which counts from now on.
    pub(super) fn begin(&mut self) -> bool {
        let may = self.account.take(Quota::InFlight, 1).is_ok();
        if may {
            self.charged += 1;
        } else {
            self.account.refused(Quota::InFlight);
        }
        may
    }

    fn pop(&mut self) -> Option<Flight> {
        let flight = self.list.pop_front()?;
        if flight.charged {
            self.charged -= 1;
            self.account.give(Quota::InFlight, 1);
        }
        Some(flight)
    }
}

impl Drop for Flights {
    fn drop(&mut self) {
        self.account.give(Quota::InFlight, self.charged);
    }
}

impl LaneSession {
    /// Takes note of an ended transfer.
    pub fn transferred(&mut self, done: Done) -> Result<(), SessionError> {
        self.in_transfer -= 1;
        self.spare_copies.push(done.copies);
        if let (Some(update), Some(model)) = (done.records, &mut self.model) {
            model.records_written(update, done.failed);
            return Ok(());
        }
        if done.ticket & BACKGROUND != 0 {
            let number = done.ticket & !BACKGROUND;
            if let Some(model) = &mut self.model {
                model.background_ended(number, self.released_through);
            }
            self.flights.list.iter_mut().for_each(|flight| flight.after.retain(|after| *after != number));
            return self.post_ready();
        }
        for flight in &mut self.flights.list {
            if flight.completion.ticket == done.ticket {
                let took = done.finished.saturating_duration_since(flight.planned).as_nanos();
                flight.completion.transfer_ns = took.min(u128::from(u32::MAX)) as u32;
                let copying = done.finished.saturating_duration_since(flight.sent).as_nanos();
                self.link.took(flight.completion.bytes_moved, copying as u64);
                flight.waiting = false;
                if done.failed {
                    flight.completion.status = Status::Failed;
                }
            }
        }
        self.post_ready()
    }

    /// Posts what is ready, in the order of tickets: the timeline word never runs backwards.
    pub(super) fn post_ready(&mut self) -> Result<(), SessionError> {
        let mut posted = false;
        while self.flights.list.front().is_some_and(|flight| !flight.waiting && flight.after.is_empty()) {
            if self.completions.room(&self.c2d)? == 0 {
                // A client with streams can release what its CPU has yet to read in the ring; any other has read it.
                if self.streams {
                    self.armed = true;
                    break;
                }
                return Err(SessionError::CompletionsFull);
            }
            let Some(flight) = self.flights.pop() else { break };
            let completion = flight.completion;
            self.note_deadline(completion.layer, flight.deadline_ns);
            self.posted = completion.ticket;
            if let Some(model) = &mut self.model {
                model.about_to_answer(completion.ticket);
            }
            self.completions.stage(&self.d2c, &completion.encode());
            self.d2c.store_u64(d2c::TIMELINE, completion.timeline());
            self.count(Stat::Speculations, 1);
            self.count(Stat::RowsSelected, u64::from(completion.rows_selected));
            self.count(Stat::RowsHit, u64::from(completion.rows_hit));
            self.count(Stat::RowsInPlace, u64::from(completion.rows_in_place));
            self.count(Stat::BytesMoved, completion.bytes_moved);
            self.count(Stat::SelectNs, u64::from(completion.select_ns));
            self.count(Stat::TransferNs, u64::from(completion.transfer_ns));
            let stages = [completion.queue_ns, completion.select_ns, completion.transfer_ns];
            self.status.times.add(completion.ticket, completion.layer.into(), stages);
            tracing::trace!(
                session = self.id,
                ticket = completion.ticket,
                layer = completion.layer,
                batch = completion.batch,
                status = ?completion.status,
                queue_ns = completion.queue_ns,
                select_ns = completion.select_ns,
                transfer_ns = completion.transfer_ns,
                rows = completion.rows_selected,
                hits = completion.rows_hit,
                bytes = completion.bytes_moved,
                "answered"
            );
            posted = true;
        }
        if posted {
            self.completions.publish(&self.d2c, &self.c2d);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::quota::{Ledger, Limits, Quotas};

    #[test]
    fn requests_under_way_count_for_all_sessions_of_a_user_and_no_longer_than_the_session() {
        let everyone = Limits::default().with(Quota::InFlight, 3);
        let ledger = Ledger::new(Quotas { everyone, ..Quotas::default() }, 0.0);
        let [mut one, mut other] = [(); 2].map(|()| Flights::new(ledger.account(1), 4));
        assert!(one.begin() && one.begin() && other.begin());
        assert!(!other.begin() && !one.begin());
        assert!(Flights::new(ledger.account(2), 4).begin());
        drop(one);
        assert_eq!(ledger.account(1).held(Quota::InFlight), 1);
        assert!(other.begin());
        drop(other);
        let used = ledger.report()[0].uses[&Quota::InFlight];
        assert_eq!((used.held, used.peak, used.refused), (0, 3, 2));
        assert_eq!(ledger.account(2).held(Quota::InFlight), 0);
    }
}
