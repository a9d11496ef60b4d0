//! Which layers of which sequences have slots on the device, the one that was used longest ago first.

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::collections::binary_heap::PeekMut;

use crate::lane::sequences::{LayerSlots, SequenceSlot};

/// A layer of a sequence by its age: the ticket of the answer that named its rows last, the sequence's slot, the layer.
pub(crate) type Aged = (u64, u32, u32);

/// Entries beside two for each page of the slab before those are thrown out that say nothing new.
const SLACK: usize = 64;

/// Every layer that has slots is here, perhaps more than once, under its last ticket or an earlier one. It may have been used since, or
/// have given its slots up: whoever takes an entry out looks, and puts back what stays.
#[derive(Debug)]
pub(crate) struct Ages {
    oldest: BinaryHeap<Reverse<Aged>>,
    /// Taken out, and to be put back.
    aside: Vec<Aged>,
    /// Pages of the slab, and so the most layers that have any.
    pages: usize,
}

impl Ages {
    /// Of all layers that have slots now, in a slab of so many pages.
    pub(crate) fn of(sequences: &[SequenceSlot], pages: usize) -> Self {
        let layers = (0u32..).zip(sequences).flat_map(|(slot, open)| {
            let layers = open.sequence.iter().flat_map(|sequence| (0u32..).zip(&sequence.residency));
            let having = layers.filter(|(_, slots)| slots.has_pages());
            having.map(move |(layer, slots)| Reverse((slots.last_ticket, slot, layer)))
        });
        Self { oldest: layers.collect(), aside: Vec::new(), pages }
    }

    /// Takes the oldest one out, if its ticket is not later than this.
    pub(crate) fn take(&mut self, through: u64) -> Option<Aged> {
        let oldest = self.oldest.peek()?.0;
        if oldest.0 > through {
            return None;
        }
        while let Some(next) = self.oldest.peek_mut().filter(|next| next.0 == oldest) {
            PeekMut::pop(next);
        }
        Some(oldest)
    }

    /// One that was taken out stays until the others are [put back](Self::put_back).
    pub(crate) fn lay_aside(&mut self, aged: Aged) {
        self.aside.push(aged);
    }

    /// Those that were laid aside are among the others again.
    pub(crate) fn put_back(&mut self) {
        self.oldest.extend(self.aside.drain(..).map(Reverse));
    }

    /// A layer that has slots has been used.
    pub(crate) fn put(&mut self, aged: Aged, sequences: &[SequenceSlot]) {
        self.oldest.push(Reverse(aged));
        if self.oldest.len() <= 2 * self.pages + SLACK {
            return;
        }
        let mut all = std::mem::take(&mut self.oldest).into_vec();
        all.retain_mut(|Reverse((ticket, slot, layer))| {
            let sequence = sequences[*slot as usize].sequence.as_ref();
            let slots = sequence.map(|sequence| &sequence.residency[*layer as usize]);
            let having = slots.filter(|slots| slots.has_pages());
            *ticket = having.map_or(0, |slots| slots.last_ticket);
            having.is_some()
        });
        all.sort_unstable();
        all.dedup();
        self.oldest = all.into();
    }
}

impl LayerSlots {
    /// Whether any of its heads has slots.
    pub(super) fn has_pages(&self) -> bool {
        self.heads.iter().any(|head| head.pages() > 0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_oldest_comes_first_and_once_however_often_it_was_put_in() {
        let mut ages = Ages::of(&[], 8);
        for aged in [(7, 0, 1), (3, 1, 0), (3, 1, 0), (5, 0, 0), (3, 0, 2), (9, 0, 3)] {
            ages.put(aged, &[]);
        }
        let taken: Vec<_> = std::iter::from_fn(|| ages.take(7)).collect();
        assert_eq!(taken, [(3, 0, 2), (3, 1, 0), (5, 0, 0), (7, 0, 1)]);
        ages.lay_aside(taken[0]);
        assert_eq!(ages.take(7), None);
        ages.put_back();
        assert_eq!(ages.take(7), Some((3, 0, 2)));
        assert_eq!(ages.take(8), None);
        assert_eq!(ages.take(9), Some((9, 0, 3)));
    }

    #[test]
    fn what_says_nothing_new_is_thrown_out() {
        let mut ages = Ages::of(&[], 8);
        let closed = [SequenceSlot::default()];
        (0..1000).for_each(|ticket| ages.put((ticket, 0, 0), &closed));
        assert!(ages.oldest.len() <= 2 * 8 + SLACK, "{}", ages.oldest.len());
    }
}
