//! Pages that leave host memory and come back: a session's side of the spill engine.
//!
//! A *frame* is a page's place in the arena, by page id. A page that nobody needs soon is written to a slot on disk, once, for
//! full pages never change; then its frame can be given up at any time, and the page table says [`SPILLED`]. Who selects
//! rows of such a page has it read into a frame again, and its answer waits for that (`bring`). Digests stay in memory, so
//! that no selection waits for a disk.
//!
//! | room | what lives there |
//! |---|---|
//! | `leave` | which pages may leave, which leave first, and when they are written |
//! | `bring` | pages on their way back, and who waits for them |
//! | `before` | what has to be in memory before a request can be done at all |
//! | `kept` | pages of a session that outlasts its daemon |
//!
//! What stays: sinks and the window with a page of margin, which the client reads itself; pages that are not full; layers
//! with rows that are about to be digested, or whose last answer is still being read; sequences that their client selects
//! for, or that are served in graph mode.
//!
//! [`SPILLED`]: kvoyant_protocol::control::SPILLED

mod before;
mod bring;
mod kept;
mod leave;

use std::collections::HashMap;
use std::sync::Arc;

use kvoyant_protocol::control::{NO_PAGE, PageWord};
use kvoyant_protocol::memory::{MemoryError, SharedMapping};
use kvoyant_protocol::quota::OverQuota;
use kvoyant_protocol::wire::SequenceId;

pub(crate) use before::Before;
pub use leave::Evicted;

use crate::lane::model::ModelState;
use crate::quota::Account;
use crate::tiers::heap::Region;
use crate::tiers::nvme::{Job, Slots, Spill, SpillReport};

/// A page without a slot on disk.
pub(crate) const NO_SLOT: u32 = u32::MAX;

/// Bytes of an entry of a table of slots: the slot, and the checksum of what has been written there, or 0.
pub(crate) const SLOT_ENTRY: usize = 8;

/// Where pages may go, and how many may stay.
#[derive(Debug, Clone)]
pub struct SpillTo {
    /// The engine.
    pub spill: Arc<Spill>,
    /// The part of a session's pages that may be in host memory at a time, within `(0, 1]`.
    pub host_share: f64,
}

/// What a frame holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
enum Content {
    /// Nothing.
    #[default]
    Free,
    /// A page that is not on disk.
    Dirty,
    /// A page on its way there, by this operation.
    Writing(u64),
    /// A page that is on disk too, which the session's journal does not say yet.
    Written,
    /// A page that is on disk too.
    Clean,
    /// A page on its way back.
    Reading,
}

#[derive(Debug, Clone, Copy, Default)]
struct Frame {
    content: Content,
    /// Head among all layers' heads, and the page's index in it.
    head: u32,
    page: u32,
    /// A sequence that had the page when it came here.
    sequence: u32,
    /// How often the clock passes it over.
    chances: u8,
}

/// An operation under way.
#[derive(Debug)]
enum Io {
    Write {
        frame: u32,
        slot: u32,
    },
    Read {
        frame: u32,
        slot: u32,
        head: usize,
        page: usize,
        /// Answers that wait for it.
        waiters: Vec<u64>,
        /// The last one that asked.
        asked_by: u64,
    },
}

/// What has happened since it was last asked for.
#[derive(Debug, Default, Clone, Copy)]
pub(crate) struct SpillCounts {
    pub(crate) written: u64,
    pub(crate) read: u64,
    pub(crate) lost: u64,
}

/// See the module.
#[derive(Debug)]
pub(crate) struct SpillState {
    spill: Arc<Spill>,
    host_share: f64,
    session: u64,
    report: Option<Arc<SpillReport>>,
    slots: Slots,
    frames: Vec<Frame>,
    hand: usize,
    ios: HashMap<u64, Io>,
    /// Reads under way by their slot.
    reading: HashMap<u32, u64>,
    next: u64,
    jobs: Vec<Job>,
    /// Extents that the engine knows.
    registered: Vec<Option<Arc<SharedMapping>>>,
    /// Pages that are on disk alone.
    spilled: usize,
    /// Last ticket whose answer is not read any more.
    released_through: u64,
    /// Layers that a request which waits for pages needs as they are.
    held: Vec<(SequenceId, usize)>,
    /// The same of a control request.
    kept: Option<(SequenceId, std::ops::Range<usize>)>,
    /// Whether a whole turn of the clock has found nothing that may leave, and nothing has changed since.
    stuck: bool,
    /// Frames passed over since one has left.
    vain: usize,
    counts: SpillCounts,
    /// Most pages that were in host memory at a time.
    peak: usize,
    /// Most pages that there were.
    most: usize,
    /// Whether it has been said that the disk takes no more.
    said_full: bool,
    /// What a journal has to do with it, if there is one.
    journaled: Option<kept::Journaled>,
    /// What the client may be reading that another daemon has named to it.
    wary: Option<kept::Wary>,
}

