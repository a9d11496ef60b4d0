//! The twin that fails on purpose: another engine, with faults at operations of one's choice.

use std::collections::VecDeque;
use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};

use kvoyant_protocol::faults::{Point, fires};
use kvoyant_protocol::memory::SharedMapping;

use super::engine::{Engine, Wake};
use super::operation::{Completed, Kind, Operation};

/// What goes wrong.
#[cfg_attr(not(test), allow(dead_code, reason = "some are chosen by the tests beside the tier alone"))]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Fault {
    /// The system refuses with this error number.
    Error(i32),
    /// It moves so many bytes only, and says so.
    Short(usize),
    /// It moves nothing and calls that no error, as at the end of a file.
    Nothing,
    /// It moves the first so many bytes and says that it moved all.
    Torn(usize),
    /// A bit of what was read is another.
    Flip,
}

/// What goes wrong when.
#[derive(Debug, Clone, Default)]
pub(super) struct Plan {
    /// At the n-th operation of this kind, counted from 0.
    pub(super) faults: Vec<(Kind, u64, Fault)>,
    /// At each operation of these kinds.
    pub(super) always: Vec<(Kind, Fault)>,
    /// Every operation ends so much later.
    pub(super) latency: Duration,
}

/// See the module.
#[derive(Debug)]
pub(super) struct Faulty {
    inner: Box<dyn Engine>,
    plan: Plan,
    counts: [u64; 2],
    /// Ended, and given back when their time has come.
    held: VecDeque<(Instant, Completed)>,
    /// What is still to be done to operations once they end, by their offset and kind.
    pending: Vec<(Kind, u64, Fault)>,
}

/// How long it sleeps at most while it holds something back.
const STEP: Duration = Duration::from_micros(200);

impl Faulty {
    pub(super) fn new(inner: Box<dyn Engine>, plan: Plan) -> Self {
        Self { inner, plan, counts: [0; 2], held: VecDeque::new(), pending: Vec::new() }
    }

    fn fault(&mut self, kind: Kind) -> Option<Fault> {
        let count = match kind {
            Kind::Read => &mut self.counts[0],
            Kind::Write => &mut self.counts[1],
            Kind::Zero | Kind::Punch | Kind::Allocate => return None,
        };
        let nth = *count;
        *count += 1;
        let chosen = match kind {
            Kind::Read if fires(Point::SpillRead) => Some(Fault::Error(nix::libc::EIO)),
            // Half a page is another's, and the system calls it whole.
            Kind::Read if fires(Point::SpillTorn) => Some(Fault::Torn(2048)),
            Kind::Write if fires(Point::SpillWrite) => Some(Fault::Error(nix::libc::EIO)),
            _ => None,
        };
        if chosen.is_some() {
            return chosen;
        }
        let once = self.plan.faults.iter().find(|(of, at, _)| *of == kind && *at == nth).map(|found| found.2);
        once.or_else(|| self.plan.always.iter().find(|(of, _)| *of == kind).map(|found| found.1))
    }

    fn hold(&mut self, completed: Completed) {
        self.held.push_back((Instant::now() + self.plan.latency, completed));
    }

    fn finish(&mut self, mut completed: Completed) -> Completed {
        let Operation { kind, offset, .. } = completed.operation;
        let Some(at) = self.pending.iter().position(|(of, place, _)| *of == kind && *place == offset) else {
            return completed;
        };
        let (_, _, fault) = self.pending.swap_remove(at);
        completed.operation.cap = usize::MAX;
        match fault {
            Fault::Torn(_) => completed.result = completed.operation.bytes as i32,
            Fault::Flip => {
                let job = &completed.operation.pages[0].job;
                job.memory.store_u32(job.offset, job.memory.load_u32(job.offset) ^ 1);
            }
            Fault::Short(_) | Fault::Error(_) | Fault::Nothing => {}
        }
        completed
    }
}

impl Engine for Faulty {
    fn name(&self) -> &'static str {
        self.inner.name()
    }

    fn waker(&self) -> Arc<dyn Wake> {
        self.inner.waker()
    }

    fn push(&mut self, mut operation: Operation) {
        match self.fault(operation.kind) {
            Some(Fault::Error(errno)) => self.hold(Completed { operation, result: -errno }),
            Some(Fault::Nothing) => self.hold(Completed { operation, result: 0 }),
            Some(fault) => {
                if let Fault::Short(bytes) | Fault::Torn(bytes) = fault {
                    operation.cap = bytes;
                }
                self.pending.push((operation.kind, operation.offset, fault));
                self.inner.push(operation);
            }
            None => self.inner.push(operation),
        }
    }

    fn wait(&mut self, ended: &mut Vec<Completed>, block: bool) {
        let mut fresh = Vec::new();
        self.inner.wait(&mut fresh, block && self.held.is_empty());
        for completed in fresh {
            let completed = self.finish(completed);
            self.hold(completed);
        }
        let now = Instant::now();
        while self.held.front().is_some_and(|(due, _)| *due <= now) {
            ended.extend(self.held.pop_front().map(|(_, completed)| completed));
        }
        if block && ended.is_empty() && !self.held.is_empty() {
            std::thread::sleep(STEP);
        }
    }

    fn register(&mut self, memory: &Arc<SharedMapping>) -> io::Result<()> {
        self.inner.register(memory)
    }

    fn forget(&mut self, memory: &Arc<SharedMapping>) {
        self.inner.forget(memory);
    }

    fn registered(&self) -> usize {
        self.inner.registered()
    }
}
