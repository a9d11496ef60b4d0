//! `shadowkv`: chunks of 8 tokens by their mean key; V moves, K is rebuilt (Sun et al., ShadowKV, ICML'25).
//!
//! - *Digest:* the *landmark* of a chunk is the mean of its keys after RoPE; beside it lies the smallest cosine between a key
//!   of the chunk and the landmark.
//! - *Outliers:* the chunks whose smallest cosine is lowest are badly described by a mean. They are always in the selection, so
//!   that they stay on the device, and are not counted in the budget.
//! - *Decode:* softmax of `q·landmark/√d` over the other chunks, the **largest** of the group's query heads (and query tokens); the
//!   best `⌊B/chunk⌋` chunks of each KV head.
//! - *Keys:* with `keys=rebuilt` only V is moved. K comes from low-rank [`factors`] of the prompt's keys, which the engine
//!   keeps on the device, and RoPE at the original position. `keys=moved` is the ablation that moves both.
//!
//! The paper chooses outliers once, when the prompt is complete, and keeps all generated tokens on the device. Here outliers are those of
//! all candidates, and generated tokens that leave the window are chunks like any other; their keys are in no factors and are
//! read as they are.

pub mod factors;
#[cfg(test)]
mod tests;

use kvoyant_kernels::Kernels;

pub use factors::Factors;

use crate::artifact::Artifacts;
use crate::budget::Budget;
use crate::context::SelectContext;
use crate::error::{MethodError, SpecError};
use crate::method::{Append, DigestKey, HintNorm, Method};
use crate::needs::{HintSource, Needs, RowPart};
use crate::options::{OptionWriter, Options};
use crate::pages;
use crate::registry::{Entry, default_budget};
use crate::scratch::Scratch;
use crate::selection::Selection;
use crate::shape::Shape;
use crate::spec::{MethodSpec, Spec};
use crate::store::Store;

/// The method's name.
pub const NAME: &str = "shadowkv";

pub(crate) const ENTRY: Entry = Entry {
    name: NAME,
    about: "chunks by their mean key; V moves, K is rebuilt from low-rank factors",
    parse: |options| Ok(Box::new(ShadowKvSpec::from_options(options)?)),
};

/// Tokens of a chunk in the paper.
const CHUNK: usize = 8;
/// The rank in the paper, where all KV heads together are 1,024 wide.
const RANK: usize = 160;
/// Outlier chunks for each 1,024 rows of the budget, in the reference's fast path.
const OUTLIERS_PER_1024: usize = 24;

/// Where the keys of selected rows come from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Keys {
    /// From the factors on the device.
    #[default]
    Rebuilt,
    /// They are moved like V.
    Moved,
}

const KEYS: &[(&str, Keys)] = &[("rebuilt", Keys::Rebuilt), ("moved", Keys::Moved)];

/// What a user chooses: `shadowkv:budget=6%,rank=160,outliers=24`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct ShadowKvSpec {
    /// Rows per KV head, outliers not counted.
    pub budget: Budget,
    /// Tokens of a chunk, a divisor of the arena's page.
    pub chunk: usize,
    /// Outlier chunks; without it 24 for each 1,024 rows of the budget, at least one.
    pub outliers: Option<usize>,
    /// Rank of the factors: so many terms, or a share of `Hkv·d`.
    pub rank: Budget,
    /// Where keys come from.
    pub keys: Keys,
    /// Which query selects.
    pub hint: HintSource,
    /// How the engine makes a hint ahead of its layer.
    pub hint_norm: HintNorm,
}

impl ShadowKvSpec {
    fn from_options(mut options: Options) -> Result<Self, SpecError> {
        let spec = Self {
            budget: options.take_budget("budget")?.unwrap_or(default_budget()),
            chunk: options
                .take_value("chunk", "give tokens of a chunk, at least 1", |chunk| *chunk > 0)?
                .unwrap_or(CHUNK),
            outliers: options.take_value("outliers", "give a number of chunks", |_| true)?,
            rank: options.take_budget("rank")?.unwrap_or(default_rank()),
            keys: options.take_word("keys", KEYS)?.unwrap_or_default(),
            hint: options.take_word("hint", HintSource::QUERIES)?.unwrap_or(HintSource::Current),
            hint_norm: options.take_word("hint_norm", HintNorm::WORDS)?.unwrap_or_default(),
        };
        options.finish(&["budget", "chunk", "outliers", "rank", "keys", "hint", "hint_norm"])?;
        Ok(spec)
    }

    /// Outlier chunks of each KV head, for a budget of `rows` rows.
    #[must_use]
    pub fn outliers(&self, rows: usize) -> usize {
        self.outliers.unwrap_or((rows.saturating_mul(OUTLIERS_PER_1024) / 1024).max(1))
    }
}

fn default_rank() -> Budget {
    Budget::rows(RANK).unwrap_or_else(|_| unreachable!("a constant above 0"))
}

