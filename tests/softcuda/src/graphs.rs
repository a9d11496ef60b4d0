//! Capture: a stream that keeps what it is given, instead of doing it. Graphs: what was kept, done again in order.

use std::sync::{Arc, Mutex, PoisonError};

use crate::driver::{Driver, call, new_handle};
use crate::ffi::{Code, Out, Outcome};
use crate::streams;
use crate::work::Work;

/// Whether a stream captures.
#[derive(Debug, Default)]
pub(crate) enum Capture {
    #[default]
    None,
    Active {
        work: Vec<Work>,
        /// Who may not make calls that wait meanwhile: 0 nobody, 1 the thread that began, 2 all may.
        mode: u32,
        thread: std::thread::ThreadId,
    },
    Invalid,
}

impl Capture {
    pub(crate) fn is_active(&self) -> bool {
        matches!(self, Self::Active { .. })
    }

    /// Keeps an operation if a capture goes on; whether it did.
    pub(crate) fn keep(&mut self, kept: &Work) -> Outcome<bool> {
        match self {
            Self::None => Ok(false),
            Self::Active { work, .. } => {
                work.push(kept.clone());
                Ok(true)
            }
            Self::Invalid => Err(Code::STREAM_CAPTURE_INVALIDATED),
        }
    }

    /// Spoils a capture that goes on.
    pub(crate) fn invalidate(&mut self) {
        if self.is_active() {
            *self = Self::Invalid;
        }
    }

    /// Refuses a call that cannot be part of a capture, and spoils the one that goes on.
    pub(crate) fn forbid(&mut self) -> Outcome {
        match self {
            Self::None => Ok(()),
            Self::Active { .. } => {
                self.invalidate();
                Err(Code::STREAM_CAPTURE_UNSUPPORTED)
            }
            Self::Invalid => Err(Code::STREAM_CAPTURE_INVALIDATED),
        }
    }
}

impl Driver {
    /// Refuses a call that could reach into a capture of this thread, or of any thread in the strictest mode.
    pub(crate) fn forbid_in_captures(&self) -> Outcome {
        let me = std::thread::current().id();
        for (_, stream) in self.streams.all() {
            let mut capture = stream.capture();
            let reached = match &*capture {
                Capture::Active { mode, thread, .. } => *mode == 0 || (*mode == 1 && *thread == me),
                _ => false,
            };
            if reached {
                capture.forbid()?;
            }
        }
        Ok(())
    }
}

/// What a capture kept.
#[derive(Debug)]
pub(crate) struct Graph(Arc<[Work]>);

/// A graph that can be launched.
#[derive(Debug)]
pub(crate) struct ExecGraph {
    work: Arc<[Work]>,
    /// Launches of one graph do not overlap: this is the order they are enqueued in.
    launching: Mutex<()>,
}

#[unsafe(no_mangle)]
pub(crate) extern "C" fn cuStreamBeginCapture_v2(stream: u64, mode: u32) -> u32 {
    call("cuStreamBeginCapture_v2", |driver| {
        let stream = streams::of(driver, "cuStreamBeginCapture_v2", stream)?;
        let mut capture = stream.capture();
        match *capture {
            Capture::None if mode <= 2 => {
                *capture = Capture::Active { work: Vec::new(), mode, thread: std::thread::current().id() };
                Ok(())
            }
            Capture::None => Err(Code::INVALID_VALUE),
            _ => Err(Code::ILLEGAL_STATE),
        }
    })
}

#[unsafe(no_mangle)]
pub(crate) extern "C" fn cuStreamIsCapturing(stream: u64, to: Out<u32>) -> u32 {
    call("cuStreamIsCapturing", |driver| {
        let stream = streams::of(driver, "cuStreamIsCapturing", stream)?;
        let capture = stream.capture();
        to.set(match *capture {
            Capture::None => 0,
            Capture::Active { .. } => 1,
            Capture::Invalid => 2,
        })
    })
}

#[unsafe(no_mangle)]
pub(crate) extern "C" fn cuStreamEndCapture(stream: u64, graph: Out<u64>) -> u32 {
    call("cuStreamEndCapture", |driver| {
        let stream = streams::of(driver, "cuStreamEndCapture", stream)?;
        match std::mem::take(&mut *stream.capture()) {
            Capture::None => Err(Code::ILLEGAL_STATE),
            Capture::Invalid => {
                graph.offer(0);
                Err(Code::STREAM_CAPTURE_INVALIDATED)
            }
            Capture::Active { work, mode, thread } => {
                if mode != 2 && thread != std::thread::current().id() {
                    graph.offer(0);
                    return Err(Code::STREAM_CAPTURE_WRONG_THREAD);
                }
                let handle = new_handle();
                driver.graphs.insert(handle, Graph(work.into()));
                graph.set(handle)
            }
        }
    })
}

fn instantiate(name: &'static str, exec: Out<u64>, graph: u64) -> u32 {
    call(name, |driver| {
        let graph = driver.graphs.get(driver, name, graph)?;
        let handle = new_handle();
        driver
            .exec_graphs
            .insert(handle, ExecGraph { work: Arc::clone(&graph.0), launching: Mutex::new(()) });
        exec.set(handle)
    })
}

#[unsafe(no_mangle)]
pub(crate) extern "C" fn cuGraphInstantiateWithFlags(exec: Out<u64>, graph: u64, _flags: u64) -> u32 {
    instantiate("cuGraphInstantiateWithFlags", exec, graph)
}

#[unsafe(no_mangle)]
pub(crate) extern "C" fn cuGraphLaunch(exec: u64, stream: u64) -> u32 {
    call("cuGraphLaunch", |driver| {
        let exec = driver.exec_graphs.get(driver, "cuGraphLaunch", exec)?;
        let stream = streams::of(driver, "cuGraphLaunch", stream)?;
        let _one_at_a_time = exec.launching.lock().unwrap_or_else(PoisonError::into_inner);
        if stream.capture().is_active() {
            return exec.work.iter().try_for_each(|work| stream.submit(driver, "cuGraphLaunch", work));
        }
        // All or nothing: what a captured operation touches may be gone by now.
        let uses = exec.work.iter().map(|work| work.check(driver, "cuGraphLaunch", false));
        let uses = uses.collect::<Outcome<Vec<_>>>()?;
        for (work, uses) in exec.work.iter().zip(uses) {
            stream.enqueue(work, uses);
        }
        Ok(())
    })
}

#[unsafe(no_mangle)]
pub(crate) extern "C" fn cuGraphExecDestroy(exec: u64) -> u32 {
    call("cuGraphExecDestroy", |driver| driver.exec_graphs.take(driver, "cuGraphExecDestroy", exec).map(drop))
}

#[unsafe(no_mangle)]
pub(crate) extern "C" fn cuGraphDestroy(graph: u64) -> u32 {
    call("cuGraphDestroy", |driver| driver.graphs.take(driver, "cuGraphDestroy", graph).map(drop))
}
