//! What decode steps cost and covered.

use std::time::Duration;

use kvoyant_client::Completion;
use kvoyant_methods::Certificate;

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
    /// Restarts of the daemon that answers have told of: it was restarted or replaced since the answer before, and the session went on.
    pub restarts: u64,
    /// Selections of a layer that this process made itself, for one sequence each.
    pub selected_here: u64,
    /// Time spent waiting for answers.
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
    /// The daemon's time in selection and planning, and that of this process's threads, added up.
    pub select: Duration,
    /// The daemon's time from plan to the last byte.
    pub transfer: Duration,
    /// Rows that the daemon's CPU attended instead of moving them.
    pub rows_cpu: u64,
    /// Time spent on attention rows for methods that learn from them: computing them and handing them over.
    pub feedback: Duration,
    /// Bytes of keys that attention rows over all tokens read beyond the rows attended: on a device they would have to be moved.
    pub feedback_bytes: u64,
    /// What was attended by other rows than the method's.
    pub fallbacks: Fallbacks,
    /// What answers say that they may have missed.
    pub certified: Certified,
    /// How far selected layers were from dense attention, where that was measured.
    pub measured: Measured,
}

/// Layers that were not attended as the method has it, because an answer was late or the daemon was lost; counted for each sequence.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Fallbacks {
    /// Attended to all rows, without the daemon.
    pub alone: u64,
    /// Attended to sinks, window and the rows of the layer's last answer ([`Fallback::Partial`](kvoyant_client::Fallback)).
    pub partial: u64,
    /// Attended to sinks and window alone ([`Fallback::ResidentOnly`](kvoyant_client::Fallback)).
    pub resident_only: u64,
    /// Rows that these left out, all KV heads together.
    pub rows_left_out: u64,
    /// Estimates of rows left out that were late, and are left out too.
    pub estimates: u64,
}

impl Fallbacks {
    /// Whether there were none.
    #[must_use]
    pub fn is_none(&self) -> bool {
        *self == Self::default()
    }
}

impl std::ops::AddAssign for Fallbacks {
    fn add_assign(&mut self, other: Self) {
        self.alone += other.alone;
        self.partial += other.partial;
        self.resident_only += other.resident_only;
        self.rows_left_out += other.rows_left_out;
        self.estimates += other.estimates;
    }
}

/// Upper ends of the bins of [`Certified::missed`].
pub(super) const MISSED_BINS: [f64; 7] = [1e-4, 1e-3, 0.003, 0.01, 0.03, 0.1, 0.3];

/// What certificates say, over query heads, layers and steps: how far each layer's attention can be from dense attention over the same
/// rows, for this layer's own queries. They say nothing about other layers or the text.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Certified {
    /// How many query heads were certified.
    pub heads: u64,
    /// Sum of the attention that they may have missed at most.
    pub missed_mass: f64,
    /// The largest.
    pub worst: f64,
    /// Query heads by the attention that they may have missed: up to each of 0.0001, 0.001, 0.003, 0.01, 0.03, 0.1 and 0.3, then more.
    pub missed: [u64; 8],
}

impl Certified {
    pub(super) fn add(&mut self, certificate: &Certificate) {
        let missed = f64::from(certificate.missed_mass);
        self.heads += 1;
        self.missed_mass += missed;
        self.worst = self.worst.max(missed);
        self.missed[MISSED_BINS.iter().position(|end| missed <= *end).unwrap_or(MISSED_BINS.len())] += 1;
    }

    /// Mean attention that a query head may have missed at most.
    #[must_use]
    pub fn mean(&self) -> Option<f64> {
        mean(self.missed_mass, self.heads)
    }
}

impl std::ops::AddAssign for Certified {
    fn add_assign(&mut self, other: Self) {
        self.heads += other.heads;
        self.missed_mass += other.missed_mass;
        self.worst = self.worst.max(other.worst);
        self.missed.iter_mut().zip(other.missed).for_each(|(sum, other)| *sum += other);
    }
}

/// How far selected layers are from dense attention over the same stored rows: sums over query heads, layers and steps.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Measured {
    /// How many query heads the sums are over.
    pub count: u64,
    /// Sum of the true attention probabilities of the attended rows. Of rows that the daemon's CPU attended, those count that the true query
    /// asked for; others, which an answer does not name, only where it attended all that the session did not: else the sum is a lower
    /// bound.
    pub mass: f64,
    /// `‖o − o*‖ / ‖o*‖`, `o*` being the output of dense attention.
    pub output_error: f64,
    /// How many KV heads `top_k` is over: those where something was selected, and all of it is known by token.
    pub top_k_count: u64,
    /// Query heads whose certificate was compared with the truth, and of those, how many it did not hold for: none, or something is wrong.
    pub certified: u64,
    /// See above.
    pub violations: u64,
    /// What certificates say of the missed attention over what was missed: query heads in bins of 5 %, from 1 on.
    pub ratios: Ratios,
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
        self.certified += other.certified;
        self.violations += other.violations;
        self.ratios.0.iter_mut().zip(other.ratios.0).for_each(|(sum, other)| *sum += other);
    }
}

/// Ratios from 1 on in bins of 5 %, the last of which takes all that are larger.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Ratios([u32; RATIO_BINS]);

const RATIO_BINS: usize = 96;
const RATIO_STEP: f64 = 1.05;

impl Default for Ratios {
    fn default() -> Self {
        Self([0; RATIO_BINS])
    }
}

impl Ratios {
    pub(super) fn add(&mut self, ratio: f64) {
        let bin = (ratio.max(1.0).ln() / RATIO_STEP.ln()) as usize;
        self.0[bin.min(RATIO_BINS - 1)] += 1;
    }

    /// The upper end of the bin that half of them do not reach beyond.
    #[must_use]
    pub fn median(&self) -> Option<f64> {
        let all: u32 = self.0.iter().sum();
        let mut below = 0;
        let bin = self.0.iter().position(|count| {
            below += count;
            2 * below >= all
        });
        bin.filter(|_| all > 0).map(|bin| RATIO_STEP.powi(bin as i32 + 1))
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

    /// Counts an answer, and whether another daemon gave it than the newest before, whose `generation` is known.
    pub(super) fn answered(&mut self, wait: Duration, completion: &Completion, generation: &mut u32) {
        self.answers += 1;
        let newer = completion.generation.wrapping_sub(*generation).cast_signed();
        // One that was given before, and is looked at later, tells nothing new.
        if newer > 0 {
            self.restarts += u64::from(newer.unsigned_abs());
            *generation = completion.generation;
        }
        self.wait += wait;
        self.rows_selected += u64::from(completion.rows_selected);
        self.rows_hit += u64::from(completion.rows_hit);
        self.rows_in_place += u64::from(completion.rows_in_place);
        self.rows_resident += u64::from(completion.rows_resident);
        self.bytes_moved += completion.bytes_moved;
        self.select += Duration::from_nanos(u64::from(completion.select_ns));
        self.transfer += Duration::from_nanos(u64::from(completion.transfer_ns));
    }

    /// A layer's rows, as an answer would have said it, and those that its true query asked for later.
    pub(super) fn selected_here(&mut self, (rows, exact): (usize, usize), time: Duration) {
        self.selected_here += 1;
        self.rows_selected += (rows + exact) as u64;
        self.rows_in_place += rows as u64;
        self.select += time;
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
        self.restarts += other.restarts;
        self.selected_here += other.selected_here;
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
        self.fallbacks += other.fallbacks;
        self.certified += other.certified;
        self.measured += other.measured;
    }
}
