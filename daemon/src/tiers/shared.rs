//! Pages that belong to no session: rows of published prefixes, which sessions read where they lie.
//!
//! They are in extents of the daemon's own, of which clients get descriptors that can only be mapped for reading. Whoever maps an extent
//! sees all of it, so one extent holds pages of one *group*: those that the same clients may read.

use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use kvoyant_protocol::EXTENT_BYTES;
use kvoyant_protocol::memory::{Memfd, MemoryError, Seals, SharedMapping};

use crate::tiers::arena::ArenaBudget;

/// 64 MiB that clients can only read.
#[derive(Debug)]
pub struct SharedExtent {
    memory: Arc<SharedMapping>,
    file: Memfd,
    budget: Arc<ArenaBudget>,
}

impl SharedExtent {
    fn new(budget: &Arc<ArenaBudget>) -> Result<Self, MemoryError> {
        if !budget.take_extents(1, 0) {
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
                budget.give_extents(1);
                Err(error)
            }
        }
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
        self.budget.give_extents(1);
    }
}

/// Who has an extent that nobody else has: its group, and the page that is just given back.
const ITS_OWN: usize = 2;

#[derive(Debug, Default)]
struct Free {
    /// Extents with pages in use, and which of their pages are free.
    extents: Vec<(Arc<SharedExtent>, Vec<u32>)>,
}

/// Pages of one size that the same clients may read.
#[derive(Debug)]
pub struct SharedPages {
    budget: Arc<ArenaBudget>,
    page_bytes: usize,
    free: Mutex<Free>,
}

impl SharedPages {
    /// None yet.
    #[must_use]
    pub fn new(budget: Arc<ArenaBudget>, page_bytes: usize) -> Arc<Self> {
        Arc::new(Self { budget, page_bytes: page_bytes.max(1), free: Mutex::default() })
    }

    fn per_extent(&self) -> usize {
        EXTENT_BYTES / self.page_bytes
    }

    fn free(&self) -> MutexGuard<'_, Free> {
        self.free.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes a page, in an extent that has one free or in a new one. What it holds is whatever it was.
    ///
    /// # Errors
    /// [`MemoryError::Budget`] if the arena has no extent left.
    pub fn take(self: &Arc<Self>) -> Result<SharedPage, MemoryError> {
        let mut free = self.free();
        let at = match free.extents.iter().position(|(_, pages)| !pages.is_empty()) {
            Some(at) => at,
            None => {
                let extent = Arc::new(SharedExtent::new(&self.budget)?);
                free.extents.push((extent, (0..self.per_extent() as u32).rev().collect()));
                free.extents.len() - 1
            }
        };
        let (extent, pages) = &mut free.extents[at];
        let index = pages.pop().unwrap_or_else(|| unreachable!("an extent with free pages was looked for"));
        Ok(SharedPage { group: Arc::clone(self), extent: Arc::clone(extent), index })
    }

    fn give(&self, extent: &Arc<SharedExtent>, index: u32) {
        let mut free = self.free();
        let Some(at) = free.extents.iter().position(|(known, _)| Arc::ptr_eq(known, extent)) else { return };
        free.extents[at].1.push(index);
        // What is empty goes: somebody else may need the memory. But while sessions have it mapped that would free nothing.
        if free.extents[at].1.len() == self.per_extent() && Arc::strong_count(extent) <= ITS_OWN {
            free.extents.swap_remove(at);
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

    #[test]
    fn pages_are_apart_come_back_and_can_only_be_read_by_others() {
        let budget = Arc::new(ArenaBudget::new(2 * EXTENT_BYTES as u64));
        let group = SharedPages::new(Arc::clone(&budget), 16 << 20);
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
        drop(pages);
        assert_eq!(budget.used_bytes(), 0);
    }
}
