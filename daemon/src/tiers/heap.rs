//! Regions of daemon-owned files, addressed by offset.
//!
//! Page tables, digests, method state and counters live here and not on the process's heap, so that they can be
//! kept by whoever holds the files when the process goes: a region is found again by file and offset.

use std::os::fd::OwnedFd;

use kvoyant_protocol::memory::{MemoryError, OwnedFile};

use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::tiers::purse::Purse;

mod marks;

use marks::Marks;

/// A region of a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Region {
    /// Which file of the heap.
    pub file: u32,
    /// Offset in bytes, a multiple of [`ALIGN`].
    pub offset: usize,
    /// Length in bytes, as asked for.
    pub len: usize,
}

/// Alignment of every region.
pub const ALIGN: usize = 64;

/// A heap of regions in files of its own.
#[derive(Debug)]
pub struct Heap {
    name: &'static str,
    purse: Purse,
    file_bytes: usize,
    files: Vec<OwnedFile>,
    /// Free spans as (file, offset, length), sorted and never adjacent.
    free: Vec<(u32, usize, usize)>,
    used_bytes: usize,
    /// What was written since it was last asked for, where somebody asks.
    marks: Option<Marks>,
}

/// What a heap was left as that does not fit together.
#[derive(Debug, Error)]
pub enum RestoreError {
    /// No memory for it.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// A region that lies in no file.
    #[error("{0:?} lies outside the files that were left")]
    Outside(Region),
    /// Two regions in one place.
    #[error("{0:?} and {1:?} lie in one place")]
    Overlap(Region, Region),
}

impl Heap {
    /// An empty heap whose files have `file_bytes` each, or more where one region needs more; its user draws on the budget for
    /// them.
    #[must_use]
    pub fn new(name: &'static str, purse: Purse, file_bytes: usize) -> Self {
        Self { name, purse, file_bytes, files: Vec::new(), free: Vec::new(), used_bytes: 0, marks: None }
    }

    /// The heap that another process had: its files' lengths and contents, as far as they were written, and all regions in them.
    ///
    /// # Errors
    /// Regions that do not fit; [`MemoryError::Budget`] if there is no room for the files.
    pub fn restore(
        name: &'static str,
        purse: Purse,
        file_bytes: usize,
        files: &[(usize, &[u8])],
        mut regions: Vec<Region>,
    ) -> Result<Self, RestoreError> {
        let mut heap = Self::new(name, purse, file_bytes);
        let span = |region: &Region| region.len.max(1).checked_next_multiple_of(ALIGN);
        regions.sort_unstable();
        let mut last: Option<Region> = None;
        for region in &regions {
            let end = span(region).and_then(|span| region.offset.checked_add(span));
            let len = files.get(region.file as usize).map_or(0, |(len, _)| *len);
            if !region.offset.is_multiple_of(ALIGN) || end.is_none_or(|end| end > len) {
                return Err(RestoreError::Outside(*region));
            }
            if let Some(last) = last.filter(|last| last.file == region.file)
                && last.offset + span(&last).unwrap_or(0) > region.offset
            {
                return Err(RestoreError::Overlap(last, *region));
            }
            last = Some(*region);
        }
        let mut regions = regions.into_iter().peekable();
        for (file, (len, bytes)) in files.iter().enumerate() {
            heap.purse.take_tables(*len as u64)?;
            match OwnedFile::create(name, *len) {
                Ok(made) => heap.files.push(made),
                Err(error) => {
                    heap.purse.give_tables_back(*len as u64);
                    return Err(error.into());
                }
            }
            let kept = bytes.len().min(*len);
            heap.files[file].bytes_mut()[..kept].copy_from_slice(&bytes[..kept]);
            let mut at = 0;
            while let Some(region) = regions.next_if(|region| region.file as usize == file) {
                if region.offset > at {
                    heap.free.push((file as u32, at, region.offset - at));
                }
                let span = span(&region).unwrap_or(0);
                at = region.offset + span;
                heap.used_bytes += span;
            }
            if at < *len {
                heap.free.push((file as u32, at, len - at));
            }
        }
        Ok(heap)
    }

    /// Remembers from now on what is written.
    pub fn watch(&mut self) {
        self.marks = Some(Marks::default());
    }

