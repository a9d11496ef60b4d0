//! Configuration: a TOML file, then the environment, then flags, each overriding what comes before it.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use bytesize::ByteSize;
use kvoyant_protocol::EXTENT_BYTES;
use kvoyant_protocol::control::{Mode, features};
use kvoyant_protocol::packet::PATH_BYTES_MAX;
use serde::{Deserialize, Serialize};

use self::error::number;
use crate::device::DeviceName;
use crate::device::cuda;
use crate::device::cuda::store::default_folder;
use crate::device::host::Shape;
use crate::log::LogFormat;
use crate::quota::{Access, Group, Quotas, User};
use crate::tiers::host_memory::HugePages;
use crate::tiers::nvme::{EngineChoice, SpillSettings};

pub mod document;
mod error;
mod flags;
pub mod keys;
mod load;
mod newcomers;
mod pin_ahead;
mod start;

pub use error::ConfigError;
pub use flags::Flags;
pub use load::{Loaded, Origin};
pub(crate) use load::{default_file, unknown};
pub use newcomers::Newcomers;
pub use pin_ahead::PinAhead;

/// Operations in flight on each device, and how many of them may be writes while reads wait.
const SPILL_DEPTH: u32 = 128;
const SPILL_WRITE_DEPTH: u32 = 16;

/// The slowest link that is simulated, in GB/s.
pub const SHAPE_GBPS_MIN: f64 = 0.001;

/// The longest latency of a simulated link, in µs: an hour.
pub const SHAPE_LATENCY_US_MAX: u64 = 3_600_000_000;

/// The most bytes of anything: more is mistyped.
const BYTES_MAX: ByteSize = ByteSize(1 << 60);

