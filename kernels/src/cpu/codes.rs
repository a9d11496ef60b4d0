//! Attention over digests in codes ([`CodeLayout`]): scores with their margins, weights, and what the rows left out add up to.

use std::ops::Range;

use super::score::{check_out, columns};
use super::{Kernels, dispatch};
use crate::codes::CodeLayout;

/// Sums over rows that are not attended, for one query; weights are relative to what the caller's are.
///
/// Not rounded to any side: [`RestSums::of_codes`](crate::RestSums::of_codes) is.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct CodeSums {
    /// `Σ w`.
    pub weight: f64,
    /// `Σ w·e^m`; `+∞` where a margin is not known.
    pub upper: f64,
    /// `Σ w·e^−m`.
    pub lower: f64,
    /// `Σ w·(e^m − 1)·‖v̄‖`.
    pub scatter: f64,
    /// `Σ w·e^m·‖v − v̄‖`.
    pub spread: f64,
}

/// What the weights of one query are relative to, and what they add up to: nothing yet, by default.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct CodeTotal {
    /// A score of one of the rows, the largest one or one at most 20 below it; `−∞` as long as there is none.
    pub reference: f32,
    /// `Σ e^(score − reference)`.
    pub sum: f64,
}

impl Default for CodeTotal {
    fn default() -> Self {
        Self { reference: f32::NEG_INFINITY, sum: 0.0 }
    }
}

impl Kernels {
    /// Scores of all rows of pages from their digests, and how far each may be off.
    ///
    /// `queries` is `[group][d]`, `blocks` is `[pages]` blocks of `layout`. `out[h·out_stride + t]` is `scale·q_h·k̂_t`, and
    /// `margins[h·margin_stride + g]` at least `scale·|q_h·k_t − q_h·k̂_t|` for every row t of group g, with all that this very
    /// computation may have lost; `+∞` where nothing is known. A score that is no number becomes −1.5e38, and none is infinite. The same
    /// on every path, to the last bit.
    ///
    /// A query is turned into whole numbers of 15 bits for each group (`q_j·step_j`, of the largest), so that sums are exact.
    ///
    /// # Panics
    /// When `group` is 0 or does not divide `queries`, or a slice is too short.
    #[allow(clippy::too_many_arguments)]
    pub fn code_scores(
        self,
        layout: &CodeLayout,
        queries: &[f32],
        group: usize,
        scale: f32,
        blocks: &[u8],
        out: &mut [f32],
        out_stride: usize,
        margins: &mut [f32],
        margin_stride: usize,
    ) {
        let d = columns("code_scores", queries, group);
        assert_eq!(d, layout.head_dim(), "code_scores: values of a query");
        let pages = check_blocks("code_scores", layout, blocks);
        check_out("code_scores", group, pages * layout.rows(), out, out_stride);
        check_out("code_scores", group, pages * layout.groups(), margins, margin_stride);
        dispatch!(
            self,
            code_scores(layout, queries, group, scale, blocks, out, out_stride, margins, margin_stride)
        );
    }

    /// Weights of rows, in the same pass over the blocks that [`Kernels::code_scores`] makes: `weights[h·stride + t]` is
    /// `e^(score − reference)`, 0 where that is below 3e−38 and where row t does not count, and `totals[h]` has the reference and the sum.
    ///
    /// A long context's blocks may come as several stretches, in order: `before` is how many pages came before. `weights`, `margins` and
    /// `rows`, the rows that count, are of all pages, from the first one on, and `totals` is what the call before left. When a page has a
    /// score that is more than 20 above the reference, its largest score becomes the reference, and all weights so far are multiplied.
    ///
    /// The references are the same on every path.
    ///
    /// # Panics
    /// When `group` is 0 or does not divide `queries`, or a slice is too short.
    #[allow(clippy::too_many_arguments)]
    pub fn code_weights(
        self,
        layout: &CodeLayout,
        queries: &[f32],
        group: usize,
        scale: f32,
        blocks: &[u8],
        before: usize,
        rows: &Range<usize>,
        weights: &mut [f32],
        stride: usize,
        margins: &mut [f32],
        margin_stride: usize,
        totals: &mut [CodeTotal],
    ) {
        let d = columns("code_weights", queries, group);
        assert_eq!(d, layout.head_dim(), "code_weights: values of a query");
        assert_eq!(totals.len(), group, "code_weights: totals of {group} queries");
        let pages = before + check_blocks("code_weights", layout, blocks);
        check_out("code_weights", group, pages * layout.rows(), weights, stride);
        check_out("code_weights", group, pages * layout.groups(), margins, margin_stride);
        dispatch!(
            self,
            code_weights(
                layout,
                queries,
                group,
                scale,
                blocks,
                before,
                rows,
                weights,
                stride,
                margins,
                margin_stride,
                totals
            )
        );
    }

    /// `scores_t ← e^(scores_t − max)`, and their sum. Scores and `max` are finite; where their difference is above 88, what comes out is
    /// `e^88` or more.
    #[must_use]
    pub fn exp_in_place(self, scores: &mut [f32], max: f32) -> f32 {
        dispatch!(self, exp_in_place(scores, max))
    }

    /// Ids of the values strictly above `threshold`, ascending, in the place of what `ids` held. NaNs are not above.
    pub fn indices_above(self, values: &[f32], threshold: f32, ids: &mut Vec<u32>) {
        dispatch!(self, indices_above(values, threshold, ids));
    }

    /// Adds up what the rows of pages with weights other than 0 amount to: `sums` is `[group]`, and `means` `[group][value_dim]` gets
    /// `Σ w·v̄` added. `weights` and `margins` are as [`Kernels::code_weights`], or [`Kernels::code_scores`] and
    /// [`Kernels::exp_in_place`], left them, but for rows whose weights were set to 0 since.
    ///
    /// What is added to `upper`, `scatter` and `spread` is not below, and to `lower` not above, what exact arithmetic would add by more
    /// than 1e−5 of it. Where a margin is `+∞`, `upper` becomes it and the others are worth nothing.
    ///
    /// # Panics
    /// When `group` is 0, or a slice is too short.
    #[allow(clippy::too_many_arguments)]
    pub fn code_rest(
        self,
        layout: &CodeLayout,
        blocks: &[u8],
        group: usize,
        weights: &[f32],
        stride: usize,
        margins: &[f32],
        margin_stride: usize,
        sums: &mut [CodeSums],
        means: &mut [f32],
    ) {
        let pages = check_blocks("code_rest", layout, blocks);
        assert!(group > 0 && sums.len() == group, "code_rest: sums of {group} queries");
        assert_eq!(means.len(), group * layout.value_dim(), "code_rest: means are [{group}][values]");
        check_out("code_rest", group, pages * layout.rows(), weights, stride);
        check_out("code_rest", group, pages * layout.groups(), margins, margin_stride);
        dispatch!(
            self,
            code_rest(layout, blocks, group, weights, stride, margins, margin_stride, sums, means)
        );
    }
}

/// How many blocks there are.
fn check_blocks(what: &str, layout: &CodeLayout, blocks: &[u8]) -> usize {
    let bytes = layout.bytes();
    assert!(blocks.len().is_multiple_of(bytes), "{what}: {} bytes of blocks of {bytes}", blocks.len());
    blocks.len() / bytes
}
