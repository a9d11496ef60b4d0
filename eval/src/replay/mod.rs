//! A method over a trace: every layer and step, judged by dense attention over the same rows.
//!
//! Selections are made as the daemon makes them: with the query that the method asks for, digests built row by row, floors, attention
//! rows and marks where it wants them, rows for the next step where it names some. What moves is counted by
//! [`Resident`]. Answers are made as clients make them: of resident rows too where the method attends them, with its estimate of all
//! else, and its second look by the true query. Rows that the CPU attends are attended with the query that it has, which may be the
//! predicted one. Outputs are of exact rows otherwise; what a method changes in the rows themselves (a low rank of shadowkv's keys) is seen
//! with a real model, not here.

mod feedback;
mod judge;
mod rest;

use std::time::Instant;

use kvoyant_methods::infinigen::{HeadRows, IndexRule, InfinigenSpec, SkewBuilder, column_sums};
use kvoyant_methods::mix::MixSpec;
use kvoyant_methods::{
    Artifact, ArtifactKind, Artifacts, Budget, Dtype, HintSource, Method, MethodError, MethodSpec, Replay,
    RowPart, Scratch, SelectContext, Selection, Shape,
};
use rayon::prelude::*;

pub use self::rest::estimate_bytes;
use crate::residency::Resident;
use crate::trace::{Trace, TraceError};
use crate::truth::{LayerTruth, attention};

/// Rows that a head keeps resident, as a multiple of its budget.
pub const KEEP: f64 = 2.0;

/// Rows of a page.
pub const PAGE_ROWS: usize = 32;

/// Why a method has no row for a trace.
#[derive(Debug, thiserror::Error)]
pub enum ReplayError {
    /// The trace itself.
    #[error(transparent)]
    Trace(#[from] TraceError),
    /// The method cannot be built for it.
    #[error(transparent)]
    Method(#[from] MethodError),
    /// There is no layer to select for.
    #[error("the trace has {layers} layers, of which {dense} are dense: there is nothing to select")]
    Dense {
        /// Its layers.
        layers: usize,
        /// Those that are not selected for.
        dense: usize,
    },
}

/// A trace with its truth, ready for any number of methods.
#[derive(Debug)]
pub struct Prepared<'a> {
    trace: &'a Trace,
    shape: Shape,
    /// Of the layers that are selected for.
    truths: Vec<(usize, LayerTruth)>,
}

/// What a method did, as means over layers, heads and steps unless said otherwise.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Outcome {
    /// Share of dense's attention probability that lies on the rows attended (0–1).
    pub attention_mass: f64,
    /// The same per step, mean over layers and heads: for paired comparisons.
    pub mass_of_steps: Vec<f64>,
    /// Share of dense's attention probability that was missed.
    pub missed_mass: f64,
    /// Share of the true best rows, as many as the budget has, that are among those selected.
    pub top_k_recall: f64,
    /// `‖o − o*‖ / ‖o*‖` of the attention output.
    pub output_error: f64,
    /// Rows selected per KV head, as a share of the sequence's tokens.
    pub selected_share: f64,
    /// Rows moved per KV head and step.
    pub rows_moved: f64,
    /// Rows attended by the CPU per KV head and step.
    pub rows_on_cpu: f64,
    /// Share of the selected rows that were resident; none where nothing was selected.
    pub hit_rate: Option<f64>,
    /// Bytes moved for each token, all layers together.
    pub bytes_per_token: f64,
    /// The same over the steps after the first, in which nothing was resident.
    pub bytes_per_token_steady: f64,
    /// Of `bytes_per_token`, the keys that full attention rows for the method needed beyond those attended.
    pub feedback_bytes_per_token: f64,
    /// Of these, what was brought ahead of its step, or recalled behind its back.
    pub ahead_bytes_per_token: f64,
    /// Whether all resident rows are attended, not only those selected.
    pub attends_resident: bool,
    /// Bytes of rows on the device besides sinks, window and dense layers.
    pub resident_bytes: f64,
    /// Bytes of digests, states and memories.
    pub digest_bytes: f64,
    /// Microseconds to select for one layer: the median. What is prepared for the next step is not in it: the daemon does that between
    /// requests.
    pub select_us: f64,
}

