//! What one user may have of a daemon that many share, and what they are told when that is reached.

use std::fmt;

use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::wire::SequenceId;

/// Something that a user has a quota of, all their sessions together.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Quota {
    /// Sessions that are open.
    Sessions,
    /// Sequences that are open.
    Sequences,
    /// Speculations that have been taken up and not yet answered.
    InFlight,
    /// Bytes of extents: host memory for KV.
    Host,
    /// Bytes of page tables, digests and whatever else methods keep.
    Tables,
    /// Bytes of request and completion rings, with their hints and block tables.
    Rings,
    /// Bytes of slabs and boards: memory of the device.
    Device,
    /// Bytes of the places on disk that pages go to.
    Spill,
}

/// Quotas that there are.
pub const QUOTAS: [Quota; 8] = [
    Quota::Sessions,
    Quota::Sequences,
    Quota::InFlight,
    Quota::Host,
    Quota::Tables,
    Quota::Rings,
    Quota::Device,
    Quota::Spill,
];

impl Quota {
    /// Its key in the daemon's configuration.
    #[must_use]
    pub fn key(self) -> &'static str {
        match self {
            Self::Sessions => "sessions",
            Self::Sequences => "sequences",
            Self::InFlight => "in_flight",
            Self::Host => "host",
            Self::Tables => "tables",
            Self::Rings => "rings",
            Self::Device => "device",
            Self::Spill => "spill",
        }
    }

    /// Whether it is counted in bytes.
    #[must_use]
    pub fn is_bytes(self) -> bool {
        !matches!(self, Self::Sessions | Self::Sequences | Self::InFlight)
    }

    fn amount(self, count: u64) -> String {
        let of = match self {
            Self::Sessions => "sessions",
            Self::Sequences => "sequences",
            Self::InFlight => "requests under way",
            Self::Host => "of host memory for KV",
            Self::Tables => "of tables and digests",
            Self::Rings => "of rings",
            Self::Device => "of device memory",
            Self::Spill => "of the disk",
        };
        if self.is_bytes() {
            format!("{} {of}", crate::control::failure::mib(&count))
        } else {
            format!("{count} {of}")
        }
    }
}

impl fmt::Display for Quota {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.key())
    }
}

/// A user asked for more than their quota leaves.
#[derive(Debug, Clone, PartialEq, Eq, Error, Serialize, Deserialize)]
#[error(
    "user {uid} may have {} ({}), has {held} and asked for {asked} more; {}",
    .quota.amount(*.limit), self.reason(), self.advice(), held = .quota.plain(*.held), asked = .quota.plain(*.asked)
)]
pub struct OverQuota {
    /// Of what.
    pub quota: Quota,
    /// Whose.
    pub uid: u32,
    /// What was asked for, beyond what is held: bytes, or how many.
    pub asked: u64,
    /// What all sessions of the user hold.
    pub held: u64,
    /// The quota, or the share.
    pub limit: u64,
    /// Whether it is no quota of the operator's: what is left is kept for users who have less than their share of the whole.
    pub share: bool,
    /// Sequences of this session which, closed, would free enough; empty if none would, or nobody looked.
    pub closing: Vec<SequenceId>,
}

impl Quota {
    fn plain(self, count: u64) -> String {
        if self.is_bytes() { crate::control::failure::mib(&count) } else { count.to_string() }
    }
}

impl OverQuota {
    fn reason(&self) -> String {
        if self.share {
            return "while what is left is kept for users who have less than their share".into();
        }
        format!("the daemon's quota `{}`", self.quota)
    }

    fn advice(&self) -> String {
        if self.asked > self.limit {
            let what =
                if self.share { "try again when others have left" } else { "have the operator raise it" };
            return format!("nothing that could be given back would be enough: ask for less, or {what}");
        }
        if !self.closing.is_empty() {
            let names: Vec<_> = self.closing.iter().map(ToString::to_string).collect();
            return format!("closing {} would free enough", names.join(", "));
        }
        let more = self.held.saturating_add(self.asked).saturating_sub(self.limit);
        match self.quota {
            Quota::Sessions => "end one of them".into(),
            Quota::Rings | Quota::Device => {
                format!("end a session that has {}, or ask for less", self.quota.plain(more))
            }
            Quota::InFlight => "wait for an answer".into(),
            _ => format!(
                "close sequences, of this session or another one, that have {}",
                self.quota.plain(more)
            ),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whoever_is_over_quota_hears_all_the_numbers_and_what_would_help() {
        let mut over = OverQuota {
            quota: Quota::Host,
            uid: 1001,
            asked: 128 << 20,
            held: 192 << 20,
            limit: 256 << 20,
            share: false,
            closing: Vec::new(),
        };
        let said = over.to_string();
        for part in
            ["1001", "256.0 MiB of host memory", "`host`", "has 192.0 MiB", "128.0 MiB more", "have 64.0 MiB"]
        {
            assert!(said.contains(part), "{part} is not in: {said}");
        }
        over.closing = vec![SequenceId { slot: 3, generation: 1 }];
        assert!(over.to_string().ends_with("closing 3.1 would free enough"));
        let sessions =
            OverQuota { quota: Quota::Sessions, asked: 1, held: 2, limit: 2, closing: Vec::new(), ..over };
        assert!(sessions.to_string().contains("2 sessions (the daemon's quota `sessions`), has 2"));
        let nobody = OverQuota { held: 0, limit: 0, ..sessions.clone() };
        assert!(nobody.to_string().ends_with("ask for less, or have the operator raise it"), "{nobody}");
        let share = OverQuota { share: true, ..sessions };
        assert!(share.to_string().contains("2 sessions (while what is left is kept for users who have less"));
    }

    #[test]
    fn every_quota_has_a_key_of_its_own() {
        let keys: std::collections::BTreeSet<_> = QUOTAS.iter().map(|quota| quota.key()).collect();
        assert_eq!(keys.len(), QUOTAS.len());
    }
}
