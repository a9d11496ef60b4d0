//! Sessions outlast their daemon: engines go on in the middle of an answer, and no token of it is another one.

use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::time::Duration;

use kvoyant_engine::synthetic;
use kvoyant_protocol::control::{ToClient, ToDaemon, decode, encode, features};
use kvoyant_protocol::layout::Limits;
use kvoyant_protocol::quota::Quota;
use kvoyant_protocol::{MINOR, packet};
use kvoyant_tests::going_on::{self, Engine, IN_PLACE, METHODS, SLAB, undisturbed};
use kvoyant_tests::person::{self, Person};
use kvoyant_tests::raw::Raw;
use kvoyant_tests::supervisor::Supervisor;
use kvoyant_tests::{Daemon, fake};
use nix::sys::signal::Signal;

const PERSON: &str = env!("CARGO_BIN_EXE_person-under-test");
const DAEMON: &str = env!("CARGO_BIN_EXE_kvoyantd-under-test");

#[test]
fn an_answer_goes_on_over_restarts_between_steps_token_for_token() {
    going_on::between_steps(DAEMON, &METHODS, &[IN_PLACE, SLAB]);
}

#[test]
fn an_answer_goes_on_over_kills_before_every_call_of_a_step() {
    going_on::before_calls(DAEMON, &METHODS, &[IN_PLACE, SLAB]);
}

#[test]
fn an_answer_goes_on_over_kills_at_any_moment_of_its_steps() {
    going_on::at_any_moment(DAEMON, &METHODS, &[IN_PLACE, SLAB]);
}

#[test]
fn an_engine_whose_session_is_lost_finds_its_rows_as_they_were_and_goes_on_alone() {
    let model = synthetic::tiny(7);
    let expected = undisturbed(DAEMON, &model, "full", &IN_PLACE, 24);
    let off = [&IN_PLACE.flags[..], &["--keep-sessions", "off"]].concat();
    let briefly = [&IN_PLACE.flags[..], &["--reattach-seconds", "1"]].concat();
    for (what, flags) in [("not kept", &off), ("damaged", &briefly), ("late", &briefly)] {
        let mut daemon = Supervisor::start(DAEMON, flags);
        let mut engine = Engine::start(&daemon.socket(), &model, "full", IN_PLACE.prompt);
        let mut found = engine.steps(8);
        match what {
            "not kept" => daemon.restart(Signal::SIGTERM),
            "damaged" => {
                let _ = daemon.end(Signal::SIGKILL);
                daemon.with_stored(|stored| {
                    for (_, fd) in stored.iter().filter(|(name, _)| name.contains(".journal.")) {
                        let journal = std::fs::File::from(fd.try_clone().unwrap());
                        let len = journal.metadata().unwrap().len();
                        if len > 0 {
                            journal.set_len(len / 2).unwrap();
                        }
                    }
                });
                daemon.again();
            }
            _ => {
                daemon.restart(Signal::SIGKILL);
                // It was there while the session waited, and has given up its memory since.
                daemon.wait_for("nothing", |status| status.arena.used_bytes == 0);
            }
        }
        found.extend(engine.steps(16));
        assert_eq!(found, expected, "{what}");
        assert!(engine.kv.kv.alone().is_some(), "{what}");
    }
}

#[test]
fn completions_tell_of_every_restart_between_two_requests() {
    let mut daemon = Supervisor::start(DAEMON, &SLAB.flags);
    let model = fake::connect_at(&daemon.socket(), &["random:budget=50%"]);
    let sequence = model.open(0, 300).unwrap();
    fake::fill(&model, &sequence, 4, 300).unwrap();
    let ask = || {
        let ready = fake::ask(&model, &sequence, 1);
        fake::check(&ready, 0, 4, 1).unwrap();
        (ready.completion().generation, ready.completion().boot_id)
    };
    let (first, boot) = ask();
    assert_eq!((first, model.generation()), (0, 0), "no daemon has served the session before");
    assert_eq!(ask(), (0, boot), "nothing has happened in between");
    let mut boots = vec![boot];
    for generation in 1..=3 {
        match generation {
            1 => daemon.restart(Signal::SIGKILL),
            2 => {
                // Asked before, and answered after.
                kvoyant_tests::stop(daemon.pid());
                let (position, hint) = (300, kvoyant_client::Hint::None);
                let member = kvoyant_client::Member { sequence: &sequence, position, hint };
                let asked = model.speculate(1, &[member]).unwrap();
                daemon.restart(Signal::SIGKILL);
                let ready = asked.wait(kvoyant_tests::PATIENCE).unwrap();
                assert_eq!(ready.completion().generation, generation, "whoever answers says so");
            }
            _ => daemon.takeover(),
        }
        let (found, boot) = ask();
        assert_eq!((found, model.generation()), (generation, generation));
        assert!(!boots.contains(&boot), "{boots:?}");
        boots.push(boot);
    }
    // A session that begins anew begins to count anew.
    let another = fake::connect_at(&daemon.socket(), &["full"]);
    assert_eq!(another.generation(), 0);
}

