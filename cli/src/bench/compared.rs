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

/// Neighbouring steps of a trace that count as one draw.
const STEPS_OF_A_CLUSTER: usize = 4;

/// What depends on one another among the values of a sample: see [`kvoyant_eval::statistics`].
#[derive(Debug, Clone, Default)]
pub(crate) struct Clusters {
    /// Continuations that were fed in one batch: positions come step by step, those of one continuation are a cluster. 0: none.
    pub(crate) continuations: usize,
    /// How many questions each context has, in the order of the scores. Those without a context are clusters of their own.
    pub(crate) questions: Vec<usize>,
}

/// A row with what its means are means of.
#[derive(Debug, Default)]
pub(crate) struct Sample {
    /// The row, without intervals.
    pub(crate) row: Row,
    /// KL at every position, `[step][continuation]`.
    pub(crate) kl: Vec<f64>,
    /// Score of every question, with its task.
    pub(crate) scores: Vec<(String, f64)>,
    /// Attention covered at every step.
    pub(crate) mass: Vec<f64>,
    /// What of it belongs together.
    pub(crate) clusters: Clusters,
}

impl Sample {
    /// Scores by context.
    fn scores_by_context(&self) -> Vec<(usize, f64)> {
        let contexts = self.clusters.questions.iter().enumerate();
        let of = contexts.flat_map(|(context, questions)| std::iter::repeat_n(context, *questions));
        let alone = self.clusters.questions.len()..;
        self.scores.iter().zip(of.chain(alone)).map(|((_, score), context)| (context, *score)).collect()
    }

    /// KL by continuation.
    fn kl_by_continuation(&self) -> Vec<(usize, f64)> {
        let continuations = self.clusters.continuations.max(1);
        self.kl.iter().enumerate().map(|(at, kl)| (at % continuations, *kl)).collect()
    }

    /// Attention covered by runs of neighbouring steps.
    fn mass_by_run(&self) -> Vec<(usize, f64)> {
        self.mass.iter().enumerate().map(|(step, mass)| (step / STEPS_OF_A_CLUSTER, *mass)).collect()
    }
}

/// The rows with all that needs a second row.
pub(crate) fn rows(samples: &[Sample], seed: u64) -> Vec<Row> {
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
            note("kl_to_dense", Interval::of_mean(&sample.kl_by_continuation(), seed));
            note("attention_mass", Interval::of_mean(&sample.mass_by_run(), seed));
            if let Some(dense) = find(&row, DENSE, false) {
                row.accuracy_to_dense = against(&dense.scores, &sample.scores);
                let (ours, theirs) = (sample.scores_by_context(), dense.scores_by_context());
                note("accuracy_minus_dense", Interval::of_difference(&ours, &theirs, seed));
            }
            if row.budget.is_some()
                && row.method != RIVAL
                && let Some(rival) = find(&row, RIVAL, true)
            {
                let mut difference = |name: &str, values: fn(&Sample) -> Vec<(usize, f64)>| {
                    note(name, Interval::of_difference(&values(sample), &values(rival), seed));
                };
                difference("kl_minus_infinigen", Sample::kl_by_continuation);
                difference("attention_mass_minus_infinigen", Sample::mass_by_run);
                difference("accuracy_minus_infinigen", Sample::scores_by_context);
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
        let clusters = Clusters { continuations: 2, questions: Vec::new() };
        Sample { row, kl: kl.to_vec(), scores, clusters, mass: Vec::new() }
    }

    #[test]
    fn a_task_that_dense_cannot_do_says_nothing() {
        let rows = rows(
            &[
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
            &[
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

    #[test]
    fn positions_of_one_continuation_and_questions_of_one_context_are_drawn_together() {
        let scores = [("single", 1.0), ("multi", 0.0), ("list", 0.5)];
        // Two continuations that differ much from one another, and not within themselves.
        let kl: Vec<f64> = [0.1, 0.9].repeat(24);
        let mut of = sample("quest", Some(0.06), &kl, &scores);
        let interval = Interval::of_mean(&of.kl_by_continuation(), 1).unwrap();
        assert!((interval.low - 0.1).abs() < 1e-9 && (interval.high - 0.9).abs() < 1e-9, "{interval:?}");
        assert_eq!(of.scores_by_context(), [(0, 1.0), (1, 0.0), (2, 0.5)]);
        of.clusters.questions = vec![2, 1];
        assert_eq!(of.scores_by_context(), [(0, 1.0), (0, 0.0), (1, 0.5)]);
        of.mass = vec![0.5; 6];
        assert_eq!(of.mass_by_run().iter().map(|(run, _)| *run).collect::<Vec<_>>(), [0, 0, 0, 0, 1, 1]);
        // One continuation alone says nothing about others.
        of.clusters.continuations = 0;
        assert_eq!(Interval::of_mean(&of.kl_by_continuation(), 1), None);
    }
}
