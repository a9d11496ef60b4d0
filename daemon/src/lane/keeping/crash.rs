//! A session's pages over many ends of its daemon, at any moment between two of its steps: what the journal, the log of frames, the extents and
//! the disk say together is what was promised.
//!
//! Steps are those of a lane, by chance: requests that read pages, pages that are written and leave, appends, and control messages, each covered
//! before and after. Rows are marked at both ends of their page. After each end the model is made again of what is left, and every
//! row that was covered is looked at; what the client was told of and has not let go of stays as it is while the next daemon works.

mod daemon;

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;
use std::time::{Duration, Instant};

use kvoyant_protocol::control::{PageWord, SelectedBy, ToDaemon};
use kvoyant_protocol::wire::SequenceId;

use self::daemon::{Daemon, Place};
use crate::keep::Keep;
use crate::lane::select::Answer;
use crate::lane::spill::Before;
use crate::tiers::nvme::EngineChoice;

const SESSION: u64 = 7;
const LAYERS: usize = 2;
const KV_HEADS: usize = 2;
/// Pages of 256 KiB: 256 of an extent, of which there is one.
const ROWS: usize = 1024;
const ROW_BYTES: usize = 256;
const SEQUENCES: usize = 6;
/// Steps of a daemon, at most.
const STEPS: u64 = 60;
const PATIENCE: Duration = Duration::from_secs(30);

/// Marks at both ends of each page, `[head][page]`, and the rows that there are.
#[derive(Debug, Clone, Default)]
struct Rows {
    len: usize,
    marks: Vec<Vec<[u64; 2]>>,
}

/// An answer that its client has not let go of: frames, and what is in them.
struct Told {
    ticket: u64,
    sequence: SequenceId,
    frames: Vec<(u32, [u64; 2])>,
}

struct World {
    place: Place,
    daemon: Option<Daemon>,
    rows: BTreeMap<SequenceId, Rows>,
    /// As of the last seal.
    sealed: BTreeMap<SequenceId, Rows>,
    told: Vec<Told>,
    ticket: u64,
    random: u64,
    /// Whether the daemon ends now.
    dies: bool,
    /// What has happened, to see that it has.
    seen: BTreeMap<&'static str, u64>,
}

impl World {
    fn new(seed: u64) -> Self {
        let mut world = Self {
            place: Place {
                folder: tempfile::tempdir().unwrap(),
                keep: Arc::new(Keep::new(None)),
                engine: if seed.is_multiple_of(2) { EngineChoice::Auto } else { EngineChoice::Psync },
            },
            daemon: None,
            rows: BTreeMap::new(),
            sealed: BTreeMap::new(),
            told: Vec::new(),
            ticket: 0,
            random: seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1,
            dies: false,
            seen: BTreeMap::new(),
        };
        world.daemon = Some(Daemon::new(&world.place));
        world.cover();
        world
    }

    fn below(&mut self, end: u64) -> u64 {
        self.random ^= self.random << 13;
        self.random ^= self.random >> 7;
        self.random ^= self.random << 17;
        self.random % end.max(1)
    }

    fn saw(&mut self, what: &'static str) {
        *self.seen.entry(what).or_default() += 1;
    }

    fn daemon(&mut self) -> &mut Daemon {
        self.daemon.as_mut().unwrap()
    }

    fn any(&mut self) -> Option<SequenceId> {
        let all: Vec<_> = self.rows.keys().copied().collect();
        let at = self.below(all.len() as u64) as usize;
        all.get(at).copied()
    }

    fn cover(&mut self) {
        let ticket = self.ticket;
        let daemon = self.daemon();
        let (model, progress) = (&mut daemon.model, &mut daemon.progress);
        (progress.tickets, progress.seeds) = (ticket, model.seeds);
        progress.open.clone_from(&model.open);
        daemon.keeping.write(model, progress).unwrap();
        model.pages_covered();
        self.sealed.clone_from(&self.rows);
    }

    /// What comes before a control message is covered, then pages are brought or have left that it needs.
    fn begins(&mut self, message: &ToDaemon) {
        let since = Instant::now();
        loop {
            self.cover();
            let before = self.daemon().model.before_control(message);
            if before == Before::Ready {
                break;
            }
            self.daemon().take_ended(u64::MAX);
            assert!(since.elapsed() < PATIENCE, "{message:?} waits for ever");
        }
        let daemon = self.daemon();
        let extents = daemon.model.missing_extents(message);
        if extents > 0 {
            let supply = daemon.pool.request(1, extents).unwrap().blocking_recv().unwrap().unwrap();
            daemon.model.arena.add(supply);
        }
    }

    /// It is done; others' requests may be handled before that is covered, and the daemon may end.
    fn ends(&mut self) {
        for _ in 0..self.below(3) {
            self.ask();
            self.release();
            self.daemon().model.evict(None, 0);
            self.daemon().quiet();
        }
        if self.below(3) == 0 {
            // Whatever is free is filled.
            let all: Vec<_> = self.rows.iter().map(|(id, rows)| (*id, rows.len / ROWS)).collect();
            for (id, pages) in all {
                (0..LAYERS).for_each(|layer| self.ask_for(id, layer, 0..pages));
            }
        }
        self.dies = self.below(5) == 0;
        if !self.dies {
            self.cover();
        }
    }

