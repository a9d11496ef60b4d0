//! The structures that kernels take by value, as `kernels/cuda/*.cu` lays them out.
//!
//! Every `u64` that is called an address is one that the device can read; 0 stands for what is left out, where that is allowed.

use bytemuck::{Pod, Zeroable};

mod codes;
mod graph;

pub use codes::{CodeRestParams, CodeScoresParams, CodeShape};
pub use graph::{
    NO_PAGE, Position, ReportHeader, ReportParams, ResidencyEntry, ResidencyHeader, ResolveParams,
};

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

/// Of `lse_merge`: attention over the union of disjoint sets of rows, `out ← Σ_i out_i·e^lse_i / Σ_i e^lse_i`. A part that covers
/// nothing (`lse = -inf`) adds nothing; of nothing but such parts `out` is 0.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
pub struct MergeParams {
    /// Address of f32 `[heads][d]`; may be that of a part.
    pub out: u64,
    /// Address of f32 `[heads]`; likewise.
    pub lse: u64,
    /// Address of f32 `[heads][d]`: one part that lies apart; 0: there is none.
    pub first_out: u64,
    /// Address of f32 `[heads]`: its log-sums.
    pub first_lse: u64,
    /// Address of f32 `[parts][heads][d]`.
    pub parts_out: u64,
    /// Address of f32 `[parts][heads]`.
    pub parts_lse: u64,
    /// How many parts, but for the first one.
    pub parts: u32,
    /// Query heads, all members together.
    pub heads: u32,
    /// Head dimension.
    pub d: u32,
    /// 0.
    pub pad: u32,
}

/// Of `top_k`: the ids of the largest scores of every head, ascending; of equal scores the lower id, NaN counts as `-inf`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
pub struct TopKParams {
    /// Address of f32 `[heads][stride]`.
    pub scores: u64,
    /// Address of u32 `[heads]`: scores of each head; 0: `n` of all. At most `stride` are looked at.
    pub lengths: u64,
    /// Address of u32 `[heads][ids_stride]`.
    pub ids: u64,
    /// Address of u32 `[heads]`: gets how many ids each head has, the least of `k`, `ids_stride` and its scores.
    pub counts: u64,
    /// Heads.
    pub heads: u32,
    /// Scores of each head, without `lengths`.
    pub n: u32,
    /// Values from head to head in `scores`.
    pub stride: u32,
    /// Ids wanted of each head.
    pub k: u32,
    /// Values from head to head in `ids`.
    pub ids_stride: u32,
    /// 0.
    pub pad: u32,
}

/// Of `partial_scores`: raw dot products with the keys of all rows of each head's runs, in their order.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
pub struct ScoresParams {
    /// Address of f32 `[heads][group][d]`.
    pub queries: u64,
    /// Address of [`RowRun`]s.
    pub runs: u64,
    /// Address of u32 `[heads + 1]`: the first run of each head, and the end.
    pub offsets: u64,
    /// Address of f32 `[heads][group][out_stride]`. Rows beyond `out_stride` are passed over.
    pub out: u64,
    /// Code of the rows' storage type.
    pub dtype: u32,
    /// Head dimension, at most [`super::launch::HEAD_DIM_MAX`].
    pub d: u32,
    /// Queries of each head.
    pub group: u32,
    /// Heads: those of all members, one behind the other.
    pub heads: u32,
    /// Bytes from row to row. Only the first `d` values of a row are read.
    pub row_bytes: u32,
    /// Values from query to query in `out`.
    pub out_stride: u32,
    /// [`super::launch::tile_rows`].
    pub tile_rows: u32,
    /// Blocks that share one head's rows, from 1.
    pub splits: u32,
}

/// Of `quest_bounds`: `out = Σ_j max(q_j·min_j, q_j·max_j)` of every page.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
pub struct QuestParams {
    /// Address of f32 `[heads][group][d]`.
    pub queries: u64,
    /// Address of `[heads][stride][2][d]` values: the minima of each channel over a page's keys, then the maxima.
    pub minmax: u64,
    /// Address of f32 `[heads][group][out_stride]`. Pages beyond `out_stride` are passed over.
    pub out: u64,
    /// Address of u32 `[heads]`: pages of each head; 0: `pages` of all. At most `stride` are looked at.
    pub lengths: u64,
    /// Code of the digest's storage type.
    pub dtype: u32,
    /// Head dimension, at most [`super::launch::HEAD_DIM_MAX`].
    pub d: u32,
    /// Queries of each head.
    pub group: u32,
    /// Heads.
    pub heads: u32,
    /// Pages of each head, without `lengths`.
    pub pages: u32,
    /// Pages from head to head in `minmax`.
    pub stride: u32,
    /// Values from query to query in `out`.
    pub out_stride: u32,
    /// [`super::launch::tile_rows`].
    pub tile_rows: u32,
    /// Blocks that share one head's pages, from 1.
    pub splits: u32,
    /// 0.
    pub pad: u32,
}

/// Of `hamming`: in how many bits each code differs from each query.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
pub struct HammingParams {
    /// Address of u64 `[heads][group][words]`.
    pub queries: u64,
    /// Address of u64 `[heads][stride][words]`.
    pub codes: u64,
    /// Address of u32 `[heads][group][out_stride]`. Rows beyond `out_stride` are passed over.
    pub out: u64,
    /// Address of u32 `[heads]`: rows of each head; 0: `rows` of all. At most `stride` are looked at.
    pub lengths: u64,
    /// Heads.
    pub heads: u32,
    /// Queries of each head.
    pub group: u32,
    /// 64-bit words of a code.
    pub words: u32,
    /// Rows of each head, without `lengths`.
    pub rows: u32,
    /// Codes from head to head in `codes`.
    pub stride: u32,
    /// Values from query to query in `out`.
    pub out_stride: u32,
}

/// Of `dequantise`: rows of any format to plain values.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
pub struct DequantiseParams {
    /// Address of the rows, in the layout of [`crate::quantise::Format`]; a multiple of 4.
    pub src: u64,
    /// Address of the values.
    pub dst: u64,
    /// Bytes from row to row in `src`, a multiple of 4.
    pub src_stride: u64,
    /// Bytes from row to row in `dst`.
    pub dst_stride: u64,
    /// Rows.
    pub rows: u32,
    /// Values of a row: see [`crate::quantise::Format::row_bytes`].
    pub n: u32,
    /// [`crate::quantise::Format::kernel_code`].
    pub format: u32,
    /// Values that share a scale: [`crate::quantise::Format::group`].
    pub group: u32,
    /// Code of the storage type of `dst`.
    pub dtype: u32,
    /// 0.
    pub pad: u32,
}

const _: () = {
    assert!(size_of::<RowRun>() == 16);
    assert!(size_of::<GatherRun>() == 24);
    assert!(size_of::<GatherParams>() == 16);
    assert!(size_of::<AttendParams>() == 144);
    assert!(size_of::<MergeParams>() == 64);
    assert!(size_of::<TopKParams>() == 56);
    assert!(size_of::<ScoresParams>() == 64);
    assert!(size_of::<QuestParams>() == 72);
    assert!(size_of::<HammingParams>() == 56);
    assert!(size_of::<DequantiseParams>() == 56);
};
