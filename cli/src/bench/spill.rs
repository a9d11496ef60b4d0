//! `kvoyant bench spill`: how fast pages come back from disk and go there, beside fio in the same folder, in turns.
//!
//! | room | job |
//! |---|---|
//! | [`ours`] | the spill tier, driven as a lane drives it |
//! | [`fio`] | fio, with io_uring, direct I/O, a fixed file and fixed buffers |
//!
//! Both have a file of the same size, the same size of pages and the same depth; each round runs one after the other, and
//! medians over rounds are compared.

mod fio;
mod ours;

use std::fmt::Write as _;
use std::path::PathBuf;
use std::time::Duration;

use kvoyant_daemon::tiers::nvme::{DeviceReport, PageError, SpillError, SpillFull};
use kvoyant_kernels::Path as KernelPath;
use kvoyant_protocol::memory::MemoryError;
use serde::Serialize;

use self::fio::FioError;
use self::ours::{Ours, Predicted};
use crate::args::SpillArgs;
use crate::cleanup::Scratch;
use crate::machine::Machine;
use crate::progress::Progress;

/// What the tier is to reach.
const GOAL_READS: f64 = 0.95;
const GOAL_READ_CPU: f64 = 1.3;
const GOAL_WRITES: f64 = 0.90;
const GOAL_IN_TIME: f64 = 0.99;
const GOAL_LANE_NS: f64 = 2000.0;

/// Predicted reads take this share of what random reads have just had, which they are to have while it lasts.
const LOAD: f64 = 0.8;

