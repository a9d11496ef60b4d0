//! What is wrong with a configuration.

use std::path::PathBuf;

use thiserror::Error;

/// A configuration that cannot be used.
#[derive(Debug, Error)]
pub enum ConfigError {
    /// A value in a file, variable or flag that is none.
    #[error("bad configuration: {key} ({place}): {reason}")]
    Parse {
        /// Which key.
        key: String,
        /// Where.
        place: String,
        /// What is wrong with it.
        reason: String,
    },
    /// A file that is no TOML.
    #[error("bad configuration: {}: {reason}", path.display())]
    Syntax {
        /// The file.
        path: PathBuf,
        /// What is wrong with it, and where.
        reason: String,
    },
    /// A file that cannot be read.
    #[error("cannot read the configuration file {}: {source}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// A key that there is not.
    #[error("bad configuration: there is no key `{key}` in {place}{}", meant(.nearest.as_ref()))]
    Unknown {
        /// What was written.
        key: String,
        /// Where.
        place: String,
        /// What may have been meant.
        nearest: Option<&'static str>,
    },
    /// The file is not there.
    #[error("configuration file {0} does not exist")]
    NoFile(PathBuf),
    /// A value that makes no sense.
    #[error("bad configuration: {key} = {value}: {reason}")]
    Value {
        /// Which key.
        key: &'static str,
        /// Its value.
        value: String,
        /// What is wrong with it.
        reason: String,
    },
}

/// A number as people write it, however large it is.
pub(super) fn number(value: f64) -> String {
    let plain = value == 0.0 || (1e-6..1e15).contains(&value.abs());
    if plain || !value.is_finite() { value.to_string() } else { format!("{value:e}") }
}

fn meant(nearest: Option<&&'static str>) -> String {
    match nearest {
        Some(name) => format!("; did you mean `{name}`?"),
        None => "; `kvoyantd --print-config` prints all that there are".into(),
    }
}
