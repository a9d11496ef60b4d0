//! Images in a remote store: an object store, or a server that speaks Redis's protocol.
//!
//! ```text
//! <prefix>/<id>/manifest                    names the upload whose pages and blobs are the image's
//! <prefix>/<id>/<upload>/pages.<n>          pages in table order, as many to a chunk as fit
//! <prefix>/<id>/<upload>/blob.<index>.<n>   a blob, cut into chunks
//! ```
//!
//! Every upload has a name of its own, and the manifest is written last: half an upload cannot be seen, and an image is
//! replaced by one write. What an upload that died has left is removed by [`ImageStore::sweep`]. A server that does not
//! answer costs its callers a bounded time, and after a few failures none at all.

mod breaker;
mod bucket;
mod connect;
mod download;
mod line;
mod objects;
mod redis;
mod upload;

#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use object_store::ObjectStore;
use serde::{Deserialize, Serialize};

use super::seal::{RECORD_MAX, unseal};
use super::{
    Damage, ImageFacts, ImageId, ImageReader, ImageStore, ImageSummary, ImageWriter, Manifest, StoreError,
};
use bucket::{Bucket, Found};
pub use connect::{check_url, connect};
use line::Line;

/// How every manifest in a remote store begins.
const MAGIC: &[u8; 8] = b"KVREMOTE";

/// Most bytes of a chunk that a manifest may speak of.
const CHUNK_MAX: u32 = 64 << 20;

/// How a remote store is treated.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RemoteOptions {
    /// How long a connection may take.
    pub connect: Duration,
    /// How long one try of an operation may take, its connection included; lists may take six times as long.
    pub operation: Duration,
    /// Tries of an operation.
    pub tries: u32,
    /// Pause before the second try; it doubles with each, and varies by a half.
    pub pause: Duration,
    /// Failures in a row after which the store is left alone …
    pub failures: u32,
    /// … for so long.
    pub rest: Duration,
    /// Bytes of a chunk; a page that is larger has one to itself.
    pub chunk_bytes: u32,
    /// How long an upload may take. What is twice as old and belongs to no image may be swept.
    pub upload: Duration,
}

impl Default for RemoteOptions {
    fn default() -> Self {
        Self {
            connect: Duration::from_secs(2),
            operation: Duration::from_secs(10),
            tries: 3,
            pause: Duration::from_millis(100),
            failures: 3,
            rest: Duration::from_secs(10),
            chunk_bytes: 4 << 20,
            upload: Duration::from_secs(3600),
        }
    }
}

/// Images in a remote store. See the module.
pub struct RemoteImages {
    shared: Arc<Shared>,
}

impl fmt::Debug for RemoteImages {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RemoteImages").field("line", &self.shared.line).finish()
    }
}

/// What the store's writers and readers share with it.
#[derive(Debug)]
struct Shared {
    line: Line,
    /// Uploads of this process that have not ended: neither removing nor sweeping touches them.
    live: Mutex<BTreeSet<String>>,
}

/// What is in a remote manifest.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Record {
    upload: String,
    chunk_bytes: u32,
    manifest: Manifest,
}

/// A record as far as it can be read, and its bytes.
type Kept = (Result<Record, Damage>, u64);

impl Record {
    fn decode(record: &[u8], file: &str) -> Result<Self, Damage> {
        let record: Self = unseal(MAGIC, record, file)?;
        let wrong = |reason| Damage::Content { file: file.to_owned(), reason };
        if begun(&record.upload).is_none() {
            return Err(wrong(format!("{:?} is no upload", record.upload)));
        }
        if !(1..=CHUNK_MAX).contains(&record.chunk_bytes) {
            return Err(wrong(format!("chunks of {} bytes; 1..={CHUNK_MAX} are good", record.chunk_bytes)));
        }
        record.manifest.check().map_err(wrong)?;
        Ok(record)
    }
}

impl RemoteImages {
    /// Images in an object store, below a prefix that may be empty. The name appears in logs and errors.
    pub fn objects(
        name: impl Into<String>,
        store: Arc<dyn ObjectStore>,
        prefix: &str,
        options: RemoteOptions,
    ) -> Result<Self, StoreError> {
        Self::new(name.into(), Box::new(objects::Objects::new(store, prefix)), options)
    }

    /// Images in a server that speaks Redis's protocol, below a prefix. The name appears in logs and errors.
    pub fn redis(
        name: impl Into<String>,
        client: ::redis::Client,
        prefix: &str,
        options: RemoteOptions,
    ) -> Result<Self, StoreError> {
        let strings = redis::Strings::new(client, prefix, options.connect);
        Self::new(name.into(), Box::new(strings), options)
    }

    fn new(name: String, bucket: Box<dyn Bucket>, mut options: RemoteOptions) -> Result<Self, StoreError> {
        options.chunk_bytes = options.chunk_bytes.clamp(1, CHUNK_MAX);
        let line = Line::new(name, bucket, options)?;
        Ok(Self { shared: Arc::new(Shared { line, live: Mutex::default() }) })
    }
}

impl Shared {
    fn name(&self) -> String {
        self.line.name().to_owned()
    }

    fn not_found(&self, id: &ImageId) -> StoreError {
        StoreError::NotFound { store: self.name(), id: id.clone() }
    }

    fn exists(&self, id: &ImageId) -> StoreError {
        StoreError::Exists { store: self.name(), id: id.clone() }
    }

