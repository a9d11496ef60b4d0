//! What is done about a daemon that is late.

use std::time::Duration;

use clap::{Args, ValueEnum};
use kvoyant_engine::{DaemonOptions, Fallback};

/// What `run` and `demo` do about answers that are late.
#[derive(Debug, Clone, Copy, Args)]
pub(crate) struct LateArgs {
    /// What stands in for a layer's rows that are late: wait for them; go on with those that are there (sinks, window, and what the
    /// last answer named); or with sinks and window alone
    #[arg(long, value_enum, default_value_t)]
    pub(crate) fallback: FallbackArg,
    /// When rows are late, in milliseconds after they were asked for; not for `--fallback wait`
    #[arg(long, value_name = "MS", default_value_t = 100, requires = "fallback", value_parser = clap::value_parser!(u64).range(1..))]
    pub(crate) late_after_ms: u64,
    /// How long the daemon may be silent, in seconds, before the answer goes on without it: with attention to all rows, in this process
    #[arg(long, value_name = "S", default_value_t = 30.0, value_parser = seconds)]
    pub(crate) deadline: f64,
}

/// What stands in for late rows.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, ValueEnum)]
pub(crate) enum FallbackArg {
    /// Wait for them, until the deadline.
    #[default]
    Wait,
    /// Those that are there.
    Partial,
    /// Sinks and window.
    ResidentOnly,
}

impl From<FallbackArg> for Fallback {
    fn from(arg: FallbackArg) -> Self {
        match arg {
            FallbackArg::Wait => Self::Wait,
            FallbackArg::Partial => Self::Partial,
            FallbackArg::ResidentOnly => Self::ResidentOnly,
        }
    }
}

impl LateArgs {
    /// Sets what a session registers with.
    pub(crate) fn set(self, options: &mut DaemonOptions) {
        options.fallback = self.fallback.into();
        options.late_after = Duration::from_millis(self.late_after_ms);
        options.deadline = Duration::from_secs_f64(self.deadline);
    }
}

/// Up to a day: what is longer is a typing error.
fn seconds(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(value) if (0.001..=86_400.0).contains(&value) => Ok(value),
        _ => Err("it must be a number of seconds between 0.001 and 86400".into()),
    }
}
