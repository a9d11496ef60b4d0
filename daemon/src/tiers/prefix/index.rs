//! The tree of published blocks: the longest prefix of a prompt, who uses it, where it lies, and what may go.
//!
//! Prefixes that begin alike share their first blocks. Every block lies on the host, in a stored image, or both. What
//! somebody is attached to stays, from its first block to its last; of the rest the leaves that were used longest ago
//! go first. A block that lies in one tier only waits for those behind it, in whichever tier they lie. Nothing here moves a
//! byte: [`Evictions`] say what whoever asked is to give back.

mod nodes;
mod terms;

use std::collections::{BTreeSet, HashMap, HashSet};
use std::sync::Arc;

use super::hash::BlockHash;
use crate::tiers::store::ImageId;
use nodes::{Node, Nodes};
pub use terms::{Counters, Evictions, Handle, Limits, Match, Place, PrefixError, Published, Tier};

/// What belongs to one tier.
#[derive(Debug, Default)]
struct Account {
    bytes: u64,
    /// Blocks that may leave it at once, the one that was used longest ago first.
    idle: BTreeSet<(u64, u32)>,
}

/// See the module.
#[derive(Debug)]
pub struct PrefixIndex<P> {
    limits: Limits,
    nodes: Nodes<P>,
    slots: HashMap<BlockHash, u32>,
    host: Account,
    stored: Account,
    /// Blocks in each image.
    images: HashMap<Arc<ImageId>, usize>,
    tick: u64,
    counters: Counters,
}

impl<P: Clone> PrefixIndex<P> {
    /// An empty index.
    #[must_use]
    pub fn new(limits: Limits) -> Self {
        Self {
            limits,
            nodes: Nodes::default(),
            slots: HashMap::new(),
            host: Account::default(),
            stored: Account::default(),
            images: HashMap::new(),
            tick: 0,
            counters: Counters::default(),
        }
    }

    /// Blocks that are known.
    #[must_use]
    pub fn len(&self) -> usize {
        self.slots.len()
    }

