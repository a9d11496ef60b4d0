//! Device memory that the daemon exports to a client: how it travels, and what lies where in it.
//!
//! A session on a GPU has two allocations of its own. The *slab* holds rows and belongs to the daemon alone: the
//! client maps it for reading where the driver can enforce that. The *board* holds what a stream of the client's
//! needs to go on without its CPU: timeline words, a status word per ring slot and a copy of each block table. Only
//! the daemon gives the board's contents a meaning, and it never reads them back, so a client that scribbles there
//! misleads itself alone. The board is writable for the client, so that its watchdog can let its streams go when
//! the daemon has died.
//!
//! ```text
//! board     0  timeline     u64   ticket << 8 | status of the last answer; never runs backwards
//!           8  timeline 32  u32   low 32 bits of the ticket, for devices without 64-bit waits; cyclic
//!          64  slot words   u64 × ring slots: ticket << 8 | status of the answer whose table lies in the slot
//!        4096  block tables, one for each ring slot, as in the daemon → client memfd
//! ```

use serde::{Deserialize, Serialize};

use crate::layout::Layout;

/// Offset of the 64-bit timeline word in a board.
pub const TIMELINE: usize = 0;
/// Offset of the 32-bit timeline word in a board.
pub const TIMELINE_32: usize = 8;
const SLOT_WORDS: usize = 64;
const TABLES: usize = 4096;

/// A handle by which another process opens device memory, or an event, of a CUDA driver. Opaque.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct IpcHandle([[u8; 32]; 2]);

impl From<[u8; 64]> for IpcHandle {
    fn from(bytes: [u8; 64]) -> Self {
        let mut halves = [[0; 32]; 2];
        halves[0].copy_from_slice(&bytes[..32]);
        halves[1].copy_from_slice(&bytes[32..]);
        Self(halves)
    }
}

impl From<IpcHandle> for [u8; 64] {
    fn from(handle: IpcHandle) -> Self {
        let mut bytes = [0; 64];
        bytes[..32].copy_from_slice(&handle.0[0]);
        bytes[32..].copy_from_slice(&handle.0[1]);
        bytes
    }
}

/// How one allocation is handed over.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Export {
    /// By a classic handle: it opens the whole allocation.
    Handle {
        /// The handle.
        handle: IpcHandle,
        /// Bytes of the allocation.
        bytes: u64,
    },
    /// By a file descriptor beside the message, in the order of the exports.
    Descriptor {
        /// Bytes of the allocation.
        bytes: u64,
    },
}

impl Export {
    /// Bytes of the allocation.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        match self {
            Self::Handle { bytes, .. } | Self::Descriptor { bytes } => *bytes,
        }
    }
}

/// How a client's stream learns that an answer is ready.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Signal {
    /// It waits for the board's 64-bit timeline word.
    Timeline64,
    /// It waits for the board's 32-bit timeline word, cyclically.
    Timeline32,
    /// It waits for an interprocess event, one for each ring slot. An event means something only once its answer has
    /// been planned: [`d2c::PLANNED`](crate::layout::d2c::PLANNED).
    Events(Vec<IpcHandle>),
}

/// A session's device memory.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeviceExport {
    /// UUID of the device, so that both sides mean the same one whatever they number it.
    pub device: [u8; 16],
    /// The slab's allocation.
    pub slab: Export,
    /// Where in it the slab begins.
    pub slab_offset: u64,
    /// Bytes of the slab.
    pub slab_bytes: u64,
    /// The board's allocation; the board begins with it.
    pub board: Export,
    /// The allocation of the residency records, which begin with it; in graph mode only.
    pub records: Option<Export>,
    /// How streams are signalled.
    pub signal: Signal,
}

/// Where a session's slab lies.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum SlabRef {
    /// There is none: answers point into the session's extents.
    None,
    /// In host memory: a memfd beside the message.
    Host {
        /// Its length.
        bytes: u64,
    },
    /// On a device.
    Device(Box<DeviceExport>),
}

impl Layout {
    /// Bytes of the session's board.
    #[must_use]
    pub fn board_bytes(&self) -> usize {
        TABLES + self.limits.ring_slots as usize * self.table_stride()
    }

    /// Offset in the board of the status word of the answer to this ticket.
    #[must_use]
    pub fn board_word(&self, ticket: u64) -> usize {
        SLOT_WORDS + self.answer_slot(ticket) * 8
    }

    /// Offset in the board of the block table of the answer to this ticket.
    #[must_use]
    pub fn board_table(&self, ticket: u64) -> usize {
        TABLES + self.answer_slot(ticket) * self.table_stride()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::layout::Limits;

    #[test]
    fn words_and_tables_of_a_board_never_overlap() {
        for ring_slots in [2, 16, 256] {
            let layout =
                Layout::new(Limits { ring_slots, table_bytes: 5000, hint_bytes: 64, ..Limits::default() })
                    .unwrap();
            let slots = u64::from(ring_slots);
            assert!(TIMELINE_32 + 4 <= layout.board_word(0));
            assert!(layout.board_word(slots - 1) + 8 <= layout.board_table(0));
            for ticket in 0..slots - 1 {
                assert!(layout.board_table(ticket) + 5000 <= layout.board_table(ticket + 1));
            }
            assert!(layout.board_table(slots - 1) + 5000 <= layout.board_bytes());
            assert_eq!(layout.board_table(slots), layout.board_table(0));
        }
    }

    #[test]
    fn a_handle_keeps_its_bytes() {
        let bytes: [u8; 64] = std::array::from_fn(|i| i as u8);
        assert_eq!(<[u8; 64]>::from(IpcHandle::from(bytes)), bytes);
    }
}
