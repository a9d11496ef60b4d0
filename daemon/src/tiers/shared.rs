//! Pages that belong to no session: rows of published prefixes, which sessions read where they lie.
//!
//! They are in extents of the daemon's own, of which clients get descriptors that can only be mapped for reading. Whoever maps an extent
//! sees all of it, so one extent holds pages of one *group*: those that the same clients may read. An extent is there for as long as one of
//! its pages is in use, or a session has it mapped; what all groups have of them together is bounded by a [`SharedBudget`].

use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use kvoyant_protocol::EXTENT_BYTES;
use kvoyant_protocol::memory::{Memfd, MemoryError, Seals, SharedMapping};

use crate::tiers::budget::ArenaBudget;

/// What all groups may have of the arena together, in whole extents.
#[derive(Debug)]
pub struct SharedBudget {
    arena: Arc<ArenaBudget>,
    most: usize,
    held: AtomicUsize,
}

impl SharedBudget {
    /// As many extents as so many bytes have, and at least one: with none nothing could be published.
    #[must_use]
    pub fn new(arena: Arc<ArenaBudget>, bytes: u64) -> Arc<Self> {
        let most = usize::try_from(bytes / EXTENT_BYTES as u64).unwrap_or(usize::MAX).max(1);
        Arc::new(Self { arena, most, held: AtomicUsize::new(0) })
    }

    /// Extents that there may be.
    #[must_use]
    pub fn most(&self) -> usize {
        self.most
    }

    /// Extents that there are.
    #[must_use]
    pub fn held(&self) -> usize {
        self.held.load(Ordering::Relaxed)
    }

    /// Bytes of extents that could still be had.
    #[must_use]
    pub fn free_bytes(&self) -> u64 {
        let left = self.most.saturating_sub(self.held()) as u64;
        left.saturating_mul(EXTENT_BYTES as u64).min(self.arena.free_bytes())
    }

    fn take(&self) -> bool {
        let one_more = |held| (held < self.most).then_some(held + 1);
        if self.held.fetch_update(Ordering::Relaxed, Ordering::Relaxed, one_more).is_err() {
            return false;
        }
        let taken = self.arena.take_extents(1, 0);
        if !taken {
            self.held.fetch_sub(1, Ordering::Relaxed);
        }
        taken
    }

    fn give(&self) {
        self.arena.give_extents(1);
        self.held.fetch_sub(1, Ordering::Relaxed);
    }
}

/// 64 MiB that clients can only read.
#[derive(Debug)]
pub struct SharedExtent {
    memory: Arc<SharedMapping>,
    file: Memfd,
    budget: Arc<SharedBudget>,
}

impl SharedExtent {
    fn new(budget: &Arc<SharedBudget>) -> Result<Self, MemoryError> {
        if !budget.take() {
            return Err(MemoryError::Budget { wanted: EXTENT_BYTES as u64, free: budget.free_bytes() });
        }
        let made = Memfd::create("kvoyant-shared", EXTENT_BYTES).and_then(|file| {
            // Mapped first: no new mapping can write from then on.
            let memory = Arc::new(file.map(false)?);
            file.seal(Seals::frozen_for_readers())?;
            Ok((file, memory))
        });
        match made {
            Ok((file, memory)) => Ok(Self { memory, file, budget: Arc::clone(budget) }),
            Err(error) => {
                budget.give();
                Err(error)
            }
        }
    }

    /// One that another daemon made, for sessions that it has left: its size and seals are checked, and nobody can write to it any more.
    ///
    /// # Errors
    /// A file that is none, or [`MemoryError::Budget`].
    pub fn adopt(file: OwnedFd, budget: &Arc<SharedBudget>) -> Result<Arc<Self>, MemoryError> {
        let file = Memfd::from_peer(file, EXTENT_BYTES, Seals::frozen_for_readers())?;
        let memory = Arc::new(file.map_read_only()?);
        if !budget.take() {
            return Err(MemoryError::Budget { wanted: EXTENT_BYTES as u64, free: budget.free_bytes() });
        }
        Ok(Arc::new(Self { memory, file, budget: Arc::clone(budget) }))
    }

    /// What tells its file from all others while it is there.
    ///
    /// # Errors
    /// The system's.
    pub fn number(&self) -> std::io::Result<u64> {
        Ok(nix::sys::stat::fstat(&self.file)?.st_ino)
    }

