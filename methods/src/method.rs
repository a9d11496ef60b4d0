//! The trait that every method implements.

use std::fmt::Debug;

use crate::context::SelectContext;
use crate::needs::Needs;
use crate::rest::Rest;
use crate::scratch::Scratch;
use crate::selection::{Selection, TokenRange};
use crate::spec::MethodSpec;
use crate::store::Store;

/// What the engine makes of layer i−1's attention input, to be layer i's hint.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum HintNorm {
    /// Layer i's own norm and query projection: it predicted better on a real Llama than the paper's.
    #[default]
    Own,
    /// Layer i−1's norm and layer i's query projection, as InfiniGen (OSDI'24) has it.
    Previous,
    /// Layer i's own norm, and its query projection with a calibrated correction ([`crate::hint`]).
    Learned,
}

impl HintNorm {
    pub(crate) const WORDS: &'static [(&'static str, Self)] =
        &[("own", Self::Own), ("previous", Self::Previous), ("learned", Self::Learned)];
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

/// A selection method, built for one model.
///
/// Same input, same answer: no method looks at a clock or at anything outside its arguments. All it keeps of a
/// sequence lies in byte slices that the caller keeps (little-endian, no alignment needed), so that it can live in
/// shared memory by offset.
///
/// Keys are post-RoPE, as f32. Of one sequence and layer, each KV head has: a *state* ([`Self::head_state_bytes`]; begins as
/// [`Self::init_state`] leaves it, is what digests are made under), one *digest* block per page ([`Self::digest_bytes`];
/// begins as anything) and perhaps a *memory* ([`Self::memory_bytes`]; begins as zeros), which both appends and selections
/// may change. Digests are shared by forks, state and memory are copied.
pub trait Method: Send + Sync + Debug {
    /// What the user chose.
    fn spec(&self) -> &MethodSpec;

