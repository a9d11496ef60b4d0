//! Graph mode: what a kernel selected is brought into the slab for the next step.
//!
//! A report names the rows that a layer of a sequence selected. Between seeing it and answering with records of its number,
//! no kernel reads the slots of that layer (see [`kvoyant_protocol::graph`]), so here rows may change places; one answer of
//! a layer is under way at a time, and reports that come meanwhile are passed over. Slots of these sequences are theirs
//! alone: nobody else's answer takes them.

use std::time::{Duration, Instant};

use kvoyant_kernels::cuda::params::{ResidencyEntry, ResidencyHeader};
use kvoyant_methods::{Needs, RowPart};
use kvoyant_protocol::control::{Failure, PageWord};
use kvoyant_protocol::graph::GraphLayout;
use kvoyant_protocol::memory::MemoryError;
use kvoyant_protocol::wire::{SequenceId, Status};

use crate::device::RecordUpdate;
use crate::lane::mailbox::{Mailbox, Report, ReportError};
use crate::lane::model::ModelState;
use crate::lane::select::{Answer, Turn};
use crate::tiers::residency::SlotSet;

/// How long after a report the lane polls for the next one.
const LIVELY_FOR: Duration = Duration::from_millis(100);

/// The version in a record's new contents until they are all there. No kernel expects it.
const BEING_WRITTEN: u64 = 0;

/// One layer's records in one slot.
#[derive(Debug, Clone, Copy)]
struct LayerRecords {
    /// An answer is under way.
    flying: bool,
    /// The records are not what the slots hold, even if nothing is brought in.
    stale: bool,
}

/// A place for a sequence's records.
#[derive(Debug)]
struct RecordSlot {
    sequence: Option<SequenceId>,
    layers: Vec<LayerRecords>,
}

/// A session's graph mode.
#[derive(Debug)]
pub struct GraphState {
    layout: GraphLayout,
    /// Where reports come.
    pub mailbox: Mailbox,
    slots: Vec<RecordSlot>,
    last_report: Option<Instant>,
    /// Memory of updates that have been written, to be used again.
    #[allow(
        clippy::vec_box,
        reason = "they travel in their boxes, so that none is made anew for each report"
    )]
    spare: Vec<Box<RecordUpdate>>,
}

impl GraphState {
    /// Nothing is served yet.
    pub fn new(layout: GraphLayout) -> Result<Self, MemoryError> {
        let fresh = LayerRecords { flying: false, stale: true };
        let slot = || RecordSlot { sequence: None, layers: vec![fresh; layout.layers as usize] };
        let slots = (0..layout.spec.sequences).map(|_| slot()).collect();
        Ok(Self { layout, mailbox: Mailbox::create(layout)?, slots, last_report: None, spare: Vec::new() })
    }

    /// Whether reports may come.
    #[must_use]
    pub fn serves(&self) -> bool {
        self.slots.iter().any(|slot| slot.sequence.is_some())
    }

    /// Whether they come one after the other, so that it is worth a core to look for them.
    #[must_use]
    pub fn lively(&self) -> bool {
        self.last_report.is_some_and(|at| at.elapsed() < LIVELY_FOR)
    }

    /// Frees a slot whose sequence is closed.
    pub fn close(&mut self, slot: u32) {
        if let Some(slot) = self.slots.get_mut(slot as usize) {
            slot.sequence = None;
        }
    }

    /// The slots of a sequence have changed otherwise than by its reports.
    pub fn changed(&mut self, slot: u32) {
        let layers = self.slots.get_mut(slot as usize).map(|slot| &mut slot.layers);
        layers.into_iter().flatten().for_each(|layer| layer.stale = true);
    }

    fn layer(&mut self, slot: u32, layer: u32) -> Option<&mut LayerRecords> {
        self.slots.get_mut(slot as usize)?.layers.get_mut(layer as usize)
    }
}

/// Why captured kernels cannot stand in for a method that needs this.
fn unserved(needs: &Needs) -> Option<&'static str> {
    if needs.drops_rows {
        // They know pages by a table of their own, which must not lose any.
        Some("has a pool, which drops rows")
    } else if needs.part == RowPart::Values {
        Some("moves values alone, and captured kernels read keys where they read values")
    } else if needs.cpu_attention.is_some() {
        Some("attends rows on the CPU, whose answer no captured kernel waits for")
    } else if needs.prefetch {
        Some("chooses ahead by what its own selections left, and captured kernels select without it")
    } else {
        None
    }
}

