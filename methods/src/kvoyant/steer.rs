//! One threshold for all layers and heads of a sequence, steered so that the mean number of rows is the budget's.
//!
//! Until there is a threshold, every head gets its budget; the geometric mean of the shares at which those end is the first one. After
//! each step it moves by what was selected over what was wanted, and what was too much or too little is made good within some steps.

use crate::context::SelectContext;

/// Bytes of what a sequence keeps.
pub(super) const BYTES: usize = 48;
/// Steps in which what was too much or too little is made good.
const HORIZON: f64 = 8.0;
/// How far the threshold moves in a step at most, either way.
const MOST: f64 = 4.0;

/// What a sequence keeps of its steps.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub(super) struct Steering {
    /// The share of the attention that a row must have; 0: none yet.
    share: f64,
    /// The step that the sums are of, by the tokens of its sequence.
    tokens: u64,
    /// Rows selected in it so far.
    selected: f64,
    /// Rows wanted.
    wanted: f64,
    /// Rows that were wanted before, and not selected.
    debt: f64,
    /// Sum of the logarithms of the shares at which selections ended, and how many of them.
    cuts: f32,
    count: f32,
}

impl Steering {
    /// Of zeros or anything else: numbers that cannot be become none.
    pub(super) fn read(bytes: &[u8]) -> Self {
        let f64_at = |at: usize| -> f64 {
            let value =
                bytes.get(at..at + 8).and_then(<[u8]>::first_chunk).map_or(0.0, |b| f64::from_le_bytes(*b));
            if value.is_finite() { value } else { 0.0 }
        };
        let f32_at = |at: usize| -> f32 {
            bytes.get(at..at + 4).and_then(<[u8]>::first_chunk).map_or(0.0, |b| f32::from_le_bytes(*b))
        };
        Self {
            share: f64_at(0),
            tokens: f64_at(8) as u64,
            selected: f64_at(16),
            wanted: f64_at(24),
            debt: f64_at(32),
            cuts: f32_at(40),
            count: f32_at(44),
        }
    }

    pub(super) fn write(&self, bytes: &mut [u8]) {
        let words = [self.share, self.tokens as f64, self.selected, self.wanted, self.debt];
        let words = words.into_iter().flat_map(f64::to_le_bytes);
        let all = words.chain([self.cuts, self.count].into_iter().flat_map(f32::to_le_bytes));
        bytes.iter_mut().zip(all).for_each(|(to, from)| *to = from);
    }

    /// The threshold of a step, once there is one.
    pub(super) fn share(&self, context: &SelectContext<'_>) -> Option<f32> {
        let now = self.at(context);
        (now.share > 0.0).then_some(now.share as f32)
    }

    /// As of a step: the one before is over.
    fn at(&self, context: &SelectContext<'_>) -> Self {
        if self.tokens == context.tokens as u64 || self.wanted <= 0.0 {
            return Self { tokens: context.tokens as u64, ..*self };
        }
        let debt = (self.debt + self.wanted - self.selected).clamp(-4.0 * self.wanted, 4.0 * self.wanted);
        let share = if self.share > 0.0 {
            let target = (self.wanted + debt / HORIZON).max(self.wanted / MOST);
            self.share * (self.selected / target).clamp(1.0 / MOST, MOST)
        } else if self.count > 0.0 {
            f64::from(self.cuts / self.count).exp()
        } else {
            0.0
        };
        Self { share: share.min(1.0), tokens: context.tokens as u64, debt, ..Self::default() }
    }

    /// Takes note of a layer's selection, and of the shares at which its heads' budgets ended.
    pub(super) fn note(&mut self, context: &SelectContext<'_>, selected: usize, wanted: usize, cuts: &[f32]) {
        *self = self.at(context);
        self.selected += selected as f64;
        self.wanted += wanted as f64;
        for cut in cuts.iter().filter(|cut| cut.is_finite() && **cut > 0.0) {
            self.cuts += cut.ln();
            self.count += 1.0;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::shape::tests::small;

    /// Runs so many steps in which a layer selects `rows(share)`.
    fn run(steps: usize, budget: usize, rows: impl Fn(usize, f64) -> usize) -> (Steering, f64) {
        let mut bytes = [0; BYTES];
        let (mut selected, mut wanted) = (0, 0);
        for step in 0..steps {
            let context = SelectContext::new(&small(), 0, 1000 + step, &[]);
            for layer in 0..4 {
                let mut steering = Steering::read(&bytes);
                let now = match steering.share(&context) {
                    Some(share) => rows(layer, f64::from(share)),
                    None => budget,
                };
                steering.note(&context, now, budget, &[1e-3]);
                steering.write(&mut bytes);
                (selected, wanted) = (selected + now, wanted + budget);
            }
        }
        (Steering::read(&bytes), selected as f64 / wanted as f64)
    }

    #[test]
    fn the_mean_is_the_budgets_however_layers_differ() {
        // Heavy tails: as many rows are above a share as a power of it says, each layer having its own.
        let rows = |layer: usize, share: f64| (share.powf(-0.7) * [0.1, 0.4, 2.0, 0.02][layer]) as usize;
        let (_, mean) = run(200, 40, rows);
        assert!((mean - 1.0).abs() < 0.02, "{mean}");
    }

    #[test]
    fn rows_that_do_not_follow_the_threshold_move_it_no_further_than_to_its_ends() {
        let (steering, _) = run(50, 40, |_, _| 400);
        assert!(steering.share > 0.5 && steering.share <= 1.0, "{steering:?}");
        let (steering, _) = run(500, 40, |_, _| 0);
        assert!(steering.share >= 0.0 && steering.share < 1e-30, "{steering:?}");
    }

    #[test]
    fn bytes_that_are_no_numbers_are_a_fresh_start() {
        let context = SelectContext::new(&small(), 0, 1000, &[]);
        assert_eq!(Steering::read(&[0xff; BYTES]).share(&context), None);
        assert_eq!(Steering::read(&[]).share(&context), None);
        let mut steering = Steering::default();
        steering.note(&context, 3, 4, &[0.25, f32::INFINITY, 0.0]);
        let mut bytes = [0; BYTES];
        steering.write(&mut bytes);
        assert_eq!(Steering::read(&bytes), steering);
        assert_eq!(steering.share(&context), None, "a step's own selections do not move it");
        let next = SelectContext::new(&small(), 0, 1001, &[]);
        assert!((steering.share(&next).unwrap() - 0.25).abs() < 1e-6);
    }
}
