//! The reference engine when its daemon dies or stands still in the middle of an answer: it finishes the answer, with the same logits as an
//! engine that attends to everything, and says that it went on alone.

use std::ops::ControlFlow;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use kvoyant_engine::{
    DaemonKv, DaemonOptions, DaemonSequence, Decoder, DecoderOptions, DenseKv, Dtype, ForwardError,
    GenerateOptions, KvBackend, KvShape, Logits, Model, PrefillOptions, Prompt, Sampler, argmax, generate,
    synthetic,
};
use kvoyant_tests::Daemon;
use kvoyant_tests::struck::Struck;
use nix::sys::signal::{Signal, kill};

const DAEMON: &str = env!("CARGO_BIN_EXE_kvoyantd-under-test");

/// Steps before the daemon goes, and after it: more than a page has rows, so that room runs out that only the daemon could give.
const BEFORE: usize = 3;
const AFTER: usize = 70;

fn prompt(model: &Model, tokens: usize) -> Vec<u32> {
    (0..tokens as u32).map(|i| (i * i * 31 + i * 7 + 3) % model.config().vocabulary as u32).collect()
}

fn connect(daemon: &Daemon, model: &Model, method: &str, deadline: Duration) -> DaemonKv {
    kvoyant_tests::compute_here();
    let shape = KvShape::new(model.config(), Dtype::F16);
    let methods = vec![method.parse().unwrap()];
    let options = DaemonOptions { methods, dense_layers: 1, deadline, ..DaemonOptions::default() };
    DaemonKv::connect(&daemon.socket(), shape, options).unwrap()
}

/// Greedy logits, step by step; `between` is called before each.
fn steps<B: KvBackend>(
    decoder: &mut Decoder,
    kv: &mut B,
    sequence: &mut B::Sequence,
    first: Vec<f32>,
    mut between: impl FnMut(usize),
) -> Vec<Vec<u32>> {
    let mut logits = first;
    (0..BEFORE + AFTER)
        .map(|step| {
            between(step);
            logits = decoder.step(kv, &mut [&mut *sequence], &[argmax(&logits)]).unwrap().logits;
            logits.iter().map(|logit| logit.to_bits()).collect()
        })
        .collect()
}

/// What an engine without a daemon says.
fn expected(decoder: &mut Decoder, prompt: &[u32]) -> Vec<Vec<u32>> {
    let mut dense = DenseKv::new(KvShape::new(decoder.model().config(), Dtype::F16));
    let mut sequence = dense.sequence();
    let first = decoder.prefill(&mut dense, &mut sequence, prompt, PrefillOptions::default()).unwrap();
    steps(decoder, &mut dense, &mut sequence, first, |_| {})
}

fn read(decoder: &mut Decoder, kv: &mut DaemonKv, prompt: &[u32]) -> (DaemonSequence, Vec<f32>) {
    let mut sequence = kv.sequence(0).unwrap();
    let first = decoder.prefill(kv, &mut sequence, prompt, PrefillOptions::default()).unwrap();
    (sequence, first)
}

