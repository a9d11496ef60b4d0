//! Control messages that cannot be, or that are too much.

use kvoyant_protocol::control::{SelectedBy, ToClient, ToDaemon, encode, features};
use kvoyant_protocol::wire::SequenceId;
use kvoyant_tests::fake;
use kvoyant_tests::raw::Raw;

use crate::stage::{Stage, append, ended, entry, goes_on, refused, with_body};
use crate::{Attack, Outcome, Setup, Verdict};

const BY: SelectedBy = SelectedBy::Lane;

const NOBODY: SequenceId = SequenceId { slot: 77, generation: 3 };

pub(super) fn table() -> Vec<Attack> {
    [sessions(), sequences(), kept()].concat()
}

fn sessions() -> Vec<Attack> {
    vec![
        Attack::rejected("message-malformed", "sends a control message of noise", |stage| {
            stage.lie("malformed", |raw, _| raw.say(&with_body(&[0xff; 100])))
        }),
        Attack::rejected(
            "message-of-60-kib-of-handles",
            "closes 7,000 sequences that are not open",
            |stage| {
                let sequences = vec![SequenceId { slot: 5, generation: 5 }; 7_000];
                stage.ask(&[(ToDaemon::Close { sequences }, "is not open")])
            },
        ),
        Attack::rejected("register-twice", "registers a second model", |stage| {
            stage.lie("once", |raw, _| raw.say(&encode(&ToDaemon::Register(fake::spec(&["full"])))))
        }),
        Attack::rejected("goodbye-and-more", "says goodbye and goes on asking", |stage| {
            stage.lie("after the goodbye", |raw, _| {
                raw.say(&encode(&ToDaemon::Goodbye));
                raw.say(&encode(&ToDaemon::Open { method: 0, tokens: 1, by: BY }));
            })
        }),
        Attack::rejected(
            "open-before-a-model",
            "opens a sequence before it has registered a model",
            |stage| {
                let mut raw = Raw::greet(&stage.socket, features::COMMON);
                refused(raw.call(&ToDaemon::Open { method: 0, tokens: 1, by: BY }), "registered first")
            },
        ),
        Attack::rejected(
            "models-that-cannot-be",
            "registers models of no layers, 2^32 heads, no such dtype and 65 methods",
            |stage| {
                let good = fake::spec(&["full"]);
                let bad = [
                    kvoyant_client::ModelSpec { layers: 0, ..good.clone() },
                    kvoyant_client::ModelSpec { layers: u32::MAX, ..good.clone() },
                    kvoyant_client::ModelSpec { kv_heads: 0, ..good.clone() },
                    kvoyant_client::ModelSpec { kv_heads: u32::MAX, query_heads: u32::MAX, ..good.clone() },
                    kvoyant_client::ModelSpec { head_dim: 0, ..good.clone() },
                    kvoyant_client::ModelSpec { head_dim: u32::MAX, ..good.clone() },
                    kvoyant_client::ModelSpec { query_heads: 3, ..good.clone() },
                    kvoyant_client::ModelSpec { dtype: 250, ..good.clone() },
                    kvoyant_client::ModelSpec { page_rows: u32::MAX, ..good.clone() },
                    kvoyant_client::ModelSpec { latent_values: u32::MAX, ..good.clone() },
                    kvoyant_client::ModelSpec { window: 0, ..good.clone() },
                    kvoyant_client::ModelSpec { dense_layers: u32::MAX, ..good.clone() },
                    kvoyant_client::ModelSpec { sliding_layers: vec![u32::MAX], ..good.clone() },
                    kvoyant_client::ModelSpec { fingerprint: "no hex".into(), ..good.clone() },
                    kvoyant_client::ModelSpec { methods: Vec::new(), ..good.clone() },
                    kvoyant_client::ModelSpec { methods: vec!["full".into(); 65], ..good.clone() },
                    kvoyant_client::ModelSpec { methods: vec!["(".repeat(9_000)], ..good.clone() },
                    kvoyant_client::ModelSpec { methods: vec!["quest:budget=1e400%".into()], ..good.clone() },
                    kvoyant_client::ModelSpec { methods: vec!["quest:budget=-5".into()], ..good },
                ];
                let mut raw = Raw::greet(&stage.socket, features::COMMON);
                let mut said = String::new();
                for spec in bad {
                    let shown = format!("{spec:?}");
                    match raw.call(&ToDaemon::Register(spec)) {
                        Ok(ToClient::Failed(failure)) => said = failure.to_string(),
                        other => {
                            return Outcome::fail(format!(
                                "{other:?} came for {}",
                                &shown[..400.min(shown.len())]
                            ));
                        }
                    }
                }
                match raw.call(&ToDaemon::Register(fake::spec(&["full"]))) {
                    Ok(ToClient::Registered { .. }) => Outcome::reject(said),
                    other => Outcome::fail(format!("{other:?} came for a good model")),
                }
            },
        ),
        Attack::passes(
            "messages-never-answered-for",
            "sends messages until no more fit, reads nothing, and goes",
            |stage| {
                let (raw, _) = stage.session();
                let open = encode(&ToDaemon::Open { method: 0, tokens: 1, by: BY });
                let sent = fill(&raw, &open);
                Outcome::pass(format!("{sent} messages went"))
            },
        ),
        Attack::rejected("lies-and-reads-nothing", "reads no answer, lies in its ring, and stays", |stage| {
            let (mut raw, _) = stage.session();
            fill(&raw, &encode(&ToDaemon::Open { method: 0, tokens: 1, by: BY }));
            raw.publish(1 << 30);
            // Its memory goes back although it does not read.
            let since = std::time::Instant::now();
            loop {
                let status = kvoyant_daemon::admin::fetch_status(&stage.admin).expect("a status");
                if status.totals.sessions == 1 {
                    break Outcome::reject("its session was ended while it slept");
                }
                if since.elapsed() > std::time::Duration::from_secs(5) {
                    break Outcome::fail("its session is still held");
                }
                std::thread::sleep(std::time::Duration::from_millis(2));
            }
        }),
    ]
}

