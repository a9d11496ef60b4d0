//! Answers that wait for pages from disk, and what has to be copied once those are there.

use std::sync::Arc;
use std::time::Instant;

use kvoyant_protocol::wire::{Operation, Request, SequenceId, Stat, Status, WORK_MAX};

use super::hints::HintArea;
use super::{LaneSession, Tools};
use crate::device::{AnswerWords, BACKGROUND, Publication, Transfer};
use crate::lane::error::SessionError;
use crate::lane::spill::Before;
use crate::tiers::nvme::Ended;

/// An answer, or a background transfer, that waits for pages.
#[derive(Debug)]
pub(super) struct Held {
    /// Its ticket, or [`BACKGROUND`] and its number.
    key: u64,
    /// Pages that have yet to come.
    reads: u32,
    lost: bool,
    since: Instant,
    /// What to copy then.
    transfer: Option<Transfer>,
    /// Whose layer it is for.
    members: Vec<(SequenceId, usize)>,
}

impl LaneSession {
    /// Whether the lane itself has to read rows for a request that are not in memory.
    pub(super) fn must_wait_for_pages(
        &mut self,
        request: &Request,
        index: u32,
    ) -> Result<bool, SessionError> {
        let members = match request.operation {
            Operation::Speculate(speculate) => speculate.batch,
            Operation::Observe(_) => 1,
            _ => return Ok(false),
        };
        if self.model.as_ref().is_none_or(|model| model.spill.is_none()) {
            return Ok(false);
        }
        // It waited before, and nothing has come since.
        if self.waited_for == Some(index) && !std::mem::take(&mut self.page_news) {
            return Ok(true);
        }
        self.read_batch(index, members)?;
        let Some(model) = &mut self.model else { return Ok(false) };
        // What is more than may be asked at once ends the session when it is handled.
        let mut work = 0_usize;
        for entry in &self.batch {
            let tokens = (entry.position as usize).saturating_add(1);
            work = work.saturating_add(model.shape.query_heads.saturating_mul(tokens));
        }
        if work > WORK_MAX {
            return Ok(false);
        }
        let mut before = model.before_request(&request.operation, &self.batch);
        if let Operation::Speculate(speculate) = request.operation
            && speculate.rest
            && model.speculates(usize::from(speculate.layer))
        {
            let area = HintArea::of(&speculate, &self.c2d, self.layout.hints(index));
            for entry in &self.batch {
                let layer = usize::from(speculate.layer);
                if area.read(entry, layer, model)? == Ok(())
                    && model.bring_exact(layer, entry) == Before::Later
                {
                    before = Before::Later;
                }
            }
        }
        let waits = before == Before::Later;
        self.waited_for = waits.then_some(index);
        Ok(waits)
    }

    /// Holds an answer, or a background transfer, until its pages are there.
    pub(super) fn hold(&mut self, key: u64, transfer: Option<Transfer>, members: Vec<(SequenceId, usize)>) {
        let Some(model) = &mut self.model else { return };
        let reads = model.wait_for_pages(key, &self.answer.reads);
        self.held.push(Held { key, reads, lost: false, since: Instant::now(), transfer, members });
    }

    /// Takes note of a page that was written or read, or could not be.
    pub fn page_ended(&mut self, ended: &Ended, tools: Tools<'_>) -> Result<(), SessionError> {
        self.page_news = true;
        let Some(model) = &mut self.model else { return Ok(()) };
        let arrived = model.page_ended(ended);
        for key in arrived.waiters {
            let Some(at) = self.held.iter().position(|held| held.key == key) else { continue };
            let held = &mut self.held[at];
            held.reads -= 1;
            held.lost |= arrived.lost;
            if held.reads == 0 {
                let held = self.held.swap_remove(at);
                self.go_on(held, tools);
            }
        }
        self.dirty = true;
        self.count_pages();
        self.post_ready()
    }

    /// All pages are there, or known not to come.
    fn go_on(&mut self, held: Held, tools: Tools<'_>) {
        let Held { key, lost, since, mut transfer, members, .. } = held;
        self.count(Stat::PageWaitNs, since.elapsed().as_nanos() as u64);
        if lost {
            self.fail_lost(key, &members);
            if let Some(transfer) = &mut transfer {
                // Their slots are given up, and pages that did come are not worth finding among them.
                transfer.copies.clear();
                transfer.bytes = 0;
            }
        }
        let mut flight = self.flights.list.iter_mut().find(|flight| flight.completion.ticket == key);
        if let Some(flight) = &mut flight {
            flight.sent = Instant::now();
        }
        match transfer {
            Some(mut transfer) => {
                if let (Some(Publication::Answer(words)), Some(flight)) = (&mut transfer.publish, flight) {
                    *words = AnswerWords {
                        word: flight.completion.timeline(),
                        table_bytes: flight.completion.table_bytes,
                    };
                }
                self.submit(transfer, tools);
            }
            None => {
                if let Some(flight) = flight {
                    flight.waiting = false;
                    let took = flight.planned.elapsed().as_nanos();
                    flight.completion.transfer_ns = took.min(u128::from(u32::MAX)) as u32;
                }
            }
        }
    }

    /// An answer whose rows are lost fails, and so does every one after it that may count on them in their slots.
    fn fail_lost(&mut self, key: u64, members: &[(SequenceId, usize)]) {
        let background = key & BACKGROUND != 0;
        for flight in &mut self.flights.list {
            let layer = usize::from(flight.completion.layer);
            let waits = background && flight.after.contains(&(key & !BACKGROUND));
            let later =
                !background && flight.completion.ticket >= key && members.iter().any(|(_, of)| *of == layer);
            if waits || later {
                flight.completion.status = Status::RowsLost;
                flight.completion.table_bytes = 0;
            }
        }
        if let Some(model) = &mut self.model {
            members.iter().for_each(|(id, layer)| model.forget_slots(*id, *layer));
        }
    }

    pub(super) fn submit(&mut self, mut transfer: Transfer, tools: Tools<'_>) {
        self.in_transfer += 1;
        // The device's queue is longer than all rings together in any sane configuration; should it be full all
        // the same, the copy threads are busy, and a lane that waits for them stalls nobody who is not stalled.
        while let Err(back) = tools.device.submit(transfer) {
            transfer = back;
            std::thread::yield_now();
        }
    }

    /// The transfer of what the answer in the buffers has to have copied.
    pub(super) fn new_transfer(
        &mut self,
        ticket: u64,
        publish: Option<Publication>,
        tools: Tools<'_>,
    ) -> Option<Transfer> {
        let model = self.model.as_ref()?;
        let spare = self.spare_copies.pop().unwrap_or_default();
        Some(Transfer {
            session: self.id,
            ticket,
            copies: std::mem::replace(&mut self.answer.copies, spare),
            bytes: self.answer.bytes,
            memory: Arc::clone(&model.memory),
            publish,
            report: Arc::clone(tools.report),
        })
    }

    /// Shows how many pages are where.
    pub(super) fn count_pages(&mut self) {
        let Some(state) = self.model.as_mut().and_then(|model| model.spill.as_mut()) else { return };
        let (counts, [spilled, peak, most]) = (state.take_counts(), state.pages());
        self.show(Stat::PagesSpilled, spilled as u64);
        self.show(Stat::PagesPeak, peak as u64);
        self.show(Stat::PagesMost, most as u64);
        self.count(Stat::PagesWritten, counts.written);
        self.count(Stat::PagesRead, counts.read);
        self.count(Stat::PagesLost, counts.lost);
    }
}
