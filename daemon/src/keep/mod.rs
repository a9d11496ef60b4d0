//! Sessions that outlast the daemon: their files, held for whoever comes next.
//!
//! Extents, journals and artifacts are files in memory. While a session lives they are held here by name, and by the service manager too
//! where it stores descriptors, so that they are there again however this process ends. The next daemon gets them from the manager when it
//! starts, or from this one when it [takes over](takeover).
//!
//! | room | what lives there |
//! |---|---|
//! | [`lane::keeping`](crate::lane::keeping) | what a lane writes to a session's journal, and how its model is made of that again |
//! | `supervisor` | the service manager's store of descriptors |
//! | [`takeover`] | one daemon's sessions handed to another |
//! | `control::claim` | sessions that wait for their clients |

mod supervisor;
pub mod takeover;

use std::collections::BTreeMap;
use std::fmt;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::str::FromStr;
use std::sync::{Mutex, MutexGuard, PoisonError};

use thiserror::Error;

use crate::config::Config;
use crate::device::DeviceName;
use supervisor::Supervisor;

/// Why sessions cannot be kept.
#[derive(Debug, Error)]
pub enum KeepError {
    /// There is one, and it cannot be reached.
    #[error("cannot reach the service manager at NOTIFY_SOCKET: {0}; unset it to start without")]
    Supervisor(io::Error),
}

/// Whether sessions are to outlast this daemon, and by whom.
///
/// # Errors
/// A service manager that cannot be reached.
pub(crate) fn choose(config: &Config) -> Result<Option<Keep>, KeepError> {
    let wanted = match config.keep_sessions.as_str() {
        "on" => true,
        "auto" => Supervisor::stores(),
        _ => false,
    };
    if !wanted {
        return Ok(None);
    }
    if config.device_name() == DeviceName::Host {
        return Ok(Some(Keep::new(Supervisor::find().map_err(KeepError::Supervisor)?)));
    }
    tracing::warn!(
        "open sessions end with this daemon, whatever keep_sessions says: their memory is a GPU's"
    );
    Ok(None)
}

/// Lets go of what was stored for a daemon that kept sessions, where this one does not.
pub(crate) fn discard(left: &[Named]) {
    if left.is_empty() {
        return;
    }
    tracing::warn!(
        "{} files of sessions were left to this daemon, which keeps none (keep_sessions)",
        left.len()
    );
    if let Ok(Some(supervisor)) = Supervisor::find() {
        left.iter().for_each(|(name, _)| supervisor.remove(&name.to_string()));
    }
}

/// Takes sessions' files out of what the service manager has handed to this process.
pub(crate) fn ours(handed: &mut Vec<(String, OwnedFd)>) -> Vec<Named> {
    let is_ours = |(name, _): &(String, OwnedFd)| name.parse::<Name>().is_ok();
    let (ours, others): (Vec<_>, Vec<_>) = std::mem::take(handed).into_iter().partition(is_ours);
    *handed = others;
    ours.into_iter().filter_map(|(name, fd)| Some((name.parse().ok()?, fd))).collect()
}

/// What a session's file is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Piece {
    /// One of the two files of its journal.
    Journal(u8),
    /// An extent, by the number of its file.
    Extent(u64),
    /// An artifact, by the number of its file.
    Artifact(u64),
    /// The log of frames that were taken since its journal was sealed.
    Frames,
    /// An extent of published prefixes, by the number of its file. Several sessions may have it, and it is stored once, under no session's name.
    Shared(u64),
}

/// What a descriptor of a session is called where it is stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Name {
    /// The session's number.
    pub session: u64,
    /// What it is.
    pub piece: Piece,
}

const PREFIX: &str = "kvoyant";

/// No session has this number: what is stored under it is several ones'.
pub(crate) const SEVERAL: u64 = 0;

impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (kind, number) = match self.piece {
            Piece::Journal(index) => ("journal", u64::from(index)),
            Piece::Extent(number) => ("extent", number),
            Piece::Artifact(number) => ("artifact", number),
            Piece::Frames => ("frames", 0),
            Piece::Shared(number) => ("shared", number),
        };
        write!(f, "{PREFIX}.{}.{kind}.{number}", self.session)
    }
}

impl Name {
    /// The name under which it is stored.
    fn stored(self) -> Self {
        match self.piece {
            Piece::Shared(_) => Self { session: SEVERAL, ..self },
            _ => self,
        }
    }
}

impl FromStr for Name {
    type Err = ();

    fn from_str(text: &str) -> Result<Self, ()> {
        let parts: Vec<&str> = text.split('.').collect();
        let [PREFIX, session, kind, number] = parts[..] else { return Err(()) };
        let number: u64 = number.parse().map_err(drop)?;
        let piece = match kind {
            "journal" => Piece::Journal(u8::try_from(number).ok().filter(|index| *index < 2).ok_or(())?),
            "extent" => Piece::Extent(number),
            "artifact" => Piece::Artifact(number),
            "frames" if number == 0 => Piece::Frames,
            "shared" => Piece::Shared(number),
            _ => return Err(()),
        };
        Ok(Self { session: session.parse().map_err(drop)?, piece })
    }
}

