//! What operators do with a daemon from the command line, and what the command line says of itself.

use std::process::Command;

use crate::common::{kvoyant, run};
use kvoyant_tests::Daemon;
use serde_json::Value;

const KVOYANT: &str = env!("CARGO_BIN_EXE_kvoyant");

/// Runs a command beside a daemon, and gives its exit code and what it said on either side.
fn beside(daemon: &Daemon, arguments: &[&str]) -> (Option<i32>, String, String) {
    run(Command::new(KVOYANT).args(arguments).arg("--admin").arg(daemon.admin()))
}

fn said(daemon: &Daemon, arguments: &[&str]) -> String {
    let (code, out, err) = beside(daemon, arguments);
    assert_eq!(code, Some(0), "{arguments:?}: {err}");
    out
}

fn json(daemon: &Daemon, arguments: &[&str]) -> Value {
    let all: Vec<&str> = arguments.iter().copied().chain(["--json"]).collect();
    serde_json::from_str(&said(daemon, &all)).unwrap()
}

fn refused(daemon: &Daemon, arguments: &[&str]) -> String {
    let (code, out, err) = beside(daemon, arguments);
    assert!(matches!(code, Some(1 | 2)) && out.is_empty(), "{arguments:?}: {code:?} {out} {err}");
    assert_eq!(err.matches("error: ").count(), 1, "{err}");
    err
}

#[test]
fn a_daemon_is_drained_and_takes_sessions_again() {
    let daemon = Daemon::serve(KVOYANT, &[]);
    assert!(said(&daemon, &["drain", "--show"]).starts_with("new sessions are taken; 0 sessions open"));
    assert!(said(&daemon, &["drain", "--wait", "5"]).contains("no new sessions are taken"));
    assert!(said(&daemon, &["status"]).contains("draining "));
    assert_eq!(json(&daemon, &["drain", "--show"]), serde_json::json!({"draining": true, "sessions": 0}));
    assert_eq!(json(&daemon, &["drain", "--undo"])["draining"], false);
    let client = kvoyant_tests::raw::Raw::socket(&daemon.socket());
    drop(client);
    assert!(refused(&daemon, &["drain", "--undo", "--wait", "3"]).contains("cannot be used with"));
}

#[test]
fn sessions_that_do_not_go_are_waited_for_as_long_as_was_said() {
    let daemon = Daemon::serve(KVOYANT, &[]);
    let model = kvoyant_tests::fake::connect(&daemon, &["full"]);
    let error = refused(&daemon, &["drain", "--wait", "0"]);
    assert!(error.contains("1 session left after 0 s"), "{error}");
    drop(model);
    assert!(said(&daemon, &["drain", "--wait", "30"]).contains("0 sessions open"));
}

#[test]
fn keys_are_shown_set_and_taken_back() {
    let daemon = Daemon::serve(KVOYANT, &["--max-sessions", "9"]);
    let all = said(&daemon, &["config"]);
    assert!(
        all.lines()
            .any(|line| line.starts_with("arena = ") && line.contains("# flag --arena; changes: restart")),
        "{all}"
    );
    assert_eq!(json(&daemon, &["config", "get", "max_sessions"])["max_sessions"]["value"], 9);
    let changed =
        said(&daemon, &["config", "set", "max_sessions=4", "quotas.host=1GiB", "quotas.user.0.sessions=3"]);
    assert!(changed.contains("max_sessions: 9 -> 4\n") && changed.contains("quotas: {} -> "), "{changed}");
    let quotas = &json(&daemon, &["config", "get", "quotas"])["quotas"];
    assert_eq!(quotas["value"], serde_json::json!({"host": 1 << 30, "user": {"0": {"sessions": 3}}}));
    said(&daemon, &["config", "set", "quotas.sessions=2"]);
    assert_eq!(json(&daemon, &["config"])["quotas"]["value"]["host"], 1 << 30, "the rest of the table stays");
    assert_eq!(json(&daemon, &["config", "unset", "max_sessions"])["changed"][0]["to"], "9");
    assert!(said(&daemon, &["config", "reload"]).contains("quotas: "));
    assert_eq!(said(&daemon, &["config", "reload"]), "nothing has changed\n");
    for (arguments, why) in [
        (&["config", "set", "arena=1GiB"][..], "cannot change while the daemon runs"),
        (&["config", "set", "max_session=1"], "did you mean `max_sessions`?"),
        (&["config", "set", "max_sessions"], "KEY=VALUE"),
        (&["config", "set"], "required"),
        (&["config", "get", "nothing"], "no key `nothing`"),
        (&["config", "set", "log.level=debug"], "`log.level`"),
    ] {
        let error = refused(&daemon, arguments);
        assert!(error.contains(why), "{arguments:?}: {error}");
    }
}

