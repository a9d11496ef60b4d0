//! The whole way with a model made in memory: demo, run and status against real daemons.

use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use crate::common::{everything_below, kvoyant, run};

/// Whatever daemons of ours leave in the temporary folder.
fn left_behind(home: &Path) -> Vec<String> {
    everything_below(home).into_iter().filter(|path| path.starts_with("kvoyant-")).collect()
}

/// Waits until `done`, for at most 20 s.
fn wait_until(what: &str, mut done: impl FnMut() -> bool) {
    let since = Instant::now();
    while !done() {
        assert!(since.elapsed() < Duration::from_secs(20), "{what}");
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// A daemon that is killed with the test.
struct Daemon(Child);

impl Daemon {
    fn start(home: &Path) -> (Self, PathBuf, PathBuf) {
        let (socket, admin) = (home.join("d.sock"), home.join("a.sock"));
        let child = kvoyant(home)
            .args(["serve", "--config", "/dev/null", "--arena", "256MiB", "--slab", "8MiB", "--store"])
            .arg(home.join("images"))
            .arg("--socket")
            .arg(&socket)
            .arg("--admin-socket")
            .arg(&admin)
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        wait_until("the daemon did not start", || UnixStream::connect(&admin).is_ok() && socket.exists());
        (Self(child), socket, admin)
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn the_demo_prints_one_json_report_in_which_full_equals_dense_and_leaves_nothing() {
    let home = tempfile::tempdir().unwrap();
    let (code, out, err) =
        run(kvoyant(home.path()).args(["demo", "--model", "tiny", "--context", "512", "--json"]));
    assert_eq!(code, Some(0), "{err}");
    let report: serde_json::Value = serde_json::from_str(&out).expect("stdout is one JSON value");
    assert!(report["machine"]["cores"].as_u64().unwrap() > 0);
    let rows = report["rows"].as_array().unwrap();
    let names: Vec<&str> = rows.iter().map(|row| row["method"].as_str().unwrap()).collect();
    let wanted = [
        "dense",
        "full",
        "kvoyant",
        "kvoyant",
        "kvoyant",
        "infinigen",
        "infinigen",
        "infinigen",
        "infinigen-alpha",
        "quest",
        "quest",
        "quest",
        "window",
        "random",
    ];
    assert_eq!(names, wanted);
    let full = &rows[1];
    assert_eq!(full["tokens_equal_dense"], 1.0);
    assert!(full["kl_to_dense"].as_f64().unwrap().abs() < 1e-9, "{full}");
    assert!(full["attention_mass"].as_f64().unwrap() > 0.999, "{full}");
    for row in rows {
        for share in
            ["tokens_equal_dense", "attention_mass", "kv_moved_share", "stall_share", "resident_share"]
        {
            let value = row[share].as_f64().unwrap();
            assert!((0.0..=1.0 + 1e-6).contains(&value), "{share} of {row}");
        }
    }
    assert_eq!(left_behind(home.path()), Vec::<String>::new());
}

#[test]
fn the_demos_table_says_that_the_tiny_models_answers_mean_nothing() {
    let home = tempfile::tempdir().unwrap();
    let (code, out, err) =
        run(kvoyant(home.path()).args(["demo", "--model", "tiny", "--context", "512", "--in-place"]));
    assert_eq!(code, Some(0), "{err}");
    assert!(out.contains("infinigen 12 %") && out.contains("weights are random"), "{out}");
    assert!(out.lines().all(|line| line.chars().count() <= 110), "{out}");
    assert!(!out.contains('\x1b'));
}

#[test]
fn bench_decode_says_where_time_goes_and_keeps_a_pace() {
    let home = tempfile::tempdir().unwrap();
    let mut child = kvoyant(home.path())
        .args(["bench", "decode", "--model", "tiny", "--lengths", "96,200", "--rounds", "2", "--steps", "3"])
        .args([
            "--attention",
            "dense",
            "--attention",
            "full",
            "--in-place",
            "--selects",
            "lane",
            "--paced",
            "--json",
        ])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let (mut stdin, mut stdout) = (child.stdin.take().unwrap(), BufReader::new(child.stdout.take().unwrap()));
    for wanted in ["read", "round", "round", "read", "round", "round"] {
        stdin.write_all(b"\n").unwrap();
        let mut said = String::new();
        stdout.read_line(&mut said).unwrap();
        assert_eq!(said.trim(), wanted);
    }
    let mut out = String::new();
    stdout.read_to_string(&mut out).unwrap();
    assert!(child.wait().unwrap().success());
    let report: serde_json::Value = serde_json::from_str(&out).expect("what is left is one JSON value");
    assert!(report["machine"]["cores"].as_u64().unwrap() > 0 && report["threads"].as_u64().unwrap() > 0);
    let rows = report["rows"].as_array().unwrap();
    let wanted = [(96, "dense"), (96, "full"), (200, "dense"), (200, "full")];
    for (row, (length, attention)) in rows.iter().zip(wanted) {
        assert_eq!((row["length"].as_u64(), row["attention"].as_str()), (Some(length), Some(attention)));
        assert!(row["ms_per_token"].as_f64().unwrap() > 0.0, "{row}");
        assert_eq!(row["rounds_ms"].as_array().unwrap().len(), 2, "{row}");
        // Only the daemon is waited for, where it selects.
        assert_eq!(row["wait_ms"].as_f64().unwrap() > 0.0, attention == "full", "{row}");
    }
    assert_eq!(rows.len(), wanted.len());
    assert_eq!(left_behind(home.path()), Vec::<String>::new());
}

#[test]
fn bench_decode_refuses_texts_that_the_model_has_no_positions_for() {
    let home = tempfile::tempdir().unwrap();
    let (code, _, err) =
        run(kvoyant(home.path()).args(["bench", "decode", "--model", "tiny", "--lengths", "1000000"]));
    assert_eq!(code, Some(1));
    assert!(err.contains("positions"), "{err}");
}

/// What `run` answers with these arguments.
fn answer(home: &Path, arguments: &[&str]) -> String {
    answer_of(&mut kvoyant(home), home, arguments)
}

fn answer_of(command: &mut Command, home: &Path, arguments: &[&str]) -> String {
    let always = ["run", "--model", "tiny", "--max-tokens", "24", "--prompt"];
    let prompt = "The harbour was quiet. ".repeat(20);
    let (code, out, err) = run(command.args(always).arg(prompt).args(arguments));
    assert_eq!(code, Some(0), "{arguments:?}: {err}");
    assert_eq!(left_behind(home), Vec::<String>::new(), "{arguments:?}");
    out
}

#[test]
fn run_with_every_row_answers_as_dense_attention_does() {
    let home = tempfile::tempdir().unwrap();
    let dense = answer(home.path(), &["--attention", "dense"]);
    assert!(dense.len() > 1);
    assert_eq!(answer(home.path(), &["--method", "full"]), dense);
    // With as many threads as there are processors, too.
    let threads = |arguments: &[&str]| {
        answer_of(kvoyant(home.path()).env_remove("RAYON_NUM_THREADS"), home.path(), arguments)
    };
    assert_eq!(threads(&["--attention", "dense"]), dense);
    assert_eq!(threads(&["--method", "full", "--in-place"]), dense);
    assert_eq!(answer(home.path(), &["--method", "infinigen", "--budget", "100%"]), dense);
}

#[test]
fn run_speaks_to_a_daemon_that_is_there_and_status_shows_it() {
    let home = tempfile::tempdir().unwrap();
    let (_daemon, socket, admin) = Daemon::start(home.path());
    let dense = answer(home.path(), &["--attention", "dense"]);
    let through = answer(home.path(), &["--method", "full", "--socket", socket.to_str().unwrap()]);
    assert_eq!(through, dense);
    let (code, out, err) = run(kvoyant(home.path()).args(["status", "--json", "--admin"]).arg(&admin));
    assert_eq!(code, Some(0), "{err}");
    let status: serde_json::Value = serde_json::from_str(&out).unwrap();
    assert_eq!(status["totals"]["sequences"], 0, "the session has ended: {out}");
    let (code, out, _) = run(kvoyant(home.path()).args(["status", "--admin"]).arg(&admin));
    assert_eq!(code, Some(0));
    assert!(out.contains("arena") && out.contains("256.00 MiB"), "{out}");
}

#[test]
fn a_tenth_of_the_kv_in_host_memory_answers_as_all_of_it_does() {
    let home = tempfile::tempdir().unwrap();
    let all = answer(home.path(), &["--method", "full"]);
    for more in [&[][..], &["--in-place"]] {
        let arguments: Vec<&str> =
            ["--method", "full", "--host-budget", "10%"].iter().chain(more).copied().collect();
        assert_eq!(answer(home.path(), &arguments), all);
    }
    for bad in ["0", "101%", "many"] {
        let (code, _, err) = run(kvoyant(home.path()).args(["demo", "--host-budget", bad]));
        assert_eq!(code, Some(2));
        assert!(err.contains("10%"), "{err}");
    }
}

#[test]
fn prompts_that_begin_alike_share_their_rows_and_conversations_outlast_their_sessions() {
    let home = tempfile::tempdir().unwrap();
    let (_daemon, socket, _) = Daemon::start(home.path());
    let socket = socket.to_str().unwrap();
    let full = ["--method", "full", "--socket", socket];
    let plain = answer(home.path(), &full);
    let shared: Vec<&str> = full.iter().chain(&["--share-prefix", "own", "--stats"]).copied().collect();
    let prompt = "The harbour was quiet. ".repeat(20);
    let ask = |arguments: &[&str], prompt: &str| {
        let always = ["run", "--model", "tiny", "--max-tokens", "24", "--prompt", prompt];
        let (code, out, err) = run(kvoyant(home.path()).args(always).args(arguments));
        assert_eq!(code, Some(0), "{arguments:?}: {err}");
        (out, err)
    };
    let (first, said) = ask(&shared, &prompt);
    assert!(first == plain && said.contains("0 of "), "{said}");
    let (second, said) = ask(&shared, &prompt);
    assert_eq!(second, plain, "attached rows are the same rows");
    let attached: usize = said.split(" of ").next().unwrap().lines().last().unwrap().trim().parse().unwrap();
    assert!(attached >= 32, "{said}");

    let keep: Vec<&str> = full.iter().chain(&["--raw", "--suspend", "talk"]).copied().collect();
    let (_, _) = ask(&keep, "Once upon a time ");
    let go_on: Vec<&str> = keep.iter().chain(&["--resume", "talk"]).copied().collect();
    let (more, _) = ask(&go_on, "and then ");
    let (again, _) = ask(&go_on, "and then ");
    assert!(!more.is_empty() && !again.is_empty());
    // Many rows chosen behind a short prompt: there is room for their runs, whatever the image holds.
    let text = "Somebody has lived here before, and left a light on. ".repeat(60);
    let chosen = ["--method", "kvoyant:budget=40%", "--socket", socket, "--raw", "--suspend", "long"];
    ask(&chosen, &text);
    let (more, _) = ask(&[&chosen[..], &["--resume", "long"]].concat(), "and then ");
    assert!(!more.is_empty());
    let always = ["run", "--model", "tiny", "--max-tokens", "4", "--prompt", "x"];
    let (code, _, err) = run(kvoyant(home.path()).args(always).args(full).args(["--resume", "nothing"]));
    assert_eq!(code, Some(1));
    assert!(err.contains("nothing"), "{err}");
    let (code, _, err) = run(kvoyant(home.path()).args(always).args(["--suspend", "x"]));
    assert_eq!(code, Some(2), "{err}");
    assert!(err.contains("--socket"), "{err}");
}

#[test]
fn stats_go_to_stderr_and_the_answer_alone_to_stdout() {
    let home = tempfile::tempdir().unwrap();
    let arguments = ["run", "--model", "tiny", "--max-tokens", "8", "--prompt", "Hello", "--stats"];
    let (code, out, err) = run(kvoyant(home.path()).args(arguments));
    assert_eq!(code, Some(0), "{err}");
    assert!(!out.contains("attention"), "{out}");
    assert!(err.contains("mean") && err.contains("waiting for rows"), "{err}");
}

/// Starts an answer that would take long, and waits for its first piece.
fn long_answer(home: &Path) -> Child {
    let prompt = "The harbour was quiet. ".repeat(20);
    let mut child = kvoyant(home)
        .args([
            "run",
            "--model",
            "tiny",
            "--max-tokens",
            "30000",
            "--method",
            "full",
            "--raw",
            "--prompt",
            &prompt,
        ])
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let mut first = [0];
    child.stdout.as_mut().unwrap().read_exact(&mut first).unwrap();
    child
}

#[test]
fn an_interrupted_or_killed_run_takes_its_daemon_and_its_files_along() {
    let home = tempfile::tempdir().unwrap();
    for (signal, code) in [("-INT", Some(130)), ("-TERM", Some(143)), ("-KILL", None)] {
        let mut child = long_answer(home.path());
        assert!(!left_behind(home.path()).is_empty(), "there is a daemon's folder while it runs");
        assert!(Command::new("kill").args([signal, &child.id().to_string()]).status().unwrap().success());
        assert_eq!(child.wait().unwrap().code(), code, "{signal}");
        // A killed parent's daemon is ended by the kernel, a moment later.
        wait_until(signal, || left_behind(home.path()).is_empty());
    }
}
