//! The log: which lines, in which form, and how they get to standard error without anybody waiting for its reader.
//!
//! | room | what lives there |
//! |---|---|
//! | `line` | how a line is written: text, text for the journal, JSON |
//! | `writer` | the thread that writes, and what it drops |

mod line;
mod writer;

use std::io::IsTerminal;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use tracing_subscriber::filter::LevelFilter;
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;
use tracing_subscriber::{EnvFilter, Layer, Registry, reload};

use self::line::{Journal, to_journal};
pub(crate) use self::writer::{dropped_lines, flush, say};

/// How long the end of the process waits for its last lines to be read.
pub(crate) const LAST_LINES: Duration = Duration::from_secs(1);

/// How lines are written.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LogFormat {
    /// Text; in the journal with priorities, and without the time, which it has itself.
    #[default]
    Auto,
    /// Text.
    Text,
    /// One JSON object a line.
    Json,
}

impl std::str::FromStr for LogFormat {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "auto" => Ok(Self::Auto),
            "text" => Ok(Self::Text),
            "json" => Ok(Self::Json),
            other => Err(format!("'{other}' is none of auto, text, json")),
        }
    }
}

/// What changes the filter of a log that runs.
#[derive(Clone)]
pub(crate) struct Filter(Option<Arc<reload::Handle<EnvFilter, Registry>>>);

impl std::fmt::Debug for Filter {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Filter")
    }
}

/// What a filter may say.
const LEVELS: &str = "error, warn, info, debug, trace, off";

/// Reads a filter. A bare word that is neither a level nor ours would silence everything but a module of that name: it is mistyped.
///
/// # Errors
/// What is wrong with it.
pub(crate) fn parse(filter: &str) -> Result<EnvFilter, String> {
    let parts: Vec<_> = filter.split(',').map(str::trim).filter(|part| !part.is_empty()).collect();
    if parts.is_empty() {
        return Err(format!("it is empty: write one of {LEVELS}, or kvoyant_daemon=debug"));
    }
    for part in parts {
        let bare = part.bytes().all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'_' | b'-'));
        if bare && !part.starts_with("kvoyant") && part.parse::<LevelFilter>().is_err() {
            return Err(format!("`{part}` is no level: write one of {LEVELS}, or {part}=debug for a module"));
        }
    }
    EnvFilter::try_new(filter).map_err(|error| error.to_string())
}

impl Filter {
    /// Of a log that is somebody else's.
    pub(crate) fn none() -> Self {
        Self(None)
    }

    /// Uses another one from now on.
    ///
    /// # Errors
    /// One that does not parse.
    pub(crate) fn set(&self, filter: &str) -> Result<(), String> {
        let parsed = parse(filter)?;
        self.0.as_ref().map_or(Ok(()), |handle| handle.reload(parsed).map_err(|error| error.to_string()))
    }
}

/// Starts the log of this process, once; a second one is written where the first is.
pub(crate) fn start(filter: EnvFilter, format: LogFormat) -> Filter {
    let (filter, handle) = reload::Layer::new(filter);
    let layer = tracing_subscriber::fmt::layer().with_writer(writer::start);
    let stderr = std::io::stderr();
    let layer: Box<dyn Layer<_> + Send + Sync> = match format {
        LogFormat::Json => layer.json().flatten_event(true).boxed(),
        LogFormat::Auto if to_journal(stderr.as_fd()) => {
            layer.with_ansi(false).event_format(Journal::default()).boxed()
        }
        _ => layer.with_ansi(stderr.is_terminal()).boxed(),
    };
    let started = tracing_subscriber::registry().with(filter).with(layer).try_init();
    if started.is_ok() {
        writer::open();
        // The standard hook writes to standard error, and waits for its reader.
        std::panic::set_hook(Box::new(|panic| tracing::error!("{panic}")));
    }
    Filter(started.is_ok().then(|| Arc::new(handle)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mistyped_level_is_refused_and_no_module_of_that_name() {
        for good in [
            "info",
            "WARN",
            "off",
            "3",
            "info,kvoyant_daemon=debug",
            "kvoyant_daemon",
            "warn,kvoyant_daemon::lane=trace",
            "hyper::proto",
            "hyper=debug",
            "[span{field}]=trace,info",
        ] {
            assert!(parse(good).is_ok(), "{good}: {:?}", parse(good).err());
        }
        for (bad, why) in [
            ("infoo", "`infoo` is no level: write one of error, warn"),
            ("info,debugg", "`debugg` is no level"),
            ("", "it is empty"),
            (" , ", "it is empty"),
            ("kvoyant_daemon=loud", ""),
        ] {
            let error = parse(bad).map(drop).unwrap_err();
            assert!(error.contains(why), "{bad}: {error}");
        }
    }
}
