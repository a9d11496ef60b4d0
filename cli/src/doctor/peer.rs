//! The other process of a trial: this same program, started again, because a process cannot open its own handles and
//! because what hangs or crashes there must not take the doctor along.

use std::io::Read;
use std::os::fd::OwnedFd;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use kvoyant_cuda::{CudaError, Unavailable};
use kvoyant_daemon::device::cuda::trial::{self, TrialError};
use serde::{Deserialize, Serialize};

/// Bytes that are registered: an extent.
pub(crate) const REGISTER_BYTES: usize = 64 << 20;

/// No trial takes as long as this unless it hangs; a driver's first start can take seconds.
const PATIENCE: Duration = Duration::from_secs(30);

/// What the other process is to do, as its one argument.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) enum Task {
    /// Open memory by the descriptor that is its standard input.
    Descriptor {
        /// Its length.
        bytes: usize,
    },
    /// Open memory by handle.
    Handle {
        /// The handle.
        handle: Vec<u8>,
        /// Its length.
        bytes: usize,
    },
    /// Open an event and wait for it.
    Event {
        /// The handle.
        handle: Vec<u8>,
    },
    /// Write and await words in stream order.
    Words {
        /// 32 or 64.
        bits: u32,
    },
    /// Register host memory.
    Register,
}

/// A task on a device.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Order {
    /// The device's number.
    pub(crate) ordinal: u32,
    /// What to do there.
    pub(crate) task: Task,
}

/// What came of it.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(crate) struct Answer {
    /// How long the call in question took, in microseconds.
    pub(crate) us: f64,
    /// Whether the driver gave a read-only mapping.
    pub(crate) read_only: bool,
    /// Whether every byte was as it should be.
    pub(crate) exact: bool,
}

/// Why nothing came of it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Refusal {
    /// What was refused.
    pub(crate) what: String,
    /// What to do about it.
    pub(crate) advice: String,
}

impl Refusal {
    pub(crate) fn new(what: impl Into<String>) -> Self {
        Self { what: what.into(), advice: String::new() }
    }
}

impl From<CudaError> for Refusal {
    fn from(error: CudaError) -> Self {
        let what = format!("{} gave {} ({})", error.call, error.name, error.code);
        Self { what, advice: error.advice().into() }
    }
}

impl From<Unavailable> for Refusal {
    fn from(error: Unavailable) -> Self {
        Self::new(error.to_string())
    }
}

impl From<TrialError> for Refusal {
    fn from(error: TrialError) -> Self {
        match error {
            TrialError::Cuda(error) => error.into(),
            other => Self::new(other.to_string()),
        }
    }
}

/// The other process's side: does what `order` says, and gives the answer as JSON.
pub(crate) fn serve(order: &str) -> String {
    let done = serde_json::from_str(order)
        .map_err(|error| Refusal::new(format!("bad order: {error}")))
        .and_then(|order: Order| work(&order));
    serde_json::to_string(&done).unwrap_or_default()
}

fn work(order: &Order) -> Result<Answer, Refusal> {
    let context = kvoyant_cuda::driver()?.context(order.ordinal)?;
    let of = |handle: &[u8]| -> Result<[u8; 64], Refusal> {
        handle.try_into().map_err(|_| Refusal::new("a handle has 64 bytes"))
    };
    let memory = |taken: trial::Taken| Answer {
        us: micros(taken.opened_in),
        read_only: taken.read_only,
        exact: taken.exact,
    };
    let timed = |took: Duration| Answer { us: micros(took), exact: true, ..Answer::default() };
    Ok(match &order.task {
        Task::Descriptor { bytes } => memory(trial::take_descriptor(&context, std::io::stdin(), *bytes)?),
        Task::Handle { handle, bytes } => memory(trial::take_handle(&context, &of(handle)?, *bytes)?),
        Task::Event { handle } => timed(trial::take_event(&context, &of(handle)?)?),
        Task::Words { bits } => {
            let since = Instant::now();
            trial::stream_words(&context, *bits)?;
            timed(since.elapsed())
        }
        Task::Register => timed(trial::register(&context, REGISTER_BYTES)?),
    })
}

fn micros(time: Duration) -> f64 {
    time.as_secs_f64() * 1e6
}

/// Has another process do it, with `descriptor` as its standard input.
pub(crate) fn ask(order: &Order, descriptor: Option<OwnedFd>) -> Result<Answer, Refusal> {
    let words = serde_json::to_string(order).map_err(|error| Refusal::new(error.to_string()))?;
    let start = |error: std::io::Error| Refusal::new(format!("no second process could be started: {error}"));
    let mut child = Command::new(std::env::current_exe().map_err(start)?)
        .args(["doctor", "--peer", &words])
        .stdin(descriptor.map_or_else(Stdio::null, Stdio::from))
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .map_err(start)?;
    let ended = wait(&mut child);
    // What hung or was taken ill ends here.
    let _ = child.kill();
    let status = child.wait();
    if !ended {
        return Err(Refusal::new(format!("it did not end within {} s", PATIENCE.as_secs())));
    }
    // The answer is shorter than a pipe holds, so that the child never waited for us.
    let mut text = String::new();
    let _ = child.stdout.take().map(|mut out| out.read_to_string(&mut text));
    serde_json::from_str(&text).unwrap_or_else(|_| {
        let how = status.map_or_else(|error| error.to_string(), |status| status.to_string());
        Err(Refusal::new(format!("the second process ended without an answer ({how})")))
    })
}

/// Whether it ended in time.
fn wait(child: &mut Child) -> bool {
    let since = Instant::now();
    while since.elapsed() < PATIENCE {
        match child.try_wait() {
            Ok(None) => std::thread::sleep(Duration::from_millis(2)),
            Ok(Some(_)) | Err(_) => return true,
        }
    }
    false
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_order_that_makes_no_sense_is_answered_and_not_obeyed() {
        let answer: Result<Answer, Refusal> = serde_json::from_str(&serve("{}")).unwrap();
        assert!(answer.unwrap_err().what.starts_with("bad order"));
    }

    #[test]
    fn an_order_and_its_answer_arrive_as_they_were_sent() {
        let order = Order { ordinal: 3, task: Task::Handle { handle: vec![7; 64], bytes: 1 << 21 } };
        let back: Order = serde_json::from_str(&serde_json::to_string(&order).unwrap()).unwrap();
        assert!(matches!(back.task, Task::Handle { handle, bytes } if handle == [7; 64] && bytes == 1 << 21));
        let refusal = Refusal::from(CudaError::new("cuIpcOpenMemHandle_v2", 201));
        let text = serde_json::to_string(&Err::<Answer, _>(refusal.clone())).unwrap();
        let back: Result<Answer, Refusal> = serde_json::from_str(&text).unwrap();
        assert_eq!(back.unwrap_err(), refusal);
        assert!(refusal.advice.contains("its own handle"));
    }
}