/// Everything that can be set. Every key is also an environment variable `KVOYANT_<KEY>` and, with dashes, a flag.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// Control socket that clients connect to.
    pub socket: PathBuf,
    /// Admin socket; unless it is set, `admin.sock` beside `socket`.
    pub admin_socket: PathBuf,
    /// Loopback address, with a port, where metrics, health and the dashboard are served over TCP to whoever is on this machine; empty: nowhere.
    pub monitor: String,
    /// File with a token; whoever sends that over TCP is the daemon's user there. Empty: nobody is.
    pub monitor_token: PathBuf,
    /// Where an OpenTelemetry collector takes metrics (OTLP over HTTP), such as `http://127.0.0.1:4318`; empty: nowhere.
    pub otlp: String,
    /// Whether the status is also written to shared memory, half a second by half a second, where `kvoyant top` reads it unasked.
    pub stats_page: bool,
    /// Host memory for KV, all sessions together. Rounded down to extents of 64 MiB.
    pub arena: ByteSize,
    /// Whether to lock the arena into memory as far as the memlock limit allows.
    pub pin: bool,
    /// How much of the arena is made and pinned ahead of time: `auto` (what the device asks for), `all`, or bytes.
    pub pin_ahead: PinAhead,
    /// Threads that make and pin memory.
    pub pin_threads: usize,
    /// Whether the arena is made of huge pages: `auto`, `off` or `require`.
    pub huge_pages: HugePages,
    /// Device: `host`, or a GPU: `cuda:0`.
    pub device: String,
    /// Device memory of all sessions together, on a GPU; 0: four fifths of what is free at start.
    pub device_memory: ByteSize,
    /// How a GPU's memory goes to clients: `descriptor`, `handle`, or `auto`: descriptors where the device has them.
    pub export: String,
    /// How a GPU's answers become known to clients' streams: `auto`, `timeline64`, `timeline32` or `events`.
    pub signal: String,
    /// Whether the daemon may run its gather kernel: `auto` (only under MPS), `on` or `off`.
    pub zerocopy: String,
    /// Folder of what is kept between starts: calibrations, compiled kernels.
    pub state: PathBuf,
    /// Where pages go that leave host memory: folders, files or raw block devices, striped; empty: they stay.
    pub spill: Vec<PathBuf>,
    /// Bytes set aside in each of them; 0: all of a block device.
    pub spill_bytes: ByteSize,
    /// How it is read and written: `auto`, `uring` or `psync`.
    pub spill_engine: String,
    /// How much of a sequence's rows a head may keep on the device, in percent, selected ones aside, which always have room.
    pub device_percent: f64,
    /// How much of a session's KV may be in host memory at a time where there is `spill`, in percent. What needs more at once gets it.
    pub host_percent: f64,
    /// Folder of images: suspended sequences and published prefixes, which outlive the daemon; empty: none are kept.
    pub store: PathBuf,
    /// Host memory for published prefixes, out of the arena; 0: an eighth of it.
    pub prefixes: ByteSize,
    /// Users whose prefixes may be for everybody, beside root and the daemon's own: their rows are believed.
    pub publishers: Vec<u32>,
    /// A store behind it: `s3://bucket/prefix`, `redis://host:port/db`, `file:///folder`; empty: none.
    pub remote: String,
    /// Whether the host device answers in place instead of copying into a slab.
    pub in_place: bool,
    /// Slab of one session, in slab mode.
    pub slab: ByteSize,
    /// How many times as many rows as are selected a head keeps on the device.
    pub keep: f64,
    /// Threads that copy, in slab mode.
    pub copy_threads: usize,
    /// Bandwidth of the simulated link in GB/s; 0: not shaped.
    pub shape_gbps: f64,
    /// Latency of the simulated link in µs.
    pub shape_latency_us: u64,
    /// Lanes: threads that select and plan.
    pub lanes: usize,
    /// Cores that lanes are pinned to, one each; empty: not pinned.
    pub lane_cpus: Vec<usize>,
    /// How long an idle lane polls before it sleeps, in µs.
    pub spin_us: u64,
    /// One answer in so many is compared with exact attention, for metrics; 0: none.
    pub check_every: u32,
    /// Sessions open at once.
    pub max_sessions: u32,
    /// Whether open sessions outlast the daemon: `on`, `off`, or `auto`: where the service manager stores descriptors.
    pub keep_sessions: String,
    /// How long the next daemon waits for a session's client, in seconds.
    pub reattach_seconds: u32,
    /// Log filter, as `tracing` takes it: `info`, `kvoyant_daemon=debug`, …
    pub log: String,
    /// How the log is written: `auto`, `text` or `json`.
    pub log_format: LogFormat,
    /// Users who may connect, by name or number, beside root and the daemon's own; with `allow_groups` empty as well: everybody whom the
    /// sockets' permissions let in.
    pub allow_users: Vec<User>,
    /// Groups whose members may connect, by name or number.
    pub allow_groups: Vec<Group>,
    /// What users may have, all their sessions together.
    pub quotas: Quotas,
    /// How much of what is scarce users who have more than an equal share of it leave free for others, in percent, or `auto`.
    pub newcomers_percent: Newcomers,
}

/// Where sockets go by default: the service's runtime folder, or the user's.
fn runtime_folder() -> PathBuf {
    if nix::unistd::geteuid().is_root() {
        return "/run/kvoyant".into();
    }
    runtime_folder_in(std::env::var_os("XDG_RUNTIME_DIR").map(PathBuf::from))
}

/// A relative path, such as an empty one, counts as none: the XDG base directory specification has it so.
fn runtime_folder_in(user: Option<PathBuf>) -> PathBuf {
    match user.filter(|folder| folder.is_absolute()) {
        Some(folder) => folder.join("kvoyant"),
        None => folder_among_others(),
    }
}

/// Where sockets go if the user has no folder for them: a folder where everybody has some, so that it is not taken on trust
/// ([`crate::endpoint`]).
pub(crate) fn folder_among_others() -> PathBuf {
    std::env::temp_dir().join(format!("kvoyant-{}", nix::unistd::geteuid()))
}

