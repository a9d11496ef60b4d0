//! Pointers to scattered rows, a chunk at a time, and the memory behind them asked for in time.

use crate::run::Run;

/// Most rows of a chunk.
const MOST: usize = 64;
/// Bytes of a chunk: a few of them fit into any second-level cache.
const CHUNK_BYTES: usize = 32 << 10;
const LINE: usize = 64;

/// Rows of a chunk: a multiple of every register's lanes.
pub(super) fn chunk_rows(row_bytes: usize) -> usize {
    (CHUNK_BYTES / row_bytes).next_multiple_of(16).clamp(16, MOST)
}

/// Rows that are worked on together.
pub(super) struct Chunk {
    rows: [*const u8; MOST],
    count: usize,
}

impl Chunk {
    /// Most rows.
    pub(super) const MOST: usize = MOST;
    /// Of no rows.
    pub(super) const EMPTY: Self = Self { rows: [std::ptr::null(); MOST], count: 0 };

    #[inline(always)]
    pub(super) fn rows(&self) -> &[*const u8] {
        &self.rows[..self.count]
    }

    /// `N` rows from `first` on; where the chunk ends, its last row over and over.
    #[inline(always)]
    pub(super) fn tile<const N: usize>(&self, first: usize) -> [*const u8; N] {
        const { assert!(MOST.is_multiple_of(N)) };
        let mut tile = [std::ptr::null(); N];
        tile.copy_from_slice(&self.rows[first..first + N]);
        tile
    }
}

/// Goes through the rows of all runs, whatever runs they come from.
pub(super) struct Rows<'a> {
    runs: std::slice::Iter<'a, Run>,
    /// The next row of the run at hand, and how many it has left.
    at: *const u8,
    left: usize,
    row_bytes: usize,
    /// Rows of a chunk.
    size: usize,
}

impl<'a> Rows<'a> {
    /// Stands at the first row; `size` is that of [`chunk_rows`].
    pub(super) fn new(runs: &'a [Run], row_bytes: usize, size: usize) -> Self {
        Self { runs: runs.iter(), at: std::ptr::null(), left: 0, row_bytes, size }
    }

    /// Puts the next rows into a chunk: none after the last one.
    pub(super) fn fill(&mut self, chunk: &mut Chunk) {
        let mut n = 0;
        while n < self.size {
            if self.left == 0 {
                let Some(run) = self.runs.next() else { break };
                (self.at, self.left) = (run.rows_ptr, run.rows);
                continue;
            }
            let take = self.left.min(self.size - n);
            for row in &mut chunk.rows[n..n + take] {
                *row = self.at;
                self.at = self.at.wrapping_add(self.row_bytes);
            }
            self.left -= take;
            n += take;
        }
        if n > 0 {
            let last = chunk.rows[n - 1];
            chunk.rows[n..].fill(last);
        }
        chunk.count = n;
    }
}

/// Rows that are needed soon, asked for a few lines at a time.
///
/// In the order of their addresses, whole, into the second-level cache, and evenly over the work on the chunk before: measured on
/// Zen 4, every other way (into the first level, keys before values, some lines only) left memory idle for a third of the time.
pub(super) struct Ahead<'a> {
    rows: std::slice::Iter<'a, *const u8>,
    row: *const u8,
    /// The row's next line, and how many it has.
    line: usize,
    lines: usize,
}

impl<'a> Ahead<'a> {
    #[inline(always)]
    pub(super) fn new(chunk: &'a Chunk, row_bytes: usize) -> Self {
        let lines = row_bytes.div_ceil(LINE);
        Self { rows: chunk.rows().iter(), row: std::ptr::null(), line: lines, lines }
    }

    /// Lines of a row.
    #[inline(always)]
    pub(super) fn lines(&self) -> usize {
        self.lines
    }

    /// Asks for the next `n` lines, as far as there are any.
    #[inline(always)]
    pub(super) fn ask(&mut self, n: usize) {
        for _ in 0..n {
            if self.line == self.lines {
                let Some(row) = self.rows.next() else { return };
                (self.row, self.line) = (*row, 0);
            }
            super::prefetch::<false>(self.row.wrapping_add(self.line * LINE));
            self.line += 1;
        }
    }
}
