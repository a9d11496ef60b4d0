//! A sampled comparison of answers with exact attention: of one in so many, one KV head's rows are all scored by the query, and what the answer
//! named is held against those that have most of the attention. Nothing that is answered depends on it.

use kvoyant_kernels::Kernels;
use kvoyant_methods::{HintSource, RowSource, Selection, TokenRange};
use kvoyant_protocol::wire::{SequenceId, Speculate};

use super::rest::name;
use crate::device::rows::PageRows;
use crate::lane::model::ModelState;
use crate::lane::select::Answer;
use crate::metrics::{Check, Query};

/// The rows that are needed: the fewest that have this share of the attention to all rows that a selection may name.
const NEEDED: f64 = 0.9;

/// Most products of a comparison, which its lane makes between two requests: a few milliseconds.
const PRODUCTS_MAX: usize = 1 << 26;

/// Which answers are compared: by a hash of their tickets, so that every layer has its turn whatever the number of layers.
pub(super) fn is_due(every: u64, session: u64, ticket: u64) -> Option<u64> {
    let mut hash = (ticket ^ session << 40).wrapping_add(0x9e37_79b9_7f4a_7c15);
    hash = (hash ^ (hash >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    hash = (hash ^ (hash >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    hash ^= hash >> 31;
    (every > 0 && hash.is_multiple_of(every)).then_some(hash >> 32)
}

/// What named rows are worth, where each row has this share of the attention.
fn compare(weights: &[f32], named: impl Iterator<Item = usize>) -> Check {
    let mut order: Vec<usize> = (0..weights.len()).collect();
    order.sort_by(|a, b| weights[*b].total_cmp(&weights[*a]));
    let mut is_needed = vec![false; weights.len()];
    let (mut sum, mut needed) = (0.0, 0);
    for at in order {
        if sum >= NEEDED {
            break;
        }
        sum += f64::from(weights[at]);
        is_needed[at] = true;
        needed += 1;
    }
    let mut check = Check { selected: 0, needed, both: 0, covered: 0.0 };
    for at in named.filter(|at| *at < weights.len()) {
        check.selected += 1;
        check.both += u64::from(is_needed[at]);
        check.covered += f64::from(weights[at]);
    }
    check
}

impl ModelState {
    /// Compares what an answer named of its last member with what the query in the buffers attends to. Nothing where there is no query, or
    /// rows are on a disk, or there are more than may be scored; nor where the answer's rest, which is asked for by the true query, comes later.
    pub(super) fn check(
        &mut self,
        request: &Speculate,
        (id, tokens): (SequenceId, usize),
        answer: &Answer,
        draw: u64,
    ) -> Option<(Query, Check)> {
        let layer = usize::from(request.layer);
        let needs = self.methods[self.sequence(id).ok()?.method].needs();
        let query = match (request.rest, needs.hint) {
            (true, _) | (false, HintSource::Current) => Query::True,
            (false, HintSource::Ahead | HintSource::Previous) if !needs.rest => Query::Predicted,
            _ => return None,
        };
        if request.queries != 1 || request.fetch {
            return None;
        }
        let kv_head = (draw % self.shape.kv_heads as u64) as usize;
        let weights = self.weights(id, layer, tokens, kv_head)?;
        let first = self.shape.candidates(tokens).start;
        let mut named = Selection::default();
        if request.rest {
            named.clone_from(&self.sequence(id).ok()?.residency[layer].named);
        } else if needs.cpu_attention.is_some() {
            // Rows that the lane attended itself are named nowhere.
            named.clone_from(&self.buffers.selection);
        } else {
            name(answer, self.shape.kv_heads, &mut named);
        }
        if named.heads() != self.shape.kv_heads {
            return None;
        }
        let tokens = named.tokens(kv_head).filter_map(|token| (token as usize).checked_sub(first));
        Some((query, compare(&weights, tokens)))
    }

    /// The share of the attention that each row has which a selection may name: the mean over the group's query heads.
    fn weights(&mut self, id: SequenceId, layer: usize, tokens: usize, kv_head: usize) -> Option<Vec<f32>> {
        let candidates = self.shape.candidates(tokens);
        let (n, group, d) = (candidates.len(), self.shape.group(), self.shape.head_dim);
        let sequence = self.sequence(id).ok()?;
        let there = candidates.end <= sequence.lens[layer] as usize;
        let products = n.saturating_mul(group * d);
        if n == 0 || !there || products > PRODUCTS_MAX || self.buffers.hint.len() < self.shape.query_heads * d
        {
            return None;
        }
        let pages = sequence.layer_pages(layer, self.shape.kv_heads);
        let memory = std::mem::take(&mut self.buffers.pages);
        let rows = PageRows::new(&self.arena, &self.tables, self.layout, pages, memory);
        let all = TokenRange { first: candidates.start as u32, count: n as u32 };
        let away = rows.away(kv_head, &[all]).is_some();
        let mut scores = vec![0.0; if away { 0 } else { group * n }];
        if !away {
            rows.scores(
                kv_head,
                candidates,
                &self.buffers.hint[kv_head * group * d..][..group * d],
                &mut scores,
            );
        }
        self.buffers.pages = rows.into_scratch();
        let mut weights = vec![0.0; n];
        for scores in scores.chunks_exact(n) {
            Kernels::best().softmax_add(scores, 1.0 / (d as f32).sqrt(), &mut weights);
        }
        let sum: f32 = weights.iter().sum();
        if away || !(sum > 0.0 && sum.is_finite()) {
            return None;
        }
        weights.iter_mut().for_each(|weight| *weight /= sum);
        Some(weights)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn precision_and_recall_are_against_the_fewest_rows_with_nine_tenths() {
        let weights = [0.05, 0.5, 0.02, 0.3, 0.11, 0.02];
        let of = |named: &[usize]| compare(&weights, named.iter().copied());
        let all = of(&[0, 1, 2, 3, 4, 5]);
        assert_eq!((all.selected, all.needed, all.both), (6, 3, 3), "1, 3 and 4 have 0.91");
        assert!((all.covered - 1.0).abs() < 1e-6);
        let some = of(&[1, 2, 77]);
        assert_eq!((some.selected, some.needed, some.both), (2, 3, 1), "what is no row counts for nothing");
        assert!((some.covered - 0.52).abs() < 1e-6);
        assert_eq!(of(&[]).selected, 0);
    }

    #[test]
    fn about_one_in_so_many_is_due_and_none_where_nobody_asked() {
        let due = |every| (0..10_000).filter(|ticket| is_due(every, 3, *ticket).is_some()).count();
        assert_eq!((due(0), due(1)), (0, 10_000));
        assert!((50..200).contains(&due(100)), "{}", due(100));
        // Layers are asked for in turns: each is compared.
        let layers: std::collections::BTreeSet<u64> =
            (0..10_000).filter(|ticket| is_due(50, 3, *ticket).is_some()).map(|ticket| ticket % 50).collect();
        assert!(layers.len() > 40, "{}", layers.len());
    }
}
