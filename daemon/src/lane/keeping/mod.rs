//! A session that outlasts its daemon: what its lane writes to its journal, and when.
//!
//! Requests of the ring are counted, and so are control messages. A *group* of the journal has the state after so many of each; once it is
//! sealed, the client is told how many requests it covers, and keeps the others, to ask for them again. So every request counts once,
//! whatever dies when, and requests need not be such that they could be done twice. Three rules make that so:
//!
//! - an answer is posted before the group is sealed that covers its request: what is covered has been answered;
//! - a control message is covered, with its answer, before it is answered;
//! - what comes before a control message is covered before it is done: pages change hands then.
//!
//! What an operator does with a sequence of a session that lives is a control message too. A sequence whose image is being written when the
//! daemon ends is its client's again, unless its client has told something since, which the image does not have: then it is closed.

mod records;
mod restore;

use std::sync::Arc;

use kvoyant_protocol::layout::d2c;
use kvoyant_protocol::wire::SequenceId;
use serde::Serialize;
use tokio::sync::oneshot;

pub(crate) use records::TakenRecord;
pub use records::{About, Held, HeldExtent, Progress, SequenceRecord, SlotRecord};
pub use restore::{Left, Unfit};

use crate::journal::{FrameLog, Group, Journal, JournalError, Kind};
use crate::keep::{Keep, Piece};
use crate::lane::keeping::records::{PoolRecord, SlabRecord};
use crate::lane::model::ModelState;
use crate::lane::session::LaneSession;
use crate::lane::spill::SpillState;
use crate::tiers::arena::ExtentFile;

/// So many requests are covered together at least, where nothing but answers was asked for.
const TOGETHER: u64 = 64;

/// With more of them than this the lane has answers on their way come in first.
const UNCOVERED_MAX: u64 = 128;

/// … or than this where pages wait to leave host memory until they are covered.
const UNCOVERED_PAGES: u64 = 16;

/// Which heap is which in a journal.
const TABLES: u32 = 0;
const META: u32 = 1;

/// See the module.
#[derive(Debug)]
pub struct Keeping {
    keep: Arc<Keep>,
    session: u64,
    journal: Journal,
    /// The encoded [`About`].
    about: Vec<u8>,
    /// Requests that are covered.
    covered: u64,
    /// Whether the client has told something since, and not only asked.
    told: bool,
    controls: u64,
    answer: Vec<u8>,
    answered: bool,
    /// Whether a control message is being done.
    asked: bool,
    /// Sequences that it has opened, and of which its client has not heard.
    opened: Vec<SequenceId>,
    /// Seeds given to sequences before it.
    seeds: Option<u64>,
    /// Who waits for a control message to be covered.
    settling: Option<oneshot::Sender<()>>,
    /// Files of extents that others know of.
    extents: Vec<Option<HeldExtent>>,
    held: Vec<u8>,
    group: Group,
    given_up: bool,
}

fn encoded<T: Serialize>(value: &T) -> Vec<u8> {
    postcard::to_stdvec(value).unwrap_or_else(|error| unreachable!("plain data always serialises: {error}"))
}

impl Keeping {
    /// For a session that has just registered its model. Its journal is empty until it is sealed.
    ///
    /// # Errors
    /// No memory for the journal, or nobody takes it.
    pub fn begin(keep: Arc<Keep>, about: &About) -> Result<Self, JournalError> {
        let journal = Journal::create(about.session)?;
        for (index, file) in journal.fds()?.into_iter().enumerate() {
            keep.add(about.session, Piece::Journal(index as u8), file)?;
        }
        Ok(Self::over(keep, journal, about, (0, Vec::new()), Vec::new()))
    }

    /// Goes on with a journal.
    pub(crate) fn over(
        keep: Arc<Keep>,
        journal: Journal,
        about: &About,
        (controls, answer): (u64, Vec<u8>),
        extents: Vec<Option<HeldExtent>>,
    ) -> Self {
        Self {
            keep,
            session: about.session,
            journal,
            about: encoded(about),
            covered: 0,
            told: false,
            controls,
            answered: !answer.is_empty(),
            answer,
            asked: false,
            opened: Vec::new(),
            seeds: None,
            settling: None,
            extents,
            held: Vec::new(),
            group: Group::default(),
            given_up: false,
        }
    }

    fn give_up(&mut self, why: &str) {
        tracing::warn!("session {} will not outlast this daemon: {why}", self.session);
        self.journal.erase();
        self.keep.forget(self.session);
        self.given_up = true;
    }

    /// Nobody goes on with the session.
    pub(crate) fn let_go(&mut self) {
        if !std::mem::replace(&mut self.given_up, true) {
            self.journal.erase();
            self.keep.forget(self.session);
        }
    }