    /// Its memory.
    #[must_use]
    pub fn memory(&self) -> &Arc<SharedMapping> {
        &self.memory
    }

    /// Another descriptor of its file; whoever gets it can only read.
    pub fn fd(&self) -> Result<OwnedFd, MemoryError> {
        self.file.try_clone()
    }
}

impl Drop for SharedExtent {
    fn drop(&mut self) {
        self.budget.give();
    }
}

#[derive(Debug, Default)]
struct Free {
    /// Extents, and which of their pages are free. What is in use keeps them, and so do sessions that have them mapped: an empty one that a
    /// session has is used again, and goes with that session otherwise.
    extents: Vec<(Weak<SharedExtent>, Vec<u32>)>,
}

/// Pages of one size that the same clients may read.
#[derive(Debug)]
pub struct SharedPages {
    budget: Arc<SharedBudget>,
    page_bytes: usize,
    free: Mutex<Free>,
}

impl SharedPages {
    /// None yet.
    #[must_use]
    pub fn new(budget: Arc<SharedBudget>, page_bytes: usize) -> Arc<Self> {
        Arc::new(Self { budget, page_bytes: page_bytes.max(1), free: Mutex::default() })
    }

    /// Pages of an extent. What does not divide is left over at its end.
    #[must_use]
    pub fn per_extent(&self) -> usize {
        EXTENT_BYTES / self.page_bytes
    }

    /// Whether there is no extent of it.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.free().extents.iter().all(|(extent, _)| extent.strong_count() == 0)
    }

    fn free(&self) -> MutexGuard<'_, Free> {
        self.free.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes a page, in an extent that has one free or in a new one. What it holds is whatever it was.
    ///
    /// # Errors
    /// [`MemoryError::Budget`] if the groups have all extents that they may have, or the arena has none left.
    pub fn take(self: &Arc<Self>) -> Result<SharedPage, MemoryError> {
        let mut free = self.free();
        free.extents.retain(|(extent, _)| extent.strong_count() > 0);
        for (extent, pages) in &mut free.extents {
            let Some(index) = pages.pop() else { continue };
            // Whoever had it last may have let go of it just now.
            if let Some(extent) = extent.upgrade() {
                return Ok(SharedPage { group: Arc::clone(self), extent, index });
            }
        }
        let extent = Arc::new(SharedExtent::new(&self.budget)?);
        // The first page is taken.
        free.extents.push((Arc::downgrade(&extent), (1..self.per_extent() as u32).rev().collect()));
        Ok(SharedPage { group: Arc::clone(self), extent, index: 0 })
    }

    fn give(&self, extent: &Arc<SharedExtent>, index: u32) {
        let mut free = self.free();
        let same = |known: &Weak<SharedExtent>| known.as_ptr() == Arc::as_ptr(extent);
        if let Some((_, pages)) = free.extents.iter_mut().find(|(known, _)| same(known)) {
            pages.push(index);
        }
    }
}

/// A page; dropping it gives it back.
#[derive(Debug)]
pub struct SharedPage {
    group: Arc<SharedPages>,
    extent: Arc<SharedExtent>,
    index: u32,
}

impl SharedPage {
    /// Whether it is one of this group's.
    #[must_use]
    pub fn is_of(&self, group: &Arc<SharedPages>) -> bool {
        Arc::ptr_eq(&self.group, group)
    }

    /// The extent that it lies in.
    #[must_use]
    pub fn extent(&self) -> &Arc<SharedExtent> {
        &self.extent
    }

    /// Its number there.
    #[must_use]
    pub fn index(&self) -> u32 {
        self.index
    }

    /// Fills it.
    ///
    /// # Errors
    /// More bytes than a page has.
    pub fn write(&self, bytes: &[u8]) -> Result<(), MemoryError> {
        self.check(bytes.len())?;
        self.extent.memory.write(self.index as usize * self.group.page_bytes, bytes)
    }

    /// Reads it.
    ///
    /// # Errors
    /// More bytes than a page has.
    pub fn read(&self, into: &mut [u8]) -> Result<(), MemoryError> {
        self.check(into.len())?;
        self.extent.memory.read(self.index as usize * self.group.page_bytes, into)
    }

    fn check(&self, bytes: usize) -> Result<(), MemoryError> {
        let (offset, len) = (0, self.group.page_bytes);
        if bytes <= len { Ok(()) } else { Err(MemoryError::OutOfBounds { offset, bytes, len }) }
    }
}