#[test]
fn forks_and_several_sessions_are_there_again_and_go_on_apart() {
    use kvoyant_client::Hint;
    use kvoyant_tests::PATIENCE;
    let mut daemon = Supervisor::start(DAEMON, &SLAB.flags);
    let connect = |daemon: &Supervisor| {
        let options = kvoyant_client::Options::default();
        let client = kvoyant_client::Client::connect(&daemon.socket(), options).unwrap();
        client.register(fake::spec(&["random:budget=50%", "quest"]), &[]).unwrap()
    };
    let models = [connect(&daemon), connect(&daemon)];
    let mut all = Vec::new();
    for (at, model) in models.iter().enumerate() {
        let sequence = model.open(0, 300).unwrap();
        fake::fill(model, &sequence, at, 300).unwrap();
        let fork = sequence.fork(None).unwrap();
        let closed = sequence.fork(None).unwrap();
        closed.close().unwrap();
        all.push((model, at, sequence, fork));
    }
    let named = |all: &[(&kvoyant_client::Model, usize, _, _)]| -> Vec<Vec<_>> {
        let both = |(model, _, sequence, fork): &(&kvoyant_client::Model, _, _, _)| {
            [sequence, fork].map(|sequence| {
                let ready = fake::ask(model, sequence, 1);
                (0..fake::KV_HEADS).map(|head| ready.tokens(0, head).collect::<Vec<_>>()).collect::<Vec<_>>()
            })
        };
        all.iter().flat_map(both).collect()
    };
    let tokens_of = |answers: Vec<Vec<Vec<kvoyant_client::RowRun>>>| -> Vec<Vec<usize>> {
        let flat = |runs: &Vec<kvoyant_client::RowRun>| {
            runs.iter().flat_map(|run| run.token..run.token + run.rows).collect::<Vec<_>>()
        };
        answers.iter().flatten().map(flat).collect()
    };
    let before = tokens_of(named(&all));
    for signal in [Signal::SIGKILL, Signal::SIGTERM] {
        daemon.restart(signal);
        assert_eq!(tokens_of(named(&all)), before, "the same seeds draw the same rows");
        let status = daemon.wait_for("both sessions", |status| status.totals.sessions == 2);
        assert_eq!(status.sessions.iter().map(|session| session.sequences).sum::<u64>(), 4);
    }
    // Writing to a fork leaves the other one alone, and what is closed comes back.
    for (model, seed, sequence, fork) in &all {
        fork.truncate(200).unwrap();
        model.reserve(&[(fork, 300)]).unwrap();
        fake::fill(model, fork, seed + 10, 250).unwrap();
        daemon.restart(Signal::SIGKILL);
        let query = vec![0.5; fake::QUERY_HEADS * fake::HEAD_DIM];
        let quest = fork.fork(Some(1)).unwrap();
        let member = kvoyant_client::Member { sequence: &quest, position: 250, hint: Hint::Query(&query) };
        assert!(model.speculate(1, &[member]).unwrap().wait(PATIENCE).unwrap().rows(0, 0) > 0);
        fake::check(&fake::ask(model, sequence, 1), 0, *seed, 1).unwrap();
        let mut keys = vec![0.0; 50 * fake::HEAD_DIM];
        let mut values = keys.clone();
        fork.read(1, 0, 200..250, &mut keys, &mut values).unwrap();
        assert_eq!(keys[..fake::HEAD_DIM], fake::row(seed + 10, 1, 0, 200)[..fake::HEAD_DIM]);
        fork.read(1, 0, 150..200, &mut keys, &mut values).unwrap();
        assert_eq!(keys[..fake::HEAD_DIM], fake::row(*seed, 1, 0, 150)[..fake::HEAD_DIM]);
    }
    drop(all);
    drop(models);
    let gone = |status: &kvoyant_daemon::status::StatusReport| {
        status.totals.sessions == 0 && status.arena.used_bytes == 0
    };
    daemon.wait_for("no session", gone);
    assert!(daemon.kinds().is_empty(), "{:?}", daemon.kinds());
}

