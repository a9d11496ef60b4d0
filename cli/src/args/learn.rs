//! The arguments of what is learnt from a model: `capture` and `calibrate-model`.

use std::path::PathBuf;

use clap::Args;
use kvoyant_methods::MethodSpec;

use super::ModelArgs;

/// `capture`.
#[derive(Debug, Args)]
pub(crate) struct CaptureArgs {
    /// Which model
    #[command(flatten)]
    pub(crate) model: ModelArgs,
    /// The text, instead of our own
    #[arg(long, value_name = "FILE")]
    pub(crate) text: Option<PathBuf>,
    /// Where the trace goes
    #[arg(long, value_name = "FILE")]
    pub(crate) out: PathBuf,
    /// Tokens of the text that are read, at most
    #[arg(long, value_name = "N", default_value_t = 2048)]
    pub(crate) tokens: usize,
    /// How many of them, the last ones, are decoded one by one
    #[arg(long, value_name = "N", default_value_t = 64)]
    pub(crate) steps: usize,
    /// Print JSON
    #[arg(long)]
    pub(crate) json: bool,
}

/// `calibrate-model`.
#[derive(Debug, Args)]
pub(crate) struct CalibrateModelArgs {
    /// Which model
    #[command(flatten)]
    pub(crate) model: ModelArgs,
    /// For which method: infinigen, infinigen:hint_norm=learned, hata, attention-predictor, hetero, …
    #[arg(long, value_name = "METHOD", value_parser = super::method::parse)]
    pub(crate) method: MethodSpec,
    /// Calibrate on this text instead of our own
    #[arg(long, value_name = "FILE")]
    pub(crate) text: Option<PathBuf>,
    /// Write the artifact here, or the artifacts into this folder, instead of into the cache folder, from where `run` and `demo`
    /// take them
    #[arg(long, value_name = "FILE|DIR")]
    pub(crate) out: Option<PathBuf>,
    /// Print JSON
    #[arg(long)]
    pub(crate) json: bool,
}
