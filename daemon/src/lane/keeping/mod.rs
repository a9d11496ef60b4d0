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
//! A session that has something that cannot be left to another daemon (rows of published prefixes, a sequence that an operator has taken) gives up.

mod records;
mod restore;

use std::sync::Arc;

use kvoyant_protocol::layout::d2c;
use serde::Serialize;
use tokio::sync::oneshot;

pub use records::{About, Held, Progress, SequenceRecord, SlotRecord};
pub use restore::{Left, Unfit};

use crate::journal::{Group, Journal, JournalError, Kind};
use crate::keep::{Keep, Piece};
use crate::lane::keeping::records::{PoolRecord, SlabRecord};
use crate::lane::model::ModelState;
use crate::lane::session::LaneSession;

/// So many requests are covered together at least, where nothing but answers was asked for.
const TOGETHER: u64 = 64;

/// With more of them than this the lane has answers on their way come in first.
const UNCOVERED_MAX: u64 = 128;

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
    /// Who waits for a control message to be covered.
    settling: Option<oneshot::Sender<()>>,
    /// Files of extents that others know of.
    extents: Vec<Option<u64>>,
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
        extents: Vec<Option<u64>>,
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

    /// Hands new extents over, and takes note of those that were given back, which are let go of once that is covered.
    fn follow_extents(&mut self, model: &ModelState) -> std::io::Result<Vec<u64>> {
        let mut gone = Vec::new();
        for (index, extent) in model.arena.own_files().enumerate() {
            match (self.extents.get(index).copied(), extent) {
                (None, Some(extent)) => {
                    let number = extent.number()?;
                    let file = extent.fd().map_err(std::io::Error::other)?;
                    self.keep.add(self.session, Piece::Extent(number), file)?;
                    self.extents.push(Some(number));
                }
                (None, None) => self.extents.push(None),
                (Some(Some(number)), None) => {
                    gone.push(number);
                    self.extents[index] = None;
                }
                (Some(_), _) => {}
            }
        }
        Ok(gone)
    }

    fn write(&mut self, model: &mut ModelState, progress: &Progress) -> Result<(), JournalError> {
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
        for number in gone {
            self.keep.remove(self.session, Piece::Extent(number));
        }
        Ok(())
    }
}

impl ModelState {
    /// Its memory, as another daemon finds it.
    fn held(&self, extents: &[Option<u64>]) -> Held {
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
        if let Some(keeping) = &mut self.keeping {
            keeping.asked = true;
        }
        true
    }

    /// A control message has been done, with this answer for its client if it came from there. `done` hears once that is covered.
    pub(super) fn settles(&mut self, answer: Option<Vec<u8>>, done: oneshot::Sender<()>) {
        let Some(keeping) = &mut self.keeping else {
            let _ = done.send(());
            return;
        };
        keeping.asked = false;
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
        let behind = self.requests_done - keeping.covered > UNCOVERED_MAX && !keeping.asked;
        (behind || keeping.settling.is_some()) && self.has_answers_under_way()
    }

    /// Covers what has been done, if it is time to; `idle`: nothing else is to be done.
    pub(super) fn cover_if_due(&mut self, idle: bool) {
        let Some(keeping) = &self.keeping else { return };
        let uncovered = self.requests_done - keeping.covered;
        let due = keeping.settling.is_some() || uncovered >= TOGETHER || idle && keeping.told;
        if due
            && self.cover()
            && let Some(done) = self.keeping.as_mut().and_then(|keeping| keeping.settling.take())
        {
            let _ = done.send(());
        }
    }

    /// The session ends: nobody goes on with it. Its memory comes back only after that is known.
    pub(super) fn let_go(&mut self) {
        if let Some(keeping) = &mut self.keeping
            && !std::mem::replace(&mut keeping.given_up, true)
        {
            keeping.journal.erase();
            keeping.keep.forget(keeping.session);
        }
    }

    /// Whether it can give extents back now.
    #[must_use]
    pub(super) fn may_yield(&self) -> bool {
        self.keeping.as_ref().is_none_or(|keeping| !keeping.asked)
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
                seeds: model.seeds,
                planned: model.planned.iter().map(|(id, layer)| (*id, *layer as u32)).collect(),
                open: model.open.clone(),
                limbo: model.limbo(),
            };
            let why = match () {
                () if model.arena.has_foreign() => Some("it has begun with a published prefix".to_owned()),
                () if !model.taken.is_empty() => {
                    Some("an operator has suspended a sequence of it".to_owned())
                }
                () => keeping.write(model, &progress).err().map(|error| error.to_string()),
            };
            if let Some(why) = why {
                keeping.give_up(&why);
            }
        }
        (keeping.covered, keeping.told) = (self.requests_done, false);
        self.d2c.store_u64(d2c::KEPT, self.requests_done);
        true
    }
}

#[cfg(test)]
mod tests;
