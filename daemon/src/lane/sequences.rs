//! Sequences: opened, forked, given room, truncated, closed.
//!
//! A sequence has a page table `[layer][KV head][capacity]` in a file that the client reads, so that it can write
//! rows straight into their pages. A fork shares all pages; before one of the two writes to a shared page,
//! `reserve` gives it a copy. All calls here come over the control socket, not on the hot path.

use std::sync::Arc;

use kvoyant_methods::Selection;
use kvoyant_protocol::control::{Failure, NO_PAGE, PageWord, SelectedBy, TableRef};
use kvoyant_protocol::memory::MemoryError;
use kvoyant_protocol::wire::SequenceId;

use crate::device::rows::LayerPages;
use crate::lane::background::is_flying;
use crate::lane::digests::DigestSet;
use crate::lane::model::{Limbo, ModelState, RECORD_BYTES};
use crate::lane::room::Charges;
use crate::lane::spill::SLOT_ENTRY;
use crate::prefixes::Attachment;
use crate::tiers::heap::Region;
use crate::tiers::residency::SlotSet;

/// Most tokens a sequence may have.
pub const TOKENS_MAX: u32 = 1 << 26;

/// Most sequences that one reservation may name.
pub const RESERVE_MAX: usize = 1024;

/// What one layer of a sequence has on the device.
#[derive(Debug, Default)]
pub struct LayerSlots {
    /// One set for each KV head; empty until the layer is first speculated.
    pub heads: Vec<SlotSet>,
    /// Ticket of the last answer that named its rows.
    pub last_ticket: u64,
    /// The rows that it named, where the layer's rest may be asked for.
    pub named: Selection,
    /// The background transfer that brings rows here.
    pub background: Option<u64>,
    /// The answer after which the next step is to be prepared, and its tokens.
    pub prefetch: Option<(u64, usize)>,
}

/// An open sequence.
#[derive(Debug)]
pub struct Sequence {
    /// Index of its method.
    pub method: usize,
    /// Who selects its rows.
    pub by: SelectedBy,
    /// Stays with the sequence and its forks, for methods that draw.
    pub seed: u64,
    /// Its page table.
    pub table: Region,
    /// Pages that each head's part of the table can hold.
    pub capacity: usize,
    /// Where its pages lie on disk, laid out as the page table; where pages can leave host memory.
    pub slots: Option<Region>,
    /// Whether its pages have to stay where they are for now.
    pub stays: bool,
    /// Pages that each head has.
    pub pages: usize,
    /// Tokens up to which rows may be written.
    pub room: usize,
    /// Rows appended, per layer.
    pub lens: Vec<u32>,
    /// Statistics of the prompt's queries, `[layer][KV head][head dim]` f32.
    pub observation: Option<Region>,
    /// Layers whose statistics have come.
    pub observed: Vec<bool>,
    /// Marks of the tokens' text, one byte for each token that the table can hold; zero where none came.
    pub marks: Option<Region>,
    /// Digests, one set for each kind that its method, or a fork's, reads.
    pub digests: Vec<DigestSet>,
    /// The published prefix that it begins with, or began with.
    pub prefix: Option<Arc<Attachment>>,
    /// What is on the device, per layer.
    pub residency: Vec<LayerSlots>,
    /// Its slot of the records, in graph mode.
    pub graph: Option<u32>,
    /// Its user has one sequence more.
    pub _charge: Charges,
}

impl Sequence {
    /// Tokens that every layer has.
    #[must_use]
    pub fn tokens(&self) -> usize {
        self.lens.iter().copied().min().unwrap_or(0) as usize
    }

    fn tokens_max(&self) -> usize {
        self.lens.iter().copied().max().unwrap_or(0) as usize
    }

    fn table_ref(&self) -> TableRef {
        TableRef { file: self.table.file, offset: self.table.offset as u64, capacity: self.capacity as u32 }
    }

    /// Where a layer's rows are, with so many KV heads in each layer.
    pub fn layer_pages(&self, layer: usize, kv_heads: usize) -> LayerPages {
        let first_head = layer * kv_heads;
        LayerPages { table: self.table, capacity: self.capacity, first_head, rows: self.lens[layer] as usize }
    }
}