impl Spec for ShadowKvSpec {
    fn name(&self) -> &'static str {
        NAME
    }

    fn write(&self, writer: &mut OptionWriter) {
        writer.option("budget", self.budget);
        writer.option_unless("chunk", &self.chunk, &CHUNK);
        if let Some(outliers) = self.outliers {
            writer.option("outliers", outliers);
        }
        writer.option_unless("rank", &self.rank, &default_rank());
        writer.word_unless("keys", KEYS, self.keys, Keys::default());
        writer.word_unless("hint", HintSource::QUERIES, self.hint, HintSource::Current);
        writer.word_unless("hint_norm", HintNorm::WORDS, self.hint_norm, HintNorm::default());
    }

    fn budget(&self) -> Option<Budget> {
        Some(self.budget)
    }

    fn set_budget(&mut self, budget: Budget) {
        self.budget = budget;
    }

    fn hint(&self) -> HintSource {
        self.hint
    }

    fn hint_norm(&self) -> Option<HintNorm> {
        Some(self.hint_norm)
    }

    fn build(&self, shape: &Shape, _artifacts: &Artifacts) -> Result<Box<dyn Method>, MethodError> {
        Ok(Box::new(ShadowKv::new(*self, shape)?))
    }

    fn boxed(&self) -> Box<dyn Spec> {
        Box::new(*self)
    }
}

/// Selects chunks by their landmarks.
#[derive(Debug)]
pub struct ShadowKv {
    shape: Shape,
    options: ShadowKvSpec,
    spec: MethodSpec,
    kernels: Kernels,
}

/// Bytes of the number of keys in the open chunk, at the front of a memory.
const COUNT_BYTES: usize = 4;

impl ShadowKv {
    /// For a model of that shape.
    ///
    /// # Errors
    /// [`MethodError::Unsuitable`] where the chunk does not divide the arena's page, or is longer than the window: a chunk that is
    /// not complete has no landmark, and must not be left out.
    pub fn new(options: ShadowKvSpec, shape: &Shape) -> Result<Self, MethodError> {
        let bad = |reason: String| Err(MethodError::Unsuitable { method: NAME, reason });
        if options.chunk == 0 || !shape.page_rows.is_multiple_of(options.chunk) {
            return bad(format!(
                "its chunks of {} rows do not divide the arena's pages of {}; set `chunk` to a divisor",
                options.chunk, shape.page_rows
            ));
        }
        if options.chunk > shape.window {
            return bad(format!(
                "its chunks of {} rows are longer than the window of {}; set `chunk` to less",
                options.chunk, shape.window
            ));
        }
        Ok(Self { shape: *shape, options, spec: MethodSpec::new(options), kernels: Kernels::best() })
    }

    fn chunks_of_a_page(&self) -> usize {
        self.shape.page_rows / self.options.chunk
    }

    fn landmark_bytes(&self) -> usize {
        self.shape.head_dim * self.shape.dtype.bytes()
    }

    /// Writes the landmark of a complete chunk, and the smallest cosine of its keys with it as stored.
    fn seal(&self, keys: &[f32], chunk: usize, digest: &mut [u8], mean: &mut Vec<f32>) {
        let d = self.shape.head_dim;
        mean.clear();
        mean.resize(d, 0.0);
        for key in keys.chunks_exact(d) {
            mean.iter_mut().zip(key).for_each(|(sum, value)| *sum += value);
        }
        let count = (keys.len() / d) as f32;
        mean.iter_mut().for_each(|sum| *sum /= count);
        let (landmarks, cosines) = digest.split_at_mut(self.chunks_of_a_page() * self.landmark_bytes());
        let landmark = &mut landmarks[chunk * self.landmark_bytes()..][..self.landmark_bytes()];
        self.kernels.from_f32(self.shape.dtype, mean, landmark);
        self.kernels.to_f32(self.shape.dtype, landmark, mean);
        let norm = |x: &[f32]| self.kernels.dot(x, x).sqrt();
        let least = keys.chunks_exact(d).map(|key| {
            let product = norm(key) * norm(mean);
            // A zero key points nowhere; no mean describes it worse than another.
            if product > 0.0 { self.kernels.dot(key, mean) / product } else { 1.0 }
        });
        let least = least.fold(1.0_f32, f32::min);
        cosines[chunk * 4..chunk * 4 + 4].copy_from_slice(&least.to_le_bytes());
    }

    /// How badly each chunk is described by its landmark: the smallest cosine of its keys, negated.
    fn worst(&self, head: usize, chunks: std::ops::Range<usize>, store: &dyn Store, out: &mut Vec<f32>) {
        let front = self.chunks_of_a_page() * self.landmark_bytes();
        out.clear();
        out.extend(chunks.map(|chunk| {
            let page = store.page(head, chunk / self.chunks_of_a_page());
            let at = front + chunk % self.chunks_of_a_page() * 4;
            page[at..at + 4].try_into().map_or(0.0, |bytes| -f32::from_le_bytes(bytes))
        }));
    }
}

impl Method for ShadowKv {
    fn spec(&self) -> &MethodSpec {
        &self.spec
    }

    fn needs(&self) -> Needs {
        Needs {
            hint: self.options.hint,
            digest: true,
            memory: true,
            part: match self.options.keys {
                Keys::Rebuilt => RowPart::Values,
                Keys::Moved => RowPart::Whole,
            },
            ..Needs::default()
        }
    }

