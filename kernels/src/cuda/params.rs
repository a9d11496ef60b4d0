//! The structures that kernels take by value, as `kernels/cuda/*.cu` lays them out.
//!
//! Every `u64` that is called an address is one that the device can read; 0 stands for what is left out, where that is allowed.

use bytemuck::{Pod, Zeroable};

/// Rows one behind the other in memory, each `[k(d) | v(d)]`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
pub struct RowRun {
    /// Address of the first row; a multiple of the bytes of a value, best of 16.
    pub address: u64,
    /// How many rows.
    pub rows: u32,
    /// 0.
    pub pad: u32,
}

/// Bytes to be copied from one place to another.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
pub struct GatherRun {
    /// Where they are: device memory, or host memory that is mapped.
    pub src: u64,
    /// Where they go.
    pub dst: u64,
    /// How many. Fastest where this and both addresses are multiples of 16.
    pub bytes: u64,
}

/// Of `gather_runs`, which copies every run. Runs must not overlap one another's destinations.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
pub struct GatherParams {
    /// Address of [`GatherRun`] `[count]`.
    pub runs: u64,
    /// How many runs.
    pub count: u32,
    /// 0.
    pub pad: u32,
}

/// In [`AttendParams::failed`]: the status word was another one, so the table was not read.
pub const FAILED_STATUS: u32 = 1;
/// In [`AttendParams::failed`]: a run of the table led outside the slab or the extents, and was left out.
pub const FAILED_RANGE: u32 = 2;

/// Of `attend`: for every member and query head `out = Σ_t softmax_t(scale · q·k_t) · v_t` and `lse = ln Σ_t exp(scale · q·k_t)`, over
/// the rows that the block table names and the local runs. Without rows `out` is 0 and `lse` is `-inf`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Pod, Zeroable)]
#[repr(C)]
pub struct AttendParams {
    /// Address of f32 `[members][kv_heads * group][d]`.
    pub queries: u64,
    /// Address of f32 `[splits][members][kv_heads * group][d]`. With more than one split these are parts, for `lse_merge`.
    pub out: u64,
    /// Address of f32 `[splits][members][kv_heads * group]`.
    pub lse: u64,
    /// Address of an answer's block table: head entries `[members][kv_heads]`, then `table_runs` runs, as in `kvoyant_protocol::wire`.
    /// 0: local runs only.
    pub table: u64,
    /// Address of the slab's row 0.
    pub slab: u64,
    /// Address of u64 `[extent_count]`: the address of each extent, 0 for one that is not mapped.
    pub extents: u64,
    /// Address of [`RowRun`]s.
    pub local_runs: u64,
    /// Address of u32 `[members * kv_heads + 1]`: the first local run of each head, and the end. 0: there are none.
    pub local_offsets: u64,
    /// Address of the u64 that says whether the table is there; 0: it is.
    pub status: u64,
    /// The value of `status` with which the table may be read. Else only local runs are attended.
    pub expected: u64,
    /// Address of a u32 that gets [`FAILED_STATUS`] and [`FAILED_RANGE`] and is never cleared; or 0.
    pub failed: u64,
    /// Code of the rows' storage type.
    pub dtype: u32,
    /// Head dimension, at most [`super::launch::HEAD_DIM_MAX`].
    pub d: u32,
    /// Query heads per KV head.
    pub group: u32,
    /// KV heads.
    pub kv_heads: u32,
    /// Members of the batch.
    pub members: u32,
    /// Bytes from row to row: `2 * d` values.
    pub row_bytes: u32,
    /// Rows of the slab.
    pub slab_rows: u32,
    /// Rows of an extent.
    pub rows_per_extent: u32,
    /// How many extents.
    pub extent_count: u32,
    /// Runs that the table has room for.
    pub table_runs: u32,
    /// Rows that a block loads at once: [`super::launch::tile_rows`].
    pub tile_rows: u32,
    /// Blocks that share one head's rows, from 1.
    pub splits: u32,
    /// What scores are multiplied by: usually `1 / sqrt(d)`.
    pub scale: f32,
    /// 0.
    pub pad: u32,
}

const _: () = {
    assert!(size_of::<RowRun>() == 16);
    assert!(size_of::<GatherRun>() == 24);
    assert!(size_of::<GatherParams>() == 16);
    assert!(size_of::<AttendParams>() == 144);
};
