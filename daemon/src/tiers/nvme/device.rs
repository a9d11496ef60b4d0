//! The area of a device: a file or a block device that is opened, locked and made as large as it is to be.

use std::fs::{File, OpenOptions, TryLockError};
use std::io;
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::sys::statvfs::fstatvfs;

use super::operation::Kind;
use super::recovery::{self, Place};
use super::superblock::{self, AreaId, SUPERBLOCK_BYTES};
use super::{CHUNK_BYTES, SpillError, raw};

/// Bytes before the first chunk.
pub(super) const HEAD_BYTES: u64 = 1 << 20;

/// The area's name in a folder.
const NAME: &str = "kvoyant-spill-0";

/// How often a file that was removed under us is opened anew.
const ATTEMPTS: usize = 8;

/// An area that is ours alone while it exists.
#[derive(Debug)]
pub(super) struct Area {
    /// The file or device.
    pub(super) path: PathBuf,
    /// It, open and locked.
    pub(super) file: Arc<File>,
    /// Bytes of its chunks.
    pub(super) bytes: u64,
    /// Whether it goes around the page cache.
    pub(super) direct: bool,
    /// Whether its space is set aside.
    pub(super) allocated: bool,
    /// Which one it is.
    pub(super) id: AreaId,
    /// Whether it still holds what another daemon has left.
    pub(super) left: bool,
    place: Place,
}

impl Area {
    /// Opens or makes an area with `bytes` bytes for pages, rounded down to chunks; 0 on a block device: all of it. What another daemon has
    /// left there stays if it is yet to be claimed, and is erased otherwise.
    pub(super) fn open(path: &Path, bytes: u64, claimed: bool) -> Result<Self, SpillError> {
        let path = if path.is_dir() { path.join(NAME) } else { path.to_owned() };
        if bytes < CHUNK_BYTES && !is_block(&path) {
            return Err(SpillError::TooSmall { path, bytes });
        }
        let (file, place) = open_locked(&path)?;
        let wanted = match place {
            Place::File => bytes,
            Place::Block(there) => {
                let there = there.saturating_sub(HEAD_BYTES);
                if bytes == 0 { there } else { bytes.min(there) }
            }
        };
        let bytes = wanted - wanted % CHUNK_BYTES;
        if bytes == 0 {
            return Err(SpillError::TooSmall { path, bytes: wanted });
        }
        let found = recovery::take_over(&file, &path, place, claimed)?;
        let id = match found {
            Some(id) => id,
            None => AreaId::fresh().map_err(|source| SpillError::Io {
                path: path.clone(),
                what: "name",
                source,
            })?,
        };
        let (file, left) = (Arc::new(file), found.is_some());
        let made = Self { path, file, bytes, direct: false, allocated: true, id, left, place };
        made.fill()
    }

    /// Marks it as ours and sets its space aside. What could not be made is removed, unless somebody has left something there.
    fn fill(mut self) -> Result<Self, SpillError> {
        let prepared = self.prepare();
        if prepared.is_err() && !self.left {
            self.close();
        }
        prepared.map(|()| self)
    }

    fn prepare(&mut self) -> Result<(), SpillError> {
        let fail = |path: &Path, what| {
            let path = path.to_owned();
            move |source| SpillError::Io { path, what, source }
        };
        if self.place == Place::File {
            self.check_room()?;
        }
        // The mark comes first: a daemon that is killed after this leaves an area that the next one takes over.
        self.file
            .write_all_at(&superblock::encode(self.bytes, self.id), 0)
            .and_then(|()| self.file.sync_data())
            .map_err(fail(&self.path, "mark"))?;
        if self.place == Place::File {
            self.file
                .set_permissions(PermissionsExt::from_mode(0o600))
                .map_err(fail(&self.path, "restrict"))?;
            self.allocate()?;
        }
        self.direct = go_direct(&self.file);
        if !self.direct {
            tracing::warn!(
                "{} does not take direct I/O: spilled pages go through the page cache, which costs copies and memory",
                self.path.display()
            );
        }
        Ok(())
    }

    /// Refuses what the file system has no room for, before all that it has is taken from others.
    fn check_room(&self) -> Result<(), SpillError> {
        let wanted = HEAD_BYTES.saturating_add(self.bytes);
        let free = match room(&self.file) {
            Some(free) if free < wanted => {
                // What an area held that has just been emptied may be free only once that is written down.
                let _ = nix::unistd::syncfs(&*self.file);
                room(&self.file)
            }
            free => free,
        };
        match free {
            Some(free) if free < wanted => Err(SpillError::NoSpace { path: self.path.clone(), wanted, free }),
            _ => Ok(()),
        }
    }

