//! Which method keeps how much: digests, and what stands beside them, by the names of the methods that read them.
//!
//! Digests of a kind are shared by all methods that read it, so they are shown once, under all their names; a memory is one
//! method's own.

use std::sync::atomic::Ordering;

use kvoyant_methods::Method;

use crate::lane::model::ModelState;
use crate::lane::sequences::Sequence;
use crate::status::{KeptBytes, SessionStatus};

/// Under which names things are shown.
#[derive(Debug, Default)]
pub struct Keepers {
    names: Vec<String>,
    /// For each method, where its digests are shown and where its memories are.
    places: Vec<Option<(usize, usize)>>,
}

impl Keepers {
    /// Of these methods, in the order of registration.
    #[must_use]
    pub fn of(methods: &[Box<dyn Method>]) -> Self {
        let mut keepers = Self::default();
        for method in methods {
            let place = method.digest_key().map(|key| {
                let mut sharers: Vec<&str> = methods
                    .iter()
                    .filter(|other| other.digest_key() == Some(key))
                    .map(|other| other.spec().name())
                    .collect();
                sharers.sort_unstable();
                sharers.dedup();
                let digests = keepers.name(sharers.join("+"));
                let memories = if method.needs().memory {
                    keepers.name(method.spec().name().to_owned())
                } else {
                    digests
                };
                (digests, memories)
            });
            keepers.places.push(place);
        }
        keepers
    }

    fn name(&mut self, name: String) -> usize {
        self.names.iter().position(|known| *known == name).unwrap_or_else(|| {
            self.names.push(name);
            self.names.len() - 1
        })
    }
}

impl ModelState {
    /// What is kept for nobody's sake alone: blocks, by the names that things are shown under.
    pub(super) fn begin_kept(&self, bytes: &mut Vec<(usize, usize)>) {
        bytes.clear();
        bytes.resize(self.keepers.names.len(), (0, 0));
        for pool in &self.pools {
            let reader = self.methods.iter().position(|method| method.digest_key() == Some(pool.key()));
            if let Some((digests, _)) = reader.and_then(|method| self.keepers.places[method]) {
                bytes[digests].0 += pool.blocks.used_bytes();
            }
        }
    }

    /// Adds what is kept for a sequence.
    pub(super) fn add_kept(&self, sequence: &Sequence, bytes: &mut [(usize, usize)]) {
        for set in &sequence.digests {
            if let Some((digests, memories)) = self.keepers.places[set.method()] {
                bytes[digests].0 += set.table_bytes();
                bytes[memories].1 += set.memory_bytes();
            }
        }
    }

    /// Writes what methods keep to the status that others read.
    pub(super) fn show_kept(&self, bytes: &[(usize, usize)], status: &SessionStatus) {
        let names = &self.keepers.names;
        let shown = status.kept.get_or_init(|| names.iter().cloned().map(KeptBytes::new).collect());
        let mut all = 0;
        for (shown, (digests, memories)) in shown.iter().zip(bytes) {
            shown.digest_bytes.store(*digests as u64, Ordering::Relaxed);
            shown.memory_bytes.store(*memories as u64, Ordering::Relaxed);
            all += digests + memories;
        }
        status.digest_bytes.store(all as u64, Ordering::Relaxed);
    }
}
