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
    let columns: Vec<Column> = QUOTAS.into_iter().filter_map(|quota| Column::of(quota, &users)).collect();
    let _ = write!(out, "\n{:>10}", "user");
    for column in &columns {
        let _ = write!(out, "  {:>width$}", title(column.quota), width = column.width);
    }
    out.push('\n');
    for (at, user) in users.iter().enumerate() {
        let _ = write!(out, "{:>10}", user.uid);
        for column in &columns {
            let _ = write!(out, "  {:>width$}", column.cells[at], width = column.width);
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

/// What users have of one kind.
struct Column {
    quota: Quota,
    cells: Vec<String>,
    width: usize,
}

impl Column {
    /// As wide as it has to be; none where nobody has anything of it, nor a quota.
    fn of(quota: Quota, users: &[&UserReport]) -> Option<Self> {
        let used = |user: &&UserReport| user.uses.get(&quota).copied();
        if !users.iter().filter_map(used).any(|used| used.held > 0 || used.limit.is_some()) {
            return None;
        }
        let cells: Vec<_> =
            users.iter().map(|user| used(user).map(|used| cell(quota, &used)).unwrap_or_default()).collect();
        let width = cells.iter().map(String::len).chain([title(quota).len()]).max().unwrap_or(0);
        Some(Self { quota, cells, width })
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
    fn a_column_is_as_wide_as_it_has_to_be_and_there_is_none_of_what_nobody_has() {
        let used = |held, limit| UseReport { held, peak: held, limit, refused: 0 };
        let uses = [
            (Quota::Sessions, used(2, None)),
            (Quota::Host, used(64 << 20, Some(1 << 30))),
            (Quota::Spill, used(0, None)),
        ];
        let user = UserReport { uid: 7, uses: uses.into_iter().collect() };
        let column = |quota| Column::of(quota, &[&user]).map(|column| (column.cells, column.width));
        assert_eq!(column(Quota::Sessions), Some((vec!["2".to_owned()], "sessions".len())));
        assert_eq!(column(Quota::Host), Some((vec!["64.00 MiB of 1.00 GiB".to_owned()], 21)));
        assert_eq!(column(Quota::Spill), None);
    }

    #[test]
    fn what_is_held_stands_beside_its_quota() {
        let used = UseReport { held: 3, peak: 4, limit: Some(4), refused: 1 };
        assert_eq!(cell(Quota::Sessions, &used), "3 of 4");
        assert_eq!(cell(Quota::Host, &UseReport { held: 64 << 20, limit: None, ..used }), "64.00 MiB");
    }
}
