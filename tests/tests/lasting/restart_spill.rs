//! Sessions with pages on disk outlast their daemon: engines go on in the middle of an answer, no token of it is another one, and no row.

use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use kvoyant_client::{Hint, Model, SelectedBy, Sequence, Status};
use kvoyant_engine::synthetic;
use kvoyant_protocol::memory::Memfd;
use kvoyant_protocol::wire::Stat;
use kvoyant_tests::fake::fill_as_prompt as fill;
use kvoyant_tests::going_on::{self, Engine, IN_PLACE, METHODS, SPILLED, Served, Way, undisturbed};
use kvoyant_tests::noisy::some_ids;
use kvoyant_tests::supervisor::Supervisor;
use kvoyant_tests::{PATIENCE, fake};
use nix::sys::signal::Signal;

const DAEMON: &str = env!("CARGO_BIN_EXE_kvoyantd-under-test");

/// The area's name in its folder.
const AREA: &str = "kvoyant-spill-0";

/// Pages of 32 rows: 94 of each head, of which a tenth is in host memory.
const TOKENS: usize = 3000;
const TENTH: [Way; 2] =
    [Way { host_percent: Some("10"), ..SPILLED[0] }, Way { host_percent: Some("10"), ..SPILLED[1] }];

#[test]
fn an_answer_goes_on_over_restarts_between_steps_token_for_token() {
    going_on::between_steps(DAEMON, &[&METHODS[..], &["full"]].concat(), &SPILLED);
}

#[test]
fn an_answer_goes_on_over_kills_before_every_call_of_a_step() {
    going_on::before_calls(DAEMON, &METHODS, &SPILLED);
}

#[test]
fn an_answer_goes_on_over_kills_at_any_moment_of_its_steps() {
    going_on::at_any_moment(DAEMON, &["kvoyant", "quest", "full"], &SPILLED);
}

/// Asks for rows here and there, and looks at each.
fn look(model: &Model, sequence: &Sequence, seed: usize, asks: std::ops::Range<usize>) {
    for step in asks {
        let layer = 1 + step % (fake::LAYERS - 1);
        let ids = some_ids(step, 1 + step % 40, TOKENS);
        let ready = fake::ask_with(model, sequence, layer, Hint::Ids(&ids));
        let rows = fake::check(&ready, 0, seed, layer).unwrap();
        assert_eq!(rows, ids.len() - fake::KV_HEADS, "all that were named");
    }
}

#[test]
fn rows_are_what_was_written_wherever_their_pages_were_when_the_daemon_died() {
    for way in TENTH {
        let mut served = Served::start(DAEMON, &way);
        let model = fake::connect_at(&served.daemon.socket(), &["given"]);
        let sequence = model.open(0, 0).unwrap();
        for (turn, tokens) in (1..=6).map(|turn| (turn, TOKENS * turn / 6)) {
            fill(&model, &sequence, 3, tokens);
            // Whatever is being written then.
            served.daemon.restart(if turn % 2 == 0 { Signal::SIGTERM } else { Signal::SIGKILL });
        }
        let on_disk = |served: &Served| served.daemon.status().sessions[0].spilled_pages as usize;
        let pages = TOKENS.div_ceil(32) * fake::LAYERS * fake::KV_HEADS;
        look(&model, &sequence, 3, 0..30);
        assert!(on_disk(&served) > pages / 2, "{way:?}: {} of {pages}", on_disk(&served));
        for turn in 1..8 {
            served.daemon.restart(Signal::SIGKILL);
            look(&model, &sequence, 3, turn * 30..turn * 30 + turn * 3);
        }
        served.daemon.takeover();
        look(&model, &sequence, 3, 0..60);
        assert_eq!(model.stat(Stat::PagesLost), 0);
        // And pages go on leaving: a second sequence needs their frames.
        let second = model.open(0, 0).unwrap();
        fill(&model, &second, 4, TOKENS);
        look(&model, &second, 4, 0..20);
        look(&model, &sequence, 3, 60..80);
        assert!(on_disk(&served) > pages, "{way:?}: {} of {}", on_disk(&served), 2 * pages);
        assert_eq!(model.generation(), 14);
    }
}

