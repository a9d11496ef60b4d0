//! Slots: where pages of one session lie on disk.
//!
//! A session takes chunks of [`CHUNK_BYTES`] from the devices and cuts them into groups of [`GROUP_PAGES`] adjacent
//! slots; pages of a head that lie in one aligned group of the sequence lie in one group on disk, so that they come
//! back in one read. Nothing here locks: a session's [`Slots`] belong to one lane, and chunks are taken by a bit.
//!
//! Nothing is used again while somebody may still move bytes there: a slot not while a [`SlotRef`] to it exists, a
//! chunk not before the last one to any of its slots is gone and it has been erased.

use std::sync::Arc;

use kvoyant_protocol::quota::{OverQuota, Quota};
use thiserror::Error;

use super::CHUNK_BYTES;
use super::disk::Disk;
use super::index::Index;
use crate::quota::{Account, Charge};

/// Adjacent pages of a head are adjacent on disk, in groups of so many.
pub const GROUP_PAGES: usize = 16;

/// Pages and devices are addressed in steps of so many bytes.
pub(super) const SECTOR: usize = 4096;

/// No slot could be had.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
#[error(
    "the spill area is full: pages of {page_bytes} bytes need another {} MiB, and {free_bytes} bytes of {total_bytes} \
     are free; give it more with a larger area or another path", CHUNK_BYTES >> 20
)]
pub struct SpillFull {
    /// Bytes of a page.
    pub page_bytes: usize,
    /// Bytes in chunks that are free.
    pub free_bytes: u64,
    /// Bytes of all devices that take writes.
    pub total_bytes: u64,
}

/// A piece of an area that one session has. It goes back when its last owner drops it.
#[derive(Debug)]
pub(super) struct Chunk {
    pub(super) disk: Arc<Disk>,
    pub(super) number: u32,
    pub(super) page_bytes: usize,
    pub(super) index: Index,
    /// Its user has one chunk more.
    pub(super) _charge: Option<Charge>,
}

impl Chunk {
    /// Where a slot lies in the area, in bytes.
    pub(super) fn offset(&self, slot: u32) -> u64 {
        self.disk.chunk_offset(self.number) + u64::from(slot) * self.page_bytes as u64
    }
}

impl Drop for Chunk {
    fn drop(&mut self) {
        self.disk.give_back(self.number);
    }
}

/// A slot, for a job. While it exists the slot is not used for anything else.
#[derive(Debug)]
pub struct SlotRef {
    pub(super) chunk: Arc<Chunk>,
    pub(super) index: u32,
}

impl SlotRef {
    fn new(chunk: &Arc<Chunk>, index: u32) -> Self {
        chunk.index.hold(index);
        Self { chunk: Arc::clone(chunk), index }
    }

    /// Bytes of its page.
    #[must_use]
    pub fn page_bytes(&self) -> usize {
        self.chunk.page_bytes
    }

    /// Where it lies in its area, in bytes.
    pub(super) fn offset(&self) -> u64 {
        self.chunk.offset(self.index)
    }

    /// Whether `next` is the slot behind this one.
    pub(super) fn is_followed_by(&self, next: &Self) -> bool {
        Arc::ptr_eq(&self.chunk, &next.chunk) && self.index + 1 == next.index
    }
}

impl Clone for SlotRef {
    fn clone(&self) -> Self {
        Self::new(&self.chunk, self.index)
    }
}

impl Drop for SlotRef {
    fn drop(&mut self) {
        self.chunk.index.let_go(self.index);
    }
}

/// A chunk as its session sees it.
#[derive(Debug)]
pub(super) struct Held {
    pub(super) chunk: Arc<Chunk>,
    device: usize,
    /// Owners of each slot; 0: free.
    pub(super) owners: Box<[u32]>,
    /// Slots of each group that have owners.
    pub(super) taken: Box<[u8]>,
    /// Groups without any, the next one last.
    pub(super) free: Vec<u32>,
}

/// A session's slots.
#[derive(Debug)]
pub struct Slots {
    pub(super) disks: Arc<[Arc<Disk>]>,
    page_bytes: usize,
    /// Slots of a group.
    pub(super) group: u32,
    /// Slots of a chunk, a multiple of those.
    pub(super) per_chunk: u32,
    /// Chunks by the number that slots have them by.
    pub(super) chunks: Vec<Option<Held>>,
    /// Numbers without a chunk.
    pub(super) vacant: Vec<u32>,
    /// For each device, chunks with free groups.
    pub(super) open: Vec<Vec<u32>>,
    pub(super) used: usize,
    /// Slots that nobody owns any more, and that the session's journal still knows as somebody's; `None`: there is no journal.
    ended: Option<Vec<u32>>,
    pub(super) account: Option<Arc<Account>>,
    /// Why the user got no chunk when one was last asked for, if that was a quota or a share.
    refused: Option<OverQuota>,
}