#[test]
fn an_answer_whose_daemon_is_killed_goes_on_bit_for_bit_as_without_one() {
    let model = synthetic::tiny(7);
    let prompt = prompt(&model, 300);
    let mut decoder = Decoder::new(model.clone(), DecoderOptions::default());
    let expected = expected(&mut decoder, &prompt);
    for flags in [&["--in-place", "true"][..], &["--slab", "1MiB"]] {
        let mut daemon = Some(Daemon::start(DAEMON, flags));
        let mut kv = connect(daemon.as_ref().unwrap(), &model, "full", kvoyant_tests::PATIENCE);
        let (mut sequence, first) = read(&mut decoder, &mut kv, &prompt);
        let found = steps(&mut decoder, &mut kv, &mut sequence, first, |step| {
            if step == BEFORE {
                drop(daemon.take());
            }
        });
        assert!(found == expected, "{flags:?}: logits differ");
        let why = kv.alone().expect("it went on alone");
        assert!(why.contains("gone"), "{why}");
        let stats = kv.take_stats();
        // Where rows are selected in this process, it takes a few steps until the daemon is missed.
        assert!(stats.fallbacks.alone as usize >= AFTER / 2 * model.config().layers, "{stats:?}");
        assert_eq!(stats.steps as usize, BEFORE + AFTER);
        // What is cut off goes too, and what comes then is what would have come.
        kv.truncate(&mut sequence, 290).unwrap();
        let again = decoder.prefill(&mut kv, &mut sequence, &prompt[290..], PrefillOptions::default());
        let first = again.unwrap();
        let again = steps(&mut decoder, &mut kv, &mut sequence, first, |_| {});
        assert_eq!(again.len(), expected.len());
        let close = |a: &u32, b: &u32| (f32::from_bits(*a) - f32::from_bits(*b)).abs() < 1e-3;
        let same = again.iter().flatten().zip(expected.iter().flatten()).all(|(a, b)| close(a, b));
        assert!(same, "{flags:?}: logits differ after a cut");
    }
}

#[test]
fn an_answer_whose_daemon_is_stopped_goes_on_after_the_deadline_and_stays_right_when_it_runs_again() {
    let model = synthetic::tiny(7);
    let prompt = prompt(&model, 300);
    let mut decoder = Decoder::new(model.clone(), DecoderOptions::default());
    let expected = expected(&mut decoder, &prompt);
    let daemon = Daemon::start(DAEMON, &["--slab", "1MiB"]);
    // Long enough for a busy machine's daemon that runs.
    let mut kv = connect(&daemon, &model, "full", Duration::from_secs(2));
    let (mut sequence, first) = read(&mut decoder, &mut kv, &prompt);
    let found = steps(&mut decoder, &mut kv, &mut sequence, first, |step| {
        if step == BEFORE {
            daemon.stop();
        }
        if step == BEFORE + AFTER / 2 {
            kill(daemon.pid(), Signal::SIGCONT).unwrap();
        }
    });
    assert!(found == expected, "logits differ");
    let why = kv.alone().expect("it went on alone");
    assert!(why.contains("has not answered for 2"), "{why}");
    // The daemon has taken no harm.
    drop((sequence, kv));
    daemon.wait_for("no session", |status| status.totals.sessions == 0 && status.arena.used_bytes == 0);
}

#[test]
fn a_prompt_whose_daemon_dies_is_read_to_its_end() {
    let model = synthetic::tiny(7);
    let prompt = prompt(&model, 300);
    let options = DecoderOptions { chunk_tokens: 64, ..DecoderOptions::default() };
    let mut decoder = Decoder::new(model.clone(), options);
    let expected = expected(&mut decoder, &prompt);
    let mut daemon = Some(Daemon::start(DAEMON, &["--in-place", "true"]));
    let mut kv = connect(daemon.as_ref().unwrap(), &model, "full", kvoyant_tests::PATIENCE);
    let mut sequence = kv.sequence(0).unwrap();
    let mut kill = |done: usize, _: usize| {
        if done >= 128 {
            drop(daemon.take());
        }
        ControlFlow::Continue(())
    };
    let options = PrefillOptions { progress: Some(&mut kill), ..PrefillOptions::default() };
    let first = decoder.prefill(&mut kv, &mut sequence, &prompt, options).unwrap();
    let found = steps(&mut decoder, &mut kv, &mut sequence, first, |_| {});
    assert!(found == expected, "logits differ");
    assert!(kv.alone().is_some());
    // There is nobody to open another one.
    assert!(kv.sequence(0).is_err());
}

