//! One speculation: hints in, block table and transfer plan out.
//!
//! For each member of the batch the method selects ranges of tokens; each range becomes runs of rows that lie side
//! by side, either in the session's extents (in place) or in slots of the slab. What is not in its slot yet goes
//! into the transfer plan.

use kvoyant_kernels::CopyRun;
use kvoyant_methods::{NoRows, NoStore, SelectContext};
use kvoyant_protocol::control::NO_PAGE;
use kvoyant_protocol::wire::{BatchEntry, BlockRun, HeadEntry, SequenceId, Status};

use crate::lane::digests::{Digested, View};
use crate::lane::model::ModelState;
use crate::tiers::residency::SlotSet;

/// The answer to one speculation while it is being made.
#[derive(Debug, Default)]
pub struct Answer {
    /// `[member][KV head]`.
    pub heads: Vec<HeadEntry>,
    /// Runs of all heads, one after the other.
    pub runs: Vec<BlockRun>,
    /// What has to be copied before it is ready.
    pub copies: Vec<CopyRun>,
    /// Rows selected.
    pub rows: u32,
    /// Rows that were on the device already.
    pub hits: u32,
    /// Rows to be read from the session's extents.
    pub in_place: u32,
    /// Rows that the members' heads keep on the device in this layer.
    pub resident: u32,
    /// Bytes in `copies`.
    pub bytes: u64,
    /// Rows of an extent: runs in extents end there, since extents are mapped apart.
    pub rows_per_extent: u32,
}

impl Answer {
    /// Empties it, and keeps its memory.
    pub fn clear(&mut self) {
        self.heads.clear();
        self.runs.clear();
        self.copies.clear();
        (self.rows, self.hits, self.in_place, self.resident, self.bytes) = (0, 0, 0, 0, 0);
    }

    /// Bytes of the block table.
    #[must_use]
    pub fn table_bytes(&self) -> usize {
        std::mem::size_of_val(self.heads.as_slice()) + std::mem::size_of_val(self.runs.as_slice())
    }

    fn push_row(&mut self, first_run: usize, row: u32, token: u32, rows: u32, in_slab: bool) {
        let apart = !in_slab && row.is_multiple_of(self.rows_per_extent.max(1));
        let joins = |last: &BlockRun| {
            !apart
                && last.in_slab() == in_slab
                && last.row + last.rows() == row
                && last.token + last.rows() == token
        };
        match self.runs[first_run..].last_mut() {
            Some(last) if joins(last) => {
                *last = BlockRun::new(last.row, last.token, last.rows() + rows, in_slab);
            }
            _ => self.runs.push(BlockRun::new(row, token, rows, in_slab)),
        }
    }

    fn push_copy(&mut self, copy: CopyRun) {
        self.bytes += copy.bytes as u64;
        if let Some(last) = self.copies.last_mut()
            && last.src.wrapping_add(last.bytes) == copy.src
            && last.dst.wrapping_add(last.bytes) == copy.dst
        {
            last.bytes += copy.bytes;
            return;
        }
        self.copies.push(copy);
    }
}

/// When and for whom.
#[derive(Debug, Clone, Copy)]
pub struct Turn {
    /// Ticket of the speculation.
    pub ticket: u64,
    /// Last ticket whose answer is not read any more.
    pub released_through: u64,
}

impl ModelState {
    /// Answers for one member, whose hint is in the buffers.
    pub fn speculate(
        &mut self,
        layer: usize,
        entry: &BatchEntry,
        queries: usize,
        turn: Turn,
        answer: &mut Answer,
    ) -> Result<(), Status> {
        let id = entry.sequence;
        let sequence = self.sequence(id).map_err(|_| Status::NoSuchSequence)?;
        if sequence.graph.is_some() {
            return Err(Status::InGraphMode);
        }
        let tokens = entry.position as usize + 1;
        let candidates = self.shape.candidates(tokens);
        if !candidates.is_empty() && candidates.end > sequence.lens[layer] as usize {
            return Err(Status::NotAppended);
        }
        match self.digested(id, layer, if candidates.is_empty() { 0 } else { candidates.end }) {
            Digested::Yes => {}
            Digested::NotObserved => return Err(Status::NotObserved),
            Digested::Behind => return Err(Status::NotAppended),
        }
        self.select(id, layer, tokens, queries);
        self.note_selected(id, layer);
        if self.slab.is_some() { self.place(id, layer, turn, answer) } else { self.point(id, layer, answer) }
    }

