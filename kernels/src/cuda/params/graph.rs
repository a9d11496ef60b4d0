//! What graph mode's kernels take. Every address is fixed when a graph is captured; what changes is read from memory at each replay.

use bytemuck::{Pod, Zeroable};

/// In a page table: no page. In a residency record: no row.
pub const NO_PAGE: u32 = u32::MAX;

/// Begins a KV head's residency record; `count` [`ResidencyEntry`]s follow, ascending by token.
///
/// Who writes a record changes `version` first, to one that nobody expects, and to the new one last; and rewrites neither the record nor
/// the slots that it names while a kernel that expects the old version may run.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
pub struct ResidencyHeader {
    /// The record holds where this is what [`ResolveParams::expected`] leads to.
    pub version: u64,
    /// How many entries.
    pub count: u32,
    /// 0.
    pub pad: u32,
}

/// A token whose row is in the slab.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
pub struct ResidencyEntry {
    /// Position in the sequence.
    pub token: u32,
    /// Row of the slab.
    pub slot: u32,
}

/// Where a sequence stands, in device memory: written before each replay.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
pub struct Position {
    /// Tokens `0..sinks` are the engine's own.
    pub sinks: u32,
    /// Tokens `first_window..tokens` are the engine's own, too.
    pub first_window: u32,
    /// Tokens of the sequence, with the one that is being computed.
    pub tokens: u32,
    /// 0.
    pub pad: u32,
}

/// Of `resolve_attend`: attention of one sequence over the selected rows and the engine's own ones, in one layer. A selected row is read
/// from the slab where the residency record has it, else over the link from the session's extents: a miss. Ids among the engine's own
/// tokens are passed over.
#[derive(Debug, Clone, Copy, Default, PartialEq, Pod, Zeroable)]
#[repr(C)]
pub struct ResolveParams {
    /// Address of f32 `[kv_heads * group][d]`.
    pub queries: u64,
    /// Address of f32 `[splits][kv_heads * group][d]`. With more than one split these are parts, for `lse_merge`.
    pub out: u64,
    /// Address of f32 `[splits][kv_heads * group]`.
    pub lse: u64,
    /// Address of u32 `[kv_heads][ids_stride]`: selected tokens, each once, in any order.
    pub ids: u64,
    /// Address of u32 `[kv_heads]`: how many.
    pub counts: u64,
    /// Address of u32 `[kv_heads]`: gets how many ids were not in the slab; or 0.
    pub misses: u64,
    /// Address of a [`Position`].
    pub position: u64,
    /// Address of `[kv_heads]` residency records; 0: nothing is resident.
    pub residency: u64,
    /// Address of the u64 version with which records hold.
    pub expected: u64,
    /// Address of the slab's row 0.
    pub slab: u64,
    /// Address of u32 `[kv_heads][page_capacity]`: the page of each block of `page_rows` tokens, or [`NO_PAGE`].
    pub pages: u64,
    /// Address of u64 `[extent_count]`: the address of each extent, 0 for one that is not mapped.
    pub extents: u64,
    /// Address of the rows of tokens `0..`.
    pub sinks: u64,
    /// Address of the window's rows: a ring, token `t` at row `t % window_rows`.
    pub window: u64,
    /// Address of a u32 that gets [`super::FAILED_RANGE`] when a row was left out, and is never cleared; or 0.
    pub failed: u64,
    /// Bytes from record to record.
    pub residency_stride: u64,
    /// Bytes from KV head to KV head in `sinks`.
    pub sinks_stride: u64,
    /// Bytes from KV head to KV head in `window`.
    pub window_stride: u64,
    /// Code of the rows' storage type.
    pub dtype: u32,
    /// Head dimension, at most [`HEAD_DIM_MAX`](crate::cuda::launch::HEAD_DIM_MAX).
    pub d: u32,
    /// Query heads per KV head.
    pub group: u32,
    /// KV heads.
    pub kv_heads: u32,
    /// Bytes from row to row: `2 * d` values.
    pub row_bytes: u32,
    /// Values from head to head in `ids`; at most so many are looked at.
    pub ids_stride: u32,
    /// Entries that a record has room for.
    pub residency_capacity: u32,
    /// Rows of the slab.
    pub slab_rows: u32,
    /// Blocks of tokens that a head's page table has room for.
    pub page_capacity: u32,
    /// Rows of a page, from 1.
    pub page_rows: u32,
    /// Pages of an extent, from 1.
    pub pages_per_extent: u32,
    /// How many extents.
    pub extent_count: u32,
    /// Rows of the window's ring; 0: there is no window.
    pub window_rows: u32,
    /// [`tile_rows`](crate::cuda::launch::tile_rows).
    pub tile_rows: u32,
    /// Blocks that share one head's rows, from 1.
    pub splits: u32,
    /// What scores are multiplied by: usually `1 / sqrt(d)`.
    pub scale: f32,
}

/// Begins a report; u32 counts `[heads]`, u32 misses `[heads]` and u32 ids `[heads][capacity]` follow.
///
/// Who reads one looks at `number` before and after: if both are the number that it waits for, what is between is whole.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
pub struct ReportHeader {
    /// Number of the report, from 1; 0 while it is being written.
    pub number: u64,
    /// [`ReportParams::sequence`].
    pub sequence: u64,
    /// [`ReportParams::layer`].
    pub layer: u32,
    /// KV heads.
    pub heads: u32,
    /// Values from head to head in the ids.
    pub capacity: u32,
    /// [`Position::tokens`].
    pub tokens: u32,
}

impl ReportHeader {
    /// Bytes of a report of that many KV heads with that many ids each at most.
    #[must_use]
    pub const fn report_bytes(heads: u32, capacity: u32) -> u64 {
        size_of::<Self>() as u64 + heads as u64 * 4 * (2 + capacity as u64)
    }
}

/// Of `report`: writes what was selected into a mailbox in mapped host memory, for the daemon.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
pub struct ReportParams {
    /// Address of u32 `[heads][capacity]`.
    pub ids: u64,
    /// Address of u32 `[heads]`.
    pub counts: u64,
    /// Address of u32 `[heads]`; 0: none is reported.
    pub misses: u64,
    /// Address of a [`Position`].
    pub position: u64,
    /// Address of the u64 number of the last report; each report adds 1. All that write to one mailbox have it in common, and run one
    /// after the other.
    pub counter: u64,
    /// Address of `slots` reports: report `r` goes to slot `r % slots`.
    pub mailbox: u64,
    /// Goes into the report.
    pub sequence: u64,
    /// Reports that the mailbox has room for, from 1.
    pub slots: u32,
    /// Bytes from report to report, a multiple of 8 and at least [`ReportHeader::report_bytes`].
    pub slot_bytes: u32,
    /// Goes into the report.
    pub layer: u32,
    /// KV heads.
    pub heads: u32,
    /// Ids that each head has room for.
    pub capacity: u32,
    /// 0.
    pub pad: u32,
}

const _: () = {
    assert!(size_of::<ResidencyHeader>() == 16);
    assert!(size_of::<ResidencyEntry>() == 8);
    assert!(size_of::<Position>() == 16);
    assert!(size_of::<ResolveParams>() == 208);
    assert!(size_of::<ReportHeader>() == 32);
    assert!(size_of::<ReportParams>() == 80);
};