#[test]
fn what_a_dead_daemon_had_on_disk_is_computed_again_from_the_first_token_that_is_gone() {
    let model = synthetic::tiny(7);
    let prompt = prompt(&model, 2000);
    let options = DecoderOptions { chunk_tokens: 64, ..DecoderOptions::default() };
    let mut decoder = Decoder::new(model.clone(), options);
    let expected = expected(&mut decoder, &prompt);
    let folder = tempfile::tempdir().unwrap();
    let spill = folder.path().display().to_string();
    let flags = ["--in-place", "true", "--spill", &spill, "--spill-bytes", "256MiB", "--host-percent", "25"];
    let daemon = Daemon::start(DAEMON, &flags);
    let mut kv = connect(&daemon, &model, "full", kvoyant_tests::PATIENCE);
    let (mut sequence, first) = read(&mut decoder, &mut kv, &prompt);
    assert!(daemon.status().sessions[0].spilled_pages > 0, "pages are on disk");
    drop(daemon);
    let token = argmax(&first);
    let error = decoder.step(&mut kv, &mut [&mut sequence], &[token]).unwrap_err();
    assert!(error.to_string().contains("compute them again"), "{error}");
    let again = decoder.refill(&mut kv, &mut sequence, &prompt).unwrap();
    assert!((1..=prompt.len()).contains(&again), "{again} tokens were computed again");
    let found = steps(&mut decoder, &mut kv, &mut sequence, first, |_| {});
    let close = |a: &u32, b: &u32| (f32::from_bits(*a) - f32::from_bits(*b)).abs() < 1e-3;
    let same = found.iter().flatten().zip(expected.iter().flatten()).all(|(a, b)| close(a, b));
    assert!(same, "logits differ");
    assert!(kv.alone().is_some());
}

/// Reads a prompt and answers it, as `kvoyant run` does.
fn answer<B: KvBackend>(model: &Arc<Model>, kv: &mut B, sequence: &mut B::Sequence) -> (Vec<u32>, Vec<f32>) {
    let options = DecoderOptions { chunk_tokens: 64, ..DecoderOptions::default() };
    let mut decoder = Decoder::new(model.clone(), options);
    let tokens = prompt(model, 1500);
    let logits = decoder.prefill(kv, sequence, &tokens, PrefillOptions::default()).unwrap();
    let options = GenerateOptions { max_tokens: 24, ignore_end: true };
    let begun = Prompt { tokens: &tokens, logits: logits.clone() };
    let mut greedy = Sampler::greedy();
    let made = generate(&mut decoder, kv, sequence, begun, &mut greedy, options, &mut |_, _| {
        ControlFlow::Continue(())
    });
    (made.unwrap().tokens, logits)
}

#[test]
fn an_answer_over_pages_on_disk_is_finished_whenever_its_daemon_dies() {
    let model = synthetic::tiny(7);
    let mut dense = DenseKv::new(KvShape::new(model.config(), Dtype::F16));
    let mut sequence = dense.sequence();
    let (expected, logits) = answer(&model, &mut dense, &mut sequence);
    // Calls of a chunk and of a step, and how many of their kind come before the daemon dies: of 24 chunks, layers and 23 steps. In the
    // first chunks nothing is on disk yet.
    let layers = model.config().layers;
    let moments = [
        ("store", 3 * layers),
        ("store", 12 * layers + 2),
        ("observe", 20 * layers + 1),
        ("read", 14 * layers),
        ("read", 23 * layers + layers - 1),
        ("commit", 16),
        ("begin", 0),
        ("begin", 9),
        ("append", 3 * layers + 1),
        ("attend", 5 * layers),
        ("attend", 11 * layers + layers - 1),
        ("end", 7),
    ];
    let (mut on_disk, mut tried) = (0, 0);
    for (at, (call, nth)) in moments.into_iter().enumerate() {
        // One of every kind of call.
        if ![1, 2, 3, 5, 7, 8, 10, 11].contains(&at) && !kvoyant_tests::thorough() {
            continue;
        }
        tried += 1;
        let folder = tempfile::tempdir().unwrap();
        let spill = folder.path().display().to_string();
        let flags =
            ["--in-place", "true", "--spill", &spill, "--spill-bytes", "256MiB", "--host-percent", "25"];
        let daemon = Daemon::start(DAEMON, &flags);
        let mut kv = connect(&daemon, &model, "full", kvoyant_tests::PATIENCE);
        let mut sequence = kv.sequence(0).unwrap();
        let (spilled, mut daemon, mut left) = (Arc::new(AtomicU64::new(0)), Some(daemon), nth);
        let seen = Arc::clone(&spilled);
        let before = move |name: &'static str| {
            if name != call || daemon.is_none() {
                return;
            }
            if left > 0 {
                left -= 1;
                return;
            }
            if let Some(daemon) = daemon.take() {
                seen.store(daemon.status().sessions[0].spilled_pages, Ordering::Relaxed);
            }
        };
        let mut kv = Struck { kv, before: Box::new(before) };
        let (found, first) = answer(&model, &mut kv, &mut sequence);
        let alone = kv.kv.alone().unwrap_or_else(|| panic!("{call} {nth}: it did not go on alone"));
        assert!(alone.contains("gone"), "{call} {nth}: {alone}");
        assert_eq!(found, expected, "{call} {nth}: other tokens, with {spilled:?} pages on disk");
        let apart = first.iter().zip(&logits).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
        assert!(apart < 1e-3, "{call} {nth}: the prompt's logits are {apart} apart");
        assert!(kv.kv.fallbacks().alone > 0, "{call} {nth}: and nobody heard of it");
        on_disk += u64::from(spilled.load(Ordering::Relaxed) > 0);
    }
    assert!(on_disk + 3 >= tried, "only in {on_disk} of {tried} cases pages were on disk");
}

