//! What rows say about one another: scores against dense, and paired intervals.

use std::collections::BTreeMap;

use kvoyant_eval::row::Row;
use kvoyant_eval::statistics::Interval;

/// The row that others are compared with.
const DENSE: &str = "dense";

/// The method that others are compared with, at the same budget.
const RIVAL: &str = "infinigen";

/// Below this score of dense's a task says nothing about methods.
const DENSE_CAN: f64 = 0.2;

/// A row with what its means are means of.
#[derive(Debug, Default)]
pub(crate) struct Sample {
    /// The row, without intervals.
    pub(crate) row: Row,
    /// KL at every position.
    pub(crate) kl: Vec<f64>,
    /// Score of every question, with its task.
    pub(crate) scores: Vec<(String, f64)>,
    /// Attention covered at every step.
    pub(crate) mass: Vec<f64>,
}

impl Sample {
    fn only_scores(&self) -> Vec<f64> {
        self.scores.iter().map(|(_, score)| *score).collect()
    }
}

/// The rows with all that needs a second row.
pub(crate) fn rows(samples: Vec<Sample>, seed: u64) -> Vec<Row> {
    let together = |a: &Row, b: &Row| a.source == b.source && a.length == b.length;
    let find = |of: &Row, method: &str, same_budget: bool| {
        samples.iter().find(|sample| {
            let row = &sample.row;
            together(row, of) && row.method == method && (!same_budget || row.budget == of.budget)
        })
    };
    samples
        .iter()
        .map(|sample| {
            let mut row = sample.row.clone();
            let mut intervals = BTreeMap::new();
            let mut note = |name: &str, interval: Option<Interval>| {
                if let Some(interval) = interval {
                    intervals.insert(name.to_owned(), interval);
                }
            };
            note("kl_to_dense", Interval::of_mean(&sample.kl, seed));
            note("attention_mass", Interval::of_mean(&sample.mass, seed));
            if let Some(dense) = find(&row, DENSE, false) {
                row.accuracy_to_dense = against(&dense.scores, &sample.scores);
                let difference = Interval::of_difference(&sample.only_scores(), &dense.only_scores(), seed);
                note("accuracy_minus_dense", difference);
            }
            if row.budget.is_some()
                && row.method != RIVAL
                && let Some(rival) = find(&row, RIVAL, true)
            {
                note("kl_minus_infinigen", Interval::of_difference(&sample.kl, &rival.kl, seed));
                note(
                    "attention_mass_minus_infinigen",
                    Interval::of_difference(&sample.mass, &rival.mass, seed),
                );
                let difference = Interval::of_difference(&sample.only_scores(), &rival.only_scores(), seed);
                note("accuracy_minus_infinigen", difference);
            }
            row.intervals = intervals;
            row
        })
        .collect()
}

/// Mean over the tasks that dense can do of the score as a share of dense's.
fn against(dense: &[(String, f64)], ours: &[(String, f64)]) -> Option<f64> {
    let (dense, ours) = (by_task(dense), by_task(ours));
    let shares: Vec<f64> = dense
        .iter()
        .filter(|(_, score)| **score >= DENSE_CAN)
        .filter_map(|(task, score)| ours.get(task).map(|ours| ours / score))
        .collect();
    (!shares.is_empty()).then(|| shares.iter().sum::<f64>() / shares.len() as f64)
}

/// Mean score of each task.
pub(crate) fn by_task(scores: &[(String, f64)]) -> BTreeMap<String, f64> {
    let mut sums: BTreeMap<String, (f64, usize)> = BTreeMap::new();
    for (task, score) in scores {
        let sum = sums.entry(task.clone()).or_default();
        *sum = (sum.0 + score, sum.1 + 1);
    }
    sums.into_iter().map(|(task, (sum, count))| (task, sum / count as f64)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample(method: &str, budget: Option<f64>, kl: &[f64], scores: &[(&str, f64)]) -> Sample {
        let row =
            Row { method: method.into(), source: "model".into(), length: 2048, budget, ..Row::default() };
        let scores = scores.iter().map(|(task, score)| ((*task).to_owned(), *score)).collect();
        Sample { row, kl: kl.to_vec(), scores, mass: Vec::new() }
    }

    #[test]
    fn a_task_that_dense_cannot_do_says_nothing() {
        let rows = rows(
            vec![
                sample("dense", None, &[0.0; 2], &[("single", 1.0), ("list", 0.1)]),
                sample("quest", Some(0.06), &[0.2; 2], &[("single", 0.5), ("list", 0.9)]),
            ],
            1,
        );
        assert_eq!(rows[1].accuracy_to_dense, Some(0.5));
        assert_eq!(rows[1].intervals["kl_to_dense"].mean, 0.2);
        assert!((rows[1].intervals["accuracy_minus_dense"].mean - 0.15).abs() < 1e-9);
    }

    #[test]
    fn methods_are_paired_with_infinigen_at_their_own_budget() {
        let rows = rows(
            vec![
                sample("infinigen", Some(0.03), &[0.5, 0.7], &[]),
                sample("infinigen", Some(0.06), &[0.3, 0.3], &[]),
                sample("hata", Some(0.06), &[0.1, 0.3], &[]),
                sample("window", None, &[1.0, 1.0], &[]),
            ],
            1,
        );
        assert!((rows[2].intervals["kl_minus_infinigen"].mean + 0.1).abs() < 1e-9);
        assert!(!rows[3].intervals.contains_key("kl_minus_infinigen"));
        assert!(!rows[0].intervals.contains_key("kl_minus_infinigen"));
    }
}
