//! fio, as fast as it goes: io_uring, direct I/O, one job, its file and its buffers registered.

use std::io::{self, Read};
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::Duration;

use serde::Deserialize;

use super::Moved;
use crate::cleanup::Reaped;

/// Why fio gave no result.
#[derive(Debug, thiserror::Error)]
pub(crate) enum FioError {
    /// It could not be run.
    #[error("fio cannot be run: {0}")]
    Run(#[from] io::Error),
    /// It said something else.
    #[error("fio's result cannot be read ({error}); it said: {said}")]
    Read {
        /// Why not.
        error: serde_json::Error,
        /// Its first words.
        said: String,
    },
    /// It ended without a job's result.
    #[error("fio failed with error {error} ({jobs} jobs reported); try the same command by hand: {command}")]
    Failed {
        /// The job's error number.
        error: i32,
        /// Jobs in its result.
        jobs: usize,
        /// What was run.
        command: String,
    },
}

/// What fio is to do.
#[derive(Clone, Debug)]
pub(super) struct Fio {
    pub(super) file: PathBuf,
    pub(super) bytes: u64,
    pub(super) page_bytes: u64,
    pub(super) depth: u32,
    pub(super) seconds: u64,
}

#[derive(Debug, Deserialize)]
struct Output {
    jobs: Vec<Job>,
}

#[derive(Debug, Deserialize)]
struct Job {
    error: i32,
    /// Percent of a processor.
    usr_cpu: f64,
    sys_cpu: f64,
    /// Milliseconds.
    job_runtime: u64,
    read: Side,
    write: Side,
}

#[derive(Debug, Deserialize)]
struct Side {
    total_ios: u64,
    /// Milliseconds.
    runtime: u64,
}

/// Whether it is installed.
pub(super) fn is_there() -> bool {
    let version = Command::new("fio").arg("--version").stdin(Stdio::null()).output();
    version.is_ok_and(|output| output.status.success())
}

impl Fio {
    /// Runs one job of this kind, for the time set.
    pub(super) fn run(&self, kind: &str) -> Result<Moved, FioError> {
        self.job(kind, &["--time_based", &self.runtime()])
    }

    /// Writes the file with checksums, all of it, however long that takes.
    pub(super) fn write_checked(&self) -> Result<(), FioError> {
        self.job("write", &["--verify=crc32c-intel", "--do_verify=0", "--verify_state_save=0"]).map(drop)
    }

    /// Reads it by chance and checks them: as many pages as it has, since fio has no time limit for that.
    pub(super) fn read_checked(&self) -> Result<Moved, FioError> {
        self.job("randread", &["--verify=crc32c-intel", "--verify_state_save=0", &self.runtime()])
    }

    fn runtime(&self) -> String {
        format!("--runtime={}", self.seconds)
    }

    fn job(&self, kind: &str, more: &[&str]) -> Result<Moved, FioError> {
        let mut command = Command::new("fio");
        command
            .args(["--name=spill", "--ioengine=io_uring", "--direct=1", "--fixedbufs=1", "--registerfiles=1"])
            .args(["--thread", "--numjobs=1", "--norandommap", "--output-format=json"])
            .args(more)
            .arg(format!("--rw={kind}"))
            .arg(format!("--filename={}", self.file.display()))
            .arg(format!("--size={}", self.bytes))
            .arg(format!("--bs={}", self.page_bytes))
            .arg(format!("--iodepth={}", self.depth))
            .stdin(Stdio::null())
            .stdout(Stdio::piped());
        let mut child = Reaped::spawn(&mut command)?;
        let mut said = String::new();
        if let Some(mut stdout) = child.child().stdout.take() {
            stdout.read_to_string(&mut said)?;
        }
        child.child().wait()?;
        let output: Output = serde_json::from_str(&said)
            .map_err(|error| FioError::Read { error, said: said.chars().take(200).collect() })?;
        match output.jobs.as_slice() {
            [job] if job.error == 0 => Ok(self.moved(job, kind)),
            jobs => Err(FioError::Failed {
                error: jobs.first().map_or(0, |job| job.error),
                jobs: jobs.len(),
                command: format!("{command:?}"),
            }),
        }
    }

    fn moved(&self, job: &Job, kind: &str) -> Moved {
        let side = if kind == "write" { &job.write } else { &job.read };
        let cpu = (job.usr_cpu + job.sys_cpu) / 100.0 * job.job_runtime as f64;
        let cpu = Duration::from_secs_f64((cpu / 1000.0).max(0.0));
        Moved::new(side.total_ios, self.page_bytes, Duration::from_millis(side.runtime), cpu)
    }
}
