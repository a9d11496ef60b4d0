//! Published prefixes: sequences of other sessions begin with them, read them where they lie, and cannot write to them.

use std::path::Path;

use kvoyant_client::{Client, Error, Failure, Hint, Model, ModelSpec, Options, SelectedBy, Sequence};
use kvoyant_tests::fake::{check_rows as check, text};
use kvoyant_tests::noisy::{QUERY, noise, noisy, tokens_of};
use kvoyant_tests::{Daemon, fake, wait_until};
use nix::sys::signal::Signal;

const DAEMON: &str = env!("CARGO_BIN_EXE_kvoyantd-under-test");
const PAGE: usize = 32;

fn fill(model: &Model, sequence: &Sequence, seed: usize, tokens: usize) {
    model.reserve(&[(sequence, tokens)]).unwrap();
    fake::fill(model, sequence, seed, tokens).unwrap();
}

fn attach(model: &Model, tokens: &[u32]) -> Sequence {
    model.attach(0, tokens, SelectedBy::Lane).unwrap()
}

#[test]
fn the_longest_prefix_is_attached_read_and_left_alone_by_whoever_goes_on_from_it() {
    for flags in [&["--in-place", "true"][..], &[]] {
        let daemon = Daemon::start(DAEMON, flags);
        let (one, two) = (fake::connect(&daemon, &["given"]), fake::connect(&daemon, &["given"]));
        let tokens = text(1, 500);
        assert_eq!(attach(&two, &tokens).tokens(), 0, "nothing is published yet");
        let published = one.open(0, 0).unwrap();
        fill(&one, &published, 5, 500);
        assert_eq!(one.publish(&published, &tokens, false).unwrap(), 480, "whole pages only");
        assert_eq!(one.publish(&published, &tokens, false).unwrap(), 480, "once more changes nothing");
        drop(published);

        let first = attach(&two, &tokens);
        assert_eq!((first.tokens(), first.room()), (480, 480));
        check(&two, &first, 0..480, 5);
        // Another text that begins alike, and goes on as it likes.
        let mut other = tokens.clone();
        other[300] ^= 1;
        let second = attach(&one, &other);
        assert_eq!(second.tokens(), 288);
        fill(&one, &second, 8, 700);
        check(&one, &second, 0..288, 5);
        check(&one, &second, 288..700, 8);
        // Cut within the prefix and written anew: only this sequence changes.
        second.truncate(100).unwrap();
        fill(&one, &second, 9, 300);
        check(&one, &second, 0..100, 5);
        check(&one, &second, 100..300, 9);
        check(&two, &first, 0..480, 5);
        let ids: Vec<u32> = (0..fake::KV_HEADS).flat_map(|_| [3, 40, 99, 260]).collect();
        for (model, sequence, seed) in [(&two, &first, 5), (&one, &second, 9)] {
            let ready = fake::ask_with(model, sequence, 1, Hint::Ids(&ids));
            let mut bytes = Vec::new();
            ready.copy_rows(0, 1, &mut bytes).unwrap();
            let last: Vec<u8> = fake::row(seed, 1, 1, 260).into_iter().flat_map(f32::to_le_bytes).collect();
            assert_eq!(bytes[2 * 256..], last);
        }
        let fork = first.fork(None).unwrap();
        drop(first);
        check(&two, &fork, 0..480, 5);
        fill(&two, &fork, 7, 600);
        check(&two, &fork, 0..480, 5);
        check(&two, &fork, 480..600, 7);
        // A prompt that is published as a whole still leaves a token to compute.
        assert_eq!(attach(&two, &tokens[..480]).tokens(), 448);
    }
}

#[test]
fn nothing_else_than_the_same_text_and_model_is_attached() {
    // An extent for what is a user's own, and one for what is everybody's.
    let daemon = Daemon::start(DAEMON, &["--prefixes", "128MiB"]);
    let model = fake::connect(&daemon, &["full"]);
    let tokens = text(2, 200);
    let sequence = model.open(0, 0).unwrap();
    fill(&model, &sequence, 5, 200);
    assert_eq!(model.publish(&sequence, &tokens, true).unwrap(), 192);
    for change in [
        |spec: &mut ModelSpec| spec.fingerprint = "1".repeat(32),
        |spec: &mut ModelSpec| spec.rope = "other".into(),
        |spec: &mut ModelSpec| spec.adapter = "lora".into(),
        |spec: &mut ModelSpec| spec.page_rows = 64,
    ] {
        let mut spec = fake::spec(&["full"]);
        change(&mut spec);
        let client = Client::connect(&daemon.socket(), Options::default()).unwrap();
        let stranger = client.register(spec, &[]).unwrap();
        assert_eq!(stranger.attach(0, &tokens, SelectedBy::Lane).unwrap().tokens(), 0);
    }
    let mut other = tokens.clone();
    other[0] ^= 1;
    assert_eq!(attach(&model, &other).tokens(), 0);
    assert_eq!(attach(&model, &tokens[..33]).tokens(), 32);
    assert_eq!(attach(&model, &tokens[..32]).tokens(), 0);
    assert_eq!(attach(&model, &[]).tokens(), 0);
    assert!(model.attach(9, &tokens, SelectedBy::Lane).is_err());
    // More tokens than there are rows of are not published.
    assert_eq!(model.publish(&sequence, &text(2, 5000), false).unwrap(), 192);
}

