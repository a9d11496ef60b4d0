//! Clients that lie, and requests that would harm others: a typed end for them, nothing for their neighbours.

use std::os::fd::AsFd;
use std::time::Duration;

use kvoyant_client::{Client, Error, Failure, Limits, Options};
use kvoyant_protocol::control::{SelectedBy, ToClient, ToDaemon, encode};
use kvoyant_protocol::wire::{Append, BatchEntry, Operation, Request, SequenceId, Speculate};
use kvoyant_tests::raw::{self, Raw};
use kvoyant_tests::{Daemon, fake};

const DAEMON: &str = env!("CARGO_BIN_EXE_kvoyantd-under-test");

#[test]
fn another_version_is_told_both_versions_and_other_protocols_are_told_apart() {
    let daemon = Daemon::start(DAEMON, &[]);
    let mut hello = encode(&ToDaemon::Mapped);
    hello[8] = 77;
    for (bytes, expected) in [
        (hello, &*format!("version 77 of the protocol and this side version {}", kvoyant_protocol::VERSION)),
        (b"GET / HTTP/1.1\r\n\r\n".to_vec(), "does not speak Kvoyant's protocol"),
        (encode(&ToDaemon::Mapped), "the first message must be a hello"),
    ] {
        let socket = Raw::socket(&daemon.socket());
        kvoyant_protocol::packet::send(socket.as_fd(), &bytes, &[]).unwrap();
        let answer = kvoyant_protocol::packet::receive(socket.as_fd()).unwrap();
        let answer: ToClient = kvoyant_protocol::control::decode(&answer.bytes).unwrap();
        let ToClient::Failed(failure) = answer else { panic!("{answer:?}") };
        assert!(failure.to_string().contains(expected), "{failure}");
    }
}

#[test]
fn a_client_that_lies_is_disconnected_with_the_reason_and_its_neighbour_sees_nothing() {
    let daemon = Daemon::start(DAEMON, &["--slab", "1MiB"]);
    let neighbour = fake::connect(&daemon, &["random:budget=50%"]);
    let sequence = neighbour.open(0, 200).unwrap();
    fake::fill(&neighbour, &sequence, 9, 200).unwrap();
    let append = |id: SequenceId, position, value| {
        let request =
            Request { release_through: 0, operation: Operation::Append(Append { layer: None, batch: 1 }) };
        (request, BatchEntry { sequence: id, position, value })
    };
    let speculate = |ticket, batch, layer| Request {
        release_through: 0,
        operation: Operation::Speculate(Speculate { layer, batch, ..raw::speculate(ticket) }),
    };
    type Attack<'a> = (&'a str, &'a str, Box<dyn Fn(&mut Raw, SequenceId) + 'a>);
    let attacks: Vec<Attack<'_>> = vec![
        ("an index that jumps", "ring index", Box::new(|raw, _| raw.publish(1000))),
        ("an index near the wrap", "ring index", Box::new(|raw, _| raw.publish(u32::MAX))),
        ("garbage", "reserved fields", Box::new(|raw, _| raw.push_raw(&[0xff; 64], &[]))),
        (
            "an unknown operation",
            "not known",
            Box::new(|raw, _| {
                let mut bytes = [0; 64];
                (bytes[0], bytes[4]) = (200, 1);
                raw.push_raw(&bytes, &[]);
            }),
        ),
        (
            "rows beyond its room",
            "cannot be appended",
            Box::new(|raw, id| {
                let (request, entry) = append(id, 0, 1 << 20);
                raw.push(&request, &[entry]);
            }),
        ),
        (
            "rows that overflow",
            "cannot be appended",
            Box::new(|raw, id| {
                let (request, entry) = append(id, 0, u32::MAX);
                raw.push(&request, &[entry]);
            }),
        ),
        (
            "rows out of order",
            "cannot be appended",
            Box::new(|raw, id| {
                let (request, entry) = append(id, 5, 1);
                raw.push(&request, &[entry]);
            }),
        ),
        (
            "somebody else's sequence",
            "not open",
            Box::new(|raw, _| {
                let (request, entry) = append(SequenceId { slot: 900, generation: 7 }, 0, 1);
                raw.push(&request, &[entry]);
            }),
        ),
        ("a batch larger than allowed", "members", Box::new(|raw, _| raw.push(&speculate(1, 5000, 1), &[]))),
        (
            "a ticket out of order",
            "ticket",
            Box::new(|raw, id| {
                let (_, entry) = append(id, 0, 0);
                raw.push(&speculate(9, 1, 1), &[entry]);
            }),
        ),
        (
            "a layer that there is not",
            "layer",
            Box::new(|raw, id| {
                let (_, entry) = append(id, 0, 0);
                raw.push(&speculate(1, 1, 999), &[entry]);
            }),
        ),
        (
            "releasing what was never asked",
            "ticket",
            Box::new(|raw, _| {
                raw.push(&Request { release_through: 50, operation: Operation::Release }, &[]);
            }),
        ),
        (
            "a malformed control message",
            "malformed",
            Box::new(|raw, _| {
                let mut bytes = encode(&ToDaemon::Mapped);
                bytes.extend([0xff; 100]);
                raw.say(&bytes);
            }),
        ),
        (
            "registering twice",
            "once",
            Box::new(|raw, _| {
                raw.say(&encode(&ToDaemon::Register(fake::spec(&["full"]))));
            }),
        ),
    ];
    for (name, reason, attack) in attacks {
        let mut raw = Raw::connect(&daemon.socket(), fake::spec(&["full"]));
        let id = raw.open(100);
        attack(&mut raw, id);
        match raw.hear() {
            Ok(ToClient::Failed(Failure::Protocol(said))) => {
                assert!(said.contains(reason), "{name}: {said}");
            }
            other => panic!("{name}: {other:?}"),
        }
        assert!(raw.hear().is_err(), "{name}: the session goes on");
        fake::check(&fake::ask(&neighbour, &sequence, 1), 0, 9, 1).unwrap();
        daemon.wait_for("one session", |status| status.totals.sessions == 1);
    }
}

