//! What comes before there is a session.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use kvoyant_protocol::control::{SelectedBy, ToClient, ToDaemon, decode, encode, features};
use kvoyant_protocol::layout::{Layout, Limits};
use kvoyant_protocol::packet;
use kvoyant_protocol::wire::SequenceId;
use kvoyant_tests::fake;
use kvoyant_tests::raw::Raw;
use nix::sys::socket::{ControlMessage, MsgFlags, UnixAddr, sendmsg};

use crate::stage::{Stage, ended_socket, goes_on, with_body};
use crate::{Attack, Outcome, Verdict};

pub(super) fn table() -> Vec<Attack> {
    vec![
        Attack::rejected("hello-other-version", "speaks version 77 of the protocol", |stage| {
            let mut hello = hello(Limits::default());
            hello[8] = 77;
            stage.first_words(&hello, "version 77")
        }),
        Attack::rejected("hello-other-magic", "begins with another magic number", |stage| {
            let mut hello = hello(Limits::default());
            hello[0] ^= 1;
            stage.first_words(&hello, "does not speak Kvoyant's protocol")
        }),
        Attack::rejected("hello-http", "speaks HTTP to the control socket", |stage| {
            stage.first_words(b"GET / HTTP/1.1\r\nHost: kvoyant\r\n\r\n", "does not speak Kvoyant's protocol")
        }),
        Attack::rejected("hello-half-a-header", "sends the first 11 bytes of a message", |stage| {
            stage.first_words(&hello(Limits::default())[..11], "does not speak Kvoyant's protocol")
        }),
        Attack::rejected("hello-no-body", "sends magic and version and nothing else", |stage| {
            stage.first_words(&with_body(&[]), "malformed")
        }),
        Attack::rejected("hello-length-2-63", "says that its name has 2^63 bytes", |stage| {
            let mut body = vec![0, 7];
            body.extend([0x80; 9]);
            body.push(1);
            stage.first_words(&with_body(&body), "malformed")
        }),
        Attack::rejected("hello-trailing-bytes", "puts a page of zeros behind its hello", |stage| {
            let mut hello = hello(Limits::default());
            hello.extend([0; 4096]);
            stage.first_words(&hello, "malformed")
        }),
        Attack::rejected("hello-unknown-message", "sends a message of a kind that there is not", |stage| {
            stage.first_words(&with_body(&[0xee, 1, 2, 3]), "malformed")
        }),
        Attack::rejected("hello-too-large", "sends a packet larger than any message", |stage| {
            let socket = Raw::socket(&stage.socket);
            let bytes = vec![0; packet::MESSAGE_BYTES_MAX + 1];
            send_raw(socket.as_raw_fd(), &bytes, &[]);
            ended_socket(&socket, "larger than")
        }),
        Attack::passes("hello-empty", "sends an empty packet, which reads as an end", |stage| {
            let socket = Raw::socket(&stage.socket);
            send_raw(socket.as_raw_fd(), &[], &[]);
            match packet::receive(socket.as_fd()) {
                Ok(packet) if packet.bytes.is_empty() => Outcome::pass("the connection was closed"),
                other => Outcome::fail(format!("{other:?} came")),
            }
        }),
        Attack::rejected("hello-not-first", "begins with every other message that there is", |stage| {
            let others = [
                ToDaemon::Mapped,
                ToDaemon::Register(fake::spec(&["full"])),
                ToDaemon::Open { method: 0, tokens: 1, by: SelectedBy::Lane },
                ToDaemon::Close { sequences: Vec::new() },
                ToDaemon::Goodbye,
                ToDaemon::Keep,
            ];
            all(others.iter().map(|message| stage.first_words(&encode(message), "must be a hello")))
        }),
        Attack::rejected(
            "hello-limits",
            "asks for limits of 0, of no power of two, and of 2^32 − 1",
            |stage| {
                let good = Limits::default();
                let bad = [
                    Limits { ring_slots: 0, ..good },
                    Limits { ring_slots: 3, ..good },
                    Limits { ring_slots: u32::MAX, ..good },
                    Limits { batch_max: 0, ..good },
                    Limits { batch_max: u32::MAX, ..good },
                    Limits { hint_bytes: 0, ..good },
                    Limits { hint_bytes: u32::MAX, ..good },
                    Limits { table_bytes: 1, ..good },
                    Limits { table_bytes: u32::MAX, ..good },
                    Limits { sequences_max: 0, ..good },
                    Limits { sequences_max: u32::MAX, ..good },
                    Limits { ring_slots: 256, hint_bytes: 1 << 28, ..good },
                ];
                all(bad.iter().map(|limits| stage.first_words(&hello(*limits), "is outside")))
            },
        ),
        Attack::rejected("hello-no-abilities", "can read no answer of any kind", |stage| {
            let hello =
                ToDaemon::Hello { features: 0, name: "raw".into(), limits: Limits::default(), minor: 0 };
            stage.first_words(&encode(&hello), "cannot read answers")
        }),
        Attack::passes("hello-all-abilities", "claims every ability that 64 bits can name", |stage| {
            let mut raw = Raw::greet(&stage.socket, u64::MAX);
            registered(&mut raw)
        }),
        Attack::passes("hello-rude-name", "has a name of 60 KiB with escapes, newlines and zeros", |stage| {
            let name = "\x1b[2J\n\0\u{202e}evil".repeat(3500);
            let hello =
                ToDaemon::Hello { features: features::COMMON, name, limits: Limits::default(), minor: 0 };
            let socket = Raw::socket(&stage.socket);
            packet::send(socket.as_fd(), &encode(&hello), &[]).expect("a hello");
            let welcome = packet::receive(socket.as_fd()).expect("a welcome");
            packet::send(socket.as_fd(), &encode(&ToDaemon::Mapped), &[]).expect("a message");
            packet::receive(socket.as_fd()).expect("a seal");
            let status = kvoyant_daemon::admin::fetch_status(&stage.admin).expect("a status");
            let shown = status.sessions.iter().any(|s| {
                s.client.contains("evil") && s.client.len() < 512 && !s.client.contains(char::is_control)
            });
            drop(welcome);
            if shown {
                Outcome::pass("the name is shown, cut and harmless")
            } else {
                Outcome::fail(format!(
                    "names are {:?}",
                    status.sessions.iter().map(|s| &s.client).collect::<Vec<_>>()
                ))
            }
        }),
        Attack::rejected("hello-twice", "says hello instead of mapping what it was given", |stage| {
            let socket = greeted(stage);
            packet::send(socket.as_fd(), &hello(Limits::default()), &[]).expect("a packet");
            ended_socket(&socket, "must say that it has mapped")
        }),
        Attack::rejected(
            "register-before-mapped",
            "registers a model before it has mapped its memory",
            |stage| {
                let socket = greeted(stage);
                let register = ToDaemon::Register(fake::spec(&["full"]));
                packet::send(socket.as_fd(), &encode(&register), &[]).expect("a packet");
                ended_socket(&socket, "must say that it has mapped")
            },
        ),
        Attack::rejected("mapped-twice", "says twice that it has mapped its memory", |stage| {
            stage.lie("handshake is over", |raw, _| raw.say(&encode(&ToDaemon::Mapped)))
        }),
        Attack::rejected("hello-in-a-session", "says hello again in the middle of a session", |stage| {
            stage.lie("handshake is over", |raw, _| raw.say(&hello(Limits::default())))
        }),
        Attack::passes("leave-at-every-step", "goes away at each step of the protocol, 3 times", |stage| {
            for step in (0..3).flat_map(|_| 0..STEPS) {
                leave_at(stage, step, |_| {});
            }
            Outcome::pass(format!("left at {STEPS} steps"))
        }),
        Attack::passes("swapped-memfds", "takes each of its two memfds for the other one", |stage| {
            let socket = Raw::socket(&stage.socket);
            packet::send(socket.as_fd(), &hello(Limits::default()), &[]).expect("a hello");
            let welcome = packet::receive(socket.as_fd()).expect("a welcome");
            let layout = Layout::new(Limits::default()).expect("limits");
            let [_, d2c] = &*welcome.fds else { return Outcome::fail("no two memfds came") };
            let d2c = d2c.try_clone().expect("a descriptor");
            let file = kvoyant_protocol::memory::Memfd::from_peer(
                d2c,
                layout.d2c_bytes,
                kvoyant_protocol::memory::Seals::size_only(),
            );
            match file.and_then(|file| file.map(false)) {
                Err(error) => {
                    Outcome::pass(format!("what the daemon writes cannot be mapped for writing: {error}"))
                }
                Ok(_) => Outcome::fail("what the daemon writes was mapped for writing"),
            }
        }),
    ]
}

