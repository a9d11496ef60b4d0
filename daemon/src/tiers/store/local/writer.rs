//! Writing an image aside, and giving it its name.

use std::fs::DirBuilder;
use std::os::unix::fs::DirBuilderExt;
use std::path::PathBuf;
use std::sync::Arc;

use kvoyant_protocol::faults::{self, Point};

use super::files::{Out, failed, sync_folder};
use super::steps::Step;
use super::{BLOBS, MANIFEST, NEW, PAGES, Shared};
use crate::tiers::store::draft::Draft;
use crate::tiers::store::{ImageFacts, ImageId, ImageSummary, ImageWriter, Manifest, StoreError};

/// An image that is being written.
#[derive(Debug)]
pub(super) struct Writer {
    draft: Draft,
    overwrite: bool,
    pages: Out,
    blobs: Out,
    staging: Staging,
}

/// A folder that goes with its writer, unless it has got its name by then.
#[derive(Debug)]
struct Staging {
    shared: Arc<Shared>,
    folder: PathBuf,
}

impl Drop for Staging {
    fn drop(&mut self) {
        if !self.folder.exists() {
            return;
        }
        if let Err(error) = self.shared.erase(&self.folder) {
            tracing::warn!("what was written of an image stays until the next start: {error}");
        }
    }
}

impl Writer {
    pub(super) fn create(shared: Arc<Shared>, id: &ImageId, overwrite: bool) -> Result<Self, StoreError> {
        let folder = shared.aside(id, NEW);
        let made =
            faults::check(Point::ImageOpen).and_then(|()| DirBuilder::new().mode(0o700).create(&folder));
        made.map_err(|error| failed("make the folder", &folder, 0, error))?;
        let staging = Staging { shared, folder };
        let pages = Out::create(staging.folder.join(PAGES))?;
        let blobs = Out::create(staging.folder.join(BLOBS))?;
        staging.shared.reach(Step::Staged, &staging.folder)?;
        Ok(Self { draft: Draft::new(id.clone()), overwrite, pages, blobs, staging })
    }
}

impl ImageWriter for Writer {
    fn page(&mut self, bytes: &[u8]) -> Result<(), StoreError> {
        self.draft.page(bytes)?;
        self.pages.write(bytes)
    }

    fn blob(&mut self, name: &str, bytes: &[u8]) -> Result<(), StoreError> {
        self.draft.blob(name, bytes)?;
        self.blobs.write(bytes)
    }

    fn commit(mut self: Box<Self>, manifest: Manifest) -> Result<ImageSummary, StoreError> {
        let manifest = self.draft.finish(manifest)?;
        let record = manifest.encode().map_err(|reason| self.draft.wrong(reason))?;
        let Staging { shared, folder } = &self.staging;
        self.pages.flush()?;
        shared.reach(Step::PagesWritten, self.pages.path())?;
        self.blobs.flush()?;
        shared.reach(Step::BlobsWritten, self.blobs.path())?;
        let mut out = Out::create(folder.join(MANIFEST))?;
        out.write(&record)?;
        out.flush()?;
        shared.reach(Step::ManifestWritten, out.path())?;
        for file in [&self.pages, &self.blobs, &out] {
            file.sync()?;
        }
        shared.reach(Step::FilesSynced, folder)?;
        sync_folder(folder)?;
        shared.reach(Step::FolderSynced, folder)?;
        shared.publish(folder, self.draft.id(), self.overwrite)?;
        let bytes = self.pages.bytes() + self.blobs.bytes() + out.bytes();
        Ok(ImageSummary { id: self.draft.id().clone(), bytes, content: Ok(ImageFacts::from(&manifest)) })
    }
}
