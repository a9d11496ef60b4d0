//! `kvoyant bench`: every method over traces, generated traces and a real model, in one table; and how long a decoded token takes.
//!
//! | room | job |
//! |---|---|
//! | [`ladder`] | which methods, with which budgets |
//! | [`replayed`] | over traces |
//! | [`live`] | through the daemon, with a real model |
//! | [`cost`] | what a method cost, at one accounting |
//! | [`compared`] | paired intervals, and scores against dense |
//! | [`table`] | what is shown |
//! | [`mod@decode`] | `bench decode` |
//! | [`mod@spill`] | `bench spill` |

mod compared;
mod cost;
pub(crate) mod decode;
mod ladder;
mod live;
mod replayed;
pub(crate) mod spill;
mod table;

use std::convert::Infallible;
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use kvoyant_engine::{DaemonError, ForwardError};
use kvoyant_eval::plot::{self, PngError};
use kvoyant_eval::replay::ReplayError;
use kvoyant_eval::row::{self, Row, Skipped};
use kvoyant_eval::trace::TraceError;
use kvoyant_kernels::Path as KernelPath;
use kvoyant_methods::{Budget, MethodError, SpecError};
use serde::Serialize;

use crate::args::{MethodsArgs, method};
use crate::artifact_cache::ArtifactError;
use crate::machine::Machine;
use crate::model::{self, ModelError};
use crate::output;
use crate::private_daemon;
use crate::progress::Progress;
use crate::session::SessionError;
use crate::trial::plan::PlanError;

use self::compared::Sample;

/// What the comparison cannot go on without.
#[derive(Debug, thiserror::Error)]
pub(crate) enum BenchError {
    /// No model.
    #[error(transparent)]
    Model(#[from] ModelError),
    /// Nothing to ask.
    #[error(transparent)]
    Plan(#[from] PlanError),
    /// No calibration.
    #[error(transparent)]
    Calibrate(#[from] ArtifactError),
    /// No daemon.
    #[error(transparent)]
    Start(#[from] private_daemon::DaemonError),
    /// No session.
    #[error(transparent)]
    Session(#[from] SessionError),
    /// A method is none, or has no such option.
    #[error("{}", method::refusal(.0))]
    Spec(#[from] SpecError),
    /// A method cannot be built.
    #[error(transparent)]
    Method(#[from] MethodError),
    /// A trace cannot be used.
    #[error("{}: {error}", .path.display())]
    Trace {
        /// The file.
        path: PathBuf,
        /// Why not.
        error: TraceError,
    },
    /// A trace cannot be replayed.
    #[error(transparent)]
    Replay(#[from] ReplayError),
    /// Plain attention failed.
    #[error(transparent)]
    Dense(#[from] ForwardError<Infallible>),
    /// The daemon failed on the way.
    #[error("{error}; the daemon's last words: {said}")]
    Daemon {
        /// What failed.
        error: ForwardError<DaemonError>,
        /// What it said.
        said: String,
    },
    /// The result cannot be written.
    #[error("the result is no JSON: {0}")]
    Json(#[from] serde_json::Error),
    /// A file cannot be written.
    #[error("{} cannot be written: {error}", .path.display())]
    Write {
        /// The file.
        path: PathBuf,
        /// Why not.
        error: std::io::Error,
    },
    /// A picture cannot be made.
    #[error(transparent)]
    Png(#[from] PngError),
}

/// How much is asked of a real model.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Effort {
    /// One context of each kind.
    Quick,
    /// Enough for intervals that tell methods apart.
    Long,
}

/// The whole result. Every benchmark keeps this outer shape.
#[derive(Debug, Serialize)]
struct Report<'a> {
    machine: Machine,
    seed: u64,
    rows: &'a [Row],
    /// What was asked for and has no row.
    skipped: &'a [Skipped],
}

/// Runs the comparison; what belongs on stdout.
///
/// # Errors
/// If anything is missing or fails.
pub(crate) fn methods(args: &MethodsArgs) -> Result<String, BenchError> {
    check_outputs(args)?;
    let progress = Progress::new();
    let budgets: &[Budget] = &args.budgets;
    let named: Vec<String> = args.methods.iter().chain(&args.specs).cloned().collect();
    let rungs = ladder::rungs(&named, budgets)?;
    let mut samples: Vec<Sample> = Vec::new();
    let mut skipped = ladder::skipped(&named);
    let mut device = "host".to_owned();
    for path in &args.traces {
        let found = replayed::file(path, &rungs, progress)?;
        samples.extend(found.samples);
        skipped.extend(found.skipped);
    }
    if args.generated {
        let found = replayed::generated(args.seed, &rungs, progress)?;
        samples.extend(found.samples);
        skipped.extend(found.skipped);
    }
    let only_traces = args.generated || !args.traces.is_empty();
    if args.model.model.is_some() || args.live || !only_traces {
        let chosen = model::open(&args.model, progress)?;
        let effort = if args.quick { Effort::Quick } else { Effort::Long };
        for &length in &args.lengths {
            let found = live::rows(&chosen.model, length, &rungs, effort, args, progress)?;
            samples.extend(found.samples);
            skipped
                .extend(found.skipped.into_iter().filter(|new| !skipped.contains(new)).collect::<Vec<_>>());
            device = found.device;
        }
    }
    let rows = compared::rows(&samples, args.seed);
    let text = if args.json {
        let machine = Machine::this(&KernelPath::best().to_string(), &device);
        serde_json::to_string_pretty(&Report { machine, seed: args.seed, rows: &rows, skipped: &skipped })?
            + "\n"
    } else {
        table::render(&rows, &skipped)
    };
    match write_files(args, &rows) {
        Ok(()) => Ok(text),
        Err(error) => {
            // What took hours is shown all the same, and that the files are missing is said behind it.
            let mut out = io::stdout().lock();
            let _ = out.write_all(text.as_bytes()).and_then(|()| out.flush());
            Err(error)
        }
    }
}

/// Whether what is to be written can be.
fn check_outputs(args: &MethodsArgs) -> Result<(), BenchError> {
    let failed = |path: &Path| {
        let path = path.to_owned();
        move |error| BenchError::Write { path, error }
    };
    if let Some(path) = &args.csv {
        output::check_written(path).map_err(failed(path))?;
    }
    if let Some(folder) = &args.plots {
        std::fs::create_dir_all(folder)
            .and_then(|()| output::check_folder(folder))
            .map_err(failed(folder))?;
    }
    Ok(())
}

/// Writes the rows and the pictures of them that were asked for.
fn write_files(args: &MethodsArgs, rows: &[Row]) -> Result<(), BenchError> {
    if let Some(path) = &args.csv {
        write(path, row::csv(rows).as_bytes())?;
    }
    if let Some(folder) = &args.plots {
        for (name, chart) in plot::charts(rows) {
            write(&folder.join(format!("{name}.svg")), chart.svg().as_bytes())?;
            write(&folder.join(format!("{name}.png")), &chart.png()?)?;
        }
    }
    Ok(())
}

fn write(path: &Path, bytes: &[u8]) -> Result<(), BenchError> {
    std::fs::write(path, bytes).map_err(|error| BenchError::Write { path: path.to_owned(), error })
}
