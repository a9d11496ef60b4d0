//! A daemon of our own: this same program as `kvoyant serve`, on a socket in a temporary folder.
//!
//! It ends with us in every case: dropped or by a signal through [`Reaped`], and if we are killed without
//! a chance to do anything, by the kernel (`--die-with-parent`, see `serve`).

use std::fs::File;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use crate::cleanup::{Reaped, Scratch};

/// Where the daemon's words go, beside its socket.
pub(crate) const LOG_FILE: &str = "daemon.log";

/// How long the daemon may take until its socket is there.
const START: Duration = Duration::from_secs(20);

/// Where NVRTC is: a matter of the machine, as which kernels its processor runs.
const NVRTC: &str = "KVOYANT_NVRTC";

/// A socket's path must fit `sockaddr_un`.
const LONGEST_SOCKET_PATH: usize = 103;

/// Why there is no daemon.
#[derive(Debug, thiserror::Error)]
pub(crate) enum DaemonError {
    /// It could not be started at all.
    #[error("the daemon cannot be started: {0}")]
    Start(#[source] io::Error),
    /// It ended before its socket was there.
    #[error("the daemon ended while starting ({status}): {said}")]
    Ended {
        /// How.
        status: ExitStatus,
        /// Its last line.
        said: String,
    },
    /// Its socket never came.
    #[error("the daemon made no socket within {} s: {said}", START.as_secs())]
    Late {
        /// Its last line.
        said: String,
    },
}

/// A running daemon that ends with this.
#[derive(Debug)]
pub(crate) struct PrivateDaemon {
    // The daemon first: it must be gone before its folder goes.
    _child: Reaped,
    folder: Scratch,
}

impl PrivateDaemon {
    /// Starts one with these further arguments of `serve`, and waits until its socket is there.
    ///
    /// Call it from the main thread: the kernel ends the child when the *thread* that made it ends.
    ///
    /// # Errors
    /// If it does not start; its own words say why.
    pub(crate) fn start(arguments: &[String]) -> Result<Self, DaemonError> {
        let folder = Scratch::new(&short_temporary_folder(), "kvoyant-").map_err(DaemonError::Start)?;
        let this = std::env::current_exe().map_err(DaemonError::Start)?;
        let log = File::create(folder.path().join(LOG_FILE)).map_err(DaemonError::Start)?;
        let mut command = Command::new(this);
        for (name, _) in std::env::vars_os() {
            let name = name.to_string_lossy();
            if name.starts_with("KVOYANT_") && name != kvoyant_kernels::ENV && name != NVRTC {
                command.env_remove(&*name);
            }
        }
        let given = |flag: &str| arguments.iter().any(|argument| argument == flag);
        if given("--host-percent") && !given("--spill") {
            let spill = folder.path().join("spill");
            std::fs::create_dir(&spill).map_err(DaemonError::Start)?;
            command.env("KVOYANT_SPILL", format!("[{:?}]", spill.display().to_string()));
        }
        command
            .arg("serve")
            // What an operator set up for the node's daemon is not meant for this one.
            .args(["--config", "/dev/null"])
            // Nobody else comes.
            .args(["--newcomers-percent", "0"])
            .arg("--socket")
            .arg(socket_in(folder.path()))
            .arg("--admin-socket")
            .arg(folder.path().join("admin.sock"))
            .arg("--die-with-parent")
            .arg(std::process::id().to_string())
            .args(arguments)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log);
        let mut child = Reaped::spawn(&mut command).map_err(DaemonError::Start)?;
        let since = Instant::now();
        while !socket_in(folder.path()).exists() {
            if let Some(status) = child.try_wait().map_err(DaemonError::Start)? {
                return Err(DaemonError::Ended { status, said: last_words(folder.path()) });
            }
            if since.elapsed() > START {
                return Err(DaemonError::Late { said: last_words(folder.path()) });
            }
            std::thread::sleep(Duration::from_millis(2));
        }
        Ok(Self { _child: child, folder })
    }

    /// Its socket.
    pub(crate) fn socket(&self) -> PathBuf {
        socket_in(self.folder.path())
    }

    /// The last line that it wrote to its log.
    pub(crate) fn last_words(&self) -> String {
        last_words(self.folder.path())
    }
}

fn socket_in(folder: &Path) -> PathBuf {
    folder.join("kvoyant.sock")
}

/// `TMPDIR`, or `/tmp` where a socket below `TMPDIR` would have too long a path.
fn short_temporary_folder() -> PathBuf {
    let folder = std::env::temp_dir();
    let room = "/kvoyant-123456/kvoyant.sock".len();
    if folder.as_os_str().len() + room > LONGEST_SOCKET_PATH { PathBuf::from("/tmp") } else { folder }
}

fn last_words(folder: &Path) -> String {
    std::fs::read(folder.join(LOG_FILE))
        .ok()
        .and_then(|log| {
            let log = String::from_utf8_lossy(&log);
            let log = console::strip_ansi_codes(&log);
            log.lines().rev().find(|line| !line.trim().is_empty()).map(|line| line.trim().to_owned())
        })
        .unwrap_or_else(|| match unwritable(folder) {
            Some(error) => {
                format!("it could say nothing, for its log in {} cannot be written ({error}); make room there, or set TMPDIR", folder.display())
            }
            None => "it said nothing".into(),
        })
}

/// Why the log in a folder takes nothing, if it takes nothing.
fn unwritable(folder: &Path) -> Option<io::Error> {
    File::options().append(true).open(folder.join(LOG_FILE)).and_then(|mut log| log.write_all(b"\n")).err()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_log_that_cannot_be_written_is_told_from_one_that_is_empty() {
        let folder = tempfile::tempdir().unwrap();
        let log = folder.path().join(LOG_FILE);
        std::os::unix::fs::symlink("/dev/full", &log).unwrap();
        assert!(unwritable(folder.path()).is_some_and(|error| error.kind() == io::ErrorKind::StorageFull));
        std::fs::remove_file(&log).unwrap();
        File::create(&log).unwrap();
        assert_eq!(last_words(folder.path()), "it said nothing");
        std::fs::write(&log, "first\nlast\n\n").unwrap();
        assert_eq!(last_words(folder.path()), "last");
    }
}
