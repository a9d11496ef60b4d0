//! `infinigen`: rows by their scores in a few columns of a skewed basis, one layer ahead (Lee et al., InfiniGen,
//! OSDI'24).
//!
//! - [`skew`], offline: an orthogonal matrix `A` per layer and KV head that packs queries into few columns;
//!   scores are the same in its basis. [`fold()`] puts it into the weights of models without RoPE.
//! - *Prefill:* the engine sums `|q̃|` by column ([`column_sums`]); the `⌊r·d⌋` strongest columns of each KV head
//!   are its partial index.
//! - *Digest:* every key in those columns, `[d'][P]` per page.
//! - *Decode:* the hint (layer i's query, predicted while layer i−1 runs) is turned into the same columns, and
//!   `ŝ_t = q̃·k̃_t/√d` stands for the true score. Under GQA a row's rank is the mean over the group's query heads
//!   of the softmax of `ŝ` over the candidates.
//! - *How many:* an explicit budget, or the threshold rule: a query head counts the rows with
//!   `ŝ_t > max ŝ − α`, `m` is the floor of the mean count (over the request's query heads, or per KV head), at
//!   least 1 and at most `cap`.
//! - [`pool`]: an optional limit on the tokens kept.
//!
//! The paper has multi-head attention, one mean count over a whole batch and the index of the batch's first
//! member for all; here counts and indices are those of each sequence.

pub mod artifact;
mod digest;
mod fold;
mod index;
pub mod pool;
pub mod skew;
pub mod spec;

#[cfg(test)]
mod tests;

use std::sync::Arc;

use kvoyant_kernels::Kernels;

pub use artifact::SkewArtifact;
pub use fold::fold;
pub use pool::{CounterPool, PoolLimits};
pub use skew::{HeadRows, SkewBuilder, column_sums};
pub use spec::{Amount, Count, Granularity, IndexRule, InfinigenSpec};

use crate::artifact::{ArtifactKind, Artifacts};
use crate::context::SelectContext;
use crate::error::MethodError;
use crate::method::{Append, DigestKey, Method, Truncated};
use crate::needs::Needs;
use crate::pages;
use crate::registry::Entry;
use crate::scratch::Scratch;
use crate::selection::{Selection, TokenRange};
use crate::shape::Shape;
use crate::spec::MethodSpec;
use crate::store::Store;

/// The method's name.
pub const NAME: &str = "infinigen";

pub(crate) const ENTRY: Entry = Entry {
    name: NAME,
    about: "rows by their predicted scores, one layer ahead",
    parse: |options| Ok(Box::new(InfinigenSpec::from_options(options)?)),
};

/// Selects the rows with the highest predicted scores.
#[derive(Debug)]
pub struct Infinigen {
    shape: Shape,
    options: InfinigenSpec,
    spec: MethodSpec,
    skew: Option<Arc<SkewArtifact>>,
    pool: Option<PoolLimits>,
    columns: usize,
    kernels: Kernels,
}

impl Infinigen {
    /// For a model of that shape.
    ///
    /// # Errors
    /// The artifact is missing or not this model's, or the pool is too small.
    pub fn new(options: InfinigenSpec, shape: &Shape, artifacts: &Artifacts) -> Result<Self, MethodError> {
        let skew = if options.skew {
            let artifact = artifacts.skew().ok_or(MethodError::ArtifactMissing {
                method: NAME,
                artifact: "a skew artifact (or the option `skew=off`)",
            })?;
            artifact.check(shape)?;
            Some(Arc::clone(artifact))
        } else {
            None
        };
        Ok(Self {
            shape: *shape,
            options,
            spec: MethodSpec::new(options),
            skew,
            pool: options.pool.map(|capacity| PoolLimits::new(capacity, shape)).transpose()?,
            columns: options.columns(shape.head_dim),
            kernels: Kernels::best(),
        })
    }

    fn matrix(&self, layer: usize, kv_head: usize) -> Option<&[f32]> {
        self.skew.as_ref().map(|skew| skew.matrix(layer, kv_head))
    }

