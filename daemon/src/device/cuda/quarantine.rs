//! Memory of ended sessions that cannot be freed yet.
//!
//! Freeing an allocation that another process has opened by handle is undefined, and that process may have died a
//! moment ago with the driver still tearing it down. So such memory waits here until the client has said that it
//! closed it, or its process has ended.

use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use crossbeam::channel::{Receiver, RecvTimeoutError, Sender, unbounded};

use super::board::Board;
use super::memory::{Allocation, Charge};
use crate::device::Importer;

/// How often the importers of held memory are looked at.
const LOOK_EVERY: Duration = Duration::from_millis(10);

/// Memory that waits.
#[derive(Debug)]
pub(super) struct Held {
    pub(super) allocations: Vec<Allocation>,
    pub(super) importer: Arc<Importer>,
    pub(super) charge: Charge,
    /// What the daemon wrote the client's words with.
    pub(super) board: Option<Box<Board>>,
}

impl Held {
    /// Leaves it to the driver, which frees it with the process.
    pub(super) fn forget(self) {
        self.allocations.into_iter().for_each(std::mem::forget);
        std::mem::forget(self.board);
    }
}

/// See the module.
#[derive(Debug)]
pub(super) struct Quarantine {
    inbox: Option<Sender<Held>>,
    thread: Option<JoinHandle<()>>,
}

impl Quarantine {
    pub(super) fn start() -> std::io::Result<Self> {
        let (inbox, outbox) = unbounded();
        let thread = crate::threads::start("quarantine", move || {
            let _bomb = crate::lane::Bomb;
            watch(&outbox);
        })?;
        Ok(Self { inbox: Some(inbox), thread: Some(thread) })
    }

    /// Where to send memory of ended sessions.
    pub(super) fn inbox(&self) -> Option<Sender<Held>> {
        self.inbox.clone()
    }
}

impl Drop for Quarantine {
    fn drop(&mut self) {
        self.inbox = None;
        if let Some(thread) = self.thread.take() {
            // It cannot have panicked: see `Bomb`.
            let _ = thread.join();
        }
    }
}

fn watch(outbox: &Receiver<Held>) {
    let mut waiting: Vec<Held> = Vec::new();
    loop {
        let next = if waiting.is_empty() {
            outbox.recv().map_err(|_| RecvTimeoutError::Disconnected)
        } else {
            outbox.recv_timeout(LOOK_EVERY)
        };
        match next {
            Ok(held) => waiting.push(held),
            Err(RecvTimeoutError::Timeout) => {}
            Err(RecvTimeoutError::Disconnected) => break,
        }
        // What can be freed is freed, by dropping it. What the driver counts can be freed at once, but the device has it
        // back only when its importer has let go: until then it counts against what sessions may have.
        waiting.retain_mut(|held| {
            if held.importer.gone() {
                return false;
            }
            held.charge.quarantine();
            held.allocations.retain(Allocation::needs_quarantine);
            // Events must outlast those who have opened them.
            held.board.take_if(|board| !board.has_events());
            // Of a process that cannot be watched nothing more will be heard: its socket has hung up, and what it may still have counts
            // nowhere, for else it would count for good.
            held.importer.process.is_some() || !held.allocations.is_empty() || held.board.is_some()
        });
    }
    // The daemon ends with importers still there: the driver takes the memory back when the last of them has gone.
    waiting.into_iter().for_each(Held::forget);
}
