//! The blocks themselves, in slots that are used again under another generation.

use std::collections::BTreeSet;

use super::{Place, Tier};
use crate::tiers::prefix::hash::BlockHash;

/// A block.
#[derive(Debug)]
pub(super) struct Node<P> {
    /// Where its chain begins.
    pub(super) root: BlockHash,
    /// The block before it; `None` for the first of a chain.
    pub(super) parent: Option<u32>,
    pub(super) hash: BlockHash,
    pub(super) place: Place<P>,
    /// In each tier that it is in.
    pub(super) bytes: u64,
    /// Blocks right behind it.
    pub(super) children: BTreeSet<u32>,
    host_children: u32,
    stored_children: u32,
    /// Sessions that use it, or a block behind it.
    pub(super) users: u32,
    /// Of those, ones whose prefix ends here.
    pub(super) attached: u32,
    /// When it was used last, in ticks of the index.
    pub(super) used: u64,
}

impl<P> Node<P> {
    pub(super) fn new(
        root: BlockHash,
        parent: Option<u32>,
        hash: BlockHash,
        place: Place<P>,
        bytes: u64,
    ) -> Self {
        Self {
            root,
            parent,
            hash,
            place,
            bytes,
            children: BTreeSet::new(),
            host_children: 0,
            stored_children: 0,
            users: 0,
            attached: 0,
            used: 0,
        }
    }

    /// How many of the blocks right behind it are in a tier.
    pub(super) fn children_in(&self, tier: Tier) -> u32 {
        match tier {
            Tier::Host => self.host_children,
            Tier::Stored => self.stored_children,
        }
    }

    pub(super) fn children_in_mut(&mut self, tier: Tier) -> &mut u32 {
        match tier {
            Tier::Host => &mut self.host_children,
            Tier::Stored => &mut self.stored_children,
        }
    }
}

/// A slot for a block.
#[derive(Debug)]
struct Slot<P> {
    generation: u32,
    node: Option<Node<P>>,
}

/// All blocks, by slot.
#[derive(Debug)]
pub(super) struct Nodes<P> {
    slots: Vec<Slot<P>>,
    free: Vec<u32>,
}

impl<P> Default for Nodes<P> {
    fn default() -> Self {
        Self { slots: Vec::new(), free: Vec::new() }
    }
}

impl<P> Nodes<P> {
    pub(super) fn add(&mut self, node: Node<P>) -> u32 {
        let slot = self.free.pop().unwrap_or_else(|| {
            self.slots.push(Slot { generation: 0, node: None });
            self.slots.len() as u32 - 1
        });
        self.slots[slot as usize].node = Some(node);
        slot
    }

    pub(super) fn remove(&mut self, slot: u32) -> Option<Node<P>> {
        let place = &mut self.slots[slot as usize];
        place.generation = place.generation.wrapping_add(1);
        self.free.push(slot);
        place.node.take()
    }

    pub(super) fn generation(&self, slot: u32) -> u32 {
        self.slots[slot as usize].generation
    }

    /// Whether the slot holds the block that it held in this generation.
    pub(super) fn is_there(&self, slot: u32, generation: u32) -> bool {
        self.slots.get(slot as usize).is_some_and(|slot| slot.generation == generation && slot.node.is_some())
    }

    /// A block that is there: slots in the index's maps, and in other blocks, always are.
    pub(super) fn get(&self, slot: u32) -> &Node<P> {
        self.slots[slot as usize].node.as_ref().expect("a slot of the index holds a block")
    }

    pub(super) fn get_mut(&mut self, slot: u32) -> &mut Node<P> {
        self.slots[slot as usize].node.as_mut().expect("a slot of the index holds a block")
    }

    /// Every block with its slot.
    pub(super) fn iter(&self) -> impl Iterator<Item = (u32, &Node<P>)> {
        let each = (0..).zip(&self.slots);
        each.filter_map(|(slot, place)| place.node.as_ref().map(|node| (slot, node)))
    }

    /// Slots of all blocks, each behind the block that it follows.
    pub(super) fn parents_first(&self) -> Vec<u32> {
        let mut order: Vec<u32> =
            self.iter().filter(|(_, node)| node.parent.is_none()).map(|(slot, _)| slot).collect();
        let mut at = 0;
        while at < order.len() {
            order.extend(&self.get(order[at]).children);
            at += 1;
        }
        order
    }

    /// Slots that there are, used or not.
    pub(super) fn capacity(&self) -> usize {
        self.slots.len()
    }
}
