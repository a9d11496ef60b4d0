//! What a daemon's process has open and mapped, and what the daemon counts.

use std::collections::{BTreeMap, BTreeSet};

use kvoyant_daemon::status::StatusReport;
use kvoyant_protocol::EXTENT_BYTES;
use nix::unistd::Pid;

/// What a daemon watches a client's process by.
pub(super) const PROCESS: &str = "fd anon_inode:[pidfd]";

/// Descriptors and mappings by kind, and what the daemon counts.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(super) struct Census(pub(super) BTreeMap<String, u64>);

impl Census {
    pub(super) fn of(pid: Pid, status: &StatusReport) -> Self {
        let mut all = BTreeMap::new();
        let kind = |target: &str| -> Option<String> {
            // "/memfd:kvoyant-extent (deleted)", "socket:[123]", "anon_inode:[eventpoll]", "/tmp/…".
            let target = target.strip_suffix(" (deleted)").unwrap_or(target);
            let name = target.rsplit('/').next()?;
            if name.starts_with("kvoyant-stats-") {
                // Each daemon's is named after its own socket.
                return Some("stats page".to_owned());
            }
            let end = if name.starts_with("anon_inode") { &[' '][..] } else { &['[', ' '] };
            Some(name.split(end).next()?.to_owned())
        };
        let mut streams = stream_sockets();
        let open = std::fs::read_dir(format!("/proc/{pid}/fd")).into_iter().flatten().flatten();
        let open: Vec<_> = open.filter_map(|entry| std::fs::read_link(entry.path()).ok()).collect();
        // Others come and go meanwhile, and the kernel's list can lack some that stay: it is read twice, and what it never has counts.
        streams.extend(stream_sockets());
        for target in open {
            let target = target.to_string_lossy();
            let socket = target.strip_prefix("socket:[").and_then(|end| end.strip_suffix(']'));
            // Those of the admin side come and go with each look at the daemon.
            if socket.is_some_and(|inode| streams.contains(inode)) {
                continue;
            }
            if let Some(kind) = kind(&target) {
                *all.entry(format!("fd {kind}")).or_default() += 1;
            }
        }
        let maps = std::fs::read_to_string(format!("/proc/{pid}/maps")).unwrap_or_default();
        for line in maps.lines().filter(|line| line.contains("/memfd:kvoyant")) {
            if let Some(kind) = line.split_once("/memfd").and_then(|(_, name)| kind(name)) {
                *all.entry(format!("map {kind}")).or_default() += 1;
            }
        }
        // What the pool has made it may keep ready: how much that is depends on which sessions met.
        let made = status.arena.pool.made_bytes / EXTENT_BYTES as u64;
        for kind in ["fd memfd:kvoyant-extent", "map :kvoyant-extent"] {
            if let Some(count) = all.get_mut(kind) {
                *count = u64::saturating_sub(*count, made);
            }
        }
        let totals = &status.totals;
        for (name, count) in [
            ("sessions", totals.sessions),
            ("sequences", totals.sequences),
            ("pages", totals.pages),
            ("digest bytes", totals.digest_bytes),
            ("slab bytes", totals.slab_bytes),
            ("arena bytes", status.arena.used_bytes),
        ] {
            all.insert(name.to_owned(), count);
        }
        Self(all)
    }

    /// Counts a kind no more.
    pub(super) fn forget(&mut self, kind: &str) {
        self.0.remove(kind);
    }

    /// Counts no kind whose name has this in it.
    pub(super) fn forget_all(&mut self, part: &str) {
        self.0.retain(|kind, _| !kind.contains(part));
    }

    /// What is more here than there.
    pub(super) fn beyond(&self, other: &Self) -> Vec<String> {
        let more = self.0.iter().filter_map(|(kind, count)| {
            let most = other.0.get(kind).copied().unwrap_or(0);
            (*count > most).then(|| format!("{kind}: {count} instead of {most}"))
        });
        more.collect()
    }
}

/// Inodes of stream sockets, as the admin side has them; sessions have others.
fn stream_sockets() -> BTreeSet<String> {
    const STREAM: &str = "0001";
    let table = std::fs::read_to_string("/proc/net/unix").unwrap_or_default();
    let columns = table.lines().map(|line| line.split_whitespace().collect::<Vec<_>>());
    columns
        .filter(|line| line.get(4) == Some(&STREAM))
        .filter_map(|line| Some((*line.get(6)?).to_owned()))
        .collect()
}
