//! Processes that stop, die, and leave others behind.

use std::io::{BufRead, BufReader};
use std::os::fd::AsFd;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use kvoyant_protocol::control::{SelectedBy, ToDaemon, encode};
use kvoyant_protocol::packet;
use kvoyant_tests::raw::Raw;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::handshake::{STEPS, leave_at};
use crate::stage::Stage;
use crate::{Attack, Outcome, Setup};

pub(super) fn table() -> Vec<Attack> {
    vec![
        Attack::passes("killed-at-every-step", "is killed at each step of the protocol", |stage| {
            for step in 0..STEPS {
                let mut child = role(stage, &format!("die-{step}"));
                let _ = child.wait();
            }
            Outcome::pass(format!("killed at {STEPS} steps"))
        }),
        Attack::passes(
            "killed-with-a-child",
            "is killed at each step, and a child of it has the socket",
            |stage| {
                // Before there is a session, the handshake's time limit ends it, which is too long to wait for here.
                let mut left = Vec::new();
                for step in 4..STEPS {
                    let mut child = role(stage, &format!("leave-{step}"));
                    left.push(first_line(&mut child));
                    let _ = child.wait();
                }
                let gone = sessions_end(stage);
                for child in left.into_iter().flatten() {
                    let _ = kill(child, Signal::SIGKILL);
                }
                if gone {
                    Outcome::pass("its sessions ended with it")
                } else {
                    Outcome::fail("its sessions go on")
                }
            },
        ),
        Attack::passes(
            "child-that-talks",
            "is killed, and a child of it goes on talking on the socket",
            |stage| {
                let mut child = role(stage, "talk");
                let talker = first_line(&mut child);
                let _ = child.kill();
                let _ = child.wait();
                let gone = sessions_end(stage);
                if let Some(talker) = talker {
                    let _ = kill(talker, Signal::SIGKILL);
                }
                if gone {
                    Outcome::pass("its session ended with it")
                } else {
                    Outcome::fail("its session goes on")
                }
            },
        ),
        Attack::passes(
            "child-that-reads-nothing",
            "is killed with all buffers full, and a child of it has the socket",
            |stage| {
                let mut child = role(stage, "stuff");
                let left = first_line(&mut child);
                let _ = child.kill();
                let _ = child.wait();
                let gone = sessions_end(stage);
                if let Some(left) = left {
                    let _ = kill(left, Signal::SIGKILL);
                }
                if gone {
                    Outcome::pass("its session ended with it")
                } else {
                    Outcome::fail("its session goes on")
                }
            },
        ),
        Attack::passes(
            "stopped-in-mid-request",
            "is stopped in the middle of its work, and goes on",
            |stage| {
                let mut child = role(stage, "work");
                first_line(&mut child);
                let pid = Pid::from_raw(child.id() as i32);
                for _ in 0..stage.many(5, 100) {
                    kill(pid, Signal::SIGSTOP).expect("a signal");
                    std::thread::sleep(Duration::from_millis(10));
                    kill(pid, Signal::SIGCONT).expect("a signal");
                    std::thread::sleep(Duration::from_millis(2));
                }
                let lives = matches!(child.try_wait(), Ok(None));
                let _ = child.kill();
                let _ = child.wait();
                if lives {
                    Outcome::pass("it was served on")
                } else {
                    Outcome::fail("it did not live through it")
                }
            },
        ),
        Attack::passes(
            "stopped-and-killed",
            "is stopped in the middle of its work, and never goes on",
            |stage| {
                let mut child = role(stage, "work");
                first_line(&mut child);
                kill(Pid::from_raw(child.id() as i32), Signal::SIGSTOP).expect("a signal");
                std::thread::sleep(Duration::from_millis(stage.many(20, 2_000) as u64));
                let _ = child.kill();
                let _ = child.wait();
                Outcome::pass("it is gone")
            },
        ),
        Attack::passes(
            "killed-while-it-suspends",
            "is killed while its sequence is written to an image",
            |stage| {
                for _ in 0..stage.many(3, 50) {
                    let mut child = role(stage, "suspend");
                    first_line(&mut child);
                    let _ = child.kill();
                    let _ = child.wait();
                }
                Outcome::pass("there is the old image or the new one")
            },
        )
        .on(Setup::Store),
        Attack::passes(
            "another-process-has-the-socket",
            "hands its socket on to a child, and goes in good order",
            |stage| {
                let mut child = role(stage, "hand-7");
                let left = first_line(&mut child);
                let _ = child.wait();
                let gone = sessions_end(stage);
                if let Some(left) = left {
                    let _ = kill(left, Signal::SIGKILL);
                }
                if gone {
                    Outcome::pass("who connected is who counts")
                } else {
                    Outcome::fail("its session goes on")
                }
            },
        ),
    ]
}

