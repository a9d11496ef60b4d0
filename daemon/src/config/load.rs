//! Reading a configuration, and where each value of it came from.

use std::collections::BTreeMap;
use std::fmt;
use std::path::{Path, PathBuf};

use figment::error::{Actual, Kind};
use figment::providers::{Env, Format, Serialized, Toml};
use figment::{Figment, Provider};
use serde::Serialize;

use super::error::number;
use super::keys::{self, Key, nearest};
use super::{Config, ConfigError, DEFAULT_FILE};

/// What variables of the environment begin with.
const PREFIX: &str = "KVOYANT_";

/// Where a value came from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Origin {
    /// Nobody said anything.
    Default,
    /// A file.
    File(PathBuf),
    /// A variable of the environment.
    Environment(String),
    /// A flag.
    Flag(String),
    /// The program that has the daemon in itself.
    Program,
    /// An operator, while the daemon runs.
    Operator,
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Default => f.write_str("default"),
            Self::File(path) => write!(f, "file {}", path.display()),
            Self::Environment(name) => write!(f, "environment {name}"),
            Self::Flag(name) => write!(f, "flag {name}"),
            Self::Program => f.write_str("program"),
            Self::Operator => f.write_str("operator"),
        }
    }
}

impl Serialize for Origin {
    fn serialize<S: serde::Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        to.collect_str(self)
    }
}

/// A configuration, and where its values came from.
#[derive(Debug, Clone, PartialEq)]
pub struct Loaded {
    /// What comes out.
    pub config: Config,
    /// By key.
    pub origins: BTreeMap<&'static str, Origin>,
}

impl Loaded {
    /// Reads the file (or [`DEFAULT_FILE`], if it exists), the environment and the flags, and checks the result.
    ///
    /// # Errors
    /// The first thing that is wrong.
    pub fn load<F: Serialize>(file: Option<&Path>, flags: F) -> Result<Self, ConfigError> {
        let mut origins: BTreeMap<_, _> = keys::all().map(|key| (key.name, Origin::Default)).collect();
        let mut note = |key: &str, origin: Origin| {
            if let Some(key) = keys::find(key) {
                origins.insert(key.name, origin);
            }
        };
        let mut given = Figment::new();
        let default = if file.is_none() { default_file(Path::new(DEFAULT_FILE))? } else { None };
        if let Some(file) = file.or(default.as_deref()) {
            let toml = Toml::string(&read(file)?);
            let syntax = |error: figment::Error| ConfigError::Syntax {
                path: file.to_path_buf(),
                reason: error.to_string().trim_end().to_owned(),
            };
            for key in toml.data().map_err(syntax)?.values().flat_map(|values| values.keys()) {
                if keys::find(key).is_none() {
                    return Err(unknown(key, file.display().to_string()));
                }
                note(key, Origin::File(file.to_path_buf()));
            }
            given = given.merge(toml);
        }
        // Variables of the same prefix that are no keys belong to other programs (`KVOYANT_KERNELS`).
        // (Variables are upper case; figment's keys compare without regard to that.)
        let environment = Env::prefixed(PREFIX).filter(|key| keys::all().any(|known| key == known.name));
        for (key, _) in environment.iter() {
            let name = format!("{PREFIX}{}", key.as_str().to_uppercase());
            note(key.as_str(), Origin::Environment(name));
        }
        let flags = Serialized::globals(flags);
        for key in flags
            .data()
            .map_err(|error| bad(&error, &BTreeMap::new()))?
            .values()
            .flat_map(|values| values.keys())
        {
            note(key, Origin::Flag(format!("--{}", key.replace('_', "-"))));
        }
        let given = given.merge(environment).merge(flags);
        let mut config: Config = Figment::from(Serialized::defaults(Config::default()))
            .merge(&given)
            .extract()
            .map_err(|error| bad(&error, &origins))?;
        if !given.contains("admin_socket") {
            config.admin_socket = config.socket.with_file_name("admin.sock");
        }
        config.check()?;
        Ok(Self { config, origins })
    }
}

/// The file that is read where none is named, if it is there.
///
/// # Errors
/// A file of which it cannot be said: without it, everybody might be allowed what it allows to some.
pub(crate) fn default_file(file: &Path) -> Result<Option<PathBuf>, ConfigError> {
    match file.try_exists() {
        Ok(there) => Ok(there.then(|| file.to_path_buf())),
        Err(source) => Err(ConfigError::Read { path: file.to_path_buf(), source }),
    }
}

fn read(file: &Path) -> Result<String, ConfigError> {
    std::fs::read_to_string(file).map_err(|source| match source.kind() {
        std::io::ErrorKind::NotFound => ConfigError::NoFile(file.to_path_buf()),
        _ => ConfigError::Read { path: file.to_path_buf(), source },
    })
}

/// What is said about a value that is none.
fn bad(error: &figment::Error, origins: &BTreeMap<&'static str, Origin>) -> ConfigError {
    let path: Vec<_> = error.path.iter().map(|part| part.to_lowercase()).collect();
    let key = path.first().and_then(|name| keys::find(name));
    let place = key.and_then(|key| origins.get(key.name)).unwrap_or(&Origin::Default).to_string();
    ConfigError::Parse { key: path.join("."), place, reason: reason(&error.kind, key) }
}

fn reason(kind: &Kind, key: Option<&Key>) -> String {
    match kind {
        Kind::InvalidType(found, wanted) | Kind::InvalidValue(found, wanted) => {
            format!("it is {}, and must be {}", shown(found), words(wanted, key))
        }
        Kind::UnknownVariant(found, known) => format!("`{found}` is none of {}", known.join(", ")),
        other => other.to_string(),
    }
}

fn shown(found: &Actual) -> String {
    match found {
        Actual::Bool(value) => value.to_string(),
        Actual::Unsigned(value) => value.to_string(),
        Actual::Signed(value) => value.to_string(),
        Actual::Float(value) => number(*value),
        Actual::Str(text) => format!("\"{text}\""),
        Actual::Seq => "a list".into(),
        Actual::Map => "a table".into(),
        other => other.to_string(),
    }
}

/// What a value must be, in the words of whoever writes the file.
fn words(wanted: &str, key: Option<&Key>) -> String {
    let numbers = ["u8", "u16", "u32", "u64", "usize"];
    match wanted {
        _ if key.is_some_and(|key| key.unit.contains("bytes")) => "a number of bytes, as \"64GiB\"".into(),
        "a sequence" => {
            let example = key.and_then(|key| key.example);
            format!("a list, as {}", example.unwrap_or("[1, 2]"))
        }
        "path string" => "a path, as \"/a/b\"".into(),
        "a boolean" => "true or false".into(),
        "f32" | "f64" => "a number".into(),
        "u32" => format!("a whole number from 0 to {}", u32::MAX),
        number if numbers.contains(&number) => "a whole number, 0 or more".into(),
        other => other.to_owned(),
    }
}

/// What is said about a key that there is not.
pub(crate) fn unknown(key: &str, place: String) -> ConfigError {
    let nearest = nearest(key, keys::all().map(|key| key.name));
    ConfigError::Unknown { key: key.to_owned(), place, nearest }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_of_which_nothing_can_be_said_is_no_missing_file() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("kvoyantd.toml");
        assert_eq!(default_file(&file).unwrap(), None);
        std::fs::write(&file, "").unwrap();
        assert_eq!(default_file(&file).unwrap(), Some(file.clone()));
        // Below a file there is nothing, and nothing that could be asked.
        assert!(matches!(default_file(&file.join("x")), Err(ConfigError::Read { .. })));
    }
}
