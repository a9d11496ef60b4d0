//! The reference engine attending on a GPU that the daemon serves, on softcuda: compared with the same engine without.

use std::sync::Arc;

use kvoyant_engine::{
    DaemonKv, DaemonOptions, Decoder, DecoderOptions, DenseKv, Dtype, KvBackend, KvShape, Model,
    PrefillOptions, WeightsMode, argmax, synthetic,
};
use kvoyant_methods::infinigen::SkewBuilder;
use kvoyant_methods::{Artifact, Artifacts};
use kvoyant_tests::Daemon;
use kvoyant_tests::softcuda::{Machine, in_child, is_child, on_softcuda};
use kvoyant_tests::this_test;
use nix::sys::signal::Signal;

const DAEMON: &str = env!("CARGO_BIN_EXE_kvoyantd-under-test");

/// A machine on which compiled kernels are kept in its own folder.
fn machine() -> Machine {
    let machine = Machine::new();
    let state = machine.state().join("home");
    machine.with("XDG_STATE_HOME", state.to_str().expect("a path of text"))
}

/// A daemon on the machine's GPU.
fn start(flags: &[&str]) -> Daemon {
    let state = std::env::var("XDG_STATE_HOME").unwrap();
    Daemon::start(DAEMON, &[&["--device", "cuda:0", "--slab", "4MiB", "--state", &state], flags].concat())
}

fn prompt(model: &Model, tokens: usize) -> Vec<u32> {
    let mut state = 12345u32;
    (0..tokens)
        .map(|_| {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 8) % model.config().vocabulary as u32
        })
        .collect()
}

/// Skew matrices that turn nothing: good for mechanics.
fn identity(options: &DaemonOptions, shape: &KvShape) -> Artifacts {
    let shape = options.shape(shape, 32);
    let mut builder = SkewBuilder::new(&shape).unwrap();
    let values = |heads: usize| -> Vec<f32> {
        let d = shape.head_dim;
        (0..d)
            .flat_map(|t| (0..heads * d).map(move |j| f32::from(u8::from(j % d == t)) * (2.0 + t as f32)))
            .collect()
    };
    for layer in 0..shape.layers {
        builder.observe(layer, &values(shape.query_heads), &values(shape.kv_heads));
    }
    [Artifact::Skew(Arc::new(builder.finish().unwrap()))].into_iter().collect()
}

fn connect(daemon: &Daemon, model: &Model, dtype: Dtype, methods: &[&str]) -> DaemonKv {
    let methods = methods.iter().map(|text| text.parse().unwrap()).collect();
    let shape = KvShape::new(model.config(), dtype);
    let options = DaemonOptions { methods, dense_layers: 1, ..DaemonOptions::default() };
    let artifacts = identity(&options, &shape);
    DaemonKv::connect(&daemon.socket(), shape, DaemonOptions { artifacts, ..options }).unwrap()
}

/// Logits of a prompt and some steps with given tokens.
fn logits<B: KvBackend>(
    decoder: &mut Decoder,
    kv: &mut B,
    sequence: &mut B::Sequence,
    prompt: &[u32],
) -> Vec<Vec<f32>> {
    let mut all = vec![decoder.prefill(kv, sequence, prompt, PrefillOptions::default()).unwrap()];
    for token in [1, 2, 3] {
        all.push(decoder.step(kv, &mut [&mut *sequence], &[token]).unwrap().logits);
    }
    all
}

/// The device sums in another order than the host, and no more than that may differ.
fn assert_close(found: &[f32], wanted: &[f32], what: &str) {
    assert_eq!(argmax(found), argmax(wanted), "{what}: another token");
    let apart = found.iter().zip(wanted).map(|(a, b)| (a - b).abs() / b.abs().max(1.0)).fold(0.0, f32::max);
    assert!(apart <= 2e-3, "{what}: logits are {apart} apart");
}

fn assert_all_close(found: &[Vec<f32>], wanted: &[Vec<f32>], what: &str) {
    assert_eq!(found.len(), wanted.len());
    for (step, (found, wanted)) in found.iter().zip(wanted).enumerate() {
        assert_close(found, wanted, &format!("{what}, step {step}"));
    }
}

fn dense_logits(decoder: &mut Decoder, model: &Model, dtype: Dtype, prompt: &[u32]) -> Vec<Vec<f32>> {
    let mut dense = DenseKv::new(KvShape::new(model.config(), dtype));
    let mut sequence = dense.sequence();
    logits(decoder, &mut dense, &mut sequence, prompt)
}

