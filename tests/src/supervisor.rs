//! A tiny service manager: it speaks systemd's protocol of datagrams as far as that stores descriptors, and starts the daemon again with them.

use std::collections::BTreeMap;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::UnixDatagram;
use std::path::PathBuf;
use std::process::{Child, Command, ExitStatus};
use std::sync::mpsc::{Receiver, channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use command_fds::{CommandFdExt, FdMapping};
use kvoyant_daemon::status::StatusReport;
use kvoyant_protocol::packet;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::{Daemon, PATIENCE, words};

/// First descriptor that a process is given by its manager.
const FIRST: i32 = 3;

/// What is stored: name and descriptor.
type Stored = Arc<Mutex<Vec<(String, OwnedFd)>>>;

/// See the module.
#[derive(Debug)]
pub struct Supervisor {
    binary: PathBuf,
    flags: Vec<String>,
    stored: Stored,
    /// Everything that was said before was taken in.
    caught_up: Receiver<()>,
    child: Option<Child>,
    folder: tempfile::TempDir,
}

impl Supervisor {
    /// Starts the daemon with these flags, and waits until its sockets are there.
    ///
    /// # Panics
    /// If it does not start.
    #[must_use]
    pub fn start(binary: &str, flags: &[&str]) -> Self {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let socket = UnixDatagram::bind(folder.path().join("notify")).expect("a socket");
        let stored = Stored::default();
        let (done, caught_up) = channel();
        let taking = Arc::clone(&stored);
        // It ends with the test.
        std::thread::spawn(move || {
            while let Ok(message) = packet::receive(socket.as_fd()) {
                if message.bytes == b"CATCH_UP" {
                    let _ = done.send(());
                } else {
                    take(&taking, &message.bytes, message.fds);
                }
            }
        });
        let flags = flags.iter().map(ToString::to_string).collect();
        let binary = PathBuf::from(binary);
        let mut all = Self { binary, flags, stored, caught_up, child: None, folder };
        all.launch(&[]);
        all
    }

    fn stored(&self) -> MutexGuard<'_, Vec<(String, OwnedFd)>> {
        self.stored.lock().unwrap_or_else(PoisonError::into_inner)
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

    /// The daemon's process.
    ///
    /// # Panics
    /// If it does not run.
    #[must_use]
    pub fn pid(&self) -> Pid {
        Pid::from_raw(self.child.as_ref().expect("a daemon").id() as i32)
    }

    /// The daemon's status.
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
        crate::status_as(|| self.status(), what, wanted)
    }

    /// Waits until everything that the daemon has said was taken in, and says what is stored: how many of each name's last part but one.
    ///
    /// # Panics
    /// If the thread that takes it in has ended.
    pub fn kinds(&self) -> BTreeMap<String, usize> {
        self.catch_up();
        let mut kinds = BTreeMap::new();
        for (name, _) in self.stored().iter() {
            let kind = name.rsplit('.').nth(1).unwrap_or(name);
            *kinds.entry(kind.to_owned()).or_default() += 1;
        }
        kinds
    }

    /// Lets a test see, and change, what is stored.
    pub fn with_stored<T>(&self, look: impl FnOnce(&mut Vec<(String, OwnedFd)>) -> T) -> T {
        self.catch_up();
        look(&mut self.stored())
    }

    fn catch_up(&self) {
        let socket = UnixDatagram::unbound().expect("a socket");
        socket.send_to(b"CATCH_UP", self.folder.path().join("notify")).expect("a word");
        self.caught_up.recv_timeout(PATIENCE).expect("the manager's thread");
    }

    fn command(&self, more: &[&str]) -> Command {
        let flags: Vec<&str> = self.flags.iter().map(String::as_str).collect();
        let plain = Daemon::command(&self.binary.display().to_string(), self.folder.path(), &flags);
        // The shell knows its process's number, which is the daemon's then.
        let mut command = Command::new("sh");
        command.args(["-c", "LISTEN_PID=$$; export LISTEN_PID; exec \"$0\" \"$@\""]).arg(&self.binary);
        command.args(plain.get_args()).args(more);
        command.env("NOTIFY_SOCKET", self.folder.path().join("notify")).env("FDSTORE", "4096");
        command.stdin(std::process::Stdio::null()).stdout(std::process::Stdio::null());
        command.stderr(std::process::Stdio::piped());
        command
    }

    fn launch(&mut self, more: &[&str]) {
        let mut command = self.command(more);
        if self.child.is_none() {
            let (names, fds): (Vec<_>, Vec<_>) = {
                let stored = self.stored();
                let copies = stored.iter().map(|(name, fd)| (name.clone(), fd.try_clone().expect("a copy")));
                copies.unzip()
            };
            command.env("LISTEN_FDS", fds.len().to_string()).env("LISTEN_FDNAMES", names.join(":"));
            let mapping = |(at, parent_fd)| FdMapping { parent_fd, child_fd: FIRST + at as i32 };
            command.fd_mappings(fds.into_iter().enumerate().map(mapping).collect()).expect("descriptors");
        }
        let mut child = command.spawn().expect("the daemon starts");
        let since = Instant::now();
        let there = |pid: u32| {
            packet::connect_to(&self.folder.path().join("kvoyantd.sock"))
                .and_then(|socket| packet_peer(&socket))
                .is_ok_and(|peer| peer == pid as i32)
        };
        while !there(child.id()) {
            if let Some(status) = child.try_wait().expect("a child") {
                panic!("the daemon ended while starting: {status}: {}", words(&mut child));
            }
            assert!(since.elapsed() < PATIENCE, "the daemon made no socket");
            std::thread::sleep(std::time::Duration::from_millis(1));
        }
        if let Some(mut before) = self.child.replace(child) {
            before.wait().expect("an end");
        }
    }

    /// Ends the daemon by a signal; says how it ended and what it said.
    ///
    /// # Panics
    /// If it does not end.
    pub fn end(&mut self, signal: Signal) -> (ExitStatus, String) {
        kill(self.pid(), signal).expect("a signal");
        let mut child = self.child.take().expect("a daemon");
        let status = child.wait().expect("an end");
        self.catch_up();
        (status, words(&mut child))
    }

    /// From its next start on it has these flags.
    pub fn serve_otherwise(&mut self, flags: &[&str]) {
        self.flags = flags.iter().map(ToString::to_string).collect();
    }

    /// Starts it again with what is stored, once it has ended.
    ///
    /// # Panics
    /// If it does not start.
    pub fn again(&mut self) {
        self.launch(&[]);
    }

    /// Ends the daemon by a signal and starts it again with what is stored.
    pub fn restart(&mut self, signal: Signal) {
        let (_, said) = self.end(signal);
        if said.contains("lost") {
            eprintln!("{said}");
        }
        self.again();
    }

    /// Has another daemon take over, and waits until the one before has ended.
    ///
    /// # Panics
    /// If it does not start, or the one before does not end.
    pub fn takeover(&mut self) {
        self.launch(&["--takeover"]);
    }

    /// Has another daemon with these further flags try to take over, which must end instead; what it said.
    ///
    /// # Panics
    /// If it does not end, or ends well.
    #[must_use]
    pub fn refused_takeover(&self, flags: &[&str]) -> String {
        let mut command = self.command(&[&["--takeover"], flags].concat());
        let output = command.output().expect("the daemon starts");
        assert!(!output.status.success(), "{flags:?}: it has taken over");
        String::from_utf8_lossy(&output.stderr).into_owned()
    }
}

fn packet_peer(socket: &OwnedFd) -> std::io::Result<i32> {
    Ok(packet::peer(socket.as_fd())?.0)
}

impl Drop for Supervisor {
    fn drop(&mut self) {
        if let Some(child) = &mut self.child {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

/// Does what a datagram says about descriptors.
fn take(stored: &Stored, bytes: &[u8], fds: Vec<OwnedFd>) {
    let text = String::from_utf8_lossy(bytes);
    let value = |key: &str| text.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix('='));
    let name = value("FDNAME").unwrap_or("stored").to_owned();
    let mut stored = stored.lock().unwrap_or_else(PoisonError::into_inner);
    if value("FDSTOREREMOVE") == Some("1") {
        stored.retain(|(its, _)| *its != name);
    } else if value("FDSTORE") == Some("1") {
        for fd in fds {
            let file = |fd: &OwnedFd| {
                let data = std::fs::File::from(fd.try_clone().expect("a copy")).metadata().expect("a file");
                (data.dev(), data.ino())
            };
            // The same file is stored once.
            if !stored.iter().any(|(_, its)| file(its) == file(&fd)) {
                stored.push((name.clone(), fd));
            }
        }
    }
}
