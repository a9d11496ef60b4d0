//! What methods keep of a sequence: digest blocks, head states and memories, built as rows are appended.
//!
//! A digest block belongs to one page of one KV head and is shared by forks like the page itself. A method that
//! needs the prompt's statistics has its digests built once those have come; before, rows only wait. A memory belongs to
//! one sequence, layer and KV head, and is the only one of them that a selection may change.

mod behind;
mod memory;
mod rows;

pub(crate) use self::behind::Behind;

use kvoyant_methods::method::Append;
use kvoyant_methods::{DigestKey, Method, Shape, Store};
use kvoyant_protocol::control::PageWord;
use kvoyant_protocol::memory::MemoryError;
use kvoyant_protocol::wire::SequenceId;

use crate::lane::model::ModelState;
use crate::lane::sequences::Sequence;
use crate::tiers::blocks::Blocks;
use crate::tiers::heap::{Heap, Region};
use rows::{read_keys, read_values};

/// Blocks of one kind of digest.
#[derive(Debug)]
pub struct DigestPool {
    pub(crate) key: DigestKey,
    /// The blocks.
    pub blocks: Blocks,
}

impl DigestPool {
    /// Which kind.
    pub(crate) fn key(&self) -> DigestKey {
        self.key
    }
}

/// No block yet.
const NO_BLOCK: u32 = DigestSet::NO_BLOCK;

/// Rows of a layer's heads that are digested in one piece, to whole pages.
const ROWS_AT_ONCE: usize = 1024;

/// What one method keeps of one sequence.
#[derive(Debug, Clone)]
pub struct DigestSet {
    /// Which kind.
    pub key: DigestKey,
    /// A method that builds this kind.
    pub(crate) method: usize,
    /// Block ids, `[layer][KV head][capacity]`.
    pub table: Region,
    /// Head states, `[layer][KV head]`.
    pub(crate) state: Region,
    /// Memories, `[layer][KV head]`.
    pub(crate) memory: Option<Region>,
    /// What is kept for all layers together, and behind it the notes, `[layer][KV head]`.
    pub(crate) sequence: Option<Region>,
    /// Rows of each page that a pool has dropped, `[layer][KV head][capacity]`.
    pub(crate) dead: Option<Region>,
    /// Rows digested, per layer.
    pub(crate) built: Vec<u32>,
    /// Whether a layer's digests can be built.
    pub(crate) ready: Vec<bool>,
}

impl DigestSet {
    /// In its table: a page without a block.
    pub(crate) const NO_BLOCK: u32 = u32::MAX;

    /// Whether a method reads it. Digests are shared by all methods of a kind; a memory is one method's, for it may
    /// depend on any of its options.
    pub(crate) fn serves(&self, key: DigestKey, method: usize) -> bool {
        self.key == key && (self.memory.is_none() || self.method == method)
    }

    /// The method that builds it.
    pub(crate) fn method(&self) -> usize {
        self.method
    }

    /// Bytes of everything but the blocks and the memories.
    pub(crate) fn table_bytes(&self) -> usize {
        let parts = [Some(self.table), Some(self.state), self.sequence, self.dead];
        parts.into_iter().flatten().map(|region| region.len).sum()
    }

    /// Bytes of the memories.
    pub(crate) fn memory_bytes(&self) -> usize {
        self.memory.map_or(0, |memory| memory.len)
    }

    fn memory_of(&self, head: usize, heads: usize) -> Option<Region> {
        self.memory.map(|memory| part(memory, head, memory.len / heads))
    }
}

/// What a method keeps of one sequence and layer, as it sees it.
#[derive(Debug)]
pub(crate) struct View<'a> {
    meta: &'a mut Heap,
    blocks: &'a Blocks,
    set: &'a DigestSet,
    capacity: usize,
    heads: usize,
    first_head: usize,
    state_bytes: usize,
    sequence_bytes: usize,
    note_bytes: usize,
}

