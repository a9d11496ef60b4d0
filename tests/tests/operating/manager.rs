//! The daemon under a service manager: what it says of itself, and sockets that it is handed.

use std::os::fd::OwnedFd;
use std::os::unix::net::UnixListener;
use std::time::Duration;

use kvoyant_daemon::admin::fetch_status;
use kvoyant_tests::manager::{Manager, packet_socket, with_sockets};
use kvoyant_tests::{Daemon, words};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

const BINARY: &str = env!("CARGO_BIN_EXE_kvoyantd-under-test");

fn is(line: &'static str) -> impl Fn(&str) -> bool {
    move |heard| heard == line
}

#[test]
fn a_manager_hears_that_the_daemon_is_ready_how_it_is_that_it_lives_and_that_it_stops() {
    let mut manager = Manager::new();
    let folder = tempfile::tempdir().unwrap();
    let mut command = Daemon::command(BINARY, folder.path(), &[]);
    manager.supervise(&mut command, Some(Duration::from_secs(4)));
    let mut child = command.spawn().unwrap();
    let before = manager.wait_for("that it is ready", is("READY=1"));
    // Its sockets are there, and answer.
    let status = fetch_status(&folder.path().join("admin.sock")).unwrap();
    assert_eq!(status.totals.sessions, 0);
    assert!(folder.path().join("kvoyantd.sock").exists());
    assert!(before.iter().all(|line| line == "STATUS=starting" || line == "WATCHDOG=1"), "{before:?}");
    let line = "STATUS=0 sessions of 0 users, 0 B of 512.0 MiB in use";
    manager.wait_for("how it is", is(line));
    for _ in 0..3 {
        manager.wait_for("that it lives", is("WATCHDOG=1"));
    }
    kill(Pid::from_raw(child.id() as i32), Signal::SIGTERM).unwrap();
    manager.wait_for("that it stops", is("STOPPING=1"));
    let status = child.wait().unwrap();
    assert!(status.success(), "{status}: {}", words(&mut child));
}

#[test]
fn a_lane_that_stands_still_ends_the_pings_and_the_log_says_which() {
    let mut manager = Manager::new();
    let folder = tempfile::tempdir().unwrap();
    let mut command = Daemon::command(BINARY, folder.path(), &["--lanes", "2"]);
    manager.supervise(&mut command, Some(Duration::from_secs(8)));
    // Each lane has a command with the look at the start; the third one is what is asked below.
    command.env("KVOYANT_FAULTS", "wedge:3");
    let mut child = command.spawn().unwrap();
    manager.wait_for("that it is ready", is("READY=1"));
    manager.wait_for("that it lives", is("WATCHDOG=1"));
    // This one is never answered by one of the lanes.
    let admin = folder.path().join("admin.sock");
    let asks = std::thread::spawn(move || kvoyant_daemon::admin::fetch_sequences(&admin));
    let refused = asks.join().unwrap().unwrap_err().to_string();
    assert!(refused.contains("lanes did not answer within"), "{refused}");
    // What was on its way is read. Then nothing comes for longer than there is between two pings.
    while manager.next(Duration::from_millis(1)).is_some() {}
    let later = std::iter::from_fn(|| manager.next(Duration::from_secs(3))).take(100);
    let pings = later.filter(|line| line == "WATCHDOG=1").count();
    assert_eq!(pings, 0, "the lane does not move");
    child.kill().unwrap();
    child.wait().unwrap();
    let said = words(&mut child);
    assert!(said.contains("has stood still for") && said.contains("lane "), "{said}");
}

#[test]
fn a_daemon_serves_the_sockets_that_its_manager_made_and_leaves_them_there() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
    for names in [["control", "admin"], ["kvoyantd.socket", "kvoyantd.socket"]] {
        let control = packet_socket(&path("kvoyantd.sock"));
        let admin: OwnedFd = UnixListener::bind(path("admin.sock")).unwrap().into();
        let plain = Daemon::command(BINARY, folder.path(), &[]);
        let mut manager = Manager::new();
        let mut command = with_sockets(&plain, &[(names[0], &control), (names[1], &admin)]);
        manager.supervise(&mut command, None);
        let mut child = command.spawn().unwrap();
        // Whoever connects before the daemon is there is served once it is.
        let client = kvoyant_client::Client::connect(&path("kvoyantd.sock"), Default::default()).unwrap();
        assert_eq!(fetch_status(&path("admin.sock")).unwrap().totals.sessions, 1);
        manager.wait_for("that it is ready", is("READY=1"));
        drop(client);
        kill(Pid::from_raw(child.id() as i32), Signal::SIGTERM).unwrap();
        let status = child.wait().unwrap();
        assert!(status.success(), "{status}: {}", words(&mut child));
        assert!(path("kvoyantd.sock").exists() && path("admin.sock").exists(), "they are the manager's");
        assert!(!path("kvoyantd.sock.lock").exists());
        for name in ["kvoyantd.sock", "admin.sock"] {
            std::fs::remove_file(path(name)).unwrap();
        }
    }
}

#[test]
fn a_descriptor_that_is_no_such_socket_is_refused_with_what_to_do() {
    let folder = tempfile::tempdir().unwrap();
    let stream: OwnedFd = UnixListener::bind(folder.path().join("kvoyantd.sock")).unwrap().into();
    let plain = Daemon::command(BINARY, folder.path(), &[]);
    let mut child = with_sockets(&plain, &[("control", &stream)]).spawn().unwrap();
    let status = child.wait().unwrap();
    let said = words(&mut child);
    assert_eq!(status.code(), Some(1), "{said}");
    assert!(said.contains("`control`") && said.contains("ListenSequentialPacket="), "{said}");
}