#[test]
fn the_log_is_shown_and_changed_and_what_leaves_memory_is_said() {
    let daemon = Daemon::serve(KVOYANT, &[]);
    assert_eq!(said(&daemon, &["log"]), "info\n");
    assert_eq!(said(&daemon, &["log", "debug"]), "debug\n");
    assert_eq!(json(&daemon, &["log"]), serde_json::json!({"filter": "debug", "dropped_lines": 0}));
    assert!(refused(&daemon, &["log", "a=b=c"]).contains("a=b=c"));
    assert!(said(&daemon, &["evict", "--all"]).starts_with("0 pages (0 B) left for the disk"));
    assert_eq!(json(&daemon, &["evict", "--all"])["pages"], 0);
    assert!(refused(&daemon, &["evict", "7"]).contains("there is no session 7, or not any more"));
    assert!(refused(&daemon, &["evict", "7", "x"]).contains("3.0"));
    assert!(refused(&daemon, &["evict"]).contains("--all"));
}

#[test]
fn every_command_that_says_something_says_it_as_json_too() {
    let home = tempfile::tempdir().unwrap();
    let (_, help, _) = run(kvoyant(home.path()).arg("--help"));
    let commands = help.lines().skip_while(|line| *line != "Commands:").skip(1);
    let commands: Vec<&str> = commands
        .take_while(|line| !line.is_empty())
        .filter_map(|line| line.split_whitespace().next())
        .collect();
    assert!(commands.len() > 15, "{help}");
    // These are no reports: a daemon, and text for shells and for `man`.
    let others = ["serve", "completions", "man", "help"];
    for command in commands.iter().filter(|command| !others.contains(*command)) {
        let parts: &[&[&str]] = match *command {
            "bench" => &[&["methods"], &["decode"], &["spill"]],
            "sequences" => &[&[], &["suspend"], &["resume"], &["rm"]],
            "config" => &[&[], &["get"], &["set"], &["unset"], &["reload"]],
            _ => &[&[]],
        };
        for part in parts {
            let (code, help, _) = run(kvoyant(home.path()).arg(command).args(*part).arg("--help"));
            assert!(code == Some(0) && help.contains("--json"), "{command} {part:?}: {help}");
        }
    }
}

#[test]
fn shells_get_completions_that_they_can_read() {
    let home = tempfile::tempdir().unwrap();
    for (shell, wanted) in [
        ("bash", "_kvoyant()"),
        ("zsh", "#compdef kvoyant"),
        ("fish", "complete -c kvoyant"),
        ("elvish", "kvoyant"),
        ("powershell", "kvoyant"),
    ] {
        let (code, out, err) = run(kvoyant(home.path()).args(["completions", shell]));
        assert!(
            code == Some(0) && out.contains(wanted) && out.contains("drain") && out.contains("max-tokens"),
            "{shell}: {err}"
        );
        let file = home.path().join(shell);
        std::fs::write(&file, out).unwrap();
        // Shells that are here read it without running anything.
        match Command::new(shell).arg("-n").arg(&file).output() {
            Ok(read) if ["bash", "zsh", "fish"].contains(&shell) => {
                assert!(read.status.success(), "{shell}: {}", String::from_utf8_lossy(&read.stderr));
            }
            _ => eprintln!("SKIPPED: there is no {shell} here to read its completions"),
        }
    }
    let (code, _, err) = run(kvoyant(home.path()).args(["completions", "tcsh"]));
    assert!(code == Some(2) && err.contains("tcsh"), "{err}");
}

#[test]
fn manual_pages_are_written_for_every_command_and_man_finds_no_fault_with_them() {
    let home = tempfile::tempdir().unwrap();
    let folder = home.path().join("man1");
    let (code, out, err) = run(kvoyant(home.path()).arg("man").arg(&folder));
    assert_eq!(code, Some(0), "{err}");
    let pages: Vec<&str> = out.lines().collect();
    for wanted in
        ["kvoyant.1", "kvoyantd.1", "kvoyant-drain.1", "kvoyant-config-set.1", "kvoyant-sequences-rm.1"]
    {
        assert!(pages.iter().any(|page| page.ends_with(wanted)), "{wanted}: {out}");
    }
    for page in pages {
        let text = std::fs::read_to_string(page).unwrap();
        assert!(text.contains(".TH ") && text.contains(".SH NAME"), "{page}");
        match Command::new("man")
            .args(["--warnings", "-E", "UTF-8", "-l"])
            .arg(page)
            .env("MANWIDTH", "100")
            .output()
        {
            Ok(read) => {
                let faults = String::from_utf8_lossy(&read.stderr);
                assert!(read.status.success() && faults.is_empty(), "{page}: {faults}");
                assert!(!read.stdout.is_empty(), "{page}");
            }
            Err(_) => {
                eprintln!("SKIPPED: there is no man here to read {page}");
            }
        }
    }
    let file = home.path().join("file");
    std::fs::write(&file, "").unwrap();
    let (code, _, err) = run(kvoyant(home.path()).arg("man").arg(file.join("x")));
    assert!(code == Some(1) && err.contains("manual pages"), "{err}");
}
