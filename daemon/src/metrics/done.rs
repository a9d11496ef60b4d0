//! What sessions have done, by user: it outlasts them, so that counters only ever go up.

use std::collections::BTreeMap;

use kvoyant_protocol::wire::{STATS, Stat};

use super::histogram::{BUCKETS, Counts, Example};
use super::seen::Sights;
use crate::status::SessionStatus;

/// Users that are told apart among those whose sessions have ended; more go under [`OTHERS`].
pub const USERS_MAX: usize = 1024;

/// Whom the kernel never names: more users than are told apart.
pub const OTHERS: u32 = u32::MAX;

/// Counters whose value is how things are, and not what has been done.
const LEVELS: [Stat; 3] = [Stat::PagesPeak, Stat::PagesMost, Stat::PagesSpilled];

/// What sessions have done.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Done {
    /// Sessions that have begun.
    pub sessions: u64,
    /// Counters in the order of [`Stat`], without those that are no counts.
    pub stats: [u64; STATS],
    /// Times of requests, by stage.
    pub times: [Counts; 4],
    /// A request in each bucket of the whole time.
    pub examples: [Option<Example>; BUCKETS],
    /// What was seen of them besides.
    pub sights: Sights,
}

impl Default for Done {
    fn default() -> Self {
        Self {
            sessions: 0,
            stats: [0; STATS],
            times: Default::default(),
            examples: [None; BUCKETS],
            sights: Sights::default(),
        }
    }
}

impl Done {
    /// Adds a session's.
    pub fn add_session(&mut self, session: &SessionStatus) {
        self.sessions += 1;
        for (stat, (mine, more)) in self.stats.iter_mut().zip(session.counters()).enumerate() {
            if !LEVELS.iter().any(|level| *level as usize == stat) {
                *mine += more;
            }
        }
        for (mine, more) in self.times.iter_mut().zip(session.times.counts()) {
            mine.add(&more);
        }
        self.have_examples(&session.times.examples(session.id));
        self.sights.add(&Sights::of(&session.seen));
    }

    /// Adds others'.
    pub fn add(&mut self, other: &Self) {
        self.sessions += other.sessions;
        self.stats.iter_mut().zip(other.stats).for_each(|(mine, more)| *mine += more);
        self.times.iter_mut().zip(&other.times).for_each(|(mine, more)| mine.add(more));
        self.have_examples(&other.examples);
        self.sights.add(&other.sights);
    }

    /// Takes these, and keeps its own where there are none.
    fn have_examples(&mut self, examples: &[Option<Example>; BUCKETS]) {
        for (mine, other) in self.examples.iter_mut().zip(examples) {
            *mine = other.or(*mine);
        }
    }

    /// One of the counters.
    #[must_use]
    pub fn stat(&self, stat: Stat) -> u64 {
        self.stats[stat as usize]
    }
}

/// By user.
#[derive(Debug, Clone, Default)]
pub struct Users(pub BTreeMap<u32, Done>);

impl Users {
    /// The user's own, or that of all whom there is no room for.
    pub fn of(&mut self, uid: u32) -> &mut Done {
        let room = self.0.len() < USERS_MAX || self.0.contains_key(&uid);
        self.0.entry(if room { uid } else { OTHERS }).or_default()
    }

    /// What all of them have done.
    #[must_use]
    pub fn all(&self) -> Done {
        let mut all = Done::default();
        self.0.values().for_each(|done| all.add(done));
        all
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::Ordering;

    #[test]
    fn what_a_session_has_done_is_added_and_what_it_holds_is_not() {
        let session = SessionStatus::new(1, "a".into(), 2, 3, 0);
        session.stats[Stat::RowsSelected as usize].store(7, Ordering::Relaxed);
        session.stats[Stat::PagesSpilled as usize].store(9, Ordering::Relaxed);
        session.times.add(4, 5, [1, 2, 3]);
        let mut users = Users::default();
        users.of(3).add_session(&session);
        users.of(3).add_session(&session);
        let done = users.of(3).clone();
        assert_eq!((done.sessions, done.stat(Stat::RowsSelected), done.stat(Stat::PagesSpilled)), (2, 14, 0));
        assert_eq!(done.times[3].count(), 2);
        assert_eq!(done.examples[0], Some(Example { session: 1, ticket: 4, layer: 5, ns: 6 }));
        assert_eq!(users.all(), done);
    }

    #[test]
    fn more_users_than_are_told_apart_are_counted_together() {
        let mut users = Users::default();
        for uid in 0..USERS_MAX as u32 + 5 {
            users.of(uid).sessions += 1;
        }
        users.of(0).sessions += 1;
        assert_eq!(users.0.len(), USERS_MAX + 1);
        assert_eq!((users.of(0).sessions, users.of(OTHERS).sessions), (2, 5));
    }
}
