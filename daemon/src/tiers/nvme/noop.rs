//! The twin that moves nothing and says that it did: what is left is what the tier costs by itself.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::Thread;

use super::engine::{Engine, Wake};
use super::operation::{Completed, Operation};

/// See the module.
#[derive(Debug)]
pub(super) struct Noop {
    pushed: Vec<Operation>,
    waker: Arc<Waker>,
}

#[derive(Debug)]
struct Waker {
    woken: AtomicBool,
    thread: Thread,
}

impl Wake for Waker {
    fn wake(&self) {
        self.woken.store(true, Ordering::Release);
        self.thread.unpark();
    }
}

impl Noop {
    /// For this thread.
    pub(super) fn new() -> Self {
        let waker = Waker { woken: AtomicBool::new(false), thread: std::thread::current() };
        Self { pushed: Vec::new(), waker: Arc::new(waker) }
    }
}

impl Engine for Noop {
    fn name(&self) -> &'static str {
        "noop"
    }

    fn waker(&self) -> Arc<dyn Wake> {
        Arc::clone(&self.waker) as Arc<dyn Wake>
    }

    fn push(&mut self, operation: Operation) {
        self.pushed.push(operation);
    }

    fn wait(&mut self, ended: &mut Vec<Completed>, block: bool) {
        while block && self.pushed.is_empty() && !self.waker.woken.swap(false, Ordering::Acquire) {
            std::thread::park();
        }
        ended.extend(self.pushed.drain(..).map(|operation| {
            let left = operation.bytes - operation.done;
            Completed { result: left as i32, operation }
        }));
    }
}
