//! The page for a browser: what comes with it, that it names nothing that the daemon does not give, and that it decides as `kvoyant top`.

use std::collections::BTreeSet;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::os::unix::net::UnixStream;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use kvoyant_tests::{Daemon, PATIENCE};
use sha2::{Digest, Sha256};

const DAEMON: &str = env!("CARGO_BIN_EXE_kvoyantd-under-test");
const LIMITS: &str = include_str!("../../../cli/src/top/limits.rs");

/// Sends a request, and gives status, head and body.
fn exchange(mut stream: impl Read + Write, request: &str) -> (u16, String, String) {
    let text = format!("{request} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n");
    stream.write_all(text.as_bytes()).unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    let (head, body) = answer.split_once("\r\n\r\n").unwrap();
    (head.split(' ').nth(1).unwrap().parse().unwrap(), head.to_owned(), body.to_owned())
}

fn get(daemon: &Daemon, path: &str) -> (u16, String, String) {
    exchange(UnixStream::connect(daemon.admin()).unwrap(), &format!("GET {path}"))
}

/// What lies between a tag's beginning and its end; the page has one of each.
fn inside<'a>(page: &'a str, tag: &str) -> &'a str {
    let (begin, end) = (format!("<{tag}>"), format!("</{tag}>"));
    assert_eq!(page.matches(&begin).count(), 1, "{tag}");
    page.split_once(&begin).unwrap().1.split_once(&end).unwrap().0
}

/// Every word of a text that begins in this way.
fn words<'a>(text: &'a str, prefix: &str) -> BTreeSet<&'a str> {
    let pieces = text.split(|c: char| !(c.is_ascii_lowercase() || c == '_'));
    pieces.filter(|word| word.starts_with(prefix) && word.len() > prefix.len()).collect()
}

#[test]
fn the_page_comes_with_a_policy_that_allows_its_own_style_and_script_and_nothing_else() {
    let daemon = Daemon::start(DAEMON, &[]);
    let (status, head, page) = get(&daemon, "/dashboard");
    assert_eq!(status, 200);
    assert!(page.starts_with("<!doctype html>"), "{page}");
    for header in [
        "content-type: text/html; charset=utf-8",
        "x-content-type-options: nosniff",
        "cache-control: no-store",
    ] {
        assert!(head.contains(header), "{header} is not in {head}");
    }
    let policy = head.lines().find_map(|line| line.strip_prefix("content-security-policy: ")).unwrap();
    assert!(policy.starts_with("default-src 'none'; ") && !policy.contains("unsafe"), "{policy}");
    assert!(policy.contains("connect-src 'self'") && policy.contains("frame-ancestors 'none'"), "{policy}");
    for tag in ["style", "script"] {
        let hash = STANDARD.encode(Sha256::digest(inside(&page, tag)));
        let wanted = format!("{tag}-src 'sha256-{hash}'");
        assert!(policy.contains(&wanted), "the page has changed: {wanted}");
    }
    // Attributes that a policy with hashes does not allow, and anything from elsewhere.
    for word in [" style=\"", "onclick", "onload", "http://", "https://", "@import", "url("] {
        let found = page.replace("http://www.w3.org/2000/svg", "");
        assert!(!found.contains(word), "{word}");
    }
    assert_eq!(exchange(UnixStream::connect(daemon.admin()).unwrap(), "POST /dashboard").0, 405);
}

#[test]
fn every_metric_that_the_page_reads_is_one_that_a_daemon_gives() {
    let folder = tempfile::tempdir().unwrap();
    let spill = folder.path().display().to_string();
    let daemon = Daemon::start(DAEMON, &["--spill", &spill, "--spill-bytes", "64MiB"]);
    let (_, _, page) = get(&daemon, "/dashboard");
    let (_, _, metrics) = get(&daemon, "/metrics");
    let script = inside(&page, "script");
    let given: BTreeSet<&str> = metrics
        .lines()
        .filter(|line| !line.starts_with('#'))
        .flat_map(|line| line.split(['{', ' ']).take(1))
        .collect();
    // Given with a GPU alone, and about a user who has had a session; both are tested where they are made.
    let rare = ["kvoyant_device_lost", "kvoyant_device_used_bytes", "kvoyant_device_size_bytes"];
    let by_user = words(script, "kvoyant_user_");
    let wanted = words(script, "kvoyant_");
    assert!(wanted.len() > 20, "{wanted:?}");
    let missing: Vec<_> = wanted
        .iter()
        .filter(|name| !given.contains(*name) && !rare.contains(*name) && !by_user.contains(*name))
        .collect();
    assert!(missing.is_empty(), "{missing:?}");
    // Labels, too.
    for label in ["version", "protocol", "device", "mode", "boot_id"] {
        assert!(
            metrics
                .lines()
                .any(|line| line.starts_with("kvoyant_build{") && line.contains(&format!("{label}=\"")))
        );
    }
    for label in [
        "stage=\"whole\"",
        "stage=\"select\"",
        "for=\"answer\"",
        "for=\"prefetch\"",
        "how=\"graph\"",
        "path=\"",
    ] {
        assert!(metrics.contains(label), "{label}");
    }
    // And those about users, once there is one.
    let held = kvoyant_tests::fake::connect(&daemon, &["full"]);
    let (_, _, metrics) = get(&daemon, "/metrics");
    for name in by_user {
        assert!(metrics.contains(&format!("\n{name}{{uid=\"")), "{name}");
    }
    drop(held);
}

#[test]
fn the_page_says_what_limits_by_the_shares_and_in_the_words_of_kvoyant_top() {
    let daemon = Daemon::start(DAEMON, &[]);
    let (_, _, page) = get(&daemon, "/dashboard");
    let script = inside(&page, "script");
    for name in ["FULL", "DISK_WAIT", "LANES_BUSY", "LINK_BUSY"] {
        let value = LIMITS.split_once(&format!("const {name}: f64 = ")).unwrap().1.split_once(';').unwrap().0;
        assert!(script.contains(&format!("{name} = {value}")), "{name} is {value}");
    }
    // What to turn: every string of that file that names a key.
    let turns: Vec<&str> =
        LIMITS.split('"').filter(|text| text.contains('`') && !text.contains('\n')).collect();
    assert!(turns.len() >= 6, "{turns:?}");
    for turn in turns {
        assert!(script.contains(turn), "{turn}");
    }
}

#[test]
fn over_tcp_the_page_is_there_with_what_it_reads() {
    let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let address = format!("127.0.0.1:{port}");
    let daemon = Daemon::start(DAEMON, &["--monitor", &address]);
    let ask = |path: &str| {
        let stream = TcpStream::connect(&address).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        exchange(stream, &format!("GET {path}"))
    };
    let page = ask("/dashboard");
    assert_eq!((page.0, ask("/metrics").0, ask("/ready").0), (200, 200, 200));
    assert_eq!(page.2, get(&daemon, "/dashboard").2);
}