impl SpillState {
    pub(crate) fn new(to: SpillTo, page_bytes: usize, account: &Arc<Account>) -> Self {
        Self {
            slots: to.spill.slots(page_bytes).of(account),
            spill: to.spill,
            host_share: to.host_share,
            session: 0,
            report: None,
            frames: Vec::new(),
            hand: 0,
            ios: HashMap::new(),
            reading: HashMap::new(),
            next: 1,
            jobs: Vec::new(),
            registered: Vec::new(),
            spilled: 0,
            released_through: 0,
            held: Vec::new(),
            kept: None,
            stuck: false,
            vain: 0,
            counts: SpillCounts::default(),
            peak: 0,
            most: 0,
            said_full: false,
            journaled: None,
            wary: None,
        }
    }

    /// Why its pages cannot have more of the disk, if that is a quota or a share of its user's.
    pub(crate) fn refused(&self) -> Option<OverQuota> {
        self.slots.refused().cloned()
    }

    /// Whether operations are under way that read or write the session's extents.
    pub(crate) fn is_busy(&self) -> bool {
        !self.ios.is_empty()
    }

    /// What has happened since the last call.
    pub(crate) fn take_counts(&mut self) -> SpillCounts {
        std::mem::take(&mut self.counts)
    }

    /// Pages on disk alone; most pages that were in host memory at a time; most that there were.
    pub(crate) fn pages(&self) -> [usize; 3] {
        [self.spilled, self.peak, self.most]
    }

    /// Other pages may leave than before.
    pub(crate) fn changed(&mut self) {
        (self.stuck, self.vain) = (false, 0);
    }

    /// Keeps pages of these layers where they are until something else is asked.
    pub(crate) fn keep(&mut self, kept: Option<(SequenceId, std::ops::Range<usize>)>) {
        self.kept = kept;
        self.changed();
    }

    /// Keeps a layer's pages where they are until the request is done.
    pub(crate) fn hold(&mut self, id: SequenceId, layer: usize) {
        self.held.push((id, layer));
    }

    /// Answers up to this ticket are not read any more.
    pub(crate) fn released(&mut self, through: u64) {
        if self.released_through != through {
            self.changed();
        }
        self.released_through = through;
    }

    /// The engine need not know an extent any more.
    pub(crate) fn forget(&mut self, memory: &Arc<SharedMapping>) {
        let same = |known: &&mut Option<Arc<SharedMapping>>| {
            known.as_ref().is_some_and(|known| Arc::ptr_eq(known, memory))
        };
        if let Some(known) = self.registered.iter_mut().find(same) {
            *known = None;
            self.spill.forget(memory);
        }
    }

    fn operation(&mut self) -> u64 {
        self.next += 1;
        self.next
    }
}

impl Drop for SpillState {
    fn drop(&mut self) {
        self.registered.iter().flatten().for_each(|memory| self.spill.forget(memory));
    }
}

impl ModelState {
    /// Says who the session is, and where the ends of its operations go.
    pub(crate) fn attach_spill(&mut self, session: u64, report: &Arc<SpillReport>) {
        if let Some(state) = &mut self.spill {
            state.session = session;
            state.report = Some(Arc::clone(report));
        }
    }

    /// Hands over what has been planned.
    pub(crate) fn submit_pages(&mut self) {
        let Some(state) = &mut self.spill else { return };
        for extent in state.registered.len()..self.arena.extents() {
            // Another daemon may have given it back; pages of others' extents are never moved.
            let memory = self.arena.is_own(extent).then(|| Arc::clone(self.arena.memory(extent)));
            memory.iter().for_each(|memory| state.spill.register(memory));
            state.registered.push(memory);
        }
        let used = self.arena.used_pages();
        state.peak = state.peak.max(used);
        state.most = state.most.max(used + state.spilled);
        if !state.jobs.is_empty() {
            state.spill.submit(&mut state.jobs);
        }
    }

