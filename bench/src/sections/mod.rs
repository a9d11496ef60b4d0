//! What is looked at: each room checks and measures one thing.

mod death;
mod demo;
mod engines;
mod ipc;
mod kernels;
mod latency;
mod overlap;
mod pinning;
mod read_only;
mod rows;

use std::path::PathBuf;
use std::time::Duration;

use kvoyant_cuda::Context;

use crate::run::{Figures, Stop};

/// What all sections are given.
#[derive(Clone, Debug)]
pub(crate) struct Setup {
    /// The device's number.
    pub(crate) ordinal: u32,
    /// Where the prebuilt programs are.
    pub(crate) programs: PathBuf,
    /// The demo's model; `None`: fetch the usual one, or take the tiny one.
    pub(crate) model: Option<PathBuf>,
    /// Whether the driver is the one in software.
    pub(crate) software: bool,
    /// How long a section may take, instead of what suits each.
    pub(crate) patience: Option<Duration>,
}

impl Setup {
    /// The same as arguments.
    pub(crate) fn arguments(&self) -> Vec<String> {
        let mut all = vec![
            "--device".to_owned(),
            self.ordinal.to_string(),
            "--programs".to_owned(),
            self.programs.display().to_string(),
        ];
        if let Some(model) = &self.model {
            all.extend(["--model".to_owned(), model.display().to_string()]);
        }
        all
    }

    /// The device's context in this process.
    fn context(&self) -> Result<Context, Stop> {
        Ok(kvoyant_cuda::driver()?.context(self.ordinal)?)
    }

    /// Measurements of each figure: few where they mean nothing.
    fn samples(&self) -> usize {
        if self.software { 2 } else { 15 }
    }

    /// A program that was built beside this one.
    fn program(&self, name: &str) -> Result<PathBuf, Stop> {
        let path = self.programs.join(name);
        if path.is_file() {
            return Ok(path);
        }
        Err(Stop::Skipped(format!("{name} is not in {}", self.programs.display())))
    }
}

/// A section.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Kind {
    Ipc,
    Engines,
    Rows,
    Kernels,
    Latency,
    Overlap,
    Death,
    ReadOnly,
    Pinning,
    Demo,
}

impl Kind {
    /// In the order in which they are run: first what all else builds on.
    pub(crate) const ALL: [Self; 10] = [
        Self::Ipc,
        Self::Engines,
        Self::Rows,
        Self::Kernels,
        Self::Latency,
        Self::Overlap,
        Self::Death,
        Self::ReadOnly,
        Self::Pinning,
        Self::Demo,
    ];

    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Ipc => "ipc",
            Self::Engines => "engines",
            Self::Rows => "rows",
            Self::Kernels => "kernels",
            Self::Latency => "latency",
            Self::Overlap => "overlap",
            Self::Death => "death",
            Self::ReadOnly => "read-only",
            Self::Pinning => "pinning",
            Self::Demo => "demo",
        }
    }

    pub(crate) fn title(self) -> &'static str {
        match self {
            Self::Ipc => "Memory across processes",
            Self::Engines => "Transfer engines",
            Self::Rows => "Rows by DMA, staged and zero-copy",
            Self::Kernels => "Kernels against their CPU twins",
            Self::Latency => "From doorbell to ready, 64 pages of 16 KiB in host memory",
            Self::Overlap => "Copies and gathering beside a kernel of another process",
            Self::Death => "When one side is killed",
            Self::ReadOnly => "A write through a read-only mapping",
            Self::Pinning => "Registering host memory",
            Self::Demo => "The demo on the GPU",
        }
    }

    /// No section takes as long as this unless something hangs.
    pub(crate) fn patience(self) -> Duration {
        Duration::from_secs(match self {
            Self::Kernels => 600,
            Self::Demo => 1200,
            _ => 180,
        })
    }

    pub(crate) fn run(self, setup: &Setup, figures: &Figures) -> Result<(), Stop> {
        match self {
            Self::Ipc => ipc::run(setup, figures),
            Self::Engines => engines::run(setup, figures),
            Self::Rows => rows::run(setup, figures),
            Self::Kernels => kernels::run(setup, figures),
            Self::Latency => latency::run(setup, figures),
            Self::Overlap => overlap::run(setup, figures),
            Self::Death => death::run(setup, figures),
            Self::ReadOnly => read_only::run(setup, figures),
            Self::Pinning => pinning::run(setup, figures),
            Self::Demo => demo::run(setup, figures),
        }
    }
}
