//! What methods keep of a sequence: digest blocks, head states and counter pools, built as rows are appended.
//!
//! A digest block belongs to one page of one KV head and is shared by forks like the page itself. A method that
//! needs the prompt's statistics has its digests built once those have come; before, rows only wait.

use kvoyant_methods::method::Append;
use kvoyant_methods::{DigestKey, DigestSource, Method};
use kvoyant_protocol::control::NO_PAGE;
use kvoyant_protocol::memory::MemoryError;
use kvoyant_protocol::wire::SequenceId;

use crate::lane::model::ModelState;
use crate::tiers::blocks::Blocks;
use crate::tiers::heap::{Heap, Region};

/// Blocks of one kind of digest.
#[derive(Debug)]
pub struct DigestPool {
    key: DigestKey,
    /// The blocks.
    pub blocks: Blocks,
}

/// No block yet.
const NO_BLOCK: u32 = u32::MAX;

/// What one method keeps of one sequence.
#[derive(Debug, Clone)]
pub struct DigestSet {
    /// Which kind.
    pub key: DigestKey,
    /// A method that builds this kind.
    method: usize,
    /// Block ids, `[layer][KV head][capacity]`.
    pub table: Region,
    /// Head states, `[layer][KV head]`.
    state: Region,
    /// Counter pools, `[layer][KV head]`, and the dead rows of each page, `[layer][KV head][capacity]`.
    pool: Option<(Region, Region)>,
    /// Rows digested, per layer.
    built: Vec<u32>,
    /// Whether a layer's digests can be built.
    ready: Vec<bool>,
}

/// Digests of one sequence and layer, as a method reads them.
#[derive(Debug)]
pub(crate) struct View<'a> {
    meta: &'a Heap,
    blocks: &'a Blocks,
    set: &'a DigestSet,
    capacity: usize,
    first_head: usize,
    state_bytes: usize,
    pool_bytes: usize,
}

fn part(region: Region, index: usize, len: usize) -> Region {
    Region { file: region.file, offset: region.offset + index * len, len }
}

