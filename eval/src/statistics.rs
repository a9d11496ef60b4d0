//! Confidence intervals of means and of paired differences, by the bootstrap.
//!
//! Methods are compared on the same steps, questions and positions, so what varies from one of those to the next falls out of
//! the *difference*: an interval of differences is much narrower than the difference of two intervals (Efron, Tibshirani 1993,
//! chapters 8 and 13). Neighbouring positions of a text and questions about one context are no independent draws: they are one
//! cluster, and clusters are what is resampled.

use std::collections::BTreeMap;

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
    /// Of the mean of values, each given with the number of its cluster.
    ///
    /// Values of one cluster may depend on one another, so that whole clusters are drawn (the cluster bootstrap; Davison, Hinkley
    /// 1997, section 3.8). None where there are fewer than two clusters: they say nothing about how clusters vary.
    #[must_use]
    pub fn of_mean(values: &[(usize, f64)], seed: u64) -> Option<Self> {
        const TAIL: f64 = 0.025;
        let mut by_cluster: BTreeMap<usize, (f64, usize)> = BTreeMap::new();
        for (cluster, value) in values {
            let sum = by_cluster.entry(*cluster).or_default();
            *sum = (sum.0 + value, sum.1 + 1);
        }
        let clusters: Vec<(f64, usize)> = by_cluster.into_values().collect();
        if clusters.len() < 2 {
            return None;
        }
        let add = |sum: (f64, usize), of: &(f64, usize)| (sum.0 + of.0, sum.1 + of.1);
        let mean = |(sum, count): (f64, usize)| sum / count as f64;
        let mut random = SplitMix64::new(seed);
        let mut means: Vec<f64> = (0..RESAMPLES)
            .map(|_| {
                let drawn = (0..clusters.len()).map(|_| &clusters[random.below(clusters.len())]);
                mean(drawn.fold((0.0, 0), add))
            })
            .collect();
        means.sort_by(f64::total_cmp);
        let at = |share: f64| means[((means.len() - 1) as f64 * share).round() as usize];
        Some(Self { mean: mean(clusters.iter().fold((0.0, 0), add)), low: at(TAIL), high: at(1.0 - TAIL) })
    }

    /// Of the mean of `ours[i] − theirs[i]`, whose clusters are those of `ours`; none where the two are not of the same values, or
    /// of fewer than two clusters.
    #[must_use]
    pub fn of_difference(ours: &[(usize, f64)], theirs: &[(usize, f64)], seed: u64) -> Option<Self> {
        if ours.len() != theirs.len() || ours.iter().zip(theirs).any(|(a, b)| a.0 != b.0) {
            return None;
        }
        let differences: Vec<(usize, f64)> =
            ours.iter().zip(theirs).map(|((cluster, a), (_, b))| (*cluster, a - b)).collect();
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

    /// Every value a cluster of its own.
    fn alone(values: &[f64]) -> Vec<(usize, f64)> {
        values.iter().copied().enumerate().collect()
    }

    /// Twelve clusters of 24 values that have most of their deviation in common.
    fn clustered(mean: f64, seed: u64) -> Vec<(usize, f64)> {
        let (common, own) = (normals(12, mean, seed), normals(12 * 24, 0.0, seed + 1000));
        own.iter().enumerate().map(|(at, own)| (at % 12, common[at % 12] + 0.2 * own)).collect()
    }

    fn held(samples: impl Fn(u64) -> Vec<(usize, f64)>) -> usize {
        let holds = |seed: &u64| {
            let interval = Interval::of_mean(&samples(*seed), 1).unwrap();
            interval.low <= 2.0 && 2.0 <= interval.high
        };
        (0..200).filter(holds).count()
    }

    #[test]
    fn ninety_five_of_a_hundred_intervals_hold_the_true_mean() {
        let held = held(|seed| alone(&normals(40, 2.0, seed)));
        assert!((178..=198).contains(&held), "{held} of 200");
    }

    #[test]
    fn values_that_depend_on_one_another_need_their_clusters() {
        let as_clusters = held(|seed| clustered(2.0, seed));
        // With twelve clusters the percentile interval is a little narrow, but near what it claims.
        assert!(as_clusters >= 166, "{as_clusters} of 200");
        let as_singles =
            held(|seed| alone(&clustered(2.0, seed).iter().map(|(_, v)| *v).collect::<Vec<_>>()));
        assert!(as_singles < 100, "{as_singles} of 200");
    }

    #[test]
    fn the_width_is_that_of_the_standard_error() {
        let interval = Interval::of_mean(&alone(&normals(400, 0.0, 5)), 2).unwrap();
        let half = (interval.high - interval.low) / 2.0;
        assert!((half - 1.96 / 20.0).abs() < 0.02, "{half}");
    }

    #[test]
    fn pairing_finds_a_difference_that_the_spread_hides() {
        let spread: Vec<f64> = normals(30, 0.0, 9).iter().map(|v| v * 10.0).collect();
        let better: Vec<f64> = spread.iter().zip(normals(30, 0.5, 4)).map(|(a, b)| a + b).collect();
        let paired = Interval::of_difference(&alone(&better), &alone(&spread), 3).unwrap();
        assert!(paired.differs_from_zero() && paired.low > 0.0, "{paired:?}");
        assert!(Interval::of_mean(&alone(&better), 3).unwrap().low < 0.0);
    }

    #[test]
    fn one_cluster_has_no_interval_and_a_constant_one_of_no_width() {
        assert_eq!(Interval::of_mean(&[], 1), None);
        assert_eq!(Interval::of_mean(&[(3, 1.0), (3, 2.0)], 1), None);
        assert_eq!(Interval::of_difference(&alone(&[1.0, 2.0]), &alone(&[1.0]), 1), None);
        assert_eq!(Interval::of_difference(&[(0, 1.0), (1, 2.0)], &[(0, 1.0), (0, 2.0)], 1), None);
        let constant = Interval::of_mean(&alone(&[3.0; 9]), 1).unwrap();
        assert_eq!((constant.low, constant.high), (3.0, 3.0));
        assert!(
            !Interval::of_difference(&alone(&[3.0; 9]), &alone(&[3.0; 9]), 1).unwrap().differs_from_zero()
        );
    }

    #[test]
    fn clusters_of_different_sizes_weigh_by_their_values() {
        let interval = Interval::of_mean(&[(0, 1.0), (1, 4.0), (1, 4.0)], 1).unwrap();
        assert_eq!((interval.mean, interval.low, interval.high), (3.0, 1.0, 4.0));
    }
}