    /// The rows wanted of each KV head, given how many its query heads count above the threshold; before
    /// limits by what there is.
    fn amount(&self, context: &SelectContext<'_>, counts: &[usize], kv_head: usize) -> usize {
        let tokens = context.tokens;
        let group = context.group(&self.shape);
        match self.options.amount {
            Amount::Budget(budget) => budget.rows_of(tokens),
            Amount::Threshold { cap, .. } => {
                let mean = match self.options.count {
                    Count::Mean => {
                        let counts = &counts[context.heads.clone()];
                        counts.iter().sum::<usize>() / (counts.len() * group).max(1)
                    }
                    Count::Head => counts[kv_head] / group,
                };
                mean.max(1).min(cap.rows_of(tokens))
            }
        }
    }
}

impl Method for Infinigen {
    fn spec(&self) -> &MethodSpec {
        &self.spec
    }

    fn needs(&self) -> Needs {
        Needs {
            hint: self.options.hint,
            observe: true,
            artifact: self.options.skew.then_some(ArtifactKind::Skew),
            digest: true,
            memory: self.pool.is_some(),
            drops_rows: self.pool.is_some(),
            ..Needs::default()
        }
    }

    fn digest_key(&self) -> Option<DigestKey> {
        let dtype = digest::dtype(self.shape.dtype);
        let rule = self.options.index as u64;
        let skew = self.skew.as_ref().map_or(0, |skew| skew.id());
        Some(DigestKey {
            method: NAME,
            parameters: [self.columns as u64, u64::from(dtype.code()), rule, skew],
        })
    }

    fn digest_bytes(&self) -> usize {
        self.columns * self.shape.page_rows * digest::dtype(self.shape.dtype).bytes()
    }

    fn head_state_bytes(&self) -> usize {
        self.columns * index::COLUMN_BYTES
    }

    fn init_state(&self, _layer: usize, _kv_head: usize, state: &mut [u8]) {
        index::init(state);
    }

    fn observe(&self, _layer: usize, _kv_head: usize, column_sums: &[f32], state: &mut [u8]) -> bool {
        index::choose(column_sums, state)
    }

    fn on_append(&self, append: &Append<'_>, digest: &mut [u8], _memory: &mut [u8], scratch: &mut Scratch) {
        let a = self.matrix(append.layer, append.kv_head);
        digest::gather(a, self.shape.head_dim, append.state, &mut scratch.matrix);
        self.kernels.project_columns(
            append.keys,
            &scratch.matrix,
            self.columns,
            digest::dtype(self.shape.dtype),
            digest,
            self.shape.page_rows,
            append.first_row,
        );
    }

    fn select(
        &self,
        context: &SelectContext<'_>,
        store: &mut dyn Store,
        scratch: &mut Scratch,
        out: &mut Selection,
    ) {
        out.clear();
        let candidates = self.shape.candidates(context.tokens);
        if candidates.is_empty() {
            context.heads.clone().for_each(|_| out.finish_head());
            return;
        }
        if matches!(self.options.amount, Amount::Budget(budget) if budget.rows_of(context.tokens) >= candidates.len())
        {
            for head in context.heads.clone() {
                let pool = store.memory(head);
                pages::push_live(out, candidates.start, candidates.end, |token| pool::is_live(pool, token));
                out.finish_head();
            }
            return;
        }
        self.rank(context, &*store, scratch);
        for head in context.heads.clone() {
            let pool = store.memory(head);
            let live = |token| pool::is_live(pool, token);
            let alive = if pool.is_empty() {
                candidates.len()
            } else {
                candidates.clone().filter(|token| live(*token)).count()
            };
            let wanted = self.amount(context, &scratch.counts, head).min(alive);
            let Scratch { group, pages: best, ids, top, .. } = scratch;
            let scores = &group[head * candidates.len()..][..candidates.len()];
            match self.options.granularity {
                Granularity::Row => {
                    self.kernels.top_k(scores, wanted, top, ids);
                    for token in ids.iter().map(|id| candidates.start + *id as usize) {
                        // A query with NaNs ranks dead rows with live ones.
                        if live(token) {
                            out.push(token, token + 1);
                        }
                    }
                }
                Granularity::Page => {
                    let rows = self.shape.page_rows;
                    best.clear();
                    best.extend(pages::covering(&candidates, rows).map(|page| {
                        let first = (page * rows).max(candidates.start) - candidates.start;
                        let end = ((page + 1) * rows).min(candidates.end) - candidates.start;
                        self.kernels.max(&scores[first..end])
                    }));
                    let count = if wanted == alive {
                        best.len()
                    } else {
                        pages::affordable(wanted, rows, &candidates)
                    };
                    pages::push_best(self.kernels, best, count, rows, &candidates, top, ids, |first, end| {
                        pages::push_live(out, first, end, live);
                    });
                }
            }
            out.finish_head();
        }
    }

