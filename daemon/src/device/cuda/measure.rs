//! Measures the link and every engine over a grid of shapes, in bounded time.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use kvoyant_cuda::{Context, Module};

use super::cost::{EngineCosts, Point, Row, Table, rounded};
use super::engines::EngineKind;
use super::rig::{Rig, RigError, RigSizes, Stretch};

/// Run lengths of the grid: a short row, the rows and pages of usual models, and what coalescing makes of them.
const RUN_BYTES: [u64; 8] = [256, 512, 1 << 10, 4 << 10, 16 << 10, 64 << 10, 256 << 10, 1 << 20];

/// Numbers of runs of the grid.
const RUNS: [u64; 7] = [1, 4, 16, 64, 256, 1024, 4096];

/// No request of the grid is larger.
const REQUEST_BYTES_MAX: u64 = 64 << 20;

/// Sources lie scattered over this much memory, of which no processor keeps enough in its caches.
const SOURCE_BYTES: usize = 256 << 20;

/// When a request took this long, more runs of that length are not tried: their cost goes on at the same rate.
const LONG: Duration = Duration::from_millis(20);

/// Ranges of destinations, and bytes of each, that show what a range costs `staged`.
const FRAGMENTS: (u64, u64) = (512, 4 << 10);

/// From one source to the next, in runs.
const STEP: u64 = 0x9e37_79b1;

/// The least time beyond a launch that is believed, in microseconds: clocks do not resolve less.
const LEAST_US: f64 = 0.01;

/// How thoroughly to measure.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Effort {
    /// Measurements of each shape, at most; of which the median counts.
    pub samples: usize,
    /// Every how manieth run length and number of runs is measured.
    pub stride: usize,
    /// Time for all of the grid. When it is used up, what is left is measured once each.
    pub budget: Duration,
}

impl Effort {
    /// What `kvoyant calibrate` does.
    #[must_use]
    pub const fn full() -> Self {
        Self { samples: 9, stride: 1, budget: Duration::from_secs(6) }
    }

    /// A quarter of the shapes, in about a second.
    #[must_use]
    pub const fn quick() -> Self {
        Self { samples: 3, stride: 2, budget: Duration::from_millis(800) }
    }
}

/// Measures the link, and the engines that there are: `zerocopy` if the module of the source `gather` is given. Nothing else
/// should run on the device meanwhile.
///
/// # Errors
/// If a call of the driver fails, or memory cannot be had: 256 MiB on the host, half as much on the device.
pub fn measure(context: &Context, gather: Option<&Module>, effort: &Effort) -> Result<Table, RigError> {
    let mut bench = Bench::new(context, gather)?;
    let (h2d_gbps, d2h_gbps) = bench.peak(context, effort)?;
    let kinds: Vec<_> = EngineKind::ALL.into_iter().filter(|&kind| bench.rig.engines().has(kind)).collect();
    let started = Instant::now();
    let mut engines = Vec::new();
    for (at, &kind) in kinds.iter().enumerate() {
        let until = started + effort.budget * (at as u32 + 1) / kinds.len() as u32;
        engines.push(bench.engine(kind, effort, until)?);
    }
    Ok(Table { h2d_gbps, d2h_gbps, engines })
}

struct Bench {
    rig: Rig,
    request: Vec<Stretch>,
    /// Counts runs, so that each request has other sources than the one before.
    turn: u64,
}

impl Bench {
    fn new(context: &Context, gather: Option<&Module>) -> Result<Self, RigError> {
        let sizes = RigSizes {
            source_bytes: SOURCE_BYTES,
            destination_bytes: 2 * REQUEST_BYTES_MAX as usize,
            registrations: 1,
        };
        let rig = Rig::new(context, gather, Table::estimate(), sizes)?;
        Ok(Self { rig, request: Vec::new(), turn: 0 })
    }

    /// Bandwidths of the fastest large copy of pinned memory to the device and back, in 10⁹ bytes a second.
    fn peak(&self, context: &Context, effort: &Effort) -> Result<(f64, f64), RigError> {
        let pinned = context.pinned(REQUEST_BYTES_MAX as usize)?;
        let gbps = |to_device| -> Result<f64, RigError> {
            let until = Instant::now() + effort.budget / 4;
            self.rig.time_pinned(&pinned, to_device)?;
            let mut times = vec![self.rig.time_pinned(&pinned, to_device)?];
            while times.len() < effort.samples && Instant::now() < until {
                times.push(self.rig.time_pinned(&pinned, to_device)?);
            }
            let least = times.into_iter().fold(f64::INFINITY, f64::min).max(LEAST_US);
            Ok(rounded(REQUEST_BYTES_MAX as f64 / least / 1e3))
        };
        Ok((gbps(true)?, gbps(false)?))
    }

