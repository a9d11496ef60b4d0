//! The configuration while the daemon runs: what it is, where each value came from, and what may be changed without a restart.
//!
//! SIGHUP reads the file, the environment and the flags again; operators set single keys over the admin socket until then. Both take the
//! same way: a whole configuration is made and checked, then what the table of keys says may change is handed to those who use it.

use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, RwLock};

use serde_json::{Map, Value};
use thiserror::Error;

use crate::config::document::{self, shown};
use crate::config::keys::{self, Reload};
use crate::config::{Config, ConfigError, Flags, Loaded, Origin};
use crate::log::Filter;
use crate::quota::Access;
use crate::tiers::budget::ArenaBudget;

/// A value that is another one than before, as text.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Change {
    pub(crate) key: &'static str,
    pub(crate) from: String,
    pub(crate) to: String,
}

impl std::fmt::Display for Change {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}: {} -> {}", self.key, self.from, self.to)
    }
}

/// What came of new values.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Changes {
    /// What counts now, or for new sessions.
    pub(crate) made: Vec<Change>,
    /// What waits for a restart.
    pub(crate) waiting: Vec<Change>,
}

impl Changes {
    /// Says what has changed, and what waits.
    pub(crate) fn log(&self) {
        for change in &self.made {
            tracing::info!("{change}");
        }
        for change in &self.waiting {
            tracing::warn!("{change} waits for a restart");
        }
    }
}

/// Why an operator's values are not taken.
#[derive(Debug, Error)]
pub(crate) enum SetError {
    /// Something that is no table of keys.
    #[error("send an object of keys and values, such as {{\"log\": \"debug\"}}")]
    NoTable,
    /// A key that there is not, or values that make no sense together.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// A key that cannot change.
    #[error("`{key}` cannot change while the daemon runs: set it in the configuration, and restart")]
    Fixed {
        /// Which.
        key: &'static str,
    },
    /// A value that is none.
    #[error("bad value: {0}")]
    Value(String),
}

/// Who uses what may change.
#[derive(Debug)]
struct Users {
    access: Arc<Access>,
    /// Whose ledger has quotas and shares.
    budget: Arc<ArenaBudget>,
    /// Where the control socket is, which says what `auto` means.
    socket: PathBuf,
}

/// What is read when the configuration is read again.
#[derive(Debug)]
enum Source {
    /// A file, the environment and flags.
    Read(Option<PathBuf>, Box<Flags>),
    /// Nothing: whoever started the daemon said all there is.
    Program,
}

/// See the module.
#[derive(Debug)]
pub(crate) struct Settings {
    source: Source,
    now: RwLock<Arc<Loaded>>,
    /// What the file, the environment and the flags said when they were last read.
    said: Mutex<Loaded>,
    filter: Filter,
    users: OnceLock<Users>,
}

impl Settings {
    /// What has been read from this file and these flags, for a log with this filter. The file has to be there from now on: where it is
    /// missing for a moment, everybody would be allowed what it allows to some.
    pub(crate) fn new(loaded: Loaded, file: Option<PathBuf>, flags: Flags, filter: Filter) -> Self {
        Self::from(Source::Read(file, Box::new(flags)), loaded, filter)
    }

    /// What a program says that has the daemon in itself, log and all.
    pub(crate) fn of_program(config: Config) -> Self {
        let origins = keys::all().map(|key| (key.name, Origin::Program)).collect();
        Self::from(Source::Program, Loaded { config, origins }, Filter::none())
    }

    fn from(source: Source, loaded: Loaded, filter: Filter) -> Self {
        let (now, said) = (RwLock::new(Arc::new(loaded.clone())), Mutex::new(loaded));
        Self { source, now, said, filter, users: OnceLock::new() }
    }

    /// Names those who use what may change.
    pub(crate) fn used_by(&self, access: Arc<Access>, budget: Arc<ArenaBudget>, socket: PathBuf) {
        let _ = self.users.set(Users { access, budget, socket });
    }

    /// What holds at this moment.
    pub(crate) fn now(&self) -> Arc<Loaded> {
        Arc::clone(&self.now.read().unwrap_or_else(PoisonError::into_inner))
    }

    fn said(&self) -> MutexGuard<'_, Loaded> {
        self.said.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Reads everything again. What operators have set is forgotten.
    ///
    /// # Errors
    /// What is wrong; then nothing has changed.
    pub(crate) fn reload(&self) -> Result<Changes, SetError> {
        // Of two at once, the later one reads later.
        let mut said = self.said();
        let read = match &self.source {
            Source::Read(file, flags) => Loaded::load(file.as_deref(), flags)?,
            Source::Program => said.clone(),
        };
        let changes = self.take(read.clone())?;
        *said = read;
        Ok(changes)
    }

