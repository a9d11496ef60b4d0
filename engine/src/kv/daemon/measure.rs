//! How far a selected layer is from dense attention over the same rows.

use std::ops::Range;

use kvoyant_methods::Certificate;
use rayon::prelude::*;

use super::DaemonSequence;
use super::attention::{Named, Pass, dense_of, scores_of};
use super::stats::Measured;

/// What attention over the selected rows gave.
#[derive(Debug, Clone, Copy)]
pub(super) struct Attended<'a> {
    /// `[batch][Hq][d]`.
    pub(super) queries: &'a [f32],
    /// `[batch][Hq][d]`.
    pub(super) out: &'a [f32],
    /// `[batch][Hq]`, or none.
    pub(super) certificates: &'a [Option<Certificate>],
    /// `[batch]`, or none.
    pub(super) exact: &'a [Exact],
}

/// Rows that the daemon's CPU attended once it knew the true query.
#[derive(Debug, Clone, Default)]
pub(super) struct Exact {
    /// How many.
    pub(super) rows: u32,
    /// `[Hq]`: the log-sum-exp over them of each query head, or none where there are none.
    pub(super) lse: Vec<f32>,
}

impl Pass<'_> {
    /// Compares each query head's attention with dense attention.
    pub(super) fn measure(
        &self,
        answer: &(impl Named + ?Sized),
        batch: &[&DaemonSequence],
        positions: &[usize],
        attended: Attended<'_>,
    ) -> Measured {
        let (kv_heads, d, group) = (self.shape.kv_heads, self.shape.head_dim, self.shape.group());
        let one = |(task, queries): (usize, &[f32])| {
            let (i, head) = (task / kv_heads, task % kv_heads);
            let (end, mut sum) = (positions[i] + 1, Measured::default());
            let scores = scores_of(self, batch[i], head, queries, std::slice::from_ref(&(0..end)));
            // A pool that dropped rows for good leaves fewer rows than tokens, and then nothing can be said.
            if scores.len() != group * end {
                return sum;
            }
            let (dense, _) = dense_of(self, batch[i], head, queries, end);
            let out = &attended.out[task * group * d..][..group * d];
            for (out, dense) in out.chunks_exact(d).zip(dense.chunks_exact(d)) {
                sum.output_error += relative(out, dense);
            }
            let candidates = self.sinks.min(end)..self.window_start(end - 1);
            let mut rows = vec![false; end];
            let selected = answer.tokens_of(i, head);
            for tokens in self.local(end - 1).iter().chain(&selected) {
                rows[tokens.start.min(end)..tokens.end.min(end)].fill(true);
            }
            // An answer says how many rows the daemon's CPU attended, not which: they are known where they are all others. Of those that it
            // attended later, their part of the attention is known from what came of it.
            let later = attended.exact.get(i);
            let by_cpu = answer.cpu_rows(i) + later.map_or(0, |later| later.rows as usize);
            let selected = |head| answer.tokens_of(i, head).iter().map(ExactSizeIterator::len).sum::<usize>();
            let whole = (0..kv_heads).map(selected).sum::<usize>() + by_cpu == kv_heads * candidates.len();
            if whole {
                rows.fill(true);
            }
            let truth = Truth::of(&scores, end);
            let known = whole || answer.cpu_rows(i) == 0;
            let beside = |h: usize| match later.and_then(|later| later.lse.get(head * group + h)) {
                Some(lse) if !whole => share_of(&scores[h * end..][..end], *lse),
                _ => 0.0,
            };
            let certificates = attended.certificates.get(task * group..(task + 1) * group).unwrap_or(&[]);
            for (h, certificate) in certificates.iter().enumerate() {
                let Some(certificate) = certificate else { continue };
                let beside = beside(h);
                let missed = (missed_by(&scores[h * end..][..end], &rows) - beside).max(0.0);
                let slack = SHARE_ROUNDING * (missed + beside);
                let error = distance(&out[h * d..][..d], &dense[h * d..][..d]);
                sum.certified += 1;
                let short = known && f64::from(certificate.missed_mass) < missed - slack;
                let off = f64::from(certificate.error) + ERROR_ROUNDING * norm(&dense[h * d..][..d]) < error;
                sum.violations += u64::from(short || off);
                if known && missed > SHARE_LEAST.max(100.0 * slack) {
                    sum.ratios.add(f64::from(certificate.missed_mass) / missed);
                }
            }
            sum.count += group as u64;
            sum.mass += truth.covered(&rows) + (0..group).map(beside).sum::<f64>();
            if (whole || by_cpu == 0)
                && let Some(share) = truth.top_k(candidates, &rows)
            {
                sum.top_k_count += 1;
                sum.top_k += share;
            }
            sum
        };
        let parts: Vec<Measured> = attended.queries.par_chunks(group * d).enumerate().map(one).collect();
        let mut all = Measured::default();
        parts.into_iter().for_each(|part| all += part);
        all
    }
}

/// What true shares, of scores in f32, may be off by, relatively.
const SHARE_ROUNDING: f64 = 1e-4;
/// Below it a share that was missed says nothing about the ratio of its bound.
const SHARE_LEAST: f64 = 1e-6;
/// What attention in f32 may be off by whatever was left out, relatively.
const ERROR_ROUNDING: f64 = 1e-4;

/// The share of a query head's attention, of scaled scores, on rows that were not attended.
fn missed_by(scores: &[f32], attended: &[bool]) -> f64 {
    let most = scores.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let (mut missed, mut all) = (0.0, 0.0);
    for (score, attended) in scores.iter().zip(attended) {
        let weight = f64::from(score - most).exp();
        all += weight;
        missed += if *attended { 0.0 } else { weight };
    }
    missed / all
}