impl<'a> Prepared<'a> {
    /// Computes dense attention of every layer that is selected for.
    ///
    /// # Errors
    /// A trace that makes no sense, or has dense layers only.
    pub fn new(trace: &'a Trace) -> Result<Self, ReplayError> {
        trace.check()?;
        let (layers, dense) = (trace.shape.layers, trace.shape.dense_layers);
        if dense >= layers {
            return Err(ReplayError::Dense { layers, dense });
        }
        let truths =
            (dense..layers).into_par_iter().map(|layer| (layer, LayerTruth::of(trace, layer))).collect();
        Ok(Self { trace, shape: trace.methods_shape(PAGE_ROWS), truths })
    }

    /// The trace.
    #[must_use]
    pub fn trace(&self) -> &'a Trace {
        self.trace
    }

    /// What methods are built for.
    #[must_use]
    pub fn shape(&self) -> &Shape {
        &self.shape
    }

    /// Bytes of all K and V of the layers that are selected for, in their storage type.
    #[must_use]
    pub fn kv_bytes(&self) -> f64 {
        let rows = self.truths.len() * self.shape.kv_heads * self.trace.shape.tokens;
        (rows * row_bytes(&self.shape)) as f64
    }

    /// Skew matrices from the trace's own prompt, for traces whose model nobody calibrated.
    ///
    /// # Errors
    /// Queries or keys that have no such matrices.
    pub fn skew(&self) -> Result<Artifact, MethodError> {
        let shape = &self.trace.shape;
        let (d, heads) = (shape.head_dim, shape.kv_heads);
        let mut builder = SkewBuilder::new(&self.shape)?;
        let rows = shape.prompt_queries;
        for layer in 0..shape.layers {
            let mut keys = Vec::with_capacity(rows * heads * d);
            for token in shape.prompt() - rows..shape.prompt() {
                for head in 0..heads {
                    keys.extend_from_slice(&self.trace.keys(layer, head)[token * d..][..d]);
                }
            }
            builder.observe(layer, self.trace.prompt_queries(layer), &keys);
        }
        Ok(Artifact::Skew(std::sync::Arc::new(builder.finish()?)))
    }

    /// The same of all layers.
    #[must_use]
    pub fn held_bytes(&self) -> f64 {
        self.kv_bytes() * self.trace.shape.layers as f64 / self.truths.len() as f64
    }

    /// Runs one method. `budget` is what the true best rows are counted by, and how many of them the engine names for methods that
    /// select nothing themselves; `keep_rows` rows per KV head stay resident.
    ///
    /// # Errors
    /// A method that cannot be built for this shape, or lacks an artifact.
    pub fn run(
        &self,
        spec: &MethodSpec,
        artifacts: &Artifacts,
        budget: Option<Budget>,
        keep_rows: usize,
    ) -> Result<Outcome, ReplayError> {
        let method = kvoyant_methods::build(spec, &self.shape, artifacts)?;
        let layers: Vec<LayerOutcome> = self
            .truths
            .par_iter()
            .map(|(layer, truth)| {
                let turned = method.needs().artifact == Some(ArtifactKind::Skew);
                let skew = artifacts.skew().filter(|_| turned);
                let matrix = |head| skew.map_or(&[][..], |skew| skew.matrix(*layer, head));
                Run { of: self, method: &*method, budget, layer: *layer, truth }.all(keep_rows, &matrix)
            })
            .collect();
        Ok(self.summed(&*method, &layers))
    }

    fn summed(&self, method: &dyn Method, layers: &[LayerOutcome]) -> Outcome {
        let needs = method.needs();
        let steps = self.trace.shape.steps as f64;
        let heads_steps = (layers.len() * self.shape.kv_heads) as f64 * steps;
        let count = |of: fn(&LayerOutcome) -> usize| layers.iter().map(of).sum::<usize>() as f64;
        let all = |of: fn(&LayerOutcome) -> &[f64]| -> Vec<f64> {
            layers.iter().flat_map(|layer| of(layer).iter().copied()).collect()
        };
        let (moved, hits) = (count(|layer| layer.moved), count(|layer| layer.hits));
        let partial = self.shape.query_heads * (self.shape.head_dim + 1) * size_of::<f32>();
        let estimate = estimate_bytes(self.shape.head_dim) as f64;
        let part = match needs.part {
            RowPart::Whole => 1.0,
            RowPart::Values => 0.5,
        };
        let row = row_bytes(&self.shape) as f64;
        let cost = |rows: f64, partials: f64, estimates: f64, keys: f64| {
            rows * part * row + partials * partial as f64 + estimates * estimate + keys * row / 2.0
        };
        let feedback = count(|layer| layer.feedback_keys);
        let bytes = cost(moved, count(|layer| layer.partials), count(|layer| layer.estimates), feedback);
        let first = cost(
            count(|layer| layer.first.moved),
            count(|layer| layer.first.partials),
            count(|layer| layer.first.estimates),
            count(|layer| layer.first.feedback_keys),
        );
        let masses = all(|layer| &layer.missed);
        let per_layer = layers.len() as f64 * self.shape.query_heads as f64;
        Outcome {
            attention_mass: 1.0 - mean(&masses),
            mass_of_steps: (0..self.trace.shape.steps)
                .map(|step| layers.iter().map(|layer| layer.mass_of_steps[step]).sum::<f64>() / per_layer)
                .collect(),
            missed_mass: mean(&masses),
            top_k_recall: mean(&all(|layer| &layer.recall)),
            output_error: mean(&all(|layer| &layer.error)),
            selected_share: count(|layer| layer.selected) / heads_steps / self.trace.shape.tokens as f64,
            rows_moved: moved / heads_steps,
            rows_on_cpu: count(|layer| layer.on_cpu) / heads_steps,
            hit_rate: Some(hits / count(|layer| layer.selected)).filter(|rate| rate.is_finite()),
            bytes_per_token: bytes / steps,
            bytes_per_token_steady: (bytes - first) / (steps - 1.0).max(1.0),
            feedback_bytes_per_token: feedback * row / 2.0 / steps,
            ahead_bytes_per_token: count(|layer| layer.ahead) * part * row / steps,
            attends_resident: needs.attend_resident,
            resident_bytes: count(|layer| layer.resident) * row * part,
            digest_bytes: count(|layer| layer.digest_bytes)
                + (layers.len() * method.device_bytes(self.trace.shape.tokens)) as f64,
            select_us: median(&mut all(|layer| &layer.select_us)),
        }
    }
}

