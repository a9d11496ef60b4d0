//! Who may connect.

use std::ffi::CString;
use std::io;
use std::os::fd::BorrowedFd;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{PoisonError, RwLock};

use kvoyant_protocol::packet;
use nix::unistd::{Gid, Uid};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{Group, User};

/// The allow-lists, and how often they kept somebody out. Empty ones let everybody in whom the sockets' permissions let in; otherwise
/// root and the daemon's own user are let in beside those who are named, for they could do anything anyway.
#[derive(Debug, Default)]
pub struct Access {
    lists: RwLock<Lists>,
    refused: AtomicU64,
}

#[derive(Debug, Clone, Default)]
struct Lists {
    users: Vec<u32>,
    groups: Vec<u32>,
}

impl Lists {
    fn of(users: &[User], groups: &[Group]) -> Self {
        let users = users.iter().map(|user| user.0).collect();
        let groups = groups.iter().map(|group| group.0).collect();
        Self { users, groups }
    }

    fn is_open(&self) -> bool {
        self.users.is_empty() && self.groups.is_empty()
    }
}

/// The allow-lists, for operators.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct AccessReport {
    /// Users who may connect; if both lists are empty, everybody whom the sockets' permissions let in.
    pub allow_users: Vec<u32>,
    /// Groups whose members may.
    pub allow_groups: Vec<u32>,
    /// Connections that were refused since the start.
    pub refused: u64,
}

impl Access {
    /// Lists of users and groups.
    #[must_use]
    pub fn new(users: &[User], groups: &[Group]) -> Self {
        Self { lists: RwLock::new(Lists::of(users, groups)), refused: AtomicU64::new(0) }
    }

    /// Other lists, for whoever connects from now on.
    pub fn set(&self, users: &[User], groups: &[Group]) {
        *self.lists.write().unwrap_or_else(PoisonError::into_inner) = Lists::of(users, groups);
    }

    fn lists(&self) -> Lists {
        self.lists.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Whether everybody may whom the sockets' permissions let in.
    #[must_use]
    pub fn is_open(&self) -> bool {
        self.lists().is_open()
    }

    /// Whether a peer may connect, who is this user as the kernel says. A refusal is counted.
    #[must_use]
    pub fn admits(&self, socket: BorrowedFd<'_>, uid: u32) -> bool {
        let admitted = self.allows(uid, nix::unistd::geteuid().as_raw(), || groups_of(socket, uid));
        if !admitted {
            self.refused.fetch_add(1, Ordering::Relaxed);
        }
        admitted
    }

    fn allows(&self, uid: u32, daemon: u32, groups: impl FnOnce() -> Vec<u32>) -> bool {
        let lists = self.lists();
        lists.is_open()
            || uid == 0
            || uid == daemon
            || lists.users.contains(&uid)
            || !lists.groups.is_empty() && groups().iter().any(|group| lists.groups.contains(group))
    }

    /// What operators see.
    #[must_use]
    pub fn report(&self) -> AccessReport {
        let Lists { users: allow_users, groups: allow_groups } = self.lists();
        AccessReport { allow_users, allow_groups, refused: self.refused.load(Ordering::Relaxed) }
    }
}

/// The groups that a peer had when it connected; where the kernel cannot say (before 4.13, and in some sandboxes), those of its user.
/// None, if nobody knows: then it is in none that is allowed.
fn groups_of(socket: BorrowedFd<'_>, uid: u32) -> Vec<u32> {
    packet::peer_groups(socket).or_else(|_| groups_of_user(uid)).unwrap_or_else(|error| {
        tracing::warn!("the groups of user {uid} are not known: {error}");
        Vec::new()
    })
}

fn groups_of_user(uid: u32) -> io::Result<Vec<u32>> {
    let user = nix::unistd::User::from_uid(Uid::from_raw(uid))?;
    let Some(user) = user else { return Ok(Vec::new()) };
    let name = CString::new(user.name)?;
    let groups = nix::unistd::getgrouplist(&name, user.gid)?;
    Ok(groups.into_iter().map(Gid::as_raw).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn none() -> Vec<u32> {
        Vec::new()
    }

    #[test]
    fn empty_lists_let_everybody_in_and_others_those_they_name_root_and_the_daemons_user() {
        assert!(Access::default().allows(1001, 990, none));
        let access = Access::new(&[User(1001)], &[Group(50)]);
        for uid in [0, 990, 1001] {
            assert!(access.allows(uid, 990, none), "{uid}");
        }
        assert!(!access.allows(1002, 990, none));
        assert!(!access.allows(u32::MAX, 990, none), "a peer that the kernel does not name");
        assert!(access.allows(1002, 990, || vec![7, 50]), "a supplementary group counts");
        assert!(!access.allows(1002, 990, || vec![7]));
        // A list of groups alone keeps everybody else out as well.
        assert!(!Access::new(&[], &[Group(50)]).allows(1001, 990, none));
    }

    #[test]
    fn roots_groups_are_known_by_name_too() {
        let groups = groups_of_user(0).unwrap();
        assert!(groups.contains(&0), "{groups:?}");
        assert_eq!(groups_of_user(4_000_000_000).unwrap(), Vec::<u32>::new());
    }
}
