//! Sequences that outlive the daemon: suspended by one, resumed by another, with rows, digests and what was selected the same.

use std::path::Path;

use kvoyant_client::{Client, Error, Failure, Hint, Member, Model, ModelSpec, Options, SelectedBy, Sequence};
use kvoyant_tests::noisy::{QUERY, noise, noisy, tokens_of};
use kvoyant_tests::{Daemon, PATIENCE, fake, wait_until};
use nix::sys::signal::Signal;

const DAEMON: &str = env!("CARGO_BIN_EXE_kvoyantd-under-test");
const TOKENS: usize = 1230;

fn start(store: &Path, flags: &[&str]) -> Daemon {
    let store = store.display().to_string();
    let mut all = vec!["--store", &store];
    all.extend(flags);
    Daemon::start(DAEMON, &all)
}

fn fill(model: &Model, sequence: &Sequence, seed: usize, tokens: usize) {
    while sequence.tokens() < tokens {
        let end = (sequence.tokens() + 100).min(tokens);
        model.reserve(&[(sequence, end)]).unwrap();
        fake::fill(model, sequence, seed, end).unwrap();
    }
}

/// Checks every row of a sequence.
fn check(model: &Model, sequence: &Sequence, seed: usize) {
    let mut rows = vec![0; 2 * fake::HEAD_DIM * 4 * sequence.tokens()];
    for layer in 0..fake::LAYERS {
        let lease = model.fetch(layer, &[(sequence, sequence.tokens())]).unwrap().wait(PATIENCE).unwrap();
        for head in 0..fake::KV_HEADS {
            sequence.read_rows(layer, head, 0..sequence.tokens(), &mut rows).unwrap();
            for (token, row) in rows.chunks_exact(2 * fake::HEAD_DIM * 4).enumerate() {
                let wanted: Vec<u8> =
                    fake::row(seed, layer, head, token).into_iter().flat_map(f32::to_le_bytes).collect();
                assert_eq!(row, wanted, "layer {layer} head {head} token {token}");
            }
        }
        drop(lease);
    }
}

fn suspend(sequence: Sequence, image: &str) {
    sequence.suspend(image, false, "a test's").map_err(|(_, error)| error).unwrap();
}

fn reason(error: &Error) -> String {
    match error {
        Error::Failed(Failure::Image { .. }) => error.to_string(),
        other => panic!("{other:?} is not about an image"),
    }
}

#[test]
fn a_sequence_is_what_it_was_after_its_daemon_has_gone() {
    let store = tempfile::tempdir().unwrap();
    let spill = tempfile::tempdir().unwrap();
    let spill = spill.path().display().to_string();
    let spilling = ["--spill", &spill, "--spill-bytes", "64MiB", "--host-percent", "10"];
    let settings: [&[&str]; 3] = [&["--in-place", "true"], &[], &spilling];
    for (round, (before, after)) in
        settings.iter().flat_map(|before| settings.iter().map(move |after| (before, after))).enumerate()
    {
        let image = format!("round-{round}");
        let daemon = start(store.path(), before);
        let model = fake::connect(&daemon, &["quest:budget=5%", "full"]);
        let sequence = model.open(1, 0).unwrap();
        fill(&model, &sequence, 4, TOKENS);
        let fork = sequence.fork(None).unwrap();
        suspend(sequence, &image);
        check(&model, &fork, 4);
        let (end, words) = daemon.end(Signal::SIGTERM);
        assert!(end.success(), "{words}");

        let daemon = start(store.path(), after);
        let model = fake::connect(&daemon, &["full", "quest:budget=5%"]);
        let (sequence, method) = model.resume(&image, None, SelectedBy::Lane).unwrap();
        assert_eq!((sequence.tokens(), method), (TOKENS, 0), "it finds its method by its name");
        check(&model, &sequence, 4);
        fill(&model, &sequence, 4, TOKENS + 300);
        check(&model, &sequence, 4);
        // The image stays, and may be resumed by another method.
        let (again, method) = model.resume(&image, Some(1), SelectedBy::Lane).unwrap();
        assert_eq!((again.tokens(), method), (TOKENS, 1));
        let query = noise(QUERY, 3);
        assert!(fake::ask_with(&model, &again, 1, Hint::Query(&query)).rows(0, 0) > 0);
        again.truncate(40).unwrap();
        assert_eq!(again.tokens(), 40);
    }
}

