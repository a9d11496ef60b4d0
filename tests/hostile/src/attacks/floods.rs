//! Many at a time: connections, sessions, descriptors.

use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use kvoyant_protocol::control::{Failure, ToClient, ToDaemon, decode, encode, features};
use kvoyant_protocol::layout::Limits;
use kvoyant_protocol::packet;
use kvoyant_tests::fake;
use kvoyant_tests::raw::Raw;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use crate::stage::{Stage, goes_on};
use crate::{Attack, Outcome};

pub(super) fn table() -> Vec<Attack> {
    vec![
        Attack::rejected(
            "connections-that-say-nothing",
            "holds 500 connections open and says nothing on any",
            silent,
        ),
        Attack::passes(
            "connections-one-after-the-other",
            "connects and goes away, thousands of times",
            |stage| {
                for _ in 0..stage.many(500, 20_000) {
                    drop(Raw::socket(&stage.socket));
                }
                Outcome::pass("each was let go")
            },
        ),
        Attack::rejected("sessions-without-end", "opens sessions until it may not any more", |stage| {
            let mut sessions = Vec::new();
            loop {
                let socket = Raw::socket(&stage.socket);
                let hello = ToDaemon::Hello {
                    features: features::COMMON,
                    name: "many".into(),
                    limits: Limits::default(),
                    minor: 0,
                };
                packet::send(socket.as_fd(), &encode(&hello), &[]).expect("a hello");
                let packet = packet::receive(socket.as_fd()).expect("an answer");
                match decode(&packet.bytes) {
                    Ok(ToClient::Welcome { .. }) => {
                        packet::send(socket.as_fd(), &encode(&ToDaemon::Mapped), &[]).expect("a message");
                        packet::receive(socket.as_fd()).expect("a seal");
                        sessions.push((socket, packet.fds));
                    }
                    Ok(ToClient::Failed(failure @ Failure::TooManySessions { .. })) => {
                        break Outcome::reject(format!("after {}: {failure}", sessions.len()));
                    }
                    other => break Outcome::fail(format!("{other:?} came after {}", sessions.len())),
                }
                if sessions.len() > 1_000 {
                    break Outcome::fail("nothing ends it");
                }
            }
        }),
        Attack::rejected(
            "sessions-half-way",
            "stops 60 handshakes half way, with 8 MiB of rings each",
            |stage| {
                let limits = Limits { hint_bytes: 1 << 18, ..Limits::default() };
                let mut half = Vec::new();
                let mut refused = None;
                for _ in 0..60 {
                    let socket = Raw::socket(&stage.socket);
                    let hello =
                        ToDaemon::Hello { features: features::COMMON, name: "half".into(), limits, minor: 0 };
                    packet::send(socket.as_fd(), &encode(&hello), &[]).expect("a hello");
                    let packet = packet::receive(socket.as_fd()).expect("an answer");
                    if let Ok(ToClient::Failed(failure)) = decode(&packet.bytes) {
                        refused = Some(failure.to_string());
                    }
                    half.push((socket, packet.fds));
                }
                refused.map_or_else(|| Outcome::fail("all of them were let in"), Outcome::reject)
            },
        ),
        Attack::passes("messages-in-a-flood", "sends messages as fast as they are answered", |stage| {
            let (mut raw, id) = stage.session();
            for _ in 0..stage.many(2_000, 50_000) {
                let answer = raw.call(&ToDaemon::Reserve { sequences: vec![(id, 1)] });
                if !matches!(answer, Ok(ToClient::Reserved { .. })) {
                    return Outcome::fail(format!("{answer:?} came"));
                }
            }
            goes_on(&mut raw).map_or_else(Outcome::fail, |()| Outcome::pass("each was answered"))
        }),
        Attack::passes(
            "messages-without-a-pause",
            "has always a message waiting that no lane has to answer, and reads each answer at once",
            without_a_pause,
        ),
    ]
}

/// A client that sends from two threads and reads on a third, so that its socket never runs dry. Others are served all the same.
fn without_a_pause(stage: &Stage) -> Outcome {
    let bad = kvoyant_client::ModelSpec { layers: 0, ..fake::spec(&["full"]) };
    let message = encode(&ToDaemon::Register(bad));
    let raw = Raw::greet(&stage.socket, features::COMMON);
    let stop = AtomicBool::new(false);
    let answered = AtomicUsize::new(0);
    std::thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                while !stop.load(Ordering::Relaxed) {
                    if packet::send(raw.as_fd(), &message, &[]).is_err() {
                        return;
                    }
                }
            });
        }
        scope.spawn(|| {
            while let Ok(packet) = packet::receive(raw.as_fd()) {
                if packet.bytes.is_empty() {
                    return;
                }
                answered.fetch_add(1, Ordering::Relaxed);
            }
        });
        let mut longest = Duration::ZERO;
        for _ in 0..stage.many(20, 200) {
            let since = Instant::now();
            let (mut other, _) = stage.session();
            if goes_on(&mut other).is_err() {
                longest = Duration::MAX;
                break;
            }
            longest = longest.max(since.elapsed());
        }
        stop.store(true, Ordering::Relaxed);
        // Whoever still reads or sends is let go.
        let _ = nix::sys::socket::shutdown(raw.as_fd().as_raw_fd(), nix::sys::socket::Shutdown::Both);
        let answered = answered.load(Ordering::Relaxed);
        if longest > Duration::from_secs(2) {
            return Outcome::fail(format!("others waited {longest:?} beside {answered} answers"));
        }
        if answered < 1_000 {
            return Outcome::fail(format!("only {answered} messages were answered: this was no flood"));
        }
        Outcome::pass(format!("{answered} messages were answered, and others waited {longest:?} at most"))
    })
}

/// Connections that say nothing: some are kept for the handshake's time, the rest are told that they are too many. Whoever has a session
/// goes on, and can have more memory.
fn silent(stage: &Stage) -> Outcome {
    let sockets: Vec<OwnedFd> = (0..500).map(|_| Raw::socket(&stage.socket)).collect();
    let mut told = None;
    let since = std::time::Instant::now();
    while told.is_none() && since.elapsed() < std::time::Duration::from_secs(5) {
        told = sockets.iter().find_map(|socket| {
            let mut ready = [PollFd::new(socket.as_fd(), PollFlags::POLLIN)];
            if poll(&mut ready, PollTimeout::ZERO) != Ok(1) {
                return None;
            }
            match packet::receive(socket.as_fd()).map(|packet| decode(&packet.bytes)) {
                Ok(Ok(ToClient::Failed(failure @ Failure::TooManyConnections { .. }))) => {
                    Some(failure.to_string())
                }
                _ => None,
            }
        });
    }
    // Those that it has just been told of are let go one after the other.
    let held = || std::fs::read_dir(format!("/proc/{}/fd", stage.daemon)).map_or(0, Iterator::count);
    while held() >= 300 && since.elapsed() < std::time::Duration::from_secs(5) {
        std::thread::sleep(std::time::Duration::from_millis(5));
    }
    match told {
        Some(said) if held() < 300 => Outcome::reject(said),
        other => Outcome::fail(format!("the daemon has {} descriptors open, and said {other:?}", held())),
    }
}