    fn memory_bytes(&self, max_tokens: usize) -> usize {
        if self.pool.is_some() { pool::pool_bytes(max_tokens) } else { 0 }
    }

    fn on_admit(&self, tokens: usize, memory: &mut [u8], victim: &mut dyn FnMut(u32)) {
        if let Some(limits) = self.pool {
            CounterPool::new(memory, limits).admit(tokens, victim);
        }
    }

    fn on_selected(&self, selected: &[TokenRange], memory: &mut [u8]) {
        if let Some(limits) = self.pool {
            CounterPool::new(memory, limits).note_selected(selected);
        }
    }

    fn on_truncate(&self, tokens: usize, memory: &mut [u8]) -> Truncated {
        if let Some(limits) = self.pool {
            CounterPool::new(memory, limits).truncate(tokens);
        }
        Truncated::Kept
    }
}

impl Infinigen {
    /// Fills `scratch.group` (`[Hkv][candidates]`, rows to rank by) and, for the threshold rule,
    /// `scratch.counts` (`[Hkv]`, summed over each group's query heads).
    fn rank(&self, context: &SelectContext<'_>, store: &dyn Store, scratch: &mut Scratch) {
        let Scratch { rows: queries, block: gathered, matrix, scores, group, counts, .. } = scratch;
        let (d, g, rows) = (self.shape.head_dim, context.group(&self.shape), self.shape.page_rows);
        let dtype = digest::dtype(self.shape.dtype);
        let candidates = self.shape.candidates(context.tokens);
        // Whole pages are scored, candidates or not: `offset` rows of the first come before them.
        let pages = pages::covering(&candidates, rows);
        let (stride, len) = (pages.len() * rows, candidates.len());
        let offset = candidates.start - pages.start * rows;
        let root = (d as f32).sqrt();

        group.clear();
        group.resize(self.shape.kv_heads * len, 0.0);
        counts.clear();
        counts.resize(self.shape.kv_heads, 0);
        queries.resize(g * self.columns, 0.0);
        scores.resize(g * stride, 0.0);
        for head in context.heads.clone() {
            digest::gather(self.matrix(context.layer, head), d, store.state(head), matrix);
            let hints = context.group_queries(&self.shape, head, gathered).chunks_exact(d);
            for (hint, query) in hints.zip(queries.chunks_exact_mut(self.columns)) {
                self.kernels.project(hint, matrix, query);
            }
            for (at, page) in pages.clone().enumerate() {
                let block = store.page(head, page);
                let out = &mut scores[at * rows..];
                self.kernels.score_columns(dtype, queries, g, block, rows, out, stride);
            }

            let pool = store.memory(head);
            let mean = &mut group[head * len..(head + 1) * len];
            for scores in scores.chunks_exact_mut(stride) {
                let scores = &mut scores[offset..offset + len];
                if !pool.is_empty() {
                    mask_dead(pool, candidates.start, scores);
                }
                self.kernels.softmax_add(scores, 1.0 / root, mean);
                if let Amount::Threshold { alpha, .. } = self.options.amount {
                    // Scores are unscaled: the threshold is stretched instead.
                    let threshold = self.kernels.max(scores) - alpha * root;
                    counts[head] += self.kernels.count_above(scores, threshold);
                }
            }
            if !pool.is_empty() {
                // A live row's softmax may round to 0; no dead one may rank beside it.
                mask_dead(pool, candidates.start, mean);
            }
        }
    }
}

/// Scores of rows that left the pool become `−∞`.
fn mask_dead(pool: &[u8], first: usize, scores: &mut [f32]) {
    for (at, score) in scores.iter_mut().enumerate() {
        if !pool::is_live(pool, first + at) {
            *score = f32::NEG_INFINITY;
        }
    }
}
