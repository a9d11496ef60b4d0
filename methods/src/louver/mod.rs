//! `louver`: every row at or above a threshold, none missed (Dehghankar and Asudeh, Louver, arXiv 2605.06763).
//!
//! Selection as a halfspace search: of each query head, all rows with `q·k_t ≥ τ`.
//! - `digest`: rows of a page in groups of 8, each with a box and a ball around its keys. A group whose upper bound is below τ
//!   has no such row, rounding included.
//! - The other groups' rows are scored exactly where they lie ([`crate::RowSource`]), so that only true hits are moved.
//! - `tau`: τ of each query is a score of a sample: by a budget (the score that its share of the sample reaches), the largest
//!   (`sample-max`), or the one below the first wide gap (`sample-gap`).
//!
//! The selection of a KV head is the union over its query heads, and query tokens. How many rows that is depends on the scores:
//! with equal ones it is all of them. A `cap` limits it; beyond, the best by the mean over the queries of their softmax over the
//! rows found are taken, and rows above τ are lost.
//!
//! The reference's indexed path prunes by centres without radii and by capped lists, and loses rows; so does `gate=centre`, which
//! is there to be compared with.

pub mod spec;

mod digest;
mod tau;

#[cfg(test)]
mod tests;

use std::ops::Range;

use kvoyant_kernels::Kernels;

pub use spec::{Gate, LouverSpec, Tau};

use crate::context::SelectContext;
use crate::error::MethodError;
use crate::method::{Append, DigestKey, Method};
use crate::needs::Needs;
use crate::pages;
use crate::registry::Entry;
use crate::scratch::Scratch;
use crate::selection::Selection;
use crate::shape::Shape;
use crate::spec::{MethodSpec, Spec};
use crate::store::Store;
use digest::Groups;

/// The method's name.
pub const NAME: &str = "louver";

pub(crate) const ENTRY: Entry = Entry {
    name: NAME,
    about: "every row at or above a threshold, none missed",
    parse: |options| Ok(Box::new(LouverSpec::from_options(options)?)),
};

/// Rows that are scored at once at most.
const RUN: usize = 256;

/// Selects every row at or above a threshold.
#[derive(Debug)]
pub struct Louver {
    shape: Shape,
    options: LouverSpec,
    spec: MethodSpec,
    groups: Groups,
    kernels: Kernels,
}

impl Louver {
    /// For a model of that shape.
    ///
    /// # Errors
    /// [`MethodError::Unsuitable`] where `group` does not divide the arena's page.
    pub fn new(options: LouverSpec, shape: &Shape) -> Result<Self, MethodError> {
        if options.group == 0 || !shape.page_rows.is_multiple_of(options.group) {
            return Err(MethodError::Unsuitable {
                method: NAME,
                reason: format!(
                    "its groups of {} rows do not divide the arena's page of {}; set `group` to a divisor",
                    options.group, shape.page_rows
                ),
            });
        }
        let kernels = Kernels::best();
        let groups = Groups { head_dim: shape.head_dim, rows: options.group, dtype: shape.dtype, kernels };
        Ok(Self { shape: *shape, options, spec: MethodSpec::new(options), groups, kernels })
    }

    /// For every KV head of the request all candidates `t` with `q_i·k_t ≥ tau_i` for any of its queries, in unscaled scores as
    /// `context.rows` gives them. `tau` is `[heads][queries · g]`; a cap is not looked at.
    ///
    /// # Panics
    /// Where `tau` is of another length.
    pub fn select_above(
        &self,
        context: &SelectContext<'_>,
        store: &dyn Store,
        tau: &[f32],
        scratch: &mut Scratch,
        out: &mut Selection,
    ) {
        out.clear();
        let g = context.group(&self.shape);
        assert_eq!(tau.len(), context.heads.len() * g, "one threshold per query");
        for (head, tau) in context.heads.clone().zip(tau.chunks_exact(g)) {
            self.find(context, store, head, tau, scratch);
            push(&scratch.hits, out);
        }
    }

    /// Fills `scratch.hits` with the candidates of one KV head at or above any query's threshold.
    fn find(
        &self,
        context: &SelectContext<'_>,
        store: &dyn Store,
        head: usize,
        tau: &[f32],
        scratch: &mut Scratch,
    ) {
        let Scratch { block: gathered, matrix, scores, norms, bounds, hits, .. } = scratch;
        let (d, size, page_rows) = (self.shape.head_dim, self.options.group, self.shape.page_rows);
        let candidates = self.shape.candidates(context.tokens);
        let queries = context.group_queries(&self.shape, head, gathered);
        norms.clear();
        norms.extend(queries.chunks_exact(d).map(digest::norm));
        bounds.resize(norms.len(), 0.0);
        scores.resize(scores.len().max(norms.len() * RUN.max(size)), 0.0);
        hits.clear();
        let mut run = candidates.start..candidates.start;
        let mut verify = |run: &Range<usize>, hits: &mut Vec<u32>| {
            let scores = &mut scores[..tau.len() * run.len()];
            context.rows.scores(head, run.clone(), queries, scores);
            hits.extend(run.clone().enumerate().filter_map(|(at, token)| {
                let mut of_row = scores[at..].iter().step_by(run.len()).zip(tau);
                of_row.any(|(score, tau)| score >= tau).then_some(token as u32)
            }));
        };
        for group in pages::covering(&candidates, size) {
            let row = group * size;
            let block = &store.page(head, row / page_rows)[row % page_rows / size * self.groups.bytes()..]
                [..self.groups.bytes()];
            match self.options.gate {
                Gate::Sound => self.groups.bounds(block, queries, norms, matrix, bounds),
                Gate::Centre => self.groups.centres(block, queries, matrix, bounds),
            }
            // What is no number is no reason to leave a group out.
            if bounds.iter().zip(tau).all(|(bound, tau)| *bound < f64::from(*tau)) {
                continue;
            }
            let rows = row.max(candidates.start)..(row + size).min(candidates.end);
            if run.end != rows.start || run.len() + rows.len() > RUN.max(size) {
                if !run.is_empty() {
                    verify(&run, hits);
                }
                run = rows;
            } else {
                run.end = rows.end;
            }
        }
        if !run.is_empty() {
            verify(&run, hits);
        }
    }

