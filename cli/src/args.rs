//! The command line.

mod late;
mod learn;
pub(crate) mod method;
mod operate;
mod sequences;

use std::path::PathBuf;

use bytesize::ByteSize;
use clap::{ArgGroup, Args, Parser, Subcommand, ValueEnum};
use kvoyant_daemon::config::{SHAPE_GBPS_MIN, SHAPE_LATENCY_US_MAX};
use kvoyant_daemon::device::DeviceName;
use kvoyant_engine::Format;
use kvoyant_methods::{Budget, MethodSpec};

pub(crate) use self::late::LateArgs;
pub(crate) use self::learn::{CalibrateModelArgs, CaptureArgs};
pub(crate) use self::operate::{ConfigArgs, ConfigWhat, DaemonArgs, DrainArgs, EvictArgs, LogArgs};
pub(crate) use self::sequences::{SequencesArgs, SequencesWhat};
use crate::bench::decode::Setting;

/// Keeps the KV cache of long-context language models, and fetches what attention will need.
#[derive(Debug, Parser)]
#[command(name = "kvoyant", version, about, max_term_width = 110)]
pub(crate) struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub(crate) command: Command,
}

/// What `kvoyant` does.
#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Be the daemon (the same as `kvoyantd`)
    Serve(Box<ServeArgs>),
    /// Say what a running daemon holds
    Status(StatusArgs),
    /// Show what a running daemon does, what limits it, and what to turn
    Top(TopArgs),
    /// List open sequences and suspended ones; suspend, bring back and erase them
    Sequences(SequencesArgs),
    /// Have a running daemon take no new sessions, before it is stopped or its node is taken out
    Drain(DrainArgs),
    /// Have pages of sessions leave host memory for the disk, and unused memory go back
    Evict(EvictArgs),
    /// Say what a running daemon logs, or change it
    Log(LogArgs),
    /// Show a running daemon's configuration and where it came from; change what may change, or have it read again
    Config(ConfigArgs),
    /// Say what this machine can do, what it cannot, and what mends it
    Doctor(DoctorArgs),
    /// Get the demo's model into the cache folder, and print its path
    FetchModel {
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// Run a real model over long texts with every method, and compare them
    Demo(DemoArgs),
    /// Compare methods, each by the same measures, or time decoding
    Bench(BenchArgs),
    /// Answer a prompt
    Run(RunArgs),
    /// Measure how a GPU is best fed on this machine, and keep the result for the daemon
    Calibrate(CalibrateArgs),
    /// Let a method learn from a model what it needs to select rows, and keep the result
    CalibrateModel(CalibrateModelArgs),
    /// Write what attention sees while a model reads a text: a trace for `bench methods`
    Capture(CaptureArgs),
    /// Print what a shell needs to complete commands: bash, zsh, fish, elvish or powershell
    Completions {
        /// Which
        shell: clap_complete::Shell,
    },
    /// Write manual pages, one for each command, into a folder
    Man {
        /// Which
        folder: PathBuf,
    },
}

/// `serve`.
#[derive(Debug, Args)]
pub(crate) struct ServeArgs {
    /// The daemon's own arguments
    #[command(flatten)]
    pub(crate) daemon: kvoyant_daemon::Args,
    /// End when the process with this id, which must be the parent, ends
    #[arg(long, hide = true, value_name = "PID")]
    pub(crate) die_with_parent: Option<u32>,
}

/// `status`.
#[derive(Debug, Args)]
pub(crate) struct StatusArgs {
    /// Print JSON
    #[arg(long)]
    pub(crate) json: bool,
    /// The daemon's admin socket
    #[arg(long, value_name = "PATH")]
    pub(crate) admin: Option<PathBuf>,
}

/// `top`.
#[derive(Debug, Args)]
pub(crate) struct TopArgs {
    /// The daemon's admin socket
    #[arg(long, value_name = "PATH")]
    pub(crate) admin: Option<PathBuf>,
    /// Seconds between two looks
    #[arg(long, value_name = "SECONDS", default_value_t = 1.0, value_parser = interval)]
    pub(crate) interval: f64,
    /// Print one look and leave, as where there is no terminal
    #[arg(long)]
    pub(crate) once: bool,
    /// Print one look as JSON
    #[arg(long)]
    pub(crate) json: bool,
}

