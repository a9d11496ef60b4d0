//! Which rows are selected, by their shares of the attention.

use super::spec::{Amount, part_of};
use super::steer::Steering;
use super::weigh::Seen;
use super::{CUT_BYTES, Kvoyant};
use crate::context::{InTime, SelectContext};
use crate::rest::RestSums;
use crate::scratch::Scratch;
use crate::selection::Selection;
use crate::store::Store;

/// Bins of shares: a float's exponent and first four bits.
const BINS: usize = 2048;
const BIN_SHIFT: u32 = 19;

/// What the largest score may be above the one that weights are relative to ([`kvoyant_kernels::CodeTotal`]).
const ABOVE: f32 = 20.0;

/// How many rows a head gets.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) enum Wanted {
    /// All of them.
    Everything,
    /// The best so many.
    Best(usize),
    /// Those with a larger share, and at least the best so many.
    Above { share: f32, least: usize },
    /// As many as it takes until every query head misses at most this of its attention.
    Missed(f64),
}

impl Wanted {
    /// What a head gets whose part of the budget is so many times that of the mean.
    pub(super) fn of_part(&self, part: f32) -> Self {
        let rows = |count: usize| part_of(count, f64::from(part));
        match *self {
            Self::Best(count) => Self::Best(rows(count)),
            Self::Above { share, least } => Self::Above { share: share / part, least: rows(least) },
            Self::Everything | Self::Missed(_) => *self,
        }
    }
}

impl Kvoyant {
    /// Puts the chosen rows into `scratch.ids`, ascending, counted from the first block's first row; the least share among them, where
    /// they are as many as a budget says.
    pub(super) fn choose(
        &self,
        context: &SelectContext<'_>,
        head: usize,
        wanted: &Wanted,
        seen: &Seen,
        scratch: &mut Scratch,
    ) -> f32 {
        match wanted {
            Wanted::Everything => {
                scratch.ids.clear();
                scratch.ids.extend(seen.rows.start as u32..seen.rows.end as u32);
                0.0
            }
            Wanted::Best(count) => {
                self.best(seen, *count, scratch);
                let shares = &scratch.group;
                scratch.ids.iter().map(|id| shares[*id as usize]).fold(f32::INFINITY, f32::min)
            }
            Wanted::Above { share, least } => {
                self.above(seen, *share, scratch);
                if scratch.ids.len() < *least {
                    self.best(seen, *least, scratch);
                }
                0.0
            }
            Wanted::Missed(missed) => {
                let share = self.share_for(context, head, *missed, seen, scratch);
                self.above(seen, share, scratch);
                0.0
            }
        }
    }

    /// Whether a head's queries are so near to those that it last selected by that what is resident will do. If not, they are the ones from now
    /// on: `note` keeps them.
    pub(super) fn is_near(&self, context: &SelectContext<'_>, head: usize, note: &mut [u8]) -> bool {
        let (Some(least), Some(kept)) = (self.options.reuse, note.get_mut(CUT_BYTES..)) else { return false };
        let d = self.shape.head_dim;
        let queries = context.group_queries(&self.shape, head, &mut Vec::new()).to_vec();
        if context.queries != 1 || kept.len() != queries.len() * size_of::<f32>() {
            return false;
        }
        let last: Vec<f32> = kept.as_chunks().0.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect();
        let cosine = |(a, b): (&[f32], &[f32])| {
            let dot = |x: &[f32], y: &[f32]| f64::from(self.kernels.dot(x, y));
            let norms = (dot(a, a) * dot(b, b)).sqrt();
            if norms > 0.0 { dot(a, b) / norms } else { 0.0 }
        };
        let all = queries.chunks_exact(d).zip(last.chunks_exact(d));
        let mean = all.map(cosine).sum::<f64>() / self.shape.group() as f64;
        if mean >= least {
            return true;
        }
        kept.iter_mut()
            .zip(queries.iter().flat_map(|q| q.to_le_bytes()))
            .for_each(|(kept, byte)| *kept = byte);
        false
    }

    /// Takes out of the chosen rows those that there is no room for in time: of the rows that are not there yet, only as many as can come
    /// are left, those with the largest shares. How many were taken out.
    pub(super) fn leave_out(
        &self,
        head: usize,
        InTime { resident, first_head, room }: InTime<'_>,
        seen: &Seen,
        scratch: &mut Scratch,
    ) -> usize {
        let Scratch { group: shares, ids, hits: absent, top, .. } = scratch;
        let first = seen.first_token(self.layout.rows()) as u32;
        let mut there = resident.tokens(head - first_head).peekable();
        absent.clear();
        for id in &*ids {
            let token = first + id;
            while there.next_if(|resident| *resident < token).is_some() {}
            if there.peek() != Some(&token) {
                absent.push(*id);
            }
        }
        if absent.len() <= room {
            return 0;
        }
        let of: Vec<f32> = absent.iter().map(|id| shares[*id as usize]).collect();
        let mut come = Vec::new();
        self.kernels.top_k(&of, room, top, &mut come);
        let come: Vec<u32> = come.iter().map(|at| absent[*at as usize]).collect();
        let late = absent.len() - come.len();
        ids.retain(|id| absent.binary_search(id).is_err() || come.binary_search(id).is_ok());
        late
    }

    fn best(&self, seen: &Seen, count: usize, scratch: &mut Scratch) {
        let Scratch { group: shares, ids, top, .. } = scratch;
        self.kernels.top_k(&shares[seen.rows.clone()], count.min(seen.rows.len()), top, ids);
        ids.iter_mut().for_each(|id| *id += seen.rows.start as u32);
    }