    /// Fills `scratch.taus` with the threshold of each query of one KV head.
    fn thresholds(&self, context: &SelectContext<'_>, head: usize, wanted: usize, scratch: &mut Scratch) {
        let Scratch { block: gathered, scores, group, taus, .. } = scratch;
        let candidates = self.shape.candidates(context.tokens);
        let queries = context.group_queries(&self.shape, head, gathered);
        let g = queries.len() / self.shape.head_dim;
        let count = self.options.sample.min(candidates.len());
        scores.resize(scores.len().max(g * count), 0.0);
        group.resize(group.len().max(g), 0.0);
        for at in 0..count {
            let row = tau::sampled(at, count, &candidates);
            context.rows.scores(head, row..row + 1, queries, &mut group[..g]);
            group[..g].iter().enumerate().for_each(|(query, score)| scores[query * count + at] = *score);
        }
        taus.clear();
        taus.extend((0..g).map(|query| {
            let scores = &mut scores[query * count..(query + 1) * count];
            tau::threshold(self.options.tau, scores, wanted, candidates.len())
        }));
    }

    /// Leaves in `scratch.hits` the `cap` best by the mean over the queries of the softmax of their scores over the hits.
    fn shrink(&self, context: &SelectContext<'_>, head: usize, cap: usize, scratch: &mut Scratch) {
        let Scratch { block: gathered, scores, group, hits, ids, top, .. } = scratch;
        let (d, count) = (self.shape.head_dim, hits.len());
        let queries = context.group_queries(&self.shape, head, gathered);
        scores.resize(scores.len().max(count), 0.0);
        group.clear();
        group.resize(count, 0.0);
        for query in queries.chunks_exact(d) {
            for run in hits.chunk_by(|a, b| a + 1 == *b) {
                let first = run[0] as usize;
                let at = hits.partition_point(|hit| (*hit as usize) < first);
                let scores = &mut scores[at..at + run.len()];
                context.rows.scores(head, first..first + run.len(), query, scores);
            }
            self.kernels.softmax_add(&scores[..count], 1.0 / (d as f32).sqrt(), group);
        }
        self.kernels.top_k(group, cap, top, ids);
        ids.iter().enumerate().for_each(|(to, from)| hits[to] = hits[*from as usize]);
        hits.truncate(ids.len());
    }
}

fn push(hits: &[u32], out: &mut Selection) {
    hits.iter().for_each(|hit| out.push(*hit as usize, *hit as usize + 1));
    out.finish_head();
}

impl Method for Louver {
    fn spec(&self) -> &MethodSpec {
        &self.spec
    }

    fn needs(&self) -> Needs {
        Needs { hint: self.options.hint, digest: true, rows: true, ..Needs::default() }
    }

    fn digest_key(&self) -> Option<DigestKey> {
        let parameters = [self.options.group as u64, u64::from(self.shape.dtype.code()), 0, 0];
        Some(DigestKey { method: NAME, parameters })
    }

    fn digest_bytes(&self) -> usize {
        self.shape.page_rows / self.options.group * self.groups.bytes()
    }

    fn on_append(&self, append: &Append<'_>, digest: &mut [u8], _memory: &mut [u8], scratch: &mut Scratch) {
        self.groups.append(append.keys, append.first_row, digest, &mut scratch.matrix);
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
        let wanted = self.options.budget().map(|budget| budget.rows_of(context.tokens));
        let cap = self.options.cap.map_or(usize::MAX, |cap| cap.rows_of(context.tokens));
        let all = wanted.is_some_and(|wanted| wanted >= candidates.len()) && cap >= candidates.len();
        for head in context.heads.clone() {
            if candidates.is_empty() || all {
                out.push(candidates.start, candidates.end);
                out.finish_head();
                continue;
            }
            self.thresholds(context, head, wanted.unwrap_or(0), scratch);
            let taus = std::mem::take(&mut scratch.taus);
            self.find(context, store, head, &taus, scratch);
            scratch.taus = taus;
            if scratch.hits.len() > cap {
                self.shrink(context, head, cap, scratch);
            }
            push(&scratch.hits, out);
        }
    }
}
