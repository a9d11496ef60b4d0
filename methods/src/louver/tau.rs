//! Thresholds from a sample of the candidates.

use std::ops::Range;

use super::spec::Tau;
use crate::random::Draw;

/// Row `at` of a sample of `count` of the candidates: one drawn from each of `count` stretches of equal length, always the
/// same one. A sample of all of them is all of them.
pub(super) fn sampled(at: usize, count: usize, candidates: &Range<usize>) -> usize {
    let len = candidates.len() as u128;
    let edge = |at: usize| (at as u128 * len / count as u128) as usize;
    let (first, end) = (edge(at), edge(at + 1));
    candidates.start + first + Draw::new(&[at as u64]).below((end - first).max(1) as u64) as usize
}

/// The threshold by the scores of a sample, which are put in falling order. The budget asks for `wanted` of `all` candidates.
pub(super) fn threshold(tau: Tau, scores: &mut [f32], wanted: usize, all: usize) -> f32 {
    scores.sort_unstable_by(|a, b| b.total_cmp(a));
    let Some(&largest) = scores.first() else { return f32::INFINITY };
    match tau {
        Tau::SampleMax => largest,
        Tau::Budget(_) => {
            let rank = (wanted as u128 * scores.len() as u128 / all.max(1) as u128) as usize;
            scores[rank.clamp(1, scores.len()) - 1]
        }
        Tau::SampleGap => {
            let upper = &scores[..scores.len().div_ceil(2).max(2).min(scores.len())];
            below_gap(upper).unwrap_or(largest)
        }
    }
}

/// In falling scores, the one below the uppermost of the three widest gaps.
fn below_gap(scores: &[f32]) -> Option<f32> {
    // The three widest so far, as (width, where).
    let mut widest = [(f32::NEG_INFINITY, usize::MAX); 3];
    for (at, pair) in scores.windows(2).enumerate() {
        let width = pair[0] - pair[1];
        if let Some(place) = widest.iter().position(|(known, _)| width > *known) {
            widest[place..].rotate_right(1);
            widest[place] = (width, at);
        }
    }
    let first = widest.iter().map(|(_, at)| *at).min()?;
    scores.get(first.checked_add(1)?).copied()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::budget::Budget;

    #[test]
    fn a_sample_has_one_row_of_each_stretch_and_a_full_one_every_row() {
        let candidates = 10..1010;
        let rows: Vec<usize> = (0..64).map(|at| sampled(at, 64, &candidates)).collect();
        assert!(rows.windows(2).all(|pair| pair[0] < pair[1]));
        assert!(
            rows.iter()
                .enumerate()
                .all(|(at, row)| (row - 10) * 64 / 1000 == at || (row - 10) * 64 / 1000 + 1 >= at)
        );
        assert!(rows.iter().all(|row| candidates.contains(row)));
        let all: Vec<usize> = (0..1000).map(|at| sampled(at, 1000, &candidates)).collect();
        assert_eq!(all, candidates.collect::<Vec<_>>());
        assert_eq!(sampled(0, 1, &(7..8)), 7);
    }

    #[test]
    fn thresholds_of_known_scores_are_those_of_the_definitions() {
        let falling: Vec<f32> = (0..100).rev().map(|value| value as f32).collect();
        let of = |tau, wanted| threshold(tau, &mut falling.clone(), wanted, 1000);
        let budget = Tau::Budget(Budget::rows(1).unwrap());
        assert_eq!(of(Tau::SampleMax, 0), 99.0);
        assert_eq!(of(budget, 100), 90.0, "a tenth of the sample: the tenth score");
        assert_eq!((of(budget, 1), of(budget, 1000), of(budget, 5000)), (99.0, 0.0, 0.0));
        // Gaps of 5 after 20, 3 after 12 and 4 after 9; the upper half decides.
        let mut gaps = [20.0, 15.0, 14.0, 13.0, 12.0, 9.0, 5.0, 4.0, 3.0, 2.0, 1.0, 0.5];
        assert_eq!(threshold(Tau::SampleGap, &mut gaps, 0, 0), 15.0);
        // Gaps of 2.7, 1.9 and 1.9 in the upper half, below four scores that lie close together.
        let mut late = vec![9.0, 8.9, 8.8, 8.7, 6.0, 5.9, 4.0, 3.9, 2.0, 1.9, 1.8];
        late.extend([0.5; 11]);
        assert_eq!(threshold(Tau::SampleGap, &mut late, 0, 0), 6.0);
    }

    #[test]
    fn samples_of_none_one_and_equal_scores_have_a_threshold() {
        for tau in [Tau::SampleMax, Tau::SampleGap, Tau::Budget(Budget::rows(3).unwrap())] {
            assert_eq!(threshold(tau, &mut [], 3, 0), f32::INFINITY);
            assert_eq!(threshold(tau, &mut [2.0], 3, 9), 2.0);
            assert_eq!(threshold(tau, &mut [2.0; 9], 3, 9), 2.0);
            assert_eq!(threshold(tau, &mut [2.0, 2.0], 3, 9), 2.0);
        }
    }
}
