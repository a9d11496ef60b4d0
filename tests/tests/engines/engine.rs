//! The reference engine with its KV in a daemon of its own process, compared with the same engine without one.

use kvoyant_engine::{
    DaemonKv, DaemonOptions, Decoder, DecoderOptions, DenseKv, Dtype, KvBackend, KvShape, Model,
    PrefillOptions, WeightsMode, argmax, synthetic,
};
use kvoyant_methods::{Artifact, Artifacts};
use kvoyant_tests::Daemon;
use std::sync::Arc;

const DAEMON: &str = env!("CARGO_BIN_EXE_kvoyantd-under-test");

fn prompt(model: &Model, tokens: usize) -> Vec<u32> {
    let mut state = 12345u32;
    (0..tokens)
        .map(|_| {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 8) % model.config().vocabulary as u32
        })
        .collect()
}

fn connect(daemon: &Daemon, model: &Model, dtype: Dtype, methods: &[&str]) -> DaemonKv {
    let methods = methods.iter().map(|text| text.parse().unwrap()).collect();
    let shape = KvShape::new(model.config(), dtype);
    let options = DaemonOptions { methods, dense_layers: 1, ..DaemonOptions::default() };
    let artifacts = identity(&options, &shape);
    DaemonKv::connect(&daemon.socket(), shape, DaemonOptions { artifacts, ..options }).unwrap()
}

