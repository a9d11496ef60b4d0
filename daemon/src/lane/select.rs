//! One speculation: hints in, block table and transfer plan out.
//!
//! For each member of the batch the method selects ranges of tokens; each range becomes runs of rows that lie side
//! by side, either in the session's extents (in place) or in slots of the slab. What is not in its slot yet goes
//! into the transfer plan.

use kvoyant_kernels::CopyRun;
use kvoyant_methods::{InTime, NoRows, NoStore, SelectContext, Selection, Store};
use kvoyant_protocol::control::SelectedBy;
use kvoyant_protocol::wire::{BatchEntry, BlockRun, HeadEntry, SequenceId, Stat, Status};

use crate::device::rows::PageRows;
use crate::lane::background::Background;
use crate::lane::digests::{Digested, View};
use crate::lane::model::ModelState;

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
    /// Partial attentions as they lie in the table, one for each member so far; only where a method attends on the CPU.
    pub partials: Vec<u32>,
    /// Rows in them.
    pub cpu_rows: u32,
    /// Estimates of rows left out as they lie in the table, one for each member so far; only where a method estimates.
    pub rests: Vec<u32>,
    /// Whether any of them says something.
    pub has_rest: bool,
    /// Rows in them, for each query head.
    pub estimated_rows: u64,
    /// Rows that would have come too late.
    pub late: u64,
    /// Counters of what certified query heads may have missed.
    pub missed: Vec<Stat>,
    /// Background transfers that bring rows which the answer names.
    pub after: Vec<u64>,
    /// Who waits for pages: a ticket or a background transfer's key; 0: nobody.
    pub key: u64,
    /// Pages on their way from disk that it needs, by operation.
    pub reads: Vec<u64>,
    /// When the rows are wanted, on the monotonic clock; 0: as soon as they can be.
    pub deadline_ns: u64,
    /// Rows of an extent: runs in extents end there, since extents are mapped apart.
    pub rows_per_extent: u32,
}

impl Answer {
    /// Empties it, and keeps its memory.
    pub fn clear(&mut self) {
        self.heads.clear();
        self.runs.clear();
        self.copies.clear();
        self.partials.clear();
        self.rests.clear();
        self.missed.clear();
        self.after.clear();
        self.reads.clear();
        (self.key, self.deadline_ns) = (0, 0);
        (self.rows, self.hits, self.in_place, self.resident, self.bytes) = (0, 0, 0, 0, 0);
        (self.cpu_rows, self.has_rest, self.estimated_rows, self.late) = (0, false, 0, 0);
    }

    /// Bytes of the block table.
    #[must_use]
    pub fn table_bytes(&self) -> usize {
        let partials = if self.cpu_rows > 0 { std::mem::size_of_val(self.partials.as_slice()) } else { 0 };
        let rests = if self.has_rest { std::mem::size_of_val(self.rests.as_slice()) } else { 0 };
        let entries =
            std::mem::size_of_val(self.heads.as_slice()) + std::mem::size_of_val(self.runs.as_slice());
        entries + partials + rests
    }