/// Whether every session but the neighbour's ends within a while.
fn sessions_end(stage: &Stage) -> bool {
    let since = std::time::Instant::now();
    while since.elapsed() < Duration::from_secs(8) {
        if kvoyant_daemon::admin::fetch_status(&stage.admin).is_ok_and(|status| status.totals.sessions == 1) {
            return true;
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    false
}

/// Another process of this program, in a role of [`play`]'s.
fn role(stage: &Stage, role: &str) -> Child {
    let me = std::env::current_exe().expect("this program");
    let mut command = Command::new(me);
    command.arg("role").arg(role).arg("--socket").arg(&stage.socket).arg("--admin").arg(&stage.admin);
    command.args(["--daemon-pid", &stage.daemon.to_string()]);
    command.stdout(Stdio::piped()).stderr(Stdio::inherit()).spawn().expect("a process")
}

/// What a process says first: that it is ready, or which child it has left.
fn first_line(child: &mut Child) -> Option<Pid> {
    let mut line = String::new();
    if let Some(stdout) = &mut child.stdout {
        let _ = BufReader::new(stdout).read_line(&mut line);
    }
    line.trim().parse().ok().map(Pid::from_raw)
}

/// Plays a part in an attack, as a process of its own.
///
/// # Panics
/// If there is no such part.
pub fn play(stage: &Stage, role: &str) {
    let die = || {
        let _ = kill(Pid::this(), Signal::SIGKILL);
    };
    match role.split_once('-') {
        Some(("die", step)) => leave_at(stage, step.parse().expect("a step"), |_| die()),
        Some(("leave", step)) => leave_at(stage, step.parse().expect("a step"), |socket| {
            println!("{}", heir(socket, "sleep", &["30"]));
            die();
        }),
        Some(("hand", step)) => leave_at(stage, step.parse().expect("a step"), |socket| {
            println!("{}", heir(socket, "sleep", &["30"]));
        }),
        _ => act(stage, role),
    }
}

fn act(stage: &Stage, role: &str) {
    match role {
        "talk" => {
            let (raw, _) = stage.session();
            println!("{}", talker(&raw));
            rest(&raw);
        }
        "stuff" => {
            let (raw, _) = stage.session();
            super::control::fill(
                &raw,
                &encode(&ToDaemon::Open { method: 0, tokens: 1, by: SelectedBy::Lane }),
            );
            println!("{}", heir(raw.as_fd(), "sleep", &["30"]));
            rest(&raw);
        }
        "work" => {
            println!("works");
            let _ = crate::reap::victim(&stage.socket, 3, false);
        }
        "suspend" => {
            let (mut raw, _) = stage.session();
            let sequence = raw.open(1 << 14);
            raw.push(&crate::stage::append(), &[crate::stage::entry(sequence, 0, 1 << 14)]);
            let image = "again".into();
            let suspend = ToDaemon::Suspend { sequence, image, overwrite: true, label: String::new() };
            let _ = packet::send(raw.as_fd(), &encode(&suspend), &[]);
            println!("ready");
            rest(&raw);
        }
        other => panic!("there is no part {other}"),
    }
}

/// Stays in a session until it is killed.
fn rest(_raw: &Raw) {
    std::thread::sleep(Duration::from_secs(30));
}

/// A child that has this socket, and outlives its parent for half a minute at most.
fn heir(socket: std::os::fd::BorrowedFd<'_>, program: &str, arguments: &[&str]) -> u32 {
    use nix::fcntl::{FcntlArg, FdFlag, fcntl};
    fcntl(socket, FcntlArg::F_SETFD(FdFlag::empty())).expect("a socket that children get");
    let mut child = Command::new(program);
    let child = child
        .args(arguments)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .expect("a child");
    let id = child.id();
    std::mem::forget(child);
    id
}

/// A child that sends a good message on this socket every few milliseconds.
fn talker(raw: &Raw) -> u32 {
    let me = std::env::current_exe().expect("this program");
    let socket: std::os::fd::OwnedFd = raw.as_fd().try_clone_to_owned().expect("a descriptor");
    let child = Command::new(me)
        .arg("talk")
        .stdin(Stdio::from(socket))
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .expect("a child");
    let id = child.id();
    std::mem::forget(child);
    id
}

/// Sends a good message on its standard input's socket every few milliseconds, for half a minute at most.
pub fn talk() {
    let message = encode(&ToDaemon::Close { sequences: Vec::new() });
    let socket = std::io::stdin();
    for _ in 0..15_000 {
        if packet::send(socket.as_fd(), &message, &[]).is_err() {
            return;
        }
        let _ = packet::receive(socket.as_fd());
        std::thread::sleep(Duration::from_millis(2));
    }
}
