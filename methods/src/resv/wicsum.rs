//! WiCSum: clusters in falling order of score until their weighted sum exceeds a share of the total.

use super::spec::Score;

/// How finely scores are sorted before a bucket is sorted in full.
const BUCKETS: usize = 64;

/// Calls `take` for the clusters taken, best first (of equal scores the first): the fewest whose weights sum to more than `ratio` of
/// the total. Clusters of size 0 are not there. `scores` are `q·c̄`, `scale` is `1/√d`.
///
/// Only as many buckets of the score's range are sorted as are needed, from the top. The order within and between buckets is that of
/// a full sort, and so is every sum.
pub(super) fn wicsum(
    score: Score,
    ratio: f64,
    scores: &[f32],
    sizes: &[u32],
    scale: f32,
    order: &mut Vec<u32>,
    mut take: impl FnMut(usize),
) {
    let there = || scores.iter().zip(sizes).enumerate().filter(|(_, (_, size))| **size > 0);
    let (mut min, mut max, mut count) = (f32::INFINITY, f32::NEG_INFINITY, 0);
    for (_, (score, _)) in there() {
        (min, max, count) = (min.min(*score), max.max(*score), count + 1);
    }
    let weight = |at: usize| {
        let each = match score {
            Score::Softmax => f64::from((scores[at] - max) * scale).exp(),
            Score::Raw => f64::from(scores[at]),
        };
        each * f64::from(sizes[at])
    };
    let threshold = ratio * there().map(|(at, _)| weight(at)).sum::<f64>();

    // A larger score never falls into a later bucket: subtraction and product keep order, rounded or not.
    let width = max - min;
    let fine = if width > 0.0 && width.is_finite() { BUCKETS as f32 / width } else { 0.0 };
    let bucket = |score: f32| (((max - score) * fine) as usize).min(BUCKETS - 1);
    let mut ends = [0_usize; BUCKETS + 1];
    for (_, (score, _)) in there() {
        ends[bucket(*score) + 1] += 1;
    }
    (1..=BUCKETS).for_each(|at| ends[at] += ends[at - 1]);
    order.clear();
    order.resize(count, 0);
    let mut next = ends;
    for (at, (score, _)) in there() {
        let place = &mut next[bucket(*score)];
        order[*place] = at as u32;
        *place += 1;
    }

    let mut sum = 0.0;
    for range in ends.windows(2) {
        let members = &mut order[range[0]..range[1]];
        members.sort_unstable_by(|a, b| scores[*b as usize].total_cmp(&scores[*a as usize]).then(a.cmp(b)));
        for at in members.iter().map(|at| *at as usize) {
            take(at);
            sum += weight(at);
            if sum > threshold {
                return;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn bucketed(score: Score, ratio: f64, scores: &[f32], sizes: &[u32]) -> Vec<usize> {
        let mut taken = Vec::new();
        wicsum(score, ratio, scores, sizes, 0.5, &mut Vec::new(), |at| taken.push(at));
        taken
    }

    /// The definition, by a full sort.
    fn sorted(score: Score, ratio: f64, scores: &[f32], sizes: &[u32]) -> Vec<usize> {
        let mut order: Vec<usize> = (0..scores.len()).filter(|at| sizes[*at] > 0).collect();
        let max = order.iter().map(|at| scores[*at]).fold(f32::NEG_INFINITY, f32::max);
        let weight = |at: &usize| {
            let each = match score {
                Score::Softmax => f64::from((scores[*at] - max) * 0.5).exp(),
                Score::Raw => f64::from(scores[*at]),
            };
            each * f64::from(sizes[*at])
        };
        let total: f64 = order.iter().map(weight).sum();
        order.sort_by(|a, b| scores[*b].total_cmp(&scores[*a]));
        let mut sum = 0.0;
        let last = order.iter().position(|at| {
            sum += weight(at);
            sum > ratio * total
        });
        order.truncate(last.map_or(order.len(), |last| last + 1));
        order
    }

    fn score() -> impl Strategy<Value = f32> {
        prop_oneof![
            6 => -8.0_f32..8.0,
            1 => prop::sample::select(vec![0.0, 1.0, -1.0, 1e30, -1e30, 1e-40, 88.0]),
        ]
    }

    proptest! {
        #[test]
        fn buckets_give_what_a_full_sort_gives(
            clusters in prop::collection::vec((score(), 0_u32..50), 0..300),
            ratio in 0.001_f64..1.0,
            mode in prop::sample::select(vec![Score::Softmax, Score::Raw]),
        ) {
            let (scores, sizes): (Vec<f32>, Vec<u32>) = clusters.into_iter().unzip();
            prop_assert_eq!(bucketed(mode, ratio, &scores, &sizes), sorted(mode, ratio, &scores, &sizes));
        }

        #[test]
        fn a_larger_ratio_never_takes_less_and_none_is_taken_in_vain(
            clusters in prop::collection::vec((-8.0_f32..8.0, 1_u32..50), 1..200),
            ratio in 0.001_f64..0.9,
        ) {
            let (scores, sizes): (Vec<f32>, Vec<u32>) = clusters.into_iter().unzip();
            let taken = bucketed(Score::Softmax, ratio, &scores, &sizes);
            let more = bucketed(Score::Softmax, ratio + 0.1, &scores, &sizes);
            prop_assert_eq!(&more[..taken.len()], &taken[..]);
            let max = scores.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            let weight = |at: usize| f64::from((scores[at] - max) * 0.5).exp() * f64::from(sizes[at]);
            let total: f64 = (0..scores.len()).map(weight).sum();
            let but_last: f64 = taken[..taken.len() - 1].iter().map(|at| weight(*at)).sum();
            prop_assert!(but_last <= ratio * total);
        }
    }

    #[test]
    fn almost_no_ratio_takes_one_cluster_and_equal_scores_go_by_number() {
        assert_eq!(bucketed(Score::Softmax, 1e-9, &[1.0, 3.0, 3.0], &[1, 1, 1]), [1]);
        assert_eq!(bucketed(Score::Softmax, 0.5, &[2.0; 4], &[1; 4]), [0, 1, 2]);
        assert_eq!(bucketed(Score::Raw, 0.3, &[3.0, -9.0], &[1, 1]), [0], "a sum below 0 is passed at once");
        assert_eq!(bucketed(Score::Raw, 0.3, &[-1.0, -3.0], &[5, 1]), [0, 1], "or never");
        assert!(bucketed(Score::Softmax, 0.3, &[1.0], &[0]).is_empty());
        assert!(bucketed(Score::Softmax, 0.3, &[], &[]).is_empty());
    }
}