    pub(super) fn push_row(&mut self, first_run: usize, row: u32, token: u32, rows: u32, in_slab: bool) {
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

    pub(super) fn push_copy(&mut self, copy: CopyRun) {
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
    /// Rows that can be copied by the time that they are wanted; none where nobody said when that is, or nothing is known of the link.
    pub room: Option<u64>,
}

/// What a method is asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Purpose {
    /// Rows for the next step, without a hint.
    Ahead,
    /// Rows.
    Rows,
    /// Rows, and the rest.
    Whole,
    /// Rows, of which the rest is asked for once it is known what else is attended.
    RowsFirst,
    /// The rest of the selection in the buffers.
    Rest,
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
        background: &mut Background,
    ) -> Result<(), Status> {
        let id = entry.sequence;
        if self.is_gone(id) {
            return Err(Status::NoSuchSequence);
        }
        let sequence = self.sequence(id).map_err(|_| Status::NoSuchSequence)?;
        if sequence.graph.is_some() {
            return Err(Status::InGraphMode);
        }
        if sequence.by == SelectedBy::Client {
            return Err(Status::SelectedByClient);
        }
        let tokens = entry.position as usize + 1;
        let candidates = self.shape.candidates(tokens);
        if !candidates.is_empty() && candidates.end > sequence.lens[layer] as usize {
            return Err(Status::NotAppended);
        }
        if let Some(state) = &mut self.spill {
            state.hold(id, layer);
        }
        if let Some(status) = self.misses_rows(id, layer) {
            return Err(status);
        }
        self.catch_up(id, layer).map_err(|_| Status::Failed)?;
        match self.digested(id, layer, if candidates.is_empty() { 0 } else { candidates.end }, tokens - 1) {
            Digested::Yes => {}
            Digested::NotObserved => return Err(Status::NotObserved),
            Digested::Behind => return Err(Status::NotAppended),
        }
        self.buffers.rest.clear(0);
        let at_once = queries == 1 && self.estimates_at_once(id);
        let purpose = match (at_once, self.slab.is_some()) {
            (false, _) => Purpose::Rows,
            (true, false) => Purpose::Whole,
            (true, true) => Purpose::RowsFirst,
        };
        self.buffers.room = self.room_in_time(id, layer, turn, answer);
        self.ask_method(id, layer, (tokens, queries), purpose);
        self.buffers.room = None;
        answer.late += self.buffers.selection.late() as u64;
        self.note_selected(id, layer);
        if self.slab.is_none() {
            if at_once {
                self.put_rest(answer);
            }
            self.point(id, layer, turn, answer)?;
            self.keep_named(id, layer, answer);
            return Ok(());
        }
        if let Err(status) = self.place(id, layer, (tokens, queries), turn, answer, background) {
            // What the selection has left for its rest is nobody else's.
            self.buffers.scratch.keep_for_rest(false);
            return Err(status);
        }
        if at_once {
            self.estimate_unnamed(id, layer, tokens, answer);
        } else {
            self.keep_named(id, layer, answer);
        }
        self.plan_prefetch(id, layer, tokens, turn.ticket);
        Ok(())
    }

    /// How many rows of each KV head can be ready in time besides those that are, which go to the buffers; none where the method does not ask.
    fn room_in_time(&mut self, id: SequenceId, layer: usize, turn: Turn, answer: &Answer) -> Option<usize> {
        let needs = self.methods[self.sequence(id).ok()?.method].needs();
        let limit = turn.room.filter(|_| needs.leaves_late);
        if self.slab.is_none() || (limit.is_none() && !needs.sees_resident) {
            return None;
        }
        let mut resident = std::mem::take(&mut self.buffers.resident);
        resident.clear();
        let slots = &self.sequence(id).ok()?.residency[layer].heads;
        for kv_head in 0..self.shape.kv_heads {
            if let Some(set) = slots.get(kv_head) {
                set.entries().for_each(|entry| resident.push(entry.token as usize, entry.token as usize + 1));
            }
            resident.finish_head();
        }
        self.buffers.resident = resident;
        let planned = answer.bytes / self.arena.geometry().row_bytes as u64;
        let each = |room: u64| (room.saturating_sub(planned) / self.shape.kv_heads as u64) as usize;
        Some(limit.map_or(usize::MAX, each))
    }

    /// Has the sequence's method choose rows ahead of any hint; true where it did.
    pub(super) fn choose_ahead(&mut self, id: SequenceId, layer: usize, tokens: usize) -> bool {
        self.ask_method(id, layer, (tokens, 1), Purpose::Ahead)
    }

    /// Has the sequence's method estimate, by the hint in the buffers, what is not in `named`.
    pub(super) fn estimate(&mut self, id: SequenceId, layer: usize, tokens: usize, named: &Selection) {
        self.buffers.rest.clear(0);
        self.buffers.selection.clone_from(named);
        self.ask_method(id, layer, (tokens, 1), Purpose::Rest);
    }

