//! What every writer counts while an image is written, and every reader checks.

use super::error::{Damage, StoreError};
use super::id::ImageId;
use super::manifest::{BlobEntry, Manifest};
use super::pages::PAGES_MAX;

/// The checksums of what has been written so far.
#[derive(Debug)]
pub(super) struct Draft {
    id: ImageId,
    page_bytes: Option<usize>,
    crcs: Vec<u32>,
    blobs: Vec<BlobEntry>,
}

impl Draft {
    pub(super) fn new(id: ImageId) -> Self {
        Self { id, page_bytes: None, crcs: Vec::new(), blobs: Vec::new() }
    }

    pub(super) fn id(&self) -> &ImageId {
        &self.id
    }

    pub(super) fn wrong(&self, reason: String) -> StoreError {
        StoreError::Draft { id: self.id.clone(), reason }
    }

    /// The next page, before it is written.
    pub(super) fn page(&mut self, bytes: &[u8]) -> Result<(), StoreError> {
        let page_bytes = *self.page_bytes.get_or_insert(bytes.len());
        if bytes.len() != page_bytes {
            return Err(self.wrong(format!("a page of {} bytes after one of {page_bytes}", bytes.len())));
        }
        if self.crcs.len() == PAGES_MAX {
            return Err(self.wrong(format!("more than {PAGES_MAX} pages")));
        }
        self.crcs.push(crc32c::crc32c(bytes));
        Ok(())
    }

    /// The next blob, before it is written. Its name is checked here so that a mistake shows early.
    pub(super) fn blob(&mut self, name: &str, bytes: &[u8]) -> Result<(), StoreError> {
        if self.blobs.iter().any(|blob| blob.name == name) {
            return Err(self.wrong(format!("two blobs of the name {name:?}")));
        }
        let crc32c = crc32c::crc32c(bytes);
        self.blobs.push(BlobEntry { name: name.to_owned(), bytes: bytes.len() as u64, crc32c });
        Ok(())
    }

    /// The manifest with everything that was counted, once it fits what was written.
    pub(super) fn finish(&mut self, mut manifest: Manifest) -> Result<Manifest, StoreError> {
        let (written, wanted) = (self.crcs.len(), manifest.pages.present());
        if written != wanted {
            return Err(self.wrong(format!("{written} pages were written and its table has {wanted}")));
        }
        if let Some(bytes) = self.page_bytes
            && manifest.model.page_bytes() != Some(bytes)
        {
            let (rows, row_bytes) = (manifest.model.page_rows, manifest.model.row_bytes);
            return Err(self.wrong(format!("pages of {bytes} bytes for {rows} rows of {row_bytes} bytes")));
        }
        manifest.pages.set_crcs(std::mem::take(&mut self.crcs));
        manifest.blobs = std::mem::take(&mut self.blobs);
        manifest.check().map_err(|reason| self.wrong(reason))?;
        Ok(manifest)
    }
}

/// The page's checksum from the manifest, and the error of a request that does not fit the image.
pub(super) fn page_crc(
    id: &ImageId,
    manifest: &Manifest,
    index: usize,
    into: &[u8],
) -> Result<u32, StoreError> {
    let page_bytes = manifest.page_bytes();
    match manifest.pages.crcs().get(index) {
        Some(crc) if into.len() == page_bytes => Ok(*crc),
        _ => Err(StoreError::NoSuchPage {
            id: id.clone(),
            index,
            pages: manifest.pages.crcs().len(),
            page_bytes,
            buffer_bytes: into.len(),
        }),
    }
}

/// Compares a page with its checksum; `file` names where it came from.
pub(super) fn verify_page(bytes: &[u8], page: usize, expected: u32, file: &str) -> Result<(), Damage> {
    let found = crc32c::crc32c(bytes);
    if found == expected {
        return Ok(());
    }
    Err(Damage::Page { file: file.to_owned(), page, expected, found })
}

/// Compares a blob with its entry; `file` names where it came from.
pub(super) fn verify_blob(bytes: &[u8], entry: &BlobEntry, file: &str) -> Result<(), Damage> {
    let found = crc32c::crc32c(bytes);
    if found == entry.crc32c {
        return Ok(());
    }
    let (file, name) = (file.to_owned(), entry.name.clone());
    Err(Damage::Blob { file, name, expected: entry.crc32c, found })
}
