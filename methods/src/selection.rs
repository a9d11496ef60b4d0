//! A method's answer: per KV head, the ranges of tokens to have ready.

/// `count` consecutive tokens from `first`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct TokenRange {
    /// First token.
    pub first: u32,
    /// Tokens, at least 1.
    pub count: u32,
}

impl TokenRange {
    /// The token after the last.
    #[must_use]
    pub fn end(&self) -> u32 {
        self.first + self.count
    }
}

/// Per KV head: sorted, disjoint, non-adjacent ranges of tokens within `[S, n − W)`.
///
/// Its buffers are reused from one selection to the next.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Selection {
    /// Ranges of head 0, then of head 1, …
    ranges: Vec<TokenRange>,
    /// Per finished head, where its ranges end, and how many rows of it and of those before it were wanted and are left out.
    ends: Vec<(usize, usize)>,
    /// Rows that would have been selected, had they not come too late.
    late: usize,
    /// Rows that would have been selected, had what is there not been enough.
    spared: usize,
}

impl Selection {
    /// An empty selection.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Forgets what it holds, keeps its buffers.
    pub fn clear(&mut self) {
        self.ranges.clear();
        self.ends.clear();
        (self.late, self.spared) = (0, 0);
    }

    /// Adds `first..end` to the head under way; empty is fine, adjacent ranges become one.
    ///
    /// # Panics
    /// Where the range begins before the last one of this head ends: a method's defect.
    pub fn push(&mut self, first: usize, end: usize) {
        if first >= end {
            return;
        }
        let head_start = self.ends.last().map_or(0, |(end, _)| *end);
        let count = (end - first) as u32;
        if let Some(last) = self.ranges[head_start..].last_mut() {
            assert!(last.end() as usize <= first, "ranges of a selection must be sorted and disjoint");
            if last.end() as usize == first {
                last.count += count;
                return;
            }
        }
        self.ranges.push(TokenRange { first: first as u32, count });
    }

    /// Ends the head under way; what is pushed next belongs to the next head.
    pub fn finish_head(&mut self) {
        self.ends.push((self.ranges.len(), self.late + self.spared));
    }

    /// Counts rows that are left out because they would come too late.
    pub fn leave(&mut self, rows: usize) {
        self.late += rows;
    }

    /// Rows that were left out because they would have come too late, all heads together.
    #[must_use]
    pub fn late(&self) -> usize {
        self.late
    }

    /// Counts rows that are left out because what is there is enough.
    pub fn spare(&mut self, rows: usize) {
        self.spared += rows;
    }

    /// Rows that were wanted, all heads together: those selected, and those left out because they would have come too late or because what is
    /// there is enough.
    #[must_use]
    pub fn wanted(&self) -> usize {
        self.total_rows() + self.late + self.spared
    }

    /// Rows of KV head `head` that were wanted and are left out, for whichever reason.
    ///
    /// # Panics
    /// Where there is no such head.
    #[must_use]
    pub(crate) fn left_out(&self, head: usize) -> usize {
        let before = if head == 0 { 0 } else { self.ends[head - 1].1 };
        self.ends[head].1 - before
    }

    /// Counts what another selection left out, all heads together.
    pub(crate) fn leave_as(&mut self, other: &Self) {
        self.late += other.late;
        self.spared += other.spared;
    }

    /// Ranges of the head under way so far.
    pub(crate) fn unfinished(&self) -> &[TokenRange] {
        &self.ranges[self.ends.last().map_or(0, |(end, _)| *end)..]
    }

    /// Finished heads.
    #[must_use]
    pub fn heads(&self) -> usize {
        self.ends.len()
    }

    /// Ranges of KV head `head`, in rising order.
    ///
    /// # Panics
    /// Where there is no such head.
    #[must_use]
    pub fn head(&self, head: usize) -> &[TokenRange] {
        let start = if head == 0 { 0 } else { self.ends[head - 1].0 };
        &self.ranges[start..self.ends[head].0]
    }

    /// Rows selected for KV head `head`.
    #[must_use]
    pub fn rows(&self, head: usize) -> usize {
        self.head(head).iter().map(|range| range.count as usize).sum()
    }

    /// Rows selected for all heads together.
    #[must_use]
    pub fn total_rows(&self) -> usize {
        self.ranges.iter().map(|range| range.count as usize).sum()
    }

    /// Tokens of KV head `head`, one by one, in rising order.
    pub fn tokens(&self, head: usize) -> impl Iterator<Item = u32> + '_ {
        self.head(head).iter().flat_map(|range| range.first..range.end())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn adjacent_ranges_of_a_head_become_one_and_heads_stay_apart() {
        let mut selection = Selection::new();
        selection.push(4, 6);
        selection.push(6, 7);
        selection.push(9, 9);
        selection.push(10, 12);
        selection.finish_head();
        selection.push(12, 13);
        selection.finish_head();
        selection.finish_head();
        assert_eq!(selection.heads(), 3);
        assert_eq!(
            selection.head(0),
            [TokenRange { first: 4, count: 3 }, TokenRange { first: 10, count: 2 }]
        );
        assert_eq!(selection.head(1), [TokenRange { first: 12, count: 1 }]);
        assert_eq!(selection.head(2), []);
        assert_eq!((selection.rows(0), selection.total_rows()), (5, 6));
        assert_eq!(selection.tokens(0).collect::<Vec<_>>(), [4, 5, 6, 10, 11]);
    }

    #[test]
    #[should_panic(expected = "sorted and disjoint")]
    fn a_range_that_goes_back_is_a_defect() {
        let mut selection = Selection::new();
        selection.push(4, 6);
        selection.push(5, 8);
    }
}
