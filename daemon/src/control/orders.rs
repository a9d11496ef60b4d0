//! What an operator asks about sessions: which sequences are open, and that one be suspended while its client lives.
//!
//! A session's own task does what is ordered, between two messages of its client, so that a sequence has one master at a time.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use kvoyant_protocol::control::Failure;
use kvoyant_protocol::wire::SequenceId;
use thiserror::Error;
use tokio::sync::{mpsc, oneshot};

use super::images::{self, Stop, Suspend, image};
use super::{Ended, Plane, Session, settle};
use crate::keeper::Keeper;
use crate::lane::Command;
use crate::lane::images::{ImageOutcome, ImageRequest};
use crate::lane::list::OpenSequence;
use crate::status::Registry;

/// No client takes so long over the rows of one answer.
const READ_WITHIN: Duration = Duration::from_millis(200);

/// Orders that may wait for one session.
const WAITING_MAX: usize = 4;

/// Why a sequence was not suspended.
#[derive(Debug, Error)]
pub(crate) enum OrderError {
    /// No such session, or not any more.
    #[error("there is no session {session}, or not any more; `kvoyant sequences` lists what is open")]
    NoSession {
        /// Which session.
        session: u64,
    },
    /// Too many orders.
    #[error("{WAITING_MAX} orders wait for session {session} already; try again when they are done")]
    Busy {
        /// Which session.
        session: u64,
    },
    /// It could not be done, and the client goes on as if nothing had been.
    #[error("{0}")]
    Failed(Failure),
    /// It could not be done, and the client had gone on meanwhile.
    #[error(
        "{failure}; its client had gone on while it was written, so sequence {sequence} is closed: the engine reads its text again"
    )]
    Closed {
        /// Which sequence.
        sequence: SequenceId,
        /// What went wrong.
        failure: Failure,
    },
}

type Answer = oneshot::Sender<Result<(), OrderError>>;

/// Where sessions get their orders.
#[derive(Debug, Default)]
pub(super) struct Orders(Mutex<HashMap<u64, mpsc::Sender<Order>>>);

/// A suspension, and who waits for it.
#[derive(Debug)]
pub(super) struct Order {
    asked: Suspend,
    answer: Answer,
}

impl Orders {
    fn lock(&self) -> MutexGuard<'_, HashMap<u64, mpsc::Sender<Order>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// From now on a session gets orders, until its inbox is dropped.
    pub(super) fn open(&self, session: u64) -> Inbox<'_> {
        let (sender, orders) = mpsc::channel(WAITING_MAX);
        self.lock().insert(session, sender);
        Inbox { all: self, session, orders }
    }

    fn of(&self, session: u64) -> Option<mpsc::Sender<Order>> {
        self.lock().get(&session).cloned()
    }
}

/// A session's orders. Those that wait when it is dropped are answered with the session's end.
#[derive(Debug)]
pub(super) struct Inbox<'a> {
    all: &'a Orders,
    session: u64,
    orders: mpsc::Receiver<Order>,
}

impl Inbox<'_> {
    /// The next one.
    pub(super) async fn next(&mut self) -> Order {
        match self.orders.recv().await {
            Some(order) => order,
            // Its sender lives as long as this.
            None => std::future::pending().await,
        }
    }
}

impl Drop for Inbox<'_> {
    fn drop(&mut self) {
        self.all.lock().remove(&self.session);
    }
}

/// Does what was ordered, and says how it went. Nobody may be waiting for that any more.
///
/// # Errors
/// If the session ends.
pub(super) async fn serve(
    plane: &Plane,
    session: &Session,
    Order { asked, answer }: Order,
) -> Result<(), Ended> {
    let sequence = asked.sequence;
    let taken = take(plane, session, asked).await;
    if !matches!(taken, Err(TakeError::Ended(_))) {
        // Before anybody hears of it, a session that outlasts this daemon has it so.
        settle(plane, session, None).await?;
    }
    match taken {
        Ok(()) => {
            tracing::info!(session = session.status.id, %sequence, "suspended by an operator");
            let _ = answer.send(Ok(()));
            Ok(())
        }
        Err(TakeError::Order(error)) => {
            let _ = answer.send(Err(error));
            Ok(())
        }
        Err(TakeError::Ended(ended)) => {
            let _ = answer.send(Err(OrderError::NoSession { session: session.status.id }));
            Err(ended)
        }
    }
}