impl Slots {
    pub(super) fn new(disks: Arc<[Arc<Disk>]>, page_bytes: usize) -> Self {
        // A size that no device takes is refused by `assign`, as a full area is: it comes from a peer.
        let fits = if page_bytes.is_multiple_of(SECTOR) {
            (CHUNK_BYTES as usize).checked_div(page_bytes).unwrap_or(0)
        } else {
            0
        };
        let group = fits.min(GROUP_PAGES);
        let per_chunk = fits.checked_div(group).unwrap_or(0) * group;
        let open = disks.iter().map(|_| Vec::new()).collect();
        Self {
            disks,
            page_bytes,
            group: group as u32,
            per_chunk: per_chunk as u32,
            chunks: Vec::new(),
            vacant: Vec::new(),
            open,
            used: 0,
            ended: None,
            account: None,
            refused: None,
        }
    }

    /// The same on a user's account.
    #[must_use]
    pub fn of(self, account: &Arc<Account>) -> Self {
        Self { account: Some(Arc::clone(account)), ..self }
    }

    /// Why the user got no more when it was last asked for, if that was a quota or a share.
    #[must_use]
    pub fn refused(&self) -> Option<&OverQuota> {
        self.refused.as_ref()
    }

    /// A slot, with one owner, for page `page` of a head: beside `sibling`, which is the slot of any other page of the
    /// same aligned group of [`GROUP_PAGES`] pages of the same head, else in a new group. `stripe` picks the device of
    /// a new group, so that heads and groups spread over all.
    ///
    /// # Errors
    /// If no device has room, or none takes pages of this size.
    pub fn assign(&mut self, page: usize, sibling: Option<u32>, stripe: usize) -> Result<u32, SpillFull> {
        if self.group == 0 {
            return Err(self.full());
        }
        let place = (page % self.group as usize) as u32;
        let beside = sibling.and_then(|slot| self.beside(slot, place));
        let slot = match beside {
            Some(slot) => slot,
            None => self.open_group(stripe)? + place,
        };
        self.take(slot);
        Ok(slot)
    }

    /// Adds an owner.
    pub fn share(&mut self, slot: u32) {
        let (held, index) = self.held_mut(slot);
        debug_assert!(held.owners[index] > 0, "slot {slot} is shared but not owned");
        held.owners[index] += 1;
    }

    /// Drops an owner; true if that was the last one. The slot may be given out again once no job refers to it, and no journal.
    pub fn release(&mut self, slot: u32) -> bool {
        let (held, index) = self.held_mut(slot);
        debug_assert!(held.owners[index] > 0, "slot {slot} is released but not owned");
        if held.owners[index] > 1 {
            held.owners[index] -= 1;
            return false;
        }
        match &mut self.ended {
            Some(ended) => ended.push(slot),
            None => self.free(slot),
        }
        true
    }

    /// From here on what is given up is kept until the journal has been [written](Self::settle), if there `is` one.
    pub fn journaled(&mut self, is: bool) {
        self.settle();
        self.ended = is.then(Vec::new);
    }

    /// The journal says where everything is now: what was given up before is free.
    pub fn settle(&mut self) {
        let ended = self.ended.as_mut().map(std::mem::take).unwrap_or_default();
        ended.into_iter().for_each(|slot| self.free(slot));
    }

    fn free(&mut self, slot: u32) {
        let group_slots = self.group;
        let (held, index) = self.held_mut(slot);
        held.owners[index] = 0;
        let group = index as u32 / group_slots;
        held.taken[group as usize] -= 1;
        if held.taken[group as usize] == 0 {
            held.free.push(group);
            let (device, free, groups) = (held.device, held.free.len(), held.taken.len());
            let number = slot / self.per_chunk;
            if free == 1 {
                self.open[device].push(number);
            }
            if free == groups {
                self.open[device].retain(|open| *open != number);
                self.chunks[number as usize] = None;
                self.vacant.push(number);
            }
        }
        self.used -= 1;
    }

    /// Slots that have owners.
    #[must_use]
    pub fn used(&self) -> usize {
        self.used
    }

    /// Bytes of the pages in them.
    #[must_use]
    pub fn used_bytes(&self) -> u64 {
        self.used as u64 * self.page_bytes as u64
    }

    /// The slot, for a job.
    #[must_use]
    pub fn slot(&self, slot: u32) -> SlotRef {
        let held = self.chunks[(slot / self.per_chunk) as usize].as_ref();
        // A slot that this session has not is the caller's mistake.
        let held = held.unwrap_or_else(|| panic!("slot {slot} has no chunk"));
        SlotRef::new(&held.chunk, slot % self.per_chunk)
    }

    fn held_mut(&mut self, slot: u32) -> (&mut Held, usize) {
        let held = self.chunks[(slot / self.per_chunk) as usize].as_mut();
        let held = held.unwrap_or_else(|| panic!("slot {slot} has no chunk"));
        (held, (slot % self.per_chunk) as usize)
    }

