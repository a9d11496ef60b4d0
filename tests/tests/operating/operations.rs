//! What operators change while the daemon runs: its configuration, its log, who is let in, and what stays in memory.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
use std::time::Duration;

use kvoyant_client::{Client, Error, Hint, Member, Model, Options, Sequence};
use kvoyant_daemon::admin::{
    AdminError, ConfigPatch, EvictOrder, drain, evict, fetch_config, fetch_draining, fetch_log, fetch_status,
    reload_config, set_config, set_log,
};
use kvoyant_protocol::control::Failure;
use kvoyant_tests::manager::Manager;
use kvoyant_tests::{Daemon, PATIENCE, fake, http, wait_until, words};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::{Value, json};

const DAEMON: &str = env!("CARGO_BIN_EXE_kvoyantd-under-test");
/// Pages of 32 rows: 94 of each head.
const TOKENS: usize = 3000;

fn patch(key: &str, value: Value) -> ConfigPatch {
    ConfigPatch::from([(key.to_owned(), value)])
}

fn refused<T: std::fmt::Debug>(result: Result<T, AdminError>) -> (u16, String) {
    match result {
        Err(AdminError::Refused { status, reason }) => (status, reason),
        other => panic!("{other:?} is no refusal"),
    }
}

/// Sends a request over any stream; the status and the body.
fn exchange(stream: impl Read + Write, request: &str, headers: &str, body: &str) -> (u16, String) {
    let answer = http::exchange(stream, request, headers, body.as_bytes());
    (answer.status, answer.body)
}

fn ask(admin: &Path, request: &str, body: &str) -> (u16, String) {
    exchange(UnixStream::connect(admin).unwrap(), request, "", body)
}

fn connect(daemon: &Daemon) -> Result<Client, Error> {
    Client::connect(&daemon.socket(), Options::default())
}

/// A daemon with a configuration file, whose manager listens.
struct Configured {
    child: Child,
    manager: Manager,
    folder: tempfile::TempDir,
}

impl Configured {
    fn start(text: &str) -> Self {
        let (folder, mut manager) = (tempfile::tempdir().unwrap(), Manager::new());
        let file = folder.path().join("kvoyantd.toml");
        std::fs::write(&file, text).unwrap();
        let mut command = Daemon::command(DAEMON, folder.path(), &["--config", file.to_str().unwrap()]);
        manager.supervise(&mut command, None);
        let child = command.spawn().unwrap();
        manager.wait_for("that it is ready", |line| line == "READY=1");
        Self { child, manager, folder }
    }

    fn admin(&self) -> PathBuf {
        self.folder.path().join("admin.sock")
    }

    fn write(&self, text: &str) {
        std::fs::write(self.folder.path().join("kvoyantd.toml"), text).unwrap();
    }

    /// Has it read its file again, as `systemctl reload` does, and waits until it says that it has.
    fn reload(&mut self) {
        kill(Pid::from_raw(self.child.id() as i32), Signal::SIGHUP).unwrap();
        self.manager.wait_for("that it reloads", |line| line == "RELOADING=1");
        self.manager.wait_for("at which time", |line| line.starts_with("MONOTONIC_USEC="));
        self.manager.wait_for("that it has", |line| line == "READY=1");
    }

    fn end(mut self) -> String {
        kill(Pid::from_raw(self.child.id() as i32), Signal::SIGTERM).unwrap();
        assert!(self.child.wait().unwrap().success());
        words(&mut self.child)
    }
}

