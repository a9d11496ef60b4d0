//! `dynsplit`: pages that end where the text does, "DynSplit-style" (after DynSplit-KV, arXiv 2602.03184).
//!
//! Only the abstract of the paper is public. What it says: blocks end at delimiters that are chosen by an importance score, within
//! limits, and blocks of any length are mapped to a form of fixed length, so that selection stays a dense scan. The scores here are
//! a reconstruction: the paper's asks how later tokens attend to the near and the far side of a delimiter, and no attention rows
//! come with appended keys. `score=keys` takes `1 − cos` of the mean keys on both sides, which no query enters: where the keys
//! turn, later queries will want the one side or the other. `score=marks` takes the strongest delimiter.
//!
//! *Memory.* Per KV head the ends of blocks and a digest of fixed length for each (the ranges of its channels, or its mean key).
//! *Selection.* As in [`crate::quest`]: a block's score is the mean over the group's queries of the softmax over the blocks of its
//! bounds. Blocks are taken by falling score while they fit the budget; one that does not fit is passed over, eight at most.

mod blocks;
mod spec;
#[cfg(test)]
mod tests;

use crate::context::SelectContext;
use crate::method::{Append, DigestKey, Method, Truncated};
use crate::needs::Needs;
use crate::registry::Entry;
use crate::scratch::Scratch;
use crate::selection::Selection;
use crate::shape::Shape;
use crate::spec::MethodSpec;
use crate::store::Store;

use blocks::Layout;
pub use spec::{Boundary, Digest, DynsplitSpec, Score};

/// The method's name.
pub const NAME: &str = "dynsplit";

pub(crate) const ENTRY: Entry = Entry {
    name: NAME,
    about: "blocks that end where the text does, by their bounds",
    parse: |options| Ok(Box::new(DynsplitSpec::from_options(options)?)),
};

/// After so many blocks that do not fit, no more are looked at.
const SKIPS: usize = 8;

/// Selects blocks of different lengths.
#[derive(Debug)]
pub struct Dynsplit {
    shape: Shape,
    options: DynsplitSpec,
    spec: MethodSpec,
    layout: Layout,
}

impl Dynsplit {
    /// For a model of that shape.
    #[must_use]
    pub fn new(options: DynsplitSpec, shape: &Shape) -> Self {
        let (spec, layout) = (MethodSpec::new(options), Layout::new(options, shape));
        Self { shape: *shape, options, spec, layout }
    }

    /// Scores of the queries `[g][d]` for the blocks from `first` on, `[g][count]`.
    fn score(
        &self,
        memory: &[u8],
        first: usize,
        count: usize,
        queries: &[f32],
        (keys, digest, bounds): (&mut Vec<f32>, &mut Vec<f32>, &mut Vec<f32>),
        scores: &mut Vec<f32>,
    ) {
        let (kernels, d) = (self.layout.kernels, self.shape.head_dim);
        let g = queries.len() / d;
        digest.resize(self.layout.values(), 0.0);
        bounds.resize(g, 0.0);
        scores.resize(g * count, 0.0);
        for at in 0..count {
            self.layout.digest(memory, first + at, keys, digest);
            match self.options.digest {
                Digest::Bounds => kernels.page_bounds(queries, g, digest, bounds),
                Digest::Mean => {
                    let dots = queries.chunks_exact(d).map(|query| kernels.dot(query, digest));
                    bounds.iter_mut().zip(dots).for_each(|(bound, dot)| *bound = dot);
                }
            }
            bounds.iter().enumerate().for_each(|(query, bound)| scores[query * count + at] = *bound);
        }
    }
}

impl Method for Dynsplit {
    fn spec(&self) -> &MethodSpec {
        &self.spec
    }

    fn needs(&self) -> Needs {
        let marks = self.options.boundary == Boundary::Dynamic;
        Needs { hint: self.options.hint, digest: true, memory: true, marks, ..Needs::default() }
    }

    fn digest_key(&self) -> Option<DigestKey> {
        let DynsplitSpec { boundary, min, max, page, score, candidates, digest, .. } = self.options;
        let words = [boundary as u64, score as u64, u64::from(candidates), digest as u64];
        let words = words.into_iter().fold(u64::from(self.shape.dtype.code()), |all, word| all << 8 | word);
        Some(DigestKey { method: NAME, parameters: [words, min as u64, max as u64, page as u64] })
    }