/// Why there is no result.
#[derive(Debug, thiserror::Error)]
pub(crate) enum SpillBenchError {
    /// No folder.
    #[error("a folder cannot be made in {}: {error}; name another one with --path", .path.display())]
    Folder {
        /// Where.
        path: PathBuf,
        /// Why not.
        error: std::io::Error,
    },
    /// Pages that the tier does not take, or no area's worth of them.
    #[error("{bytes} bytes in pages of {page} bytes cannot be measured: {why}")]
    Sizes {
        /// Bytes of the area.
        bytes: u64,
        /// Bytes of a page.
        page: u64,
        /// Why not.
        why: &'static str,
    },
    /// No tier.
    #[error(transparent)]
    Spill(#[from] SpillError),
    /// No slots.
    #[error(transparent)]
    Full(#[from] SpillFull),
    /// A page was not moved.
    #[error("the spill tier failed: {0}")]
    Page(#[from] PageError),
    /// No frames.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// The system does not say what time we take.
    #[error("the processor time of this process cannot be read: {0}")]
    Usage(#[from] nix::Error),
    /// fio failed.
    #[error(transparent)]
    Fio(#[from] FioError),
    /// The result cannot be written.
    #[error("the result is no JSON: {0}")]
    Json(#[from] serde_json::Error),
}

/// Pages that were moved, in how long, at what cost.
#[derive(Clone, Copy, Debug, Default, Serialize)]
struct Moved {
    pages_per_second: f64,
    gib_per_second: f64,
    /// Processor time of a page, of all threads, in user and in kernel.
    cpu_us_per_page: f64,
}

impl Moved {
    fn new(pages: u64, page_bytes: u64, took: Duration, cpu: Duration) -> Self {
        let seconds = took.as_secs_f64().max(1e-9);
        Self {
            pages_per_second: pages as f64 / seconds,
            gib_per_second: (pages * page_bytes) as f64 / seconds / f64::from(1 << 30),
            cpu_us_per_page: cpu.as_secs_f64() * 1e6 / (pages.max(1)) as f64,
        }
    }
}

/// What was measured in each round.
#[derive(Debug, Default, Serialize)]
struct Rounds {
    our_reads: Vec<Moved>,
    our_writes: Vec<Moved>,
    fio_reads: Vec<Moved>,
    fio_writes: Vec<Moved>,
    /// With checksums of what was read, as ours are.
    fio_checked_reads: Vec<Moved>,
    predicted: Vec<Predicted>,
    /// What a lane spends on a page.
    lane_ns: Vec<f64>,
}

/// A line of the table.
#[derive(Debug, Serialize)]
struct Row {
    what: &'static str,
    unit: &'static str,
    ours: f64,
    fio: Option<f64>,
    /// Ours as a share of fio's.
    ratio: Option<f64>,
    goal: Option<String>,
    /// Whether the goal is reached, if there is one and it could be measured.
    reached: Option<bool>,
}

#[derive(Debug, Serialize)]
struct Report<'a> {
    machine: Machine,
    bytes: u64,
    page_bytes: u64,
    depth: u32,
    seconds: u64,
    rows: &'a [Row],
    rounds: &'a Rounds,
    device: &'a DeviceReport,
}

/// Runs the comparison; what belongs on stdout.
///
/// # Errors
/// If anything is missing or fails. That there is no fio is no error.
pub(crate) fn spill(args: &SpillArgs) -> Result<String, SpillBenchError> {
    let (bytes, page) = (args.bytes.as_u64(), args.page.as_u64());
    let progress = Progress::new();
    let with_fio = fio::is_there();
    if !with_fio {
        progress.note("fio is not installed, so the tier is measured alone; to compare: apt-get install fio, or dnf install fio");
    }
    let folder = Scratch::new(&args.path, "kvoyant-bench-spill-")
        .map_err(|error| SpillBenchError::Folder { path: args.path.clone(), error })?;
    let mut ours = Ours::start(folder.path(), bytes, page, args.depth)?;
    let fio = fio::Fio {
        file: folder.path().join("fio"),
        bytes: ours.bytes(),
        page_bytes: page,
        depth: args.depth,
        seconds: args.seconds,
    };
    let checked = fio::Fio { file: folder.path().join("fio-checked"), ..fio.clone() };
    if with_fio {
        checked.write_checked()?;
    }
    let time = Duration::from_secs(args.seconds);
    let mut rounds = Rounds::default();
    for round in 0..args.rounds {
        progress.note(&format!("round {} of {}", round + 1, args.rounds));
        if with_fio {
            rounds.fio_writes.push(fio.run("write")?);
        }
        rounds.our_writes.push(ours.write(time)?);
        if with_fio {
            rounds.fio_reads.push(fio.run("randread")?);
            rounds.fio_checked_reads.push(checked.read_checked()?);
        }
        rounds.our_reads.push(ours.read(time)?);
        rounds.predicted.push(ours.predicted(time, LOAD)?);
        rounds.lane_ns.push(ours.lane_cost()?);
    }
    let rows = rows(&rounds);
    let device = ours.report();
    if args.json {
        let machine = Machine::this(&KernelPath::best().to_string(), &format!("spill, {}", device.engine));
        let report = Report {
            machine,
            bytes: ours.bytes(),
            page_bytes: page,
            depth: args.depth,
            seconds: args.seconds,
            rows: &rows,
            rounds: &rounds,
            device: &device,
        };
        return Ok(serde_json::to_string_pretty(&report)? + "\n");
    }
    Ok(render(&rows, &device, args))
}

fn median<T>(rounds: &[T], value: impl Fn(&T) -> f64) -> f64 {
    // A round in which nothing could be measured is none.
    let mut values: Vec<f64> = rounds.iter().map(value).filter(|value| !value.is_nan()).collect();
    values.sort_by(f64::total_cmp);
    match values.len() {
        0 => f64::NAN,
        n if n.is_multiple_of(2) => f64::midpoint(values[n / 2 - 1], values[n / 2]),
        n => values[n / 2],
    }
}

/// A value of one direction.
type Of = fn(&Moved) -> f64;

fn rows(rounds: &Rounds) -> Vec<Row> {
    let both = |what, unit, ours: &[Moved], fio: &[Moved], of: Of| {
        let (ours, fio) = (median(ours, of), (!fio.is_empty()).then(|| median(fio, of)));
        let ratio = fio.map(|fio| ours / fio);
        Row { what, unit, ours, fio, ratio, goal: None, reached: None }
    };
    let at_least = |row: Row, goal: f64| {
        let reached = row.ratio.map(|ratio| ratio >= goal);
        Row { goal: Some(format!("≥ {goal:.2} of fio")), reached, ..row }
    };
    let (reads, writes) = (&rounds.our_reads, &rounds.our_writes);
    let (fio_reads, fio_writes) = (&rounds.fio_reads, &rounds.fio_writes);
    let fio_checked = &rounds.fio_checked_reads;
    let cpu = both("random reads, processor", "µs a page", reads, fio_reads, |moved| moved.cpu_us_per_page);
    let cpu_reached = cpu.ratio.map(|ratio| ratio <= GOAL_READ_CPU);
    let alone = |what, unit, ours, goal: String, reached| Row {
        what,
        unit,
        ours,
        fio: None,
        ratio: None,
        goal: Some(goal),
        reached,
    };
    let in_time = median(&rounds.predicted, Predicted::held_in_time);
    let in_time_of_all = median(&rounds.predicted, Predicted::in_time);
    let lane = median(&rounds.lane_ns, |ns| *ns);
    vec![
        at_least(both("random reads", "IOPS", reads, fio_reads, |moved| moved.pages_per_second), GOAL_READS),
        both("random reads", "GiB/s", reads, fio_reads, |moved| moved.gib_per_second),
        Row { goal: Some(format!("≤ {GOAL_READ_CPU:.2} of fio")), reached: cpu_reached, ..cpu },
        both("… beside fio with crc32c", "IOPS", reads, fio_checked, |moved| moved.pages_per_second),
        both("… beside fio with crc32c", "µs a page", reads, fio_checked, |moved| moved.cpu_us_per_page),
        at_least(
            both("spill writes", "GiB/s", writes, fio_writes, |moved| moved.gib_per_second),
            GOAL_WRITES,
        ),
        both("spill writes, processor", "µs a page", writes, fio_writes, |moved| moved.cpu_us_per_page),
        alone(
            "predicted reads in time, at 80 % load",
            "%",
            in_time * 100.0,
            format!("≥ {:.0} %", GOAL_IN_TIME * 100.0),
            (!in_time.is_nan()).then_some(in_time >= GOAL_IN_TIME),
        ),
        Row {
            what: "… and while the disk got slower",
            unit: "%",
            ours: in_time_of_all * 100.0,
            fio: None,
            ratio: None,
            goal: None,
            reached: None,
        },
        alone("lane", "ns a page", lane, format!("< {GOAL_LANE_NS:.0} ns"), Some(lane < GOAL_LANE_NS)),
    ]
}

fn number(value: f64) -> String {
    match value {
        value if value >= 1000.0 => format!("{value:.0}"),
        value if value >= 100.0 => format!("{value:.1}"),
        value => format!("{value:.2}"),
    }
}

fn render(rows: &[Row], device: &DeviceReport, args: &SpillArgs) -> String {
    let mut out = format!(
        "{} in pages of {}, depth {}, {}{}, medians of {} rounds of {} s\n\n",
        args.bytes.display().iec(),
        args.page.display().iec(),
        args.depth,
        device.engine,
        if device.direct { " around the page cache" } else { " through the page cache" },
        args.rounds,
        args.seconds
    );
    let dash = || "–".to_owned();
    let mut line = |cells: [&str; 6]| {
        let [what, unit, ours, fio, ratio, goal] = cells;
        let text = format!("{what:<38} {unit:<10} {ours:>9} {fio:>9} {ratio:>6}  {goal}");
        let _ = writeln!(out, "{}", text.trim_end());
    };
    line(["", "", "ours", "fio", "ratio", "goal"]);
    for row in rows {
        let goal = match (&row.goal, row.reached) {
            (None, _) => String::new(),
            (Some(goal), None) => goal.clone(),
            (Some(goal), Some(true)) => format!("{goal}: reached"),
            (Some(goal), Some(false)) => format!("{goal}: missed"),
        };
        let fio = row.fio.map_or_else(dash, number);
        let ratio = row.ratio.map_or_else(dash, |ratio| format!("{ratio:.2}"));
        line([row.what, row.unit, &number(row.ours), &fio, &ratio, &goal]);
    }
    out
}

#[cfg(test)]
mod tests {
    use super::ours::Step;
    use super::*;

    #[test]
    fn a_goal_is_reached_by_medians_and_not_judged_without_fio() {
        let moved = |pages: u64, cpu_us: u64| {
            Moved::new(pages, 16 << 10, Duration::from_secs(1), Duration::from_micros(cpu_us * pages))
        };
        let mut predicted = Predicted::default();
        predicted.add(&Step { pages: 1000, late: 5 }, true);
        predicted.add(&Step { pages: 1000, late: 500 }, false);
        assert_eq!((predicted.held_in_time(), predicted.in_time()), (0.995, 1.0 - 0.2525));
        let mut rounds = Rounds {
            our_reads: vec![moved(960, 3), moved(10, 3), moved(2000, 3)],
            our_writes: vec![moved(80, 1)],
            fio_reads: vec![moved(1000, 2)],
            fio_writes: vec![moved(100, 1)],
            fio_checked_reads: vec![moved(900, 3)],
            predicted: vec![predicted],
            lane_ns: vec![2500.0],
        };
        let reached = |rounds: &Rounds| rows(rounds).iter().filter_map(|row| row.reached).collect::<Vec<_>>();
        assert_eq!(reached(&rounds), [true, false, false, true, false]);
        (rounds.fio_reads, rounds.fio_writes, rounds.fio_checked_reads) = Default::default();
        assert_eq!(reached(&rounds), [true, false], "only what needs no fio");
        assert_eq!(rows(&rounds)[0].ours, 960.0);
    }

    #[test]
    fn a_page_of_16_kib_a_second_is_a_65536th_of_a_gib() {
        let moved = Moved::new(65536, 16 << 10, Duration::from_secs(2), Duration::from_secs(1));
        assert_eq!(moved.gib_per_second, 0.5);
        assert!((moved.cpu_us_per_page - 15.26).abs() < 0.01);
    }
}
