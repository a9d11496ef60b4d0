//! Memory that both sides have: memfds cut short, holes, words that change under the reader's eyes.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};

use kvoyant_kernels::SplitMix64;
use kvoyant_protocol::control::{Failure, ToClient, decode, features};
use kvoyant_protocol::memory::{Memfd, Seals};
use kvoyant_protocol::packet;
use kvoyant_protocol::wire::Operation;
use kvoyant_tests::fake;
use kvoyant_tests::raw::Raw;

use super::handshake::welcomed;
use crate::stage::{Stage, append, ended, entry, goes_on, request, speculate};
use crate::{Attack, Outcome, Verdict};

pub(super) fn table() -> Vec<Attack> {
    vec![
        Attack::passes(
            "memfd-truncated",
            "cuts its rings' memory short, before and after they are mapped",
            |stage| {
                let (_socket, fds) = welcomed(stage);
                let (mut raw, _) = stage.session();
                let files = fds.iter().map(AsFd::as_fd).chain([raw.c2d_file.as_fd()]);
                for file in files {
                    for bytes in [0, 4096, 1 << 30] {
                        if nix::unistd::ftruncate(file, bytes).is_ok() {
                            return Outcome::fail(format!("it was resized to {bytes} bytes"));
                        }
                    }
                }
                goes_on(&mut raw).map_or_else(Outcome::fail, |()| Outcome::pass("the seals hold"))
            },
        ),
        Attack::passes("memfd-holes", "punches holes into its rings and its extents", |stage| {
            let (mut raw, id) = stage.session();
            let punched = punch(raw.c2d_file.as_fd(), raw.layout.c2d_bytes);
            // Before the handshake has ended, holes can be punched: what is read there is zeros.
            let (_socket, fds) = welcomed(stage);
            let early = punch(fds[0].as_fd(), 1 << 16);
            raw.push(&append(), &[entry(id, 0, 1)]);
            match goes_on(&mut raw) {
                Ok(()) if !punched => Outcome::pass(format!("the seals hold (before the seal: {early})")),
                Ok(()) => Outcome::fail("the rings have a hole"),
                Err(how) => Outcome::fail(how),
            }
        }),
        Attack::passes(
            "extent-holes",
            "punches holes into an extent that has its rows, and asks for them",
            |stage| {
                let (mut raw, id, extents) = with_extents(stage);
                raw.push(&append(), &[entry(id, 0, 90)]);
                for extent in &extents {
                    punch(extent.as_fd(), kvoyant_protocol::EXTENT_BYTES);
                }
                raw.push(&request(Operation::Speculate(speculate(1))), &[entry(id, 89, 0)]);
                raw.wait_for_ticket(1);
                goes_on(&mut raw)
                    .map_or_else(Outcome::fail, |()| Outcome::pass("it got zeros for its own rows"))
            },
        ),
        Attack::passes(
            "extent-truncated",
            "cuts an extent short that has its rows, and asks for them",
            |stage| {
                let (mut raw, id, extents) = with_extents(stage);
                raw.push(&append(), &[entry(id, 0, 90)]);
                if extents.iter().any(|extent| nix::unistd::ftruncate(extent, 0).is_ok()) {
                    return Outcome::fail("an extent was cut short");
                }
                raw.push(&request(Operation::Speculate(speculate(1))), &[entry(id, 89, 0)]);
                raw.wait_for_ticket(1);
                goes_on(&mut raw).map_or_else(Outcome::fail, |()| Outcome::pass("the seals hold"))
            },
        ),
        Attack::passes(
            "descriptors-change-after-they-are-sent",
            "writes over requests, batch tables and hints while they are read",
            changes,
        ),
        Attack::passes(
            "all-words-change",
            "writes noise over all of its memory while its lane reads it",
            noise_everywhere,
        ),
        Attack::rejected(
            "artifact-not-sealed",
            "registers an artifact that it can still cut short",
            |stage| artifact(stage, 4096, |_| file(4096, None), "seal"),
        ),
        Attack::rejected(
            "artifact-shorter-than-said",
            "registers an artifact that is shorter than it says",
            |stage| artifact(stage, 8192, |_| file(4096, Some(Seals::fixed_size())), "bytes"),
        ),
        Attack::rejected(
            "artifact-a-terabyte",
            "registers an artifact of a terabyte, all of it a hole",
            |stage| artifact(stage, 1 << 40, |_| file(1 << 40, Some(Seals::fixed_size())), "outside"),
        ),
        Attack::rejected(
            "artifact-a-pipe",
            "registers a pipe, a socket, a folder and a device for an artifact",
            |stage| {
                let others: [fn(()) -> OwnedFd; 4] = [
                    |()| nix::unistd::pipe().expect("a pipe").0,
                    |()| std::os::unix::net::UnixStream::pair().expect("sockets").0.into(),
                    |()| std::fs::File::open("/").expect("a folder").into(),
                    |()| std::fs::File::open("/dev/zero").expect("a device").into(),
                ];
                let mut last = Outcome::fail("nothing was tried");
                for other in others {
                    last = artifact(stage, 4096, other, "");
                    if last.verdict != Verdict::Reject {
                        break;
                    }
                }
                last
            },
        ),
        Attack::rejected("artifact-garbage", "registers a page of noise for an artifact", |stage| {
            artifact(stage, 4096, |_| file(4096, Some(Seals::fixed_size())), "")
        }),
        Attack::rejected(
            "artifact-missing",
            "says that an artifact comes beside its registration, and sends none",
            |stage| {
                let mut raw = Raw::greet(&stage.socket, features::COMMON);
                let spec = kvoyant_client::ModelSpec { artifacts: vec![4096], ..fake::spec(&["full"]) };
                raw.say(&kvoyant_protocol::control::encode(&kvoyant_protocol::control::ToDaemon::Register(
                    spec,
                )));
                ended(&mut raw, "0 memfds came")
            },
        ),
    ]
}

