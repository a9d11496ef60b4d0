//! `hata`: rows by the Hamming distance of learnt codes (HATA, Findings of ACL 2025, arXiv 2506.02572).
//!
//! - [`train`], offline: a matrix `W` `[d, r]` per layer and KV head, shared by the group's query heads.
//! - *Digest.* Of every key after RoPE the code `x·W > 0`, `r` bits, and its norm in f16.
//! - *Score.* Of row t, with `s_t` the Hamming distances of its code from the codes of the group's `G` queries, summed:
//!   `(G − 2·s_t/r)·‖k_t‖`, largest first, which stands for `Σ_g q̂_g·k_t`; with `norm=off` `s_t` alone, smallest first.
//! - *Selection.* The `B` best rows of each KV head.
//!
//! The sum over the group is the paper's: it is the one place where rows are not ranked by the mean softmax. Sinks and window come
//! on top of the budget here, where the reference counts them in. With `weights=random` nothing has to be trained: signs of random
//! projections keep angles too (SimHash), but need more bits for the same recall.

mod digest;
pub mod spec;
pub mod train;
mod weights;

#[cfg(test)]
mod tests;

pub use spec::{HashOptions, HataSpec, Weights};

pub(crate) use digest::Codes;

use crate::artifact::Artifacts;
use crate::context::SelectContext;
use crate::error::MethodError;
use crate::method::{Append, DigestKey, Method};
use crate::needs::Needs;
use crate::registry::Entry;
use crate::scratch::Scratch;
use crate::selection::Selection;
use crate::shape::Shape;
use crate::spec::{MethodSpec, Spec as _};
use crate::store::Store;

/// The method's name.
pub const NAME: &str = "hata";

pub(crate) const ENTRY: Entry = Entry {
    name: NAME,
    about: "rows by the Hamming distance of learnt codes",
    parse: |options| Ok(Box::new(HataSpec::from_options(options)?)),
};

/// Selects the rows whose codes are nearest.
#[derive(Debug)]
pub struct Hata {
    options: HataSpec,
    spec: MethodSpec,
    codes: Codes,
}

impl Hata {
    /// For a model of that shape.
    ///
    /// # Errors
    /// The artifact is missing, of another model or of another shape.
    pub fn new(options: HataSpec, shape: &Shape, artifacts: &Artifacts) -> Result<Self, MethodError> {
        let codes = Codes::new(NAME, options.hash, shape, artifacts)?;
        Ok(Self { options, spec: MethodSpec::new(options), codes })
    }
}

impl Method for Hata {
    fn spec(&self) -> &MethodSpec {
        &self.spec
    }

    fn needs(&self) -> Needs {
        Needs { hint: self.options.hint, artifact: self.options.artifact(), digest: true, ..Needs::default() }
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

    fn select(
        &self,
        context: &SelectContext<'_>,
        store: &mut dyn Store,
        scratch: &mut Scratch,
        out: &mut Selection,
    ) {
        out.clear();
        for head in context.heads.clone() {
            self.codes.push_best(context, self.options.budget, &*store, head, scratch, out);
            out.finish_head();
        }
    }
}
