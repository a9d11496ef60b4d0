//! Metrics that no counter of a session has: deadlines by layer, what clients say of themselves, answers held against exact attention, what was
//! refused and who was reaped; and all of it as an OpenTelemetry collector gets it.

use std::io::{Read, Write};
use std::net::TcpListener;
use std::process::{Command, Stdio};
use std::time::Duration;

use kvoyant_client::{Error, Fallback, Hint, InTime, Member, Model, Sequence};
use kvoyant_protocol::control::ToClient;
use kvoyant_protocol::layout::c2d;
use kvoyant_protocol::wire::{Operation, Request, Speculate};
use kvoyant_tests::http::{self, metric};
use kvoyant_tests::raw::{self, Raw};
use kvoyant_tests::{Daemon, PATIENCE, fake, wait_until};
use serde_json::Value;

const DAEMON: &str = env!("CARGO_BIN_EXE_kvoyantd-under-test");
const CLIENT: &str = env!("CARGO_BIN_EXE_client-under-test");
const TOKENS: usize = 300;
/// Copies that do not end while a test lasts.
const NEVER: [&str; 2] = ["--shape-latency-us", "600000000"];

fn open(model: &Model) -> Sequence {
    let sequence = model.open(0, TOKENS).unwrap();
    fake::fill(model, &sequence, 1, TOKENS).unwrap();
    sequence
}

fn member<'a>(sequence: &'a Sequence, hint: Hint<'a>) -> Member<'a> {
    Member { sequence, position: sequence.tokens(), hint }
}

#[test]
fn answers_stand_before_or_after_their_deadline_by_layer() {
    let daemon = Daemon::start(DAEMON, &[]);
    let model = fake::connect(&daemon, &["full"]);
    let sequence = open(&model);
    let of = |name: &str, layer: usize| {
        metric(&daemon, &format!("kvoyant_deadline_{name}_seconds_count{{layer=\"{layer}\"}}"))
    };
    let ask = |layer: usize, within: Option<Duration>| {
        let members = [member(&sequence, Hint::None)];
        let pending = match within {
            Some(within) => model.speculate_within(layer, &members, within),
            None => model.speculate(layer, &members),
        };
        drop(pending.unwrap().wait(PATIENCE).unwrap());
    };
    ask(1, None);
    assert!(!http::metrics(&daemon).contains("kvoyant_deadline_slack"), "there was no deadline");
    ask(1, Some(Duration::from_secs(3)));
    ask(2, Some(Duration::from_secs(3)));
    ask(2, Some(Duration::ZERO));
    wait_until("three answers with deadlines", || of("slack", 1) + of("slack", 2) + of("overrun", 2) == 3.0);
    assert_eq!((of("slack", 1), of("overrun", 1)), (1.0, 0.0));
    assert_eq!(of("overrun", 2), 1.0, "a deadline that is now is past");
    assert_eq!(metric(&daemon, "kvoyant_deadline_misses_total{fallback=\"wait\"}"), 1.0);
    // What a session has seen stays when it has gone.
    drop((sequence, model));
    daemon.wait_for("no session", |status| status.totals.sessions == 0);
    assert_eq!((of("slack", 1), of("overrun", 2)), (1.0, 1.0));
    assert!(metric(&daemon, "kvoyant_session_time_seconds_total") > 0.0);
}

