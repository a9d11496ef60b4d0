//! Lies about images, prefixes and pages: refused in words, or the end of the liar's session, and nothing for its neighbour.

use std::net::{TcpListener, TcpStream};
use std::os::fd::OwnedFd;
use std::process::{Child, Command, Stdio};

use kvoyant_client::{Error, Failure, SelectedBy};
use kvoyant_protocol::control::{ToClient, ToDaemon, encode};
use kvoyant_protocol::memory::{Memfd, Seals};
use kvoyant_protocol::wire::{Append, BatchEntry, Operation, Request, SequenceId, Speculate};
use kvoyant_tests::raw::{self, Raw};
use kvoyant_tests::{Daemon, PATIENCE, fake, wait_until};

const DAEMON: &str = env!("CARGO_BIN_EXE_kvoyantd-under-test");

fn file(bytes: usize, sealed: bool) -> OwnedFd {
    let file = Memfd::create("tokens", bytes).unwrap();
    if sealed {
        file.seal(Seals::fixed_size()).unwrap();
    }
    file.try_clone().unwrap()
}

fn ask(raw: &mut Raw, message: &ToDaemon, fds: &[OwnedFd]) -> ToClient {
    raw.say_with(&encode(message), fds);
    raw.hear().unwrap()
}

#[test]
fn tokens_that_are_not_there_or_can_still_change_their_size_are_refused_and_the_session_goes_on() {
    let daemon = Daemon::start(DAEMON, &[]);
    let mut raw = Raw::connect(&daemon.socket(), fake::spec(&["full"]));
    let sequence = raw.open(64);
    let attach = |tokens| ToDaemon::Attach { method: 0, by: SelectedBy::Lane, tokens };
    let publish = |tokens| ToDaemon::Publish { sequence, tokens, shared: false };
    let many = || (0..3).map(|_| file(4096, true)).collect::<Vec<_>>();
    let cases: Vec<(u32, Vec<OwnedFd>)> = vec![
        (1024, Vec::new()),
        (1024, many()),
        (1024, vec![file(4096, false)]),
        (1024, vec![file(4092, true)]),
        (u32::MAX, vec![file(4096, true)]),
        (1 << 25, vec![file(4096, true)]),
    ];
    for (tokens, fds) in cases {
        for message in [attach(tokens), publish(tokens)] {
            let answer = ask(&mut raw, &message, &fds);
            assert!(matches!(&answer, ToClient::Failed(Failure::BadModel(_))), "{tokens}: {answer:?}");
        }
    }
    let stranger = SequenceId { slot: 9, generation: 3 };
    let publish = ToDaemon::Publish { sequence: stranger, tokens: 32, shared: true };
    let answer = ask(&mut raw, &publish, &[file(128, true)]);
    assert!(matches!(answer, ToClient::Failed(Failure::NoSuchSequence(_))), "{answer:?}");
    // Nothing is appended yet, so that nothing can be published.
    let publish = ToDaemon::Publish { sequence, tokens: 64, shared: true };
    assert_eq!(ask(&mut raw, &publish, &[file(256, true)]), ToClient::Published { tokens: 0, known: 0 });
    let suspend = ToDaemon::Suspend {
        sequence: stranger,
        image: "x".repeat(4000),
        overwrite: true,
        label: String::new(),
    };
    assert!(matches!(ask(&mut raw, &suspend, &[]), ToClient::Failed(Failure::Image { .. })));
    assert_ne!(raw.open(10), sequence, "the session goes on");
}

fn fetch(ticket: u64, layer: u16) -> Request {
    let operation = Operation::Speculate(Speculate { layer, fetch: true, ..raw::speculate(ticket) });
    Request { release_through: 0, operation }
}

