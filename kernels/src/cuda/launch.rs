//! How kernels are launched: beside their parameters, so that every caller does it alike.

use super::params::{
    AttendParams, CodeRestParams, CodeScoresParams, DequantiseParams, GatherParams, HammingParams,
    MergeParams, QuestParams, ReportParams, ResolveParams, ScoresParams, TopKParams,
};
use crate::Dtype;

/// Threads of a block.
const THREADS: u32 = 128;
/// Largest head dimension of attention and scores.
pub const HEAD_DIM_MAX: u32 = 2 * THREADS;
/// Most values of a value whose means can be added up.
pub const VALUE_DIM_MAX: u32 = SHARED_MAX / 4 / GROUP_MAX;
/// Query heads that one block attends for; a larger group is split over blocks.
const GROUP_MAX: u32 = 8;
/// Shared memory of a block that needs no asking for.
const SHARED_MAX: u32 = 48 << 10;
/// Bytes that a warp copies at once.
const GATHER_CHUNK: u64 = 4096;
/// Runs that a warp takes at once.
const GATHER_TOGETHER: u32 = 4;
/// Most blocks of a copy: enough to keep any link busy.
const GATHER_BLOCKS: u32 = 1024;
/// Threads of a block that selects.
const SELECT_THREADS: u32 = 256;
/// Most blocks in y or z that a device takes, rounded down.
const GRID_MAX: u32 = 1 << 15;

/// The shape of a launch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Launch {
    /// Blocks.
    pub grid: (u32, u32, u32),
    /// Threads of a block.
    pub block: (u32, u32, u32),
    /// Bytes of dynamic shared memory.
    pub shared_bytes: u32,
}

impl Launch {
    fn blocks(x: u32, y: u32, z: u32, shared_bytes: u32) -> Self {
        Self { grid: (x.max(1), y.max(1), z.max(1)), block: (THREADS, 1, 1), shared_bytes }
    }
}

/// Bytes of shared memory for tiles of `rows` rows of which `bytes` are staged: as `carve_tile` in `common.cuh` lays them out.
fn tile_bytes(rows: u32, bytes: u32) -> u32 {
    let stride = (bytes.div_ceil(16) | 1) * 16;
    rows * stride + THREADS * 12 + 16 + (rows * 8).next_multiple_of(16)
}

/// Query heads of one block, as the kernels round them.
fn heads(group: u32) -> u32 {
    group.clamp(1, GROUP_MAX).next_power_of_two()
}

/// Bytes of shared memory for queries, scores and the running softmax.
fn softmax_bytes(rows: u32, group: u32, d: u32) -> u32 {
    heads(group) * (d + rows + 3) * 4
}

/// Rows of an attention tile for rows `[k(d) | v(d)]`: the most that fit into a block's shared memory. `None` when `d` is 0 or larger
/// than [`HEAD_DIM_MAX`].
#[must_use]
pub fn tile_rows(dtype: Dtype, d: u32, group: u32) -> Option<u32> {
    if d == 0 || d > HEAD_DIM_MAX {
        return None;
    }
    let bytes = 2 * d * dtype.bytes() as u32;
    [64, 32, 16, 8].into_iter().find(|rows| attend_bytes(*rows, bytes, group, d) <= SHARED_MAX)
}

/// Into how many parts a head's rows are best split, so that `heads` heads keep `multiprocessors` busy: `rows` is the usual number of
/// rows of a head. 1 to 32; the parts are put together by `lse_merge`.
#[must_use]
pub fn splits(heads: u32, rows: u32, multiprocessors: u32) -> u32 {
    // Four blocks fit a multiprocessor; a part of less than two tiles is not worth its merge.
    (multiprocessors * 4 / heads.max(1)).min(rows / 128).clamp(1, 32)
}

impl GatherParams {
    /// The launch of `gather_runs`; `longest` is the bytes of the longest run.
    #[must_use]
    pub fn launch(&self, longest: u64) -> Launch {
        let warps = THREADS / 32;
        let x = self.count.div_ceil(warps * GATHER_TOGETHER).min(GATHER_BLOCKS);
        let y = longest.div_ceil(GATHER_CHUNK).min(u64::from(GATHER_BLOCKS / x.max(1)));
        Launch::blocks(x, y as u32, 1, 0)
    }
}

/// Blocks for so many heads of a group of query heads.
fn head_blocks(heads: u32, group: u32) -> u32 {
    heads * group.div_ceil(GROUP_MAX)
}

/// Shared memory of attention.
fn attend_bytes(rows: u32, row_bytes: u32, group: u32, d: u32) -> u32 {
    tile_bytes(rows, row_bytes) + softmax_bytes(rows, group, d)
}

impl AttendParams {
    /// The launch of `attend`.
    #[must_use]
    pub fn launch(&self) -> Launch {
        let blocks = head_blocks(self.members * self.kv_heads, self.group);
        Launch::blocks(
            blocks,
            1,
            self.splits,
            attend_bytes(self.tile_rows, self.row_bytes, self.group, self.d),
        )
    }
}