impl ModelState {
    /// Serves a sequence in graph mode from now on.
    pub fn serve_graph(&mut self, id: SequenceId, slot: u32) -> Result<(), Failure> {
        let refused = |reason: String| Failure::Graph { sequence: id, reason };
        let sequence = self.sequence(id)?;
        if !self.is_whole(sequence) {
            return Err(refused("some of its pages are on disk, where no kernel can read them".into()));
        }
        if sequence.graph.is_some() {
            return Err(refused("it is already".into()));
        }
        let method = &self.methods[sequence.method];
        if let Some(reason) = unserved(&method.needs()) {
            return Err(refused(format!("its method, {}, {reason}", method.spec())));
        }
        let graph = self.graph.as_mut();
        let graph = graph.ok_or_else(|| refused("the model was registered without graph mode".into()))?;
        let slots = graph.slots.len();
        let place = graph.slots.get_mut(slot as usize);
        let place = place.ok_or_else(|| refused(format!("slot {slot} is not one of {slots}")))?;
        if let Some(other) = place.sequence {
            return Err(refused(format!("slot {slot} is that of sequence {other}")));
        }
        place.sequence = Some(id);
        graph.changed(slot);
        // What answers have brought there is given up, once nobody reads it.
        let sequence = self.sequence_mut(id)?;
        sequence.graph = Some(slot);
        let mut residency = std::mem::take(&mut sequence.residency);
        for layer in &mut residency {
            self.clear_slots(layer);
            layer.last_ticket = 0;
        }
        self.sequence_mut(id)?.residency = residency;
        Ok(())
    }

    /// Takes a report: what it lacks is in `answer.copies` then, and the records that go with it are the answer. `None`: the
    /// last answer for the layer is still under way.
    pub fn prefetch(
        &mut self,
        graph: &mut GraphState,
        report: &mut Report,
        released_through: u64,
        answer: &mut Answer,
    ) -> Result<Option<Box<RecordUpdate>>, ReportError> {
        graph.last_report = Some(Instant::now());
        let (number, id, layer) = (report.number, report.sequence(), report.layer);
        let slot = self.sequence(id).ok().and_then(|sequence| sequence.graph);
        let slot = slot.ok_or(ReportError::Sequence { number, sequence: id })?;
        if !self.speculates(layer as usize) {
            return Err(ReportError::Layer { number, layer, layers: self.shape.layers });
        }
        self.choose(report)?;
        let Some(records) = graph.layer(slot, layer) else { return Ok(None) };
        if records.flying {
            return Ok(None);
        }
        answer.clear();
        let placed = self.place_report(id, layer as usize, graph.layout.spec.rows, released_through, answer);
        let Some(records) = graph.layer(slot, layer) else { return Ok(None) };
        if let Err(status) = placed {
            // The sets say that rows are there which nobody will bring.
            tracing::error!("rows of graph mode cannot be placed: {status}");
            records.stale = true;
            self.forget(id, layer);
            return Ok(None);
        }
        records.flying = true;
        let changed = std::mem::replace(&mut records.stale, false) || !answer.copies.is_empty();
        let mut update = graph.spare.pop().unwrap_or_default();
        (update.slot, update.layer, update.version) = (slot, layer, number);
        update.offset = graph.layout.record(slot, layer);
        (update.stride, update.heads) = (graph.layout.record_bytes(), graph.layout.kv_heads);
        update.image.clear();
        update.ends.clear();
        if changed {
            self.draw(id, layer as usize, graph.layout.spec.rows as usize, &mut update);
        }
        Ok(Some(update))
    }

    /// Turns a report's ids into a selection: each row once, and only those that can be brought.
    fn choose(&mut self, report: &mut Report) -> Result<(), ReportError> {
        let (number, id, layer) = (report.number, report.sequence(), report.layer as usize);
        let candidates = self.shape.candidates(report.tokens as usize);
        let mut selection = std::mem::take(&mut self.buffers.selection);
        selection.clear();
        let result = (|| {
            let sequence = self.sequence(id).map_err(|_| ReportError::Sequence { number, sequence: id })?;
            // Rows whose appending the daemon has yet to hear of are brought next time.
            let end = candidates.end.min(sequence.lens[layer] as usize);
            let (rows, room) =
                (self.shape.page_rows, sequence.room.max(sequence.pages * self.shape.page_rows));
            for head in 0..self.shape.kv_heads {
                let ids = report.ids(head);
                ids.sort_unstable();
                let base = (layer * self.shape.kv_heads + head) * sequence.capacity;
                let mut last = None;
                for &token in &*ids {
                    if token as usize >= room {
                        return Err(ReportError::Token { number, sequence: id, token, room });
                    }
                    let at = token as usize;
                    let there = (candidates.start..end).contains(&at)
                        && self.page_word(sequence.table, base + at / rows) != PageWord::None;
                    if there && last.replace(token) != Some(token) {
                        selection.push(at, at + 1);
                    }
                }
                selection.finish_head();
            }
            Ok(())
        })();
        self.buffers.selection = selection;
        result
    }

