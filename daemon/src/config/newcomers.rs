//! How much of everything scarce is kept for users who have less than their share of it.

use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use serde::{Deserialize, Serialize};

/// What `auto` keeps where several users may come, in percent.
const AUTO_PERCENT: f64 = 10.0;

/// The part of host memory, tables, device memory, disk and places for sessions that users who have more than an equal share leave free.
#[derive(Debug, Clone, Copy, Default, PartialEq, Deserialize, Serialize)]
#[serde(try_from = "Given", into = "Given")]
pub enum Newcomers {
    /// A tenth where others than the daemon's own user may enter the folder of its socket, else nothing.
    #[default]
    Auto,
    /// So many percent.
    Percent(f64),
}

#[derive(Deserialize, Serialize)]
#[serde(untagged, expecting = "it must be `auto` or a number of percent")]
enum Given {
    Percent(f64),
    Text(String),
}

impl From<Newcomers> for Given {
    fn from(newcomers: Newcomers) -> Self {
        match newcomers {
            Newcomers::Auto => Self::Text("auto".into()),
            Newcomers::Percent(percent) => Self::Percent(percent),
        }
    }
}

impl TryFrom<Given> for Newcomers {
    type Error = String;

    fn try_from(given: Given) -> Result<Self, String> {
        match given {
            Given::Text(text) => text.parse(),
            Given::Percent(percent) => Self::of(percent),
        }
    }
}

impl std::str::FromStr for Newcomers {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "auto" => Ok(Self::Auto),
            number => number
                .parse()
                .map_err(|_| format!("'{text}' is neither `auto` nor a number"))
                .and_then(Self::of),
        }
    }
}

impl Newcomers {
    fn of(percent: f64) -> Result<Self, String> {
        if (0.0..=50.0).contains(&percent) {
            return Ok(Self::Percent(percent));
        }
        Err(format!("{percent} percent cannot be kept for newcomers: it must be 0 to 50"))
    }

    /// In percent, of a daemon with this socket, whose folder is there.
    #[must_use]
    pub fn percent(self, socket: &Path) -> f64 {
        match self {
            Self::Percent(percent) => percent,
            Self::Auto if others_may_enter(socket) => AUTO_PERCENT,
            Self::Auto => 0.0,
        }
    }
}

fn others_may_enter(socket: &Path) -> bool {
    let folder = socket.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
    std::fs::metadata(folder).is_ok_and(|found| found.permissions().mode() & 0o011 != 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tenth_is_kept_where_others_may_come_unless_somebody_says_how_much() {
        let folder = tempfile::tempdir().unwrap();
        let socket = folder.path().join("kvoyantd.sock");
        let allow = |mode| {
            std::fs::set_permissions(folder.path(), std::fs::Permissions::from_mode(mode)).unwrap();
            Newcomers::Auto.percent(&socket)
        };
        assert_eq!((allow(0o700), allow(0o750), allow(0o701)), (0.0, 10.0, 10.0));
        assert_eq!(Newcomers::Percent(3.0).percent(&socket), 3.0);
        for (text, found) in [
            ("\"auto\"", Some(Newcomers::Auto)),
            ("12.5", Some(Newcomers::Percent(12.5))),
            ("\"5\"", Some(Newcomers::Percent(5.0))),
        ] {
            assert_eq!(serde_json::from_str::<Newcomers>(text).ok(), found, "{text}");
        }
        for bad in ["51", "-1", "\"much\""] {
            assert!(serde_json::from_str::<Newcomers>(bad).is_err(), "{bad}");
        }
    }
}
