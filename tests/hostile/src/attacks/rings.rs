//! What lies in the rings' words: indices, doorbells, flags.

use kvoyant_protocol::layout::{c2d, d2c};
use kvoyant_protocol::wire::Operation;

use crate::stage::{Stage, append, entry, goes_on, request, speculate};
use crate::{Attack, Outcome};

pub(super) fn table() -> Vec<Attack> {
    vec![
        Attack::rejected("index-jumps", "publishes a ring index 1,000 ahead", |stage| {
            stage.lie("ring index", |raw, _| raw.publish(1000))
        }),
        Attack::rejected(
            "index-one-too-far",
            "publishes one request more than the ring has slots",
            |stage| stage.lie("ring index", |raw, _| raw.publish(raw.layout.limits.ring_slots + 1)),
        ),
        Attack::rejected("index-near-wrap", "publishes the largest index that there is", |stage| {
            stage.lie("ring index", |raw, _| raw.publish(u32::MAX))
        }),
        Attack::rejected("index-half-way-round", "publishes an index as far ahead as behind", |stage| {
            stage.lie("ring index", |raw, _| raw.publish(1 << 31))
        }),
        Attack::rejected(
            "index-runs-backwards",
            "takes a request back that the daemon has consumed",
            |stage| {
                stage.lie("ring index", |raw, sequence| {
                    raw.push(&append(), &[entry(sequence, 0, 10)]);
                    raw.push(&append(), &[entry(sequence, 10, 10)]);
                    wait_consumed(raw, 2);
                    raw.publish(1);
                })
            },
        ),
        Attack::rejected(
            "head-jumps",
            "says that it has read completions that nobody has written",
            |stage| {
                stage.lie_with(&["window"], "ring index", |raw, sequence| {
                    raw.c2d.store_u32(c2d::COMPLETION_HEAD, 500);
                    raw.push(&request(Operation::Speculate(speculate(1))), &[entry(sequence, 0, 0)]);
                })
            },
        ),
        Attack::rejected("head-runs-backwards", "says that it has not read what it had read", |stage| {
            stage.lie_with(&["window"], "ring index", |raw, sequence| {
                for ticket in 1..=2 {
                    raw.push(&request(Operation::Speculate(speculate(ticket))), &[entry(sequence, 0, 0)]);
                    raw.wait_for_ticket(ticket);
                }
                raw.c2d.store_u32(c2d::COMPLETION_HEAD, 2);
                raw.push(&request(Operation::Speculate(speculate(3))), &[entry(sequence, 0, 0)]);
                raw.wait_for_ticket(3);
                raw.c2d.store_u32(c2d::COMPLETION_HEAD, 0);
                raw.push(&request(Operation::Speculate(speculate(4))), &[entry(sequence, 0, 0)]);
            })
        }),
        Attack::rejected("ring-never-drained", "releases answers and never reads one", |stage| {
            stage.lie_with(&["window"], "completion ring is full", |raw, sequence| {
                for ticket in 1..=u64::from(raw.layout.limits.ring_slots) + 1 {
                    let mut asked = request(Operation::Speculate(speculate(ticket)));
                    asked.release_through = ticket - 1;
                    raw.push(&asked, &[entry(sequence, 0, 0)]);
                    if ticket <= u64::from(raw.layout.limits.ring_slots) {
                        raw.wait_for_ticket(ticket);
                    }
                }
            })
        }),
        Attack::rejected("tickets-never-released", "asks on and on and lets go of nothing", |stage| {
            stage.lie_with(&["window"], "cannot follow ticket", |raw, sequence| {
                for ticket in 1..=u64::from(raw.layout.limits.ring_slots) + 1 {
                    raw.push(&request(Operation::Speculate(speculate(ticket))), &[entry(sequence, 0, 0)]);
                    raw.c2d.store_u32(c2d::COMPLETION_HEAD, ticket as u32 - 1);
                    wait_consumed(raw, raw.tail.min(raw.layout.limits.ring_slots));
                }
            })
        }),
        Attack::passes(
            "sleeping-flag-lies",
            "says that it sleeps, and is awake, for every answer",
            |stage| {
                let (mut raw, sequence) = stage.session_of(&["window"]);
                for ticket in 1..=stage.many(200, 5_000) as u64 {
                    raw.c2d.store_u32(c2d::SLEEPING, u32::MAX);
                    let mut asked = request(Operation::Speculate(speculate(ticket)));
                    asked.release_through = ticket - 1;
                    raw.push(&asked, &[entry(sequence, 0, 0)]);
                    raw.wait_for_ticket(ticket);
                    raw.c2d.store_u32(c2d::COMPLETION_HEAD, ticket as u32);
                }
                goes_on(&mut raw).map_or_else(Outcome::fail, |()| Outcome::pass("it cost wake-ups"))
            },
        ),
        Attack::passes("doorbell-storm", "wakes its lane as fast as it can, with nothing to say", |stage| {
            let (mut raw, _) = stage.session();
            for _ in 0..stage.many(20_000, 1_000_000) {
                raw.publish(raw.tail);
            }
            goes_on(&mut raw).map_or_else(Outcome::fail, |()| Outcome::pass("it cost wake-ups"))
        }),
        Attack::passes("doorbell-never-rings", "asks with a doorbell, never rings it, and goes", |stage| {
            let (mut raw, sequence) = stage.session_of(&["window"]);
            let asked = kvoyant_protocol::wire::Speculate { doorbell: true, ..speculate(1) };
            raw.push(&request(Operation::Speculate(asked)), &[entry(sequence, 0, 0)]);
            std::thread::sleep(std::time::Duration::from_millis(stage.many(30, 1_000) as u64));
            if raw.timeline() == 0 {
                Outcome::pass("it waited, and nobody else")
            } else {
                Outcome::fail("it was answered without its doorbell")
            }
        }),
        Attack::passes("doorbell-rings-wrongly", "rings for every other ticket before its own", |stage| {
            let (mut raw, sequence) = stage.session_of(&["window"]);
            let slot = raw.layout.doorbell(raw.tail);
            let asked = kvoyant_protocol::wire::Speculate { doorbell: true, ..speculate(1) };
            raw.push(&request(Operation::Speculate(asked)), &[entry(sequence, 0, 0)]);
            for other in (2..500).chain([0, u32::MAX]) {
                raw.c2d.store_u32(slot, other);
            }
            std::thread::sleep(std::time::Duration::from_millis(5));
            if raw.timeline() != 0 {
                return Outcome::fail("it was answered for another ticket's doorbell");
            }
            raw.c2d.store_u32(slot, 1);
            raw.wait_for_ticket(1);
            Outcome::pass("it was answered for its own")
        }),
        Attack::passes(
            "stream-releases-everything",
            "says in the streams' word that all of 2^31 answers are read",
            |stage| {
                let (mut raw, sequence) = stage.session_of(&["window"]);
                raw.c2d.store_u32(c2d::RELEASED, i32::MAX as u32);
                raw.push(&request(Operation::Speculate(speculate(1))), &[entry(sequence, 0, 0)]);
                raw.wait_for_ticket(1);
                goes_on(&mut raw).map_or_else(Outcome::fail, |()| {
                    Outcome::pass("a session without streams has no such word")
                })
            },
        ),
        Attack::passes(
            "scribbles-on-the-daemons-words",
            "opens the daemon's memfd anew to write to it",
            scribble,
        ),
    ]
}

/// Waits until the daemon has consumed so many requests.
pub(super) fn wait_consumed(raw: &kvoyant_tests::raw::Raw, requests: u32) {
    let since = std::time::Instant::now();
    while raw.d2c.load_u32(d2c::REQUEST_HEAD) < requests {
        assert!(since.elapsed() < kvoyant_tests::PATIENCE, "request {requests} was never consumed");
        std::thread::yield_now();
    }
}

/// Whoever has a descriptor of a file in memory can open it anew for writing, whatever its own mode; the seals hold.
fn scribble(stage: &Stage) -> Outcome {
    use std::os::fd::AsRawFd;
    use std::os::unix::fs::FileExt;
    let (_socket, fds) = super::handshake::welcomed(stage);
    let [_, d2c] = &*fds else { return Outcome::fail("no two memfds came") };
    let path = format!("/proc/self/fd/{}", d2c.as_raw_fd());
    let file = std::fs::OpenOptions::new().read(true).write(true).open(path).expect("the file, anew");
    match file.write_at(&[0xff; 64], d2c::TIMELINE as u64) {
        Err(error) => Outcome::pass(format!("the seals hold: {error}")),
        Ok(_) => Outcome::fail("the daemon's words were written over"),
    }
}