impl<'a> View<'a> {
    /// What the method with this index keeps; `None` if it keeps nothing.
    pub(crate) fn new(
        meta: &'a mut Heap,
        pools: &'a [DigestPool],
        sequence: &'a Sequence,
        (method, index): (&dyn Method, usize),
        (shape, layer): (&Shape, usize),
    ) -> Option<Self> {
        let key = method.digest_key()?;
        let set = sequence.digests.iter().find(|set| set.serves(key, index))?;
        let pool = pools.iter().find(|pool| pool.key == key)?;
        Some(Self {
            meta,
            blocks: &pool.blocks,
            set,
            capacity: sequence.capacity,
            heads: shape.layers * shape.kv_heads,
            first_head: layer * shape.kv_heads,
            state_bytes: method.head_state_bytes(),
            sequence_bytes: method.sequence_bytes(),
            note_bytes: method.note_bytes(),
        })
    }
}

pub(crate) fn part(region: Region, index: usize, len: usize) -> Region {
    Region { file: region.file, offset: region.offset + index * len, len }
}

impl Store for View<'_> {
    fn page(&self, kv_head: usize, page: usize) -> &[u8] {
        let block = self.meta.word(self.set.table, (self.first_head + kv_head) * self.capacity + page);
        self.blocks.get(self.meta, block)
    }

    fn state(&self, kv_head: usize) -> &[u8] {
        self.meta.get(part(self.set.state, self.first_head + kv_head, self.state_bytes))
    }

    fn memory(&self, kv_head: usize) -> &[u8] {
        let memory = self.set.memory_of(self.first_head + kv_head, self.heads);
        memory.map_or(&[], |memory| self.meta.get(memory))
    }

    fn memory_mut(&mut self, kv_head: usize) -> &mut [u8] {
        let memory = self.set.memory_of(self.first_head + kv_head, self.heads);
        memory.map_or(&mut [], |memory| self.meta.get_mut(memory))
    }

    fn sequence(&mut self) -> &mut [u8] {
        self.set
            .sequence
            .map_or(&mut [], |sequence| self.meta.get_mut(part(sequence, 0, self.sequence_bytes)))
    }

    fn note(&mut self, kv_head: usize) -> &mut [u8] {
        let at = self.sequence_bytes + (self.first_head + kv_head) * self.note_bytes;
        let place =
            |sequence: Region| Region { offset: sequence.offset + at, len: self.note_bytes, ..sequence };
        self.set.sequence.map_or(&mut [], |sequence| self.meta.get_mut(place(sequence)))
    }
}

impl ModelState {
    fn total_heads(&self) -> usize {
        self.shape.layers * self.shape.kv_heads
    }

    fn pool_index(&mut self, key: DigestKey, block_bytes: usize) -> usize {
        match self.pools.iter().position(|pool| pool.key == key) {
            Some(index) => index,
            None => {
                self.pools.push(DigestPool { key, blocks: Blocks::new(block_bytes) });
                self.pools.len() - 1
            }
        }
    }

    /// Whether the digests of a layer cover the first `tokens` rows, as far as a method looks at them that selects for a token at `position`.
    pub(crate) fn digested(&self, id: SequenceId, layer: usize, tokens: usize, position: usize) -> Digested {
        let Ok(sequence) = self.sequence(id) else { return Digested::Behind };
        let Some(key) = self.methods[sequence.method].digest_key() else { return Digested::Yes };
        // Groups of rows have digests when they are full: as many must be there as it takes for those that a method looks at, which takes it
        // that all tokens but the current one have been appended.
        let needs = self.methods[sequence.method].needs();
        let tokens = match needs.sealed_rows {
            0 => tokens,
            rows => tokens.min(needs.digestible(position)).div_ceil(rows) * rows,
        };
        match sequence.digests.iter().find(|set| set.serves(key, sequence.method)) {
            Some(set) if !set.ready[layer] => Digested::NotObserved,
            Some(set) if set.built[layer] as usize >= tokens => Digested::Yes,
            _ => Digested::Behind,
        }
    }

    /// Whether a sequence has the digests that a method reads.
    pub(crate) fn has_digests(&self, id: SequenceId, method: usize) -> bool {
        let Some(key) = self.methods[method].digest_key() else { return true };
        self.sequence(id).is_ok_and(|sequence| sequence.digests.iter().any(|set| set.serves(key, method)))
    }

