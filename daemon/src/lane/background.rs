//! Rows that are brought to the device before anybody asks for them: what a method chooses ahead of a step, and what the
//! lane attended itself and had better have there.
//!
//! A background transfer has a number and no completion. Until it has ended, the rows that it brings keep their slots
//! ([`SlotSet::hold`](crate::tiers::residency::SlotSet::hold)), slots that are given up meanwhile stay in limbo, and an
//! answer that may name such rows is posted after it. A layer of a sequence has one at a time.

use kvoyant_methods::{CpuAttention, TokenRange};
use kvoyant_protocol::wire::{HeadEntry, PartialLayout, SequenceId, Status};

use crate::device::BACKGROUND;
use crate::device::rows::PageRows;
use crate::lane::digests::Digested;
use crate::lane::model::ModelState;
use crate::lane::place::moved_part;
use crate::lane::select::{Answer, Turn};
use crate::lane::sequences::LayerSlots;
use crate::tiers::residency::SlotSet;

/// How many of the layers that wait are looked at in one go.
const LOOKS: usize = 64;

/// A background transfer while it is being planned.
#[derive(Debug, Default)]
pub struct Background {
    /// Its number, from 1.
    pub number: u64,
    /// Where its rows go, and the copies.
    pub answer: Answer,
    /// Which layers of which sequences it brings rows to.
    pub layers: Vec<(SequenceId, usize)>,
    /// Rows that it brings.
    pub rows: u64,
}

impl Background {
    /// Empties it, and gives it its number.
    pub fn clear(&mut self, number: u64, rows_per_extent: u32) {
        self.answer.clear();
        self.answer.rows_per_extent = rows_per_extent;
        self.layers.clear();
        (self.number, self.rows) = (number, 0);
    }
}

/// A background transfer under way.
#[derive(Debug)]
pub struct Flying {
    number: u64,
    layers: Vec<(SequenceId, usize)>,
}

/// Whether one with this number is among them.
pub(super) fn is_flying(flying: &[Flying], number: u64) -> bool {
    flying.iter().any(|flying| flying.number == number)
}

impl ModelState {
    /// Whether a query comes with requests for the sequence.
    pub(super) fn selects_by_query(&self, id: SequenceId) -> bool {
        self.sequence(id).is_ok_and(|sequence| self.methods[sequence.method].needs().hint.is_query())
    }

    /// What the sequence's method wants of the CPU.
    pub(super) fn cpu_attention(&self, id: SequenceId) -> Option<CpuAttention> {
        self.methods[self.sequence(id).ok()?.method].needs().cpu_attention
    }

    /// Remembers that the layer's next step is to be prepared once this answer is not read any more.
    pub(super) fn plan_prefetch(&mut self, id: SequenceId, layer: usize, tokens: usize, ticket: u64) {
        let Ok(sequence) = self.sequence(id) else { return };
        if !self.methods[sequence.method].needs().prefetch {
            return;
        }
        let Ok(sequence) = self.sequence_mut(id) else { return };
        let before = sequence.residency[layer].prefetch.replace((ticket, tokens + 1));
        if before.is_none() {
            self.planned.push_back((id, layer));
        }
    }

    /// Takes a layer out of those that wait whose answer is not read any more. Others change places with those behind
    /// them, so that an answer that is held holds up nothing but its own layer.
    fn next_planned(&mut self, released_through: u64) -> Option<(SequenceId, usize, usize)> {
        for _ in 0..self.planned.len().min(LOOKS) {
            let (id, layer) = self.planned.pop_front()?;
            let planned = self.sequence(id).ok().and_then(|sequence| sequence.residency[layer].prefetch);
            match planned {
                Some((ticket, _)) if ticket > released_through => self.planned.push_back((id, layer)),
                Some((_, tokens)) => return Some((id, layer, tokens)),
                None => {}
            }
        }
        None
    }

