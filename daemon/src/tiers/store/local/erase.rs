//! Erasing: what an image holds is somebody's text.

use std::fs::{File, FileType, OpenOptions};
use std::io::{self, Seek, SeekFrom, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};

use nix::libc::{O_CLOEXEC, O_NOFOLLOW};

use super::Shared;
use super::files::failed;
use super::steps::{Step, reach};
use crate::tiers::store::StoreError;

/// What is overwritten at once.
const ZEROS: usize = 1 << 20;
/// A file is overwritten from its end, and cut, in pieces of so many bytes: whoever is interrupted has not done it in vain.
const PIECE: u64 = 64 << 20;

impl Shared {
    /// Overwrites and unlinks whatever is under a name that is no image's any more. When the daemon stops meanwhile, its next start goes on
    /// where this one ended.
    pub(super) fn erase(&self, path: &Path) -> Result<(), StoreError> {
        let erased =
            path.symlink_metadata().and_then(|metadata| erase(path, metadata.file_type(), &self.stop));
        match erased {
            Ok(()) => {}
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {
                tracing::info!("the next start erases the rest of {}: {error}", path.display());
                return Ok(());
            }
            Err(error) => return Err(failed("erase", path, 0, error)),
        }
        self.sync_root()?;
        self.reach(Step::FolderGone, path)
    }
}

/// We make folders of files only; whatever somebody's hand has put there goes too.
fn erase(path: &Path, kind: FileType, stop: &AtomicBool) -> io::Result<()> {
    if kind.is_dir() {
        for entry in std::fs::read_dir(path)? {
            let entry = entry?;
            erase(&entry.path(), entry.file_type()?, stop)?;
        }
        return std::fs::remove_dir(path);
    }
    if kind.is_file() {
        overwrite(path, stop)?;
        reach(Step::FileZeroed)?;
    }
    std::fs::remove_file(path)?;
    reach(Step::FileGone)
}

/// Overwrites a file with zeros, as far as it reaches. Files of several links are another's, too, and left as they are.
fn overwrite(path: &Path, stop: &AtomicBool) -> io::Result<()> {
    let mut file = OpenOptions::new().write(true).custom_flags(O_NOFOLLOW | O_CLOEXEC).open(path)?;
    let metadata = file.metadata()?;
    if metadata.nlink() > 1 {
        return Ok(());
    }
    match zero(&mut file, metadata.len(), stop) {
        // On a full file system that copies on write, the name can still go.
        Err(error) if error.kind() == io::ErrorKind::StorageFull => {
            tracing::warn!("{} is unlinked without being overwritten: {error}", path.display());
            Ok(())
        }
        done => done,
    }
}

fn zero(file: &mut File, bytes: u64, stop: &AtomicBool) -> io::Result<()> {
    let zeros = vec![0; ZEROS.min(usize::try_from(bytes).unwrap_or(ZEROS))];
    let mut end = bytes;
    while end > 0 {
        if stop.load(Ordering::Relaxed) {
            return Err(io::Error::new(io::ErrorKind::Interrupted, "the daemon stops"));
        }
        let begin = (end - 1) / PIECE * PIECE;
        file.seek(SeekFrom::Start(begin))?;
        let mut left = end - begin;
        while left > 0 {
            let part = left.min(zeros.len() as u64) as usize;
            file.write_all(&zeros[..part])?;
            left -= part as u64;
        }
        file.sync_data()?;
        if begin > 0 {
            file.set_len(begin)?;
        }
        end = begin;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_is_overwritten_from_its_end_and_cut_on_the_way_unless_that_is_stopped() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("pages");
        std::fs::write(&path, vec![7; 3 << 20]).unwrap();
        let file = File::options().write(true).open(&path).unwrap();
        // Nothing of the second piece lies on any disk.
        file.set_len(PIECE + 5).unwrap();
        let (mut twin, stop) = (file.try_clone().unwrap(), AtomicBool::new(true));
        let stopped = zero(&mut twin, PIECE + 5, &stop).unwrap_err();
        assert_eq!(stopped.kind(), io::ErrorKind::Interrupted);
        assert_eq!(file.metadata().unwrap().len(), PIECE + 5);
        zero(&mut twin, PIECE + 5, &AtomicBool::new(false)).unwrap();
        // What is left is the first piece, of zeros.
        assert_eq!(file.metadata().unwrap().len(), PIECE);
        assert!(std::fs::read(&path).unwrap()[..4 << 20].iter().all(|byte| *byte == 0));
    }
}
