//! The arguments of `kvoyant sequences`.

use std::path::PathBuf;

use clap::{Args, Subcommand};

/// `sequences`.
#[derive(Debug, Args)]
#[command(
    after_help = "Root and the daemon's own user see and change everything, everybody else what is theirs."
)]
pub(crate) struct SequencesArgs {
    /// What to do; without it, list
    #[command(subcommand)]
    pub(crate) what: Option<SequencesWhat>,
    /// Print JSON
    #[arg(long, global = true)]
    pub(crate) json: bool,
    /// The daemon's admin socket
    #[arg(long, value_name = "PATH", global = true)]
    pub(crate) admin: Option<PathBuf>,
}

/// What `sequences` does.
#[derive(Debug, Subcommand)]
pub(crate) enum SequencesWhat {
    /// Write an open sequence to an image and close it, while its client lives; that is told with its next question about it
    Suspend(SuspendArgs),
    /// Get a suspended sequence ready here: copy it from the remote store if it is only there, and compare every byte with its checksums
    Resume(ImageArgs),
    /// Erase an image, on this machine and in the remote store
    Rm(ImageArgs),
}

/// `sequences suspend`.
#[derive(Debug, Args)]
pub(crate) struct SuspendArgs {
    /// Number of its session, as `kvoyant sequences` lists it
    pub(crate) session: u64,
    /// Its handle there, such as 3.0
    #[arg(value_parser = handle)]
    pub(crate) sequence: String,
    /// What the image is to be called: letters, digits, dots, dashes and underscores
    pub(crate) image: String,
    /// Replace an image of that name
    #[arg(long)]
    pub(crate) overwrite: bool,
    /// A note that is kept with it
    #[arg(long, value_name = "TEXT", default_value = "")]
    pub(crate) label: String,
}

/// `sequences resume` and `rm`.
#[derive(Debug, Args)]
pub(crate) struct ImageArgs {
    /// What the image is called
    pub(crate) image: String,
    /// Whose it is; without it, yours
    #[arg(long, value_name = "UID")]
    pub(crate) uid: Option<u32>,
}

/// Slot and generation, which the daemon reads.
pub(super) fn handle(text: &str) -> Result<String, String> {
    let number = |text: &str| !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
    match text.split_once('.') {
        Some((slot, generation)) if number(slot) && number(generation) => Ok(text.to_owned()),
        _ => Err("name its slot and generation, as 3.0; `kvoyant sequences` lists them".into()),
    }
}
