//! Takes ended sessions apart beside their lane: to give gigabytes back to the kernel takes longer than a lane may be away from the
//! sessions that live.

use std::thread::JoinHandle;

use crossbeam::channel::{Receiver, Sender, unbounded};
use tokio::sync::oneshot;

use crate::lane::Bomb;
use crate::lane::session::LaneSession;

/// A session that has ended, and who waits until all of its memory is given back.
type Ended = (Box<LaneSession>, Option<oneshot::Sender<()>>);

/// See the module. Dropping it waits until everything is given back.
#[derive(Debug)]
pub(super) struct Reaper {
    sessions: Option<Sender<Ended>>,
    thread: Option<JoinHandle<()>>,
}

impl Reaper {
    /// Starts the thread beside this lane.
    pub(super) fn start(lane: usize) -> std::io::Result<Self> {
        let (sessions, ended) = unbounded();
        let thread = crate::threads::start(format!("reaper-{lane}"), move || {
            let _bomb = Bomb;
            reap(&ended);
        })?;
        Ok(Self { sessions: Some(sessions), thread: Some(thread) })
    }

    /// Takes a session apart.
    pub(super) fn take(&self, session: Box<LaneSession>, waits: Option<oneshot::Sender<()>>) {
        let Some(sessions) = &self.sessions else { return };
        // The thread ends when this does, so that there is somebody to take it.
        let _ = sessions.send((session, waits));
    }
}

fn reap(ended: &Receiver<Ended>) {
    for (mut session, waits) in ended {
        if let Some(model) = &mut session.model {
            // First what its disk's rings know of its extents.
            drop(model.spill.take());
            // They are given back by others, while this goes on with the rest.
            drop(model.arena.give_up_all());
        }
        drop(session);
        if let Some(waits) = waits {
            let _ = waits.send(());
        }
    }
}

impl Drop for Reaper {
    fn drop(&mut self) {
        self.sessions = None;
        if let Some(thread) = self.thread.take() {
            // It cannot have panicked: see `Bomb`.
            let _ = thread.join();
        }
    }
}
