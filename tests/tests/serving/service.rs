//! The daemon as its clients and operators meet it: answers, limits, bad input, death.

use std::io::BufRead;
use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use kvoyant_client::{Client, Error, Failure, Hint, Limits, Member, Options, Sequence};
use kvoyant_protocol::control::{ToClient, ToDaemon, encode, features};
use kvoyant_protocol::wire::SequenceId;
use kvoyant_tests::raw::Raw;
use kvoyant_tests::{Daemon, PATIENCE, fake, words};
use nix::sys::signal::Signal;
use proptest::prelude::*;

const DAEMON: &str = env!("CARGO_BIN_EXE_kvoyantd-under-test");
const CLIENT: &str = env!("CARGO_BIN_EXE_client-under-test");

#[test]
fn every_row_that_comes_back_is_the_row_that_was_written() {
    let methods = ["full", "random:budget=30%", "random:budget=7"];
    for flags in
        [&["--in-place", "true"][..], &[], &["--slab", "1MiB"], &["--copy-threads", "3", "--keep", "1"]]
    {
        let daemon = Daemon::start(DAEMON, flags);
        let model = fake::connect(&daemon, &methods);
        let sequences: Vec<_> = (0..6)
            .map(|seed| {
                let sequence = model.open(seed % 3, 500).unwrap();
                fake::fill(&model, &sequence, seed, 500).unwrap();
                sequence
            })
            .collect();
        for _ in 0..10 {
            for layer in 1..fake::LAYERS {
                let members: Vec<_> = sequences
                    .iter()
                    .map(|sequence| Member { sequence, position: sequence.tokens(), hint: Hint::None })
                    .collect();
                let ready = model.speculate(layer, &members).unwrap().wait(PATIENCE).unwrap();
                for (seed, expected) in [480 + 1, 150, 7, 481, 150, 7].into_iter().enumerate() {
                    let rows = fake::check(&ready, seed, seed, layer).unwrap();
                    assert_eq!(rows, expected * fake::KV_HEADS, "sequence {seed} with {flags:?}");
                }
            }
            for (seed, sequence) in sequences.iter().enumerate() {
                let tokens = sequence.tokens();
                model.reserve(&[(sequence, tokens + 1)]).unwrap();
                fake::fill(&model, sequence, seed, tokens + 1).unwrap();
                model.close(Vec::new()).unwrap();
                sequence.truncate(500).unwrap();
            }
        }
    }
}

#[test]
fn rows_are_written_where_they_belong_while_their_table_moves() {
    let daemon = Daemon::start(DAEMON, &["--in-place", "true"]);
    let model = fake::connect(&daemon, &["full"]);
    let rows: Vec<u8> = fake::row(9, 0, 0, 0).into_iter().flat_map(f32::to_le_bytes).collect();
    for _ in 0..20 {
        let open = |seed, tokens| {
            let sequence = model.open(0, 256).unwrap();
            fake::fill(&model, &sequence, seed, tokens).unwrap();
            sequence
        };
        // The other one has a row where this one's last is written, in a table of the same form.
        let (written, other) = (open(1, 255), open(2, 256));
        let over = std::sync::atomic::AtomicBool::new(false);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                while !over.load(std::sync::atomic::Ordering::Relaxed) {
                    for head in 0..fake::KV_HEADS {
                        written.write_rows(fake::LAYERS - 1, head, 255, &rows).unwrap();
                    }
                }
            });
            for n in 1..6 {
                model.reserve(&[(&written, 256 << n), (&other, 128 << n)]).unwrap();
            }
            over.store(true, std::sync::atomic::Ordering::Relaxed);
        });
        for (sequence, seed) in [(&written, 1), (&other, 2)] {
            let tokens = sequence.tokens();
            let mut found = vec![0; rows.len() * tokens];
            for (layer, head) in
                (0..fake::LAYERS).flat_map(|layer| (0..fake::KV_HEADS).map(move |head| (layer, head)))
            {
                sequence.read_rows(layer, head, 0..tokens, &mut found).unwrap();
                for (token, found) in found.chunks_exact(rows.len()).enumerate() {
                    let wanted: Vec<u8> =
                        fake::row(seed, layer, head, token).into_iter().flat_map(f32::to_le_bytes).collect();
                    assert_eq!(found, wanted, "sequence {seed}, layer {layer} head {head} token {token}");
                }
            }
        }
    }
}