    /// Hands new extents over, and takes note of those that were given back, which are let go of once that is covered.
    fn follow_extents(&mut self, model: &ModelState) -> std::io::Result<Vec<HeldExtent>> {
        let mut gone = Vec::new();
        for (index, extent) in model.arena.files().enumerate() {
            match (self.extents.get(index).copied(), extent) {
                (None, Some(extent)) => {
                    let (held, file) = match extent {
                        ExtentFile::Own(extent) => (HeldExtent::Own(extent.number()?), extent.fd()),
                        ExtentFile::Shared(extent) => (HeldExtent::Shared(extent.number()?), extent.fd()),
                    };
                    self.keep.add(self.session, held.piece(), file.map_err(std::io::Error::other)?)?;
                    self.extents.push(Some(held));
                }
                (None, None) => self.extents.push(None),
                (Some(Some(held)), None) => {
                    gone.push(held);
                    self.extents[index] = None;
                }
                (Some(_), _) => {}
            }
        }
        Ok(gone)
    }

    fn write(&mut self, model: &mut ModelState, progress: &Progress) -> Result<(), JournalError> {
        if model.needs_frame_log() {
            let (log, file) = FrameLog::create()?;
            self.keep.add(self.session, Piece::Frames, file)?;
            model.logs_frames(log);
        }
        let gone = self.follow_extents(model)?;
        let all = self.journal.wants_all();
        let group = &mut self.group;
        group.clear();
        if all {
            group.push(Kind::Session, &self.about, &[]);
        }
        group.push(Kind::State, &encoded(progress), &[]);
        if all || std::mem::take(&mut self.answered) {
            group.push(Kind::Answer, &self.answer, &[]);
        }
        let held = encoded(&model.held(&self.extents));
        if all || held != self.held {
            group.push(Kind::Memory, &held, &[]);
            self.held = held;
        }
        let slots = &model.sequences;
        model.touched.take(all, slots.len(), |slot| {
            let (generation, sequence) = (slots[slot].generation, &slots[slot].sequence);
            // Most were never used.
            if generation > 0 || sequence.is_some() {
                let record = SlotRecord { generation, open: sequence.as_ref().map(SequenceRecord::of) };
                group.push(Kind::Sequence, &(slot as u32).to_le_bytes(), &encoded(&record));
            }
        });
        for (heap, id) in [(&mut model.tables, TABLES), (&mut model.meta, META)] {
            let take =
                |file: u32, offset: usize, bytes: &[u8]| group.push_bytes(id, file, offset as u64, bytes);
            if all {
                heap.take_all(take);
            } else {
                heap.take_written(take);
            }
        }
        if all {
            self.journal.begin(&self.group)?;
        } else {
            self.journal.add(&self.group)?;
        }
        for held in gone {
            self.keep.remove(self.session, held.piece());
        }
        Ok(())
    }
}

impl ModelState {
    /// Its memory, as another daemon finds it.
    fn held(&self, extents: &[Option<HeldExtent>]) -> Held {
        let lens = |heap: &crate::tiers::heap::Heap| {
            (0..heap.files()).map(|file| heap.file_len(file) as u64).collect()
        };
        let pool = |pool: &crate::lane::digests::DigestPool| {
            let method = self.methods.iter().position(|method| method.digest_key() == Some(pool.key()));
            Some(PoolRecord { method: method? as u32, regions: pool.blocks.regions().to_vec() })
        };
        Held {
            extents: extents.to_vec(),
            tables: lens(&self.tables),
            meta: lens(&self.meta),
            directory: self.directory,
            pools: self.pools.iter().filter_map(pool).collect(),
            slab: self.slab.as_ref().map(|slab| SlabRecord {
                pages: slab.pages.total() as u32,
                keep: self.keep,
                device_share: self.device_share,
            }),
            chunks: self.spill.as_ref().map(SpillState::chunks).unwrap_or_default(),
        }
    }

    /// Pages of the slab that will be free.
    fn limbo(&self) -> Vec<(u64, u32)> {
        let limbo = self.slab.iter().flat_map(|slab| &slab.limbo);
        limbo.map(|limbo| (limbo.ticket, limbo.pages.len() as u32)).collect()
    }
}

/// Slots whose sequences have changed.
#[derive(Debug, Default)]
pub(crate) struct Touched(Vec<u64>);

impl Touched {
    pub(crate) fn mark(&mut self, slot: usize) {
        // No session has more of them, whatever a client says.
        const SLOTS_MAX: usize = 1 << 16;
        if slot >= SLOTS_MAX {
            return;
        }
        if self.0.len() <= slot / 64 {
            self.0.resize(slot / 64 + 1, 0);
        }
        self.0[slot / 64] |= 1 << (slot % 64);
    }

    /// Calls `take` with each of them, or with all slots, and forgets them.
    fn take(&mut self, all: bool, slots: usize, mut take: impl FnMut(usize)) {
        if all {
            self.0.fill(0);
            (0..slots).for_each(take);
            return;
        }
        for (at, word) in self.0.iter_mut().enumerate() {
            let mut left = std::mem::take(word);
            while left != 0 {
                let slot = at * 64 + left.trailing_zeros() as usize;
                left &= left - 1;
                if slot < slots {
                    take(slot);
                }
            }
        }
    }
}

impl LaneSession {
    /// Its model has been registered, or restored: from here on it is kept.
    pub(crate) fn keep(&mut self, keeping: Box<Keeping>) {
        if let Some(model) = &mut self.model {
            model.tables.watch();
            model.meta.watch();
        }
        self.keeping = Some(keeping);
        self.cover();
    }