    fn above(&self, seen: &Seen, share: f32, scratch: &mut Scratch) {
        let Scratch { group: shares, ids, .. } = scratch;
        self.kernels.indices_above(&shares[seen.rows.clone()], share, ids);
        ids.iter_mut().for_each(|id| *id += seen.rows.start as u32);
    }

    /// The rows that a selection missed and that are worth attending to now.
    pub(super) fn correct(
        &self,
        context: &SelectContext<'_>,
        head: usize,
        steering: &Steering,
        seen: &Seen,
        scratch: &mut Scratch,
    ) {
        match self.options.amount {
            Amount::MissedMass(missed) => {
                let share = self.share_for(context, head, missed.get(), seen, scratch);
                self.above(seen, share, scratch);
            }
            Amount::Budget(_) => {
                let part = self.part(context.layer, head);
                let most =
                    part_of(self.options.rows_of(context.tokens), self.options.correct * f64::from(part));
                self.best(seen, most, scratch);
                let share = steering.share(context).unwrap_or(0.0) / part;
                let shares = &scratch.group;
                scratch.ids.retain(|id| shares[*id as usize] > share);
            }
        }
    }

    /// The share such that what rows with no larger one may weigh is at most `missed` of the attention of each query head.
    fn share_for(
        &self,
        context: &SelectContext<'_>,
        head: usize,
        missed: f64,
        seen: &Seen,
        scratch: &mut Scratch,
    ) -> f32 {
        if missed >= 1.0 {
            return f32::INFINITY;
        }
        if missed <= 0.0 {
            return -1.0;
        }
        let Scratch { scores, margins, maxima, group: shares, bins, .. } = scratch;
        let (rows, group) = (self.layout.rows(), self.layout.group());
        let (stride, margin_stride) = (seen.stride(rows), seen.stride(self.layout.groups()));
        // The bound on the odds that what is left out is to what is attended; certificates leave room for rounding.
        let odds = missed / (1.0 - missed) * (1.0 - 1e-4);
        let mut share = f32::INFINITY;
        for h in 0..maxima.len() {
            bins.clear();
            bins.resize(BINS, (0.0, 0.0));
            let weights = &scores[h * stride..][..stride];
            for (g, (weights, shares)) in weights.chunks(group).zip(shares.chunks(group)).enumerate() {
                let margin = f64::from(margins[h * margin_stride + g]);
                if margin.is_infinite() {
                    // These rows are selected, and nobody knows what they weigh.
                    continue;
                }
                let (up, down) = (margin.exp(), (-margin).exp());
                for (weight, share) in weights.iter().zip(shares) {
                    let bin = ((share.to_bits() >> BIN_SHIFT) as usize).min(BINS - 1);
                    bins[bin].0 += f64::from(*weight) * up;
                    bins[bin].1 += f64::from(*weight) * down;
                }
            }
            let floor = context.floor(&self.shape, head, h).unwrap_or(f32::NEG_INFINITY);
            let mut attended = f64::from(floor - maxima[h]).exp();
            let largest = floor.max(maxima[h]);
            let odds =
                odds * (-RestSums::rounding(largest.abs() + ABOVE + (seen.rows.len() as f32).ln())).exp();
            attended += bins.iter().map(|bin| bin.1).sum::<f64>();
            // What exp rounds to nothing counts all the same.
            let mut left = seen.rows.len() as f64 * f64::from(RestSums::LEAST_WEIGHT);
            let mut first = 0;
            while first + 1 < BINS {
                let (up, down) = bins[first];
                if left + up > odds * (attended - down) {
                    break;
                }
                (left, attended) = (left + up, attended - down);
                first += 1;
            }
            // Everything below the bin's first share stays out.
            let bound = f32::from_bits((first as u32) << BIN_SHIFT).next_down();
            share = share.min(if first == 0 { -1.0 } else { bound });
        }
        share
    }

    /// Rows of all heads together, by what the layer gets as a whole.
    pub(super) fn choose_together(
        &self,
        context: &SelectContext<'_>,
        store: &mut dyn Store,
        scratch: &mut Scratch,
        out: &mut Selection,
    ) {
        out.clear();
        let candidates = self.shape.candidates(context.tokens);
        let seen = self.seen(context);
        let (len, heads) = (seen.rows.len(), context.heads.len());
        let budget = self.options.rows_of(context.tokens).min(len);
        let least = part_of(budget, self.options.floor).min(len);
        let mut all = std::mem::take(&mut scratch.pages);
        all.clear();
        for head in context.heads.clone() {
            self.weigh(context, &*store, head, &seen, scratch);
            self.mix(&seen, scratch);
            self.best(&seen, least, scratch);
            // The least that a head gets comes before all others.
            let Scratch { group: shares, ids, .. } = &mut *scratch;
            ids.iter().for_each(|id| shares[*id as usize] += 2.0);
            all.extend_from_slice(&shares[seen.rows.clone()]);
            self.keep(head, scratch);
        }
        let Scratch { ids, top, .. } = &mut *scratch;
        self.kernels.top_k(&all, (budget * heads).min(all.len()), top, ids);
        scratch.pages = all;
        let mut ids = scratch.ids.iter().map(|id| *id as usize).peekable();
        for head in 0..heads {
            while let Some(id) = ids.next_if(|id| *id < (head + 1) * len) {
                let token = candidates.start + id - head * len;
                out.push(token, token + 1);
            }
            out.push(seen.sealed_end, candidates.end);
            out.finish_head();
        }
    }
}