#[test]
fn fetches_of_nothing_are_answered_and_of_layers_that_are_not_there_end_the_session() {
    let spill = tempfile::tempdir().unwrap();
    let path = spill.path().display().to_string();
    for flags in [&[][..], &["--spill", &path, "--spill-bytes", "64MiB", "--host-percent", "10"]] {
        let daemon = Daemon::start(DAEMON, flags);
        let neighbour = fake::connect(&daemon, &["full"]);
        let kept = neighbour.open(0, 200).unwrap();
        fake::fill(&neighbour, &kept, 9, 200).unwrap();
        let mut raw = Raw::connect(&daemon.socket(), fake::spec(&["full"]));
        let sequence = raw.open(64);
        let entry = |sequence, position| BatchEntry { sequence, position, value: u32::MAX };
        raw.push(&fetch(1, 0), &[entry(sequence, 0)]);
        raw.push(&fetch(2, 2), &[entry(sequence, u32::MAX)]);
        raw.push(&fetch(3, 1), &[entry(SequenceId { slot: 77, generation: 1 }, 5)]);
        raw.wait_for_ticket(3);
        raw.push(&fetch(4, 3), &[entry(sequence, 0)]);
        let ended = raw.hear().unwrap();
        let ToClient::Failed(failure) = ended else { panic!("{ended:?}") };
        assert!(failure.to_string().contains("layer 3"), "{failure}");
        fake::check(&fake::ask(&neighbour, &kept, 1), 0, 9, 1).unwrap();
    }
}

#[test]
fn rows_that_come_while_a_sequence_is_written_to_an_image_end_their_session_alone() {
    let store = tempfile::tempdir().unwrap();
    let path = store.path().display().to_string();
    let daemon = Daemon::start(DAEMON, &["--store", &path]);
    let neighbour = fake::connect(&daemon, &["full"]);
    let kept = neighbour.open(0, 200).unwrap();
    fake::fill(&neighbour, &kept, 9, 200).unwrap();
    let mut raw = Raw::connect(&daemon.socket(), fake::spec(&["full"]));
    let sequence = raw.open(1 << 15);
    let append = |position| {
        let operation = Operation::Append(Append { layer: None, batch: 1 });
        (Request { release_through: 0, operation }, BatchEntry { sequence, position, value: 1 << 14 })
    };
    let (request, entry) = append(0);
    raw.push(&request, &[entry]);
    let suspend = ToDaemon::Suspend { sequence, image: "it".into(), overwrite: true, label: String::new() };
    raw.say(&encode(&suspend));
    std::thread::sleep(std::time::Duration::from_millis(5));
    let (request, entry) = append(1 << 14);
    raw.push(&request, &[entry]);
    // Whichever was first, the daemon says one thing or the other, and lives.
    let answer = raw.hear().unwrap();
    assert!(matches!(answer, ToClient::Done | ToClient::Failed(_)), "{answer:?}");
    fake::check(&fake::ask(&neighbour, &kept, 1), 0, 9, 1).unwrap();
}

/// A server on loopback that ends with the test.
struct Redis {
    child: Child,
    port: u16,
    _folder: tempfile::TempDir,
}

impl Redis {
    /// `None` if there is no such program.
    fn start() -> Option<Self> {
        let port = TcpListener::bind("127.0.0.1:0").ok()?.local_addr().ok()?.port();
        let folder = tempfile::tempdir().unwrap();
        let child = Command::new("redis-server")
            .args(["--port", &port.to_string(), "--bind", "127.0.0.1", "--save", "", "--dir"])
            .arg(folder.path())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .ok()?;
        let server = Self { child, port, _folder: folder };
        wait_until("the server to listen", || TcpStream::connect(("127.0.0.1", port)).is_ok());
        Some(server)
    }
}