    /// Sets keys to values; `null` is what the configuration said when it was last read.
    ///
    /// # Errors
    /// What is wrong; then nothing has changed.
    pub(crate) fn set(&self, wanted: &Value) -> Result<Changes, SetError> {
        let wanted = wanted.as_object().ok_or(SetError::NoTable)?;
        let said = self.said();
        let mut loaded = Loaded::clone(&self.now());
        let (mut values, file_values) = (document::values(&loaded.config), document::values(&said.config));
        for (name, value) in wanted {
            let key = keys::find(name).ok_or_else(|| crate::config::unknown(name, "what was sent".into()))?;
            if key.reload == Reload::Restart {
                return Err(SetError::Fixed { key: key.name });
            }
            let (value, origin) = match value {
                Value::Null => (file_values.get(name).cloned(), said.origins.get(key.name).cloned()),
                value => (Some(value.clone()), Some(Origin::Operator)),
            };
            values.insert(name.clone(), value.unwrap_or_default());
            loaded.origins.insert(key.name, origin.unwrap_or(Origin::Default));
        }
        loaded.config = config_of(values).map_err(|error| self.bad_value(wanted).unwrap_or(error))?;
        self.take(loaded)
    }

    /// Which of these values is none.
    fn bad_value(&self, wanted: &Map<String, Value>) -> Option<SetError> {
        let now = document::values(&self.now().config);
        wanted.iter().filter(|(_, value)| !value.is_null()).find_map(|(key, value)| {
            let mut one = now.clone();
            one.insert(key.clone(), value.clone());
            let SetError::Value(why) = config_of(one).err()? else { return None };
            Some(SetError::Value(format!("{key} = {value}: {why}")))
        })
    }

    /// Has whatever may change be as this says.
    fn take(&self, read: Loaded) -> Result<Changes, SetError> {
        crate::log::parse(&read.config.log).map_err(|reason| ConfigError::Value {
            key: "log",
            value: read.config.log.clone(),
            reason,
        })?;
        let before = self.now();
        let changes = changes(&before.config, &read.config);
        let (config, origins) = (adopt(&before.config, read.config), before.origins.clone());
        config.check()?;
        let mut next = Loaded { config, origins };
        for key in keys::all().filter(|key| key.reload != Reload::Restart) {
            if let Some(origin) = read.origins.get(key.name) {
                next.origins.insert(key.name, origin.clone());
            }
        }
        self.hand_out(&next.config);
        *self.now.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(next);
        Ok(changes)
    }

    fn hand_out(&self, config: &Config) {
        if let Err(error) = self.filter.set(&config.log) {
            tracing::warn!("the log's filter stays as it was: {error}");
        }
        if let Some(Users { access, budget, socket }) = self.users.get() {
            access.set(&config.allow_users, &config.allow_groups);
            budget.ledger().set(config.quotas.clone(), config.newcomers_percent.percent(socket));
        }
    }
}

/// A configuration of these values.
fn config_of(values: Map<String, Value>) -> Result<Config, SetError> {
    serde_json::from_value(Value::Object(values)).map_err(|error| SetError::Value(error.to_string()))
}

/// The running configuration, with what may change of a new one.
fn adopt(running: &Config, new: Config) -> Config {
    Config {
        publishers: new.publishers,
        check_every: new.check_every,
        log: new.log,
        max_sessions: new.max_sessions,
        allow_users: new.allow_users,
        allow_groups: new.allow_groups,
        newcomers_percent: new.newcomers_percent,
        quotas: new.quotas,
        device_percent: new.device_percent,
        keep: new.keep,
        slab: new.slab,
        host_percent: new.host_percent,
        ..running.clone()
    }
}

fn changes(old: &Config, new: &Config) -> Changes {
    let (mut changes, old, new) = (Changes::default(), document::values(old), document::values(new));
    for key in keys::all() {
        let (Some(from), Some(to)) = (old.get(key.name), new.get(key.name)) else { continue };
        if from == to {
            continue;
        }
        let change = Change { key: key.name, from: shown(key, from), to: shown(key, to) };
        if key.reload == Reload::Restart { changes.waiting.push(change) } else { changes.made.push(change) }
    }
    changes
}

#[cfg(test)]
mod tests {
    use bytesize::ByteSize;
    use kvoyant_protocol::quota::Quota;
    use serde_json::json;

    use super::*;

    fn settings(text: &str) -> (tempfile::TempDir, Settings) {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("kvoyantd.toml");
        std::fs::write(&file, text).unwrap();
        let flags = Flags { lanes: Some(2), ..Flags::default() };
        let loaded = Loaded::load(Some(&file), &flags).unwrap();
        let settings = Settings::new(loaded, Some(file), flags, Filter::none());
        (folder, settings)
    }

    fn write(folder: &tempfile::TempDir, text: &str) {
        std::fs::write(folder.path().join("kvoyantd.toml"), text).unwrap();
    }