impl Default for Config {
    fn default() -> Self {
        let folder = runtime_folder();
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        Self {
            socket: folder.join("kvoyantd.sock"),
            admin_socket: folder.join("admin.sock"),
            monitor: String::new(),
            monitor_token: PathBuf::new(),
            otlp: String::new(),
            stats_page: true,
            arena: ByteSize::gib(4),
            pin: true,
            pin_ahead: PinAhead::Auto,
            pin_threads: (cores / 4).clamp(1, 8),
            huge_pages: HugePages::Auto,
            device: "host".into(),
            device_memory: ByteSize(0),
            export: "auto".into(),
            signal: "auto".into(),
            zerocopy: "auto".into(),
            state: default_folder(),
            spill: Vec::new(),
            spill_bytes: ByteSize::gib(16),
            spill_engine: "auto".into(),
            device_percent: 100.0,
            host_percent: 100.0,
            store: PathBuf::new(),
            prefixes: ByteSize(0),
            publishers: Vec::new(),
            remote: String::new(),
            in_place: false,
            slab: ByteSize::mib(256),
            keep: 2.0,
            copy_threads: 1,
            shape_gbps: 0.0,
            shape_latency_us: 0,
            lanes: (cores / 8).max(1),
            lane_cpus: Vec::new(),
            // A sleeping lane costs a wake-up (microseconds on bare metal, tens of them in a virtual machine); a
            // polling one costs a core, which small machines need for the model.
            spin_us: if cores >= 8 { 200 } else { 20 },
            check_every: 4096,
            max_sessions: 64,
            keep_sessions: "auto".into(),
            reattach_seconds: 30,
            log: "info".into(),
            log_format: LogFormat::Auto,
            allow_users: Vec::new(),
            allow_groups: Vec::new(),
            quotas: Quotas::default(),
            newcomers_percent: Newcomers::Auto,
        }
    }
}

/// The file that is read when none is named, if it exists.
pub const DEFAULT_FILE: &str = "/etc/kvoyant/kvoyantd.toml";

impl Config {
    /// Reads the file (or [`DEFAULT_FILE`], if it exists), the environment and the flags, and checks the result.
    ///
    /// # Errors
    /// The first thing that is wrong.
    pub fn load<F: Serialize>(file: Option<&Path>, flags: F) -> Result<Self, ConfigError> {
        Ok(Loaded::load(file, flags)?.config)
    }

