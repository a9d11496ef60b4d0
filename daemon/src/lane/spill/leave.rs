//! Which pages leave host memory: a clock over the frames.
//!
//! A page that selections use gets up to three chances, one for each time it was used; what is read for a layer as a whole
//! gets none. So what leaves first is what nobody selects, and streams of dense layers do not push out what others select.

use kvoyant_protocol::control::{PageWord, SPILLED, SelectedBy};
use kvoyant_protocol::wire::SequenceId;

use super::{Content, Frame, Io, NO_SLOT, SpillState};
use crate::lane::model::ModelState;
use crate::lane::sequences::Sequence;
use crate::tiers::heap::Region;
use crate::tiers::nvme::{Direction, GROUP_PAGES, Job};

/// The part of the frames that could be had which is kept free for pages that come back, as a divisor.
const RESERVE: usize = 16;

/// Frames that are looked at in one go, for each one that has to be freed and at least.
const LOOKS_EACH: usize = 8;
const LOOKS_LEAST: usize = 64;
const LOOKS_MOST: usize = 4096;

/// Pages that the disk may refuse in one go: where it is full, the others would be refused too.
const REFUSED_MOST: usize = 256;

/// Sequences that are compared with shared frames in one go.
const COMPARED_MOST: usize = 1 << 16;

/// Frames that are passed over for an operator before others have their turn.
const EVICTED_AT_ONCE: usize = 1 << 15;

/// What has left because an operator wants it.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub struct Evicted {
    /// Pages that are on disk alone now.
    pub pages: u64,
    /// Extents that were given back.
    pub extents: u64,
    /// Where to go on, if that was not all.
    pub next: Option<usize>,
    /// Whether pages are being written, which may leave then.
    pub writing: bool,
}

/// What has come of passing over a frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Passed {
    /// Its page is on disk alone now.
    Left,
    /// It is nearer to that: it is being written, or has a chance less.
    Nearer,
    /// The disk has no room for it.
    Refused,
    /// Nothing: it stays.
    Nothing,
}

/// Whether a page of a sequence may be written, or leave.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Step {
    Write,
    Leave,
}

impl ModelState {
    /// The tables of the open sequences that have a frame's page.
    pub(super) fn owners(&self, frame: u32, Frame { head, page, sequence, .. }: Frame) -> Vec<SequenceId> {
        let has = |id: &SequenceId| {
            self.sequence(*id).is_ok_and(|sequence| {
                (page as usize) < sequence.capacity
                    && self.tables.word(sequence.table, head as usize * sequence.capacity + page as usize)
                        == frame
            })
        };
        if !self.arena.is_shared(frame) {
            let generation = self.sequences.get(sequence as usize).map_or(0, |slot| slot.generation);
            let id = SequenceId { slot: sequence, generation };
            if has(&id) {
                return vec![id];
            }
            return self.open_handles().find(has).into_iter().collect();
        }
        self.open_handles().filter(has).collect()
    }

    fn lets(&self, step: Step, sequence: &Sequence, id: SequenceId, frame: Frame) -> bool {
        let rows = self.shape.page_rows;
        let layer = frame.head as usize / self.shape.kv_heads;
        let (first, end) = (frame.page as usize * rows, (frame.page as usize + 1) * rows);
        let len = sequence.lens[layer] as usize;
        let stays = sequence.by == SelectedBy::Client || sequence.graph.is_some();
        if stays || first < self.shape.sinks || end + self.shape.window > len {
            return false;
        }
        if step == Step::Write {
            return true;
        }
        let Some(state) = &self.spill else { return false };
        let slots = &sequence.residency[layer];
        end + self.shape.window + rows <= len
            && state.wary.is_none()
            && slots.last_ticket <= state.released_through
            && slots.background.is_none()
            && !self.behind.holds(id, layer)
            && !state.held.contains(&(id, layer))
            && !state.kept.as_ref().is_some_and(|(kept, layers)| *kept == id && layers.contains(&layer))
    }