fn sequences() -> Vec<Attack> {
    vec![
        Attack::rejected(
            "sequence-larger-than-the-arena",
            "opens sequences of 2^26 and 2^32 − 1 tokens",
            |stage| {
                stage.ask(&[
                    (ToDaemon::Open { method: 0, tokens: 1 << 26, by: BY }, "the arena is full"),
                    (ToDaemon::Open { method: 0, tokens: u32::MAX, by: BY }, "are more than"),
                ])
            },
        ),
        Attack::rejected(
            "method-65535",
            "opens a sequence with a method that it has not registered",
            |stage| stage.ask(&[(ToDaemon::Open { method: u16::MAX, tokens: 1, by: BY }, "method 65535")]),
        ),
        Attack::rejected(
            "handles-of-nobody",
            "forks, reserves, cuts, serves and closes what is not open",
            |stage| {
                stage.ask(&[
                    (ToDaemon::Fork { parent: NOBODY, method: None, by: BY }, "is not open"),
                    (ToDaemon::Reserve { sequences: vec![(NOBODY, 1)] }, "is not open"),
                    (ToDaemon::Truncate { sequence: NOBODY, tokens: 0 }, "is not open"),
                    (ToDaemon::Close { sequences: vec![NOBODY] }, "is not open"),
                    (ToDaemon::Graph { sequence: NOBODY, slot: 0 }, ""),
                ])
            },
        ),
        Attack::rejected(
            "reserve-twice-at-once",
            "makes room for one sequence twice in a message",
            |stage| {
                let (mut raw, id) = stage.session();
                let answer = raw.call(&ToDaemon::Reserve { sequences: vec![(id, 200), (id, 300)] });
                refused(answer, "each once")
            },
        ),
        Attack::rejected(
            "close-twice-at-once",
            "closes a sequence twice in a message, and then again",
            |stage| {
                let (mut raw, id) = stage.session();
                let twice = refused(raw.call(&ToDaemon::Close { sequences: vec![id, id] }), "is not open");
                let again = refused(raw.call(&ToDaemon::Close { sequences: vec![id] }), "is not open");
                if twice.verdict == Verdict::Reject { again } else { twice }
            },
        ),
        Attack::rejected("truncate-to-more", "cuts a sequence to more tokens than it has", |stage| {
            let (mut raw, id) = stage.session();
            raw.push(&append(), &[entry(id, 0, 10)]);
            match raw.call(&ToDaemon::Truncate { sequence: id, tokens: u32::MAX }) {
                Ok(ToClient::Failed(failure)) => Outcome::reject(failure.to_string()),
                Ok(ToClient::Done) => {
                    // Nothing was there to cut; what was not there must not be now.
                    raw.push(&append(), &[entry(id, 11, 1)]);
                    ended(&mut raw, "cannot be appended")
                }
                other => Outcome::fail(format!("{other:?} came")),
            }
        }),
        Attack::rejected("sequences-without-end", "opens sequences until it may not any more", |stage| {
            let limits = kvoyant_protocol::layout::Limits {
                sequences_max: stage.many(2_000, 1 << 16) as u32,
                ..Default::default()
            };
            opened(stage, limits, |_, _| ToDaemon::Open { method: 0, tokens: 0, by: BY })
        }),
        Attack::rejected("forks-without-end", "forks a long sequence until it may not any more", |stage| {
            let limits = kvoyant_protocol::layout::Limits {
                sequences_max: stage.many(2_000, 1 << 16) as u32,
                ..Default::default()
            };
            opened(stage, limits, |first, _| ToDaemon::Fork { parent: first, method: None, by: BY })
        }),
        Attack::rejected("forks-of-forks", "forks each fork, to any depth", |stage| {
            let limits = kvoyant_protocol::layout::Limits {
                sequences_max: stage.many(1_000, 1 << 14) as u32,
                ..Default::default()
            };
            opened(stage, limits, |_, last| ToDaemon::Fork { parent: last, method: None, by: BY })
        }),
        Attack::passes(
            "sequences-10-5",
            "opens and closes 100,000 sequences, one after the other",
            |stage| {
                let (mut raw, _) = stage.session();
                for _ in 0..stage.many(1_000, 100_000) {
                    let id = raw.open(1);
                    if !matches!(raw.call(&ToDaemon::Close { sequences: vec![id] }), Ok(ToClient::Done)) {
                        return Outcome::fail("a sequence could not be closed");
                    }
                }
                Outcome::pass("each was opened and closed")
            },
        ),
        Attack::rejected("graph-on-the-host", "wants graph mode where there is no GPU", |stage| {
            let (mut raw, id) = stage.session();
            refused(raw.call(&ToDaemon::Graph { sequence: id, slot: u32::MAX }), "graph mode")
        }),
    ]
}

