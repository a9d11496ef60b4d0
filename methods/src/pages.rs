//! What every page-wise selection does: the best pages, clipped to the candidates.

use std::ops::Range;

use kvoyant_kernels::{Kernels, TopKScratch};

use crate::selection::Selection;

/// Pages of `rows` rows that hold at least one candidate.
pub(crate) fn covering(candidates: &Range<usize>, rows: usize) -> Range<usize> {
    if candidates.is_empty() { 0..0 } else { candidates.start / rows..candidates.end.div_ceil(rows) }
}

/// How many pages of `rows` rows a budget buys: `⌊B/P⌋`, at least 1, and all of them where `budget` covers
/// every candidate.
pub(crate) fn affordable(budget: usize, rows: usize, candidates: &Range<usize>) -> usize {
    let all = covering(candidates, rows).len();
    if budget >= candidates.len() { all } else { (budget / rows).clamp(1, all) }
}

/// Pushes the `count` best pages, clipped to the candidates. `scores` has one score per page of
/// [`covering`].
#[allow(clippy::too_many_arguments)]
pub(crate) fn push_best(
    kernels: Kernels,
    scores: &[f32],
    count: usize,
    rows: usize,
    candidates: &Range<usize>,
    top: &mut TopKScratch,
    ids: &mut Vec<u32>,
    mut push: impl FnMut(usize, usize),
) {
    let first = covering(candidates, rows).start;
    kernels.top_k(scores, count, top, ids);
    for id in ids.iter() {
        let page = first + *id as usize;
        push((page * rows).max(candidates.start), ((page + 1) * rows).min(candidates.end));
    }
}

/// Pushes the tokens of `first..end` that are live in `counters` (all of them where there are none).
pub(crate) fn push_live(out: &mut Selection, first: usize, end: usize, live: impl Fn(usize) -> bool) {
    let mut start = first;
    for token in first..end {
        if !live(token) {
            out.push(start, token);
            start = token + 1;
        }
    }
    out.push(start, end);
}
