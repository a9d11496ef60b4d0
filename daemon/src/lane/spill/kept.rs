//! Pages of a session that outlasts its daemon.
//!
//! Its [journal](crate::journal) says of every page where it is, as of its last seal; what happens afterwards must leave that true, or
//! be found by the next daemon. So:
//!
//! - a page leaves its frame once a seal says in which slot it lies;
//! - a frame is [written down](FrameLog) before another page is read into it: of a page that is on disk and whose frame was written down, the
//!   next daemon knows that it is on disk alone;
//! - a frame of a page that ends elsewhere is free, and so is a slot, once a seal says so.
//!
//! An engine may still read rows that a daemon has named to it before it ended. The next one is *wary*: until those answers are let go of,
//! it reads nothing into a frame that was written down, and no page leaves.

use std::collections::BTreeSet;

use kvoyant_protocol::control::{PageWord, SPILLED};
use kvoyant_protocol::memory::MemoryError;

use super::{Content, NO_SLOT, SLOT_ENTRY, SpillState};
use crate::journal::{FrameLog, TakenFrames};
use crate::lane::model::ModelState;
use crate::tiers::heap::{Heap, Region};
use crate::tiers::nvme::{LeftChunk, PageError};

/// What waits for the journal's next seal.
#[derive(Debug)]
pub(super) struct Journaled {
    log: FrameLog,
    /// Frames whose pages have been written.
    written: Vec<u32>,
    /// Frames that nobody owns any more.
    ended: Vec<u32>,
    /// Whether pages could leave, or frames be taken, after a seal.
    wants_cover: bool,
}

/// See the module.
#[derive(Debug)]
pub(super) struct Wary {
    /// The last ticket that another daemon may have answered.
    ticket: u64,
    /// Frames that were written down and hold nothing: they are nobody's until then.
    frames: Vec<u32>,
}

impl SpillState {
    /// Whether pages have been written that may leave after the journal's next seal.
    pub(super) fn awaits_cover(&self) -> bool {
        self.journaled.as_ref().is_some_and(|kept| !kept.written.is_empty())
    }

    /// Which chunks of the disk it has.
    pub(crate) fn chunks(&self) -> Vec<Option<LeftChunk>> {
        self.slots.chunks()
    }

    /// Reads a page from disk at once, by its table of slots: for a session that nobody is served in yet.
    pub(crate) fn read_now(
        &self,
        meta: &Heap,
        (slots, index): (Region, usize),
        into: &mut Vec<u8>,
    ) -> Result<(), PageError> {
        self.slots.read_now(meta.word(slots, 2 * index), into)
    }
}

impl ModelState {
    /// Whether the session's journal has no log of its frames yet, and needs one.
    pub(crate) fn needs_frame_log(&self) -> bool {
        self.spill.as_ref().is_some_and(|state| state.journaled.is_none())
    }

    /// From here on a journal says where pages are.
    pub(crate) fn logs_frames(&mut self, log: FrameLog) {
        if let Some(state) = &mut self.spill {
            state.slots.journaled(true);
            let (written, ended) = (Vec::new(), Vec::new());
            state.journaled = Some(Journaled { log, written, ended, wants_cover: false });
        }
    }

    /// The journal has been sealed.
    pub(crate) fn pages_covered(&mut self) {
        let Some(state) = &mut self.spill else { return };
        let Some(kept) = &mut state.journaled else { return };
        kept.log.clear_but(state.wary.as_ref().map_or(&[], |wary| &wary.frames));
        kept.wants_cover = false;
        for frame in kept.written.drain(..) {
            if let Some(frame) = state.frames.get_mut(frame as usize)
                && frame.content == Content::Written
            {
                frame.content = Content::Clean;
            }
        }
        state.slots.settle();
        for frame in kept.ended.drain(..) {
            self.arena.release(frame);
        }
        state.changed();
    }

    /// There is no journal any more.
    pub(crate) fn pages_not_kept(&mut self) {
        self.pages_covered();
        if let Some(state) = &mut self.spill {
            state.slots.journaled(false);
            state.journaled = None;
        }
    }

    /// Whether the journal should be sealed soon.
    pub(crate) fn pages_want_cover(&self) -> bool {
        let kept = self.spill.as_ref().and_then(|state| state.journaled.as_ref());
        kept.is_some_and(|kept| kept.wants_cover || kept.log.is_filling())
    }

    pub(super) fn wants_cover(&mut self) {
        if let Some(kept) = self.spill.as_mut().and_then(|state| state.journaled.as_mut()) {
            kept.wants_cover = true;
        }
    }

    /// A frame will hold something else than the journal may say.
    pub(crate) fn about_to_fill(&mut self, frame: u32) {
        if let Some(kept) = self.spill.as_mut().and_then(|state| state.journaled.as_mut()) {
            kept.log.take(frame);
        }
    }

    /// An answer is about to be given, and its rows read from then on.
    pub(crate) fn about_to_answer(&mut self, ticket: u64) {
        if let Some(kept) = self.spill.as_mut().and_then(|state| state.journaled.as_mut()) {
            kept.log.answers(ticket);
        }
    }

    /// Whether a frame whose owner lets go of it stays until the journal says so: its last owner, of a page that may be nowhere else.
    pub(super) fn waits_for_journal(&mut self, frame: u32) -> bool {
        if self.arena.is_shared(frame) {
            return false;
        }
        let Some(state) = &mut self.spill else { return false };
        let (Some(kept), Some(found)) = (&mut state.journaled, state.frames.get_mut(frame as usize)) else {
            return false;
        };
        if matches!(found.content, Content::Clean | Content::Free) {
            return false;
        }
        found.content = Content::Free;
        kept.ended.push(frame);
        true
    }