impl Drop for Configured {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[test]
fn a_hangup_has_the_file_read_again_and_the_log_says_what_changed_and_what_waits() {
    let mut daemon = Configured::start("max_sessions = 1\nslab = \"8MiB\"\n");
    let socket = daemon.folder.path().join("kvoyantd.sock");
    let first = Client::connect(&socket, Options::default()).unwrap();
    assert!(Client::connect(&socket, Options::default()).is_err(), "one place");
    daemon.write("max_sessions = 2\nslab = \"9MiB\"\nspin_us = 7\nlog = \"info,kvoyant_daemon=debug\"\n[quotas]\nsessions = 2\n");
    daemon.reload();
    assert_eq!(fetch_log(&daemon.admin()).unwrap().filter, "info,kvoyant_daemon=debug");
    let second = Client::connect(&socket, Options::default()).unwrap();
    let config = fetch_config(&daemon.admin()).unwrap();
    assert_eq!((&config["max_sessions"].value, &config["slab"].value), (&json!(2), &json!(9 << 20)));
    assert!(config["slab"].from.starts_with("file /") && config["slab"].changes == "new sessions");
    assert_ne!(config["spin_us"].value, 7);
    let quota = |admin: &Path| {
        fetch_status(admin).unwrap().users[0].uses.values().map(|used| used.limit).collect::<Vec<_>>()
    };
    assert!(quota(&daemon.admin()).contains(&Some(2)), "the user who is there hears of it");
    // A file that is wrong changes nothing.
    daemon.write("max_sesions = 3\n");
    daemon.reload();
    assert_eq!(fetch_config(&daemon.admin()).unwrap(), config);
    // Fewer places than there are sessions end none.
    daemon.write("max_sessions = 1\n");
    daemon.reload();
    drop(second);
    let again = Client::connect(&socket, Options::default());
    assert!(again.is_err(), "the first one has the only place");
    drop(first);
    wait_until("a place", || Client::connect(&socket, Options::default()).is_ok());
    let said = daemon.end();
    for wanted in [
        "max_sessions: 1 -> 2",
        "slab: \"8MiB\" -> \"9MiB\"",
        "-> 7 waits for a restart",
        "the configuration stays as it was: bad configuration: there is no key `max_sesions`",
        "did you mean `max_sessions`?",
    ] {
        assert!(said.contains(wanted), "{wanted}: {said}");
    }
}

#[test]
fn an_operator_sets_keys_until_the_next_reload_and_what_cannot_be_is_refused() {
    let daemon = Daemon::start(DAEMON, &["--max-sessions", "3"]);
    let admin = daemon.admin();
    let changed = set_config(&admin, &patch("max_sessions", json!(1))).unwrap();
    assert_eq!((changed.changed[0].from.as_str(), changed.changed[0].to.as_str()), ("3", "1"));
    assert_eq!(fetch_config(&admin).unwrap()["max_sessions"].from, "operator");
    let one = connect(&daemon).unwrap();
    assert!(connect(&daemon).is_err());
    let changed = reload_config(&admin).unwrap();
    assert_eq!((changed.changed.len(), changed.waiting.len()), (1, 0));
    assert_eq!(fetch_config(&admin).unwrap()["max_sessions"].from, "flag --max-sessions");
    let two = connect(&daemon).unwrap();
    drop((one, two));
    for (key, value, status, said) in [
        ("arena", json!("1GiB"), 409, "restart"),
        ("max_session", json!(1), 400, "did you mean `max_sessions`?"),
        ("max_sessions", json!(0), 400, "at least 1"),
        ("max_sessions", json!("many"), 400, "bad value"),
        ("host_percent", json!(10), 400, "`spill`"),
        ("log", json!("a=b=c"), 400, "log = a=b=c"),
        ("log", json!("infoo"), 400, "`infoo` is no level: write one of error, warn"),
        ("log", json!(""), 400, "it is empty"),
        ("allow_users", json!(["nobody-of-that-name"]), 400, "no user `nobody-of-that-name`"),
    ] {
        let (found, why) = refused(set_config(&admin, &patch(key, value.clone())));
        assert!(found == status && why.contains(said), "{key} {value}: {found} {why}");
    }
    assert_eq!(ask(&admin, "PATCH /v1/config", "[]").0, 400);
    assert_eq!(fetch_config(&admin).unwrap()["max_sessions"].value, 3);
}

#[test]
fn what_is_logged_changes_while_the_daemon_runs() {
    let daemon = Daemon::start(DAEMON, &["--log", "warn"]);
    assert_eq!(fetch_log(&daemon.admin()).unwrap().filter, "warn");
    drop(connect(&daemon).unwrap());
    let now = set_log(&daemon.admin(), "info").unwrap();
    assert_eq!((now.filter.as_str(), now.dropped_lines), ("info", 0));
    drop(Client::connect(&daemon.socket(), Options { name: "seen".into(), ..Options::default() }).unwrap());
    daemon.wait_for("no session", |status| status.totals.sessions == 0);
    let (status, why) = refused(set_log(&daemon.admin(), "kvoyant=loud"));
    assert!(status == 400 && why.contains("kvoyant=loud"), "{why}");
    assert_eq!(ask(&daemon.admin(), "PUT /v1/log", "{\"level\": \"info\"}").0, 400);
    let (_, said) = daemon.end(Signal::SIGTERM);
    assert_eq!(said.matches("session began").count(), 1, "{said}");
    assert!(said.contains("client=\"seen\""), "{said}");
}

#[test]
fn what_comes_out_says_where_each_value_came_from_and_misspelt_keys_what_was_meant() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("kvoyantd.toml");
    let check = |text: &str, more: &[&str]| {
        std::fs::write(&file, text).unwrap();
        let flags = [&["--config", file.to_str().unwrap()], more].concat();
        let mut command = Daemon::command(DAEMON, folder.path(), &flags);
        command.stdout(Stdio::piped()).env("KVOYANT_MAX_SESSIONS", "3").env("KVOYANT_SPILL", "[\"/a\"]");
        let output = command.output().unwrap();
        let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
        (output.status.code(), text(output.stdout), text(output.stderr))
    };
    let (code, said, error) = check("max_sessions = 2\nkeep = 3.0\nhost_percent = 50.0\n", &["--check"]);
    assert_eq!(code, Some(0), "{error}");
    for (value, origin) in [
        ("max_sessions = 3 ", "# environment KVOYANT_MAX_SESSIONS"),
        ("spill = [\"/a\"] ", "# environment KVOYANT_SPILL"),
        ("keep = 3.0 ", "# file "),
        ("socket = ", "# flag --socket"),
        ("copy_threads = 1 ", "# default"),
    ] {
        let line = said.lines().find(|line| line.starts_with(value));
        assert!(line.is_some_and(|line| line.contains(origin)), "{value} {origin}: {said}");
    }
    // What is printed is a configuration that gives the same.
    let (code, again, error) = check(&said, &["--check"]);
    assert_eq!(code, Some(0), "{error}");
    let values = |text: &str| {
        text.lines().map(|line| line.split(" #").next().unwrap().trim_end().to_owned()).collect::<Vec<_>>()
    };
    assert_eq!(values(&again), values(&said));
    let (code, said, _) = check("keep = 3.0\n", &["--check=json"]);
    let json: Value = serde_json::from_str(&said).unwrap();
    assert_eq!((code, &json["max_sessions"]["value"]), (Some(0), &json!(3)), "{said}");
    for (text, more, wanted) in [
        ("areena = \"1GiB\"\n", &["--check"][..], "did you mean `arena`?"),
        ("bandwidth = 3\n", &["--check"], "kvoyantd --print-config"),
        ("keep = \"much\"\n", &["--check"], "bad configuration"),
        ("[quotas]\nhots = 3\n", &["--check"], "did you mean `host`?"),
        ("", &["--check=xml"], "xml"),
        ("prefixes = -1\n", &["--check"], "prefixes (file "),
        ("lane_cpus = 3\n", &["--check"], "must be a list"),
        ("lanes = \n", &["--check"], "kvoyantd.toml: "),
        ("", &["--allow-users", ",,", "--check"], "allow_users.0 (flag --allow-users): "),
        ("", &["--config", "/", "--check"], "configuration file /: "),
        ("log = \"infoo\"\n", &["--check"], "`infoo` is no level"),
        ("spill = [\"/nonexistent/a\"]\n", &["--spill", "/nonexistent/a", "--check"], "make the folder"),
        ("store = \"/a\"\nremote = \"ftp://x\"\n", &["--check"], "remote = "),
    ] {
        let (code, said, error) = check(text, more);
        assert!(
            code != Some(0) && said.is_empty() && error.contains(wanted),
            "{text}: {code:?} {said} {error}"
        );
    }
}