/// A session without the client library, of a client that can go on with another daemon.
fn claimable(daemon: &Supervisor) -> (Raw, u64, [u64; 2]) {
    let socket = Raw::socket(&daemon.socket());
    let limits = Limits { ring_slots: 8, ..Limits::default() };
    let features = features::COMMON | features::KEPT;
    let hello = ToDaemon::Hello { features, name: "raw".into(), limits, minor: MINOR };
    packet::send(socket.as_fd(), &encode(&hello), &[]).unwrap();
    let welcome = packet::receive(socket.as_fd()).unwrap();
    let Ok(ToClient::Welcome { session, features: common, .. }) = decode(&welcome.bytes) else {
        panic!("no welcome")
    };
    assert_ne!(common & features::KEPT, 0, "the daemon keeps sessions");
    let mut raw = Raw::welcomed(socket, welcome.fds, limits);
    let Ok(ToClient::Kept { token, seconds }) = raw.call(&ToDaemon::Keep) else { panic!("no token") };
    assert!(seconds > 0);
    raw.register(fake::spec(&["full"]), &[]).unwrap();
    (raw, session, token)
}

fn claim(daemon: &Supervisor, session: u64, token: [u64; 2], extents: u32) -> Result<ToClient, String> {
    let socket = Raw::socket(&daemon.socket());
    packet::send(socket.as_fd(), &encode(&ToDaemon::Claim { session, token, extents }), &[]).unwrap();
    let answer = packet::receive(socket.as_fd()).unwrap();
    match decode(&answer.bytes).unwrap() {
        ToClient::Failed(failure) => Err(failure.to_string()),
        message => Ok(message),
    }
}

#[test]
fn a_claim_needs_the_sessions_token_and_its_user_and_a_session_that_waits() {
    let mut daemon = Supervisor::start(DAEMON, &[]);
    let (mut raw, session, token) = claimable(&daemon);
    raw.open(100);
    assert!(claim(&daemon, session, token, 1).unwrap_err().contains("not kept for you"), "it is open");
    daemon.restart(Signal::SIGKILL);
    for (session, token) in [
        (session, [token[0], token[1] ^ 1]),
        (session, [token[0] ^ 1 << 63, token[1]]),
        (session, [0, 0]),
        (session + 1, token),
        (u64::MAX, token),
    ] {
        assert!(claim(&daemon, session, token, 1).unwrap_err().contains("not kept for you"));
    }
    if person::can_be_others() {
        let folder = daemon.socket().parent().unwrap().to_path_buf();
        std::fs::set_permissions(folder, std::fs::Permissions::from_mode(0o755)).unwrap();
        std::fs::set_permissions(daemon.socket(), std::fs::Permissions::from_mode(0o666)).unwrap();
        let mut other = Person::new(PERSON, &daemon.socket(), 54_321, 54_321, &[]);
        let said = other.does(&format!("claim {session} {} {}", token[0], token[1])).unwrap_err();
        assert!(said.contains("not kept for you"), "{said}");
    }
    let said = claim(&daemon, session, token, 1000).unwrap_err();
    assert!(said.contains("1000 extents"), "{said}");
    // Whoever goes away in the middle may come again.
    for _ in 0..2 {
        let Ok(ToClient::Claimed { requests, controls, answered, .. }) = claim(&daemon, session, token, 1)
        else {
            panic!("it is theirs")
        };
        assert_eq!((requests, controls, answered), (0, 1, true));
        std::thread::sleep(Duration::from_millis(50));
    }
}

/// What a daemon has open, as this process's own, where the system lets its parent have that.
fn descriptors_of(daemon: &Supervisor) -> Vec<OwnedFd> {
    use nix::libc::{SYS_pidfd_getfd, SYS_pidfd_open, syscall};
    // SAFETY: the kernel gives a descriptor that nobody else has, or fails.
    let own = |fd: i64| (fd >= 0).then(|| unsafe { OwnedFd::from_raw_fd(fd as i32) });
    // SAFETY: two numbers go in, and no memory.
    let process = own(unsafe { syscall(SYS_pidfd_open, daemon.pid().as_raw(), 0) }).unwrap();
    // SAFETY: the same.
    let copy = |fd: i32| own(unsafe { syscall(SYS_pidfd_getfd, process.as_raw_fd(), fd, 0) });
    (0..1024).filter_map(copy).collect()
}

