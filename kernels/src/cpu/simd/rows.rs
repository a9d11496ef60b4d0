//! Pointers to scattered rows, a block at a time, with the block after it.

use crate::run::Run;

/// Rows of a block: far enough ahead to hide memory, few enough not to fill the queue of outstanding lines.
pub(super) const BLOCK: usize = 16;
const LINE: usize = 64;

/// Goes through the rows of all runs in blocks, whatever runs they come from.
pub(super) struct Blocks<'a> {
    runs: std::slice::Iter<'a, Run>,
    /// The next row of the run at hand, and how many it has left.
    at: *const u8,
    left: usize,
    row_bytes: usize,
    now: [*const u8; BLOCK],
    count: usize,
    ahead: [*const u8; BLOCK],
    count_ahead: usize,
}

impl<'a> Blocks<'a> {
    /// Stands at the first block.
    #[inline(always)]
    pub(super) fn new(runs: &'a [Run], row_bytes: usize) -> Self {
        let nowhere = [std::ptr::null(); BLOCK];
        let (runs, at) = (runs.iter(), std::ptr::null());
        let mut blocks =
            Self { runs, at, left: 0, row_bytes, now: nowhere, count: 0, ahead: nowhere, count_ahead: 0 };
        blocks.advance();
        blocks.advance();
        blocks
    }

    /// The rows of this block; none after the last one.
    #[inline(always)]
    pub(super) fn rows(&self) -> &[*const u8] {
        &self.now[..self.count]
    }

    /// `N` rows of this block from `first` on; where the block ends, its last row over and over.
    #[inline(always)]
    pub(super) fn tile<const N: usize>(&self, first: usize) -> [*const u8; N] {
        const { assert!(BLOCK.is_multiple_of(N)) };
        let mut tile = [std::ptr::null(); N];
        tile.copy_from_slice(&self.now[first..first + N]);
        tile
    }

    /// The rows of the block after this one.
    #[inline(always)]
    pub(super) fn ahead(&self) -> &[*const u8] {
        &self.ahead[..self.count_ahead]
    }

    /// Goes on to the next block.
    #[inline(always)]
    pub(super) fn advance(&mut self) {
        (self.now, self.count) = (self.ahead, self.count_ahead);
        let mut n = 0;
        while n < BLOCK {
            if self.left == 0 {
                let Some(run) = self.runs.next() else { break };
                (self.at, self.left) = (run.rows_ptr, run.rows);
                continue;
            }
            let take = self.left.min(BLOCK - n);
            for row in &mut self.ahead[n..n + take] {
                *row = self.at;
                self.at = self.at.wrapping_add(self.row_bytes);
            }
            self.left -= take;
            n += take;
        }
        if n > 0 {
            let last = self.ahead[n - 1];
            self.ahead[n..].fill(last);
        }
        self.count_ahead = n;
    }
}

/// Asks for `bytes` bytes from `at` on.
#[inline(always)]
pub(super) fn prefetch<const NEAR: bool>(at: *const u8, bytes: usize) {
    let skew = at.addr() % LINE;
    let first = at.wrapping_sub(skew);
    for line in (0..bytes + skew).step_by(LINE) {
        super::prefetch::<NEAR>(first.wrapping_add(line));
    }
}
