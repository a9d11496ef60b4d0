//! A session's place: among those that the daemon has, and among those of its user.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use kvoyant_protocol::control::{Failure, ToClient};
use kvoyant_protocol::quota::Quota;
use tokio::sync::oneshot;

use super::{Plane, Session};
use crate::lane::Command;
use crate::quota::{Account, Charge};

/// How long a lane may take to give back extents in which nothing is.
const YIELD_TIMEOUT: Duration = Duration::from_secs(1);

impl Session {
    /// Counts what is refused.
    pub(super) fn note(&self, message: &ToClient) {
        if let ToClient::Failed(failure) = message {
            self.account.note(failure);
        }
    }
}

/// If this says that host memory is full, and the user has less than their share of it: whether users who have more have given some back.
pub(super) async fn makes_room(plane: &Plane, account: &Account, said: &ToClient) -> bool {
    let ToClient::Failed(Failure::Backpressure { arena_bytes, .. }) = said else { return false };
    if account.held(Quota::Host) >= account.share(*arena_bytes) {
        return false;
    }
    let mut given = 0;
    for lane in &plane.lanes {
        let (reply, answer) = oneshot::channel();
        lane.send(Command::Yield(account.uid(), reply));
        given += match tokio::time::timeout(YIELD_TIMEOUT, answer).await {
            Ok(Ok(extents)) => extents,
            _ => 0,
        };
    }
    tracing::debug!(uid = account.uid(), given, "users with more than their share gave extents back");
    given > 0
}

/// Given back when dropped.
#[derive(Debug)]
pub(super) struct Place {
    _taken: Taken,
    _session: Charge,
    _rings: Charge,
}

/// One of the places, until it is dropped.
#[derive(Debug)]
struct Taken(Arc<AtomicU64>);

impl Drop for Taken {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Place {
    /// A place for a session whose rings take so many bytes. All places are taken here, on one thread.
    pub(super) fn take(plane: &Plane, account: &Arc<Account>, ring_bytes: usize) -> Result<Self, Failure> {
        let max_sessions = plane.config().config.max_sessions;
        let (quota, max) = (Quota::Sessions, u64::from(max_sessions));
        let rings = account.charge(Quota::Rings, ring_bytes as u64).map_err(Failure::Quota)?;
        let session = account.charge(quota, 1).map_err(Failure::Quota)?;
        // There may be more sessions than may come in, where that number has been lowered.
        if plane.places.load(Ordering::Relaxed) >= max {
            // Whoever leaves takes what they wanted along: so this comes last.
            drop(session);
            account.wants(quota, 1, max);
            return Err(Failure::TooManySessions { max: max_sessions });
        }
        let taken = plane.places.fetch_add(1, Ordering::Relaxed) + 1;
        let place = Taken(Arc::clone(&plane.places));
        let (held, free) = (account.held(quota), max - taken);
        if free < account.leaves(quota, max, held) {
            drop(session);
            return Err(Failure::Quota(account.over_share(quota, 1, max)));
        }
        account.served(quota);
        Ok(Self { _taken: place, _session: session, _rings: rings })
    }
}
