//! Where images of sequences and prefixes are kept: a folder of this machine, and a remote store behind it if there is one.
//!
//! Everything here blocks, and runs beside the control plane. What is kept in the folder is copied to the remote store by a thread of
//! its own, so that nobody waits for that one, dead or alive; what is not in the folder is looked for there.

use std::collections::btree_map::Entry;
use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crossbeam::channel::{Receiver, RecvTimeoutError, Sender, unbounded};

use crate::status::StoreReport;
use crate::tiers::store::{
    ImageId, ImageReader, ImageStore, ImageSummary, ImageWriter, LocalStore, Manifest, RemoteOptions,
    StoreError, connect,
};

/// How long a remote store that did not answer is left alone.
const AGAIN_AFTER: Duration = Duration::from_secs(15);

/// How often a copy is tried: for a day.
const TRIES: u32 = 24 * 240;

/// What writers that died have left remotely is removed after so long.
const LEFTOVERS: Duration = Duration::from_secs(24 * 3600);

/// Where copies of what is being resumed lie, in the folder.
const RESUMED: &str = ".resumed";

#[derive(Debug)]
enum Order {
    /// Whether it may take the place of another one.
    Copy(ImageId, bool),
    Stop,
}

/// How copying goes.
#[derive(Debug, Default)]
struct Progress(Mutex<Copying>);

#[derive(Debug, Default)]
struct Copying {
    /// What has yet to be copied.
    waiting: BTreeSet<ImageId>,
    /// What is being copied, and whether it has been removed meanwhile.
    now: Option<(ImageId, bool)>,
    /// What the remote store said last, if that was no success.
    error: Option<String>,
}

impl Progress {
    fn lock(&self) -> MutexGuard<'_, Copying> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Remembers how an operation of the remote store went.
    fn note<T>(&self, result: Result<T, StoreError>) -> Result<T, StoreError> {
        match &result {
            Ok(_) => self.lock().error = None,
            // It has answered.
            Err(StoreError::NotFound { .. }) => {}
            Err(error) => self.lock().error = Some(error.to_string()),
        }
        result
    }
}

/// See the module.
#[derive(Debug)]
pub struct Keeper {
    local: Arc<LocalStore>,
    remote: Option<Arc<dyn ImageStore>>,
    /// Copies of what is being resumed from the remote store.
    resumed: Option<Arc<LocalStore>>,
    progress: Arc<Progress>,
    orders: Sender<Order>,
    stop: Arc<AtomicBool>,
    threads: Vec<JoinHandle<()>>,
}

impl Keeper {
    /// Opens the folder, and the remote store at a URL if that is not empty.
    ///
    /// # Errors
    /// A folder that cannot be used, or a URL of no store. A remote store that does not answer is none.
    pub fn start(folder: &Path, remote: &str) -> Result<Self, StoreError> {
        let local = Arc::new(LocalStore::open(folder)?);
        let remote: Option<Arc<dyn ImageStore>> = match remote {
            "" => None,
            url => Some(Arc::from(connect(url, RemoteOptions::default())?)),
        };
        let (orders, inbox) = unbounded();
        let progress = Arc::new(Progress::default());
        let stop = Arc::new(AtomicBool::new(false));
        let failed =
            |source| StoreError::Io { doing: "start a thread for", path: folder.to_path_buf(), source };
        let mut threads = Vec::new();
        // Also where there is none any more, for what a crash has left.
        let aside = folder.join(RESUMED);
        let wanted = remote.is_some() || aside.is_dir();
        let resumed = wanted.then(|| LocalStore::open(aside).map(Arc::new)).transpose()?;
        // What a crash has left there.
        let old: Vec<ImageId> = match &resumed {
            Some(resumed) => resumed.list()?.into_iter().map(|image| image.id).collect(),
            None => Vec::new(),
        };
        {
            // It takes as long as the disk does, and nobody waits for it.
            let (local, resumed, stop) = (Arc::clone(&local), resumed.clone(), Arc::clone(&stop));
            let erase = move || {
                local.erase_leftovers();
                let Some(resumed) = resumed else { return };
                resumed.erase_leftovers();
                for id in old {
                    if !stop.load(Ordering::Relaxed)
                        && let Err(error) = resumed.remove(&id)
                    {
                        tracing::warn!("a copy of an image stays until the next start: {error}");
                    }
                }
            };
            threads.push(crate::threads::start("eraser", erase).map_err(failed)?);
        }
        if let Some(remote) = remote.clone() {
            let (local, progress, stop) = (Arc::clone(&local), Arc::clone(&progress), Arc::clone(&stop));
            let copy = move || copy_loop(&local, &*remote, (&progress, &stop), &inbox);
            threads.push(crate::threads::start("keeper", copy).map_err(failed)?);
        }
        Ok(Self { local, remote, resumed, progress, orders, stop, threads })
    }