impl Drop for SharedPage {
    fn drop(&mut self) {
        self.group.give(&self.extent, self.index);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn budgets(arena: u64, shared: u64) -> (Arc<ArenaBudget>, Arc<SharedBudget>) {
        let arena = Arc::new(ArenaBudget::new(arena * EXTENT_BYTES as u64));
        (Arc::clone(&arena), SharedBudget::new(arena, shared * EXTENT_BYTES as u64))
    }

    #[test]
    fn groups_never_have_more_extents_together_than_their_share() {
        let (arena, shared) = budgets(8, 2);
        let groups: Vec<_> = (1..9).map(|kib| SharedPages::new(Arc::clone(&shared), kib << 10)).collect();
        let mut pages: Vec<_> = groups.iter().flat_map(SharedPages::take).collect();
        assert_eq!((pages.len(), shared.held()), (2, 2));
        assert_eq!(arena.free_bytes(), 6 * EXTENT_BYTES as u64, "the rest is there for others");
        assert!(matches!(groups[2].take(), Err(MemoryError::Budget { free: 0, .. })));
        pages.remove(0);
        assert!(groups[0].is_empty() && !groups[1].is_empty());
        pages.push(groups[2].take().unwrap());
        drop(pages);
        // What the arena does not have is not counted.
        assert!(arena.take_extents(8, 0));
        assert!(groups[0].take().is_err());
        assert_eq!((shared.held(), shared.free_bytes()), (0, 0));
        assert_eq!(SharedBudget::new(arena, 5).most(), 1, "something can always be published");
    }

    #[test]
    fn an_empty_extent_that_a_session_has_is_used_again_and_goes_with_the_session() {
        let (arena, shared) = budgets(8, 1);
        let (group, other) =
            (SharedPages::new(Arc::clone(&shared), 4096), SharedPages::new(Arc::clone(&shared), 8192));
        let page = group.take().unwrap();
        let mapped = Arc::clone(page.extent());
        drop(page);
        assert!(other.take().is_err(), "its memory is still there");
        let again = group.take().unwrap();
        assert!(Arc::ptr_eq(again.extent(), &mapped));
        drop(again);
        drop(mapped);
        assert_eq!((shared.held(), arena.used_bytes()), (0, 0));
        other.take().unwrap();
    }

    #[test]
    fn pages_are_apart_come_back_and_can_only_be_read_by_others() {
        let (budget, shared) = budgets(2, 2);
        let group = SharedPages::new(shared, 16 << 20);
        let pages: Vec<SharedPage> = (0..8).map(|_| group.take().unwrap()).collect();
        for (i, page) in pages.iter().enumerate() {
            page.write(&[i as u8; 4096]).unwrap();
        }
        let mut bytes = [0; 4096];
        for (i, page) in pages.iter().enumerate() {
            page.read(&mut bytes).unwrap();
            assert_eq!(bytes, [i as u8; 4096]);
        }
        assert!(matches!(group.take(), Err(MemoryError::Budget { .. })));
        assert!(pages[0].write(&vec![0; (16 << 20) + 1]).is_err());
        let theirs =
            Memfd::from_peer(pages[0].extent().fd().unwrap(), EXTENT_BYTES, Seals::frozen_for_readers());
        let theirs = theirs.unwrap();
        assert!(theirs.map(false).is_err(), "nobody else can write");
        assert!(theirs.map_read_only().is_ok());
        // The next daemon has it to read, and within its own share.
        let file = pages[2].extent().fd().unwrap();
        let (_, next) = budgets(2, 1);
        let adopted = SharedExtent::adopt(file.try_clone().unwrap(), &next).unwrap();
        assert_eq!(adopted.number().unwrap(), pages[2].extent().number().unwrap());
        adopted.memory().read(2 * (16 << 20), &mut bytes).unwrap();
        assert_eq!(bytes, [2; 4096]);
        assert!(matches!(SharedExtent::adopt(file, &next), Err(MemoryError::Budget { .. })));
        drop(adopted);
        assert_eq!(next.held(), 0);
        let unsealed = Memfd::create("unsealed", EXTENT_BYTES).unwrap();
        assert!(SharedExtent::adopt(unsealed.try_clone().unwrap(), &next).is_err());
        drop(pages);
        assert_eq!(budget.used_bytes(), 0);
    }
}
