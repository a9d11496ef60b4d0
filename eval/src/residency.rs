//! A model of what lies on the device: so many rows per KV head, the least recently selected leave first.
//!
//! The daemon keeps slots and pages of them; here it is rows alone, so that every method is counted alike: what is selected and
//! not resident moves. A head's room grows to [`KEEP`] times what it selects, as far as the device has room. Of a selection that
//! is larger than that, what is resident stays, the first of the other rows join it, and the rest streams through.

use kvoyant_methods::TokenRange;

use crate::replay::KEEP;

/// Resident rows of one KV head.
#[derive(Debug, Clone)]
pub struct Resident {
    /// What the device has for the head.
    capacity: usize,
    /// What the head has taken of it.
    room: usize,
    /// When each token was last selected, 0: it is not resident.
    last: Vec<u64>,
    clock: u64,
    resident: usize,
}

/// What a selection found.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Found {
    /// Rows that were resident already.
    pub hits: usize,
    /// Rows that were not.
    pub missing: usize,
}

impl Resident {
    /// On a device with room for `capacity` rows.
    #[must_use]
    pub fn new(capacity: usize) -> Self {
        Self { capacity, room: 0, last: Vec::new(), clock: 0, resident: 0 }
    }

    /// Rows resident now.
    #[must_use]
    pub fn rows(&self) -> usize {
        self.resident
    }

    /// Whether a token's row is resident.
    #[must_use]
    pub fn holds(&self, token: u32) -> bool {
        self.last.get(token as usize).is_some_and(|last| *last > 0)
    }

    /// Counts what a selection finds, and changes nothing.
    #[must_use]
    pub fn look(&self, selected: &[TokenRange]) -> Found {
        let mut found = Found::default();
        for token in tokens(selected) {
            if self.holds(token) { found.hits += 1 } else { found.missing += 1 }
        }
        found
    }

    /// Takes in a selection: as much of it as fits is resident afterwards.
    pub fn take(&mut self, selected: &[TokenRange]) -> Found {
        let found = self.look(selected);
        let wanted = ((found.hits + found.missing) as f64 * KEEP) as usize;
        self.room = self.room.max(wanted.min(self.capacity));
        self.clock += 1;
        let mut left = self.room - found.hits;
        for token in tokens(selected) {
            let token = token as usize;
            if self.last.len() <= token {
                self.last.resize(token + 1, 0);
            }
            if self.last[token] == 0 {
                if left == 0 {
                    continue;
                }
                left -= 1;
                self.resident += 1;
            }
            self.last[token] = self.clock;
        }
        self.evict();
        found
    }

    fn evict(&mut self) {
        let Some(over) = self.resident.checked_sub(self.room).filter(|over| *over > 0) else { return };
        let mut ages: Vec<(u64, usize)> = self
            .last
            .iter()
            .enumerate()
            .filter(|(_, last)| **last > 0)
            .map(|(token, last)| (*last, token))
            .collect();
        ages.select_nth_unstable(over - 1);
        for (_, token) in &ages[..over] {
            self.last[*token] = 0;
        }
        self.resident -= over;
    }
}

fn tokens(ranges: &[TokenRange]) -> impl Iterator<Item = u32> + '_ {
    ranges.iter().flat_map(|range| range.first..range.end())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn range(first: u32, count: u32) -> TokenRange {
        TokenRange { first, count }
    }

    #[test]
    fn what_was_selected_is_found_again_and_the_oldest_leave_first() {
        let mut rows = Resident::new(4);
        assert_eq!(rows.take(&[range(0, 2)]), Found { hits: 0, missing: 2 });
        assert_eq!(rows.take(&[range(1, 2)]), Found { hits: 1, missing: 1 });
        assert_eq!(rows.take(&[range(8, 2)]), Found { hits: 0, missing: 2 });
        assert!(!rows.holds(0) && rows.holds(1) && rows.holds(2) && rows.holds(9));
        assert_eq!(rows.rows(), 4);
    }

    #[test]
    fn a_selection_one_row_above_the_room_finds_all_the_others_again() {
        let mut rows = Resident::new(8);
        assert_eq!(rows.take(&[range(20, 4)]), Found { hits: 0, missing: 4 });
        assert_eq!(rows.take(&[range(0, 9)]), Found { hits: 0, missing: 9 });
        for _ in 0..3 {
            assert_eq!(rows.take(&[range(0, 9)]), Found { hits: 8, missing: 1 });
            assert_eq!(rows.rows(), 8);
        }
        assert_eq!(rows.take(&[range(5, 12)]), Found { hits: 3, missing: 9 });
        assert!(rows.holds(5) && rows.holds(12) && !rows.holds(13) && !rows.holds(4));
    }

    #[test]
    fn a_head_keeps_twice_what_it_selects_and_no_more() {
        let mut rows = Resident::new(100);
        for first in 0..10 {
            rows.take(&[range(first * 3, 3)]);
        }
        assert_eq!(rows.rows(), 6);
        assert!(rows.holds(24) && rows.holds(29) && !rows.holds(23));
        let mut nowhere = Resident::new(0);
        assert_eq!(nowhere.take(&[range(0, 3)]), Found { hits: 0, missing: 3 });
        assert_eq!(nowhere.rows(), 0);
    }

    proptest! {
        #[test]
        fn it_never_holds_more_than_its_room_and_always_what_was_selected_last(
            selections in proptest::collection::vec((0u32..40, 1u32..20), 1..60),
        ) {
            let mut rows = Resident::new(8);
            for (first, count) in selections {
                let selected = [range(first, count)];
                let found = rows.take(&selected);
                prop_assert_eq!(found.hits + found.missing, count as usize);
                prop_assert!(rows.rows() <= 8);
                prop_assert_eq!(rows.look(&selected).missing, (count as usize).saturating_sub(8));
            }
        }
    }
}
