//! What one daemon leaves on disk for the next: which chunks of which area a session has, and what each of their slots holds.
//!
//! The area says which one it is, the session's journal which chunks of it are the session's, and the tables of its sequences in which slot a
//! page lies and what its checksum is. What of this does not fit together is nobody's, and is erased.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::io::ErrorKind;
use std::os::unix::fs::FileExt;

use kvoyant_protocol::quota::Quota;
use serde::{Deserialize, Serialize};

use super::CHUNK_BYTES;
use super::index::never_zero;
use super::job::{Direction, PageError};
use super::slots::{Held, SECTOR, Slots};
use super::superblock::AreaId;

/// A chunk that a session has, for its journal.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct LeftChunk {
    /// Which area it is in.
    area: AreaId,
    /// Its number there.
    number: u32,
}

impl Slots {
    /// Its chunks, in the order in which slots are numbered; `None` for numbers without one.
    #[must_use]
    pub fn chunks(&self) -> Vec<Option<LeftChunk>> {
        let left = |held: &Option<Held>| {
            let chunk = &held.as_ref()?.chunk;
            Some(LeftChunk { area: chunk.disk.area.id, number: chunk.number })
        };
        self.chunks.iter().map(left).collect()
    }

    /// The checksum of what a slot holds, once that has been written.
    #[must_use]
    pub fn checksum(&self, slot: u32) -> Option<u32> {
        let held = self.chunks.get((slot / self.per_chunk) as usize)?.as_ref()?;
        held.chunk.index.checksum(slot % self.per_chunk)
    }

    /// Takes what the session had with another daemon: its chunks as they were numbered, and for each owner of a slot that slot and the
    /// checksum of what it holds. `None` if these do not fit together, if an area is not here, or its user may not have so much.
    #[must_use]
    pub fn claim(
        &mut self,
        chunks: &[Option<LeftChunk>],
        owners: impl IntoIterator<Item = (u32, u32)>,
    ) -> Option<()> {
        let mut holds: BTreeMap<u32, (u32, u32)> = BTreeMap::new();
        for (slot, sum) in owners {
            match holds.entry(slot) {
                Entry::Vacant(entry) => _ = entry.insert((sum, 1)),
                Entry::Occupied(mut entry) if entry.get().0 == sum => entry.get_mut().1 += 1,
                Entry::Occupied(_) => return None,
            }
        }
        let slots = self;
        for left in chunks {
            let number = slots.chunks.len() as u32;
            let first = number.checked_mul(slots.per_chunk)?;
            let its = holds.range(first..first.checked_add(slots.per_chunk)?);
            let its: Vec<_> = its.map(|(slot, held)| (*slot, *held)).collect();
            // What was given up last is erased with all that nobody claims.
            let (Some(left), false) = (left, its.is_empty()) else {
                if !its.is_empty() {
                    return None;
                }
                slots.vacant.push(number);
                slots.chunks.push(None);
                continue;
            };
            let device = slots.disks.iter().position(|disk| disk.area.id == left.area)?;
            let charge = slots.account.as_ref().map(|account| account.charge(Quota::Spill, CHUNK_BYTES));
            let charge = charge.transpose().ok()?;
            if !slots.disks[device].claim(left.number) {
                return None;
            }
            let mut held = slots.hold(device, left.number, charge);
            for (slot, (sum, owners)) in its {
                let at = slot - first;
                held.owners[at as usize] = owners;
                held.taken[(at / slots.group) as usize] += 1;
                held.chunk.index.set(at, never_zero(sum));
                slots.used += 1;
                holds.remove(&slot);
            }
            held.free.retain(|group| held.taken[*group as usize] == 0);
            if !held.free.is_empty() {
                slots.open[device].push(number);
            }
            slots.chunks.push(Some(held));
        }
        holds.is_empty().then_some(())
    }

    /// Reads a page at once, without the device's thread, and compares it with its checksum.
    ///
    /// # Errors
    /// As a job of the device's would end.
    pub fn read_now(&self, slot: u32, into: &mut Vec<u8>) -> Result<(), PageError> {
        let known = self.checksum(slot);
        let slot = self.slot(slot);
        let (offset, wanted) = (slot.offset(), slot.page_bytes());
        let expected = known.ok_or(PageError::NeverWritten { offset })?;
        // Direct I/O wants its memory aligned.
        let mut room = vec![0; wanted + SECTOR];
        let skip = room.as_ptr().align_offset(SECTOR).min(SECTOR);
        let page = &mut room[skip..skip + wanted];
        let mut done = 0;
        while done < wanted {
            match slot.chunk.disk.area.file.read_at(&mut page[done..], offset + done as u64) {
                Ok(0) => return Err(PageError::Short { direction: Direction::Read, offset, done, wanted }),
                Ok(read) => done += read,
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => {
                    let errno = error.raw_os_error().unwrap_or(libc::EIO);
                    return Err(PageError::Io { direction: Direction::Read, offset, errno });
                }
            }
        }
        let found = never_zero(crc32c::crc32c(page));
        if found != expected {
            return Err(PageError::Checksum { offset, expected, found });
        }
        into.clear();
        into.extend_from_slice(page);
        Ok(())
    }
}
