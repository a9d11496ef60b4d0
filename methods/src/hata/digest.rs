//! The digest: codes of a page's keys, then their norms; and the selection by them.
//!
//! A block is `[P]` codes of `⌈bits/64⌉` words (little endian), then `[P]` norms in f16. Codes of a page lie together, so that a
//! scan reads nothing else.

use kvoyant_kernels::{Dtype, Kernels};

use super::spec::{HashOptions, Weights};
use super::weights::HashWeights;
use crate::artifact::Artifacts;
use crate::budget::Budget;
use crate::context::SelectContext;
use crate::error::MethodError;
use crate::method::{Append, DigestKey};
use crate::pages;
use crate::scratch::Scratch;
use crate::selection::Selection;
use crate::shape::Shape;
use crate::store::Store;

/// Bytes of a word of a code.
const WORD: usize = 8;
const NORM: Dtype = Dtype::F16;
/// The largest f16: norms beyond it all count as that.
const NORM_MAX: f32 = 65504.0;

/// Codes of one model's keys.
#[derive(Debug, Clone)]
pub(crate) struct Codes {
    shape: Shape,
    hash: HashOptions,
    pub(super) weights: HashWeights,
    kernels: Kernels,
}

impl Codes {
    /// For `method` on a model of that shape.
    ///
    /// # Errors
    /// As [`HashWeights::new`].
    pub(crate) fn new(
        method: &'static str,
        hash: HashOptions,
        shape: &Shape,
        artifacts: &Artifacts,
    ) -> Result<Self, MethodError> {
        let weights = HashWeights::new(method, hash.weights, shape, artifacts)?;
        Ok(Self { shape: *shape, hash, weights, kernels: Kernels::best() })
    }

    /// One key for all methods that read these codes: they share them.
    pub(crate) fn digest_key(&self) -> DigestKey {
        let random = u64::from(self.hash.weights != Weights::Trained);
        DigestKey { method: super::NAME, parameters: [self.weights.bits as u64, random, self.weights.id, 0] }
    }

    /// Bytes of one code.
    pub(super) fn code_bytes(&self) -> usize {
        self.weights.bits.div_ceil(8 * WORD) * WORD
    }

    /// Bytes of a block.
    pub(crate) fn digest_bytes(&self) -> usize {
        self.shape.page_rows * (self.code_bytes() + NORM.bytes())
    }

    /// Adds new rows of one page.
    pub(crate) fn append(&self, append: &Append<'_>, digest: &mut [u8], scratch: &mut Scratch) {
        let weights = self.weights.of(append.layer, append.kv_head);
        let (codes, norms) = digest.split_at_mut(self.shape.page_rows * self.code_bytes());
        let projected = &mut scratch.rows;
        projected.resize(self.weights.bits, 0.0);
        let keys = append.keys.chunks_exact(self.shape.head_dim);
        let codes = codes.chunks_exact_mut(self.code_bytes()).skip(append.first_row);
        let norms = norms.chunks_exact_mut(NORM.bytes()).skip(append.first_row);
        for ((key, code), norm) in keys.zip(codes).zip(norms) {
            self.kernels.project(key, weights, projected);
            self.kernels.sign_bits(projected, code);
            // Not `max`, which would let a NaN through as 0.
            let length = self.kernels.dot(key, key).sqrt();
            let length = if length < NORM_MAX { length } else { NORM_MAX };
            self.kernels.from_f32(NORM, &[length], norm);
        }
    }

    /// Fills `scratch.group` with the score of each candidate of one KV head, largest best.
    fn score(&self, context: &SelectContext<'_>, store: &dyn Store, kv_head: usize, scratch: &mut Scratch) {
        let Scratch { block, rows: projected, words, code, distances, matrix: norms, group, .. } = scratch;
        let (rows, g) = (self.shape.page_rows, context.group(&self.shape));
        let candidates = self.shape.candidates(context.tokens);
        let pages = pages::covering(&candidates, rows);

        let weights = self.weights.of(context.layer, kv_head);
        projected.resize(self.weights.bits, 0.0);
        code.resize(self.code_bytes(), 0);
        words.clear();
        let queries = context.group_queries(&self.shape, kv_head, block);
        for query in queries.chunks_exact(self.shape.head_dim) {
            self.kernels.project(query, weights, projected);
            self.kernels.sign_bits(projected, code);
            words.extend(code.as_chunks::<WORD>().0.iter().map(|word| u64::from_le_bytes(*word)));
        }

        // Whole pages are scored, candidates or not: rows that no one appended yet give rubbish, which is cut off.
        group.clear();
        distances.resize(rows, 0);
        norms.resize(rows, 0.0);
        let (whole, step) = (g as f32, 2.0 / self.weights.bits as f32);
        let mut page = pages.start;
        while page < pages.end {
            let stretch = store.stretch(kv_head, page, pages.end - page).chunks_exact(self.digest_bytes());
            page += stretch.len();
            for block in stretch {
                let (codes, lengths) = block.split_at(rows * self.code_bytes());
                self.kernels.hamming_sum_bytes(words, g, codes, distances);
                if self.hash.norm {
                    self.kernels.to_f32(NORM, lengths, norms);
                    let scored = distances.iter().zip(norms.iter());
                    group.extend(scored.map(|(distance, norm)| (whole - step * *distance as f32) * norm));
                } else {
                    group.extend(distances.iter().map(|distance| -(*distance as f32)));
                }
            }
        }
        group.truncate(candidates.end - pages.start * rows);
        group.drain(..candidates.start - pages.start * rows);
    }

    /// Pushes the best rows of one KV head: as many as the budget has, or all.
    pub(crate) fn push_best(
        &self,
        context: &SelectContext<'_>,
        budget: Budget,
        store: &dyn Store,
        kv_head: usize,
        scratch: &mut Scratch,
        out: &mut Selection,
    ) {
        let candidates = self.shape.candidates(context.tokens);
        let wanted = budget.rows_of(context.tokens);
        if wanted >= candidates.len() {
            // Nothing to choose where everything is wanted.
            return out.push(candidates.start, candidates.end);
        }
        self.score(context, store, kv_head, scratch);
        let Scratch { group, ids, top, .. } = scratch;
        self.kernels.top_k(group, wanted, top, ids);
        for token in ids.iter().map(|id| candidates.start + *id as usize) {
            out.push(token, token + 1);
        }
    }
}
