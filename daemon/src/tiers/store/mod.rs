//! Images: sequences and prefixes that outlive the daemon, in a local folder or in a remote store.
//!
//! An image is a manifest, pages and blobs, all checksummed. It is there whole or not at all: whatever happens while one
//! is written, overwritten or removed, the next start finds the old image or the new one. What is read is compared
//! with its checksum first; no byte of a damaged page is ever handed on.
//!
//! | room | what lives there |
//! |---|---|
//! | [`id`], [`manifest`], [`pages`] | what an image is called, and what it says about itself |
//! | `seal` | how a manifest is written down, and read with suspicion |
//! | `draft` | what every writer counts and every reader checks |
//! | [`local`] | images in a folder of this machine |
//! | [`remote`] | images in an object store, or in a server that speaks Redis's protocol |
//! | [`error`] | what can go wrong |

mod draft;
pub mod error;
pub mod id;
pub mod local;
pub mod manifest;
pub mod pages;
pub mod remote;
mod seal;

#[cfg(test)]
pub(crate) mod conformance;

use std::fmt;
use std::time::Duration;

pub use error::{Damage, StoreError, Unanswered};
pub use id::{IdError, ImageId};
pub use local::LocalStore;
pub use manifest::{BlobEntry, ImageKind, Manifest, ModelKey};
pub use pages::PageTable;
pub use remote::{RemoteImages, RemoteOptions, check_url, connect};

/// Where images are kept. Its calls block, some for long: they are for keeper threads, never for a lane, nor for a task
/// of an async runtime.
pub trait ImageStore: Send + Sync + fmt::Debug {
    /// What it is called in logs and errors. There is no secret in it.
    fn name(&self) -> &str;

    /// Begins an image. Without `overwrite` an image of that name is an error, now or at the commit. Nothing of it can
    /// be seen before [`ImageWriter::commit`]; of several writers of one name, the last to commit wins.
    fn create(&self, id: &ImageId, overwrite: bool) -> Result<Box<dyn ImageWriter>, StoreError>;

    /// Opens an image. Its manifest has been checked, and so have the lengths of its parts where they can be known.
    fn open(&self, id: &ImageId) -> Result<Box<dyn ImageReader>, StoreError>;

    /// Every image, by name; damaged ones are there with what is wrong with them.
    fn list(&self) -> Result<Vec<ImageSummary>, StoreError>;

    /// Erases an image, whole or damaged: it is somebody's text.
    fn remove(&self, id: &ImageId) -> Result<(), StoreError>;

    /// Removes what writers that died more than so long ago have left, where opening the store does not; how many
    /// there were.
    fn sweep(&self, older_than: Duration) -> Result<usize, StoreError> {
        let _ = older_than;
        Ok(0)
    }
}

/// An image that is being written. Dropped without a commit, it leaves nothing behind.
pub trait ImageWriter: Send {
    /// The next page that is present, in [table order](PageTable). All have the same length.
    fn page(&mut self, bytes: &[u8]) -> Result<(), StoreError>;

    /// A blob with a name of its own.
    fn blob(&mut self, name: &str, bytes: &[u8]) -> Result<(), StoreError>;

    /// Makes the image seen, whole, and kept: once this returns, it survives a crash of the machine. The manifest comes
    /// without checksums and blobs, which the writer knows.
    fn commit(self: Box<Self>, manifest: Manifest) -> Result<ImageSummary, StoreError>;
}

/// An image that is being read. If it is overwritten or removed meanwhile, what is read is either the old image or an
/// error.
pub trait ImageReader: Send {
    /// What it says about itself.
    fn manifest(&self) -> &Manifest;

    /// Reads a page, by its index among those that are present, into a buffer of exactly a page's length. After an
    /// error the buffer holds zeros.
    fn page(&mut self, index: usize, into: &mut [u8]) -> Result<(), StoreError>;

    /// Reads a blob.
    fn blob(&mut self, name: &str) -> Result<Vec<u8>, StoreError>;
}

/// An image in a list.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ImageSummary {
    /// Its name.
    pub id: ImageId,
    /// Bytes of its parts, as far as they are known.
    pub bytes: u64,
    /// What it is, or what is wrong with it.
    pub content: Result<ImageFacts, Damage>,
}

/// What a list says of an image that can be read. Its pages have not been compared with their checksums.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ImageFacts {
    /// What it is of.
    pub kind: ImageKind,
    /// Tokens that it is worth.
    pub tokens: u32,
    /// When it was made, in seconds since 1970.
    pub created_unix: u64,
    /// Fingerprint of the model's weights, hex.
    pub fingerprint: String,
    /// The user whose text it is.
    pub uid: u32,
    /// Whatever its owner calls it.
    pub label: String,
}

impl From<&Manifest> for ImageFacts {
    fn from(manifest: &Manifest) -> Self {
        Self {
            kind: manifest.kind,
            tokens: manifest.tokens,
            created_unix: manifest.created_unix,
            fingerprint: manifest.model.fingerprint.clone(),
            uid: manifest.uid,
            label: manifest.label.clone(),
        }
    }
}
