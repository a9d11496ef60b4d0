//! Engines that go on in the middle of an answer while their daemon ends and comes again, in every way and at every moment, compared with
//! engines that nothing disturbs.

use std::collections::HashMap;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, LazyLock, Mutex, OnceLock, PoisonError};
use std::time::Duration;

use kvoyant_engine::{
    DaemonKv, DaemonOptions, DaemonSequence, Decoder, DecoderOptions, Dtype, Fallbacks, KvShape, Model,
    PrefillOptions, Selects, argmax, synthetic,
};
use nix::sys::signal::{Signal, kill};

use crate::struck::Struck;
use crate::supervisor::Supervisor;
use crate::{Daemon, PATIENCE};

/// Digests, digests of an observed prompt, bounds, rows ahead of a step, and memories of several kinds.
pub const METHODS: [&str; 6] = ["kvoyant", "quest", "infinigen:skew=off", "freekv", "resv", "dynsplit"];

/// How a daemon serves.
#[derive(Debug, Clone, Copy)]
pub struct Way {
    /// Its flags.
    pub flags: [&'static str; 2],
    /// Tokens of the prompt.
    pub prompt: usize,
    /// The part of a session's pages that stays in host memory, in percent; the others are on disk.
    pub host_percent: Option<&'static str>,
}

/// Rows are read where they are.
pub const IN_PLACE: Way = Way { flags: ["--in-place", "true"], prompt: 300, host_percent: None };
/// Rows are copied to where the engine reads them.
pub const SLAB: Way = Way { flags: ["--slab", "1MiB"], prompt: 300, host_percent: None };
/// The same, of which most are on disk.
pub const SPILLED: [Way; 2] = [
    Way { prompt: 900, host_percent: Some("15"), ..IN_PLACE },
    Way { prompt: 900, host_percent: Some("15"), ..SLAB },
];

/// More than a page has rows, so that room runs out that only the daemon can give.
const STEPS: usize = 40;

/// The first method in every way, and each of the others in one of them; if tests are to be thorough, all in all.
fn combinations<'a>(methods: &[&'a str], ways: &'a [Way]) -> Vec<(&'a str, &'a Way)> {
    let mut all = Vec::new();
    for (at, method) in methods.iter().enumerate() {
        let ways = ways.iter().enumerate();
        let own = ways.filter(|(nth, _)| crate::thorough() || at == 0 || at % 2 == nth % 2);
        all.extend(own.map(|(_, way)| (*method, way)));
    }
    all
}

impl Way {
    /// Flags of a daemon that has this folder for itself.
    #[must_use]
    pub fn flags(&self, folder: &Path) -> Vec<String> {
        let mut flags: Vec<String> = self.flags.map(String::from).into();
        if let Some(percent) = self.host_percent {
            let folder = folder.display().to_string();
            let spill = ["--spill", &folder, "--spill-bytes", "256MiB", "--host-percent", percent];
            flags.extend(spill.map(String::from));
        }
        flags
    }
}

/// A daemon that is started again, and a folder for what it spills.
#[derive(Debug)]
pub struct Served {
    /// The daemon.
    pub daemon: Supervisor,
    /// The folder.
    pub folder: tempfile::TempDir,
}

impl Served {
    /// A daemon that serves in this way.
    ///
    /// # Panics
    /// If it does not start.
    #[must_use]
    pub fn start(binary: &str, way: &Way) -> Self {
        let folder = tempfile::tempdir().expect("a folder");
        let flags = way.flags(folder.path());
        let flags: Vec<&str> = flags.iter().map(String::as_str).collect();
        Self { daemon: Supervisor::start(binary, &flags), folder }
    }
}

fn prompt(model: &Model, tokens: usize) -> Vec<u32> {
    (0..tokens as u32).map(|i| (i * i * 31 + i * 7 + 3) % model.config().vocabulary as u32).collect()
}

/// An engine in the middle of an answer.
#[derive(Debug)]
pub struct Engine {
    /// Its backend.
    pub kv: Struck,
    decoder: Decoder,
    sequence: DaemonSequence,
    logits: Vec<f32>,
}

impl Engine {
    /// Reads a prompt of so many tokens.
    ///
    /// # Panics
    /// If it cannot.
    #[must_use]
    pub fn start(socket: &Path, model: &Arc<Model>, method: &str, tokens: usize) -> Self {
        Self::struck(socket, model, (method, tokens), |_| {})
    }

