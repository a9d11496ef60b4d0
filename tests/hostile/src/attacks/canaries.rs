//! Attacks that must not end well: each shows that one kind of harm would be seen.

use std::os::fd::AsFd;

use kvoyant_protocol::packet;
use kvoyant_tests::raw::Raw;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::stage::Stage;
use crate::{Attack, Outcome};

pub(super) fn table() -> Vec<Attack> {
    vec![
        Attack::rejected(
            "canary-silent-daemon",
            "faces a daemon that takes connections and never answers",
            |stage| instead(stage, |_| std::thread::sleep(std::time::Duration::from_secs(3600))),
        ),
        Attack::rejected(
            "canary-wordless-daemon",
            "faces a daemon that closes and does not say why",
            |stage| instead(stage, drop),
        ),
        Attack::rejected("canary-no-attack", "does nothing wrong, and is to be refused", |stage| {
            let (mut raw, _) = stage.session();
            crate::stage::goes_on(&mut raw).map_or_else(Outcome::fail, |()| Outcome::pass("served"))
        }),
        Attack::passes("canary-kills-the-daemon", "kills the daemon", |stage| {
            kill(Pid::from_raw(stage.daemon), Signal::SIGKILL).expect("a signal");
            Outcome::pass("it is dead")
        }),
        Attack::passes(
            "canary-keeps-a-session",
            "leaves a process behind that has a session open",
            |stage| {
                let me = std::env::current_exe().expect("this program");
                let left = std::process::Command::new(me)
                    .arg("hold")
                    .arg(&stage.socket)
                    .stdout(std::process::Stdio::null())
                    .stderr(std::process::Stdio::null())
                    .spawn()
                    .expect("a process");
                kvoyant_tests::wait_until("its session", || {
                    kvoyant_daemon::admin::fetch_status(&stage.admin)
                        .is_ok_and(|status| status.totals.sessions > 1)
                });
                std::mem::forget(left);
                Outcome::pass("its child goes on")
            },
        ),
    ]
}

/// The first attack of all, on a stand-in that treats its connection like this.
fn instead(stage: &Stage, treats: fn(std::os::fd::OwnedFd)) -> Outcome {
    let folder = tempfile::tempdir().expect("a folder");
    let socket = folder.path().join("stand-in.sock");
    let listening = packet::listen_at(&socket, 0o600).expect("a socket");
    let listening = std::os::unix::net::UnixListener::from(listening);
    std::thread::spawn(move || {
        if let Ok((stream, _)) = listening.accept() {
            treats(stream.into());
        }
    });
    let client = Raw::socket(&socket);
    packet::send(client.as_fd(), b"nonsense", &[]).expect("a packet");
    let _ = stage;
    crate::stage::ended_socket(&client, "does not speak")
}