    /// Has all copying, comparing and erasing end soon, for the daemon stops.
    pub fn hurry(&self) {
        self.stop.store(true, Ordering::Relaxed);
        self.local.stop_erasing();
        if let Some(resumed) = &self.resumed {
            resumed.stop_erasing();
        }
    }

    /// What hashes of users' prefixes are salted with: made once for the folder, so that prefixes are found again after a restart.
    ///
    /// # Errors
    /// A file that can be neither read nor written.
    pub fn salt(&self) -> Result<Vec<u8>, StoreError> {
        use std::os::unix::fs::OpenOptionsExt;
        let path = self.local.root().join(".salt");
        let failed = |doing: &'static str| {
            let path = path.clone();
            move |source| StoreError::Io { doing, path, source }
        };
        match std::fs::read(&path) {
            Ok(salt) if salt.len() >= 16 => return Ok(salt),
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(failed("read")(error)),
            _ => {}
        }
        let salt = crate::prefixes::fresh_salt();
        let mut file = std::fs::OpenOptions::new()
            .create(true)
            .truncate(true)
            .write(true)
            .mode(0o600)
            .open(&path)
            .map_err(failed("create"))?;
        std::io::Write::write_all(&mut file, &salt)
            .and_then(|()| file.sync_all())
            .map_err(failed("write"))?;
        Ok(salt)
    }

    /// Where images are kept, and how copying goes.
    #[must_use]
    pub fn report(&self) -> StoreReport {
        let progress = self.progress.lock();
        StoreReport {
            folder: self.local.root().to_path_buf(),
            remote: self.remote.as_ref().map(|remote| remote.name().to_owned()),
            waiting: progress.waiting.len() as u64,
            remote_error: progress.error.clone(),
        }
    }

    /// Begins an image in the folder.
    ///
    /// # Errors
    /// The store's.
    pub fn create(&self, id: &ImageId, overwrite: bool) -> Result<Box<dyn ImageWriter>, StoreError> {
        self.local.create(id, overwrite)
    }

    /// An image has been kept in the folder: it is copied to the remote store, in the place of another one of that name if it may
    /// `overwrite`.
    pub fn kept(&self, id: ImageId, overwrite: bool) {
        if self.remote.is_some() {
            self.progress.lock().waiting.insert(id.clone());
            // The thread lives as long as this.
            let _ = self.orders.send(Order::Copy(id, overwrite));
        }
    }

    /// Opens an image, in the folder or else in the remote store.
    ///
    /// # Errors
    /// The store's; of the remote one only where the folder has no such image.
    pub fn open(&self, id: &ImageId) -> Result<Box<dyn ImageReader>, StoreError> {
        match (self.local.open(id), &self.remote) {
            (Err(StoreError::NotFound { .. }), Some(remote)) => self.progress.note(remote.open(id)),
            (opened, _) => opened,
        }
    }

    /// Opens an image whose pages are wanted in another order than they lie in: one that only the remote store has is copied to the folder
    /// first, for from there the same bytes would come many times. Where the folder has no room for it they do.
    ///
    /// # Errors
    /// The store's; of the remote one only where the folder has no such image.
    pub fn open_here(&self, id: &ImageId) -> Result<Box<dyn ImageReader>, StoreError> {
        let (Err(StoreError::NotFound { .. }), Some(remote)) = (self.local.open(id), &self.remote) else {
            return self.local.open(id);
        };
        let reader = self.progress.note(remote.open(id))?;
        match copy(reader, &*self.local, (id, false), &self.stop) {
            // Somebody else may have brought it meanwhile.
            Ok(_) | Err(StoreError::Exists { .. }) => self.open(id),
            Err(error @ (StoreError::Full { .. } | StoreError::Io { .. })) => {
                tracing::warn!("image {id} is read from {} as it is: {error}", remote.name());
                self.progress.note(remote.open(id))
            }
            Err(error) => Err(error),
        }
    }

    /// The same for a sequence that is to be resumed, whose image may be replaced or removed there later: the copy has no name, and goes
    /// with its reader.
    ///
    /// # Errors
    /// As [`open`](Self::open).
    pub fn open_to_resume(&self, id: &ImageId) -> Result<Box<dyn ImageReader>, StoreError> {
        let opened = self.local.open(id);
        let (Err(StoreError::NotFound { .. }), Some(remote), Some(resumed)) =
            (&opened, &self.remote, &self.resumed)
        else {
            return opened;
        };
        let reader = self.progress.note(remote.open(id))?;
        let Ok(own) = format!("{:016x}", fastrand::u64(..)).parse::<ImageId>() else { return Ok(reader) };
        match copy(reader, &**resumed, (&own, false), &self.stop) {
            Ok(_) => {
                let reader = resumed.open(&own)?;
                Ok(Box::new(Brought { reader, store: Arc::clone(resumed), id: own }))
            }
            Err(error @ (StoreError::Full { .. } | StoreError::Io { .. })) => {
                tracing::warn!("image {id} is read from {} as it is: {error}", remote.name());
                self.progress.note(remote.open(id))
            }
            Err(error) => Err(error),
        }
    }

    /// The images of the folder, by name.
    ///
    /// # Errors
    /// The folder's.
    pub fn list_here(&self) -> Result<Vec<ImageSummary>, StoreError> {
        self.local.list()
    }

    /// The images of the remote store, by name; none where there is no such store.
    ///
    /// # Errors
    /// The remote store's.
    pub fn list_remotely(&self) -> Result<Vec<ImageSummary>, StoreError> {
        self.remote.as_ref().map_or(Ok(Vec::new()), |remote| self.progress.note(remote.list()))
    }

    /// Whether the folder has an image of that name, whole or damaged.
    #[must_use]
    pub fn has_here(&self, id: &ImageId) -> bool {
        !matches!(self.local.open(id), Err(StoreError::NotFound { .. }))
    }

    /// Whether the remote store has an image of that name that is labelled otherwise.
    ///
    /// # Errors
    /// A store that does not say.
    pub fn is_others(&self, id: &ImageId, label: &str) -> Result<bool, StoreError> {
        let Some(remote) = &self.remote else { return Ok(false) };
        match self.progress.note(remote.open(id)) {
            Ok(there) => Ok(there.manifest().label != label),
            Err(StoreError::NotFound { .. }) => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// Erases an image in the folder, and leaves the remote store as it is.
    ///
    /// # Errors
    /// [`StoreError::NotFound`] if it is not there; what the folder refuses.
    pub fn remove_here(&self, id: &ImageId) -> Result<(), StoreError> {
        self.local.remove(id)
    }

    /// Where an image that is in the folder is, as far as the remote store says.
    #[must_use]
    pub fn where_is(&self, id: &ImageId) -> Kept {
        match &self.remote {
            Some(remote) if self.progress.note(remote.open(id)).is_ok() => Kept::Both,
            _ => Kept::Here,
        }
    }

    /// Copies an image from the remote store to the folder, if it is only there, comparing every page with its checksum; one that
    /// is in the folder is compared too.
    ///
    /// # Errors
    /// The stores'.
    pub fn bring(&self, id: &ImageId) -> Result<ImageSummary, StoreError> {
        match (self.local.open(id), &self.remote) {
            (Err(StoreError::NotFound { .. }), Some(remote)) => {
                let reader = self.progress.note(remote.open(id))?;
                copy(reader, &*self.local, (id, true), &self.stop)
            }
            (opened, _) => {
                let mut reader = opened?;
                check(&mut *reader, &self.stop)?;
                let all = self.local.list()?;
                all.into_iter()
                    .find(|summary| summary.id == *id)
                    .ok_or_else(|| StoreError::NotFound { store: self.local.name().into(), id: id.clone() })
            }
        }
    }

    /// Erases an image wherever it is.
    ///
    /// # Errors
    /// [`StoreError::NotFound`] if it is nowhere; what a store refuses.
    pub fn remove(&self, id: &ImageId) -> Result<(), StoreError> {
        {
            // A copy that is under way would bring it back.
            let mut progress = self.progress.lock();
            progress.waiting.remove(id);
            if let Some((_, removed)) = progress.now.as_mut().filter(|(now, _)| now == id) {
                *removed = true;
            }
        }
        let here = self.local.remove(id);
        let Some(remote) = &self.remote else { return here };
        match (here, self.progress.note(remote.remove(id))) {
            (Ok(()), Ok(()) | Err(StoreError::NotFound { .. }))
            | (Err(StoreError::NotFound { .. }), Ok(())) => Ok(()),
            (Err(error), Ok(()) | Err(StoreError::NotFound { .. })) | (_, Err(error)) => Err(error),
        }
    }
}

impl Drop for Keeper {
    fn drop(&mut self) {
        self.hurry();
        let _ = self.orders.send(Order::Stop);
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}

/// A copy that goes with its reader.
struct Brought {
    reader: Box<dyn ImageReader>,
    store: Arc<LocalStore>,
    id: ImageId,
}

impl ImageReader for Brought {
    fn manifest(&self) -> &Manifest {
        self.reader.manifest()
    }

    fn page(&mut self, index: usize, into: &mut [u8]) -> Result<(), StoreError> {
        self.reader.page(index, into)
    }

    fn blob(&mut self, name: &str) -> Result<Vec<u8>, StoreError> {
        self.reader.blob(name)
    }
}

impl Drop for Brought {
    fn drop(&mut self) {
        let (store, id) = (Arc::clone(&self.store), self.id.clone());
        let erase = move || {
            if let Err(error) = store.remove(&id) {
                tracing::warn!("a copy of an image stays until the next start: {error}");
            }
        };
        if let Err(error) = crate::threads::start("eraser", erase) {
            tracing::warn!("a copy of an image stays until the next start: {error}");
        }
    }
}

/// Where an image is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Kept {
    /// In the daemon's folder.
    Here,
    /// In the remote store.
    Remotely,
    /// In both.
    Both,
}

/// All images of the folder and of the remote store by name, with where they are.
#[must_use]
pub fn merge(here: Vec<ImageSummary>, remotely: Vec<ImageSummary>) -> Vec<(ImageSummary, Kept)> {
    let mut all: BTreeMap<ImageId, (ImageSummary, Kept)> =
        here.into_iter().map(|summary| (summary.id.clone(), (summary, Kept::Here))).collect();
    for summary in remotely {
        match all.entry(summary.id.clone()) {
            Entry::Occupied(mut entry) => entry.get_mut().1 = Kept::Both,
            Entry::Vacant(entry) => _ = entry.insert((summary, Kept::Remotely)),
        }
    }
    all.into_values().collect()
}

/// Reads every page and blob of an image, which compares it with its checksum.
fn check(reader: &mut dyn ImageReader, stop: &AtomicBool) -> Result<(), StoreError> {
    let pages = reader.manifest().pages.present();
    let mut page = vec![0; reader.manifest().page_bytes()];
    for index in 0..pages {
        if stop.load(Ordering::Relaxed) {
            return Err(StoreError::Stopped);
        }
        reader.page(index, &mut page)?;
    }
    let blobs: Vec<String> = reader.manifest().blobs.iter().map(|blob| blob.name.clone()).collect();
    blobs.iter().try_for_each(|name| reader.blob(name).map(drop))
}

fn copy(
    mut from: Box<dyn ImageReader>,
    to: &dyn ImageStore,
    (id, overwrite): (&ImageId, bool),
    stop: &AtomicBool,
) -> Result<ImageSummary, StoreError> {
    let manifest = from.manifest().clone();
    let mut writer = to.create(id, overwrite)?;
    let mut page = vec![0; manifest.page_bytes()];
    for index in 0..manifest.pages.present() {
        if stop.load(Ordering::Relaxed) {
            return Err(StoreError::Stopped);
        }
        from.page(index, &mut page)?;
        writer.page(&page)?;
    }
    for entry in &manifest.blobs {
        let bytes = from.blob(&entry.name)?;
        writer.blob(&entry.name, &bytes)?;
    }
    writer.commit(Manifest { blobs: Vec::new(), ..manifest })
}

/// An image that is to be copied.
struct Waiting {
    id: ImageId,
    overwrite: bool,
    tries: u32,
    due: Instant,
}

/// Copies images to the remote store, one after the other, as often as it takes within reason.
fn copy_loop(
    local: &LocalStore,
    remote: &dyn ImageStore,
    (progress, stop): (&Progress, &AtomicBool),
    inbox: &Receiver<Order>,
) {
    if let Err(error) = remote.sweep(LEFTOVERS) {
        tracing::warn!("leftovers in {} could not be removed: {error}", remote.name());
    }
    let mut waiting: Vec<Waiting> = Vec::new();
    loop {
        let due = waiting.iter().map(|waiting| waiting.due).min();
        let order = match due {
            None => inbox.recv().map_err(|_| RecvTimeoutError::Disconnected),
            Some(due) => inbox.recv_deadline(due),
        };
        match order {
            Ok(Order::Copy(id, overwrite)) => {
                waiting.retain(|other| other.id != id);
                waiting.push(Waiting { id, overwrite, tries: 0, due: Instant::now() });
            }
            Ok(Order::Stop) | Err(RecvTimeoutError::Disconnected) => return,
            Err(RecvTimeoutError::Timeout) => {}
        }
        let now = Instant::now();
        let (ready, later): (Vec<_>, Vec<_>) = waiting.into_iter().partition(|waiting| waiting.due <= now);
        waiting = later;
        for Waiting { id, overwrite, tries, .. } in ready {
            progress.lock().now = Some((id.clone(), false));
            let copied = local
                .open(&id)
                .and_then(|reader| progress.note(copy(reader, remote, (&id, overwrite), stop)));
            let removed = progress.lock().now.take().is_some_and(|(_, removed)| removed);
            if removed
                && let Err(error) = remote.remove(&id)
                && !matches!(error, StoreError::NotFound { .. })
            {
                tracing::error!("image {id} was removed, and may still be in {}: {error}", remote.name());
            }
            match copied {
                Err(StoreError::Stopped) => return,
                Ok(_) if removed => {}
                Ok(_) => tracing::info!("image {id} is in {} too", remote.name()),
                // It has been removed, or resumed and gone.
                Err(StoreError::NotFound { .. }) => {}
                // Of a prefix, it has the same blocks.
                Err(StoreError::Exists { .. }) if crate::prefixes::is_image(&id) => {}
                // No later try would fare better.
                Err(
                    error @ (StoreError::Exists { .. }
                    | StoreError::Damaged { .. }
                    | StoreError::Draft { .. }
                    | StoreError::TooSlow { .. }),
                ) => {
                    tracing::warn!("image {id} is here alone: {error}");
                }
                Err(error) if tries + 1 < TRIES && !removed => {
                    tracing::warn!("image {id} cannot be copied to {} yet: {error}", remote.name());
                    let due = Instant::now() + AGAIN_AFTER;
                    waiting.push(Waiting { id, overwrite, tries: tries + 1, due });
                    continue;
                }
                Err(error) => tracing::error!("image {id} is not copied to {}: {error}", remote.name()),
            }
            progress.lock().waiting.remove(&id);
        }
    }
}

#[cfg(test)]
mod tests;