/// `doctor`.
#[derive(Debug, Args)]
pub(crate) struct DoctorArgs {
    /// The device that must be usable: host, or a GPU such as cuda:0; without it, the configuration's
    #[arg(long, value_name = "DEVICE")]
    pub(crate) device: Option<DeviceName>,
    /// The daemon's configuration file; default: /etc/kvoyant/kvoyantd.toml, if it exists
    #[arg(long, value_name = "FILE")]
    pub(crate) config: Option<PathBuf>,
    /// Folder of calibrations and compiled kernels
    #[arg(long, value_name = "DIR")]
    pub(crate) state: Option<PathBuf>,
    /// Print JSON
    #[arg(long)]
    pub(crate) json: bool,
    /// Be the other process of a trial
    #[arg(long, hide = true, value_name = "ORDER")]
    pub(crate) peer: Option<String>,
}

impl DoctorArgs {
    /// The same as flags of the daemon.
    pub(crate) fn flags(&self) -> kvoyant_daemon::config::Flags {
        kvoyant_daemon::config::Flags {
            device: self.device.map(|device| device.to_string()),
            state: self.state.clone(),
            ..Default::default()
        }
    }
}

/// `calibrate`.
#[derive(Debug, Args)]
pub(crate) struct CalibrateArgs {
    /// Which GPU: cuda:N
    #[arg(long, value_name = "DEVICE", default_value = "cuda:0")]
    pub(crate) device: DeviceName,
    /// Where the daemon keeps its state
    #[arg(long, env = "KVOYANT_STATE", value_name = "DIR")]
    pub(crate) state: Option<PathBuf>,
    /// Measure fewer shapes, in about a second
    #[arg(long)]
    pub(crate) quick: bool,
    /// Print JSON instead of the table
    #[arg(long)]
    pub(crate) json: bool,
}

/// Which model.
#[derive(Debug, Args)]
pub(crate) struct ModelArgs {
    /// A GGUF file, a folder with a Hugging Face checkpoint, or `tiny` (random weights, made in memory);
    /// without it, SmolLM2-135M-Instruct, fetched once
    #[arg(long, value_name = "FILE|DIR|tiny")]
    pub(crate) model: Option<PathBuf>,
}

/// The daemon that `demo` and `run` start for themselves.
#[derive(Debug, Args)]
pub(crate) struct OwnDaemonArgs {
    /// Where rows are kept ready and attention runs: host, or a GPU such as cuda:0 (linear layers stay on the CPU)
    #[arg(long, value_name = "DEVICE", default_value_t)]
    pub(crate) device: DeviceName,
    /// Let rows be read where they lie instead of copying them: nothing moves
    #[arg(long)]
    pub(crate) in_place: bool,
    /// Slow copies down to this bandwidth, in GB/s
    #[arg(long, value_name = "GB/s", conflicts_with = "in_place", value_parser = bandwidth)]
    pub(crate) shape_gbps: Option<f64>,
    /// Keep at most so much of the KV in host memory, in percent, and the rest on disk
    #[arg(long, value_name = "PERCENT", value_parser = percent)]
    pub(crate) host_budget: Option<f64>,
    /// Where on disk: a folder, file or block device; without it, a temporary folder
    #[arg(long, value_name = "PATH", requires = "host_budget")]
    pub(crate) spill: Option<PathBuf>,
    /// Delay every transfer by this much, in microseconds
    #[arg(long, value_name = "µs", conflicts_with = "in_place", value_parser = latency)]
    pub(crate) shape_latency_us: Option<u64>,
}

impl OwnDaemonArgs {
    /// The same as arguments of `serve`.
    pub(crate) fn for_serve(&self) -> Vec<String> {
        let mut all = vec!["--device".to_owned(), self.device.to_string()];
        if self.in_place {
            all.push("--in-place".to_owned());
        }
        if let Some(percent) = self.host_budget {
            all.extend(["--host-percent".to_owned(), percent.to_string()]);
        }
        if let Some(path) = &self.spill {
            all.extend(["--spill".to_owned(), path.display().to_string()]);
        }
        if let Some(gbps) = self.shape_gbps {
            all.extend(["--shape-gbps".to_owned(), gbps.to_string()]);
        }
        if let Some(latency) = self.shape_latency_us {
            all.extend(["--shape-latency-us".to_owned(), latency.to_string()]);
        }
        all
    }
}