    /// Makes sure that a sequence has the digests that a method reads, built as far as rows are there.
    pub(crate) fn ensure_digests(&mut self, id: SequenceId, method: usize) -> Result<(), MemoryError> {
        let Some(key) = self.methods[method].digest_key() else { return Ok(()) };
        let Ok(sequence) = self.sequence(id) else { return Ok(()) };
        if sequence.digests.iter().any(|set| set.serves(key, method)) {
            return Ok(());
        }
        let (capacity, layers, heads) = (sequence.capacity, self.shape.layers, self.total_heads());
        let needs = self.methods[method].needs();
        let state_bytes = self.methods[method].head_state_bytes();
        let block_bytes = self.methods[method].digest_bytes();
        self.pool_index(key, block_bytes);
        let table = self.meta.allocate(heads * capacity * 4)?;
        self.meta.get_mut(table).fill(0xff);
        let state = self.meta.allocate(heads * state_bytes)?;
        for head in 0..heads {
            let (layer, kv_head) = (head / self.shape.kv_heads, head % self.shape.kv_heads);
            let bytes = self.meta.get_mut(part(state, head, state_bytes));
            self.methods[method].init_state(layer, kv_head, bytes);
        }
        let (memory, dead) = self.new_memory(method, capacity)?;
        let kept = self.methods[method].sequence_bytes() + heads * self.methods[method].note_bytes();
        let sequence_bytes = (kept > 0).then(|| self.meta.allocate(kept)).transpose()?;
        let set = DigestSet {
            key,
            method,
            table,
            state,
            memory,
            sequence: sequence_bytes,
            dead,
            built: vec![0; layers],
            ready: vec![!needs.observe; layers],
        };
        let Ok(sequence) = self.sequence_mut(id) else { return Ok(()) };
        sequence.digests.push(set);
        let index = sequence.digests.len() - 1;
        for layer in 0..layers {
            if needs.observe && self.sequence(id).is_ok_and(|sequence| sequence.observed[layer]) {
                self.apply_observation(id, index, layer)?;
            }
            self.falls_behind(id, layer);
        }
        Ok(())
    }

    /// A fork's own set over the parent's blocks.
    pub(crate) fn share_digests(
        &mut self,
        parent: SequenceId,
        method: usize,
    ) -> Result<Vec<DigestSet>, MemoryError> {
        let Some(key) = self.methods[method].digest_key() else { return Ok(Vec::new()) };
        let Ok(sequence) = self.sequence(parent) else { return Ok(Vec::new()) };
        let Some(mut set) = sequence.digests.iter().find(|set| set.serves(key, method)).cloned() else {
            return Ok(Vec::new());
        };
        let words = sequence.capacity * self.total_heads();
        set.table = self.meta.copy(set.table)?;
        set.state = self.meta.copy(set.state)?;
        set.memory = set.memory.map(|memory| self.meta.copy(memory)).transpose()?;
        set.sequence = set.sequence.map(|sequence| self.meta.copy(sequence)).transpose()?;
        set.dead = set.dead.map(|dead| self.meta.copy(dead)).transpose()?;
        if let Some(pool) = self.pools.iter_mut().find(|pool| pool.key == key) {
            for word in 0..words {
                let block = self.meta.word(set.table, word);
                if block != NO_BLOCK {
                    pool.blocks.share(block);
                }
            }
        }
        Ok(vec![set])
    }