#[test]
fn what_clients_did_without_is_told_by_fallback_and_how_long_they_stood_still() {
    let daemon = Daemon::start(DAEMON, &NEVER);
    let model = fake::connect(&daemon, &["full"]);
    let sequence = open(&model);
    let ask = |fallback: Fallback, deadline: Duration| {
        let pending = model.speculate(1, &[member(&sequence, Hint::None)]).unwrap();
        pending.with_fallback(fallback, Duration::ZERO).or_late(deadline)
    };
    assert_eq!(metric(&daemon, "kvoyant_stall_seconds_total"), 0.0);
    assert!(matches!(ask(Fallback::Partial, PATIENCE), Ok(InTime::Late { .. })));
    assert!(matches!(ask(Fallback::Partial, PATIENCE), Ok(InTime::Late { .. })));
    assert!(matches!(ask(Fallback::ResidentOnly, PATIENCE), Ok(InTime::Late { .. })));
    assert!(matches!(ask(Fallback::Wait, Duration::from_millis(5)), Err(Error::Deadline { .. })));
    let misses = |fallback: &str| {
        metric(&daemon, &format!("kvoyant_deadline_misses_total{{fallback=\"{fallback}\"}}"))
    };
    wait_until("the client's own word", || misses("none") == 1.0);
    assert_eq!(
        (misses("partial"), misses("resident_only"), misses("wait"), misses("leave")),
        (2.0, 1.0, 0.0, 0.0)
    );
    assert!(metric(&daemon, "kvoyant_stall_seconds_total") >= 0.005, "it waited for so long at least");
}

#[test]
fn a_client_that_lies_about_itself_changes_no_more_than_can_be() {
    let daemon = Daemon::start(DAEMON, &[]);
    let raw = Raw::connect(&daemon.socket(), fake::spec(&["full"]));
    for word in 0..4 {
        raw.c2d.store_u64(c2d::TOLD + word * 8, u64::MAX);
    }
    let slots = f64::from(raw.layout.limits.ring_slots);
    wait_until("its word", || metric(&daemon, "kvoyant_stall_seconds_total") > 0.0);
    let open = metric(&daemon, "kvoyant_session_time_seconds_total");
    assert!(metric(&daemon, "kvoyant_stall_seconds_total") <= slots * (open + PATIENCE.as_secs_f64()));
    assert_eq!(
        metric(&daemon, "kvoyant_deadline_misses_total{fallback=\"none\"}"),
        0.0,
        "it has asked for nothing"
    );
}

#[test]
fn sampled_answers_are_held_against_exact_attention_and_what_is_selected_does_not_change() {
    let all = ["--check-every", "1"];
    // Sixteen of the 280 rows between sinks and window: the true best, by the layer's own query and by one that was predicted; and others.
    let methods = ["oracle:budget=16", "oracle:budget=16,hint=ahead", "random:budget=16"];
    // Keys grow by the token, so that attention falls off from the last one on, by less than a twentieth from row to row.
    let query = vec![1e-4; fake::QUERY_HEADS * fake::HEAD_DIM];
    let tokens = |daemon: &Daemon, method: &str| {
        let model = fake::connect(daemon, &[method]);
        let sequence = open(&model);
        let hint = if method.starts_with("oracle") { Hint::Query(&query) } else { Hint::None };
        let ready = fake::ask_with(&model, &sequence, 1, hint);
        let rows = |head| ready.tokens(0, head).map(|run| (run.token, run.rows)).collect::<Vec<_>>();
        (0..fake::KV_HEADS).flat_map(rows).collect::<Vec<_>>()
    };
    let plain = Daemon::start(DAEMON, &["--check-every", "0"]);
    for in_place in ["false", "true"] {
        let daemon = Daemon::start(DAEMON, &[all, ["--in-place", in_place]].concat());
        let check = |query: &str, rows: &str| {
            metric(&daemon, &format!("kvoyant_check_rows_total{{query=\"{query}\",rows=\"{rows}\"}}"))
        };
        let count =
            |query: &str| metric(&daemon, &format!("kvoyant_check_covered_ratio_count{{query=\"{query}\"}}"));
        for method in methods {
            assert_eq!(tokens(&daemon, method), tokens(&plain, method), "{method}");
        }
        wait_until("two comparisons", || count("true") + count("predicted") == 2.0);
        for query in ["true", "predicted"] {
            let (selected, needed, both) =
                (check(query, "selected"), check(query, "needed"), check(query, "both"));
            assert_eq!((count(query), selected), (1.0, 16.0), "{query}");
            assert!(needed > 16.0, "{query}: {needed}");
            // The best sixteen are all needed.
            assert_eq!(both, 16.0, "{query}: {needed}");
            let sum = metric(&daemon, &format!("kvoyant_check_covered_ratio_sum{{query=\"{query}\"}}"));
            assert!(sum > 0.2 && sum < 0.9, "{query}: {sum}");
        }
    }
    assert!(http::metrics(&plain).contains("kvoyant_check_covered_ratio_count{query=\"true\"} 0"));
}