    /// Whether the sequence that a frame's page came with has it still, and keeps it where it is: then no other has to be asked.
    fn first_refuses(&self, step: Step, at: u32, frame: Frame) -> bool {
        let generation = self.sequences.get(frame.sequence as usize).map_or(0, |slot| slot.generation);
        let id = SequenceId { slot: frame.sequence, generation };
        self.sequence(id).is_ok_and(|sequence| {
            (frame.page as usize) < sequence.capacity
                && self
                    .tables
                    .word(sequence.table, frame.head as usize * sequence.capacity + frame.page as usize)
                    == at
                && !self.lets(step, sequence, id, frame)
        })
    }

    fn all_let(&self, step: Step, owners: &[SequenceId], frame: Frame) -> bool {
        !owners.is_empty()
            && owners
                .iter()
                .all(|id| self.sequence(*id).is_ok_and(|sequence| self.lets(step, sequence, *id, frame)))
    }

    /// Frames that have to be freed: those beyond the share of pages that may be in host memory once there are `more` pages, and
    /// those that are missing from the reserve.
    fn over(&self, more: usize) -> usize {
        let Some(state) = &self.spill else { return 0 };
        let used = self.arena.used_pages() + more;
        let pages = used + state.spilled;
        let share = (pages as f64 * state.host_share).ceil() as usize;
        let obtainable = self.arena.obtainable_pages();
        let reserve = (self.arena.used_pages() + obtainable) / RESERVE;
        used.saturating_sub(share).max((reserve + more).saturating_sub(obtainable))
    }

    /// Keeps the session within its share of host memory, as far as that is a matter of a moment.
    pub(crate) fn keep_within(&mut self) {
        let over = self.over(0);
        if over > 0 && self.spill.as_ref().is_some_and(|state| !state.stuck) {
            self.sweep(over, (over * LOOKS_EACH).clamp(LOOKS_LEAST, LOOKS_MOST));
        }
    }

    /// Frees frames until `more` pages can be had within the session's share, or nothing can leave; false if something may leave
    /// once operations that are under way have ended.
    pub(crate) fn make_frames(&mut self, more: usize) -> bool {
        let over = self.over(more);
        if over == 0 {
            return true;
        }
        let freed = self.sweep_all(over);
        freed >= over || !self.spill.as_ref().is_some_and(SpillState::is_writing)
    }

    /// Passes over every frame as often as it has chances, if anything has changed since that was in vain.
    pub(super) fn sweep_all(&mut self, wanted: usize) -> usize {
        let Some(state) = self.spill.as_ref().filter(|state| !state.stuck) else { return 0 };
        // Every frame has three chances at most.
        let looks = 4 * state.frames.len();
        self.sweep(wanted, looks)
    }

    /// Passes over up to `looks` frames: has full pages written, and lets those leave that are on disk, until `wanted` have left.
    fn sweep(&mut self, wanted: usize, looks: usize) -> usize {
        let (mut freed, mut compared, mut refused, mut idle) = (0, 0, 0, 0);
        for _ in 0..looks {
            let Some(state) = &mut self.spill else { break };
            // A whole turn that has come to nothing would come to nothing again.
            if freed >= wanted || compared > COMPARED_MOST || idle >= state.frames.len() {
                break;
            }
            state.hand = (state.hand + 1) % state.frames.len();
            state.vain += 1;
            let (at, writes) = (state.hand as u32, refused < REFUSED_MOST);
            match self.pass(at, None, writes, &mut compared) {
                Passed::Left => {
                    (freed, idle) = (freed + 1, 0);
                    if let Some(state) = &mut self.spill {
                        state.vain = 0;
                    }
                }
                Passed::Nearer => idle = 0,
                Passed::Refused => (refused, idle) = (refused + 1, idle + 1),
                Passed::Nothing => idle += 1,
            }
        }
        if let Some(state) = &mut self.spill {
            // Every frame has three chances at most.
            state.stuck = state.vain > 4 * state.frames.len();
        }
        freed
    }