/// `demo`.
#[derive(Debug, Args)]
pub(crate) struct DemoArgs {
    /// Which model
    #[command(flatten)]
    pub(crate) model: ModelArgs,
    /// Tokens of each context
    #[arg(long, value_name = "TOKENS", default_value_t = 2048)]
    pub(crate) context: usize,
    /// Hide the needles in this text, and continue it, instead of our own ones
    #[arg(long, value_name = "FILE")]
    pub(crate) text: Option<PathBuf>,
    /// Print JSON instead of the table
    #[arg(long)]
    pub(crate) json: bool,
    /// Seed of the texts and needles
    #[arg(long, default_value_t = 1)]
    pub(crate) seed: u64,
    /// What is done about answers that are late
    #[command(flatten)]
    pub(crate) late: LateArgs,
    /// The daemon
    #[command(flatten)]
    pub(crate) daemon: OwnDaemonArgs,
}

/// `bench`.
#[derive(Debug, Args)]
pub(crate) struct BenchArgs {
    /// What is compared
    #[command(subcommand)]
    pub(crate) what: BenchWhat,
}

/// What `bench` compares.
#[derive(Debug, Subcommand)]
pub(crate) enum BenchWhat {
    /// Every selection method, over traces and a real model
    Methods(MethodsArgs),
    /// How long a decoded token takes after a long text, and where that time goes
    Decode(DecodeArgs),
    /// How fast spilled pages come back from disk and go there, beside fio
    Spill(SpillArgs),
}

/// `bench spill`.
#[derive(Debug, Args)]
pub(crate) struct SpillArgs {
    /// Folder on the disk that is measured; three files of --bytes are made there and removed
    #[arg(long, value_name = "DIR", default_value = ".")]
    pub(crate) path: PathBuf,
    /// Bytes of the area: more than the disk's own caches hold
    #[arg(long, value_name = "BYTES", default_value = "2GiB")]
    pub(crate) bytes: ByteSize,
    /// Bytes of a page, a multiple of 4 KiB and at most 1 MiB
    #[arg(long, value_name = "BYTES", default_value = "16KiB")]
    pub(crate) page: ByteSize,
    /// Operations in flight, ours and fio's
    #[arg(long, value_name = "N", default_value_t = 64, value_parser = clap::value_parser!(u32).range(2..=4096))]
    pub(crate) depth: u32,
    /// Seconds of each measurement
    #[arg(long, value_name = "N", default_value_t = 5, value_parser = clap::value_parser!(u64).range(1..))]
    pub(crate) seconds: u64,
    /// How often each has its turn; medians are shown
    #[arg(long, value_name = "N", default_value_t = 3, value_parser = at_least_one)]
    pub(crate) rounds: usize,
    /// Print JSON instead of the table
    #[arg(long)]
    pub(crate) json: bool,
}

/// `bench decode`.
#[derive(Debug, Args)]
pub(crate) struct DecodeArgs {
    /// Which model
    #[command(flatten)]
    pub(crate) model: ModelArgs,
    /// Tokens of the texts
    #[arg(long, value_name = "TOKENS", value_delimiter = ',', default_value = "2048,8000", value_parser = at_least_one)]
    pub(crate) lengths: Vec<usize>,
    /// `dense`, or a method as `name:key=value,…`; may be repeated
    #[arg(long, value_name = "dense|METHOD", default_value = "dense")]
    pub(crate) attention: Vec<Setting>,
    /// How often each has its turn
    #[arg(long, value_name = "N", default_value_t = 5, value_parser = at_least_one)]
    pub(crate) rounds: usize,
    /// Who selects rows that are read in place
    #[arg(long, value_enum, default_value_t)]
    pub(crate) selects: Selects,
    /// Tokens decoded in a turn
    #[arg(long, value_name = "N", default_value_t = 32, value_parser = at_least_one)]
    pub(crate) steps: usize,
    /// Print JSON instead of the table
    #[arg(long)]
    pub(crate) json: bool,
    /// Read a line before each text and each round, and say a word after it: for a script that measures something else in between
    #[arg(long, hide = true)]
    pub(crate) paced: bool,
    /// The daemon
    #[command(flatten)]
    pub(crate) daemon: OwnDaemonArgs,
}