#[test]
fn sessions_that_say_nothing_are_reaped_and_refused_descriptors_are_counted_by_what_was_wrong() {
    let daemon = Daemon::start(DAEMON, &[]);
    let ended = |how: &str| metric(&daemon, &format!("kvoyant_sessions_ended_total{{how=\"{how}\"}}"));
    drop(fake::connect(&daemon, &["full"]));
    wait_until("one that left", || ended("left") == 1.0);
    let mut child =
        Command::new(CLIENT).arg(daemon.socket()).arg("hold").stdout(Stdio::piped()).spawn().unwrap();
    daemon.wait_for("its sequences", |status| status.totals.sequences == 4);
    child.kill().unwrap();
    child.wait().unwrap();
    wait_until("one that was reaped", || ended("reaped") == 1.0);
    assert_eq!((ended("left"), ended("rejected")), (1.0, 0.0));

    let rejected =
        |why: &str| metric(&daemon, &format!("kvoyant_descriptors_rejected_total{{why=\"{why}\"}}"));
    let speculate = |layer: u16, ticket: u64| Request {
        release_through: 0,
        operation: Operation::Speculate(Speculate { layer, ..raw::speculate(ticket) }),
    };
    type Wrong<'a> = (&'a str, Box<dyn Fn(&mut Raw)>);
    let wrongs: [Wrong<'_>; 4] = [
        ("format", Box::new(|raw| raw.push_raw(&[0xff; 64], &[]))),
        ("order", Box::new(move |raw| raw.push(&speculate(1, 9), &[]))),
        ("contents", Box::new(move |raw| raw.push(&speculate(77, 1), &[]))),
        ("ring", Box::new(|raw| raw.publish(100_000))),
    ];
    for (times, (why, wrong)) in wrongs.iter().enumerate() {
        let mut raw = Raw::connect(&daemon.socket(), fake::spec(&["full"]));
        wrong(&mut raw);
        let heard = raw.hear();
        assert!(matches!(heard, Ok(ToClient::Failed(_))), "{why}: {heard:?}");
        wait_until("the end is counted", || ended("rejected") == (times + 1) as f64);
        assert_eq!(rejected(why), 1.0, "{why}");
    }
    assert_eq!(rejected("work"), 0.0);
}

#[test]
fn the_largest_free_region_is_given_of_everything_that_is_given_out() {
    let spill = tempfile::tempdir().unwrap();
    let spill = spill.path().display().to_string();
    let daemon = Daemon::start(DAEMON, &["--spill", &spill, "--spill-bytes", "64MiB"]);
    let largest = |of: &str| metric(&daemon, &format!("kvoyant_largest_free_bytes{{of=\"{of}\"}}"));
    assert_eq!((largest("arena"), largest("tables")), ((512u64 << 20) as f64, 0.0));
    assert!(largest("spill") > 0.0);
    let model = fake::connect(&daemon, &["full"]);
    let sequence = open(&model);
    drop(fake::ask(&model, &sequence, 1));
    wait_until("a session's files", || largest("tables") > 0.0);
    assert!(largest("arena") < (512u64 << 20) as f64);
    assert!(metric(&daemon, "kvoyant_tables_free_bytes") >= largest("tables"));
}

