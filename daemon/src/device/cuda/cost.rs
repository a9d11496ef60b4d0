//! What a transfer costs on each engine: times that were measured on a grid of shapes, and between them interpolated.
//!
//! Which engine is the fastest depends on the card, its link, the driver and the processor, and changes with the length
//! and number of runs: nothing that could be written into a program. A [`Table`] comes from [`measure`](super::measure)
//! through [`store`](super::store); until then [`Table::estimate`] stands in.

use serde::{Deserialize, Serialize};
use thiserror::Error;

use super::engines::{EngineKind, Shape};

/// Times of one run length.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Row {
    /// Bytes of each run.
    pub run_bytes: u64,
    /// Times by number of runs, ascending, from one run on.
    pub points: Vec<Point>,
}

/// The time of one shape.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Point {
    /// How many runs.
    pub runs: u64,
    /// Microseconds beyond the engine's `launch_us`.
    pub us: f64,
}

/// What one engine costs.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct EngineCosts {
    /// Which engine.
    pub engine: EngineKind,
    /// What a request pays whatever its size, in microseconds.
    pub launch_us: f64,
    /// What each further range of adjacent destinations costs, in microseconds: `staged` makes one copy for each. Times
    /// of the grid are of requests with a single range.
    pub range_us: f64,
    /// Times by run length, ascending.
    pub rows: Vec<Row>,
}

impl EngineCosts {
    /// Microseconds from handing over a request until its last byte has arrived.
    #[must_use]
    pub fn us(&self, shape: &Shape) -> f64 {
        if shape.runs == 0 {
            return 0.0;
        }
        let runs = shape.runs as f64;
        let ranges = shape.ranges.saturating_sub(1) as f64;
        self.launch_us + self.range_us * ranges + self.body_us(runs, shape.bytes as f64 / runs)
    }

    /// Shorter runs than any that was measured cost as much as the shortest; longer ones count as several of the longest.
    fn body_us(&self, runs: f64, run_bytes: f64) -> f64 {
        let above = self.rows.partition_point(|row| (row.run_bytes as f64) < run_bytes);
        match (above.checked_sub(1).map(|below| &self.rows[below]), self.rows.get(above)) {
            (Some(below), Some(above)) => {
                let (x0, x1) = (below.run_bytes as f64, above.run_bytes as f64);
                between(run_bytes, (x0, row_us(below, runs)), (x1, row_us(above, runs)))
            }
            (Some(longest), None) => row_us(longest, runs * run_bytes / longest.run_bytes as f64),
            (None, Some(shortest)) => row_us(shortest, runs),
            (None, None) => f64::INFINITY,
        }
    }
}

/// More runs than were measured go on at the average rate of the most.
fn row_us(row: &Row, runs: f64) -> f64 {
    let above = row.points.partition_point(|point| (point.runs as f64) < runs);
    match (above.checked_sub(1).map(|below| row.points[below]), row.points.get(above)) {
        (Some(below), Some(above)) => {
            between(runs, (below.runs as f64, below.us), (above.runs as f64, above.us))
        }
        (Some(most), None) => most.us * runs / most.runs as f64,
        (None, Some(fewest)) => fewest.us,
        (None, None) => f64::INFINITY,
    }
}

/// The power law through two points, at `x`: a straight line on logarithmic axes, as the grid is.
fn between(x: f64, (x0, y0): (f64, f64), (x1, y1): (f64, f64)) -> f64 {
    let share = (x / x0).ln() / (x1 / x0).ln();
    (y0.ln() + share * (y1 / y0).ln()).exp()
}

/// Which engines can take a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Usable {
    /// Every source is registered with the driver, without which only `staged` can read it.
    pub registered: bool,
    /// The gather kernel could be built and may be used.
    pub kernel: bool,
}

impl Usable {
    /// Whether `engine` can take it.
    #[must_use]
    pub const fn has(self, engine: EngineKind) -> bool {
        match engine {
            EngineKind::Staged => true,
            EngineKind::Dma => self.registered,
            EngineKind::Zerocopy => self.registered && self.kernel,
        }
    }
}

