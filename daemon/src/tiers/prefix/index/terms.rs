//! What the index speaks of: tiers, places, answers, and why something was not done.

use std::sync::Arc;

use thiserror::Error;

use crate::tiers::prefix::hash::BlockHash;
use crate::tiers::store::ImageId;

/// Where a block can lie.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Tier {
    /// In the daemon's extents, to be mapped by whoever attaches.
    Host,
    /// In an image of a store.
    Stored,
}

impl Tier {
    pub(super) fn other(self) -> Self {
        match self {
            Self::Host => Self::Stored,
            Self::Stored => Self::Host,
        }
    }
}

/// Where a block lies. `P` names what holds its rows on the host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Place<P> {
    /// On the host only.
    Host(P),
    /// In an image only: it must be read before anybody can attend to it.
    Stored(Arc<ImageId>),
    /// In both.
    Both(P, Arc<ImageId>),
}

impl<P> Place<P> {
    /// What holds its rows on the host, if anything does.
    #[must_use]
    pub fn host(&self) -> Option<&P> {
        match self {
            Self::Host(payload) | Self::Both(payload, _) => Some(payload),
            Self::Stored(_) => None,
        }
    }

    /// The image that has it, if one does.
    #[must_use]
    pub fn image(&self) -> Option<&Arc<ImageId>> {
        match self {
            Self::Stored(image) | Self::Both(_, image) => Some(image),
            Self::Host(_) => None,
        }
    }

    pub(super) fn without(self, tier: Tier) -> Option<Self> {
        match (tier, self) {
            (Tier::Host, Self::Both(_, image)) => Some(Self::Stored(image)),
            (Tier::Stored, Self::Both(payload, _)) => Some(Self::Host(payload)),
            _ => None,
        }
    }

    pub(super) fn is_in(&self, tier: Tier) -> bool {
        match tier {
            Tier::Host => self.host().is_some(),
            Tier::Stored => self.image().is_some(),
        }
    }
}

/// Bounds, in bytes of blocks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// On the host.
    pub host_bytes: u64,
    /// In images.
    pub stored_bytes: u64,
}

impl Limits {
    pub(super) fn of(self, tier: Tier) -> u64 {
        match tier {
            Tier::Host => self.host_bytes,
            Tier::Stored => self.stored_bytes,
        }
    }
}

/// The last block of a published prefix, or of a part of one. A handle of a block that has gone is refused, even when
/// another block has its place.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Handle {
    pub(super) slot: u32,
    pub(super) generation: u32,
}

/// The longest prefix of a prompt.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Match {
    /// Its last block.
    pub handle: Handle,
    /// How many blocks it has.
    pub blocks: usize,
}

/// What has been published.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Published<P> {
    /// The last block.
    pub handle: Handle,
    /// Blocks that had been there before.
    pub known: usize,
    /// What had to go for it.
    pub evicted: Evictions<P>,
}

/// What whoever asked is to give back.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Evictions<P> {
    /// Rows on the host.
    pub payloads: Vec<P>,
    /// Images in which no block lies any more.
    pub images: Vec<Arc<ImageId>>,
    /// Blocks that are nowhere any more, and no longer known.
    pub blocks: Vec<BlockHash>,
}

impl<P> Default for Evictions<P> {
    fn default() -> Self {
        Self { payloads: Vec::new(), images: Vec::new(), blocks: Vec::new() }
    }
}

/// Why something was not done. The index is as it was.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum PrefixError {
    /// A prefix without a block.
    #[error("a prefix has at least one full block")]
    Empty,
    /// Places do not fit the blocks that are new.
    #[error("{given} places were given for {wanted} blocks that are new")]
    Places {
        /// Blocks that are new.
        wanted: usize,
        /// Places that were given.
        given: usize,
    },
    /// A block that is known with another one before it: somebody mixed two chains.
    #[error("block {0} follows another block than is said here: take all hashes from one chain")]
    Chain(BlockHash),
    /// Everything that could go would not be enough.
    #[error(
        "{wanted_bytes} bytes of prefixes are to be kept in {tier:?} and at most {free_bytes} can be had; wait until sessions \
         detach, publish less, or raise the limit"
    )]
    Full {
        /// Where.
        tier: Tier,
        /// Bytes that are wanted.
        wanted_bytes: u64,
        /// Bytes that are free or could become so.
        free_bytes: u64,
    },
    /// A block that is not known (any more).
    #[error("the prefix has gone: match again")]
    Gone,
    /// More detached than attached.
    #[error("nobody is attached to the prefix")]
    NotAttached,
    /// A block that somebody uses, or that lies before one that somebody uses.
    #[error("sessions are attached to the prefix; it can go when they have detached")]
    InUse,
}

/// What has happened, since the index was made.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Counters {
    /// Questions that found a block or more.
    pub hits: u64,
    /// Blocks that they found.
    pub hit_blocks: u64,
    /// Questions that found none.
    pub misses: u64,
    /// Blocks that left the host to make room.
    pub host_evictions: u64,
    /// Blocks that left images to make room.
    pub stored_evictions: u64,
}
