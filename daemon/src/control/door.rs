//! How many connections there may be that are no sessions yet: each costs a descriptor and a task, and says nothing for as long as it is
//! let.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// See the module.
#[derive(Debug, Clone)]
pub(crate) struct Door {
    inside: Arc<Mutex<Inside>>,
    max: u32,
    of_a_user: u32,
}

#[derive(Debug, Default)]
struct Inside {
    all: u32,
    by_user: HashMap<u32, u32>,
}

/// One that is inside, until it is dropped.
#[derive(Debug)]
pub(crate) struct Entered {
    door: Door,
    uid: u32,
}

impl Door {
    /// For so many at a time, and so many of one user.
    pub(crate) fn new(max: u32, of_a_user: u32) -> Self {
        Self { inside: Arc::default(), max, of_a_user }
    }

    /// How many of one user may be inside.
    pub(crate) fn of_a_user(&self) -> u32 {
        self.of_a_user
    }

    fn lock(&self) -> MutexGuard<'_, Inside> {
        self.inside.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Goes in, if there is room for one more of this user.
    pub(crate) fn enter(&self, uid: u32) -> Option<Entered> {
        let mut inside = self.lock();
        let of_user = inside.by_user.get(&uid).copied().unwrap_or(0);
        if inside.all >= self.max || of_user >= self.of_a_user {
            return None;
        }
        inside.all += 1;
        inside.by_user.insert(uid, of_user + 1);
        Some(Entered { door: self.clone(), uid })
    }
}

impl Drop for Entered {
    fn drop(&mut self) {
        let mut inside = self.door.lock();
        inside.all -= 1;
        // Users that come once are not remembered for ever.
        if let Some(of_user) = inside.by_user.get_mut(&self.uid) {
            *of_user -= 1;
            if *of_user == 0 {
                inside.by_user.remove(&self.uid);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_user_cannot_keep_others_out_and_nobody_is_remembered_who_has_gone() {
        let door = Door::new(5, 3);
        let first: Vec<_> = (0..4).filter_map(|_| door.enter(1000)).collect();
        assert_eq!(first.len(), 3);
        let second: Vec<_> = (0..4).filter_map(|_| door.enter(1001)).collect();
        assert_eq!(second.len(), 2, "five in all");
        drop(first);
        assert!(door.enter(1001).is_some());
        drop(second);
        let inside = door.lock();
        assert_eq!((inside.all, inside.by_user.len()), (0, 0));
    }
}