#[test]
fn what_an_engine_is_reading_stays_as_it_is_while_the_next_daemon_serves_others() {
    let mut served = Served::start(DAEMON, &TENTH[0]);
    let model = fake::connect_at(&served.daemon.socket(), &["given"]);
    let sequences = [5, 6].map(|seed| {
        let sequence = model.open(0, 0).unwrap();
        fill(&model, &sequence, seed, TOKENS);
        sequence
    });
    for turn in 0..6 {
        // Rows from all over: each in a page of its own, most of which come from disk for this.
        let held: Vec<_> = (0..2)
            .map(|step| {
                let ids = some_ids(turn * 10 + step, 60, TOKENS);
                fake::ask_with(&model, &sequences[0], 1 + step, Hint::Ids(&ids))
            })
            .collect();
        served.daemon.restart(Signal::SIGKILL);
        // While these are held, frames are few.
        for step in 0..5 {
            let layer = 1 + step % (fake::LAYERS - 1);
            let ids = some_ids(turn * 100 + step, 30, TOKENS);
            let position = TOKENS;
            let member = kvoyant_client::Member { sequence: &sequences[1], position, hint: Hint::Ids(&ids) };
            match model.speculate(layer, &[member]).unwrap().wait(PATIENCE) {
                Ok(ready) => drop(fake::check(&ready, 0, 6, layer).unwrap()),
                Err(kvoyant_client::Error::NotReady { status: Status::HostFull, .. }) => {}
                Err(error) => panic!("{error}"),
            }
        }
        for (step, ready) in held.iter().enumerate() {
            fake::check(ready, 0, 5, 1 + step).unwrap();
        }
        drop(held);
        look(&model, &sequences[1], 6, turn * 7..turn * 7 + 7);
    }
}

#[test]
fn forks_and_cuts_of_what_lies_on_disk_are_there_again() {
    let mut served = Served::start(DAEMON, &TENTH[1]);
    let model = fake::connect_at(&served.daemon.socket(), &["given"]);
    let sequence = model.open(0, 0).unwrap();
    fill(&model, &sequence, 1, TOKENS);
    let fork = sequence.fork(None).unwrap();
    served.daemon.restart(Signal::SIGKILL);
    look(&model, &fork, 1, 0..20);
    // The fork goes another way from the middle on; what was there stays the first one's.
    fork.truncate(1555).unwrap();
    served.daemon.restart(Signal::SIGKILL);
    fill(&model, &fork, 2, TOKENS);
    served.daemon.restart(Signal::SIGTERM);
    look(&model, &sequence, 1, 20..40);
    let mut keys = vec![0.0; 3 * fake::HEAD_DIM];
    let mut values = keys.clone();
    let _lease = model.fetch(2, &[(&fork, TOKENS)]).unwrap().wait(PATIENCE).unwrap();
    for (from, seed) in [(1552, 1), (1555, 2), (2900, 2)] {
        fork.read(2, 1, from..from + 3, &mut keys, &mut values).unwrap();
        assert_eq!(keys[..fake::HEAD_DIM], fake::row(seed, 2, 1, from)[..fake::HEAD_DIM], "{from}");
    }
    drop(sequence);
    served.daemon.restart(Signal::SIGKILL);
    let _lease = model.fetch(1, &[(&fork, TOKENS)]).unwrap().wait(PATIENCE).unwrap();
    fork.read(1, 0, 1000..1003, &mut keys, &mut values).unwrap();
    assert_eq!(keys[..fake::HEAD_DIM], fake::row(1, 1, 0, 1000)[..fake::HEAD_DIM]);
    drop(fork);
    let empty = served.daemon.wait_for("nothing on disk", |status| {
        status.spill.iter().all(|device| device.used_bytes == 0) && status.sessions[0].spilled_pages == 0
    });
    assert_eq!(empty.sessions[0].pages, 0);
}

fn text_of(path: &Path) -> usize {
    let bytes = std::fs::read(path).unwrap();
    // Behind the first block.
    bytes[4096..].iter().filter(|byte| **byte != 0).count()
}

#[test]
fn what_nobody_claims_is_erased_and_who_ends_with_nobody_leaves_nothing() {
    let mut served = Served::start(DAEMON, &TENTH[0]);
    let area = served.folder.path().join(AREA);
    let models = [7, 8].map(|seed| {
        let model = fake::connect_at(&served.daemon.socket(), &["given"]);
        let sequence = model.open(0, 0).unwrap();
        fill(&model, &sequence, seed, TOKENS);
        (model, sequence, seed)
    });
    let status = served.daemon.status();
    let (used, gone) = (status.spill[0].used_bytes, status.sessions[1].id);
    let _ = served.daemon.end(Signal::SIGKILL);
    let [(first, sequence, seed), (second, ..)] = models;
    // The second engine dies too, and its journal with it.
    drop(second);
    let prefix = format!("kvoyant.{gone}.");
    served.daemon.with_stored(|stored| stored.retain(|(name, _)| !name.starts_with(&prefix)));
    served.daemon.again();
    look(&first, &sequence, seed, 0..10);
    let half = |status: &kvoyant_daemon::status::StatusReport| status.spill[0].used_bytes == used / 2;
    served.daemon.wait_for("its chunks", half);
    assert!(text_of(&area) > 0);
    drop((sequence, first));
    served.daemon.wait_for("nobody", |status| status.totals.sessions == 0 && status.spill[0].used_bytes == 0);
    assert_eq!(text_of(&area), 0);
    let _ = served.daemon.end(Signal::SIGTERM);
    assert!(!area.exists(), "it is left to nobody");
}

