//! Whose turn it is on a lane: users take turns, and so do the sessions of one user.
//!
//! In one round every user gets one turn, however many sessions they have there, so that a flood of sessions slows down the sessions of
//! its own user alone. A turn is bounded (see [`FAIR_SHARE`](super::FAIR_SHARE)); whoever finds nothing to do has not had one.

/// Somebody who takes turns.
pub(super) trait Seat {
    /// Whose it is.
    fn uid(&self) -> u32;
    /// The last round in which it had a turn.
    fn last(&self) -> u64;
    /// It has had one.
    fn took(&mut self, round: u64);
}

/// See the module.
#[derive(Debug, Default)]
pub(super) struct Turns {
    round: u64,
    /// Users who have had their turn.
    had: Vec<u32>,
}

impl Turns {
    /// One round: `serve` says whether somebody had something to do. True if anybody had.
    pub(super) fn round<S: Seat>(&mut self, seats: &mut [S], mut serve: impl FnMut(&mut S) -> bool) -> bool {
        self.round += 1;
        self.had.clear();
        let several = seats.first().is_some_and(|first| seats.iter().any(|seat| seat.uid() != first.uid()));
        let (mut any, mut passed) = (false, false);
        for seat in seats.iter_mut() {
            let uid = seat.uid();
            // One user alone has all turns.
            if several && self.had.contains(&uid) {
                passed = true;
                continue;
            }
            if serve(seat) {
                any = true;
                seat.took(self.round);
                if several {
                    self.had.push(uid);
                }
            }
        }
        if passed {
            // Whoever has waited longest comes first.
            seats.sort_by_key(Seat::last);
        }
        any
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug)]
    struct Session {
        uid: u32,
        last: u64,
        work: u32,
        served: u32,
    }

    impl Seat for Session {
        fn uid(&self) -> u32 {
            self.uid
        }

        fn last(&self) -> u64 {
            self.last
        }

        fn took(&mut self, round: u64) {
            self.last = round;
        }
    }

    fn sessions(of: &[(u32, u32)]) -> Vec<Session> {
        of.iter().map(|(uid, work)| Session { uid: *uid, last: 0, work: *work, served: 0 }).collect()
    }

    fn serve(session: &mut Session) -> bool {
        let had = session.work > 0;
        session.work -= u32::from(had);
        session.served += u32::from(had);
        had
    }

    #[test]
    fn a_users_one_session_gets_as_many_turns_as_all_sessions_of_another_user_together() {
        let mut flood: Vec<(u32, u32)> = vec![(1, 1000); 9];
        flood.insert(4, (2, 1000));
        let (mut sessions, mut turns) = (sessions(&flood), Turns::default());
        for _ in 0..90 {
            assert!(turns.round(&mut sessions, serve));
        }
        for session in &sessions {
            assert_eq!(session.served, if session.uid == 2 { 90 } else { 10 }, "{sessions:?}");
        }
    }

    #[test]
    fn whoever_has_nothing_to_do_takes_no_turn_from_others_of_their_user() {
        let (mut sessions, mut turns) = (sessions(&[(1, 0), (1, 5), (2, 0), (1, 5)]), Turns::default());
        let rounds =
            std::iter::repeat_with(|| turns.round(&mut sessions, serve)).take_while(|any| *any).count();
        assert_eq!(rounds, 10, "one turn for user 1 in each round");
        assert!(sessions.iter().all(|session| session.work == 0));
    }

    #[test]
    fn sessions_of_one_user_who_is_alone_have_a_turn_each_in_every_round() {
        let (mut sessions, mut turns) = (sessions(&[(1, 3), (1, 3), (1, 3)]), Turns::default());
        assert!(turns.round(&mut sessions, serve));
        assert!(sessions.iter().all(|session| session.served == 1));
        assert!(!turns.round::<Session>(&mut [], serve));
    }
}
