//! What monitoring reads: texts that parsers take, counters that outlast sessions, and nothing that a client has named.

use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::os::unix::net::UnixStream;

use kvoyant_daemon::admin::Health;
use kvoyant_tests::raw::Raw;
use kvoyant_tests::{Daemon, PATIENCE, fake, wait_until};
use nix::sys::signal::Signal;

const DAEMON: &str = env!("CARGO_BIN_EXE_kvoyantd-under-test");
const TOKENS: usize = 300;

/// Sends a request, and gives status, header and body.
fn exchange(mut stream: impl Read + Write, request: &str, accept: &str) -> (u16, String, String) {
    let text =
        format!("{request} HTTP/1.1\r\nHost: localhost\r\nAccept: {accept}\r\nConnection: close\r\n\r\n");
    stream.write_all(text.as_bytes()).unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    let (head, body) = answer.split_once("\r\n\r\n").unwrap();
    let status = head.split(' ').nth(1).unwrap().parse().unwrap();
    (status, head.to_owned(), body.to_owned())
}

fn get(daemon: &Daemon, path: &str, accept: &str) -> (u16, String, String) {
    exchange(UnixStream::connect(daemon.admin()).unwrap(), &format!("GET {path}"), accept)
}

/// Series by name and labels.
type Series = BTreeMap<String, f64>;

/// Reads the text, and holds it to what every parser of it wants: each series belongs to the family that was announced last, by a name
/// that its type may give it; none comes twice.
fn parse(text: &str) -> Series {
    let mut series = Series::new();
    let (mut family, mut kind) = (String::new(), String::new());
    let mut families = Vec::new();
    for line in text.lines().filter(|line| !line.starts_with("# EOF")) {
        if let Some(rest) = line.strip_prefix("# TYPE ") {
            let (name, type_) = rest.split_once(' ').unwrap();
            (family, kind) = (name.to_owned(), type_.to_owned());
            assert!(!families.contains(&family), "{family} comes twice");
            families.push(family.clone());
        } else if !line.starts_with('#') {
            let (name, value) = line.rsplit_once(' ').unwrap_or_else(|| panic!("{line}"));
            let plain = name.split('{').next().unwrap();
            let suffix = plain.strip_prefix(&family).unwrap_or_else(|| panic!("{line} is not of {family}"));
            let known: &[&str] = match kind.as_str() {
                "counter" => &["_total", ""],
                "gauge" => &[""],
                "histogram" => &["_sum", "_count", "_bucket"],
                other => panic!("{family} is a {other}"),
            };
            assert!(known.contains(&suffix), "{line} is no {kind}");
            assert!(family.starts_with("kvoyant_"), "{family}");
            // Formats differ in the order of labels, and in how they write a number.
            let name = match name.strip_suffix('}').and_then(|name| name.split_once('{')) {
                None => name.to_owned(),
                Some((name, labels)) => {
                    let mut labels: Vec<_> = labels.split(',').map(plain_number).collect();
                    labels.sort();
                    format!("{name}{{{}}}", labels.join(","))
                }
            };
            let before = series.insert(name.clone(), value.parse().unwrap());
            assert!(before.is_none(), "{name} comes twice");
        }
    }
    series
}

fn plain_number(label: &str) -> String {
    let (key, value) = label.split_once('=').unwrap();
    match value.trim_matches('"').parse::<f64>() {
        Ok(end) if key == "le" && end.is_finite() => format!("le=\"{end}\""),
        _ => label.to_owned(),
    }
}

fn metrics(daemon: &Daemon) -> Series {
    let (status, head, body) = get(daemon, "/metrics", "text/plain");
    assert_eq!(status, 200);
    assert!(head.contains("text/plain; version=0.0.4"), "{head}");
    parse(&body)
}