/// `bench methods`.
#[derive(Debug, Args)]
pub(crate) struct MethodsArgs {
    /// Replay these traces (see `capture`)
    #[arg(long, value_name = "FILE", num_args = 1..)]
    pub(crate) traces: Vec<PathBuf>,
    /// Replay generated traces
    #[arg(long)]
    pub(crate) generated: bool,
    /// Run the real model too, where traces are given
    #[arg(long)]
    pub(crate) live: bool,
    /// Which model; naming one runs it
    #[command(flatten)]
    pub(crate) model: ModelArgs,
    /// Methods, separated by commas; a method with options needs a `--method` of its own
    #[arg(long, value_name = "NAME", value_delimiter = ',', value_parser = method::checked)]
    pub(crate) methods: Vec<String>,
    /// A method with options, as `name:key=value,…`
    #[arg(long = "method", value_name = "METHOD", value_parser = method::checked)]
    pub(crate) specs: Vec<String>,
    /// Rows that a selection may hold per KV head: shares of the sequence (`6%`), or numbers
    #[arg(long, value_name = "N|%", value_delimiter = ',', default_value = "3%,6%,12%")]
    pub(crate) budgets: Vec<Budget>,
    /// Tokens of the real model's texts
    #[arg(long, value_name = "TOKENS", value_delimiter = ',', default_value = "2048", value_parser = at_least_one)]
    pub(crate) lengths: Vec<usize>,
    /// Ask less: ends within ten minutes on two cores
    #[arg(long)]
    pub(crate) quick: bool,
    /// Print JSON instead of the table
    #[arg(long)]
    pub(crate) json: bool,
    /// Write the rows as CSV
    #[arg(long, value_name = "FILE")]
    pub(crate) csv: Option<PathBuf>,
    /// Draw them, as SVG and PNG
    #[arg(long, value_name = "DIR")]
    pub(crate) plots: Option<PathBuf>,
    /// Seed of texts, questions, generated traces and intervals
    #[arg(long, default_value_t = 1)]
    pub(crate) seed: u64,
    /// The daemon
    #[command(flatten)]
    pub(crate) daemon: OwnDaemonArgs,
}

/// `run`.
#[derive(Debug, Args)]
#[command(group = ArgGroup::new("what").required(true).args(["prompt", "file"]))]
pub(crate) struct RunArgs {
    /// Which model
    #[command(flatten)]
    pub(crate) model: ModelArgs,
    /// The prompt
    #[arg(long, value_name = "TEXT")]
    pub(crate) prompt: Option<String>,
    /// A file with the prompt; `-` is standard input
    #[arg(long, value_name = "FILE")]
    pub(crate) file: Option<PathBuf>,
    #[arg(long, value_name = "METHOD", default_value = "kvoyant", conflicts_with = "attention", value_parser = method::parse, help = method::help())]
    pub(crate) method: MethodSpec,
    /// Rows that a selection may hold per KV head: a number, or a share of the sequence (`6%`)
    #[arg(long, value_name = "N|%", conflicts_with = "attention")]
    pub(crate) budget: Option<Budget>,
    /// `dense` attends over everything in this process, without a daemon
    #[arg(long, value_enum)]
    pub(crate) attention: Option<Attention>,
    /// Who selects rows that are read in place
    #[arg(long, value_enum, default_value_t)]
    pub(crate) selects: Selects,
    /// How K and V are stored: f32, f16, bf16, fp8-e4m3, int8, int4-g32 or int4-g64; f16 without it
    #[arg(long, value_name = "FORMAT")]
    pub(crate) kv_format: Option<Format>,
    /// How the prompt is read: `sparse` attends over selected rows, in chunks of 256 tokens
    #[arg(long, value_enum, default_value_t, conflicts_with = "attention")]
    pub(crate) prefill: Prefill,
    /// What a method was calibrated to (`kvoyant calibrate-model --out`), instead of what lies in the cache; may be repeated
    #[arg(long, value_name = "FILE", conflicts_with = "attention")]
    pub(crate) artifact: Vec<PathBuf>,
    /// Longest answer
    #[arg(long, value_name = "TOKENS", default_value_t = 256, value_parser = clap::value_parser!(u32).range(1..))]
    pub(crate) max_tokens: u32,
    /// Give the prompt to the model as it is, without its chat template
    #[arg(long)]
    pub(crate) raw: bool,
    /// Draw tokens at this temperature instead of taking the most probable one
    #[arg(long, value_name = "T", value_parser = positive)]
    pub(crate) temperature: Option<f64>,
    /// Draw among the most probable tokens of this total probability only
    #[arg(long, value_name = "P", requires = "temperature", value_parser = probability)]
    pub(crate) top_p: Option<f64>,
    /// Seed of the draws
    #[arg(long, default_value_t = 0)]
    pub(crate) seed: u64,
    /// Begin with the longest published prefix of the prompt, and publish its own: for this user, or for all
    #[arg(long, value_enum, value_name = "FOR", requires = "socket", conflicts_with_all = ["resume", "attention"])]
    pub(crate) share_prefix: Option<ShareFor>,
    /// Go on from a suspended sequence: the prompt comes behind what it has
    #[arg(long, value_name = "IMAGE", requires = "socket", conflicts_with = "attention")]
    pub(crate) resume: Option<String>,
    /// Suspend the sequence under this name once it has answered; one that was resumed by it is replaced
    #[arg(long, value_name = "IMAGE", requires = "socket", conflicts_with = "attention")]
    pub(crate) suspend: Option<String>,
    /// Replace whatever image has the name of `--suspend`
    #[arg(long, requires = "suspend")]
    pub(crate) overwrite: bool,
    /// Print the answer as JSON once it is whole, with its times
    #[arg(long)]
    pub(crate) json: bool,
    /// Say on stderr where each token's time went
    #[arg(long)]
    pub(crate) stats: bool,
    /// What is done about answers that are late
    #[command(flatten)]
    pub(crate) late: LateArgs,
    /// Use the daemon at this socket instead of starting one
    #[arg(long, value_name = "PATH", conflicts_with_all = ["device", "in_place", "host_budget", "spill", "shape_gbps", "shape_latency_us", "attention"])]
    pub(crate) socket: Option<PathBuf>,
    /// The daemon that it starts
    #[command(flatten)]
    pub(crate) daemon: OwnDaemonArgs,
}

