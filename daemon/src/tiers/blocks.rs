//! Refcounted blocks of equal size: one digest block per page and KV head, shared by forks like the pages.

use kvoyant_protocol::memory::MemoryError;

use crate::tiers::heap::{Heap, Region};

/// Blocks that are taken from the heap at once.
const BATCH: usize = 256;

/// A pool of blocks of one size.
#[derive(Debug)]
pub struct Blocks {
    block_bytes: usize,
    regions: Vec<Region>,
    references: Vec<u32>,
    free: Vec<u32>,
}

impl Blocks {
    /// An empty pool.
    #[must_use]
    pub fn new(block_bytes: usize) -> Self {
        Self { block_bytes, regions: Vec::new(), references: Vec::new(), free: Vec::new() }
    }

    /// The pool that another process had, in these regions; `owners` are blocks in use, as often as they are owned. `None` if one of them lies
    /// in no region, or a region is no batch of blocks.
    #[must_use]
    pub fn restore(
        block_bytes: usize,
        regions: Vec<Region>,
        owners: impl IntoIterator<Item = u32>,
    ) -> Option<Self> {
        if regions.iter().any(|region| region.len != BATCH * block_bytes) {
            return None;
        }
        let mut references = vec![0_u32; regions.len() * BATCH];
        for block in owners {
            *references.get_mut(block as usize)? += 1;
        }
        let free = (0..references.len() as u32).rev().filter(|block| references[*block as usize] == 0);
        let free = free.collect();
        Some(Self { block_bytes, regions, references, free })
    }

    /// Where they lie.
    #[must_use]
    pub fn regions(&self) -> &[Region] {
        &self.regions
    }

    /// Bytes of a block.
    #[must_use]
    pub fn block_bytes(&self) -> usize {
        self.block_bytes
    }

    /// Takes a block with one reference. Its content is whatever it was.
    pub fn take(&mut self, heap: &mut Heap) -> Result<u32, MemoryError> {
        if self.free.is_empty() {
            self.regions.push(heap.allocate(BATCH * self.block_bytes)?);
            let first = self.references.len() as u32;
            self.references.resize(first as usize + BATCH, 0);
            self.free.extend((first..first + BATCH as u32).rev());
        }
        let block = self.free.pop().unwrap_or_else(|| unreachable!("blocks were just added"));
        self.references[block as usize] = 1;
        Ok(block)
    }

    /// Adds an owner.
    pub fn share(&mut self, block: u32) {
        self.references[block as usize] += 1;
    }

    /// Whether a block has more than one owner.
    #[must_use]
    pub fn is_shared(&self, block: u32) -> bool {
        self.references[block as usize] > 1
    }

    /// Drops an owner.
    pub fn release(&mut self, block: u32) {
        let references = &mut self.references[block as usize];
        debug_assert!(*references > 0, "block {block} is released but not owned");
        *references -= 1;
        if *references == 0 {
            self.free.push(block);
        }
    }

    /// Blocks in use.
    #[must_use]
    pub fn used(&self) -> usize {
        self.references.len() - self.free.len()
    }

    /// Bytes of the blocks in use.
    #[must_use]
    pub fn used_bytes(&self) -> usize {
        self.used() * self.block_bytes
    }

    fn region(&self, block: u32) -> Region {
        let region = self.regions[block as usize / BATCH];
        let offset = region.offset + block as usize % BATCH * self.block_bytes;
        Region { file: region.file, offset, len: self.block_bytes }
    }

    /// Bytes of a block.
    #[must_use]
    pub fn get<'a>(&self, heap: &'a Heap, block: u32) -> &'a [u8] {
        heap.get(self.region(block))
    }

    /// Bytes of a block, to write.
    pub fn get_mut<'a>(&self, heap: &'a mut Heap, block: u32) -> &'a mut [u8] {
        heap.get_mut(self.region(block))
    }

    /// A private copy of a shared block, in its place.
    pub fn make_private(&mut self, heap: &mut Heap, block: u32) -> Result<u32, MemoryError> {
        if !self.is_shared(block) {
            return Ok(block);
        }
        let copy = self.take(heap)?;
        let content = self.get(heap, block).to_vec();
        self.get_mut(heap, copy).copy_from_slice(&content);
        self.release(block);
        Ok(copy)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tiers::budget::ArenaBudget;
    use crate::tiers::purse::Purse;
    use std::sync::Arc;

    fn heap(file_bytes: usize) -> Heap {
        Heap::new("test", Purse::of(&Arc::new(ArenaBudget::new(1 << 30)), 1), file_bytes)
    }

    #[test]
    fn a_shared_block_is_copied_before_it_is_written() {
        let mut heap = heap(1 << 16);
        let mut blocks = Blocks::new(48);
        let first = blocks.take(&mut heap).unwrap();
        blocks.get_mut(&mut heap, first).fill(7);
        assert_eq!(blocks.make_private(&mut heap, first).unwrap(), first, "nobody shares it");
        blocks.share(first);
        let copy = blocks.make_private(&mut heap, first).unwrap();
        assert_ne!(copy, first);
        blocks.get_mut(&mut heap, copy)[0] = 9;
        assert_eq!(blocks.get(&heap, first), [7; 48]);
        assert_eq!(blocks.get(&heap, copy)[..2], [9, 7]);
        blocks.release(first);
        blocks.release(copy);
        assert_eq!((blocks.used(), blocks.used_bytes()), (0, 0));
    }

    #[test]
    fn blocks_are_apart_across_batches() {
        let mut heap = heap(4096);
        let mut blocks = Blocks::new(40);
        let all: Vec<_> = (0..600).map(|_| blocks.take(&mut heap).unwrap()).collect();
        for block in &all {
            blocks.get_mut(&mut heap, *block).fill(*block as u8);
        }
        assert!(all.iter().all(|block| blocks.get(&heap, *block) == [*block as u8; 40]));
    }
}
