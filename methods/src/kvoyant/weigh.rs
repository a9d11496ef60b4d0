//! Weights of a head's rows for the queries of its group, from its digests.

use std::ops::Range;

use kvoyant_kernels::{CodeOut, CodeScan, CodeTotal, CodeWeighing};

use super::Kvoyant;
use crate::context::SelectContext;
use crate::scratch::{Join, KeptHead, Scratch};
use crate::store::Store;

/// Which rows of a head have digests that count.
#[derive(Debug, Clone)]
pub(super) struct Seen {
    /// Pages that are looked at.
    pub(super) blocks: Range<usize>,
    /// Of the rows of these blocks, counted from the first one's first row, the candidates.
    pub(super) rows: Range<usize>,
    /// Candidates from this token on have no digest.
    pub(super) sealed_end: usize,
}

impl Seen {
    /// The token of the first row of the first block.
    pub(super) fn first_token(&self, block_rows: usize) -> usize {
        self.blocks.start * block_rows
    }

    /// From one query's values to the next one's, where there are `each` a block.
    pub(super) fn stride(&self, each: usize) -> usize {
        self.blocks.len() * each
    }
}

/// Blocks from which on two threads scan a head: some ten microseconds' work for each.
const HELP_BLOCKS: usize = 32;

/// What is scanned for one head.
struct Scan<'a> {
    method: &'a Kvoyant,
    store: &'a dyn Store,
    head: usize,
    /// `[g][d]`.
    queries: &'a [f32],
    seen: &'a Seen,
}

impl Scan<'_> {
    /// Weights and margins of some of the blocks, which are the first ones of their buffers.
    fn run(&self, blocks: Range<usize>, out: &mut CodeOut<'_>, totals: &mut [CodeTotal]) {
        let Kvoyant { layout, kernels, .. } = self.method;
        let before = blocks.start * layout.rows();
        let own = |row: usize| row.max(before) - before;
        let rows = own(self.seen.rows.start)..own(self.seen.rows.end);
        let first = blocks.start;
        for (block, bytes) in self.method.stretches(self.store, self.head, self.seen, blocks) {
            let scan = self.of(totals.len(), bytes);
            let mut weighing = CodeWeighing { before: block - first, rows: &rows, totals };
            kernels.code_weights(&scan, &mut weighing, out);
        }
    }

    /// A stretch of blocks, for the kernels.
    fn of<'b>(&'b self, group: usize, blocks: &'b [u8]) -> CodeScan<'b> {
        let Kvoyant { layout, shape, .. } = self.method;
        let scale = 1.0 / (shape.head_dim as f32).sqrt();
        CodeScan { layout, queries: self.queries, group, scale, blocks }
    }

    /// All blocks, the second half of which another thread may take.
    fn in_halves(
        &self,
        join: Join,
        (weights, margins): (&mut [f32], &mut [f32]),
        (other_weights, other_margins): &mut (Vec<f32>, Vec<f32>),
        totals: &mut [CodeTotal],
    ) {
        let layout = &self.method.layout;
        let (blocks, g) = (self.seen.blocks.len(), totals.len());
        let (half, stride, margin_stride) =
            (blocks / 2, self.seen.stride(layout.rows()), self.seen.stride(layout.groups()));
        let (own, own_margins) = ((blocks - half) * layout.rows(), (blocks - half) * layout.groups());
        other_weights.resize(g * own, 0.0);
        other_margins.resize(g * own_margins, 0.0);
        let mut others = vec![CodeTotal::default(); g];
        let mut out = CodeOut { rows: &mut *weights, stride, margins: &mut *margins, margin_stride };
        let mut other = CodeOut {
            rows: &mut *other_weights,
            stride: own,
            margins: &mut *other_margins,
            margin_stride: own_margins,
        };
        join(&mut || self.run(0..half, &mut out, &mut *totals), &mut || {
            self.run(half..blocks, &mut other, &mut others);
        });
        for (h, (total, other)) in totals.iter_mut().zip(&others).enumerate() {
            let (first, second) = weights[h * stride..][..stride].split_at_mut(half * layout.rows());
            second.copy_from_slice(&other_weights[h * own..][..own]);
            let (_, theirs) =
                margins[h * margin_stride..][..margin_stride].split_at_mut(half * layout.groups());
            theirs.copy_from_slice(&other_margins[h * own_margins..][..own_margins]);
            // Both relative to the larger one.
            let reference = total.reference.max(other.reference);
            let mut sum = 0.0;
            for (part, weights) in [(&*total, first), (other, second)] {
                if part.reference == f32::NEG_INFINITY {
                    continue;
                }
                let factor = (part.reference - reference).exp();
                if factor != 1.0 {
                    weights.iter_mut().for_each(|weight| *weight *= factor);
                }
                sum += part.sum * f64::from(factor);
            }
            *total = CodeTotal { reference, sum };
        }
    }
}

