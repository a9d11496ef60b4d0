//! What lies where a daemon is to spill pages to.

use std::sync::{LazyLock, Mutex, PoisonError};

use kvoyant_daemon::tiers::nvme::{CHUNK_BYTES, EngineChoice, Spill, SpillError, SpillSettings};
use tempfile::TempDir;

static FOLDER: LazyLock<Mutex<TempDir>> =
    LazyLock::new(|| Mutex::new(tempfile::tempdir().expect("a folder")));

/// Any file is an area of a daemon that has gone, or is left as it is.
///
/// # Panics
/// If anything of somebody else's changes.
pub fn run(bytes: &[u8]) {
    let folder = FOLDER.lock().unwrap_or_else(PoisonError::into_inner);
    let path = folder.path().join("area");
    std::fs::write(&path, bytes).expect("a file");
    let settings = SpillSettings {
        paths: vec![path.clone()],
        bytes: CHUNK_BYTES,
        engine: EngineChoice::Psync,
        depth: 2,
        write_depth: 1,
        ..SpillSettings::default()
    };
    match Spill::start(&settings) {
        Ok(spill) => {
            let ours = bytes.is_empty() || bytes.starts_with(b"kvoyant-spill\0\r\n");
            assert!(ours, "a file that is none of ours was taken");
            drop(spill);
        }
        Err(SpillError::Foreign { .. }) => {
            assert_eq!(
                std::fs::read(&path).expect("the file"),
                bytes,
                "a file that is none of ours was changed"
            );
        }
        Err(error) => panic!("{error}"),
    }
    let _ = std::fs::remove_file(&path);
}

/// A first block as it is written, damaged, nothing, and zeros.
#[must_use]
pub fn seeds() -> Vec<Vec<u8>> {
    let mut block = b"kvoyant-spill\0\r\n".to_vec();
    block.extend_from_slice(&1_u32.to_le_bytes());
    block.extend_from_slice(&CHUNK_BYTES.to_le_bytes());
    block.extend_from_slice(&CHUNK_BYTES.to_le_bytes());
    let sum = crc32c::crc32c(&block);
    block.extend_from_slice(&sum.to_le_bytes());
    let cut = block[..20].to_vec();
    vec![block, cut, Vec::new(), vec![0; 64]]
}
