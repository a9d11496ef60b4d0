//! What a method keeps of one sequence, in this process.

use std::sync::Arc;

use kvoyant_kernels::RowLayout;
use kvoyant_methods::method::Append;
use kvoyant_methods::{Method, Scratch, Shape, Store};

use crate::Error;
use crate::sequence::Sequence;

/// Pages whose digests lie one behind the other; also what a fork that grows has to copy.
const CHUNK_PAGES: usize = 64;

/// Digests of one layer and KV head.
#[derive(Debug, Clone)]
pub struct HeadDigests {
    block_bytes: usize,
    /// Of [`CHUNK_PAGES`] pages each, but for the last.
    chunks: Vec<Arc<Vec<u8>>>,
    state: Vec<u8>,
    /// Rows digested.
    built: usize,
}

impl HeadDigests {
    fn page(&self, page: usize) -> &[u8] {
        &self.chunks[page / CHUNK_PAGES][page % CHUNK_PAGES * self.block_bytes..][..self.block_bytes]
    }

    fn stretch(&self, first: usize, most: usize) -> &[u8] {
        let chunk = &self.chunks[first / CHUNK_PAGES][first % CHUNK_PAGES * self.block_bytes..];
        &chunk[..chunk.len().min(most * self.block_bytes)]
    }

    /// A page's block to be written; what is new begins as zeros.
    fn page_mut(&mut self, page: usize) -> &mut [u8] {
        let (chunk, at) = (page / CHUNK_PAGES, page % CHUNK_PAGES * self.block_bytes);
        if self.chunks.len() <= chunk {
            self.chunks.resize_with(chunk + 1, || Arc::new(Vec::new()));
        }
        let bytes = Arc::make_mut(&mut self.chunks[chunk]);
        if bytes.len() < at + self.block_bytes {
            // All at once: a chunk that grew page by page would be moved as often.
            bytes.reserve_exact(CHUNK_PAGES * self.block_bytes - bytes.len());
            bytes.resize(at + self.block_bytes, 0);
        }
        &mut bytes[at..at + self.block_bytes]
    }

    pub(super) fn build(
        &mut self,
        method: &dyn Method,
        (shape, layout): (&Shape, RowLayout),
        sequence: &Sequence,
        (layer, kv_head): (usize, usize),
        tokens: usize,
    ) -> Result<(), Error> {
        let (needs, rows) = (method.needs(), shape.page_rows);
        let end = needs.digestible(tokens);
        if !needs.digest || layer < shape.dense_layers || self.built >= end {
            return Ok(());
        }
        let row_bytes = layout.row_bytes().unwrap_or(0);
        let (mut stored, mut scratch) = (Vec::new(), Scratch::new());
        let (mut keys, mut values) = (Vec::new(), Vec::new());
        while self.built < end {
            let (first, first_row) = (self.built, self.built % rows);
            let count = (end - first).min(rows - first_row);
            stored.resize(count * row_bytes, 0);
            sequence.read_rows(layer, kv_head, first..first + count, &mut stored)?;
            keys.resize(count * layout.key_values(), 0.0);
            layout.decode_keys(&stored, &mut keys);
            if needs.values {
                values.resize(count * layout.value_values(), 0.0);
                layout.decode_values(&stored, &mut values);
            }
            let state = std::mem::take(&mut self.state);
            let append = Append {
                layer,
                kv_head,
                state: &state,
                keys: &keys,
                values: &values,
                first_token: first,
                first_row,
                marks: &[],
            };
            method.on_append(&append, self.page_mut(first / rows), &mut [], &mut scratch);
            self.state = state;
            self.built = first + count;
        }
        Ok(())
    }

    fn bytes(&self) -> usize {
        self.chunks.iter().map(|chunk| chunk.capacity()).sum::<usize>() + self.state.len()
    }
}

/// What a method keeps of one sequence. A clone is a fork's: what neither of the two has changed since is kept once.
#[derive(Debug, Clone)]
pub struct LocalDigests {
    /// `[layers][Hkv]`.
    heads: Vec<HeadDigests>,
    kv_heads: usize,
    page_rows: usize,
    /// What is kept for all layers together.
    sequence: Vec<u8>,
    /// What the last selections left, `[layers][Hkv]`.
    notes: Vec<u8>,
    note_bytes: usize,
    seed: u64,
}

