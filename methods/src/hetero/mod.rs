//! `hetero`: heads that choose once, for others, or again when their attention drifts (HeteroCache, ACL'26, arXiv 2601.13684).
//!
//! *Roles.* Calibration ([`profile`]) finds heads that keep their choice (anchors), heads that choose alike (a pivot and its
//! satellites), and the rest (volatile). *Choice.* At the end of the prompt each head but the satellites takes its best rows by exact scores:
//! softmax per query, averaged over five neighbours, the largest over the group's queries. A satellite takes the best of its
//! pivot's. *Drift.* Pivots and volatile heads keep their queries of the last steps; every few steps, off the critical path
//! ([`Method::prefetch`]), it is seen how much of their choice is still among the best by each, and if that is too little by most of
//! them, which passes over a short excursion, the best by the last one serve from the next step on.
//!
//! A layer's budget is shared by role: most for pivots and volatile heads. Rows that leave the window after a choice are kept as well, as in
//! the paper, here in place of the choice's last ones and up to half of the budget.

mod memory;
pub mod profile;
mod roles;
mod spec;
#[cfg(test)]
mod tests;

use std::ops::Range;

use kvoyant_kernels::Kernels;

use crate::artifact::{ArtifactKind, Artifacts};
use crate::context::SelectContext;
use crate::error::MethodError;
use crate::method::{DigestKey, Method, Truncated};
use crate::needs::Needs;
use crate::registry::Entry;
use crate::scratch::Scratch;
use crate::selection::Selection;
use crate::shape::Shape;
use crate::spec::{MethodSpec, Spec};
use crate::store::{RowSource, Store};

use memory::Memory;
use roles::Head;
pub(crate) use roles::parts;
pub use roles::{Role, Weights};
pub use spec::{HeteroSpec, Roles};

/// The method's name.
pub const NAME: &str = "hetero";

pub(crate) const ENTRY: Entry = Entry {
    name: NAME,
    about: "heads that choose once, for others, or again when their attention drifts",
    parse: |options| Ok(Box::new(HeteroSpec::from_options(options)?)),
};

/// Neighbours on either side that a row's weight is averaged with.
const REACH: usize = 2;

/// Selects by the roles of heads.
#[derive(Debug)]
pub struct Hetero {
    shape: Shape,
    options: HeteroSpec,
    spec: MethodSpec,
    /// `[layers][kv_heads]`.
    layers: Vec<Vec<Head>>,
    /// Tells artifacts apart.
    id: u64,
    kernels: Kernels,
}

/// A head that chooses, in one request.
struct Chooser<'a> {
    /// The head whose query and rows decide.
    head: usize,
    /// Rows that it chooses.
    rows: usize,
    /// Rows that it takes itself.
    own: usize,
    source: &'a dyn RowSource,
}

impl Hetero {
    /// For a model of that shape.
    ///
    /// # Errors
    /// The roles artifact is missing, of another model, or holds roles that do not fit together.
    pub fn new(options: HeteroSpec, shape: &Shape, artifacts: &Artifacts) -> Result<Self, MethodError> {
        let (mut layers, id) = match options.roles {
            Roles::None => (roles::none(shape), 0),
            Roles::Calibrated => {
                let artifact = artifacts.tensors(NAME, ArtifactKind::Roles, shape)?;
                (roles::read(artifact, shape)?, artifact.id())
            }
        };
        layers.iter_mut().for_each(|heads| options.weights.fill(heads));
        let spec = MethodSpec::new(options);
        Ok(Self { shape: *shape, options, spec, layers, id, kernels: Kernels::best() })
    }

    /// Budgets of a layer's heads in a sequence of that length.
    fn share(&self, layer: usize, tokens: usize, out: &mut Vec<usize>) {
        let most = self.shape.candidates(tokens).len();
        roles::share(self.options.budget.rows_of(tokens), most, &self.layers[layer], out);
    }