#[test]
fn a_clients_ring_memory_can_be_neither_truncated_nor_mapped_anew_at_any_time() {
    let daemon = Daemon::start(DAEMON, &["--max-sessions", "2"]);
    let raw = Raw::connect(&daemon.socket(), fake::spec(&["full"]));
    assert!(nix::unistd::ftruncate(raw.c2d_file.as_fd(), 0).is_err());
    assert!(raw.c2d_file.map(false).is_err());
    // Nor between the welcome and the seal; and who is half way in has a place already.
    let socket = Raw::socket(&daemon.socket());
    let hello = || {
        encode(&ToDaemon::Hello {
            features: u64::MAX,
            name: "raw".into(),
            limits: Limits::default(),
            minor: 0,
        })
    };
    kvoyant_protocol::packet::send(socket.as_fd(), &hello(), &[]).unwrap();
    let welcome = kvoyant_protocol::packet::receive(socket.as_fd()).unwrap();
    for fd in &welcome.fds {
        assert!(nix::unistd::ftruncate(fd, 0).is_err());
    }
    let third = Raw::socket(&daemon.socket());
    kvoyant_protocol::packet::send(third.as_fd(), &hello(), &[]).unwrap();
    let answer = kvoyant_protocol::packet::receive(third.as_fd()).unwrap();
    let answer: ToClient = kvoyant_protocol::control::decode(&answer.bytes).unwrap();
    assert!(matches!(answer, ToClient::Failed(Failure::TooManySessions { max: 2 })), "{answer:?}");
}

#[test]
fn runs_never_cross_from_one_extent_into_the_next() {
    let daemon = Daemon::start(DAEMON, &["--in-place", "true"]);
    let model = fake::connect(&daemon, &["full"]);
    // Over 64 MiB of rows: 1,536 bytes a token.
    let sequence = model.open(0, 60_000).unwrap();
    fake::fill(&model, &sequence, 1, 60_000).unwrap();
    for layer in 1..fake::LAYERS {
        let ready = fake::ask(&model, &sequence, layer);
        let rows = fake::check(&ready, 0, 1, layer).unwrap();
        assert_eq!(rows, (60_001 - fake::SINKS - fake::WINDOW) * fake::KV_HEADS);
        for head in 0..fake::KV_HEADS {
            let mut runs = Vec::new();
            ready.runs(0, head, &mut runs).unwrap();
            assert_eq!(runs.iter().map(|run| run.rows).sum::<usize>(), ready.rows(0, head));
        }
    }
}

