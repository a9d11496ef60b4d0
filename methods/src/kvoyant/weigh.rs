//! Weights of a head's rows for the queries of its group, from its digests.

use std::ops::Range;

use super::Kvoyant;
use crate::context::SelectContext;
use crate::scratch::Scratch;
use crate::store::Store;

/// Which rows of a head have digests that count.
#[derive(Debug, Clone)]
pub(super) struct Seen {
    /// Pages that are looked at.
    pub(super) pages: Range<usize>,
    /// Of the rows of these pages, counted from the first one's first row, the candidates.
    pub(super) rows: Range<usize>,
    /// Candidates from this token on have no digest.
    pub(super) sealed_end: usize,
}

impl Seen {
    /// The token of the first row of the first page.
    pub(super) fn first_token(&self, page_rows: usize) -> usize {
        self.pages.start * page_rows
    }

    /// From one query's values to the next one's, where there are `each` a page.
    pub(super) fn stride(&self, each: usize) -> usize {
        self.pages.len() * each
    }
}

impl Kvoyant {
    /// The rows of a request that have digests.
    pub(super) fn seen(&self, context: &SelectContext<'_>) -> Seen {
        let rows = self.shape.page_rows;
        let candidates = self.shape.candidates(context.tokens);
        // All tokens but the current one have been appended.
        let full = (context.tokens.saturating_sub(1)) / rows * rows;
        let sealed_end = candidates.end.min(full).max(candidates.start);
        if sealed_end == candidates.start {
            return Seen { pages: 0..0, rows: 0..0, sealed_end };
        }
        let pages = candidates.start / rows..sealed_end.div_ceil(rows);
        let first = pages.start * rows;
        Seen { pages, rows: candidates.start - first..sealed_end - first, sealed_end }
    }

    /// Fills `scratch.scores` with weights `[queries of the group][rows of the pages]`, relative to `e^maxima`; those of rows that are no
    /// candidates are 0. `scratch.margins` is `[queries][groups of the pages]`, and `scratch.group` gets each row's mean share of the
    /// attention.
    pub(super) fn weigh(
        &self,
        context: &SelectContext<'_>,
        store: &dyn Store,
        head: usize,
        seen: &Seen,
        scratch: &mut Scratch,
    ) {
        let Scratch { block, scores, margins, maxima, group: shares, .. } = scratch;
        let g = context.group(&self.shape);
        let (rows, groups) = (self.layout.rows(), self.layout.groups());
        let (stride, margin_stride) = (seen.stride(rows), seen.stride(groups));
        scores.resize(g * stride, 0.0);
        margins.resize(g * margin_stride, 0.0);
        maxima.clear();
        maxima.resize(g, f32::NEG_INFINITY);
        shares.clear();
        shares.resize(stride, 0.0);
        if seen.pages.is_empty() {
            return;
        }
        let queries = context.group_queries(&self.shape, head, block);
        let scale = 1.0 / (self.shape.head_dim as f32).sqrt();
        let mut page = 0;
        while page < seen.pages.len() {
            let most = seen.pages.len() - page;
            let blocks = store.stretch(head, seen.pages.start + page, most);
            let count = (blocks.len() / self.layout.bytes()).clamp(1, most);
            self.kernels.code_scores(
                &self.layout,
                queries,
                g,
                scale,
                &blocks[..count * self.layout.bytes()],
                &mut scores[page * rows..],
                stride,
                &mut margins[page * groups..],
                margin_stride,
            );
            page += count;
        }
        for h in 0..g {
            let all = &mut scores[h * stride..][..stride];
            all[..seen.rows.start].fill(0.0);
            all[seen.rows.end..].fill(0.0);
            let candidates = &mut all[seen.rows.clone()];
            let margins = &margins[h * margin_stride..][..margin_stride];
            maxima[h] = self.reference(seen, candidates, margins);
            let sum = self.kernels.exp_in_place(candidates, maxima[h]);
            let floor = context.floor(&self.shape, head, h).map_or(0.0, |floor| (floor - maxima[h]).exp());
            let share = 1.0 / ((sum + floor) * g as f32);
            // Beside a floor that is out of reach no row counts.
            let share = if share.is_finite() { share } else { 0.0 };
            self.kernels.axpy(&mut shares[seen.rows.clone()], share, candidates);
        }
        // Rows of which nothing is known come before all others, and weigh something wherever they are left out.
        let group = self.layout.group();
        for h in 0..g {
            let unknown = |at: &usize| margins[h * margin_stride + at] == f32::INFINITY;
            for at in (0..margin_stride).filter(unknown) {
                let rows = (at * group).max(seen.rows.start)..((at + 1) * group).min(seen.rows.end);
                if rows.start < rows.end {
                    shares[rows.clone()].fill(f32::INFINITY);
                    scores[h * stride..][rows].fill(1.0);
                }
            }
        }
    }

    /// What weights are relative to: no more than the largest true score, so that nothing that counts beside it is rounded to 0, and so
    /// little less than the largest estimated one that no weight is infinite.
    fn reference(&self, seen: &Seen, scores: &[f32], margins: &[f32]) -> f32 {
        let widest = self.kernels.max(margins);
        if widest.is_finite() {
            return self.kernels.max(scores) - widest;
        }
        let group = self.layout.group();
        let (mut largest, mut widest) = (f32::NEG_INFINITY, 0.0_f32);
        for (g, margin) in margins.iter().enumerate().filter(|(_, margin)| margin.is_finite()) {
            let from = (g * group).max(seen.rows.start) - seen.rows.start;
            let to = ((g + 1) * group).min(seen.rows.end).saturating_sub(seen.rows.start);
            if from < to {
                largest = largest.max(self.kernels.max(&scores[from..to]));
                widest = widest.max(*margin);
            }
        }
        if largest == f32::NEG_INFINITY { 0.0 } else { largest - widest }
    }

    /// Sets the weights of the rows in `scratch.ids` to 0.
    pub(super) fn forget(&self, seen: &Seen, scratch: &mut Scratch) {
        let stride = seen.stride(self.layout.rows());
        let Scratch { scores, ids, .. } = scratch;
        for weights in scores.chunks_exact_mut(stride.max(1)) {
            ids.iter().for_each(|id| weights[*id as usize] = 0.0);
        }
    }

    /// The same for rows side by side, which no threshold lets in from now on.
    pub(super) fn forget_rows(&self, seen: &Seen, rows: Range<usize>, scratch: &mut Scratch) {
        let stride = seen.stride(self.layout.rows());
        for weights in scratch.scores.chunks_exact_mut(stride.max(1)) {
            weights[rows.clone()].fill(0.0);
        }
        // Below any threshold, so that none of them is chosen again.
        scratch.group[rows].fill(-2.0);
    }
}
