//! `attention-predictor`: blocks by the attention that a small network expects next (AttentionPredictor, NeurIPS'25,
//! arXiv 2502.04077).
//!
//! *Memory.* Per KV head the last 64 attention rows, the largest weight of each block of 16 tokens: an image of time × blocks.
//! *Score.* One network for all layers and heads: 3×3 convolution 1→16, ReLU, 3×3 convolution 16→32, ReLU, mean over time, 1×1
//! convolution 32→1. *Selection.* The `⌊B/16⌋` best blocks. It takes no query, so that the choice for the next step is made while
//! this one runs ([`Method::prefetch`]).
//!
//! The image holds the blocks that are candidates as a whole. Candidates that lie after them, beside the window or where no row
//! has been yet, are taken first, the newest first: so without any row the newest candidates are selected, and nothing is left
//! out between the last block and the window. Candidates beside the sinks get what the blocks leave over. Rows are the largest of
//! the group's query heads.

mod history;
mod network;
mod spec;
#[cfg(test)]
mod tests;
pub mod train;

use std::ops::Range;

use kvoyant_kernels::Kernels;

use crate::artifact::{ArtifactKind, Artifacts};
use crate::context::SelectContext;
use crate::error::MethodError;
use crate::method::{DigestKey, FeedbackRow, Method, Truncated};
use crate::needs::{Feedback, Needs};
use crate::registry::Entry;
use crate::scratch::Scratch;
use crate::selection::Selection;
use crate::shape::Shape;
use crate::spec::{MethodSpec, Spec};
use crate::store::Store;

use history::History;
pub use network::{HISTORY, Network, PARAMETERS};
pub use spec::{AttentionPredictorSpec, Weights};

/// The method's name.
pub const NAME: &str = "attention-predictor";

pub(crate) const ENTRY: Entry = Entry {
    name: NAME,
    about: "blocks by the attention that a small network expects next",
    parse: |options| Ok(Box::new(AttentionPredictorSpec::from_options(options)?)),
};

/// Tokens of a block.
pub const BLOCK: usize = 16;

/// Selects the blocks that the network expects most attention on.
#[derive(Debug)]
pub struct AttentionPredictor {
    shape: Shape,
    options: AttentionPredictorSpec,
    spec: MethodSpec,
    /// None: blocks are ranked by the mean over time.
    network: Option<Network>,
    /// Tells artifacts apart.
    id: u64,
    kernels: Kernels,
}

impl AttentionPredictor {
    /// For a model of that shape.
    ///
    /// # Errors
    /// The predictor artifact is missing, of another model, or holds no such network.
    pub fn new(
        options: AttentionPredictorSpec,
        shape: &Shape,
        artifacts: &Artifacts,
    ) -> Result<Self, MethodError> {
        let (network, id) = match options.weights {
            Weights::Average => (None, 0),
            Weights::Trained => {
                let artifact = artifacts.tensors(NAME, ArtifactKind::Predictor, shape)?;
                for (setting, wanted) in [("history", HISTORY), ("block", BLOCK)] {
                    let found = artifact.setting(setting).unwrap_or("nothing");
                    if found != wanted.to_string() {
                        return Err(MethodError::ArtifactFormat {
                            reason: format!(
                                "the predictor was trained for a {setting} of {found}, and {wanted} is wanted"
                            ),
                        });
                    }
                }
                (Some(Network::from_artifact(artifact)?), artifact.id())
            }
        };
        let spec = MethodSpec::new(options);
        Ok(Self { shape: *shape, options, spec, network, id, kernels: Kernels::best() })
    }

    /// The first block without a sink.
    fn first(&self) -> usize {
        self.shape.sinks.div_ceil(BLOCK)
    }

    fn history<'a>(&self, memory: &'a mut [u8]) -> History<'a> {
        History::new(memory, self.first(), self.kernels)
    }

    /// Chooses for one KV head.
    fn choose(
        &self,
        candidates: &Range<usize>,
        budget: usize,
        memory: &mut [u8],
        scratch: &mut Scratch,
        out: &mut Selection,
    ) {
        if budget >= candidates.len() {
            return out.push(candidates.start, candidates.end);
        }
        let Scratch { pages: scores, ids, top, .. } = scratch;
        let mut history = self.history(memory);
        let first = self.first();
        // Blocks that rows have covered, and that no token of the window is in.
        let end = history.columns().min(candidates.end / BLOCK).max(first);
        let start = if end == first { candidates.start } else { end * BLOCK };
        let recent = start..candidates.end;
        let recent = recent.end - recent.len().min(budget)..recent.end;
        let left = budget - recent.len();
        // A budget below a block still buys one, where there is nothing else to have.
        let blocks = (left / BLOCK).max(usize::from(recent.is_empty())).min(end - first);
        let beside_sinks = candidates.start..(first * BLOCK).min(recent.start);
        if beside_sinks.len() <= left.saturating_sub(blocks * BLOCK) {
            out.push(beside_sinks.start, beside_sinks.end);
        }
        if blocks > 0 {
            match &self.network {
                Some(network) => history.predict(network, end, scores),
                None => history.average(end, scores),
            }
            self.kernels.top_k(scores, blocks, top, ids);
            for id in ids.iter() {
                let block = first + *id as usize;
                out.push(block * BLOCK, (block + 1) * BLOCK);
            }
        }
        out.push(recent.start, recent.end);
    }
}

impl Method for AttentionPredictor {
    fn spec(&self) -> &MethodSpec {
        &self.spec
    }

    fn needs(&self) -> Needs {
        let calibrate_every = self.options.calibrate;
        Needs {
            artifact: self.options.artifact(),
            memory: true,
            feedback: Some(Feedback { block: BLOCK, prompt_rows: HISTORY, calibrate_every }),
            prefetch: true,
            ..Needs::default()
        }
    }

    fn digest_key(&self) -> Option<DigestKey> {
        Some(DigestKey { method: NAME, parameters: [self.id, self.options.weights as u64, 0, 0] })
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
        let budget = self.options.budget.rows_of(context.tokens);
        for head in context.heads.clone() {
            self.choose(&candidates, budget, store.memory_mut(head), scratch, out);
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
        self.select(context, store, scratch, out);
        true
    }

    fn memory_bytes(&self, max_tokens: usize) -> usize {
        history::bytes(max_tokens.div_ceil(BLOCK))
    }

    fn grow_memory(&self, old: &[u8], new: &mut [u8]) {
        let mut old = old.to_vec();
        self.history(new).copy(&self.history(&mut old));
    }

    fn on_feedback(&self, feedback: &FeedbackRow<'_>, memory: &mut [u8]) {
        self.history(memory).push(feedback.blocks, self.network.as_ref());
    }

    fn on_truncate(&self, tokens: usize, memory: &mut [u8]) -> Truncated {
        self.history(memory).truncate(tokens / BLOCK, self.network.as_ref());
        Truncated::Kept
    }
}