    /// Has the sequence's method do its part, by the hint in the buffers or ahead of any; true where rows were chosen.
    fn ask_method(
        &mut self,
        id: SequenceId,
        layer: usize,
        (tokens, queries): (usize, usize),
        purpose: Purpose,
    ) -> bool {
        let ahead = purpose == Purpose::Ahead;
        let mut selection = std::mem::take(&mut self.buffers.selection);
        let mut rest = std::mem::take(&mut self.buffers.rest);
        let floors = std::mem::take(&mut self.buffers.floors);
        let mut scratch = std::mem::take(&mut self.buffers.scratch);
        if purpose != Purpose::Rest {
            scratch.keep_for_rest(purpose == Purpose::RowsFirst);
        }
        let hint = std::mem::take(&mut self.buffers.hint);
        let ids = std::mem::take(&mut self.buffers.ids);
        let resident = std::mem::take(&mut self.buffers.resident);
        let slot = self.sequences.get(id.slot as usize);
        let mut chosen = false;
        if let Some(sequence) = slot.and_then(|slot| slot.sequence.as_ref()) {
            let method = &*self.methods[sequence.method];
            let pages = sequence.layer_pages(layer, self.shape.kv_heads);
            let memory = std::mem::take(&mut self.buffers.pages);
            let rows = PageRows::new(&self.arena, &self.tables, self.layout, pages, memory);
            let context = SelectContext {
                layer,
                heads: 0..self.shape.kv_heads,
                tokens,
                queries,
                hint: if ahead { &[] } else { &hint },
                floors: if ahead { &[] } else { &floors },
                ids: if ahead { &[] } else { &ids },
                sequence_seed: sequence.seed,
                step: tokens as u64,
                rows: if method.needs().rows { &rows } else { &NoRows },
                in_time: self.buffers.room.map(|room| InTime { resident: &resident, first_head: 0, room }),
            };
            let of = (method, sequence.method);
            let mut view = View::new(&mut self.meta, &self.pools, sequence, of, (&self.shape, layer));
            let store: &mut dyn Store = match &mut view {
                Some(view) => view,
                None => &mut NoStore,
            };
            match purpose {
                Purpose::Ahead => chosen = method.prefetch(&context, store, &mut scratch, &mut selection),
                Purpose::Rest => method.rest(&context, &selection, store, &mut scratch, &mut rest),
                Purpose::Rows | Purpose::RowsFirst => {
                    method.select(&context, store, &mut scratch, &mut selection);
                }
                Purpose::Whole => {
                    method.select_with_rest(&context, store, &mut scratch, &mut selection, &mut rest);
                }
            }
            if matches!(purpose, Purpose::Rows | Purpose::RowsFirst | Purpose::Whole) {
                method.steer(&context, &selection, store);
                chosen = true;
            }
            self.buffers.pages = rows.into_scratch();
        }
        (self.buffers.selection, self.buffers.scratch) = (selection, scratch);
        (self.buffers.rest, self.buffers.floors, self.buffers.resident) = (rest, floors, resident);
        (self.buffers.hint, self.buffers.ids) = (hint, ids);
        chosen
    }

    /// Runs that point into the session's own extents.
    fn point(&mut self, id: SequenceId, layer: usize, turn: Turn, answer: &mut Answer) -> Result<(), Status> {
        // What the answer names stays where it is.
        self.sequence_mut(id).map_err(|_| Status::NoSuchSequence)?.residency[layer].last_ticket = turn.ticket;
        let selection = std::mem::take(&mut self.buffers.selection);
        let result = self.point_at(id, layer, &selection, answer);
        self.buffers.selection = selection;
        result
    }

    fn point_at(
        &mut self,
        id: SequenceId,
        layer: usize,
        selection: &Selection,
        answer: &mut Answer,
    ) -> Result<(), Status> {
        let (rows, heads) = (self.shape.page_rows as u32, self.shape.kv_heads);
        for kv_head in 0..heads {
            let first_run = answer.runs.len();
            let mut total = 0;
            for range in selection.head(kv_head) {
                let mut token = range.first;
                while token < range.end() {
                    let (page, row) = (token / rows, token % rows);
                    let count = (range.end() - token).min(rows - row);
                    if let Some(own) = self.page_for(id, (layer * heads + kv_head, page as usize), answer)? {
                        self.note_use(own);
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
}
