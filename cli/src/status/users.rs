//! What each user has, of how much, and who may connect.

use std::fmt::Write;

use kvoyant_daemon::quota::{AccessReport, UseReport, UserReport};
use kvoyant_daemon::status::StatusReport;
use kvoyant_protocol::quota::{QUOTAS, Quota};

use super::{bytes, counted};

/// One line of who may connect, where that is said.
pub(super) fn access(access: &AccessReport) -> Option<String> {
    let list = |what: &str, ids: &[u32]| {
        let ids: Vec<_> = ids.iter().map(ToString::to_string).collect();
        (!ids.is_empty()).then(|| format!("{what} {}", ids.join(", ")))
    };
    let lists = [list("users", &access.allow_users), list("groups", &access.allow_groups)];
    let lists: Vec<_> = lists.into_iter().flatten().collect();
    (!lists.is_empty())
        .then(|| format!("{}; {} refused", lists.join(", "), counted(access.refused, "connection")))
}

/// A table of users who have anything, or were refused anything.
pub(super) fn table(report: &StatusReport, out: &mut String) {
    let shown = |user: &&UserReport| user.uses.values().any(|used| used.held + used.refused > 0);
    let users: Vec<_> = report.users.iter().filter(shown).collect();
    if users.is_empty() {
        return;
    }
    let _ = write!(out, "\n{:>10}", "user");
    for quota in QUOTAS {
        let _ = write!(out, " {:>21}", title(quota));
    }
    out.push('\n');
    for user in users {
        let _ = write!(out, "{:>10}", user.uid);
        for quota in QUOTAS {
            let used = user.uses.get(&quota);
            let _ = write!(out, " {:>21}", used.map(|used| cell(quota, used)).unwrap_or_default());
        }
        let refused: Vec<_> = user
            .uses
            .iter()
            .filter(|(_, used)| used.refused > 0)
            .map(|(quota, used)| format!("{} of {}", counted(used.refused, "time"), title(*quota)))
            .collect();
        out.push('\n');
        if !refused.is_empty() {
            let _ = writeln!(out, "{:>10}  refused more {}", "", refused.join(", "));
        }
    }
}

fn title(quota: Quota) -> &'static str {
    match quota {
        Quota::InFlight => "in flight",
        Quota::Spill => "disk",
        other => other.key(),
    }
}

/// What is held, of how much.
fn cell(quota: Quota, used: &UseReport) -> String {
    let amount = |count: u64| if quota.is_bytes() { bytes(count) } else { count.to_string() };
    match used.limit {
        Some(limit) => format!("{} of {}", amount(used.held), amount(limit)),
        None => amount(used.held),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whoever_may_connect_is_named_and_so_is_how_many_were_not_let_in() {
        assert_eq!(access(&AccessReport::default()), None);
        let lists = AccessReport { allow_users: vec![5, 1001], allow_groups: vec![100], refused: 3 };
        assert_eq!(access(&lists).unwrap(), "users 5, 1001, groups 100; 3 connections refused");
    }

    #[test]
    fn what_is_held_stands_beside_its_quota() {
        let used = UseReport { held: 3, peak: 4, limit: Some(4), refused: 1 };
        assert_eq!(cell(Quota::Sessions, &used), "3 of 4");
        assert_eq!(cell(Quota::Host, &UseReport { held: 64 << 20, limit: None, ..used }), "64.00 MiB");
    }
}