/// A hello with such limits.
pub(super) fn hello(limits: Limits) -> Vec<u8> {
    encode(&ToDaemon::Hello { features: features::COMMON, name: "raw".into(), limits, minor: 0 })
}

/// A connection that has been welcomed, and has yet to say that it has mapped its memory.
pub(super) fn greeted(stage: &Stage) -> OwnedFd {
    welcomed(stage).0
}

/// The same, and what it was given.
pub(super) fn welcomed(stage: &Stage) -> (OwnedFd, Vec<OwnedFd>) {
    let socket = Raw::socket(&stage.socket);
    packet::send(socket.as_fd(), &hello(Limits::default()), &[]).expect("a hello");
    let welcome = packet::receive(socket.as_fd()).expect("a welcome");
    (socket, welcome.fds)
}

/// Sends what the protocol's own `send` would refuse.
pub(super) fn send_raw(socket: i32, bytes: &[u8], fds: &[i32]) {
    let rights = [ControlMessage::ScmRights(fds)];
    let control = if fds.is_empty() { &rights[..0] } else { &rights[..] };
    let slices = [std::io::IoSlice::new(bytes)];
    sendmsg::<UnixAddr>(socket, &slices, control, MsgFlags::MSG_NOSIGNAL, None).expect("a packet");
}

