//! The thread that gives a device its work.
//!
//! Calls of a driver can take long, so lanes make none: they hand transfers over here. For each one the cost model
//! names an engine, the copies go into the session's stream with the publication behind them, and the transfer is
//! reported once the event behind it all has happened.

use std::collections::{HashMap, HashSet, VecDeque};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use crossbeam::channel::{Receiver, RecvTimeoutError, Sender};
use kvoyant_cuda::{Context, CudaError, Event, EventKind, Priority, Stream};
use kvoyant_protocol::wire::Status;

use super::board::Board;
use super::busy::Busy;
use super::engines::{EngineError, EngineKind, Engines};
use super::quarantine::Held;
use super::records::{Records, Staging};
use super::{OpenError, Shared};
use crate::device::{AnswerWords, Publication, Transfer};

/// Streams for sessions' copies; a session keeps to one, so that its answers become known in the order of tickets.
const STREAMS: usize = 4;

/// How long the worker polls for the end of copies before it begins to sleep between looks.
const POLL_FOR: Duration = Duration::from_micros(200);

/// How long it sleeps between looks then.
const LOOK_EVERY: Duration = Duration::from_micros(50);

/// Copies that take longer than this will not end any more.
const STUCK_AFTER: Duration = Duration::from_secs(20);

/// The same, or what a test has it be.
fn stuck_after() -> Duration {
    let told = if cfg!(debug_assertions) { std::env::var("KVOYANT_TEST_STUCK_SECONDS").ok() } else { None };
    told.and_then(|text| text.parse().ok()).map_or(STUCK_AFTER, Duration::from_secs)
}

/// `CUDA_ERROR_INVALID_VALUE`.
const INVALID_VALUE: i32 = 1;

/// `CUDA_ERROR_LAUNCH_TIMEOUT`: what a driver calls work that does not end.
const TIMEOUT: i32 = 702;

/// What the worker is asked to do.
#[derive(Debug)]
pub(super) enum Work {
    /// A session has come.
    Open(u64, Box<Board>, Option<Records>),
    /// A session's answer.
    Transfer(Box<Transfer>),
    /// A session has gone, and its memory can be freed when nobody has it open.
    Close(u64, Held),
}

/// Staging memory that is kept for later updates, and the most that each may have: beyond that it is freed.
const STAGING_KEPT: usize = 64;
const STAGING_KEPT_BYTES: usize = 1 << 20;

struct Flight {
    event: Event,
    /// What its records are copied from.
    staging: Option<Staging>,
    transfer: Box<Transfer>,
    since: Instant,
    /// Whether the driver could not say once whether it has ended.
    doubted: bool,
}

/// See the module.
pub(super) struct Worker {
    shared: Arc<Shared>,
    busy: Busy,
    streams: Vec<Stream>,
    engines: Engines,
    quarantine: Option<Sender<Held>>,
    boards: HashMap<u64, (Box<Board>, Option<Records>)>,
    /// What each stream has not done yet, in its order.
    flights: Vec<VecDeque<Flight>>,
    /// Since when each stream has been working on its first flight.
    advanced: Vec<Instant>,
    /// Copies that take longer will not end any more.
    stuck_after: Duration,
    /// Sessions of which a transfer failed: what lies in their slots is unknown, and no answer after it is ready.
    poisoned: HashSet<u64>,
    /// Events to be used again.
    events: Vec<Event>,
    /// Staging memory to be used again.
    staging: Vec<Staging>,
}

impl Worker {
    pub(super) fn new(
        shared: Arc<Shared>,
        engines: Engines,
        quarantine: Option<Sender<Held>>,
    ) -> Result<Self, OpenError> {
        let streams: Vec<_> =
            (0..STREAMS).map(|_| shared.context.stream(Priority::High)).collect::<Result<_, _>>()?;
        let flights = streams.iter().map(|_| VecDeque::new()).collect();
        let advanced = vec![Instant::now(); STREAMS];
        let stuck_after = stuck_after();
        let lost = Arc::clone(&shared);
        let busy =
            Busy::watched(stuck_after, move || lost.lose(&CudaError::new("a call of the driver", TIMEOUT)))?;
        Ok(Self {
            shared,
            busy,
            streams,
            engines,
            quarantine,
            boards: HashMap::new(),
            flights,
            advanced,
            stuck_after,
            poisoned: HashSet::new(),
            events: Vec::new(),
            staging: Vec::new(),
        })
    }