    /// Prepares the next layer that waits for it, if its answer is not read any more; true if there was one. What has to
    /// be copied is in `background` then.
    pub fn prefetch_next(&mut self, released_through: u64, background: &mut Background) -> bool {
        let Some((id, layer, tokens)) = self.next_planned(released_through) else { return false };
        let Ok(sequence) = self.sequence_mut(id) else { return true };
        sequence.residency[layer].prefetch = None;
        let candidates = self.shape.candidates(tokens);
        let Ok(sequence) = self.sequence(id) else { return true };
        // What has not been appended cannot be brought, and what still arrives is enough for now.
        let ready = candidates.end <= sequence.lens[layer] as usize
            && sequence.residency[layer].background.is_none()
            && sequence.graph.is_none()
            && self.misses_rows(id, layer).is_none()
            && self.digested(id, layer, candidates.end, tokens - 1) == Digested::Yes;
        if !ready || !self.choose_ahead(id, layer, tokens) {
            return true;
        }
        background.answer.key = BACKGROUND | background.number;
        if let Some(state) = &mut self.spill {
            state.hold(id, layer);
        }
        let Ok(sequence) = self.sequence_mut(id) else { return true };
        let mut slots = std::mem::take(&mut sequence.residency[layer]);
        slots.heads.resize_with(self.shape.kv_heads, Default::default);
        let evict = slots.last_ticket <= released_through;
        if let Err(status) = self.bring(id, layer, released_through, evict, &mut slots, background) {
            tracing::warn!("rows cannot be brought ahead: {status}");
            // Rows have slots that nothing will be copied to.
            self.clear_slots(&mut slots);
        }
        if let Ok(sequence) = self.sequence_mut(id) {
            sequence.residency[layer] = slots;
        }
        self.note_age(id, layer);
        true
    }

    /// Places the selection in the buffers by a background transfer.
    pub(super) fn bring(
        &mut self,
        id: SequenceId,
        layer: usize,
        released_through: u64,
        evict: bool,
        slots: &mut LayerSlots,
        background: &mut Background,
    ) -> Result<(), Status> {
        let before = background.answer.bytes;
        let tokens = self.sequence(id).map_or(0, |sequence| sequence.lens[layer] as usize);
        self.make_room(self.pages_short(slots), Turn { ticket: 0, released_through, room: None });
        let mut result = Ok(());
        for (head, set) in slots.heads.iter_mut().enumerate() {
            let keep = self.kept_rows(self.buffers.selection.rows(head), tokens);
            result = result.and(self.place_head(
                id,
                layer,
                head,
                set,
                (keep, u32::MAX),
                evict,
                &mut background.answer,
            ));
            set.hold();
        }
        let bytes = background.answer.bytes - before;
        if bytes == 0 {
            slots.heads.iter_mut().for_each(SlotSet::let_go);
            return result;
        }
        let sequence = self.sequence(id).map_err(|_| Status::NoSuchSequence)?;
        let part = moved_part(self.methods[sequence.method].needs().part, self.arena.geometry().row_bytes);
        background.rows += bytes / part.len() as u64;
        background.layers.push((id, layer));
        slots.background = Some(background.number);
        result
    }

    /// A background transfer is under way.
    pub fn background_begins(&mut self, background: &mut Background) {
        let layers = std::mem::take(&mut background.layers);
        self.flying.push(Flying { number: background.number, layers });
    }

    /// It has ended.
    pub fn background_ended(&mut self, number: u64, released_through: u64) {
        let Some(at) = self.flying.iter().position(|flying| flying.number == number) else { return };
        for (id, layer) in self.flying.swap_remove(at).layers {
            let Ok(sequence) = self.sequence_mut(id) else { continue };
            let slots = &mut sequence.residency[layer];
            if slots.background == Some(number) {
                slots.background = None;
                slots.heads.iter_mut().for_each(SlotSet::let_go);
            }
        }
        self.settle(released_through);
    }

    /// How partial attentions lie in an answer.
    pub(super) fn partial_layout(&self) -> PartialLayout {
        PartialLayout { query_heads: self.shape.query_heads, values: self.layout.value_values() }
    }

