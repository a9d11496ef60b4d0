//! The reference engine with a tenth of its KV in host memory: the same logits as with all of it, and the same text when the disk has
//! lost rows.

use std::ops::ControlFlow;
use std::sync::Arc;

use kvoyant_engine::{
    DaemonKv, DaemonOptions, Decoder, DecoderOptions, DenseKv, Dtype, GenerateOptions, KvBackend, KvShape,
    Model, PrefillOptions, Prompt, Sampler, Selects, argmax, generate, synthetic,
};
use kvoyant_tests::Daemon;

const DAEMON: &str = env!("CARGO_BIN_EXE_kvoyantd-under-test");
const TOKENS: usize = 1800;

fn prompt(model: &Model) -> Vec<u32> {
    let mut state = 4321u32;
    let mut next = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 8) % model.config().vocabulary as u32
    };
    (0..TOKENS).map(|_| next()).collect()
}

fn spilling(flags: &[&str]) -> (Daemon, tempfile::TempDir) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().display().to_string();
    let mut all = vec!["--spill", &path, "--spill-bytes", "128MiB", "--host-percent", "10"];
    all.extend(flags);
    (Daemon::start(DAEMON, &all), folder)
}

fn connect(daemon: &Daemon, model: &Model, method: &str) -> DaemonKv {
    kvoyant_tests::compute_here();
    let shape = KvShape::new(model.config(), Dtype::F32);
    let methods = vec![method.parse().unwrap()];
    // Where all is in memory, the lane selects too: what it estimates comes rounded.
    let selects = Selects::Lane;
    let options = DaemonOptions { methods, dense_layers: 1, window: 32, selects, ..DaemonOptions::default() };
    DaemonKv::connect(&daemon.socket(), shape, options).unwrap()
}

fn logits<B: KvBackend>(model: &Arc<Model>, kv: &mut B, sequence: &mut B::Sequence) -> Vec<Vec<u32>> {
    let mut decoder = Decoder::new(model.clone(), DecoderOptions::default());
    let mut last = decoder.prefill(kv, sequence, &prompt(model), PrefillOptions::default()).unwrap();
    let mut all = Vec::new();
    for _ in 0..8 {
        all.push(last.iter().map(|value| value.to_bits()).collect());
        last = decoder.step(kv, &mut [&mut *sequence], &[argmax(&last)]).unwrap().logits;
    }
    all
}

#[test]
fn a_tenth_of_the_kv_in_host_memory_gives_the_logits_that_all_of_it_gives() {
    let model = synthetic::tiny(7);
    let mut dense = DenseKv::new(KvShape::new(model.config(), Dtype::F32));
    let mut sequence = dense.sequence();
    let expected = logits(&model, &mut dense, &mut sequence);
    let methods = [
        "full",
        "kvoyant:budget=5%",
        "kvoyant:budget=5%,hint=ahead",
        "kvoyant:max_missed_mass=0.1",
        "quest:budget=5%",
        "infinigen:budget=5%,skew=off",
        "louver",
        "freekv:budget=5%",
        // Without recalls: a block that one has brought is attended by the query itself, not by the predicted one, and when it has come
        // is up to the disk.
        "scout:budget=5%,beta=1",
    ];
    for (at, flags) in [&["--in-place", "true"][..], &["--slab", "1MiB"]].into_iter().enumerate() {
        let (daemon, _folder) = spilling(flags);
        let plain = Daemon::start(DAEMON, flags);
        for (nth, method) in methods.into_iter().enumerate() {
            // The first two in both ways, and each of the others in one of them.
            if nth > 1 && nth % 2 != at && !kvoyant_tests::thorough() {
                continue;
            }
            let run = |daemon: &Daemon| {
                let mut kv = connect(daemon, &model, method);
                let mut sequence = kv.sequence(0).unwrap();
                let found = logits(&model, &mut kv, &mut sequence);
                (found, kv.paged())
            };
            let (spilled, paged) = run(&daemon);
            let (kept, nothing) = run(&plain);
            assert!(
                spilled == kept,
                "{method} {flags:?}: logits differ from those with everything in memory"
            );
            assert!(method != "full" || spilled == expected, "{flags:?}: full differs from dense");
            assert!(nothing.is_none());
            let paged = paged.expect("pages can leave");
            assert!(paged.written_bytes > 0 && paged.read_bytes > 0 && paged.lost_pages == 0, "{paged:?}");
            // The model has four layers, of which two are there as a whole at times; what scout's lane attends itself is there as well.
            let most = if method.starts_with("scout") { paged.most_bytes } else { paged.most_bytes * 2 / 3 };
            assert!(paged.peak_bytes < most, "{method}: {paged:?}");
        }
    }
}

#[test]
fn an_answer_goes_on_with_rows_computed_again_where_the_disk_has_lost_them() {
    let model = synthetic::tiny(7);
    let answer = |spoil: bool| {
        let (daemon, folder) = spilling(&[]);
        let mut kv = connect(&daemon, &model, "quest:budget=5%");
        let mut sequence = kv.sequence(0).unwrap();
        let mut decoder = Decoder::new(model.clone(), DecoderOptions::default());
        let tokens = prompt(&model);
        let logits = decoder.prefill(&mut kv, &mut sequence, &tokens, PrefillOptions::default()).unwrap();
        if spoil {
            let file = std::fs::OpenOptions::new().write(true).open(folder.path().join("kvoyant-spill-0"));
            file.unwrap().set_len(1 << 20).unwrap();
        }
        let options = GenerateOptions { max_tokens: 12, ignore_end: true };
        let made = generate(
            &mut decoder,
            &mut kv,
            &mut sequence,
            Prompt { tokens: &tokens, logits },
            &mut Sampler::greedy(),
            options,
            &mut |_, _| ControlFlow::Continue(()),
        );
        (made.unwrap().tokens, kv.paged().unwrap().lost_pages)
    };
    let ((whole, none), (mended, lost)) = (answer(false), answer(true));
    assert_eq!(none, 0);
    assert!(lost > 0, "a file that somebody cut has lost pages");
    assert_eq!(whole, mended);
}
