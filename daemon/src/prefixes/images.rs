//! Images of published blocks: their names, what they say, and readers of them.

use std::collections::HashMap;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::PrefixFailure;
use crate::keeper::Keeper;
use crate::tiers::prefix::{BlockHash, PrefixError};
use crate::tiers::store::{ImageId, ImageKind, ImageReader, ModelKey, StoreError};

/// What an image of blocks says of them.
pub(super) const BLOCKS: &str = "prefix";

/// What an image has beside its pages.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Blocks {
    pub(super) root: [u8; 32],
    /// Of all blocks from the root on.
    pub(super) hashes: Vec<[u8; 32]>,
    /// The first one whose pages are in this image.
    pub(super) first: usize,
}

/// Whether an image is one of blocks, by its name: those of sequences begin with their user.
pub(crate) fn is_image(id: &ImageId) -> bool {
    id.as_str().starts_with("prefix.")
}

/// The image of the blocks up to this one, from their `first` on: one of fewer never takes the place of one of more.
pub(super) fn image_of(last: &BlockHash, first: usize) -> Result<ImageId, StoreError> {
    let id = format!("prefix.{last}.{first}");
    id.parse().map_err(|error: crate::tiers::store::IdError| StoreError::Io {
        doing: "name",
        path: id.into(),
        source: std::io::Error::other(error),
    })
}

/// An image's reader, and the numbers of its blocks.
pub(super) type OpenImage = (Box<dyn ImageReader>, HashMap<BlockHash, usize>);

/// Images that are read from, opened once each.
pub(super) struct Images<'a> {
    pub(super) keeper: Option<&'a Keeper>,
    pub(super) open: HashMap<ImageId, OpenImage>,
}

impl Images<'_> {
    /// An image's reader, and the numbers of its blocks.
    pub(super) fn of(
        &mut self,
        keeper: &Keeper,
        id: &Arc<ImageId>,
        model: &ModelKey,
    ) -> Result<&mut OpenImage, PrefixFailure> {
        use std::collections::hash_map::Entry;
        match self.open.entry((**id).clone()) {
            Entry::Occupied(open) => Ok(open.into_mut()),
            Entry::Vacant(place) => {
                let mut reader = keeper.open_here(id)?;
                reader.manifest().expect(id, ImageKind::Prefix, model)?;
                let blob = reader.blob(BLOCKS)?;
                let about: Blocks = postcard::from_bytes(&blob).map_err(|_| PrefixError::Gone)?;
                let counts = reader.manifest().pages.counts();
                let count = about.hashes.len().saturating_sub(about.first);
                if counts.iter().any(|pages| *pages as usize != count) {
                    return Err(PrefixError::Gone.into());
                }
                let own = about.hashes.into_iter().skip(about.first).map(BlockHash::from);
                let numbers = own.enumerate().map(|(number, hash)| (hash, number)).collect();
                Ok(place.insert((reader, numbers)))
            }
        }
    }
}