/// Skew matrices that turn nothing: good for mechanics.
fn identity(options: &DaemonOptions, shape: &KvShape) -> Artifacts {
    let shape = options.shape(shape, 32);
    let mut builder = kvoyant_methods::infinigen::SkewBuilder::new(&shape).unwrap();
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

/// Logits of a prompt and some greedy steps.
fn logits<B: KvBackend>(
    decoder: &mut Decoder,
    kv: &mut B,
    sequence: &mut B::Sequence,
    prompt: &[u32],
) -> Vec<Vec<f32>> {
    let mut all = vec![decoder.prefill(kv, sequence, prompt, PrefillOptions::default()).unwrap()];
    for _ in 0..6 {
        let next = argmax(all.last().unwrap());
        all.push(decoder.step(kv, &mut [&mut *sequence], &[next]).unwrap().logits);
    }
    all
}

fn assert_same(a: &[Vec<f32>], b: &[Vec<f32>]) {
    let bits = |logits: &[Vec<f32>]| -> Vec<Vec<u32>> {
        logits.iter().map(|row| row.iter().map(|value| value.to_bits()).collect()).collect()
    };
    assert!(bits(a) == bits(b), "logits differ");
}

#[test]
fn full_gives_denses_logits_bit_for_bit_in_place_and_through_a_slab_and_in_every_storage_type() {
    let model = synthetic::tiny(7);
    let prompt = prompt(&model, 333);
    for dtype in [Dtype::F32, Dtype::F16, Dtype::Bf16] {
        let mut decoder = Decoder::new(model.clone(), DecoderOptions::default());
        let mut dense = DenseKv::new(KvShape::new(model.config(), dtype));
        let mut sequence = dense.sequence();
        let expected = logits(&mut decoder, &mut dense, &mut sequence, &prompt);
        for flags in [&["--in-place", "true"][..], &[], &["--slab", "1MiB"]] {
            let daemon = Daemon::start(DAEMON, flags);
            let mut kv = connect(&daemon, &model, dtype, &["full"]);
            let mut sequence = kv.sequence(0).unwrap();
            assert_same(&logits(&mut decoder, &mut kv, &mut sequence, &prompt), &expected);
            let stats = kv.take_stats();
            assert!(stats.rows_selected > 0, "rows came through the daemon");
            assert_eq!(stats.bytes_moved > 0, flags.first() != Some(&"--in-place"));
        }
    }
}

#[test]
fn forks_of_one_prompt_answer_as_if_each_had_read_it_alone_and_decode_as_one_batch() {
    let model = synthetic::tiny(7);
    let prompt = prompt(&model, 200);
    let methods = [
        "full",
        "quest:budget=20%",
        "infinigen:budget=20%",
        "infinigen:alpha=5",
        "window",
        "random:budget=20%",
    ];
    let daemon = Daemon::start(DAEMON, &[]);
    let mut kv = connect(&daemon, &model, Dtype::F16, &methods);
    let mut decoder = Decoder::new(model.clone(), DecoderOptions::default());
    let mut base = kv.sequence(0).unwrap();
    decoder.prefill(&mut kv, &mut base, &prompt, PrefillOptions::default()).unwrap();
    for method in 0..methods.len() {
        // Alone: another daemon session, prompt and question in one go.
        let mut alone = Vec::new();
        for question in [3u32, 7, 9] {
            let mut kv = connect(&daemon, &model, Dtype::F16, &methods);
            let mut sequence = kv.sequence(method).unwrap();
            decoder.prefill(&mut kv, &mut sequence, &prompt, PrefillOptions::default()).unwrap();
            let mut forked = kv.fork(&mut sequence, None).unwrap();
            let mut rows = Vec::new();
            for token in [question, 1, 2] {
                rows.push(decoder.step(&mut kv, &mut [&mut forked], &[token]).unwrap().logits);
            }
            alone.push(rows);
        }
        // Together: forks of one prompt, one batch; the third leaves after the second step.
        let mut forks: Vec<_> = (0..3).map(|_| kv.fork(&mut base, Some(method)).unwrap()).collect();
        for (step, tokens) in [[3u32, 7, 9], [1, 1, 1], [2, 2, 2]].into_iter().enumerate() {
            let members = if step < 2 { 3 } else { 2 };
            let mut batch: Vec<_> = forks.iter_mut().take(members).collect();
            let out = decoder.step(&mut kv, &mut batch, &tokens[..members]).unwrap();
            for (member, rows) in alone.iter().enumerate().take(members) {
                let together = out.of(member, members);
                let close = |a: &f32, b: &f32| (a - b).abs() <= 1e-3 * a.abs().max(1.0);
                assert!(
                    together.iter().zip(&rows[step]).all(|(a, b)| close(a, b)),
                    "{}: member {member} step {step}",
                    methods[method]
                );
            }
        }
        kv.close(forks).unwrap();
    }
}

#[test]
fn a_truncated_sequence_goes_on_as_if_the_dropped_tokens_had_never_been() {
    let model = synthetic::tiny(7);
    let prompt = prompt(&model, 150);
    let daemon = Daemon::start(DAEMON, &[]);
    for method in ["full", "quest:budget=30%", "infinigen:budget=30%"] {
        let mut kv = connect(&daemon, &model, Dtype::F32, &[method]);
        let mut decoder = Decoder::new(model.clone(), DecoderOptions::default());
        let mut straight = kv.sequence(0).unwrap();
        decoder.prefill(&mut kv, &mut straight, &prompt, PrefillOptions::default()).unwrap();
        let mut twisted = kv.fork(&mut straight, None).unwrap();
        for token in [5, 6, 7, 8] {
            decoder.step(&mut kv, &mut [&mut twisted], &[token]).unwrap();
        }
        kv.truncate(&mut twisted, 151).unwrap();
        decoder.step(&mut kv, &mut [&mut straight], &[5]).unwrap();
        for token in [11, 12] {
            let a = decoder.step(&mut kv, &mut [&mut straight], &[token]).unwrap().logits;
            let b = decoder.step(&mut kv, &mut [&mut twisted], &[token]).unwrap().logits;
            assert_same(&[a], &[b]);
        }
    }
}

#[test]
fn the_induction_circuit_recalls_when_the_right_rows_come_and_not_when_random_ones_do() {
    let model = synthetic::induction().model(WeightsMode::F32);
    let task = synthetic::recall_task(5, 1200, 40);
    let methods = ["full", "infinigen:budget=3%", "random:budget=6%", "window"];
    for flags in [&["--in-place", "true"][..], &[]] {
        let daemon = Daemon::start(DAEMON, flags);
        let shape = KvShape::new(model.config(), Dtype::F16);
        let specs = methods.iter().map(|text| text.parse().unwrap()).collect();
        let options = DaemonOptions { methods: specs, ..DaemonOptions::default() };
        let artifacts = identity(&options, &shape);
        let mut kv =
            DaemonKv::connect(&daemon.socket(), shape, DaemonOptions { artifacts, ..options }).unwrap();
        let mut decoder = Decoder::new(model.clone(), DecoderOptions::default());
        let mut base = kv.sequence(0).unwrap();
        decoder.prefill(&mut kv, &mut base, &task.tokens, PrefillOptions::default()).unwrap();
        // The needles that no window covers.
        let old = task.tokens.len() - 100;
        let asked: Vec<_> = task
            .pairs
            .iter()
            .filter(|(key, _)| task.tokens[4..old].contains(key))
            .take(16)
            .copied()
            .collect();
        let keys: Vec<u32> = asked.iter().map(|(key, _)| *key).collect();
        let mut right = Vec::new();
        for method in 0..methods.len() {
            let mut forks: Vec<_> = asked.iter().map(|_| kv.fork(&mut base, Some(method)).unwrap()).collect();
            let mut batch: Vec<_> = forks.iter_mut().collect();
            let out = decoder.step(&mut kv, &mut batch, &keys).unwrap();
            let answers = asked.iter().enumerate();
            right.push(answers.filter(|(i, (_, value))| argmax(out.of(*i, asked.len())) == *value).count());
            kv.close(forks).unwrap();
        }
        assert_eq!(asked.len(), 16);
        assert_eq!(right[..2], [16, 16], "{methods:?}");
        assert!(right[2] <= 4 && right[3] <= 4, "{methods:?}: {right:?}");
    }
}

#[test]
fn a_pool_bounds_what_a_sequence_keeps_and_gives_pages_back() {
    let model = synthetic::tiny(7);
    let prompt = prompt(&model, 1000);
    let daemon = Daemon::start(DAEMON, &[]);
    let mut kv =
        connect(&daemon, &model, Dtype::F16, &["infinigen:budget=10%", "infinigen:budget=10%,pool=50%"]);
    let mut decoder = Decoder::new(model.clone(), DecoderOptions::default());
    let mut pages = Vec::new();
    for method in 0..2 {
        let mut sequence = kv.sequence(method).unwrap();
        decoder.prefill(&mut kv, &mut sequence, &prompt, PrefillOptions::default()).unwrap();
        for token in [1, 2, 3, 4] {
            let out = decoder.step(&mut kv, &mut [&mut sequence], &[token]).unwrap();
            assert!(out.logits.iter().all(|logit| logit.is_finite()));
        }
        // Truncation and going on must work with a pool too.
        kv.truncate(&mut sequence, 1002).unwrap();
        decoder.step(&mut kv, &mut [&mut sequence], &[3]).unwrap();
        let status = daemon.wait_for("the tokens", |status| status.totals.tokens == 1003);
        pages.push(status.totals.pages);
        drop(sequence);
        daemon.wait_for("no pages", |status| status.totals.pages == 0 && status.totals.digest_bytes == 0);
    }
    let config = model.config();
    let heads = (config.layers * config.kv_heads) as u64;
    assert_eq!(pages[0], heads * 1003u64.div_ceil(32));
    // One layer of four is dense and keeps everything; of the others, half of the 31 whole pages can go.
    assert!(pages[1] < pages[0] * 3 / 4, "{pages:?}");
}

#[test]
fn layers_with_a_sliding_window_are_kept_and_attended_as_without_a_daemon() {
    let mut config = synthetic::tiny_config();
    config.sliding_window = (0..config.layers).map(|layer| (layer % 2 == 1).then_some(40)).collect();
    let model = synthetic::Checkpoint::random(config, 3).model(WeightsMode::F32);
    let prompt = prompt(&model, 300);
    let mut decoder = Decoder::new(model.clone(), DecoderOptions::default());
    let mut dense = DenseKv::new(KvShape::new(model.config(), Dtype::F16));
    let mut sequence = dense.sequence();
    let expected = logits(&mut decoder, &mut dense, &mut sequence, &prompt);
    let daemon = Daemon::start(DAEMON, &[]);
    let mut kv = connect(&daemon, &model, Dtype::F16, &["full"]);
    let mut sequence = kv.sequence(0).unwrap();
    assert_same(&logits(&mut decoder, &mut kv, &mut sequence, &prompt), &expected);
    assert!(kv.take_stats().rows_selected > 0);
}