#[test]
fn a_reader_that_has_seen_enough_is_no_error() {
    for what in ["--check", "--print-config"] {
        let folder = tempfile::tempdir().unwrap();
        let (reader, writer) = std::io::pipe().unwrap();
        drop(reader);
        let mut command = Daemon::command(DAEMON, folder.path(), &[what]);
        let output = command.stdout(writer).output().unwrap();
        let said = String::from_utf8(output.stderr).unwrap();
        assert!(output.status.success() && !said.contains("pipe"), "{what}: {:?} {said}", output.status);
    }
}

#[test]
fn a_daemon_with_a_transfer_on_a_slow_link_ends_without_it() {
    let daemon = Daemon::start(DAEMON, &["--shape-latency-us", "600000000"]);
    let model = fake::connect(&daemon, &["full"]);
    let sequence = model.open(0, 0).unwrap();
    model.reserve(&[(&sequence, 100)]).unwrap();
    fake::fill(&model, &sequence, 1, 100).unwrap();
    let member = Member { sequence: &sequence, position: 100, hint: Hint::None };
    let pending = model.speculate(1, &[member]).unwrap();
    assert!(pending.wait(Duration::from_millis(300)).is_err(), "nothing comes over this link");
    kill(daemon.pid(), Signal::SIGTERM).unwrap();
    assert!(daemon.wait().0.success());
}