    /// Calls `take` with every range that was written since the last call, or since it is watched: file, offset and bytes.
    pub fn take_written(&mut self, mut take: impl FnMut(u32, usize, &[u8])) {
        let Some(marks) = &mut self.marks else { return };
        let files = &self.files;
        marks.take(|file, range| {
            let bytes = files[file].bytes();
            let end = range.end.min(bytes.len());
            take(file as u32, range.start, &bytes[range.start..end]);
        });
    }

    /// Calls `take` with all that is in regions: file, offset and bytes. Nothing counts as written then.
    pub fn take_all(&mut self, mut take: impl FnMut(u32, usize, &[u8])) {
        if let Some(marks) = &mut self.marks {
            marks.take(|_, _| {});
        }
        let mut free = self.free.iter().peekable();
        for (file, owned) in self.files.iter().enumerate() {
            let bytes = owned.bytes();
            let mut at = 0;
            while let Some((_, offset, len)) = free.next_if(|(of, _, _)| *of as usize == file) {
                if *offset > at {
                    take(file as u32, at, &bytes[at..*offset]);
                }
                at = offset + len;
            }
            if at < bytes.len() {
                take(file as u32, at, &bytes[at..]);
            }
        }
    }

    /// How many files there are.
    #[must_use]
    pub fn files(&self) -> usize {
        self.files.len()
    }

    /// Length of a file in bytes.
    #[must_use]
    pub fn file_len(&self, file: usize) -> usize {
        self.files[file].bytes().len()
    }

    /// A descriptor of a file; whoever gets it can only read.
    pub fn file_fd(&self, file: usize) -> Result<OwnedFd, MemoryError> {
        self.files[file].file().try_clone()
    }

    /// Bytes in regions.
    #[must_use]
    pub fn used_bytes(&self) -> usize {
        self.used_bytes
    }

    /// Bytes in which nothing is.
    #[must_use]
    pub fn free_bytes(&self) -> usize {
        self.free.iter().map(|(_, _, len)| len).sum()
    }

    /// Bytes of the longest free span.
    #[must_use]
    pub fn longest_span(&self) -> u64 {
        self.free.iter().map(|(_, _, len)| *len as u64).max().unwrap_or(0)
    }

    /// Takes a zeroed region.
    pub fn allocate(&mut self, len: usize) -> Result<Region, MemoryError> {
        let span = len.max(1).next_multiple_of(ALIGN);
        let at = match self.free.iter().position(|(_, _, free)| *free >= span) {
            Some(at) => at,
            None => {
                let bytes = self.file_bytes.max(span).next_multiple_of(4096);
                self.purse.take_tables(bytes as u64)?;
                match OwnedFile::create(self.name, bytes) {
                    Ok(file) => self.files.push(file),
                    Err(error) => {
                        self.purse.give_tables_back(bytes as u64);
                        return Err(error);
                    }
                }
                self.free.push((self.files.len() as u32 - 1, 0, bytes));
                self.free.len() - 1
            }
        };
        let (file, offset, free) = self.free[at];
        if free == span {
            self.free.remove(at);
        } else {
            self.free[at] = (file, offset + span, free - span);
        }
        self.used_bytes += span;
        let region = Region { file, offset, len };
        self.get_mut(region).fill(0);
        Ok(region)
    }

    /// A copy of a region in a region of its own.
    pub fn copy(&mut self, from: Region) -> Result<Region, MemoryError> {
        let to = self.allocate(from.len)?;
        let bytes = self.get(from).to_vec();
        self.get_mut(to).copy_from_slice(&bytes);
        Ok(to)
    }

    /// Gives a region back.
    pub fn release(&mut self, region: Region) {
        let span = region.len.max(1).next_multiple_of(ALIGN);
        self.used_bytes -= span;
        let key = (region.file, region.offset);
        let at = self.free.partition_point(|(file, offset, _)| (*file, *offset) < key);
        self.free.insert(at, (region.file, region.offset, span));
        let joins = |a: (u32, usize, usize), b: (u32, usize, usize)| a.0 == b.0 && a.1 + a.2 == b.1;
        if at + 1 < self.free.len() && joins(self.free[at], self.free[at + 1]) {
            self.free[at].2 += self.free[at + 1].2;
            self.free.remove(at + 1);
        }
        if at > 0 && joins(self.free[at - 1], self.free[at]) {
            self.free[at - 1].2 += self.free[at].2;
            self.free.remove(at);
        }
    }