    fn on_append(&self, append: &Append<'_>, _digest: &mut [u8], memory: &mut [u8], scratch: &mut Scratch) {
        let Scratch { matrix, rows, .. } = scratch;
        self.layout.append(append.first_token, append.keys, append.marks, memory, matrix, rows);
    }

    fn select(
        &self,
        context: &SelectContext<'_>,
        store: &mut dyn Store,
        scratch: &mut Scratch,
        out: &mut Selection,
    ) {
        out.clear();
        let Scratch { block, rows: digest, matrix: keys, scores, group, pages: bounds, ids, top, .. } =
            scratch;
        let candidates = self.shape.candidates(context.tokens);
        let budget = self.options.budget.rows_of(context.tokens);
        for head in context.heads.clone() {
            if budget >= candidates.len() {
                out.push(candidates.start, candidates.end);
                out.finish_head();
                continue;
            }
            let memory = store.memory(head);
            // The current token's key may come after the request.
            let last = self.layout.tokens(memory).min(candidates.end);
            let first = self.layout.block_of(memory, candidates.start);
            let count = match last.checked_sub(1) {
                Some(last) if last >= candidates.start => self.layout.block_of(memory, last) + 1,
                _ => 0,
            };
            let count = count.min(self.layout.blocks(memory)).saturating_sub(first);
            let queries = context.group_queries(&self.shape, head, block);
            self.score(memory, first, count, queries, (keys, digest, bounds), scores);
            group.clear();
            group.resize(count, 0.0);
            for bounds in scores.chunks_exact(count.max(1)) {
                self.layout.kernels.softmax_add(bounds, 1.0 / (self.shape.head_dim as f32).sqrt(), group);
            }
            let tokens = |at: u32| {
                let tokens = self.layout.block(memory, first + at as usize);
                tokens.start.max(candidates.start)..tokens.end.min(candidates.end)
            };
            let length = |at: u32| match self.options.boundary {
                // Pages at the ends count as whole ones, as Quest has it.
                Boundary::Fixed => self.options.page,
                Boundary::Dynamic => tokens(at).len(),
            };
            // No more can be taken or passed over: but for those at the ends, blocks have a least length.
            let most = budget / self.layout.shortest() + SKIPS + 2;
            self.layout.kernels.top_k(group, most, top, ids);
            let weight =
                |at: u32| if group[at as usize].is_nan() { f32::NEG_INFINITY } else { group[at as usize] };
            ids.sort_unstable_by(|a, b| weight(*b).total_cmp(&weight(*a)).then(a.cmp(b)));
            let (mut left, mut skips, mut taken) = (budget, 0, 0);
            for at in 0..ids.len() {
                let rows = length(ids[at]);
                if rows <= left {
                    left -= rows;
                    ids[taken] = ids[at];
                    taken += 1;
                } else {
                    skips += 1;
                    if skips > SKIPS {
                        break;
                    }
                }
            }
            if taken == 0
                && let Some(best) = ids.first()
            {
                // Nothing fits: the newest rows of the best one, or a whole page.
                let tokens = tokens(*best);
                let rows = if self.options.boundary == Boundary::Fixed { tokens.len() } else { budget };
                out.push(tokens.end.saturating_sub(rows).max(tokens.start), tokens.end);
            }
            ids.truncate(taken);
            ids.sort_unstable();
            // Blocks lie one behind the other, but for a memory's that lies.
            let mut from = candidates.start;
            for tokens in ids.iter().map(|id| tokens(*id)) {
                out.push(tokens.start.max(from), tokens.end);
                from = from.max(tokens.end);
            }
            out.finish_head();
        }
    }

    fn memory_bytes(&self, max_tokens: usize) -> usize {
        self.layout.bytes(max_tokens)
    }

    fn on_truncate(&self, tokens: usize, memory: &mut [u8]) -> Truncated {
        // A block that has its end cannot be opened again.
        if tokens < self.layout.tokens(memory) { Truncated::Rebuild } else { Truncated::Kept }
    }
}
