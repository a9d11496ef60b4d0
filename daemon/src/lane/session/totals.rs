//! What a session has open and uses, as others read it.
//!
//! Sums over its sequences are made in pieces, one at a time: whoever has very many of them would else have the lane sum up all of them after each of
//! their messages. They are right once nothing changes for a moment, and before the client hears of its change where one piece is enough.

use std::sync::atomic::{AtomicU64, Ordering};

use super::LaneSession;
use crate::lane::model::ModelState;
use crate::tiers::heap::Heap;

/// Rows' counts of layers that one piece looks at, all sequences together: a tenth of a millisecond or two.
const PIECE: usize = 1 << 15;

/// What a sequence counts for beside its layers.
const SEQUENCE: usize = 32;

/// Sums over the first of the open sequences.
#[derive(Debug, Default)]
pub(super) struct Totals {
    /// How many of them; 0: it has not begun.
    next: usize,
    tokens: usize,
    /// Bytes of digests and of memories, by the names that they are shown under.
    kept: Vec<(usize, usize)>,
}

impl Totals {
    /// Adds a piece; true if that was the last one.
    fn go_on(&mut self, model: &ModelState) -> bool {
        let end = (self.next + at_once(model)).min(model.open.len());
        for slot in model.open.get(self.next..end).unwrap_or_default() {
            let Some(sequence) = &model.sequences[*slot as usize].sequence else { continue };
            self.tokens += sequence.tokens();
            model.add_kept(sequence, &mut self.kept);
        }
        self.next = end;
        end == model.open.len()
    }
}

/// Sequences of a piece.
fn at_once(model: &ModelState) -> usize {
    (PIECE / (model.shape.layers + SEQUENCE)).max(1)
}

impl LaneSession {
    /// Something has changed: writes what is open and used to the status that others read, as far as one piece goes.
    pub fn refresh_status(&mut self) {
        self.dirty = true;
        self.refresh();
    }

    /// Goes on with that, if there is anything left of it; true if there is still more.
    pub fn refresh_if_dirty(&mut self) -> bool {
        let under_way = |session: &Self| session.dirty || session.totals.next > 0;
        if under_way(self) {
            self.refresh();
        }
        under_way(self)
    }

    fn refresh(&mut self) {
        self.count_pages();
        let Some(model) = &self.model else {
            self.dirty = false;
            return;
        };
        let status = &self.status;
        let set = |cell: &AtomicU64, value: usize| cell.store(value as u64, Ordering::Relaxed);
        set(&status.sequences, model.open_sequences());
        set(&status.pages, model.arena.used_pages());
        set(&status.page_bytes, model.arena.geometry().page_bytes());
        set(&status.extents, model.arena.held_extents());
        set(&status.slab_pages, model.slab.as_ref().map_or(0, |slab| slab.pages.used()));
        let totals = &mut self.totals;
        if totals.next == 0 || model.open.len() <= at_once(model) {
            // What changes from here on is in the next sums.
            *totals = Totals { kept: std::mem::take(&mut totals.kept), ..Totals::default() };
            model.begin_kept(&mut totals.kept);
            self.dirty = false;
        }
        if !totals.go_on(model) {
            return;
        }
        totals.next = 0;
        set(&status.tokens, totals.tokens);
        model.show_kept(&totals.kept, status);
        let heaps = [&model.tables, &model.meta];
        let room = |heap: &&Heap| heap.free_bytes();
        set(&status.table_room[0], heaps.iter().map(room).sum());
        set(&status.table_room[1], heaps.iter().map(|heap| heap.longest_span() as usize).max().unwrap_or(0));
    }
}