#[derive(Debug)]
enum TakeError {
    Order(OrderError),
    Ended(Ended),
}

impl From<Stop> for TakeError {
    fn from(stop: Stop) -> Self {
        match stop {
            Stop::Failed(failure) => Self::Order(OrderError::Failed(failure)),
            Stop::Ended(ended) => Self::Ended(ended),
        }
    }
}

async fn take(plane: &Plane, session: &Session, asked: Suspend) -> Result<(), TakeError> {
    let sequence = asked.sequence;
    image(plane, session, ImageRequest::Take(sequence)).await?;
    let failure = match images::write(plane, session, asked).await {
        Ok(()) => None,
        Err(Stop::Failed(failure)) => Some(failure),
        Err(Stop::Ended(ended)) => return Err(TakeError::Ended(ended)),
    };
    if let Some(failure) = failure {
        // It may not have got as far as to stay.
        let _ = image(plane, session, ImageRequest::Release(sequence)).await;
        let given = image(plane, session, ImageRequest::GiveBack(sequence)).await?;
        if !matches!(given, ImageOutcome::GivenBack(false)) {
            return Err(TakeError::Order(OrderError::Failed(failure)));
        }
        retire(plane, session, sequence).await?;
        return Err(TakeError::Order(OrderError::Closed { sequence, failure }));
    }
    retire(plane, session, sequence).await
}

/// Closes a sequence whose client does not know, and gives that a moment to finish what it reads.
async fn retire(plane: &Plane, session: &Session, sequence: SequenceId) -> Result<(), TakeError> {
    image(plane, session, ImageRequest::Retire(sequence)).await?;
    tokio::time::sleep(READ_WITHIN).await;
    image(plane, session, ImageRequest::Forget(sequence)).await?;
    Ok(())
}

impl Plane {
    /// All sessions' counters, and what the daemon is.
    #[must_use]
    pub fn registry(&self) -> &Arc<Registry> {
        &self.registry
    }

    /// Where images are kept, if they are.
    #[must_use]
    pub fn keeper(&self) -> Option<Arc<Keeper>> {
        self.keeper.clone()
    }

    /// Rounds that each lane has made.
    pub(crate) fn rounds(&self) -> Vec<u64> {
        self.lanes.iter().map(|lane| lane.pulse().count()).collect()
    }

    /// Asks each lane for a sign of life.
    pub(crate) fn ping(&self) -> Vec<oneshot::Receiver<()>> {
        let ask = |lane: &crate::lane::LaneHandle| {
            let (reply, answer) = oneshot::channel();
            lane.send(Command::Ping(reply));
            answer
        };
        self.lanes.iter().map(ask).collect()
    }

    /// The open sequences of all sessions, as their lanes say.
    pub(crate) async fn open_sequences(&self) -> Vec<OpenSequence> {
        let ask = |lane: &crate::lane::LaneHandle| {
            let (reply, answer) = oneshot::channel();
            lane.send(Command::List(reply));
            answer
        };
        let answers: Vec<_> = self.lanes.iter().map(ask).collect();
        let mut all = Vec::new();
        for answer in answers {
            // A lane that does not answer has ended, and so does the daemon.
            all.extend(answer.await.unwrap_or_default());
        }
        all.sort_by_key(|open| (open.session, open.sequence.slot));
        all
    }

    /// Has a session's sequence suspended, and waits until that is done.
    pub(crate) async fn order_suspension(
        &self,
        session: u64,
        sequence: SequenceId,
        image: String,
        overwrite: bool,
        label: String,
    ) -> Result<(), OrderError> {
        let inbox = self.orders.of(session).ok_or(OrderError::NoSession { session })?;
        let (answer, answered) = oneshot::channel();
        let asked = Suspend { sequence, image, overwrite, label };
        inbox.try_send(Order { asked, answer }).map_err(|error| match error {
            mpsc::error::TrySendError::Full(_) => OrderError::Busy { session },
            mpsc::error::TrySendError::Closed(_) => OrderError::NoSession { session },
        })?;
        answered.await.unwrap_or(Err(OrderError::NoSession { session }))
    }
}
