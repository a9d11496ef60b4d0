//! The admin socket: HTTP from whoever may connect.

use std::io::{ErrorKind, Read, Write};
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use kvoyant_protocol::packet;
use nix::sys::socket::{ControlMessage, MsgFlags, UnixAddr, sendmsg};

use super::descriptors::lingering;
use crate::stage::Stage;
use crate::{Attack, Outcome, Setup};

/// How long the daemon may take for an answer.
const PATIENCE: Duration = Duration::from_secs(8);

pub(super) fn table() -> Vec<Attack> {
    vec![
        Attack::rejected("admin-no-http", "speaks no HTTP", |stage| {
            told(stage, b"\x00\x01\x02\x03 nonsense\r\n\r\n", &["400"])
        }),
        Attack::rejected(
            "admin-descriptor-that-lingers",
            "sends a socket that takes a minute to be closed beside a request",
            lingers,
        ),
        Attack::passes("admin-http-2", "opens with the preface of HTTP/2", |stage| {
            let outcome = closed_within(stage, b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", PATIENCE);
            if outcome.verdict == crate::Verdict::Reject {
                Outcome::pass("the connection was closed")
            } else {
                outcome
            }
        }),
        Attack::rejected("admin-head-of-a-mebibyte", "sends a header of a mebibyte", |stage| {
            let mut head = b"GET /v1/status HTTP/1.1\r\nx: ".to_vec();
            head.resize(1 << 20, b'a');
            told(stage, &head, &["431", "400"])
        }),
        Attack::rejected("admin-1000-headers", "sends a thousand headers", |stage| {
            let mut head = b"GET /v1/status HTTP/1.1\r\n".to_vec();
            for number in 0..1000 {
                head.extend(format!("x-{number}: y\r\n").bytes());
            }
            head.extend(b"\r\n");
            told(stage, &head, &["431", "400"])
        }),
        Attack::rejected("admin-uri-of-100-kib", "asks for a path of 100 KiB", |stage| {
            let head = format!("GET /{} HTTP/1.1\r\n\r\n", "a".repeat(100 << 10));
            told(stage, head.as_bytes(), &["414", "431", "404"])
        }),
        Attack::rejected("admin-methods", "sends every method that a resource does not have", |stage| {
            each(["POST", "PUT", "DELETE", "PATCH", "HEAD", "OPTIONS", "TRACE", "BREW"].map(|method| {
                told(
                    stage,
                    format!("{method} /v1/status HTTP/1.1\r\nconnection: close\r\ncontent-length: 0\r\n\r\n")
                        .as_bytes(),
                    &["405"],
                )
            }))
        }),
        Attack::rejected(
            "admin-paths",
            "asks for what is not there, with dots, escapes and 2^64 in it",
            |stage| {
                each(["/", "/v1", "/v1/status/", "/../etc/passwd", "/v1/images", "//v1/status"].map(|path| {
                    told(
                        stage,
                        format!("GET {path} HTTP/1.1\r\nconnection: close\r\n\r\n").as_bytes(),
                        &["404", "400"],
                    )
                }))
            },
        ),
        Attack::rejected("admin-erase-elsewhere", "erases images under names that lead elsewhere", |stage| {
            each(
                [
                    "0/../../etc/passwd",
                    "0/..%2f..%2fetc%2fpasswd",
                    "0/%00",
                    "-1/x",
                    "4294967296/x",
                    "0/",
                    "0/.x",
                ]
                .map(|name| {
                    let head = format!(
                        "DELETE /v1/images/{name} HTTP/1.1\r\nconnection: close\r\ncontent-length: 0\r\n\r\n"
                    );
                    told(stage, head.as_bytes(), &["400", "404"])
                }),
            )
        })
        .on(Setup::Store),
        Attack::rejected(
            "admin-json",
            "sends bodies that are no JSON, other JSON, and JSON 60 KiB deep",
            |stage| {
                let deep = "[".repeat(60_000);
                each(
                    [
                        "",
                        "{",
                        "null",
                        "[]",
                        "{\"session\":-1}",
                        "{\"session\":1e999}",
                        "\u{0}",
                        &*deep,
                        "{\"session\":1,\"sequence\":\"0.0\",\"image\":\"x\",\"more\":1}",
                    ]
                    .map(|body| told(stage, posted("/v1/sequences/suspend", body).as_bytes(), &["400"])),
                )
            },
        ),
        Attack::rejected("admin-body-too-long", "sends a body of a mebibyte", |stage| {
            let body = "a".repeat(1 << 20);
            told(stage, posted("/v1/sequences/suspend", &body).as_bytes(), &["413"])
        }),
        Attack::rejected(
            "admin-suspend-nobody",
            "suspends sequences of nobody, with handles that are none",
            |stage| {
                let order = |session: &str, sequence: &str| {
                    posted(
                        "/v1/sequences/suspend",
                        &format!("{{\"session\":{session},\"sequence\":\"{sequence}\",\"image\":\"x\"}}"),
                    )
                };
                each([
                    told(stage, order("18446744073709551615", "0.0").as_bytes(), &["404"]),
                    told(stage, order("1", "x").as_bytes(), &["400"]),
                    told(stage, order("1", "99999999999.0").as_bytes(), &["400"]),
                    told(stage, order("1", "7000.7").as_bytes(), &["404"]),
                ])
            },
        )
        .on(Setup::Store),
        Attack::rejected("admin-slow-head", "sends a head of one letter, and no more", |stage| {
            closed_within(stage, b"G", Duration::from_secs(20))
        })
        .slow(),
        Attack::rejected("admin-slow-body", "says that a body of 10 bytes comes, and sends one", |stage| {
            let head = b"POST /v1/sequences/suspend HTTP/1.1\r\ncontent-length: 10\r\n\r\n{";
            closed_within(stage, head, Duration::from_secs(20))
        })
        .slow(),
        Attack::rejected(
            "admin-reads-nothing",
            "asks a hundred thousand times and reads no answer",
            |stage| {
                let mut stream = connect(stage);
                stream.set_write_timeout(Some(Duration::from_millis(200))).expect("a timeout");
                let many = b"GET /v1/status HTTP/1.1\r\n\r\n".repeat(1000);
                let mut went = 0;
                while went < 100 && stream.write_all(&many).is_ok() {
                    went += 1;
                }
                // Nothing is read: the daemon gives up on writing, and closes.
                let since = Instant::now();
                loop {
                    match stream.write_all(b"GET ") {
                        Err(error)
                            if matches!(error.kind(), ErrorKind::BrokenPipe | ErrorKind::ConnectionReset) =>
                        {
                            break Outcome::reject("the connection was closed");
                        }
                        _ if since.elapsed() > Duration::from_secs(30) => {
                            break Outcome::fail("it is still served");
                        }
                        _ => std::thread::sleep(Duration::from_millis(20)),
                    }
                }
            },
        )
        .slow(),
        Attack::rejected(
            "admin-connections",
            "holds 300 connections open and says nothing on any",
            |stage| {
                let streams: Vec<UnixStream> = (0..300).map(|_| connect(stage)).collect();
                let told = streams.iter().rev().find_map(|mut stream| {
                    stream.set_read_timeout(Some(Duration::from_millis(50))).ok()?;
                    let mut words = [0; 512];
                    let count = stream.read(&mut words).ok()?;
                    let words = String::from_utf8_lossy(&words[..count]).into_owned();
                    words.contains("503").then_some(words)
                });
                let held = std::fs::read_dir(format!("/proc/{}/fd", stage.daemon)).map_or(0, Iterator::count);
                match told {
                    Some(words) if held < 300 => Outcome::reject(words.lines().last().unwrap_or_default()),
                    other => {
                        Outcome::fail(format!("the daemon has {held} descriptors open, and said {other:?}"))
                    }
                }
            },
        ),
        Attack::passes(
            "admin-leaves-at-every-byte",
            "goes away after each byte of a good request",
            |stage| {
                let request = b"GET /v1/sequences HTTP/1.1\r\nhost: x\r\n\r\n";
                for bytes in 0..=request.len() {
                    let mut stream = connect(stage);
                    let _ = stream.write_all(&request[..bytes]);
                }
                Outcome::pass("each was let go")
            },
        ),
    ]
}

fn connect(stage: &Stage) -> UnixStream {
    UnixStream::connect(&stage.admin).expect("the admin socket")
}

fn posted(path: &str, body: &str) -> String {
    format!(
        "POST {path} HTTP/1.1\r\nconnection: close\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n{body}",
        body.len()
    )
}

/// A kernel that can be told lets nobody send it; on others the daemon is harmed by whoever may connect to its admin socket, and this says no
/// more than that.
fn lingers(stage: &Stage) -> Outcome {
    let (lingers, _unread) = lingering();
    let socket = UnixStream::connect(&stage.admin).expect("a connection");
    match packet::refuse_descriptors(socket.as_fd()) {
        Ok(true) => {}
        other => return Outcome::reject(format!("this kernel cannot keep descriptors out: {other:?}")),
    }
    let fds = [lingers.as_raw_fd()];
    let sent = sendmsg::<UnixAddr>(
        socket.as_raw_fd(),
        &[std::io::IoSlice::new(b"GET /v1/status HTTP/1.1\r\n")],
        &[ControlMessage::ScmRights(&fds)],
        MsgFlags::MSG_NOSIGNAL,
        None,
    );
    match sent {
        Err(nix::errno::Errno::EPERM) => Outcome::reject("nobody can send it"),
        other => Outcome::fail(format!("it was sent: {other:?}")),
    }
}

/// Sends bytes, and expects an answer with one of these statuses.
fn told(stage: &Stage, bytes: &[u8], statuses: &[&str]) -> Outcome {
    let mut stream = connect(stage);
    stream.set_read_timeout(Some(PATIENCE)).expect("a timeout");
    // The daemon may close before it has read all of it.
    let _ = stream.write_all(bytes);
    let mut answer = Vec::new();
    let mut part = [0; 4096];
    loop {
        match stream.read(&mut part) {
            Ok(0) => break,
            Ok(count) => answer.extend(&part[..count]),
            Err(error) if error.kind() == ErrorKind::ConnectionReset => break,
            Err(error) => return Outcome::fail(format!("no answer: {error}")),
        }
    }
    let answer = String::from_utf8_lossy(&answer).into_owned();
    let status = answer.split(' ').nth(1).unwrap_or_default();
    if statuses.contains(&status) {
        Outcome::reject(answer.lines().last().unwrap_or_default().to_owned())
    } else {
        Outcome::fail(format!("{statuses:?} was to come, and {answer:?} came"))
    }
}

/// The last of outcomes that are all refusals; else the first that is none.
fn each<const N: usize>(outcomes: [Outcome; N]) -> Outcome {
    super::handshake::all(outcomes.into_iter())
}

/// Sends bytes, and waits until the daemon has enough.
fn closed_within(stage: &Stage, bytes: &[u8], patience: Duration) -> Outcome {
    let mut stream = connect(stage);
    stream.write_all(bytes).expect("bytes");
    stream.set_read_timeout(Some(patience)).expect("a timeout");
    let mut words = Vec::new();
    match stream.read_to_end(&mut words) {
        Ok(_) => Outcome::reject(format!("closed, with {:?}", String::from_utf8_lossy(&words))),
        Err(error) => Outcome::fail(format!("it was still open after {patience:?}: {error}")),
    }
}
