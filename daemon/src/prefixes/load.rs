//! What a start finds of prefixes that were published before.

use std::sync::{Arc, PoisonError};

use super::Prefixes;
use super::images::{BLOCKS, Blocks};
use crate::keeper::{Keeper, Kept};
use crate::tiers::prefix::{BlockHash, Place};
use crate::tiers::store::ImageKind;

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
        let mut found = Vec::new();
        for (summary, kept) in images {
            if !summary.content.as_ref().is_ok_and(|facts| facts.kind == ImageKind::Prefix) {
                continue;
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
        // Those that others build on come first.
        found.sort_by_key(|(_, about, ..)| about.first);
        let mut blocks = 0;
        for (id, about, block_bytes, kept) in found {
            let hashes: Vec<BlockHash> = about.hashes.into_iter().map(BlockHash::from).collect();
            let noted = {
                let mut index = self.index();
                let known = index.known(about.root.into(), &hashes);
                if known < about.first {
                    // What it goes on from may be in an image that could not be read.
                    if all_read { Ok(None) } else { continue }
                } else if known == hashes.len() {
                    Ok(None)
                } else {
                    let places = (known..hashes.len()).map(|_| Place::Stored(Arc::clone(&id))).collect();
                    blocks += hashes.len() - known;
                    index.publish(about.root.into(), &hashes, places, block_bytes).map(Some)
                }
            };
            match noted {
                Ok(Some(published)) => self.give_back(published.evicted),
                Ok(None) => {}
                Err(error) => tracing::warn!("image {id} of a prefix is not taken note of: {error}"),
            }
            // Nothing else would ever count it. Whoever is writing one has it counted by the end of their turn.
            let _turn = self.keeping.lock().unwrap_or_else(PoisonError::into_inner);
            if kept != Kept::Remotely && !self.index().has_image(&id) {
                match keeper.remove_here(&id) {
                    Ok(()) => tracing::info!(
                        "image {id} of a prefix had nothing that is to be had from it, and is erased"
                    ),
                    Err(error) => tracing::warn!("image {id} of a prefix is of no use, and stays: {error}"),
                }
            }
        }
        tracing::info!(blocks, "published prefixes of before are known");
    }
}