impl ResolveParams {
    /// The launch of `resolve_attend`.
    #[must_use]
    pub fn launch(&self) -> Launch {
        let blocks = head_blocks(self.kv_heads, self.group);
        Launch::blocks(
            blocks,
            1,
            self.splits,
            attend_bytes(self.tile_rows, self.row_bytes, self.group, self.d),
        )
    }
}

impl ReportParams {
    /// The launch of `report`: one block.
    #[must_use]
    pub fn launch(&self) -> Launch {
        Launch::blocks(1, 1, 1, 0)
    }
}

impl MergeParams {
    /// The launch of `lse_merge`.
    #[must_use]
    pub fn launch(&self) -> Launch {
        Launch::blocks(self.heads, 1, 1, 0)
    }
}

impl TopKParams {
    /// The launch of `top_k`.
    #[must_use]
    pub fn launch(&self) -> Launch {
        let shared_bytes = 256 * 4 + 8 + SELECT_THREADS / 32 * 8;
        Launch { grid: (self.heads.max(1), 1, 1), block: (SELECT_THREADS, 1, 1), shared_bytes }
    }
}

impl ScoresParams {
    /// The launch of `partial_scores`.
    #[must_use]
    pub fn launch(&self) -> Launch {
        // At most a whole row is staged.
        let shared = tile_bytes(self.tile_rows, self.row_bytes) + heads(self.group) * self.d * 4;
        Launch::blocks(head_blocks(self.heads, self.group), 1, self.splits, shared)
    }
}

impl QuestParams {
    /// The launch of `quest_bounds`.
    #[must_use]
    pub fn launch(&self) -> Launch {
        let value = if self.dtype == u32::from(Dtype::F32.code()) { 4 } else { 2 };
        let shared = tile_bytes(self.tile_rows, 2 * self.d * value) + heads(self.group) * self.d * 4;
        Launch::blocks(head_blocks(self.heads, self.group), 1, self.splits, shared)
    }
}

impl CodeScoresParams {
    /// The launch of `code_scores`.
    #[must_use]
    pub fn launch(&self) -> Launch {
        let shared = GROUP_MAX * 4 + GROUP_MAX * 2 * self.shape.d.next_multiple_of(16);
        Launch::blocks(head_blocks(self.heads, self.group), 1, self.splits, shared)
    }
}

impl CodeRestParams {
    /// The launch of `code_rest`.
    #[must_use]
    pub fn launch(&self) -> Launch {
        let shared = GROUP_MAX * self.shape.value_dim * 4;
        Launch::blocks(head_blocks(self.heads, self.group), 1, self.splits, shared)
    }
}

impl HammingParams {
    /// The launch of `hamming`; at most 65,535 heads.
    #[must_use]
    pub fn launch(&self) -> Launch {
        Launch::blocks(self.stride.min(self.out_stride).div_ceil(THREADS).min(GRID_MAX), self.heads, 1, 0)
    }
}

impl DequantiseParams {
    /// The launch of `dequantise`.
    #[must_use]
    pub fn launch(&self) -> Launch {
        Launch::blocks(self.n.div_ceil(THREADS).min(GRID_MAX), self.rows.min(GRID_MAX), 1, 0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_head_dimension_that_is_allowed_has_a_tile_that_fits() {
        for dtype in Dtype::ALL {
            for d in 1..=HEAD_DIM_MAX {
                for group in [1, 2, 3, 4, 5, 8, 16] {
                    let rows = tile_rows(dtype, d, group).unwrap();
                    let row_bytes = 2 * d * dtype.bytes() as u32;
                    let params =
                        AttendParams { d, group, row_bytes, tile_rows: rows, ..AttendParams::default() };
                    assert!(params.launch().shared_bytes <= SHARED_MAX, "{dtype} {d} {group}");
                }
            }
        }
        assert_eq!(tile_rows(Dtype::F16, 0, 1), None);
        assert_eq!(tile_rows(Dtype::F16, HEAD_DIM_MAX + 1, 1), None);
    }

    #[test]
    fn copies_are_split_over_blocks_within_bounds() {
        let params = |count| GatherParams { count, ..GatherParams::default() };
        assert_eq!(params(0).launch(0).grid, (1, 1, 1));
        assert_eq!(params(64).launch(512).grid, (4, 1, 1));
        assert_eq!(params(1).launch(64 << 20).grid, (1, 1024, 1));
        assert_eq!(params(1 << 20).launch(16 << 10).grid, (1024, 1, 1));
    }

    #[test]
    fn rows_are_split_when_there_are_too_few_heads() {
        assert_eq!(splits(1, 100, 132), 1);
        assert_eq!(splits(8, 4096, 132), 32);
        assert_eq!(splits(256, 4096, 132), 2);
        assert_eq!(splits(4096, 4096, 132), 1);
    }
}
