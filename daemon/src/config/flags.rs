//! The configuration's keys as flags.

use std::path::PathBuf;

use bytesize::ByteSize;
use serde::Serialize;

use super::{Newcomers, PinAhead};
use crate::log::LogFormat;
use crate::tiers::host_memory::HugePages;

/// The same keys as flags.
#[derive(Debug, Clone, Default, clap::Args, Serialize)]
pub struct Flags {
    /// Control socket that clients connect to
    #[arg(long, value_name = "PATH")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub socket: Option<PathBuf>,
    /// Admin socket
    #[arg(long, value_name = "PATH")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub admin_socket: Option<PathBuf>,
    /// Serve metrics and health over TCP at this loopback address, e.g. 127.0.0.1:9464
    #[arg(long, value_name = "ADDRESS")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub monitor: Option<String>,
    /// File with a token; whoever sends it to that address may see and do there what the daemon's user may
    #[arg(long, value_name = "FILE")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub monitor_token: Option<PathBuf>,
    /// Send metrics to an OpenTelemetry collector, by OTLP over HTTP, e.g. http://127.0.0.1:4318
    #[arg(long, value_name = "URL")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub otlp: Option<String>,
    /// Write the status to shared memory, too, for `kvoyant top`
    #[arg(long, value_name = "BOOL", num_args = 0..=1, default_missing_value = "true")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub stats_page: Option<bool>,
    /// Host memory for KV, all sessions together, e.g. 64GiB
    #[arg(long, value_name = "BYTES")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub arena: Option<ByteSize>,
    /// Lock the arena into memory as far as the memlock limit allows
    #[arg(long, value_name = "BOOL")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pin: Option<bool>,
    /// Make and pin so much of the arena ahead of time: auto, all, or e.g. 64GiB
    #[arg(long, value_name = "BYTES")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pin_ahead: Option<PinAhead>,
    /// Threads that make and pin memory
    #[arg(long, value_name = "N")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pin_threads: Option<usize>,
    /// Make the arena of huge pages: auto, off, require
    #[arg(long, value_name = "WHEN")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub huge_pages: Option<HugePages>,
    /// Device that attention runs on: host, or a GPU such as cuda:0
    #[arg(long, value_name = "DEVICE")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub device: Option<String>,
    /// Device memory of all sessions together, on a GPU (0: four fifths of what is free)
    #[arg(long, value_name = "BYTES")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub device_memory: Option<ByteSize>,
    /// How a GPU's memory goes to clients: auto, descriptor or handle
    #[arg(long, value_name = "HOW")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub export: Option<String>,
    /// How a GPU's answers become known to streams: auto, timeline64, timeline32 or events
    #[arg(long, value_name = "HOW")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub signal: Option<String>,
    /// Whether the daemon may run its gather kernel: auto (only under MPS), on or off
    #[arg(long, value_name = "WHEN")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub zerocopy: Option<String>,
    /// Folder of what is kept between starts: calibrations, compiled kernels
    #[arg(long, value_name = "DIR")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub state: Option<PathBuf>,
    /// Where pages go that leave host memory: folders, files or block devices, e.g. /var/lib/kvoyant/spill
    #[arg(long, value_name = "PATHS", value_delimiter = ',')]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub spill: Option<Vec<PathBuf>>,
    /// Bytes set aside in each of them (0: all of a block device)
    #[arg(long, value_name = "BYTES")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub spill_bytes: Option<ByteSize>,
    /// How they are read and written: auto, uring or psync
    #[arg(long, value_name = "HOW")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub spill_engine: Option<String>,
    /// How much of a sequence's rows a head may keep on the device, in percent, beside those selected
    #[arg(long, value_name = "PERCENT")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub device_percent: Option<f64>,
    /// How much of a session's KV may be in host memory at a time, in percent; the rest goes to `spill`
    #[arg(long, value_name = "PERCENT")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub host_percent: Option<f64>,
    /// Folder of images: suspended sequences and published prefixes, which outlive the daemon
    #[arg(long, value_name = "DIR")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub store: Option<PathBuf>,
    /// Host memory for published prefixes, out of the arena (0: an eighth of it)
    #[arg(long, value_name = "BYTES")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub prefixes: Option<ByteSize>,
    /// Users (uids) whose prefixes may be for everybody, beside root and the daemon's own
    #[arg(long, value_name = "UIDS", value_delimiter = ',')]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub publishers: Option<Vec<u32>>,
    /// A store behind it, to which images are copied: s3://bucket/prefix, redis://host:port/db, file:///folder
    #[arg(long, value_name = "URL")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub remote: Option<String>,
    /// Answer with pointers into the session's own memory instead of copying into a slab
    #[arg(long, value_name = "BOOL", num_args = 0..=1, default_missing_value = "true")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub in_place: Option<bool>,
    /// Slab of one session, in slab mode
    #[arg(long, value_name = "BYTES")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub slab: Option<ByteSize>,
    /// How many times as many rows as are selected a head keeps on the device
    #[arg(long, value_name = "FACTOR")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub keep: Option<f64>,
    /// Threads that copy, in slab mode
    #[arg(long, value_name = "N")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub copy_threads: Option<usize>,
    /// Simulate a link of this bandwidth in GB/s (0: as fast as memory)
    #[arg(long, value_name = "GB/S")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub shape_gbps: Option<f64>,
    /// Simulate a link of this latency in µs
    #[arg(long, value_name = "US")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub shape_latency_us: Option<u64>,
    /// Threads that select and plan
    #[arg(long, value_name = "N")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub lanes: Option<usize>,
    /// Cores to pin the lanes to, e.g. 2,3
    #[arg(long, value_name = "CORES", value_delimiter = ',')]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub lane_cpus: Option<Vec<usize>>,
    /// How long an idle lane polls before it sleeps, in µs
    #[arg(long, value_name = "US")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub spin_us: Option<u64>,
    /// Compare one answer in so many with exact attention (0: none)
    #[arg(long, value_name = "N")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub check_every: Option<u32>,
    /// Sessions open at once
    #[arg(long, value_name = "N")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_sessions: Option<u32>,
    /// Whether open sessions outlast the daemon: auto (where the service manager stores descriptors), on or off
    #[arg(long, value_name = "WHEN")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub keep_sessions: Option<String>,
    /// How long the next daemon waits for a session's client, in seconds
    #[arg(long, value_name = "SECONDS")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reattach_seconds: Option<u32>,
    /// Log filter: error, warn, info, debug, or per module
    #[arg(long, value_name = "FILTER")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub log: Option<String>,
    /// How the log is written: auto, text or json
    #[arg(long, value_name = "FORMAT")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub log_format: Option<LogFormat>,
    /// Users who may connect, names or numbers, beside root and the daemon's own (none named: the sockets' permissions say)
    #[arg(long, value_name = "USERS", value_delimiter = ',')]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub allow_users: Option<Vec<String>>,
    /// Groups whose members may connect, names or numbers
    #[arg(long, value_name = "GROUPS", value_delimiter = ',')]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub allow_groups: Option<Vec<String>>,
    /// How much of what is scarce is kept for users who have less than their share: auto, or percent
    #[arg(long, value_name = "PERCENT")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub newcomers_percent: Option<Newcomers>,
}