    /// Checks what types cannot.
    pub fn check(&self) -> Result<(), ConfigError> {
        let bad =
            |key, value: String, reason: &str| Err(ConfigError::Value { key, value, reason: reason.into() });
        let ahead = match self.pin_ahead {
            PinAhead::Bytes(bytes) => bytes,
            _ => ByteSize(0),
        };
        for (key, bytes) in [
            ("arena", self.arena),
            ("device_memory", self.device_memory),
            ("spill_bytes", self.spill_bytes),
            ("prefixes", self.prefixes),
            ("pin_ahead", ahead),
        ] {
            if bytes > BYTES_MAX {
                return bad(key, bytes.to_string(), "it must be at most 1 EiB");
            }
        }
        if self.arena.as_u64() < EXTENT_BYTES as u64 {
            return bad("arena", self.arena.to_string(), "it must hold at least one extent of 64 MiB");
        }
        if let Err(reason) = self.monitor_address() {
            return bad("monitor", self.monitor.clone(), &reason);
        }
        if !self.monitor_token.as_os_str().is_empty() && self.monitor.is_empty() {
            return bad(
                "monitor_token",
                self.monitor_token.display().to_string(),
                "it goes with `monitor`, an address",
            );
        }
        if !self.otlp.is_empty()
            && let Err(reason) = crate::metrics::collector(&self.otlp)
        {
            return bad("otlp", self.otlp.clone(), &reason);
        }
        if let Err(error) = self.device.parse::<DeviceName>() {
            return bad("device", self.device.clone(), &error.to_string());
        }
        let one_of = |key, value: &str, known: &[&str]| {
            let reason = format!("it must be {}", known.join(", "));
            if known.contains(&value) { Ok(()) } else { bad(key, value.into(), &reason) }
        };
        one_of("export", &self.export, &["auto", "descriptor", "handle"])?;
        one_of("signal", &self.signal, &["auto", "timeline64", "timeline32", "events"])?;
        one_of("zerocopy", &self.zerocopy, &["auto", "on", "off"])?;
        if self.device_name() != DeviceName::Host
            && (self.in_place || self.shape_gbps > 0.0 || self.shape_latency_us > 0)
        {
            return bad(
                "device",
                self.device.clone(),
                "in_place, shape_gbps and shape_latency_us go with the device `host` alone",
            );
        }
        if self.device_name() != DeviceName::Host && !self.spill.is_empty() {
            let reason = "pages leave host memory with the device `host` alone, for now: a GPU's streams wait for answers in order";
            return bad("spill", format!("{:?}", self.spill), reason);
        }
        one_of("spill_engine", &self.spill_engine, &["auto", "uring", "psync"])?;
        one_of("keep_sessions", &self.keep_sessions, &["auto", "on", "off"])?;
        if !(1..=3600).contains(&self.reattach_seconds) {
            return bad("reattach_seconds", self.reattach_seconds.to_string(), "it must be 1 to 3600");
        }
        if !(0.0..=100.0).contains(&self.device_percent) {
            return bad("device_percent", self.device_percent.to_string(), "it must be 0 to 100");
        }
        if !(self.host_percent > 0.0 && self.host_percent <= 100.0) {
            return bad(
                "host_percent",
                self.host_percent.to_string(),
                "it must be more than 0 and at most 100",
            );
        }
        if self.host_percent < 100.0 && self.spill.is_empty() {
            return bad(
                "host_percent",
                self.host_percent.to_string(),
                "name a place for the rest with `spill`",
            );
        }
        if !self.remote.is_empty() && self.store.as_os_str().is_empty() {
            return bad("remote", "a URL".into(), "name a folder for images of this machine with `store`");
        }
        if !(1..=256).contains(&self.lanes) {
            return bad("lanes", self.lanes.to_string(), "it must be 1 to 256");
        }
        if !self.lane_cpus.is_empty() && self.lane_cpus.len() != self.lanes {
            let reason = format!("name one core for each of the {} lanes, or none", self.lanes);
            return bad("lane_cpus", format!("{:?}", self.lane_cpus), &reason);
        }
        if !(1..=64).contains(&self.pin_threads) {
            return bad("pin_threads", self.pin_threads.to_string(), "it must be 1 to 64");
        }
        if !(1..=64).contains(&self.copy_threads) {
            return bad("copy_threads", self.copy_threads.to_string(), "it must be 1 to 64");
        }
        if self.shape_gbps != 0.0 && !(SHAPE_GBPS_MIN..=1e6).contains(&self.shape_gbps) {
            return bad("shape_gbps", number(self.shape_gbps), "it must be 0.001 to 1000000 GB/s, or 0");
        }
        if self.shape_latency_us > SHAPE_LATENCY_US_MAX {
            let reason = format!("it must be at most {SHAPE_LATENCY_US_MAX} µs, an hour");
            return bad("shape_latency_us", self.shape_latency_us.to_string(), &reason);
        }
        if !(1.0..=1e6).contains(&self.keep) {
            return bad("keep", number(self.keep), "it must be 1 to 1000000");
        }
        if !(1 << 20..=1 << 40).contains(&self.slab.as_u64()) {
            return bad("slab", self.slab.to_string(), "it must be 1 MiB to 1 TiB");
        }
        if self.max_sessions == 0 {
            return bad("max_sessions", "0".into(), "it must be at least 1");
        }
        for (key, path) in [("socket", &self.socket), ("admin_socket", &self.admin_socket)] {
            if path.file_name().is_none() {
                return bad(key, path.display().to_string(), "it must be the path of a socket");
            }
            if path.as_os_str().len() > PATH_BYTES_MAX {
                return bad(key, path.display().to_string(), "a socket's path may have 103 bytes at most");
            }
        }
        if self.socket == self.admin_socket {
            return bad(
                "admin_socket",
                self.socket.display().to_string(),
                "it is the control socket as well",
            );
        }
        Ok(())
    }

    /// Where metrics and health are served over TCP.
    ///
    /// # Errors
    /// If it is no address, or one that other machines reach.
    pub fn monitor_address(&self) -> Result<Option<SocketAddr>, String> {
        if self.monitor.is_empty() {
            return Ok(None);
        }
        match self.monitor.parse::<SocketAddr>() {
            Ok(address) if address.ip().is_loopback() => Ok(Some(address)),
            Ok(_) => Err("it must be a loopback address: for other machines, put a proxy that asks who they are before it".into()),
            Err(_) => Err("it must be an address with a port, such as 127.0.0.1:9464 or [::1]:9464".into()),
        }
    }

