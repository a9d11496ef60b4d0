//! The arena: extents of 64 MiB, each a memfd of one session, cut into refcounted pages.
//!
//! A page holds P rows of one layer and KV head of one sequence. Forks share pages; whoever wants to write to a
//! shared page gets a copy first. [`ArenaBudget`] bounds what all sessions have together; a session's own
//! [`SessionArena`] belongs to one lane and takes no lock. It never makes an extent: what is missing comes from the
//! [pool](super::pool), which the control plane asks.

use std::sync::Arc;

use kvoyant_protocol::EXTENT_BYTES;
pub use kvoyant_protocol::layout::PageGeometry;
use kvoyant_protocol::memory::{MemoryError, SharedMapping};

use crate::tiers::budget::ArenaBudget;
use crate::tiers::extent::Extent;
use crate::tiers::pool::Supply;
use crate::tiers::purse::Purse;
use crate::tiers::shared::SharedExtent;

/// A page could not be had because the arena is full.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ArenaFull {
    /// Pages that were asked for beyond those that could be had.
    pub missing_pages: usize,
}

/// Where an extent comes from.
#[derive(Debug)]
enum Place {
    /// The session's supply, by index.
    Own(usize),
    /// Somebody else.
    Foreign(Arc<SharedExtent>),
    /// It was given back; none of its pages is used again.
    Gone,
}

/// An extent that another process had.
#[derive(Debug)]
pub enum LeftExtent {
    /// The session's, by its index in the supply.
    Own(usize),
    /// Somebody else's, whose pages are only read.
    Shared(Arc<SharedExtent>),
    /// It was given back.
    Gone,
}

