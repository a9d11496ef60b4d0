//! Reading an image, with suspicion.

use std::fs::{File, OpenOptions};
use std::io::{self, Read};
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use kvoyant_protocol::faults::{self, Point};
use nix::libc::{O_CLOEXEC, O_NOFOLLOW};

use super::files::failed;
use super::{BLOBS, MANIFEST, PAGES, Shared};
use crate::tiers::store::draft::{page_crc, verify_blob, verify_page};
use crate::tiers::store::seal::RECORD_MAX;
use crate::tiers::store::{Damage, ImageId, ImageReader, Manifest, StoreError};

/// An open image. Its files stay open: a name that goes to another image meanwhile changes nothing.
#[derive(Debug)]
pub(super) struct Reader {
    store: String,
    id: ImageId,
    folder: PathBuf,
    manifest: Manifest,
    pages: File,
    blobs: File,
}

impl Reader {
    /// Opens the three files. The gate is held, so that all are of one image.
    pub(super) fn open(shared: &Shared, id: &ImageId) -> Result<Self, StoreError> {
        if !shared.has(id)? {
            return Err(shared.not_found(id));
        }
        let folder = shared.folder(id);
        let damaged = |damage| StoreError::Damaged { store: shared.name.clone(), id: id.clone(), damage };
        let part = |name: &str| -> Result<(File, u64), StoreError> {
            let path = folder.join(name);
            match open(&path) {
                Ok(opened) => Ok(opened),
                Err(error) if error.kind() == io::ErrorKind::NotFound => {
                    Err(damaged(Damage::Missing { file: name.into() }))
                }
                Err(error) => Err(failed("open", &path, 0, error)),
            }
        };
        let (mut file, bytes) = part(MANIFEST)?;
        if bytes > RECORD_MAX {
            let file = MANIFEST.into();
            return Err(damaged(Damage::Length { file, expected: RECORD_MAX, found: bytes }));
        }
        let mut record = Vec::with_capacity(bytes as usize);
        let read =
            faults::check(Point::ImageRead).and_then(|()| file.by_ref().take(bytes).read_to_end(&mut record));
        read.map_err(|error| failed("read", &folder.join(MANIFEST), 0, error))?;
        let manifest = Manifest::decode(&record, MANIFEST).map_err(damaged)?;
        let sized = |name: &str, expected: u64| -> Result<File, StoreError> {
            match part(name)? {
                (file, found) if found == expected => Ok(file),
                (_, found) => Err(damaged(Damage::Length { file: name.into(), expected, found })),
            }
        };
        let pages = sized(PAGES, manifest.pages_bytes())?;
        let blobs = sized(BLOBS, manifest.blobs_bytes())?;
        Ok(Self { store: shared.name.clone(), id: id.clone(), folder, manifest, pages, blobs })
    }

    /// What is erased while it is read looks damaged, too.
    fn damaged(&self, damage: Damage) -> StoreError {
        if !self.is_current() {
            return StoreError::Replaced { store: self.store.clone(), id: self.id.clone() };
        }
        StoreError::Damaged { store: self.store.clone(), id: self.id.clone(), damage }
    }

    /// Whether its files still have the image's name.
    fn is_current(&self) -> bool {
        let same = |name: &str, file: &File| -> io::Result<bool> {
            let (named, open) = (self.folder.join(name).symlink_metadata()?, file.metadata()?);
            Ok((named.dev(), named.ino()) == (open.dev(), open.ino()))
        };
        [(PAGES, &self.pages), (BLOBS, &self.blobs)]
            .iter()
            .all(|(name, file)| same(name, file).unwrap_or(false))
    }

    /// A file that has become shorter is damaged; anything else is the file system's.
    fn unread(&self, name: &str, end: u64, file: &File, error: io::Error) -> StoreError {
        if error.kind() != io::ErrorKind::UnexpectedEof {
            return failed("read", &self.folder.join(name), 0, error);
        }
        let found = file.metadata().map_or(0, |metadata| metadata.len());
        self.damaged(Damage::Length { file: name.into(), expected: end, found })
    }
}

impl ImageReader for Reader {
    fn manifest(&self) -> &Manifest {
        &self.manifest
    }

    fn page(&mut self, index: usize, into: &mut [u8]) -> Result<(), StoreError> {
        let expected = page_crc(&self.id, &self.manifest, index, into)?;
        let at = index as u64 * into.len() as u64;
        let read = faults::check(Point::ImageRead).and_then(|()| self.pages.read_exact_at(into, at));
        let read = read.map_err(|error| self.unread(PAGES, self.manifest.pages_bytes(), &self.pages, error));
        let good = read
            .and_then(|()| verify_page(into, index, expected, PAGES).map_err(|damage| self.damaged(damage)));
        if good.is_err() {
            into.fill(0);
        }
        good
    }

    fn blob(&mut self, name: &str) -> Result<Vec<u8>, StoreError> {
        let mut at = 0;
        for entry in &self.manifest.blobs {
            if entry.name != name {
                at += entry.bytes;
                continue;
            }
            // No longer than the file was when it was opened.
            let mut bytes = vec![0; entry.bytes as usize];
            let read =
                faults::check(Point::ImageRead).and_then(|()| self.blobs.read_exact_at(&mut bytes, at));
            read.map_err(|error| self.unread(BLOBS, self.manifest.blobs_bytes(), &self.blobs, error))?;
            verify_blob(&bytes, entry, BLOBS).map_err(|damage| self.damaged(damage))?;
            return Ok(bytes);
        }
        Err(StoreError::NoSuchBlob { id: self.id.clone(), name: name.to_owned() })
    }
}

/// A regular file that is no link, and its length.
fn open(path: &Path) -> io::Result<(File, u64)> {
    faults::check(Point::ImageOpen)?;
    let file = OpenOptions::new().read(true).custom_flags(O_NOFOLLOW | O_CLOEXEC).open(path)?;
    let metadata = file.metadata()?;
    if !metadata.is_file() {
        return Err(io::Error::other("it is no regular file"));
    }
    Ok((file, metadata.len()))
}
