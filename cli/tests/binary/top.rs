//! `kvoyant top` beside a real daemon, where there is no terminal.

use std::process::Command;

use kvoyant_tests::{Daemon, wait_until};
use nix::sys::signal::{Signal, kill};

const KVOYANT: &str = env!("CARGO_BIN_EXE_kvoyant");

#[test]
fn without_a_terminal_one_look_is_printed_as_text_or_as_json() {
    let daemon = Daemon::serve(KVOYANT, &[]);
    let top = |more: &[&str]| {
        let output = Command::new(KVOYANT)
            .args(["top", "--interval", "0.1", "--admin"])
            .arg(daemon.admin())
            .args(more)
            .output();
        let output = output.unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap()
    };
    let text = top(&[]);
    assert!(
        text.contains("limit   none") && text.contains("0 % of 512.00 MiB") && !text.contains('\x1b'),
        "{text}"
    );
    let json: serde_json::Value = serde_json::from_str(&top(&["--json"])).unwrap();
    assert_eq!(json["limit"]["what"], "nothing");
    assert_eq!(json["rates"]["all"]["answers"], 0.0);
    assert_eq!(json["status"]["arena"]["total_bytes"], 512 << 20);
}

#[test]
fn the_daemon_is_asked_only_where_there_is_no_page() {
    let source = |flags: &[&str], interval: &str| {
        let daemon = Daemon::serve(KVOYANT, flags);
        let output = Command::new(KVOYANT)
            .args(["top", "--json", "--interval", interval, "--admin"])
            .arg(daemon.admin())
            .output()
            .unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        let json: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
        assert_eq!(json["status"]["arena"]["total_bytes"], 512 << 20);
        json["read_from"].as_str().unwrap().to_owned()
    };
    assert_eq!(source(&[], "1.5"), "stats-page");
    assert_eq!(source(&[], "0.1"), "admin-socket", "a page changes twice a second");
    assert_eq!(source(&["--stats-page", "false"], "1.5"), "admin-socket");
}

#[test]
fn a_daemon_that_is_not_there_and_an_interval_that_cannot_be_are_one_sentence() {
    let folder = tempfile::tempdir().unwrap();
    let output = Command::new(KVOYANT)
        .args(["top", "--once", "--admin"])
        .arg(folder.path().join("none"))
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.code() == Some(1) && said.contains("is kvoyantd running?"), "{said}");
    for bad in ["0", "-1", "nan", "100000"] {
        let output = Command::new(KVOYANT).args(["top", "--interval", bad]).output().unwrap();
        assert_eq!(output.status.code(), Some(2), "{bad}");
    }
}

#[test]
fn a_daemon_that_was_killed_is_not_shown_as_if_it_lived() {
    let daemon = Daemon::serve(KVOYANT, &[]);
    let top = || {
        let mut command = Command::new(KVOYANT);
        command.args(["top", "--once", "--interval", "1", "--admin"]).arg(daemon.admin()).output().unwrap()
    };
    let text = String::from_utf8(top().stdout).unwrap();
    assert!(text.lines().all(|line| !line.is_empty()), "{text}");
    kill(daemon.pid(), Signal::SIGKILL).unwrap();
    wait_until("its end", || std::os::unix::net::UnixStream::connect(daemon.admin()).is_err());
    let output = top();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.code() == Some(1) && said.contains("is kvoyantd running?"), "{said}");
}