    /// The slot at `place` of a slot's group, if it is free. A copy of a page may have it, where sequences have forked.
    fn beside(&self, sibling: u32, place: u32) -> Option<u32> {
        let held = self.chunks.get((sibling / self.per_chunk) as usize)?.as_ref()?;
        let index = sibling % self.per_chunk;
        let wanted = index - index % self.group + place;
        let owned = |index: u32| held.owners[index as usize] > 0;
        let free = owned(index)
            && !owned(wanted)
            && held.chunk.disk.takes_writes()
            && !held.chunk.index.is_held(wanted);
        free.then_some(sibling - index + wanted)
    }

    /// The first slot of a group without any owners, on the device of this stripe if that has one.
    fn open_group(&mut self, stripe: usize) -> Result<u32, SpillFull> {
        let devices = self.disks.len();
        let mut allowed = None;
        for device in (0..devices).map(|more| (stripe % devices + more) % devices) {
            if !self.disks[device].takes_writes() {
                continue;
            }
            if let Some(slot) = self.idle_group(device) {
                return Ok(slot);
            }
            let may = allowed.unwrap_or_else(|| self.allows_chunk());
            allowed = Some(may);
            if may && let Some(number) = self.add_chunk(device) {
                self.open[device].push(number);
                return self.idle_group(device).ok_or_else(|| self.full());
            }
        }
        Err(self.full())
    }

    /// Takes a group out of a device's open chunks that no job refers to.
    fn idle_group(&mut self, device: usize) -> Option<u32> {
        let group_slots = self.group;
        for at in (0..self.open[device].len()).rev() {
            let number = self.open[device][at];
            let held = self.chunks[number as usize].as_mut()?;
            let idle = |group: &u32| {
                let slots = group * group_slots..(group + 1) * group_slots;
                slots.into_iter().all(|slot| !held.chunk.index.is_held(slot))
            };
            if let Some(found) = held.free.iter().rposition(idle) {
                let group = held.free.remove(found);
                if held.free.is_empty() {
                    self.open[device].swap_remove(at);
                }
                return Some(number * self.per_chunk + group * group_slots);
            }
        }
        None
    }

    /// Whether the user may have another chunk.
    fn allows_chunk(&mut self) -> bool {
        let Some(account) = &self.account else { return true };
        let SpillFull { free_bytes, total_bytes, .. } = self.full();
        let refused = if account.room(Quota::Spill) < CHUNK_BYTES {
            Some(account.over_quota(Quota::Spill, CHUNK_BYTES))
        } else if free_bytes >= CHUNK_BYTES
            && account.obtainable(Quota::Spill, total_bytes, free_bytes) < CHUNK_BYTES
        {
            Some(account.over_share(Quota::Spill, CHUNK_BYTES, total_bytes))
        } else {
            None
        };
        // A lane tries for page after page: once counts.
        if refused.is_some() && self.refused.is_none() {
            account.refused(Quota::Spill);
        }
        self.refused = refused;
        self.refused.is_none()
    }

    fn add_chunk(&mut self, device: usize) -> Option<u32> {
        let number = self.vacant.pop().unwrap_or(self.chunks.len() as u32);
        let named = number.checked_add(1).and_then(|chunks| chunks.checked_mul(self.per_chunk));
        let charge =
            self.account.as_ref().map(|account| account.charge(Quota::Spill, CHUNK_BYTES)).transpose();
        let taken = named.and_then(|_| Some((charge.ok()?, self.disks[device].take_chunk()?)));
        let Some((charge, taken)) = taken else {
            if (number as usize) < self.chunks.len() {
                self.vacant.push(number);
            }
            return None;
        };
        let held = self.hold(device, taken, charge);
        if number as usize == self.chunks.len() {
            self.chunks.push(Some(held));
        } else {
            self.chunks[number as usize] = Some(held);
        }
        Some(number)
    }

    /// A chunk of a device with nothing in it.
    pub(super) fn hold(&self, device: usize, number: u32, charge: Option<Charge>) -> Held {
        let slots = self.per_chunk as usize;
        let groups = self.per_chunk / self.group;
        let chunk = Arc::new(Chunk {
            disk: Arc::clone(&self.disks[device]),
            number,
            page_bytes: self.page_bytes,
            index: Index::new(slots),
            _charge: charge,
        });
        Held {
            chunk,
            device,
            owners: vec![0; slots].into(),
            taken: vec![0; groups as usize].into(),
            free: (0..groups).rev().collect(),
        }
    }

    fn take(&mut self, slot: u32) {
        let group_slots = self.group;
        let (held, index) = self.held_mut(slot);
        debug_assert_eq!(held.owners[index], 0, "slot {slot} was free and owned");
        held.owners[index] = 1;
        held.taken[index / group_slots as usize] += 1;
        // What was here is not the page that will be.
        held.chunk.index.clear(index as u32);
        self.used += 1;
    }

    fn full(&self) -> SpillFull {
        let serving = self.disks.iter().filter(|disk| disk.takes_writes());
        let (free, total) = serving
            .fold((0, 0), |(free, total), disk| (free + disk.free_bytes(), total + disk.total_bytes()));
        SpillFull { page_bytes: self.page_bytes, free_bytes: free, total_bytes: total }
    }
}

#[cfg(test)]
mod tests;
