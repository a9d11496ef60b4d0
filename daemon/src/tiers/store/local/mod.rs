//! Images in a folder of this machine.
//!
//! ```text
//! <root>/.lock                       held by the daemon whose store it is
//! <root>/<id>/{manifest,pages,blobs} an image
//! <root>/.<id>.<random>.new          one that is being written: erased after the next start
//! <root>/.<id>.<random>.old          the old one while the new one gets its name: put back by the next start
//! <root>/.<id>.<random>.gone         one that is being erased: erased after the next start
//! ```
//!
//! Files are 0600 and folders 0700. A new image is written aside and reaches the disk before it gets its name; the old
//! one goes aside for the moment between two renames, and is erased only when the new name is on the disk too. So a crash
//! at any step leaves the old image or the new one, and the next start clears up. Contents are overwritten before
//! they are unlinked; on a disk that remaps its blocks that is an attempt, and encryption below the file system is the
//! remedy.

mod erase;
mod files;
mod reader;
mod recover;
mod steps;
mod writer;

#[cfg(test)]
mod tests;

use std::fs::{DirBuilder, File, OpenOptions, TryLockError};
use std::io;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use kvoyant_protocol::faults::{self, Point};

use super::{Damage, ImageFacts, ImageId, ImageReader, ImageStore, ImageSummary, ImageWriter, StoreError};
use files::{failed, sync_folder};
use steps::{Step, reach};

const LOCK: &str = ".lock";
const MANIFEST: &str = "manifest";
const PAGES: &str = "pages";
const BLOBS: &str = "blobs";

/// Ends of the names of folders that are no images.
const NEW: &str = "new";
const OLD: &str = "old";
const GONE: &str = "gone";

/// Images in a folder. See the module.
#[derive(Debug)]
pub struct LocalStore {
    shared: Arc<Shared>,
}

/// What the store's writers share with it.
#[derive(Debug)]
struct Shared {
    name: String,
    root: PathBuf,
    /// Held while names change, and while an image's three files are opened.
    gate: Mutex<()>,
    /// What a crash has left of images that are none: to be erased.
    leftovers: Mutex<Vec<PathBuf>>,
    /// Whether erasing ends: the next start goes on with it.
    stop: AtomicBool,
    /// Locked for as long as the store, or one of its writers, lives.
    _lock: File,
}

impl LocalStore {
    /// Opens the store in a folder, which is made if it is missing, and finishes or undoes what a crash has left there. What is to be erased
    /// of that waits for [`erase_leftovers`](Self::erase_leftovers): it takes as long as the disk does.
    pub fn open(root: impl Into<PathBuf>) -> Result<Self, StoreError> {
        let root = root.into();
        DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(&root)
            .map_err(|error| failed("make the folder", &root, 0, error))?;
        let lock = lock(&root)?;
        let shared = Shared {
            name: format!("file://{}", root.display()),
            root,
            gate: Mutex::default(),
            leftovers: Mutex::default(),
            stop: AtomicBool::new(false),
            _lock: lock,
        };
        shared.recover()?;
        Ok(Self { shared: Arc::new(shared) })
    }

    /// Erases what a crash has left, until that is done or [stopped](Self::stop_erasing); the next start goes on where this one ended.
    pub fn erase_leftovers(&self) {
        self.shared.erase_leftovers();
    }

    /// Has all erasing end soon. What is left of it has no image's name, and is erased after the next start.
    pub fn stop_erasing(&self) {
        self.shared.stop.store(true, Ordering::Relaxed);
    }

    /// Its folder.
    #[must_use]
    pub fn root(&self) -> &Path {
        &self.shared.root
    }
}

