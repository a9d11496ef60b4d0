//! A listening socket's place in the file system.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{DirBuilderExt, FileTypeExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use kvoyant_protocol::packet;
use nix::fcntl::{Flock, FlockArg};

use crate::config::folder_among_others;
use crate::notify::Listener;
use crate::server::ServerError;

/// A listening socket and the lock that makes it ours. Dropping it removes both from the file system; a socket that the service manager
/// made stays.
#[derive(Debug)]
pub(crate) struct Endpoint {
    path: PathBuf,
    lock: PathBuf,
    given: Option<OwnedFd>,
    managers: bool,
    _held: Flock<File>,
}

/// Whoever may enter the folder and is in its group may connect.
const SOCKET_MODE: u32 = 0o660;

const FOLDER_ADVICE: &str =
    "choose another place with --socket and --admin-socket, or make the folder writable";

/// Whether a folder that anybody could have made is ours: whoever else has it could have clients connect to them.
fn check_own(folder: &Path) -> io::Result<()> {
    let found = std::fs::symlink_metadata(folder)?;
    let ours = found.is_dir() && found.uid() == nix::unistd::geteuid().as_raw();
    if ours && found.mode() & 0o022 == 0 {
        return Ok(());
    }
    let why = format!(
        "others can change what is in it: it is user {}'s, of mode {:o}",
        found.uid(),
        found.mode() & 0o7777
    );
    Err(io::Error::new(io::ErrorKind::PermissionDenied, why))
}

impl Endpoint {
    /// Takes the lock beside `path`, and removes a socket that a dead daemon left there unless there is one that listens already.
    pub(crate) fn claim(
        path: &Path,
        flag: &'static str,
        given: Option<Listener>,
    ) -> Result<Self, ServerError> {
        let (path, given) = match given {
            None => (path.to_path_buf(), None),
            Some(Listener { socket, path }) => (path, Some(socket)),
        };
        let path = path.as_path();
        let fail = |what, path: &Path, source| ServerError::Path {
            what,
            path: path.to_path_buf(),
            source,
            advice: FOLDER_ADVICE,
        };
        if let Some(folder) = path.parent().filter(|folder| !folder.as_os_str().is_empty()) {
            std::fs::DirBuilder::new()
                .recursive(true)
                .mode(0o750)
                .create(folder)
                .map_err(|source| fail("create the folder", folder, source))?;
            if folder == folder_among_others() {
                check_own(folder).map_err(|source| fail("use the folder", folder, source))?;
            }
        }
        let mut lock = path.as_os_str().to_owned();
        lock.push(".lock");
        let lock = PathBuf::from(lock);
        let held = loop {
            let file = OpenOptions::new()
                .create(true)
                .truncate(false)
                .write(true)
                .mode(0o600)
                .open(&lock)
                .map_err(|source| fail("create the lock", &lock, source))?;
            let held =
                Flock::lock(file, FlockArg::LockExclusiveNonblock).map_err(|(_, errno)| match errno {
                    nix::errno::Errno::EWOULDBLOCK => ServerError::InUse { path: path.to_path_buf(), flag },
                    errno => fail("lock", &lock, errno.into()),
                })?;
            // A daemon that stops removes its lock: ours counts only if it is still the one on the path.
            let same =
                |a: &std::fs::Metadata, b: &std::fs::Metadata| a.ino() == b.ino() && a.dev() == b.dev();
            match (held.metadata(), std::fs::metadata(&lock)) {
                (Ok(ours), Ok(current)) if same(&ours, &current) => break held,
                _ => {}
            }
        };
        // Only a socket can be a dead daemon's.
        let is_socket = |found: &std::fs::Metadata| found.file_type().is_socket();
        if std::fs::symlink_metadata(path).is_ok_and(|found| !is_socket(&found)) {
            let source = io::Error::new(io::ErrorKind::AlreadyExists, "something that is no socket is there");
            return Err(fail("listen on", path, source));
        }
        let managers = given.is_some();
        if !managers
            && let Err(source) = std::fs::remove_file(path)
            && source.kind() != io::ErrorKind::NotFound
        {
            return Err(fail("remove the old socket", path, source));
        }
        Ok(Self { path: path.to_path_buf(), lock, given, managers, _held: held })
    }

    /// Where it is.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    fn fail(&self, what: &'static str) -> impl FnOnce(io::Error) -> ServerError {
        let path = self.path.clone();
        move |source| ServerError::Path { what, path, source, advice: FOLDER_ADVICE }
    }

    /// A stream socket that listens there.
    ///
    /// # Errors
    /// What the system says.
    pub(crate) fn stream(&mut self) -> Result<tokio::net::UnixListener, ServerError> {
        if let Some(given) = self.given.take() {
            return listener(given).map_err(self.fail("listen on"));
        }
        let listener = tokio::net::UnixListener::bind(&self.path).map_err(self.fail("listen on"))?;
        std::fs::set_permissions(&self.path, std::fs::Permissions::from_mode(SOCKET_MODE))
            .map_err(self.fail("set the mode of"))?;
        Ok(listener)
    }

    /// A socket of sequenced packets that listens there. Readiness and accepting are the same as on a stream.
    ///
    /// # Errors
    /// What the system says.
    pub(crate) fn packets(&mut self) -> Result<tokio::net::UnixListener, ServerError> {
        let socket = match self.given.take() {
            Some(given) => given,
            None => packet::listen_at(&self.path, SOCKET_MODE).map_err(self.fail("listen on"))?,
        };
        listener(socket).map_err(self.fail("listen on"))
    }
}

fn listener(socket: OwnedFd) -> io::Result<tokio::net::UnixListener> {
    let listener = std::os::unix::net::UnixListener::from(socket);
    listener.set_nonblocking(true)?;
    tokio::net::UnixListener::from_std(listener)
}

impl Drop for Endpoint {
    fn drop(&mut self) {
        if !self.managers {
            let _ = std::fs::remove_file(&self.path);
        }
        let _ = std::fs::remove_file(&self.lock);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_folder_that_others_may_write_in_or_that_is_only_a_link_is_not_ours() {
        let parent = tempfile::tempdir().unwrap();
        let (folder, link) = (parent.path().join("folder"), parent.path().join("link"));
        std::fs::create_dir(&folder).unwrap();
        let mode = |mode| std::fs::set_permissions(&folder, std::fs::Permissions::from_mode(mode)).unwrap();
        for (bits, ours) in [(0o700, true), (0o750, true), (0o770, false), (0o777, false), (0o1777, false)] {
            mode(bits);
            assert_eq!(check_own(&folder).is_ok(), ours, "{bits:o}");
        }
        mode(0o700);
        std::os::unix::fs::symlink(&folder, &link).unwrap();
        assert!(check_own(&link).unwrap_err().to_string().contains("others can change"));
    }
}
