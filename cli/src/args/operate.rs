//! The arguments of what operators do with a running daemon: `drain`, `evict`, `log`, `config`.

use std::path::PathBuf;

use clap::{ArgGroup, Args, Subcommand};

/// Which daemon, and how the answer is printed.
#[derive(Debug, Args)]
pub(crate) struct DaemonArgs {
    /// Print JSON
    #[arg(long, global = true)]
    pub(crate) json: bool,
    /// The daemon's admin socket
    #[arg(long, value_name = "PATH", global = true)]
    pub(crate) admin: Option<PathBuf>,
}

/// `drain`.
#[derive(Debug, Args)]
#[command(after_help = "Only root and the daemon's own user may do it.")]
pub(crate) struct DrainArgs {
    /// Take new sessions again
    #[arg(long, conflicts_with = "wait")]
    pub(crate) undo: bool,
    /// Say only whether it is so, and how many sessions there are
    #[arg(long, conflicts_with_all = ["undo", "wait"])]
    pub(crate) show: bool,
    /// Wait until no session is left, for so many seconds at most; fail if some are left then
    #[arg(long, value_name = "SECONDS")]
    pub(crate) wait: Option<u64>,
    #[command(flatten)]
    pub(crate) daemon: DaemonArgs,
}

/// `evict`.
#[derive(Debug, Args)]
#[command(
    group(ArgGroup::new("what").required(true).args(["session", "all"])),
    after_help = "Pages leave where the daemon has a place for them on disk (`spill`); they come back when a selection names them. Sinks, the window \
                  and what is being read stay. Root and the daemon's own user may do it with every session, everybody else with theirs."
)]
pub(crate) struct EvictArgs {
    /// Number of a session, as `kvoyant sequences` lists it
    pub(crate) session: Option<u64>,
    /// One sequence of it, such as 3.0
    #[arg(value_parser = super::sequences::handle)]
    pub(crate) sequence: Option<String>,
    /// All sessions
    #[arg(long)]
    pub(crate) all: bool,
    #[command(flatten)]
    pub(crate) daemon: DaemonArgs,
}

/// `log`.
#[derive(Debug, Args)]
pub(crate) struct LogArgs {
    /// What to log from now on: error, warn, info, debug, or per module; without it, say what is logged
    pub(crate) filter: Option<String>,
    #[command(flatten)]
    pub(crate) daemon: DaemonArgs,
}

/// `config`.
#[derive(Debug, Args)]
#[command(
    after_help = "What is set holds until the daemon reads its configuration again, or restarts. Only root and the daemon's own user may change it."
)]
pub(crate) struct ConfigArgs {
    /// What to do; without it, show all keys
    #[command(subcommand)]
    pub(crate) what: Option<ConfigWhat>,
    #[command(flatten)]
    pub(crate) daemon: DaemonArgs,
}

/// What `config` does.
#[derive(Debug, Subcommand)]
pub(crate) enum ConfigWhat {
    /// Show one key, or all: its value, where that came from, when a change counts
    Get {
        /// Which
        key: Option<String>,
    },
    /// Set keys that may change while the daemon runs: max_sessions=16, log=debug, quotas.host=64GiB
    Set {
        /// KEY=VALUE; lists and tables as JSON
        #[arg(required = true, value_name = "KEY=VALUE", value_parser = assignment)]
        all: Vec<(String, String)>,
    },
    /// Take keys back to what the file, the environment and the flags said
    Unset {
        /// Which
        #[arg(required = true, value_name = "KEY")]
        keys: Vec<String>,
    },
    /// Have the daemon read its file again, as SIGHUP does
    Reload,
}

fn assignment(text: &str) -> Result<(String, String), String> {
    match text.split_once('=') {
        Some((key, value)) if !key.is_empty() => Ok((key.to_owned(), value.to_owned())),
        _ => Err("write KEY=VALUE, such as max_sessions=16".into()),
    }
}
