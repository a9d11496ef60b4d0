//! How far a selected layer is from dense attention over the same rows.

use kvoyant_client::Answer;
use rayon::prelude::*;

use super::DaemonSequence;
use super::attention::{Pass, dense_of, scores_of};
use super::stats::Measured;

/// What attention over the selected rows gave.
#[derive(Debug, Clone, Copy)]
pub(super) struct Attended<'a> {
    /// `[batch][Hq][d]`.
    pub(super) queries: &'a [f32],
    /// `[batch][Hq][d]`.
    pub(super) out: &'a [f32],
    /// `[batch][Hq]`.
    pub(super) lse: &'a [f32],
}

impl Pass<'_> {
    /// Compares each query head's attention with dense attention.
    pub(super) fn measure(
        &self,
        answer: &Answer,
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
            let (dense, dense_lse) = dense_of(self, batch[i], head, queries, end);
            let (out, lse) = (&attended.out[task * group * d..], &attended.lse[task * group..]);
            let partial = answer.partial(i).is_some();
            for (j, scores) in scores.chunks_exact(end).enumerate() {
                sum.count += 1;
                sum.mass += f64::from(lse[j] - dense_lse[j]).exp().min(1.0);
                sum.output_error += relative(&out[j * d..(j + 1) * d], &dense[j * d..(j + 1) * d]);
                if !partial && let Some(share) = self.top_k(answer, (i, head), end, scores) {
                    sum.top_k_count += 1;
                    sum.top_k += share;
                }
            }
            sum
        };
        let parts: Vec<Measured> = attended.queries.par_chunks(group * d).enumerate().map(one).collect();
        let mut all = Measured::default();
        parts.into_iter().for_each(|part| all += part);
        all
    }

    /// The share of a head's best candidates among its selected rows, as many as were selected.
    fn top_k(&self, answer: &Answer, (i, head): (usize, usize), end: usize, scores: &[f32]) -> Option<f64> {
        let candidates = self.sinks.min(end)..self.window_start(end - 1);
        let mut selected = vec![false; end];
        for run in answer.tokens(i, head) {
            selected.get_mut(run.token..run.token + run.rows)?.fill(true);
        }
        let rows = selected[candidates.clone()].iter().filter(|selected| **selected).count();
        if rows == 0 {
            return None;
        }
        let mut best: Vec<usize> = candidates.collect();
        if rows < best.len() {
            best.select_nth_unstable_by(rows - 1, |a, b| scores[*b].total_cmp(&scores[*a]));
        }
        Some(best[..rows].iter().filter(|token| selected[**token]).count() as f64 / rows as f64)
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
