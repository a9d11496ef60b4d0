//! What methods keep of a sequence, through a real daemon: followed through forks and truncations, shown, and given back.

use kvoyant_client::{Hint, Sequence};
use kvoyant_tests::noisy::{QUERY, append_noise, ask, noise, noisy, tokens_of};
use kvoyant_tests::{Daemon, fake};

const DAEMON: &str = env!("CARGO_BIN_EXE_kvoyantd-under-test");

#[test]
fn a_memory_follows_forks_and_truncations() {
    let daemon = Daemon::start(DAEMON, &["--in-place", "true"]);
    for method in ["resv", "freekv:tau=2", "shadowkv:rank=8", "quest"] {
        let model = fake::connect(&daemon, &[method, "window"]);
        let query = noise(QUERY, 9);
        let selected = |sequence: &Sequence| {
            let ready = ask(&model, sequence, 1, Hint::Query(&query)).unwrap();
            (0..fake::KV_HEADS).map(|head| tokens_of(&ready, head)).collect::<Vec<_>>()
        };
        let fresh = noisy(&model, 300);
        let wanted = selected(&fresh);
        let sequence = noisy(&model, 450);
        let fork = sequence.fork(None).unwrap();
        sequence.truncate(170).unwrap();
        append_noise(&model, &sequence, 300);
        let forked = selected(&fork);
        fork.truncate(300).unwrap();
        if method != "resv" {
            // Clusters depend on the order of what came before; everything else on the rows that are there.
            assert_eq!(selected(&sequence), wanted, "{method}");
            assert_eq!(selected(&fork), wanted, "{method}");
        }
        let window = fork.fork(Some(1)).unwrap();
        assert_eq!(selected(&window), [[0; 0]; 2]);
        assert!(!forked[0].is_empty(), "{method}");
    }
}

/// Attention on one block of 16 tokens, for every KV head of a layer.
fn hot(block: usize, tokens: usize) -> Vec<f32> {
    let row = |_| (0..tokens.div_ceil(16)).map(move |at| if at == block { 1.0 } else { 0.0 });
    (0..fake::KV_HEADS).flat_map(row).collect()
}

#[test]
fn a_truncation_makes_those_memories_anew_that_ask_for_it_and_leaves_their_neighbours_what_they_learnt() {
    let daemon = Daemon::start(DAEMON, &["--in-place", "true"]);
    // The first head clusters keys, which a truncation undoes; the second learns from attention, which no row can teach it again.
    let mix = "mix:*/0=(resv),rest=(attention-predictor:weights=average,budget=64)";
    let model = fake::connect(&daemon, &[mix]);
    let query = noise(QUERY, 9);
    let selected = |sequence: &Sequence| {
        let ready = ask(&model, sequence, 1, Hint::Query(&query)).unwrap();
        (tokens_of(&ready, 0), tokens_of(&ready, 1))
    };
    let learnt: Vec<usize> = (7 * 16..8 * 16).collect();
    let knows = |tokens: &[usize]| learnt.iter().all(|token| tokens.contains(token));
    let sequence = noisy(&model, 450);
    for _ in 0..64 {
        model.feedback(&sequence, 1, 450, true, &hot(7, 450)).unwrap();
    }
    assert!(knows(&selected(&sequence).1));
    let fork = sequence.fork(None).unwrap();
    sequence.truncate(300).unwrap();
    let fresh = noisy(&model, 300);
    let (cut, never_longer) = (selected(&sequence), selected(&fresh));
    assert_eq!(cut.0, never_longer.0, "the first head's clusters are those of the rows that are left");
    assert!(!cut.0.is_empty());
    assert!(knows(&cut.1) && !knows(&never_longer.1), "the second head's memory was not touched: {cut:?}");
    append_noise(&model, &sequence, 320);
    assert!(knows(&selected(&sequence).1));
    fork.truncate(301).unwrap();
    assert!(knows(&selected(&fork).1));
}

#[test]
fn what_methods_keep_is_shown_by_method_and_given_back() {
    let daemon = Daemon::start(DAEMON, &[]);
    let model =
        fake::connect(&daemon, &["resv", "full", "quest:budget=3%,page=32", "quest:page=32", "scout"]);
    // For each name what is kept for digests and in memories.
    let kept = |what: &str, wanted: [[bool; 2]; 2]| {
        let status = daemon.wait_for(what, |status| {
            let methods = &status.sessions[0].methods;
            methods.iter().map(|method| [method.digest_bytes > 0, method.memory_bytes > 0]).eq(wanted)
        });
        let [session] = &status.sessions[..] else { panic!("{status:?}") };
        let names: Vec<_> = session.methods.iter().map(|method| method.method.as_str()).collect();
        assert_eq!(
            names,
            ["resv", "quest+scout"],
            "what keeps nothing is not shown, and what is shared once"
        );
        let all = session.methods.iter().map(|method| method.digest_bytes + method.memory_bytes).sum();
        assert_eq!((session.digest_bytes, status.totals.digest_bytes), (all, all));
        all
    };
    let plain = model.open(1, 300).unwrap();
    fake::fill(&model, &plain, 1, 300).unwrap();
    drop(fake::ask(&model, &plain, 1));
    assert_eq!(kept("nothing kept", [[false, false]; 2]), 0);
    let clusters = noisy(&model, 300);
    drop(ask(&model, &clusters, 1, Hint::Query(&noise(QUERY, 1))).unwrap());
    let of_clusters = kept("a memory", [[true, true], [false, false]]);
    let bounds = model.open(3, 300).unwrap();
    append_noise(&model, &bounds, 300);
    drop(ask(&model, &bounds, 1, Hint::Query(&noise(QUERY, 1))).unwrap());
    assert!(kept("digests beside it", [[true, true], [true, false]]) > of_clusters);
    clusters.close().unwrap();
    kept("a memory that is given back", [[false, false], [true, false]]);
    bounds.close().unwrap();
    assert_eq!(kept("everything given back", [[false, false]; 2]), 0);
}