fn registered(raw: &mut Raw) -> Outcome {
    let answer = raw.register(fake::spec(&["full"]), &[]).expect("an answer");
    match decode::<ToClient>(&answer.bytes) {
        Ok(ToClient::Registered { .. }) => {
            goes_on(raw).map_or_else(Outcome::fail, |()| Outcome::pass("the session is like any other"))
        }
        other => Outcome::fail(format!("{other:?} came")),
    }
}

/// The last of outcomes that are all refusals; else the first that is none.
pub(super) fn all(outcomes: impl Iterator<Item = Outcome>) -> Outcome {
    let mut last = Outcome::fail("nothing was tried");
    for outcome in outcomes {
        let rejected = outcome.verdict == Verdict::Reject;
        last = outcome;
        if !rejected {
            break;
        }
    }
    last
}

/// Steps after which [`leave_at`] can go away.
pub(super) const STEPS: usize = 9;

/// Goes through the protocol and away after so many steps: connected, greeted, welcomed, mapped, sealed, registered, open,
/// appended, asked. What is done last, while the connection is still there, is the caller's.
pub(super) fn leave_at(stage: &Stage, step: usize, last: impl FnOnce(BorrowedFd<'_>)) {
    if step < 4 {
        let socket = Raw::socket(&stage.socket);
        if step > 0 {
            packet::send(socket.as_fd(), &hello(Limits::default()), &[]).expect("a hello");
        }
        if step > 1 {
            packet::receive(socket.as_fd()).expect("a welcome");
        }
        if step > 2 {
            packet::send(socket.as_fd(), &encode(&ToDaemon::Mapped), &[]).expect("a message");
        }
        return last(socket.as_fd());
    }
    let mut raw = Raw::greet(&stage.socket, features::COMMON);
    if step > 4 {
        raw.register(fake::spec(&["random:budget=50%"]), &[]).expect("an answer");
    }
    let sequence =
        if step > 5 { raw.open(crate::stage::ROOM) } else { SequenceId { slot: 0, generation: 0 } };
    if step > 6 {
        raw.push(&crate::stage::append(), &[crate::stage::entry(sequence, 0, 90)]);
    }
    if step > 7 {
        let ask = kvoyant_protocol::wire::Operation::Speculate(crate::stage::speculate(1));
        raw.push(&crate::stage::request(ask), &[crate::stage::entry(sequence, 89, 0)]);
    }
    last(raw.as_fd());
}