impl Drop for Redis {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[test]
fn a_remote_store_that_dies_holds_up_nobody_and_gets_what_it_missed_when_another_one_comes() {
    let Some(server) = Redis::start() else {
        println!("SKIPPED: redis-server is not installed (apt-get install redis-server)");
        return;
    };
    let store = tempfile::tempdir().unwrap();
    let path = store.path().display().to_string();
    let url = format!("redis://127.0.0.1:{}/0", server.port);
    let daemon = Daemon::start(DAEMON, &["--store", &path, "--remote", &url]);
    let model = fake::connect(&daemon, &["full"]);
    let suspended = |name: &str| {
        let sequence = model.open(0, 300).unwrap();
        fake::fill(&model, &sequence, 4, 300).unwrap();
        sequence.suspend(name, false, "").map_err(|(_, error)| error).unwrap();
    };
    suspended("before");
    let there = tempfile::tempdir().unwrap();
    let other_path = there.path().display().to_string();
    let other = Daemon::start(DAEMON, &["--store", &other_path, "--remote", &url]);
    let stranger = fake::connect(&other, &["full"]);
    wait_until("the image to be copied", || stranger.resume("before", None, SelectedBy::Lane).is_ok());
    drop(server);
    suspended("after");
    let (sequence, _) = model.resume("after", None, SelectedBy::Lane).unwrap();
    assert_eq!(sequence.tokens(), 300);
    let error = stranger.resume("after", None, SelectedBy::Lane).unwrap_err();
    assert!(error.to_string().contains("after"), "{error}");
    fake::check(&fake::ask(&model, &sequence, 1), 0, 4, 1).unwrap();
}

#[test]
fn a_session_that_ends_while_pages_are_on_their_way_gives_everything_back() {
    let spill = tempfile::tempdir().unwrap();
    let path = spill.path().display().to_string();
    let flags = ["--spill", &path, "--spill-bytes", "64MiB", "--host-percent", "10"];
    let daemon = Daemon::start(DAEMON, &flags);
    for _ in 0..3 {
        let mut raw = Raw::connect(&daemon.socket(), fake::spec(&["full"]));
        let sequence = raw.open(3000);
        let operation = Operation::Append(Append { layer: None, batch: 1 });
        let append = Request { release_through: 0, operation };
        raw.push(&append, &[BatchEntry { sequence, position: 0, value: 3000 }]);
        // What leaves is written first.
        let entry = |position| BatchEntry { sequence, position, value: 0 };
        daemon.wait_for("pages to leave", |status| {
            status.sessions.first().is_some_and(|session| session.spilled_pages > 100)
        });
        raw.push(&fetch(1, 1), &[entry(3000)]);
        raw.push(&fetch(9, 1), &[entry(3000)]);
        let ended = raw.hear().unwrap();
        assert!(matches!(ended, ToClient::Failed(_)), "{ended:?}");
        daemon.wait_for("the session to go", |status| status.sessions.is_empty());
    }
    daemon.wait_for("all memory to come back", |status| status.arena.used_bytes == 0);
}

#[test]
fn a_fetch_of_more_than_may_be_asked_at_once_ends_the_session() {
    let daemon = Daemon::start(DAEMON, &["--arena", "512MiB"]);
    let mut raw = Raw::connect(&daemon.socket(), fake::spec(&["full"]));
    let sequence = raw.open(60_000);
    let operation = Operation::Append(Append { layer: None, batch: 1 });
    let append = Request { release_through: 0, operation };
    raw.push(&append, &[BatchEntry { sequence, position: 0, value: 60_000 }]);
    let mut request = fetch(1, 1);
    if let Operation::Speculate(speculate) = &mut request.operation {
        speculate.batch = 64;
    }
    for ticket in 1..=8 {
        if let Operation::Speculate(speculate) = &mut request.operation {
            speculate.ticket = ticket;
        }
        raw.push(&request, &[BatchEntry { sequence, position: 60_000, value: 0 }; 64]);
    }
    // Bounded work or an end: either way the daemon answers somebody else at once.
    let neighbour = fake::connect(&daemon, &["full"]);
    // What the session that ended has taken with it comes back a moment later.
    let since = std::time::Instant::now();
    let kept = loop {
        match neighbour.open(0, 200) {
            Err(Error::Failed(Failure::Backpressure { .. })) if since.elapsed() < PATIENCE => {
                std::thread::sleep(std::time::Duration::from_millis(5));
            }
            opened => break opened.unwrap(),
        }
    };
    fake::fill(&neighbour, &kept, 9, 200).unwrap();
    fake::check(&fake::ask(&neighbour, &kept, 1), 0, 9, 1).unwrap();
}
