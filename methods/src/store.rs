//! Where a method reads what it keeps of a sequence, and the rows themselves.

use std::ops::Range;

/// What is kept of one sequence and layer. Threads that [help](crate::Scratch::with_help) read it side by side.
pub trait Store: Sync {
    /// Digest block of a page, [`crate::Method::digest_bytes`] long. `page` counts from the sequence's start.
    fn page(&self, kv_head: usize, page: usize) -> &[u8];

    /// Digest blocks of pages from `first` on that lie one behind the other: at least one, at most `most`. Scanning
    /// stretches costs less than scanning pages.
    fn stretch(&self, kv_head: usize, first: usize, most: usize) -> &[u8] {
        let _ = most;
        self.page(kv_head, first)
    }

    /// State of a KV head, [`crate::Method::head_state_bytes`] long.
    fn state(&self, kv_head: usize) -> &[u8];

    /// Memory of a KV head, [`crate::Method::memory_bytes`] long; empty where the method keeps none.
    fn memory(&self, kv_head: usize) -> &[u8] {
        let _ = kv_head;
        &[]
    }

    /// The same, to change.
    fn memory_mut(&mut self, kv_head: usize) -> &mut [u8] {
        let _ = kv_head;
        &mut []
    }

    /// What the sequence keeps for all its layers together, [`crate::Method::sequence_bytes`] long. Only [`crate::Method::steer`] changes it:
    /// what a selection writes there may be lost.
    fn sequence(&mut self) -> &mut [u8] {
        &mut []
    }

    /// What a selection for a KV head leaves for [`crate::Method::steer`], [`crate::Method::note_bytes`] long.
    fn note(&mut self, kv_head: usize) -> &mut [u8] {
        let _ = kv_head;
        &mut []
    }
}

/// The store of a method that keeps nothing.
#[derive(Debug, Clone, Copy, Default)]
pub struct NoStore;

impl Store for NoStore {
    fn page(&self, _kv_head: usize, _page: usize) -> &[u8] {
        &[]
    }

    fn state(&self, _kv_head: usize) -> &[u8] {
        &[]
    }
}

/// The rows of one sequence and layer, in host memory. A client may write to them at any time: what comes back can be
/// wrong then, and nothing worse.
pub trait RowSource {
    /// Unscaled scores of queries `[queries][d]` against the keys of `tokens`: `out[i · tokens + t] = q_i·k_t`. Rows that are
    /// not there (a pool dropped them) score `−∞`.
    fn scores(&self, kv_head: usize, tokens: Range<usize>, queries: &[f32], out: &mut [f32]);

    /// Keys of `tokens` as f32, `[tokens][d]`; zeros where a row is not there.
    fn keys(&self, kv_head: usize, tokens: Range<usize>, out: &mut [f32]);
}

/// The rows for methods that did not ask for any ([`crate::Needs::rows`]): no row is there.
#[derive(Debug, Clone, Copy, Default)]
pub struct NoRows;

impl RowSource for NoRows {
    fn scores(&self, _kv_head: usize, _tokens: Range<usize>, _queries: &[f32], out: &mut [f32]) {
        out.fill(f32::NEG_INFINITY);
    }

    fn keys(&self, _kv_head: usize, _tokens: Range<usize>, out: &mut [f32]) {
        out.fill(0.0);
    }
}