#[test]
fn an_area_that_is_not_the_same_any_more_ends_its_sessions_alone_with_a_sentence() {
    let model = synthetic::tiny(7);
    let way = SPILLED[0];
    let expected = undisturbed(DAEMON, &model, "full", &way, 4);
    for what in ["removed", "another's", "not asked for", "without a log", "a log of nothing"] {
        let mut served = Served::start(DAEMON, &way);
        let area = served.folder.path().join(AREA);
        let mut engine = Engine::start(&served.daemon.socket(), &model, "full", way.prompt);
        let found = engine.steps(4);
        let _ = served.daemon.end(Signal::SIGKILL);
        match what {
            "removed" => std::fs::remove_file(&area).unwrap(),
            "another's" => {
                // As if the daemon of another folder had been here.
                let other = Served::start(DAEMON, &way);
                let mut block = vec![0; 4096];
                std::fs::File::open(other.folder.path().join(AREA))
                    .unwrap()
                    .read_exact_at(&mut block, 0)
                    .unwrap();
                std::fs::OpenOptions::new().write(true).open(&area).unwrap().write_all_at(&block, 0).unwrap();
            }
            "not asked for" => served.daemon.serve_otherwise(&IN_PLACE.flags),
            _ => served.daemon.with_stored(|stored| {
                let log = stored.iter_mut().find(|(name, _)| name.contains(".frames.")).unwrap();
                log.1 = Memfd::create("other", 4096).unwrap().try_clone().unwrap();
                if what == "without a log" {
                    stored.retain(|(name, _)| !name.contains(".frames."));
                }
            }),
        }
        served.daemon.again();
        assert_eq!(found, expected, "{what}");
        let error = engine.try_step().unwrap_err();
        assert!(error.contains("compute them again"), "{what}: {error}");
        assert!(engine.kv.kv.alone().is_some(), "{what}");
        let (_, said) = served.daemon.end(Signal::SIGTERM);
        let sentence = match what {
            "without a log" => "the log of its frames is missing",
            "a log of nothing" => "the peer's memfd has seals",
            _ => "what its journal says of its pages on disk cannot be",
        };
        assert!(said.contains(sentence), "{what}: {said}");
    }
}

#[test]
fn a_start_that_fails_or_has_to_wait_takes_nothing_of_what_was_left() {
    let others = tempfile::tempdir().unwrap();
    let way = TENTH[0];
    let mut served = Served::start(DAEMON, &way);
    let mut flags = way.flags(served.folder.path());
    // Two areas, so that one is open when the other one is found to be in use.
    flags.extend(["--spill".into(), others.path().display().to_string()]);
    let strs = |flags: &[String]| -> Vec<&'static str> {
        flags.iter().map(|flag| &*String::leak(flag.clone())).collect()
    };
    let _ = served.daemon.end(Signal::SIGTERM);
    served.daemon.serve_otherwise(&strs(&flags));
    served.daemon.again();
    let model = fake::connect_at(&served.daemon.socket(), &["given"]);
    let sequence = model.open(0, 0).unwrap();
    fill(&model, &sequence, 13, TOKENS);
    assert!(served.daemon.status().spill.iter().all(|area| area.used_bytes > 0), "both are in use");
    let _ = served.daemon.end(Signal::SIGKILL);
    let wrong = [&flags[..], &["--store".into(), "/dev/null/nothing".into()]].concat();
    served.daemon.serve_otherwise(&strs(&wrong));
    let failed = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| served.daemon.again()));
    assert!(failed.is_err(), "there is no such folder");
    served.daemon.serve_otherwise(&strs(&flags));
    let second = std::fs::File::open(others.path().join(AREA)).unwrap();
    second.lock().unwrap();
    std::thread::scope(|scope| {
        scope.spawn(|| {
            std::thread::sleep(Duration::from_millis(300));
            second.unlock().unwrap();
        });
        served.daemon.again();
    });
    look(&model, &sequence, 13, 0..40);
    assert_eq!((model.stat(Stat::PagesLost), model.generation()), (0, 1));
}

