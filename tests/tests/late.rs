//! Answers that are late, where the engine chose not to wait: what is attended instead, and that it is said.

use std::time::Duration;

use kvoyant_client::{Client, Error, Fallback, Hint, InTime, Member, Options};
use kvoyant_engine::{
    DaemonKv, DaemonOptions, DaemonSequence, Decoder, DecoderOptions, Dtype, KvShape, Model, PrefillOptions,
    synthetic,
};
use kvoyant_tests::{Daemon, PATIENCE, fake};
use nix::sys::signal::{Signal, kill};

const DAEMON: &str = env!("CARGO_BIN_EXE_kvoyantd-under-test");
/// A link over which nothing comes while a test lasts.
const NEVER: [&str; 2] = ["--shape-latency-us", "600000000"];
const PROMPT: usize = 300;
const STEPS: [u32; 4] = [3, 7, 9, 1];

fn prompt(model: &Model) -> Vec<u32> {
    (0..PROMPT as u32).map(|i| (i * i * 31 + i * 7 + 3) % model.config().vocabulary as u32).collect()
}

struct Engine {
    kv: DaemonKv,
    decoder: Decoder,
    sequence: DaemonSequence,
}

impl Engine {
    fn start(
        daemon: &Daemon,
        model: &std::sync::Arc<Model>,
        method: &str,
        late: (Fallback, Duration),
    ) -> Self {
        let shape = KvShape::new(model.config(), Dtype::F16);
        let options = DaemonOptions {
            methods: vec![method.parse().unwrap()],
            dense_layers: 1,
            fallback: late.0,
            late_after: late.1,
            deadline: 10 * PATIENCE,
            ..DaemonOptions::default()
        };
        let mut kv = DaemonKv::connect(&daemon.socket(), shape, options).unwrap();
        let mut decoder = Decoder::new(model.clone(), DecoderOptions::default());
        let mut sequence = kv.sequence(0).unwrap();
        decoder.prefill(&mut kv, &mut sequence, &prompt(model), PrefillOptions::default()).unwrap();
        kv.take_stats();
        Self { kv, decoder, sequence }
    }

    fn step(&mut self, token: u32) -> Vec<u32> {
        let out = self.decoder.step(&mut self.kv, &mut [&mut self.sequence], &[token]).unwrap();
        out.logits.iter().map(|logit| logit.to_bits()).collect()
    }

    fn steps(&mut self) -> Vec<Vec<u32>> {
        STEPS.iter().map(|token| self.step(*token)).collect()
    }
}

#[test]
fn resident_only_attends_to_sinks_and_window_and_to_nothing_else() {
    let model = synthetic::tiny(7);
    let quick = Daemon::start(DAEMON, &["--in-place", "true"]);
    let expected = Engine::start(&quick, &model, "window", (Fallback::Wait, Duration::ZERO)).steps();
    let slow = Daemon::start(DAEMON, &NEVER);
    // Fewer tickets than answers that never come: those without one are late at once.
    for fallback in [Fallback::ResidentOnly, Fallback::Partial] {
        let late = (fallback, Duration::from_millis(2));
        let mut engine = Engine::start(&slow, &model, "quest:budget=20%", late);
        assert!(engine.steps() == expected, "{fallback}: not what sinks and window give");
        let selected = model.config().layers - 1;
        let stats = engine.kv.take_stats().fallbacks;
        let late = (STEPS.len() * selected) as u64;
        // No answer has named anything yet, so that both have the same to attend to.
        match fallback {
            Fallback::ResidentOnly => assert_eq!((stats.resident_only, stats.partial), (late, 0)),
            _ => assert_eq!((stats.resident_only, stats.partial), (0, late)),
        }
        let options = DaemonOptions::default();
        let beyond = |position: usize| position + 1 - options.sinks - options.window;
        let rows: usize = (PROMPT..PROMPT + STEPS.len()).map(beyond).sum();
        assert_eq!(stats.rows_left_out as usize, rows * selected * model.config().kv_heads);
        assert_eq!(engine.kv.alone(), None, "it has not given the daemon up");
    }
}

#[test]
fn partial_attends_to_what_the_last_answer_named_while_the_daemon_stands_still_and_to_its_answers_again_after()
 {
    let model = synthetic::tiny(7);
    let daemon = Daemon::start(DAEMON, &["--slab", "1MiB"]);
    let late = (Fallback::Partial, Duration::from_millis(300));
    let mut engine = Engine::start(&daemon, &model, "quest:budget=20%", late);
    engine.step(3);
    engine.kv.take_stats();
    daemon.stop();
    // One step's requests: those of a second one might find the ring full, and wait for room until the deadline.
    engine.step(7);
    let selected = (model.config().layers - 1) as u64;
    let stats = engine.kv.take_stats().fallbacks;
    assert_eq!((stats.partial, stats.resident_only, stats.alone), (selected, 0, 0));
    let options = DaemonOptions::default();
    let beyond = |position: usize| position + 1 - options.sinks - options.window;
    let all = beyond(PROMPT + 1) as u64 * selected * model.config().kv_heads as u64;
    assert!(stats.rows_left_out < all, "of {all} rows {} were left out", stats.rows_left_out);
    kill(daemon.pid(), Signal::SIGCONT).unwrap();
    let answered = (0..10).any(|_| {
        engine.step(5);
        let stats = engine.kv.take_stats();
        stats.fallbacks.is_none() && stats.answers == selected
    });
    assert!(answered, "answers never came again");
    assert_eq!(engine.kv.fallbacks().alone, 0);
}

#[test]
fn a_request_may_have_another_fallback_than_its_session() {
    let daemon = Daemon::start(DAEMON, &NEVER);
    let options = Options { fallback: Fallback::Partial, late_after: Duration::ZERO, ..Options::default() };
    let client = Client::connect(&daemon.socket(), options).unwrap();
    let model = client.register(fake::spec(&["full"]), &[]).unwrap();
    let sequence = model.open(0, 100).unwrap();
    fake::fill(&model, &sequence, 1, 100).unwrap();
    let ask =
        || model.speculate(1, &[Member { sequence: &sequence, position: 100, hint: Hint::None }]).unwrap();
    assert!(matches!(ask().or_late(PATIENCE), Ok(InTime::Late { .. })));
    let waits = ask().with_fallback(Fallback::Wait, Duration::ZERO).or_late(Duration::from_millis(5));
    assert!(matches!(waits, Err(Error::Deadline { .. })), "{waits:?}");
}