impl DigestSource for View<'_> {
    fn page(&self, kv_head: usize, page: usize) -> &[u8] {
        let block = self.meta.word(self.set.table, (self.first_head + kv_head) * self.capacity + page);
        self.blocks.get(self.meta, block)
    }

    fn state(&self, kv_head: usize) -> &[u8] {
        self.meta.get(part(self.set.state, self.first_head + kv_head, self.state_bytes))
    }

    fn pool(&self, kv_head: usize) -> &[u8] {
        match self.set.pool {
            None => &[],
            Some((pool, _)) => self.meta.get(part(pool, self.first_head + kv_head, self.pool_bytes)),
        }
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

    /// Whether the digests of a layer cover the first `tokens` rows.
    pub(crate) fn digested(&self, id: SequenceId, layer: usize, tokens: usize) -> Digested {
        let Ok(sequence) = self.sequence(id) else { return Digested::Behind };
        let Some(key) = self.methods[sequence.method].digest_key() else { return Digested::Yes };
        match sequence.digests.iter().find(|set| set.key == key) {
            Some(set) if !set.ready[layer] => Digested::NotObserved,
            Some(set) if set.built[layer] as usize >= tokens => Digested::Yes,
            _ => Digested::Behind,
        }
    }

    /// The digests that the sequence's method reads; `None` if it reads none.
    pub(crate) fn view(&self, id: SequenceId, layer: usize) -> Option<View<'_>> {
        let sequence = self.sequence(id).ok()?;
        let method = &self.methods[sequence.method];
        let key = method.digest_key()?;
        let set = sequence.digests.iter().find(|set| set.key == key)?;
        let pool = self.pools.iter().find(|pool| pool.key == key)?;
        Some(View {
            meta: &self.meta,
            blocks: &pool.blocks,
            set,
            capacity: sequence.capacity,
            first_head: layer * self.shape.kv_heads,
            state_bytes: method.head_state_bytes(),
            pool_bytes: method.pool_bytes(sequence.capacity * self.shape.page_rows),
        })
    }

    /// Makes sure that a sequence has the digests that a method reads, built as far as rows are there.
    pub(crate) fn ensure_digests(&mut self, id: SequenceId, method: usize) -> Result<(), MemoryError> {
        let Some(key) = self.methods[method].digest_key() else { return Ok(()) };
        let Ok(sequence) = self.sequence(id) else { return Ok(()) };
        if sequence.digests.iter().any(|set| set.key == key) {
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
        let pool = self.new_counters(method, capacity)?;
        let set = DigestSet {
            key,
            method,
            table,
            state,
            pool,
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
            self.build(id, index, layer)?;
        }
        Ok(())
    }

    fn new_counters(
        &mut self,
        method: usize,
        capacity: usize,
    ) -> Result<Option<(Region, Region)>, MemoryError> {
        if !self.methods[method].needs().pool {
            return Ok(None);
        }
        let heads = self.total_heads();
        let bytes = self.methods[method].pool_bytes(capacity * self.shape.page_rows);
        let pool = self.meta.allocate(heads * bytes)?;
        let dead = self.meta.allocate(heads * capacity * 4)?;
        Ok(Some((pool, dead)))
    }

    /// A fork's own set over the parent's blocks.
    pub(crate) fn share_digests(
        &mut self,
        parent: SequenceId,
        key: DigestKey,
    ) -> Result<Vec<DigestSet>, MemoryError> {
        let Ok(sequence) = self.sequence(parent) else { return Ok(Vec::new()) };
        let Some(mut set) = sequence.digests.iter().find(|set| set.key == key).cloned() else {
            return Ok(Vec::new());
        };
        let words = sequence.capacity * self.total_heads();
        let copy = |meta: &mut Heap, from: Region| -> Result<Region, MemoryError> {
            let to = meta.allocate(from.len)?;
            let bytes = meta.get(from).to_vec();
            meta.get_mut(to).copy_from_slice(&bytes);
            Ok(to)
        };
        set.table = copy(&mut self.meta, set.table)?;
        set.state = copy(&mut self.meta, set.state)?;
        set.pool = match set.pool {
            None => None,
            Some((pool, dead)) => Some((copy(&mut self.meta, pool)?, copy(&mut self.meta, dead)?)),
        };
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

    /// Moves digest tables and counter pools to regions for `capacity` pages.
    pub(crate) fn grow_digests(
        &mut self,
        id: SequenceId,
        old: usize,
        capacity: usize,
    ) -> Result<(), MemoryError> {
        let (heads, rows) = (self.total_heads(), self.shape.page_rows);
        let Ok(sequence) = self.sequence_mut(id) else { return Ok(()) };
        let mut sets = std::mem::take(&mut sequence.digests);
        for set in &mut sets {
            let table = self.meta.allocate(heads * capacity * 4)?;
            self.meta.get_mut(table).fill(0xff);
            self.move_parts(set.table, table, heads, old * 4, capacity * 4);
            set.table = table;
            if let Some((pool, dead)) = set.pool {
                let method = &self.methods[set.method];
                let (from, to) = (method.pool_bytes(old * rows), method.pool_bytes(capacity * rows));
                let new_pool = self.meta.allocate(heads * to)?;
                self.move_parts(pool, new_pool, heads, from, to);
                let new_dead = self.meta.allocate(heads * capacity * 4)?;
                self.move_parts(dead, new_dead, heads, old * 4, capacity * 4);
                set.pool = Some((new_pool, new_dead));
            }
        }
        if let Ok(sequence) = self.sequence_mut(id) {
            sequence.digests = sets;
        }
        Ok(())
    }

    /// Copies each head's part of a region into its larger part of another, and releases the old one.
    fn move_parts(&mut self, from: Region, to: Region, heads: usize, from_len: usize, to_len: usize) {
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
            self.build(id, index, layer)?;
        }
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

    /// Digests the rows of a layer that have been appended since it was last called.
    pub(crate) fn build_layer(&mut self, id: SequenceId, layer: usize) -> Result<(), MemoryError> {
        let sets = self.sequence(id).map_or(0, |sequence| sequence.digests.len());
        (0..sets).try_for_each(|index| self.build(id, index, layer))
    }

    fn build(&mut self, id: SequenceId, index: usize, layer: usize) -> Result<(), MemoryError> {
        if !self.speculates(layer) {
            return Ok(());
        }
        let Ok(sequence) = self.sequence(id) else { return Ok(()) };
        let set = &sequence.digests[index];
        let (from, to) = (set.built[layer] as usize, sequence.lens[layer] as usize);
        if !set.ready[layer] || from >= to {
            return Ok(());
        }
        let (key, table, state, method) = (set.key, set.table, set.state, set.method);
        let (pages, capacity) = (sequence.table, sequence.capacity);
        let (rows, heads) = (self.shape.page_rows, self.shape.kv_heads);
        let Some(pool) = self.pools.iter_mut().find(|pool| pool.key == key) else { return Ok(()) };
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
                let id = self.tables.word(pages, word);
                if id == NO_PAGE {
                    token += count;
                    continue;
                }
                let locator = id * rows as u32 + first_row as u32;
                read_keys(&self.arena, &self.shape, locator, count, &mut buffers.rows, &mut buffers.keys)?;
                let block = match self.meta.word(table, word) {
                    NO_BLOCK => pool.blocks.take(&mut self.meta)?,
                    block => pool.blocks.make_private(&mut self.meta, block)?,
                };
                self.meta.set_word(table, word, block);
                let append = Append { layer, kv_head, state: &buffers.state, keys: &buffers.keys, first_row };
                let digest = pool.blocks.get_mut(&mut self.meta, block);
                method.on_append(&append, digest, &mut buffers.scratch);
                token += count;
            }
        }
        if let Ok(sequence) = self.sequence_mut(id) {
            sequence.digests[index].built[layer] = to as u32;
        }
        self.admit(id, index, layer, to);
        Ok(())
    }

    /// Tells counter pools that the sequence grew, and gives up pages of which every row has left the pool.
    fn admit(&mut self, id: SequenceId, index: usize, layer: usize, tokens: usize) {
        let Ok(sequence) = self.sequence(id) else { return };
        let set = &sequence.digests[index];
        let Some((pool, dead)) = set.pool else { return };
        let (pages, capacity, method) = (sequence.table, sequence.capacity, set.method);
        let (rows, heads) = (self.shape.page_rows, self.shape.kv_heads);
        let pool_bytes = self.methods[method].pool_bytes(capacity * rows);
        let mut victims: Vec<u32> = Vec::new();
        for kv_head in 0..heads {
            let head = layer * heads + kv_head;
            victims.clear();
            let bytes = self.meta.get_mut(part(pool, head, pool_bytes));
            self.methods[method].on_admit(tokens, bytes, &mut |victim| victims.push(victim));
            for victim in &victims {
                let word = head * capacity + *victim as usize / rows;
                let gone = self.meta.word(dead, word) + 1;
                self.meta.set_word(dead, word, gone);
                if gone as usize == rows {
                    let page = self.tables.word(pages, word);
                    self.tables.set_word(pages, word, NO_PAGE);
                    self.arena.release(page);
                }
            }
        }
    }

    /// Counts the rows that a method has just selected.
    pub(crate) fn note_selected(&mut self, id: SequenceId, layer: usize) {
        let Ok(sequence) = self.sequence(id) else { return };
        let method = sequence.method;
        let Some(key) = self.methods[method].digest_key() else { return };
        let Some(set) = sequence.digests.iter().find(|set| set.key == key) else { return };
        let Some((pool, _)) = set.pool else { return };
        let pool_bytes = self.methods[method].pool_bytes(sequence.capacity * self.shape.page_rows);
        for kv_head in 0..self.shape.kv_heads {
            let bytes = self.meta.get_mut(part(pool, layer * self.shape.kv_heads + kv_head, pool_bytes));
            self.methods[method].on_selected(self.buffers.selection.head(kv_head), bytes);
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
            if let Some((pool, dead)) = set.pool {
                let pool_bytes = self.methods[set.method].pool_bytes(capacity * rows);
                for head in 0..total {
                    let bytes = self.meta.get_mut(part(pool, head, pool_bytes));
                    self.methods[set.method].on_truncate(tokens as usize, bytes);
                    // Of the page that was cut, too few dead rows count from now on: it stays, which is the safe side.
                    for page in tokens as usize / rows..capacity {
                        self.meta.set_word(dead, head * capacity + page, 0);
                    }
                }
            }
            if let Ok(sequence) = self.sequence_mut(id) {
                let start = tokens / rows as u32 * rows as u32;
                for built in &mut sequence.digests[index].built {
                    if *built > tokens {
                        *built = start;
                    }
                }
            }
            for layer in 0..self.shape.layers {
                self.build(id, index, layer)?;
            }
        }
        Ok(())
    }

    /// Gives a closed sequence's digests back.
    pub(crate) fn release_digests(&mut self, set: &DigestSet) {
        if let Some(pool) = self.pools.iter_mut().find(|pool| pool.key == set.key) {
            for word in 0..set.table.len / 4 {
                let block = self.meta.word(set.table, word);
                if block != NO_BLOCK {
                    pool.blocks.release(block);
                }
            }
        }
        self.meta.release(set.table);
        self.meta.release(set.state);
        if let Some((pool, dead)) = set.pool {
            self.meta.release(pool);
            self.meta.release(dead);
        }
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

/// Reads the keys of `count` consecutive rows out of a page, as f32 `[count][head dim]`.
fn read_keys(
    arena: &crate::tiers::arena::SessionArena,
    shape: &kvoyant_methods::Shape,
    locator: u32,
    count: usize,
    rows: &mut Vec<u8>,
    keys: &mut Vec<f32>,
) -> Result<(), MemoryError> {
    let geometry = arena.geometry();
    let (extent, offset) = geometry.locate(locator);
    let key_bytes = geometry.row_bytes / 2;
    rows.clear();
    rows.resize(count * key_bytes, 0);
    for (row, key) in rows.chunks_exact_mut(key_bytes).enumerate() {
        arena.memory(extent).read(offset + row * geometry.row_bytes, key)?;
    }
    keys.clear();
    keys.resize(count * shape.head_dim, 0.0);
    kvoyant_kernels::Kernels::best().to_f32(shape.dtype, rows, keys);
    Ok(())
}
