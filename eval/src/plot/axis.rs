//! From values to places, and the ticks between.

/// One axis.
#[derive(Debug, Clone, Copy)]
pub(super) struct Axis {
    log: bool,
    /// The range of values, in logarithms if `log`.
    low: f64,
    high: f64,
    /// Where its ends lie in the scene.
    from: f64,
    to: f64,
}

/// Ticks of a linear axis, about.
const TICKS: f64 = 6.0;

impl Axis {
    /// An axis that holds all values, from `from` to `to` in the scene.
    pub(super) fn new(values: impl Iterator<Item = f64>, log: bool, from: f64, to: f64) -> Self {
        let usable =
            values.filter(|value| !log || *value > 0.0).map(|value| if log { value.log10() } else { value });
        let (mut low, mut high) =
            usable.fold((f64::INFINITY, f64::NEG_INFINITY), |(low, high), v| (low.min(v), high.max(v)));
        if low > high {
            (low, high) = (0.0, 1.0);
        }
        if log {
            (low, high) = (low - 0.1, high + 0.1);
        } else {
            let step = step_of(low, high);
            (low, high) = ((low / step).floor() * step, (high / step).ceil() * step);
        }
        if high - low < f64::EPSILON * low.abs().max(1.0) {
            high = low + 1.0;
        }
        Self { log, low, high, from, to }
    }

    /// Where a value lies; what a logarithmic axis cannot show lies at its beginning.
    pub(super) fn at(&self, value: f64) -> f64 {
        let value = match (self.log, value > 0.0) {
            (true, true) => value.log10(),
            (true, false) => self.low,
            (false, _) => value,
        };
        self.place(value.clamp(self.low, self.high))
    }

    fn place(&self, value: f64) -> f64 {
        self.from + (value - self.low) / (self.high - self.low) * (self.to - self.from)
    }

    /// Places and labels of the ticks.
    pub(super) fn ticks(&self) -> Vec<(f64, String)> {
        if self.log {
            let few = self.high - self.low < 2.5;
            let digits: &[f64] = if few { &[1.0, 2.0, 5.0] } else { &[1.0] };
            return (self.low.floor() as i32..=self.high.ceil() as i32)
                .flat_map(|decade| digits.iter().map(move |digit| digit * 10f64.powi(decade)))
                .filter(|value| (self.low..=self.high).contains(&value.log10()))
                .map(|value| (self.place(value.log10()), label(value)))
                .collect();
        }
        let step = step_of(self.low, self.high);
        let first = (self.low / step).ceil() as i64;
        let last = (self.high / step + 1e-9).floor() as i64;
        (first..=last).map(|i| i as f64 * step).map(|value| (self.place(value), label(value))).collect()
    }
}

/// 1, 2 or 5 times a power of ten, so that a range has about [`TICKS`] of it.
fn step_of(low: f64, high: f64) -> f64 {
    let range = (high - low).max(1e-9);
    let rough = range / TICKS;
    let power = 10f64.powf(rough.log10().floor());
    let digit = rough / power;
    power
        * if digit < 1.5 {
            1.0
        } else if digit < 3.5 {
            2.0
        } else if digit < 7.5 {
            5.0
        } else {
            10.0
        }
}

/// Few digits, no trailing zeros.
fn label(value: f64) -> String {
    if value == 0.0 || value.abs() < 1e-12 {
        return "0".into();
    }
    if !(1e-4..1e5).contains(&value.abs()) {
        return format!("{value:.0e}");
    }
    let text = format!("{value:.5}");
    text.trim_end_matches('0').trim_end_matches('.').to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn linear_ticks_are_round_and_hold_all_values() {
        let axis = Axis::new([0.03, 0.12, 0.06].into_iter(), false, 0.0, 100.0);
        let labels: Vec<String> = axis.ticks().into_iter().map(|(_, label)| label).collect();
        assert_eq!(labels, ["0.02", "0.04", "0.06", "0.08", "0.1", "0.12"]);
        assert!(axis.at(0.03) > 0.0 && axis.at(0.12) <= 100.0);
    }

    #[test]
    fn logarithmic_ticks_are_decades_or_their_parts_and_zero_stands_at_the_end() {
        let axis = Axis::new([0.001, 10.0, 0.0].into_iter(), true, 0.0, 100.0);
        let labels: Vec<String> = axis.ticks().into_iter().map(|(_, label)| label).collect();
        assert_eq!(labels, ["0.001", "0.01", "0.1", "1", "10"]);
        assert_eq!(axis.at(0.0), 0.0);
        assert!((axis.at(0.1) - 50.0).abs() < 1e-9);
    }

    #[test]
    fn an_axis_of_nothing_or_of_one_value_has_ticks() {
        assert!(!Axis::new([].into_iter(), false, 0.0, 1.0).ticks().is_empty());
        assert!(Axis::new([3.0].into_iter(), false, 0.0, 1.0).at(3.0).is_finite());
        assert!(Axis::new([3.0].into_iter(), true, 0.0, 1.0).at(3.0).is_finite());
    }
}