#[test]
fn thousands_of_sequences_are_closed_by_one_message_while_others_are_served_and_nothing_of_them_stays() {
    let daemon = Daemon::start(DAEMON, &["--lanes", "1"]);
    let other = fake::connect(&daemon, &["full"]);
    let sequence = other.open(0, 300).unwrap();
    fake::fill(&other, &sequence, 1, 300).unwrap();
    let limits = Limits { sequences_max: 6_000, ..Limits::default() };
    let mut raw = Raw::greet_with(&daemon.socket(), features::COMMON, limits);
    raw.register(fake::spec(&["quest"]), &[]).unwrap();
    let mut sequences: Vec<_> = (0..6_000).map(|_| raw.open(0)).collect();
    daemon.wait_for("all of them", |status| status.totals.sequences == 6_001 && status.totals.tokens == 300);
    // A handle of nobody's among them keeps none of the others open.
    let nobody = SequenceId { slot: 5, generation: 77 };
    sequences.insert(100, nobody);
    raw.say(&encode(&ToDaemon::Close { sequences }));
    for _ in 0..50 {
        fake::check(&fake::ask(&other, &sequence, 1), 0, 1, 1).unwrap();
    }
    assert_eq!(raw.hear(), Ok(ToClient::Failed(Failure::NoSuchSequence(nobody))));
    daemon.wait_for("their end", |status| {
        let gone =
            status.sessions.iter().filter(|session| session.sequences == 0 && session.digest_bytes == 0);
        gone.count() == 1 && status.totals.tokens == 300
    });
    assert_eq!(raw.open(0).slot, 0);
    fake::check(&fake::ask(&other, &sequence, 1), 0, 1, 1).unwrap();
}

#[test]
fn lanes_that_may_not_sleep_on_their_rings_look_at_them_and_say_so_once() {
    let daemon = Daemon::start_failing(DAEMON, "futex-wait-many:1+", &["--lanes", "1"]);
    for _ in 0..2 {
        let model = fake::connect(&daemon, &["full"]);
        let sequence = model.open(0, 300).unwrap();
        fake::fill(&model, &sequence, 1, 300).unwrap();
        for pause in [0, 1, 300] {
            // After a while they look less often.
            std::thread::sleep(Duration::from_millis(pause));
            let member = Member { sequence: &sequence, position: sequence.tokens(), hint: Hint::None };
            let ready = model.speculate(1, &[member]).unwrap().wait(PATIENCE).unwrap();
            fake::check(&ready, 0, 1, 1).unwrap();
        }
        drop((sequence, model));
        daemon.wait_for("no session", |status| status.totals.sessions == 0);
    }
    let (status, said) = daemon.end(Signal::SIGTERM);
    assert!(status.success(), "{said}");
    assert_eq!(said.matches("allow futex_waitv").count(), 1, "{said}");
}