/// A place for a sequence.
#[derive(Debug, Default)]
pub struct SequenceSlot {
    /// How often the slot was used before.
    pub generation: u32,
    /// The sequence, while one is open.
    pub sequence: Option<Sequence>,
}

pub(super) fn check_tokens(tokens: u32) -> Result<u32, Failure> {
    if tokens > TOKENS_MAX {
        return Err(Failure::BadModel(format!("{tokens} tokens are more than {TOKENS_MAX}")));
    }
    Ok(tokens)
}

impl ModelState {
    /// An open sequence by its handle.
    pub fn sequence(&self, id: SequenceId) -> Result<&Sequence, Failure> {
        self.sequences
            .get(id.slot as usize)
            .filter(|slot| slot.generation == id.generation)
            .and_then(|slot| slot.sequence.as_ref())
            .ok_or(Failure::NoSuchSequence(id))
    }

    pub(crate) fn sequence_mut(&mut self, id: SequenceId) -> Result<&mut Sequence, Failure> {
        self.touched.mark(id.slot as usize);
        self.sequences
            .get_mut(id.slot as usize)
            .filter(|slot| slot.generation == id.generation)
            .and_then(|slot| slot.sequence.as_mut())
            .ok_or(Failure::NoSuchSequence(id))
    }

    /// How many sequences are open.
    #[must_use]
    pub fn open_sequences(&self) -> usize {
        self.open.len()
    }

