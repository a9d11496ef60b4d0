//! `kvoyant drain`, `evict`, `log` and `config`: what operators do with a running daemon.

use std::os::unix::fs::FileTypeExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use kvoyant_daemon::admin::{
    AdminError, Changed, ConfigPatch, ConfigReport, DrainReport, EvictOrder, EvictReport, LogReport, drain,
    evict, fetch_config, fetch_draining, fetch_log, reload_config, set_config, set_log,
};
use kvoyant_daemon::config::Config;
use kvoyant_daemon::quota::User;
use nix::libc;
use serde::Serialize;
use serde_json::Value;
use thiserror::Error;

use crate::args::{ConfigArgs, ConfigWhat, DaemonArgs, DrainArgs, EvictArgs, LogArgs};
use crate::status::{bytes, counted};

/// How often it is looked whether sessions have gone.
const LOOK_EVERY: Duration = Duration::from_millis(200);

/// How long a daemon that was started just now may take until its sockets are there.
const JUST_STARTED: Duration = Duration::from_secs(1);

/// How often it is looked whether they are.
const LOOK_AGAIN: Duration = Duration::from_millis(20);

/// What cannot be done.
#[derive(Debug, Error)]
pub(crate) enum OperateError {
    /// The daemon cannot be asked, or refuses.
    #[error(transparent)]
    Admin(#[from] AdminError),
    /// Sessions are left.
    #[error("{} left after {seconds} s; the daemon takes no new ones", counted(*sessions, "session"))]
    Left {
        /// How many.
        sessions: u64,
        /// How long was waited.
        seconds: u64,
    },
    /// There is no such key.
    #[error("there is no key `{0}`; `kvoyant config` shows all")]
    NoKey(String),
    /// A key with dots whose table cannot be set like this.
    #[error(
        "`{0}` is no key of a table: only quotas have keys of their own, such as quotas.host or quotas.user.anna.host"
    )]
    NoTable(String),
}

/// The daemon's admin socket, at which somebody listens. At the usual place that is waited for a moment: the daemon may have been started
/// just now.
///
/// # Errors
/// Nobody listens there, or it is no admin socket.
pub(crate) fn admin_socket(named: Option<&PathBuf>) -> Result<PathBuf, AdminError> {
    let path = named.cloned().unwrap_or_else(|| Config::default().admin_socket);
    let since = Instant::now();
    loop {
        match listened_at(&path) {
            Err(AdminError::Connect { .. }) if named.is_none() && since.elapsed() < JUST_STARTED => {
                std::thread::sleep(LOOK_AGAIN);
            }
            listened => return listened.map(|()| path),
        }
    }
}

/// Whether somebody listens at an admin socket; who may not connect hears so when asking.
///
/// # Errors
/// Nobody does, or it is no admin socket.
pub(crate) fn listened_at(path: &Path) -> Result<(), AdminError> {
    let Err(source) = UnixStream::connect(path) else { return Ok(()) };
    let no_admin = |what: &str| AdminError::Refused {
        status: 0,
        reason: format!(
            "cannot connect to {}: {what}; name the daemon's admin socket with --admin",
            path.display()
        ),
    };
    match std::fs::metadata(path) {
        Ok(found) if found.is_dir() => return Err(no_admin("it is a folder and no socket")),
        Ok(found) if !found.file_type().is_socket() => return Err(no_admin("it is a file and no socket")),
        _ => {}
    }
    match source.raw_os_error() {
        Some(libc::EPROTOTYPE) => Err(no_admin(
            "it is the socket for engines, which `kvoyant run --socket` takes, or another program's",
        )),
        Some(libc::EACCES) => Ok(()),
        _ => Err(AdminError::Connect { path: path.to_path_buf(), source }),
    }
}

/// An answer as JSON, or in words.
///
/// # Errors
/// JSON that cannot be made.
pub(crate) fn told(
    json: bool,
    path: PathBuf,
    what: &impl Serialize,
    words: impl FnOnce() -> String,
) -> Result<String, AdminError> {
    if !json {
        return Ok(words());
    }
    let json = serde_json::to_string_pretty(what);
    json.map(|json| json + "\n").map_err(|error| AdminError::Answer { path, reason: error.to_string() })
}