/// What one layer did.
#[derive(Debug, Default)]
struct LayerOutcome {
    /// Missed probability per step and query head.
    missed: Vec<f64>,
    /// Sum over the query heads of the probability covered, per step.
    mass_of_steps: Vec<f64>,
    recall: Vec<f64>,
    error: Vec<f64>,
    select_us: Vec<f64>,
    selected: usize,
    hits: usize,
    moved: usize,
    /// Of these, rows that no step waited for.
    ahead: usize,
    on_cpu: usize,
    /// Answers with a partial attention in them.
    partials: usize,
    /// Query heads that were told something of the rows left out.
    estimates: usize,
    /// Keys that full attention rows for the method needed beyond those attended.
    feedback_keys: usize,
    /// Of what moved, the first step's.
    first: FirstStep,
    resident: usize,
    digest_bytes: usize,
}

/// What moved in a sequence's first step.
#[derive(Debug, Default)]
struct FirstStep {
    moved: usize,
    partials: usize,
    estimates: usize,
    feedback_keys: usize,
}

/// One layer under one method.
struct Run<'a> {
    of: &'a Prepared<'a>,
    method: &'a dyn Method,
    budget: Option<Budget>,
    layer: usize,
    truth: &'a LayerTruth,
}

impl Run<'_> {
    fn all<'m>(&self, keep_rows: usize, matrix: &dyn Fn(usize) -> &'m [f32]) -> LayerOutcome {
        let (trace, shape) = (self.of.trace, &self.of.shape);
        let needs = self.method.needs();
        let mut out = LayerOutcome::default();
        let mut replay = Replay::new(self.method, shape, self.layer, trace.shape.prompt() + 1);
        let mut scratch = Scratch::new();
        let mut resident = vec![Resident::new(keep_rows); shape.kv_heads];
        self.prompt(&mut replay, matrix);
        for (step, truth) in self.truth.steps.iter().enumerate() {
            let tokens = trace.shape.prompt() + step + 1;
            let ids = if needs.hint == HintSource::Ids { self.best_ids(truth, tokens) } else { Vec::new() };
            let hint = self.hint(needs.hint, step);
            if needs.marks
                && let Some(mark) = trace.marks.get(tokens - 1)
            {
                replay.mark(&[*mark]);
            }
            let floors = self.floors(hint, tokens);
            let context = SelectContext {
                ids: &ids,
                floors: &floors,
                sequence_seed: 1,
                step: step as u64,
                ..SelectContext::new(shape, self.layer, tokens, hint)
            };
            let since = Instant::now();
            let selection = replay.select_with(self.method, &context, &mut scratch);
            out.select_us.push(since.elapsed().as_secs_f64() * 1e6);
            let on_cpu = self.count(&selection, &mut resident, tokens, &mut out);
            // The CPU attends with the query that it was asked by.
            let by_hint = on_cpu.iter().zip(0..).filter(|_| needs.hint == HintSource::Ahead);
            let by_hint: Vec<Vec<f32>> =
                by_hint.map(|(rows, head)| self.weights(rows, head, (truth, step), hint)).collect();
            let beside = self.beside(
                &mut replay,
                (&selection, &floors),
                &resident,
                (step, tokens),
                &mut scratch,
                &mut out,
            );
            let attended =
                self.judge((&selection, &beside), (truth, step), tokens, (&on_cpu, &by_hint), &mut out);
            self.append(&mut replay, tokens - 1..tokens);
            self.feed_back(&mut replay, truth, &attended, step, &mut out);
            if needs.prefetch
                && let Some(next) = replay.prefetch(self.method, &mut scratch)
            {
                for (head, rows) in resident.iter_mut().enumerate() {
                    let missing = rows.take(next.head(head)).missing;
                    out.moved += missing;
                    out.ahead += missing;
                }
            }
            if step == 0 {
                let LayerOutcome { moved, partials, estimates, feedback_keys, .. } = out;
                out.first = FirstStep { moved, partials, estimates, feedback_keys };
            }
        }
        out.resident = resident.iter().map(Resident::rows).sum();
        out.digest_bytes = replay.digest_bytes();
        out
    }

    /// Rows of tokens as they are appended, `[T][Hkv][d]`.
    fn rows<'t>(&self, tokens: std::ops::Range<usize>, of_head: impl Fn(usize) -> &'t [f32]) -> Vec<f32> {
        let d = self.of.shape.head_dim;
        let mut rows = Vec::with_capacity(tokens.len() * self.of.shape.kv_heads * d);
        for token in tokens {
            for head in 0..self.of.shape.kv_heads {
                rows.extend_from_slice(&of_head(head)[token * d..][..d]);
            }
        }
        rows
    }

    fn keys(&self, tokens: std::ops::Range<usize>) -> Vec<f32> {
        self.rows(tokens, |head| self.of.trace.keys(self.layer, head))
    }

    fn append(&self, replay: &mut Replay, tokens: std::ops::Range<usize>) {
        let keys = self.keys(tokens.clone());
        if self.method.needs().values {
            let values = self.rows(tokens, |head| self.of.trace.values(self.layer, head));
            replay.append_rows(self.method, &keys, &values, usize::MAX);
        } else {
            replay.append(self.method, &keys, usize::MAX);
        }
    }

    /// Reads the prompt: statistics, keys, and the attention rows of its last tokens.
    fn prompt<'m>(&self, replay: &mut Replay, matrix: &dyn Fn(usize) -> &'m [f32]) {
        let (trace, shape) = (self.of.trace, &self.of.shape);
        let (needs, prompt) = (self.method.needs(), trace.shape.prompt());
        let queries = trace.prompt_queries(self.layer);
        if needs.observe && !queries.is_empty() {
            for head in 0..shape.kv_heads {
                let mut sums = vec![0.0; shape.head_dim];
                column_sums(matrix(head), &HeadRows::queries(queries, shape, head), &mut sums);
                if self.sums_keys() {
                    // Of the tokens whose queries there are, so that both count alike.
                    let keys = self.keys(prompt - trace.shape.prompt_queries..prompt);
                    column_sums(matrix(head), &HeadRows::keys(&keys, shape, head), &mut sums);
                }
                replay.observe(self.method, head, &sums);
            }
        }
        if needs.marks && !trace.marks.is_empty() {
            replay.mark(&trace.marks[..prompt]);
        }
        let reported =
            needs.feedback.map_or(0, |feedback| feedback.prompt_rows).min(trace.shape.prompt_queries);
        self.append(replay, 0..prompt - reported);
        let width = shape.query_heads * shape.head_dim;
        for (at, query) in queries.chunks_exact(width).skip(trace.shape.prompt_queries - reported).enumerate()
        {
            let token = prompt - reported + at;
            self.append(replay, token..token + 1);
            let rows = attention(trace, self.layer, query, token + 1);
            self.send(replay, &rows, token + 1, true);
        }
    }

    /// Whether the prompt's statistics are of its keys too.
    fn sums_keys(&self) -> bool {
        let spec = self.method.spec();
        let both = |spec: &MethodSpec| {
            spec.options::<InfinigenSpec>().is_some_and(|infinigen| infinigen.index == IndexRule::Both)
        };
        both(spec)
            || spec.options::<MixSpec>().is_some_and(|mix| mix.parts().iter().any(|part| both(&part.spec)))
    }

    fn hint(&self, source: HintSource, step: usize) -> &[f32] {
        let (trace, shape) = (self.of.trace, &self.of.shape);
        match source {
            HintSource::None | HintSource::Ids => &[],
            HintSource::Ahead => trace.hint(self.layer, step),
            HintSource::Current => trace.query(self.layer, step),
            HintSource::Previous if step > 0 => trace.query(self.layer, step - 1),
            HintSource::Previous => {
                let width = shape.query_heads * shape.head_dim;
                let prompt = trace.prompt_queries(self.layer);
                match prompt.len().checked_sub(width) {
                    Some(last) => &prompt[last..],
                    // No query of the prompt was kept: the prediction stands in for it, this once.
                    None => trace.hint(self.layer, step),
                }
            }
        }
    }

    /// Counts what moves; the tokens that the CPU attends, per KV head, if it attends any.
    fn count(
        &self,
        selection: &Selection,
        resident: &mut [Resident],
        tokens: usize,
        out: &mut LayerOutcome,
    ) -> Vec<Vec<usize>> {
        let cpu = self.method.needs().cpu_attention;
        let found: Vec<_> =
            resident.iter_mut().enumerate().map(|(head, rows)| rows.look(selection.head(head))).collect();
        let missing: usize = found.iter().map(|found| found.missing).sum();
        let hits: usize = found.iter().map(|found| found.hits).sum();
        out.selected += hits + missing;
        out.hits += hits;
        let attends = |(head, rows): (usize, &Resident)| {
            selection.tokens(head).filter(|token| !rows.holds(*token)).map(|token| token as usize).collect()
        };
        let on_cpu =
            if cpu.is_some() { resident.iter().enumerate().map(attends).collect() } else { Vec::new() };
        // As the daemon does: what is missing is attended by the CPU, and fetched behind its back where the layer's share is large.
        let fetched = cpu.is_none_or(|cpu| {
            let every = cpu.recall_every;
            missing as f32 / (hits + missing).max(1) as f32 > cpu.recall_above
                || (every > 0 && (tokens as u64).is_multiple_of(every))
        });
        if cpu.is_some() {
            out.on_cpu += missing;
        }
        if fetched {
            for (head, rows) in resident.iter_mut().enumerate() {
                let _ = rows.take(selection.head(head));
            }
            out.moved += missing;
            out.ahead += if cpu.is_some() { missing } else { 0 };
        }
        out.partials += usize::from(cpu.is_some());
        on_cpu
    }
}

/// Bytes of a row: K and V of one token and KV head.
#[must_use]
pub fn row_bytes(shape: &Shape) -> usize {
    2 * shape.head_dim * Dtype::bytes(shape.dtype)
}

fn mean(values: &[f64]) -> f64 {
    values.iter().sum::<f64>() / values.len().max(1) as f64
}

fn median(values: &mut [f64]) -> f64 {
    if values.is_empty() {
        return 0.0;
    }
    let at = values.len() / 2;
    *values.select_nth_unstable_by(at, f64::total_cmp).1
}

#[cfg(test)]
mod tests;