    fn place_report(
        &mut self,
        id: SequenceId,
        layer: usize,
        rows: u32,
        released_through: u64,
        answer: &mut Answer,
    ) -> Result<(), Status> {
        let sequence = self.sequence_mut(id).map_err(|_| Status::NoSuchSequence)?;
        let mut slots = std::mem::take(&mut sequence.residency[layer]);
        slots.heads.resize_with(self.shape.kv_heads, SlotSet::default);
        self.make_room(self.pages_short(&slots), Turn { ticket: 0, released_through, room: None });
        let mut result = Ok(());
        for (head, set) in slots.heads.iter_mut().enumerate() {
            let keep = (self.buffers.selection.rows(head) as f64 * self.keep) as usize;
            let keep = keep.min(rows as usize);
            result = result.and(self.place_head(id, layer, head, set, (keep, u32::MAX), true, answer));
        }
        self.sequence_mut(id).map_err(|_| Status::NoSuchSequence)?.residency[layer] = slots;
        result
    }

    /// Draws a layer's records as they are to be: what was selected now first of all, if not all that is there fits.
    fn draw(&self, id: SequenceId, layer: usize, rows: usize, update: &mut RecordUpdate) {
        let Ok(sequence) = self.sequence(id) else { return };
        for set in &sequence.residency[layer].heads {
            let now = set.entries().filter(|entry| entry.selected).count();
            let (mut count, mut others) = (0u32, rows.saturating_sub(now));
            let begin = update.image.len();
            update.image.resize(begin + size_of::<ResidencyHeader>(), 0);
            for entry in set.entries() {
                if count as usize == rows || !entry.selected && others == 0 {
                    continue;
                }
                others -= usize::from(!entry.selected);
                count += 1;
                let entry = ResidencyEntry { token: entry.token, slot: entry.slot };
                update.image.extend_from_slice(bytemuck::bytes_of(&entry));
            }
            let header = ResidencyHeader { version: BEING_WRITTEN, count, pad: 0 };
            update.image[begin..][..size_of::<ResidencyHeader>()]
                .copy_from_slice(bytemuck::bytes_of(&header));
            update.ends.push(update.image.len());
        }
    }

    /// Forgets what a layer has in its slots, and keeps the slots: a kernel may still read them.
    fn forget(&mut self, id: SequenceId, layer: u32) {
        let residency = self.sequence_mut(id).ok().map(|sequence| &mut sequence.residency);
        if let Some(slots) = residency.and_then(|residency| residency.get_mut(layer as usize)) {
            slots.heads.iter_mut().for_each(|set| set.truncate(0));
        }
    }

    /// Takes note that an answer has been written, or never will be.
    pub fn records_written(&mut self, update: Box<RecordUpdate>, failed: bool) {
        let Some(graph) = &mut self.graph else { return };
        let id = graph.slots.get(update.slot as usize).and_then(|slot| slot.sequence);
        let (slot, layer) = (update.slot, update.layer);
        if let Some(records) = graph.layer(slot, layer) {
            records.flying = false;
            records.stale |= failed;
        }
        graph.spare.push(update);
        if let (true, Some(id)) = (failed, id) {
            self.forget(id, layer);
        }
    }
}

#[cfg(test)]
mod tests {
    use kvoyant_methods::CpuAttention;

    use super::*;

    #[test]
    fn methods_that_captured_kernels_cannot_stand_in_for_are_refused_with_the_reason() {
        assert_eq!(unserved(&Needs { rows: true, digest: true, memory: true, ..Needs::default() }), None);
        let cpu_attention = Some(CpuAttention { recall_above: 0.5, recall_every: 0 });
        for (needs, reason) in [
            (Needs { drops_rows: true, ..Needs::default() }, "pool"),
            (Needs { part: RowPart::Values, ..Needs::default() }, "values alone"),
            (Needs { cpu_attention, ..Needs::default() }, "CPU"),
            (Needs { prefetch: true, ..Needs::default() }, "ahead"),
        ] {
            assert!(unserved(&needs).is_some_and(|said| said.contains(reason)), "{needs:?}");
        }
    }
}
