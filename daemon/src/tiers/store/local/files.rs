//! Files as images need them: private, written in large pieces, and errors that say what they were for.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use kvoyant_protocol::faults::{self, Point};
use nix::errno::Errno;
use nix::sys::statvfs::statvfs;

use crate::tiers::store::StoreError;

/// What is written at once.
const WRITE_BYTES: usize = 1 << 20;

/// The error of a call, where `wanted_bytes` were to be written.
pub(super) fn failed(doing: &'static str, path: &Path, wanted_bytes: u64, source: io::Error) -> StoreError {
    let full = [Errno::ENOSPC, Errno::EDQUOT].map(|errno| Some(errno as i32));
    if !full.contains(&source.raw_os_error()) {
        return StoreError::Io { doing, path: path.to_owned(), source };
    }
    // The file may be gone again, its folder hardly.
    let room = statvfs(path).or_else(|_| statvfs(path.parent().unwrap_or(path)));
    let free_bytes = room.map_or(0, |room| room.blocks_available() * room.fragment_size());
    StoreError::Full { path: path.to_owned(), wanted_bytes, free_bytes }
}

/// Makes a folder's list of names lasting.
pub(super) fn sync_folder(folder: &Path) -> Result<(), StoreError> {
    let opened = faults::check(Point::ImageSync).and_then(|()| File::open(folder));
    opened.and_then(|file| file.sync_all()).map_err(|error| failed("sync", folder, 0, error))
}

/// A new file of an image.
#[derive(Debug)]
pub(super) struct Out {
    path: PathBuf,
    file: File,
    buffer: Vec<u8>,
    bytes: u64,
}

impl Out {
    /// Makes the file, which must not be there.
    pub(super) fn create(path: PathBuf) -> Result<Self, StoreError> {
        let made = || OpenOptions::new().write(true).create_new(true).mode(0o600).open(&path);
        let file = faults::check(Point::ImageOpen).and_then(|()| made());
        let file = file.map_err(|error| failed("make the file", &path, 0, error))?;
        Ok(Self { path, file, buffer: Vec::new(), bytes: 0 })
    }

    /// Where it is.
    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// Bytes that it has been given.
    pub(super) fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Adds bytes to its end, sooner or later.
    pub(super) fn write(&mut self, bytes: &[u8]) -> Result<(), StoreError> {
        self.bytes += bytes.len() as u64;
        if self.buffer.len() + bytes.len() >= WRITE_BYTES {
            self.flush()?;
        }
        if bytes.len() >= WRITE_BYTES {
            return self.now(bytes);
        }
        self.buffer.extend_from_slice(bytes);
        Ok(())
    }

    /// Hands everything to the kernel.
    pub(super) fn flush(&mut self) -> Result<(), StoreError> {
        let mut buffer = std::mem::take(&mut self.buffer);
        let written = self.now(&buffer);
        buffer.clear();
        self.buffer = buffer;
        written
    }

    /// Has everything on the disk.
    pub(super) fn sync(&self) -> Result<(), StoreError> {
        let synced = faults::check(Point::ImageSync).and_then(|()| self.file.sync_all());
        synced.map_err(|error| failed("sync", &self.path, self.bytes, error))
    }

    fn now(&mut self, bytes: &[u8]) -> Result<(), StoreError> {
        let written = faults::check(Point::ImageWrite).and_then(|()| self.file.write_all(bytes));
        written.map_err(|error| failed("write", &self.path, bytes.len() as u64, error))
    }
}