    /// Passes over a frame, of a sequence if one is named: has a full page written, if there are to be `writes`, or lets one leave that is on
    /// disk.
    fn pass(&mut self, at: u32, only: Option<SequenceId>, writes: bool, compared: &mut usize) -> Passed {
        let Some(state) = &self.spill else { return Passed::Nothing };
        let Some(frame) = state.frames.get(at as usize).copied() else { return Passed::Nothing };
        if frame.content == Content::Written {
            self.wants_cover();
            return Passed::Nothing;
        }
        if !matches!(frame.content, Content::Dirty | Content::Clean)
            || frame.content == Content::Dirty && !(writes && state.takes_writes())
        {
            return Passed::Nothing;
        }
        let shared = self.arena.is_shared(at);
        if shared && frame.content == Content::Clean && frame.chances > 0 {
            // Before anybody is compared: there may be a thousand.
            if let Some(state) = &mut self.spill {
                state.frames[at as usize].chances -= 1;
            }
            return Passed::Nearer;
        }
        let step = if frame.content == Content::Dirty { Step::Write } else { Step::Leave };
        if shared && self.first_refuses(step, at, frame) {
            return Passed::Nothing;
        }
        let owners = self.owners(at, frame);
        if shared || owners.first().is_none_or(|owner| owner.slot != frame.sequence) {
            *compared += self.open.len();
        }
        if let Some(owner) = owners.first().filter(|_| !shared)
            && let Some(state) = &mut self.spill
        {
            // The one that it came with has gone, and it is looked for once.
            state.frames[at as usize].sequence = owner.slot;
        }
        if only.is_some_and(|only| !owners.contains(&only)) {
            return Passed::Nothing;
        }
        if frame.content == Content::Dirty {
            return match self.all_let(Step::Write, &owners, frame) {
                true if self.write_page(at, frame, &owners) => Passed::Nearer,
                true => Passed::Refused,
                false => Passed::Nothing,
            };
        }
        if !self.all_let(Step::Leave, &owners, frame) {
            return Passed::Nothing;
        }
        let on_disk = self.have_slots(&owners, frame);
        let Some(state) = &mut self.spill else { return Passed::Nothing };
        if !on_disk {
            // Somebody cut it while it was shared, and has it alone now: it is not what was written.
            state.frames[at as usize].content = Content::Dirty;
            return Passed::Nearer;
        }
        if frame.chances > 0 {
            state.frames[at as usize].chances -= 1;
            return Passed::Nearer;
        }
        state.spilled += 1;
        for id in owners {
            let Ok(sequence) = self.sequence(id) else { continue };
            let index = frame.head as usize * sequence.capacity + frame.page as usize;
            self.tables.set_word(sequence.table, index, SPILLED);
            self.release_frame(at);
        }
        Passed::Left
    }

    /// Has frames leave from one on, of a sequence if one is named, however often they were used. What is not on disk yet is written first.
    pub(crate) fn evict(&mut self, only: Option<SequenceId>, from: usize) -> Evicted {
        let mut evicted = Evicted::default();
        let Some(state) = &mut self.spill else { return evicted };
        state.changed();
        let end = state.frames.len().min(from + EVICTED_AT_ONCE);
        for at in from..end {
            if let Some(state) = &mut self.spill {
                state.frames[at].chances = 0;
            }
            evicted.pages += u64::from(self.pass(at as u32, only, true, &mut 0) == Passed::Left);
        }
        evicted.next = self.spill.as_ref().filter(|state| end < state.frames.len()).map(|_| end);
        evicted.writing = self.spill.as_ref().is_some_and(|state| state.is_writing() || state.awaits_cover());
        evicted
    }

    /// Whether all owners of a page know where it lies on disk.
    fn have_slots(&self, owners: &[SequenceId], frame: Frame) -> bool {
        owners.iter().all(|id| {
            self.sequence(*id).is_ok_and(|sequence| {
                let index = frame.head as usize * sequence.capacity + frame.page as usize;
                sequence.slots.is_some_and(|slots| self.slot_at(slots, index) != NO_SLOT)
            })
        })
    }

