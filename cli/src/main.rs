//! Kvoyant's command line: the daemon, and what one does with it.
#![forbid(unsafe_code)]

mod args;
mod artifact_cache;
mod bench;
mod cache;
mod calibrate;
mod calibrate_model;
mod capture;
mod cleanup;
mod demo;
mod doctor;
mod fetch;
mod fingerprint;
mod late;
mod machine;
mod manual;
mod model;
mod operate;
mod output;
mod private_daemon;
mod progress;
mod run;
mod say;
mod sequences;
mod serve;
mod session;
mod status;
mod top;
mod trial;

use std::error::Error;
use std::io::{self, Write};
use std::process::ExitCode;

use clap::Parser;

use crate::args::{Cli, Command};
use crate::progress::Progress;

fn main() -> ExitCode {
    let cli = Cli::parse();
    if let Err(error) = kvoyant_kernels::Kernels::from_env() {
        crate::say::say(format_args!("error: {error}"));
        return ExitCode::FAILURE;
    }
    let done = match &cli.command {
        // The daemon has its own signals and its own words.
        Command::Serve(args) => return serve::main(args),
        // It answers by its exit code too.
        Command::Doctor(args) => return doctor::main(args),
        Command::Status(args) => status::text(args).map_err(Into::into).and_then(|text| print(&text)),
        Command::Top(args) => top::run(args).map_err(Into::into).and_then(|text| print(&text)),
        Command::Sequences(args) => sequences::text(args).map_err(Into::into).and_then(|text| print(&text)),
        Command::Drain(args) => operate::drained(args).map_err(Into::into).and_then(|text| print(&text)),
        Command::Evict(args) => operate::evicted(args).map_err(Into::into).and_then(|text| print(&text)),
        Command::Log(args) => operate::logged(args).map_err(Into::into).and_then(|text| print(&text)),
        Command::Config(args) => operate::configured(args).map_err(Into::into).and_then(|text| print(&text)),
        Command::Completions { shell } => print(&manual::completions(*shell)),
        Command::Man { folder } => manual::pages(folder).map_err(Into::into).and_then(|text| print(&text)),
        Command::FetchModel { json } => fetch_model(*json),
        Command::Bench(args) => guarded(|| bench(args)).and_then(|text| print(&text)),
        Command::Demo(args) => guarded(|| demo::run(args).map_err(Into::into)).and_then(|text| print(&text)),
        Command::Run(args) => guarded(|| run::run(args).map_err(Into::into)),
        Command::Capture(args) => {
            guarded(|| capture::text(args).map_err(Into::into)).and_then(|text| print(&text))
        }
        Command::CalibrateModel(args) => {
            guarded(|| calibrate_model::text(args).map_err(Into::into)).and_then(|text| print(&text))
        }
        Command::Calibrate(args) => calibrate::text(args).map_err(Into::into).and_then(|text| print(&text)),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            crate::say::say(format_args!("error: {error}"));
            ExitCode::FAILURE
        }
    }
}

/// Does `work` so that a signal leaves nothing behind.
fn guarded<T>(work: impl FnOnce() -> Result<T, Box<dyn Error>>) -> Result<T, Box<dyn Error>> {
    cleanup::on_signals()?;
    work()
}

fn bench(args: &args::BenchArgs) -> Result<String, Box<dyn Error>> {
    match &args.what {
        args::BenchWhat::Methods(methods) => Ok(bench::methods(methods)?),
        args::BenchWhat::Decode(decode) => Ok(bench::decode::decode(decode)?),
        args::BenchWhat::Spill(spill) => Ok(bench::spill::spill(spill)?),
    }
}

fn fetch_model(json: bool) -> Result<(), Box<dyn Error>> {
    let path = guarded(|| Ok(fetch::model(&fetch::SMOLLM2, Progress::new())?))?;
    print(&if json {
        format!("{:#}\n", serde_json::json!({"path": path}))
    } else {
        format!("{}\n", path.display())
    })
}

/// Writes to stdout; a reader that has seen enough is no error.
fn print(text: &str) -> Result<(), Box<dyn Error>> {
    match io::stdout().write_all(text.as_bytes()).and_then(|()| io::stdout().flush()) {
        Err(error) if error.kind() != io::ErrorKind::BrokenPipe => Err(error.into()),
        _ => Ok(()),
    }
}