/// Takes one request, and answers it.
fn collect(listener: &TcpListener, answer: &str) -> (String, Value) {
    let (mut stream, _) = listener.accept().unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    let (mut bytes, mut part) = (Vec::new(), [0; 1 << 16]);
    loop {
        let text = String::from_utf8_lossy(&bytes).into_owned();
        if let Some((head, body)) = text.split_once("\r\n\r\n") {
            let length = head.to_lowercase();
            let length = length
                .split("content-length: ")
                .nth(1)
                .and_then(|rest| rest.lines().next()?.parse::<usize>().ok());
            if Some(body.len()) == length {
                stream.write_all(answer.as_bytes()).unwrap();
                return (head.to_owned(), serde_json::from_str(body).unwrap());
            }
        }
        let read = stream.read(&mut part).unwrap();
        assert!(read > 0, "it ends: {text}");
        bytes.extend_from_slice(&part[..read]);
    }
}

#[test]
fn an_opentelemetry_collector_gets_what_a_scrape_gets() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = format!("http://{}", listener.local_addr().unwrap());
    let daemon = Daemon::start(DAEMON, &["--otlp", &address]);
    let (head, body) = collect(&listener, "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}");
    assert!(head.starts_with("POST /v1/metrics HTTP/1.1"), "{head}");
    assert!(head.to_lowercase().contains("content-type: application/json"), "{head}");
    let resource = &body["resourceMetrics"][0];
    let named = resource["resource"]["attributes"].as_array().unwrap();
    assert!(
        named.iter().any(|one| one["key"] == "service.name" && one["value"]["stringValue"] == "kvoyantd")
    );
    let metrics = resource["scopeMetrics"][0]["metrics"].as_array().unwrap();
    let names: Vec<&str> = metrics.iter().map(|metric| metric["name"].as_str().unwrap()).collect();
    let text = http::metrics(&daemon);
    let scraped = text.lines().filter_map(|line| line.strip_prefix("# TYPE ")?.split(' ').next());
    // Names of counters have their ending in the older text only.
    let scraped: Vec<&str> = scraped.map(|name| name.strip_suffix("_total").unwrap_or(name)).collect();
    for name in &names {
        assert!(scraped.contains(&name.strip_suffix("_total").unwrap_or(name)), "{name}");
    }
    assert!(names.len() > 40, "{names:?}");
    let arena = metrics.iter().find(|metric| metric["name"] == "kvoyant_arena_size_bytes").unwrap();
    assert_eq!(arena["gauge"]["dataPoints"][0]["asDouble"], (512u64 << 20) as f64);
    assert_eq!(arena["unit"], "By");
}

#[test]
fn a_collector_that_refuses_or_is_not_there_is_told_of_and_the_daemon_goes_on() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = format!("http://{}", listener.local_addr().unwrap());
    let daemon = Daemon::start(DAEMON, &["--otlp", &address]);
    collect(&listener, "HTTP/1.1 400 Bad Request\r\nContent-Length: 8\r\n\r\nno room!");
    drop(fake::connect(&daemon, &["full"]));
    wait_until("a session has come and gone", || {
        metric(&daemon, "kvoyant_sessions_ended_total{how=\"left\"}") == 1.0
    });
    let (status, said) = daemon.end(nix::sys::signal::Signal::SIGTERM);
    assert!(status.success() && said.contains("takes no metrics: 400 Bad Request no room!"), "{said}");

    drop(listener);
    let daemon = Daemon::start(DAEMON, &["--otlp", &address]);
    drop(fake::connect(&daemon, &["full"]));
    wait_until("a session has come and gone", || {
        metric(&daemon, "kvoyant_sessions_ended_total{how=\"left\"}") == 1.0
    });
    let (status, said) = daemon.end(nix::sys::signal::Signal::SIGTERM);
    assert!(status.success() && said.contains("takes no metrics: "), "{said}");
    let folder = tempfile::tempdir().unwrap();
    let output = Daemon::command(DAEMON, folder.path(), &["--otlp", "https://far"]).output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.code() == Some(1) && said.contains("otlp = https://far"), "{said}");
}
