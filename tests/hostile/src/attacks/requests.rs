//! Requests that cannot be: descriptors, batch tables, hints, rows.

use kvoyant_protocol::wire::{Append, FeedbackRows, Observe, Operation, Request, SequenceId, Speculate};
use kvoyant_tests::noisy::{QUERY, noise};
use kvoyant_tests::raw::Raw;

use super::handshake::all;
use crate::stage::{ROOM, Stage, append, ended, entry, goes_on, request, speculate};
use crate::{Attack, Outcome};

pub(super) fn table() -> Vec<Attack> {
    [descriptors(), batches(), rows(), payloads()].concat()
}

fn descriptors() -> Vec<Attack> {
    vec![
        Attack::rejected("descriptor-all-ones", "sends a descriptor of ones", |stage| {
            stage.lie("reserved fields", |raw, _| raw.push_raw(&[0xff; 64], &[]))
        }),
        Attack::rejected("descriptor-all-zeros", "sends a descriptor of zeros", |stage| {
            stage.lie("members", |raw, _| raw.push_raw(&[0; 64], &[]))
        }),
        Attack::rejected(
            "descriptor-unknown-operations",
            "asks for every operation that there is not",
            |stage| {
                all([0, 7, 8, 100, 200, 255].into_iter().map(|operation| {
                    let mut bytes = [0; 64];
                    (bytes[0], bytes[4]) = (operation, 1);
                    stage.lie("not known", |raw, _| raw.push_raw(&bytes, &[]))
                }))
            },
        ),
        Attack::rejected(
            "descriptor-reserved-bits",
            "sets each reserved byte and flag of a good request",
            |stage| {
                let good = append().encode();
                all((44..64).chain([1]).map(|at| {
                    let mut bytes = good;
                    bytes[at] = 0x80;
                    stage.lie("reserved fields", |raw, _| raw.push_raw(&bytes, &[]))
                }))
            },
        ),
        Attack::rejected("batch-of-nobody", "sends a batch without members", |stage| {
            stage.lie("members", |raw, _| raw.push(&ask(Speculate { batch: 0, ..speculate(1) }), &[]))
        }),
        Attack::rejected("batch-of-2-32", "sends a batch of 2^32 − 1 members", |stage| {
            stage.lie("members", |raw, _| raw.push(&ask(Speculate { batch: u32::MAX, ..speculate(1) }), &[]))
        }),
        Attack::rejected("payload-of-2-32", "says that its hints have 2^32 − 1 bytes", |stage| {
            stage.lie("hint area", |raw, id| {
                raw.push(&ask(Speculate { hint_bytes: u32::MAX, ..speculate(1) }), &[entry(id, 0, 0)]);
            })
        }),
        Attack::rejected("query-tokens-2-32", "asks with a block of 2^32 − 1 query tokens", |stage| {
            stage.lie("query tokens", |raw, id| {
                raw.push(&ask(Speculate { queries: u32::MAX, ..speculate(1) }), &[entry(id, 0, 0)]);
            })
        }),
        Attack::rejected("ticket-0", "asks with ticket 0", |stage| ticket(stage, &[0])),
        Attack::rejected("ticket-skipped", "leaves a ticket out", |stage| ticket(stage, &[1, 3])),
        Attack::rejected("ticket-reused", "asks twice with the same ticket", |stage| ticket(stage, &[1, 1])),
        Attack::rejected("ticket-2-64", "asks with the largest ticket that there is", |stage| {
            ticket(stage, &[u64::MAX])
        }),
        Attack::rejected("release-of-the-future", "lets go of answers that nobody has given", |stage| {
            all([1, 50, u64::MAX].into_iter().map(|release_through| {
                stage.lie("ticket", |raw, _| {
                    raw.push(&Request { release_through, operation: Operation::Release }, &[]);
                })
            }))
        }),
        Attack::passes("release-twice", "lets go of the same answer again and again", |stage| {
            let (mut raw, id) = stage.session_of(&["random:budget=50%"]);
            raw.push(&append(), &[entry(id, 0, 90)]);
            raw.push(&ask(speculate(1)), &[entry(id, 89, 0)]);
            raw.wait_for_ticket(1);
            for release_through in [1, 1, 0, 1, 0] {
                raw.push(&Request { release_through, operation: Operation::Release }, &[]);
            }
            goes_on(&mut raw).map_or_else(Outcome::fail, |()| Outcome::pass("once is what counts"))
        }),
    ]
}

