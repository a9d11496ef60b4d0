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

/// Queries that share a KV head, and the pages that they look at.
#[derive(Debug, Clone, Copy)]
pub struct CodeScan<'a> {
    /// Of the digests.
    pub layout: &'a CodeLayout,
    /// `[group][d]`.
    pub queries: &'a [f32],
    /// How many queries.
    pub group: usize,
    /// What products are multiplied by.
    pub scale: f32,
    /// `[pages]` blocks of the layout.
    pub blocks: &'a [u8],
}

/// Where scores or weights go, and margins: those of row t and query h to `rows[h·stride + t]`, those of group g to
/// `margins[h·margin_stride + g]`.
#[derive(Debug)]
pub struct CodeOut<'a> {
    /// `[group]`, `stride` apart.
    pub rows: &'a mut [f32],
    /// From one query's rows to the next one's.
    pub stride: usize,
    /// `[group]`, `margin_stride` apart.
    pub margins: &'a mut [f32],
    /// From one query's margins to the next one's.
    pub margin_stride: usize,
}

/// What weights are asked for, where pages come as several stretches, in order.
#[derive(Debug)]
pub struct CodeWeighing<'a> {
    /// Pages that came before.
    pub before: usize,
    /// Rows that count, of all, from the first page on.
    pub rows: &'a Range<usize>,
    /// One for each query, as the stretch before left them.
    pub totals: &'a mut [CodeTotal],
}

/// Weights and margins of all rows of pages, as [`CodeOut`] has them.
#[derive(Debug, Clone, Copy)]
pub struct CodeWeights<'a> {
    /// `[group]`, `stride` apart.
    pub rows: &'a [f32],
    /// From one query's rows to the next one's.
    pub stride: usize,
    /// `[group]`, `margin_stride` apart.
    pub margins: &'a [f32],
    /// From one query's margins to the next one's.
    pub margin_stride: usize,
}

/// Rows that are taken instead of left out: those whose share, the sum of their weights times `factors`, is above `threshold`.
#[derive(Debug)]
pub struct CodeTaken<'a> {
    /// `[group]`.
    pub factors: &'a [f32],
    /// A row of this share is still left out.
    pub threshold: f32,
    /// The first page's first row.
    pub first: u32,
    /// Taken rows are added, ascending.
    pub ids: &'a mut Vec<u32>,
}

impl CodeScan<'_> {
    /// Checks it; how many pages it is over.
    fn pages(&self, what: &str) -> usize {
        let d = columns(what, self.queries, self.group);
        assert_eq!(d, self.layout.head_dim(), "{what}: values of a query");
        check_blocks(what, self.layout, self.blocks)
    }
}

impl CodeOut<'_> {
    fn check(&self, what: &str, scan: &CodeScan<'_>, pages: usize) {
        check_out(what, scan.group, pages * scan.layout.rows(), self.rows, self.stride);
        check_out(what, scan.group, pages * scan.layout.groups(), self.margins, self.margin_stride);
    }
}

impl Kernels {
    /// Scores of all rows of pages from their digests, and how far each may be off.
    ///
    /// A score is `scale·q_h·k̂_t`, and a margin at least `scale·|q_h·k_t − q_h·k̂_t|` for every row t of its group, with all that this very
    /// computation may have lost; `+∞` where nothing is known. A score that is no number becomes −1.5e38, and none is infinite. The same
    /// on every path, to the last bit.
    ///
    /// A query is turned into whole numbers of 15 bits for each group (`q_j·step_j`, of the largest), so that sums are exact.
    ///
    /// # Panics
    /// When `group` is 0 or does not divide `queries`, or a slice is too short.
    pub fn code_scores(self, scan: &CodeScan<'_>, out: &mut CodeOut<'_>) {
        let pages = scan.pages("code_scores");
        out.check("code_scores", scan, pages);
        dispatch!(self, code_scores(scan, out));
    }

    /// Weights of rows, in the same pass over the blocks that [`Kernels::code_scores`] makes: `e^(score − reference)`, 0 where that is below
    /// 3e−38 and where a row does not count; the totals have references and sums.
    ///
    /// `out` is of all pages, those that came before among them. When a page has a score that is more than 20 above the reference, its largest
    /// score becomes the reference, and all weights so far are multiplied.
    ///
    /// The references are the same on every path.
    ///
    /// # Panics
    /// When `group` is 0 or does not divide `queries`, or a slice is too short.
    pub fn code_weights(self, scan: &CodeScan<'_>, weighing: &mut CodeWeighing<'_>, out: &mut CodeOut<'_>) {
        let pages = weighing.before + scan.pages("code_weights");
        assert_eq!(weighing.totals.len(), scan.group, "code_weights: totals of {} queries", scan.group);
        out.check("code_weights", scan, pages);
        dispatch!(self, code_weights(scan, weighing, out));
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
    /// `Σ w·v̄` added. Weights and margins are as [`Kernels::code_weights`], or [`Kernels::code_scores`] and
    /// [`Kernels::exp_in_place`], left them, but for rows whose weights were set to 0 since.
    ///
    /// What is added to `upper`, `scatter` and `spread` is not below, and to `lower` not above, what exact arithmetic would add by more
    /// than 1e−5 of it. Where a margin is `+∞`, `upper` becomes it and the others are worth nothing.
    ///
    /// # Panics
    /// When there are no sums, or a slice is too short.
    pub fn code_rest(
        self,
        layout: &CodeLayout,
        blocks: &[u8],
        weights: &CodeWeights<'_>,
        sums: &mut [CodeSums],
        means: &mut [f32],
    ) {
        check_rest("code_rest", (layout, blocks), weights, sums.len(), means);
        dispatch!(self, code_rest(layout, blocks, weights, sums, means));
    }

    /// The same for rows that are not taken, and which ones are, in one pass over the weights: as [`Kernels::mix_rows`],
    /// [`Kernels::indices_above`], weights of 0 for what that names, and [`Kernels::code_rest`] one after the other, but that the
    /// weights stay what they are. What has no number for a share is left out.
    ///
    /// # Panics
    /// When there are no sums, there are not as many factors, or a slice is too short.
    pub fn code_rest_below(
        self,
        layout: &CodeLayout,
        blocks: &[u8],
        weights: &CodeWeights<'_>,
        taken: &mut CodeTaken<'_>,
        sums: &mut [CodeSums],
        means: &mut [f32],
    ) {
        check_rest("code_rest_below", (layout, blocks), weights, sums.len(), means);
        assert_eq!(taken.factors.len(), sums.len(), "code_rest_below: factors of {} queries", sums.len());
        dispatch!(self, code_rest_below(layout, blocks, weights, taken, sums, means));
    }
}

/// Whether there are weights, margins and means of all rows for each of `group` queries.
fn check_rest(
    what: &str,
    (layout, blocks): (&CodeLayout, &[u8]),
    weights: &CodeWeights<'_>,
    group: usize,
    means: &[f32],
) {
    let pages = check_blocks(what, layout, blocks);
    assert!(group > 0, "{what}: sums of no query");
    assert_eq!(means.len(), group * layout.value_dim(), "{what}: means are [{group}][values]");
    check_out(what, group, pages * layout.rows(), weights.rows, weights.stride);
    check_out(what, group, pages * layout.groups(), weights.margins, weights.margin_stride);
}

/// How many blocks there are.
fn check_blocks(what: &str, layout: &CodeLayout, blocks: &[u8]) -> usize {
    let bytes = layout.bytes();
    assert!(blocks.len().is_multiple_of(bytes), "{what}: {} bytes of blocks of {bytes}", blocks.len());
    blocks.len() / bytes
}
