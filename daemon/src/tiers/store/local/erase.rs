//! Erasing: what an image holds is somebody's text.

use std::fs::{File, FileType, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::Path;

use nix::libc::{O_CLOEXEC, O_NOFOLLOW};

use super::Shared;
use super::files::failed;
use super::steps::{Step, reach};
use crate::tiers::store::StoreError;

/// What is overwritten at once.
const ZEROS: usize = 1 << 20;

impl Shared {
    /// Overwrites and unlinks whatever is under a name that is no image's any more.
    pub(super) fn erase(&self, path: &Path) -> Result<(), StoreError> {
        let erased = path.symlink_metadata().and_then(|metadata| erase(path, metadata.file_type()));
        erased.map_err(|error| failed("erase", path, 0, error))?;
        self.sync_root()?;
        self.reach(Step::FolderGone, path)
    }
}

/// We make folders of files only; whatever somebody's hand has put there goes too.
fn erase(path: &Path, kind: FileType) -> io::Result<()> {
    if kind.is_dir() {
        for entry in std::fs::read_dir(path)? {
            let entry = entry?;
            erase(&entry.path(), entry.file_type()?)?;
        }
        return std::fs::remove_dir(path);
    }
    if kind.is_file() {
        overwrite(path)?;
        reach(Step::FileZeroed)?;
    }
    std::fs::remove_file(path)?;
    reach(Step::FileGone)
}

/// Overwrites a file with zeros, as far as it reaches. Files of several links are another's, too, and left as they are.
fn overwrite(path: &Path) -> io::Result<()> {
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