    /// A client does not close, cut or write what it reads.
    fn reads_no_more(&mut self, id: SequenceId) {
        self.told.retain(|told| told.sequence != id);
    }

    fn open(&mut self) {
        let message = ToDaemon::Open { method: 0, tokens: 0, by: SelectedBy::Lane };
        self.begins(&message);
        if let Ok(id) = self.daemon().model.open(0, 0, SelectedBy::Lane) {
            self.rows.insert(id, Rows { len: 0, marks: vec![Vec::new(); LAYERS * KV_HEADS] });
        }
        self.ends();
    }

    /// Room for some more pages, which are filled and appended, a part of them before anybody covers that.
    fn grow(&mut self, id: SequenceId) {
        let len = self.rows[&id].len;
        if !len.is_multiple_of(ROWS) {
            self.reads_no_more(id);
        }
        let end = (len / ROWS + 1 + self.below(4) as usize) * ROWS;
        let message = ToDaemon::Reserve { sequences: vec![(id, end as u32)] };
        self.begins(&message);
        if self.daemon().model.reserve(&[(id, end as u32)]).is_err() {
            self.saw("refused");
            return self.ends();
        }
        self.ends();
        if self.dies {
            return;
        }
        let first = self.below(u64::MAX);
        for head in 0..LAYERS * KV_HEADS {
            for page in len / ROWS..end / ROWS {
                let daemon = self.daemon.as_mut().unwrap();
                let PageWord::Page(frame) = daemon.word(id, head, page) else { panic!("no room after all") };
                let mark = first.wrapping_add((head * 1000 + page) as u64) | 1;
                let (extent, offset) = daemon.model.arena.geometry().locate(frame * ROWS as u32);
                let memory = Arc::clone(daemon.model.arena.memory(extent));
                let marks = &mut self.rows.get_mut(&id).unwrap().marks[head];
                marks.resize(marks.len().max(page + 1), [0; 2]);
                // Of a page that was cut, what was before the cut stays.
                if page * ROWS >= len {
                    memory.store_u64(offset, mark);
                    marks[page][0] = mark;
                }
                memory.store_u64(offset + (ROWS - 1) * ROW_BYTES, !mark);
                marks[page][1] = !mark;
            }
        }
        let sequence = self.daemon().model.sequence_mut(id).unwrap();
        sequence.lens.fill(end as u32);
        self.daemon().model.touched.mark(id.slot as usize);
        self.rows.get_mut(&id).unwrap().len = end;
        if self.below(2) == 0 {
            self.cover();
        }
    }

    fn fork(&mut self, parent: SequenceId) {
        let message = ToDaemon::Fork { parent, method: None, by: SelectedBy::Lane };
        self.begins(&message);
        if let Ok(id) = self.daemon().model.fork(parent, None, SelectedBy::Lane) {
            let rows = self.rows[&parent].clone();
            self.rows.insert(id, rows);
            self.saw("forked");
        }
        self.ends();
    }

    fn cut(&mut self, id: SequenceId) {
        let len = self.rows[&id].len;
        // In the middle of a page, more often than not.
        let tokens =
            (len / ROWS).saturating_sub(1 + self.below(6) as usize) * ROWS + self.below(3) as usize * 300;
        if tokens == 0 || tokens >= len {
            return;
        }
        self.reads_no_more(id);
        let message = ToDaemon::Truncate { sequence: id, tokens: tokens as u32 };
        self.begins(&message);
        let released = self.daemon().progress.released_through;
        if self.daemon().model.truncate(id, tokens as u32, released).is_ok() {
            let rows = self.rows.get_mut(&id).unwrap();
            rows.len = tokens;
            rows.marks.iter_mut().for_each(|marks| marks.truncate(tokens.div_ceil(ROWS)));
            self.saw("cut");
        }
        self.ends();
    }

    fn close(&mut self, id: SequenceId) {
        self.reads_no_more(id);
        self.begins(&ToDaemon::Close { sequences: vec![id] });
        self.daemon().model.close(id).unwrap();
        self.rows.remove(&id);
        self.ends();
    }

    /// A request that names pages, some of which have to come.
    fn ask(&mut self) {
        let Some(id) = self.any() else { return };
        let (pages, layer) = (self.rows[&id].len / ROWS, self.below(LAYERS as u64) as usize);
        let first = self.below(pages as u64) as usize;
        let end = (first + 1 + self.below(3) as usize).min(pages);
        self.ask_for(id, layer, first..end);
    }

