//! Extents, and how they are made.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use kvoyant_protocol::EXTENT_BYTES;
use kvoyant_protocol::memory::{Memfd, MemoryError, Seals, SharedMapping, holes};

use nix::fcntl::{FallocateFlags, fallocate};

use crate::tiers::host_memory::{HUGE_PAGE_BYTES, HugePages, free_huge_pages};
use crate::tiers::pin::PinGuard;

/// 64 MiB of host memory in a file of its own.
#[derive(Debug)]
pub struct Extent {
    // Dropped in this order: nothing is unmapped while a device has it registered.
    guard: Option<Box<dyn PinGuard>>,
    /// There if it lies in huge pages.
    holes: Option<holes::Guard>,
    memory: Arc<SharedMapping>,
    file: Memfd,
}

impl Extent {
    /// One that another process made: its size and seals are checked, and what is in it stays.
    ///
    /// # Errors
    /// A file that is no extent.
    pub fn adopt(file: OwnedFd) -> Result<Self, MemoryError> {
        let block = nix::sys::stat::fstat(&file).map_or(0, |stat| stat.st_blksize as u64);
        let file = Memfd::from_peer(file, EXTENT_BYTES, Seals::fixed_size())?;
        let memory = Arc::new(file.map(false)?);
        let holes = if block >= HUGE_PAGE_BYTES {
            let guard = holes::Guard::new(&memory);
            Some(guard.map_err(|source| MemoryError::Os { what: "guard an extent of huge pages", source })?)
        } else {
            None
        };
        Ok(Self { guard: None, holes, memory, file })
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

    /// Another descriptor of its file, for a client.
    pub fn fd(&self) -> Result<OwnedFd, MemoryError> {
        self.file.try_clone()
    }

    /// Whether it lies in huge pages that were set aside.
    #[must_use]
    pub fn is_huge(&self) -> bool {
        self.holes.is_some()
    }

    /// Whether it is pinned.
    #[must_use]
    pub fn is_pinned(&self) -> bool {
        self.guard.is_some()
    }

    /// Keeps it pinned until it is destroyed.
    pub(crate) fn keep_pinned(&mut self, guard: Box<dyn PinGuard>) {
        self.guard = Some(guard);
    }

    /// Destroys it. What is in it goes at once, whoever still has it mapped: they find zeros.
    pub(crate) fn destroy(mut self) {
        // First, for what a device has registered it holds on to.
        self.guard = None;
        if self.holes.is_some() {
            return;
        }
        let mode = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
        if let Err(errno) = fallocate(&self.file, mode, 0, EXTENT_BYTES as i64) {
            tracing::debug!("an extent's memory goes once nobody has it mapped: {errno}");
        }
    }

    /// Wipes what a session left. Its pages stay where they are: a hole would cost their pins.
    pub(crate) fn wipe(&self) -> Result<(), MemoryError> {
        if self.is_huge() {
            // Its owner may have punched holes, and somebody else may have the pages.
            self.memory.populate()?;
        }
        self.memory.zero()?;
        match &self.holes {
            Some(holes) if holes.had_hole() => {
                let source = std::io::Error::other("its client has taken pages out of it");
                Err(MemoryError::Os { what: "wipe an extent", source })
            }
            _ => Ok(()),
        }
    }
}

/// How extents are made.
#[derive(Debug, Clone, Copy)]
pub struct Recipe {
    /// Of which pages.
    pub huge: HugePages,
    /// Whether the kernel takes advice to make ordinary pages huge.
    pub advise: bool,
    /// On which NUMA node, as long as it has room.
    pub node: Option<u32>,
}

impl Recipe {
    /// Whether the next extent would be of huge pages that were set aside.
    #[must_use]
    pub fn finds_huge(&self) -> bool {
        match self.huge {
            HugePages::Off => false,
            HugePages::Require => true,
            HugePages::Auto => free_huge_pages() >= EXTENT_BYTES as u64 / HUGE_PAGE_BYTES,
        }
    }

    /// Makes an extent, sealed; `populate` has all its pages made at once, here, which is their first touch.
    pub fn make(&self, populate: bool) -> Result<Extent, MemoryError> {
        if self.finds_huge() {
            match self.make_huge() {
                // Somebody else was quicker.
                Err(error) if self.huge == HugePages::Auto => tracing::debug!("no huge pages: {error}"),
                Err(MemoryError::Os { source, .. }) => {
                    let what = "make an extent of 32 huge pages of 2 MiB, as huge_pages = \"require\" says (`sysctl vm.nr_hugepages=N` sets them aside)";
                    return Err(MemoryError::Os { what, source });
                }
                result => return result,
            }
        }
        let extent = self.finish(Memfd::create("kvoyant-extent", EXTENT_BYTES)?)?;
        if self.advise && self.huge == HugePages::Auto {
            // Without it the pages are small, which costs speed only.
            if let Err(error) = extent.memory.advise_huge() {
                tracing::debug!("the kernel takes no advice on huge pages: {error}");
            }
        }
        if populate {
            extent.memory.populate()?;
        }
        Ok(extent)
    }

    fn make_huge(&self) -> Result<Extent, MemoryError> {
        let mut extent = self.finish(Memfd::create_huge("kvoyant-extent", EXTENT_BYTES)?)?;
        extent.memory.populate()?;
        let guard = holes::Guard::new(&extent.memory);
        extent.holes =
            Some(guard.map_err(|source| MemoryError::Os { what: "guard an extent of huge pages", source })?);
        Ok(extent)
    }

    fn finish(&self, file: Memfd) -> Result<Extent, MemoryError> {
        file.seal(Seals::fixed_size())?;
        let memory = Arc::new(file.map(false)?);
        if let Some(node) = self.node
            && let Err(error) = memory.prefer_node(node)
        {
            tracing::debug!("an extent lies on no node in particular: {error}");
        }
        Ok(Extent { guard: None, holes: None, memory, file })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_extent_is_made_of_ordinary_pages_where_there_are_no_huge_ones() {
        let recipe = Recipe { huge: HugePages::Auto, advise: true, node: Some(0) };
        let enough = free_huge_pages() >= 64;
        let extent = recipe.make(true).unwrap();
        assert!(enough || !extent.is_huge());
        extent.memory().store_u64(EXTENT_BYTES - 8, 7);
        extent.wipe().unwrap();
        assert_eq!(extent.memory().load_u64(EXTENT_BYTES - 8), 0);
        Memfd::from_peer(extent.fd().unwrap(), EXTENT_BYTES, Seals::fixed_size()).unwrap();
    }

    #[test]
    fn huge_pages_that_are_required_and_not_there_are_an_error() {
        let recipe = Recipe { huge: HugePages::Require, advise: false, node: None };
        match recipe.make(false) {
            Ok(extent) => assert!(extent.is_huge()),
            Err(error) => assert!(
                error.to_string().contains("map shared memory") || error.to_string().contains("huge"),
                "{error}"
            ),
        }
    }
}
