//! What must not outlive this process: temporary folders and child processes.
//!
//! Each is a guard that undoes itself when dropped, and is also listed in one registry, from which a
//! signal undoes them all: Ctrl-C ends the process at any moment and leaves nothing behind. A child
//! has a process group of its own, so the terminal's Ctrl-C reaches us alone and we end it in order.

use std::io;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, killpg};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::iterator::Signals;

/// How long a child may take to end by itself before it is killed.
const GRACE: Duration = Duration::from_secs(3);

struct Registry {
    folders: Vec<PathBuf>,
    children: Vec<Pid>,
}

static REGISTRY: Mutex<Registry> = Mutex::new(Registry { folders: Vec::new(), children: Vec::new() });

fn registry() -> MutexGuard<'static, Registry> {
    // A list of paths and ids is whole after any panic.
    REGISTRY.lock().unwrap_or_else(PoisonError::into_inner)
}

/// From now on SIGINT, SIGTERM and SIGHUP undo what is registered and end the process with 128 + signal.
///
/// # Errors
/// If the handlers or their thread cannot be made.
pub(crate) fn on_signals() -> io::Result<()> {
    let mut signals = Signals::new([SIGINT, SIGTERM, SIGHUP])?;
    std::thread::Builder::new().name("signals".into()).spawn(move || {
        if let Some(signal) = signals.forever().next() {
            // The lock is kept: nothing can be registered any more between here and the exit.
            let mut all = registry();
            for child in std::mem::take(&mut all.children) {
                end(child);
            }
            for folder in std::mem::take(&mut all.folders) {
                let _ = std::fs::remove_dir_all(folder);
            }
            std::process::exit(128 + signal);
        }
    })?;
    Ok(())
}

/// Asks the child's group to end, and kills it when it takes too long.
fn end(child: Pid) {
    let _ = killpg(child, Signal::SIGTERM);
    let since = Instant::now();
    while matches!(waitpid(child, Some(WaitPidFlag::WNOHANG)), Ok(WaitStatus::StillAlive)) {
        if since.elapsed() > GRACE {
            let _ = killpg(child, Signal::SIGKILL);
            let _ = waitpid(child, None);
            return;
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// A folder (mode 0700) that is gone with everything in it when this is dropped or a signal comes.
#[derive(Debug)]
pub(crate) struct Scratch(PathBuf);

impl Scratch {
    /// A new folder in `parent` whose name begins with `prefix`.
    ///
    /// # Errors
    /// If it cannot be made.
    pub(crate) fn new(parent: &Path, prefix: &str) -> io::Result<Self> {
        // The lock spans both steps: no signal can fall between making the folder and listing it.
        let mut all = registry();
        let path = tempfile::Builder::new().prefix(prefix).tempdir_in(parent)?.keep();
        all.folders.push(path.clone());
        Ok(Self(path))
    }

    /// Where it is.
    pub(crate) fn path(&self) -> &Path {
        &self.0
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
        registry().folders.retain(|folder| *folder != self.0);
    }
}

/// A child process, leader of its own group, that is ended when this is dropped or a signal comes.
#[derive(Debug)]
pub(crate) struct Reaped(Child);

impl Reaped {
    /// Starts `command`.
    ///
    /// # Errors
    /// If it cannot be started.
    pub(crate) fn spawn(command: &mut Command) -> io::Result<Self> {
        let mut all = registry();
        let child = command.process_group(0).spawn()?;
        all.children.push(pid(&child));
        Ok(Self(child))
    }

    /// The child itself, for its pipes.
    pub(crate) fn child(&mut self) -> &mut Child {
        &mut self.0
    }

    /// Its exit status, once it has ended.
    ///
    /// # Errors
    /// As `waitpid`.
    pub(crate) fn try_wait(&mut self) -> io::Result<Option<ExitStatus>> {
        let status = self.0.try_wait()?;
        if status.is_some() {
            self.forget();
        }
        Ok(status)
    }

    fn forget(&self) {
        let pid = pid(&self.0);
        registry().children.retain(|child| *child != pid);
    }
}

impl Drop for Reaped {
    fn drop(&mut self) {
        if matches!(self.0.try_wait(), Ok(None)) {
            end(pid(&self.0));
        }
        self.forget();
    }
}

fn pid(child: &Child) -> Pid {
    // A pid fits pid_t: the kernel's largest is 2^22.
    Pid::from_raw(i32::try_from(child.id()).unwrap_or(i32::MAX))
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::sys::signal::kill;

    #[test]
    fn a_dropped_scratch_folder_is_gone_with_its_files() {
        let scratch = Scratch::new(&std::env::temp_dir(), "kvoyant-test-").unwrap();
        let path = scratch.path().to_owned();
        std::fs::write(path.join("file"), "x").unwrap();
        drop(scratch);
        assert!(!path.exists());
    }

    #[test]
    fn a_dropped_child_is_ended_and_reaped() {
        let mut child = Reaped::spawn(Command::new("sleep").arg("60")).unwrap();
        assert!(child.try_wait().unwrap().is_none());
        let id = pid(child.child());
        drop(child);
        assert!(kill(id, None).is_err(), "process {id} is still there");
    }
}
