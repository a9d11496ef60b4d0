//! Work of several users' sessions, one piece after the other in turns.
//!
//! Users take turns, sessions of a user take turns among themselves, and what one session has asked for stays in order: whoever asks for much
//! waits for it, and nobody else does.

use std::collections::VecDeque;

/// See the module.
#[derive(Debug)]
pub(super) struct Fair<T> {
    /// Users, the next one first, each with sessions, the next one first.
    users: VecDeque<(u32, Sessions<T>)>,
}

type Sessions<T> = VecDeque<(u64, VecDeque<T>)>;

impl<T> Default for Fair<T> {
    fn default() -> Self {
        Self { users: VecDeque::new() }
    }
}

/// The list of whoever this is, last in line if they were not there.
fn line<K: PartialEq, T>(all: &mut VecDeque<(K, VecDeque<T>)>, key: K) -> Option<&mut VecDeque<T>> {
    let at = all.iter().position(|(known, _)| *known == key).unwrap_or_else(|| {
        all.push_back((key, VecDeque::new()));
        all.len() - 1
    });
    all.get_mut(at).map(|(_, list)| list)
}

impl<T> Fair<T> {
    pub(super) fn push(&mut self, uid: u32, session: u64, work: T) {
        if let Some(list) = line(&mut self.users, uid).and_then(|sessions| line(sessions, session)) {
            list.push_back(work);
        }
    }

    pub(super) fn pop(&mut self) -> Option<T> {
        let (uid, mut sessions) = self.users.pop_front()?;
        let (session, mut list) = sessions.pop_front()?;
        let work = list.pop_front();
        if !list.is_empty() {
            sessions.push_back((session, list));
        }
        if !sessions.is_empty() {
            self.users.push_back((uid, sessions));
        }
        work
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn users_take_turns_and_so_do_their_sessions_and_each_sessions_work_stays_in_order() {
        let mut fair = Fair::default();
        for work in 0..3 {
            fair.push(1, 10, (10, work));
        }
        (0..2).for_each(|work| fair.push(1, 11, (11, work)));
        (0..2).for_each(|work| fair.push(2, 20, (20, work)));
        let order: Vec<_> = std::iter::from_fn(|| fair.pop()).collect();
        assert_eq!(order, [(10, 0), (20, 0), (11, 0), (20, 1), (10, 1), (11, 1), (10, 2)]);
        assert!(fair.pop().is_none() && fair.users.is_empty());
    }

    #[test]
    fn whoever_comes_while_others_wait_has_their_turn_after_one_piece_of_each() {
        let mut fair = Fair::default();
        (0..1000).for_each(|work| fair.push(1, 1, work));
        assert_eq!(fair.pop(), Some(0));
        fair.push(2, 2, 5000);
        assert_eq!((fair.pop(), fair.pop(), fair.pop()), (Some(1), Some(5000), Some(2)));
    }
}
