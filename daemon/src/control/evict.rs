//! What an operator wants out of host memory: pages of open sequences that can be on disk, and extents in which nothing is.

use std::time::{Duration, Instant};

use kvoyant_protocol::EXTENT_BYTES;
use kvoyant_protocol::wire::SequenceId;
use tokio::sync::oneshot;

use super::{OrderError, Plane};
use crate::lane::Command;

/// How long pages may take to be written before what is left is left. What is under way goes on.
const EVICT_TIMEOUT: Duration = Duration::from_secs(10);

/// How long writes are given before frames are passed over again.
const WRITES: Duration = Duration::from_millis(5);

/// What has left host memory.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub(crate) struct EvictedBytes {
    /// Pages that are on disk alone now.
    pub(crate) pages: u64,
    /// Their bytes.
    pub(crate) page_bytes: u64,
    /// Bytes of extents that sessions gave back.
    pub(crate) extent_bytes: u64,
    /// Whether more would have left, had there been more time.
    pub(crate) unfinished: bool,
}

impl EvictedBytes {
    fn add(&mut self, other: Self) {
        self.pages += other.pages;
        self.page_bytes += other.page_bytes;
        self.extent_bytes += other.extent_bytes;
        self.unfinished |= other.unfinished;
    }
}

impl Plane {
    /// Evicts what can be of a session, or of one of its sequences.
    ///
    /// # Errors
    /// A session or a sequence that is not open.
    pub(crate) async fn evict(
        &self,
        session: u64,
        only: Option<SequenceId>,
    ) -> Result<EvictedBytes, OrderError> {
        let gone = OrderError::NoSession { session };
        let Some(status) = self.registry.session(session) else { return Err(gone) };
        let lane = &self.lanes[status.lane];
        let page_bytes = status.page_bytes.load(std::sync::atomic::Ordering::Relaxed);
        let (since, mut all, mut from, mut passed) = (Instant::now(), EvictedBytes::default(), 0, 0);
        loop {
            let (reply, answer) = oneshot::channel();
            lane.send(Command::Evict(session, only, from, reply));
            let evicted = match answer.await {
                Ok(Ok(evicted)) => evicted,
                Ok(Err(failure)) => return Err(OrderError::Failed(failure)),
                Err(_) => return Err(gone),
            };
            passed += evicted.pages;
            all.add(EvictedBytes {
                pages: evicted.pages,
                page_bytes: evicted.pages * page_bytes,
                extent_bytes: evicted.extents * EXTENT_BYTES as u64,
                unfinished: false,
            });
            let late = since.elapsed() > EVICT_TIMEOUT;
            match evicted.next {
                Some(next) if !late => from = next,
                // One more pass finds what has been written meanwhile, and lets go of extents when all is quiet.
                None if (evicted.writing || passed > 0) && !late => {
                    (from, passed) = (0, 0);
                    tokio::time::sleep(WRITES).await;
                }
                next => return Ok(EvictedBytes { unfinished: next.is_some() || evicted.writing, ..all }),
            }
        }
    }

    /// The same of all sessions, one after the other; those that end meanwhile have nothing left anyway.
    pub(crate) async fn evict_all(&self) -> EvictedBytes {
        let mut all = EvictedBytes::default();
        for session in self.registry.open_sessions() {
            if let Ok(evicted) = self.evict(session, None).await {
                all.add(evicted);
            }
        }
        all
    }
}