    /// Whether none is.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.slots.is_empty()
    }

    /// Bytes of the blocks in a tier.
    #[must_use]
    pub fn bytes(&self, tier: Tier) -> u64 {
        self.account(tier).bytes
    }

    /// What has happened.
    #[must_use]
    pub fn counters(&self) -> Counters {
        self.counters
    }

    /// What nobody uses, of the host.
    pub fn unused(&self) -> impl Iterator<Item = &P> {
        let nodes = self.nodes.iter().map(|(_, node)| node);
        nodes.filter(|node| node.users == 0).filter_map(|node| node.place.host())
    }

    /// Whether a block lies in this image.
    #[must_use]
    pub fn has_image(&self, image: &ImageId) -> bool {
        self.images.contains_key(image)
    }

    /// How many leading blocks of a chain are known: those need no copy when it is published. Counts as no question.
    #[must_use]
    pub fn known(&self, root: BlockHash, hashes: &[BlockHash]) -> usize {
        self.walk(root, hashes).len()
    }

    /// The longest known prefix of a chain. Its blocks count as used.
    pub fn longest(&mut self, root: BlockHash, hashes: &[BlockHash]) -> Option<Match> {
        let path = self.walk(root, hashes);
        let Some(last) = path.last().copied() else {
            self.counters.misses += 1;
            return None;
        };
        self.counters.hits += 1;
        self.counters.hit_blocks += path.len() as u64;
        self.touch(&path);
        Some(Match { handle: self.handle(last), blocks: path.len() })
    }

    /// Adds a chain. `places` are those of its blocks behind the [known](Self::known) ones, of `block_bytes` bytes
    /// each. What has to go for them goes; known blocks that lie in an image only stay there.
    pub fn publish(
        &mut self,
        root: BlockHash,
        hashes: &[BlockHash],
        places: Vec<Place<P>>,
        block_bytes: u64,
    ) -> Result<Published<P>, PrefixError> {
        if hashes.is_empty() {
            return Err(PrefixError::Empty);
        }
        let mut path = self.walk(root, hashes);
        let known = path.len();
        let new = &hashes[known..];
        if let Some(hash) = new.iter().find(|hash| self.slots.contains_key(hash)) {
            return Err(PrefixError::Chain(*hash));
        }
        let mut seen = HashSet::new();
        if let Some(twice) = new.iter().find(|hash| !seen.insert(**hash)) {
            return Err(PrefixError::Chain(*twice));
        }
        if places.len() != new.len() {
            return Err(PrefixError::Places { wanted: new.len(), given: places.len() });
        }
        let wanted = |tier| places.iter().filter(|place| place.is_in(tier)).count() as u64 * block_bytes;
        let (host, stored) = (wanted(Tier::Host), wanted(Tier::Stored));
        // Nothing that it continues may go for it.
        self.hold(&path);
        let evicted = self.make_room(host, stored);
        self.let_go(&path);
        let evicted = evicted?;
        for (hash, place) in new.iter().zip(places) {
            let parent = path.last().copied();
            path.push(self.insert(root, parent, *hash, place, block_bytes));
        }
        self.touch(&path);
        let last = path[path.len() - 1];
        Ok(Published { handle: self.handle(last), known, evicted })
    }

    /// Says that a session uses a prefix: none of its blocks leaves any tier until it is [detached](Self::detach) as
    /// often.
    pub fn attach(&mut self, handle: Handle) -> Result<(), PrefixError> {
        let path = self.path_to(handle)?;
        self.hold(&path);
        Ok(())
    }

    /// Says that a session uses it no longer.
    pub fn detach(&mut self, handle: Handle) -> Result<(), PrefixError> {
        let path = self.path_to(handle)?;
        // Whoever is attached to a longer prefix holds the blocks of this one too, but not by this handle.
        if self.nodes.get(handle.slot).attached == 0 {
            return Err(PrefixError::NotAttached);
        }
        self.let_go(&path);
        Ok(())
    }

    /// Blocks of a prefix and where they lie, from its first to its last.
    pub fn path(&self, handle: Handle) -> Result<Vec<(BlockHash, &Place<P>)>, PrefixError> {
        let path = self.path_to(handle)?;
        Ok(path.iter().map(|slot| self.nodes.get(*slot)).map(|node| (node.hash, &node.place)).collect())
    }

    /// Says that an image has a block, too.
    pub fn set_stored(&mut self, hash: &BlockHash, image: Arc<ImageId>) -> Result<Evictions<P>, PrefixError> {
        self.set(hash, Tier::Stored, |place| match place {
            Place::Host(payload) => Place::Both(payload, image),
            other => other,
        })
    }

    /// Says that the host has a block, too.
    pub fn set_host(&mut self, hash: &BlockHash, payload: P) -> Result<Evictions<P>, PrefixError> {
        self.set(hash, Tier::Host, |place| match place {
            Place::Stored(image) => Place::Both(payload, image),
            other => other,
        })
    }

    /// Lets the oldest leaves leave a tier until so many bytes of it have become free, or none is left that may.
    pub fn evict(&mut self, tier: Tier, bytes: u64) -> Evictions<P> {
        let target = self.account(tier).bytes.saturating_sub(bytes);
        let mut evicted = Evictions::default();
        self.evict_to(tier, target, &mut evicted);
        evicted
    }

    /// Forgets a block and everything behind it, wherever it lies: because it is withdrawn, or its image is damaged.
    pub fn forget(&mut self, hash: &BlockHash) -> Result<Evictions<P>, PrefixError> {
        let slot = *self.slots.get(hash).ok_or(PrefixError::Gone)?;
        // Whoever uses a block behind it uses this one.
        if self.nodes.get(slot).users > 0 {
            return Err(PrefixError::InUse);
        }
        let (mut subtree, mut at) = (vec![slot], 0);
        while at < subtree.len() {
            subtree.extend(&self.nodes.get(subtree[at]).children);
            at += 1;
        }
        let mut evicted = Evictions::default();
        for slot in subtree.into_iter().rev() {
            if matches!(self.nodes.get(slot).place, Place::Both(..)) {
                self.leave(slot, Tier::Stored, &mut evicted);
            }
            // It is in one of the two.
            let tier = if self.nodes.get(slot).place.is_in(Tier::Host) { Tier::Host } else { Tier::Stored };
            self.leave(slot, tier, &mut evicted);
        }
        Ok(evicted)
    }
}

impl<P: Clone> PrefixIndex<P> {
    fn account(&self, tier: Tier) -> &Account {
        match tier {
            Tier::Host => &self.host,
            Tier::Stored => &self.stored,
        }
    }

    fn account_mut(&mut self, tier: Tier) -> &mut Account {
        match tier {
            Tier::Host => &mut self.host,
            Tier::Stored => &mut self.stored,
        }
    }

    fn handle(&self, slot: u32) -> Handle {
        Handle { slot, generation: self.nodes.generation(slot) }
    }

