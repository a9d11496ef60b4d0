//! What is done with what is found where an area is to be.
//!
//! An area is a cache, and its index was in the memory of a daemon that has gone: whatever is found in one of ours
//! counts as free, and is erased, unless that daemon has left sessions whose journals say what lies where: then it stays until it has been
//! claimed. Anything else is left alone.

use std::fs::File;
use std::io;
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt};
use std::path::Path;

use super::SpillError;
use super::device::HEAD_BYTES;
use super::operation::Kind;
use super::raw;
use super::superblock::{AreaId, Found, SUPERBLOCK_BYTES, look};

/// Of which kind the place is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Place {
    /// A regular file.
    File,
    /// A block device of so many bytes.
    Block(u64),
}

/// Looks at an open and locked area: if it may be used it holds nothing afterwards, or else is this one, whose contents somebody has yet to claim.
pub(super) fn take_over(
    file: &File,
    path: &Path,
    place: Place,
    claimed: bool,
) -> Result<Option<AreaId>, SpillError> {
    let fail = |what| move |source| SpillError::Io { path: path.to_owned(), what, source };
    let mut first = vec![0; SUPERBLOCK_BYTES];
    let length = read_up_to(file, &mut first, 0).map_err(fail("read"))?;
    let found = look(&first[..length]);
    match (found, place) {
        (Found::Ours { id: Some(id), .. }, _) if claimed => {
            tracing::info!("{} is the spill area of the daemon that has left its sessions", path.display());
            Ok(Some(id))
        }
        (Found::Ours { version, .. }, _) => {
            tracing::info!(
                "{} is a spill area (layout {version}) of a daemon that has gone; its contents are dropped",
                path.display()
            );
            erase(file, path, place).map(|()| None)
        }
        (Found::Nothing, Place::File) => {
            let length = file.metadata().map_err(fail("look at"))?.len();
            // A file of nothing but a block of zeros is no area that a daemon ever left.
            match length {
                0 => Ok(None),
                _ => Err(foreign(path, "it begins with zeros and is not empty")),
            }
        }
        (Found::Nothing, Place::Block(bytes)) => look_at_ends(file, path, bytes).map(|()| None),
        (Found::Damaged, _) => Err(foreign(path, "it begins as a spill area does, but is damaged")),
        (Found::Foreign, _) => Err(foreign(path, "it holds something else")),
    }
}

fn foreign(path: &Path, what: &'static str) -> SpillError {
    SpillError::Foreign { path: path.to_owned(), what }
}

/// A block device may carry a signature beyond its first block: a partition table's copy at the end, a file system's
/// superblock at 64 KiB, a pool's label at 256 KiB.
fn look_at_ends(file: &File, path: &Path, bytes: u64) -> Result<(), SpillError> {
    let fail = |source| SpillError::Io { path: path.to_owned(), what: "read", source };
    for at in [0, bytes.saturating_sub(HEAD_BYTES)] {
        let mut piece = vec![0; HEAD_BYTES as usize];
        let length = read_up_to(file, &mut piece, at).map_err(fail)?;
        if piece[..length].iter().any(|byte| *byte != 0) {
            return Err(foreign(path, "it carries a signature or data"));
        }
    }
    Ok(())
}

/// Drops everything that a former daemon left.
fn erase(file: &File, path: &Path, place: Place) -> Result<(), SpillError> {
    match place {
        Place::File => {
            file.set_len(0).map_err(|source| SpillError::Io { path: path.to_owned(), what: "empty", source })
        }
        Place::Block(bytes) => {
            discard(file, path, bytes);
            Ok(())
        }
    }
}

/// Has a block device forget what it holds, as far as it can.
pub(super) fn discard(file: &File, path: &Path, bytes: u64) {
    let result = raw::change_range(file, Kind::Punch, 0, bytes as usize);
    if result < 0 {
        tracing::warn!(
            "{} cannot discard what it holds ({}): it stays there until it is overwritten, though nobody can read it \
             through the daemon",
            path.display(),
            io::Error::from_raw_os_error(-result)
        );
    }
}

/// Reads until the buffer is full or the file ends.
fn read_up_to(file: &File, into: &mut [u8], at: u64) -> io::Result<usize> {
    let mut done = 0;
    while done < into.len() {
        match file.read_at(&mut into[done..], at + done as u64) {
            Ok(0) => break,
            Ok(read) => done += read,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(done)
}

/// Of which kind an open file is.
pub(super) fn place(file: &File, path: &Path) -> Result<Place, SpillError> {
    let fail = |source| SpillError::Io { path: path.to_owned(), what: "look at", source };
    let kind = file.metadata().map_err(fail)?.file_type();
    if kind.is_file() {
        Ok(Place::File)
    } else if kind.is_block_device() {
        let mut end = file;
        let bytes = io::Seek::seek(&mut end, io::SeekFrom::End(0)).map_err(fail)?;
        Ok(Place::Block(bytes))
    } else {
        Err(SpillError::Unusable { path: path.to_owned() })
    }
}

/// Whether a path still leads to an open file: it may have been removed while we waited for it.
pub(super) fn leads_to(path: &Path, file: &File) -> bool {
    let same = |a: std::fs::Metadata, b: std::fs::Metadata| a.dev() == b.dev() && a.ino() == b.ino();
    match (std::fs::metadata(path), file.metadata()) {
        (Ok(there), Ok(here)) => same(there, here),
        _ => false,
    }
}
