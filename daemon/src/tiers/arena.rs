//! The arena: extents of 64 MiB, each a memfd of one session, cut into refcounted pages.
//!
//! A page holds P rows of one layer and KV head of one sequence. Forks share pages; whoever wants to write to a
//! shared page gets a copy first. [`ArenaBudget`] bounds what all sessions have together; a session's own
//! [`SessionArena`] belongs to one lane and takes no lock once an extent is there.
//!
//! An extent belongs to one session, and its memory goes back to the system when the session ends: a former
//! owner's mapping of it outlives everything that we could do, so it is never given to another user.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use kvoyant_protocol::EXTENT_BYTES;
pub use kvoyant_protocol::layout::PageGeometry;
use kvoyant_protocol::memory::{Memfd, MemoryError, Seals, SharedMapping};

/// Tables and digests of all sessions may take this share of the arena's size beside it: partial keys at a ratio of
/// 0.3 are 0.15 of the KV that they describe, page tables a thousandth.
const TABLES_SHARE: u64 = 4;

/// … and this much more, so that a small arena can still have many sequences.
const TABLES_LEAST: u64 = 512 << 20;

/// What all sessions may have together, and whether it is to be locked into memory.
#[derive(Debug)]
pub struct ArenaBudget {
    total_bytes: u64,
    used_bytes: AtomicU64,
    tables_bytes: AtomicU64,
    tables_total: u64,
    locked_bytes: AtomicU64,
    lock: AtomicBool,
}

impl ArenaBudget {
    /// A budget of `total_bytes`; `lock` pins extents with `mlock` as long as the system lets us.
    #[must_use]
    pub fn new(total_bytes: u64, lock: bool) -> Self {
        Self {
            total_bytes,
            used_bytes: AtomicU64::new(0),
            tables_bytes: AtomicU64::new(0),
            tables_total: total_bytes / TABLES_SHARE + TABLES_LEAST,
            locked_bytes: AtomicU64::new(0),
            lock: AtomicBool::new(lock),
        }
    }

    /// Bytes of the whole arena.
    #[must_use]
    pub fn total_bytes(&self) -> u64 {
        self.total_bytes
    }

    /// Bytes in extents that sessions have.
    #[must_use]
    pub fn used_bytes(&self) -> u64 {
        self.used_bytes.load(Ordering::Relaxed)
    }

    /// Bytes that are locked into memory.
    #[must_use]
    pub fn locked_bytes(&self) -> u64 {
        self.locked_bytes.load(Ordering::Relaxed)
    }

    /// Bytes that are left.
    #[must_use]
    pub fn free_bytes(&self) -> u64 {
        self.total_bytes.saturating_sub(self.used_bytes())
    }

    /// Bytes that are left for page tables, digests and other descriptions of the arena.
    #[must_use]
    pub fn free_table_bytes(&self) -> u64 {
        self.tables_total.saturating_sub(self.tables_bytes.load(Ordering::Relaxed))
    }

    /// Takes memory for tables.
    pub fn take_tables(&self, bytes: u64) -> Result<(), MemoryError> {
        let take = |used: u64| used.checked_add(bytes).filter(|after| *after <= self.tables_total);
        match self.tables_bytes.fetch_update(Ordering::Relaxed, Ordering::Relaxed, take) {
            Ok(_) => Ok(()),
            Err(_) => Err(MemoryError::Budget { wanted: bytes, free: self.free_table_bytes() }),
        }
    }

    /// Gives memory for tables back.
    pub fn give_tables_back(&self, bytes: u64) {
        self.tables_bytes.fetch_sub(bytes, Ordering::Relaxed);
    }

