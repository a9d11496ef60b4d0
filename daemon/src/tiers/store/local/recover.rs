//! What a start does about what a crash has left.

use std::path::PathBuf;
use std::sync::atomic::Ordering;
use std::sync::{MutexGuard, PoisonError};

use super::steps::Step;
use super::{GONE, NEW, OLD, Shared};
use crate::tiers::store::{ImageId, StoreError};

/// Of which image a folder is, and what it is, if it has such a name: `.<id>.<random>.<end>`.
pub(super) fn aside(name: &str) -> Option<(ImageId, &'static str)> {
    let (rest, end) = name.strip_prefix('.')?.rsplit_once('.')?;
    let (id, random) = rest.rsplit_once('.')?;
    let end = [NEW, OLD, GONE].into_iter().find(|known| *known == end)?;
    let ours = random.len() == 16 && random.bytes().all(|byte| byte.is_ascii_hexdigit());
    Some((id.parse().ok().filter(|_| ours)?, end))
}

impl Shared {
    /// Puts old images back that no new one has replaced, and lists what else is no image, to be erased. May die and be asked again.
    pub(super) fn recover(&self) -> Result<(), StoreError> {
        let names = self.names()?;
        let found: Vec<_> =
            names.iter().filter_map(|name| aside(name).map(|(id, end)| (name, id, end))).collect();
        let mut leftovers = Vec::new();
        // First whatever comes back: nothing is erased before what replaces it is certain.
        for (name, id, _) in found.iter().filter(|(_, _, end)| *end == OLD) {
            let old = self.root.join(name);
            if self.has(id)? {
                leftovers.push(self.condemn(&old, id)?);
                continue;
            }
            self.rename(&old, &self.folder(id))?;
            self.reach(Step::OldRestored, &old)?;
            self.sync_root()?;
            tracing::warn!(
                "image {id} of {}: a crash interrupted its replacement, and the old one is back",
                self.name
            );
        }
        for (name, id, end) in found.iter().filter(|(_, _, end)| *end != OLD) {
            leftovers.push(self.root.join(name));
            if *end == NEW {
                tracing::warn!(
                    "image {id} of {}: a crash interrupted its writing, and it is not there",
                    self.name
                );
            }
        }
        *self.leftovers() = leftovers;
        self.reach(Step::Recovered, &self.root)
    }

    /// What cannot be erased now keeps nobody from their images; the next start tries again.
    pub(super) fn erase_leftovers(&self) {
        while !self.stop.load(Ordering::Relaxed)
            && let Some(path) = { self.leftovers().pop() }
        {
            if let Err(error) = self.erase(&path) {
                tracing::warn!("what is left of an image stays until the next start: {error}");
            }
        }
    }

    fn leftovers(&self) -> MutexGuard<'_, Vec<PathBuf>> {
        self.leftovers.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_names_of_our_own_making_are_cleared_up() {
        let id = |text: &str| text.parse::<ImageId>().unwrap();
        assert_eq!(aside(".a.b.0123456789abcdef.new"), Some((id("a.b"), NEW)));
        assert_eq!(aside(".x.old.0123456789abcdef.old"), Some((id("x.old"), OLD)));
        for name in [
            ".lock",
            "a.0123456789abcdef.new",
            ".a.0123.new",
            ".a.0123456789abcdef.txt",
            "..0123456789abcdef.new",
        ] {
            assert_eq!(aside(name), None, "{name}");
        }
    }
}
