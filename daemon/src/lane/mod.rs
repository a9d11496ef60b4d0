//! Lanes: threads that validate, select, plan, hand over to the device and report.
//!
//! A session belongs to one lane for its life, with everything that is its own, so a lane takes no locks. It polls
//! the request rings of its sessions, its queue of commands from the control plane and its queue of ended
//! transfers; when all are empty it polls a little longer, then sleeps on all of them at once.

mod ages;
mod asked;
pub mod background;
mod bomb;
mod check;
mod close;
pub mod digests;
mod ending;
pub mod error;
pub mod graph;
pub mod images;
pub mod keeping;
pub mod kept;
mod link;
pub mod list;
pub mod mailbox;
pub mod model;
mod naps;
mod parked;
mod place;
mod reaper;
mod rest;
mod room;
pub mod select;
pub mod sequences;
pub mod session;
pub mod spill;
#[cfg(test)]
mod tests;
mod turns;
mod yields;

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crossbeam::channel::{Receiver, Sender, unbounded};
use kvoyant_protocol::control::{Failure, ToClient, ToDaemon};
use kvoyant_protocol::faults::{self, Point};
use kvoyant_protocol::futex::{Bell, Word, publish_before_looking, spin, wait_any};
use kvoyant_protocol::memory::MemoryError;
use kvoyant_protocol::wire::SequenceId;
use tokio::sync::oneshot;

pub use self::asked::Asked;
pub(crate) use self::bomb::Bomb;
pub use self::ending::{Ending, Over};
use crate::device::{Device, Report};
use crate::lane::error::SessionError;
use crate::lane::images::{ImageOutcome, ImageRequest};
use crate::lane::keeping::Keeping;
use crate::lane::list::{Looks, OpenSequence};
use crate::lane::model::{Announcement, ModelState};
use crate::lane::naps::Naps;
use crate::lane::reaper::Reaper;
use crate::lane::session::{LaneSession, Tools};
use crate::lane::spill::Evicted;
use crate::lane::turns::{Seat, Turns};
use crate::notify::Pulse;
use crate::tiers::nvme::SpillReport;
use crate::tiers::pool::Supply;

/// Requests of one session that a lane handles before it looks at the next one.
const FAIR_SHARE: u32 = 32;

/// Commands of the control plane that a lane does before it looks at its rings again.
const COMMANDS_AT_ONCE: usize = 8;

/// How often a lane that never sleeps writes what others may read of its sessions, a piece at a time.
const REFRESH_EVERY: Duration = Duration::from_millis(10);

/// How long a lane sleeps at most, so that a lost wake-up could only ever cost this much.
const SLEEP_MAX: Duration = Duration::from_millis(100);

/// An answer to a control request.
#[derive(Debug)]
pub struct Reply {
    /// New memory, to be sent first.
    pub announcements: Vec<Announcement>,
    /// The answer.
    pub message: ToClient,
    /// Descriptors that go with the answer.
    pub fds: Vec<OwnedFd>,
}

impl Reply {
    /// An answer with nothing beside it.
    #[must_use]
    pub fn plain(message: ToClient) -> Self {
        Self { announcements: Vec::new(), message, fds: Vec::new() }
    }
}

/// What a lane makes of a control request.
#[derive(Debug)]
pub enum Outcome {
    /// It is done, or refused.
    Answered(Reply),
    /// The session needs more extents first. Nothing was done: the request is to be repeated after a
    /// [`Command::Supply`].
    Needs {
        /// How many.
        extents: usize,
        /// The request.
        message: ToDaemon,
    },
    /// It was about an image.
    Image(ImageOutcome),
    /// Pages have to come or go first. The lane does the request itself then; nobody else gets to see this.
    Later(Asked),
    /// A part is done, and the rest is in the session's next turn. Nobody else gets to see this either.
    GoesOn(Asked),
}

/// From the control plane to a lane.
#[derive(Debug)]
pub enum Command {
    /// Serve this session.
    Attach(Box<LaneSession>, Arc<Ending>),
    /// Its model is built; and what it leaves to the next daemon, if it is to.
    Register(u64, Box<ModelState>, Option<Box<Keeping>>, oneshot::Sender<Reply>),
    /// A session that another daemon has left has its client back.
    Resume(u64, Box<Keeping>, oneshot::Sender<Result<Vec<Announcement>, MemoryError>>),
    /// That client knows all that it has to: nobody else can have the session's memory mapped from here on.
    Claimed(u64),
    /// What was asked of a session has been done, with this answer for its client if it came from there. Answered once that is kept.
    Settle(u64, Option<Vec<u8>>, oneshot::Sender<()>),
    /// Something about sequences.
    Control(u64, Asked, oneshot::Sender<Outcome>),
    /// Extents that it needs.
    Supply(u64, Supply),
    /// Another user needs host memory of which they have less than their share: whoever has more is to give back extents in which nothing is.
    /// Answered with how many there were.
    Yield(u32, oneshot::Sender<usize>),
    /// An operator wants pages of a session on disk, from a frame on: of a sequence, or of all.
    Evict(u64, Option<SequenceId>, usize, oneshot::Sender<Result<Evicted, Failure>>),
    /// Which sequences are open, in all of its sessions.
    List(oneshot::Sender<Vec<OpenSequence>>),
    /// Nothing but a sign of life.
    Ping(oneshot::Sender<()>),
    /// The client is gone. Answered once all its memory has been given back.
    Detach(u64, oneshot::Sender<()>),
    /// End the lane once every session's transfers have ended.
    Stop,
}

