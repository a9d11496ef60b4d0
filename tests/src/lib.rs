//! What the cross-process tests share: a daemon in a process of its own, on sockets in a temporary folder.

pub mod fake;
pub mod faults;
pub mod going_on;
pub mod http;
pub mod later;
pub mod manager;
pub mod noisy;
pub mod person;
pub mod raw;
pub mod softcuda;
pub mod struck;
pub mod supervisor;

use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use kvoyant_daemon::status::StatusReport;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

/// Whether tests are to go through every combination, as `scripts/ci-long` has them.
#[must_use]
pub fn thorough() -> bool {
    std::env::var_os("KVOYANT_THOROUGH").is_some_and(|value| !value.is_empty())
}

/// Has this thread compute alone from here on. A step is one piece of work of the pool's: threads of tests side by side would take up one
/// another's, and wait within them.
pub fn compute_here() {
    // The pool is this thread's, and ends with the process. The second time there is one already.
    let pool = rayon::ThreadPoolBuilder::new().num_threads(1).use_current_thread().build();
    let _ = pool.map(std::mem::forget);
}

/// How long anything may take before a test gives up.
pub const PATIENCE: Duration = Duration::from_secs(30);

/// A running daemon that ends with this value.
#[derive(Debug)]
pub struct Daemon {
    child: Child,
    folder: tempfile::TempDir,
}

/// The daemon's arguments for sockets in a folder, and a small unpinned arena.
fn arguments(folder: &Path) -> Vec<String> {
    let path = |name: &str| folder.join(name).display().to_string();
    vec![
        "--config".into(),
        "/dev/null".into(),
        "--socket".into(),
        path("kvoyantd.sock"),
        "--admin-socket".into(),
        path("admin.sock"),
        "--arena".into(),
        "512MiB".into(),
        "--pin".into(),
        "false".into(),
        "--newcomers-percent".into(),
        "0".into(),
    ]
}

/// Looks at a daemon's status until it is as wanted, and returns it.
fn status_as(
    look: impl Fn() -> StatusReport,
    what: &str,
    wanted: impl Fn(&StatusReport) -> bool,
) -> StatusReport {
    let since = Instant::now();
    loop {
        let status = look();
        if wanted(&status) {
            return status;
        }
        assert!(since.elapsed() < PATIENCE, "the daemon never had {what}: {status:?}");
        std::thread::sleep(Duration::from_millis(2));
    }
}

impl Daemon {
    /// Starts one with these further flags (later ones win), and waits until its sockets are there.
    ///
    /// # Panics
    /// If it does not start; its own words are in the message.
    #[must_use]
    pub fn start(binary: &str, flags: &[&str]) -> Self {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let command = Self::command(binary, folder.path(), flags);
        Self::launch(folder, command)
    }

    /// As [`Daemon::start`], with calls that fail: `futex-wait-many:1+` ([`kvoyant_protocol::faults`]).
    ///
    /// # Panics
    /// If it does not start; its own words are in the message.
    #[must_use]
    pub fn start_failing(binary: &str, fault: &str, flags: &[&str]) -> Self {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let mut command = Self::command(binary, folder.path(), flags);
        command.env("KVOYANT_FAULTS", fault);
        Self::launch(folder, command)
    }

    /// As [`Daemon::start`], where the daemon is a program's command `serve`.
    ///
    /// # Panics
    /// If it does not start; its own words are in the message.
    #[must_use]
    pub fn serve(program: &str, flags: &[&str]) -> Self {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let plain = Self::command(program, folder.path(), flags);
        let mut command = Command::new(program);
        command.args(["serve", "--die-with-parent", &std::process::id().to_string()]);
        command.args(plain.get_args()).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
        Self::launch(folder, command)
    }

    fn launch(folder: tempfile::TempDir, mut command: Command) -> Self {
        let mut child = command.spawn().expect("the daemon starts");
        let since = Instant::now();
        while !folder.path().join("kvoyantd.sock").exists() {
            if let Some(status) = child.try_wait().expect("a child") {
                panic!("the daemon ended while starting: {status}: {}", words(&mut child));
            }
            assert!(since.elapsed() < PATIENCE, "the daemon made no socket");
            std::thread::sleep(Duration::from_millis(2));
        }
        Self { child, folder }
    }