#[test]
fn only_rows_that_are_not_resident_move() {
    let daemon = Daemon::start(DAEMON, &[]);
    let model = fake::connect(&daemon, &["full"]);
    let sequence = model.open(0, 400).unwrap();
    fake::fill(&model, &sequence, 1, 400).unwrap();
    let row_bytes = 2 * fake::HEAD_DIM as u64 * 4;
    let rows = 381 * fake::KV_HEADS as u64;
    let first = *fake::ask(&model, &sequence, 1).completion();
    assert_eq!((first.bytes_moved, first.rows_hit), (rows * row_bytes, 0));
    let second = *fake::ask(&model, &sequence, 1).completion();
    assert_eq!((second.bytes_moved, u64::from(second.rows_hit)), (0, rows));
    assert_eq!(u64::from(second.rows_resident), rows);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]
    /// Opens, forks, appends, truncations and closes in any order: every sequence keeps its own rows, and in the
    /// end everything is given back.
    #[test]
    fn forks_and_closes_in_any_order_keep_rows_apart_and_return_everything(
        moves in proptest::collection::vec((0u8..5, any::<prop::sample::Index>(), 1usize..90), 1..40),
        in_place: bool,
    ) {
        let daemon = Daemon::start(DAEMON, if in_place { &["--in-place", "true"] } else { &["--slab", "1MiB"] });
        let model = fake::connect(&daemon, &["full"]);
        // A sequence, and for each of its tokens the seed that wrote it.
        let mut live: Vec<(Sequence, Vec<usize>)> = Vec::new();
        for (step, (kind, index, count)) in moves.into_iter().enumerate() {
            match kind {
                0 => live.push((model.open(0, 0).unwrap(), Vec::new())),
                1 | 2 if !live.is_empty() => {
                    let at = index.index(live.len());
                    let (sequence, seeds) = &mut live[at];
                    let tokens = seeds.len() + count;
                    model.reserve(&[(sequence, tokens)]).unwrap();
                    fake::fill(&model, sequence, step, tokens).unwrap();
                    seeds.resize(tokens, step);
                }
                3 if !live.is_empty() => {
                    let (sequence, seeds) = &live[index.index(live.len())];
                    live.push((sequence.fork(None).unwrap(), seeds.clone()));
                }
                4 if !live.is_empty() => {
                    let at = index.index(live.len());
                    if count % 2 == 0 {
                        live.swap_remove(at).0.close().unwrap();
                    } else {
                        let keep = live[at].1.len() * count / 90;
                        live[at].0.truncate(keep).unwrap();
                        live[at].1.truncate(keep);
                    }
                }
                _ => {}
            }
            for (sequence, seeds) in &live {
                for layer in 0..fake::LAYERS {
                    for head in 0..fake::KV_HEADS {
                        let mut rows = vec![0; seeds.len() * 2 * fake::HEAD_DIM * 4];
                        sequence.read_rows(layer, head, 0..seeds.len(), &mut rows).unwrap();
                        for (token, (row, seed)) in rows.chunks_exact(2 * fake::HEAD_DIM * 4).zip(seeds).enumerate() {
                            let expected: Vec<u8> =
                                fake::row(*seed, layer, head, token).into_iter().flat_map(f32::to_le_bytes).collect();
                            prop_assert!(row == expected, "token {} of layer {}", token, layer);
                        }
                    }
                }
                if seeds.len() > fake::SINKS + fake::WINDOW {
                    let ready = fake::ask(&model, sequence, 1);
                    let tokens: usize = ready.tokens(0, 0).map(|run| run.rows).sum();
                    prop_assert_eq!(tokens, seeds.len() + 1 - fake::SINKS - fake::WINDOW);
                }
            }
        }
        drop(live);
        let status = daemon.status();
        prop_assert_eq!(status.totals.sequences, 0);
        prop_assert_eq!(status.totals.pages, 0);
        prop_assert_eq!(status.totals.digest_bytes, 0);
        drop(model);
        let status = daemon.wait_for("no session", |status| status.totals.sessions == 0);
        prop_assert_eq!(status.arena.used_bytes, 0);
    }
}

#[test]
fn a_full_arena_is_a_typed_answer_that_names_what_would_help_and_nothing_else_stops() {
    let daemon = Daemon::start(DAEMON, &["--arena", "128MiB"]);
    let model = fake::connect(&daemon, &["full"]);
    let small = model.open(0, 100).unwrap();
    fake::fill(&model, &small, 1, 100).unwrap();
    // A token is 1,536 bytes: 80,000 are most of the arena.
    let large = model.open(0, 80_000).unwrap();
    let error = model.reserve(&[(&small, 20_000)]).unwrap_err();
    let Error::Failed(Failure::Backpressure { needed_bytes, free_bytes, arena_bytes, closing }) = &error
    else {
        panic!("{error}");
    };
    assert!(needed_bytes > free_bytes && *arena_bytes == 128 << 20, "{error}");
    assert_eq!(*closing, [large.id()]);
    // Nothing was taken, and what is there goes on.
    fake::check(&fake::ask(&model, &small, 1), 0, 1, 1).unwrap();
    let hopeless = model.open(0, 1_000_000).unwrap_err();
    assert!(hopeless.to_string().contains("raise the daemon's arena size"), "{hopeless}");
    large.close().unwrap();
    model.reserve(&[(&small, 20_000)]).unwrap();
    fake::fill(&model, &small, 1, 20_000).unwrap();
    fake::check(&fake::ask(&model, &small, 2), 0, 1, 2).unwrap();
}

