//! `kvoyant calibrate`: what transfers to a GPU cost on each engine, measured, shown and kept for the daemon.

use std::fmt::Write;
use std::path::Path;

use kvoyant_daemon::device::DeviceName;
use kvoyant_daemon::device::cuda::calibrate::{CalibrateError, calibrate};
use kvoyant_daemon::device::cuda::cost::Table;
use kvoyant_daemon::device::cuda::engines::{EngineKind, Shape};
use kvoyant_daemon::device::cuda::measure::Effort;
use kvoyant_daemon::device::cuda::store::{Calibration, StoreError, default_folder};

use crate::args::CalibrateArgs;

/// Runs of the table's small requests: what one layer misses.
const SMALL_RUNS: u64 = 64;

/// Bytes of its large ones,
const LARGE_BYTES: u64 = 4 << 20;

/// and the most runs of those.
const LARGE_RUNS: u64 = 4096;

/// Why nothing was calibrated.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    /// There is nothing to measure.
    #[error("--device host: copies in host memory need no calibration; name a GPU, as in cuda:0")]
    Host,
    /// No GPU, or it could not be measured.
    #[error(transparent)]
    Calibrate(#[from] CalibrateError),
    /// The result cannot be kept.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The result cannot be printed.
    #[error("the calibration cannot be written as JSON: {0}")]
    Json(#[from] serde_json::Error),
}

/// Calibrates, stores the result, and returns it as text or JSON.
///
/// # Errors
/// If there is no such GPU, it cannot be measured, or the result not be kept.
pub(crate) fn text(args: &CalibrateArgs) -> Result<String, Error> {
    let DeviceName::Cuda(ordinal) = args.device else { return Err(Error::Host) };
    let folder = args.state.clone().unwrap_or_else(default_folder);
    let effort = if args.quick { Effort::quick() } else { Effort::full() };
    let found = calibrate(ordinal, &folder, &effort)?;
    if let Some(error) = &found.without_kernel {
        crate::say::say(format_args!("warning: zerocopy was not measured: {error}"));
    }
    let path = found.calibration.save(&folder)?;
    if args.json {
        let json = serde_json::json!({ "path": path, "calibration": found.calibration });
        return Ok(serde_json::to_string_pretty(&json)? + "\n");
    }
    Ok(words(&found.calibration, &path))
}

/// The calibration for people.
fn words(calibration: &Calibration, path: &Path) -> String {
    let (of, costs) = (&calibration.of, &calibration.costs);
    let mut out = String::new();
    let _ = writeln!(
        out,
        "{} ({}), driver {}.{}\nlink {:.1} GB/s to the device, {:.1} GB/s from it\n",
        of.device,
        of.uuid,
        of.driver / 1000,
        of.driver % 1000 / 10,
        costs.h2d_gbps,
        costs.d2h_gbps
    );
    let title = |text: String| format!("{text:<48}");
    let small = title(format!("  requests of {SMALL_RUNS} runs"));
    let large = title(format!("  requests of {}, at most {LARGE_RUNS} runs", bytes(LARGE_BYTES)));
    let _ = writeln!(out, "{:>8}{}", "", format!("{small}{large}").trim_end());
    let names: String =
        [EngineKind::ALL, EngineKind::ALL].concat().iter().map(|kind| format!("{kind:>16}")).collect();
    let _ = writeln!(out, "{:>8}{names}", "run");
    for run_bytes in costs.of(EngineKind::Dma).into_iter().flat_map(|dma| &dma.rows).map(|row| row.run_bytes)
    {
        let large = (LARGE_BYTES / run_bytes).clamp(1, LARGE_RUNS);
        let cells: String = [SMALL_RUNS, large].map(|runs| cells(costs, runs, run_bytes)).concat();
        let _ = writeln!(out, "{:>8}{}", bytes(run_bytes), cells.trim_end());
    }
    let range_us = costs.of(EngineKind::Staged).map_or(0.0, |staged| staged.range_us);
    let _ = writeln!(
        out,
        "\nGB/s and share of the link; * the engine that such a request goes to. Destinations are adjacent; each gap\n\
         between them costs staged {range_us:.2} µs more.\nKept in {}.",
        path.display()
    );
    out
}

/// One request on every engine.
fn cells(costs: &Table, runs: u64, run_bytes: u64) -> String {
    let bytes = runs * run_bytes;
    let shape = Shape { runs: runs as usize, bytes, ranges: 1, registered: true };
    let us = EngineKind::ALL.map(|kind| costs.us(kind, &shape));
    let least = us.into_iter().fold(f64::INFINITY, f64::min);
    let cell = |us: f64| {
        if us.is_infinite() {
            return format!("{:>16}", "–");
        }
        let gbps = bytes as f64 / us / 1e3;
        let winner = if us <= least { "*" } else { " " };
        format!("{gbps:>8.2} {:>4.0} %{winner}", 100.0 * gbps / costs.h2d_gbps)
    };
    us.map(cell).concat()
}

/// A power of two for people.
fn bytes(bytes: u64) -> String {
    match bytes {
        bytes if bytes >= 1 << 20 => format!("{} MiB", bytes >> 20),
        bytes if bytes >= 1 << 10 => format!("{} KiB", bytes >> 10),
        bytes => format!("{bytes} B"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use kvoyant_daemon::device::cuda::store::Identity;

    #[test]
    fn the_table_has_a_line_per_run_length_and_marks_a_winner_in_each_half() {
        let of = Identity { device: "Test Card".into(), uuid: "GPU-01".into(), driver: 12_080 };
        let text = words(&Calibration::now(of, false, Table::estimate()), Path::new("/state/file.json"));
        assert!(text.starts_with("Test Card (GPU-01), driver 12.8\nlink 25.0 GB/s to the device"), "{text}");
        let lines: Vec<_> = text.lines().filter(|line| line.contains('%')).collect();
        assert_eq!(lines.len(), Table::estimate().of(EngineKind::Dma).unwrap().rows.len(), "{text}");
        for line in lines {
            let halves = line.split_at(8 + 3 * 16);
            assert!(halves.0.contains('*') && halves.1.contains('*'), "{text}");
            let width = line.chars().count() + usize::from(!line.ends_with('*'));
            assert_eq!(width, 8 + 6 * 16, "{text}");
        }
        assert!(text.contains("/state/file.json"));
    }

    #[test]
    fn an_engine_that_was_not_measured_is_a_dash_and_never_wins() {
        let mut costs = Table::estimate();
        costs.engines.retain(|engine| engine.engine != EngineKind::Zerocopy);
        let line = cells(&costs, 64, 512);
        assert!(line.ends_with('–') && line.matches('*').count() == 1, "{line}");
    }
}
