//! `resv`: clusters of like keys, taken until a share of their weight is reached; made for streams (ReSV, the algorithm of V-Rex,
//! HPCA'26, arXiv 2512.12284).
//!
//! - *Clusters* (`table`): the signs of 32 random projections are a key's hash. In order of position a key joins the nearest
//!   recent cluster at a Hamming distance below 7, else it opens one. Of a cluster the mean key, its hash and its size are kept.
//!   A cluster that got no key of the last `recent` tokens is closed, as the paper closes those that left the device.
//! - *WiCSum* (`wicsum`): a query takes clusters in falling order of `q·c̄` until the sum of `exp(q·c̄/√d − max)·size` exceeds the
//!   share `ratio` of the total. The number of rows follows the scores. A KV head's selection is the union over its query heads
//!   and the query tokens of a block; sizes count candidates alone, so that sinks and window, which are attended always, do not
//!   use up the share.
//! - With a `budget` the union is cut to so many rows: clusters in falling order of the mean over the queries of a row's weight; of the
//!   last one the newest rows.
//!
//! The paper leaves open in which order keys are clustered, how ties and a cluster's hash are decided, whether scores are
//! exponentiated, and what a group of query heads does. What is said above are our answers; `score=raw` is the other reading.

pub mod spec;

mod table;
mod wicsum;

#[cfg(test)]
mod tests;

use kvoyant_kernels::Kernels;

pub use spec::{ResvSpec, Score};

use crate::context::SelectContext;
use crate::method::{Append, DigestKey, Method, Truncated};
use crate::needs::Needs;
use crate::random::Draw;
use crate::registry::Entry;
use crate::scratch::Scratch;
use crate::selection::Selection;
use crate::shape::Shape;
use crate::spec::MethodSpec;
use crate::store::Store;
use table::{PLANES, Tables};
use wicsum::wicsum;

/// The method's name.
pub const NAME: &str = "resv";

pub(crate) const ENTRY: Entry = Entry {
    name: NAME,
    about: "clusters of like keys, until a share of their weight is reached",
    parse: |options| Ok(Box::new(ResvSpec::from_options(options)?)),
};

/// A cluster that gives no row.
const NONE: u32 = u32::MAX;

/// Selects the rows of the clusters that hold a share of the weight.
#[derive(Debug)]
pub struct Resv {
    shape: Shape,
    options: ResvSpec,
    spec: MethodSpec,
    tables: Tables,
    kernels: Kernels,
}

impl Resv {
    /// For a model of that shape.
    #[must_use]
    pub fn new(options: ResvSpec, shape: &Shape) -> Self {
        let kernels = Kernels::best();
        let mut draw = Draw::new(&[options.seed]);
        let tables = Tables {
            head_dim: shape.head_dim,
            planes: (0..shape.head_dim * PLANES).map(|_| draw.normal()).collect(),
            distance: options.distance,
            recent: options.recent,
            clusters: options.clusters,
            kernels,
        };
        Self { shape: *shape, options, spec: MethodSpec::new(options), tables, kernels }
    }

    /// Fills `scratch.sizes` with the candidates of each cluster, and `scratch.skips` with [`NONE`].
    fn count(&self, memory: &[u8], candidates: &std::ops::Range<usize>, scratch: &mut Scratch) {
        let Scratch { sizes, skips, .. } = scratch;
        let count = self.tables.count(memory);
        sizes.clear();
        sizes.extend((0..count).map(|cluster| self.tables.size(memory, cluster)));
        let held = Tables::tokens(memory);
        for token in (0..candidates.start.min(held)).chain(candidates.end.min(held)..held) {
            if let Some(size) = sizes.get_mut(Tables::cluster_of(memory, token)) {
                *size = size.saturating_sub(1);
            }
        }
        skips.clear();
        skips.resize(count, NONE);
    }