    fn ask_for(&mut self, id: SequenceId, layer: usize, pages: Range<usize>) {
        let key = self.ticket + 1;
        let mut answer = Answer { key, ..Answer::default() };
        let daemon = self.daemon();
        daemon.model.spill.as_mut().unwrap().hold(id, layer);
        let named = daemon.model.fetch_layer(id, layer, pages.clone(), &mut answer);
        daemon.model.wait_for_pages(key, &answer.reads);
        daemon.quiet();
        if named.is_ok() {
            daemon.model.sequence_mut(id).unwrap().residency[layer].last_ticket = key;
            daemon.model.about_to_answer(key);
            let heads = layer * KV_HEADS..(layer + 1) * KV_HEADS;
            let all = heads.flat_map(|head| pages.clone().map(move |page| (head, page)));
            let frames: Vec<_> = all
                .map(|(head, page)| match daemon.word(id, head, page) {
                    PageWord::Page(frame) => (frame, daemon.marks(frame)),
                    word => panic!("{word:?} was named"),
                })
                .collect();
            self.ticket = key;
            self.told.push(Told { ticket: key, sequence: id, frames });
            self.saw(if answer.reads.is_empty() { "found in memory" } else { "read from disk" });
        } else {
            self.saw("no frame");
        }
        let daemon = self.daemon();
        daemon.model.after_request();
        daemon.model.keep_within();
        daemon.model.submit_pages();
    }

    /// The client lets go of its answers, but for the last ones.
    fn release(&mut self) {
        let through = self.ticket.saturating_sub(self.below(3));
        self.told.retain(|told| told.ticket > through);
        let daemon = self.daemon();
        daemon.progress.released_through = daemon.progress.released_through.max(through);
        let through = daemon.progress.released_through;
        daemon.model.settle(through);
    }

    fn of_any(&mut self, what: fn(&mut Self, SequenceId)) {
        if let Some(id) = self.any() {
            what(self, id);
        }
    }

    fn step(&mut self) {
        match self.below(14) {
            0 if self.rows.len() < SEQUENCES => self.open(),
            1..=3 => self.of_any(Self::grow),
            4 if self.rows.len() < SEQUENCES => self.of_any(Self::fork),
            5 => self.of_any(Self::cut),
            6 if self.rows.len() > 2 => self.of_any(Self::close),
            7 => {
                self.daemon().model.evict(None, 0);
                self.daemon().model.submit_pages();
            }
            8 => self.release(),
            9 => self.cover(),
            10 => {
                let most = self.below(4);
                self.daemon().take_ended(most);
            }
            _ => self.ask(),
        }
    }

    /// What the client was told of is as it was.
    fn look_at_told(&self) {
        let daemon = self.daemon.as_ref().unwrap();
        for told in &self.told {
            for (frame, marks) in &told.frames {
                assert_eq!(daemon.marks(*frame), *marks, "ticket {}, frame {frame}", told.ticket);
            }
        }
    }

    /// What was covered is there, and nothing else.
    fn look_at_rows(&self) {
        let daemon = self.daemon.as_ref().unwrap();
        let open: Vec<_> = daemon.model.open_handles().collect();
        assert_eq!(open.len(), self.rows.len());
        for (id, rows) in &self.rows {
            let sequence = daemon.model.sequence(*id).unwrap();
            assert_eq!(sequence.lens, vec![rows.len as u32; LAYERS], "{id}");
            for (head, marks) in rows.marks.iter().enumerate() {
                for (page, marks) in marks.iter().enumerate().filter(|(page, _)| page * ROWS < rows.len) {
                    let found = daemon.read(*id, head, page);
                    assert_eq!(found[0], marks[0], "{id}, head {head}, page {page}: its first row");
                    if (page + 1) * ROWS <= rows.len {
                        assert_eq!(found[1], marks[1], "{id}, head {head}, page {page}: its last row");
                    }
                }
            }
        }
    }

    /// The daemon ends now, and another one goes on.
    fn crash(&mut self) {
        let daemon = self.daemon.take().unwrap();
        // Nothing is given back, wiped or erased by who is dead. What is under way in the kernel ends some time.
        daemon.pool.leave();
        daemon.spill.leave();
        drop(daemon);
        // What was not covered is asked for again: here it has never been.
        self.rows.clone_from(&self.sealed);
        let next = Daemon::again(&self.place);
        self.ticket = self.ticket.max(next.progress.tickets);
        self.daemon = Some(next);
        self.look_at_rows();
        self.look_at_told();
        // Its first seal is of everything.
        self.cover();
    }
}

#[test]
fn what_was_covered_is_there_after_every_end_and_what_is_being_read_stays() {
    let mut seen: BTreeMap<&'static str, u64> = BTreeMap::new();
    for seed in 0..12 {
        let mut world = World::new(seed);
        for _ in 0..12 {
            let steps = world.below(STEPS);
            for _ in 0..steps {
                world.step();
                world.look_at_told();
                if std::mem::take(&mut world.dies) {
                    break;
                }
            }
            world.crash();
            world.saw("ended");
        }
        world.daemon().quiet();
        world.look_at_rows();
        for (what, count) in &world.seen {
            *seen.entry(what).or_default() += count;
        }
        let state = world.daemon().model.spill.as_ref().unwrap();
        *seen.entry("on disk alone").or_default() += state.pages()[0] as u64;
    }
    for what in ["read from disk", "found in memory", "forked", "cut", "on disk alone", "ended"] {
        assert!(seen.get(what).is_some_and(|count| *count > 10), "{what}: {seen:?}");
    }
}