fn batches() -> Vec<Attack> {
    vec![
        Attack::rejected("layer-beyond", "asks for layers that the model does not have", |stage| {
            all([3, 999, u16::MAX].into_iter().map(|layer| {
                stage.lie("layer", |raw, id| {
                    raw.push(&ask(Speculate { layer, ..speculate(1) }), &[entry(id, 0, 0)]);
                })
            }))
        }),
        Attack::rejected("layer-dense", "asks for rows of a layer that is never selected from", |stage| {
            stage.lie("layer", |raw, id| {
                raw.push(&ask(Speculate { layer: 0, ..speculate(1) }), &[entry(id, 0, 0)]);
            })
        }),
        Attack::rejected("sequence-of-nobody", "appends to a sequence that was never open", |stage| {
            stage.lie("not open", |raw, _| {
                raw.push(&append(), &[entry(SequenceId { slot: u32::MAX, generation: 7 }, 0, 1)]);
            })
        }),
        Attack::rejected(
            "sequence-of-another-session",
            "uses the handle of another session's sequence",
            |stage| {
                let (mut other, _) = stage.session();
                let second = other.open(ROOM);
                let outcome = stage.lie("not open", |raw, _| raw.push(&append(), &[entry(second, 0, 1)]));
                match goes_on(&mut other) {
                    Ok(()) => outcome,
                    Err(how) => Outcome::fail(format!("the other session: {how}")),
                }
            },
        ),
        Attack::rejected("sequence-closed", "appends to a sequence that it has closed", |stage| {
            stage.lie("not open", |raw, id| {
                let close = kvoyant_protocol::control::ToDaemon::Close { sequences: vec![id] };
                raw.call(&close).expect("an answer");
                raw.open(ROOM);
                raw.push(&append(), &[entry(id, 0, 1)]);
            })
        }),
        Attack::rejected("request-before-a-model", "asks before it has registered a model", |stage| {
            let mut raw = Raw::greet(&stage.socket, kvoyant_protocol::control::features::COMMON);
            raw.push(&ask(speculate(1)), &[entry(SequenceId { slot: 0, generation: 0 }, 0, 0)]);
            ended(&mut raw, "before a model was registered")
        }),
        Attack::passes("member-twice", "names one sequence many times in a batch", |stage| {
            let (mut raw, id) = stage.session_of(&["random:budget=50%"]);
            raw.push(&append(), &[entry(id, 0, 90)]);
            raw.push(&ask(Speculate { batch: 64, ..speculate(1) }), &[entry(id, 89, 0); 64]);
            raw.wait_for_ticket(1);
            goes_on(&mut raw).map_or_else(Outcome::fail, |()| Outcome::pass("it was answered as often"))
        }),
        Attack::passes("position-2-32", "asks at positions far beyond its rows", |stage| {
            let (mut raw, id) = stage.session_of(&["random:budget=50%"]);
            raw.push(&append(), &[entry(id, 0, 90)]);
            for (ticket, position) in (1..).zip([92, 5_000, 1 << 24, 1 << 30]) {
                raw.push(&ask(speculate(ticket)), &[entry(id, position, 0)]);
                // A position whose work alone is too much ends the session instead.
                if position < 1 << 24 {
                    raw.wait_for_ticket(ticket);
                    if status(&raw) == 0 {
                        return Outcome::fail(format!("position {position} was answered"));
                    }
                }
            }
            Outcome::pass("each was told that there are no such rows, or that it is too much work")
        }),
        Attack::rejected("work-of-years", "asks for more products than a lane may be asked for", |stage| {
            stage.lie_with(&["random:budget=50%"], "split the batch", |raw, id| {
                raw.push(&ask(Speculate { batch: 64, ..speculate(1) }), &[entry(id, u32::MAX - 1, 0); 64]);
            })
        }),
        Attack::passes("deadline-long-ago", "wants its rows in the past, and at the end of time", |stage| {
            let (mut raw, id) = stage.session_of(&["random:budget=50%"]);
            raw.push(&append(), &[entry(id, 0, 90)]);
            for (ticket, deadline_ns) in (1..).zip([1, u64::MAX, u64::MAX - 1]) {
                raw.push(&ask(Speculate { deadline_ns, ..speculate(ticket) }), &[entry(id, 89, 0)]);
                raw.wait_for_ticket(ticket);
            }
            goes_on(&mut raw).map_or_else(Outcome::fail, |()| Outcome::pass("it was answered"))
        }),
        Attack::passes("fetch-without-a-disk", "fetches pages where none can leave", |stage| {
            let (mut raw, id) = stage.session();
            raw.push(&append(), &[entry(id, 0, 90)]);
            raw.push(&ask(Speculate { fetch: true, ..speculate(1) }), &[entry(id, 90, 0)]);
            raw.wait_for_ticket(1);
            goes_on(&mut raw).map_or_else(Outcome::fail, |()| Outcome::pass("they are all there"))
        }),
    ]
}

