//! Sealed records: how manifests are written down, and read back with suspicion.
//!
//! ```text
//! magic [8] · version u32 · body bytes u64 · body (postcard) · BLAKE3 of all before [32]      little-endian
//! ```
//!
//! The sum is compared before the body is looked at, and no size is believed before it fits the record's own length.

use serde::Serialize;
use serde::de::DeserializeOwned;

use super::error::Damage;

/// Version of the body's layout. Another one is refused, never guessed.
pub(super) const VERSION: u32 = 1;

/// Most bytes of a record: the checksums of 2²⁵ pages with room to spare. Nothing larger is read.
pub(super) const RECORD_MAX: u64 = 256 << 20;

const MAGIC_BYTES: usize = 8;
const HEADER_BYTES: usize = MAGIC_BYTES + 4 + 8;
const SUM_BYTES: usize = 32;

/// Writes a value down. An error is a sentence: only a value that is too large, or one that serde refuses, is none.
pub(super) fn seal(magic: &[u8; MAGIC_BYTES], value: &impl Serialize) -> Result<Vec<u8>, String> {
    let body = postcard::to_allocvec(value).map_err(|error| error.to_string())?;
    let bytes = HEADER_BYTES + body.len() + SUM_BYTES;
    if bytes as u64 > RECORD_MAX {
        return Err(format!("its manifest would have {bytes} bytes and may have {RECORD_MAX}"));
    }
    let mut record = Vec::with_capacity(bytes);
    record.extend_from_slice(magic);
    record.extend_from_slice(&VERSION.to_le_bytes());
    record.extend_from_slice(&(body.len() as u64).to_le_bytes());
    record.extend_from_slice(&body);
    let sum = blake3::hash(&record);
    record.extend_from_slice(sum.as_bytes());
    Ok(record)
}

/// Reads a value back. `file` names the record in errors.
pub(super) fn unseal<T: DeserializeOwned>(
    magic: &[u8; MAGIC_BYTES],
    record: &[u8],
    file: &str,
) -> Result<T, Damage> {
    let file = || file.to_owned();
    let found = record.len() as u64;
    let Some((head, rest)) = record.split_first_chunk::<HEADER_BYTES>() else {
        return Err(Damage::Length { file: file(), expected: (HEADER_BYTES + SUM_BYTES) as u64, found });
    };
    let (mut version, mut length) = ([0; 4], [0; 8]);
    version.copy_from_slice(&head[MAGIC_BYTES..MAGIC_BYTES + 4]);
    length.copy_from_slice(&head[MAGIC_BYTES + 4..]);
    if head[..MAGIC_BYTES] != magic[..] {
        return Err(Damage::NoManifest { file: file() });
    }
    let length = u64::from_le_bytes(length);
    let expected = length.saturating_add((HEADER_BYTES + SUM_BYTES) as u64);
    let Some((body, sum)) = rest.split_last_chunk::<SUM_BYTES>().filter(|_| expected == found) else {
        return Err(Damage::Length { file: file(), expected, found });
    };
    let sum = blake3::Hash::from_bytes(*sum);
    let actual = blake3::hash(&record[..record.len() - SUM_BYTES]);
    if actual != sum {
        let (expected, found) = (sum.to_hex().to_string(), actual.to_hex().to_string());
        return Err(Damage::Seal { file: file(), expected, found });
    }
    // A whole record of another version is not damaged, but it cannot be read here either.
    let version = u32::from_le_bytes(version);
    if version != VERSION {
        return Err(Damage::Version { file: file(), found: version, known: VERSION });
    }
    match postcard::take_from_bytes(body) {
        Ok((value, [])) => Ok(value),
        Ok((_, rest)) => {
            let reason = format!("{} bytes follow its end", rest.len());
            Err(Damage::Content { file: file(), reason })
        }
        Err(error) => Err(Damage::Content { file: file(), reason: error.to_string() }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MAGIC: &[u8; 8] = b"TESTTEST";

    #[test]
    fn any_flipped_bit_and_any_cut_is_found() {
        let value = ("a name".to_owned(), vec![1u32, 70_000, u32::MAX], 7u64);
        let record = seal(MAGIC, &value).unwrap();
        assert_eq!(unseal::<(String, Vec<u32>, u64)>(MAGIC, &record, "m").unwrap(), value);
        for bit in 0..record.len() * 8 {
            let mut damaged = record.clone();
            damaged[bit / 8] ^= 1 << (bit % 8);
            assert!(unseal::<(String, Vec<u32>, u64)>(MAGIC, &damaged, "m").is_err(), "bit {bit}");
        }
        for len in 0..record.len() {
            assert!(unseal::<(String, Vec<u32>, u64)>(MAGIC, &record[..len], "m").is_err(), "{len} bytes");
        }
    }

    #[test]
    fn another_version_is_named() {
        let mut record = seal(MAGIC, &1u8).unwrap();
        record[8] = 2;
        let end = record.len() - SUM_BYTES;
        let sum = blake3::hash(&record[..end]);
        record[end..].copy_from_slice(sum.as_bytes());
        let error = unseal::<u8>(MAGIC, &record, "m").unwrap_err();
        assert_eq!(error, Damage::Version { file: "m".into(), found: 2, known: 1 });
    }

    #[test]
    fn a_count_that_the_body_cannot_hold_is_refused_before_memory_is_taken() {
        // A list of 2^60 words, sealed by somebody who can compute a sum.
        let record = seal(MAGIC, &(1u64 << 60)).unwrap();
        assert!(matches!(unseal::<Vec<u32>>(MAGIC, &record, "m"), Err(Damage::Content { .. })));
    }
}