    /// Moves digest tables, memories and marks to regions for `capacity` pages.
    pub(crate) fn grow_digests(
        &mut self,
        id: SequenceId,
        old: usize,
        capacity: usize,
    ) -> Result<(), MemoryError> {
        let (heads, rows) = (self.total_heads(), self.shape.page_rows);
        let Ok(sequence) = self.sequence_mut(id) else { return Ok(()) };
        if let Some(marks) = sequence.marks.take() {
            let larger = self.meta.allocate(capacity * rows)?;
            self.move_parts(marks, larger, 1, old * rows, capacity * rows);
            if let Ok(sequence) = self.sequence_mut(id) {
                sequence.marks = Some(larger);
            }
        }
        let Ok(sequence) = self.sequence_mut(id) else { return Ok(()) };
        let mut sets = std::mem::take(&mut sequence.digests);
        for set in &mut sets {
            let table = self.meta.allocate(heads * capacity * 4)?;
            self.meta.get_mut(table).fill(0xff);
            self.move_parts(set.table, table, heads, old * 4, capacity * 4);
            set.table = table;
            if let Some(dead) = set.dead {
                let larger = self.meta.allocate(heads * capacity * 4)?;
                self.move_parts(dead, larger, heads, old * 4, capacity * 4);
                set.dead = Some(larger);
            }
            if let Some(memory) = set.memory {
                let larger =
                    self.meta.allocate(heads * self.methods[set.method].memory_bytes(capacity * rows))?;
                let (from, to) = (memory.len / heads, larger.len / heads);
                for head in 0..heads {
                    let bytes = self.meta.get(part(memory, head, from)).to_vec();
                    let into = self.meta.get_mut(part(larger, head, to));
                    self.methods[set.method].grow_memory(&bytes, into);
                }
                self.meta.release(memory);
                set.memory = Some(larger);
            }
        }
        if let Ok(sequence) = self.sequence_mut(id) {
            sequence.digests = sets;
        }
        Ok(())
    }

    /// Copies each head's part of a region into its larger part of another, and releases the old one.
    pub(super) fn move_parts(
        &mut self,
        from: Region,
        to: Region,
        heads: usize,
        from_len: usize,
        to_len: usize,
    ) {
        for head in 0..heads {
            let bytes = self.meta.get(part(from, head, from_len)).to_vec();
            self.meta.get_mut(part(to, head, to_len))[..from_len].copy_from_slice(&bytes);
        }
        self.meta.release(from);
    }

    /// Takes in the statistics of a prompt's queries for one layer, `[KV head][head dim]`.
    pub(crate) fn observe(&mut self, id: SequenceId, layer: usize, sums: &[f32]) -> Result<(), MemoryError> {
        let per_layer = self.shape.kv_heads * self.shape.head_dim;
        let region = match self.sequence(id).map(|sequence| sequence.observation) {
            Ok(Some(region)) => region,
            Ok(None) => self.meta.allocate(self.shape.layers * per_layer * 4)?,
            Err(_) => return Ok(()),
        };
        self.meta.get_mut(part(region, layer, per_layer * 4)).copy_from_slice(bytemuck::cast_slice(sums));
        let Ok(sequence) = self.sequence_mut(id) else { return Ok(()) };
        sequence.observation = Some(region);
        sequence.observed[layer] = true;
        let sets = sequence.digests.len();
        for index in 0..sets {
            self.apply_observation(id, index, layer)?;
        }
        self.falls_behind(id, layer);
        Ok(())
    }

    fn apply_observation(&mut self, id: SequenceId, index: usize, layer: usize) -> Result<(), MemoryError> {
        if !self.speculates(layer) {
            return Ok(());
        }
        let Ok(sequence) = self.sequence(id) else { return Ok(()) };
        let Some(region) = sequence.observation else { return Ok(()) };
        let (method, state) = (sequence.digests[index].method, sequence.digests[index].state);
        let (heads, dim) = (self.shape.kv_heads, self.shape.head_dim);
        let state_bytes = self.methods[method].head_state_bytes();
        let mut changed = false;
        let mut sums = vec![0.0f32; dim];
        for head in 0..heads {
            let bytes = self.meta.get(part(region, layer * heads + head, dim * 4));
            bytemuck::cast_slice_mut::<f32, u8>(&mut sums).copy_from_slice(bytes);
            let state = self.meta.get_mut(part(state, layer * heads + head, state_bytes));
            changed |= self.methods[method].observe(layer, head, &sums, state);
        }
        if let Ok(sequence) = self.sequence_mut(id) {
            let set = &mut sequence.digests[index];
            set.ready[layer] = true;
            if changed {
                set.built[layer] = 0;
            }
        }
        Ok(())
    }