#[test]
fn full_gives_denses_tokens_on_a_gpu_in_every_storage_type() {
    if !on_softcuda(this_test!(), &machine()) {
        return;
    }
    let model = synthetic::tiny(7);
    let prompt = prompt(&model, 333);
    let mut decoder = Decoder::new(model.clone(), DecoderOptions::default());
    let daemon = start(&[]);
    for dtype in [Dtype::F32, Dtype::F16, Dtype::Bf16] {
        let expected = dense_logits(&mut decoder, &model, dtype, &prompt);
        let mut kv = connect(&daemon, &model, dtype, &["full"]);
        assert_eq!(kv.model().device(), "cuda:0");
        kv.measure(true);
        let mut sequence = kv.sequence(0).unwrap();
        let found = logits(&mut decoder, &mut kv, &mut sequence, &prompt);
        assert_all_close(&found, &expected, dtype.name());
        let stats = kv.take_stats();
        assert!(stats.rows_selected > 0 && stats.bytes_moved > 0, "{stats:?}");
        assert!((stats.attention_mass().unwrap() - 1.0).abs() < 1e-4, "{stats:?}");
    }
}

#[test]
fn every_way_to_export_and_to_signal_gives_the_same_tokens() {
    if !on_softcuda(this_test!(), &machine()) {
        return;
    }
    let model = synthetic::tiny(7);
    let prompt = prompt(&model, 200);
    let mut decoder = Decoder::new(model.clone(), DecoderOptions::default());
    let mut first: Option<Vec<Vec<f32>>> = None;
    for (export, signal) in [
        ("descriptor", "timeline64"),
        ("handle", "timeline64"),
        ("descriptor", "timeline32"),
        ("handle", "events"),
        ("descriptor", "events"),
    ] {
        let daemon = start(&["--export", export, "--signal", signal]);
        let mut kv = connect(&daemon, &model, Dtype::F16, &["infinigen:budget=20%"]);
        let mut sequence = kv.sequence(0).unwrap();
        let found = logits(&mut decoder, &mut kv, &mut sequence, &prompt);
        assert!(kv.take_stats().rows_selected > 0);
        match &first {
            None => first = Some(found),
            Some(first) => assert!(*first == found, "{export} and {signal} give other logits"),
        }
        drop((sequence, kv));
        assert!(daemon.end(Signal::SIGTERM).0.success());
    }
}

#[test]
fn what_methods_select_is_attended_on_a_gpu_as_on_the_host_and_kept_there_for_the_next_step() {
    if !on_softcuda(this_test!(), &machine()) {
        return;
    }
    let model = synthetic::tiny(7);
    let prompt = prompt(&model, 300);
    let methods =
        ["quest:budget=20%", "infinigen:budget=20%", "infinigen:alpha=5", "window", "random:budget=20%"];
    let host = Daemon::start(DAEMON, &["--slab", "4MiB"]);
    let gpu = start(&[]);
    let mut decoder = Decoder::new(model.clone(), DecoderOptions::default());
    for method in methods {
        let mut answers = Vec::new();
        for daemon in [&host, &gpu] {
            let mut kv = connect(daemon, &model, Dtype::F16, &[method]);
            let mut sequence = kv.sequence(0).unwrap();
            let found = logits(&mut decoder, &mut kv, &mut sequence, &prompt);
            let stats = kv.take_stats();
            if method != "window" {
                assert!(stats.rows_selected > 0, "{method}: {stats:?}");
            }
            if method.contains("20%") {
                assert!(stats.rows_hit > 0, "{method}: {stats:?}");
            }
            answers.push((found, stats.rows_selected));
        }
        let [(on_host, rows_host), (on_gpu, rows_gpu)] = &answers[..] else { panic!("two daemons") };
        assert_all_close(on_gpu, on_host, method);
        // Rounding may turn a row at the threshold, and no more.
        assert!(rows_host.abs_diff(*rows_gpu) <= rows_host / 50, "{method}: {rows_host} and {rows_gpu} rows");
    }
}