impl Kvoyant {
    /// The rows of a request that have digests.
    pub(super) fn seen(&self, context: &SelectContext<'_>) -> Seen {
        let rows = self.layout.rows();
        let candidates = self.shape.candidates(context.tokens);
        // All tokens but the current one have been appended.
        let full = (context.tokens.saturating_sub(1)) / rows * rows;
        let sealed_end = candidates.end.min(full).max(candidates.start);
        if sealed_end == candidates.start {
            return Seen { blocks: 0..0, rows: 0..0, sealed_end };
        }
        let blocks = candidates.start / rows..sealed_end.div_ceil(rows);
        let first = blocks.start * rows;
        Seen { blocks, rows: candidates.start - first..sealed_end - first, sealed_end }
    }

    /// Fills `scratch.scores` with weights `[queries of the group][rows of the blocks]`, relative to `e^maxima`; those of rows that are no
    /// candidates are 0. `scratch.margins` is `[queries][groups of the blocks]`, and `scratch.factors` is what makes weights shares of the
    /// attention. Rows of which nothing is known weigh something wherever they are left out.
    pub(super) fn weigh(
        &self,
        context: &SelectContext<'_>,
        store: &dyn Store,
        head: usize,
        seen: &Seen,
        scratch: &mut Scratch,
    ) {
        let Scratch { block, scores, margins, maxima, factors, other, join, .. } = scratch;
        let g = context.group(&self.shape);
        let (rows, groups) = (self.layout.rows(), self.layout.groups());
        let (stride, margin_stride) = (seen.stride(rows), seen.stride(groups));
        scores.resize(g * stride, 0.0);
        margins.resize(g * margin_stride, 0.0);
        maxima.clear();
        maxima.resize(g, f32::NEG_INFINITY);
        factors.clear();
        factors.resize(g, 0.0);
        if seen.blocks.is_empty() {
            return;
        }
        let queries = context.group_queries(&self.shape, head, block);
        let scan = Scan { method: self, store, head, queries, seen };
        let mut totals = vec![CodeTotal::default(); g];
        let helped = join.filter(|_| seen.blocks.len() >= HELP_BLOCKS);
        if let Some(join) = helped {
            scan.in_halves(join, (scores, margins), other, &mut totals);
        } else {
            let mut out = CodeOut { rows: &mut *scores, stride, margins: &mut *margins, margin_stride };
            scan.run(0..seen.blocks.len(), &mut out, &mut totals);
        }
        let all_known = self.all_known(margins);
        if !all_known {
            // A score of which nothing is known must not be what the others are relative to.
            self.weigh_known(&scan, (scores, margins), &mut totals);
        }
        for (h, total) in totals.iter().enumerate() {
            maxima[h] = if total.reference == f32::NEG_INFINITY { 0.0 } else { total.reference };
            let floor = context.floor(&self.shape, head, h).map_or(0.0, |floor| (floor - maxima[h]).exp());
            let share = 1.0 / ((total.sum as f32 + floor) * g as f32);
            // Beside a floor that is out of reach no row counts.
            factors[h] = if share.is_finite() { share } else { 0.0 };
        }
        if !all_known {
            self.unknown_rows(seen, margins, |h, rows| scores[h * stride..][rows].fill(1.0));
        }
    }

    /// Whether something is known of every row.
    pub(super) fn all_known(&self, margins: &[f32]) -> bool {
        self.kernels.max(margins) < f32::INFINITY
    }

    /// Names the rows, side by side, of which nothing is known for some query.
    fn unknown_rows(&self, seen: &Seen, margins: &[f32], mut name: impl FnMut(usize, Range<usize>)) {
        let group = self.layout.group();
        for (h, margins) in margins.chunks_exact(seen.stride(self.layout.groups())).enumerate() {
            for (at, _) in margins.iter().enumerate().filter(|(_, margin)| **margin == f32::INFINITY) {
                let rows = (at * group).max(seen.rows.start)..((at + 1) * group).min(seen.rows.end);
                if rows.start < rows.end {
                    name(h, rows);
                }
            }
        }
    }

    /// `scratch.group` gets each row's mean share of the attention, from weights.
    pub(super) fn mix(&self, seen: &Seen, scratch: &mut Scratch) {
        let Scratch { scores, margins, factors, group: shares, .. } = scratch;
        let stride = seen.stride(self.layout.rows());
        shares.clear();
        shares.resize(stride, 0.0);
        if seen.blocks.is_empty() {
            return;
        }
        let weights = &scores[seen.rows.start..];
        self.kernels.mix_rows(weights, stride, factors, &mut shares[seen.rows.clone()]);
        if !self.all_known(margins) {
            // They come before all others.
            self.unknown_rows(seen, margins, |_, rows| shares[rows].fill(f32::INFINITY));
        }
    }