    fn select(&mut self, id: SequenceId, layer: usize, tokens: usize, queries: usize) {
        let mut selection = std::mem::take(&mut self.buffers.selection);
        let mut scratch = std::mem::take(&mut self.buffers.scratch);
        let hint = std::mem::take(&mut self.buffers.hint);
        let ids = std::mem::take(&mut self.buffers.ids);
        let slot = self.sequences.get(id.slot as usize);
        if let Some(sequence) = slot.and_then(|slot| slot.sequence.as_ref()) {
            let method = &*self.methods[sequence.method];
            let context = SelectContext {
                layer,
                heads: 0..self.shape.kv_heads,
                tokens,
                queries,
                hint: &hint,
                ids: &ids,
                sequence_seed: sequence.seed,
                step: tokens as u64,
                rows: &NoRows,
            };
            let of = (method, sequence.method);
            match View::new(&mut self.meta, &self.pools, sequence, of, (&self.shape, layer)) {
                Some(mut view) => method.select(&context, &mut view, &mut scratch, &mut selection),
                None => method.select(&context, &mut NoStore, &mut scratch, &mut selection),
            }
        }
        (self.buffers.selection, self.buffers.scratch) = (selection, scratch);
        (self.buffers.hint, self.buffers.ids) = (hint, ids);
    }

    /// Runs that point into the session's own extents.
    fn point(&mut self, id: SequenceId, layer: usize, answer: &mut Answer) -> Result<(), Status> {
        let sequence = self.sequence(id).map_err(|_| Status::NoSuchSequence)?;
        let (rows, heads) = (self.shape.page_rows as u32, self.shape.kv_heads);
        for kv_head in 0..heads {
            let first_run = answer.runs.len();
            let mut total = 0;
            for range in self.buffers.selection.head(kv_head) {
                let mut token = range.first;
                while token < range.end() {
                    let (page, row) = (token / rows, token % rows);
                    let count = (range.end() - token).min(rows - row);
                    let word = (layer * heads + kv_head) * sequence.capacity + page as usize;
                    let own = self.tables.word(sequence.table, word);
                    if own != NO_PAGE {
                        answer.push_row(first_run, own * rows + row, token, count, false);
                        total += count;
                    }
                    token += count;
                }
            }
            answer.rows = answer.rows.saturating_add(total);
            answer.in_place = answer.in_place.saturating_add(total);
            answer.heads.push(HeadEntry {
                first_run: first_run as u32,
                runs: (answer.runs.len() - first_run) as u32,
                rows: total,
                resident: 0,
            });
        }
        Ok(())
    }

    /// Slots in the slab, and copies for what is not there yet.
    fn place(&mut self, id: SequenceId, layer: usize, turn: Turn, answer: &mut Answer) -> Result<(), Status> {
        let heads = self.shape.kv_heads;
        let sequence = self.sequence_mut(id).map_err(|_| Status::NoSuchSequence)?;
        // Taken out while other sequences may have to give way to it.
        let mut slots = std::mem::take(&mut sequence.residency[layer]);
        if slots.heads.is_empty() {
            slots.heads.resize_with(heads, SlotSet::default);
        }
        // Rows that an unread answer names stay where they are.
        let evict = slots.last_ticket <= turn.released_through;
        slots.last_ticket = turn.ticket;
        let selection = &self.buffers.selection;
        let short =
            |(head, set): (usize, &SlotSet)| set.pages_wanted(selection.rows(head), self.shape.page_rows);
        let short = slots.heads.iter().enumerate().map(short).sum();
        self.make_room(short, turn);
        let mut result = Ok(());
        for (kv_head, set) in slots.heads.iter_mut().enumerate() {
            let wanted: usize = self.buffers.selection.rows(kv_head);
            let keep = (wanted as f64 * self.keep) as usize;
            result = result.and(self.place_head(id, layer, kv_head, set, keep, evict, answer));
            answer.resident = answer.resident.saturating_add(set.resident() as u32);
        }
        self.sequence_mut(id).map_err(|_| Status::NoSuchSequence)?.residency[layer] = slots;
        result
    }

