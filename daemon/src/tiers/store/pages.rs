//! Which pages an image has, and their checksums.

use serde::{Deserialize, Serialize};

/// Most pages of an image, present or not: 512 GiB of pages of 16 KiB.
pub const PAGES_MAX: usize = 1 << 25;

/// Pages of every `[layer][KV head]`, in that order, and page by page within a head: *table order*. Some may be absent,
/// as where a pool has dropped all of their rows.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PageTable {
    /// Pages of each head, absent ones included.
    counts: Vec<u32>,
    /// One bit for each page in table order, lowest first: whether it is present.
    present: Vec<u8>,
    /// CRC-32C of each page that is present.
    crcs: Vec<u32>,
}

impl PageTable {
    /// A table of so many pages for each `[layer][KV head]`, without checksums yet. `present(head, page)` says which
    /// are there, where `head = layer · KV heads + KV head`. A table of more than [`PAGES_MAX`] pages has none of them,
    /// and no image is written with it.
    #[must_use]
    pub fn new(counts: Vec<u32>, mut present: impl FnMut(usize, usize) -> bool) -> Self {
        let pages = total(&counts).unwrap_or(0);
        let mut bits = vec![0u8; pages.div_ceil(8)];
        if pages > 0 {
            let each = counts.iter().enumerate();
            let each = each.flat_map(|(head, count)| (0..*count as usize).map(move |page| (head, page)));
            for (at, (head, page)) in each.enumerate() {
                bits[at / 8] |= u8::from(present(head, page)) << (at % 8);
            }
        }
        Self { counts, present: bits, crcs: Vec::new() }
    }

    /// As [`PageTable::new`], with all pages present.
    #[must_use]
    pub fn full(counts: Vec<u32>) -> Self {
        Self::new(counts, |_, _| true)
    }

    /// Pages of each `[layer][KV head]`, absent ones included.
    #[must_use]
    pub fn counts(&self) -> &[u32] {
        &self.counts
    }

    /// How many pages are present.
    #[must_use]
    pub fn present(&self) -> usize {
        self.present.iter().map(|bits| bits.count_ones() as usize).sum()
    }

    /// CRC-32C of each page that is present, in table order; empty before the image is written.
    #[must_use]
    pub fn crcs(&self) -> &[u32] {
        &self.crcs
    }

    /// The pages that are present as `(head, page)`, in table order: the order in which they are written, and the
    /// indices by which they are read.
    pub fn iter(&self) -> impl Iterator<Item = (usize, usize)> + '_ {
        let each = self.counts.iter().enumerate();
        let each = each.flat_map(|(head, count)| (0..*count as usize).map(move |page| (head, page)));
        each.enumerate().filter(|(at, _)| self.bit(*at)).map(|(_, place)| place)
    }

    fn bit(&self, at: usize) -> bool {
        self.present.get(at / 8).is_some_and(|bits| bits >> (at % 8) & 1 == 1)
    }

    pub(super) fn set_crcs(&mut self, crcs: Vec<u32>) {
        self.crcs = crcs;
    }

    /// What does not go together, if anything, for a model of so many heads.
    pub(super) fn check(&self, heads: usize) -> Result<(), String> {
        if self.counts.len() != heads {
            return Err(format!("pages of {} heads for a model of {heads}", self.counts.len()));
        }
        let Some(pages) = total(&self.counts) else {
            return Err(format!("more than {PAGES_MAX} pages"));
        };
        if self.present.len() != pages.div_ceil(8) {
            return Err(format!("marks of {} bytes for {pages} pages", self.present.len()));
        }
        if (pages..self.present.len() * 8).any(|at| self.bit(at)) {
            return Err(format!("a page behind the last of {pages} is marked"));
        }
        if self.crcs.len() != self.present() {
            return Err(format!("{} checksums for {} pages", self.crcs.len(), self.present()));
        }
        Ok(())
    }
}

fn total(counts: &[u32]) -> Option<usize> {
    let pages = counts.iter().try_fold(0usize, |sum, count| sum.checked_add(*count as usize));
    pages.filter(|pages| *pages <= PAGES_MAX)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn the_pages_that_are_present_come_in_table_order(
            counts in proptest::collection::vec(0u32..20, 1..9),
            salt in any::<u64>(),
        ) {
            let there = |head: usize, page: usize| (salt >> ((head * 7 + page) % 64)) & 1 == 1;
            let mut table = PageTable::new(counts.clone(), there);
            let mut wanted = Vec::new();
            for (head, count) in counts.iter().enumerate() {
                wanted.extend((0..*count as usize).filter(|page| there(head, *page)).map(|page| (head, page)));
            }
            prop_assert_eq!(table.iter().collect::<Vec<_>>(), wanted.clone());
            prop_assert_eq!(table.present(), wanted.len());
            table.set_crcs(vec![0; wanted.len()]);
            prop_assert_eq!(table.check(counts.len()), Ok(()));
            prop_assert!(table.check(counts.len() + 1).is_err());
            table.set_crcs(vec![0; wanted.len() + 1]);
            prop_assert!(table.check(counts.len()).is_err());
        }
    }

    #[test]
    fn counts_that_overflow_are_no_table() {
        let table = PageTable::full(vec![u32::MAX; 4]);
        assert_eq!(table.present(), 0);
        assert!(table.check(4).unwrap_err().contains("more than"));
        let stray = PageTable { counts: vec![3], present: vec![0b1111], crcs: vec![0; 4] };
        assert!(stray.check(1).unwrap_err().contains("behind the last"));
    }
}