    /// Slots of the leading blocks of a chain that are known, each behind the one before.
    fn walk(&self, root: BlockHash, hashes: &[BlockHash]) -> Vec<u32> {
        let mut path: Vec<u32> = Vec::new();
        for hash in hashes {
            let Some(slot) = self.slots.get(hash) else { break };
            let node = self.nodes.get(*slot);
            if node.parent != path.last().copied() || node.root != root {
                break;
            }
            path.push(*slot);
        }
        path
    }

    fn path_to(&self, handle: Handle) -> Result<Vec<u32>, PrefixError> {
        if !self.nodes.is_there(handle.slot, handle.generation) {
            return Err(PrefixError::Gone);
        }
        let up = std::iter::successors(Some(handle.slot), |slot| self.nodes.get(*slot).parent);
        let mut path: Vec<_> = up.collect();
        path.reverse();
        Ok(path)
    }

    fn hold(&mut self, path: &[u32]) {
        for slot in path {
            self.nodes.get_mut(*slot).users += 1;
            self.refresh(*slot);
        }
        if let Some(last) = path.last() {
            self.nodes.get_mut(*last).attached += 1;
        }
    }

    fn let_go(&mut self, path: &[u32]) {
        for slot in path {
            self.nodes.get_mut(*slot).users -= 1;
            self.refresh(*slot);
        }
        if let Some(last) = path.last() {
            self.nodes.get_mut(*last).attached -= 1;
        }
    }

    fn touch(&mut self, path: &[u32]) {
        self.tick += 1;
        for slot in path {
            self.unlist(*slot);
            self.nodes.get_mut(*slot).used = self.tick;
            self.refresh(*slot);
        }
    }

    fn unlist(&mut self, slot: u32) {
        let entry = (self.nodes.get(slot).used, slot);
        self.host.idle.remove(&entry);
        self.stored.idle.remove(&entry);
    }

    /// Whether a block may leave a tier at once: nobody uses it, it is there, no block behind it is, and if it is
    /// nowhere else no block is behind it at all.
    fn may_leave(&self, slot: u32, tier: Tier) -> bool {
        let node = self.nodes.get(slot);
        let elsewhere = matches!(node.place, Place::Both(..));
        node.users == 0
            && node.place.is_in(tier)
            && node.children_in(tier) == 0
            && (elsewhere || node.children.is_empty())
    }

    /// Lists a block where it may leave, and nowhere else.
    fn refresh(&mut self, slot: u32) {
        let entry = (self.nodes.get(slot).used, slot);
        for tier in [Tier::Host, Tier::Stored] {
            if self.may_leave(slot, tier) {
                self.account_mut(tier).idle.insert(entry);
            } else {
                self.account_mut(tier).idle.remove(&entry);
            }
        }
    }

    fn insert(
        &mut self,
        root: BlockHash,
        parent: Option<u32>,
        hash: BlockHash,
        place: Place<P>,
        bytes: u64,
    ) -> u32 {
        let slot = self.nodes.add(Node::new(root, parent, hash, place, bytes));
        self.slots.insert(hash, slot);
        if let Some(parent) = parent {
            self.nodes.get_mut(parent).children.insert(slot);
        }
        for tier in [Tier::Host, Tier::Stored] {
            if self.nodes.get(slot).place.is_in(tier) {
                self.arrive(slot, tier);
            }
        }
        self.refresh(slot);
        slot
    }

    /// Counts a block that is in a tier from now on.
    fn arrive(&mut self, slot: u32, tier: Tier) {
        let node = self.nodes.get(slot);
        let (bytes, parent) = (node.bytes, node.parent);
        if let (Tier::Stored, Some(image)) = (tier, node.place.image()) {
            *self.images.entry(Arc::clone(image)).or_default() += 1;
        }
        self.account_mut(tier).bytes += bytes;
        if let Some(parent) = parent {
            *self.nodes.get_mut(parent).children_in_mut(tier) += 1;
            self.refresh(parent);
        }
    }