fn lock(root: &Path) -> Result<File, StoreError> {
    let path = root.join(LOCK);
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o600)
        .open(&path)
        .map_err(|error| failed("open the lock", &path, 0, error))?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(TryLockError::WouldBlock) => Err(StoreError::Locked { root: root.to_owned() }),
        Err(TryLockError::Error(error)) => Err(failed("lock", &path, 0, error)),
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, ()> {
        self.gate.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn folder(&self, id: &ImageId) -> PathBuf {
        self.root.join(id.as_str())
    }

    /// A name for a folder that is no image.
    fn aside(&self, id: &ImageId, end: &str) -> PathBuf {
        self.root.join(format!(".{id}.{:016x}.{end}", fastrand::u64(..)))
    }

    fn has(&self, id: &ImageId) -> Result<bool, StoreError> {
        let folder = self.folder(id);
        folder.try_exists().map_err(|error| failed("look for the image", &folder, 0, error))
    }

    fn not_found(&self, id: &ImageId) -> StoreError {
        StoreError::NotFound { store: self.name.clone(), id: id.clone() }
    }

    fn exists(&self, id: &ImageId) -> StoreError {
        StoreError::Exists { store: self.name.clone(), id: id.clone() }
    }

    fn rename(&self, from: &Path, to: &Path) -> Result<(), StoreError> {
        let renamed = faults::check(Point::ImageSync).and_then(|()| std::fs::rename(from, to));
        renamed.map_err(|error| failed("rename", from, 0, error))
    }

    /// Makes the root's names lasting.
    fn sync_root(&self) -> Result<(), StoreError> {
        sync_folder(&self.root)
    }

    fn reach(&self, step: Step, path: &Path) -> Result<(), StoreError> {
        reach(step).map_err(|error| failed("go on", path, 0, error))
    }

    /// Gives a finished folder its name.
    fn publish(&self, staging: &Path, id: &ImageId, overwrite: bool) -> Result<(), StoreError> {
        let gate = self.lock();
        let folder = self.folder(id);
        let old = self.has(id)?.then(|| self.aside(id, OLD));
        if let Some(old) = &old {
            if !overwrite {
                return Err(self.exists(id));
            }
            self.rename(&folder, old)?;
        }
        let named = match &old {
            Some(old) => self.reach(Step::OldAside, old).and_then(|()| self.rename(staging, &folder)),
            None => self.rename(staging, &folder),
        };
        if let Err(error) = named {
            if let Some(old) = &old {
                self.rename(old, &folder)?;
            }
            return Err(error);
        }
        self.reach(Step::NewNamed, &folder)?;
        self.sync_root()?;
        self.reach(Step::RootSynced, &folder)?;
        // From here on the old one must not come back, or a later crash could bring half of it.
        let gone = old.map(|old| self.condemn(&old, id)).transpose();
        drop(gate);
        // The new image is there and lasts; what is left of the old one is the next start's.
        match gone.and_then(|gone| gone.map_or(Ok(()), |gone| self.erase(&gone))) {
            Err(error) => {
                tracing::warn!("what image {id} of {} replaced is not erased yet: {error}", self.name);
                Ok(())
            }
            done => done,
        }
    }

    /// Gives a folder a name under which it never comes back.
    fn condemn(&self, folder: &Path, id: &ImageId) -> Result<PathBuf, StoreError> {
        let gone = self.aside(id, GONE);
        self.rename(folder, &gone)?;
        self.sync_root()?;
        self.reach(Step::Condemned, &gone)?;
        Ok(gone)
    }

    fn summary(&self, id: ImageId) -> Option<ImageSummary> {
        let opened = {
            let _gate = self.lock();
            reader::Reader::open(self, &id)
        };
        let content = match opened {
            Ok(reader) => Ok(ImageFacts::from(reader.manifest())),
            Err(StoreError::Damaged { damage, .. }) => Err(damage),
            // Removed since its name was read.
            Err(StoreError::NotFound { .. }) => return None,
            // One that the disk does not give hides no other.
            Err(error) => Err(Damage::Unreadable { reason: error.to_string() }),
        };
        let folder = self.folder(&id);
        let bytes =
            [MANIFEST, PAGES, BLOBS].iter().filter_map(|file| folder.join(file).symlink_metadata().ok());
        let bytes = bytes.map(|metadata| metadata.len()).sum();
        Some(ImageSummary { id, bytes, content })
    }

    /// Names in the root.
    fn names(&self) -> Result<Vec<String>, StoreError> {
        let list = || -> io::Result<Vec<String>> {
            let mut names = Vec::new();
            for entry in std::fs::read_dir(&self.root)? {
                // What is no text is no name of ours.
                names.extend(entry?.file_name().into_string().ok());
            }
            names.sort_unstable();
            Ok(names)
        };
        list().map_err(|error| failed("list", &self.root, 0, error))
    }
}

impl ImageStore for LocalStore {
    fn name(&self) -> &str {
        &self.shared.name
    }

    fn create(&self, id: &ImageId, overwrite: bool) -> Result<Box<dyn ImageWriter>, StoreError> {
        if !overwrite && self.shared.has(id)? {
            return Err(self.shared.exists(id));
        }
        Ok(Box::new(writer::Writer::create(Arc::clone(&self.shared), id, overwrite)?))
    }

    fn open(&self, id: &ImageId) -> Result<Box<dyn ImageReader>, StoreError> {
        let _gate = self.shared.lock();
        Ok(Box::new(reader::Reader::open(&self.shared, id)?))
    }

    fn list(&self) -> Result<Vec<ImageSummary>, StoreError> {
        let ids = self.shared.names()?.into_iter().filter_map(|name| name.parse().ok());
        Ok(ids.filter_map(|id| self.shared.summary(id)).collect())
    }

    fn remove(&self, id: &ImageId) -> Result<(), StoreError> {
        let shared = &self.shared;
        let gate = shared.lock();
        let mut condemned = Vec::new();
        // An old one that could not be erased once would come back at the next start.
        for name in shared.names()? {
            if recover::aside(&name).is_some_and(|(of, end)| of == *id && end == OLD) {
                condemned.push(shared.condemn(&shared.root.join(name), id)?);
            }
        }
        let there = shared.has(id)?;
        if there {
            condemned.push(shared.condemn(&shared.folder(id), id)?);
        }
        drop(gate);
        condemned.iter().try_for_each(|folder| shared.erase(folder))?;
        if there { Ok(()) } else { Err(shared.not_found(id)) }
    }
}