    fn take_extent(&self) -> bool {
        self.used_bytes
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, |used| {
                let after = used + EXTENT_BYTES as u64;
                (after <= self.total_bytes).then_some(after)
            })
            .is_ok()
    }

    fn give_back(&self, extent: &Extent) {
        self.used_bytes.fetch_sub(EXTENT_BYTES as u64, Ordering::Relaxed);
        if extent.locked {
            self.locked_bytes.fetch_sub(EXTENT_BYTES as u64, Ordering::Relaxed);
        }
    }

    /// Locks an extent if that is wanted and possible. The first refusal is logged, with the limit and what
    /// would raise it, and ends all further tries.
    fn lock(&self, memory: &SharedMapping) -> bool {
        if !self.lock.load(Ordering::Relaxed) {
            return false;
        }
        match memory.lock() {
            Ok(()) => {
                self.locked_bytes.fetch_add(EXTENT_BYTES as u64, Ordering::Relaxed);
                true
            }
            Err(error) => {
                self.lock.store(false, Ordering::Relaxed);
                tracing::warn!("{}; going on unpinned", memlock_advice(self.total_bytes, &error));
                false
            }
        }
    }
}

/// What to tell an operator whose memlock limit is too small.
#[must_use]
pub fn memlock_advice(needed_bytes: u64, error: &std::io::Error) -> String {
    let limit = nix::sys::resource::getrlimit(nix::sys::resource::Resource::RLIMIT_MEMLOCK);
    let limit = limit.map_or_else(
        |error| format!("unknown ({error})"),
        |(soft, _)| if soft == u64::MAX { "unlimited".into() } else { format!("{soft} bytes") },
    );
    format!(
        "cannot pin the arena ({error}): the memlock limit is {limit} and the arena needs {needed_bytes} bytes; \
         raise it with LimitMEMLOCK=infinity in the unit or `ulimit -l unlimited`, or set pin = false"
    )
}

/// One extent.
#[derive(Debug)]
struct Extent {
    file: Memfd,
    memory: Arc<SharedMapping>,
    locked: bool,
}

/// A page could not be had because the arena is full.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ArenaFull {
    /// Pages that were asked for beyond those that could be had.
    pub missing_pages: usize,
}

/// The extents and pages of one session.
#[derive(Debug)]
pub struct SessionArena {
    budget: Arc<ArenaBudget>,
    geometry: PageGeometry,
    extents: Vec<Extent>,
    /// References per page; 0: free.
    references: Vec<u32>,
    /// Free pages; the last is taken first, and pages of a new extent are taken in rising order, so that pages
    /// that are asked for together lie side by side.
    free: Vec<u32>,
}

impl SessionArena {
    /// An arena without extents.
    #[must_use]
    pub fn new(budget: Arc<ArenaBudget>, geometry: PageGeometry) -> Self {
        Self { budget, geometry, extents: Vec::new(), references: Vec::new(), free: Vec::new() }
    }

    /// Sizes of its pages.
    #[must_use]
    pub fn geometry(&self) -> PageGeometry {
        self.geometry
    }

    /// The budget that it draws on.
    #[must_use]
    pub fn budget(&self) -> &ArenaBudget {
        &self.budget
    }

    /// How many extents there are.
    #[must_use]
    pub fn extents(&self) -> usize {
        self.extents.len()
    }

    /// A descriptor of an extent, for its session's client.
    pub fn extent_fd(&self, extent: usize) -> Result<std::os::fd::OwnedFd, MemoryError> {
        self.extents[extent].file.try_clone()
    }

    /// Memory of an extent.
    #[must_use]
    pub fn memory(&self, extent: usize) -> &Arc<SharedMapping> {
        &self.extents[extent].memory
    }

    /// Pages in use.
    #[must_use]
    pub fn used_pages(&self) -> usize {
        self.references.len() - self.free.len()
    }

    /// Pages that could still be had.
    #[must_use]
    pub fn obtainable_pages(&self) -> usize {
        let extents = (self.budget.free_bytes() / EXTENT_BYTES as u64) as usize;
        self.free.len() + extents * self.geometry.pages_per_extent()
    }

