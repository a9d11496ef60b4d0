//! Where images of sequences and prefixes are kept: a folder of this machine, and a remote store behind it if there is one.
//!
//! Everything here blocks, and runs beside the control plane. What is kept in the folder is copied to the remote store by a thread of
//! its own, so that nobody waits for that one, dead or alive; what is not in the folder is looked for there.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crossbeam::channel::{Receiver, RecvTimeoutError, Sender, unbounded};

use crate::tiers::store::{
    ImageId, ImageReader, ImageStore, ImageSummary, ImageWriter, LocalStore, RemoteOptions, StoreError,
    connect,
};

/// How long a remote store that did not answer is left alone.
const AGAIN_AFTER: Duration = Duration::from_secs(15);

/// How often a copy is tried: for a day.
const TRIES: u32 = 24 * 240;

/// What writers that died have left remotely is removed after so long.
const LEFTOVERS: Duration = Duration::from_secs(24 * 3600);

#[derive(Debug)]
enum Order {
    /// Whether it may take the place of another one.
    Copy(ImageId, bool),
    Stop,
}

/// See the module.
#[derive(Debug)]
pub struct Keeper {
    local: Arc<LocalStore>,
    remote: Option<Arc<dyn ImageStore>>,
    orders: Sender<Order>,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
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
        let stop = Arc::new(AtomicBool::new(false));
        let thread = remote.clone().map(|remote| {
            let (local, stop) = (Arc::clone(&local), Arc::clone(&stop));
            std::thread::Builder::new()
                .name("keeper".into())
                .spawn(move || copy_loop(&local, &*remote, &inbox, &stop))
        });
        let thread = thread.transpose().map_err(|source| StoreError::Io {
            doing: "start a thread for",
            path: folder.to_path_buf(),
            source,
        })?;
        Ok(Self { local, remote, orders, stop, thread })
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
            (Err(StoreError::NotFound { .. }), Some(remote)) => remote.open(id),
            (opened, _) => opened,
        }
    }

    /// All images by name, with where they are; and why the remote store's are missing, if they are.
    ///
    /// # Errors
    /// The folder's.
    pub fn list(&self) -> Result<(Vec<(ImageSummary, Kept)>, Option<StoreError>), StoreError> {
        let mut all: Vec<(ImageSummary, Kept)> =
            self.local.list()?.into_iter().map(|summary| (summary, Kept::Here)).collect();
        let (remote, missing) = match self.remote.as_ref().map(|remote| remote.list()) {
            None => (Vec::new(), None),
            Some(Ok(list)) => (list, None),
            Some(Err(error)) => (Vec::new(), Some(error)),
        };
        for summary in remote {
            match all.iter_mut().find(|(here, _)| here.id == summary.id) {
                Some((_, kept)) => *kept = Kept::Both,
                None => all.push((summary, Kept::Remotely)),
            }
        }
        all.sort_by(|(a, _), (b, _)| a.id.as_str().cmp(b.id.as_str()));
        Ok((all, missing))
    }

    /// Copies an image from the remote store to the folder, if it is only there, comparing every page with its checksum; one that
    /// is in the folder is compared too.
    ///
    /// # Errors
    /// The stores'.
    pub fn bring(&self, id: &ImageId) -> Result<ImageSummary, StoreError> {
        match (self.local.open(id), &self.remote) {
            (Err(StoreError::NotFound { .. }), Some(remote)) => {
                let copied = copy(remote.open(id)?, &*self.local, (id, true), &self.stop)?;
                copied.ok_or_else(|| StoreError::NotFound { store: self.local.name().into(), id: id.clone() })
            }
            (opened, _) => {
                let mut reader = opened?;
                check(&mut *reader)?;
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
        let here = self.local.remove(id);
        let Some(remote) = &self.remote else { return here };
        match (here, remote.remove(id)) {
            (Ok(()), Ok(()) | Err(StoreError::NotFound { .. }))
            | (Err(StoreError::NotFound { .. }), Ok(())) => Ok(()),
            (Err(error), Ok(()) | Err(StoreError::NotFound { .. })) | (_, Err(error)) => Err(error),
        }
    }
}

impl Drop for Keeper {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        let _ = self.orders.send(Order::Stop);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// Where an image is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Kept {
    /// In the daemon's folder.
    Here,
    /// In the remote store.
    Remotely,
    /// In both.
    Both,
}

/// Reads every page of an image, which compares it with its checksum.
fn check(reader: &mut dyn ImageReader) -> Result<(), StoreError> {
    let pages = reader.manifest().pages.present();
    let mut page = vec![0; reader.manifest().page_bytes()];
    (0..pages).try_for_each(|index| reader.page(index, &mut page))
}

fn copy(
    mut from: Box<dyn ImageReader>,
    to: &dyn ImageStore,
    (id, overwrite): (&ImageId, bool),
    stop: &AtomicBool,
) -> Result<Option<ImageSummary>, StoreError> {
    let manifest = from.manifest().clone();
    let mut writer = to.create(id, overwrite)?;
    let mut page = vec![0; manifest.page_bytes()];
    for index in 0..manifest.pages.present() {
        if stop.load(Ordering::Relaxed) {
            return Ok(None);
        }
        from.page(index, &mut page)?;
        writer.page(&page)?;
    }
    for entry in &manifest.blobs {
        let bytes = from.blob(&entry.name)?;
        writer.blob(&entry.name, &bytes)?;
    }
    writer.commit(crate::tiers::store::Manifest { blobs: Vec::new(), ..manifest }).map(Some)
}

/// An image that is to be copied.
struct Waiting {
    id: ImageId,
    overwrite: bool,
    tries: u32,
    due: Instant,
}

/// Copies images to the remote store, one after the other, as often as it takes within reason.
fn copy_loop(local: &LocalStore, remote: &dyn ImageStore, inbox: &Receiver<Order>, stop: &AtomicBool) {
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
            let copied = local.open(&id).and_then(|reader| copy(reader, remote, (&id, overwrite), stop));
            match copied {
                Ok(None) => return,
                Ok(Some(_)) => {
                    tracing::info!("image {id} is in {} too", remote.name());
                    // What was removed meanwhile must not come back from there.
                    if matches!(local.open(&id), Err(StoreError::NotFound { .. }))
                        && let Err(error) = remote.remove(&id)
                    {
                        tracing::warn!(
                            "image {id} was removed while it was copied, and stays there: {error}"
                        );
                    }
                }
                // It has been removed, or resumed and gone.
                Err(StoreError::NotFound { .. }) => {}
                Err(error @ StoreError::Exists { .. }) => {
                    tracing::warn!("image {id} is here alone: {error}");
                }
                Err(error) if tries + 1 < TRIES => {
                    tracing::warn!("image {id} cannot be copied to {} yet: {error}", remote.name());
                    waiting.push(Waiting {
                        id,
                        overwrite,
                        tries: tries + 1,
                        due: Instant::now() + AGAIN_AFTER,
                    });
                }
                Err(error) => tracing::error!("image {id} is not copied to {}: {error}", remote.name()),
            }
        }
    }
}