    fn damaged(&self, id: &ImageId, damage: Damage) -> StoreError {
        StoreError::Damaged { store: self.name(), id: id.clone(), damage }
    }

    fn live(&self) -> MutexGuard<'_, BTreeSet<String>> {
        self.live.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// An image's record and its bytes; `None` if there is no such image.
    fn record(&self, id: &ImageId) -> Result<Option<Kept>, StoreError> {
        let key = manifest_key(id);
        Ok(match self.line.get(&key, RECORD_MAX as usize)? {
            Found::Missing => None,
            Found::TooLong(found) => {
                Some((Err(Damage::Length { file: key, expected: RECORD_MAX, found }), found))
            }
            Found::Bytes(bytes) => Some((Record::decode(&bytes, &key), bytes.len() as u64)),
        })
    }

    fn summary(&self, id: ImageId) -> Result<Option<ImageSummary>, StoreError> {
        let Some((record, record_bytes)) = self.record(&id)? else { return Ok(None) };
        let parts = |manifest: &Manifest| manifest.pages_bytes() + manifest.blobs_bytes();
        let bytes = record_bytes + record.as_ref().map_or(0, |record| parts(&record.manifest));
        let content = record.map(|record| ImageFacts::from(&record.manifest));
        Ok(Some(ImageSummary { id, bytes, content }))
    }
}

fn manifest_key(id: &ImageId) -> String {
    format!("{id}/manifest")
}

/// A name for an upload that begins now: when, and something that nobody else has.
fn new_upload(now: u64) -> String {
    format!("{now:010x}-{:016x}", fastrand::u64(..))
}

/// When an upload began, in seconds since 1970; `None` if the text does not name one.
fn begun(upload: &str) -> Option<u64> {
    let (began, random) = upload.split_once('-')?;
    let hex = |text: &str, digits| text.len() == digits && text.bytes().all(|byte| byte.is_ascii_hexdigit());
    (hex(began, 10) && hex(random, 16)).then(|| u64::from_str_radix(began, 16).ok())?
}

fn unix_now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
}

impl ImageStore for RemoteImages {
    fn name(&self) -> &str {
        self.shared.line.name()
    }

    fn create(&self, id: &ImageId, overwrite: bool) -> Result<Box<dyn ImageWriter>, StoreError> {
        // A server that is dead says so before anything is copied.
        if self.shared.line.get(&manifest_key(id), 1)? != Found::Missing && !overwrite {
            return Err(self.shared.exists(id));
        }
        Ok(Box::new(upload::Upload::begin(Arc::clone(&self.shared), id, overwrite)))
    }

    fn open(&self, id: &ImageId) -> Result<Box<dyn ImageReader>, StoreError> {
        let (record, _) = self.shared.record(id)?.ok_or_else(|| self.shared.not_found(id))?;
        let record = record.map_err(|damage| self.shared.damaged(id, damage))?;
        Ok(Box::new(download::Download::new(Arc::clone(&self.shared), id, record)))
    }

    fn list(&self) -> Result<Vec<ImageSummary>, StoreError> {
        let mut ids: Vec<ImageId> = self.shared.line.ids()?.iter().filter_map(|id| id.parse().ok()).collect();
        ids.sort_unstable();
        ids.into_iter().filter_map(|id| self.shared.summary(id).transpose()).collect()
    }

    fn remove(&self, id: &ImageId) -> Result<(), StoreError> {
        let shared = &self.shared;
        let manifest = manifest_key(id);
        let there = shared.line.get(&manifest, 1)? != Found::Missing;
        // First what makes it an image: from here on nobody finds half of it.
        shared.line.delete(std::slice::from_ref(&manifest))?;
        let mut keys = shared.line.list(&format!("{id}/"))?;
        let live = shared.live().clone();
        keys.retain(|key| upload_of(key).is_none_or(|(_, upload)| !live.contains(upload)));
        shared.line.delete(&keys)?;
        if there { Ok(()) } else { Err(shared.not_found(id)) }
    }

    fn sweep(&self, older_than: Duration) -> Result<usize, StoreError> {
        let shared = &self.shared;
        let mut uploads: BTreeMap<(ImageId, String), Vec<String>> = BTreeMap::new();
        for key in shared.line.list("")? {
            let Some((id, upload)) = upload_of(&key) else { continue };
            if let Ok(id) = id.parse() {
                uploads.entry((id, upload.to_owned())).or_default().push(key);
            }
        }
        // An upload that took half as long refuses to be committed: clocks may differ by the other half.
        let age = older_than.max(shared.line.options().upload * 2).as_secs();
        let now = unix_now();
        let mut swept = 0;
        for ((id, upload), keys) in uploads {
            let old = begun(&upload).is_some_and(|began| began.saturating_add(age) <= now);
            if !old || shared.live().contains(&upload) {
                continue;
            }
            let dead = match shared.record(&id)? {
                None => true,
                Some((Ok(record), _)) => record.upload != upload,
                // It may be the one that a damaged manifest names.
                Some((Err(_), _)) => false,
            };
            if dead {
                shared.line.delete(&keys)?;
                swept += 1;
            }
        }
        Ok(swept)
    }
}

/// Image and upload of a key, if it is an upload's.
fn upload_of(key: &str) -> Option<(&str, &str)> {
    let (id, rest) = key.split_once('/')?;
    let (upload, _) = rest.split_once('/')?;
    begun(upload).map(|_| (id, upload))
}