/// Costs that contradict themselves.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum BadTable {
    /// An engine that needs nothing of its own is not in it.
    #[error("it has no costs of the engine {0}")]
    Missing(EngineKind),
    /// An engine is in it twice.
    #[error("it has the costs of the engine {0} twice")]
    Twice(EngineKind),
    /// A number that is no time, or no bandwidth.
    #[error("{what} of {of} is {value}")]
    Number {
        /// Of what.
        of: String,
        /// Which number.
        what: &'static str,
        /// The number, as text.
        value: String,
    },
    /// Rows or points that are not ascending, do not start with one run, or are none at all.
    #[error("the grid of the engine {0} is not in ascending order from one run on")]
    Grid(EngineKind),
}

/// The costs of every engine that was measured.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Table {
    /// The most that one large copy of pinned memory to the device moves, in 10⁹ bytes a second.
    pub h2d_gbps: f64,
    /// The same from the device.
    pub d2h_gbps: f64,
    /// One entry per engine; `zerocopy` may be missing.
    pub engines: Vec<EngineCosts>,
}

impl Table {
    /// What one engine costs, if it was measured.
    #[must_use]
    pub fn of(&self, engine: EngineKind) -> Option<&EngineCosts> {
        self.engines.iter().find(|costs| costs.engine == engine)
    }

    /// Microseconds that a request takes on an engine: infinitely many if it was not measured.
    #[must_use]
    pub fn us(&self, engine: EngineKind, shape: &Shape) -> f64 {
        self.of(engine).map_or(f64::INFINITY, |costs| costs.us(shape))
    }

    /// The engine that brings a request the soonest, of those that can take it.
    #[must_use]
    pub fn pick(&self, shape: &Shape, usable: Usable) -> EngineKind {
        let mut best = (EngineKind::Staged, self.us(EngineKind::Staged, shape));
        for engine in [EngineKind::Dma, EngineKind::Zerocopy] {
            let us = self.us(engine, shape);
            // At equal cost the copy engine alone: it takes no core and no multiprocessor from anybody.
            let cheaper = if engine == EngineKind::Dma { us <= best.1 } else { us < best.1 };
            if usable.has(engine) && cheaper {
                best = (engine, us);
            }
        }
        best.0
    }

    /// Costs to go by on a card that was never measured: those of a processor and a card on PCIe 4.0 × 16 by their data
    /// sheets and by what others have published (25 GB/s; 0.5 µs for a descriptor in a batch; one core gathers 3 to
    /// 9 GB/s; a gather kernel reaches nine tenths of the link with rows of 512 bytes). They have the right order of
    /// magnitude, and prefer the copy engine wherever it is not clearly worse.
    #[must_use]
    pub fn estimate() -> Self {
        const LINK: f64 = 25e3; // bytes a microsecond
        let dma = |runs: f64, bytes: f64| (runs * 0.5).max(runs * bytes / LINK);
        let staged = |runs: f64, bytes: f64| runs * (0.08 + bytes / 9e3) + bytes / LINK;
        let zerocopy = |runs: f64, bytes: f64| 1.0 + runs * (bytes + 64.0) / (0.92 * LINK);
        Self {
            h2d_gbps: 25.0,
            d2h_gbps: 25.0,
            engines: vec![
                estimated(EngineKind::Dma, 8.0, 0.0, dma),
                estimated(EngineKind::Staged, 10.0, 0.5, staged),
                estimated(EngineKind::Zerocopy, 14.0, 0.0, zerocopy),
            ],
        }
    }

    /// Says what is wrong with a table, which may come from anywhere.
    ///
    /// # Errors
    /// If an engine is missing or there twice, a number is none, or a grid is not ascending from one run on.
    pub fn check(&self) -> Result<(), BadTable> {
        for (what, value) in [("h2d_gbps", self.h2d_gbps), ("d2h_gbps", self.d2h_gbps)] {
            check(&"the link", what, value, 1e-6)?;
        }
        for kind in EngineKind::ALL {
            match self.engines.iter().filter(|costs| costs.engine == kind).count() {
                0 if kind != EngineKind::Zerocopy => return Err(BadTable::Missing(kind)),
                0 | 1 => {}
                _ => return Err(BadTable::Twice(kind)),
            }
        }
        for costs in &self.engines {
            let kind = costs.engine;
            check(&kind, "launch_us", costs.launch_us, 0.0)?;
            check(&kind, "range_us", costs.range_us, 0.0)?;
            let runs_ascend = |row: &Row| {
                row.points.first().is_some_and(|point| point.runs == 1)
                    && row.points.is_sorted_by(|a, b| a.runs < b.runs)
            };
            if costs.rows.first().is_none_or(|row| row.run_bytes == 0)
                || !costs.rows.is_sorted_by(|a, b| a.run_bytes < b.run_bytes)
                || !costs.rows.iter().all(runs_ascend)
            {
                return Err(BadTable::Grid(kind));
            }
            for point in costs.rows.iter().flat_map(|row| &row.points) {
                check(&kind, "a time", point.us, 1e-6)?;
            }
        }
        Ok(())
    }
}