    /// A new sequence's table of slots, for `capacity` pages of each head.
    pub(crate) fn new_slot_table(&mut self, capacity: usize) -> Result<Option<Region>, MemoryError> {
        if self.spill.is_none() {
            return Ok(None);
        }
        let table = self.meta.allocate(self.heads() * capacity * SLOT_ENTRY)?;
        self.meta.get_mut(table).fill(0xff);
        Ok(Some(table))
    }

    /// Where a page lies on disk, or is about to, by its index in a sequence's table.
    pub(crate) fn slot_at(&self, slots: Region, index: usize) -> u32 {
        self.meta.word(slots, 2 * index)
    }

    /// A page is about to lie in a slot, or in none.
    fn set_slot(&mut self, slots: Region, index: usize, slot: u32) {
        self.meta.set_word(slots, 2 * index, slot);
        self.meta.set_word(slots, 2 * index + 1, 0);
    }

    /// A fork's own table over the same slots, of its first `pages` pages.
    pub(crate) fn share_slots(
        &mut self,
        table: Option<Region>,
        capacity: usize,
        pages: usize,
    ) -> Result<Option<Region>, MemoryError> {
        let Some(from) = table else { return Ok(None) };
        let table = self.meta.copy(from)?;
        for index in 0..table.len / SLOT_ENTRY {
            let slot = self.slot_at(table, index);
            if index % capacity >= pages {
                self.set_slot(table, index, NO_SLOT);
            } else if slot != NO_SLOT
                && let Some(state) = &mut self.spill
            {
                state.slots.share(slot);
            }
        }
        Ok(Some(table))
    }

    /// Takes a free page for a sequence. [`SessionArena::reserve`](crate::tiers::arena::SessionArena::reserve) has made sure that there
    /// is one.
    pub(crate) fn take_page(&mut self, id: SequenceId, head: usize, page: usize) -> u32 {
        let Some(own) = self.arena.take() else { unreachable!("pages were reserved") };
        self.fill_frame(own, (id.slot, head, page), Content::Dirty);
        self.about_to_fill(own);
        own
    }

    fn fill_frame(&mut self, frame: u32, (sequence, head, page): (u32, usize, usize), content: Content) {
        let Some(state) = &mut self.spill else { return };
        if state.frames.len() <= frame as usize {
            state.frames.resize(frame as usize + 1, Frame::default());
        }
        state.frames[frame as usize] =
            Frame { content, head: head as u32, page: page as u32, sequence, chances: 0 };
    }

    /// Drops one owner of a page, wherever it is, and leaves the entry empty.
    pub(crate) fn drop_page(&mut self, table: Region, slots: Option<Region>, index: usize) {
        let word = PageWord::of(self.tables.word(table, index));
        self.tables.set_word(table, index, NO_PAGE);
        if let PageWord::Page(page) = word {
            if self.is_known_on_disk(page, slots, index) {
                self.release_frame(page);
            } else {
                self.let_go_of_frame(page);
            }
        }
        let last = slots.is_some_and(|slots| self.drop_slot(slots, index));
        if word == PageWord::Spilled
            && last
            && let Some(state) = &mut self.spill
        {
            state.spilled -= 1;
        }
    }

    /// Drops one owner of a page's slot; true if it was the last one.
    fn drop_slot(&mut self, slots: Region, index: usize) -> bool {
        let slot = self.slot_at(slots, index);
        if slot == NO_SLOT {
            return false;
        }
        self.set_slot(slots, index, NO_SLOT);
        self.spill.as_mut().is_some_and(|state| state.slots.release(slot))
    }

    /// A page is written to again: what is on disk is not it any more.
    pub(crate) fn page_changes(&mut self, table: Region, slots: Option<Region>, index: usize) {
        let Some(slots) = slots else { return };
        let PageWord::Page(page) = PageWord::of(self.tables.word(table, index)) else { return };
        self.drop_slot(slots, index);
        if self.arena.is_shared(page) {
            // What is shared is copied before it is written to.
            return;
        }
        if let Some(frame) = self.spill.as_mut().and_then(|state| state.frames.get_mut(page as usize)) {
            frame.content = Content::Dirty;
        }
    }

    /// Counts a page as used by a selection.
    pub(crate) fn note_use(&mut self, frame: u32) {
        const MOST: u8 = 3;
        if let Some(frame) = self.spill.as_mut().and_then(|state| state.frames.get_mut(frame as usize)) {
            frame.chances = (frame.chances + 1).min(MOST);
        }
    }

    /// What a page table says.
    pub(crate) fn page_word(&self, table: Region, index: usize) -> PageWord {
        PageWord::of(self.tables.word(table, index))
    }
}