/// A running lane, from outside.
#[derive(Debug)]
pub struct LaneHandle {
    commands: Sender<Command>,
    bell: Arc<Bell>,
    pulse: Arc<Pulse>,
    thread: Option<JoinHandle<()>>,
}

impl LaneHandle {
    /// Starts a lane; `cpu` pins it to a core.
    pub fn start(
        index: usize,
        cpu: Option<usize>,
        spin_for: Duration,
        device: Arc<dyn Device>,
    ) -> std::io::Result<Self> {
        let (commands, inbox) = unbounded();
        let bell = Arc::new(Bell::default());
        let report = Arc::new(Report::new(Arc::clone(&bell)));
        let pages = Arc::new(SpillReport::new(Arc::clone(&bell)));
        let reaper = Reaper::start(index)?;
        let (sessions, turns) = (Vec::new(), Turns::default());
        let pulse = Arc::new(Pulse::default());
        let (its_bell, its_pulse) = (Arc::clone(&bell), Arc::clone(&pulse));
        let lane = Lane {
            inbox,
            bell: its_bell,
            pulse: its_pulse,
            report,
            pages,
            device,
            sessions,
            turns,
            reaper,
            spin_for,
            naps: Naps::default(),
            idle: Instant::now(),
            refreshed: Instant::now(),
        };
        let thread = crate::threads::start(format!("lane-{index}"), move || {
            let _bomb = Bomb;
            if let Some(cpu) = cpu {
                pin(cpu);
            }
            lane.run();
        })?;
        Ok(Self { commands, bell, pulse, thread: Some(thread) })
    }

    /// Beats with each of its rounds.
    pub(crate) fn pulse(&self) -> Arc<Pulse> {
        Arc::clone(&self.pulse)
    }

    /// Hands over a command.
    pub fn send(&self, command: Command) {
        // The lane only ends on `Stop`, which is sent last, by `drop`.
        let _ = self.commands.send(command);
        self.bell.ring();
    }
}

impl Drop for LaneHandle {
    fn drop(&mut self) {
        self.send(Command::Stop);
        if let Some(thread) = self.thread.take() {
            // It cannot have panicked: see `Bomb`.
            let _ = thread.join();
        }
    }
}

fn lost(device: &dyn Device) -> bool {
    device.lost().is_some_and(|lost| lost.borrow().is_some())
}

fn pin(cpu: usize) {
    let mut set = nix::sched::CpuSet::new();
    let pinned =
        set.set(cpu).and_then(|()| nix::sched::sched_setaffinity(nix::unistd::Pid::from_raw(0), &set));
    if let Err(error) = pinned {
        tracing::warn!("cannot pin a lane to core {cpu} ({error}); it runs unpinned");
    }
}

#[derive(Debug)]
struct Attached {
    session: Box<LaneSession>,
    ending: Arc<Ending>,
    broken: bool,
    /// A control request that waits for pages to come or go.
    parked: Option<(Asked, oneshot::Sender<Outcome>)>,
    /// Whether all requests before that one are done: those that came since are after it.
    drained: bool,
    /// Whether something has come that it may have waited for.
    retries: bool,
    detaching: Option<oneshot::Sender<()>>,
    /// The last round in which it had something to do.
    last_turn: u64,
}

impl Seat for Attached {
    fn uid(&self) -> u32 {
        self.session.status.uid
    }

    fn last(&self) -> u64 {
        self.last_turn
    }

    fn took(&mut self, round: u64) {
        self.last_turn = round;
    }
}

#[derive(Debug)]
struct Lane {
    inbox: Receiver<Command>,
    bell: Arc<Bell>,
    pulse: Arc<Pulse>,
    report: Arc<Report>,
    pages: Arc<SpillReport>,
    device: Arc<dyn Device>,
    sessions: Vec<Attached>,
    turns: Turns,
    reaper: Reaper,
    spin_for: Duration,
    naps: Naps,
    /// When there was last nothing to do.
    idle: Instant,
    refreshed: Instant,
}