#[test]
fn who_claims_a_session_and_reads_nothing_has_lost_it_before_long() {
    let mut daemon = Supervisor::start(DAEMON, &[]);
    let (mut raw, session, token) = claimable(&daemon);
    raw.open(100);
    daemon.restart(Signal::SIGKILL);
    let socket = Raw::socket(&daemon.socket());
    packet::send(socket.as_fd(), &encode(&ToDaemon::Claim { session, token, extents: 1 }), &[]).unwrap();
    assert!(matches!(decode(&packet::receive(socket.as_fd()).unwrap().bytes), Ok(ToClient::Claimed { .. })));
    // Large sessions fill the socket with what is announced of their memory. This one is small, so it is filled from the daemon's end.
    let us = std::process::id() as i32;
    let is_ours = |fd: &OwnedFd| packet::peer(fd.as_fd()).is_ok_and(|(pid, _)| pid == us);
    let ends: Vec<_> = descriptors_of(&daemon).into_iter().filter(is_ours).collect();
    if ends.is_empty() {
        return eprintln!("SKIPPED: this system does not let a process have its child's descriptors");
    }
    for end in ends {
        while packet::send(end.as_fd(), &[0; 4096], &[]).is_ok() {}
    }
    packet::send(socket.as_fd(), &encode(&ToDaemon::Mapped), &[]).unwrap();
    daemon.wait_for("its session", |status| status.totals.sessions == 1);
    daemon.wait_for("no session", |status| status.totals.sessions == 0 && status.arena.used_bytes == 0);
    assert!(daemon.kinds().is_empty(), "{:?}", daemon.kinds());
    assert!(claim(&daemon, session, token, 1).unwrap_err().contains("not kept for you"));
}

#[test]
fn what_was_left_and_is_not_right_ends_its_session_alone_with_a_sentence() {
    let mut daemon = Supervisor::start(DAEMON, &IN_PLACE.flags);
    let model = synthetic::tiny(7);
    let mut engine = Engine::start(&daemon.socket(), &model, "quest", IN_PLACE.prompt);
    let expected = undisturbed(DAEMON, &model, "quest", &IN_PLACE, 8);
    let spoilt: Vec<_> = (0..5)
        .map(|_| {
            let (mut raw, session, token) = claimable(&daemon);
            raw.open(100);
            (raw, session, token)
        })
        .collect();
    let mut found = engine.steps(4);
    let _ = daemon.end(Signal::SIGKILL);
    let sessions: Vec<u64> = spoilt.iter().map(|(_, session, _)| *session).collect();
    let of = |session: u64, kind: &str| format!("kvoyant.{session}.{kind}.");
    daemon.with_stored(|stored| {
        let journals = |stored: &[(String, OwnedFd)], session| -> Vec<std::fs::File> {
            let its = stored.iter().filter(|(name, _)| name.starts_with(&of(session, "journal")));
            its.map(|(_, fd)| fd.try_clone().unwrap().into())
                .filter(|file: &std::fs::File| file.metadata().unwrap().len() > 0)
                .collect()
        };
        // A version that is to come, with the right checksum; a byte; an extent that is gone, or is another file; half of a journal.
        for journal in journals(stored, sessions[0]) {
            let mut header = [0; 64];
            journal.read_exact_at(&mut header, 0).unwrap();
            header[8] += 1;
            header[12..16].fill(0);
            let crc = crc32c::crc32c(&header);
            header[12..16].copy_from_slice(&crc.to_le_bytes());
            journal.write_all_at(&header, 0).unwrap();
        }
        for journal in journals(stored, sessions[1]) {
            let mut byte = [0];
            journal.read_exact_at(&mut byte, 300).unwrap();
            journal.write_all_at(&[byte[0] ^ 4], 300).unwrap();
        }
        stored.retain(|(name, _)| !name.starts_with(&of(sessions[2], "extent")));
        let other = kvoyant_protocol::memory::Memfd::create("other", 64 << 20).unwrap();
        for (name, fd) in stored.iter_mut().filter(|(name, _)| name.starts_with(&of(sessions[3], "extent"))) {
            assert!(!name.is_empty());
            *fd = other.try_clone().unwrap();
        }
        stored.retain(|(name, _)| *name != format!("kvoyant.{}.journal.0", sessions[4]));
    });
    daemon.again();
    for (at, (_, session, token)) in spoilt.iter().enumerate() {
        let claimed = claim(&daemon, *session, *token, 1);
        assert!(claimed.as_ref().is_err_and(|said| said.contains("not kept for you")), "{at}: {claimed:?}");
    }
    found.extend(engine.steps(4));
    assert_eq!(found, expected, "its neighbours' files are nothing to it");
    assert_eq!(engine.kv.kv.alone(), None);
    let (_, said) = daemon.end(Signal::SIGTERM);
    for sentence in [
        "its journal has version 4 and this daemon reads version 3; a newer daemon wrote it",
        "its journal is damaged at byte",
        "an extent is missing",
        "the peer's memfd has seals",
        "of its journal there is only a part",
    ] {
        assert!(said.contains(sentence), "{sentence}: {said}");
    }
}