    /// Digests some of a set's rows that have been appended since it was last called; true if it could go on with more of them.
    fn build(&mut self, id: SequenceId, index: usize, layer: usize) -> Result<bool, MemoryError> {
        if !self.speculates(layer) {
            return Ok(false);
        }
        let Ok(sequence) = self.sequence(id) else { return Ok(false) };
        let set = &sequence.digests[index];
        let needs = self.methods[set.method].needs();
        let rows = self.shape.page_rows;
        let (from, end) = (set.built[layer] as usize, needs.digestible(sequence.lens[layer] as usize));
        if !set.ready[layer] || from >= end {
            return Ok(false);
        }
        let some = (from / rows + (ROWS_AT_ONCE / (rows * self.shape.kv_heads)).max(1)) * rows;
        // What lies on disk is digested when somebody asks for it.
        let to = self.in_memory_to(sequence, layer, from, some.min(end));
        if from >= to {
            return Ok(false);
        }
        let more = to == some && to < end;
        let (key, table, state, method) = (set.key, set.table, set.state, set.method);
        let (pages, capacity, set) = (sequence.table, sequence.capacity, set.clone());
        let (heads, total) = (self.shape.kv_heads, self.total_heads());
        let marks = sequence.marks.filter(|_| needs.marks);
        let Some(pool) = self.pools.iter_mut().find(|pool| pool.key == key) else { return Ok(false) };
        let method: &dyn Method = &*self.methods[method];
        let state_bytes = method.head_state_bytes();
        let buffers = &mut self.buffers;
        for kv_head in 0..heads {
            let head = layer * heads + kv_head;
            buffers.state.clear();
            buffers.state.extend_from_slice(self.meta.get(part(state, head, state_bytes)));
            let mut token = from;
            while token < to {
                let (page, first_row) = (token / rows, token % rows);
                let count = (to - token).min(rows - first_row);
                let word = head * capacity + page;
                let Some(id) = PageWord::of(self.tables.word(pages, word)).page() else {
                    token += count;
                    continue;
                };
                let locator = id * rows as u32 + first_row as u32;
                read_keys(&self.arena, self.layout, locator, count, &mut buffers.rows, &mut buffers.keys)?;
                buffers.values.clear();
                if needs.values {
                    let (rows, values) = (&mut buffers.rows, &mut buffers.values);
                    read_values(&self.arena, self.layout, locator, count, rows, values)?;
                }
                let block = match self.meta.word(table, word) {
                    NO_BLOCK => pool.blocks.take(&mut self.meta)?,
                    block => pool.blocks.make_private(&mut self.meta, block)?,
                };
                self.meta.set_word(table, word, block);
                buffers.marks.clear();
                if let Some(marks) = marks {
                    buffers.marks.extend_from_slice(&self.meta.get(marks)[token..token + count]);
                }
                let append = Append {
                    layer,
                    kv_head,
                    state: &buffers.state,
                    keys: &buffers.keys,
                    values: &buffers.values,
                    first_token: token,
                    first_row,
                    marks: &buffers.marks,
                };
                match set.memory_of(head, total) {
                    None => {
                        let digest = pool.blocks.get_mut(&mut self.meta, block);
                        method.on_append(&append, digest, &mut [], &mut buffers.scratch);
                    }
                    Some(memory) => {
                        // Both lie in one heap, and the digest is the smaller by far.
                        buffers.digest.clear();
                        buffers.digest.extend_from_slice(pool.blocks.get(&self.meta, block));
                        let memory = self.meta.get_mut(memory);
                        method.on_append(&append, &mut buffers.digest, memory, &mut buffers.scratch);
                        pool.blocks.get_mut(&mut self.meta, block).copy_from_slice(&buffers.digest);
                    }
                }
                token += count;
            }
        }
        if let Ok(sequence) = self.sequence_mut(id) {
            sequence.digests[index].built[layer] = to as u32;
        }
        // Once for all of them: what a pool gives up must not depend on the pieces.
        if !more {
            self.admit(id, index, layer, to);
        }
        Ok(more)
    }

