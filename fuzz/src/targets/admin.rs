//! Requests of the admin socket, byte for byte.

use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;

use crate::service;

/// Any bytes are answered in HTTP or not at all, in time, with a reason where they are refused, and none of them by a failure
/// of the daemon's own.
///
/// # Panics
/// If it is not so.
pub fn run(bytes: &[u8]) {
    let mut stream = UnixStream::connect(service::admin()).expect("the admin socket");
    stream.set_read_timeout(Some(service::PATIENCE)).expect("a timeout");
    stream.set_write_timeout(Some(service::PATIENCE)).expect("a timeout");
    // It may have hung up on what came first.
    let _ = stream.write_all(bytes);
    let _ = stream.shutdown(Shutdown::Write);
    let mut answer = Vec::new();
    match stream.read_to_end(&mut answer) {
        Ok(_) => {}
        Err(error) if error.kind() == std::io::ErrorKind::ConnectionReset => {}
        Err(error) => panic!("no end came: {error}"),
    }
    if answer.is_empty() {
        return;
    }
    let text = String::from_utf8_lossy(&answer);
    let status =
        text.strip_prefix("HTTP/1.").and_then(|rest| rest.get(2..5)).and_then(|code| code.parse().ok());
    let status: u16 = status.unwrap_or_else(|| panic!("the answer is none: {text}"));
    assert_ne!(status, 500, "{text}");
    let head = text.split("\r\n\r\n").next().unwrap_or_default();
    if status >= 400 && head.contains("application/json") && text.matches("HTTP/1.").count() == 1 {
        let body = &text[head.len()..].trim_start();
        let ready = body.contains("\"ready\"");
        assert!(body.is_empty() || ready || body.starts_with("{\"error\":\""), "{text}");
    }
}

/// A request of each kind, some of them refused.
#[must_use]
pub fn seeds() -> Vec<Vec<u8>> {
    let get = |path: &str| format!("GET {path} HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n");
    let post = |path: &str, body: &str| {
        let length = body.len();
        format!("POST {path} HTTP/1.1\r\nhost: a\r\ncontent-length: {length}\r\n\r\n{body}")
    };
    let suspend = r#"{"session":1,"sequence":"0.1","image":"chat","overwrite":false,"label":"a"}"#;
    let requests = [
        get("/v1/status"),
        get("/health"),
        get("/ready"),
        get("/metrics").replace("host: a", "accept: application/openmetrics-text"),
        get("/v1/sequences"),
        get("/v1/images/0/a"),
        post("/v1/sequences/suspend", suspend),
        post("/v1/images/bring", r#"{"image":"chat","uid":0}"#),
        post("/v1/images/bring", r#"{"image":"../x"}"#),
        get("/v1/images/0/chat").replace("GET", "DELETE"),
        get("/v1/images/4294967295/%2e%2e").replace("GET", "DELETE"),
        "POST /v1/images/bring HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\n5\r\n{\"ima\r\n0\r\n\r\n".to_owned(),
    ];
    requests.map(String::into_bytes).to_vec()
}