/// `drain`, with a line's end.
///
/// # Errors
/// See [`OperateError`].
pub(crate) fn drained(args: &DrainArgs) -> Result<String, OperateError> {
    let path = admin_socket(args.daemon.admin.as_ref())?;
    let mut report = if args.show { fetch_draining(&path)? } else { drain(&path, !args.undo)? };
    if let Some(seconds) = args.wait {
        let since = Instant::now();
        while report.sessions > 0 {
            if since.elapsed() >= Duration::from_secs(seconds) {
                return Err(OperateError::Left { sessions: report.sessions, seconds });
            }
            std::thread::sleep(LOOK_EVERY);
            report = fetch_draining(&path)?;
        }
    }
    let DrainReport { draining, sessions } = report;
    Ok(told(args.daemon.json, path, &report, || {
        let there = counted(sessions, "session");
        match draining {
            true => format!(
                "no new sessions are taken; {there} open (`kvoyant drain --undo` takes new ones again)\n"
            ),
            false => format!("new sessions are taken; {there} open\n"),
        }
    })?)
}

/// `evict`, with a line's end.
///
/// # Errors
/// See [`OperateError`].
pub(crate) fn evicted(args: &EvictArgs) -> Result<String, OperateError> {
    let path = admin_socket(args.daemon.admin.as_ref())?;
    let order = EvictOrder { session: args.session, sequence: args.sequence.clone() };
    let report = evict(&path, &order)?;
    let EvictReport { pages, page_bytes, extent_bytes, unfinished } = report;
    Ok(told(args.daemon.json, path, &report, || {
        let more = if unfinished { "; more can leave: do it again" } else { "" };
        format!(
            "{} ({}) left for the disk, and {} went back to the arena{more}\n",
            counted(pages, "page"),
            bytes(page_bytes),
            bytes(extent_bytes)
        )
    })?)
}

/// `log`, with a line's end.
///
/// # Errors
/// See [`OperateError`].
pub(crate) fn logged(args: &LogArgs) -> Result<String, OperateError> {
    let path = admin_socket(args.daemon.admin.as_ref())?;
    let report = match &args.filter {
        Some(filter) => set_log(&path, filter)?,
        None => fetch_log(&path)?,
    };
    let LogReport { filter, dropped_lines } = &report;
    Ok(told(args.daemon.json, path, &report, || match dropped_lines {
        0 => format!("{filter}\n"),
        lost => {
            format!("{filter} ({lost} lines were dropped because nobody reads the daemon's standard error)\n")
        }
    })?)
}

/// `config`, with a line's end.
///
/// # Errors
/// See [`OperateError`].
pub(crate) fn configured(args: &ConfigArgs) -> Result<String, OperateError> {
    let DaemonArgs { json, admin } = &args.daemon;
    let path = admin_socket(admin.as_ref())?;
    let changed = match &args.what {
        None | Some(ConfigWhat::Get { key: None }) => {
            let all = fetch_config(&path)?;
            return Ok(told(*json, path, &all, || table(&all))?);
        }
        Some(ConfigWhat::Get { key: Some(key) }) => {
            let all = fetch_config(&path)?;
            let one: ConfigReport = all.into_iter().filter(|(name, _)| name == key).collect();
            if one.is_empty() {
                return Err(OperateError::NoKey(key.clone()));
            }
            return Ok(told(*json, path, &one, || table(&one))?);
        }
        Some(ConfigWhat::Set { all }) => {
            let nested = all.iter().any(|(key, _)| key.contains('.'));
            let now = if nested { fetch_config(&path)? } else { ConfigReport::new() };
            set_config(&path, &patch(all, &now)?)?
        }
        Some(ConfigWhat::Unset { keys }) => {
            set_config(&path, &keys.iter().map(|key| (key.clone(), Value::Null)).collect())?
        }
        Some(ConfigWhat::Reload) => reload_config(&path)?,
    };
    Ok(told(*json, path, &changed, || changes(&changed))?)
}

