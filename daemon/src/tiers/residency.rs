//! Which rows of a KV head lie in which slots of a device slab.
//!
//! A slab is cut into pages of P row slots. A [`SlotSet`] (one per sequence, layer and KV head) owns some of them
//! and keeps a sorted list of the tokens that lie there. [`SlotSet::place`] turns a selection into slots: what is
//! resident stays where it is, and only the rest gets a slot and has to be copied.
//!
//! What to give up when the set is full: the rows whose last selection is longest ago, by step and then by token,
//! so the answer never depends on a clock.

use kvoyant_methods::TokenRange;
use serde::{Deserialize, Serialize};

/// Free pages of one slab.
#[derive(Debug)]
pub struct SlabPages {
    free: Vec<u32>,
    total: usize,
    page_rows: usize,
}

impl SlabPages {
    /// A slab of `pages` pages of `page_rows` slots.
    #[must_use]
    pub fn new(pages: usize, page_rows: usize) -> Self {
        Self { free: (0..pages as u32).rev().collect(), total: pages, page_rows }
    }

    /// Pages that nobody owns.
    #[must_use]
    pub fn free(&self) -> usize {
        self.free.len()
    }

    /// Pages in all.
    #[must_use]
    pub fn total(&self) -> usize {
        self.total
    }

    /// Pages that somebody owns.
    #[must_use]
    pub fn used(&self) -> usize {
        self.total - self.free.len()
    }

    /// Takes a free page, the lowest of those that were given back last.
    pub fn take(&mut self) -> Option<u32> {
        self.free.pop()
    }

    /// Takes pages back.
    pub fn give_back(&mut self, pages: impl IntoIterator<Item = u32>) {
        self.free.extend(pages);
        debug_assert!(self.free.len() <= self.total);
    }
}

/// Where one selected row is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Placed {
    /// Position of its token.
    pub token: u32,
    /// Its slot (slab page times P plus slot in page); `None`: the slab has no room for it.
    pub slot: Option<u32>,
    /// Whether it still has to be copied there.
    pub fresh: bool,
}

/// A row that lies in a slot.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SlotEntry {
    /// Position of its token.
    pub token: u32,
    /// Its slot.
    pub slot: u32,
    /// Whether the last placement wanted it.
    pub selected: bool,
}

#[derive(Debug, Clone, Copy)]
struct Resident {
    token: u32,
    slot: u32,
    used: u64,
}

/// The slots of one KV head.
#[derive(Debug, Default)]
pub struct SlotSet {
    rows: Vec<Resident>,
    free: Vec<u32>,
    pages: Vec<u32>,
    step: u64,
    /// Placement whose rows are still on their way, and are not given up; 0: none.
    held: u64,
}

/// Which rows a set has, and since when they were not wanted, for a daemon that goes on with it. Where they lie is not a part of it: what
/// comes of them depends on the order of tokens, and not on that of slots.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Residents {
    /// Pages that it owns.
    pub pages: u32,
    /// Placements so far.
    pub step: u64,
    /// Rows by token: how many tokens lie between it and the one before, and before how many placements it was wanted last.
    pub rows: Vec<(u32, u64)>,
}

/// Buffers that a lane keeps for all its placements.
#[derive(Debug, Default)]
pub struct PlaceScratch {
    merged: Vec<Resident>,
    victims: Vec<(u64, u32)>,
}

impl SlotSet {
    /// Rows that lie in slots.
    #[must_use]
    pub fn resident(&self) -> usize {
        self.rows.len()
    }

