//! Ways to keep an extent where it is.
//!
//! Pinning is what takes long (a device registers hundreds of GiB in minutes), so it happens in the pool's threads,
//! one extent at a time, and lasts until the extent is destroyed.

use std::fmt::Debug;
use std::io;
use std::sync::Arc;

use kvoyant_protocol::memory::SharedMapping;
use nix::sys::resource::{Resource, getrlimit};
use thiserror::Error;

use crate::tiers::cgroup::Limits;

/// Holds memory in its place; dropping it lets go.
pub trait PinGuard: Send + Sync + Debug {}

impl<T: Send + Sync + Debug> PinGuard for T {}

/// A way to keep memory where it is.
pub trait Pin: Send + Sync + Debug {
    /// Its name in logs and status.
    fn name(&self) -> &'static str;

    /// Pins all of an extent's mapping. The guard may hold on to the mapping.
    fn pin(&self, memory: &Arc<SharedMapping>) -> Result<Box<dyn PinGuard>, PinError>;
}

/// Why memory cannot be pinned: each names the limit that was hit, and what raises it.
#[derive(Debug, Error)]
pub enum PinError {
    /// The memlock limit.
    #[error(
        "cannot pin the arena ({source}): the memlock limit is {limit} and the arena needs {needed_bytes} bytes; raise \
         it with LimitMEMLOCK=infinity in the unit or `ulimit -l unlimited`, or set pin = false"
    )]
    Memlock {
        /// The limit.
        limit: String,
        /// Bytes of the whole arena.
        needed_bytes: u64,
        /// What the system said.
        source: io::Error,
    },
    /// Memory itself.
    #[error("cannot pin the arena ({source}): {limit}; lower the arena size (--arena) or raise that limit")]
    Memory {
        /// The tightest limit, and what it leaves.
        limit: String,
        /// What the system said.
        source: io::Error,
    },
    /// A device's registration.
    #[error("cannot register the arena with the device: {reason}")]
    Registration {
        /// What the driver said, and what to do.
        reason: String,
    },
}

/// The limits that keep memory from being pinned, as they are now: a driver does not say which one it has hit.
#[must_use]
pub fn limits_in_words() -> String {
    let memlock = match getrlimit(Resource::RLIMIT_MEMLOCK) {
        Ok((u64::MAX, _)) => "unlimited".into(),
        Ok((soft, _)) => format!("{soft} bytes"),
        Err(error) => format!("unknown ({error})"),
    };
    let room = Limits::default().room();
    let room = room.map_or_else(|| "no limit of memory can be read".into(), |room| room.to_string());
    format!("the memlock limit is {memlock}, and of memory: {room}")
}

/// Pins with `mlock`.
#[derive(Debug)]
pub struct MlockPin {
    needed_bytes: u64,
}

impl MlockPin {
    /// For an arena of so many bytes.
    #[must_use]
    pub fn new(needed_bytes: u64) -> Self {
        Self { needed_bytes }
    }

    fn refused(&self, source: io::Error) -> PinError {
        let needed_bytes = self.needed_bytes;
        match getrlimit(Resource::RLIMIT_MEMLOCK) {
            // What is not limited was refused for want of memory.
            Ok((u64::MAX, _)) => {
                let room = Limits::default().room();
                let limit = room.map_or_else(|| "no limit can be read".into(), |room| room.to_string());
                PinError::Memory { limit, source }
            }
            Ok((soft, _)) => PinError::Memlock { limit: format!("{soft} bytes"), needed_bytes, source },
            Err(error) => PinError::Memlock { limit: format!("unknown ({error})"), needed_bytes, source },
        }
    }
}

#[derive(Debug)]
struct Locked(Arc<SharedMapping>);

impl Drop for Locked {
    fn drop(&mut self) {
        if let Err(error) = self.0.unlock() {
            tracing::warn!("cannot unlock an extent: {error}");
        }
    }
}

impl Pin for MlockPin {
    fn name(&self) -> &'static str {
        "mlock"
    }

    fn pin(&self, memory: &Arc<SharedMapping>) -> Result<Box<dyn PinGuard>, PinError> {
        match memory.lock() {
            Ok(()) => Ok(Box::new(Locked(Arc::clone(memory)))),
            Err(source) => Err(self.refused(source)),
        }
    }
}
