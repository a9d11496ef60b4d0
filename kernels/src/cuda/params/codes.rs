//! What the kernels over digests in codes take.

use bytemuck::{Pod, Zeroable};

use crate::codes::CodeLayout;

/// How pages are digested: a [`CodeLayout`].
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
pub struct CodeShape {
    /// Values of a key.
    pub d: u32,
    /// Rows of a page.
    pub rows: u32,
    /// Rows that share an offset and a step.
    pub group: u32,
    /// The largest code.
    pub levels: u32,
    /// Values of a value.
    pub value_dim: u32,
    /// Bytes of a page's block.
    pub block_bytes: u32,
}

impl From<&CodeLayout> for CodeShape {
    fn from(layout: &CodeLayout) -> Self {
        Self {
            d: layout.head_dim() as u32,
            rows: layout.rows() as u32,
            group: layout.group() as u32,
            levels: u32::from(layout.bits().levels()),
            value_dim: layout.value_dim() as u32,
            block_bytes: layout.bytes() as u32,
        }
    }
}

/// Of `code_scores`: scores of all rows from their pages' digests, and margins of all groups of rows, as
/// [`Kernels::code_scores`](crate::Kernels::code_scores) gives them, to the last bit.
#[derive(Debug, Clone, Copy, Default, PartialEq, Pod, Zeroable)]
#[repr(C)]
pub struct CodeScoresParams {
    /// Address of f32 `[heads][group][d]`.
    pub queries: u64,
    /// Address of `[heads][stride]` blocks, a multiple of 4.
    pub blocks: u64,
    /// Address of f32 `[heads][group][out_stride]`. Rows beyond `out_stride` are passed over.
    pub out: u64,
    /// Address of f32 `[heads][group][margin_stride]`. Groups of rows beyond `margin_stride` are passed over.
    pub margins: u64,
    /// Address of u32 `[heads]`: pages of each head; 0: `pages` of all. At most `stride` are looked at.
    pub lengths: u64,
    /// The digests' layout.
    pub shape: CodeShape,
    /// Queries of each head.
    pub group: u32,
    /// Heads.
    pub heads: u32,
    /// Pages of each head, without `lengths`.
    pub pages: u32,
    /// Pages from head to head in `blocks`.
    pub stride: u32,
    /// Values from query to query in `out`.
    pub out_stride: u32,
    /// Values from query to query in `margins`.
    pub margin_stride: u32,
    /// Blocks that share one head's pages, from 1.
    pub splits: u32,
    /// What scores are multiplied by: usually `1 / sqrt(d)`.
    pub scale: f32,
}

/// Of `code_rest`: what the rows with weights other than 0 amount to, as [`Kernels::code_rest`](crate::Kernels::code_rest) adds it up. The
/// parts of several splits are to be added.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
pub struct CodeRestParams {
    /// Address of `[heads][stride]` blocks, a multiple of 4.
    pub blocks: u64,
    /// Address of f32 `[heads][group][weight_stride]`. Rows beyond `weight_stride` weigh nothing.
    pub weights: u64,
    /// Address of f32 `[heads][group][margin_stride]`. Of groups of rows beyond `margin_stride` nothing is known.
    pub margins: u64,
    /// Address of f64 `[splits][heads][group][5]`: the fields of [`CodeSums`](crate::CodeSums), in their order.
    pub sums: u64,
    /// Address of f32 `[splits][heads][group][value_dim]`: `Σ w·v̄`.
    pub means: u64,
    /// Address of u32 `[heads]`: pages of each head; 0: `pages` of all. At most `stride` are looked at.
    pub lengths: u64,
    /// The digests' layout. At most [`super::super::launch::VALUE_DIM_MAX`] values.
    pub shape: CodeShape,
    /// Queries of each head.
    pub group: u32,
    /// Heads.
    pub heads: u32,
    /// Pages of each head, without `lengths`.
    pub pages: u32,
    /// Pages from head to head in `blocks`.
    pub stride: u32,
    /// Values from query to query in `weights`.
    pub weight_stride: u32,
    /// Values from query to query in `margins`.
    pub margin_stride: u32,
    /// Blocks that share one head's pages, from 1.
    pub splits: u32,
    /// 0.
    pub pad: u32,
}

const _: () = {
    assert!(size_of::<CodeShape>() == 24);
    assert!(size_of::<CodeScoresParams>() == 96);
    assert!(size_of::<CodeRestParams>() == 104);
};
