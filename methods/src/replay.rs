//! One sequence and layer in plain memory, as the daemon would keep it: for replays of captured attention, and tests.

use std::ops::Range;

use kvoyant_kernels::Kernels;

use crate::context::SelectContext;
use crate::infinigen::HeadRows;
use crate::method::{Append, FeedbackRow, Method, Truncated};
use crate::rest::Rest;
use crate::scratch::Scratch;
use crate::selection::Selection;
use crate::shape::Shape;
use crate::store::{RowSource, Store};

/// What is kept of one sequence and layer: rows' keys, digests, states and memories.
#[derive(Debug, Clone)]
pub struct Replay {
    shape: Shape,
    layer: usize,
    tokens: usize,
    keys: Keys,
    /// Values as stored, `[Hkv]` of `[n][d]`.
    values: Vec<Vec<f32>>,
    pages: Vec<Vec<Vec<u8>>>,
    states: Vec<Vec<u8>>,
    memories: Vec<Vec<u8>>,
    sequence: Vec<u8>,
    notes: Vec<Vec<u8>>,
    marks: Vec<u8>,
    /// Tokens that the memories can hold.
    room: usize,
    /// Per KV head, the rows that have left its pool so far.
    pub victims: Vec<Vec<u32>>,
}

/// Keys as the storage type rounds them, `[Hkv]` of `[n][d]`.
#[derive(Debug, Clone)]
struct Keys {
    head_dim: usize,
    heads: Vec<Vec<f32>>,
}

impl RowSource for Keys {
    fn scores(&self, kv_head: usize, tokens: Range<usize>, queries: &[f32], out: &mut [f32]) {
        let d = self.head_dim;
        let keys = &self.heads[kv_head][tokens.start * d..tokens.end * d];
        for (query, out) in queries.chunks_exact(d).zip(out.chunks_exact_mut(tokens.len().max(1))) {
            for (key, score) in keys.chunks_exact(d).zip(out) {
                *score = Kernels::best().dot(query, key);
            }
        }
    }

    fn keys(&self, kv_head: usize, tokens: Range<usize>, out: &mut [f32]) {
        let d = self.head_dim;
        out.copy_from_slice(&self.heads[kv_head][tokens.start * d..tokens.end * d]);
    }
}

/// What methods see as their store, over plain memory: of each KV head, but for the sequence's own bytes.
#[derive(Debug)]
pub struct View<'a> {
    /// The digests of its pages.
    pub pages: &'a [Vec<Vec<u8>>],
    /// Its state.
    pub states: &'a [Vec<u8>],
    /// Its memory.
    pub memories: &'a mut [Vec<u8>],
    /// What is kept of the sequence.
    pub sequence: &'a mut [u8],
    /// Its note.
    pub notes: &'a mut [Vec<u8>],
}

impl Store for View<'_> {
    fn page(&self, kv_head: usize, page: usize) -> &[u8] {
        &self.pages[kv_head][page]
    }

    fn state(&self, kv_head: usize) -> &[u8] {
        &self.states[kv_head]
    }

    fn memory(&self, kv_head: usize) -> &[u8] {
        &self.memories[kv_head]
    }

    fn memory_mut(&mut self, kv_head: usize) -> &mut [u8] {
        &mut self.memories[kv_head]
    }

    fn sequence(&mut self) -> &mut [u8] {
        self.sequence
    }

    fn note(&mut self, kv_head: usize) -> &mut [u8] {
        &mut self.notes[kv_head]
    }
}

impl Replay {
    /// An empty sequence that begins with room for `max_tokens` tokens.
    #[must_use]
    pub fn new(method: &dyn Method, shape: &Shape, layer: usize, max_tokens: usize) -> Self {
        let states = (0..shape.kv_heads)
            .map(|head| {
                let mut state = vec![0; method.head_state_bytes()];
                method.init_state(layer, head, &mut state);
                state
            })
            .collect();
        Self {
            shape: *shape,
            layer,
            tokens: 0,
            keys: Keys { head_dim: shape.head_dim, heads: vec![Vec::new(); shape.kv_heads] },
            values: vec![Vec::new(); shape.kv_heads],
            pages: vec![Vec::new(); shape.kv_heads],
            states,
            sequence: vec![0; method.sequence_bytes()],
            notes: vec![vec![0; method.note_bytes()]; shape.kv_heads],
            memories: vec![vec![0; method.memory_bytes(max_tokens)]; shape.kv_heads],
            marks: Vec::new(),
            room: max_tokens,
            victims: vec![Vec::new(); shape.kv_heads],
        }
    }

    /// Tokens appended so far.
    #[must_use]
    pub fn tokens(&self) -> usize {
        self.tokens
    }

    /// Keys of a KV head as stored, `[n][d]`.
    #[must_use]
    pub fn keys(&self, kv_head: usize) -> &[f32] {
        &self.keys.heads[kv_head]
    }

