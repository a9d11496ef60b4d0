//! The same session with another daemon: claimed by its token, its extents kept, its rings made anew, and asked again for what the daemon
//! before may not have done.

use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::{Duration, Instant};

use kvoyant_protocol::control::{Failure, ToClient, ToDaemon};
use kvoyant_protocol::device::SlabRef;
use kvoyant_protocol::layout::Layout;
use kvoyant_protocol::memory::{Memfd, Seals};
use kvoyant_protocol::packet;

use crate::control::{Control, Line, Received};
use crate::error::Error;
use crate::model::Inner;
use crate::rings::{Known, Maps};
use crate::turn::Turns;

/// How long to wait before the next daemon is looked for again.
const LOOK_AGAIN: Duration = Duration::from_millis(5);

/// See the module.
#[derive(Debug)]
pub(crate) struct Again {
    path: PathBuf,
    session: u64,
    token: [u64; 2],
    /// How long the next daemon waits for us.
    patience: Duration,
    /// Whose session it is; gone when nobody needs it.
    inner: Weak<Inner>,
    /// Control messages that have been answered.
    controls: AtomicU64,
    /// What the newest daemon said that it had done of them, and how the last one was answered.
    claimed: Mutex<(u64, Option<Result<ToClient, Failure>>)>,
    /// One thread at a time looks for the next daemon.
    turn: Turns,
    search: Mutex<Search>,
    /// Nobody goes on with the session.
    lost: AtomicBool,
}

/// What is known of the search for the next daemon, whichever thread goes on with it.
#[derive(Debug, Default)]
struct Search {
    /// When it was first found that there is no daemon.
    begun: Option<Instant>,
    /// Whether a claim was given up half way, because somebody did not want to wait any longer.
    given_up: bool,
}

/// What a session needs to go on with another daemon.
#[derive(Debug, Clone)]
pub(crate) struct Ticket {
    pub(crate) path: PathBuf,
    pub(crate) session: u64,
    pub(crate) token: [u64; 2],
    pub(crate) patience: Duration,
}

impl Again {
    pub(crate) fn new(Ticket { path, session, token, patience }: Ticket, inner: Weak<Inner>) -> Self {
        Self {
            path,
            session,
            token,
            patience,
            inner,
            controls: AtomicU64::new(0),
            claimed: Mutex::default(),
            turn: Turns::default(),
            search: Mutex::default(),
            lost: AtomicBool::new(false),
        }
    }

    /// Control messages that have been answered.
    pub(crate) fn controls(&self) -> u64 {
        self.controls.load(Ordering::Relaxed)
    }

    /// One more has been.
    pub(crate) fn done(&self, number: u64) {
        self.controls.store(number, Ordering::Relaxed);
    }

    /// The answer to the control message of this number, if a daemon has done it and could not say so any more.
    pub(crate) fn answered(&self, number: u64) -> Option<Result<ToClient, Error>> {
        let mut claimed = self.claimed.lock().unwrap_or_else(PoisonError::into_inner);
        let answer = if claimed.0 == number { claimed.1.take() } else { None };
        answer.map(|answer| answer.map_err(Error::Failed))
    }

    /// Goes on with the daemon after the one on this line, by a moment at the latest.
    ///
    /// # Errors
    /// [`Error::Deadline`] if there is none by then; [`Error::DaemonGone`] if there is none that would, or none came for as long as daemons
    /// wait for their clients.
    pub(crate) fn go_on(&self, control: &Control, line: &Arc<Line>, until: Instant) -> Result<(), Error> {
        let inner = self.inner.upgrade().ok_or(Error::DaemonGone)?;
        let begun = Instant::now();
        let late = || Error::Deadline { ticket: 0, waited: begun.elapsed() };
        let _turn = self.turn.take(until.saturating_duration_since(begun)).ok_or_else(late)?;
        if self.lost.load(Ordering::Relaxed) {
            return Err(Error::DaemonGone);
        }
        // Somebody else was quicker.
        if !Arc::ptr_eq(&control.line(), line) {
            return Ok(());
        }
        // However soon one caller wants to know, others have as long as a daemon waits for this session.
        let (end, given_up) = {
            let mut search = self.search.lock().unwrap_or_else(PoisonError::into_inner);
            (*search.begun.get_or_insert(begun) + self.patience, search.given_up)
        };
        loop {
            let passes = match self.claim(&inner, control, until.min(end)) {
                Ok(()) => {
                    *self.search.lock().unwrap_or_else(PoisonError::into_inner) = Search::default();
                    return Ok(());
                }
                Err(error) => {
                    let late = matches!(error, Error::Deadline { .. });
                    if late {
                        self.search.lock().unwrap_or_else(PoisonError::into_inner).given_up = true;
                    }
                    // A daemon that has not yet seen a claim given up holds it against the next one.
                    let own = given_up && matches!(error, Error::Failed(Failure::NotKept { .. }));
                    if late || own || may_pass(&error) { Ok(()) } else { Err(error) }
                }
            };
            let now = Instant::now();
            match passes {
                Ok(()) if now >= end => {
                    self.lost.store(true, Ordering::Relaxed);
                    return Err(Error::DaemonGone);
                }
                Ok(()) if now >= until => return Err(late()),
                Ok(()) => std::thread::sleep(LOOK_AGAIN),
                Err(error) => {
                    self.lost.store(true, Ordering::Relaxed);
                    return Err(match error {
                        Error::Broken(_) => error,
                        _ => Error::DaemonGone,
                    });
                }
            }
        }
    }