    fn digest_key(&self) -> Option<DigestKey> {
        let parameters = [self.options.chunk as u64, u64::from(self.shape.dtype.code()), 0, 0];
        Some(DigestKey { method: NAME, parameters })
    }

    fn digest_bytes(&self) -> usize {
        self.chunks_of_a_page() * (self.landmark_bytes() + 4)
    }

    /// The keys of the chunk that is not complete yet: how many, then `[chunk][d]` f32.
    fn memory_bytes(&self, _max_tokens: usize) -> usize {
        COUNT_BYTES + self.options.chunk * self.shape.head_dim * 4
    }

    /// The factors of the keys, at two bytes a value.
    fn device_bytes(&self, tokens: usize) -> usize {
        let width = self.shape.kv_heads * self.shape.head_dim;
        match self.options.keys {
            Keys::Rebuilt => 2 * (tokens + width) * self.options.rank.rows_of(width).clamp(1, width),
            Keys::Moved => 0,
        }
    }

    fn on_append(&self, append: &Append<'_>, digest: &mut [u8], memory: &mut [u8], scratch: &mut Scratch) {
        let (d, chunk) = (self.shape.head_dim, self.options.chunk);
        let Scratch { rows: open, matrix: mean, .. } = scratch;
        let mut row = append.first_row;
        for key in append.keys.chunks_exact(d) {
            // What the open chunk held before a truncation to its front is void.
            let at = row % chunk;
            let (_, keys) = memory.split_at_mut(COUNT_BYTES);
            for (bytes, value) in keys[at * d * 4..].chunks_exact_mut(4).zip(key) {
                bytes.copy_from_slice(&value.to_le_bytes());
            }
            if at + 1 == chunk {
                open.clear();
                open.extend(keys.as_chunks().0.iter().map(|bytes| f32::from_le_bytes(*bytes)));
                self.seal(open, row / chunk, digest, mean);
            }
            row += 1;
        }
        memory[..COUNT_BYTES].copy_from_slice(&((row % chunk) as u32).to_le_bytes());
    }

    fn select(
        &self,
        context: &SelectContext<'_>,
        store: &mut dyn Store,
        scratch: &mut Scratch,
        out: &mut Selection,
    ) {
        out.clear();
        let Scratch { block, matrix, scores, group, pages: worst, ids, top, .. } = scratch;
        let (d, g, chunk) = (self.shape.head_dim, context.group(&self.shape), self.options.chunk);
        let candidates = self.shape.candidates(context.tokens);
        let chunks = pages::covering(&candidates, chunk);
        let (count, per_page) = (chunks.len(), self.chunks_of_a_page());
        let rows = self.options.budget.rows_of(context.tokens);
        let wanted = if count == 0 { 0 } else { pages::affordable(rows, chunk, &candidates) };
        let outliers = self.options.outliers(rows).min(count);
        matrix.resize(per_page * d, 0.0);
        scores.resize(g * count, 0.0);
        for head in context.heads.clone() {
            if wanted + outliers >= count {
                out.push(candidates.start, candidates.end);
                out.finish_head();
                continue;
            }
            let queries = context.group_queries(&self.shape, head, block);
            let mut at = 0;
            while at < count {
                let first = chunks.start + at;
                let (page, in_page) = (first / per_page, first % per_page);
                let many = (per_page - in_page).min(count - at);
                let landmarks = &store.page(head, page)[in_page * self.landmark_bytes()..];
                let values = &mut matrix[..many * d];
                self.kernels.to_f32(self.shape.dtype, &landmarks[..many * self.landmark_bytes()], values);
                for (query, scores) in queries.chunks_exact(d).zip(scores.chunks_exact_mut(count)) {
                    for (landmark, score) in values.chunks_exact(d).zip(&mut scores[at..]) {
                        *score = self.kernels.dot(query, landmark);
                    }
                }
                at += many;
            }
            self.worst(head, chunks.clone(), &*store, worst);
            self.kernels.top_k(worst, outliers, top, ids);
            // Outliers take no part in the softmax: they are there already.
            for scores in scores.chunks_exact_mut(count) {
                ids.iter().for_each(|outlier| scores[*outlier as usize] = f32::NEG_INFINITY);
            }
            group.clear();
            group.resize(count, f32::NEG_INFINITY);
            for scores in scores.chunks_exact_mut(count) {
                let scale = 1.0 / (d as f32).sqrt();
                scores.iter_mut().for_each(|score| *score *= scale);
                self.kernels.softmax_in_place(scores);
                group.iter_mut().zip(scores.iter()).for_each(|(best, score)| *best = best.max(*score));
            }
            // Above every probability, so that the best `wanted + outliers` are those and the outliers.
            ids.iter().for_each(|outlier| group[*outlier as usize] = 2.0);
            let all = wanted + outliers;
            pages::push_best(self.kernels, group, all, chunk, &candidates, top, ids, |first, end| {
                out.push(first, end);
            });
            out.finish_head();
        }
    }
}