    /// The command that starts a daemon on sockets in `folder`.
    #[must_use]
    pub fn command(binary: &str, folder: &Path, flags: &[&str]) -> Command {
        let mut all = arguments(folder);
        for flag in flags.chunks(2) {
            if let Some(at) = all.iter().position(|known| known == flag[0]) {
                all.drain(at..at + 2);
            }
            all.extend(flag.iter().map(ToString::to_string));
        }
        let mut command = Command::new(binary);
        command.args(all).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
        command
    }

    /// The control socket.
    #[must_use]
    pub fn socket(&self) -> PathBuf {
        self.folder.path().join("kvoyantd.sock")
    }

    /// The admin socket.
    #[must_use]
    pub fn admin(&self) -> PathBuf {
        self.folder.path().join("admin.sock")
    }

    /// Its folder.
    #[must_use]
    pub fn folder(&self) -> &Path {
        self.folder.path()
    }

    /// Its process.
    #[must_use]
    pub fn pid(&self) -> Pid {
        Pid::from_raw(self.child.id() as i32)
    }

    /// Its status.
    ///
    /// # Panics
    /// If it gives none.
    #[must_use]
    pub fn status(&self) -> StatusReport {
        kvoyant_daemon::admin::fetch_status(&self.admin()).expect("a status")
    }

    /// Waits until its status is as wanted, and returns it.
    ///
    /// # Panics
    /// If that does not come to pass.
    pub fn wait_for(&self, what: &str, wanted: impl Fn(&StatusReport) -> bool) -> StatusReport {
        status_as(|| self.status(), what, wanted)
    }

    /// Stops it, as SIGSTOP does, and waits until every thread of it stands still.
    ///
    /// # Panics
    /// If it does not stop.
    pub fn stop(&self) {
        stop(self.pid());
    }

    /// Waits until it ends by itself; returns how it ended and what it said.
    ///
    /// # Panics
    /// If it does not.
    #[must_use]
    pub fn wait(mut self) -> (ExitStatus, String) {
        let since = Instant::now();
        while self.child.try_wait().expect("a child").is_none() {
            assert!(since.elapsed() < PATIENCE, "the daemon did not end by itself");
            std::thread::sleep(Duration::from_millis(2));
        }
        let status = self.child.wait().expect("an end");
        (status, words(&mut self.child))
    }

    /// Sends a signal and waits for the end; returns how it ended and what it said.
    ///
    /// # Panics
    /// If it does not end.
    pub fn end(mut self, signal: Signal) -> (ExitStatus, String) {
        kill(self.pid(), signal).expect("a signal");
        let status = self.child.wait().expect("an end");
        (status, words(&mut self.child))
    }
}

/// What a process wrote to its standard error. Call it once the process has ended.
pub fn words(child: &mut Child) -> String {
    let mut text = String::new();
    if let Some(mut stderr) = child.stderr.take() {
        let _ = stderr.read_to_string(&mut text);
    }
    text
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Stops a process, as SIGSTOP does, and waits until every thread of it stands still.
///
/// # Panics
/// If it does not stop.
pub fn stop(pid: Pid) {
    kill(pid, Signal::SIGSTOP).expect("a signal");
    let stands_still = |task: std::io::Result<std::fs::DirEntry>| {
        let stat = task.and_then(|task| std::fs::read_to_string(task.path().join("stat")));
        stat.is_ok_and(|stat| stat.rsplit(") ").next().is_some_and(|state| state.starts_with('T')))
    };
    wait_until("the daemon standing still", || {
        let tasks = std::fs::read_dir(format!("/proc/{pid}/task"));
        tasks.is_ok_and(|mut tasks| tasks.all(stands_still))
    });
}

/// Waits until something is so.
///
/// # Panics
/// If that does not come to pass.
pub fn wait_until(what: &str, mut so: impl FnMut() -> bool) {
    let since = Instant::now();
    while !so() {
        assert!(since.elapsed() < PATIENCE, "{what} never came");
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// Sends a signal, and waits until the daemon's folder is empty.
///
/// # Panics
/// If something stays.
pub fn signal_and_wait_until_empty(daemon: &Daemon, signal: Signal, folder: &Path) {
    kill(daemon.pid(), signal).expect("a signal");
    wait_until("an empty folder", || {
        std::fs::read_dir(folder).is_ok_and(|mut entries| entries.next().is_none())
    });
}
