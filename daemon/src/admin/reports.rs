//! What operators see and say of the daemon as a whole.

use std::collections::BTreeMap;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::settings::{Change, Changes};
use crate::status::{ArenaReport, DeviceReport, MethodReport, StoreReport};
use crate::tiers::nvme;

/// The configuration by key.
pub type ConfigReport = BTreeMap<String, ConfigValue>;

/// Keys and what they are to be; `null` is what the configuration said when it was last read.
pub type ConfigPatch = BTreeMap<String, Value>;

/// A key of the configuration.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct ConfigValue {
    /// What it is; bytes as numbers, addresses without their passwords.
    pub value: Value,
    /// Where that came from: `default`, `file …`, `environment …`, `flag …`, `operator`, or `program` of a daemon that is part of one.
    pub from: String,
    /// When a change counts: `restart`, `at once` or `new sessions`.
    pub changes: String,
}

/// A key that has another value than before.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct ChangeReport {
    /// Which.
    pub key: String,
    /// What it was, as the file has it.
    pub from: String,
    /// What it is, or will be.
    pub to: String,
}

/// What came of new values.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Changed {
    /// What counts now, or for new sessions.
    pub changed: Vec<ChangeReport>,
    /// What waits for a restart.
    pub waiting: Vec<ChangeReport>,
}

impl From<Changes> for Changed {
    fn from(Changes { made, waiting }: Changes) -> Self {
        let report = |Change { key, from, to }| ChangeReport { key: str::to_owned(key), from, to };
        Self {
            changed: made.into_iter().map(report).collect(),
            waiting: waiting.into_iter().map(report).collect(),
        }
    }
}

/// What is logged.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct LogReport {
    /// The filter, as the key `log` has it.
    pub filter: String,
    /// Lines that were dropped since the start because nobody read those before them.
    #[serde(default)]
    pub dropped_lines: u64,
}

/// Whether no new sessions are taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct DrainReport {
    /// Whether it is so.
    pub draining: bool,
    /// Sessions that there are.
    pub sessions: u64,
}

/// What is to leave host memory.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct EvictOrder {
    /// Of which session; of all, which operators alone may ask for.
    #[serde(default)]
    pub session: Option<u64>,
    /// Of which sequence of it: slot and generation, with a dot between them. Of all, without it.
    #[serde(default)]
    pub sequence: Option<String>,
}

/// What has left host memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct EvictReport {
    /// Pages that are on disk alone now; none without `spill`.
    pub pages: u64,
    /// Bytes of these pages.
    pub page_bytes: u64,
    /// Bytes of extents in which nothing was, which sessions gave back to the arena.
    pub extent_bytes: u64,
    /// Whether more would have left, had there been more time.
    pub unfinished: bool,
}

/// The device that attention runs on.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct DevicesReport {
    /// One, for now.
    pub devices: Vec<DeviceState>,
}

/// A device.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct DeviceState {
    /// `host` or `cuda:N`.
    pub name: String,
    /// `slab`, `in-place` or `device`.
    pub mode: String,
    /// Bytes of slabs in use.
    pub slab_bytes: u64,
    /// Bytes copied there since the start.
    pub bytes_moved: u64,
    /// What a GPU holds.
    pub gpu: Option<DeviceReport>,
}

/// Where pages and images are.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct TiersReport {
    /// Host memory.
    pub arena: ArenaReport,
    /// Places on disk.
    pub spill: Vec<nvme::DeviceReport>,
    /// The store of images.
    pub store: Option<StoreReport>,
}

/// All lanes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct LanesReport {
    /// By their numbers.
    pub lanes: Vec<LaneReport>,
}

/// A lane.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct LaneReport {
    /// Its number.
    pub lane: usize,
    /// The core that it is pinned to.
    pub cpu: Option<usize>,
    /// Rounds that it has made: a lane that moves makes ten a second at least.
    pub rounds: u64,
    /// Sessions that it serves.
    pub sessions: Vec<u64>,
    /// Requests that they have had answered.
    pub speculations: u64,
}

/// Methods.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct MethodsReport {
    /// All that sessions may name.
    pub methods: Vec<KnownMethod>,
    /// What those keep that open sessions use, with their options.
    pub used: Vec<MethodReport>,
}

/// A method.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct KnownMethod {
    /// Its name.
    pub name: String,
    /// What it does, in a few words.
    pub about: String,
}