    /// Measures one engine, in full until the time is up, and from then on with one sample each.
    fn engine(&mut self, kind: EngineKind, effort: &Effort, until: Instant) -> Result<EngineCosts, RigError> {
        let all = || Instant::now() + effort.budget;
        let launch_us = self.sample(kind, (1, RUN_BYTES[0], RUN_BYTES[0]), effort, all())?;
        let (count, bytes) = FRAGMENTS;
        let range_us = if kind == EngineKind::Staged {
            let whole = self.sample(kind, (count, bytes, bytes), effort, all())?;
            let fragmented = self.sample(kind, (count, bytes, 2 * bytes), effort, all())?;
            rounded((fragmented - whole) / (count - 1) as f64)
        } else {
            0.0
        };
        let lengths: Vec<_> = thinned(&RUN_BYTES, effort.stride).collect();
        let mut rows = Vec::new();
        for (at, &run_bytes) in lengths.iter().enumerate() {
            let left = until.saturating_duration_since(Instant::now());
            let row_until = Instant::now() + left / (lengths.len() - at) as u32;
            let mut points = Vec::new();
            for runs in thinned(&RUNS, effort.stride).take_while(|runs| runs * run_bytes <= REQUEST_BYTES_MAX)
            {
                let us = self.sample(kind, (runs, run_bytes, run_bytes), effort, row_until)?;
                points.push(Point { runs, us: rounded(us - launch_us) });
                if us > LONG.as_secs_f64() * 1e6 {
                    break;
                }
            }
            rows.push(Row { run_bytes, points });
        }
        smooth(&mut rows);
        Ok(EngineCosts { engine: kind, launch_us, range_us, rows })
    }

    /// The median of several requests of `(runs, run_bytes, bytes from one destination to the next)`, in microseconds.
    fn sample(
        &mut self,
        kind: EngineKind,
        shape: (u64, u64, u64),
        effort: &Effort,
        until: Instant,
    ) -> Result<f64, RigError> {
        let mut times = vec![self.request(kind, shape)?];
        while times.len() <= effort.samples && Instant::now() < until {
            times.push(self.request(kind, shape)?);
        }
        if times.len() > 1 {
            // The first one found caches and tables cold.
            times.remove(0);
        }
        Ok(median(&mut times))
    }

    /// The microseconds of one request.
    fn request(
        &mut self,
        kind: EngineKind,
        (runs, run_bytes, apart): (u64, u64, u64),
    ) -> Result<f64, RigError> {
        // A power of two: any odd number is a step that visits all of them, and this one goes to no neighbour.
        let places = SOURCE_BYTES as u64 / run_bytes;
        self.request.clear();
        self.request.extend((0..runs).map(|run| Stretch {
            source: ((run + self.turn).wrapping_mul(STEP) % places * run_bytes) as usize,
            destination: (run * apart) as usize,
            bytes: run_bytes as usize,
        }));
        self.turn += runs;
        Ok(rounded(self.rig.time(kind, &self.request)?))
    }
}

/// Every `stride`th value from the first, and the last.
fn thinned(values: &[u64], stride: usize) -> impl Iterator<Item = u64> {
    let last = values.len() - 1;
    values.iter().enumerate().filter(move |(at, _)| at % stride == 0 || *at == last).map(|(_, &value)| value)
}

fn median(times: &mut [f64]) -> f64 {
    times.sort_unstable_by(f64::total_cmp);
    times[times.len() / 2]
}

/// Takes out what only noise explains: that more runs, or longer ones, take less time.
fn smooth(rows: &mut [Row]) {
    let mut shorter = BTreeMap::new();
    for row in rows {
        let mut fewer = LEAST_US;
        for point in &mut row.points {
            let least = shorter.entry(point.runs).or_insert(LEAST_US);
            point.us = point.us.max(fewer).max(*least);
            fewer = point.us;
            *least = point.us;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn more_or_longer_runs_never_take_less_time() {
        let row = |run_bytes, times: &[f64]| Row {
            run_bytes,
            points: RUNS.iter().zip(times).map(|(&runs, &us)| Point { runs, us }).collect(),
        };
        let mut rows = vec![row(256, &[-1.0, 2.0, 1.0]), row(512, &[0.5, 1.0, 4.0, 3.0])];
        smooth(&mut rows);
        assert_eq!(rows, [row(256, &[LEAST_US, 2.0, 2.0]), row(512, &[0.5, 2.0, 4.0, 4.0])]);
    }

    #[test]
    fn a_quick_grid_still_has_both_ends() {
        assert_eq!(thinned(&RUNS, 1).collect::<Vec<_>>(), RUNS);
        assert_eq!(thinned(&RUNS, 2).collect::<Vec<_>>(), [1, 16, 256, 4096]);
        assert_eq!(thinned(&RUN_BYTES, 2).collect::<Vec<_>>(), [256, 1 << 10, 16 << 10, 256 << 10, 1 << 20]);
    }

    #[test]
    fn sources_of_a_request_are_scattered_and_distinct() {
        for run_bytes in RUN_BYTES {
            let places = SOURCE_BYTES as u64 / run_bytes;
            assert!(places.is_power_of_two() && places * run_bytes == SOURCE_BYTES as u64);
            let step = STEP % places;
            assert!(step % 2 == 1 && step > 1 && step < places - 1, "{run_bytes}");
            assert!(REQUEST_BYTES_MAX <= SOURCE_BYTES as u64);
        }
    }
}