#[test]
fn every_method_selects_after_a_resume_what_it_would_have_selected() {
    let methods = [
        "infinigen:budget=5%,skew=off",
        "infinigen:budget=5%,skew=off,pool=50%",
        "quest:budget=5%,hint=current",
        "kvoyant:budget=5%",
        "oracle:budget=5%",
        "louver",
        "resv",
        "freekv:budget=5%",
    ];
    let store = tempfile::tempdir().unwrap();
    for method in methods {
        let mut daemon = start(store.path(), &["--in-place", "true"]);
        let mut model = fake::connect(&daemon, &[method]);
        let mut kept = noisy(&model, 900);
        if method.starts_with("infinigen") {
            for layer in 1..fake::LAYERS {
                model.observe(&kept, layer, &noise(fake::KV_HEADS * fake::HEAD_DIM, layer)).unwrap();
            }
        }
        let ask = |model: &Model, sequence: &Sequence, steps: std::ops::Range<usize>| -> Vec<Vec<usize>> {
            let mut all = Vec::new();
            for (step, layer) in steps.flat_map(|step| (1..fake::LAYERS).map(move |layer| (step, layer))) {
                let query = noise(QUERY, step * 10 + layer);
                let member = Member { sequence, position: sequence.tokens(), hint: Hint::Query(&query) };
                let ready = model.speculate(layer, &[member]).unwrap().wait(PATIENCE).unwrap();
                all.extend((0..fake::KV_HEADS).map(|head| tokens_of(&ready, head)));
            }
            all
        };
        ask(&model, &kept, 0..3);
        let twin = if method.contains("pool") { None } else { Some(kept.fork(None).unwrap()) };
        let expected = twin.as_ref().map(|twin| ask(&model, twin, 3..6));
        drop(twin);
        let image = format!("of-{}", method.len());
        kept.suspend(&image, true, "").map_err(|(_, error)| error).unwrap();
        drop(model);
        daemon = start_again(daemon, store.path());
        model = fake::connect(&daemon, &[method]);
        (kept, _) = model.resume(&image, None, SelectedBy::Lane).unwrap();
        let found = ask(&model, &kept, 3..6);
        assert!(expected.is_none_or(|expected| expected == found), "{method}: other rows than its twin");
    }
}

fn start_again(daemon: Daemon, store: &Path) -> Daemon {
    let (end, words) = daemon.end(Signal::SIGTERM);
    assert!(end.success(), "{words}");
    start(store, &["--in-place", "true"])
}