    /// The client has told something.
    pub(super) fn was_told(&mut self) {
        if let Some(keeping) = &mut self.keeping {
            keeping.told = true;
        }
    }

    /// A control message is about to be done; false if what came before it has to be covered first, and answers are on their way.
    pub(super) fn begins_control(&mut self) -> bool {
        let begins = self.keeping.as_ref().is_some_and(|keeping| !keeping.asked);
        if begins && !self.cover() {
            return false;
        }
        if let (Some(keeping), Some(model)) = (&mut self.keeping, &self.model) {
            keeping.asked = true;
            keeping.seeds.get_or_insert(model.seeds);
        }
        true
    }

    /// A control message has opened a sequence, and may not be done yet.
    pub(super) fn has_opened(&mut self, sequence: SequenceId) {
        if let Some(keeping) = &mut self.keeping {
            keeping.opened.push(sequence);
        }
    }

    /// A control message has been done, with this answer for its client if it came from there. `done` hears once that is covered.
    pub(super) fn settles(&mut self, answer: Option<Vec<u8>>, done: oneshot::Sender<()>) {
        let Some(keeping) = &mut self.keeping else {
            let _ = done.send(());
            return;
        };
        (keeping.asked, keeping.seeds) = (false, None);
        keeping.opened.clear();
        if let Some(answer) = answer {
            keeping.controls += 1;
            (keeping.answer, keeping.answered) = (answer, true);
        }
        keeping.settling = Some(done);
        self.cover_if_due(true);
    }

    /// Whether the session takes nothing new until what is on its way has come.
    pub(super) fn must_rest(&self) -> bool {
        let Some(keeping) = &self.keeping else { return false };
        let most = if self.pages_want_cover() { UNCOVERED_PAGES } else { UNCOVERED_MAX };
        let behind = self.requests_done - keeping.covered > most && !keeping.asked;
        (behind || keeping.settling.is_some()) && self.has_answers_under_way()
    }

    /// Covers what has been done, if it is time to; `idle`: nothing else is to be done.
    pub(super) fn cover_if_due(&mut self, idle: bool) {
        let Some(keeping) = &self.keeping else { return };
        let uncovered = self.requests_done - keeping.covered;
        let pages = self.pages_want_cover();
        let due = keeping.settling.is_some() || uncovered >= TOGETHER || pages || idle && keeping.told;
        if due
            && self.cover()
            && let Some(done) = self.keeping.as_mut().and_then(|keeping| keeping.settling.take())
        {
            let _ = done.send(());
        }
    }

    /// The session ends: nobody goes on with it. Its memory comes back only after that is known.
    pub(super) fn let_go(&mut self) {
        if let Some(keeping) = &mut self.keeping {
            keeping.let_go();
        }
    }

    /// Whether it can give extents back now.
    #[must_use]
    pub(super) fn may_yield(&self) -> bool {
        self.keeping.as_ref().is_none_or(|keeping| !keeping.asked)
    }

    /// Whether pages wait to leave host memory, or frames to be used again, until that is covered.
    fn pages_want_cover(&self) -> bool {
        self.model.as_ref().is_some_and(|model| model.pages_want_cover())
    }

    /// A control message waits for pages, or for the next part of an image. What was done before it, and of it, may be covered meanwhile: if the daemon ends then, the next one
    /// closes what it has opened, and the client asks again.
    pub(super) fn puts_control_off(&mut self) {
        if let Some(keeping) = &mut self.keeping {
            keeping.asked = false;
        }
    }

    /// Covers what has been done; false if that cannot be now.
    pub(super) fn cover(&mut self) -> bool {
        let on_their_way = self.has_answers_under_way();
        let (Some(keeping), Some(model)) = (&mut self.keeping, &mut self.model) else { return true };
        if !keeping.given_up {
            if on_their_way || keeping.asked {
                return false;
            }
            let progress = Progress {
                requests: self.requests_done,
                generation: self.served.generation,
                controls: keeping.controls,
                tickets: self.last_ticket,
                released_through: self.released_through,
                stats: self.stats.to_vec(),
                seeds: keeping.seeds.unwrap_or(model.seeds),
                unsettled: keeping.opened.clone(),
                planned: model.planned.iter().map(|(id, layer)| (*id, *layer as u32)).collect(),
                open: model.open.clone(),
                limbo: model.limbo(),
                taken: model.taken_for_good(),
            };
            match keeping.write(model, &progress) {
                Ok(()) => model.pages_covered(),
                Err(error) => {
                    keeping.give_up(&error.to_string());
                    model.pages_not_kept();
                }
            }
            if model.spill.is_some() {
                // What waited for pages may find some, and those that were given up count no more.
                (self.page_news, self.dirty) = (true, true);
            }
        }
        (keeping.covered, keeping.told) = (self.requests_done, false);
        self.d2c.store_u64(d2c::KEPT, self.requests_done);
        true
    }
}

#[cfg(test)]
mod crash;
#[cfg(test)]
mod tests;
