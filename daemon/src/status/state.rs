//! The daemon's state as a whole: whether it is drained, and how it is in one line.

use std::collections::BTreeSet;
use std::sync::atomic::Ordering;

use bytesize::ByteSize;

use super::Registry;

impl Registry {
    /// Takes no new sessions from now on, or takes them again. Whether that is another answer than before.
    pub(crate) fn drain(&self, draining: bool) -> bool {
        self.draining.swap(draining, Ordering::Relaxed) != draining
    }

    /// Whether no new sessions are taken.
    #[must_use]
    pub fn is_draining(&self) -> bool {
        self.draining.load(Ordering::Relaxed)
    }

    /// Numbers of the open sessions.
    pub(crate) fn open_sessions(&self) -> Vec<u64> {
        self.sessions().open.keys().copied().collect()
    }

    /// How it is in one line, without asking anybody.
    #[must_use]
    pub(crate) fn line(&self) -> String {
        let (sessions, users) = {
            let sessions = self.sessions();
            let users: BTreeSet<u32> = sessions.open.values().map(|session| session.uid).collect();
            (sessions.open.len(), users.len())
        };
        let plural = |count: usize| if count == 1 { "" } else { "s" };
        let budget = self.pool.budget();
        let (used, total) = (ByteSize(budget.used_bytes()), ByteSize(budget.total_bytes()));
        format!(
            "{}{sessions} session{} of {users} user{}, {used} of {total} in use",
            if self.is_draining() { "draining: " } else { "" },
            plural(sessions),
            plural(users)
        )
    }
}
