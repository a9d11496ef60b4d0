//! The end of a sequence: closed by its client, or retired under its client's hands.

use std::sync::Arc;

use kvoyant_protocol::control::{Failure, PageWord};
use kvoyant_protocol::wire::SequenceId;

use crate::lane::model::{ModelState, RECORD_BYTES};
use crate::lane::sequences::Sequence;
use crate::prefixes::Attachment;
use crate::tiers::heap::Region;

/// What stays of a sequence whose client does not know of its end: it may still read what it was just told of, and write where
/// it had room.
#[derive(Debug)]
pub(crate) struct Remains {
    /// Its page table, in which the pages that its client uses by itself still are: sinks, window, and room for more.
    table: Region,
    /// Pages that are in the table no more, and may still be read for a moment.
    read: Vec<u32>,
    /// The published prefix that some of them belong to.
    _prefix: Option<Arc<Attachment>>,
}

impl Remains {
    /// As another daemon has left them.
    pub(crate) fn of(table: Region, read: Vec<u32>) -> Self {
        Self { table, read, _prefix: None }
    }

    /// For the next daemon: the table, and the pages that may still be read.
    pub(crate) fn left(&self) -> (Region, Vec<u32>) {
        (self.table, self.read.clone())
    }
}

/// Entries of a sequence's tables between two looks at the clock.
const ENTRIES: usize = 1 << 10;

/// What is left of a message that closes sequences.
#[derive(Debug)]
pub struct Closing {
    left: std::vec::IntoIter<SequenceId>,
    /// How far the first of them has been emptied.
    emptied: usize,
    /// Those that lists still name.
    closed: Vec<SequenceId>,
    /// What went wrong first. One bad handle must not keep the others open.
    failed: Option<Failure>,
}

impl Closing {
    pub(super) fn of(sequences: Vec<SequenceId>) -> Self {
        Self { left: sequences.into_iter(), emptied: 0, closed: Vec::new(), failed: None }
    }

    /// How it went.
    pub(super) fn result(self) -> Result<(), Failure> {
        self.failed.map_or(Ok(()), Err)
    }
}

impl ModelState {
    /// Closes a sequence and gives back what was its alone.
    pub fn close(&mut self, id: SequenceId) -> Result<(), Failure> {
        let mut closing = Closing::of(vec![id]);
        self.close_some(&mut closing, || false);
        closing.result()
    }

    /// Closes one sequence after the other until all are closed, which it says, or `enough` says so.
    pub(crate) fn close_some(&mut self, closing: &mut Closing, enough: impl Fn() -> bool) -> bool {
        while let Some(id) = closing.left.as_slice().first().copied() {
            if !self.empty_some(id, &mut closing.emptied, &enough) {
                break;
            }
            closing.left.next();
            closing.emptied = 0;
            match self.close_emptied(id) {
                Ok(()) => closing.closed.push(id),
                Err(failure) => drop(closing.failed.get_or_insert(failure)),
            }
            if enough() {
                break;
            }
        }
        self.forget_closed(&closing.closed);
        closing.closed.clear();
        closing.left.len() == 0
    }

    /// Gives a sequence's pages and digest blocks back, from one entry of its tables on, until `enough` says so; true once there are none. What is
    /// gone of them reads as what a pool has given up.
    fn empty_some(&mut self, id: SequenceId, entry: &mut usize, enough: impl Fn() -> bool) -> bool {
        let Ok(sequence) = self.sequence(id) else { return true };
        let (table, slots) = (sequence.table, sequence.slots);
        let (pages, capacity) = (sequence.pages, sequence.capacity);
        let sets: Vec<_> = sequence.digests.iter().map(|set| (set.key, set.table)).collect();
        let (in_pages, in_set) = (self.heads() * pages, self.heads() * capacity);
        let all = in_pages + sets.len() * in_set;
        while *entry < all {
            match entry.checked_sub(in_pages) {
                None => self.drop_page(table, slots, *entry / pages * capacity + *entry % pages),
                Some(at) => {
                    let (key, blocks) = sets[at / in_set];
                    self.release_block(key, blocks, at % in_set);
                }
            }
            *entry += 1;
            if entry.is_multiple_of(ENTRIES) && enough() {
                break;
            }
        }
        *entry >= all
    }

    /// Closes a sequence that has been emptied. Lists still name it.
    fn close_emptied(&mut self, id: SequenceId) -> Result<(), Failure> {
        if self.bury(id) {
            return Ok(());
        }
        let sequence = self.take_out(id)?;
        self.tables.release(sequence.table);
        self.give_up(sequence);
        Ok(())
    }