#[test]
fn a_method_with_a_pool_neither_takes_over_a_sequence_nor_hands_one_on() {
    let daemon = Daemon::start(DAEMON, &[]);
    let model = fake::connect(&daemon, &["full", "infinigen:budget=10%,skew=off,pool=30%"]);
    let plain = model.open(0, 300).unwrap();
    fake::fill(&model, &plain, 1, 300).unwrap();
    for (parent, method) in [(&plain, 1), (&model.open(1, 0).unwrap(), 0)] {
        let error = parent.fork(Some(method)).unwrap_err();
        assert!(error.to_string().contains("a method with a pool drops rows"), "{error}");
    }
    fake::check(&fake::ask(&model, &plain, 1), 0, 1, 1).unwrap();
    assert_eq!(fake::ask(&model, &plain, 1).rows(0, 0), 301 - fake::SINKS - fake::WINDOW);
}

#[test]
fn requests_that_would_take_a_lane_or_memory_for_themselves_are_refused() {
    let daemon = Daemon::start(DAEMON, &["--arena", "256MiB"]);
    let mut raw = Raw::connect(&daemon.socket(), fake::spec(&["full"]));
    let id = raw.open(100);
    for (message, expected) in [
        (ToDaemon::Reserve { sequences: vec![(id, 200), (id, 300)] }, "each once"),
        (ToDaemon::Open { method: 0, tokens: 1 << 27, by: SelectedBy::Lane }, "are more than"),
        (ToDaemon::Open { method: 0, tokens: 1 << 26, by: SelectedBy::Lane }, "the arena is full"),
        (ToDaemon::Open { method: 9, tokens: 1, by: SelectedBy::Lane }, "method 9"),
        (
            ToDaemon::Fork {
                parent: SequenceId { slot: 77, generation: 0 },
                method: None,
                by: SelectedBy::Lane,
            },
            "is not open",
        ),
    ] {
        let Ok(ToClient::Failed(failure)) = raw.call(&message) else { panic!("{message:?} was done") };
        assert!(failure.to_string().contains(expected), "{failure}");
    }
    let refusal = |spec| {
        let client = Client::connect(&daemon.socket(), Options::default()).unwrap();
        client.register(spec, &[]).unwrap_err().to_string()
    };
    let spec = fake::spec(&["full"]);
    let wide = kvoyant_client::ModelSpec { layers: 1024, query_heads: 1024, kv_heads: 1024, ..spec.clone() };
    assert!(refusal(wide).contains("KV heads in all layers"));
    let many = kvoyant_client::ModelSpec { methods: vec!["full".into(); 65], ..spec.clone() };
    assert!(refusal(many).contains("65 methods"));
    let sliding = kvoyant_client::ModelSpec { sliding_layers: vec![3], ..spec };
    assert!(refusal(sliding).contains("sliding layer 3"));
    // Forks are free of pages, but not of tables: they end in a typed answer, and closing them helps.
    let limits = Limits { sequences_max: 1 << 16, ..Limits::default() };
    let client = Client::connect(&daemon.socket(), Options { limits, ..Options::default() }).unwrap();
    let model = client.register(fake::spec(&["full"]), &[]).unwrap();
    let base = model.open(0, 80_000).unwrap();
    let mut forks = Vec::new();
    let error = loop {
        match base.fork(None) {
            Ok(fork) => forks.push(fork),
            Err(error) => break error,
        }
    };
    assert!(
        matches!(error, Error::Failed(Failure::TablesFull { .. })),
        "{error} after {} forks",
        forks.len()
    );
    model.close(forks).unwrap();
    drop(base.fork(None).unwrap());
}

#[test]
fn a_request_with_a_doorbell_waits_for_it() {
    let daemon = Daemon::start(DAEMON, &[]);
    let mut raw = Raw::connect(&daemon.socket(), fake::spec(&["window"]));
    let id = raw.open(100);
    let speculate = |ticket, doorbell| Request {
        release_through: 0,
        operation: Operation::Speculate(Speculate { doorbell, ..raw::speculate(ticket) }),
    };
    let entry = BatchEntry { sequence: id, position: 0, value: 0 };
    raw.push(&speculate(1, false), &[entry]);
    raw.wait_for_ticket(1);
    let slot = raw.layout.doorbell(raw.tail);
    raw.push(&speculate(2, true), &[entry]);
    raw.push(&speculate(3, false), &[entry]);
    std::thread::sleep(Duration::from_millis(50));
    assert_eq!(raw.timeline(), 1, "nothing is answered before the doorbell rings, and nothing out of order");
    raw.c2d.store_u32(slot, 2);
    raw.wait_for_ticket(3);
}
