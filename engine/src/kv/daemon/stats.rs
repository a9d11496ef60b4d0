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
    /// Share of the true attention that the attended rows cover, summed.
    pub mass: f64,
    /// How many shares `mass` is the sum of.
    pub mass_count: u64,
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
        (self.mass_count > 0).then(|| self.mass / self.mass_count as f64)
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
        self.mass += other.mass;
        self.mass_count += other.mass_count;
    }
}