    /// Gives an answer the empty partial attention of one more member; false where a table of at most so many bytes
    /// would not hold it.
    pub fn begin_partial(&self, answer: &mut Answer, most: usize) -> bool {
        let layout = self.partial_layout();
        let first = answer.partials.len();
        let entries = size_of_val(answer.heads.as_slice()) + size_of_val(answer.runs.as_slice());
        if entries + (first + layout.words()) * size_of::<u32>() > most {
            return false;
        }
        answer.partials.resize(first + layout.words(), 0);
        answer.partials[first + 1..][..layout.query_heads].fill(f32::NEG_INFINITY.to_bits());
        true
    }

    /// Names the selected rows that are there, and attends the others by the hint in the buffers, from where they lie.
    /// True if so many were not there, or the time has come, that they should be brought.
    pub(super) fn place_or_attend(
        &mut self,
        id: SequenceId,
        layer: usize,
        tokens: usize,
        cpu: CpuAttention,
        slots: &mut LayerSlots,
        answer: &mut Answer,
    ) -> Result<bool, Status> {
        let (group, layout) = (self.shape.group(), self.partial_layout());
        let (d, values) = (self.shape.head_dim, layout.values);
        let sequence = self.sequence(id).map_err(|_| Status::NoSuchSequence)?;
        let pages = sequence.layer_pages(layer, self.shape.kv_heads);
        let mut placed = std::mem::take(&mut self.buffers.placed);
        let mut partial = std::mem::take(&mut self.buffers.partial);
        let mut missing: Vec<TokenRange> = std::mem::take(&mut self.buffers.missing);
        let memory = std::mem::take(&mut self.buffers.pages);
        let rows = PageRows::new(&self.arena, &self.tables, self.layout, pages, memory);
        let (mut here, mut attended) = (0u32, 0u32);
        let at = answer.partials.len() - layout.words();
        for (kv_head, set) in slots.heads.iter_mut().enumerate() {
            placed.clear();
            missing.clear();
            set.find(self.buffers.selection.head(kv_head), &mut placed);
            let first_run = answer.runs.len();
            let mut found = 0;
            for row in &placed {
                if let Some(slot) = row.slot {
                    answer.push_row(first_run, slot, row.token, 1, true);
                    found += 1;
                    continue;
                }
                match missing.last_mut().filter(|last| last.end() == row.token) {
                    Some(last) => last.count += 1,
                    None => missing.push(TokenRange { first: row.token, count: 1 }),
                }
            }
            partial.resize(group * (values + 1), 0.0);
            let (out, lse) = partial.split_at_mut(group * values);
            let queries = &self.buffers.hint[kv_head * group * d..][..group * d];
            let scale = 1.0 / (d as f32).sqrt();
            attended += rows.attend(kv_head, &missing, queries, scale, out, lse) as u32;
            let words = &mut answer.partials[at + 1..];
            let (all_lse, all_out) = words.split_at_mut(layout.query_heads);
            all_lse[kv_head * group..][..group].copy_from_slice(bytemuck::cast_slice(lse));
            all_out[kv_head * group * values..][..group * values].copy_from_slice(bytemuck::cast_slice(out));
            here += found;
            answer.resident = answer.resident.saturating_add(set.resident() as u32);
            answer.heads.push(HeadEntry {
                first_run: first_run as u32,
                runs: (answer.runs.len() - first_run) as u32,
                rows: found,
                resident: set.resident() as u32,
            });
        }
        answer.partials[at] = attended;
        answer.cpu_rows = answer.cpu_rows.saturating_add(attended);
        answer.hits = answer.hits.saturating_add(here);
        answer.rows = answer.rows.saturating_add(here).saturating_add(attended);
        self.buffers.pages = rows.into_scratch();
        (self.buffers.placed, self.buffers.partial, self.buffers.missing) = (placed, partial, missing);
        let share = f64::from(attended) / f64::from((here + attended).max(1));
        let due = cpu.recall_every > 0 && (tokens as u64).is_multiple_of(cpu.recall_every);
        Ok(attended > 0 && (share > f64::from(cpu.recall_above) || due))
    }
}