/// A session that has asked a few times.
fn work(daemon: &Daemon) -> (kvoyant_client::Model, kvoyant_client::Sequence) {
    let model = fake::connect(daemon, &["full"]);
    let sequence = model.open(0, 0).unwrap();
    model.reserve(&[(&sequence, TOKENS)]).unwrap();
    fake::fill(&model, &sequence, 1, TOKENS).unwrap();
    for _ in 0..3 {
        drop(fake::ask(&model, &sequence, 1));
    }
    (model, sequence)
}

#[test]
fn counters_of_a_session_stay_when_it_has_gone_and_what_it_held_does_not() {
    let daemon = Daemon::start(DAEMON, &[]);
    let uid = nix::unistd::geteuid();
    let of_user = |name: &str| format!("kvoyant_{name}{{uid=\"{uid}\"}}");
    let held = work(&daemon);
    wait_until("three answers", || metrics(&daemon)["kvoyant_requests_total"] == 3.0);
    let during = metrics(&daemon);
    drop(held);
    daemon.wait_for("the session has gone", |status| status.totals.sessions == 0);
    let after = metrics(&daemon);
    for name in ["kvoyant_requests_total", "kvoyant_rows_selected_total", "kvoyant_rows_appended_total"] {
        assert!(during[name] > 0.0, "{name}");
        assert_eq!(during[name], after[name], "{name}");
    }
    assert_eq!(after[&of_user("user_requests_total")], 3.0);
    assert_eq!((during[&of_user("user_sequences")], after[&of_user("user_sequences")]), (1.0, 0.0));
    assert!(during[&of_user("user_held_bytes")] > 0.0 && after[&of_user("user_held_bytes")] == 0.0);
    assert_eq!((during["kvoyant_sessions"], after["kvoyant_sessions"]), (1.0, 0.0));
    assert_eq!(after["kvoyant_sessions_ended_total{how=\"left\"}"], 1.0);
    // Every stage has each answer once, and the buckets add up.
    for stage in ["queue", "select", "transfer", "whole"] {
        let count = after[&format!("kvoyant_request_time_seconds_count{{stage=\"{stage}\"}}")];
        let all = after[&format!("kvoyant_request_time_seconds_bucket{{le=\"+Inf\",stage=\"{stage}\"}}")];
        assert_eq!((count, all), (3.0, 3.0), "{stage}");
    }
    drop(work(&daemon));
    wait_until("a second session's", || metrics(&daemon)["kvoyant_requests_total"] == 6.0);
}

#[test]
fn a_client_that_breaks_the_protocol_is_counted_and_what_it_called_itself_is_nowhere() {
    let daemon = Daemon::start(DAEMON, &[]);
    let mut raw = Raw::greet(&daemon.socket(), u64::MAX);
    raw.say(b"this is no message");
    assert!(raw.hear().is_ok(), "it is told why");
    let rejected = "kvoyant_sessions_ended_total{how=\"rejected\"}";
    wait_until("the end is counted", || metrics(&daemon)[rejected] == 1.0);
    let (_, _, body) = get(&daemon, "/metrics", "*/*");
    let held = work(&daemon);
    let (_, _, with_session) = get(&daemon, "/metrics", "*/*");
    let name = &daemon.status().sessions[0].client;
    assert!(!name.is_empty() && !with_session.contains(&format!("\"{name}\"")), "{name}");
    // What is named must not depend on who has connected: one more user at most.
    let names = |text: &str| parse(text).len();
    assert!(names(&with_session) >= names(&body) && names(&with_session) < names(&body) + 20);
    drop(held);
}

#[test]
fn whoever_asks_for_openmetrics_gets_it_and_whoever_does_not_gets_plain_text() {
    let daemon = Daemon::start(DAEMON, &[]);
    let (_, head, body) =
        get(&daemon, "/metrics", "application/openmetrics-text;version=1.0.0,text/plain;q=0.5");
    assert!(head.contains("application/openmetrics-text; version=1.0.0"), "{head}");
    assert!(body.ends_with("# EOF\n"));
    assert!(body.contains("# UNIT kvoyant_arena_size_bytes bytes\n"), "{body}");
    let open = parse(&body);
    let plain = metrics(&daemon);
    assert_eq!(open.keys().collect::<Vec<_>>(), plain.keys().collect::<Vec<_>>());
    assert_eq!(plain["kvoyant_arena_size_bytes"], (512u64 << 20) as f64);
}

