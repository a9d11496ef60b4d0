//! The trait that every method implements.

use std::fmt::Debug;
use std::sync::Arc;

use crate::infinigen::SkewArtifact;
use crate::registry::MethodSpec;
use crate::scratch::Scratch;
use crate::selection::Selection;

/// Which calibrated artifact a method wants.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum ArtifactKind {
    /// Orthogonal matrices per layer and KV head ([`crate::infinigen::SkewArtifact`]).
    Skew,
}

/// A calibrated artifact, read from a file.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub enum Artifact {
    /// Of [`ArtifactKind::Skew`].
    Skew(Arc<SkewArtifact>),
}

/// What the engine normalises layer i−1's attention input with, before layer i's query projection turns it
/// into the hint.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum HintNorm {
    /// Layer i's own norm: it predicted better on a real Llama.
    #[default]
    Own,
    /// Layer i−1's norm, as InfiniGen (OSDI'24) has it.
    Previous,
}

impl HintNorm {
    pub(crate) const WORDS: &'static [(&'static str, Self)] =
        &[("own", Self::Own), ("previous", Self::Previous)];
}

/// What a method wants from the engine and the daemon.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Needs {
    /// A query hint `[Hq, d]` with each request.
    pub hint: bool,
    /// Prefill statistics, once per layer and KV head, before keys are digested ([`Method::observe`]).
    pub observe: bool,
    /// A calibrated artifact when it is built.
    pub artifact: Option<ArtifactKind>,
    /// Digest blocks and [`Method::on_append`].
    pub digest: bool,
    /// A pool of counters per layer and KV head ([`Method::on_admit`], [`Method::on_selected`]).
    pub pool: bool,
}

/// Tells digests that can be shared from those that cannot: the method's kind and the parameters that shape
/// its digest. Budgets and other parameters of the selection alone are not in it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct DigestKey {
    /// The method that reads the digest.
    pub method: &'static str,
    /// What shapes the digest, in the method's own order.
    pub parameters: [u64; 4],
}

/// Where a method reads what it kept of one sequence and layer.
pub trait DigestSource {
    /// Digest block of a page, [`Method::digest_bytes`] long. `page` counts from the sequence's start.
    fn page(&self, kv_head: usize, page: usize) -> &[u8];

    /// State of a KV head, [`Method::head_state_bytes`] long.
    fn state(&self, kv_head: usize) -> &[u8];

    /// Pool of a KV head, [`Method::pool_bytes`] long; empty where the method keeps none.
    fn pool(&self, kv_head: usize) -> &[u8] {
        let _ = kv_head;
        &[]
    }
}

/// The digests of a method that keeps none.
#[derive(Debug, Clone, Copy, Default)]
pub struct NoDigests;

impl DigestSource for NoDigests {
    fn page(&self, _kv_head: usize, _page: usize) -> &[u8] {
        &[]
    }

    fn state(&self, _kv_head: usize) -> &[u8] {
        &[]
    }
}

/// One request for one sequence and layer.
#[derive(Debug, Clone, Copy)]
pub struct SelectContext<'a> {
    /// The layer to select for.
    pub layer: usize,
    /// Tokens of the sequence, the current one among them, `n`.
    pub tokens: usize,
    /// Predicted query of the layer after RoPE, `[Hq][d]`, f32, not scaled by `1/√d`; empty where the method
    /// needs none.
    pub hint: &'a [f32],
    /// A number that stays with the sequence (and its forks), for methods that draw.
    pub sequence_seed: u64,
    /// Decode step, or any number that differs from one step to the next.
    pub step: u64,
}

/// A selection method, built for one model.
///
/// Same input, same answer: no method looks at a clock or at anything outside its arguments. All state of a
/// sequence lies in byte slices that the caller keeps (little-endian, no alignment needed), so that it can
/// live in shared memory by offset.
///
/// Keys are post-RoPE, as f32. Of one sequence and layer, each KV head has: a *state*
/// ([`Self::head_state_bytes`]; begins as [`Self::init_state`] leaves it), one *digest* block per page
/// ([`Self::digest_bytes`]; begins as anything) and perhaps a *pool* ([`Self::pool_bytes`]; begins as zeros).
pub trait Method: Send + Sync + Debug {
    /// What the user chose.
    fn spec(&self) -> &MethodSpec;

    /// The method's name, as in its specification.
    fn name(&self) -> &'static str;

    /// What it wants from engine and daemon.
    fn needs(&self) -> Needs;

    /// Sequences whose methods have equal keys can share digest blocks, if their states are equal too (those
    /// of a fork are). `None`: it keeps no digest.
    fn digest_key(&self) -> Option<DigestKey> {
        None
    }

    /// Bytes of a digest block: one per page and KV head.
    fn digest_bytes(&self) -> usize {
        0
    }

    /// Bytes of state per sequence, layer and KV head.
    fn head_state_bytes(&self) -> usize {
        0
    }

    /// Fills a new sequence's state of one KV head.
    fn init_state(&self, layer: usize, kv_head: usize, state: &mut [u8]) {
        let _ = (layer, kv_head, state);
    }

    /// Takes in prefill statistics `column_sums` (`[d]`, see [`crate::infinigen::column_sums`]). True where the
    /// state changed: digests made under the old state are void and must be made again from the keys.
    fn observe(&self, layer: usize, kv_head: usize, column_sums: &[f32], state: &mut [u8]) -> bool {
        let _ = (layer, kv_head, column_sums, state);
        false
    }

    /// Takes in new rows of *one* page: `keys` is `[rows][d]`, the first of them row `first_row` of the page.
    ///
    /// After a truncation inside a page, digest the page's remaining rows again from `first_row` 0.
    fn on_append(&self, append: &Append<'_>, digest: &mut [u8], scratch: &mut Scratch) {
        let _ = (append, digest, scratch);
    }

    /// Chooses, for every KV head, the rows to have ready; `out` is cleared first.
    fn select(
        &self,
        context: &SelectContext<'_>,
        digests: &dyn DigestSource,
        scratch: &mut Scratch,
        out: &mut Selection,
    );

    /// Bytes of the pool of one sequence, layer and KV head that can hold up to `max_tokens` tokens.
    fn pool_bytes(&self, max_tokens: usize) -> usize {
        let _ = max_tokens;
        0
    }

    /// The sequence grew to `tokens` tokens. Calls `victim` for every token that has to leave this KV head's
    /// pool: it will not be selected any more and its row may be overwritten.
    fn on_admit(&self, tokens: usize, pool: &mut [u8], victim: &mut dyn FnMut(u32)) {
        let _ = (tokens, pool, victim);
    }

    /// The rows in `selected` were selected for this KV head.
    fn on_selected(&self, selected: &[crate::TokenRange], pool: &mut [u8]) {
        let _ = (selected, pool);
    }

    /// The sequence was cut down to `tokens` tokens.
    fn on_truncate(&self, tokens: usize, pool: &mut [u8]) {
        let _ = (tokens, pool);
    }
}

/// New rows of one page of one KV head.
#[derive(Debug, Clone, Copy)]
pub struct Append<'a> {
    /// The layer.
    pub layer: usize,
    /// The KV head.
    pub kv_head: usize,
    /// The head's state.
    pub state: &'a [u8],
    /// Keys after RoPE, `[rows][d]`.
    pub keys: &'a [f32],
    /// Row of the page that the first key becomes.
    pub first_row: usize,
}
