//! What methods that estimate are told before they select, what is attended beside their selection, and what they say of all else: an
//! answer as the daemon and its client make it together.

use kvoyant_kernels::Kernels;
use kvoyant_methods::{HintSource, Replay, Rest, RestSums, Scratch, SelectContext, Selection};

use super::{LayerOutcome, Run};
use crate::residency::Resident;
use crate::truth::{StepTruth, kv_head_of};

/// Bytes of the estimate of one query head: its sums, and a mean value in f16 up to a whole word.
#[must_use]
pub fn estimate_bytes(value_dim: usize) -> usize {
    size_of::<RestSums>() + value_dim.div_ceil(2) * 4
}

/// What an answer is made of beside the rows selected.
#[derive(Debug)]
pub(super) struct Beside {
    /// Selected rows, and all others that are attended.
    pub(super) attended: Selection,
    /// What is said of the rest, where the method says something.
    pub(super) rest: Option<Rest>,
}

impl Run<'_> {
    /// Log-sum-exps `[Hq]` of a query's scores over the rows that are attended in any case, if the method wants them and selects by a query of
    /// the step. A predicted query knows nothing of the layer's own row.
    pub(super) fn floors(&self, queries: &[f32], tokens: usize) -> Vec<f32> {
        let needs = self.method.needs();
        let end = match needs.hint {
            HintSource::Current => tokens,
            HintSource::Ahead => tokens - 1,
            HintSource::None | HintSource::Previous | HintSource::Ids => return Vec::new(),
        };
        if !needs.floors {
            return Vec::new();
        }
        let candidates = self.of.shape.candidates(tokens);
        let rows: Vec<usize> = (0..end).filter(|token| !candidates.contains(token)).collect();
        (0..self.of.shape.query_heads).map(|head| self.lse(queries, head, &rows)).collect()
    }

    /// The log-sum-exp of a query head's scaled scores of some rows.
    fn lse(&self, queries: &[f32], head: usize, rows: &[usize]) -> f32 {
        let d = self.of.shape.head_dim;
        let keys = self.of.trace.keys(self.layer, kv_head_of(self.of.trace, head));
        let (query, scale) = (&queries[head * d..][..d], 1.0 / (d as f32).sqrt());
        let mut scores: Vec<f32> =
            rows.iter().map(|token| scale * Kernels::best().dot(query, &keys[token * d..][..d])).collect();
        let largest = Kernels::best().max(&scores);
        if largest == f32::NEG_INFINITY {
            return largest;
        }
        largest + Kernels::best().exp_in_place(&mut scores, largest).ln()
    }

    /// What is attended beside a selection, and what the method says of all else once the layer's true query is known.
    pub(super) fn beside(
        &self,
        replay: &mut Replay,
        (selection, floors): (&Selection, &[f32]),
        resident: &[Resident],
        (step, tokens): (usize, usize),
        scratch: &mut Scratch,
        out: &mut LayerOutcome,
    ) -> Beside {
        let needs = self.method.needs();
        let mut attended = selection.clone();
        if needs.attend_resident {
            attended.clear();
            for (head, resident) in resident.iter().enumerate() {
                let candidates = self.of.shape.candidates(tokens);
                let mut rows: Vec<usize> = selection.tokens(head).map(|token| token as usize).collect();
                rows.extend(candidates.filter(|token| resident.holds(*token as u32)));
                finish(&mut attended, rows);
            }
        }
        if !needs.rest {
            return Beside { attended, rest: None };
        }
        let query = self.of.trace.query(self.layer, step);
        // Who selects ahead is told by the true query what all that was attended got.
        let after: Vec<f32> = if needs.hint == HintSource::Current {
            floors.to_vec()
        } else {
            let rows = self.attended(&attended, tokens);
            let group = self.of.shape.group();
            (0..self.of.shape.query_heads).map(|head| self.lse(query, head, &rows[head / group])).collect()
        };
        let context = SelectContext {
            floors: &after,
            sequence_seed: 1,
            step: step as u64,
            ..SelectContext::new(&self.of.shape, self.layer, tokens, query)
        };
        let rest = replay.rest(self.method, &context, &attended, scratch);
        let exact = rest.exact().total_rows();
        // The CPU attends them where they lie; the second look has a place for that, whether it finds rows or not.
        out.on_cpu += exact;
        out.selected += exact;
        out.partials += usize::from(needs.hint != HintSource::Current);
        if exact > 0 {
            let named = attended;
            attended = Selection::new();
            for head in 0..self.of.shape.kv_heads {
                let both = named.tokens(head).chain(rest.exact().tokens(head));
                finish(&mut attended, both.map(|token| token as usize).collect());
            }
        }
        out.estimates += rest.heads();
        Beside { attended, rest: Some(rest) }
    }

    /// The tokens of sinks, window and a selection, per KV head.
    pub(super) fn attended(&self, selection: &Selection, tokens: usize) -> Vec<Vec<usize>> {
        let candidates = self.of.shape.candidates(tokens);
        let of = |head| {
            let selected = selection.tokens(head).map(|token| token as usize);
            (0..candidates.start.min(tokens))
                .chain(selected)
                .chain(candidates.end.min(tokens)..tokens)
                .collect()
        };
        (0..self.of.shape.kv_heads).map(of).collect()
    }

    /// Dense attention's log-sum-exp of a query head.
    pub(super) fn dense_lse(&self, (truth, step): (&StepTruth, usize), head: usize) -> f32 {
        let (trace, d) = (self.of.trace, self.of.shape.head_dim);
        let probabilities = &truth.probabilities[head];
        let best = (0..probabilities.len())
            .max_by(|a, b| probabilities[*a].total_cmp(&probabilities[*b]))
            .unwrap_or(0);
        let query = &trace.query(self.layer, step)[head * d..][..d];
        let key = &trace.keys(self.layer, kv_head_of(trace, head))[best * d..][..d];
        Kernels::best().dot(query, key) / (d as f32).sqrt() - probabilities[best].ln()
    }
}

/// One head's rows, in any order, some perhaps twice.
fn finish(selection: &mut Selection, mut rows: Vec<usize>) {
    rows.sort_unstable();
    rows.dedup();
    rows.iter().for_each(|row| selection.push(*row, row + 1));
    selection.finish_head();
}