    #[test]
    fn a_reload_takes_what_may_change_and_says_what_waits_for_a_restart() {
        let (folder, settings) = settings("max_sessions = 8\n");
        let budget = Arc::new(ArenaBudget::new(1 << 30));
        let access = Arc::new(Access::default());
        settings.used_by(Arc::clone(&access), Arc::clone(&budget), folder.path().join("s"));
        let account = budget.ledger().account(7);
        assert_eq!(account.limit(Quota::Sessions), u64::MAX);
        write(&folder, "max_sessions = 9\narena = \"1GiB\"\nallow_users = [7]\n[quotas]\nsessions = 3\n");
        let changes = settings.reload().unwrap();
        let keys = |changes: &[Change]| changes.iter().map(|change| change.key).collect::<Vec<_>>();
        assert_eq!(keys(&changes.made), ["max_sessions", "allow_users", "quotas"]);
        assert_eq!(changes.made[0].to_string(), "max_sessions: 8 -> 9");
        assert_eq!(changes.waiting[0].to_string(), "arena: \"4GiB\" -> \"1GiB\"");
        let now = settings.now();
        assert_eq!((now.config.max_sessions, now.config.arena, now.config.lanes), (9, ByteSize::gib(4), 2));
        assert_eq!(now.origins["arena"], Origin::Default, "the running value's");
        assert_eq!(account.limit(Quota::Sessions), 3, "accounts that there are hear of it");
        assert_eq!(access.report().allow_users, [7]);
    }

    #[test]
    fn a_file_that_is_wrong_changes_nothing_and_says_why() {
        let (folder, settings) = settings("max_sessions = 8\n");
        let before = settings.now();
        for (text, said) in [
            ("max_sesions = 9\n", "did you mean `max_sessions`?"),
            ("max_sessions = 0\n", "it must be at least 1"),
            ("max_sessions = 9\nlog = \"kvoyant=loud\"\n", "log = kvoyant=loud"),
            ("max_sessions = [\n", "bad configuration"),
            // It goes with a place on disk, which this daemon does not have.
            ("spill = [\"/x\"]\nhost_percent = 10\n", "name a place for the rest"),
        ] {
            write(&folder, text);
            let error = settings.reload().unwrap_err().to_string();
            assert!(error.contains(said), "{text}: {error}");
            assert_eq!(settings.now(), before);
        }
        std::fs::remove_file(folder.path().join("kvoyantd.toml")).unwrap();
        assert!(settings.reload().unwrap_err().to_string().contains("does not exist"));
    }

    #[test]
    fn an_operators_values_hold_until_the_next_reload_or_until_they_are_taken_back() {
        let (_folder, settings) = settings("max_sessions = 8\nslab = \"1025KiB\"\n");
        let changes = settings.set(&json!({"max_sessions": 2, "quotas": {"host": "1GiB"}})).unwrap();
        assert_eq!((changes.made.len(), changes.waiting.len()), (2, 0));
        let now = settings.now();
        assert_eq!((now.config.max_sessions, now.config.slab.as_u64()), (2, 1025 << 10));
        assert_eq!(now.origins["max_sessions"], Origin::Operator);
        assert!(matches!(now.origins["slab"], Origin::File(_)));
        settings.set(&json!({"max_sessions": null})).unwrap();
        let now = settings.now();
        assert!(now.config.max_sessions == 8 && matches!(now.origins["max_sessions"], Origin::File(_)));
        assert_eq!(now.origins["quotas"], Origin::Operator);
        let changes = settings.reload().unwrap();
        assert_eq!(changes.made.len(), 1, "{changes:?}");
        assert_eq!(settings.now().origins["quotas"], Origin::Default);
        for (wanted, said) in [
            (json!({"arena": "1GiB"}), "`arena` cannot change while the daemon runs"),
            (json!({"max_session": 1}), "did you mean `max_sessions`?"),
            (json!({"max_sessions": "many", "keep": 2.0}), "bad value: max_sessions = \"many\""),
            (json!({"max_sessions": 0}), "at least 1"),
            (json!({"quotas": {"hots": 1}}), "did you mean `host`?"),
            (json!({"log": "a=b=c"}), "log = a=b=c"),
            (json!([]), "send an object"),
        ] {
            let error = settings.set(&wanted).unwrap_err().to_string();
            assert!(error.contains(said), "{wanted}: {error}");
        }
        assert_eq!(settings.now().config.max_sessions, 8);
    }

    #[test]
    fn exactly_what_the_table_calls_changeable_is_adopted() {
        let old = Config::default();
        let new = Config {
            publishers: vec![1],
            check_every: 1,
            log: "debug".into(),
            max_sessions: 1,
            allow_users: vec![crate::quota::User(1)],
            allow_groups: vec![crate::quota::Group(1)],
            newcomers_percent: crate::config::Newcomers::Percent(1.0),
            quotas: serde_json::from_value(json!({"host": 1})).unwrap(),
            device_percent: 1.0,
            keep: 3.0,
            slab: ByteSize::mib(1),
            host_percent: 1.0,
            arena: ByteSize::gib(1),
            lanes: 200,
            spin_us: 1,
            ..Config::default()
        };
        let changeable: Vec<_> =
            keys::all().filter(|key| key.reload != Reload::Restart).map(|key| key.name).collect();
        let all = changes(&old, &new);
        let made: Vec<_> = all.made.iter().map(|change| change.key).collect();
        assert_eq!(made, changeable, "this test changes all of them");
        let adopted = changes(&old, &adopt(&old, new));
        assert_eq!((adopted.made, adopted.waiting), (all.made, Vec::new()));
        assert_eq!(all.waiting.len(), 3);
    }
}
