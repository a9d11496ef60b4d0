//! The portable twin: a few threads with preadv and pwritev.

use std::fs::File;
use std::io;
use std::sync::Arc;
use std::thread::JoinHandle;

use crossbeam::channel::{Receiver, Sender, unbounded};

use super::engine::{Engine, Setup, Wake};
use super::operation::{Completed, Operation};
use super::raw::Vectors;
use crate::lane::Bomb;

/// Operations that run at the same time.
const THREADS: usize = 4;

#[derive(Debug)]
enum Event {
    Ended(Completed),
    Woken,
}

/// See the module.
#[derive(Debug)]
pub(super) struct Psync {
    /// `None` once it stops.
    work: Option<Sender<Operation>>,
    events: Receiver<Event>,
    waker: Arc<Waker>,
    threads: Vec<JoinHandle<()>>,
}

#[derive(Debug)]
struct Waker(Sender<Event>);

impl Wake for Waker {
    fn wake(&self) {
        // Nobody listens once the engine is gone.
        let _ = self.0.send(Event::Woken);
    }
}

impl Psync {
    /// Starts its threads.
    pub(super) fn new(setup: &Setup) -> io::Result<Self> {
        let (work, jobs) = unbounded::<Operation>();
        let (ended, events) = unbounded();
        let mut engine = Self {
            work: Some(work),
            events,
            waker: Arc::new(Waker(ended.clone())),
            threads: Vec::with_capacity(THREADS),
        };
        for index in 0..THREADS {
            let (jobs, ended, file) = (jobs.clone(), ended.clone(), Arc::clone(&setup.file));
            let thread = crate::threads::start(format!("spill-psync-{index}"), move || {
                let _bomb = Bomb;
                serve(&jobs, &ended, &file);
            })?;
            engine.threads.push(thread);
        }
        Ok(engine)
    }
}

fn serve(jobs: &Receiver<Operation>, ended: &Sender<Event>, file: &File) {
    let mut vectors = Vectors::default();
    for operation in jobs {
        let completed = Completed::by_hand(operation, file, &mut vectors);
        if ended.send(Event::Ended(completed)).is_err() {
            return;
        }
    }
}

impl Engine for Psync {
    fn name(&self) -> &'static str {
        "psync"
    }

    fn waker(&self) -> Arc<dyn Wake> {
        Arc::clone(&self.waker) as Arc<dyn Wake>
    }

    fn push(&mut self, operation: Operation) {
        if let Some(work) = &self.work {
            // The threads live for as long as this end of the channel does.
            let _ = work.send(operation);
        }
    }

    fn wait(&mut self, ended: &mut Vec<Completed>, block: bool) {
        let first = if block { self.events.recv().ok() } else { None };
        ended.extend(first.into_iter().chain(self.events.try_iter()).filter_map(|event| match event {
            Event::Ended(completed) => Some(completed),
            Event::Woken => None,
        }));
    }
}

impl Drop for Psync {
    fn drop(&mut self) {
        self.work = None;
        for thread in self.threads.drain(..) {
            // It cannot have panicked: see `Bomb`.
            let _ = thread.join();
        }
    }
}
