//! Rows of one sequence and layer where they lie, in host memory: for methods that look at keys, and for attention on the
//! lane.
//!
//! The client may write to its extents at any time. What is read there becomes a number and decides about no address, so
//! that a client that does so gets wrong scores of its own rows, and nobody else gets anything.

use std::cell::RefCell;
use std::ops::Range;

use kvoyant_kernels::{AttendScratch, Kernels, RowLayout, Run};
use kvoyant_methods::{RowSource, TokenRange};
use kvoyant_protocol::control::PageWord;
use kvoyant_protocol::wire::Status;

use crate::tiers::arena::SessionArena;
use crate::tiers::heap::{Heap, Region};

/// Memory that is kept from one use to the next.
#[derive(Debug, Default)]
pub struct RowScratch {
    runs: Vec<Run>,
    attend: AttendScratch,
    bytes: Vec<u8>,
}

/// Where the pages of one sequence and layer are.
#[derive(Debug, Clone, Copy)]
pub struct LayerPages {
    /// The sequence's page table, `[layer][KV head][capacity]`.
    pub table: Region,
    /// Pages of each head's part of the table.
    pub capacity: usize,
    /// The layer's first head among all layers' heads.
    pub first_head: usize,
    /// Rows appended. What lies behind them is not there.
    pub rows: usize,
}

/// See the module.
#[derive(Debug)]
pub struct PageRows<'a> {
    arena: &'a SessionArena,
    tables: &'a Heap,
    layout: RowLayout,
    pages: LayerPages,
    scratch: RefCell<RowScratch>,
}

impl<'a> PageRows<'a> {
    /// The rows behind these pages.
    #[must_use]
    pub fn new(
        arena: &'a SessionArena,
        tables: &'a Heap,
        layout: RowLayout,
        pages: LayerPages,
        scratch: RowScratch,
    ) -> Self {
        Self { arena, tables, layout, pages, scratch: RefCell::new(scratch) }
    }

    /// The memory that it was given.
    #[must_use]
    pub fn into_scratch(self) -> RowScratch {
        self.scratch.into_inner()
    }

    /// Calls `each` with the first token, the extent, the offset there and the number of the rows of each page's part of
    /// these tokens, where the page is there.
    fn parts(&self, kv_head: usize, tokens: Range<usize>, mut each: impl FnMut(usize, usize, usize, usize)) {
        let geometry = self.arena.geometry();
        let page_rows = geometry.page_rows;
        let base = (self.pages.first_head + kv_head) * self.pages.capacity;
        let end = tokens.end.min(self.pages.rows);
        let mut token = tokens.start;
        while token < end {
            let count = (end - token).min(page_rows - token % page_rows);
            let word = PageWord::of(self.tables.word(self.pages.table, base + token / page_rows));
            if let Some(page) = word.page() {
                let (extent, offset) = geometry.locate(page * page_rows as u32 + (token % page_rows) as u32);
                each(token, extent, offset, count);
            }
            token += count;
        }
    }

    /// Why rows of these tokens cannot be read here, if some are on disk or lost.
    #[must_use]
    pub fn away(&self, kv_head: usize, tokens: &[TokenRange]) -> Option<Status> {
        let page_rows = self.arena.geometry().page_rows as u32;
        let base = (self.pages.first_head + kv_head) * self.pages.capacity;
        let pages = tokens.iter().flat_map(|range| range.first / page_rows..range.end().div_ceil(page_rows));
        let mut words = pages
            .filter(|page| (*page as usize) < self.pages.capacity)
            .map(|page| PageWord::of(self.tables.word(self.pages.table, base + page as usize)));
        words.find_map(|word| match word {
            PageWord::Lost => Some(Status::RowsLost),
            PageWord::Spilled => Some(Status::HostFull),
            PageWord::Page(_) | PageWord::None => None,
        })
    }

    /// Adds the runs of these tokens' rows; returns how many rows they have.
    fn runs(&self, kv_head: usize, tokens: Range<usize>, runs: &mut Vec<Run>) -> usize {
        let row_bytes = self.arena.geometry().row_bytes;
        let mut rows = 0;
        self.parts(kv_head, tokens, |_, extent, offset, count| {
            if let Ok(address) = self.arena.memory(extent).address(offset, count * row_bytes) {
                runs.push(Run::new(address.cast_const(), count));
                rows += count;
            }
        });
        rows
    }

    /// Attention of queries `[group][d]` over the rows of these tokens that are there: `out` is `[group][values]`, `lse` is
    /// `[group]`. Returns how many rows there were.
    pub fn attend(
        &self,
        kv_head: usize,
        tokens: &[TokenRange],
        queries: &[f32],
        scale: f32,
        out: &mut [f32],
        lse: &mut [f32],
    ) -> usize {
        let RowScratch { runs, attend, .. } = &mut *self.scratch.borrow_mut();
        runs.clear();
        let range = |range: &TokenRange| range.first as usize..range.end() as usize;
        let rows = tokens.iter().map(|tokens| self.runs(kv_head, range(tokens), runs)).sum();
        // SAFETY: every run lies in an extent of the session's, by an accessor that checked it, and the arena keeps its
        // extents mapped while it is borrowed. The session's client may write there meanwhile, which the kernel allows.
        unsafe {
            let (kernels, group) = (Kernels::best(), lse.len());
            kernels.attend_layout(self.layout, queries, group, scale, runs, attend, out, lse);
        }
        rows
    }
}

impl RowSource for PageRows<'_> {
    fn scores(&self, kv_head: usize, tokens: Range<usize>, queries: &[f32], out: &mut [f32]) {
        out.fill(f32::NEG_INFINITY);
        let RowScratch { runs, attend, .. } = &mut *self.scratch.borrow_mut();
        let (first, stride) = (tokens.start, tokens.len());
        let group = queries.len() / self.layout.key_values();
        let row_bytes = self.arena.geometry().row_bytes;
        let score = |runs: &mut Vec<Run>, attend: &mut AttendScratch, out: &mut [f32]| {
            if !runs.is_empty() {
                // SAFETY: as in `attend`.
                unsafe {
                    Kernels::best().scores_layout(self.layout, queries, group, runs, attend, out, stride);
                }
                runs.clear();
            }
        };
        runs.clear();
        // Pages that follow one another in the sequence are scored in one go.
        let (mut begin, mut next) = (first, first);
        self.parts(kv_head, tokens, |token, extent, offset, count| {
            let Ok(address) = self.arena.memory(extent).address(offset, count * row_bytes) else { return };
            if token != next {
                score(runs, attend, &mut out[begin - first..]);
                begin = token;
            }
            runs.push(Run::new(address.cast_const(), count));
            next = token + count;
        });
        if !runs.is_empty() {
            score(runs, attend, &mut out[begin - first..]);
        }
    }

    fn keys(&self, kv_head: usize, tokens: Range<usize>, out: &mut [f32]) {
        out.fill(0.0);
        let d = self.layout.key_values();
        let row_bytes = self.arena.geometry().row_bytes;
        let bytes = &mut self.scratch.borrow_mut().bytes;
        let first = tokens.start;
        self.parts(kv_head, tokens, |token, extent, offset, count| {
            bytes.resize(count * row_bytes, 0);
            if self.arena.memory(extent).read(offset, bytes).is_ok() {
                self.layout.decode_keys(bytes, &mut out[(token - first) * d..(token - first + count) * d]);
            }
        });
    }
}