#[test]
fn methods_select_from_an_attached_prefix_what_they_select_from_rows_of_their_own() {
    for in_place in ["true", "false"] {
        let daemon = Daemon::start(DAEMON, &["--in-place", in_place]);
        for (seed, method) in
            ["quest:budget=5%,hint=current", "kvoyant:budget=5%", "oracle:budget=5%", "louver"]
                .iter()
                .enumerate()
        {
            let model = fake::connect(&daemon, &[method]);
            let own = noisy(&model, 960);
            let tokens = text(seed as u32, 961);
            assert_eq!(model.publish(&own, &tokens, false).unwrap(), 960);
            let attached = attach(&model, &tokens);
            assert_eq!(attached.tokens(), 960);
            for layer in 1..fake::LAYERS {
                let query = noise(QUERY, layer);
                let of = |sequence| {
                    let ready = fake::ask_with(&model, sequence, layer, Hint::Query(&query));
                    (0..fake::KV_HEADS).map(|head| tokens_of(&ready, head)).collect::<Vec<_>>()
                };
                assert_eq!(of(&attached), of(&own), "{method}");
            }
        }
    }
}

#[test]
fn prefixes_that_nobody_uses_give_way_and_those_that_somebody_reads_do_not() {
    // One extent of 64 MiB for prefixes; a text of 9,000 tokens has 13 MiB.
    let daemon = Daemon::start(DAEMON, &["--prefixes", "64MiB"]);
    let model = fake::connect(&daemon, &["given"]);
    let publish = |seed: u32| {
        let sequence = model.open(0, 0).unwrap();
        fill(&model, &sequence, seed as usize, 9000);
        model.publish(&sequence, &text(seed, 9001), false)
    };
    publish(1).unwrap();
    let used = attach(&model, &text(1, 9001));
    for seed in 2..9 {
        publish(seed).unwrap();
    }
    assert_eq!(attach(&model, &text(1, 9001)).tokens(), 8992, "it is being read");
    assert_eq!(attach(&model, &text(8, 9001)).tokens(), 8992, "it is the newest");
    assert_eq!(attach(&model, &text(2, 9001)).tokens(), 0, "it was used longest ago");
    check(&model, &used, 0..8992, 1);
    let arena = daemon.status().arena;
    assert!(arena.used_bytes <= arena.total_bytes, "{arena:?}");
    drop((used, model));
    daemon.wait_for("the session to end", |status| status.sessions.is_empty());
}

/// A session whose pages have so many rows, and which has published two of them.
fn publish_pages(daemon: &Daemon, rows: usize) -> (Model, Result<usize, Error>) {
    let spec = ModelSpec { page_rows: rows as u32, ..fake::spec(&["given"]) };
    let model = Client::connect(&daemon.socket(), Options::default()).unwrap().register(spec, &[]).unwrap();
    let sequence = model.open(0, 0).unwrap();
    fill(&model, &sequence, rows, 2 * rows);
    let published = model.publish(&sequence, &text(rows as u32, 2 * rows), false);
    drop(sequence);
    (model, published)
}

/// A token of a text more than is published of it.
fn attach_pages(model: &Model, rows: usize) -> Sequence {
    attach(model, &text(rows as u32, 2 * rows + 1))
}