    fn context(&self) -> &Context {
        &self.shared.context
    }

    pub(super) fn run(mut self, inbox: &Receiver<Work>) {
        if let Err(error) = self.context().bind() {
            self.shared.lose(&error);
        }
        let mut idle_since = Instant::now();
        loop {
            let busy = self.flights.iter().any(|flights| !flights.is_empty());
            let next = if !busy && idle_since.elapsed() >= self.shared.spin {
                inbox.recv().map_err(|_| RecvTimeoutError::Disconnected)
            } else if !busy || idle_since.elapsed() < POLL_FOR {
                std::hint::spin_loop();
                inbox.try_recv().map_err(|error| match error {
                    crossbeam::channel::TryRecvError::Empty => RecvTimeoutError::Timeout,
                    crossbeam::channel::TryRecvError::Disconnected => RecvTimeoutError::Disconnected,
                })
            } else {
                inbox.recv_timeout(LOOK_EVERY)
            };
            match next {
                Ok(work) => {
                    idle_since = Instant::now();
                    self.busy.begin();
                    self.handle(work);
                    self.busy.end();
                }
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) if !busy => return,
                Err(RecvTimeoutError::Disconnected) => std::thread::sleep(LOOK_EVERY),
            }
            self.busy.begin();
            self.look();
            self.busy.end();
        }
    }

    fn handle(&mut self, work: Work) {
        match work {
            Work::Open(session, board, records) => {
                self.boards.insert(session, (board, records));
            }
            Work::Transfer(transfer) => self.start(transfer),
            Work::Close(session, mut held) => {
                // A lane lets a session go only once its transfers have ended, so no stream uses the board any more. To free it may take
                // as long as all other streams do, and its events are the client's until that has gone.
                held.board = self.boards.remove(&session).map(|(board, _)| board);
                self.poisoned.remove(&session);
                if self.shared.is_lost() {
                    // Whether anything still writes there nobody can tell: the driver frees it with the process.
                    held.forget();
                    return;
                }
                if let Some(quarantine) = &self.quarantine {
                    let _ = quarantine.send(held);
                }
            }
        }
    }

    fn start(&mut self, transfer: Box<Transfer>) {
        let index = (transfer.session % self.streams.len() as u64) as usize;
        match self.enqueue(&transfer, index) {
            Ok((event, staging)) => {
                let since = Instant::now();
                self.flights[index].push_back(Flight { event, staging, transfer, since, doubted: false });
            }
            Err(error) => {
                tracing::warn!(
                    session = transfer.session,
                    ticket = transfer.ticket,
                    "a transfer failed: {error}"
                );
                self.fail(*transfer, &error, index);
            }
        }
    }

    fn enqueue(&mut self, transfer: &Transfer, index: usize) -> Result<(Event, Option<Staging>), CudaError> {
        if self.shared.is_lost() {
            return Err(CudaError::new("transfer", TIMEOUT));
        }
        if self.poisoned.contains(&transfer.session) {
            return Err(CudaError::new("transfer", INVALID_VALUE));
        }
        let stream = self.streams[index].clone();
        if !transfer.copies.is_empty() {
            let known = self.shared.registered.read();
            // SAFETY: the lane made every run from offsets that it checked: sources in extents, which `transfer.memory`
            // keeps mapped and registered until the transfer is reported, destinations in slots of the session's slab
            // that no other transfer and no answer uses until then.
            match unsafe { self.engines.enqueue(&transfer.copies, &known, &stream) } {
                Ok(kind) => self.shared.count(kind),
                Err(EngineError::Cuda(error)) => return Err(error),
                Err(error) => {
                    tracing::error!("{error}");
                    return Err(CudaError::new("transfer", INVALID_VALUE));
                }
            }
        }
        let mut staging = None;
        match (&transfer.publish, self.boards.get(&transfer.session)) {
            (Some(Publication::Answer(words)), Some((board, _))) => {
                board.publish(transfer.ticket, *words, &stream)?;
            }
            (Some(Publication::Records(update)), Some((_, Some(records)))) => {
                let wanted = Records::staging_bytes(update);
                let fits = self.staging.iter().position(|staging| staging.bytes() >= wanted);
                let mut memory = match fits {
                    Some(at) => self.staging.swap_remove(at),
                    None => Staging::new(self.context(), wanted)?,
                };
                let published = records.publish(update, &mut memory, &stream);
                staging = Some(memory);
                if let Err(error) = published {
                    // Some of it may be queued, and nothing will say when that is over.
                    std::mem::forget(staging);
                    return Err(error);
                }
            }
            _ => {}
        }
        let event = match self.events.pop() {
            Some(event) => Ok(event),
            None => self.context().event(EventKind::Local),
        };
        let recorded = event.and_then(|event| event.record(&stream).map(|()| event));
        match recorded {
            Ok(event) => Ok((event, staging)),
            Err(error) => {
                std::mem::forget(staging);
                Err(error)
            }
        }
    }

    /// Reports a transfer that could not be done, and lets the client's stream go with a status that says so.
    fn fail(&mut self, transfer: Transfer, error: &CudaError, index: usize) {
        // A part of it may be queued: its memory is in use until the stream has done that.
        let at_rest = if error.is_sticky() { Err(error.clone()) } else { self.streams[index].synchronize() };
        if matches!(transfer.publish, Some(Publication::Answer(_)) | None) {
            self.poisoned.insert(transfer.session);
        }
        if let Err(error) = at_rest {
            self.shared.lose(&error);
        } else if let Some(Publication::Answer(_)) = transfer.publish
            && let Some((board, _)) = self.boards.get(&transfer.session)
        {
            let word = transfer.ticket << 8 | Status::Failed as u64;
            let failed = AnswerWords { word, table_bytes: 0 };
            if let Err(error) = board.publish(transfer.ticket, failed, &self.streams[index]) {
                tracing::warn!("cannot say on the device that an answer failed: {error}");
            }
            // The board may be freed as soon as this is reported.
            if let Err(error) = self.streams[index].synchronize() {
                self.shared.lose(&error);
            }
        }
        transfer.end(true);
    }

    /// Reports what has ended.
    fn look(&mut self) {
        for index in 0..self.flights.len() {
            while let Some(flight) = self.flights[index].front_mut() {
                // What waits behind others is not stuck.
                let since = flight.since.max(self.advanced[index]);
                let over = self.shared.is_lost() || since.elapsed() > self.stuck_after;
                let ended = match flight.event.query() {
                    Ok(true) => Ok(()),
                    Ok(false) if over => Err(CudaError::new("cuEventQuery", TIMEOUT)),
                    Ok(false) => break,
                    // A question that failed says nothing of the copies: it is asked again, for as long as they may take.
                    Err(error) if !error.is_sticky() && !over => {
                        if !std::mem::replace(&mut flight.doubted, true) {
                            tracing::warn!("cannot tell whether copies have ended, and asks again: {error}");
                        }
                        break;
                    }
                    Err(error) => Err(error),
                };
                let Some(flight) = self.flights[index].pop_front() else { break };
                self.advanced[index] = Instant::now();
                match ended {
                    Ok(()) => {
                        self.events.push(flight.event);
                        let kept = |staging: &Staging| staging.bytes() <= STAGING_KEPT_BYTES;
                        if self.staging.len() < STAGING_KEPT {
                            self.staging.extend(flight.staging.filter(kept));
                        }
                        flight.transfer.end(false);
                    }
                    Err(error) => {
                        // What follows in the stream cannot be told from this one any more.
                        self.shared.lose(&error);
                        flight.transfer.end(true);
                    }
                }
            }
        }
    }
}

impl Shared {
    pub(super) fn count(&self, kind: EngineKind) {
        self.transfers[kind as usize].fetch_add(1, Ordering::Relaxed);
    }
}
