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

use std::collections::HashSet;

use kvoyant_protocol::control::{PageWord, SPILLED};
use kvoyant_protocol::memory::MemoryError;

use super::{Content, Io, NO_SLOT, SpillState};
use crate::journal::{FrameLog, TakenFrames};
use crate::lane::model::ModelState;
use crate::tiers::heap::{Heap, Region};
use crate::tiers::nvme::{LeftChunk, PageError};

/// What waits for the journal's next seal.
#[derive(Debug, Default)]
pub(super) struct Journaled {
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
        self.frame_log.is_none()
    }

    /// From here on a journal says where pages are.
    pub(crate) fn logs_frames(&mut self, log: FrameLog) {
        self.frame_log = Some(log);
        if let Some(state) = &mut self.spill {
            state.slots.journaled(true);
            state.journaled = Some(Journaled::default());
        }
    }

    /// The journal has been sealed.
    pub(crate) fn pages_covered(&mut self) {
        let Some(log) = &mut self.frame_log else { return };
        let Some(state) = &mut self.spill else { return log.clear_but(&[]) };
        let Some(journaled) = &mut state.journaled else { return };
        // Pages that come now are in their frames only later, and the journal says that these are free.
        let reading = state.ios.values().filter_map(|io| match io {
            Io::Read { frame, .. } => Some(*frame),
            Io::Write { .. } => None,
        });
        let wary = state.wary.iter().flat_map(|wary| &wary.frames).copied();
        log.clear_but(&wary.chain(reading).collect::<Vec<_>>());
        journaled.wants_cover = false;
        for frame in journaled.written.drain(..) {
            if let Some(frame) = state.frames.get_mut(frame as usize)
                && frame.content == Content::Written
            {
                frame.content = Content::Clean;
            }
        }
        state.slots.settle();
        for frame in journaled.ended.drain(..) {
            self.arena.release(frame);
        }
        state.changed();
    }

    /// There is no journal any more.
    pub(crate) fn pages_not_kept(&mut self) {
        self.pages_covered();
        self.frame_log = None;
        if let Some(state) = &mut self.spill {
            state.slots.journaled(false);
            state.journaled = None;
        }
    }

    /// Whether the journal should be sealed soon.
    pub(crate) fn pages_want_cover(&self) -> bool {
        let journaled = self.spill.as_ref().and_then(|state| state.journaled.as_ref());
        let Some((journaled, log)) = journaled.zip(self.frame_log.as_ref()) else { return false };
        journaled.wants_cover || log.is_filling(self.arena.free_pages())
    }

    pub(super) fn wants_cover(&mut self) {
        if let Some(journaled) = self.spill.as_mut().and_then(|state| state.journaled.as_mut()) {
            journaled.wants_cover = true;
        }
    }

    /// A frame will hold something else than the journal may say.
    pub(super) fn about_to_fill(&mut self, frame: u32) {
        if let (Some(log), Some(_)) = (&mut self.frame_log, &self.spill) {
            log.take(frame);
        }
    }

    /// An answer is about to be given, and its rows read from then on.
    pub(crate) fn about_to_answer(&mut self, ticket: u64) {
        if let Some(log) = &mut self.frame_log {
            log.answers(ticket);
        }
    }

    /// Drops one owner of a frame whose page is elsewhere for that owner, as the journal says, or never was anything.
    pub(crate) fn release_frame(&mut self, frame: u32) {
        if self.arena.release(frame)
            && let Some(state) = &mut self.spill
            && let Some(frame) = state.frames.get_mut(frame as usize)
        {
            frame.content = Content::Free;
        }
    }

    /// Drops one owner of a frame, which may be that owner's only place for the page as the journal knows it: nothing else comes there
    /// before the journal is sealed again.
    pub(crate) fn let_go_of_frame(&mut self, frame: u32) {
        let shared = self.arena.is_shared(frame);
        let state = self.spill.as_mut();
        let found =
            state.and_then(|state| Some((state.journaled.as_mut()?, state.frames.get_mut(frame as usize)?)));
        match found {
            Some((journaled, found)) if shared => {
                // The others may know a place on disk.
                if found.content == Content::Clean {
                    found.content = Content::Written;
                    journaled.written.push(frame);
                }
                self.release_frame(frame);
            }
            Some((journaled, found)) => {
                found.content = Content::Free;
                journaled.ended.push(frame);
            }
            None => self.release_frame(frame),
        }
    }

    /// Whether the journal says where a page in memory lies on disk, by its index in a sequence's tables.
    pub(super) fn is_known_on_disk(&self, frame: u32, slots: Option<Region>, index: usize) -> bool {
        let found = self.spill.as_ref().and_then(|state| state.frames.get(frame as usize));
        let written =
            |slots| self.slot_at(slots, index) != NO_SLOT && self.meta.word(slots, 2 * index + 1) != 0;
        found.is_some_and(|found| found.content == Content::Clean) && slots.is_some_and(written)
    }

    /// A page has been written: it may leave, if a journal says so first.
    pub(super) fn page_is_on_disk(&mut self, at: u32, slot: u32) {
        let Some(state) = &mut self.spill else { return };
        let found = state.frames[at as usize];
        let Some(journaled) = &mut state.journaled else {
            state.frames[at as usize].content = Content::Clean;
            return;
        };
        journaled.written.push(at);
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
        taken: &TakenFrames,
    ) -> bool {
        let logged: Option<HashSet<u32>> =
            taken.frames.as_ref().map(|frames| frames.iter().copied().collect());
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

    /// Frames that were written down and have no owner, which nobody may have yet, as they follow one another in the log: of the first `all`,
    /// those that may be had at all and are not `owned`.
    pub(crate) fn wary_frames(
        taken: &TakenFrames,
        owned: &[u32],
        all: usize,
        may_be_had: impl Fn(u32) -> bool,
    ) -> Vec<u32> {
        let Some(frames) = &taken.frames else {
            let mut free = vec![true; all];
            for frame in owned {
                if let Some(free) = free.get_mut(*frame as usize) {
                    *free = false;
                }
            }
            let frames = (0..).zip(free).filter_map(|(frame, free)| free.then_some(frame));
            return frames.filter(|frame| may_be_had(*frame)).collect();
        };
        // There are far more owned ones than these.
        let mut free: HashSet<u32> = frames.iter().copied().filter(|frame| may_be_had(*frame)).collect();
        owned.iter().for_each(|frame| _ = free.remove(frame));
        frames.iter().copied().filter(|frame| free.remove(frame)).collect()
    }

    /// Goes on with pages as another daemon has left them, once they have frames and slots: `wary` are frames that nobody may have before
    /// answers up to `ticket` are let go of.
    pub(crate) fn pages_go_on(&mut self, log: FrameLog, ticket: u64, wary: Vec<u32>) {
        let mut on_disk = HashSet::new();
        let open: Vec<_> = self.open_handles().collect();
        for id in open {
            let Ok(sequence) = self.sequence(id) else { continue };
            let (table, capacity, pages) = (sequence.table, sequence.capacity, sequence.pages);
            let Some(slots) = sequence.slots else { continue };
            for head in 0..self.heads() {
                for page in 0..pages {
                    let slot = self.slot_at(slots, head * capacity + page);
                    match self.page_word(table, head * capacity + page) {
                        // Published pages are never moved.
                        PageWord::Page(frame) if !self.arena.is_own_page(frame) => {}
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
        self.logs_frames(log);
    }

    /// A sequence's table of slots, if it needs one here: as another daemon has left it, or an empty one.
    pub(crate) fn slot_table_for(
        &mut self,
        left: Option<Region>,
        capacity: usize,
    ) -> Result<Option<Region>, MemoryError> {
        match left {
            Some(left) if self.spill.is_none() => {
                self.meta.release(left);
                Ok(None)
            }
            Some(left) => Ok(Some(left)),
            None => self.new_slot_table(capacity),
        }
    }
}