#[test]
fn what_cannot_be_suspended_or_resumed_says_why_and_the_session_goes_on() {
    let store = tempfile::tempdir().unwrap();
    let daemon = start(store.path(), &[]);
    let model = fake::connect(&daemon, &["full", "infinigen:budget=5%,skew=off,pool=50%"]);
    let sequence = model.open(0, 0).unwrap();
    fill(&model, &sequence, 2, 200);
    for bad in ["", "../up", ".hidden", "a b", &"x".repeat(300)] {
        let (_, error) = sequence.fork(None).unwrap().suspend(bad, false, "").unwrap_err();
        reason(&error);
    }
    suspend(sequence.fork(None).unwrap(), "one");
    let (again, error) = sequence.suspend("one", false, "").unwrap_err();
    assert!(reason(&error).contains("already"), "{error}");
    fill(&model, &again, 2, 240);
    check(&model, &again, 2);
    again.suspend("one", true, "").map_err(|(_, error)| error).unwrap();
    let error = model.resume("two", None, SelectedBy::Lane).unwrap_err();
    assert!(reason(&error).contains("two"), "{error}");
    let error = model.resume("one", Some(1), SelectedBy::Lane).unwrap_err();
    assert!(error.to_string().contains("pool"), "{error}");
    let error = model.resume("one", Some(7), SelectedBy::Lane).unwrap_err();
    assert!(error.to_string().contains("method 7"), "{error}");

    let other = ModelSpec { fingerprint: "1".repeat(32), ..fake::spec(&["full"]) };
    let client = Client::connect(&daemon.socket(), Options::default()).unwrap();
    let stranger = client.register(other, &[]).unwrap();
    let error = stranger.resume("one", None, SelectedBy::Lane).unwrap_err();
    assert!(reason(&error).contains("fingerprint"), "{error}");
    let (sequence, _) = model.resume("one", None, SelectedBy::Lane).unwrap();
    assert_eq!(sequence.tokens(), 240);
    check(&model, &sequence, 2);

    // A byte of a page that somebody has changed.
    let pages = std::fs::read_dir(store.path())
        .unwrap()
        .map(|entry| entry.unwrap().path().join("pages"))
        .find(|path| path.is_file())
        .unwrap();
    let mut bytes = std::fs::read(&pages).unwrap();
    bytes[20_000] ^= 1;
    std::fs::write(&pages, bytes).unwrap();
    let before = daemon.status().sessions.iter().map(|session| session.sequences).sum::<u64>();
    let error = model.resume("one", None, SelectedBy::Lane).unwrap_err();
    assert!(reason(&error).contains("CRC-32C"), "{error}");
    let after = daemon.status().sessions.iter().map(|session| session.sequences).sum::<u64>();
    assert_eq!(before, after, "nothing stays open");
    check(&model, &sequence, 2);

    let none = Daemon::start(DAEMON, &[]);
    let model = fake::connect(&none, &["full"]);
    let (_, error) = model.open(0, 10).unwrap().suspend("one", false, "").unwrap_err();
    assert!(reason(&error).contains("--store"), "{error}");
}

/// How often the daemon is killed, each time a little later.
const ROUNDS: u64 = 12;

#[test]
fn a_daemon_killed_while_it_suspends_leaves_the_old_image_or_the_new_one() {
    let store = tempfile::tempdir().unwrap();
    let mut news = 0;
    for round in 0..ROUNDS {
        let daemon = start(store.path(), &["--in-place", "true"]);
        let model = fake::connect(&daemon, &["full"]);
        let sequence = model.open(0, 0).unwrap();
        let seed = 10 + round as usize;
        fill(&model, &sequence, seed, 600);
        let suspending = std::thread::spawn(move || sequence.suspend("it", true, "").is_ok());
        // A suspension takes some milliseconds; the last one is waited for.
        if round + 1 < ROUNDS {
            std::thread::sleep(std::time::Duration::from_micros(700 * round));
        } else {
            wait_until("the suspension to end", || suspending.is_finished());
        }
        let (_, words) = daemon.end(Signal::SIGKILL);
        let done = suspending.join().unwrap();
        let daemon = start(store.path(), &["--in-place", "true"]);
        let model = fake::connect(&daemon, &["full"]);
        match model.resume("it", None, SelectedBy::Lane) {
            Ok((sequence, _)) => {
                let mut row = vec![0; 2 * fake::HEAD_DIM * 4];
                sequence.read_rows(0, 0, 0..1, &mut row).unwrap();
                let first = f32::from_le_bytes([row[0], row[1], row[2], row[3]]);
                let found = (first / 1_000_003.0).round() as usize;
                assert!(found <= seed && (!done || found == seed), "{found} of {seed}: {words}");
                news += usize::from(found == seed);
                check(&model, &sequence, found);
            }
            Err(error) => {
                assert!(news == 0 && !done, "an image that was there has gone: {error}");
            }
        }
    }
    assert!(news > 0, "the last suspension was waited for");
}