#[test]
fn in_openmetrics_a_bucket_of_times_names_a_request_that_the_log_has_too() {
    let daemon = Daemon::start(DAEMON, &["--log", "kvoyant_daemon::lane=trace", "--log-format", "json"]);
    let held = work(&daemon);
    wait_until("three answers", || metrics(&daemon)["kvoyant_requests_total"] == 3.0);
    let (_, _, body) = get(&daemon, "/metrics", "application/openmetrics-text");
    let mut examples = Vec::new();
    let mut from = 0.0;
    for line in body.lines().filter(|line| line.starts_with("kvoyant_request_time_seconds_bucket")) {
        let Some((bucket, example)) = line.split_once(" # ") else { continue };
        assert!(bucket.contains("stage=\"whole\""), "{line}");
        let (labels, took) = example.trim_start_matches('{').split_once("} ").unwrap();
        let end = bucket.split("le=\"").nth(1).unwrap().split('"').next().unwrap();
        let (end, took) = (end.parse().unwrap_or(f64::INFINITY), took.parse::<f64>().unwrap());
        assert!(took > from && took <= end, "{line}");
        from = took;
        let logged = |label: &str| {
            let value = labels.split(&format!("{label}=\"")).nth(1).unwrap().split('"').next().unwrap();
            format!("\"{label}\":{value},")
        };
        examples.push(["session", "ticket", "layer"].map(logged));
    }
    assert!((1..=3).contains(&examples.len()), "{body}");
    let (_, _, plain) = get(&daemon, "/metrics", "text/plain");
    assert!(!plain.contains(" # {"), "{plain}");
    drop(held);
    let (_, said) = daemon.end(Signal::SIGTERM);
    for wanted in examples {
        let is_it =
            |line: &&str| line.contains("answered") && wanted.iter().all(|field| line.contains(field));
        assert_eq!(said.lines().filter(is_it).count(), 1, "{wanted:?} in {said}");
    }
}

#[test]
fn over_tcp_there_are_metrics_and_health_and_nothing_else() {
    // A port that is free now; another process may be quicker, in which case the daemon says so.
    let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let address = format!("127.0.0.1:{port}");
    let daemon = Daemon::start(DAEMON, &["--monitor", &address]);
    let ask = |request: &str| {
        let stream = TcpStream::connect(&address).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        exchange(stream, request, "text/plain")
    };
    assert!(parse(&ask("GET /metrics").2).contains_key("kvoyant_uptime_seconds"));
    let (status, _, body) = ask("GET /ready");
    let health: Health = serde_json::from_str(&body).unwrap();
    assert_eq!((status, health), (200, Health { ready: true, troubles: Vec::new() }));
    assert_eq!(ask("GET /health").0, 200);
    let bodies =
        ["GET /v1/status", "GET /v1/sequences", "POST /v1/sequences/suspend", "DELETE /v1/images/0/a"];
    for refused in bodies.into_iter().chain(["GET /", "PUT /v1/status", "GET /metrics/../v1/status"]) {
        let (status, _, body) = ask(refused);
        assert_eq!(status, 403, "{refused}: {body}");
        assert!(body.contains("ask the admin socket"), "{body}");
    }
    assert_eq!(ask("POST /metrics").0, 405);
    drop(daemon);
}

#[test]
fn an_address_that_other_machines_reach_is_refused_before_anything_starts() {
    let folder = tempfile::tempdir().unwrap();
    for (address, reason) in
        [("0.0.0.0:9464", "loopback"), ("192.0.2.1:1", "loopback"), ("9464", "with a port")]
    {
        let mut command = Daemon::command(DAEMON, folder.path(), &["--monitor", address]);
        let output = command.output().unwrap();
        let words = String::from_utf8_lossy(&output.stderr);
        assert!(!output.status.success() && words.contains(reason), "{address}: {words}");
    }
}
