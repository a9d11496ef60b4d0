//! Selected rows on the device: slots of the slab, and copies for what is not there yet.

use std::ops::Range;

use kvoyant_kernels::CopyRun;
use kvoyant_methods::RowPart;
use kvoyant_protocol::control::PageWord;
use kvoyant_protocol::wire::{HeadEntry, SequenceId, Status};

use crate::lane::ages::Ages;
use crate::lane::background::Background;
use crate::lane::model::ModelState;
use crate::lane::select::{Answer, Turn};
use crate::lane::sequences::LayerSlots;
use crate::tiers::residency::SlotSet;

/// The bytes of a row that have to be moved.
pub(super) fn moved_part(part: RowPart, row_bytes: usize) -> Range<usize> {
    match part {
        RowPart::Whole => 0..row_bytes,
        // K and V are stored alike.
        RowPart::Values => row_bytes / 2..row_bytes,
    }
}

impl ModelState {
    /// Slots in the slab, and copies for what is not there yet.
    pub(super) fn place(
        &mut self,
        id: SequenceId,
        layer: usize,
        (tokens, queries): (usize, usize),
        turn: Turn,
        answer: &mut Answer,
        background: &mut Background,
    ) -> Result<(), Status> {
        let heads = self.shape.kv_heads;
        let cpu = self.cpu_attention(id).filter(|_| queries == 1);
        let sequence = self.sequence_mut(id).map_err(|_| Status::NoSuchSequence)?;
        // Taken out while other sequences may have to give way to it.
        let mut slots = std::mem::take(&mut sequence.residency[layer]);
        if slots.heads.is_empty() {
            slots.heads.resize_with(heads, SlotSet::default);
        }
        // Rows that an unread answer names stay where they are.
        let evict = slots.last_ticket <= turn.released_through;
        slots.last_ticket = turn.ticket;
        if let Some(number) = slots.background
            && !answer.after.contains(&number)
        {
            answer.after.push(number);
        }
        if let Some(cpu) = cpu {
            let result =
                self.place_or_attend(id, layer, tokens, cpu, &mut slots, answer).and_then(|recall| {
                    if !recall || slots.background.is_some() {
                        return Ok(());
                    }
                    self.bring(id, layer, turn.released_through, evict, &mut slots, background)
                });
            self.sequence_mut(id).map_err(|_| Status::NoSuchSequence)?.residency[layer] = slots;
            self.note_age(id, layer);
            return result;
        }
        self.make_room(self.pages_short(&slots), turn);
        let mut result = Ok(());
        let end = self.shape.candidates(tokens).end as u32;
        for (kv_head, set) in slots.heads.iter_mut().enumerate() {
            let wanted: usize = self.buffers.selection.rows(kv_head);
            let keep = self.kept_rows(wanted, tokens);
            result = result.and(self.place_head(id, layer, kv_head, set, (keep, end), evict, answer));
            answer.resident = answer.resident.saturating_add(set.resident() as u32);
        }
        if result.is_err() {
            // Rows have slots that nothing will be copied to.
            self.clear_slots(&mut slots);
        }
        self.sequence_mut(id).map_err(|_| Status::NoSuchSequence)?.residency[layer] = slots;
        self.note_age(id, layer);
        result
    }

    /// Rows of a sequence of so many tokens that a head may keep on the device, where so many are wanted.
    pub(super) fn kept_rows(&self, wanted: usize, tokens: usize) -> usize {
        let most = (tokens as f64 * self.device_share) as usize;
        ((wanted as f64 * self.keep) as usize).min(most).max(wanted)
    }

    /// Slab pages that the selection needs beyond what its heads have.
    pub(super) fn pages_short(&self, slots: &LayerSlots) -> usize {
        let selection = &self.buffers.selection;
        let short =
            |(head, set): (usize, &SlotSet)| set.pages_wanted(selection.rows(head), self.shape.page_rows);
        slots.heads.iter().enumerate().map(short).sum()
    }

