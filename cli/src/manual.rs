//! `kvoyant completions` and `kvoyant man`: what shells and `man` know of the command line, made from the command line itself.

use std::io;
use std::path::{Path, PathBuf};

use clap::{CommandFactory, Parser};
use clap_complete::Shell;
use thiserror::Error;

use crate::args::Cli;

/// The daemon's own program, of which this one has the same arguments.
#[derive(Debug, Parser)]
#[command(
    name = "kvoyantd",
    version,
    about = "Keeps the KV cache of long-context LLM inference, and has what the next layer needs ready before it asks"
)]
struct Daemon {
    #[command(flatten)]
    args: kvoyant_daemon::Args,
}

/// Pages that cannot be written.
#[derive(Debug, Error)]
#[error("cannot write manual pages to {}: {source}; name a folder that can be written", path.display())]
pub(crate) struct ManError {
    path: PathBuf,
    source: io::Error,
}

/// The completions of a shell.
pub(crate) fn completions(shell: Shell) -> String {
    let mut text = Vec::new();
    clap_complete::generate(shell, &mut Cli::command(), "kvoyant", &mut text);
    String::from_utf8_lossy(&text).into_owned()
}

/// Writes a page for each command and one for the daemon, and says which.
///
/// # Errors
/// A folder that cannot be written.
pub(crate) fn pages(folder: &Path) -> Result<String, ManError> {
    let fail = |source| ManError { path: folder.to_path_buf(), source };
    std::fs::create_dir_all(folder).map_err(fail)?;
    clap_mangen::generate_to(Cli::command(), folder).map_err(fail)?;
    clap_mangen::generate_to(Daemon::command(), folder).map_err(fail)?;
    let mut names = Vec::new();
    for entry in std::fs::read_dir(folder).map_err(fail)? {
        let name = entry.map_err(fail)?.file_name().to_string_lossy().into_owned();
        if name.starts_with("kvoyant") && name.ends_with(".1") {
            names.push(folder.join(name).display().to_string());
        }
    }
    names.sort();
    Ok(names.join("\n") + "\n")
}