#[test]
fn a_session_whose_engine_died_meanwhile_is_dropped_after_a_while_and_leaves_nothing() {
    let mut daemon = Supervisor::start(DAEMON, &["--reattach-seconds", "1"]);
    let (mut raw, ..) = claimable(&daemon);
    raw.open(100);
    assert_eq!(daemon.kinds()["extent"], 1);
    let _ = daemon.end(Signal::SIGKILL);
    drop(raw);
    daemon.again();
    let status = daemon.status();
    let held = |status: &kvoyant_daemon::status::StatusReport| {
        let quotas = [Quota::Host, Quota::Tables, Quota::Sequences, Quota::Sessions, Quota::Rings];
        let of = |quota| status.users.iter().map(|user| user.held(quota)).sum::<u64>();
        quotas.map(of)
    };
    // While it waits it counts, as it did.
    assert!(held(&status).iter().all(|held| *held > 0), "{:?}", status.users);
    daemon.wait_for("nothing", |status| held(status) == [0; 5] && status.arena.used_bytes == 0);
    assert!(daemon.kinds().is_empty(), "{:?}", daemon.kinds());
    // And one that leaves in good order leaves nothing either.
    let (raw, ..) = claimable(&daemon);
    drop(raw);
    daemon.wait_for("no session", |status| status.totals.sessions == 0);
    assert!(daemon.kinds().is_empty(), "{:?}", daemon.kinds());
}

#[test]
fn where_nothing_is_kept_nothing_is_written_and_nobody_takes_over() {
    let daemon = Daemon::start(DAEMON, &[]);
    let socket = Raw::socket(&daemon.socket());
    packet::send(socket.as_fd(), &encode(&ToDaemon::Takeover), &[]).unwrap();
    let answer = packet::receive(socket.as_fd()).unwrap();
    let Ok(ToClient::Failed(failure)) = decode(&answer.bytes) else { panic!("{:?}", answer.bytes) };
    assert!(failure.to_string().contains("it keeps no sessions"), "{failure}");
    let raw = Raw::greet(&daemon.socket(), features::COMMON | features::KEPT);
    drop(raw);
    let off = Supervisor::start(DAEMON, &["--keep-sessions", "off"]);
    let _model = fake::connect_at(&off.socket(), &["full"]);
    assert!(off.kinds().is_empty());
}

#[test]
fn a_takeover_that_would_fail_is_given_up_before_the_daemon_before_it_has_let_go() {
    let daemon = Supervisor::start(DAEMON, &[]);
    let (mut raw, ..) = claimable(&daemon);
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str, mode: u32| {
        let path = folder.path().join(name);
        std::fs::write(&path, "0123456789abcdef").unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(mode)).unwrap();
        path.display().to_string()
    };
    let (open, file) = (path("open", 0o644), path("file", 0o600));
    for (flags, says) in [
        (&["--monitor", "127.0.0.1:0", "--monitor-token", &open][..], "others may read the token"),
        (&["--store", &file], "is no folder"),
        (&["--store", &folder.path().join("new").display().to_string(), "--remote", "nowhere"], "remote = "),
    ] {
        let said = daemon.refused_takeover(flags);
        assert!(said.contains(says), "{flags:?}: {said}");
        raw.open(10);
    }
    assert_eq!(daemon.status().totals.sessions, 1);
}

#[test]
fn whoever_takes_over_does_without_an_address_that_somebody_else_has() {
    let mut daemon = Supervisor::start(DAEMON, &[]);
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    daemon.serve_otherwise(&["--monitor", &taken.local_addr().unwrap().to_string()]);
    let (mut raw, session, token) = claimable(&daemon);
    raw.open(10);
    daemon.takeover();
    let extents = 1;
    assert!(matches!(claim(&daemon, session, token, extents), Ok(ToClient::Claimed { .. })));
    let (_, said) = daemon.end(Signal::SIGTERM);
    assert!(said.contains("no metrics at"), "{said}");
}
