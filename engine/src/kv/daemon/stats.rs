//! What decode steps cost and covered.

use std::time::Duration;

use kvoyant_client::Completion;

/// Sums over decode steps.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct StepStats {
    /// Steps.
    pub steps: u64,
    /// Tokens made: one per sequence and step.
    pub tokens: u64,
    /// Tokens of context of every sequence and step, the new one included.
    pub context_tokens: u64,
    /// Answers of the daemon, one per selected layer and step.
    pub answers: u64,
    /// Time spent waiting for them.
    pub wait: Duration,
    /// Rows selected, all layers and KV heads together.
    pub rows_selected: u64,
    /// Of these, rows that were on the device already.
    pub rows_hit: u64,
    /// Of these, rows that were read in place.
    pub rows_in_place: u64,
    /// Rows that selected layers keep on the device, summed over steps.
    pub rows_resident: u64,
    /// Bytes that were copied.
    pub bytes_moved: u64,
    /// The daemon's time in selection and planning.
    pub select: Duration,
    /// The daemon's time from plan to the last byte.
    pub transfer: Duration,
    /// Rows that the daemon's CPU attended instead of moving them.
    pub rows_cpu: u64,
    /// Time spent on attention rows for methods that learn from them: computing them and handing them over.
    pub feedback: Duration,
    /// Bytes of keys that attention rows over all tokens read beyond the rows attended: on a device they would have to be moved.
    pub feedback_bytes: u64,
    /// How far selected layers were from dense attention, where that was measured.
    pub measured: Measured,
}

/// How far selected layers are from dense attention over the same stored rows: sums over query heads, layers and steps.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Measured {
    /// How many query heads the sums are over.
    pub count: u64,
    /// Sum of the true attention probabilities of the attended rows. Rows that the daemon's CPU attended count where it attended
    /// all that the session did not: an answer does not name them, and else the sum is a lower bound.
    pub mass: f64,
    /// `‖o − o*‖ / ‖o*‖`, `o*` being the output of dense attention.
    pub output_error: f64,
    /// How many KV heads `top_k` is over: those where something was selected, and all of it is known by token.
    pub top_k_count: u64,
    /// Share of the true top-k among the selected rows, k as many as were selected; ranked by the mean over the group's query heads.
    pub top_k: f64,
}

impl Measured {
    /// Mean share of the true attention that the attended rows covered.
    #[must_use]
    pub fn attention_mass(&self) -> Option<f64> {
        mean(self.mass, self.count)
    }

    /// Mean share of the true attention that was left out.
    #[must_use]
    pub fn missed_mass(&self) -> Option<f64> {
        self.attention_mass().map(|mass| 1.0 - mass)
    }

    /// Mean relative error of the attention's output.
    #[must_use]
    pub fn output_error(&self) -> Option<f64> {
        mean(self.output_error, self.count)
    }

    /// Mean share of the true top-k that was selected.
    #[must_use]
    pub fn top_k_recall(&self) -> Option<f64> {
        mean(self.top_k, self.top_k_count)
    }
}

impl std::ops::AddAssign for Measured {
    fn add_assign(&mut self, other: Self) {
        self.count += other.count;
        self.mass += other.mass;
        self.output_error += other.output_error;
        self.top_k_count += other.top_k_count;
        self.top_k += other.top_k;
    }
}

fn mean(sum: f64, count: u64) -> Option<f64> {
    (count > 0).then(|| sum / count as f64)
}

impl StepStats {
    pub(super) fn begin(&mut self, batch: usize, positions: &[usize]) {
        self.steps += 1;
        self.tokens += batch as u64;
        self.context_tokens += positions.iter().map(|position| *position as u64 + 1).sum::<u64>();
    }

    pub(super) fn answered(&mut self, wait: Duration, completion: &Completion) {
        self.answers += 1;
        self.wait += wait;
        self.rows_selected += u64::from(completion.rows_selected);
        self.rows_hit += u64::from(completion.rows_hit);
        self.rows_in_place += u64::from(completion.rows_in_place);
        self.rows_resident += u64::from(completion.rows_resident);
        self.bytes_moved += completion.bytes_moved;
        self.select += Duration::from_nanos(u64::from(completion.select_ns));
        self.transfer += Duration::from_nanos(u64::from(completion.transfer_ns));
    }

    /// Mean share of the true attention that the attended rows covered, if it was measured.
    #[must_use]
    pub fn attention_mass(&self) -> Option<f64> {
        self.measured.attention_mass()
    }

    /// Share of the selected rows that did not have to be copied.
    #[must_use]
    pub fn hit_rate(&self) -> Option<f64> {
        let there = self.rows_hit + self.rows_in_place;
        (self.rows_selected > 0).then(|| there as f64 / self.rows_selected as f64)
    }
}

impl std::ops::AddAssign for StepStats {
    fn add_assign(&mut self, other: Self) {
        self.steps += other.steps;
        self.tokens += other.tokens;
        self.context_tokens += other.context_tokens;
        self.answers += other.answers;
        self.wait += other.wait;
        self.rows_selected += other.rows_selected;
        self.rows_hit += other.rows_hit;
        self.rows_in_place += other.rows_in_place;
        self.rows_resident += other.rows_resident;
        self.bytes_moved += other.bytes_moved;
        self.select += other.select;
        self.transfer += other.transfer;
        self.rows_cpu += other.rows_cpu;
        self.feedback += other.feedback;
        self.feedback_bytes += other.feedback_bytes;
        self.measured += other.measured;
    }
}
