//! Who is at the other end of an admin connection, and what of.

/// A user, as the kernel names them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Caller {
    /// Their id.
    pub(super) uid: u32,
    /// The daemon's own user's.
    pub(super) daemon: u32,
    /// Whether they came over TCP, where nobody says who they are.
    pub(super) remote: bool,
    /// Whether the allow-lists let them in.
    pub(super) admitted: bool,
    /// Whether they have sent the token that stands for the daemon's user.
    pub(super) token: bool,
}

impl Caller {
    /// Somebody who came over TCP.
    pub(super) fn remote() -> Self {
        Self { uid: u32::MAX, daemon: u32::MAX, remote: true, admitted: true, token: false }
    }

    /// The same, who has sent a token, or has not.
    pub(super) fn with_token(self, token: bool) -> Self {
        Self { token, ..self }
    }

    /// Whose things are meant where nobody is named: who has the token is the daemon's user.
    pub(super) fn own(self) -> u32 {
        if self.token { nix::unistd::geteuid().as_raw() } else { self.uid }
    }

    /// What the log calls them.
    pub(super) fn name(self) -> String {
        if self.remote { "whoever has the token".into() } else { format!("user {}", self.uid) }
    }

    /// Whether they answer for the whole daemon: root, and its own user, who could read its memory anyway.
    pub(super) fn operates(self) -> bool {
        self.token || !self.remote && (self.uid == 0 || self.uid == self.daemon)
    }

    /// Whether they may see and change what is this user's.
    pub(super) fn may(self, owner: u32) -> bool {
        self.operates() || !self.remote && self.uid == owner
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn root_the_daemons_user_and_the_owner_may_and_nobody_else() {
        let caller = |uid| Caller { uid, daemon: 990, remote: false, admitted: true, token: false };
        assert!(caller(0).may(1000) && caller(990).may(1000) && caller(1000).may(1000));
        assert!(!caller(1001).may(1000) && !caller(1001).may(0) && !caller(1000).may(990));
        // A peer that the kernel does not name.
        assert!(!caller(u32::MAX).may(0));
        let remote = Caller::remote();
        assert!(!remote.operates() && !remote.may(0) && !remote.may(u32::MAX));
        let known = remote.with_token(true);
        assert!(known.operates() && known.may(1000));
        assert_eq!((known.own(), caller(1000).own()), (nix::unistd::geteuid().as_raw(), 1000));
    }
}