    /// What `device` names.
    #[must_use]
    pub fn device_name(&self) -> DeviceName {
        self.device.parse().unwrap_or_default()
    }

    /// What is set about a GPU.
    #[must_use]
    pub fn cuda(&self, ordinal: u32) -> cuda::Options {
        cuda::Options {
            ordinal,
            device_memory: self.device_memory.as_u64(),
            exports: match self.export.as_str() {
                "descriptor" => features::CUDA_DESCRIPTORS,
                "handle" => features::CUDA_HANDLES,
                _ => 0,
            },
            signal: self.signal.clone(),
            zerocopy: self.zerocopy.clone(),
            state: self.state.clone(),
            spin: Duration::from_micros(self.spin_us),
        }
    }

    /// Who may connect.
    #[must_use]
    pub fn access(&self) -> Access {
        Access::new(&self.allow_users, &self.allow_groups)
    }

    /// Where pages go that leave host memory.
    #[must_use]
    pub fn spill(&self) -> Option<SpillSettings> {
        (!self.spill.is_empty()).then(|| SpillSettings {
            paths: self.spill.clone(),
            bytes: self.spill_bytes.as_u64(),
            engine: match self.spill_engine.as_str() {
                "uring" => EngineChoice::Uring,
                "psync" => EngineChoice::Psync,
                _ => EngineChoice::Auto,
            },
            depth: SPILL_DEPTH,
            write_depth: SPILL_WRITE_DEPTH,
            sq_poll: false,
            io_poll: false,
        })
    }

    /// How the host device answers.
    #[must_use]
    pub fn mode(&self) -> Mode {
        if self.in_place { Mode::InPlace } else { Mode::Slab }
    }

    /// The simulated link.
    #[must_use]
    pub fn shape(&self) -> Shape {
        Shape {
            gbps: (self.shape_gbps > 0.0).then_some(self.shape_gbps),
            latency: Duration::from_micros(self.shape_latency_us),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn flags_override_the_file_and_the_file_overrides_the_defaults() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("kvoyantd.toml");
        std::fs::write(&file, "arena = \"1GiB\"\nlanes = 3\n").unwrap();
        let flags = Flags { lanes: Some(2), ..Flags::default() };
        let config = Config::load(Some(&file), flags).unwrap();
        assert_eq!((config.arena, config.lanes), (ByteSize::gib(1), 2));
        assert_eq!(config.keep, Config::default().keep);
    }

    #[test]
    fn what_is_pinned_ahead_is_a_word_or_a_number_of_bytes() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("kvoyantd.toml");
        let load = |value: &str| {
            std::fs::write(&file, format!("pin_ahead = {value}\nhuge_pages = \"off\"\n")).unwrap();
            Config::load(Some(&file), Flags::default())
        };
        for (value, bytes) in [
            ("\"auto\"", 7),
            ("\"all\"", 1 << 30),
            ("\"64MiB\"", 64 << 20),
            ("4096", 4096),
            ("\"2TiB\"", 1 << 30),
        ] {
            let config = load(value).unwrap();
            assert_eq!(config.pin_ahead.bytes(1 << 30, 7), bytes, "{value}");
            let again = serde_json::from_str(&serde_json::to_string(&config).unwrap()).unwrap();
            assert_eq!(config, again);
        }
        let error = load("\"some\"").unwrap_err().to_string();
        assert!(error.contains("neither `auto` nor `all`"), "{error}");
    }

    #[test]
    fn the_admin_socket_lies_beside_the_socket_unless_it_is_set() {
        let flags = Flags { socket: Some("/x/y.sock".into()), ..Flags::default() };
        assert_eq!(Config::load(None, flags.clone()).unwrap().admin_socket, Path::new("/x/admin.sock"));
        let flags = Flags { admin_socket: Some("/z/a.sock".into()), ..flags };
        assert_eq!(Config::load(None, flags).unwrap().admin_socket, Path::new("/z/a.sock"));
    }

