//! HTTP spoken by hand, so that a test can say what no client library would.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;

use crate::Daemon;

/// What came back.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Answer {
    /// The status.
    pub status: u16,
    /// Everything before the body.
    pub head: String,
    /// The body.
    pub body: String,
}

impl Answer {
    fn of(bytes: &[u8]) -> Option<Self> {
        let text = String::from_utf8_lossy(bytes);
        let (head, body) = text.split_once("\r\n\r\n")?;
        let status = head.split(' ').nth(1)?.parse().ok()?;
        Some(Self { status, head: head.to_owned(), body: body.to_owned() })
    }
}

/// Sends a request (`GET /health`) with further header lines, each with its end, and a body, and reads until the other side closes. It may close
/// before it has read everything that is too long.
///
/// # Panics
/// If no answer comes.
pub fn exchange(mut stream: impl Read + Write, request: &str, headers: &str, body: &[u8]) -> Answer {
    let length = body.len();
    let head = format!(
        "{request} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: {length}\r\n{headers}\r\n"
    );
    let _ = stream.write_all(head.as_bytes()).and_then(|()| stream.write_all(body));
    let mut bytes = Vec::new();
    let ended = stream.read_to_end(&mut bytes);
    Answer::of(&bytes).unwrap_or_else(|| {
        let request: String = request.chars().take(100).collect();
        panic!("no answer to {request}: {ended:?}: {}", String::from_utf8_lossy(&bytes))
    })
}

/// What a daemon gives to a monitoring system.
///
/// # Panics
/// If it gives nothing.
#[must_use]
pub fn metrics(daemon: &Daemon) -> String {
    let answer =
        exchange(UnixStream::connect(daemon.admin()).expect("a connection"), "GET /metrics", "", b"");
    assert_eq!(answer.status, 200);
    answer.body
}

/// Of that, one series by its name and labels; 0 where it is not given.
///
/// # Panics
/// If there is nothing, or it has no value.
#[must_use]
pub fn metric(daemon: &Daemon, series: &str) -> f64 {
    let all = metrics(daemon);
    let mut lines = all.lines().filter_map(|line| line.rsplit_once(' '));
    lines.find(|(name, _)| *name == series).map_or(0.0, |(_, value)| value.parse().expect("a value"))
}