    /// Weights relative to the scores of those groups alone whose margins are known.
    fn weigh_known(
        &self,
        scan: &Scan<'_>,
        (scores, margins): (&mut [f32], &mut [f32]),
        totals: &mut [CodeTotal],
    ) {
        let Scan { store, head, seen, .. } = *scan;
        let (rows, groups, group) = (self.layout.rows(), self.layout.groups(), self.layout.group());
        let (stride, margin_stride) = (seen.stride(rows), seen.stride(groups));
        for (block, blocks) in self.stretches(store, head, seen, 0..seen.blocks.len()) {
            let (rows, margins) = (&mut scores[block * rows..], &mut margins[block * groups..]);
            let mut out = CodeOut { rows, stride, margins, margin_stride };
            self.kernels.code_scores(&scan.of(totals.len(), blocks), &mut out);
        }
        for (h, total) in totals.iter_mut().enumerate() {
            let all = &mut scores[h * stride..][..stride];
            all[..seen.rows.start].fill(0.0);
            all[seen.rows.end..].fill(0.0);
            let mut largest = f32::NEG_INFINITY;
            for (g, _) in margins[h * margin_stride..][..margin_stride]
                .iter()
                .enumerate()
                .filter(|(_, margin)| margin.is_finite())
            {
                let (from, to) = ((g * group).max(seen.rows.start), ((g + 1) * group).min(seen.rows.end));
                if from < to {
                    largest = largest.max(self.kernels.max(&all[from..to]));
                }
            }
            let reference = if largest == f32::NEG_INFINITY { 0.0 } else { largest };
            let sum = self.kernels.exp_in_place(&mut all[seen.rows.clone()], reference);
            *total = CodeTotal { reference, sum: f64::from(sum) };
        }
    }

    /// Digests of some of the blocks that are looked at, those side by side at once, with the first one's number.
    pub(super) fn stretches<'s>(
        &'s self,
        store: &'s dyn Store,
        head: usize,
        seen: &Seen,
        range: Range<usize>,
    ) -> impl Iterator<Item = (usize, &'s [u8])> + use<'s> {
        let (bytes, per_page) = (self.layout.bytes(), self.blocks_of_a_page());
        let (first, mut block) = (seen.blocks.start, range.start);
        std::iter::from_fn(move || {
            let most = range.end.checked_sub(block).filter(|most| *most > 0)?;
            let (page, within) = ((first + block) / per_page, (first + block) % per_page);
            let there = &store.stretch(head, page, (within + most).div_ceil(per_page))[within * bytes..];
            let count = (there.len() / bytes).clamp(1, most);
            let at = block;
            block += count;
            Some((at, &there[..count * bytes]))
        })
    }

    /// Leaves a head's weights for the rest of this selection, if that is to follow.
    pub(super) fn keep(&self, head: usize, scratch: &mut Scratch) {
        if !scratch.keeps {
            return;
        }
        if scratch.kept.len() <= head {
            scratch.kept.resize_with(head + 1, KeptHead::default);
        }
        Self::swap_kept(head, scratch);
        scratch.kept[head].fresh = true;
    }

    /// Weights that a selection has left for its rest; false where there are none.
    pub(super) fn recall(&self, head: usize, scratch: &mut Scratch) -> bool {
        let fresh = scratch.kept.get_mut(head).is_some_and(|kept| std::mem::take(&mut kept.fresh));
        if fresh {
            Self::swap_kept(head, scratch);
        }
        fresh
    }

    /// Buffers change places, so that none of them has to be made anew.
    fn swap_kept(head: usize, scratch: &mut Scratch) {
        let Scratch { scores, margins, maxima, factors, kept, .. } = scratch;
        let kept = &mut kept[head];
        std::mem::swap(scores, &mut kept.scores);
        std::mem::swap(margins, &mut kept.margins);
        std::mem::swap(maxima, &mut kept.maxima);
        std::mem::swap(factors, &mut kept.factors);
    }

    /// Sets the weights of the rows in `scratch.ids` to 0.
    pub(super) fn forget(&self, seen: &Seen, scratch: &mut Scratch) {
        let stride = seen.stride(self.layout.rows());
        let Scratch { scores, ids, .. } = scratch;
        for weights in scores.chunks_exact_mut(stride.max(1)) {
            ids.iter().for_each(|id| weights[*id as usize] = 0.0);
        }
    }

    /// The same for rows side by side.
    pub(super) fn forget_rows(&self, seen: &Seen, rows: Range<usize>, scratch: &mut Scratch) {
        let stride = seen.stride(self.layout.rows());
        for weights in scratch.scores.chunks_exact_mut(stride.max(1)) {
            weights[rows.clone()].fill(0.0);
        }
    }
}