    /// Bytes of a region.
    #[must_use]
    pub fn get(&self, region: Region) -> &[u8] {
        &self.files[region.file as usize].bytes()[region.offset..region.offset + region.len]
    }

    /// Bytes of a region, to write.
    pub fn get_mut(&mut self, region: Region) -> &mut [u8] {
        if let Some(marks) = &mut self.marks {
            marks.mark(region.file as usize, region.offset..region.offset + region.len);
        }
        let file = &mut self.files[region.file as usize];
        &mut file.bytes_mut()[region.offset..region.offset + region.len]
    }

    /// The 32-bit word with this index in a region.
    #[must_use]
    pub fn word(&self, region: Region, index: usize) -> u32 {
        let bytes = &self.get(region)[index * 4..index * 4 + 4];
        bytes.try_into().map_or(0, u32::from_le_bytes)
    }

    /// Publishes a 32-bit word of a region to readers in other processes.
    pub fn set_word(&mut self, region: Region, index: usize, value: u32) {
        debug_assert!(index * 4 + 4 <= region.len);
        if let Some(marks) = &mut self.marks {
            let at = region.offset + index * 4;
            marks.mark(region.file as usize, at..at + 4);
        }
        self.files[region.file as usize].publish_u32(region.offset + index * 4, value.to_le());
    }
}

impl Drop for Heap {
    fn drop(&mut self) {
        for file in &self.files {
            self.purse.give_tables_back(file.bytes().len() as u64);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tiers::budget::ArenaBudget;
    use proptest::prelude::*;
    use std::sync::Arc;

    fn budget() -> Purse {
        Purse::of(&Arc::new(ArenaBudget::new(1 << 30)), 1)
    }

    #[test]
    fn a_budget_that_is_used_up_is_said_so_and_comes_back() {
        let budget = budget();
        let free = budget.free_table_bytes();
        let mut heap = Heap::new("test", budget.clone(), 4096);
        heap.allocate(5000).unwrap();
        assert_eq!(budget.free_table_bytes(), free - 8192);
        let error = heap.allocate(free as usize).unwrap_err();
        assert!(matches!(error, MemoryError::Budget { .. }), "{error}");
        drop(heap);
        assert_eq!(budget.free_table_bytes(), free);
    }

    proptest! {
        #[test]
        fn regions_never_overlap_and_all_space_returns(
            moves in proptest::collection::vec((any::<bool>(), 1usize..9000, any::<prop::sample::Index>()), 1..80),
        ) {
            let mut heap = Heap::new("test", budget(), 16 << 10);
            let mut live: Vec<(Region, u8)> = Vec::new();
            for (step, (take, len, index)) in moves.into_iter().enumerate() {
                if take || live.is_empty() {
                    let region = heap.allocate(len).unwrap();
                    prop_assert!(heap.get(region).iter().all(|byte| *byte == 0), "a new region is zeroed");
                    heap.get_mut(region).fill(step as u8 | 1);
                    live.push((region, step as u8 | 1));
                } else {
                    let (region, _) = live.swap_remove(index.index(live.len()));
                    heap.release(region);
                }
                for (region, fill) in &live {
                    prop_assert!(heap.get(*region).iter().all(|byte| byte == fill), "a region was overwritten");
                }
            }
            for (region, _) in live {
                heap.release(region);
            }
            prop_assert_eq!(heap.used_bytes(), 0);
            prop_assert_eq!(heap.free.len(), heap.files(), "free spans of a file join again");
        }
    }

    #[test]
    fn words_are_stored_little_endian_by_index() {
        let mut heap = Heap::new("test", budget(), 4096);
        let region = heap.allocate(12).unwrap();
        heap.set_word(region, 2, 0x0102_0304);
        assert_eq!(heap.get(region)[8..], [4, 3, 2, 1]);
        assert_eq!((heap.word(region, 2), heap.word(region, 0)), (0x0102_0304, 0));
    }
}