#[test]
fn a_page_that_was_spoilt_meanwhile_is_lost_and_nothing_else() {
    let mut served = Served::start(DAEMON, &TENTH[0]);
    let model = fake::connect_at(&served.daemon.socket(), &["given"]);
    let sequence = model.open(0, 0).unwrap();
    fill(&model, &sequence, 11, TOKENS);
    let _ = served.daemon.end(Signal::SIGKILL);
    let area = std::fs::OpenOptions::new().write(true).open(served.folder.path().join(AREA)).unwrap();
    // Every eighth of its pages.
    for at in (0..4 << 20).step_by(32 << 10) {
        area.write_all_at(&[0x55; 4096], (1 << 20) + at).unwrap();
    }
    served.daemon.again();
    let (mut lost, mut right) = (0, 0);
    for step in 0..200 {
        let layer = 1 + step % (fake::LAYERS - 1);
        let ids = some_ids(step, 1, TOKENS);
        let member = kvoyant_client::Member { sequence: &sequence, position: TOKENS, hint: Hint::Ids(&ids) };
        match model.speculate(layer, &[member]).unwrap().wait(PATIENCE) {
            Ok(ready) => right += fake::check(&ready, 0, 11, layer).unwrap(),
            Err(kvoyant_client::Error::NotReady { status: Status::RowsLost, .. }) => lost += 1,
            Err(error) => panic!("{error}"),
        }
    }
    assert!(lost > 0 && right > 0, "{lost} lost, {right} right");
    // What is in memory is right, and goes on.
    let second = model.open(0, 0).unwrap();
    fill(&model, &second, 12, TOKENS);
    look(&model, &second, 12, 0..10);
}

#[test]
fn sessions_go_on_where_there_was_no_disk_and_is_one_now() {
    let mut served = Served::start(DAEMON, &IN_PLACE);
    let model = fake::connect_at(&served.daemon.socket(), &["given"]);
    let sequence = model.open(0, 0).unwrap();
    fill(&model, &sequence, 9, TOKENS / 2);
    let _ = served.daemon.end(Signal::SIGTERM);
    let flags = TENTH[0].flags(served.folder.path());
    served.daemon.serve_otherwise(&flags.iter().map(String::as_str).collect::<Vec<_>>());
    served.daemon.again();
    fill(&model, &sequence, 9, TOKENS);
    look(&model, &sequence, 9, 0..20);
    served.daemon.wait_for("pages on disk", |status| status.sessions[0].spilled_pages > 0);
    served.daemon.restart(Signal::SIGKILL);
    look(&model, &sequence, 9, 20..40);
    assert_eq!(model.generation(), 2);
}

#[test]
fn an_image_larger_than_what_is_free_comes_back_while_daemons_come_and_go() {
    let folders = [(); 2].map(|()| tempfile::tempdir().unwrap());
    let [store, spill] = folders.each_ref().map(|folder| folder.path().display().to_string());
    let flags = ["--arena", "64MiB", "--store", &store, "--spill", &spill, "--spill-bytes", "512MiB"];
    let mut daemon = Supervisor::start(DAEMON, &flags);
    let model = fake::connect_at(&daemon.socket(), &["given"]);
    // Each has 46 MiB.
    let tokens = 30_000;
    let [first, second] = [21, 22].map(|seed| {
        let sequence = model.open(0, 0).unwrap();
        fill(&model, &sequence, seed, tokens);
        sequence
    });
    second.suspend("large", false, "").map_err(|(_, error)| error).unwrap();
    let resumed: Vec<Sequence> = (0..4)
        .map(|turn| {
            let over = AtomicBool::new(false);
            std::thread::scope(|scope| {
                let resuming = scope.spawn(|| {
                    let resumed = model.resume("large", None, SelectedBy::Lane).unwrap().0;
                    over.store(true, Ordering::Relaxed);
                    resumed
                });
                // The daemon ends with the thread that started it.
                for kill in 0..turn {
                    std::thread::sleep(Duration::from_millis(40 + 60 * kill));
                    if !over.load(Ordering::Relaxed) {
                        daemon.restart(Signal::SIGKILL);
                    }
                }
                resuming.join().unwrap()
            })
        })
        .collect();
    for (sequence, seed) in resumed.iter().map(|sequence| (sequence, 22)).chain([(&first, 21)]) {
        assert_eq!(sequence.tokens(), tokens);
        fake::check_rows(&model, sequence, 0..tokens, seed);
    }
    // What was opened for a resumption that its daemon did not live to end is nobody's.
    assert_eq!(daemon.status().sessions[0].sequences, 5);
}
