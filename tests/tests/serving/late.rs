//! Answers that are late, where the engine chose not to wait: what is attended instead, and that it is said.

use std::time::Duration;

use kvoyant_client::{Client, Error, Fallback, Hint, InTime, Member, Options};
use kvoyant_engine::{
    DaemonKv, DaemonOptions, DaemonSequence, Decoder, DecoderOptions, Dtype, KvBackend, KvShape, Model,
    PrefillOptions, synthetic,
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
        Self::start_within(daemon, model, method, late, 10 * PATIENCE)
    }

    fn start_within(
        daemon: &Daemon,
        model: &std::sync::Arc<Model>,
        method: &str,
        late: (Fallback, Duration),
        deadline: Duration,
    ) -> Self {
        let shape = KvShape::new(model.config(), Dtype::F16);
        let options = DaemonOptions {
            methods: vec![method.parse().unwrap()],
            dense_layers: 1,
            fallback: late.0,
            late_after: late.1,
            deadline,
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

/// Steps that the room lasts for which a sequence of the prompt has: the rest of its last page.
const ROOM: usize = 16;

#[test]
fn steps_beside_a_daemon_that_stands_still_go_on_and_it_hears_of_them_when_it_runs_again() {
    let model = synthetic::tiny(7);
    let selected = (model.config().layers - 1) as u64;
    for (fallback, method) in [
        (Fallback::Partial, "quest:budget=20%"),
        (Fallback::ResidentOnly, "quest:budget=20%"),
        // Marks of the text come before its rows.
        (Fallback::Partial, "dynsplit:budget=64,boundary=dynamic,score=marks,min=8,max=32"),
        (Fallback::Partial, "resv"),
        (Fallback::Partial, "full"),
    ] {
        let daemon = Daemon::start(DAEMON, &["--slab", "1MiB"]);
        // Had each of these steps' answers been waited for, or room in the ring, which is that of a few steps, this would take for ever.
        let mut engine = Engine::start(&daemon, &model, method, (fallback, Duration::from_millis(300)));
        engine.step(3);
        engine.kv.take_stats();
        daemon.stop();
        for step in 1..ROOM as u64 {
            engine.step(7);
            let stats = engine.kv.take_stats();
            let late = match fallback {
                Fallback::ResidentOnly => stats.fallbacks.resident_only,
                _ => stats.fallbacks.partial,
            };
            assert_eq!((late, stats.answers), (selected, 0), "{method} {fallback}: step {step}");
            assert_eq!(engine.kv.alone(), None, "{method} {fallback}: step {step}");
        }
        kill(daemon.pid(), Signal::SIGCONT).unwrap();
        let answered = (0..10).any(|_| {
            engine.step(5);
            let stats = engine.kv.take_stats();
            stats.fallbacks.is_none() && stats.answers == selected
        });
        assert!(answered, "{method} {fallback}: answers never came again");
        assert_eq!(engine.kv.fallbacks().alone, 0, "{method} {fallback}");
        // It knows of every row: of what is forked now, and of what is cut.
        let mut fork = engine.kv.fork(&mut engine.sequence, None).unwrap();
        engine.kv.truncate(&mut fork, PROMPT + 2).unwrap();
        let tokens = (engine.sequence.tokens() + fork.tokens()) as u64;
        daemon.wait_for("every row", |status| status.sessions[0].tokens == tokens);
        engine.decoder.step(&mut engine.kv, &mut [&mut fork], &[1]).unwrap();
    }
}

#[test]
fn rows_that_are_selected_here_are_selected_on_beside_a_daemon_that_stands_still() {
    let model = synthetic::tiny(7);
    let start = |daemon: &Daemon| {
        let late = (Fallback::Partial, Duration::from_millis(300));
        Engine::start(daemon, &model, "quest:budget=20%", late)
    };
    let flags = ["--in-place", "true"];
    let daemon = Daemon::start(DAEMON, &flags);
    let mut engine = start(&daemon);
    let expected: Vec<_> = (0..ROOM + 3).map(|step| engine.step(step as u32)).collect();
    assert!(engine.kv.take_stats().selected_here > 0, "rows are selected in this process");
    let daemon = Daemon::start(DAEMON, &flags);
    let mut engine = start(&daemon);
    let mut found: Vec<_> = vec![engine.step(0)];
    daemon.stop();
    found.extend((1..ROOM).map(|step| engine.step(step as u32)));
    kill(daemon.pid(), Signal::SIGCONT).unwrap();
    found.extend((ROOM..ROOM + 3).map(|step| engine.step(step as u32)));
    assert!(found == expected, "other logits");
    assert_eq!((engine.kv.alone(), engine.kv.fallbacks().is_none()), (None, true));
    // Where it has yet to be given a processor, it is told of the rows with a later step.
    let mut steps = 0;
    while daemon.status().sessions[0].tokens != engine.sequence.tokens() as u64 {
        assert!(steps < 200, "the daemon never had every row: {:?}", daemon.status());
        std::thread::sleep(Duration::from_millis(50));
        if steps % 4 == 3 {
            engine.step(1);
        }
        steps += 1;
    }
}

#[test]
fn a_daemon_that_stands_still_for_the_deadline_or_dies_meanwhile_is_gone_on_without() {
    let model = synthetic::tiny(7);
    for dies in [false, true] {
        let daemon = Daemon::start(DAEMON, &["--slab", "1MiB"]);
        let shape = KvShape::new(model.config(), Dtype::F16);
        let options = DaemonOptions {
            methods: vec!["full".parse().unwrap()],
            dense_layers: 1,
            fallback: Fallback::Partial,
            late_after: Duration::from_millis(5),
            deadline: if dies { 10 * PATIENCE } else { Duration::from_secs(2) },
            ..DaemonOptions::default()
        };
        let mut kv = DaemonKv::connect(&daemon.socket(), shape, options).unwrap();
        let mut decoder = Decoder::new(model.clone(), DecoderOptions::default());
        let mut sequence = kv.sequence(0).unwrap();
        decoder.prefill(&mut kv, &mut sequence, &prompt(&model), PrefillOptions::default()).unwrap();
        daemon.stop();
        let mut daemon = Some(daemon);
        let mut steps = 0;
        // At the latest where the room ends that only the daemon could add to.
        while kv.alone().is_none() {
            assert!(steps <= ROOM + 80, "it never goes on alone");
            decoder.step(&mut kv, &mut [&mut sequence], &[steps as u32]).unwrap();
            steps += 1;
            if dies && steps == 8 {
                drop(daemon.take());
            }
        }
        let why = kv.alone().unwrap_or_default().to_owned();
        assert!(why.contains(if dies { "gone" } else { "has not answered" }), "{why}");
        for token in 0..40 {
            decoder.step(&mut kv, &mut [&mut sequence], &[token]).unwrap();
        }
        assert_eq!(sequence.tokens(), PROMPT + steps + 40);
        let row_values = model.config().kv_heads * sequence.tokens() * model.config().head_dim;
        let (mut k, mut v) = (vec![f32::NAN; row_values], vec![f32::NAN; row_values]);
        kv.read(1, &sequence, 0..sequence.tokens(), &mut k, &mut v).unwrap();
        assert!(k.iter().chain(&v).all(|value| value.is_finite()), "every row is there");
    }
}

#[test]
fn between_two_steps_the_daemon_is_not_silent_for_nobody_asks_it() {
    const DEADLINE: Duration = Duration::from_secs(4);
    let model = synthetic::tiny(7);
    let daemon = Daemon::start(DAEMON, &["--slab", "1MiB"]);
    let late = (Fallback::Partial, Duration::from_millis(300));
    let mut engine = Engine::start_within(&daemon, &model, "quest:budget=20%", late, DEADLINE);
    engine.step(3);
    for _ in 0..2 {
        daemon.stop();
        engine.step(7);
        kill(daemon.pid(), Signal::SIGCONT).unwrap();
        assert!(engine.kv.take_stats().fallbacks.partial > 0, "its answer was late");
        // An engine without a request.
        std::thread::sleep(DEADLINE + Duration::from_millis(500));
    }
    engine.step(5);
    assert_eq!(engine.kv.alone(), None);
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