#[test]
fn a_daemon_that_is_killed_is_an_error_within_the_deadline_and_own_rows_stay_readable() {
    let daemon = Daemon::start(DAEMON, &[]);
    let model = fake::connect(&daemon, &["full"]);
    let sequence = model.open(0, 100).unwrap();
    fake::fill(&model, &sequence, 3, 100).unwrap();
    drop(fake::ask(&model, &sequence, 1));
    daemon.end(Signal::SIGKILL);
    let since = Instant::now();
    let member = Member { sequence: &sequence, position: 100, hint: Hint::None };
    let error = model.speculate(1, &[member]).unwrap().wait(PATIENCE).unwrap_err();
    assert!(matches!(error, Error::DaemonGone), "{error}");
    assert!(since.elapsed() < PATIENCE, "it was noticed, not waited for");
    assert!(matches!(model.open(0, 1), Err(Error::DaemonGone)));
    let mut rows = vec![0; 2 * fake::HEAD_DIM * 4];
    sequence.read_rows(2, 1, 57..58, &mut rows).unwrap();
    assert_eq!(rows[..4], fake::row(3, 2, 1, 57)[0].to_le_bytes());
}

#[test]
fn a_daemon_that_is_stopped_is_an_error_at_the_deadline_and_goes_on_when_it_is_continued() {
    let daemon = Daemon::start(DAEMON, &[]);
    let model = fake::connect(&daemon, &["full"]);
    let sequence = model.open(0, 100).unwrap();
    fake::fill(&model, &sequence, 3, 100).unwrap();
    drop(fake::ask(&model, &sequence, 1));
    daemon.stop();
    let member = Member { sequence: &sequence, position: 100, hint: Hint::None };
    let pending = model.speculate(1, &[member]).unwrap();
    let error = pending.wait(Duration::from_millis(100)).unwrap_err();
    assert!(matches!(error, Error::Deadline { .. }), "{error}");
    nix::sys::signal::kill(daemon.pid(), Signal::SIGCONT).unwrap();
    fake::check(&fake::ask(&model, &sequence, 2), 0, 3, 2).unwrap();
    // Dropping does not wait long for a daemon that does not answer.
    daemon.stop();
    let since = Instant::now();
    drop(sequence);
    assert!(since.elapsed() < PATIENCE, "dropping waited {:?}", since.elapsed());
    nix::sys::signal::kill(daemon.pid(), Signal::SIGCONT).unwrap();
}

#[test]
fn a_client_that_is_killed_leaves_nothing_behind_and_its_neighbours_unharmed() {
    let daemon = Daemon::start(DAEMON, &[]);
    let model = fake::connect(&daemon, &["full"]);
    let sequence = model.open(0, 100).unwrap();
    fake::fill(&model, &sequence, 1, 100).unwrap();
    let before = daemon.wait_for("the rows", |status| status.totals.tokens == 100);
    for _ in 0..3 {
        let mut client =
            Command::new(CLIENT).arg(daemon.socket()).arg("hold").stdout(Stdio::piped()).spawn().unwrap();
        let mut line = String::new();
        std::io::BufReader::new(client.stdout.take().unwrap()).read_line(&mut line).unwrap();
        assert_eq!(line, "holding\n");
        assert_eq!(daemon.status().totals.sequences, 5);
        client.kill().unwrap();
        client.wait().unwrap();
        let after = daemon.wait_for("one session", |status| status.totals.sessions == 1);
        assert_eq!(after.arena.used_bytes, before.arena.used_bytes);
        assert_eq!(after.totals.pages, before.totals.pages);
        fake::check(&fake::ask(&model, &sequence, 1), 0, 1, 1).unwrap();
    }
}

#[test]
fn several_processes_and_several_threads_of_one_session_work_at_once() {
    let daemon = Daemon::start(DAEMON, &["--lanes", "2", "--slab", "1MiB"]);
    let clients: Vec<_> = (0..2)
        .map(|_| {
            let mut command = Command::new(CLIENT);
            command.arg(daemon.socket()).args(["work", "1.5"]).stdout(Stdio::piped()).spawn().unwrap()
        })
        .collect();
    let model = fake::connect(&daemon, &["random:budget=40%", "full"]);
    std::thread::scope(|scope| {
        for seed in 0..3 {
            let model = model.clone();
            scope.spawn(move || {
                let sequence = model.open(seed % 2, 200).unwrap();
                fake::fill(&model, &sequence, seed, 200).unwrap();
                for step in 0..100 {
                    let layer = 1 + step % 2;
                    fake::check(&fake::ask(&model, &sequence, layer), 0, seed, layer).unwrap();
                }
            });
        }
    });
    for client in clients {
        let output = client.wait_with_output().unwrap();
        assert!(output.status.success(), "a client saw a wrong answer");
        let answers: u64 = String::from_utf8(output.stdout).unwrap().trim().parse().unwrap();
        assert!(answers > 0);
    }
}

