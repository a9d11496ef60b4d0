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
//! | [`journal`] | the format in which sessions are to be left to the next daemon |
//! | [`admin`], [`status`], [`stats_page`] | what operators see |
//!
//! `kvoyantd` and `kvoyant serve` are the same [`main`](fn@main).

pub mod admin;
mod artifacts;
pub mod config;
pub mod control;
pub mod device;
pub mod journal;
pub mod keeper;
pub mod lane;
pub mod metrics;
pub mod prefixes;
pub mod quota;
pub mod server;
pub mod stats_page;
pub mod status;
mod threads;
pub mod tiers;

use std::io::{IsTerminal, Write};
use std::path::PathBuf;
use std::process::ExitCode;

use tracing_subscriber::EnvFilter;

/// Arguments of the daemon.
#[derive(Debug, Clone, Default, clap::Args)]
pub struct Args {
    /// Configuration file (TOML); default: /etc/kvoyant/kvoyantd.toml, if it exists
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// Check the configuration, print it and exit
    #[arg(long)]
    pub check: bool,
    #[command(flatten)]
    #[allow(missing_docs)]
    pub flags: config::Flags,
}

/// Runs the daemon until it is told to stop; errors are one sentence on stderr and a non-zero exit.
#[must_use]
pub fn main(args: &Args) -> ExitCode {
    match run(args) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("kvoyantd: {error}");
            error
                .downcast_ref()
                .map_or(ExitCode::FAILURE, |error: &server::ServerError| error.exit_code().into())
        }
    }
}

fn run(args: &Args) -> Result<(), Box<dyn std::error::Error>> {
    kvoyant_kernels::Kernels::from_env()?;
    let config = config::Config::load(args.config.as_deref(), args.flags.clone())?;
    let filter = EnvFilter::try_new(&config.log)
        .map_err(|error| format!("bad configuration: log = {}: {error}", config.log))?;
    if args.check {
        server::check_room(&config)?;
        writeln!(std::io::stdout(), "{}", serde_json::to_string_pretty(&config)?)?;
        return Ok(());
    }
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal())
        .try_init()
        .ok();
    server::run(&config)?;
    Ok(())
}