    /// Sets `scratch.skips` to 0 for every cluster that any query of the KV head takes, and fills `scratch.group` with the mean
    /// weight of one row of each cluster.
    fn take(&self, context: &SelectContext<'_>, memory: &[u8], head: usize, scratch: &mut Scratch) {
        let Scratch { block: gathered, matrix, scores, group, sizes, skips, ids, .. } = scratch;
        let d = self.shape.head_dim;
        let queries = context.group_queries(&self.shape, head, gathered);
        let (g, count) = (queries.len() / d, sizes.len());
        let scale = 1.0 / (d as f32).sqrt();
        matrix.resize(matrix.len().max(d), 0.0);
        scores.resize(scores.len().max(g * count), 0.0);
        for cluster in (0..count).filter(|cluster| sizes[*cluster] > 0) {
            let mean = &mut matrix[..d];
            self.tables.mean(memory, cluster, mean);
            for (query, row) in queries.chunks_exact(d).zip(scores.chunks_exact_mut(count.max(1))) {
                row[cluster] = self.kernels.dot(query, mean);
            }
        }
        group.clear();
        group.resize(count, 0.0);
        for scores in scores[..g * count].chunks_exact_mut(count.max(1)) {
            // What it held of a cluster without candidates is of another selection.
            scores.iter_mut().zip(&*sizes).filter(|(_, size)| **size == 0).for_each(|(score, _)| {
                *score = f32::NEG_INFINITY;
            });
            wicsum(self.options.score, self.options.ratio.get(), scores, sizes, scale, ids, |cluster| {
                skips[cluster] = 0;
            });
            let max = self.kernels.max(scores);
            let weight = |score: f32| ((score - max) * scale).exp();
            let total: f32 =
                scores.iter().zip(&*sizes).map(|(score, size)| weight(*score) * *size as f32).sum();
            group.iter_mut().zip(&*scores).for_each(|(mean, score)| *mean += weight(*score) / total);
        }
    }

    /// Cuts what is taken to `budget` rows: sets how many of its first rows each cluster leaves out.
    fn cut(budget: usize, scratch: &mut Scratch) {
        let Scratch { group, sizes, skips, ids, .. } = scratch;
        let rows = |cluster: usize| sizes[cluster] as usize;
        ids.clear();
        ids.extend((0..skips.len() as u32).filter(|cluster| skips[*cluster as usize] == 0));
        if ids.iter().map(|cluster| rows(*cluster as usize)).sum::<usize>() <= budget {
            return;
        }
        ids.sort_unstable_by(|a, b| group[*b as usize].total_cmp(&group[*a as usize]).then(a.cmp(b)));
        let mut left = budget;
        for cluster in ids.iter().map(|cluster| *cluster as usize) {
            let taken = rows(cluster).min(left);
            skips[cluster] = (rows(cluster) - taken) as u32;
            left -= taken;
        }
    }
}

impl Method for Resv {
    fn spec(&self) -> &MethodSpec {
        &self.spec
    }

    fn needs(&self) -> Needs {
        Needs { hint: self.options.hint, digest: true, memory: true, ..Needs::default() }
    }

    fn digest_key(&self) -> Option<DigestKey> {
        let ResvSpec { distance, recent, clusters, seed, .. } = self.options;
        let parameters = [u64::from(distance), recent as u64, clusters.get().to_bits(), seed];
        Some(DigestKey { method: NAME, parameters })
    }

    fn memory_bytes(&self, max_tokens: usize) -> usize {
        self.tables.bytes(max_tokens)
    }

    fn grow_memory(&self, old: &[u8], new: &mut [u8]) {
        self.tables.grow(old, new);
    }

    fn on_append(&self, append: &Append<'_>, _digest: &mut [u8], memory: &mut [u8], scratch: &mut Scratch) {
        let d = self.shape.head_dim;
        scratch.matrix.resize(d, 0.0);
        for (at, key) in append.keys.chunks_exact(d).enumerate() {
            // A row that comes again is in its cluster already.
            if append.first_token + at == Tables::tokens(memory) {
                self.tables.push(key, memory, &mut scratch.matrix);
            }
        }
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
        let budget = self.options.budget.map_or(usize::MAX, |budget| budget.rows_of(context.tokens));
        for head in context.heads.clone() {
            let memory = store.memory(head);
            let everything = self.options.ratio.get() >= 1.0;
            if candidates.is_empty() || everything && budget >= candidates.len() {
                out.push(candidates.start, candidates.end);
                out.finish_head();
                continue;
            }
            self.count(memory, &candidates, scratch);
            self.take(context, memory, head, scratch);
            if everything {
                scratch.skips.fill(0);
            }
            Self::cut(budget, scratch);
            for token in candidates.start..candidates.end.min(Tables::tokens(memory)) {
                match scratch.skips.get_mut(Tables::cluster_of(memory, token)) {
                    Some(0) => out.push(token, token + 1),
                    None | Some(&mut NONE) => {}
                    Some(skip) => *skip -= 1,
                }
            }
            out.finish_head();
        }
    }

    fn on_truncate(&self, tokens: usize, memory: &mut [u8]) -> Truncated {
        // A mean cannot forget.
        if tokens < Tables::tokens(memory) { Truncated::Rebuild } else { Truncated::Kept }
    }
}