    /// Makes sure that `pages` pages are free, with new extents where needed.
    pub fn reserve(&mut self, pages: usize) -> Result<Result<(), ArenaFull>, MemoryError> {
        // A request that cannot be met takes nothing.
        // Row locators have 32 bits.
        let addressable = (u32::MAX as usize / self.geometry.page_rows).saturating_sub(self.used_pages());
        let obtainable = self.obtainable_pages().min(addressable);
        if pages > obtainable {
            return Ok(Err(ArenaFull { missing_pages: pages - obtainable }));
        }
        while self.free.len() < pages {
            if !self.budget.take_extent() {
                return Ok(Err(ArenaFull { missing_pages: pages - self.free.len() }));
            }
            match self.add_extent() {
                Ok(()) => {}
                Err(error) => {
                    self.budget.used_bytes.fetch_sub(EXTENT_BYTES as u64, Ordering::Relaxed);
                    return Err(error);
                }
            }
        }
        Ok(Ok(()))
    }

    fn add_extent(&mut self) -> Result<(), MemoryError> {
        let file = Memfd::create("kvoyant-extent", EXTENT_BYTES)?;
        file.seal(Seals::fixed_size())?;
        let memory = Arc::new(file.map(false)?);
        let locked = self.budget.lock(&memory);
        self.extents.push(Extent { file, memory, locked });
        let first = self.references.len() as u32;
        let count = self.geometry.pages_per_extent() as u32;
        self.references.resize((first + count) as usize, 0);
        // New pages go below the pages that are free already, the lowest of them last.
        self.free.splice(0..0, (first..first + count).rev());
        Ok(())
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

    /// Whether a page has more than one owner. What is no page has none.
    #[must_use]
    pub fn is_shared(&self, page: u32) -> bool {
        self.references.get(page as usize).is_some_and(|references| *references > 1)
    }

    /// Drops an owner; true if that was the last one.
    pub fn release(&mut self, page: u32) -> bool {
        let references = &mut self.references[page as usize];
        debug_assert!(*references > 0, "page {page} is released but not owned");
        *references -= 1;
        if *references == 0 {
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

impl Drop for SessionArena {
    fn drop(&mut self) {
        for extent in &self.extents {
            self.budget.give_back(extent);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::HashMap;

    fn arena(extents: u64) -> SessionArena {
        let budget = Arc::new(ArenaBudget::new(extents * EXTENT_BYTES as u64, false));
        // Pages of 1 MiB: 64 to an extent.
        SessionArena::new(budget, PageGeometry { page_rows: 32, row_bytes: 32 << 10 })
    }

    #[test]
    fn pages_that_are_taken_together_lie_side_by_side() {
        let mut arena = arena(2);
        arena.reserve(70).unwrap().unwrap();
        let pages: Vec<_> = (0..64).map(|_| arena.take().unwrap()).collect();
        assert!(pages.windows(2).all(|pair| pair[1] == pair[0] + 1));
    }

    #[test]
    fn a_full_arena_says_how_much_is_missing_and_gives_everything_back() {
        let mut arena = arena(2);
        assert_eq!(arena.reserve(129).unwrap(), Err(ArenaFull { missing_pages: 1 }));
        arena.reserve(128).unwrap().unwrap();
        let budget = Arc::clone(&arena.budget);
        assert_eq!(budget.free_bytes(), 0);
        drop(arena);
        assert_eq!(budget.used_bytes(), 0);
    }

    proptest! {
        /// No page is ever owned twice, and releases in any order return everything.
        #[test]
        fn no_page_is_owned_twice_and_everything_returns(moves in proptest::collection::vec((0u8..3, any::<prop::sample::Index>()), 1..300)) {
            let mut arena = arena(3);
            let mut owners: Vec<u32> = Vec::new();
            for (kind, index) in moves {
                match kind {
                    0 if arena.reserve(1).unwrap().is_ok() => {
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