    #[test]
    fn a_runtime_folder_of_the_user_counts_if_it_is_a_whole_path() {
        assert_eq!(runtime_folder_in(Some("/run/user/7".into())), Path::new("/run/user/7/kvoyant"));
        for none in [None, Some(""), Some("run")] {
            assert_eq!(runtime_folder_in(none.map(PathBuf::from)), folder_among_others());
        }
    }

    #[test]
    fn who_may_connect_and_have_how_much_is_read_from_names_and_numbers() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("kvoyantd.toml");
        let load = |text: &str, flags: Flags| {
            std::fs::write(&file, text).unwrap();
            Config::load(Some(&file), flags).map_err(|error| error.to_string())
        };
        let text = "allow_users = [\"root\", 1001]\nnewcomers_percent = 5\n[quotas]\nhost = \"1GiB\"\n[quotas.user.root]\nhost = \"none\"\n";
        let config = load(text, Flags::default()).unwrap();
        assert_eq!(
            (config.allow_users.as_slice(), config.newcomers_percent),
            ([User(0), User(1001)].as_slice(), Newcomers::Percent(5.0))
        );
        assert_eq!((config.quotas.of(0)[3], config.quotas.of(1001)[3]), (u64::MAX, 1 << 30));
        let again: Config = serde_json::from_str(&serde_json::to_string(&config).unwrap()).unwrap();
        assert_eq!(again, config, "what --check prints says the same");
        let flags = Flags { allow_users: Some(vec!["nobody-of-that-name".into()]), ..Flags::default() };
        let error = load(text, flags).unwrap_err();
        assert!(error.contains("there is no user `nobody-of-that-name`"), "{error}");
        let flags = Flags { allow_groups: Some(vec!["root".into(), "7".into()]), ..Flags::default() };
        assert_eq!(load(text, flags).unwrap().allow_groups, [Group(0), Group(7)]);
        let error = load("[quotas]\nhots = 3\n", Flags::default()).unwrap_err();
        assert!(error.contains("no quota `hots`"), "{error}");
    }

    #[test]
    fn unknown_keys_missing_files_and_bad_values_are_refused_in_one_sentence() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("kvoyantd.toml");
        std::fs::write(&file, "areena = \"1GiB\"\n").unwrap();
        let error = Config::load(Some(&file), Flags::default()).unwrap_err().to_string();
        assert!(
            error.contains("no key `areena` in /") && error.ends_with("did you mean `arena`?"),
            "{error}"
        );
        let missing = Config::load(Some(&folder.path().join("no")), Flags::default()).unwrap_err();
        assert!(matches!(missing, ConfigError::NoFile(_)));
        for flags in [
            Flags { arena: Some(ByteSize::mib(1)), ..Flags::default() },
            Flags { lanes: Some(0), ..Flags::default() },
            Flags { lane_cpus: Some(vec![1, 2]), lanes: Some(1), ..Flags::default() },
            Flags { shape_gbps: Some(-1.0), ..Flags::default() },
            Flags { shape_gbps: Some(1e-300), ..Flags::default() },
            Flags { shape_latency_us: Some(u64::MAX), ..Flags::default() },
            Flags { arena: Some(ByteSize(u64::MAX)), ..Flags::default() },
            Flags { keep: Some(1e300), ..Flags::default() },
            Flags { device: Some("tpu".into()), ..Flags::default() },
            Flags { device: Some("cuda:0".into()), in_place: Some(true), ..Flags::default() },
            Flags { signal: Some("smoke".into()), ..Flags::default() },
            Flags { export: Some("fax".into()), ..Flags::default() },
            Flags { keep: Some(0.5), ..Flags::default() },
            Flags { host_percent: Some(10.0), ..Flags::default() },
            Flags { host_percent: Some(0.0), spill: Some(vec!["/x".into()]), ..Flags::default() },
            Flags { device: Some("cuda:0".into()), spill: Some(vec!["/x".into()]), ..Flags::default() },
            Flags { spill_engine: Some("tape".into()), ..Flags::default() },
        ] {
            assert!(matches!(Config::load(None, flags), Err(ConfigError::Value { .. })));
        }
    }
}
