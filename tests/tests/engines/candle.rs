//! A model written with candle, with its KV in a daemon.

#[path = "../../../engine/examples/candle_llama/model.rs"]
mod model;

use std::fs::File;

use candle_core::quantized::{GgmlDType, gguf_file};
use candle_core::{Device, Tensor};
use kvoyant_engine::candle::{KvPass, PassError};
use kvoyant_engine::synthetic::{Checkpoint, tiny_config};
use kvoyant_engine::{DaemonKv, DaemonOptions, DenseKv, KvBackend};
use kvoyant_tests::Daemon;
use model::{Llama, most_probable};
use nix::sys::signal::Signal;

const DAEMON: &str = env!("CARGO_BIN_EXE_kvoyantd-under-test");

fn llama() -> Llama {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("tiny.gguf");
    Checkpoint::random(tiny_config(), 5).write_gguf(&path, GgmlDType::F32).unwrap();
    let mut file = File::open(&path).unwrap();
    Llama::load(&gguf_file::Content::read(&mut file).unwrap(), &mut file).unwrap()
}

fn connect(daemon: &Daemon, llama: &Llama, method: &str) -> DaemonKv {
    let methods = vec![method.parse().unwrap()];
    let options = DaemonOptions { methods, dense_layers: 1, ..DaemonOptions::default() };
    DaemonKv::connect(&daemon.socket(), llama.shape().clone(), options).unwrap()
}

/// Bits of the logits of a prompt of two sequences, and of some greedy steps of both.
fn logits<B: KvBackend>(llama: &Llama, kv: &mut B, mut sequences: [B::Sequence; 2]) -> Vec<Vec<u32>> {
    let prompt: Vec<u32> = (0..400).map(|i| (i * i + 7 * i) % 256).collect();
    let mut input = Tensor::from_vec(prompt, (2, 200), &Device::Cpu).unwrap();
    let mut all = Vec::new();
    for step in 0..7 {
        let pass = match step {
            0 => KvPass::prefill(kv, &mut sequences, 200).unwrap(),
            _ => KvPass::step(kv, &mut sequences).unwrap(),
        };
        let logits = llama.forward(&input, pass).unwrap();
        let values: Vec<f32> = logits.flatten_all().unwrap().to_vec1().unwrap();
        all.push(values.iter().map(|value| value.to_bits()).collect());
        input = Tensor::from_vec(most_probable(&logits).unwrap(), (2, 1), &Device::Cpu).unwrap();
    }
    all
}

#[test]
fn full_attention_through_the_daemon_gives_the_logits_of_the_process_own_memory() {
    let llama = llama();
    let mut dense = DenseKv::new(llama.shape().clone());
    let sequences = [dense.sequence(), dense.sequence()];
    let expected = logits(&llama, &mut dense, sequences);
    for flags in [&["--in-place", "true"][..], &[]] {
        let daemon = Daemon::start(DAEMON, flags);
        let mut kv = connect(&daemon, &llama, "full");
        let sequences = [kv.sequence(0).unwrap(), kv.sequence(0).unwrap()];
        assert!(logits(&llama, &mut kv, sequences) == expected, "{flags:?}");
        assert!(kv.take_stats().rows_selected > 0, "rows came through the daemon");
    }
}

#[test]
fn hints_of_the_model_decide_what_is_selected() {
    let llama = llama();
    let daemon = Daemon::start(DAEMON, &[]);
    let mut kv = connect(&daemon, &llama, "quest:budget=20%");
    let mut sequence = kv.sequence(0).unwrap();
    let prompt = Tensor::new(&[[7u32; 200]], &Device::Cpu).unwrap();
    llama.forward(&prompt, KvPass::prefill(&mut kv, [&mut sequence], 200).unwrap()).unwrap();
    kv.take_stats();
    let pass = KvPass::step(&mut kv, [&mut sequence]).unwrap();
    assert!(pass.wants_hint(1) && !pass.wants_hint(4), "layers that speculate, of those that there are");
    llama.forward(&Tensor::new(&[[9u32]], &Device::Cpu).unwrap(), pass).unwrap();
    let stats = kv.take_stats();
    let (layers, kv_heads, behind_sinks_and_window) = (3, 2, 201 - 4 - 64);
    assert!(stats.rows_selected > 0, "{stats:?}");
    assert!(stats.rows_selected < layers * kv_heads * behind_sinks_and_window / 2, "{stats:?}");
}

#[test]
fn a_daemon_that_dies_leaves_a_candle_model_its_rows() {
    let llama = llama();
    let daemon = Daemon::start(DAEMON, &[]);
    let mut kv = connect(&daemon, &llama, "full");
    let mut sequence = kv.sequence(0).unwrap();
    let prompt = Tensor::new(&[[3u32; 50]], &Device::Cpu).unwrap();
    llama.forward(&prompt, KvPass::prefill(&mut kv, [&mut sequence], 50).unwrap()).unwrap();
    daemon.end(Signal::SIGKILL);
    llama
        .forward(
            &Tensor::new(&[[9u32]], &Device::Cpu).unwrap(),
            KvPass::step(&mut kv, [&mut sequence]).unwrap(),
        )
        .unwrap();
    assert_eq!(kv.tokens(&sequence), 51);
    // What cannot go on without a daemon says so, as candle's error too.
    let error = kv.sequence(0).unwrap_err();
    let error = candle_core::Error::from(PassError::Backend(error));
    assert!(error.to_string().contains("daemon"), "{error}");
}
