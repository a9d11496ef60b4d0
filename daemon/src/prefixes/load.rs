//! What a start finds of prefixes that were published before.

use std::sync::{Arc, PoisonError};

use super::Prefixes;
use super::images::{BLOCKS, Blocks};
use crate::keeper::{Keeper, Kept};
use crate::tiers::prefix::{BlockHash, Place};
use crate::tiers::store::{Damage, ImageId, ImageKind};

/// An image, what it says, the bytes of one of its blocks, and where it is.
type Found = (Arc<ImageId>, Blocks, u64, Kept);

impl Prefixes {
    /// Takes note of the prefixes that images have, and erases those of the folder of which it takes none.
    pub(super) fn load(&self, keeper: &Keeper) {
        let mut all_read = true;
        let here = keeper.list_here().unwrap_or_else(|error| {
            tracing::warn!("published prefixes of before cannot be looked for: {error}");
            Vec::new()
        });
        let remotely = keeper.list_remotely().unwrap_or_else(|error| {
            tracing::warn!("published prefixes of the remote store cannot be looked for: {error}");
            all_read = false;
            Vec::new()
        });
        let images = crate::keeper::merge(here, remotely);
        let mut found: Vec<Found> = Vec::new();
        for (summary, kept) in images {
            match &summary.content {
                Ok(facts) if facts.kind == ImageKind::Prefix => {}
                // It may be one that others go on from.
                Err(Damage::Unreadable { .. }) => {
                    all_read = false;
                    continue;
                }
                _ => continue,
            }
            let read = keeper.open(&summary.id).and_then(|mut reader| {
                let bytes =
                    (reader.manifest().pages_bytes(), reader.manifest().pages.counts().first().copied());
                Ok((reader.blob(BLOCKS)?, bytes))
            });
            match read {
                Ok((blob, (bytes, Some(count)))) if count > 0 => {
                    match postcard::from_bytes::<Blocks>(&blob) {
                        Ok(about) if about.first + count as usize == about.hashes.len() => {
                            found.push((Arc::new(summary.id), about, bytes / u64::from(count), kept));
                        }
                        _ => tracing::warn!("image {} of a prefix makes no sense", summary.id),
                    }
                }
                Ok(_) => {}
                Err(error) => {
                    tracing::warn!("image {} of a prefix cannot be read: {error}", summary.id);
                    all_read = false;
                }
            }
        }
        // What is here first, so that it is not brought from elsewhere; then those that others build on.
        found.sort_by_key(|(_, about, _, kept)| (*kept == Kept::Remotely, about.first));
        let mut blocks = 0;
        let mut left: Vec<&Found> = found.iter().collect();
        // What goes on from an image that is elsewhere, which may go on from one that is here.
        loop {
            let before = left.len();
            left.retain(|image| !self.note(image, &mut blocks));
            if left.len() == before {
                break;
            }
        }
        for image in found.iter().filter(|(.., kept)| *kept != Kept::Remotely) {
            // What it goes on from may be in an image that could not be read.
            if !all_read && left.iter().any(|other| std::ptr::eq(*other, image)) {
                continue;
            }
            // Nothing else would ever count it. Whoever is writing one has it counted by the end of their turn.
            let _turn = self.keeping.lock().unwrap_or_else(PoisonError::into_inner);
            if !self.index().has_image(&image.0) {
                tracing::info!(
                    "image {} of a prefix has nothing that is to be had from it: it is erased",
                    image.0
                );
                self.erase(keeper, &image.0);
            }
        }
        tracing::info!(blocks, "published prefixes of before are known");
    }

    /// Takes note of an image, and counts its blocks; false if what it goes on from is not known.
    fn note(&self, (id, about, block_bytes, _): &Found, blocks: &mut usize) -> bool {
        let hashes: Vec<BlockHash> = about.hashes.iter().copied().map(BlockHash::from).collect();
        let noted = {
            let mut index = self.index();
            let known = index.known(about.root.into(), &hashes);
            if known < about.first {
                return false;
            }
            if known == hashes.len() {
                return true;
            }
            let places = (known..hashes.len()).map(|_| Place::Stored(Arc::clone(id))).collect();
            *blocks += hashes.len() - known;
            index.publish(about.root.into(), &hashes, places, *block_bytes)
        };
        match noted {
            Ok(published) => self.give_back(published.evicted),
            Err(error) => tracing::warn!("image {id} of a prefix is not taken note of: {error}"),
        }
        true
    }
}