#[test]
fn lines_of_json_have_level_message_and_fields() {
    let daemon = Daemon::start(DAEMON, &["--log-format", "json"]);
    drop(connect(&daemon).unwrap());
    daemon.wait_for("no session", |status| status.totals.sessions == 0);
    let (_, said) = daemon.end(Signal::SIGTERM);
    let lines: Vec<Value> = said.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let began = lines.iter().find(|line| line["message"] == "session began").unwrap();
    assert!(began["level"] == "INFO" && began["session"] == 1 && began["timestamp"].is_string(), "{began}");
}

#[test]
fn a_daemon_that_is_drained_serves_those_who_are_there_and_nobody_else_until_that_is_undone() {
    let daemon = Daemon::start(DAEMON, &[]);
    let admin = daemon.admin();
    let model = fake::connect(&daemon, &["full"]);
    let sequence = model.open(0, 300).unwrap();
    assert_eq!(ask(&admin, "GET /ready", "").0, 200);
    // Somebody who means something else drains nobody.
    let (status, body) = ask(&admin, "POST /v1/drain", r#"{"undo":true}"#);
    assert!(status == 400 && body.contains("takes none"), "{status} {body}");
    assert!(!fetch_draining(&admin).unwrap().draining);
    let report = drain(&admin, true).unwrap();
    assert!(report.draining && report.sessions == 1);
    assert!(matches!(connect(&daemon), Err(Error::Failed(Failure::Draining))), "{:?}", connect(&daemon));
    fake::fill(&model, &sequence, 1, 300).unwrap();
    fake::check(&fake::ask(&model, &sequence, 1), 0, 1, 1).unwrap();
    let (status, body) = ask(&admin, "GET /ready", "");
    assert!(status == 503 && body.contains("being drained"), "{status} {body}");
    assert_eq!(ask(&admin, "GET /health", "").0, 200, "it lives");
    assert!(fetch_status(&admin).unwrap().draining && fetch_draining(&admin).unwrap().draining);
    assert!(!drain(&admin, false).unwrap().draining);
    assert_eq!(ask(&admin, "POST /v1/drain", "{}").0, 200);
    assert_eq!(ask(&admin, "DELETE /v1/drain", "{}").0, 200);
    connect(&daemon).unwrap();
    assert_eq!(ask(&admin, "GET /ready", "").0, 200);
}

fn fill(model: &Model, sequence: &Sequence, seed: usize) {
    while sequence.tokens() < TOKENS {
        let end = (sequence.tokens() + 100).min(TOKENS);
        model.reserve(&[(sequence, end)]).unwrap();
        fake::fill(model, sequence, seed, end).unwrap();
    }
}

fn check(model: &Model, sequence: &Sequence, seed: usize) {
    for layer in 1..fake::LAYERS {
        let member = Member { sequence, position: sequence.tokens(), hint: Hint::None };
        let ready = model.speculate(layer, &[member]).unwrap().wait(PATIENCE).unwrap();
        assert!(fake::check(&ready, 0, seed, layer).unwrap() > 0);
    }
}

#[test]
fn pages_that_an_operator_evicts_are_on_disk_alone_and_come_back_as_they_were() {
    let spill = tempfile::tempdir().unwrap();
    let spill = spill.path().display().to_string();
    let daemon = Daemon::start(DAEMON, &["--spill", &spill, "--spill-bytes", "256MiB"]);
    let admin = daemon.admin();
    let model = fake::connect(&daemon, &["full"]);
    let (one, two) = (model.open(0, 0).unwrap(), model.open(0, 0).unwrap());
    fill(&model, &one, 1);
    fill(&model, &two, 2);
    let fork = two.fork(None).unwrap();
    let all = daemon.wait_for("all rows", |status| status.totals.pages >= 2 * 94 * 6).totals.pages;
    let order = EvictOrder { session: Some(1), sequence: Some(one.id().to_string()) };
    let report = evict(&admin, &order).unwrap();
    assert!(report.pages > 80 * 6 && report.pages < 94 * 6 && !report.unfinished, "{report:?}");
    assert_eq!(report.page_bytes, report.pages * daemon.status().sessions[0].page_bytes);
    let status = daemon.status();
    assert_eq!(status.sessions[0].spilled_pages, report.pages);
    assert_eq!(status.totals.pages, all - report.pages);
    check(&model, &one, 1);
    let report = evict(&admin, &EvictOrder { session: Some(1), sequence: None }).unwrap();
    assert!(report.pages > 80 * 6, "{report:?}");
    // Answers that were just let go of are known to be a moment later.
    wait_until("all to leave that can", || evict(&admin, &EvictOrder::default()).unwrap().pages == 0);
    check(&model, &two, 2);
    check(&model, &fork, 2);
    check(&model, &one, 1);
    drop((one, fork, two));
    daemon.wait_for("no pages", |status| status.totals.pages == 0);
    let used = daemon.status().arena.used_bytes;
    assert!(used > 0, "a session keeps its extents");
    let mut back = 0;
    wait_until("unused extents to go back", || {
        back += evict(&admin, &EvictOrder { session: Some(1), sequence: None }).unwrap().extent_bytes;
        daemon.status().arena.used_bytes == 0
    });
    assert_eq!(back, used);
    let again = model.open(0, 0).unwrap();
    fill(&model, &again, 4);
    check(&model, &again, 4);
    for (order, status) in [
        (EvictOrder { session: Some(99), sequence: None }, 404),
        (EvictOrder { session: Some(1), sequence: Some("77.1".into()) }, 404),
        (EvictOrder { session: Some(1), sequence: Some("x".into()) }, 400),
        (EvictOrder { session: None, sequence: Some("0.0".into()) }, 400),
    ] {
        assert_eq!(refused(evict(&admin, &order)).0, status, "{order:?}");
    }
}

#[test]
fn over_tcp_the_token_opens_everything_and_nothing_else_does() {
    let folder = tempfile::tempdir().unwrap();
    let token = folder.path().join("token");
    std::fs::write(&token, "a-token-that-nobody-guesses\n").unwrap();
    std::fs::set_permissions(&token, std::fs::Permissions::from_mode(0o600)).unwrap();
    let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().to_string();
    let daemon = Daemon::start(DAEMON, &["--monitor", &port, "--monitor-token", token.to_str().unwrap()]);
    let over_tcp =
        |request: &str, headers: &str| exchange(TcpStream::connect(&port).unwrap(), request, headers, "");
    assert_eq!(over_tcp("GET /health", "").0, 200);
    for headers in [
        "",
        "Authorization: Bearer wrong-token-wrong-token\r\n",
        "Authorization: a-token-that-nobody-guesses\r\n",
    ] {
        for request in ["GET /v1/status", "GET /v1/config", "POST /v1/drain"] {
            let (status, why) = over_tcp(request, headers);
            assert!(status == 403 && why.contains("monitor_token"), "{request} {headers}: {status} {why}");
        }
    }
    let right = "Authorization: Bearer a-token-that-nobody-guesses\r\n";
    assert_eq!(over_tcp("GET /v1/status", right).0, 200);
    assert_eq!(over_tcp("POST /v1/drain", right).0, 200);
    assert!(daemon.status().draining);
    let (_, said) = daemon.end(Signal::SIGTERM);
    assert!(said.contains("whoever has the token has the daemon take no new sessions"), "{said}");
    assert!(!said.contains("nobody-guesses"), "{said}");
    // One that others may read is none.
    std::fs::set_permissions(&token, std::fs::Permissions::from_mode(0o644)).unwrap();
    let flags = ["--monitor", &port, "--monitor-token", token.to_str().unwrap()];
    let output = Daemon::command(DAEMON, folder.path(), &flags).output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.code() == Some(1) && said.contains("chmod 600"), "{said}");
}