    /// Values of a KV head as stored, `[n][d]`.
    #[must_use]
    pub fn values(&self, kv_head: usize) -> &[f32] {
        &self.values[kv_head]
    }

    /// What the sequence keeps for all its layers together. A replay is of one layer: replays of several layers hand it on.
    pub fn sequence(&mut self) -> &mut [u8] {
        &mut self.sequence
    }

    /// Digest block of a page.
    #[must_use]
    pub fn page(&self, kv_head: usize, page: usize) -> &[u8] {
        &self.pages[kv_head][page]
    }

    /// State of a KV head.
    #[must_use]
    pub fn state(&self, kv_head: usize) -> &[u8] {
        &self.states[kv_head]
    }

    /// Memory of a KV head.
    #[must_use]
    pub fn memory(&self, kv_head: usize) -> &[u8] {
        &self.memories[kv_head]
    }

    /// Bytes of digests, states and memories.
    #[must_use]
    pub fn digest_bytes(&self) -> usize {
        let pages = self.pages.iter().flatten().map(Vec::len).sum::<usize>();
        pages
            + self.states.iter().chain(&self.memories).chain(&self.notes).map(Vec::len).sum::<usize>()
            + self.sequence.len()
    }

    /// What the method sees: for calls that no function here makes.
    pub fn with_store<T>(&mut self, call: impl FnOnce(&mut dyn Store) -> T) -> T {
        let Self { pages, states, memories, sequence, notes, .. } = self;
        call(&mut View { pages, states, memories, sequence, notes })
    }

    /// Sends prefill statistics of one KV head; digests made before are made again if the state changed.
    pub fn observe(&mut self, method: &dyn Method, kv_head: usize, sums: &[f32]) -> bool {
        let changed = method.observe(self.layer, kv_head, sums, &mut self.states[kv_head]);
        if changed && self.tokens > 0 {
            self.digest(method, kv_head, 0, self.tokens, usize::MAX);
        }
        changed
    }

    /// Marks of the next tokens' text, one each.
    pub fn mark(&mut self, marks: &[u8]) {
        self.marks.extend_from_slice(marks);
    }

    /// Appends `keys`, `[T][Hkv][d]`, split at page ends and every `chunk` tokens. Their values are zeros.
    pub fn append(&mut self, method: &dyn Method, keys: &[f32], chunk: usize) {
        self.append_rows(method, keys, &vec![0.0; keys.len()], chunk);
    }

    /// As [`Self::append`], with `values` `[T][Hkv][d]`.
    pub fn append_rows(&mut self, method: &dyn Method, keys: &[f32], values: &[f32], chunk: usize) {
        let Shape { kv_heads, head_dim, dtype, .. } = self.shape;
        let (first, count) = (self.tokens, keys.len() / (kv_heads * head_dim));
        let tokens = first + count;
        if tokens > self.room {
            self.room = tokens.next_power_of_two();
            for memory in &mut self.memories {
                let mut new = vec![0; method.memory_bytes(self.room)];
                method.grow_memory(memory, &mut new);
                *memory = new;
            }
        }
        for head in 0..kv_heads {
            for (rows, stored) in [(keys, &mut self.keys.heads[head]), (values, &mut self.values[head])] {
                let rows: Vec<f32> =
                    HeadRows::keys(rows, &self.shape, head).rows().flatten().copied().collect();
                let mut bytes = vec![0; rows.len() * dtype.bytes()];
                let mut rounded = vec![0.0; rows.len()];
                Kernels::best().from_f32(dtype, &rows, &mut bytes);
                Kernels::best().to_f32(dtype, &bytes, &mut rounded);
                stored.extend_from_slice(&rounded);
            }
            self.digest(method, head, first, tokens, chunk);
        }
        self.tokens = tokens;
    }

    /// Gives rows `from..to` of one KV head to the method, page by page.
    fn digest(&mut self, method: &dyn Method, kv_head: usize, from: usize, to: usize, chunk: usize) {
        let Shape { head_dim: d, page_rows, .. } = self.shape;
        let mut scratch = Scratch::new();
        let needs = method.needs();
        let wants_values = needs.values;
        let mut token = needs.digestible(from);
        let (to, chunk) = match needs.sealed_rows {
            0 => (to, chunk),
            _ => (needs.digestible(to), usize::MAX),
        };
        while token < to {
            let first_row = token % page_rows;
            let count = chunk.min(to - token).min(page_rows - first_row);
            let pages = &mut self.pages[kv_head];
            if pages.len() <= token / page_rows {
                // A page's digest begins as anything: here as NaNs.
                pages.resize(token / page_rows + 1, vec![0xff; method.digest_bytes()]);
            }
            let append = Append {
                layer: self.layer,
                kv_head,
                state: &self.states[kv_head],
                keys: &self.keys.heads[kv_head][token * d..(token + count) * d],
                values: if wants_values {
                    &self.values[kv_head][token * d..(token + count) * d]
                } else {
                    &[]
                },
                first_token: token,
                first_row,
                marks: self.marks.get(token..token + count).unwrap_or(&[]),
            };
            let memory = &mut self.memories[kv_head];
            method.on_append(&append, &mut pages[token / page_rows], memory, &mut scratch);
            let victims = &mut self.victims[kv_head];
            method.on_admit(token + count, memory, &mut |victim| victims.push(victim));
            token += count;
        }
    }