    /// Has a page written to a slot; false if there is none.
    fn write_page(&mut self, at: u32, frame: Frame, owners: &[SequenceId]) -> bool {
        let (head, page) = (frame.head as usize, frame.page as usize);
        let tables: Vec<(Region, usize, usize)> = owners
            .iter()
            .filter_map(|id| self.sequence(*id).ok())
            .filter_map(|sequence| Some((sequence.slots?, head * sequence.capacity, sequence.capacity)))
            .collect();
        let Some((table, base, capacity)) = tables.first().copied() else { return false };
        let group = page / GROUP_PAGES * GROUP_PAGES;
        let sibling = (group..(group + GROUP_PAGES).min(capacity))
            .map(|page| self.slot_at(table, base + page))
            .find(|slot| *slot != NO_SLOT);
        let (extent, offset) = self.arena.geometry().locate(at * self.shape.page_rows as u32);
        let Some(state) = &mut self.spill else { return false };
        let Some(report) = &state.report else { return false };
        let report = std::sync::Arc::clone(report);
        let slot = match state.slots.assign(page, sibling, head + page / GROUP_PAGES) {
            Ok(slot) => slot,
            Err(full) => {
                if !std::mem::replace(&mut state.said_full, true) {
                    match state.slots.refused() {
                        Some(over) => {
                            tracing::info!(session = state.session, "pages stay in host memory: {over}");
                        }
                        None => tracing::warn!(session = state.session, "pages stay in host memory: {full}"),
                    }
                }
                return false;
            }
        };
        // One for each owner, and one for the operation.
        tables.iter().for_each(|_| state.slots.share(slot));
        let token = state.operation();
        state.frames[at as usize].content = Content::Writing(token);
        state.ios.insert(token, Io::Write { frame: at, slot });
        state.jobs.push(Job {
            direction: Direction::Write,
            slot: state.slots.slot(slot),
            memory: std::sync::Arc::clone(self.arena.memory(extent)),
            offset,
            deadline_ns: 0,
            session: state.session,
            token,
            report,
        });
        for (table, base, _) in tables {
            // Whoever still knows another place lets go of that.
            self.drop_slot(table, base + page);
            self.set_slot(table, base + page, slot);
        }
        true
    }

    /// A page has been written, or could not be.
    pub(super) fn page_written(&mut self, token: u64, frame: u32, slot: u32, failed: bool) {
        let Some(state) = &mut self.spill else { return };
        state.changed();
        state.slots.release(slot);
        let found = state.frames.get(frame as usize).copied();
        let Some(found) = found.filter(|frame| frame.content == Content::Writing(token)) else { return };
        if !failed {
            state.counts.written += 1;
            self.page_is_on_disk(frame, slot);
            return;
        }
        state.frames[frame as usize].content = Content::Dirty;
        for id in self.owners(frame, found) {
            let Ok(sequence) = self.sequence(id) else { continue };
            let (slots, index) =
                (sequence.slots, found.head as usize * sequence.capacity + found.page as usize);
            if let Some(slots) = slots.filter(|slots| self.slot_at(*slots, index) == slot) {
                self.drop_slot(slots, index);
            }
        }
    }

    /// Whether every page of a sequence is in host memory, or gone for good.
    pub(crate) fn is_whole(&self, sequence: &Sequence) -> bool {
        let words = self.heads() * sequence.capacity;
        let away = |word| matches!(self.page_word(sequence.table, word), PageWord::Spilled | PageWord::Lost);
        self.spill.is_none() || !(0..words).any(away)
    }
}

impl SpillState {
    fn takes_writes(&self) -> bool {
        self.report.is_some() && !self.spill.is_failed()
    }

    fn is_writing(&self) -> bool {
        self.ios.values().any(|io| matches!(io, Io::Write { .. }))
    }
}