    fn allocate(&mut self) -> Result<(), SpillError> {
        let bytes = HEAD_BYTES + self.bytes;
        let before = self.file.metadata().map_or(0, |there| there.len());
        if self.left && before > bytes {
            // It is to have less than it had.
            self.file.set_len(bytes).map_err(|source| SpillError::Io {
                path: self.path.clone(),
                what: "shorten",
                source,
            })?;
        }
        match -raw::change_range(&self.file, Kind::Allocate, 0, bytes as usize) {
            0 => Ok(()),
            libc::ENOSPC | libc::EDQUOT | libc::EFBIG => {
                // What has been set aside so far is free again, and counts as such. What was left there stays.
                let rest = if self.left { before } else { 0 };
                let emptied = self.file.set_len(rest).and_then(|()| self.file.sync_all());
                if let Err(error) = emptied {
                    tracing::warn!("the spill area {} cannot be emptied: {error}", self.path.display());
                }
                let free = room(&self.file).unwrap_or(0);
                Err(SpillError::NoSpace { path: self.path.clone(), wanted: bytes, free })
            }
            libc::EOPNOTSUPP | libc::ENOSYS => {
                self.allocated = false;
                tracing::warn!(
                    "the file system of {} cannot set space aside: the spill area may turn out to have less than it is to",
                    self.path.display()
                );
                let sized = self.file.set_len(bytes);
                sized.map_err(|source| SpillError::Io { path: self.path.clone(), what: "size", source })
            }
            errno => Err(SpillError::Io {
                path: self.path.clone(),
                what: "set space aside in",
                source: io::Error::from_raw_os_error(errno),
            }),
        }
    }

    /// Leaves nothing behind: a file is removed, a block device loses its mark and discards what it held.
    pub(super) fn close(&self) {
        match self.place {
            Place::File if recovery::leads_to(&self.path, &self.file) => {
                if let Err(error) = std::fs::remove_file(&self.path) {
                    tracing::warn!("the spill area {} cannot be removed: {error}", self.path.display());
                }
            }
            Place::File => {}
            Place::Block(bytes) => {
                recovery::discard(&self.file, &self.path, bytes);
                go_buffered(&self.file);
                let wiped = self.file.write_all_at(&[0; SUPERBLOCK_BYTES], 0);
                if let Err(error) = wiped.and_then(|()| self.file.sync_data()) {
                    tracing::warn!(
                        "the mark of the spill area {} cannot be wiped: {error}",
                        self.path.display()
                    );
                }
            }
        }
    }
}

fn is_block(path: &Path) -> bool {
    std::fs::metadata(path).is_ok_and(|there| there.file_type().is_block_device())
}

/// Bytes that a file may have, those that it has already among them. `None`: its file system does not say.
fn room(file: &File) -> Option<u64> {
    let (there, has) = (fstatvfs(file).ok()?, file.metadata().ok()?.blocks() * 512);
    let free = there.blocks_available().saturating_mul(there.fragment_size());
    (there.blocks() > 0).then(|| free.saturating_add(has))
}

/// Opens a file, made if it is not there, or a block device, and locks it against other daemons.
fn open_locked(path: &Path) -> Result<(File, Place), SpillError> {
    let fail = |what| move |source| SpillError::Io { path: path.to_owned(), what, source };
    let is_block = is_block(path);
    for _ in 0..ATTEMPTS {
        let mut options = OpenOptions::new();
        options.read(true).write(true).mode(0o600);
        if is_block {
            // Nobody else has it: no mounted file system, no volume group.
            options.custom_flags(libc::O_CLOEXEC | libc::O_EXCL);
        } else {
            // Not through a link that somebody else may have put there, nor waiting for a pipe's other end.
            options.create(true).truncate(false);
            options.custom_flags(libc::O_CLOEXEC | libc::O_NOFOLLOW | libc::O_NONBLOCK);
        }
        let file = match options.open(path) {
            Err(error) if is_block && error.raw_os_error() == Some(libc::EBUSY) => {
                return Err(SpillError::Busy { path: path.to_owned() });
            }
            opened => opened.map_err(fail("open"))?,
        };
        let place = recovery::place(&file, path)?;
        match file.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => return Err(SpillError::Busy { path: path.to_owned() }),
            Err(TryLockError::Error(source)) => return Err(fail("lock")(source)),
        }
        // Another daemon may just have removed it.
        if recovery::leads_to(path, &file) {
            return Ok((file, place));
        }
    }
    Err(SpillError::Busy { path: path.to_owned() })
}

fn set_direct(file: &File, direct: bool) -> nix::Result<()> {
    let mut flags = OFlag::from_bits_retain(fcntl(file, FcntlArg::F_GETFL)?);
    flags.set(OFlag::O_DIRECT, direct);
    // It was for opening only: where waiting cannot be avoided, io_uring is to wait elsewhere.
    flags.remove(OFlag::O_NONBLOCK);
    fcntl(file, FcntlArg::F_SETFL(flags)).map(drop)
}

/// Goes around the page cache from now on, if the file system lets us do so in steps of pages.
fn go_direct(file: &File) -> bool {
    if set_direct(file, true).is_err() {
        go_buffered(file);
        return false;
    }
    let mut buffer = vec![0; 2 * SUPERBLOCK_BYTES];
    let skip = buffer.as_ptr().align_offset(SUPERBLOCK_BYTES);
    let aligned = buffer.get_mut(skip..skip + SUPERBLOCK_BYTES);
    let works =
        aligned.is_some_and(|aligned| file.read_at(aligned, 0).is_ok_and(|read| read == SUPERBLOCK_BYTES));
    if !works {
        go_buffered(file);
    }
    works
}

fn go_buffered(file: &File) {
    // Where it cannot be undone, what follows fails and says so.
    let _ = set_direct(file, false);
}