    fn claim(&self, inner: &Inner, control: &Control, until: Instant) -> Result<(), Error> {
        let left = || until.saturating_duration_since(Instant::now()).max(Duration::from_millis(1));
        let socket = packet::connect_within(&self.path, left())
            .map_err(|source| Error::Connect { path: self.path.clone(), source })?;
        let line = Line::new(socket)?;
        let (session, token) = (self.session, self.token);
        let extents = inner.memory.extents() as u32;
        line.send(&ToDaemon::Claim { session, token, extents }, &[])?;
        let Received { message, fds } = line.receive(left())?;
        let ToClient::Claimed { boot_id, requests, tickets, controls, answered, slab } = message else {
            return Err(Error::Broken(format!("{message:?} came instead of a session")));
        };
        let mut fds = fds.into_iter();
        let mut next = || fds.next().ok_or_else(|| Error::Broken("a session came with too few files".into()));
        let maps = rings_of(inner.rings.layout(), (next()?, next()?), boot_id)?;
        let slab = match slab {
            SlabRef::Host { bytes } => {
                let file = Memfd::from_peer(next()?, bytes as usize, Seals::frozen_for_readers())?;
                Some(file.map_read_only()?)
            }
            _ => None,
        };
        line.send(&ToDaemon::Mapped, &[])?;
        match line.receive(left())?.message {
            ToClient::Sealed => {}
            other => return Err(Error::Broken(format!("{other:?} came instead of the seal"))),
        }
        inner.memory.begin_anew(slab);
        loop {
            let Received { message, fds } = line.receive(left())?;
            match message {
                ToClient::Memory { kind, first, bytes } => inner.memory.add(kind, first, bytes, fds)?,
                ToClient::Done => break,
                other => return Err(Error::Broken(format!("{other:?} came instead of memory"))),
            }
        }
        let answer = match answered.then(|| line.receive(left())) {
            None => None,
            Some(Ok(Received { message, .. })) => Some(Ok(message)),
            Some(Err(Error::Failed(failure))) => Some(Err(failure)),
            Some(Err(error)) => return Err(error),
        };
        *self.claimed.lock().unwrap_or_else(PoisonError::into_inner) = (controls, answer);
        let maps = maps.with_slab(inner.memory.host_slab());
        let alive = || !line.hung_up() && Instant::now() < until;
        inner.rings.again(maps, Known { requests, tickets }, alive)?;
        line.give_up_after(control.timeout())?;
        control.set_line(line);
        Ok(())
    }
}

pub(crate) fn rings_of(layout: Layout, (c2d, d2c): (OwnedFd, OwnedFd), boot_id: u64) -> Result<Maps, Error> {
    // Its size is sealed; the daemon forbids further writable mappings once we have ours.
    let c2d = Memfd::from_peer(c2d, layout.c2d_bytes, Seals::size_only())?.map(true)?;
    let d2c = Memfd::from_peer(d2c, layout.d2c_bytes, Seals::frozen_for_readers())?.map_read_only()?;
    Ok(Maps::new(layout, c2d, d2c, boot_id))
}

/// Whether it may go better a little later: while there is no daemon, or one that ends.
fn may_pass(error: &Error) -> bool {
    match error {
        Error::DaemonGone | Error::Connect { .. } | Error::Io(_) => true,
        Error::Failed(failure) => matches!(
            failure,
            Failure::TooManyConnections { .. } | Failure::TooManySessions { .. } | Failure::Quota(_)
        ),
        _ => false,
    }
}