/// The share of a query head's attention, of scaled scores, on rows of this log-sum-exp.
fn share_of(scores: &[f32], lse: f32) -> f64 {
    let most = scores.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let all: f64 = scores.iter().map(|score| f64::from(score - most).exp()).sum();
    (f64::from(lse) - f64::from(most)).exp() / all
}

fn norm(values: &[f32]) -> f64 {
    values.iter().map(|value| f64::from(*value).powi(2)).sum::<f64>().sqrt()
}

fn distance(a: &[f32], b: &[f32]) -> f64 {
    a.iter().zip(b).map(|(a, b)| f64::from(a - b).powi(2)).sum::<f64>().sqrt()
}

/// Dense attention of a KV head's query heads.
struct Truth {
    /// Sum of the query heads' probabilities, per token: their mean but for a constant.
    probabilities: Vec<f64>,
}

impl Truth {
    /// From scaled scores `[group][tokens]`.
    fn of(scores: &[f32], tokens: usize) -> Self {
        let mut probabilities = vec![0.0; tokens];
        for scores in scores.chunks_exact(tokens) {
            let most = scores.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            let weight = |score: &f32| f64::from(score - most).exp();
            let sum: f64 = scores.iter().map(weight).sum();
            for (probability, score) in probabilities.iter_mut().zip(scores) {
                *probability += weight(score) / sum;
            }
        }
        Self { probabilities }
    }

    /// Probability on these rows, summed over the query heads.
    fn covered(&self, rows: &[bool]) -> f64 {
        self.probabilities.iter().zip(rows).filter(|(_, attended)| **attended).map(|(p, _)| p).sum()
    }

    /// The share of the best candidates among the attended ones, as many as were attended; of equals the first is better.
    fn top_k(&self, candidates: Range<usize>, rows: &[bool]) -> Option<f64> {
        let k = rows[candidates.clone()].iter().filter(|attended| **attended).count();
        if k == 0 {
            return None;
        }
        let mut best: Vec<usize> = candidates.collect();
        if k < best.len() {
            let of = &self.probabilities;
            best.select_nth_unstable_by(k - 1, |a, b| of[*b].total_cmp(&of[*a]).then(a.cmp(b)));
        }
        Some(best[..k].iter().filter(|token| rows[**token]).count() as f64 / k as f64)
    }
}

/// `‖a − b‖ / ‖b‖`; 0 where both are 0.
fn relative(a: &[f32], b: &[f32]) -> f64 {
    let squares = |values: &mut dyn Iterator<Item = f32>| -> f64 {
        values.map(|value| f64::from(value) * f64::from(value)).sum()
    };
    let difference = squares(&mut a.iter().zip(b).map(|(a, b)| a - b));
    let norm = squares(&mut b.iter().copied());
    if difference == 0.0 { 0.0 } else { (difference / norm.max(f64::MIN_POSITIVE)).sqrt() }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rows(attended: &[usize], tokens: usize) -> Vec<bool> {
        (0..tokens).map(|token| attended.contains(&token)).collect()
    }

    #[test]
    fn what_is_covered_is_the_sum_of_the_true_probabilities_of_every_query_head() {
        // Of four tokens the heads put 1/2 and 1/8 on the first.
        let ln = |weights: [f32; 4]| weights.map(f32::ln);
        let truth = Truth::of(&[ln([4.0, 2.0, 1.0, 1.0]), ln([1.0, 1.0, 5.0, 1.0])].concat(), 4);
        let near = |a: f64, b: f64| assert!((a - b).abs() < 1e-6, "{a} {b}");
        near(truth.covered(&rows(&[0], 4)), 0.5 + 0.125);
        near(truth.covered(&rows(&[0, 2], 4)), 0.5 + 0.125 + 0.125 + 0.625);
        near(truth.covered(&rows(&[0, 1, 2, 3], 4)), 2.0);
        near(truth.covered(&rows(&[], 4)), 0.0);
    }

    #[test]
    fn rows_that_are_known_by_their_log_sum_exp_have_their_share() {
        let scores = [4.0_f32, 2.0, 1.0, 1.0].map(f32::ln);
        assert!((share_of(&scores, 3.0_f32.ln()) - 3.0 / 8.0).abs() < 1e-6);
        assert_eq!(share_of(&scores, f32::NEG_INFINITY), 0.0);
    }

    #[test]
    fn the_best_rows_are_those_of_the_group_together() {
        // Token 1 is the second of both heads, and the best of the two together; tokens 2 and 3 are one head's best each.
        let truth = Truth::of(&[[0.0, 3.0, 3.2, -9.0], [0.0, 3.0, -9.0, 3.2]].concat(), 4);
        assert_eq!(truth.top_k(0..4, &rows(&[1], 4)), Some(1.0));
        assert_eq!(truth.top_k(0..4, &rows(&[2], 4)), Some(0.0));
        assert_eq!(truth.top_k(0..4, &rows(&[1, 0], 4)), Some(0.5));
        // Rows that are no candidates do not count as attended ones.
        assert_eq!(truth.top_k(2..4, &rows(&[1], 4)), None);
        assert_eq!(truth.top_k(2..4, &rows(&[0, 1, 2], 4)), Some(1.0));
    }

    #[test]
    fn of_equal_rows_the_first_is_the_best() {
        let truth = Truth::of(&[1.0; 6], 6);
        assert_eq!(truth.top_k(0..6, &rows(&[0, 1], 6)), Some(1.0));
        assert_eq!(truth.top_k(0..6, &rows(&[4, 5], 6)), Some(0.0));
    }
}