    /// The method's name, as in its specification.
    fn name(&self) -> &'static str {
        self.spec().name()
    }

    /// What it wants from engine and daemon.
    fn needs(&self) -> Needs;

    /// Sequences whose methods have equal keys can share digest blocks, if their states are equal too (those
    /// of a fork are); they also have as many [`Self::sequence_bytes`] and [`Self::note_bytes`]. `None`: it keeps nothing. A method with a memory
    /// has a key, perhaps with digests of 0 bytes.
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

    /// Takes in new rows of *one* page; where [`Needs::sealed_rows`] is set, whole groups of so many. `memory` is the head's, and
    /// long enough for them.
    ///
    /// After a truncation inside a page the page's remaining rows come again, from `first_row` 0 (see
    /// [`Self::on_truncate`]).
    fn on_append(&self, append: &Append<'_>, digest: &mut [u8], memory: &mut [u8], scratch: &mut Scratch) {
        let _ = (append, digest, memory, scratch);
    }

    /// Chooses, for every KV head of the request, the rows to have ready; `out` is cleared first and gets one head after
    /// the other.
    fn select(
        &self,
        context: &SelectContext<'_>,
        store: &mut dyn Store,
        scratch: &mut Scratch,
        out: &mut Selection,
    );

    /// Where [`Needs::rest`] is set: estimates what the rows that are *not* attended would have added to a decode step's answer, by
    /// the true query in `context`. `attended` names the candidates that were, of every KV head of the request; sinks, window
    /// and what comes after the window are attended always. `out` is cleared first; it may name rows that are to be attended now
    /// ([`Rest::exact`]).
    fn rest(
        &self,
        context: &SelectContext<'_>,
        attended: &Selection,
        store: &mut dyn Store,
        scratch: &mut Scratch,
        out: &mut Rest,
    ) {
        let _ = (context, attended, store, scratch);
        out.clear(0);
    }

    /// [`Self::select`], and [`Self::rest`] of what it chose: for those that get both from one look at their digests.
    fn select_with_rest(
        &self,
        context: &SelectContext<'_>,
        store: &mut dyn Store,
        scratch: &mut Scratch,
        out: &mut Selection,
        rest: &mut Rest,
    ) {
        self.select(context, store, scratch, out);
        self.rest(context, out, store, scratch, rest);
    }

    /// Takes note of a step's selection for a layer, of all its heads; comes once after [`Self::select`] or [`Self::select_with_rest`], which
    /// may have been asked for one head after the other. What it keeps is for the steps to come.
    fn steer(&self, context: &SelectContext<'_>, selected: &Selection, store: &mut dyn Store) {
        let _ = (context, selected, store);
    }

    /// Where [`Needs::prefetch`] is set: chooses for the layer's *next* step, after an answer, off the critical path.
    /// `context` has no hint, and `tokens` is one more than in the selection before. True where `out` names rows worth having
    /// ready by then. It may be called late or never: what [`Self::select`] chooses must not depend on it.
    fn prefetch(
        &self,
        context: &SelectContext<'_>,
        store: &mut dyn Store,
        scratch: &mut Scratch,
        out: &mut Selection,
    ) -> bool {
        let _ = (context, store, scratch, out);
        false
    }

    /// Bytes that a sequence keeps for all its layers together ([`Store::sequence`]); zeros at first, copied by forks.
    fn sequence_bytes(&self) -> usize {
        0
    }

    /// Bytes that a sequence keeps for each layer and KV head of its last selection ([`Store::note`]); zeros at first, copied by forks.
    fn note_bytes(&self) -> usize {
        0
    }

    /// Bytes of memory of one sequence, layer and KV head that can hold up to `max_tokens` tokens.
    fn memory_bytes(&self, max_tokens: usize) -> usize {
        let _ = max_tokens;
        0
    }

    /// Bytes that a layer of a sequence of so many tokens keeps on the device besides rows and digests, for all KV heads together: what
    /// the engine makes of the prompt for this method.
    fn device_bytes(&self, tokens: usize) -> usize {
        let _ = tokens;
        0
    }

    /// Moves the memory of a sequence that outgrew it: `old` was made for fewer tokens than `new`, which is zeroed.
    fn grow_memory(&self, old: &[u8], new: &mut [u8]) {
        new[..old.len()].copy_from_slice(old);
    }

    /// Takes in an attention row, where [`Needs::feedback`] is set.
    fn on_feedback(&self, feedback: &FeedbackRow<'_>, memory: &mut [u8]) {
        let _ = (feedback, memory);
    }

    /// The sequence grew to `tokens` tokens. Calls `victim` for every token that has to leave this KV head's
    /// pool: it will not be selected any more and its row may be overwritten. For [`Needs::drops_rows`] alone.
    fn on_admit(&self, tokens: usize, memory: &mut [u8], victim: &mut dyn FnMut(u32)) {
        let _ = (tokens, memory, victim);
    }

    /// The rows in `selected` were selected for this KV head. For [`Needs::drops_rows`] alone.
    fn on_selected(&self, selected: &[TokenRange], memory: &mut [u8]) {
        let _ = (selected, memory);
    }

    /// The sequence was cut down to `tokens` tokens.
    fn on_truncate(&self, tokens: usize, memory: &mut [u8]) -> Truncated {
        let _ = (tokens, memory);
        Truncated::Kept
    }
}

/// What a truncation leaves of a memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Truncated {
    /// The memory fits the shorter sequence; the rows that are left of the page that was cut come again.
    Kept,
    /// The memory has to be made anew: the caller zeroes it and appends every row of the sequence again, also to heads of the
    /// layer whose memories are kept.
    Rebuild,
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
    /// Their values, `[rows][dv]`; empty unless the method [wants them](Needs::values).
    pub values: &'a [f32],
    /// Position of the first row's token in the sequence.
    pub first_token: usize,
    /// Row of the page that the first key becomes: `first_token` modulo the page's rows.
    pub first_row: usize,
    /// One [mark](crate::needs::mark) per row, or none at all.
    pub marks: &'a [u8],
}

/// An attention row of one KV head.
#[derive(Debug, Clone, Copy)]
pub struct FeedbackRow<'a> {
    /// The layer.
    pub layer: usize,
    /// The KV head.
    pub kv_head: usize,
    /// Tokens that the row is over, the query's own among them.
    pub tokens: usize,
    /// Largest attention weight in each block of [`crate::needs::Feedback::block`] tokens, over the group's query heads;
    /// `⌈tokens / block⌉` of them. All finite, in `[0, 1]`.
    pub blocks: &'a [f32],
    /// Whether it is full attention, or that over the attended rows alone.
    pub full: bool,
}
