//! What limits the daemon at this moment, and the knob to turn.

use kvoyant_daemon::status::StatusReport;
use kvoyant_daemon::tiers::nvme::DeviceState;
use serde::Serialize;

use super::rates::Rates;

/// What limits.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum What {
    /// Something has failed.
    Failure,
    /// Host memory.
    Memory,
    /// A disk.
    Disk,
    /// Selection, on the lanes.
    Cpu,
    /// Copies to the device.
    Link,
    /// Nothing that the daemon knows of.
    Nothing,
}

/// What limits, in words.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub(super) struct Limit {
    /// Which kind.
    pub(super) what: What,
    /// How that shows.
    pub(super) why: String,
    /// What to turn.
    pub(super) turn: String,
}

impl Limit {
    fn new(what: What, why: String, turn: &str) -> Self {
        Self { what, why, turn: turn.into() }
    }
}

/// Shares from which something is said to limit.
const FULL: f64 = 0.95;
const DISK_WAIT: f64 = 0.2;
const LANES_BUSY: f64 = 0.7;
const LINK_BUSY: f64 = 0.5;

/// What limits: failures before memory, memory before time, and of what takes time the largest.
pub(super) fn of(status: &StatusReport, rates: &Rates) -> Limit {
    if let Some(lost) = status.gpu.as_ref().and_then(|gpu| gpu.lost.as_ref()) {
        return Limit::new(
            What::Failure,
            format!("the device is lost: {lost}"),
            "look at `nvidia-smi`; the supervisor starts the daemon again",
        );
    }
    if let Some(failed) = status.spill.iter().find_map(|device| match &device.state {
        DeviceState::Failed(reason) => {
            Some(format!("{} takes no more pages: {reason}", device.path.display()))
        }
        DeviceState::Serving => None,
    }) {
        return Limit::new(What::Failure, failed, "replace the disk, or name another place in `spill`");
    }
    let share = |part: u64, whole: u64| part as f64 / whole.max(1) as f64;
    let arena = share(status.arena.used_bytes, status.arena.total_bytes);
    let disk_total = status.spill.iter().map(|device| device.total_bytes).sum::<u64>();
    let disk = share(status.spill.iter().map(|device| device.used_bytes).sum(), disk_total);
    if arena > FULL && status.spill.is_empty() {
        let why = format!("{:.0} % of the arena is taken, and pages have nowhere to go", arena * 100.0);
        return Limit::new(What::Memory, why, "raise `arena`, or set `spill`");
    }
    if arena > FULL && disk > FULL {
        let why =
            format!("{:.0} % of the arena and {:.0} % of the disk are taken", arena * 100.0, disk * 100.0);
        return Limit::new(What::Memory, why, "raise `spill_bytes`, or suspend sequences at rest");
    }
    let sessions = status.sessions.len().max(1) as f64;
    let (work, lanes) = (&rates.all, status.lanes.max(1) as f64);
    let candidates = [
        (
            work.page_wait_s / sessions / DISK_WAIT,
            Limit::new(
                What::Disk,
                format!(
                    "sessions wait {:.0} % of the time for pages from disk",
                    work.page_wait_s / sessions * 100.0
                ),
                "raise `host_percent`, lower budgets, or add a disk to `spill`",
            ),
        ),
        (
            work.select_s / lanes / LANES_BUSY,
            Limit::new(
                What::Cpu,
                format!("lanes select {:.0} % of the time", work.select_s / lanes * 100.0),
                "more `lanes`, or a method with a smaller digest",
            ),
        ),
        (
            work.transfer_s / sessions / LINK_BUSY,
            Limit::new(
                What::Link,
                format!(
                    "copies to the device are under way {:.0} % of the time",
                    work.transfer_s / sessions * 100.0
                ),
                "lower budgets, or raise `keep`, `slab` and `device_percent`",
            ),
        ),
    ];
    let most = candidates.into_iter().max_by(|a, b| a.0.total_cmp(&b.0));
    match most {
        Some((over, limit)) if over >= 1.0 => limit,
        _ => Limit::new(What::Nothing, "nothing that the daemon knows of".into(), "nothing"),
    }
}
