//! The daemon's end of the page.

use std::fs::{File, OpenOptions, Permissions};
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use shared_memory::{Shmem, ShmemConf};

use super::{FOLDER, HEAD_BYTES, Head, OLD_S, PREFIX, SLOT_BYTES, file_of, name_of};
use crate::status::Registry;

/// How often it is written.
const EVERY: Duration = Duration::from_millis(500);

/// The page of a daemon. Dropping it takes its name away.
pub struct StatsPage {
    file: File,
    boot_id: u64,
    number: u64,
    /// Whether whoever is in the group of the socket's folder may read it.
    open_to_group: bool,
    /// Keeps the name, and gives it back.
    _object: Shmem,
}

impl std::fmt::Debug for StatsPage {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("StatsPage").field("number", &self.number).finish_non_exhaustive()
    }
}

impl StatsPage {
    /// Makes the page of the daemon that has this admin socket: nobody else has its lock, so a page that is there is a dead daemon's.
    /// `open_to_group`: whoever is in the group of the socket's folder may read it.
    ///
    /// # Errors
    /// If there is no shared memory, or the name is somebody else's.
    pub fn create(admin_socket: &Path, boot_id: u64, open_to_group: bool) -> io::Result<Self> {
        let path = file_of(admin_socket);
        match std::fs::remove_file(&path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        let slots = usize::try_from(2 * SLOT_BYTES).map_err(io::Error::other)?;
        let conf = ShmemConf::new().os_id(name_of(admin_socket)).size(slots);
        let object = conf.create().map_err(io::Error::other)?;
        let file = OpenOptions::new().write(true).custom_flags(libc::O_NOFOLLOW).open(&path)?;
        // For as long as this process has it open: who finds it unlocked may remove it.
        file.try_lock()?;
        if open_to_group {
            let folder = admin_socket.parent().filter(|folder| !folder.as_os_str().is_empty());
            let group = std::fs::metadata(folder.unwrap_or(Path::new(".")))?.gid();
            std::os::unix::fs::fchown(&file, None, Some(group))?;
            file.set_permissions(Permissions::from_mode(0o640))?;
        }
        Ok(Self { file, boot_id, number: 0, open_to_group, _object: object })
    }

    /// Puts a body there, in the place of the one before the last.
    ///
    /// # Errors
    /// If the system has no memory for it, or it is larger than a slot: then all stays as it was, and ages.
    pub(super) fn put(&mut self, body: &[u8]) -> io::Result<()> {
        let most = SLOT_BYTES as usize - HEAD_BYTES;
        if body.len() > most {
            let what =
                format!("a status of {} bytes does not fit into the {most} of a stats page", body.len());
            return Err(io::Error::other(what));
        }
        self.number += 1;
        let written = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
        let head = Head { bytes: body.len() as u32, number: self.number, written, boot_id: self.boot_id };
        let slot = self.number % 2 * SLOT_BYTES;
        self.file.write_all_at(body, slot + HEAD_BYTES as u64)?;
        self.file.write_all_at(&head.encode(body), slot)
    }

    /// Whether somebody took its name away: a daemon that was on its way out, or a cleaner of temporary files.
    pub(super) fn is_gone(&self) -> bool {
        self.file.metadata().is_ok_and(|found| found.nlink() == 0)
    }
}

/// Removes the pages that dead daemons of this user have left: nobody has them locked, nor has written to them for a while.
pub fn sweep() {
    let Ok(found) = std::fs::read_dir(FOLDER) else { return };
    for entry in found.flatten() {
        let name = entry.file_name();
        let ours = name.to_str().and_then(|name| name.strip_prefix(PREFIX));
        let ours =
            ours.is_some_and(|hash| hash.len() == 16 && hash.bytes().all(|byte| byte.is_ascii_hexdigit()));
        if ours && is_left(&entry.path()) {
            match std::fs::remove_file(entry.path()) {
                Ok(()) => tracing::debug!(
                    "{} was left by a daemon that is dead; it is gone",
                    entry.path().display()
                ),
                Err(error) => tracing::debug!("{} cannot be removed: {error}", entry.path().display()),
            }
        }
    }
}

fn is_left(path: &Path) -> bool {
    let opened = OpenOptions::new().read(true).custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK).open(path);
    let Ok(file) = opened else { return false };
    let Ok(found) = file.metadata() else { return false };
    // Daemons of versions before this one lock nothing, and write twice a second. A new one's page is young until it is locked.
    let old = found.modified().ok().and_then(|written| written.elapsed().ok());
    let old = old.is_some_and(|age| age > Duration::from_secs(OLD_S));
    found.is_file() && found.uid() == nix::unistd::geteuid().as_raw() && old && file.try_lock().is_ok()
}

/// Writes the page until the task is dropped. Another one is made where it is gone, and where other people may read it than before, for
/// whoever has opened a page can read that one for ever. A daemon without one serves as well: what fails is said once.
pub async fn keep(
    page: io::Result<StatsPage>,
    make: impl Fn() -> io::Result<StatsPage>,
    registry: Arc<Registry>,
) {
    let access = registry.access();
    let mut beat = tokio::time::interval(EVERY);
    beat.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    let (mut page, mut said) = (page, false);
    loop {
        beat.tick().await;
        let fits = |page: &StatsPage| page.open_to_group == access.is_open() && !page.is_gone();
        if !page.as_ref().is_ok_and(fits) {
            // The old one takes its name away when it goes, which must not be the new one's.
            drop(std::mem::replace(&mut page, Err(io::ErrorKind::NotFound.into())));
            page = make();
        }
        let written = match &mut page {
            Ok(page) => {
                serde_json::to_vec(&registry.report()).map_err(Into::into).and_then(|body| page.put(&body))
            }
            Err(error) => Err(io::Error::other(error.to_string())),
        };
        if let Err(error) = written
            && !std::mem::replace(&mut said, true)
        {
            tracing::warn!("no stats page: {error}; `kvoyant top` asks the admin socket instead");
        }
    }
}