impl LocalDigests {
    pub(super) fn new(method: &dyn Method, shape: &Shape, seed: u64) -> Self {
        let head = |at: usize| {
            let mut state = vec![0; method.head_state_bytes()];
            method.init_state(at / shape.kv_heads, at % shape.kv_heads, &mut state);
            HeadDigests { block_bytes: method.digest_bytes(), chunks: Vec::new(), state, built: 0 }
        };
        let heads = shape.layers * shape.kv_heads;
        Self {
            heads: (0..heads).map(head).collect(),
            kv_heads: shape.kv_heads,
            page_rows: shape.page_rows,
            sequence: vec![0; method.sequence_bytes()],
            notes: vec![0; heads * method.note_bytes()],
            note_bytes: method.note_bytes(),
            seed,
        }
    }

    /// Of every layer and KV head, `[layers][Hkv]`.
    pub fn heads_mut(&mut self) -> &mut [HeadDigests] {
        &mut self.heads
    }

    /// Bytes that they take, those shared with forks included.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.heads.iter().map(HeadDigests::bytes).sum::<usize>() + self.sequence.len() + self.notes.len()
    }

    /// Forgets the rows from `tokens` on. A page that is cut is digested again, whole.
    pub fn truncate(&mut self, tokens: usize) {
        let pages = tokens / self.page_rows;
        for head in self.heads.iter_mut().filter(|head| head.built > tokens) {
            head.built = pages * self.page_rows;
        }
    }

    pub(super) fn seed(&self) -> u64 {
        self.seed
    }

    pub(super) fn note_mut(&mut self, layer: usize, kv_head: usize) -> &mut [u8] {
        let at = (layer * self.kv_heads + kv_head) * self.note_bytes;
        &mut self.notes[at..at + self.note_bytes]
    }
}

/// A layer of a sequence, as its method sees it.
pub(super) struct View<'a> {
    heads: &'a [HeadDigests],
    sequence: &'a mut [u8],
    /// Of the layer, `[Hkv]`.
    notes: &'a mut [u8],
    note_bytes: usize,
}

impl<'a> View<'a> {
    /// With copies of what may change, so that heads can be looked at side by side.
    pub(super) fn of_copy(
        digests: &'a LocalDigests,
        layer: usize,
        (sequence, notes): (&'a mut Vec<u8>, &'a mut Vec<u8>),
    ) -> Self {
        let (heads, note_bytes) = (digests.kv_heads, digests.note_bytes);
        sequence.clone_from(&digests.sequence);
        notes.clear();
        notes.extend_from_slice(&digests.notes[layer * heads * note_bytes..][..heads * note_bytes]);
        Self { heads: &digests.heads[layer * heads..][..heads], sequence, notes, note_bytes }
    }

    /// With everything.
    pub(super) fn of(digests: &'a mut LocalDigests, layer: usize) -> Self {
        let (heads, note_bytes) = (digests.kv_heads, digests.note_bytes);
        Self {
            heads: &digests.heads[layer * heads..][..heads],
            sequence: &mut digests.sequence,
            notes: &mut digests.notes[layer * heads * note_bytes..][..heads * note_bytes],
            note_bytes,
        }
    }
}

impl Store for View<'_> {
    fn page(&self, kv_head: usize, page: usize) -> &[u8] {
        self.heads[kv_head].page(page)
    }

    fn stretch(&self, kv_head: usize, first: usize, most: usize) -> &[u8] {
        self.heads[kv_head].stretch(first, most)
    }

    fn state(&self, kv_head: usize) -> &[u8] {
        &self.heads[kv_head].state
    }

    fn sequence(&mut self) -> &mut [u8] {
        self.sequence
    }

    fn note(&mut self, kv_head: usize) -> &mut [u8] {
        &mut self.notes[kv_head * self.note_bytes..][..self.note_bytes]
    }
}