#[test]
fn a_log_that_nobody_reads_holds_up_nobody_and_what_is_dropped_is_counted() {
    let folder = tempfile::tempdir().unwrap();
    let mut command = Daemon::command(DAEMON, folder.path(), &["--log", "trace"]);
    let mut child = command.spawn().unwrap();
    let admin = folder.path().join("admin.sock");
    wait_until("its sockets", || folder.path().join("kvoyantd.sock").exists());
    // Every refusal is a line; a pipe has room for 64 KiB of them, and the queue for some thousands.
    let mut answered = 0;
    wait_until("lines that are dropped", || {
        for _ in 0..200 {
            assert_eq!(ask(&admin, "GET /v1/nothing", "").0, 404);
            answered += 1;
        }
        fetch_log(&admin).unwrap().dropped_lines > 0
    });
    assert!(answered > 0);
    let (_, body) = ask(&admin, "GET /health", "");
    assert!(body.contains("lines of the log were dropped"), "{body}");
    let text = ask(&admin, "GET /metrics", "").1;
    assert!(text.contains("kvoyant_log_lines_dropped_total"), "{text}");
    drop(Client::connect(&folder.path().join("kvoyantd.sock"), Options::default()).unwrap());
    // Somebody reads a little, and hears of it.
    let mut lines = BufReader::new(child.stderr.take().unwrap());
    let mut line = String::new();
    wait_until("what is said of it", || {
        line.clear();
        lines.read_line(&mut line).unwrap();
        line.contains("nobody read the log for a while")
    });
    // And then nobody again; it ends all the same.
    for _ in 0..500 {
        assert_eq!(ask(&admin, "GET /v1/nothing", "").0, 404);
    }
    kill(Pid::from_raw(child.id() as i32), Signal::SIGTERM).unwrap();
    let mut ended = None;
    wait_until("its end", || {
        ended = child.try_wait().unwrap();
        ended.is_some()
    });
    assert!(ended.unwrap().success());
}
