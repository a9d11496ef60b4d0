//! Pages on their way back to host memory.
//!
//! The frame is taken, and named in answers, when the read is planned; the page table names it once the page is there and its
//! checksum has been found right. Answers that name it are held until then. A page that cannot be read back whole is lost to every
//! sequence that has it: the table says so, answers that wait for it fail, and nothing else does.

use kvoyant_protocol::control::{LOST, PageWord, SPILLED};
use kvoyant_protocol::wire::{SequenceId, Status};

use super::{Content, Io, NO_SLOT};
use crate::lane::model::ModelState;
use crate::lane::select::Answer;
use crate::tiers::heap::Region;
use crate::tiers::nvme::{Direction, Ended, Job};

/// A page that has come back, or has not, and who waited for it.
#[derive(Debug, Default)]
pub(crate) struct Arrived {
    /// Keys of the answers.
    pub(crate) waiters: Vec<u64>,
    /// Whether it is lost.
    pub(crate) lost: bool,
}

impl ModelState {
    /// The page behind an entry of a page table, for an answer: one that is on disk is read, and the answer waits for it.
    pub(crate) fn page_for(
        &mut self,
        id: SequenceId,
        (head, page): (usize, usize),
        answer: &mut Answer,
    ) -> Result<Option<u32>, Status> {
        let sequence = self.sequence(id).map_err(|_| Status::NoSuchSequence)?;
        let index = head * sequence.capacity + page;
        match self.page_word(sequence.table, index) {
            PageWord::Page(page) => Ok(Some(page)),
            PageWord::None => Ok(None),
            PageWord::Lost => Err(Status::RowsLost),
            PageWord::Spilled => self.read_page(id, (head, page), answer).map(Some),
        }
    }

    fn read_page(
        &mut self,
        id: SequenceId,
        (head, page): (usize, usize),
        answer: &mut Answer,
    ) -> Result<u32, Status> {
        let sequence = self.sequence(id).map_err(|_| Status::NoSuchSequence)?;
        let slots = sequence.slots.ok_or(Status::Failed)?;
        let slot = self.slot_at(slots, head * sequence.capacity + page);
        if slot == NO_SLOT {
            return Err(Status::RowsLost);
        }
        let state = self.spill.as_mut().ok_or(Status::Failed)?;
        if let Some(token) = state.reading.get(&slot).copied()
            && let Some(Io::Read { frame, asked_by, .. }) = state.ios.get_mut(&token)
        {
            // Nobody in particular has key 0.
            if std::mem::replace(asked_by, answer.key) != answer.key || answer.key == 0 {
                answer.reads.push(token);
            }
            return Ok(*frame);
        }
        let report = state.report.clone().ok_or(Status::Failed)?;
        let frame = self.free_frame().ok_or(Status::HostFull)?;
        self.fill_frame(frame, (id.slot, head, page), Content::Reading);
        self.about_to_fill(frame);
        let (extent, offset) = self.arena.geometry().locate(frame * self.shape.page_rows as u32);
        let memory = std::sync::Arc::clone(self.arena.memory(extent));
        let state = self.spill.as_mut().ok_or(Status::Failed)?;
        // The slot stays what it is until the read has ended.
        state.slots.share(slot);
        let token = state.operation();
        let (waiters, asked_by) = (Vec::new(), answer.key);
        state.ios.insert(token, Io::Read { frame, slot, head, page, waiters, asked_by });
        state.reading.insert(slot, token);
        state.jobs.push(Job {
            direction: Direction::Read,
            slot: state.slots.slot(slot),
            memory,
            offset,
            deadline_ns: answer.deadline_ns,
            session: state.session,
            token,
            report,
        });
        answer.reads.push(token);
        Ok(frame)
    }

    /// A frame for a page that comes back: one that is free, or that of a page that may leave.
    fn free_frame(&mut self) -> Option<u32> {
        self.arena.take().or_else(|| {
            self.sweep_all(1);
            self.arena.take()
        })
    }

    /// Has an answer wait for its reads; how many there are.
    pub(crate) fn wait_for_pages(&mut self, key: u64, reads: &[u64]) -> u32 {
        let Some(state) = &mut self.spill else { return 0 };
        let mut waits = 0;
        for token in reads {
            if let Some(Io::Read { waiters, .. }) = state.ios.get_mut(token) {
                waiters.push(key);
                waits += 1;
            }
        }
        waits
    }

    /// Takes note of an operation that has ended.
    pub(crate) fn page_ended(&mut self, ended: &Ended) -> Arrived {
        let Some(state) = &mut self.spill else { return Arrived::default() };
        let session = state.session;
        match state.ios.remove(&ended.token) {
            Some(Io::Write { frame, slot }) => {
                if let Err(error) = &ended.result {
                    tracing::warn!(session, "a page could not be written, and stays in host memory: {error}");
                }
                self.page_written(ended.token, frame, slot, ended.result.is_err());
                Arrived::default()
            }
            Some(Io::Read { frame, slot, head, page, waiters, .. }) => {
                state.reading.remove(&slot);
                let lost = ended.result.is_err();
                if let Err(error) = &ended.result {
                    let rows = self.shape.page_rows;
                    let (layer, kv_head) = (head / self.shape.kv_heads, head % self.shape.kv_heads);
                    tracing::warn!(
                        session,
                        "tokens {}..{} of layer {layer}, KV head {kv_head} are lost: {error}",
                        page * rows,
                        (page + 1) * rows
                    );
                }
                self.page_read(frame, slot, (head, page), lost);
                Arrived { waiters, lost }
            }
            None => Arrived::default(),
        }
    }

    /// Gives up all slots of a layer on the device: some were to be filled from a page that is lost.
    pub(crate) fn forget_slots(&mut self, id: SequenceId, layer: usize) {
        let Ok(sequence) = self.sequence_mut(id) else { return };
        let mut slots = std::mem::take(&mut sequence.residency[layer]);
        self.clear_slots(&mut slots);
        if let Ok(sequence) = self.sequence_mut(id) {
            sequence.residency[layer] = slots;
        }
    }

    fn page_read(&mut self, frame: u32, slot: u32, (head, page): (usize, usize), lost: bool) {
        let owners: Vec<(Region, Region, usize)> = self
            .open_handles()
            .filter_map(|id| self.sequence(id).ok())
            .filter(|sequence| page < sequence.capacity)
            .filter_map(|sequence| Some((sequence.table, sequence.slots?, head * sequence.capacity + page)))
            .filter(|(table, slots, index)| {
                self.tables.word(*table, *index) == SPILLED && self.slot_at(*slots, *index) == slot
            })
            .collect();
        if lost {
            for (table, slots, index) in &owners {
                self.tables.set_word(*table, *index, LOST);
                self.drop_slot(*slots, *index);
            }
        }
        let kept = if lost { 0 } else { owners.len() };
        // The operation was one owner.
        (1..kept).for_each(|_| self.arena.share(frame));
        if kept == 0 {
            self.release_frame(frame);
        } else {
            for (table, _, index) in &owners {
                self.tables.set_word(*table, *index, frame);
            }
            if let Some(found) = self.spill.as_mut().and_then(|state| state.frames.get_mut(frame as usize)) {
                found.content = Content::Clean;
            }
        }
        let Some(state) = &mut self.spill else { return };
        state.changed();
        state.slots.release(slot);
        state.spilled -= 1;
        if lost {
            state.counts.lost += 1;
        } else {
            state.counts.read += 1;
        }
    }
}
