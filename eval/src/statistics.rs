//! Confidence intervals of means and of paired differences, by the bootstrap.
//!
//! Methods are compared on the same steps, questions and positions, so what varies from one of those to the next falls out of
//! the *difference*: an interval of differences is much narrower than the difference of two intervals (Efron, Tibshirani 1993,
//! chapters 8 and 13).

use kvoyant_kernels::SplitMix64;
use serde::{Deserialize, Serialize};

/// Draws of a bootstrap.
pub const RESAMPLES: usize = 2000;

/// A mean with its 95 % interval.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Interval {
    /// The mean of the sample.
    pub mean: f64,
    /// The 2.5 % quantile of the resampled means.
    pub low: f64,
    /// The 97.5 % quantile.
    pub high: f64,
}

impl Interval {
    /// Of the mean of `values`; none of an empty sample.
    #[must_use]
    pub fn of_mean(values: &[f64], seed: u64) -> Option<Self> {
        const TAIL: f64 = 0.025;
        if values.is_empty() {
            return None;
        }
        let mean = |sum: f64| sum / values.len() as f64;
        let mut random = SplitMix64::new(seed);
        let mut means: Vec<f64> = (0..RESAMPLES)
            .map(|_| mean((0..values.len()).map(|_| values[random.below(values.len())]).sum()))
            .collect();
        means.sort_by(f64::total_cmp);
        let at = |share: f64| means[((means.len() - 1) as f64 * share).round() as usize];
        Some(Self { mean: mean(values.iter().sum()), low: at(TAIL), high: at(1.0 - TAIL) })
    }

    /// Of the mean of `ours[i] − theirs[i]`; none where nothing is paired.
    #[must_use]
    pub fn of_difference(ours: &[f64], theirs: &[f64], seed: u64) -> Option<Self> {
        if ours.len() != theirs.len() {
            return None;
        }
        let differences: Vec<f64> = ours.iter().zip(theirs).map(|(a, b)| a - b).collect();
        Self::of_mean(&differences, seed)
    }

    /// Whether 0 is outside.
    #[must_use]
    pub fn differs_from_zero(&self) -> bool {
        self.low > 0.0 || self.high < 0.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn normals(n: usize, mean: f64, seed: u64) -> Vec<f64> {
        let mut random = SplitMix64::new(seed);
        (0..n).map(|_| mean + f64::from(random.normal())).collect()
    }

    #[test]
    fn ninety_five_of_a_hundred_intervals_hold_the_true_mean() {
        let held = (0..400)
            .filter(|seed| {
                let interval = Interval::of_mean(&normals(40, 2.0, *seed), 1).unwrap();
                interval.low <= 2.0 && 2.0 <= interval.high
            })
            .count();
        assert!((360..=392).contains(&held), "{held} of 400");
    }

    #[test]
    fn the_width_is_that_of_the_standard_error() {
        let interval = Interval::of_mean(&normals(400, 0.0, 5), 2).unwrap();
        let half = (interval.high - interval.low) / 2.0;
        assert!((half - 1.96 / 20.0).abs() < 0.02, "{half}");
    }

    #[test]
    fn pairing_finds_a_difference_that_the_spread_hides() {
        let spread: Vec<f64> = normals(30, 0.0, 9).iter().map(|v| v * 10.0).collect();
        let better: Vec<f64> = spread.iter().zip(normals(30, 0.5, 4)).map(|(a, b)| a + b).collect();
        let paired = Interval::of_difference(&better, &spread, 3).unwrap();
        assert!(paired.differs_from_zero() && paired.low > 0.0, "{paired:?}");
        let alone = Interval::of_mean(&better, 3).unwrap();
        assert!(alone.low < 0.0);
    }

    #[test]
    fn nothing_has_no_interval_and_a_constant_one_of_no_width() {
        assert_eq!(Interval::of_mean(&[], 1), None);
        assert_eq!(Interval::of_difference(&[1.0], &[], 1), None);
        let constant = Interval::of_mean(&[3.0; 9], 1).unwrap();
        assert_eq!((constant.low, constant.high), (3.0, 3.0));
        assert!(!Interval::of_difference(&[3.0; 9], &[3.0; 9], 1).unwrap().differs_from_zero());
    }
}