#[test]
fn tiny_prefixes_of_many_page_sizes_take_no_more_than_their_share_of_the_arena() {
    const EXTENT: u64 = 64 << 20;
    // Eight extents, of which published prefixes may have two, however small they are.
    let daemon = Daemon::start(DAEMON, &["--prefixes", "128MiB"]);
    let sizes: Vec<usize> = (1..=10).map(|pages| 16 * pages).collect();
    for rows in &sizes {
        let (model, published) = publish_pages(&daemon, *rows);
        assert_eq!(published.unwrap(), 2 * rows);
        let attached = attach_pages(&model, *rows);
        assert_eq!(attached.tokens(), 2 * rows, "what is new is there");
        check(&model, &attached, 0..2 * rows, *rows);
        drop((attached, model));
        let left = daemon.wait_for("the session to end", |status| status.sessions.is_empty());
        assert!(left.arena.used_bytes <= 2 * EXTENT, "{:?}", left.arena);
    }
    let (model, _) = publish_pages(&daemon, sizes[0]);
    assert_eq!(
        attach_pages(&model, sizes[0]).tokens(),
        2 * sizes[0],
        "it was forgotten, and is published anew"
    );
    drop(model);
    daemon.wait_for("the session to end", |status| status.sessions.is_empty());
    // Another client has what is left: six extents.
    let model = fake::connect(&daemon, &["given"]);
    let sequence = model.open(0, 0).unwrap();
    model.reserve(&[(&sequence, 256_000)]).unwrap();
}

#[test]
fn an_extent_that_a_session_has_mapped_comes_back_when_the_session_ends() {
    // One extent for prefixes.
    let daemon = Daemon::start(DAEMON, &["--prefixes", "64MiB"]);
    let (reader, published) = publish_pages(&daemon, 16);
    assert_eq!(published.unwrap(), 32);
    let attached = attach_pages(&reader, 16);
    assert_eq!(attached.tokens(), 32);
    let refused = |published: Result<usize, Error>| match published {
        Err(Error::Failed(Failure::NotReady(why))) => assert!(why.contains("`prefixes`"), "{why}"),
        other => panic!("{other:?} although there is no extent"),
    };
    refused(publish_pages(&daemon, 32).1);
    assert_eq!(attach_pages(&reader, 16).tokens(), 32, "what is in use stays");
    // Nobody uses the prefix any more, but the session still has its extent mapped.
    attached.close().unwrap();
    refused(publish_pages(&daemon, 32).1);
    drop(reader);
    wait_until("the extent to come back", || publish_pages(&daemon, 32).1.is_ok());
}

fn start(store: &Path, flags: &[&str]) -> Daemon {
    let store = store.display().to_string();
    // An extent for what is a user's own, and one for what is everybody's.
    let mut all = vec!["--store", &store, "--prefixes", "128MiB"];
    all.extend(flags);
    Daemon::start(DAEMON, &all)
}

#[test]
fn prefixes_are_found_again_after_a_restart_and_on_another_node_if_they_are_for_everybody() {
    let (here, there, remote) =
        (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let url = format!("file://{}", remote.path().display());
    let daemon = start(here.path(), &["--remote", &url]);
    let model = fake::connect(&daemon, &["given"]);
    for (seed, shared) in [(1, false), (2, true)] {
        let sequence = model.open(0, 0).unwrap();
        fill(&model, &sequence, seed, 300);
        model.publish(&sequence, &text(seed as u32, 300), shared).unwrap();
        // One that goes on from it, of which only what is new is kept.
        fill(&model, &sequence, seed, 600);
        model.publish(&sequence, &text(seed as u32, 600), shared).unwrap();
    }
    let images = |folder: &Path| {
        let Ok(list) = std::fs::read_dir(folder) else { return 0 };
        let names = list.filter_map(Result::ok).map(|entry| entry.file_name());
        names.filter(|name| name.to_string_lossy().starts_with("prefix")).count()
    };
    wait_until("the images to be written, and those that are for everybody to be copied", || {
        images(here.path()) == 4 && images(remote.path()) == 2
    });
    let (end, words) = daemon.end(Signal::SIGTERM);
    assert!(end.success(), "{words}");
    for (folder, remote, both) in [(here.path(), "", true), (there.path(), url.as_str(), false)] {
        let flags = if remote.is_empty() { Vec::new() } else { vec!["--remote", remote] };
        let daemon = start(folder, &flags);
        let model = fake::connect(&daemon, &["given"]);
        let mut found = attach(&model, &text(2, 601));
        wait_until("prefixes of before to be known", || {
            found = attach(&model, &text(2, 601));
            found.tokens() > 0
        });
        assert_eq!(found.tokens(), 600 / PAGE * PAGE);
        check(&model, &found, 0..576, 2);
        let own = attach(&model, &text(1, 601));
        assert_eq!(
            own.tokens(),
            if both { 576 } else { 0 },
            "what is a user's alone is not told by its hash"
        );
        if both {
            check(&model, &own, 0..576, 1);
        }
    }
}