    /// Rows that lie in slots, by token.
    pub fn entries(&self) -> impl Iterator<Item = SlotEntry> + '_ {
        self.rows.iter().map(|row| SlotEntry {
            token: row.token,
            slot: row.slot,
            selected: row.used == self.step,
        })
    }

    fn own(&mut self, page: u32, page_rows: usize) {
        self.pages.push(page);
        let first = page * page_rows as u32;
        self.free.extend(first..first + page_rows as u32);
    }

    /// What another daemon needs to have the same rows. Rows on their way count as there.
    #[must_use]
    pub fn residents(&self) -> Residents {
        let mut next = 0;
        let row = |row: &Resident| {
            let between = row.token - std::mem::replace(&mut next, row.token + 1);
            (between, self.step - row.used)
        };
        Residents {
            pages: self.pages.len() as u32,
            step: self.step,
            rows: self.rows.iter().map(row).collect(),
        }
    }

    /// The set that another daemon had, of a sequence of `tokens` tokens. Its rows are yet to be copied to their slots. `None` if it cannot
    /// have been so, or the slab has too few pages.
    #[must_use]
    pub fn restore(residents: &Residents, tokens: u32, slab: &mut SlabPages) -> Option<Self> {
        let mut set = Self { step: residents.step, ..Self::default() };
        if residents.pages as usize > slab.free() {
            return None;
        }
        for _ in 0..residents.pages {
            let page = slab.take()?;
            set.own(page, slab.page_rows);
        }
        set.free.sort_unstable_by(|a, b| b.cmp(a));
        let mut next = 0_u32;
        for (between, age) in &residents.rows {
            let token = next.checked_add(*between).filter(|token| *token < tokens)?;
            let used = residents.step.checked_sub(*age)?;
            set.rows.push(Resident { token, slot: set.free.pop()?, used });
            next = token + 1;
        }
        Some(set)
    }

    /// Pages that it owns.
    #[must_use]
    pub fn pages(&self) -> usize {
        self.pages.len()
    }

    /// Gives up everything and returns its pages.
    pub fn clear(&mut self) -> std::vec::Drain<'_, u32> {
        self.rows.clear();
        self.free.clear();
        self.held = 0;
        self.pages.drain(..)
    }

    /// Holds on to the rows of the last placement until [`Self::let_go`]: copies to their slots are under way.
    pub fn hold(&mut self) {
        self.held = self.step;
    }

    /// The rows that were held have arrived.
    pub fn let_go(&mut self) {
        self.held = 0;
    }

    /// Finds the wanted rows that lie in slots, and makes no place for the others.
    pub fn find(&mut self, wanted: &[TokenRange], out: &mut Vec<Placed>) {
        self.step += 1;
        let step = self.step;
        let mut at = 0;
        for token in wanted.iter().flat_map(|range| range.first..range.end()) {
            while at < self.rows.len() && self.rows[at].token < token {
                at += 1;
            }
            let hit = self.rows.get_mut(at).filter(|row| row.token == token);
            let slot = hit.map(|row| {
                row.used = step;
                row.slot
            });
            out.push(Placed { token, slot, fresh: slot.is_none() });
        }
    }

    /// Forgets tokens from `tokens` on: they were truncated.
    pub fn truncate(&mut self, tokens: u32) {
        let keep = self.rows.partition_point(|row| row.token < tokens);
        self.free.extend(self.rows.drain(keep..).map(|row| row.slot));
    }

    /// Slots that `wanted` rows of which none is resident would need beyond what the set has.
    #[must_use]
    pub fn pages_wanted(&self, wanted: usize, page_rows: usize) -> usize {
        wanted.div_ceil(page_rows).saturating_sub(self.pages.len())
    }

    /// Finds or makes a place for every wanted row.
    ///
    /// `wanted` is sorted and disjoint. The set may grow to `keep_rows` rows, or to what is wanted if that is
    /// more, as far as the slab has pages. `evict`: rows that are not wanted now may be given up (not while an
    /// earlier answer that names them is still being read).
    pub fn place(
        &mut self,
        wanted: &[TokenRange],
        keep_rows: usize,
        evict: bool,
        slab: &mut SlabPages,
        scratch: &mut PlaceScratch,
        out: &mut Vec<Placed>,
    ) {
        let start = out.len();
        self.find(wanted, out);
        let step = self.step;
        let total = out.len() - start;
        let missing = out[start..].iter().filter(|placed| placed.fresh).count();
        if missing == 0 {
            return;
        }
        let page_rows = slab.page_rows;
        let limit = keep_rows.max(total);
        while self.free.len() < missing && self.pages.len() * page_rows < limit {
            let Some(page) = slab.take() else { break };
            self.own(page, page_rows);
        }
        if self.free.len() < missing && evict {
            self.evict(missing - self.free.len(), step, scratch);
        }
        // Lowest slots first, so that neighbours in the sequence become neighbours in the slab.
        self.free.sort_unstable_by(|a, b| b.cmp(a));
        scratch.merged.clear();
        let mut old = self.rows.iter().copied().peekable();
        for placed in &mut out[start..] {
            while let Some(row) = old.next_if(|row| row.token < placed.token) {
                scratch.merged.push(row);
            }
            if placed.fresh {
                placed.slot = self.free.pop();
                placed.fresh = placed.slot.is_some();
                if let Some(slot) = placed.slot {
                    scratch.merged.push(Resident { token: placed.token, slot, used: step });
                }
            }
        }
        scratch.merged.extend(old);
        std::mem::swap(&mut self.rows, &mut scratch.merged);
    }

    /// Gives up the `count` rows that were selected longest ago, if as many are not selected now.
    fn evict(&mut self, count: usize, step: u64, scratch: &mut PlaceScratch) {
        let (victims, held) = (&mut scratch.victims, self.held);
        victims.clear();
        let idle = |row: &&Resident| row.used < step && row.used != held;
        victims.extend(self.rows.iter().filter(idle).map(|row| (row.used, row.token)));
        let count = count.min(victims.len());
        if count == 0 {
            return;
        }
        let (_, last, _) = victims.select_nth_unstable(count - 1);
        let last = *last;
        let free = &mut self.free;
        self.rows.retain(|row| {
            let stays = row.used == step || row.used == held || (row.used, row.token) > last;
            if !stays {
                free.push(row.slot);
            }
            stays
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::{BTreeMap, BTreeSet};

    fn ranges(tokens: &BTreeSet<u32>) -> Vec<TokenRange> {
        tokens.iter().map(|&first| TokenRange { first, count: 1 }).collect()
    }

    #[test]
    fn only_rows_that_are_not_resident_are_fresh() {
        let mut slab = SlabPages::new(4, 8);
        let (mut set, mut scratch, mut out) = (SlotSet::default(), PlaceScratch::default(), Vec::new());
        let first = [TokenRange { first: 10, count: 4 }];
        set.place(&first, 16, true, &mut slab, &mut scratch, &mut out);
        assert!(out.iter().all(|placed| placed.fresh));
        let slots: Vec<_> = out.iter().map(|placed| placed.slot.unwrap()).collect();
        assert!(slots.windows(2).all(|pair| pair[1] == pair[0] + 1), "neighbours stay neighbours: {slots:?}");
        out.clear();
        let second = [TokenRange { first: 12, count: 4 }];
        set.place(&second, 16, true, &mut slab, &mut scratch, &mut out);
        let fresh: Vec<_> = out.iter().filter(|p| p.fresh).map(|p| p.token).collect();
        assert_eq!(fresh, [14, 15]);
        assert_eq!(set.resident(), 6);
    }

    #[test]
    fn a_slab_without_room_leaves_rows_unplaced_and_touches_no_leased_row() {
        let mut slab = SlabPages::new(1, 4);
        let (mut set, mut scratch, mut out) = (SlotSet::default(), PlaceScratch::default(), Vec::new());
        set.place(&[TokenRange { first: 0, count: 4 }], 4, true, &mut slab, &mut scratch, &mut out);
        out.clear();
        set.place(&[TokenRange { first: 4, count: 2 }], 4, false, &mut slab, &mut scratch, &mut out);
        assert!(out.iter().all(|placed| placed.slot.is_none() && !placed.fresh));
        assert_eq!(set.resident(), 4);
        out.clear();
        set.place(&[TokenRange { first: 4, count: 2 }], 4, true, &mut slab, &mut scratch, &mut out);
        assert!(out.iter().all(|placed| placed.fresh));
        set.truncate(5);
        assert_eq!(set.resident(), 3, "token 5 is gone, and tokens 0 and 1 gave way");
        let pages: Vec<_> = set.clear().collect();
        slab.give_back(pages);
        assert_eq!(slab.free(), 1);
    }

    #[test]
    fn residents_that_cannot_be_are_none() {
        let restore = |pages, step, rows: &[(u32, u64)]| {
            let residents = Residents { pages, step, rows: rows.to_vec() };
            SlotSet::restore(&residents, 100, &mut SlabPages::new(2, 4))
        };
        assert!(restore(1, 3, &[(0, 3), (98, 0)]).is_some());
        assert!(restore(3, 3, &[]).is_none(), "more pages than there are");
        assert!(restore(1, 3, &[(0, 0), (0, 0), (0, 0), (0, 0), (0, 0)]).is_none(), "more rows than slots");
        assert!(restore(1, 3, &[(0, 4)]).is_none(), "wanted before anything was");
        assert!(restore(1, 3, &[(0, 0), (99, 0)]).is_none(), "a token that is not there");
        assert!(restore(1, 3, &[(5, 0), (u32::MAX, 0)]).is_none());
    }

    proptest! {
        /// Of a set that goes on in another daemon come the same rows, new and old, as of one that nothing disturbs.
        #[test]
        fn a_set_that_is_restored_places_and_gives_up_the_same_rows(
            steps in proptest::collection::vec(proptest::collection::btree_set(0u32..120, 0..30), 1..40),
            pages in 1usize..12, keep in 0usize..64, restored in 0usize..40,
        ) {
            let (mut slab, mut other) = (SlabPages::new(pages, 8), SlabPages::new(pages, 8));
            let (mut set, mut again) = (SlotSet::default(), SlotSet::default());
            let mut scratch = PlaceScratch::default();
            for (at, wanted) in steps.into_iter().enumerate() {
                if at == restored {
                    other = SlabPages::new(pages, 8);
                    again = SlotSet::restore(&again.residents(), 120, &mut other).unwrap();
                    prop_assert_eq!(again.residents(), set.residents());
                    prop_assert!(SlotSet::restore(&set.residents(), 120, &mut SlabPages::new(0, 8)).is_none_or(|set| set.pages() == 0));
                }
                let rows = |set: &mut SlotSet, slab: &mut SlabPages, scratch: &mut PlaceScratch| {
                    let mut out = Vec::new();
                    set.place(&ranges(&wanted), keep, true, slab, scratch, &mut out);
                    let placed: Vec<_> = out.iter().map(|row| (row.token, row.slot.is_some(), row.fresh)).collect();
                    (placed, set.entries().map(|entry| (entry.token, entry.selected)).collect::<Vec<_>>(), slab.free())
                };
                let expected = rows(&mut set, &mut slab, &mut scratch);
                prop_assert_eq!(rows(&mut again, &mut other, &mut scratch), expected);
            }
        }

        /// A model of the slab: what a slot holds is what was copied there last. Every answer must name slots
        /// that hold the right tokens, no slot twice, and fresh rows only where the model has something else.
        #[test]
        fn a_slot_always_holds_the_token_that_the_answer_says(
            steps in proptest::collection::vec(proptest::collection::btree_set(0u32..120, 0..30), 1..40),
            pages in 1usize..12, keep in 0usize..64,
        ) {
            let mut slab = SlabPages::new(pages, 8);
            let (mut set, mut scratch) = (SlotSet::default(), PlaceScratch::default());
            let mut content: BTreeMap<u32, u32> = BTreeMap::new();
            for wanted in steps {
                let mut out = Vec::new();
                set.place(&ranges(&wanted), keep, true, &mut slab, &mut scratch, &mut out);
                prop_assert_eq!(out.iter().map(|p| p.token).collect::<BTreeSet<_>>(), wanted.clone());
                let mut seen = BTreeSet::new();
                for placed in out {
                    let Some(slot) = placed.slot else { continue };
                    prop_assert!(seen.insert(slot), "slot {} was given twice", slot);
                    if placed.fresh {
                        content.insert(slot, placed.token);
                    }
                    prop_assert_eq!(content.get(&slot), Some(&placed.token));
                }
                let room = pages * 8;
                prop_assert!(seen.len() == wanted.len().min(room), "as much as fits is placed");
                prop_assert!(set.resident() + set.free.len() == set.pages() * 8);
                prop_assert!(set.pages() + slab.free() == pages);
            }
        }
    }
}