fn kept() -> Vec<Attack> {
    vec![
        Attack::rejected(
            "image-names",
            "suspends to paths, dots, nothing, 4,000 letters and zeros",
            |stage| {
                let (mut raw, id) = stage.session();
                let mut last = Outcome::fail("nothing was tried");
                for name in [
                    "../../etc/passwd",
                    "/etc/passwd",
                    "",
                    ".",
                    "..",
                    ".hidden",
                    "a/b",
                    "a\0b",
                    "\u{202e}x",
                    &"n".repeat(4_000),
                ] {
                    let suspend = ToDaemon::Suspend {
                        sequence: id,
                        image: name.into(),
                        overwrite: true,
                        label: String::new(),
                    };
                    last = refused(raw.call(&suspend), "image");
                    if last.verdict != Verdict::Reject {
                        return Outcome::fail(format!("{name:?}: {}", last.said));
                    }
                    let resume = ToDaemon::Resume { image: name.into(), method: None, by: BY };
                    last = refused(raw.call(&resume), "image");
                    if last.verdict != Verdict::Reject {
                        return Outcome::fail(format!("{name:?}: {}", last.said));
                    }
                }
                goes_on(&mut raw).map_or_else(Outcome::fail, |()| last)
            },
        )
        .on(Setup::Store),
        Attack::rejected(
            "image-of-another-user",
            "resumes images under names that others could have",
            |stage| {
                stage.ask(&[
                    (ToDaemon::Resume { image: "u0.chat".into(), method: None, by: BY }, "u0.chat"),
                    (ToDaemon::Resume { image: "chat".into(), method: Some(9), by: BY }, "chat"),
                ])
            },
        )
        .on(Setup::Store),
        Attack::rejected(
            "rows-while-suspended",
            "appends rows while its sequence is written to an image",
            |stage| {
                let (mut raw, _) = stage.session();
                let id = raw.open(1 << 14);
                raw.push(&append(), &[entry(id, 0, 1 << 13)]);
                // What the lane has lent must stay as it is: a sequence that is being published is not cut either.
                let suspend = ToDaemon::Suspend {
                    sequence: id,
                    image: "it".into(),
                    overwrite: true,
                    label: String::new(),
                };
                raw.say(&encode(&suspend));
                for position in (1 << 13)..(1 << 13) + 200 {
                    raw.push(&append(), &[entry(id, position, 1)]);
                    std::thread::sleep(std::time::Duration::from_micros(50));
                    if raw.tail.wrapping_sub(raw.d2c.load_u32(kvoyant_protocol::layout::d2c::REQUEST_HEAD))
                        >= 7
                    {
                        break;
                    }
                }
                match raw.hear() {
                    Ok(ToClient::Failed(failure)) => Outcome::reject(failure.to_string()),
                    Ok(ToClient::Done) => {
                        // On a busy machine all of them may have come before.
                        raw.push(&append(), &[entry(id, 1 << 13, 1)]);
                        ended(&mut raw, "is not open")
                    }
                    other => Outcome::fail(format!("{other:?} came")),
                }
            },
        )
        .on(Setup::Store),
        Attack::rejected("label-of-60-kib", "suspends with a label as long as a message", |stage| {
            let (mut raw, id) = stage.session();
            let label = "l".repeat(60_000);
            match raw.call(&ToDaemon::Suspend {
                sequence: id,
                image: "labelled".into(),
                overwrite: true,
                label,
            }) {
                Ok(ToClient::Failed(failure)) => Outcome::reject(failure.to_string()),
                other => Outcome::fail(format!("{other:?} came")),
            }
        })
        .on(Setup::Store),
        Attack::rejected(
            "publish-what-is-not-there",
            "publishes tokens of nobody, of no file, and 2^32 − 1 of them",
            |stage| {
                stage.ask(&[
                    (ToDaemon::Publish { sequence: NOBODY, tokens: 64, shared: false }, "0 memfds"),
                    (ToDaemon::Publish { sequence: NOBODY, tokens: u32::MAX, shared: true }, "are more than"),
                    (ToDaemon::Attach { method: 0, by: BY, tokens: u32::MAX }, "are more than"),
                    (ToDaemon::Attach { method: 0, by: BY, tokens: 64 }, "0 memfds"),
                ])
            },
        ),
        Attack::rejected(
            "leaves-while-pages-move",
            "lies while its pages are on their way to disk and back",
            |stage| {
                let (mut raw, _) = stage.session();
                let id = raw.open(3_000);
                raw.push(&append(), &[entry(id, 0, 3_000)]);
                let fetch = |ticket| {
                    let speculate =
                        kvoyant_protocol::wire::Speculate { fetch: true, ..crate::stage::speculate(ticket) };
                    crate::stage::request(kvoyant_protocol::wire::Operation::Speculate(speculate))
                };
                kvoyant_tests::wait_until("pages to leave", || {
                    let status = kvoyant_daemon::admin::fetch_status(&stage.admin).expect("a status");
                    status.sessions.iter().any(|session| session.spilled_pages > 100)
                });
                raw.push(&fetch(1), &[entry(id, 3_000, 0)]);
                raw.push(&fetch(9), &[entry(id, 3_000, 0)]);
                ended(&mut raw, "cannot follow ticket")
            },
        )
        .on(Setup::Spill),
    ]
}