    /// Handles of the open sequences.
    pub fn open_handles(&self) -> impl Iterator<Item = SequenceId> + '_ {
        self.open
            .iter()
            .map(|slot| SequenceId { slot: *slot, generation: self.sequences[*slot as usize].generation })
    }

    pub(super) fn heads(&self) -> usize {
        self.shape.layers * self.shape.kv_heads
    }

    pub(super) fn free_slot(&self) -> Result<usize, Failure> {
        let max = self.sequences.len() as u32;
        self.sequences
            .iter()
            .position(|slot| slot.sequence.is_none())
            .ok_or(Failure::TooManySequences { max })
    }

    fn install(&mut self, slot: usize, sequence: Sequence) -> SequenceId {
        self.sequences[slot].sequence = Some(sequence);
        self.touched.mark(slot);
        self.open.push(slot as u32);
        let id = SequenceId { slot: slot as u32, generation: self.sequences[slot].generation };
        self.record(id);
        id
    }

    pub(super) fn method_index(&self, method: u16) -> Result<usize, Failure> {
        let method = usize::from(method);
        if method < self.methods.len() {
            return Ok(method);
        }
        Err(Failure::BadMethod(format!(
            "method {method} is not one of the {} registered",
            self.methods.len()
        )))
    }

    /// The method whose digests the daemon keeps of a sequence, if any.
    pub(super) fn digested_here(&self, method: usize, by: SelectedBy) -> Option<usize> {
        (by == SelectedBy::Lane).then_some(method)
    }

    /// What drops rows for good is the daemon's to decide.
    pub(super) fn check_selector(&self, method: usize, by: SelectedBy) -> Result<(), Failure> {
        if by == SelectedBy::Lane || !self.drops_rows(method) {
            return Ok(());
        }
        Err(Failure::BadMethod(format!(
            "{} has a pool that drops rows: the daemon's lane selects for it, and no client can",
            self.methods[method].spec()
        )))
    }

    pub(super) fn drops_rows(&self, method: usize) -> bool {
        self.methods[method].needs().drops_rows
    }

    /// Opens an empty sequence with room for `tokens`.
    pub fn open(&mut self, method: u16, tokens: u32, by: SelectedBy) -> Result<SequenceId, Failure> {
        let method = self.method_index(method)?;
        self.check_selector(method, by)?;
        let slot = self.free_slot()?;
        self.check_tables(self.tables_of(self.digested_here(method, by), 0))?;
        let charge = self.charge_sequence()?;
        let table = self.tables.allocate(0)?;
        let slots = self.new_slot_table(0)?;
        self.seeds += 1;
        let layers = self.shape.layers;
        let mut residency = Vec::new();
        residency.resize_with(layers, LayerSlots::default);
        let sequence = Sequence {
            method,
            by,
            seed: self.seeds,
            table,
            capacity: 0,
            slots,
            stays: false,
            pages: 0,
            room: 0,
            lens: vec![0; layers],
            observation: None,
            observed: vec![false; layers],
            marks: None,
            digests: Vec::new(),
            prefix: None,
            residency,
            graph: None,
            _charge: charge,
        };
        let id = self.install(slot, sequence);
        let digests = match by {
            SelectedBy::Lane => self.ensure_digests(id, method),
            SelectedBy::Client => Ok(()),
        };
        let ready = digests.map_err(Failure::from).and_then(|()| self.reserve(&[(id, tokens)]));
        if let Err(failure) = ready {
            self.close(id)?;
            return Err(failure);
        }
        Ok(id)
    }

    /// Opens a copy of a sequence, perhaps with another method. Neither of the two has room to write until it is
    /// given some.
    pub fn fork(
        &mut self,
        parent: SequenceId,
        method: Option<u16>,
        by: SelectedBy,
    ) -> Result<SequenceId, Failure> {
        let method = match method {
            Some(method) => self.method_index(method)?,
            None => self.sequence(parent)?.method,
        };
        self.check_fork(parent, method, by)?;
        let slot = self.free_slot()?;
        // The parent may get digests that it had no need of, and the child has those of its method alone.
        let capacity = self.sequence(parent)?.capacity;
        let digested = self.digested_here(method, by);
        let new = digested.filter(|method| !self.has_digests(parent, *method));
        let child = self.tables_of(digested, capacity);
        self.check_tables(child.saturating_add(self.tables_of(new, capacity)))?;
        let charge = self.charge_sequence()?;
        if let Some(method) = digested {
            self.ensure_digests(parent, method)?;
        }
        let (rows, kept) = (self.shape.page_rows, 0..self.heads());
        let sequence = self.sequence(parent)?;
        let (tokens, capacity, from) = (sequence.tokens_max(), sequence.capacity, sequence.table);
        let room = sequence.tokens();
        let (seed, lens, observed) = (sequence.seed, sequence.lens.clone(), sequence.observed.clone());
        let (observation, marks) = (sequence.observation, sequence.marks);
        let prefix = sequence.prefix.clone();
        let pages = tokens.div_ceil(rows);
        let table = self.tables.allocate(from.len)?;
        let bytes = self.tables.get(from).to_vec();
        self.tables.get_mut(table).copy_from_slice(&bytes);
        for head in kept {
            for page in 0..capacity {
                let index = head * capacity + page;
                let word = self.tables.word(table, index);
                if page >= pages {
                    self.tables.set_word(table, index, NO_PAGE);
                } else if let Some(page) = PageWord::of(word).page() {
                    self.arena.share(page);
                }
            }
        }
        let slots = self.share_slots(self.sequence(parent)?.slots, capacity, pages)?;
        let observation = observation.map(|from| self.meta.copy(from)).transpose()?;
        let marks = marks.map(|from| self.meta.copy(from)).transpose()?;
        let digests = match digested {
            Some(method) => self.share_digests(parent, method)?,
            None => Vec::new(),
        };
        // Its pages are shared now: the parent may not write to them either until it asks for room again.
        self.sequence_mut(parent)?.room = room;
        let mut residency = Vec::new();
        residency.resize_with(self.shape.layers, LayerSlots::default);
        let sequence = Sequence {
            method,
            by,
            seed,
            table,
            capacity,
            slots,
            stays: false,
            pages,
            room,
            lens,
            observation,
            observed,
            marks,
            digests,
            prefix,
            residency,
            graph: None,
            _charge: charge,
        };
        let child = self.install(slot, sequence);
        (0..self.shape.layers).for_each(|layer| self.falls_behind(child, layer));
        Ok(child)
    }

    /// Gives sequences room to write: private pages up to so many tokens each. All of them or none.
    pub fn reserve(&mut self, list: &[(SequenceId, u32)]) -> Result<(), Failure> {
        let needed = self.pages_to_reserve(list)?;
        if let Err(full) = self.arena.reserve(needed) {
            let mut asking: Vec<_> = list.iter().map(|(id, _)| *id).collect();
            asking.sort_unstable();
            return Err(self.backpressure(needed, full.missing_pages, &asking));
        }
        for (id, tokens) in list {
            self.grow(*id, *tokens as usize)?;
            self.record(*id);
        }
        Ok(())
    }

    fn grow(&mut self, id: SequenceId, tokens: usize) -> Result<(), MemoryError> {
        let rows = self.shape.page_rows;
        let pages = tokens.div_ceil(rows);
        self.grow_table(id, pages)?;
        let Ok(sequence) = self.sequence(id) else { return Ok(()) };
        let (table, capacity, have) = (sequence.table, sequence.capacity, sequence.pages);
        let (slots, lens) = (sequence.slots, sequence.lens.clone());
        let first = sequence.tokens() / rows;
        let mut buffer = std::mem::take(&mut self.buffers.rows);
        for head in 0..self.heads() {
            for page in first..have {
                let index = head * capacity + page;
                match self.page_word(table, index) {
                    PageWord::None => {
                        // A pool gave it up, and a truncation came back to it.
                        let own = self.take_page(id, head, page);
                        self.tables.set_word(table, index, own);
                    }
                    PageWord::Page(shared) if self.arena.is_shared(shared) => {
                        let own = self.take_page(id, head, page);
                        let filled =
                            (lens[head / self.shape.kv_heads] as usize).saturating_sub(page * rows).min(rows);
                        self.arena.copy_rows(shared, own, filled, &mut buffer)?;
                        self.drop_page(table, slots, index);
                        self.tables.set_word(table, index, own);
                    }
                    // Its own, or full and on disk: nothing is written to that any more.
                    PageWord::Page(_) | PageWord::Spilled | PageWord::Lost => {}
                }
            }
            for page in have..pages {
                let own = self.take_page(id, head, page);
                self.tables.set_word(table, head * capacity + page, own);
            }
        }
        self.buffers.rows = buffer;
        if let Ok(sequence) = self.sequence_mut(id) {
            sequence.pages = have.max(pages);
            sequence.room = sequence.pages * rows;
        }
        Ok(())
    }

    /// Moves a page table to a larger region if `pages` do not fit.
    pub(super) fn grow_table(&mut self, id: SequenceId, pages: usize) -> Result<(), MemoryError> {
        let heads = self.heads();
        let Ok(sequence) = self.sequence(id) else { return Ok(()) };
        let (old, old_capacity, old_slots) = (sequence.table, sequence.capacity, sequence.slots);
        if pages <= old_capacity {
            return Ok(());
        }
        let capacity = pages.next_power_of_two().max(8);
        let table = self.tables.allocate(heads * capacity * 4)?;
        let slots = match self.new_slot_table(capacity) {
            Ok(slots) => slots,
            Err(error) => {
                // The sequence keeps what it has.
                self.tables.release(table);
                return Err(error);
            }
        };
        for head in 0..heads {
            for page in 0..capacity {
                let word = if page < old_capacity {
                    self.tables.word(old, head * old_capacity + page)
                } else {
                    NO_PAGE
                };
                self.tables.set_word(table, head * capacity + page, word);
            }
        }
        self.tables.release(old);
        if let (Some(old), Some(new)) = (old_slots, slots) {
            self.move_parts(old, new, heads, old_capacity * SLOT_ENTRY, capacity * SLOT_ENTRY);
        }
        if let Ok(sequence) = self.sequence_mut(id) {
            (sequence.table, sequence.capacity, sequence.slots) = (table, capacity, slots);
        }
        self.grow_digests(id, old_capacity, capacity)
    }

    /// Drops every row from token `tokens` on.
    pub fn truncate(&mut self, id: SequenceId, tokens: u32, released_through: u64) -> Result<(), Failure> {
        let rows = self.shape.page_rows;
        let kept = 0..self.heads();
        match self.first_away(id, tokens as usize) {
            Some((token, PageWord::Lost)) => {
                return Err(Failure::RowsLost { sequence: id, token: token as u32 });
            }
            Some((token, _)) => {
                return Err(Failure::NotReady(format!(
                    "the rows of sequence {id} from token {token} on lie on disk, and no page can make room for them"
                )));
            }
            None => {}
        }
        let sequence = self.sequence(id)?;
        let (table, capacity, have) = (sequence.table, sequence.capacity, sequence.pages);
        let (slots, lens) = (sequence.slots, sequence.lens.clone());
        let pages = (tokens as usize).div_ceil(rows).min(have);
        for head in kept {
            for page in pages..have {
                self.drop_page(table, slots, head * capacity + page);
            }
            // What is on disk of the page that is cut is not it any more.
            let cut = tokens as usize / rows;
            if cut < pages && lens[head / self.shape.kv_heads] > tokens {
                self.page_changes(table, slots, head * capacity + cut);
            }
        }
        let sequence = self.sequence_mut(id)?;
        sequence.pages = pages;
        for len in &mut sequence.lens {
            *len = (*len).min(tokens);
        }
        // The tail page may be shared, so room has to be asked for again.
        sequence.room = sequence.room.min(sequence.tokens_max());
        let mut residency = std::mem::take(&mut sequence.residency);
        for layer in &mut residency {
            if layer.last_ticket > released_through || layer.background.is_some() {
                self.clear_slots(layer);
            } else {
                layer.heads.iter_mut().for_each(|head| head.truncate(tokens));
            }
        }
        let sequence = self.sequence_mut(id)?;
        sequence.residency = residency;
        let marks = sequence.marks;
        if let Some(marks) = marks {
            let marks = self.meta.get_mut(marks);
            let kept = (tokens as usize).min(marks.len());
            marks[kept..].fill(0);
        }
        let sequence = self.sequence_mut(id)?;
        if let (Some(slot), Some(graph)) = (sequence.graph, &mut self.graph) {
            graph.changed(slot);
        }
        self.truncate_digests(id, tokens)?;
        self.record(id);
        Ok(())
    }

    /// Gives a layer's slab pages back once no unread answer can name them and nothing is being copied there.
    pub(crate) fn clear_slots(&mut self, layer: &mut LayerSlots) {
        let pages: Vec<u32> = layer.heads.iter_mut().flat_map(SlotSet::clear).collect();
        let background = layer.background.take();
        if let Some(slab) = &mut self.slab
            && !pages.is_empty()
        {
            slab.limbo.push(Limbo { ticket: layer.last_ticket, background, pages });
        }
    }

    /// Moves slab pages that nobody reads or writes any more from limbo to the free ones.
    pub fn settle(&mut self, released_through: u64) {
        self.pages_released(released_through);
        let Some(slab) = &mut self.slab else { return };
        if slab.limbo.is_empty() {
            return;
        }
        let (pages, flying) = (&mut slab.pages, &self.flying);
        slab.limbo.retain_mut(|limbo| {
            let arriving = limbo.background.is_some_and(|number| is_flying(flying, number));
            if limbo.ticket > released_through || arriving {
                return true;
            }
            pages.give_back(limbo.pages.drain(..));
            false
        });
    }

    /// Page table and room of a sequence, for its client.
    pub fn table_of(&self, id: SequenceId) -> Result<(TableRef, u32), Failure> {
        let sequence = self.sequence(id)?;
        Ok((sequence.table_ref(), sequence.room as u32))
    }

    /// Writes the sequence's record into the directory, from which all of it can be found again.
    pub(crate) fn record(&mut self, id: SequenceId) {
        let Ok(sequence) = self.sequence(id) else { return };
        let words: [u64; 8] = [
            1 | u64::from(id.generation) << 32,
            sequence.method as u64,
            sequence.seed,
            sequence.tokens() as u64,
            u64::from(sequence.table.file) << 32 | sequence.capacity as u64,
            sequence.table.offset as u64,
            sequence.digests.first().map_or(0, |set| u64::from(set.table.file) << 32 | set.table.len as u64),
            sequence.digests.first().map_or(0, |set| set.table.offset as u64),
        ];
        let record = id.slot as usize * RECORD_BYTES;
        self.meta.get_mut(self.directory)[record..record + RECORD_BYTES]
            .copy_from_slice(bytemuck::cast_slice(&words));
    }
}
