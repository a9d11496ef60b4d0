//! The Kvoyant daemon: it owns the host memory that KV caches live in, predicts with a session's method which rows
//! the next layer will need, and has them on the device before it asks.
//!
//! | room | what lives there |
//! |---|---|
//! | [`config`] | file, environment, flags |
//! | [`server`] | starting, stopping, the listening sockets |
//! | [`control`] | the control plane's side of a session: handshake, registration, control messages |
//! | [`lane`] | threads that validate, select, plan, transfer and complete |
//! | [`tiers`] | arena, page tables, digests, residency |
//! | [`device`] | where attention runs, and how bytes get there |
//! | [`quota`] | who may connect, and how much each user may have |
//! | [`keep`], [`journal`] | sessions that outlast the daemon: their files, and the format in which they are left to the next one |
//! | [`admin`], [`status`], [`stats_page`] | what operators see |
//!
//! `kvoyantd` and `kvoyant serve` are the same [`main`](fn@main).

pub mod admin;
mod artifacts;
pub mod config;
pub mod control;
pub mod device;
mod endpoint;
pub mod journal;
pub mod keep;
pub mod keeper;
pub mod lane;
mod log;
pub mod metrics;
mod notify;
pub mod prefixes;
pub mod quota;
pub mod server;
mod settings;
pub mod stats_page;
pub mod status;
mod threads;
pub mod tiers;

use std::io::{self, Write};
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;

use clap::ValueEnum;

use crate::config::{Loaded, document};
use crate::settings::Settings;

pub use log::LogFormat;

/// Arguments of the daemon.
#[derive(Debug, Clone, Default, clap::Args)]
pub struct Args {
    /// Configuration file (TOML); default: /etc/kvoyant/kvoyantd.toml, if it exists
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// Check the configuration, print what comes out and where each value came from, and exit
    #[arg(long, value_name = "FORMAT", num_args = 0..=1, require_equals = true, default_missing_value = "toml")]
    pub check: Option<CheckFormat>,
    /// Print every key with its unit, its default and when to change it, and exit
    #[arg(long, value_name = "FORMAT", num_args = 0..=1, require_equals = true, default_missing_value = "toml")]
    pub print_config: Option<PrintFormat>,
    /// Take the sessions of the daemon over that serves the same socket, which ends
    #[arg(long)]
    pub takeover: bool,
    #[command(flatten)]
    #[allow(missing_docs)]
    pub flags: config::Flags,
}

/// How a configuration is printed that has been checked.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum CheckFormat {
    /// A file that would give the same.
    Toml,
    /// By key, its value, where that came from, and when a change counts.
    Json,
}

/// How all keys are printed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum PrintFormat {
    /// A commented file.
    Toml,
    /// Tables for the manual.
    Markdown,
}

/// Runs the daemon until it is told to stop; errors are one sentence on stderr and a non-zero exit.
#[must_use]
pub fn main(args: &Args) -> ExitCode {
    let code = match run(args) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            log::say(&format!("kvoyantd: {error}"));
            error
                .downcast_ref()
                .map_or(ExitCode::FAILURE, |error: &server::ServerError| error.exit_code().into())
        }
    };
    log::flush(log::LAST_LINES);
    code
}

fn run(args: &Args) -> Result<(), Box<dyn std::error::Error>> {
    if let Some(format) = args.print_config {
        let text = match format {
            PrintFormat::Toml => document::sample(),
            PrintFormat::Markdown => document::markdown(),
        };
        return Ok(print(&text)?);
    }
    kvoyant_kernels::Kernels::from_env()?;
    let file = match &args.config {
        Some(file) => Some(file.clone()),
        None => config::default_file(std::path::Path::new(config::DEFAULT_FILE))?,
    };
    let loaded = Loaded::load(file.as_deref(), &args.flags)?;
    let config = &loaded.config;
    let filter = log::parse(&config.log)
        .map_err(|error| format!("bad configuration: log = {}: {error}", config.log))?;
    if let Some(format) = args.check {
        config.look_around()?;
        server::check_room(config)?;
        for doubt in config.doubts() {
            log::say(&format!("kvoyantd: {doubt}"));
        }
        let text = match format {
            CheckFormat::Toml => document::effective(&loaded),
            CheckFormat::Json => format!("{:#}\n", document::effective_json(&loaded, true)),
        };
        return Ok(print(&text)?);
    }
    let filter = log::start(filter, config.log_format);
    let settings = Settings::new(loaded, file, args.flags.clone(), filter);
    server::serve(&Arc::new(settings), args.takeover)?;
    Ok(())
}

/// Writes to stdout; a reader that has seen enough is no error.
fn print(text: &str) -> io::Result<()> {
    let mut out = io::stdout();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Err(error) if error.kind() != io::ErrorKind::BrokenPipe => Err(error),
        _ => Ok(()),
    }
}