    /// A page has been written: it may leave, if a journal says so first.
    pub(super) fn page_is_on_disk(&mut self, at: u32, slot: u32) {
        let Some(state) = &mut self.spill else { return };
        let found = state.frames[at as usize];
        let Some(kept) = &mut state.journaled else {
            state.frames[at as usize].content = Content::Clean;
            return;
        };
        kept.written.push(at);
        state.frames[at as usize].content = Content::Written;
        let Some(sum) = state.slots.checksum(slot) else { return };
        for id in self.owners(at, found) {
            let Ok(sequence) = self.sequence(id) else { continue };
            let index = found.head as usize * sequence.capacity + found.page as usize;
            if let Some(slots) = sequence.slots.filter(|slots| self.slot_at(*slots, index) == slot) {
                self.meta.set_word(slots, 2 * index + 1, sum);
            }
        }
    }

    /// Answers up to a ticket are not read any more.
    pub(crate) fn pages_released(&mut self, through: u64) {
        let Some(state) = &mut self.spill else { return };
        state.released(through);
        if let Some(wary) = state.wary.take_if(|wary| wary.ticket <= through) {
            for frame in wary.frames {
                self.arena.release(frame);
            }
            state.changed();
        }
    }

    /// Takes what another daemon has left of these tables' pages, each a page table and its table of slots: in tables, a page is in its
    /// frame afterwards if it is there for certain, and on disk otherwise. False if it does not fit together.
    pub(crate) fn claim_pages(
        &mut self,
        tables: &[(Region, Region)],
        chunks: &[Option<LeftChunk>],
        taken: Option<&TakenFrames>,
    ) -> bool {
        let logged: Option<BTreeSet<u32>> = match taken {
            None => Some(BTreeSet::new()),
            Some(taken) => taken.frames.as_ref().map(|frames| frames.iter().copied().collect()),
        };
        let mut owners = Vec::new();
        for (table, slots) in tables {
            for index in 0..table.len / 4 {
                let (slot, sum) = (self.slot_at(*slots, index), self.meta.word(*slots, 2 * index + 1));
                let written = slot != NO_SLOT && sum != 0;
                let stays = match self.page_word(*table, index) {
                    PageWord::Page(frame) if written => {
                        if logged.as_ref().is_none_or(|logged| logged.contains(&frame)) {
                            self.tables.set_word(*table, index, SPILLED);
                        }
                        true
                    }
                    PageWord::Spilled if !written => return false,
                    PageWord::Spilled => true,
                    PageWord::Page(_) | PageWord::None | PageWord::Lost => false,
                };
                if stays {
                    owners.push((slot, sum));
                } else if slot != NO_SLOT {
                    // It was being written.
                    self.set_slot(*slots, index, NO_SLOT);
                }
            }
        }
        let Some(state) = &mut self.spill else { return false };
        state.slots.claim(chunks, owners).is_some()
    }

    /// Frames that were written down and have no owner, which nobody may have yet: all but those that are `owned`.
    pub(crate) fn wary_frames(
        taken: &TakenFrames,
        owned: &[u32],
        all: impl Iterator<Item = u32>,
    ) -> Vec<u32> {
        let owned: BTreeSet<u32> = owned.iter().copied().collect();
        let logged: Option<BTreeSet<u32>> =
            taken.frames.as_ref().map(|frames| frames.iter().copied().collect());
        all.filter(|frame| {
            !owned.contains(frame) && logged.as_ref().is_none_or(|logged| logged.contains(frame))
        })
        .collect()
    }

    /// Goes on with pages as another daemon has left them, once they have frames and slots: `wary` are frames that nobody may have before
    /// answers up to `ticket` are let go of.
    pub(crate) fn pages_go_on(&mut self, log: Option<FrameLog>, ticket: u64, wary: Vec<u32>) {
        let mut on_disk = BTreeSet::new();
        let open: Vec<_> = self.open_handles().collect();
        for id in open {
            let Ok(sequence) = self.sequence(id) else { continue };
            let (table, capacity, pages) = (sequence.table, sequence.capacity, sequence.pages);
            let Some(slots) = sequence.slots else { continue };
            for head in 0..self.heads() {
                for page in 0..pages {
                    let slot = self.slot_at(slots, head * capacity + page);
                    match self.page_word(table, head * capacity + page) {
                        PageWord::Page(frame) => {
                            let content = if slot == NO_SLOT { Content::Dirty } else { Content::Clean };
                            self.fill_frame(frame, (id.slot, head, page), content);
                        }
                        PageWord::Spilled => _ = on_disk.insert(slot),
                        PageWord::None | PageWord::Lost => {}
                    }
                }
            }
        }
        if let Some(state) = &mut self.spill {
            state.spilled = on_disk.len();
            state.wary = Some(Wary { ticket, frames: wary });
        }
        if let Some(log) = log {
            self.logs_frames(log);
        }
    }

    /// Bytes of a sequence's table of slots, for so many pages of each head, if it needs one.
    pub(crate) fn slot_table_bytes(&self, capacity: usize) -> Option<usize> {
        self.spill.is_some().then_some(self.heads() * capacity * SLOT_ENTRY)
    }

    /// A table of slots for a sequence that another daemon has had none for.
    pub(crate) fn slot_table_for(
        &mut self,
        left: Option<Region>,
        capacity: usize,
    ) -> Result<Option<Region>, MemoryError> {
        match left {
            Some(left) => Ok(Some(left)),
            None => self.new_slot_table(capacity),
        }
    }
}