impl Lane {
    fn run(mut self) {
        let mut stopping = false;
        loop {
            self.pulse.beat();
            let rung = self.bell.seen();
            let mut busy = false;
            for _ in 0..COMMANDS_AT_ONCE {
                let Ok(command) = self.inbox.try_recv() else { break };
                busy = true;
                stopping |= matches!(command, Command::Stop);
                self.command(command);
            }
            while let Some(done) = self.report.pop() {
                busy = true;
                if let Some(attached) = self.sessions.iter_mut().find(|a| a.session.id == done.session) {
                    // Of a lost device every session is told by the control plane.
                    let failed = done.failed && done.records.is_none() && !lost(&*self.device);
                    let (ticket, result) = (done.ticket, attached.session.transferred(done));
                    attached.check(result);
                    if failed {
                        attached.check::<()>(Err(SessionError::Transfer { ticket }));
                    }
                }
            }
            let tools = Tools { device: &*self.device, report: &self.report, idle: self.idle };
            while let Some(ended) = self.pages.pop() {
                busy = true;
                if let Some(attached) = self.sessions.iter_mut().find(|a| a.session.id == ended.session) {
                    let result = attached.session.page_ended(&ended, tools);
                    attached.check(result);
                    attached.retries = attached.parked.is_some();
                }
            }
            busy |= self.turns.round(&mut self.sessions, |attached| {
                if attached.broken || attached.detaching.is_some() {
                    // What it has asked is not done any more.
                    if std::mem::take(&mut attached.retries) {
                        attached.parked = None;
                    }
                    return false;
                }
                // What was asked at the control socket comes before further requests, and is a turn like theirs.
                if std::mem::take(&mut attached.retries)
                    && let Some((asked, reply)) = attached.parked.take()
                {
                    attached.control(asked, reply, tools);
                    return true;
                }
                if stopping {
                    return false;
                }
                let result = attached.session.poll(tools, FAIR_SHARE);
                attached.check(result).unwrap_or(false)
            });
            // Those that go on in the middle of their ring have work, whatever else there is.
            busy |= self.sessions.iter().any(|attached| attached.retries);
            for attached in self.sessions.iter_mut().filter(|attached| attached.is_served()) {
                attached.session.cover_if_due(!busy);
            }
            if self.refreshed.elapsed() > REFRESH_EVERY {
                self.refresh();
            }
            let armed = !stopping && self.sessions.iter().any(Attached::is_armed);
            self.reap();
            if stopping && self.sessions.iter().all(|attached| !attached.session.in_transfer()) {
                for attached in self.sessions.iter_mut().filter(|attached| attached.is_served()) {
                    // What its client was told is what the next daemon goes on with.
                    attached.session.cover();
                }
                return;
            }
            if busy {
                self.naps.found();
                continue;
            } else if armed {
                // A write from a GPU wakes nobody, so an armed doorbell is polled.
                std::thread::yield_now();
            } else if self.spin(rung) {
                self.naps.found();
            } else if !self.refresh() {
                self.sleep(rung);
            }
            self.idle = Instant::now();
        }
    }

    fn words(&self) -> impl Iterator<Item = (Word<'_>, u32)> {
        let serving = |attached: &&Attached| {
            !attached.broken && attached.detaching.is_none() && !attached.session.waits_for_pages
        };
        self.sessions.iter().filter(serving).map(|attached| attached.session.word())
    }

    fn anything_new(&self, rung: u32) -> bool {
        self.bell.seen() != rung || self.words().any(|(word, seen)| word.load() != seen)
    }

    fn spin(&self, rung: u32) -> bool {
        spin(self.spin_for, || self.anything_new(rung))
    }

    /// Goes on with what others read of its sessions; true if that was not all.
    fn refresh(&mut self) -> bool {
        self.refreshed = Instant::now();
        self.sessions.iter_mut().fold(false, |more, attached| attached.session.refresh_if_dirty() | more)
    }

    fn sleep(&mut self, rung: u32) {
        for attached in &mut self.sessions {
            attached.session.hear();
        }
        self.bell.say_sleeping(true);
        for attached in &self.sessions {
            attached.session.say_sleeping(true);
        }
        publish_before_looking();
        if !self.anything_new(rung) {
            let words: Vec<_> = self.words().collect();
            // More rings than can be watched at once are looked at every so often.
            let watched = words.len() < kvoyant_protocol::futex::WAIT_ANY_MAX;
            // So are mailboxes: what a GPU writes wakes nobody.
            let watched = watched && !self.sessions.iter().any(|attached| attached.session.listens());
            let timeout = if watched { SLEEP_MAX } else { Duration::from_millis(1) };
            let rings = !words.is_empty();
            if let Err(error) = wait_any((&self.bell, rung), &words, timeout) {
                self.naps.sleep((&self.bell, rung), rings, timeout, &error);
            }
        }
        for attached in &self.sessions {
            attached.session.say_sleeping(false);
        }
        self.bell.say_sleeping(false);
    }

