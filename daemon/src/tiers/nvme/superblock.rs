//! The first block of an area: that it is ours, and of which kind.

use super::CHUNK_BYTES;

/// Bytes of the block.
pub(super) const SUPERBLOCK_BYTES: usize = 4096;

const MAGIC: [u8; 16] = *b"kvoyant-spill\0\r\n";
const VERSION: u32 = 1;
/// Magic, version, bytes of a chunk, bytes of the area.
const CHECKED: usize = 16 + 4 + 8 + 8;

/// What a first block says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Found {
    /// Nothing but zeros, or nothing at all.
    Nothing,
    /// An area of ours, of this version.
    Ours {
        /// The layout's version.
        version: u32,
    },
    /// Begins as ours do, but the rest is no superblock.
    Damaged,
    /// Something else.
    Foreign,
}

/// The block of an area of so many bytes.
pub(super) fn encode(area_bytes: u64) -> Vec<u8> {
    let mut block = Vec::with_capacity(SUPERBLOCK_BYTES);
    block.extend(MAGIC);
    block.extend(VERSION.to_le_bytes());
    block.extend(CHUNK_BYTES.to_le_bytes());
    block.extend(area_bytes.to_le_bytes());
    debug_assert_eq!(block.len(), CHECKED);
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
    Found::Ours { version }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_superblock_is_recognised_and_zeros_are_nothing() {
        let block = encode(1 << 30);
        assert_eq!(block.len(), SUPERBLOCK_BYTES);
        assert_eq!(look(&block), Found::Ours { version: VERSION });
        assert_eq!((look(&[]), look(&[0; 4096])), (Found::Nothing, Found::Nothing));
        assert_eq!(look(&block[..30]), Found::Damaged);
    }

    proptest! {
        #[test]
        fn whatever_else_is_there_is_not_ours(at in 0usize..CHECKED + 4, bit in 0u8..8, noise in proptest::collection::vec(any::<u8>(), 0..100)) {
            let mut block = encode(1 << 30);
            block[at] ^= 1 << bit;
            let ours = |block: &[u8]| matches!(look(block), Found::Ours { .. });
            prop_assert!(!ours(&block));
            prop_assert!(!ours(&noise));
        }
    }
}
