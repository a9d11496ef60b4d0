//! A well-behaved client: it decodes, checks every row that comes, opens and closes sequences, and takes times.

use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use kvoyant_client::{Client, Hint, Member, Model, Options, Sequence};
use kvoyant_tests::{PATIENCE, fake};
use serde::Serialize;

/// Tokens of its sequence.
const TOKENS: usize = 300;

/// Its rows say whose they are.
const SEED: usize = 9;

/// Requests between two of its control messages.
const CONTROL_EVERY: usize = 16;

/// How long it rests between two requests, so that it does not take the machine's cores for itself.
const REST: Duration = Duration::from_micros(300);

#[derive(Debug, Default)]
struct Shared {
    stop: AtomicBool,
    pause: AtomicBool,
    paused: AtomicBool,
    /// Requests answered.
    answers: AtomicUsize,
    /// Latencies since they were last taken.
    latencies: Mutex<Vec<Duration>>,
    harm: Mutex<Option<String>>,
}

/// See the module.
#[derive(Debug)]
pub struct Neighbour {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

/// How long requests took.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Latency {
    /// Half of them took less, in µs.
    pub median_us: f64,
    /// Of a hundred, one took longer, in µs.
    pub p99_us: f64,
    /// How many there were.
    pub requests: usize,
}

impl Latency {
    fn of(mut times: Vec<Duration>) -> Option<Self> {
        times.sort_unstable();
        let at = |share: f64| {
            let index = ((times.len() as f64 * share) as usize).min(times.len().checked_sub(1)?);
            Some(times[index].as_secs_f64() * 1e6)
        };
        Some(Self { median_us: at(0.5)?, p99_us: at(0.99)?, requests: times.len() })
    }
}

/// What it does between decoding.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Manners {
    /// It opens, fills and closes sequences.
    Lively,
    /// Nothing, so that what it holds is always the same.
    Steady,
}

/// What it checks rows against.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Checks {
    /// What it wrote.
    Truly,
    /// What it did not write: for the canary that shows that rows are compared at all.
    Wrongly,
}

impl Neighbour {
    /// Moves in.
    ///
    /// # Panics
    /// If the daemon does not let it.
    #[must_use]
    pub fn start(socket: &Path, checks: Checks, manners: Manners) -> Self {
        let options = Options { name: "neighbour".into(), ..Options::default() };
        let client = Client::connect(socket, options).expect("a connection for the neighbour");
        let model = client.register(fake::spec(&["random:budget=50%"]), &[]).expect("its registration");
        let sequence = model.open(0, TOKENS).expect("its sequence");
        fake::fill(&model, &sequence, SEED, TOKENS).expect("its rows");
        let shared = Arc::new(Shared::default());
        let mine = Arc::clone(&shared);
        let expected = if checks == Checks::Truly { SEED } else { SEED + 1 };
        let thread = std::thread::spawn(move || live(&mine, &model, &sequence, expected, manners));
        Self { shared, thread: Some(thread) }
    }

    /// What has befallen it, if anything.
    #[must_use]
    pub fn harm(&self) -> Option<String> {
        self.shared.harm.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Waits until it has had so many more answers, or was harmed.
    pub fn wait_for(&self, answers: usize) {
        let (first, since) = (self.shared.answers.load(Ordering::Acquire), Instant::now());
        while self.shared.answers.load(Ordering::Acquire) < first + answers && self.harm().is_none() {
            if since.elapsed() > PATIENCE {
                self.shared.hurt(format!("it had no {answers} answers within {PATIENCE:?}"));
            }
            std::thread::sleep(Duration::from_micros(500));
        }
    }

    /// Times since they were last taken.
    #[must_use]
    pub fn latency(&self) -> Option<Latency> {
        let times =
            std::mem::take(&mut *self.shared.latencies.lock().unwrap_or_else(PoisonError::into_inner));
        Latency::of(times)
    }

    /// Has it rest, with nothing open but its one sequence, while something is done.
    pub fn resting<T>(&self, work: impl FnOnce() -> T) -> T {
        // What an earlier rest left there says nothing.
        self.shared.paused.store(false, Ordering::Release);
        self.shared.pause.store(true, Ordering::Release);
        let since = Instant::now();
        while !self.shared.paused.load(Ordering::Acquire) && self.harm().is_none() {
            if since.elapsed() > PATIENCE {
                self.shared.hurt("it hangs in a request".into());
            }
            std::thread::sleep(Duration::from_micros(500));
        }
        let done = work();
        self.shared.pause.store(false, Ordering::Release);
        done
    }
}

impl Drop for Neighbour {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::Release);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

impl Shared {
    fn hurt(&self, how: String) {
        self.harm.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(how);
    }
}

fn live(shared: &Shared, model: &Model, sequence: &Sequence, seed: usize, manners: Manners) {
    for number in 0.. {
        if shared.stop.load(Ordering::Acquire) {
            return;
        }
        if shared.pause.load(Ordering::Acquire) {
            shared.paused.store(true, Ordering::Release);
            std::thread::sleep(Duration::from_micros(200));
            continue;
        }
        shared.paused.store(false, Ordering::Release);
        let layer = 1 + number % (fake::LAYERS - 1);
        let lived = decode(model, sequence, layer, seed).and_then(|took| {
            shared.latencies.lock().unwrap_or_else(PoisonError::into_inner).push(took);
            if manners == Manners::Lively && number % CONTROL_EVERY == 0 {
                open_and_close(model, seed)
            } else {
                Ok(())
            }
        });
        if let Err(how) = lived {
            shared.hurt(how);
            return;
        }
        shared.answers.fetch_add(1, Ordering::Release);
        std::thread::sleep(REST);
    }
}

fn decode(model: &Model, sequence: &Sequence, layer: usize, seed: usize) -> Result<Duration, String> {
    let began = Instant::now();
    let member = Member { sequence, position: TOKENS, hint: Hint::None };
    let ready = model
        .speculate(layer, &[member])
        .and_then(|pending| pending.wait(PATIENCE))
        .map_err(|error| format!("it got no answer: {error}"))?;
    let took = began.elapsed();
    let rows = fake::check(&ready, 0, seed, layer).map_err(|problem| format!("a wrong answer: {problem}"))?;
    let wanted = (TOKENS + 1 - fake::SINKS - fake::WINDOW) / 2;
    if rows < wanted * fake::KV_HEADS { Err(format!("{rows} rows of {wanted} a head")) } else { Ok(took) }
}

fn open_and_close(model: &Model, seed: usize) -> Result<(), String> {
    let fail =
        |error: kvoyant_client::Error| format!("it could not open, fill and close a sequence: {error}");
    let sequence = model.open(0, 40).map_err(fail)?;
    fake::fill(model, &sequence, seed, 40).map_err(fail)?;
    model.close(vec![sequence]).map_err(fail)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn median_and_p99_are_those_of_the_sorted_times() {
        let times = (1..=200).rev().map(Duration::from_micros).collect();
        let latency = Latency::of(times).unwrap();
        assert_eq!((latency.median_us, latency.p99_us, latency.requests), (101.0, 199.0, 200));
        assert_eq!(Latency::of(Vec::new()), None);
    }
}
