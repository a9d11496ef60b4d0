//! A daemon that something fails in.

use std::os::unix::process::ExitStatusExt;
use std::path::PathBuf;
use std::process::Child;

use nix::unistd::Pid;

use super::Found;
use crate::words;

/// A running daemon, and the folder of its sockets, images and spilled pages.
#[derive(Debug)]
pub(super) struct Subject {
    pub(super) child: Child,
    pub(super) folder: tempfile::TempDir,
}

impl Drop for Subject {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Subject {
    pub(super) fn socket(&self) -> PathBuf {
        self.folder.path().join("kvoyantd.sock")
    }

    pub(super) fn pid(&self) -> Pid {
        Pid::from_raw(self.child.id() as i32)
    }

    /// How it ended, if it has: a panic and a signal are defects, an exit with a sentence is none.
    pub(super) fn ended(&mut self) -> Result<Option<String>, Found> {
        let Ok(Some(status)) = self.child.try_wait() else { return Ok(None) };
        let said = words(&mut self.child);
        match status.signal() {
            None if !said.contains("panicked") => Ok(Some(format!("{status}: {}", said.trim()))),
            _ => Err(Found::Broken(format!("the daemon ended with {status}: {said}"))),
        }
    }
}
