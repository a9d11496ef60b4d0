//! Clients that attack a daemon, one process each, with a well-behaved neighbour beside them.
//!
//! Each [`Attack`] is a row of a table: a name, what it does, and what has to come of it. The [`runner`] starts a real daemon process
//! and a [`neighbour`], runs each attack in a process of its own, and gives three answers: what became of the attacker, whether
//! the neighbour was harmed, and whether the daemon has everything back.
//!
//! | room | what lives there |
//! |---|---|
//! | [`attacks`] | the table |
//! | [`stage`] | what an attacker has: sockets, sessions by hand, ways to hear how it ended |
//! | [`neighbour`] | the session that must not notice |
//! | [`accounts`] | what the daemon holds, from its status and from `/proc` |
//! | [`runner`] | one attack after the other, and their verdicts |
//! | [`reap`] | clients that are killed at random moments, and how long until everything of theirs is back |
//! | [`report`] | the table that people read, and JSON |

#![forbid(unsafe_code)]

pub mod accounts;
pub mod attacks;
pub mod neighbour;
pub mod reap;
pub mod report;
pub mod runner;
pub mod stage;

use serde::{Deserialize, Serialize};

use crate::stage::Stage;

/// What became of an attacker.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Verdict {
    /// It was served, or what it did had no effect: nothing in it was against the rules, or nothing of it arrived.
    Pass,
    /// It was refused, or its session was ended, with a reason that says what was wrong.
    Reject,
    /// It got no answer in time.
    Wedged,
    /// Anything else: no reason, the wrong reason, a daemon that died, or that has not everything back.
    Fail,
}

impl std::fmt::Display for Verdict {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.pad(match self {
            Self::Pass => "pass",
            Self::Reject => "reject",
            Self::Wedged => "wedged",
            Self::Fail => "fail",
        })
    }
}

/// What an attacker says of its own end.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Outcome {
    /// In a word.
    pub verdict: Verdict,
    /// In the daemon's own words, or in the attacker's.
    pub said: String,
}

impl Outcome {
    /// Nothing came of it.
    #[must_use]
    pub fn pass(said: impl Into<String>) -> Self {
        Self { verdict: Verdict::Pass, said: said.into() }
    }

    /// It was told why not.
    #[must_use]
    pub fn reject(said: impl Into<String>) -> Self {
        Self { verdict: Verdict::Reject, said: said.into() }
    }

    /// Something that must not be.
    #[must_use]
    pub fn fail(said: impl Into<String>) -> Self {
        Self { verdict: Verdict::Fail, said: said.into() }
    }
}

/// How the daemon under attack is set up.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Setup {
    /// One lane, rows copied into slabs in host memory.
    Plain,
    /// The same, and it keeps images.
    Store,
    /// The same, and pages leave host memory as soon as there are more than a few.
    Spill,
}

/// One row of the table.
#[derive(Debug, Clone, Copy)]
pub struct Attack {
    /// What it is called.
    pub name: &'static str,
    /// What it does.
    pub does: &'static str,
    /// What has to come of it.
    pub expected: Verdict,
    /// What it is done to.
    pub setup: Setup,
    /// Whether it takes seconds, so that only scripts run it.
    pub slow: bool,
    /// Doing it, in a process of its own.
    pub run: fn(&Stage) -> Outcome,
}

impl Attack {
    const fn new(
        name: &'static str,
        does: &'static str,
        expected: Verdict,
        run: fn(&Stage) -> Outcome,
    ) -> Self {
        Self { name, does, expected, setup: Setup::Plain, slow: false, run }
    }

    const fn passes(name: &'static str, does: &'static str, run: fn(&Stage) -> Outcome) -> Self {
        Self::new(name, does, Verdict::Pass, run)
    }

    const fn rejected(name: &'static str, does: &'static str, run: fn(&Stage) -> Outcome) -> Self {
        Self::new(name, does, Verdict::Reject, run)
    }

    const fn on(self, setup: Setup) -> Self {
        Self { setup, ..self }
    }

    const fn slow(self) -> Self {
        Self { slow: true, ..self }
    }
}
