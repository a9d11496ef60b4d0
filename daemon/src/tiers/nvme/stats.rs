//! Counters of a device, and what operators see of them.

use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Upper ends of the read latency's buckets, in microseconds; a last bucket has what took longer.
pub const LATENCY_BUCKETS_US: [u64; 15] =
    [25, 50, 75, 100, 150, 250, 500, 1_000, 2_000, 5_000, 10_000, 25_000, 50_000, 100_000, 1_000_000];

/// What a device has done since the start.
#[derive(Debug, Default)]
pub(super) struct Counters {
    pub(super) reads: AtomicU64,
    pub(super) writes: AtomicU64,
    pub(super) read_operations: AtomicU64,
    pub(super) write_operations: AtomicU64,
    pub(super) read_bytes: AtomicU64,
    pub(super) written_bytes: AtomicU64,
    pub(super) late_reads: AtomicU64,
    pub(super) read_failures: AtomicU64,
    pub(super) write_failures: AtomicU64,
    latency: [AtomicU64; LATENCY_BUCKETS_US.len() + 1],
}

/// Adds to a counter that one thread only writes: no locked instruction.
pub(super) fn add(counter: &AtomicU64, more: u64) {
    counter.store(counter.load(Ordering::Relaxed) + more, Ordering::Relaxed);
}

impl Counters {
    /// A read took so long, from its submission to its report.
    pub(super) fn read_took(&self, ns: u64) {
        let us = ns.div_ceil(1000);
        let bucket = LATENCY_BUCKETS_US.partition_point(|end| *end < us);
        add(&self.latency[bucket], 1);
    }

    /// Reads by latency, as [`LATENCY_BUCKETS_US`] has them.
    pub(super) fn latency(&self) -> Vec<u64> {
        self.latency.iter().map(|bucket| bucket.load(Ordering::Relaxed)).collect()
    }
}

/// Whether a device takes pages.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
#[schemars(rename = "SpillState")]
pub enum DeviceState {
    /// It does.
    Serving,
    /// It takes no more writes; what it holds can be read, as far as that goes.
    Failed(String),
}

/// What to say of one device of the spill tier.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[schemars(rename = "SpillReport")]
pub struct DeviceReport {
    /// The file or block device.
    pub path: PathBuf,
    /// How it is driven: `io_uring` or `psync`.
    pub engine: String,
    /// Whether it goes around the page cache.
    pub direct: bool,
    /// Bytes for pages.
    pub total_bytes: u64,
    /// Bytes in chunks that sessions have, or that are being erased.
    pub used_bytes: u64,
    /// Pages read.
    pub reads: u64,
    /// Pages written.
    pub writes: u64,
    /// Reads of the device; adjacent pages go in one.
    pub read_operations: u64,
    /// Writes of the device.
    pub write_operations: u64,
    /// Bytes of the pages read.
    pub read_bytes: u64,
    /// Bytes of the pages written.
    pub written_bytes: u64,
    /// Pages that came after their deadline.
    pub late_reads: u64,
    /// Pages that could not be read.
    pub read_failures: u64,
    /// Pages that could not be written.
    pub write_failures: u64,
    /// Reads by latency, from submission to report: a count for each of [`LATENCY_BUCKETS_US`], and one beyond.
    pub read_latency: Vec<u64>,
    /// Mappings that are registered as fixed buffers.
    pub registered: u64,
    /// How it is.
    pub state: DeviceState,
}

/// How long a share of the reads took at most, as far as buckets tell.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Latency {
    /// So many microseconds.
    Within(u64),
    /// More than so many.
    Beyond(u64),
}

impl DeviceReport {
    /// How long the quickest `percent` percent of all reads took; `None` before the first one.
    #[must_use]
    pub fn latency_at(&self, percent: u64) -> Option<Latency> {
        let all: u64 = self.read_latency.iter().sum();
        let wanted = (all * percent).div_ceil(100).max(1);
        let mut reads = 0;
        let bucket = self.read_latency.iter().position(|count| {
            reads += count;
            reads >= wanted
        })?;
        let last = LATENCY_BUCKETS_US[LATENCY_BUCKETS_US.len() - 1];
        Some(LATENCY_BUCKETS_US.get(bucket).map_or(Latency::Beyond(last), |end| Latency::Within(*end)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_latency_falls_into_the_first_bucket_that_it_does_not_exceed() {
        let counters = Counters::default();
        for ns in [0, 25_000, 25_001, 2_000_000_000] {
            counters.read_took(ns);
        }
        let latency = counters.latency();
        assert_eq!((latency[0], latency[1], latency[LATENCY_BUCKETS_US.len()]), (2, 1, 1));
    }

    #[test]
    fn a_percentile_is_the_end_of_the_bucket_that_it_falls_into() {
        let report = |read_latency: Vec<u64>| DeviceReport {
            path: "/spill".into(),
            engine: "psync".into(),
            direct: true,
            total_bytes: 0,
            used_bytes: 0,
            reads: 0,
            writes: 0,
            read_operations: 0,
            write_operations: 0,
            read_bytes: 0,
            written_bytes: 0,
            late_reads: 0,
            read_failures: 0,
            write_failures: 0,
            read_latency,
            registered: 0,
            state: DeviceState::Failed("it was unplugged".into()),
        };
        assert_eq!(report(vec![0; LATENCY_BUCKETS_US.len() + 1]).latency_at(50), None);
        assert_eq!(report(Vec::new()).latency_at(50), None);
        let mut counts = vec![0; LATENCY_BUCKETS_US.len() + 1];
        (counts[1], counts[4], counts[LATENCY_BUCKETS_US.len()]) = (50, 48, 2);
        let report = report(counts);
        assert_eq!(report.latency_at(50), Some(Latency::Within(50)));
        assert_eq!(report.latency_at(51), Some(Latency::Within(150)));
        assert_eq!(report.latency_at(99), Some(Latency::Beyond(1_000_000)));
        let text = serde_json::to_string(&report).unwrap();
        assert_eq!(serde_json::from_str::<DeviceReport>(&text).unwrap(), report);
    }
}