    fn chooser<'a>(
        &self,
        layer: usize,
        head: usize,
        shares: &[usize],
        source: &'a dyn RowSource,
    ) -> Chooser<'a> {
        let served = self.layers[layer].iter().zip(shares).filter(|(other, _)| other.pivot == head);
        let rows = served.map(|(_, rows)| *rows).max().unwrap_or(0);
        Chooser { head, rows, own: shares[head], source }
    }

    /// Puts the best rows by `queries` `[n][d]` into `ids`, in rising order and counted from the first candidate; their weights are in
    /// `group` then.
    fn best(
        &self,
        chooser: &Chooser<'_>,
        candidates: &Range<usize>,
        queries: &[f32],
        (scores, pooled, group): (&mut Vec<f32>, &mut Vec<f32>, &mut Vec<f32>),
        (top, ids): (&mut kvoyant_kernels::TopKScratch, &mut Vec<u32>),
    ) {
        let (count, d) = (candidates.len(), self.shape.head_dim);
        ids.clear();
        group.clear();
        group.resize(count, 0.0);
        if count == 0 {
            return;
        }
        scores.resize(queries.len() / d * count, 0.0);
        chooser.source.scores(chooser.head, candidates.clone(), queries, scores);
        for scores in scores.chunks_exact(count) {
            pooled.clear();
            pooled.resize(count, 0.0);
            self.kernels.softmax_add(scores, 1.0 / (d as f32).sqrt(), pooled);
            for (at, best) in group.iter_mut().enumerate() {
                let around = &pooled[at.saturating_sub(REACH)..(at + REACH + 1).min(count)];
                *best = best.max(around.iter().sum::<f32>() / (2 * REACH + 1) as f32);
            }
        }
        self.kernels.top_k(group, chooser.rows, top, ids);
    }

    /// Makes a head's choice, in the order of weight.
    fn choose(
        &self,
        chooser: &Chooser<'_>,
        tokens: usize,
        queries: &[f32],
        memory: &mut Memory<'_>,
        scratch: &mut Scratch,
    ) {
        let Scratch { scores, pages: pooled, group, top, ids, .. } = scratch;
        let candidates = self.shape.candidates(tokens);
        self.best(chooser, &candidates, queries, (scores, pooled, group), (top, ids));
        keep(memory, candidates.start, tokens, group, ids);
    }

    /// Queries that a look takes.
    fn looks(&self) -> usize {
        self.options.looks.min(self.options.every)
    }

    fn memory<'a>(&self, bytes: &'a mut [u8]) -> Memory<'a> {
        Memory::new(bytes, &self.shape, self.looks())
    }

    /// Where queries wait: sees whether the choice has drifted from most of them, and makes it anew by the last if so. Gives
    /// whether it did. Queries of a longer sequence than the one that is asked for wait on: its rows need not be there.
    fn refresh(
        &self,
        context: &SelectContext<'_>,
        head: usize,
        memory: &mut Memory<'_>,
        scratch: &mut Scratch,
    ) -> bool {
        let (layer, tokens) = (context.layer, memory.query_tokens());
        if tokens == 0 || tokens > context.tokens || self.looks() == 0 {
            return false;
        }
        let Scratch { scores, pages: pooled, group, top, ids, hits: kept, counts, rows: queries, .. } =
            scratch;
        self.share(layer, tokens, counts);
        let chooser = self.chooser(layer, head, counts, context.rows);
        memory.take_queries(queries);
        let candidates = self.shape.candidates(tokens);
        kept.clear();
        kept.extend(memory.ids());
        kept.sort_unstable();
        let recent = self.recent(memory, &candidates, chooser.own);
        let gone = |ids: &[u32]| {
            let still = ids.iter().filter(|id| {
                let token = candidates.start + **id as usize;
                recent.contains(&token) || kept.binary_search(&(token as u32)).is_ok()
            });
            let least = ids.len().min(kept.len() + recent.len());
            (still.count() as f32) < self.options.drift * least as f32
        };
        // Of an even number half are enough: the lower median.
        let (looks, enough) = (self.looks(), self.looks().div_ceil(2));
        let (mut drifted, mut stayed) = (0, 0);
        let mut best = |queries: &[f32], ids: &mut Vec<u32>| {
            let buffers = (&mut *scores, &mut *pooled, &mut *group);
            self.best(&chooser, &candidates, queries, buffers, (&mut *top, ids));
        };
        let (before, last) = queries.split_at(queries.len() - queries.len() / looks);
        for queries in before.chunks_exact(last.len()) {
            if drifted == enough {
                break;
            }
            best(queries, ids);
            if gone(ids) {
                drifted += 1;
            } else {
                stayed += 1;
            }
            if stayed + enough > looks {
                return false;
            }
        }
        best(last, ids);
        if drifted + usize::from(gone(ids)) < enough {
            return false;
        }
        keep(memory, candidates.start, tokens, group, ids);
        true
    }

    /// The rows that left the window since the choice, the newest of them, for a head that takes `rows`.
    fn recent(&self, memory: &Memory<'_>, candidates: &Range<usize>, rows: usize) -> Range<usize> {
        let since = self.shape.candidates(memory.chosen_tokens()).end.min(candidates.end);
        since.max(candidates.end - (rows / 2).min(candidates.len()))..candidates.end
    }

    /// Where the choice is kept that a head takes, in a request for `heads`: with its pivot if that is asked for too.
    fn place(&self, layer: usize, head: usize, heads: &Range<usize>) -> usize {
        let pivot = self.layers[layer][head].pivot;
        if heads.contains(&pivot) { pivot } else { head }
    }

    /// A head's part of a choice.
    fn push(
        &self,
        memory: &Memory<'_>,
        candidates: &Range<usize>,
        rows: usize,
        ids: &mut Vec<u32>,
        out: &mut Selection,
    ) {
        if rows >= candidates.len() {
            return out.push(candidates.start, candidates.end);
        }
        let recent = self.recent(memory, candidates, rows);
        ids.clear();
        // What was chosen for a longer sequence may lie beyond the end of this one; what an image brings may be anything.
        let before = candidates.start..recent.start;
        let within = memory.ids().filter(|id| before.contains(&(*id as usize)));
        ids.extend(within.take(rows - recent.len()));
        ids.sort_unstable();
        ids.dedup();
        for id in ids.iter() {
            out.push(*id as usize, *id as usize + 1);
        }
        out.push(recent.start, recent.end);
    }
}