    fn struck(
        socket: &Path,
        model: &Arc<Model>,
        (method, tokens): (&str, usize),
        before: impl FnMut(&'static str) + Send + 'static,
    ) -> Self {
        crate::compute_here();
        let shape = KvShape::new(model.config(), Dtype::F16);
        let options = DaemonOptions {
            methods: vec![method.parse().expect("a method")],
            dense_layers: 1,
            selects: Selects::Lane,
            deadline: PATIENCE,
            ..DaemonOptions::default()
        };
        let mut kv = DaemonKv::connect(socket, shape, options).expect("a session");
        let mut decoder = Decoder::new(model.clone(), DecoderOptions::default());
        let mut sequence = kv.sequence(0).expect("a sequence");
        let mut kv = Struck { kv, before: Box::new(before) };
        let prompt = prompt(model, tokens);
        let read = decoder.prefill(&mut kv, &mut sequence, &prompt, PrefillOptions::default());
        Self { kv, decoder, sequence, logits: read.expect("a prompt") }
    }

    /// One greedy step: its token.
    ///
    /// # Panics
    /// If it cannot be done.
    pub fn step(&mut self) -> u32 {
        self.try_step().expect("a step")
    }

    /// The same.
    ///
    /// # Errors
    /// Why it cannot be done.
    pub fn try_step(&mut self) -> Result<u32, String> {
        let token = argmax(&self.logits);
        let step = self.decoder.step(&mut self.kv, &mut [&mut self.sequence], &[token]);
        self.logits = step.map_err(|error| error.to_string())?.logits;
        Ok(token)
    }

    /// The tokens of so many steps.
    ///
    /// # Panics
    /// If they cannot be done.
    pub fn steps(&mut self, count: usize) -> Vec<u32> {
        (0..count).map(|_| self.step()).collect()
    }
}

/// What an engine says that nothing disturbs.
///
/// # Panics
/// If it says nothing.
#[must_use]
pub fn undisturbed(binary: &str, model: &Arc<Model>, method: &str, way: &Way, steps: usize) -> Vec<u32> {
    let folder = tempfile::tempdir().expect("a folder");
    let flags = way.flags(folder.path());
    let flags: Vec<&str> = flags.iter().map(String::as_str).collect();
    let daemon = Daemon::start(binary, &flags);
    let mut engine = Engine::start(&daemon.socket(), model, method, way.prompt);
    let found = engine.steps(steps);
    if way.host_percent.is_some() {
        assert!(daemon.status().sessions[0].spilled_pages > 0, "{method}: pages are on disk");
    }
    found
}

type Answers = Mutex<HashMap<String, Arc<OnceLock<Vec<u32>>>>>;

/// What an engine says in [`STEPS`] steps that nothing disturbs; the same for all tests of a program.
fn expected(binary: &str, model: &Arc<Model>, method: &str, way: &Way) -> Vec<u32> {
    static ANSWERS: LazyLock<Answers> = LazyLock::new(Answers::default);
    let answer = {
        let mut answers = ANSWERS.lock().unwrap_or_else(PoisonError::into_inner);
        Arc::clone(answers.entry(format!("{method} {way:?}")).or_default())
    };
    answer.get_or_init(|| undisturbed(binary, model, method, way, STEPS)).clone()
}

/// Tokens that differ, and who went on alone, if anything did.
fn compare(
    wrong: &mut Vec<String>,
    (method, way): (&str, &Way),
    engine: &Engine,
    (found, expected): (&[u32], &[u32]),
) {
    assert_eq!(found.len(), expected.len());
    let first = found.iter().zip(expected).position(|(a, b)| a != b);
    let alone = engine.kv.kv.alone();
    if first.is_some() || alone.is_some() {
        wrong.push(format!("{method} {way:?}: token {first:?} differs, alone: {alone:?}"));
    }
    assert_eq!(engine.kv.kv.fallbacks(), Fallbacks::default());
}

/// Restarts, kills and takes over between steps. Of the ways each method goes one, but the first all; with `KVOYANT_THOROUGH` all do.
///
/// # Panics
/// If any token is another one than without that.
pub fn between_steps(binary: &str, methods: &[&str], ways: &[Way]) {
    let model = synthetic::tiny(7);
    let mut wrong = Vec::new();
    for (method, way) in combinations(methods, ways) {
        let expected = expected(binary, &model, method, way);
        let Served { mut daemon, folder } = Served::start(binary, way);
        let mut engine = Engine::start(&daemon.socket(), &model, method, way.prompt);
        let mut found = Vec::new();
        for step in 0..STEPS {
            match step {
                3 => daemon.restart(Signal::SIGTERM),
                // The second one before anything has happened since.
                10 => {
                    daemon.restart(Signal::SIGKILL);
                    daemon.restart(Signal::SIGKILL);
                }
                25 => daemon.takeover(),
                32 => daemon.restart(Signal::SIGKILL),
                _ => {}
            }
            found.push(engine.step());
        }
        compare(&mut wrong, (method, way), &engine, (&found, &expected));
        // Of those that were killed one after the other the first has served nobody.
        let restarts = engine.kv.kv.take_stats().restarts;
        if restarts != 4 {
            wrong.push(format!("{method} {way:?}: answers told of {restarts} restarts"));
        }
        drop((daemon, folder));
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
}

/// Calls from kill to kill: prime, so that in time each call of a step is the one that follows.
const CALLS_BETWEEN: usize = 71;

/// Kills before every call of a step, those of the prompt among them.
///
/// # Panics
/// If any token is another one than without that.
pub fn before_calls(binary: &str, methods: &[&str], ways: &[Way]) {
    let model = synthetic::tiny(7);
    let mut wrong = Vec::new();
    for (at, (method, way)) in combinations(methods, ways).into_iter().enumerate() {
        let expected = expected(binary, &model, method, way);
        let Served { mut daemon, folder } = Served::start(binary, way);
        let socket = daemon.socket();
        // In so few steps half of the calls are reached: by every other one the other half.
        let (mut calls, mut stopped, mut kills) = (at % 2 * (CALLS_BETWEEN / 2), false, 0);
        let most_on_disk = Arc::new(AtomicU64::new(0));
        let seen = Arc::clone(&most_on_disk);
        let spills = way.host_percent.is_some();
        let mut engine = Engine::struck(&socket, &model, (method, way.prompt), move |call| {
            calls += 1;
            if std::mem::take(&mut stopped) {
                daemon.restart(Signal::SIGKILL);
            } else if calls % CALLS_BETWEEN == 0 {
                kills += 1;
                if spills {
                    let on_disk = daemon.status().sessions.first().map_or(0, |session| session.spilled_pages);
                    seen.fetch_max(on_disk, Ordering::Relaxed);
                }
                // What these ask for, nobody waits for yet: then nothing of it has been done when the daemon dies.
                if matches!(call, "hint" | "append" | "end" | "mark") && kills % 2 == 0 {
                    kill(daemon.pid(), Signal::SIGSTOP).expect("a signal");
                    stopped = true;
                } else {
                    daemon.restart(Signal::SIGKILL);
                }
            }
        });
        let found = engine.steps(STEPS);
        compare(&mut wrong, (method, way), &engine, (&found, &expected));
        assert!(!spills || most_on_disk.load(Ordering::Relaxed) > 0, "{method} {way:?}: nothing was on disk");
        drop((engine, folder));
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
}

struct SetWhenDropped<'a>(&'a AtomicBool);

impl Drop for SetWhenDropped<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// Ends the daemon at any moment of a step, of a start, of a claim.
///
/// # Panics
/// If any token is another one than without that.
pub fn at_any_moment(binary: &str, methods: &[&str], ways: &[Way]) {
    let model = synthetic::tiny(7);
    let mut wrong = Vec::new();
    for (method, way) in combinations(methods, ways) {
        let Served { mut daemon, folder } = Served::start(binary, way);
        let mut engine = Engine::start(&daemon.socket(), &model, method, way.prompt);
        let (steps, over) = (AtomicUsize::new(0), AtomicBool::new(false));
        let enough = AtomicBool::new(false);
        let mut found = Vec::new();
        std::thread::scope(|scope| {
            scope.spawn(|| {
                let killed = SetWhenDropped(&over);
                let before = |step: usize| {
                    while steps.load(Ordering::Relaxed) < step && !enough.load(Ordering::Relaxed) {
                        std::thread::sleep(Duration::from_micros(100));
                    }
                };
                for (at, signals) in [
                    &[Signal::SIGKILL][..],
                    // While the engine still looks for the daemon, or is being let in.
                    &[Signal::SIGKILL, Signal::SIGKILL, Signal::SIGTERM, Signal::SIGKILL],
                    &[Signal::SIGTERM],
                    &[Signal::SIGTERM, Signal::SIGTERM],
                ]
                .iter()
                .enumerate()
                {
                    before(4 + at * 8);
                    for (turn, signal) in signals.iter().enumerate() {
                        // No two at the same moment of a step, or of a claim.
                        std::thread::sleep(Duration::from_micros((311 + 977 * turn + 173 * at) as u64));
                        daemon.restart(*signal);
                    }
                }
                drop(killed);
                // The daemon ends with the thread that started it.
                while !enough.load(Ordering::Relaxed) {
                    std::thread::sleep(Duration::from_millis(1));
                }
            });
            // Also when a step panics: nobody waits for another one then.
            let _enough = SetWhenDropped(&enough);
            while !over.load(Ordering::Relaxed) || found.len() < STEPS / 2 {
                found.push(engine.step());
                steps.store(found.len(), Ordering::Relaxed);
            }
        });
        let expected = match found.len() {
            few if few <= STEPS => expected(binary, &model, method, way)[..few].to_vec(),
            many => undisturbed(binary, &model, method, way, many),
        };
        compare(&mut wrong, (method, way), &engine, (&found, &expected));
        drop(folder);
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
}