/// Values as they are written: JSON where they are that, else text. Keys with dots are set within what holds now.
fn patch(all: &[(String, String)], now: &ConfigReport) -> Result<ConfigPatch, OperateError> {
    let mut patch = ConfigPatch::new();
    for (key, text) in all {
        let value = serde_json::from_str(text).unwrap_or_else(|_| Value::String(text.clone()));
        let (name, inner) = key.split_once('.').unwrap_or((key, ""));
        if inner.is_empty() {
            patch.insert(key.clone(), value);
            continue;
        }
        let held = || now.get(name).map_or(Value::Null, |entry| entry.value.clone());
        let mut place = patch.entry(name.to_owned()).or_insert_with(held);
        let mut before = name;
        for part in inner.split('.') {
            let table = place.as_object_mut().ok_or_else(|| OperateError::NoTable(key.clone()))?;
            // The daemon numbers users, whatever they were called: one under both would have two tables.
            let user = (before == "user").then(|| part.parse::<User>().ok()).flatten();
            let part_of_table = user.map_or_else(|| part.to_owned(), |user| user.0.to_string());
            place = table.entry(part_of_table).or_insert_with(|| Value::Object(serde_json::Map::new()));
            before = part;
        }
        *place = value;
    }
    Ok(patch)
}

fn table(all: &ConfigReport) -> String {
    let line = |(key, entry): (&String, &kvoyant_daemon::admin::ConfigValue)| {
        let value = format!("{key} = {}", entry.value);
        format!("{value:<48} # {}; changes: {}\n", entry.from, entry.changes)
    };
    all.iter().map(line).collect()
}

fn changes(Changed { changed, waiting }: &Changed) -> String {
    if changed.is_empty() && waiting.is_empty() {
        return "nothing has changed\n".into();
    }
    let made = changed.iter().map(|change| format!("{}: {} -> {}\n", change.key, change.from, change.to));
    let waits = waiting
        .iter()
        .map(|change| format!("{}: {} -> {} waits for a restart\n", change.key, change.from, change.to));
    made.chain(waits).collect()
}

#[cfg(test)]
mod tests {
    use kvoyant_daemon::admin::ConfigValue;
    use serde_json::json;

    use super::*;

    #[test]
    fn values_are_json_or_text_and_dots_go_into_tables_that_there_are() {
        let of = |key: &str, value: &str| (key.to_owned(), value.to_owned());
        let entry = ConfigValue {
            value: json!({"host": 1, "user": {"0": {"host": 2, "device": 9}, "7": {"host": 2}}}),
            from: String::new(),
            changes: String::new(),
        };
        let now = ConfigReport::from([("quotas".to_owned(), entry)]);
        let all = [
            of("log", "info,kvoyant=debug"),
            of("max_sessions", "16"),
            of("allow_users", "[\"anna\", 7]"),
            of("quotas.sessions", "4"),
            of("quotas.user.7.device", "8GiB"),
            of("quotas.user.anna.host", "none"),
            of("quotas.user.root.host", "3"),
            of("quotas.user.root.sessions", "5"),
        ];
        let patch = patch(&all, &now).unwrap();
        assert_eq!(patch["log"], json!("info,kvoyant=debug"));
        assert_eq!((&patch["max_sessions"], &patch["allow_users"]), (&json!(16), &json!(["anna", 7])));
        // One whom the system knows has the table that is theirs already; of one whom it does not, the daemon says so.
        let users = json!({
            "0": {"host": 3, "device": 9, "sessions": 5},
            "7": {"host": 2, "device": "8GiB"},
            "anna": {"host": "none"}
        });
        let quotas = json!({"host": 1, "sessions": 4, "user": users});
        assert_eq!(patch["quotas"], quotas);
        let refused = super::patch(&[of("log.level", "debug")], &now).unwrap_err().to_string();
        assert!(refused.contains("`log.level`"), "{refused}");
    }
}