#[test]
fn an_image_is_resumed_by_another_daemon_that_shares_a_remote_store() {
    let (here, there, remote) =
        (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let url = format!("file://{}", remote.path().display());
    let daemon = start(here.path(), &["--remote", &url]);
    let here_model = fake::connect(&daemon, &["full"]);
    let sequence = here_model.open(0, 0).unwrap();
    fill(&here_model, &sequence, 4, 500);
    suspend(sequence, "moved");
    let other = start(there.path(), &["--remote", &url]);
    let model = fake::connect(&other, &["full"]);
    let mut moved = None;
    wait_until("the image to be copied", || {
        moved = model.resume("moved", None, SelectedBy::Lane).ok();
        moved.is_some()
    });
    let (sequence, _) = moved.unwrap();
    check(&model, &sequence, 4);
    // What was brought for that is under no name there, and goes: in the remote store it may be replaced, or removed.
    let names = |folder: std::path::PathBuf| -> Vec<String> {
        let entries = std::fs::read_dir(folder).unwrap();
        entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
    };
    assert!(names(there.path().to_owned()).iter().all(|name| name.starts_with('.')));
    wait_until("the copy to go", || names(there.path().join(".resumed")) == [".lock"]);
    let newer = here_model.open(0, 0).unwrap();
    fill(&here_model, &newer, 5, 500);
    newer.suspend("moved", true, "a test's").map_err(|(_, error)| error).unwrap();
    wait_until("the newer one to be copied and resumed", || {
        // In the moment when it is replaced it is to be asked for again.
        let Ok((sequence, _)) = model.resume("moved", None, SelectedBy::Lane) else { return false };
        let mut rows = vec![0; 2 * fake::HEAD_DIM * 4];
        sequence.read_rows(0, 0, 100..101, &mut rows).unwrap();
        rows == fake::row(5, 0, 0, 100).into_iter().flat_map(f32::to_le_bytes).collect::<Vec<u8>>()
    });
}

#[test]
fn what_is_larger_than_host_memory_is_suspended_and_resumed_all_the_same() {
    let (store, spill) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let spill = spill.path().display().to_string();
    let flags = ["--arena", "64MiB", "--spill", &spill, "--spill-bytes", "512MiB", "--in-place", "true"];
    let daemon = start(store.path(), &flags);
    let model = fake::connect(&daemon, &["given"]);
    let sequence = model.open(0, 0).unwrap();
    // 138 MiB.
    let tokens = 90_000;
    while sequence.tokens() < tokens {
        let end = (sequence.tokens() + 3000).min(tokens);
        model.reserve(&[(&sequence, end)]).unwrap();
        fake::fill(&model, &sequence, 4, end).unwrap();
    }
    suspend(sequence, "large");
    let (sequence, _) = model.resume("large", None, SelectedBy::Lane).unwrap();
    assert_eq!(sequence.tokens(), tokens);
    let ids: Vec<u32> =
        (0..fake::KV_HEADS).flat_map(|head| [4, 9, 31_000 + head as u32, 60_000, 89_000]).collect();
    for layer in 1..fake::LAYERS {
        let ready = fake::ask_with(&model, &sequence, layer, Hint::Ids(&ids));
        assert_eq!(fake::check(&ready, 0, 4, layer).unwrap(), 8);
    }
}

#[test]
fn room_without_rows_is_no_part_of_an_image_and_its_client_may_select_what_it_resumes() {
    let store = tempfile::tempdir().unwrap();
    let daemon = start(store.path(), &["--in-place", "true"]);
    let model = fake::connect(&daemon, &["kvoyant:budget=5%"]);
    let sequence = model.open(0, 4096).unwrap();
    fake::fill(&model, &sequence, 4, 100).unwrap();
    suspend(sequence, "short");
    for by in [SelectedBy::Client, SelectedBy::Lane] {
        let (sequence, method) = model.resume("short", Some(0), by).unwrap();
        assert_eq!((sequence.tokens(), method, sequence.selected_by()), (100, 0, by));
        check(&model, &sequence, 4);
    }
}