    /// Tells pools that the sequence grew, and gives up pages of which every row has left the pool.
    fn admit(&mut self, id: SequenceId, index: usize, layer: usize, tokens: usize) {
        let Ok(sequence) = self.sequence(id) else { return };
        let set = &sequence.digests[index];
        let Some(dead) = set.dead else { return };
        let (pages, capacity, set) = (sequence.table, sequence.capacity, set.clone());
        let slots = sequence.slots;
        let (rows, heads, total) = (self.shape.page_rows, self.shape.kv_heads, self.total_heads());
        let mut victims: Vec<u32> = Vec::new();
        for kv_head in 0..heads {
            let head = layer * heads + kv_head;
            victims.clear();
            let bytes = set.memory_of(head, total).map_or(&mut [][..], |memory| self.meta.get_mut(memory));
            self.methods[set.method].on_admit(tokens, bytes, &mut |victim| victims.push(victim));
            for victim in victims.iter().filter(|victim| (**victim as usize) < tokens) {
                let word = head * capacity + *victim as usize / rows;
                let gone = self.meta.word(dead, word) + 1;
                self.meta.set_word(dead, word, gone);
                if gone as usize == rows {
                    self.drop_page(pages, slots, word);
                }
            }
        }
    }

    /// Forgets rows from token `tokens` on, and digests what is left of the page that was cut.
    pub(crate) fn truncate_digests(&mut self, id: SequenceId, tokens: u32) -> Result<(), MemoryError> {
        let rows = self.shape.page_rows;
        let total = self.total_heads();
        let sets = self.sequence(id).map_or(0, |sequence| sequence.digests.len());
        for index in 0..sets {
            let Ok(sequence) = self.sequence(id) else { return Ok(()) };
            let capacity = sequence.capacity;
            let set = sequence.digests[index].clone();
            let keep = (tokens as usize).div_ceil(rows);
            if let Some(pool) = self.pools.iter_mut().find(|pool| pool.key == set.key) {
                for head in 0..total {
                    for page in keep..capacity {
                        let word = head * capacity + page;
                        let block = self.meta.word(set.table, word);
                        if block != NO_BLOCK {
                            pool.blocks.release(block);
                            self.meta.set_word(set.table, word, NO_BLOCK);
                        }
                    }
                }
            }
            if let Some(dead) = set.dead {
                // Of the page that was cut, too few dead rows count from now on: it stays, which is the safe side.
                for head in 0..total {
                    for page in tokens as usize / rows..capacity {
                        self.meta.set_word(dead, head * capacity + page, 0);
                    }
                }
            }
            let start = tokens / rows as u32 * rows as u32;
            for layer in 0..self.shape.layers {
                let built = set.built[layer];
                let kept = if built > tokens { start } else { built };
                let rebuild = self.cut_memory(&set, layer, capacity, tokens as usize);
                if let Ok(sequence) = self.sequence_mut(id) {
                    sequence.digests[index].built[layer] = if rebuild { 0 } else { kept };
                }
            }
        }
        if sets > 0 {
            (0..self.shape.layers).for_each(|layer| self.falls_behind(id, layer));
        }
        Ok(())
    }

    /// Gives back the block of an entry of a set's table, if there is one.
    pub(crate) fn release_block(&mut self, key: DigestKey, table: Region, entry: usize) {
        let block = self.meta.word(table, entry);
        if block != NO_BLOCK {
            self.meta.set_word(table, entry, NO_BLOCK);
            let pool = self.pools.iter_mut().find(|pool| pool.key == key);
            pool.into_iter().for_each(|pool| pool.blocks.release(block));
        }
    }

    /// Gives a closed sequence's digests back, but for their blocks.
    pub(crate) fn release_digests(&mut self, set: &DigestSet) {
        let regions = [Some(set.table), Some(set.state), set.memory, set.sequence, set.dead];
        regions.into_iter().flatten().for_each(|region| self.meta.release(region));
    }
}

/// Whether digests are there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Digested {
    /// They are, or none are needed.
    Yes,
    /// Rows are missing.
    Behind,
    /// The prompt's statistics are missing.
    NotObserved,
}
