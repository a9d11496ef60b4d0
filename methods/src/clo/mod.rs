//! `clo`: a selection stays while the query stays close to the one that made it (CLO, later LiteCache, arXiv 2511.14510), with
//! [`crate::hata`]'s codes below.
//!
//! - *Label.* Each KV head keeps the queries of its group that made its selection, and the selection.
//! - *Hit.* `mean over the group of cos(q, label) ≥ τ`: the selection is given again as it is, and nothing moves. Rows that are
//!   candidates no longer are left out.
//! - *Miss.* `hata` selects anew; selection and label are replaced. The label moves on a miss only, so that a slow drift adds up
//!   until it is one. A query or label of length 0, or with a NaN, is a miss. So is a block of query tokens: it brings what no
//!   single label stands for. The label that it leaves is its last token's.
//!
//! The paper has thresholds per head, stricter for heads that matter; how they are found is not published. Here `important` names
//! heads, and `important_tau` is their threshold. By default the query is the one predicted a layer ahead, as in the authors' earlier
//! code, and it is also what becomes the label.

mod memory;
pub mod spec;

#[cfg(test)]
mod tests;

pub use spec::{CloSpec, Head};

use crate::artifact::Artifacts;
use crate::context::SelectContext;
use crate::error::MethodError;
use crate::hata::Codes;
use crate::method::{Append, DigestKey, Method, Truncated};
use crate::needs::Needs;
use crate::registry::Entry;
use crate::scratch::Scratch;
use crate::selection::Selection;
use crate::shape::Shape;
use crate::spec::{MethodSpec, Spec as _};
use crate::store::Store;

use memory::Layout;

/// The method's name.
pub const NAME: &str = "clo";

pub(crate) const ENTRY: Entry = Entry {
    name: NAME,
    about: "rows by learnt codes, kept while the query stays close",
    parse: |options| Ok(Box::new(CloSpec::from_options(options)?)),
};

/// Selects by codes, and again only when the query has moved.
#[derive(Debug)]
pub struct Clo {
    shape: Shape,
    options: CloSpec,
    spec: MethodSpec,
    codes: Codes,
    layout: Layout,
}

impl Clo {
    /// For a model of that shape.
    ///
    /// # Errors
    /// A head in `important` that the model does not have; an artifact that is missing, of another model or of another shape.
    pub fn new(options: CloSpec, shape: &Shape, artifacts: &Artifacts) -> Result<Self, MethodError> {
        let missing = |head: &&Head| head.layer >= shape.layers || head.kv_head >= shape.kv_heads;
        if let Some(head) = options.important.iter().find(missing) {
            return Err(MethodError::Unsuitable {
                method: NAME,
                reason: format!(
                    "`important` names head {head}, and there are {} layers of {} KV heads",
                    shape.layers, shape.kv_heads
                ),
            });
        }
        let codes = Codes::new(NAME, options.hash, shape, artifacts)?;
        let layout = Layout { group: shape.group(), head_dim: shape.head_dim };
        Ok(Self { shape: *shape, spec: MethodSpec::new(options.clone()), options, codes, layout })
    }
}

impl Method for Clo {
    fn spec(&self) -> &MethodSpec {
        &self.spec
    }

    fn needs(&self) -> Needs {
        Needs {
            hint: self.options.hint,
            artifact: self.options.artifact(),
            digest: true,
            memory: true,
            ..Needs::default()
        }
    }

    fn digest_key(&self) -> Option<DigestKey> {
        Some(self.codes.digest_key())
    }

    fn digest_bytes(&self) -> usize {
        self.codes.digest_bytes()
    }

    fn on_append(&self, append: &Append<'_>, digest: &mut [u8], _memory: &mut [u8], scratch: &mut Scratch) {
        self.codes.append(append, digest, scratch);
    }

    fn memory_bytes(&self, max_tokens: usize) -> usize {
        self.layout.bytes(self.options.budget.rows_of(max_tokens), max_tokens)
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
        let everything = self.options.budget.rows_of(context.tokens) >= candidates.len();
        for head in context.heads.clone() {
            if everything {
                // Nothing to choose, and nothing that a later step should be held to.
                out.push(candidates.start, candidates.end);
                out.finish_head();
                continue;
            }
            let queries = context.group_queries(&self.shape, head, &mut scratch.block);
            let likeness = self.layout.likeness(store.memory(head), queries);
            let close = likeness.is_some_and(|likeness| likeness >= self.options.tau_of(context.layer, head));
            if close && context.queries == 1 {
                self.layout.push(store.memory(head), &candidates, out);
            } else {
                self.codes.push_best(context, self.options.budget, &*store, head, scratch, out);
                // Of a block of tokens the last one's queries are nearest to those to come.
                let width = self.shape.group() * self.shape.head_dim;
                let queries = context.group_queries(&self.shape, head, &mut scratch.block);
                let label = &queries[queries.len() - width..];
                self.layout.keep(label, out.unfinished(), store.memory_mut(head));
            }
            out.finish_head();
        }
    }

    fn on_truncate(&self, tokens: usize, memory: &mut [u8]) -> Truncated {
        self.layout.truncate(tokens, memory);
        Truncated::Kept
    }
}