/// Keeps a choice: its rows by falling weight.
fn keep(memory: &mut Memory<'_>, first: usize, tokens: usize, weights: &[f32], ids: &mut [u32]) {
    // The weights are sums of exponentials: none is negative, and what is no number counts as nothing.
    let weight = |id: u32| if weights[id as usize] > 0.0 { weights[id as usize] } else { 0.0 };
    ids.sort_unstable_by(|a, b| weight(*b).total_cmp(&weight(*a)).then(a.cmp(b)));
    memory.keep(tokens, ids.iter().map(|id| first as u32 + id));
}

impl Method for Hetero {
    fn spec(&self) -> &MethodSpec {
        &self.spec
    }

    fn needs(&self) -> Needs {
        Needs {
            hint: self.options.hint,
            artifact: self.options.artifact(),
            memory: true,
            rows: true,
            prefetch: true,
            ..Needs::default()
        }
    }

    fn digest_key(&self) -> Option<DigestKey> {
        Some(DigestKey { method: NAME, parameters: [self.id, self.options.roles as u64, 0, 0] })
    }

    fn select(
        &self,
        context: &SelectContext<'_>,
        store: &mut dyn Store,
        scratch: &mut Scratch,
        out: &mut Selection,
    ) {
        out.clear();
        let SelectContext { layer, tokens, .. } = *context;
        let candidates = self.shape.candidates(tokens);
        for head in context.heads.clone() {
            let place = self.place(layer, head, &context.heads);
            let chooser = self.layers[layer][head].pivot;
            if place != head {
                continue;
            }
            let mut memory = self.memory(store.memory_mut(place));
            let decode = context.queries == 1;
            // A choice lasts while the sequence grows, step by step.
            let grows = (memory.chosen_tokens()..=memory.last_tokens() + self.shape.window).contains(&tokens);
            if decode && memory.is_lasting() && grows {
                self.refresh(context, chooser, &mut memory, scratch);
                let (every, looks) = (self.options.every, self.looks());
                if self.layers[layer][chooser].role != Role::Anchor {
                    let step = memory.count_step();
                    // The last steps before a look.
                    if let Some(number) =
                        (step + looks).checked_sub(every.saturating_add(1)).filter(|number| *number < looks)
                    {
                        let queries = context.group_queries(&self.shape, chooser, &mut scratch.block);
                        memory.put_query(number, queries);
                        if step == every {
                            memory.wait(tokens);
                        }
                    }
                }
            } else {
                // The prompt's end, or a block of it: a block's choice serves that block alone.
                self.share(layer, tokens, &mut scratch.counts);
                let chooser = self.chooser(layer, chooser, &scratch.counts, context.rows);
                let mut buffer = std::mem::take(&mut scratch.block);
                let queries = context.group_queries(&self.shape, chooser.head, &mut buffer);
                self.choose(&chooser, tokens, queries, &mut memory, scratch);
                scratch.block = buffer;
                memory.set_lasting(decode);
            }
            memory.set_last_tokens(tokens);
        }
        self.share(layer, tokens, &mut scratch.counts);
        for head in context.heads.clone() {
            let place = self.place(layer, head, &context.heads);
            let memory = self.memory(store.memory_mut(place));
            self.push(&memory, &candidates, scratch.counts[head], &mut scratch.ids, out);
            out.finish_head();
        }
    }

    fn prefetch(
        &self,
        context: &SelectContext<'_>,
        store: &mut dyn Store,
        scratch: &mut Scratch,
        out: &mut Selection,
    ) -> bool {
        out.clear();
        let SelectContext { layer, tokens, .. } = *context;
        let candidates = self.shape.candidates(tokens);
        let mut renewed = std::mem::take(&mut scratch.sizes);
        renewed.clear();
        for head in context.heads.clone() {
            if self.place(layer, head, &context.heads) == head {
                let mut memory = self.memory(store.memory_mut(head));
                let chooser = self.layers[layer][head].pivot;
                if self.refresh(context, chooser, &mut memory, scratch) {
                    renewed.push(head as u32);
                }
            }
        }
        self.share(layer, tokens, &mut scratch.counts);
        for head in context.heads.clone() {
            let place = self.place(layer, head, &context.heads);
            if renewed.contains(&(place as u32)) {
                let memory = self.memory(store.memory_mut(place));
                self.push(&memory, &candidates, scratch.counts[head], &mut scratch.ids, out);
            }
            out.finish_head();
        }
        scratch.sizes = renewed;
        out.total_rows() > 0
    }

    fn memory_bytes(&self, max_tokens: usize) -> usize {
        // No head gets more than its layer has, nor than there is.
        let rows =
            self.options.budget.rows_of(max_tokens).saturating_mul(self.shape.kv_heads).min(max_tokens);
        memory::bytes(&self.shape, self.looks(), rows)
    }

    fn on_truncate(&self, tokens: usize, memory: &mut [u8]) -> Truncated {
        self.memory(memory).truncate(tokens);
        Truncated::Kept
    }
}