#[test]
fn answers_that_are_held_or_given_up_free_their_tickets() {
    let daemon = Daemon::start(DAEMON, &["--shape-latency-us", "20000"]);
    let limits = Limits { ring_slots: 4, ..Limits::default() };
    let options = Options { limits, ticket_timeout: Duration::ZERO, ..Options::default() };
    let client = Client::connect(&daemon.socket(), options).unwrap();
    let model = client.register(fake::spec(&["random:budget=20%"]), &[]).unwrap();
    let sequence = model.open(0, 300).unwrap();
    fake::fill(&model, &sequence, 2, 300).unwrap();
    let ask_at = |position| model.speculate(1, &[Member { sequence: &sequence, position, hint: Hint::None }]);
    let held: Vec<_> = (0..4).map(|i| ask_at(300 - i).unwrap()).collect();
    assert!(matches!(ask_at(200), Err(Error::TooManyInFlight { slots: 4 })));
    let mut held = held.into_iter();
    let late = held.next().unwrap().wait(Duration::from_micros(1)).unwrap_err();
    assert!(matches!(late, Error::Deadline { .. }), "{late}");
    drop(held);
    // The given-up answers still come, and with them their tickets.
    let since = Instant::now();
    let ready = loop {
        match ask_at(250) {
            Ok(pending) => break pending.wait(PATIENCE).unwrap(),
            Err(Error::TooManyInFlight { .. }) if since.elapsed() < PATIENCE => {
                std::thread::sleep(Duration::from_millis(1));
            }
            Err(error) => panic!("{error}"),
        }
    };
    fake::check(&ready, 0, 2, 1).unwrap();
}

#[test]
fn a_second_daemon_on_the_same_socket_is_refused_and_the_first_goes_on() {
    let daemon = Daemon::start(DAEMON, &[]);
    let output = Daemon::command(DAEMON, daemon.folder(), &[]).output().unwrap();
    assert!(!output.status.success());
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(said.contains("another daemon serves") && said.lines().count() == 1, "{said}");
    drop(fake::connect(&daemon, &["full"]));
}

#[test]
fn a_daemon_that_is_told_to_stop_leaves_nothing_and_one_that_was_killed_is_cleaned_up_after() {
    for signal in [Signal::SIGTERM, Signal::SIGINT] {
        let daemon = Daemon::start(DAEMON, &[]);
        let model = fake::connect(&daemon, &["full"]);
        let sequence = model.open(0, 100).unwrap();
        let folder = daemon.folder().to_path_buf();
        kvoyant_tests::signal_and_wait_until_empty(&daemon, signal, &folder);
        drop(sequence);
    }
    let folder = tempfile::tempdir().unwrap();
    let mut child = Daemon::command(DAEMON, folder.path(), &[]).spawn().unwrap();
    let socket = folder.path().join("kvoyantd.sock");
    kvoyant_tests::wait_until("its socket", || socket.exists());
    child.kill().unwrap();
    child.wait().unwrap();
    assert!(socket.exists(), "a killed daemon leaves its socket");
    let refused = Client::connect(&socket, Options::default()).unwrap_err();
    assert!(refused.to_string().contains("a daemon left this socket behind"), "{refused}");
    let mut child = Daemon::command(DAEMON, folder.path(), &[]).spawn().unwrap();
    kvoyant_tests::wait_until("a new daemon", || Client::connect(&socket, Options::default()).is_ok());
    child.kill().unwrap();
    child.wait().unwrap();
}

#[test]
fn places_that_cannot_be_used_are_named_in_one_sentence() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("file");
    std::fs::write(&file, "").unwrap();
    let under_file = file.join("kvoyantd.sock").display().to_string();
    let output = Daemon::command(DAEMON, folder.path(), &["--socket", &under_file]).output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(!output.status.success() && said.lines().count() == 1, "{said}");
    assert!(said.contains("file") && said.contains("--socket"), "{said}");
    let missing = Client::connect(&folder.path().join("no.sock"), Options::default()).unwrap_err();
    assert!(missing.to_string().contains("is kvoyantd running"), "{missing}");
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1, "nothing is left behind");
}

