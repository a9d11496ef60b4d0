//! Host memory that is made ahead of time, kept, and held against limits: the daemon as operators and clients see it.

use std::cell::Cell;
use std::io::BufRead;
use std::process::{Command, Stdio};

use kvoyant_client::{Client, Options};
use kvoyant_daemon::status::PoolState;
use kvoyant_tests::{Daemon, fake};
use nix::sys::signal::Signal;

const DAEMON: &str = env!("CARGO_BIN_EXE_kvoyantd-under-test");
const CLIENT: &str = env!("CARGO_BIN_EXE_client-under-test");

const MIB: u64 = 1 << 20;

/// Ordinary pages, so that the same happens on every machine.
const AHEAD: [&str; 8] =
    ["--pin-ahead", "all", "--pin-threads", "1", "--huge-pages", "off", "--arena", "1GiB"];

#[test]
fn a_session_is_served_while_the_arena_is_still_being_made_and_status_shows_how_far_it_is() {
    let daemon = Daemon::start(DAEMON, &AHEAD);
    // The sockets are there; whether anything is ready yet is the pool's affair.
    let first = daemon.status().arena.pool;
    assert_eq!((first.ahead_bytes, first.pin.as_str(), first.trouble), (1024 * MIB, "none", None));
    let model = fake::connect(&daemon, &["full"]);
    let sequence = model.open(0, 100).unwrap();
    fake::fill(&model, &sequence, 1, 100).unwrap();
    fake::check(&fake::ask(&model, &sequence, 1), 0, 1, 1).unwrap();
    let seen = Cell::new(first.made_bytes);
    let full = daemon.wait_for("all of the arena", |status| {
        let pool = &status.arena.pool;
        assert!(pool.made_bytes >= seen.get() && pool.made_bytes <= 1024 * MIB, "it only grows: {pool:?}");
        seen.set(pool.made_bytes);
        assert!(pool.state == PoolState::Filling || pool.made_bytes == 1024 * MIB, "{pool:?}");
        pool.state == PoolState::Idle
    });
    assert_eq!((full.arena.used_bytes, full.arena.pool.ready_bytes), (64 * MIB, 960 * MIB));
    drop((sequence, model));
    daemon.wait_for("all of it ready", |status| status.arena.pool.ready_bytes == 1024 * MIB);
    let (_, said) = daemon.end(Signal::SIGTERM);
    assert!(said.contains("1024 of 1024 MiB of the arena are ready ahead of time"), "{said}");
}

#[test]
fn the_next_session_of_a_user_finds_the_extents_of_the_one_before_ready_and_empty() {
    let flags = ["--pin-ahead", "all", "--huge-pages", "off", "--arena", "64MiB"];
    let daemon = Daemon::start(DAEMON, &flags);
    for seed in 0..3 {
        let model = fake::connect(&daemon, &["full"]);
        let sequence = model.open(0, 20_000).unwrap();
        // There is one extent, so that these are the rows of the session before.
        let mut rows = vec![1; 20_000 * 2 * fake::HEAD_DIM * 4];
        for layer in 0..fake::LAYERS {
            for head in 0..fake::KV_HEADS {
                sequence.read_rows(layer, head, 0..20_000, &mut rows).unwrap();
                assert!(rows.iter().all(|byte| *byte == 0), "session {seed} sees another's rows");
            }
        }
        fake::fill(&model, &sequence, seed, 20_000).unwrap();
        fake::check(&fake::ask(&model, &sequence, 1), 0, seed, 1).unwrap();
        drop((sequence, model));
        let status = daemon.wait_for("the extent back", |status| status.arena.pool.ready_bytes == 64 * MIB);
        assert_eq!((status.arena.used_bytes, status.arena.pool.made_bytes), (0, 64 * MIB));
    }
}

#[test]
fn a_client_that_is_killed_gives_its_extents_back_to_the_pool() {
    let flags = ["--pin-ahead", "128MiB", "--huge-pages", "off", "--arena", "256MiB"];
    let daemon = Daemon::start(DAEMON, &flags);
    for _ in 0..3 {
        let mut client =
            Command::new(CLIENT).arg(daemon.socket()).arg("hold").stdout(Stdio::piped()).spawn().unwrap();
        let mut line = String::new();
        std::io::BufReader::new(client.stdout.take().unwrap()).read_line(&mut line).unwrap();
        assert!(daemon.status().arena.used_bytes > 0);
        client.kill().unwrap();
        client.wait().unwrap();
        let status = daemon.wait_for("rest", |status| {
            status.arena.used_bytes == 0 && status.arena.pool.state == PoolState::Idle
        });
        assert_eq!(status.arena.pool.ready_bytes, status.arena.pool.made_bytes);
        assert!(status.arena.pool.ready_bytes >= 128 * MIB);
    }
}

#[test]
fn sessions_that_ask_for_all_of_the_arena_at_once_get_it_or_are_told_that_it_is_full() {
    let daemon = Daemon::start(DAEMON, &["--arena", "256MiB", "--lanes", "2"]);
    let opened: usize = std::thread::scope(|scope| {
        let clients: Vec<_> = (0..4)
            .map(|_| {
                let daemon = &daemon;
                scope.spawn(move || {
                    let model = fake::connect(daemon, &["full"]);
                    let mut opened = 0;
                    for _ in 0..10 {
                        // A token is 1,536 bytes: three of the four extents.
                        match model.open(0, 120_000) {
                            Ok(sequence) => {
                                opened += 1;
                                sequence.close().unwrap();
                            }
                            Err(error) => assert!(error.to_string().contains("the arena is full"), "{error}"),
                        }
                    }
                    opened
                })
            })
            .collect();
        clients.into_iter().map(|client| client.join().unwrap()).sum()
    });
    assert!(opened >= 10, "whoever has the extents keeps them, and opens every time");
    daemon.wait_for("rest", |status| status.arena.used_bytes == 0 && status.arena.pool.made_bytes == 0);
}

#[test]
fn an_arena_beyond_every_limit_is_refused_in_one_sentence_that_names_the_limit() {
    let folder = tempfile::tempdir().unwrap();
    for check in [&["--arena", "1PiB"][..], &["--arena", "1PiB", "--check"]] {
        let output = Daemon::command(DAEMON, folder.path(), check).output().unwrap();
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(!output.status.success() && said.lines().count() == 1, "{said}");
        for part in ["does not fit", "can be had", "--arena"] {
            assert!(said.contains(part), "{part} is not in: {said}");
        }
    }
}

#[test]
fn huge_pages_that_are_required_and_not_there_are_a_typed_answer_and_the_session_goes_on() {
    let daemon = Daemon::start(DAEMON, &["--huge-pages", "require"]);
    let client = Client::connect(&daemon.socket(), Options::default()).unwrap();
    let model = client.register(fake::spec(&["full"]), &[]).unwrap();
    let empty = model.open(0, 0).unwrap();
    match model.open(0, 100) {
        Ok(_) => assert_eq!(daemon.status().arena.pool.huge_bytes, 64 * MIB),
        Err(error) => {
            let said = error.to_string();
            assert!(said.contains("host memory cannot be made ready"), "{said}");
            let status = daemon.status();
            assert_eq!((status.arena.used_bytes, status.arena.pool.state), (0, PoolState::Failed));
            assert!(status.arena.pool.trouble.is_some());
        }
    }
    empty.close().unwrap();
}