    /// Closes a sequence whose client does not know. Pages that it may be reading are to be given back by
    /// [`forget_read`](Self::forget_read) a little later, the rest when its client closes it, or its session ends.
    pub(crate) fn retire(&mut self, id: SequenceId) -> Result<Remains, Failure> {
        let sequence = self.take_out(id)?;
        self.forget_closed(&[id]);
        let (rows, heads) = (self.shape.page_rows, self.shape.kv_heads);
        let mut remains =
            Remains { table: sequence.table, read: Vec::new(), _prefix: sequence.prefix.clone() };
        for index in pages_of(&sequence, self.heads()) {
            let (head, page) = (index / sequence.capacity, index % sequence.capacity);
            let len = sequence.lens[head / heads] as usize;
            // A page of margin, as everywhere: the client may be a token ahead.
            let own = page * rows < self.shape.sinks || (page + 1) * rows + self.shape.window + rows > len;
            match self.page_word(sequence.table, index) {
                PageWord::Page(_) if own => self.page_changes(sequence.table, sequence.slots, index),
                PageWord::Page(frame) => {
                    self.arena.share(frame);
                    self.drop_page(sequence.table, sequence.slots, index);
                    remains.read.push(frame);
                }
                _ => self.drop_page(sequence.table, sequence.slots, index),
            }
        }
        for set in &sequence.digests {
            (0..set.table.len / 4).for_each(|entry| self.release_block(set.key, set.table, entry));
        }
        self.give_up(sequence);
        Ok(remains)
    }

    /// Gives pages back that a client may have been reading when its sequence was retired.
    pub(crate) fn forget_read(&mut self, remains: &mut Remains) {
        remains.read.drain(..).for_each(|frame| self.let_go_of_frame(frame));
    }

    /// Gives back what is left of a retired sequence.
    pub(crate) fn end(&mut self, mut remains: Remains) {
        self.forget_read(&mut remains);
        for index in 0..remains.table.len / 4 {
            self.drop_page(remains.table, None, index);
        }
        self.tables.release(remains.table);
    }

    /// Takes a sequence out of its slot: from here on its handle means nothing. Lists name it until [`forget_closed`](Self::forget_closed).
    fn take_out(&mut self, id: SequenceId) -> Result<Sequence, Failure> {
        self.sequence(id)?;
        self.touched.mark(id.slot as usize);
        let slot = &mut self.sequences[id.slot as usize];
        slot.generation = slot.generation.wrapping_add(1);
        let Some(sequence) = slot.sequence.take() else { return Err(Failure::NoSuchSequence(id)) };
        self.forgets_plans |= sequence.residency.iter().any(|layer| layer.prefetch.is_some());
        let record = id.slot as usize * RECORD_BYTES;
        self.meta.get_mut(self.directory)[record..record + RECORD_BYTES].fill(0);
        Ok(sequence)
    }

    /// Takes closed sequences out of the lists, once for all that were closed together: each list is passed over.
    fn forget_closed(&mut self, closed: &[SequenceId]) {
        let sequences = &self.sequences;
        match closed {
            [] => return,
            [one] => {
                if let Some(at) = self.open.iter().position(|slot| *slot == one.slot) {
                    self.open.remove(at);
                }
            }
            _ => self.open.retain(|slot| sequences[*slot as usize].sequence.is_some()),
        }
        if std::mem::take(&mut self.forgets_plans) {
            let is_open = |id: SequenceId| {
                let slot = &sequences[id.slot as usize];
                slot.generation == id.generation && slot.sequence.is_some()
            };
            self.planned.retain(|(planned, _)| is_open(*planned));
        }
    }

    /// Gives back everything of a sequence but its pages and their table, and its digest blocks.
    fn give_up(&mut self, sequence: Sequence) {
        if let (Some(slot), Some(graph)) = (sequence.graph, &mut self.graph) {
            graph.close(slot);
        }
        for region in [sequence.observation, sequence.marks, sequence.slots].into_iter().flatten() {
            self.meta.release(region);
        }
        for mut layer in sequence.residency {
            self.clear_slots(&mut layer);
        }
        for set in sequence.digests {
            self.release_digests(&set);
        }
    }
}

/// Entries of a sequence's table that may hold pages.
fn pages_of(sequence: &Sequence, heads: usize) -> impl Iterator<Item = usize> + use<> {
    let (pages, capacity) = (sequence.pages, sequence.capacity);
    (0..heads).flat_map(move |head| (0..pages).map(move |page| head * capacity + page))
}