fn rows() -> Vec<Attack> {
    vec![
        Attack::rejected("rows-beyond-the-room", "appends more rows than there is room for", |stage| {
            appended(stage, 0, 1 << 20)
        }),
        Attack::rejected("rows-that-overflow", "appends 2^32 − 1 rows at the largest position", |stage| {
            all([(0, u32::MAX), (u32::MAX, u32::MAX), (u32::MAX, 1)]
                .into_iter()
                .map(|(position, rows)| appended(stage, position, rows)))
        }),
        Attack::rejected("rows-out-of-order", "leaves a gap before its rows", |stage| appended(stage, 5, 1)),
        Attack::rejected("rows-twice", "appends the same rows twice", |stage| {
            stage.lie("cannot be appended", |raw, id| {
                raw.push(&append(), &[entry(id, 0, 10)]);
                raw.push(&append(), &[entry(id, 0, 10)]);
            })
        }),
        Attack::rejected("rows-of-a-layer-that-is-none", "appends to a layer beyond the last one", |stage| {
            stage.lie("layer", |raw, id| {
                let append = Operation::Append(Append { layer: Some(77), batch: 1 });
                raw.push(&request(append), &[entry(id, 0, 1)]);
            })
        }),
    ]
}

fn payloads() -> Vec<Attack> {
    vec![
        Attack::rejected(
            "hint-offset-2-32",
            "says that its hint lies at the end of the address space",
            |stage| {
                all([u32::MAX, u32::MAX - 3, 1 << 31, 512]
                    .into_iter()
                    .map(|offset| hinted(stage, 512, offset)))
            },
        ),
        Attack::rejected("hint-too-short", "sends a hint of one byte", |stage| hinted(stage, 1, 0)),
        Attack::passes("hint-not-a-number", "sends hints of NaN and infinity", |stage| {
            let (mut raw, id) = stage.session_of(&["quest:budget=20,hint=current"]);
            raw.push(&append(), &[entry(id, 0, 90)]);
            for (ticket, bad) in (1..).zip([f32::NAN, f32::INFINITY, f32::NEG_INFINITY]) {
                let mut query = noise(QUERY, 1);
                query[7] = bad;
                let bytes: Vec<u8> = query.iter().flat_map(|value| value.to_le_bytes()).collect();
                raw.c2d.write(raw.layout.hints(raw.tail), &bytes).expect("a hint");
                raw.push(
                    &ask(Speculate { hint_bytes: bytes.len() as u32, ..speculate(ticket) }),
                    &[entry(id, 89, 0)],
                );
                raw.wait_for_ticket(ticket);
                if status(&raw) != kvoyant_protocol::wire::Status::BadHint as u8 {
                    return Outcome::fail(format!("a hint of {bad} was answered"));
                }
            }
            Outcome::pass("each was told so, and the session goes on")
        }),
        Attack::rejected(
            "ids-that-run-over",
            "sends ids whose counts run over the end of the hint",
            |stage| {
                let words = [u32::MAX, 1, 2, 3, 4, 5, 6, 7];
                all([&words[..], &words[1..]].into_iter().map(|words| {
                    let (mut raw, id) = stage.session_of(&["given"]);
                    raw.push(&append(), &[entry(id, 0, 90)]);
                    let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
                    raw.c2d.write(raw.layout.hints(raw.tail), &bytes).expect("ids");
                    raw.push(
                        &ask(Speculate { hint_bytes: bytes.len() as u32, ..speculate(1) }),
                        &[entry(id, 89, 0)],
                    );
                    let told = || {
                        let since = std::time::Instant::now();
                        while raw.timeline() < 1 && since.elapsed() < std::time::Duration::from_millis(500) {
                            std::thread::yield_now();
                        }
                        raw.timeline() == 1 && status(&raw) != 0
                    };
                    if told() {
                        Outcome::reject("the answer says that the hint is none")
                    } else {
                        ended(&mut raw, "payload")
                    }
                }))
            },
        ),
        Attack::rejected(
            "observation-of-the-wrong-size",
            "sends a prompt's statistics of another model",
            |stage| {
                stage.lie_with(&["infinigen:budget=10%,skew=off"], "does not fit", |raw, id| {
                    let observe = Operation::Observe(Observe { layer: 1, payload_bytes: 12 });
                    raw.push(&request(observe), &[entry(id, 0, 0)]);
                })
            },
        ),
        Attack::rejected(
            "feedback-nobody-asked-for",
            "sends attention rows to a method that learns from none",
            |stage| {
                stage.lie("learns from none", |raw, id| {
                    let rows = FeedbackRows { layer: 1, payload_bytes: 64, full: true };
                    raw.push(&append(), &[entry(id, 0, 90)]);
                    raw.push(&request(Operation::Feedback(rows)), &[entry(id, 90, 0)]);
                })
            },
        ),
        Attack::rejected(
            "marks-beyond-the-room",
            "marks tokens that its sequence has no room for",
            |stage| {
                stage.lie("marks", |raw, id| {
                    let bytes = 4096;
                    raw.push(
                        &request(Operation::Mark { payload_bytes: bytes }),
                        &[entry(id, u32::MAX - 7, 0)],
                    );
                })
            },
        ),
    ]
}

fn ask(speculate: Speculate) -> Request {
    request(Operation::Speculate(speculate))
}

/// Status of the last answer.
pub(super) fn status(raw: &Raw) -> u8 {
    raw.d2c.load_u64(kvoyant_protocol::layout::d2c::TIMELINE) as u8
}

fn ticket(stage: &Stage, tickets: &[u64]) -> Outcome {
    stage.lie_with(&["window"], "cannot follow ticket", |raw, id| {
        for ticket in tickets {
            raw.push(&ask(speculate(*ticket)), &[entry(id, 0, 0)]);
        }
    })
}

fn appended(stage: &Stage, position: u32, rows: u32) -> Outcome {
    stage.lie("cannot be appended", |raw, id| raw.push(&append(), &[entry(id, position, rows)]))
}

fn hinted(stage: &Stage, hint_bytes: u32, offset: u32) -> Outcome {
    stage.lie_with(&["quest:budget=20,hint=current"], "payload", |raw, id| {
        raw.push(&append(), &[entry(id, 0, 90)]);
        raw.push(&ask(Speculate { hint_bytes, ..speculate(1) }), &[entry(id, 89, offset)]);
    })
}