/// For whom a prefix is published.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum ShareFor {
    /// For sessions of the same user.
    Own,
    /// For sessions of every user.
    All,
}

/// Who selects rows that are read in place.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub(crate) enum Selects {
    /// Whoever costs a step less.
    #[default]
    Auto,
    /// The daemon.
    Lane,
    /// The engine's own threads, for methods that can be.
    Client,
}

impl From<Selects> for kvoyant_engine::Selects {
    fn from(selects: Selects) -> Self {
        match selects {
            Selects::Auto => Self::Auto,
            Selects::Lane => Self::Lane,
            Selects::Client => Self::Client,
        }
    }
}

/// Kinds of attention besides the daemon's.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Attention {
    /// Over all rows, in this process.
    Dense,
}

/// How a prompt is read.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub(crate) enum Prefill {
    /// Over all rows.
    #[default]
    Dense,
    /// Over sinks, selected rows and the window, where the method selects by queries.
    Sparse,
}

fn at_least_one(text: &str) -> Result<usize, String> {
    text.parse().ok().filter(|n| *n > 0).ok_or_else(|| "it must be a whole number above 0".into())
}

fn positive(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(value) if value > 0.0 && value.is_finite() => Ok(value),
        _ => Err("it must be a number above 0".into()),
    }
}

fn bandwidth(text: &str) -> Result<f64, String> {
    positive(text)
        .ok()
        .filter(|gbps| (SHAPE_GBPS_MIN..=1e6).contains(gbps))
        .ok_or_else(|| "it must be 0.001 to 1000000 GB/s".into())
}

fn latency(text: &str) -> Result<u64, String> {
    let parsed = text.parse().ok().filter(|latency| *latency <= SHAPE_LATENCY_US_MAX);
    parsed.ok_or_else(|| format!("it must be a whole number of µs, at most {SHAPE_LATENCY_US_MAX}"))
}

fn interval(text: &str) -> Result<f64, String> {
    positive(text)
        .ok()
        .filter(|seconds| (0.1..=3600.0).contains(seconds))
        .ok_or_else(|| "it must be 0.1 to 3600 seconds".into())
}

fn percent(text: &str) -> Result<f64, String> {
    let number = text.strip_suffix('%').unwrap_or(text);
    positive(number)
        .ok()
        .filter(|p| *p <= 100.0)
        .ok_or_else(|| "it must be above 0 and at most 100, as 10%".into())
}

fn probability(text: &str) -> Result<f64, String> {
    positive(text).ok().filter(|p| *p <= 1.0).ok_or_else(|| "it must be above 0 and at most 1".into())
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn a_run_needs_a_prompt_or_a_file_and_not_both() {
        assert!(Cli::try_parse_from(["kvoyant", "run"]).is_err());
        assert!(Cli::try_parse_from(["kvoyant", "run", "--prompt", "a", "--file", "b"]).is_err());
        assert!(Cli::try_parse_from(["kvoyant", "run", "--prompt", "a"]).is_ok());
    }
}