/// Sends a message as often as the socket takes it.
pub(super) fn fill(raw: &Raw, bytes: &[u8]) -> usize {
    use nix::sys::socket::{MsgFlags, send};
    use std::os::fd::{AsFd, AsRawFd};
    let socket = raw.as_fd().as_raw_fd();
    let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL;
    let mut sent = 0;
    let mut full = 0;
    // The daemon takes some out while we look, until its own answers fit no more.
    while full < 20 && sent < 100_000 {
        match send(socket, bytes, flags) {
            Ok(_) => (sent, full) = (sent + 1, 0),
            Err(_) => {
                full += 1;
                std::thread::sleep(std::time::Duration::from_millis(1));
            }
        }
    }
    sent
}

/// Opens sequences by such a message until that is refused.
fn opened(
    stage: &Stage,
    limits: kvoyant_protocol::layout::Limits,
    message: fn(SequenceId, SequenceId) -> ToDaemon,
) -> Outcome {
    let mut raw = Raw::greet_with(&stage.socket, features::COMMON, limits);
    raw.register(fake::spec(&["full"]), &[]).expect("an answer");
    let first = raw.open(300);
    raw.push(&append(), &[entry(first, 0, 300)]);
    let (mut last, mut count) = (first, 1_usize);
    loop {
        match raw.call(&message(first, last)) {
            Ok(ToClient::Opened { sequence, .. }) => (last, count) = (sequence, count + 1),
            Ok(ToClient::Failed(failure)) => break Outcome::reject(format!("after {count}: {failure}")),
            other => break Outcome::fail(format!("{other:?} came after {count}")),
        }
        if count > 1 << 17 {
            break Outcome::fail("nothing ends it");
        }
    }
}