    /// Cuts the sequence down to `tokens` tokens.
    pub fn truncate(&mut self, method: &dyn Method, tokens: usize) {
        let Shape { kv_heads, head_dim, page_rows, .. } = self.shape;
        self.tokens = tokens;
        self.marks.truncate(tokens);
        for head in 0..kv_heads {
            self.keys.heads[head].truncate(tokens * head_dim);
            self.values[head].truncate(tokens * head_dim);
            self.pages[head].truncate(tokens.div_ceil(page_rows));
            let from = match method.on_truncate(tokens, &mut self.memories[head]) {
                Truncated::Kept => tokens / page_rows * page_rows,
                Truncated::Rebuild => {
                    self.memories[head].fill(0);
                    0
                }
            };
            self.digest(method, head, from, tokens, usize::MAX);
        }
    }

    /// Sends an attention row of one KV head.
    pub fn feedback(&mut self, method: &dyn Method, kv_head: usize, blocks: &[f32], full: bool) {
        let row = FeedbackRow { layer: self.layer, kv_head, tokens: self.tokens, blocks, full };
        method.on_feedback(&row, &mut self.memories[kv_head]);
    }

    /// One selection for all tokens so far, noted in the pools.
    pub fn select(&mut self, method: &dyn Method, hint: &[f32], scratch: &mut Scratch) -> Selection {
        let context = SelectContext {
            sequence_seed: 1,
            ..SelectContext::new(&self.shape, self.layer, self.tokens, hint)
        };
        self.select_with(method, &context, scratch)
    }

    /// As [`Self::select`], for any request; its rows are this sequence's.
    pub fn select_with(
        &mut self,
        method: &dyn Method,
        context: &SelectContext<'_>,
        scratch: &mut Scratch,
    ) -> Selection {
        let mut out = Selection::new();
        // What it held before does not matter.
        out.push(0, 1);
        out.finish_head();
        let Self { pages, states, memories, keys, sequence, notes, .. } = self;
        let context = SelectContext { rows: keys, ..context.clone() };
        let mut view = View { pages, states, memories, sequence, notes };
        method.select(&context, &mut view, scratch, &mut out);
        if context.heads == (0..self.shape.kv_heads) {
            method.steer(&context, &out, &mut view);
        }
        for (at, head) in context.heads.clone().enumerate() {
            method.on_selected(out.head(at), &mut self.memories[head]);
        }
        out
    }

    /// The method's choice for the next step, where it makes one.
    pub fn prefetch(&mut self, method: &dyn Method, scratch: &mut Scratch) -> Option<Selection> {
        let mut out = Selection::new();
        let Self { pages, states, memories, keys, sequence, notes, .. } = self;
        let context = SelectContext {
            sequence_seed: 1,
            rows: keys,
            ..SelectContext::new(&self.shape, self.layer, self.tokens + 1, &[])
        };
        let view = &mut View { pages, states, memories, sequence, notes };
        method.prefetch(&context, view, scratch, &mut out).then_some(out)
    }

    /// As [`Self::select_with`], with the method's estimate of what it left out.
    pub fn select_with_rest(
        &mut self,
        method: &dyn Method,
        context: &SelectContext<'_>,
        scratch: &mut Scratch,
    ) -> (Selection, Rest) {
        let (mut out, mut rest) = (Selection::new(), Rest::new());
        let Self { pages, states, memories, keys, sequence, notes, .. } = self;
        let context = SelectContext { rows: keys, ..context.clone() };
        let mut view = View { pages, states, memories, sequence, notes };
        method.select_with_rest(&context, &mut view, scratch, &mut out, &mut rest);
        if context.heads == (0..self.shape.kv_heads) {
            method.steer(&context, &out, &mut view);
        }
        (out, rest)
    }

    /// The method's estimate of all that is not in `attended`, for the query in `context`.
    pub fn rest(
        &mut self,
        method: &dyn Method,
        context: &SelectContext<'_>,
        attended: &Selection,
        scratch: &mut Scratch,
    ) -> Rest {
        let mut out = Rest::new();
        // What it held before does not matter.
        out.clear(1);
        out.push();
        let Self { pages, states, memories, keys, sequence, notes, .. } = self;
        let context = SelectContext { rows: keys, ..context.clone() };
        method.rest(
            &context,
            attended,
            &mut View { pages, states, memories, sequence, notes },
            scratch,
            &mut out,
        );
        out
    }
}
