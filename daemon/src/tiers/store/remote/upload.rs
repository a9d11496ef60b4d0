//! Writing an image to a remote store.

use std::sync::Arc;
use std::time::Instant;

use super::{MAGIC, Record, Shared, manifest_key, new_upload, unix_now};
use crate::tiers::store::draft::Draft;
use crate::tiers::store::seal::seal;
use crate::tiers::store::{ImageFacts, ImageId, ImageSummary, ImageWriter, Manifest, StoreError};

/// An upload. Dropped before its manifest is on its way, it deletes what it has sent.
#[derive(Debug)]
pub(super) struct Upload {
    shared: Arc<Shared>,
    draft: Draft,
    overwrite: bool,
    upload: String,
    began: Instant,
    /// Pages that make no whole chunk yet.
    buffer: Vec<u8>,
    /// Chunks of pages that were sent.
    chunks: usize,
    /// Blobs that were sent.
    blobs: usize,
    /// Keys that may be there.
    sent: Vec<String>,
}

/// Key of a chunk of pages.
pub(super) fn pages_key(id: &ImageId, upload: &str, chunk: usize) -> String {
    format!("{id}/{upload}/pages.{chunk:06}")
}

/// Key of a blob's chunk.
pub(super) fn blob_key(id: &ImageId, upload: &str, blob: usize, chunk: usize) -> String {
    format!("{id}/{upload}/blob.{blob:05}.{chunk:06}")
}

/// Pages that go into a chunk.
pub(super) fn chunk_pages(chunk_bytes: u32, page_bytes: usize) -> usize {
    (chunk_bytes as usize / page_bytes.max(1)).max(1)
}

impl Upload {
    pub(super) fn begin(shared: Arc<Shared>, id: &ImageId, overwrite: bool) -> Self {
        let upload = new_upload(unix_now());
        shared.live().insert(upload.clone());
        let draft = Draft::new(id.clone());
        let (buffer, sent) = (Vec::new(), Vec::new());
        Self { shared, draft, overwrite, upload, began: Instant::now(), buffer, chunks: 0, blobs: 0, sent }
    }

    fn chunk_bytes(&self) -> u32 {
        self.shared.line.options().chunk_bytes
    }

    /// What takes too long may be swept before it is whole.
    fn in_time(&self) -> Result<(), StoreError> {
        let (after, most) = (self.began.elapsed(), self.shared.line.options().upload);
        if after <= most {
            return Ok(());
        }
        Err(StoreError::TooSlow { name: self.shared.name(), id: self.draft.id().clone(), after, most })
    }

    fn send(&mut self, key: String, value: &[u8]) -> Result<(), StoreError> {
        self.in_time()?;
        // Even one whose answer was lost may be there.
        self.sent.push(key);
        self.shared.line.put(&self.sent[self.sent.len() - 1], value)
    }

    fn flush(&mut self) -> Result<(), StoreError> {
        if self.buffer.is_empty() {
            return Ok(());
        }
        let key = pages_key(self.draft.id(), &self.upload, self.chunks);
        let mut buffer = std::mem::take(&mut self.buffer);
        self.chunks += 1;
        let sent = self.send(key, &buffer);
        buffer.clear();
        self.buffer = buffer;
        sent
    }

    /// Writes the manifest; the upload that it replaces, if it can be known.
    fn publish(&mut self, record: &[u8]) -> Result<Option<String>, StoreError> {
        let shared = Arc::clone(&self.shared);
        let (id, key) = (self.draft.id().clone(), manifest_key(self.draft.id()));
        self.in_time()?;
        let old = if self.overwrite { shared.record(&id)? } else { None };
        // From here on the manifest may be there, even if no answer says so: its chunks stay, or are swept.
        let sent = std::mem::take(&mut self.sent);
        let written = match self.overwrite {
            true => shared.line.put(&key, record).map(|()| true),
            false => shared.line.put_new(&key, record),
        };
        match written {
            Ok(true) => Ok(old.and_then(|(old, _)| old.ok()).map(|old| old.upload)),
            Ok(false) => {
                self.sent = sent;
                Err(shared.exists(&id))
            }
            Err(error) => {
                if matches!(error, StoreError::Refused { .. }) {
                    self.sent = sent;
                }
                Err(error)
            }
        }
    }
}

impl ImageWriter for Upload {
    fn page(&mut self, bytes: &[u8]) -> Result<(), StoreError> {
        self.draft.page(bytes)?;
        self.buffer.extend_from_slice(bytes);
        let full = chunk_pages(self.chunk_bytes(), bytes.len()) * bytes.len();
        if self.buffer.len() >= full { self.flush() } else { Ok(()) }
    }

    fn blob(&mut self, name: &str, bytes: &[u8]) -> Result<(), StoreError> {
        self.draft.blob(name, bytes)?;
        let blob = self.blobs;
        self.blobs += 1;
        for (chunk, part) in bytes.chunks(self.chunk_bytes() as usize).enumerate() {
            self.send(blob_key(self.draft.id(), &self.upload, blob, chunk), part)?;
        }
        Ok(())
    }

    fn commit(mut self: Box<Self>, manifest: Manifest) -> Result<ImageSummary, StoreError> {
        self.flush()?;
        let manifest = self.draft.finish(manifest)?;
        let record = Record { upload: self.upload.clone(), chunk_bytes: self.chunk_bytes(), manifest };
        let bytes = seal(MAGIC, &record).map_err(|reason| self.draft.wrong(reason))?;
        let old = self.publish(&bytes)?;
        let (shared, id) = (&self.shared, self.draft.id());
        if let Some(old) = old {
            // The new image is there; what is left of the old one is swept.
            let deleted =
                shared.line.list(&format!("{id}/{old}/")).and_then(|keys| shared.line.delete(&keys));
            if let Err(error) = deleted {
                tracing::warn!("what image {id} of {} replaced is not deleted yet: {error}", shared.name());
            }
        }
        let manifest = &record.manifest;
        let bytes = bytes.len() as u64 + manifest.pages_bytes() + manifest.blobs_bytes();
        Ok(ImageSummary { id: id.clone(), bytes, content: Ok(ImageFacts::from(manifest)) })
    }
}

impl Drop for Upload {
    fn drop(&mut self) {
        if !self.sent.is_empty() && self.shared.line.delete(&self.sent).is_err() {
            let (id, name) = (self.draft.id(), self.shared.name());
            tracing::warn!("what was sent of image {id} to {name} stays there until it is swept");
        }
        self.shared.live().remove(&self.upload);
    }
}