    /// Takes a block out of a tier, if it is in it; out of the index, if it is nowhere else.
    fn leave(&mut self, slot: u32, tier: Tier, evicted: &mut Evictions<P>) {
        if !self.nodes.get(slot).place.is_in(tier) {
            return;
        }
        self.unlist(slot);
        let node = self.nodes.get(slot);
        let (hash, parent, bytes) = (node.hash, node.parent, node.bytes);
        let place = node.place.clone();
        self.account_mut(tier).bytes -= bytes;
        match tier {
            Tier::Host => evicted.payloads.extend(place.host().cloned()),
            Tier::Stored => self.leave_image(place.image(), evicted),
        }
        if let Some(parent) = parent {
            *self.nodes.get_mut(parent).children_in_mut(tier) -= 1;
        }
        match place.without(tier) {
            Some(place) => {
                self.nodes.get_mut(slot).place = place;
                self.refresh(slot);
            }
            None => {
                self.nodes.remove(slot);
                self.slots.remove(&hash);
                evicted.blocks.push(hash);
                if let Some(parent) = parent {
                    self.nodes.get_mut(parent).children.remove(&slot);
                }
            }
        }
        if let Some(parent) = parent {
            self.refresh(parent);
        }
    }

    fn leave_image(&mut self, image: Option<&Arc<ImageId>>, evicted: &mut Evictions<P>) {
        let Some(image) = image else { return };
        let Some(blocks) = self.images.get_mut(image) else { return };
        *blocks -= 1;
        if *blocks == 0 {
            self.images.remove(image);
            evicted.images.push(Arc::clone(image));
        }
    }

    fn set(
        &mut self,
        hash: &BlockHash,
        tier: Tier,
        change: impl FnOnce(Place<P>) -> Place<P>,
    ) -> Result<Evictions<P>, PrefixError> {
        let slot = *self.slots.get(hash).ok_or(PrefixError::Gone)?;
        if self.nodes.get(slot).place.is_in(tier) {
            return Ok(Evictions::default());
        }
        let bytes = self.nodes.get(slot).bytes;
        let mut evicted = Evictions::default();
        // Where there is room, a path is not walked for each of its blocks.
        if self.account(tier).bytes.saturating_add(bytes) > self.limits.of(tier) {
            let path = self.path_to(self.handle(slot))?;
            self.hold(&path);
            let made = match tier {
                Tier::Host => self.make_room(bytes, 0),
                Tier::Stored => self.make_room(0, bytes),
            };
            self.let_go(&path);
            evicted = made?;
        }
        let place = change(self.nodes.get(slot).place.clone());
        self.nodes.get_mut(slot).place = place;
        self.arrive(slot, tier);
        self.refresh(slot);
        Ok(evicted)
    }

    /// Makes room in both tiers, or leaves everything as it is.
    fn make_room(&mut self, host: u64, stored: u64) -> Result<Evictions<P>, PrefixError> {
        let wanted = [(Tier::Host, host), (Tier::Stored, stored)];
        for (tier, bytes) in wanted {
            let limit = self.limits.of(tier);
            if self.account(tier).bytes.saturating_add(bytes) <= limit {
                continue;
            }
            let free_bytes = limit.saturating_sub(self.staying_bytes(tier));
            if bytes > free_bytes {
                return Err(PrefixError::Full { tier, wanted_bytes: bytes, free_bytes });
            }
        }
        let mut evicted = Evictions::default();
        for (tier, bytes) in wanted {
            let target = self.limits.of(tier) - bytes;
            self.evict_to(tier, target, &mut evicted);
        }
        Ok(evicted)
    }

    /// Bytes that no eviction from this tier makes free: of blocks that are used, of those with such a block behind them,
    /// and of those that are in this tier only and have one behind them that is in the other.
    fn staying_bytes(&self, tier: Tier) -> u64 {
        // Whether a block right behind a slot's stays in the tier, and whether one stays known.
        let (mut stays, mut known) = (vec![false; self.nodes.capacity()], vec![false; self.nodes.capacity()]);
        let mut bytes = 0;
        for slot in self.nodes.parents_first().into_iter().rev() {
            let node = self.nodes.get(slot);
            let elsewhere = node.place.is_in(tier.other());
            let blocked = stays[slot as usize] || (!elsewhere && known[slot as usize]);
            let staying = node.place.is_in(tier) && (node.users > 0 || blocked);
            bytes += if staying { node.bytes } else { 0 };
            if let Some(parent) = node.parent {
                stays[parent as usize] |= staying;
                known[parent as usize] |= staying || elsewhere;
            }
        }
        bytes
    }

    fn evict_to(&mut self, tier: Tier, target_bytes: u64, evicted: &mut Evictions<P>) {
        while self.account(tier).bytes > target_bytes {
            let Some((_, slot)) = self.account(tier).idle.first().copied() else { return };
            self.leave(slot, tier, evicted);
            match tier {
                Tier::Host => self.counters.host_evictions += 1,
                Tier::Stored => self.counters.stored_evictions += 1,
            }
        }
    }
}

#[cfg(test)]
mod tests;