/// An extent's file.
#[derive(Debug)]
pub enum ExtentFile<'a> {
    /// The session's own.
    Own(&'a Extent),
    /// Somebody else's.
    Shared(&'a SharedExtent),
}

/// The extents and pages of one session.
#[derive(Debug)]
pub struct SessionArena {
    geometry: PageGeometry,
    supply: Supply,
    /// Its extents in the order in which they came.
    places: Vec<Place>,
    /// Pages of extents that are not its own.
    foreign: usize,
    /// Pages of extents that were given back.
    gone: usize,
    /// References per page; 0: free.
    references: Vec<u32>,
    /// Free pages; the last is taken first, and pages of a new extent are taken in rising order, so that pages
    /// that are asked for together lie side by side.
    free: Vec<u32>,
}

impl SessionArena {
    /// An arena in these extents, and more that are added.
    #[must_use]
    pub fn new(supply: Supply, geometry: PageGeometry) -> Self {
        let empty = supply.empty();
        let (places, references, free) = (Vec::new(), Vec::new(), Vec::new());
        let mut arena = Self { geometry, supply: empty, places, foreign: 0, gone: 0, references, free };
        arena.add(supply);
        arena
    }

    /// The arena that another process had: its extents in the order in which they came, and pages in use as often as they are owned. `None` if
    /// these do not fit together.
    #[must_use]
    pub fn restore(
        supply: Supply,
        geometry: PageGeometry,
        extents: Vec<LeftExtent>,
        owners: impl IntoIterator<Item = u32>,
    ) -> Option<Self> {
        let per_extent = geometry.pages_per_extent();
        let mut seen = vec![false; supply.extents().len()];
        let mut references = vec![0_u32; extents.len().checked_mul(per_extent)?];
        let mut places = Vec::with_capacity(extents.len());
        let (mut foreign, mut gone) = (0, 0);
        for extent in extents {
            places.push(match extent {
                LeftExtent::Gone => {
                    gone += per_extent;
                    Place::Gone
                }
                LeftExtent::Shared(extent) => {
                    foreign += per_extent;
                    Place::Foreign(extent)
                }
                LeftExtent::Own(index) => {
                    let seen = seen.get_mut(index)?;
                    if std::mem::replace(seen, true) {
                        return None;
                    }
                    Place::Own(index)
                }
            });
        }
        for page in owners {
            let extent = places.get(page as usize / per_extent)?;
            if matches!(extent, Place::Gone) {
                return None;
            }
            references[page as usize] += 1;
        }
        let is_free = |page: &u32| {
            references[*page as usize] == 0 && matches!(places[*page as usize / per_extent], Place::Own(_))
        };
        let free = (0..references.len() as u32).rev().filter(is_free).collect();
        seen.iter().all(|seen| *seen).then_some(Self {
            geometry,
            supply,
            places,
            foreign,
            gone,
            references,
            free,
        })
    }

    /// Its extents, in the order in which they came; `None` for one that is gone.
    pub fn files(&self) -> impl ExactSizeIterator<Item = Option<ExtentFile<'_>>> {
        self.places.iter().map(|place| match place {
            Place::Own(index) => self.supply.extents().get(*index).map(ExtentFile::Own),
            Place::Foreign(extent) => Some(ExtentFile::Shared(extent)),
            Place::Gone => None,
        })
    }

    /// The client whose they are is here: from now on they are given back as all others.
    pub fn claimed(&mut self) {
        self.supply.claimed();
    }

    /// Sizes of its pages.
    #[must_use]
    pub fn geometry(&self) -> PageGeometry {
        self.geometry
    }

    /// The budget that it draws on.
    #[must_use]
    pub fn budget(&self) -> &ArenaBudget {
        self.supply.purse().all()
    }

    /// What its user may draw on it.
    #[must_use]
    pub fn purse(&self) -> &Purse {
        self.supply.purse()
    }

    /// How many extents there are, or have been: numbers are not used again.
    #[must_use]
    pub fn extents(&self) -> usize {
        self.places.len()
    }

    /// How many extents there are.
    #[must_use]
    pub fn held_extents(&self) -> usize {
        self.places.len() - self.gone / self.geometry.pages_per_extent()
    }

    /// A descriptor of an extent, for its session's client.
    pub fn extent_fd(&self, extent: usize) -> Result<std::os::fd::OwnedFd, MemoryError> {
        match &self.places[extent] {
            Place::Own(index) => self.supply.extents()[*index].fd(),
            Place::Foreign(extent) => extent.fd(),
            Place::Gone => Err(MemoryError::OutOfBounds { offset: extent, bytes: 1, len: 0 }),
        }
    }

    /// Whether an extent has not been given back.
    #[must_use]
    pub fn is_there(&self, extent: usize) -> bool {
        !matches!(self.places[extent], Place::Gone)
    }

    /// Whether an extent is the session's own, so that its client may write to it.
    #[must_use]
    pub fn is_own(&self, extent: usize) -> bool {
        matches!(self.places[extent], Place::Own(_))
    }

    /// Memory of an extent.
    #[must_use]
    pub fn memory(&self, extent: usize) -> &Arc<SharedMapping> {
        match &self.places[extent] {
            Place::Own(index) => self.supply.extents()[*index].memory(),
            Place::Foreign(extent) => extent.memory(),
            Place::Gone => unreachable!("no page of extent {extent} has an owner"),
        }
    }

    /// Own pages in use.
    #[must_use]
    pub fn used_pages(&self) -> usize {
        self.references.len() - self.free.len() - self.foreign - self.gone
    }

    /// Pages that are free and there.
    #[must_use]
    pub fn free_pages(&self) -> usize {
        self.free.len()
    }

    /// Whether a page is the session's own.
    #[must_use]
    pub fn is_own_page(&self, page: u32) -> bool {
        !self.is_foreign(page)
    }

    /// Pages that could still be had.
    #[must_use]
    pub fn obtainable_pages(&self) -> usize {
        let extents = (self.purse().free_bytes() / EXTENT_BYTES as u64) as usize;
        self.free.len() + extents * self.geometry.pages_per_extent()
    }

    /// Pages that could be had for the asking, and named: row locators have 32 bits.
    fn within_reach(&self) -> usize {
        let addressable = (u32::MAX as usize / self.geometry.page_rows)
            .saturating_sub(self.used_pages() + self.foreign + self.gone);
        self.obtainable_pages().min(addressable)
    }

    /// Extents that must be added before [`SessionArena::reserve`] finds `pages` free pages. None if they cannot be
    /// had: a request that cannot be met takes nothing.
    #[must_use]
    pub fn missing_extents(&self, pages: usize) -> usize {
        let missing = pages.saturating_sub(self.free.len());
        if pages > self.within_reach() { 0 } else { missing.div_ceil(self.geometry.pages_per_extent()) }
    }

    /// Bytes of the extents that `pages` free pages would need beside those that are there.
    #[must_use]
    pub fn bytes_for(&self, pages: usize) -> u64 {
        let missing = pages.saturating_sub(self.free.len()).div_ceil(self.geometry.pages_per_extent());
        (missing as u64).saturating_mul(EXTENT_BYTES as u64)
    }

    /// Adds extents of the same user.
    pub fn add(&mut self, supply: Supply) {
        let (own, more) = (self.supply.extents().len(), supply.extents().len());
        self.places.extend((own..own + more).map(Place::Own));
        let first = self.references.len();
        let end = first + more * self.geometry.pages_per_extent();
        self.references.resize(end, 0);
        // New pages go below the pages that are free already, the lowest of them last.
        self.free.splice(0..0, (first as u32..end as u32).rev());
        self.supply.append(supply);
    }

    /// Gives up its own extents in which no page is in use, of the first `known` and up to so many. Their pages are never taken again: whoever knows them by number finds nobody else's.
    #[must_use]
    pub fn give_up_free(&mut self, known: usize, most: usize) -> Supply {
        let per_extent = self.geometry.pages_per_extent();
        let mut given = self.supply.empty();
        // Numbers have an end; a session that comes near it keeps what it has.
        if self.references.len() > u32::MAX as usize / self.geometry.page_rows / 2 {
            return given;
        }
        let mut free = vec![0; self.places.len()];
        self.free.iter().for_each(|page| free[*page as usize / per_extent] += 1);
        // Where each extent of the supply has its place.
        let mut place_of = vec![0; self.supply.extents().len()];
        for (at, place) in self.places.iter().enumerate() {
            if let Place::Own(index) = place {
                place_of[*index] = at;
            }
        }
        for (at, free) in free.into_iter().enumerate().take(known) {
            if given.extents().len() >= most {
                break;
            }
            let Place::Own(index) = self.places[at] else { continue };
            if free < per_extent {
                continue;
            }
            given.append(self.supply.part(index));
            // The last one has taken its place in the supply.
            let moved = place_of.pop().unwrap_or(at);
            if moved != at {
                self.places[moved] = Place::Own(index);
                place_of[index] = moved;
            }
            self.places[at] = Place::Gone;
            self.gone += per_extent;
        }
        if given.extents().is_empty() {
            return given;
        }
        // Once for all of them: there may be millions of pages.
        let places = &self.places;
        self.free.retain(|page| !matches!(places[*page as usize / per_extent], Place::Gone));
        given
    }

    /// Gives up all its own extents, whatever is in them: its session has ended, and nobody looks for a page of it any more.
    #[must_use]
    pub fn give_up_all(&mut self) -> Supply {
        let empty = Self::new(self.supply.empty(), self.geometry);
        std::mem::replace(self, empty).supply
    }

    /// Adds an extent of somebody else's, whose pages are only read; its pages have no owner yet. One that is there already is not added
    /// again. The id of its first page.
    pub fn add_foreign(&mut self, extent: &Arc<SharedExtent>) -> u32 {
        let count = self.geometry.pages_per_extent();
        let same = |place: &Place| matches!(place, Place::Foreign(known) if Arc::ptr_eq(known, extent));
        // Pages come extent by extent: it is the last one, or else any.
        let last = self.places.len().checked_sub(1).filter(|last| same(&self.places[*last]));
        let at = last.or_else(|| self.places.iter().position(same)).unwrap_or_else(|| {
            self.places.push(Place::Foreign(Arc::clone(extent)));
            self.references.resize(self.references.len() + count, 0);
            self.foreign += count;
            self.places.len() - 1
        });
        (at * count) as u32
    }

    fn is_foreign(&self, page: u32) -> bool {
        let extent = page as usize / self.geometry.pages_per_extent();
        matches!(self.places.get(extent), Some(Place::Foreign(_)))
    }

    /// Becomes the first owner, or one more, of a page of a foreign extent.
    pub fn attach(&mut self, page: u32) {
        debug_assert!(self.is_foreign(page), "page {page} is the session's own");
        self.references[page as usize] += 1;
    }

    /// Makes sure that `pages` pages are free. Extents that would be needed for it have been added.
    pub fn reserve(&self, pages: usize) -> Result<(), ArenaFull> {
        if pages <= self.free.len() {
            return Ok(());
        }
        // If the rest has become free since it was asked for, there still is no extent for it.
        let have = if pages > self.within_reach() { self.within_reach() } else { self.free.len() };
        Err(ArenaFull { missing_pages: pages - have })
    }

    /// Takes a free page, with one reference. [`SessionArena::reserve`] has made sure that there is one.
    pub fn take(&mut self) -> Option<u32> {
        let page = self.free.pop()?;
        debug_assert_eq!(self.references[page as usize], 0, "page {page} was free and owned");
        self.references[page as usize] = 1;
        Some(page)
    }

    /// Adds an owner.
    pub fn share(&mut self, page: u32) {
        debug_assert!(self.references[page as usize] > 0, "page {page} is shared but not owned");
        self.references[page as usize] += 1;
    }

    /// Whether a page has more than one owner, or one beside the session. What is no page has none.
    #[must_use]
    pub fn is_shared(&self, page: u32) -> bool {
        self.references.get(page as usize).is_some_and(|references| *references > 1) || self.is_foreign(page)
    }

    /// Drops an owner; true if that was the last one, and the page is free now.
    pub fn release(&mut self, page: u32) -> bool {
        let references = &mut self.references[page as usize];
        debug_assert!(*references > 0, "page {page} is released but not owned");
        *references -= 1;
        if *references == 0 && !self.is_foreign(page) {
            self.free.push(page);
            return true;
        }
        false
    }

    /// Copies the first `rows` rows of a page into another one.
    pub fn copy_rows(
        &self,
        from: u32,
        to: u32,
        rows: usize,
        buffer: &mut Vec<u8>,
    ) -> Result<(), MemoryError> {
        buffer.clear();
        buffer.resize(rows * self.geometry.row_bytes, 0);
        let (extent, offset) = self.geometry.locate(from * self.geometry.page_rows as u32);
        self.memory(extent).read(offset, buffer)?;
        let (extent, offset) = self.geometry.locate(to * self.geometry.page_rows as u32);
        self.memory(extent).write(offset, buffer)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tiers::pool::{ExtentPool, PoolSettings};
    use kvoyant_protocol::quota::Quota;
    use proptest::prelude::*;
    use std::collections::HashMap;

    fn arena(extents: u64) -> (ExtentPool, SessionArena) {
        let budget = Arc::new(ArenaBudget::new(extents * EXTENT_BYTES as u64));
        let pool = ExtentPool::start(budget, PoolSettings::unpinned()).unwrap();
        // Pages of 1 MiB: 64 to an extent.
        let arena = SessionArena::new(pool.supply(1), PageGeometry { page_rows: 32, row_bytes: 32 << 10 });
        (pool, arena)
    }

    /// As a lane and its control plane do it together.
    fn reserve(pool: &ExtentPool, arena: &mut SessionArena, pages: usize) -> Result<(), ArenaFull> {
        match arena.missing_extents(pages) {
            0 => {}
            extents => arena.add(pool.request(1, extents).unwrap().blocking_recv().unwrap().unwrap()),
        }
        arena.reserve(pages)
    }

    #[test]
    fn pages_that_are_taken_together_lie_side_by_side() {
        let (pool, mut arena) = arena(2);
        reserve(&pool, &mut arena, 70).unwrap();
        let pages: Vec<_> = (0..64).map(|_| arena.take().unwrap()).collect();
        assert!(pages.windows(2).all(|pair| pair[1] == pair[0] + 1));
    }

    #[test]
    fn a_full_arena_says_how_much_is_missing_and_gives_everything_back() {
        let (pool, mut arena) = arena(2);
        assert_eq!(reserve(&pool, &mut arena, 129), Err(ArenaFull { missing_pages: 1 }));
        assert_eq!(arena.extents(), 0, "nothing was taken");
        reserve(&pool, &mut arena, 128).unwrap();
        let budget = Arc::clone(pool.budget());
        assert_eq!(budget.free_bytes(), 0);
        drop(arena);
        assert_eq!(budget.used_bytes(), 0);
    }

    #[test]
    fn extents_in_which_nothing_is_are_given_back_and_the_others_keep_their_pages() {
        let (pool, mut arena) = arena(4);
        let take = |arena: &mut SessionArena, pages| {
            assert!(reserve(&pool, arena, pages).is_ok());
            (0..pages).map(|_| arena.take().unwrap()).collect::<Vec<_>>()
        };
        let pages = take(&mut arena, 3 * 64);
        let mark = |page: u32| (page as usize / 64, page as usize % 64 * (1 << 20));
        for page in &pages {
            let (extent, offset) = mark(*page);
            arena.memory(extent).store_u64(offset, u64::from(*page));
        }
        // All of the first, and all but one of the second.
        for page in &pages[..2 * 64 - 1] {
            arena.release(*page);
        }
        assert_eq!(arena.give_up_free(usize::MAX, 0).extents().len(), 0);
        let given = arena.give_up_free(usize::MAX, usize::MAX);
        assert_eq!((given.extents().len(), arena.held_extents(), arena.used_pages()), (1, 2, 65));
        assert_eq!(given.extents()[0].memory().load_u64(5 << 20), 5, "the first one");
        drop(given);
        assert_eq!(arena.budget().used_bytes(), 2 * EXTENT_BYTES as u64);
        for page in &pages[2 * 64 - 1..] {
            let (extent, offset) = mark(*page);
            assert_eq!(arena.memory(extent).load_u64(offset), u64::from(*page));
        }
        let more = take(&mut arena, 63 + 64);
        assert!(more.iter().all(|page| *page >= 64), "numbers are not used again");
        assert!(arena.extent_fd(0).is_err() && arena.extent_fd(3).is_ok());
        assert_eq!(arena.give_up_free(usize::MAX, 9).extents().len(), 0);
        for page in more.iter().chain(&pages[2 * 64 - 1..]) {
            arena.release(*page);
        }
        assert_eq!(arena.give_up_free(usize::MAX, 9).extents().len(), 3);
        assert_eq!((arena.budget().used_bytes(), arena.purse().account().held(Quota::Host)), (0, 0));
    }

    proptest! {
        /// No page is ever owned twice, and releases in any order return everything.
        #[test]
        fn no_page_is_owned_twice_and_everything_returns(moves in proptest::collection::vec((0u8..3, any::<prop::sample::Index>()), 1..300)) {
            let (pool, mut arena) = arena(3);
            let mut owners: Vec<u32> = Vec::new();
            for (kind, index) in moves {
                match kind {
                    0 if reserve(&pool, &mut arena, 1).is_ok() => {
                        let page = arena.take().unwrap();
                        prop_assert!(!owners.contains(&page), "page {} was given out twice", page);
                        owners.push(page);
                    }
                    1 if !owners.is_empty() => {
                        let page = owners[index.index(owners.len())];
                        arena.share(page);
                        owners.push(page);
                    }
                    2 if !owners.is_empty() => {
                        let page = owners.swap_remove(index.index(owners.len()));
                        prop_assert_eq!(arena.release(page), !owners.contains(&page));
                    }
                    _ => {}
                }
                let mut counts: HashMap<u32, u32> = HashMap::new();
                for page in &owners {
                    *counts.entry(*page).or_default() += 1;
                }
                prop_assert_eq!(arena.used_pages(), counts.len());
                for (page, count) in counts {
                    prop_assert_eq!(arena.is_shared(page), count > 1);
                }
            }
            for page in owners {
                arena.release(page);
            }
            prop_assert_eq!(arena.used_pages(), 0);
        }
    }
}