    fn find(&mut self, id: u64) -> Option<&mut Attached> {
        self.sessions.iter_mut().find(|attached| attached.session.id == id)
    }

    fn command(&mut self, command: Command) {
        if faults::fires(Point::Wedge) {
            loop {
                std::thread::park();
            }
        }
        let device = Arc::clone(&self.device);
        let report = Arc::clone(&self.report);
        let tools = Tools { device: &*device, report: &report, idle: self.idle };
        match command {
            Command::Stop => {}
            Command::Attach(mut session, ending) => {
                let id = session.id;
                if let Some(model) = &mut session.model {
                    model.attach_spill(id, &self.pages);
                }
                self.sessions.push(Attached {
                    session,
                    ending,
                    broken: false,
                    parked: None,
                    drained: false,
                    retries: false,
                    detaching: None,
                    last_turn: 0,
                });
            }
            Command::Register(id, mut model, keeping, reply) => {
                model.attach_spill(id, &self.pages);
                if let Some(attached) = self.find(id) {
                    attached.session.status.seen.has_layers(model.shape.layers);
                    attached.session.model = Some(model);
                    if let Some(keeping) = keeping {
                        attached.session.keep(keeping);
                    }
                    let _ = reply.send(Reply::plain(ToClient::Done));
                }
            }
            Command::Control(id, message, reply) => {
                if let Some(attached) = self.find(id) {
                    attached.park(message, reply, tools);
                }
            }
            Command::Resume(id, keeping, reply) => {
                if let Some(attached) = self.find(id) {
                    attached.session.keep(keeping);
                    if let Some(model) = &mut attached.session.model {
                        let _ = reply.send(model.announce());
                    }
                    attached.session.refresh_status();
                }
            }
            Command::Claimed(id) => {
                if let Some(model) = self.find(id).and_then(|attached| attached.session.model.as_mut()) {
                    model.arena.claimed();
                }
            }
            Command::Settle(id, answer, reply) => {
                if let Some(attached) = self.find(id) {
                    attached.session.settles(answer, reply);
                }
            }
            Command::Supply(id, supply) => {
                // Without a session, or a model, it gives itself back.
                if let Some(model) = self.find(id).and_then(|attached| attached.session.model.as_mut()) {
                    model.arena.add(supply);
                }
            }
            Command::Yield(to, reply) => {
                let given = self.sessions.iter_mut().map(|attached| attached.session.yield_extents(to)).sum();
                let _ = reply.send(given);
            }
            Command::Evict(id, sequence, from, reply) => {
                // A session that has ended drops the question.
                if let Some(attached) = self.find(id).filter(|attached| !attached.broken) {
                    let _ = reply.send(attached.session.evict(sequence, from));
                }
            }
            Command::List(reply) => drop(reply.send(self.list())),
            Command::Ping(reply) => drop(reply.send(())),
            Command::Detach(id, done) => {
                if let Some(attached) = self.find(id) {
                    attached.session.hear();
                    attached.session.let_go();
                    attached.detaching = Some(done);
                }
            }
        }
    }

    fn list(&self) -> Vec<OpenSequence> {
        let (mut list, mut looks) = (Vec::new(), Looks::default());
        for attached in self.sessions.iter().filter(|attached| !attached.broken) {
            if let Some(model) = &attached.session.model {
                model.list(attached.session.id, &mut looks, &mut list);
            }
        }
        list
    }

    /// Has sessions taken apart whose client is gone and whose transfers have ended.
    fn reap(&mut self) {
        let gone = |a: &mut Attached| a.detaching.is_some() && !a.session.in_transfer();
        for attached in self.sessions.extract_if(.., gone) {
            self.reaper.take(attached.session, attached.detaching);
        }
    }
}

impl Attached {
    fn is_served(&self) -> bool {
        !self.broken && self.detaching.is_none()
    }

    fn is_armed(&self) -> bool {
        self.session.armed && !self.broken && self.detaching.is_none()
    }

    /// Ends the session on an error.
    fn check<T>(&mut self, result: Result<T, SessionError>) -> Option<T> {
        match result {
            Ok(value) => Some(value),
            Err(error) => {
                // Once: what is still under way fails for the same reason.
                if !std::mem::replace(&mut self.broken, true) {
                    error.rejection().into_iter().for_each(|why| self.session.status.seen.rejected(why));
                    self.ending.end(&error);
                }
                None
            }
        }
    }
}