#[test]
fn what_was_there_before_a_prompt_is_computed_again_by_who_knows_its_tokens() {
    let model = synthetic::tiny(7);
    let tokens = prompt(&model, 1500);
    let options = DecoderOptions { chunk_tokens: 64, ..DecoderOptions::default() };
    let mut decoder = Decoder::new(model.clone(), options);
    let mut dense = DenseKv::new(KvShape::new(model.config(), Dtype::F16));
    let mut sequence = dense.sequence();
    let expected = decoder.prefill(&mut dense, &mut sequence, &tokens, PrefillOptions::default()).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let spill = folder.path().display().to_string();
    let flags = ["--in-place", "true", "--spill", &spill, "--spill-bytes", "256MiB", "--host-percent", "25"];
    let daemon = Daemon::start(DAEMON, &flags);
    let mut kv = connect(&daemon, &model, "full", kvoyant_tests::PATIENCE);
    let mut sequence = kv.sequence(0).unwrap();
    decoder.prefill(&mut kv, &mut sequence, &tokens[..1300], PrefillOptions::default()).unwrap();
    assert!(daemon.status().sessions[0].spilled_pages > 0, "pages are on disk");
    drop(daemon);
    // Who knows the rest alone hears what is lost, and nothing is lost by trying.
    let error =
        decoder.prefill(&mut kv, &mut sequence, &tokens[1300..], PrefillOptions::default()).unwrap_err();
    assert!(error.to_string().contains("compute them again"), "{error}");
    let (mut told, mut progress) = (Vec::new(), Vec::new());
    let mut each = |index: usize, _: &[f32]| told.push(index);
    let mut report = |done: usize, total: usize| {
        progress.push((done, total));
        ControlFlow::Continue(())
    };
    let options = PrefillOptions {
        logits: Logits::Each(&mut each),
        progress: Some(&mut report),
        ..PrefillOptions::default()
    };
    let found = decoder.prefill_rest(&mut kv, &mut sequence, &tokens, options).unwrap();
    let apart = found.iter().zip(&expected).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
    assert!(apart < 1e-3, "logits are {apart} apart");
    assert_eq!(sequence.tokens(), tokens.len());
    // Of what had been read before nobody is told again.
    assert_eq!(told, (0..200).collect::<Vec<_>>());
    assert!(progress.iter().all(|(done, total)| done <= total && *total == 200), "{progress:?}");
    let error = decoder.prefill_rest(&mut kv, &mut sequence, &tokens, PrefillOptions::default()).unwrap_err();
    assert!(matches!(error, ForwardError::BatchMismatch { .. }), "{error}");
}