fn check(of: &impl ToString, what: &'static str, value: f64, least: f64) -> Result<(), BadTable> {
    // A day, or an exabyte a second, is as wrong as no number at all.
    if value.is_finite() && (least..=1e11).contains(&value) {
        return Ok(());
    }
    Err(BadTable::Number { of: of.to_string(), what, value: value.to_string() })
}

/// A number to three decimals (of a microsecond: clocks resolve no more), which a file keeps exactly. Never nothing.
#[must_use]
pub(super) fn rounded(value: f64) -> f64 {
    (value * 1e3).round().max(1.0) / 1e3
}

fn estimated(
    engine: EngineKind,
    launch_us: f64,
    range_us: f64,
    body: impl Fn(f64, f64) -> f64,
) -> EngineCosts {
    let row = |run_bytes: u64| Row {
        run_bytes,
        points: (0..7)
            .map(|power| 4_u64.pow(power))
            .map(|runs| Point { runs, us: rounded(body(runs as f64, run_bytes as f64)) })
            .collect(),
    };
    EngineCosts {
        engine,
        launch_us,
        range_us,
        rows: (0..7).map(|power| row(256 * 4_u64.pow(power))).collect(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const ALL: Usable = Usable { registered: true, kernel: true };

    fn recorded() -> Vec<(&'static str, Table)> {
        [
            ("fast link", include_str!("tables/synthetic-fast-link.json")),
            ("slow descriptors", include_str!("tables/synthetic-slow-descriptors.json")),
            ("no kernel", include_str!("tables/synthetic-no-kernel.json")),
        ]
        .map(|(name, text)| (name, serde_json::from_str(text).unwrap()))
        .into()
    }

    fn shape(runs: usize, run_bytes: u64, ranges: usize) -> Shape {
        Shape { runs, bytes: runs as u64 * run_bytes, ranges, registered: true }
    }

    #[test]
    fn the_estimate_and_the_recorded_tables_are_sound() {
        Table::estimate().check().unwrap();
        for (name, table) in recorded() {
            table.check().unwrap_or_else(|error| panic!("{name}: {error}"));
        }
    }

    #[test]
    fn on_points_of_the_grid_the_cost_is_what_was_measured() {
        for (name, table) in recorded() {
            for costs in &table.engines {
                for row in &costs.rows {
                    for point in &row.points {
                        let us = costs.us(&shape(point.runs as usize, row.run_bytes, 1));
                        let measured = costs.launch_us + point.us;
                        let at = (name, costs.engine, row.run_bytes, point.runs);
                        assert!((us / measured - 1.0).abs() < 1e-9, "{at:?}: {us} for {measured}");
                    }
                }
            }
        }
    }

    /// On points of the grid the right answer needs no interpolation: the least sum of recorded numbers.
    #[test]
    fn the_pick_on_recorded_tables_is_the_cheapest_by_brute_force() {
        for (name, table) in recorded() {
            let mut winners = std::collections::BTreeSet::new();
            let grid = &table.of(EngineKind::Dma).unwrap().rows;
            for (row_at, row) in grid.iter().enumerate() {
                for (point_at, point) in row.points.iter().enumerate() {
                    for ranges in [1, 8, point.runs as usize] {
                        for (registered, kernel) in [(true, true), (true, false), (false, true)] {
                            let cheapest = EngineKind::ALL
                                .into_iter()
                                .filter(|engine| match engine {
                                    EngineKind::Dma => registered,
                                    EngineKind::Staged => true,
                                    EngineKind::Zerocopy => registered && kernel,
                                })
                                .filter_map(|engine| {
                                    let costs = table.engines.iter().find(|costs| costs.engine == engine)?;
                                    let us = costs.launch_us
                                        + costs.range_us * (ranges - 1) as f64
                                        + costs.rows[row_at].points[point_at].us;
                                    Some((engine, us))
                                })
                                .min_by(|a, b| a.1.total_cmp(&b.1))
                                .unwrap();
                            let shape = shape(point.runs as usize, row.run_bytes, ranges);
                            let picked = table.pick(&shape, Usable { registered, kernel });
                            assert_eq!(picked, cheapest.0, "{name}: {shape:?}, {registered} {kernel}");
                            if registered && kernel {
                                winners.insert(picked);
                            }
                        }
                    }
                }
            }
            let kinds = table.engines.len();
            assert!(winners.len() >= kinds.min(2), "{name} is no test: {winners:?} wins everything");
        }
    }

    proptest! {
        #[test]
        fn between_points_the_pick_is_the_least_of_the_interpolated_costs(
            runs in 1_usize..20_000,
            run_bytes in 1_u64..8_000_000,
            ranges in 1_usize..20_000,
        ) {
            let shape = shape(runs, run_bytes, ranges.min(runs));
            for (name, table) in recorded() {
                let picked = table.us(table.pick(&shape, ALL), &shape);
                for costs in &table.engines {
                    prop_assert!(picked <= costs.us(&shape), "{}: {:?}", name, shape);
                }
            }
        }

        #[test]
        fn an_interpolated_cost_lies_between_those_of_its_neighbours(
            at in (0_usize..6, 0_usize..5),
            share in (0.0_f64..1.0, 0.0_f64..1.0),
        ) {
            let table = Table::estimate();
            for costs in &table.engines {
                let (low, high) = (&costs.rows[at.0], &costs.rows[at.0 + 1]);
                let bytes = low.run_bytes as f64 * (high.run_bytes as f64 / low.run_bytes as f64).powf(share.0);
                let (few, many) = (low.points[at.1], high.points[at.1 + 1]);
                let runs = few.runs as f64 * (many.runs as f64 / few.runs as f64).powf(share.1);
                let us = costs.body_us(runs, bytes);
                prop_assert!((few.us * 0.999..=many.us * 1.001).contains(&us), "{us} of {few:?}..{many:?}");
            }
        }
    }

    #[test]
    fn beyond_the_grid_costs_go_on_by_bytes_and_by_runs() {
        let table = Table::estimate();
        let dma = table.of(EngineKind::Dma).unwrap();
        let megabyte = 1 << 20;
        let per_byte = |shape: Shape| (dma.us(&shape) - dma.launch_us) / shape.bytes as f64;
        let longest = per_byte(shape(16, megabyte, 1));
        assert!((per_byte(shape(4, 4 * megabyte, 1)) / longest - 1.0).abs() < 1e-9);
        let most = dma.us(&shape(4096, 256, 1)) - dma.launch_us;
        assert!(((dma.us(&shape(40_960, 256, 1)) - dma.launch_us) / most - 10.0).abs() < 1e-9);
        assert_eq!(dma.us(&shape(100, 1, 1)), dma.us(&shape(100, 256, 1)), "a byte is no cheaper than 256");
        assert_eq!(dma.us(&Shape { runs: 0, bytes: 0, ranges: 0, registered: true }), 0.0);
    }

    #[test]
    fn a_table_that_contradicts_itself_is_refused_by_what_is_wrong() {
        let good = Table::estimate();
        let mut bad = good.clone();
        bad.engines.retain(|costs| costs.engine != EngineKind::Dma);
        assert_eq!(bad.check(), Err(BadTable::Missing(EngineKind::Dma)));
        let mut bad = good.clone();
        bad.engines.push(bad.engines[1].clone());
        assert_eq!(bad.check(), Err(BadTable::Twice(EngineKind::Staged)));
        for wrong in [f64::NAN, f64::INFINITY, -1.0, 0.0] {
            let mut bad = good.clone();
            bad.engines[2].rows[3].points[2].us = wrong;
            assert!(matches!(bad.check(), Err(BadTable::Number { what: "a time", .. })));
            let mut bad = good.clone();
            bad.h2d_gbps = wrong;
            assert!(matches!(bad.check(), Err(BadTable::Number { what: "h2d_gbps", .. })));
        }
        let mut bad = good.clone();
        bad.engines[0].rows.swap(0, 1);
        assert_eq!(bad.check(), Err(BadTable::Grid(EngineKind::Dma)));
        let mut bad = good.clone();
        bad.engines[0].rows[0].points.remove(0);
        assert_eq!(bad.check(), Err(BadTable::Grid(EngineKind::Dma)));
        let mut bad = good;
        bad.engines[0].rows.clear();
        assert_eq!(bad.check(), Err(BadTable::Grid(EngineKind::Dma)));
    }
}
