//! A service manager as small as one can be: it listens to what a daemon says of itself, and hands sockets over as systemd does.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixDatagram;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use nix::fcntl::{FcntlArg, FdFlag, fcntl};

use crate::PATIENCE;

/// The manager's end of `NOTIFY_SOCKET`.
#[derive(Debug)]
pub struct Manager {
    socket: UnixDatagram,
    folder: tempfile::TempDir,
    heard: VecDeque<String>,
}

impl Default for Manager {
    fn default() -> Self {
        Self::new()
    }
}

impl Manager {
    /// A manager that listens.
    ///
    /// # Panics
    /// If it cannot.
    #[must_use]
    pub fn new() -> Self {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let socket = UnixDatagram::bind(folder.path().join("notify")).expect("a socket");
        Self { socket, folder, heard: VecDeque::new() }
    }

    /// Where it listens.
    #[must_use]
    pub fn path(&self) -> std::path::PathBuf {
        self.folder.path().join("notify")
    }

    /// Has a command talk to it, and be watched.
    pub fn supervise(&self, command: &mut Command, watchdog: Option<Duration>) {
        command.env("NOTIFY_SOCKET", self.path()).env_remove("WATCHDOG_PID").env_remove("WATCHDOG_USEC");
        if let Some(period) = watchdog {
            command.env("WATCHDOG_USEC", period.as_micros().to_string());
        }
    }

    /// The next line that it hears within a time, if any comes.
    pub fn next(&mut self, within: Duration) -> Option<String> {
        if let Some(line) = self.heard.pop_front() {
            return Some(line);
        }
        self.socket.set_read_timeout(Some(within.max(Duration::from_millis(1)))).ok()?;
        let mut bytes = [0; 4096];
        match self.socket.recv(&mut bytes) {
            Ok(length) => {
                self.heard.extend(String::from_utf8_lossy(&bytes[..length]).lines().map(str::to_owned));
                self.heard.pop_front()
            }
            Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut) => None,
            Err(error) => panic!("the manager cannot listen: {error}"),
        }
    }

    /// Waits for a line; returns what came before it.
    ///
    /// # Panics
    /// If it does not come.
    pub fn wait_for(&mut self, what: &str, wanted: impl Fn(&str) -> bool) -> Vec<String> {
        let since = Instant::now();
        let mut before = Vec::new();
        loop {
            match self.next(Duration::from_millis(50)) {
                Some(line) if wanted(&line) => return before,
                Some(line) => before.push(line),
                None => assert!(since.elapsed() < PATIENCE, "the manager never heard {what}, but {before:?}"),
            }
        }
    }
}

/// A command that gets these descriptors under these names, as of systemd, and the arguments of `command`.
///
/// # Panics
/// If a descriptor cannot be handed over.
#[must_use]
pub fn with_sockets(command: &Command, sockets: &[(&str, &OwnedFd)]) -> Command {
    // A shell puts them where they belong, and knows its process id, which stays the program's.
    let mut script = String::new();
    for (index, (_, socket)) in sockets.iter().enumerate() {
        fcntl(*socket, FcntlArg::F_SETFD(FdFlag::empty())).expect("a descriptor that is kept");
        script += &format!("exec {}<&{}; ", 100 + index, socket.as_raw_fd());
    }
    for index in 0..sockets.len() {
        script += &format!("exec {}<&{} {}<&-; ", 3 + index, 100 + index, 100 + index);
    }
    script += "export LISTEN_PID=$$; exec \"$0\" \"$@\"";
    let names: Vec<&str> = sockets.iter().map(|(name, _)| *name).collect();
    let mut all = Command::new("bash");
    all.arg("-c").arg(script).arg(command.get_program()).args(command.get_args());
    all.env("LISTEN_FDS", sockets.len().to_string()).env("LISTEN_FDNAMES", names.join(":"));
    all.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
    all
}

/// A socket of sequenced packets that listens, as the socket unit has one.
///
/// # Panics
/// If it cannot be made.
#[must_use]
pub fn packet_socket(path: &Path) -> OwnedFd {
    use nix::sys::socket::{AddressFamily, Backlog, SockFlag, SockType, UnixAddr, bind, listen, socket};
    let made =
        socket(AddressFamily::Unix, SockType::SeqPacket, SockFlag::SOCK_CLOEXEC, None).expect("a socket");
    bind(made.as_raw_fd(), &UnixAddr::new(path).expect("an address")).expect("a bound socket");
    listen(&made, Backlog::new(16).expect("a backlog")).expect("a listening socket");
    made
}