/// A descriptor by its name.
pub type Named = (Name, OwnedFd);

/// See the module.
#[derive(Debug, Default)]
pub struct Keep {
    held: Mutex<BTreeMap<Name, OwnedFd>>,
    supervisor: Option<Supervisor>,
}

impl Keep {
    /// Holds files for whoever takes over; with a supervisor, which stores them, for the next start too.
    #[must_use]
    pub(crate) fn new(supervisor: Option<Supervisor>) -> Self {
        Self { held: Mutex::default(), supervisor }
    }

    fn held(&self) -> MutexGuard<'_, BTreeMap<Name, OwnedFd>> {
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Holds a session's file. Once this returns, it outlasts this process.
    ///
    /// # Errors
    /// If the supervisor does not take it within a moment.
    pub fn add(&self, session: u64, piece: Piece, file: OwnedFd) -> io::Result<()> {
        let name = Name { session, piece };
        // In one step: whoever lets go of a file that several have looks whether it is the last one.
        let mut held = self.held();
        if let Some(supervisor) = &self.supervisor
            && !has_stored(&held, name)
        {
            supervisor.store(&name.stored().to_string(), file.as_fd())?;
        }
        held.insert(name, file);
        Ok(())
    }

    /// Holds a file that the supervisor may have already.
    pub(crate) fn has(&self, name: Name, file: OwnedFd, stored: bool) -> io::Result<()> {
        if stored {
            self.held().insert(name, file);
            return Ok(());
        }
        self.add(name.session, name.piece, file)
    }

    /// Lets go of a session's file.
    pub fn remove(&self, session: u64, piece: Piece) {
        let name = Name { session, piece };
        let mut held = self.held();
        if let (Some(_), Some(supervisor)) = (held.remove(&name), &self.supervisor)
            && !has_stored(&held, name)
        {
            supervisor.remove(&name.stored().to_string());
        }
    }

    /// Lets go of everything of a session.
    pub fn forget(&self, session: u64) {
        let all: Vec<Piece> = {
            let held = self.held();
            held.keys().filter(|name| name.session == session).map(|name| name.piece).collect()
        };
        all.into_iter().for_each(|piece| self.remove(session, piece));
    }

    /// Whether there is anything for a daemon that comes after this one has ended: one that takes over has it anyway.
    pub(crate) fn leaves_any(&self, successor: bool) -> bool {
        (successor || self.supervisor.is_some()) && !self.held().is_empty()
    }

    /// Takes everything out, to hand it over.
    pub(crate) fn take(&self) -> BTreeMap<Name, OwnedFd> {
        let held = std::mem::take(&mut *self.held());
        held.into_iter().map(|(name, file)| (name.stored(), file)).collect()
    }
}

/// Whether another session has the same file.
fn has_stored(held: &BTreeMap<Name, OwnedFd>, name: Name) -> bool {
    let same = |other: &Name| other.stored() == name.stored() && *other != name;
    name.stored().session == SEVERAL && held.keys().any(same)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_read_as_they_are_written_and_nothing_else_is_one() {
        for piece in
            [Piece::Journal(1), Piece::Extent(77), Piece::Artifact(u64::MAX), Piece::Frames, Piece::Shared(9)]
        {
            let name = Name { session: 12, piece };
            assert_eq!(name.to_string().parse(), Ok(name));
        }
        for text in [
            "",
            "kvoyant",
            "kvoyant.1.journal.2",
            "kvoyant.1.frames.1",
            "kvoyant.1.extent.-1",
            "other.1.extent.1",
            "kvoyant.1.extent.1.1",
        ] {
            assert_eq!(text.parse::<Name>(), Err(()), "{text}");
        }
    }

    #[test]
    fn what_ends_is_let_go_of_and_nothing_else() {
        let keep = Keep::default();
        let file = || OwnedFd::from(std::fs::File::open("/dev/null").unwrap());
        for (session, piece) in [(1, Piece::Journal(0)), (1, Piece::Extent(3)), (2, Piece::Extent(4))] {
            keep.add(session, piece, file()).unwrap();
        }
        keep.remove(1, Piece::Extent(3));
        assert_eq!(keep.held().len(), 2);
        keep.forget(1);
        let left: Vec<Name> = keep.take().into_keys().collect();
        assert_eq!(left, [Name { session: 2, piece: Piece::Extent(4) }]);
    }

    #[test]
    fn what_several_have_is_handed_over_once_and_let_go_of_with_the_last_of_them() {
        let keep = Keep::default();
        let file = || OwnedFd::from(std::fs::File::open("/dev/null").unwrap());
        let shared = Piece::Shared(8);
        for session in [1, 2, SEVERAL] {
            keep.add(session, shared, file()).unwrap();
        }
        let name = Name { session: 1, piece: shared };
        keep.forget(SEVERAL);
        keep.forget(2);
        assert!(!has_stored(&keep.held(), name), "one is left");
        keep.add(2, shared, file()).unwrap();
        assert!(has_stored(&keep.held(), name));
        let left: Vec<Name> = keep.take().into_keys().collect();
        assert_eq!(left, [Name { session: SEVERAL, piece: shared }]);
    }
}
