//! Reading an image from a remote store, with suspicion.

use std::sync::Arc;

use super::bucket::Found;
use super::upload::{blob_key, chunk_pages, pages_key};
use super::{Record, Shared};
use crate::tiers::store::draft::{page_crc, verify_blob, verify_page};
use crate::tiers::store::{Damage, ImageId, ImageReader, Manifest, StoreError};

/// An image that is being read. Pages in table order fetch every chunk once.
#[derive(Debug)]
pub(super) struct Download {
    shared: Arc<Shared>,
    id: ImageId,
    record: Record,
    /// The chunk of pages that was fetched last.
    chunk: Option<(usize, Vec<u8>)>,
}

impl Download {
    pub(super) fn new(shared: Arc<Shared>, id: &ImageId, record: Record) -> Self {
        Self { shared, id: id.clone(), record, chunk: None }
    }

    /// What is deleted while it is read looks damaged, too.
    fn damaged(&self, damage: Damage) -> StoreError {
        match self.shared.record(&self.id) {
            Ok(Some((Ok(record), _))) if record.upload == self.record.upload => {
                self.shared.damaged(&self.id, damage)
            }
            Ok(_) => StoreError::Replaced { store: self.shared.name(), id: self.id.clone() },
            Err(error) => error,
        }
    }

    fn fetch(&self, key: &str, bytes: usize) -> Result<Vec<u8>, StoreError> {
        let found = self.shared.line.get(key, bytes)?;
        sized(found, key, bytes).map_err(|damage| self.damaged(damage))
    }

    fn read(&mut self, index: usize, expected: u32, into: &mut [u8]) -> Result<(), StoreError> {
        let each = chunk_pages(self.record.chunk_bytes, into.len());
        let (chunk, at) = (index / each, index % each * into.len());
        let key = pages_key(&self.id, &self.record.upload, chunk);
        let bytes = match self.chunk.take() {
            Some((fetched, bytes)) if fetched == chunk => bytes,
            _ => {
                let pages = self.record.manifest.pages.crcs().len() - chunk * each;
                self.fetch(&key, pages.min(each) * into.len())?
            }
        };
        into.copy_from_slice(&bytes[at..at + into.len()]);
        verify_page(into, index, expected, &key).map_err(|damage| self.damaged(damage))?;
        self.chunk = Some((chunk, bytes));
        Ok(())
    }
}

impl ImageReader for Download {
    fn manifest(&self) -> &Manifest {
        &self.record.manifest
    }

    fn page(&mut self, index: usize, into: &mut [u8]) -> Result<(), StoreError> {
        let expected = page_crc(&self.id, &self.record.manifest, index, into)?;
        let read = self.read(index, expected, into);
        if read.is_err() {
            into.fill(0);
        }
        read
    }

    fn blob(&mut self, name: &str) -> Result<Vec<u8>, StoreError> {
        let mut entries = self.record.manifest.blobs.iter().enumerate();
        let Some((blob, entry)) = entries.find(|(_, entry)| entry.name == name) else {
            return Err(StoreError::NoSuchBlob { id: self.id.clone(), name: name.to_owned() });
        };
        // It grows as its chunks come: what the manifest says of its length is not believed before.
        let (mut bytes, mut left) = (Vec::new(), entry.bytes);
        for chunk in 0.. {
            if left == 0 {
                break;
            }
            let part = left.min(self.record.chunk_bytes.into()) as usize;
            bytes.extend(self.fetch(&blob_key(&self.id, &self.record.upload, blob, chunk), part)?);
            left -= part as u64;
        }
        let file = blob_key(&self.id, &self.record.upload, blob, 0);
        verify_blob(&bytes, entry, &file).map_err(|damage| self.damaged(damage))?;
        Ok(bytes)
    }
}

/// Whether what was found under a key has the length that it must have.
fn sized(found: Found, key: &str, expected: usize) -> Result<Vec<u8>, Damage> {
    let found = match found {
        Found::Missing => return Err(Damage::Missing { file: key.to_owned() }),
        Found::TooLong(found) => found,
        Found::Bytes(bytes) if bytes.len() == expected => return Ok(bytes),
        Found::Bytes(bytes) => bytes.len() as u64,
    };
    Err(Damage::Length { file: key.to_owned(), expected: expected as u64, found })
}
