//! What a daemon holds: by its own account, and by the kernel's.

use std::time::{Duration, Instant};

use kvoyant_daemon::status::{StatusReport, Totals};
use nix::unistd::Pid;
use serde::Serialize;

/// Everything that a session could leave behind.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Accounts {
    /// Sums over sessions: sequences, tokens, pages, bytes of each kind.
    pub totals: Totals,
    /// Bytes of extents in use.
    pub arena_bytes: u64,
    /// Bytes of all extents there are.
    pub made_bytes: u64,
    /// Bytes of spilled pages, all places together.
    pub spilled_bytes: u64,
    /// Open descriptors of its process.
    pub descriptors: usize,
    /// Mappings of memfds in its process.
    pub mappings: usize,
}

impl Accounts {
    /// At this moment. `None` if the daemon gives no answer.
    #[must_use]
    pub fn take(status: &StatusReport, daemon: Pid) -> Option<Self> {
        let maps = std::fs::read_to_string(format!("/proc/{daemon}/maps")).ok()?;
        // What was copied since the start only grows.
        let mut totals = Totals { bytes_moved: 0, ..status.totals.clone() };
        if !status.spill.is_empty() {
            // Pages of whoever lives come and go between memory, disk and slab: all of them together are as many as before.
            totals.pages = status.sessions.iter().map(|session| session.pages + session.spilled_pages).sum();
            (totals.kv_bytes, totals.slab_bytes) = (0, 0);
        }
        Some(Self {
            totals,
            arena_bytes: status.arena.used_bytes,
            made_bytes: status.arena.pool.made_bytes,
            spilled_bytes: status.spill.iter().map(|place| place.used_bytes).sum(),
            descriptors: std::fs::read_dir(format!("/proc/{daemon}/fd")).ok()?.count(),
            mappings: maps.lines().filter(|line| line.contains("/memfd:")).count(),
        })
    }

    /// Whether nothing is held that was not held then. Descriptors may be fewer.
    #[must_use]
    pub fn came_back_to(&self, before: &Self) -> bool {
        let alike = Self { descriptors: before.descriptors, ..self.clone() };
        alike == *before && self.descriptors <= before.descriptors
    }
}

/// Waits until a daemon holds no more than before; returns how long that took.
///
/// # Errors
/// What is still held when patience ends.
pub fn settle(
    mut look: impl FnMut() -> Option<Accounts>,
    before: &Accounts,
    patience: Duration,
) -> Result<Duration, String> {
    let since = Instant::now();
    loop {
        let now = look();
        if now.as_ref().is_some_and(|now| now.came_back_to(before)) {
            return Ok(since.elapsed());
        }
        if since.elapsed() > patience {
            return Err(match now {
                Some(now) => format!("held before: {before:?}; held now: {now:?}"),
                None => "the daemon gives no status".into(),
            });
        }
        std::thread::sleep(Duration::from_millis(1));
    }
}
