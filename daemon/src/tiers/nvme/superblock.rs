//! The first block of an area: that it is ours, of which kind, and which one.

use std::io::Read;

use serde::{Deserialize, Serialize};

use super::CHUNK_BYTES;

/// Which area it is: no two are the same, whatever they are called.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct AreaId([u64; 2]);

impl AreaId {
    /// One that no other area has.
    pub(super) fn fresh() -> std::io::Result<Self> {
        let mut bytes = [0; 16];
        std::fs::File::open("/dev/urandom")?.read_exact(&mut bytes)?;
        Ok(Self(bytemuck::cast(bytes)))
    }
}

/// Bytes of the block.
pub(super) const SUPERBLOCK_BYTES: usize = 4096;

const MAGIC: [u8; 16] = *b"kvoyant-spill\0\r\n";
const VERSION: u32 = 2;
/// Magic, version, bytes of a chunk, bytes of the area: followed by a checksum, so in every version.
const CHECKED: usize = 16 + 4 + 8 + 8;
/// All that and which area it is, followed by a checksum: since version 2.
const NAMED: usize = CHECKED + 4 + 16;

/// What a first block says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Found {
    /// Nothing but zeros, or nothing at all.
    Nothing,
    /// An area of ours, of this version.
    Ours {
        /// The layout's version.
        version: u32,
        /// Which one, if this version says so in a way that is known.
        id: Option<AreaId>,
    },
    /// Begins as ours do, but the rest is no superblock.
    Damaged,
    /// Something else.
    Foreign,
}

/// The block of an area of so many bytes.
pub(super) fn encode(area_bytes: u64, id: AreaId) -> Vec<u8> {
    let mut block = Vec::with_capacity(SUPERBLOCK_BYTES);
    block.extend(MAGIC);
    block.extend(VERSION.to_le_bytes());
    block.extend(CHUNK_BYTES.to_le_bytes());
    block.extend(area_bytes.to_le_bytes());
    debug_assert_eq!(block.len(), CHECKED);
    let sum = crc32c::crc32c(&block);
    block.extend(sum.to_le_bytes());
    block.extend(id.0.iter().flat_map(|word| word.to_le_bytes()));
    debug_assert_eq!(block.len(), NAMED);
    let sum = crc32c::crc32c(&block);
    block.extend(sum.to_le_bytes());
    block.resize(SUPERBLOCK_BYTES, 0);
    block
}

/// Looks at the beginning of an area, which may be shorter than a block.
pub(super) fn look(block: &[u8]) -> Found {
    if block.iter().all(|byte| *byte == 0) {
        return Found::Nothing;
    }
    if !block.starts_with(&MAGIC) {
        return Found::Foreign;
    }
    let (Some(checked), Some(sum)) = (block.get(..CHECKED), block.get(CHECKED..CHECKED + 4)) else {
        return Found::Damaged;
    };
    if crc32c::crc32c(checked).to_le_bytes() != sum {
        return Found::Damaged;
    }
    let version = checked[16..20].try_into().map_or(0, u32::from_le_bytes);
    Found::Ours { version, id: (version == VERSION).then(|| id(block)).flatten() }
}

fn id(block: &[u8]) -> Option<AreaId> {
    let (checked, sum) = (block.get(..NAMED)?, block.get(NAMED..NAMED + 4)?);
    if crc32c::crc32c(checked).to_le_bytes() != sum {
        return None;
    }
    let word = |at: usize| Some(u64::from_le_bytes(checked.get(at..at + 8)?.try_into().ok()?));
    Some(AreaId([word(CHECKED + 4)?, word(CHECKED + 12)?]))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_superblock_is_recognised_and_zeros_are_nothing() {
        let id = AreaId::fresh().unwrap();
        let block = encode(1 << 30, id);
        assert_eq!(block.len(), SUPERBLOCK_BYTES);
        assert_eq!(look(&block), Found::Ours { version: VERSION, id: Some(id) });
        assert_ne!(id, AreaId::fresh().unwrap());
        // An area is still ours when it is not known which one it is.
        let mut unnamed = block.clone();
        unnamed[CHECKED + 9] ^= 1;
        assert_eq!(look(&unnamed), Found::Ours { version: VERSION, id: None });
        // One of the first version ended with its checksum.
        let mut first = block[..CHECKED].to_vec();
        first[16] = 1;
        let sum = crc32c::crc32c(&first);
        first.extend(sum.to_le_bytes());
        first.resize(SUPERBLOCK_BYTES, 0);
        assert_eq!(look(&first), Found::Ours { version: 1, id: None });
        assert_eq!((look(&[]), look(&[0; 4096])), (Found::Nothing, Found::Nothing));
        assert_eq!(look(&block[..30]), Found::Damaged);
    }

    proptest! {
        #[test]
        fn whatever_else_is_there_is_not_ours(at in 0usize..CHECKED + 4, bit in 0u8..8, noise in proptest::collection::vec(any::<u8>(), 0..100)) {
            let mut block = encode(1 << 30, AreaId::fresh().unwrap());
            block[at] ^= 1 << bit;
            let ours = |block: &[u8]| matches!(look(block), Found::Ours { .. });
            prop_assert!(!ours(&block));
            prop_assert!(!ours(&noise));
        }
    }
}