/// Punches a hole over so many bytes, as `fallocate` does; whether that was done.
fn punch(file: std::os::fd::BorrowedFd<'_>, bytes: usize) -> bool {
    use nix::fcntl::{FallocateFlags, fallocate};
    let flags = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
    fallocate(file, flags, 0, bytes as i64).is_ok()
}

/// A session with one sequence, and the extents that it was given.
fn with_extents(stage: &Stage) -> (Raw, kvoyant_protocol::wire::SequenceId, Vec<OwnedFd>) {
    use kvoyant_protocol::control::{MemoryKind, SelectedBy, ToDaemon, encode};
    let mut raw = Raw::connect(&stage.socket, fake::spec(&["random:budget=50%"]));
    raw.say(&encode(&ToDaemon::Open { method: 0, tokens: crate::stage::ROOM, by: SelectedBy::Lane }));
    let mut extents = Vec::new();
    loop {
        let packet = packet::receive(raw.as_fd()).expect("an answer");
        match decode(&packet.bytes).expect("a message") {
            ToClient::Memory { kind: MemoryKind::Extents, .. } => extents.extend(packet.fds),
            ToClient::Opened { sequence, .. } => return (raw, sequence, extents),
            ToClient::Memory { .. } => {}
            other => panic!("{other:?} came"),
        }
    }
}

fn file(bytes: usize, seals: Option<Seals>) -> OwnedFd {
    let file = Memfd::create("artifact", bytes).expect("a file in memory");
    if let Some(seals) = seals {
        file.seal(seals).expect("seals");
    }
    file.try_clone().expect("a descriptor")
}

/// Registers a model whose artifact is this file; what is not refused in such words is not refused.
fn artifact(stage: &Stage, bytes: u64, file: impl FnOnce(()) -> OwnedFd, reason: &str) -> Outcome {
    use kvoyant_protocol::control::{ToDaemon, encode};
    let mut raw = Raw::greet(&stage.socket, features::COMMON);
    let spec = kvoyant_client::ModelSpec {
        artifacts: vec![bytes],
        ..fake::spec(&["attention-predictor:weights=trained"])
    };
    raw.say_with(&encode(&ToDaemon::Register(spec)), &[file(())]);
    match raw.hear() {
        Ok(ToClient::Failed(Failure::Protocol(said) | Failure::BadMethod(said))) if said.contains(reason) => {
            Outcome::reject(said)
        }
        other => Outcome::fail(format!("{other:?} came")),
    }
}

/// A good request whose bytes another thread flips all the while: the daemon reads each of them once, and what it read is either a
/// request or the end of the session.
fn changes(stage: &Stage) -> Outcome {
    let (mut served, mut ended) = (0, 0);
    for round in 0..stage.many(20, 300) {
        let (mut raw, id) = stage.session_of(&["random:budget=50%"]);
        raw.push(&append(), &[entry(id, 0, 90)]);
        let stop = AtomicBool::new(false);
        let good = request(Operation::Speculate(speculate(1))).encode();
        let at = raw.layout.descriptor(raw.tail);
        let batch = raw.layout.batch(raw.tail);
        let c2d = std::sync::Arc::clone(&raw.c2d);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                let mut random = SplitMix64::new(round as u64);
                while !stop.load(Ordering::Relaxed) {
                    let byte = random.below(64);
                    let _ = c2d.write(at + byte, &[random.bits() as u8]);
                    let _ = c2d.write(at + byte, &[good[byte]]);
                    let _ = c2d.write(batch + random.below(16), &[random.bits() as u8]);
                }
            });
            raw.push_raw(&good, &[entry(id, 89, 0)]);
            // It is answered, or the session ends: a question on the socket is answered either way.
            match goes_on(&mut raw) {
                Ok(()) => served += 1,
                Err(_) => ended += 1,
            }
            stop.store(true, Ordering::Relaxed);
        });
    }
    Outcome::pass(format!("{served} sessions were served, {ended} were ended"))
}

/// Noise over everything that the client writes, indices included.
fn noise_everywhere(stage: &Stage) -> Outcome {
    let mut ended = 0;
    for round in 0..stage.many(10, 200) {
        let (mut raw, id) = stage.session_of(&["random:budget=50%", "quest:budget=20,hint=current"]);
        raw.push(&append(), &[entry(id, 0, 90)]);
        let mut random = SplitMix64::new(round as u64);
        for _ in 0..2_000 {
            let at = random.below(raw.layout.c2d_bytes / 4) * 4;
            raw.c2d.store_u32(at, random.bits() as u32);
            raw.c2d.store_u32(random.below(1024) * 4, random.bits() as u32);
        }
        raw.publish(raw.tail);
        ended += usize::from(goes_on(&mut raw).is_err());
    }
    if ended == 0 {
        Outcome::fail("noise in the ring's own words was not noticed")
    } else {
        Outcome::pass(format!("{ended} sessions were ended"))
    }
}