#[test]
fn forks_decode_on_a_gpu_as_one_batch_and_go_on_after_a_truncation() {
    if !on_softcuda(this_test!(), &machine()) {
        return;
    }
    let model = synthetic::tiny(7);
    let prompt = prompt(&model, 200);
    let daemon = start(&[]);
    let methods = ["full", "infinigen:budget=30%", "quest:budget=30%"];
    let mut kv = connect(&daemon, &model, Dtype::F32, &methods);
    let mut decoder = Decoder::new(model.clone(), DecoderOptions::default());
    let mut base = kv.sequence(0).unwrap();
    decoder.prefill(&mut kv, &mut base, &prompt, PrefillOptions::default()).unwrap();
    for (method, name) in methods.iter().enumerate() {
        // Each alone, and all three together; the third leaves after the first step.
        let questions = [3u32, 7, 9];
        let mut alone = Vec::new();
        for question in questions {
            let mut fork = kv.fork(&mut base, Some(method)).unwrap();
            let mut step = |token| decoder.step(&mut kv, &mut [&mut fork], &[token]).unwrap().logits;
            alone.push([step(question), step(1)]);
        }
        let mut forks: Vec<_> = (0..3).map(|_| kv.fork(&mut base, Some(method)).unwrap()).collect();
        for (step, tokens) in [questions, [1, 1, 1]].into_iter().enumerate() {
            let members = 3 - step;
            let mut batch: Vec<_> = forks.iter_mut().take(members).collect();
            let out = decoder.step(&mut kv, &mut batch, &tokens[..members]).unwrap();
            for (member, alone) in alone.iter().enumerate().take(members) {
                assert_close(out.of(member, members), &alone[step], &format!("{name}: member {member}"));
            }
        }
        // What was dropped leaves no trace.
        let [first, second, ..] = &mut forks[..] else { panic!("three forks") };
        kv.truncate(first, 200).unwrap();
        kv.truncate(second, 200).unwrap();
        decoder.step(&mut kv, &mut [&mut *first], &[5]).unwrap();
        kv.truncate(first, 200).unwrap();
        for token in [11, 12] {
            let twisted = decoder.step(&mut kv, &mut [&mut *first], &[token]).unwrap().logits;
            let straight = decoder.step(&mut kv, &mut [&mut *second], &[token]).unwrap().logits;
            assert_close(&twisted, &straight, &format!("{name}: after a truncation"));
        }
        kv.close(forks).unwrap();
    }
}

#[test]
fn layers_with_a_sliding_window_are_attended_on_a_gpu_from_the_engines_own_memory() {
    if !on_softcuda(this_test!(), &machine()) {
        return;
    }
    let mut config = synthetic::tiny_config();
    config.sliding_window = (0..config.layers).map(|layer| (layer % 2 == 1).then_some(40)).collect();
    let model = synthetic::Checkpoint::random(config, 3).model(WeightsMode::F32);
    let prompt = prompt(&model, 150);
    let mut decoder = Decoder::new(model.clone(), DecoderOptions::default());
    let expected = dense_logits(&mut decoder, &model, Dtype::F16, &prompt);
    let daemon = start(&[]);
    let mut kv = connect(&daemon, &model, Dtype::F16, &["full"]);
    let mut sequence = kv.sequence(0).unwrap();
    assert_all_close(&logits(&mut decoder, &mut kv, &mut sequence, &prompt), &expected, "sliding layers");
}

#[test]
fn a_daemon_that_dies_or_stands_still_fails_the_step_within_its_deadline_and_hangs_nothing() {
    if !on_softcuda(this_test!(), &machine()) {
        return;
    }
    let model = synthetic::tiny(7);
    let prompt = prompt(&model, 100);
    let mut decoder = Decoder::new(model.clone(), DecoderOptions::default());
    for dies in [true, false] {
        let daemon = start(&[]);
        let shape = KvShape::new(model.config(), Dtype::F16);
        let options = DaemonOptions {
            methods: vec!["infinigen:skew=off".parse().unwrap()],
            dense_layers: 1,
            deadline: std::time::Duration::from_millis(300),
            ..DaemonOptions::default()
        };
        let mut kv = DaemonKv::connect(&daemon.socket(), shape, options).unwrap();
        let mut sequence = kv.sequence(0).unwrap();
        decoder.prefill(&mut kv, &mut sequence, &prompt, PrefillOptions::default()).unwrap();
        // Room for the next token, so that the step gets as far as to ask for rows.
        decoder.step(&mut kv, &mut [&mut sequence], &[1]).unwrap();
        if dies {
            nix::sys::signal::kill(daemon.pid(), Signal::SIGKILL).unwrap();
        } else {
            daemon.stop();
        }
        for _ in 0..2 {
            // From its own rows, where it has all of them; else it says why not.
            match decoder.step(&mut kv, &mut [&mut sequence], &[2]) {
                Ok(_) => assert!(kv.fallbacks().alone > 0),
                Err(error) => {
                    let (error, known) = (error.to_string(), ["gone", "stopped or overloaded", "closed"]);
                    assert!(known.iter().any(|part| error.contains(part)), "{error}");
                }
            }
        }
        // Dropping lets the stream go that still waits.
        drop((sequence, kv));
    }
}

#[test]
fn without_a_compiler_the_engine_says_what_to_install() {
    if !is_child() {
        let machine = machine();
        let ended = in_child(this_test!(), &machine, &[("KVOYANT_NVRTC", "/nowhere/libnvrtc.so")]);
        assert!(ended.status.success(), "{}", ended.words);
        machine.assert_clean();
        return;
    }
    let model = synthetic::tiny(7);
    let daemon = start(&[]);
    let shape = KvShape::new(model.config(), Dtype::F16);
    let error = DaemonKv::connect(&daemon.socket(), shape, DaemonOptions::default()).unwrap_err().to_string();
    for part in ["cuda:0", "pip install nvidia-cuda-nvrtc-cu12", "KVOYANT_NVRTC", "/nowhere"] {
        assert!(error.contains(part), "{error}");
    }
}