    #[allow(clippy::too_many_arguments)]
    pub(super) fn place_head(
        &mut self,
        id: SequenceId,
        layer: usize,
        kv_head: usize,
        set: &mut SlotSet,
        keep: usize,
        evict: bool,
        answer: &mut Answer,
    ) -> Result<(), Status> {
        let mut placed = std::mem::take(&mut self.buffers.placed);
        placed.clear();
        let Some(slab) = &mut self.slab else { return Err(Status::Failed) };
        let wanted = self.buffers.selection.head(kv_head);
        set.place(wanted, keep, evict, &mut slab.pages, &mut self.buffers.place, &mut placed);
        let Some(slab) = &self.slab else { return Err(Status::Failed) };
        let sequence = self.sequence(id).map_err(|_| Status::NoSuchSequence)?;
        let geometry = self.arena.geometry();
        let rows = geometry.page_rows as u32;
        let base = (layer * self.shape.kv_heads + kv_head) * sequence.capacity;
        let first_run = answer.runs.len();
        let mut total = 0;
        for row in &placed {
            let page = self.tables.word(sequence.table, base + (row.token / rows) as usize);
            if page == NO_PAGE {
                continue;
            }
            let locator = page * rows + row.token % rows;
            match row.slot {
                None => {
                    answer.push_row(first_run, locator, row.token, 1, false);
                    answer.in_place = answer.in_place.saturating_add(1);
                }
                Some(slot) => {
                    answer.push_row(first_run, slot, row.token, 1, true);
                    if row.fresh {
                        let (extent, offset) = geometry.locate(locator);
                        let bytes = geometry.row_bytes;
                        let src =
                            self.arena.memory(extent).address(offset, bytes).map_err(|_| Status::Failed)?;
                        let dst =
                            slab.slab.address(slot as usize * bytes, bytes).map_err(|_| Status::Failed)?;
                        answer.push_copy(CopyRun { src: src.cast_const(), dst, bytes });
                    } else {
                        answer.hits = answer.hits.saturating_add(1);
                    }
                }
            }
            total += 1;
        }
        answer.rows = answer.rows.saturating_add(total);
        answer.heads.push(HeadEntry {
            first_run: first_run as u32,
            runs: (answer.runs.len() - first_run) as u32,
            rows: total,
            resident: set.resident() as u32,
        });
        self.buffers.placed = placed;
        Ok(())
    }

    /// Takes slab pages from the layers that were used longest ago until `pages` are free, or nobody has any that
    /// no unread answer names. Those of graph mode stay where they are: kernels read them whenever they like.
    pub(super) fn make_room(&mut self, pages: usize, turn: Turn) {
        loop {
            let Some(slab) = &mut self.slab else { return };
            if slab.pages.free() >= pages {
                return;
            }
            let sequences = &self.sequences;
            let oldest = self
                .open
                .iter()
                .filter_map(|slot| Some((*slot, sequences[*slot as usize].sequence.as_ref()?)))
                .filter(|(_, sequence)| sequence.graph.is_none())
                .flat_map(|(slot, sequence)| {
                    sequence.residency.iter().enumerate().map(move |(layer, slots)| (slot, layer, slots))
                })
                .filter(|(_, _, layer)| {
                    layer.last_ticket <= turn.released_through
                        && layer.heads.iter().any(|head| head.pages() > 0)
                })
                .min_by_key(|(_, _, layer)| layer.last_ticket)
                .map(|(slot, layer, _)| (slot, layer));
            let Some((slot, layer)) = oldest else { return };
            let sequence = self.sequences[slot as usize].sequence.as_mut();
            let Some(layer) = sequence.map(|sequence| &mut sequence.residency[layer]) else { return };
            slab.pages.give_back(layer.heads.iter_mut().flat_map(SlotSet::clear));
        }
    }
}