    #[allow(clippy::too_many_arguments)]
    pub(super) fn place_head(
        &mut self,
        id: SequenceId,
        layer: usize,
        kv_head: usize,
        set: &mut SlotSet,
        (keep, end): (usize, u32),
        evict: bool,
        answer: &mut Answer,
    ) -> Result<(), Status> {
        let mut placed = std::mem::take(&mut self.buffers.placed);
        placed.clear();
        let Some(slab) = &mut self.slab else { return Err(Status::Failed) };
        let wanted = self.buffers.selection.head(kv_head);
        set.place(wanted, keep, evict, &mut slab.pages, &mut self.buffers.place, &mut placed);
        let slab = slab.slab.clone();
        let sequence = self.sequence(id).map_err(|_| Status::NoSuchSequence)?;
        let geometry = self.arena.geometry();
        let (rows, row_bytes) = (geometry.page_rows as u32, geometry.row_bytes);
        let needs = self.methods[sequence.method].needs();
        let part = moved_part(needs.part, row_bytes);
        let head = layer * self.shape.kv_heads + kv_head;
        let (table, base) = (sequence.table, head * sequence.capacity);
        let first_run = answer.runs.len();
        let (mut total, mut named) = (0, 0);
        // Rows that are there are attended at no cost: they stand between those that were selected. From `end` on all are attended anyway, or are
        // of later tokens: a sequence that was cut still has them.
        let mut there = set.entries().filter(|entry| needs.attend_resident && entry.token < end).peekable();
        let mut name_others = |answer: &mut Answer, before: u32| {
            while let Some(entry) = there.next_if(|entry| entry.token <= before) {
                if entry.token < before {
                    answer.push_row(first_run, entry.slot, entry.token, 1, true);
                    named += 1;
                }
            }
        };
        for row in &placed {
            name_others(answer, row.token);
            let index = (row.token / rows) as usize;
            let word = self.page_word(table, base + index);
            if word == PageWord::None {
                continue;
            }
            // A row that lies in a slot is there, wherever its page is.
            if let Some(slot) = row.slot.filter(|_| !row.fresh) {
                answer.push_row(first_run, slot, row.token, 1, true);
                answer.hits = answer.hits.saturating_add(1);
                total += 1;
                continue;
            }
            let page = match word.page() {
                Some(page) => page,
                None => match self.page_for(id, (head, index), answer) {
                    Ok(Some(page)) => page,
                    Ok(None) => continue,
                    Err(status) => {
                        self.buffers.placed = placed;
                        return Err(status);
                    }
                },
            };
            self.note_use(page);
            let locator = page * rows + row.token % rows;
            match row.slot {
                None => {
                    answer.push_row(first_run, locator, row.token, 1, false);
                    answer.in_place = answer.in_place.saturating_add(1);
                }
                Some(slot) => {
                    answer.push_row(first_run, slot, row.token, 1, true);
                    let (extent, offset) = geometry.locate(locator);
                    let (from, to, bytes) =
                        (offset + part.start, slot as usize * row_bytes + part.start, part.len());
                    let src = self.arena.memory(extent).address(from, bytes).map_err(|_| Status::Failed)?;
                    let dst = slab.address(to, bytes).map_err(|_| Status::Failed)?;
                    answer.push_copy(CopyRun { src: src.cast_const(), dst, bytes });
                }
            }
            total += 1;
        }
        name_others(answer, u32::MAX);
        answer.rows = answer.rows.saturating_add(total);
        answer.heads.push(HeadEntry {
            first_run: first_run as u32,
            runs: (answer.runs.len() - first_run) as u32,
            rows: total + named,
            resident: set.resident() as u32,
        });
        self.buffers.placed = placed;
        Ok(())
    }

    /// Takes slab pages from the layers that were used longest ago until `pages` are free, or nobody has any that
    /// no unread answer names. Those of graph mode stay where they are: kernels read them whenever they like.
    pub(super) fn make_room(&mut self, pages: usize, turn: Turn) {
        let Self { slab: Some(slab), ages, sequences, touched, .. } = self else { return };
        if slab.pages.free() >= pages {
            return;
        }
        let ages = ages.get_or_insert_with(|| Ages::of(sequences, slab.pages.total()));
        while slab.pages.free() < pages {
            let Some(oldest) = ages.take(turn.released_through) else { break };
            let (ticket, slot, layer) = oldest;
            let sequence = sequences[slot as usize].sequence.as_mut();
            let sequence = sequence.filter(|sequence| sequence.graph.is_none());
            let slots = sequence.map(|sequence| &mut sequence.residency[layer as usize]);
            // It may have given them up, or have been closed; or it is the one that room is made for, and is put in again.
            let Some(slots) = slots.filter(|slots| slots.has_pages()) else { continue };
            let last = slots.last_ticket;
            if last != ticket {
                ages.put((last, slot, layer), sequences);
            } else if slots.background.is_some() {
                ages.lay_aside(oldest);
            } else {
                touched.mark(slot as usize);
                slab.pages.give_back(slots.heads.iter_mut().flat_map(SlotSet::clear));
            }
        }
        ages.put_back();
    }

    /// A layer has been placed.
    pub(super) fn note_age(&mut self, id: SequenceId, layer: usize) {
        let Self { ages: Some(ages), sequences, .. } = self else { return };
        let sequence = sequences.get(id.slot as usize).and_then(|slot| slot.sequence.as_ref());
        let slots = sequence.and_then(|sequence| sequence.residency.get(layer));
        if let Some(slots) = slots.filter(|slots| slots.has_pages()) {
            ages.put((slots.last_ticket, id.slot, layer as u32), sequences);
        }
    }
}