#[test]
fn a_memlock_limit_that_is_too_small_is_named_with_what_raises_it_and_the_daemon_goes_on() {
    // Root may lock whatever it likes, so as root the daemon runs as nobody.
    let folder = tempfile::tempdir().unwrap();
    let mut command = Daemon::command(DAEMON, folder.path(), &["--pin", "true"]);
    if nix::unistd::geteuid().is_root() {
        let nobody = 65534;
        nix::unistd::chown(folder.path(), Some(nobody.into()), Some(nobody.into())).unwrap();
        command.uid(nobody).gid(nobody);
    }
    let (soft, _) = nix::sys::resource::getrlimit(nix::sys::resource::Resource::RLIMIT_MEMLOCK).unwrap();
    let mut child = command.spawn().unwrap();
    let socket = folder.path().join("kvoyantd.sock");
    kvoyant_tests::wait_until("its socket", || socket.exists());
    let client = Client::connect(&socket, Options::default()).unwrap();
    let model = client.register(fake::spec(&["full"]), &[]).unwrap();
    let sequence = model.open(0, 100).unwrap();
    fake::fill(&model, &sequence, 1, 100).unwrap();
    fake::check(&fake::ask(&model, &sequence, 1), 0, 1, 1).unwrap();
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(child.id() as i32), Signal::SIGTERM).unwrap();
    assert!(child.wait().unwrap().success());
    let said = words(&mut child);
    if soft >= 64 << 20 {
        assert!(!said.contains("memlock"), "{said}");
    } else {
        assert!(said.contains(&format!("memlock limit is {soft} bytes")), "{said}");
        assert!(said.contains("LimitMEMLOCK=infinity") && said.contains("going on unpinned"), "{said}");
    }
}

#[test]
fn models_and_methods_that_cannot_be_served_are_refused_by_name() {
    let daemon = Daemon::start(DAEMON, &[]);
    let refusal = |spec, artifacts: &[Vec<u8>]| {
        let client = Client::connect(&daemon.socket(), Options::default()).unwrap();
        client.register(spec, artifacts).unwrap_err().to_string()
    };
    let spec = fake::spec(&["full"]);
    for (spec, expected) in [
        (kvoyant_client::ModelSpec { kv_heads: 3, ..spec.clone() }, "no multiple of 3"),
        (kvoyant_client::ModelSpec { window: 0, ..spec.clone() }, "window"),
        (kvoyant_client::ModelSpec { layers: 0, ..spec.clone() }, "layers = 0"),
        (kvoyant_client::ModelSpec { page_rows: 3, ..spec.clone() }, "4096"),
        (kvoyant_client::ModelSpec { methods: Vec::new(), ..spec.clone() }, "at least one method"),
        (fake::spec(&["clairvoyance"]), "clairvoyance"),
        (fake::spec(&["random:budget=0%"]), "0"),
        (fake::spec(&["random:budget=101%"]), "101"),
        (fake::spec(&["infinigen:budget=6%"]), "skew"),
    ] {
        let said = refusal(spec, &[]);
        assert!(said.contains(expected), "{said}");
    }
    let said = refusal(fake::spec(&["infinigen:budget=6%"]), &[b"not an artifact at all".to_vec()]);
    assert!(said.contains("artifact"), "{said}");
}

#[test]
fn status_counts_sessions_sequences_pages_and_bytes() {
    let daemon = Daemon::start(DAEMON, &[]);
    let empty = daemon.status();
    assert_eq!((empty.totals.sessions, empty.totals.pages, empty.arena.used_bytes), (0, 0, 0));
    let model = fake::connect(&daemon, &["full"]);
    let sequence = model.open(0, 64).unwrap();
    fake::fill(&model, &sequence, 1, 64).unwrap();
    let fork = sequence.fork(None).unwrap();
    drop(fake::ask(&model, &sequence, 1));
    let status = daemon
        .wait_for("an answer", |status| status.sessions.iter().any(|session| session.speculations == 1));
    let pages = (fake::LAYERS * fake::KV_HEADS * 2) as u64;
    assert_eq!((status.totals.sequences, status.totals.tokens), (2, 128));
    assert_eq!(status.totals.pages, pages, "what forks share counts once");
    assert_eq!(status.totals.kv_bytes, pages * 32 * 2 * fake::HEAD_DIM as u64 * 4);
    assert_eq!(status.sessions[0].pid, std::process::id() as i32);
    assert!(status.totals.bytes_moved > 0);
    drop(fork);
}
