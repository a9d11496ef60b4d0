//! Sides of different minors of the protocol work together, by what both know.

use std::os::fd::AsFd;

use kvoyant_client::{Client, Options};
use kvoyant_protocol::control::{Failure, ToClient, ToDaemon, decode, encode, features};
use kvoyant_protocol::layout::Limits;
use kvoyant_protocol::{MINOR, VERSION, packet};
use kvoyant_tests::later::Later;
use kvoyant_tests::raw::Raw;
use kvoyant_tests::{Daemon, fake};

const DAEMON: &str = env!("CARGO_BIN_EXE_kvoyantd-under-test");

#[test]
fn a_client_works_with_a_daemon_of_its_own_minor_and_of_the_next() {
    let daemon = Daemon::start(DAEMON, &[]);
    let later = Later::before(&daemon);
    for socket in [daemon.socket(), later.socket()] {
        let client = Client::connect(&socket, Options::default()).unwrap();
        assert_eq!(client.protocol(), (VERSION, MINOR), "the smaller minor is spoken");
        let model = client.register(fake::spec(&["random:budget=50%"]), &[]).unwrap();
        let sequence = model.open(0, 300).unwrap();
        fake::fill(&model, &sequence, 4, 300).unwrap();
        fake::check(&fake::ask(&model, &sequence, 1), 0, 4, 1).unwrap();
        let fork = sequence.fork(None).unwrap();
        fork.truncate(200).unwrap();
        fake::check(&fake::ask(&model, &fork, 2), 0, 4, 2).unwrap();
        fork.close().unwrap();
        sequence.close().unwrap();
    }
}

#[test]
fn a_daemon_works_with_a_client_of_its_own_minor_of_the_first_and_of_the_next() {
    let daemon = Daemon::start(DAEMON, &[]);
    for (minor, more) in [(0, &[][..]), (MINOR, &[][..]), (MINOR + 1, &[9, 9, 9][..])] {
        let limits = Limits { ring_slots: 8, ..Limits::default() };
        // A bit that only the later client knows.
        let features = features::COMMON | if more.is_empty() { 0 } else { 1 << 63 };
        let mut hello = encode(&ToDaemon::Hello { features, name: "later".into(), limits, minor });
        hello.extend(more);
        let socket = Raw::socket(&daemon.socket());
        packet::send(socket.as_fd(), &hello, &[]).unwrap();
        let welcome = packet::receive(socket.as_fd()).unwrap();
        let ToClient::Welcome { features: common, minor: theirs, .. } = decode(&welcome.bytes).unwrap()
        else {
            panic!("{:?} came instead of a welcome", welcome.bytes)
        };
        assert_eq!(theirs, MINOR);
        assert_eq!(common & (1 << 63), 0, "a daemon offers only what it knows");
        let mut raw = Raw::welcomed(socket, welcome.fds, limits);
        let registered = raw.register(fake::spec(&["full"]), &[]).unwrap();
        assert!(matches!(decode(&registered.bytes), Ok(ToClient::Registered { .. })));
        assert_eq!(raw.open(100).slot, 0);
    }
}

#[test]
fn only_a_client_that_knows_of_generations_gets_completions_that_carry_them() {
    let daemon = Daemon::start(DAEMON, &[]);
    for (minor, expected) in [(0, 0), (1, 0), (2, features::GENERATION)] {
        let (name, limits) = ("older".into(), Limits::default());
        let features = features::COMMON | features::GENERATION;
        let hello = encode(&ToDaemon::Hello { features, name, limits, minor });
        let socket = Raw::socket(&daemon.socket());
        packet::send(socket.as_fd(), &hello, &[]).unwrap();
        let answer = packet::receive(socket.as_fd()).unwrap();
        let ToClient::Welcome { features: common, .. } = decode(&answer.bytes).unwrap() else {
            panic!("{:?} came instead of a welcome", answer.bytes)
        };
        assert_eq!(common & features::GENERATION, expected, "minor {minor}");
    }
}

#[test]
fn a_client_that_does_not_know_of_draining_hears_of_it_in_words_that_it_knows() {
    let daemon = Daemon::start(DAEMON, &[]);
    kvoyant_daemon::admin::drain(&daemon.admin(), true).unwrap();
    for (minor, expected) in [(1, Failure::Draining), (0, Failure::Internal(Failure::Draining.to_string()))] {
        let (name, limits) = ("older".into(), Limits::default());
        let hello = encode(&ToDaemon::Hello { features: features::COMMON, name, limits, minor });
        let socket = Raw::socket(&daemon.socket());
        packet::send(socket.as_fd(), &hello, &[]).unwrap();
        let answer = packet::receive(socket.as_fd()).unwrap();
        assert_eq!(decode::<ToClient>(&answer.bytes).unwrap(), ToClient::Failed(expected));
    }
}
