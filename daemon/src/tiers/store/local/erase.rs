//! Erasing: what an image holds is somebody's text.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use nix::libc::{O_CLOEXEC, O_NOFOLLOW};

use super::Shared;
use super::files::failed;
use super::steps::{Step, reach};
use crate::tiers::store::StoreError;

/// What is overwritten at once.
const ZEROS: usize = 1 << 20;

impl Shared {
    /// Overwrites and unlinks every file of a folder that is no image any more, whatever is in it, and the folder.
    pub(super) fn erase(&self, folder: &Path) -> Result<(), StoreError> {
        erase_folder(folder).map_err(|error| failed("erase", folder, 0, error))?;
        self.sync_root()?;
        self.reach(Step::FolderGone, folder)
    }
}

fn erase_folder(folder: &Path) -> io::Result<()> {
    for entry in std::fs::read_dir(folder)? {
        let (path, kind) = entry.and_then(|entry| Ok((entry.path(), entry.file_type()?)))?;
        if kind.is_dir() {
            // We make none; somebody's hand did.
            erase_folder(&path)?;
            continue;
        }
        if kind.is_file() {
            overwrite(&path)?;
            reach(Step::FileZeroed)?;
        }
        std::fs::remove_file(&path)?;
        reach(Step::FileGone)?;
    }
    std::fs::remove_dir(folder)
}

/// Overwrites a file with zeros, as far as it reaches. Files of several links are another's, too, and left as they are.
fn overwrite(path: &Path) -> io::Result<()> {
    use std::os::unix::fs::MetadataExt;
    let mut file = OpenOptions::new().write(true).custom_flags(O_NOFOLLOW | O_CLOEXEC).open(path)?;
    let metadata = file.metadata()?;
    if metadata.nlink() > 1 {
        return Ok(());
    }
    match zero(&mut file, metadata.len()) {
        // On a full file system that copies on write, the name can still go.
        Err(error) if error.kind() == io::ErrorKind::StorageFull => {
            tracing::warn!("{} is unlinked without being overwritten: {error}", path.display());
            Ok(())
        }
        done => done,
    }
}

fn zero(file: &mut File, mut bytes: u64) -> io::Result<()> {
    let zeros = vec![0; ZEROS.min(usize::try_from(bytes).unwrap_or(ZEROS))];
    while bytes > 0 {
        let part = bytes.min(zeros.len() as u64) as usize;
        file.write_all(&zeros[..part])?;
        bytes -= part as u64;
    }
    file.sync_data()
}
