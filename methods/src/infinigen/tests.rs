//! The method as a whole, against its formulas.

use kvoyant_kernels::Dtype;

use super::*;
use crate::artifact::{Artifact, Artifacts};
use crate::budget::{Budget, Share};
use crate::shape::tests::small;
use crate::testing::{Rng, Store, are_best, logits, matmul, mean_softmax, random_artifact, relative_error};

const TOKENS: usize = 300;

/// A sequence with random keys, and what its method sees.
struct Scene {
    shape: Shape,
    artifact: Arc<SkewArtifact>,
    keys: Vec<f32>,
    hint: Vec<f32>,
}

fn scene(shape: Shape, seed: u64) -> Scene {
    let mut rng = Rng::new(seed);
    let row = shape.kv_heads * shape.head_dim;
    let hint = rng.normal(shape.query_heads * shape.head_dim).iter().map(|value| 2.0 * value).collect();
    Scene { shape, artifact: Arc::new(random_artifact(&shape, seed)), keys: rng.normal(TOKENS * row), hint }
}

impl Scene {
    fn method(&self, options: &str) -> Infinigen {
        let spec: MethodSpec = format!("infinigen:{options}").parse().unwrap();
        let artifacts = [Artifact::Skew(Arc::clone(&self.artifact))].into_iter().collect();
        Infinigen::new(*spec.options().unwrap(), &self.shape, &artifacts).unwrap()
    }

    fn store(&self, method: &Infinigen, chunk: usize) -> Store {
        let mut store = Store::new(method, &self.shape, 1, TOKENS);
        store.append(method, &self.keys, chunk);
        store
    }

    fn select(&self, options: &str) -> Selection {
        let method = self.method(options);
        self.store(&method, 64).select(&method, &self.hint, &mut Scratch::new())
    }

    fn context(&self) -> SelectContext<'_> {
        SelectContext::new(&self.shape, 1, TOKENS, &self.hint)
    }

    /// True logits of the candidates, `[g][candidates]`.
    fn true_logits(&self, head: usize) -> Vec<f32> {
        let candidates = self.shape.candidates(TOKENS);
        let all = logits(&self.shape, &self.hint, &self.keys, head);
        all.chunks(TOKENS).flat_map(|row| row[candidates.clone()].to_vec()).collect()
    }

    /// Logits of the candidates from the columns that the digest keeps, `[g][candidates]`.
    fn predicted_logits(&self, store: &Store, head: usize) -> Vec<f32> {
        let (d, g) = (self.shape.head_dim, self.shape.group());
        let a = self.artifact.matrix(1, head);
        let columns: Vec<usize> = index::columns(store.state(head)).collect();
        let turn = |rows: &[f32]| -> Vec<f32> {
            let turned = matmul(rows, a, rows.len() / d, d, d);
            turned
                .chunks(d)
                .flat_map(|row| columns.iter().map(|column| row[*column]).collect::<Vec<_>>())
                .collect()
        };
        let keys: Vec<f32> =
            HeadRows::keys(&self.keys, &self.shape, head).rows().flatten().copied().collect();
        let keys =
            turn(&keys[self.shape.candidates(TOKENS).start * d..self.shape.candidates(TOKENS).end * d]);
        let queries = turn(&self.hint[head * g * d..(head + 1) * g * d]);
        let n = self.shape.candidates(TOKENS).len();
        let mut scores = crate::testing::matmul_t(&queries, &keys, g, columns.len(), n);
        scores.iter_mut().for_each(|score| *score /= (d as f32).sqrt());
        scores
    }
}

fn candidates_of(selection: &Selection, head: usize, shape: &Shape) -> Vec<usize> {
    selection.tokens(head).map(|token| token as usize - shape.sinks).collect()
}

fn is_superset(large: &Selection, small: &Selection) -> bool {
    (0..2).all(|head| {
        let large: Vec<u32> = large.tokens(head).collect();
        small.tokens(head).all(|token| large.contains(&token))
    })
}

/// Rows above `max − alpha` of each query head.
fn counts(logits: &[f32], n: usize, alpha: f32) -> Vec<usize> {
    logits
        .chunks(n)
        .map(|row| {
            let max = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            row.iter().filter(|score| **score > max - alpha).count()
        })
        .collect()
}

#[test]
fn with_every_column_and_the_true_query_predicted_scores_are_the_true_ones() {
    for (dtype, tolerance) in [(Dtype::F32, 1e-5), (Dtype::F16, 2e-3), (Dtype::Bf16, 5e-3)] {
        let scene = scene(Shape { dtype, ..small() }, 1);
        let method = scene.method("alpha=5,partial=100%");
        let mut store = scene.store(&method, 64);
        let mut scratch = Scratch::new();
        store.with_store(|store| method.rank(&scene.context(), store, &mut scratch));
        let n = scene.shape.candidates(TOKENS).len();
        for head in 0..2 {
            let expected: Vec<f32> =
                mean_softmax(&scene.true_logits(head), n).iter().map(|p| p * 2.0).collect();
            let error = relative_error(&scratch.group[head * n..(head + 1) * n], &expected);
            assert!(error < tolerance, "{dtype}: {error}");
        }
    }
}

#[test]
fn an_infinite_threshold_under_a_full_cap_selects_everything() {
    let scene = scene(small(), 2);
    for partial in ["100%", "30%"] {
        let selection = scene.select(&format!("alpha=inf,cap=100%,partial={partial}"));
        assert_eq!([selection.rows(0), selection.rows(1)], [288, 288]);
        let pages = scene.select(&format!("alpha=inf,cap=300,granularity=page,partial={partial}"));
        assert_eq!([pages.rows(0), pages.rows(1)], [288, 288]);
    }
}

#[test]
fn larger_thresholds_and_caps_and_budgets_select_supersets() {
    let scene = scene(small(), 3);
    for granularity in ["row", "page"] {
        for (name, values, rest) in [
            ("alpha", ["0.5", "1", "2", "3", "5", "9"], "cap=30%"),
            ("cap", ["1", "5", "10%", "90", "50%", "100%"], "alpha=4"),
            ("budget", ["1", "2%", "20", "12%", "50%", "290"], "partial=50%"),
        ] {
            let selections: Vec<Selection> = values
                .iter()
                .map(|value| scene.select(&format!("{name}={value},{rest},granularity={granularity}")))
                .collect();
            for pair in selections.windows(2) {
                assert!(is_superset(&pair[1], &pair[0]), "{name}, {granularity}");
            }
            assert!(selections[5].total_rows() > selections[0].total_rows(), "{name} matters");
        }
    }
}

#[test]
fn the_number_of_rows_is_the_floor_of_the_mean_count_by_brute_force() {
    for seed in 0..12 {
        let scene = scene(small(), seed);
        let n = scene.shape.candidates(TOKENS).len();
        for (partial, alpha) in [("100%", 1.0_f32), ("50%", 2.0), ("30%", 0.5)] {
            let options = format!("alpha={alpha},cap=100%,partial={partial}");
            let store = scene.store(&scene.method(&options), 64);
            let mean = scene.select(&options);
            let per_head = scene.select(&format!("{options},count=head"));
            // What is within rounding of the threshold may fall either way.
            let [low, high] = [alpha - 1e-4, alpha + 1e-4].map(|alpha| {
                (0..2).map(|head| counts(&scene.predicted_logits(&store, head), n, alpha)).collect::<Vec<_>>()
            });
            let all = |counts: &[Vec<usize>]| counts.concat().iter().sum::<usize>() / 4;
            for head in 0..2 {
                assert!((all(&low)..=all(&high)).contains(&mean.rows(head)));
                let own = |counts: &[Vec<usize>]| counts[head].iter().sum::<usize>() / 2;
                assert!((own(&low)..=own(&high)).contains(&per_head.rows(head)));
                let ranks = mean_softmax(&scene.predicted_logits(&store, head), n);
                assert!(are_best(&ranks, &candidates_of(&mean, head, &scene.shape)), "the best by rank");
            }
        }
    }
}

#[test]
fn the_cap_and_the_budget_are_exact_and_at_least_one_row_is_selected() {
    let scene = scene(small(), 5);
    let rows = |options: &str| scene.select(options).rows(1);
    assert_eq!(rows("alpha=inf,cap=17"), 17);
    assert_eq!(rows("alpha=inf,cap=20%"), 60, "of all 300 tokens");
    assert_eq!(rows("budget=6%"), 18);
    assert_eq!(rows("budget=6%,granularity=page"), rows("budget=1,granularity=page"), "one page");
    assert_eq!(rows("alpha=1e-30"), 1);
}

#[test]
fn dropped_mass_is_within_its_bound_when_each_head_counts_for_itself_and_not_with_a_mean() {
    let shape = Shape { query_heads: 2, ..small() };
    let (alpha, n) = (3.0_f32, shape.candidates(TOKENS).len());
    let mut heads_short_of_rows = 0;
    for seed in 0..20 {
        let scene = scene(shape, seed);
        for (count, bound_holds) in [("head", true), ("mean", false)] {
            let selection = scene.select(&format!("alpha={alpha},cap=100%,partial=100%,count={count}"));
            for head in 0..2 {
                let scores = scene.true_logits(head);
                let chosen = candidates_of(&selection, head, &shape);
                let max = scores.iter().copied().fold(f32::NEG_INFINITY, f32::max);
                // Relative to the weight of the best row.
                let dropped: f32 =
                    (0..n).filter(|at| !chosen.contains(at)).map(|at| (scores[at] - max).exp()).sum();
                let bound = (n - chosen.len()) as f32 * (-alpha).exp();
                if bound_holds {
                    assert!(dropped <= bound * 1.001, "{dropped} above {bound}");
                } else if chosen.len() < counts(&scores, n, alpha)[0] {
                    heads_short_of_rows += 1;
                }
            }
        }
    }
    assert!(heads_short_of_rows > 0, "a mean over heads leaves some with fewer rows than they count");
}

#[test]
fn queries_of_low_rank_are_ranked_exactly_by_as_many_columns() {
    const RANK: usize = 3;
    let shape = small();
    let (d, calibration) = (shape.head_dim, 40);
    for seed in 0..6 {
        let mut rng = Rng::new(seed);
        // Every KV head's group asks within a subspace of its own; keys are anything.
        let bases: Vec<Vec<f32>> = (0..shape.kv_heads).map(|_| rng.normal(RANK * d)).collect();
        let mut ask = |tokens: usize| -> Vec<f32> {
            let heads = tokens * shape.query_heads;
            (0..heads)
                .flat_map(|at| {
                    let basis = &bases[at % shape.query_heads / shape.group()];
                    matmul(&rng.normal(RANK), basis, 1, RANK, d)
                })
                .collect()
        };
        let queries = ask(calibration);
        let hint = ask(1);
        let keys = rng.normal(TOKENS * shape.kv_heads * d);
        let mut builder = SkewBuilder::new(&shape).unwrap();
        (0..shape.layers).for_each(|layer| {
            builder.observe(layer, &queries, &keys[..calibration * shape.kv_heads * d]);
        });
        let scene = Scene { shape, artifact: Arc::new(builder.finish().unwrap()), keys, hint };
        // ⌊0.375 · 8⌋ = 3 columns.
        let method = scene.method("budget=20,partial=37.5%");
        assert_eq!(method.columns, RANK);
        let mut store = Store::new(&method, &shape, 1, TOKENS);
        for head in 0..2 {
            let mut sums = vec![0.0; d];
            let rows = HeadRows::queries(&queries, &shape, head);
            column_sums(scene.artifact.matrix(1, head), &rows, &mut sums);
            store.observe(&method, head, &sums);
        }
        store.append(&method, &scene.keys, 64);
        let selection = store.select(&method, &scene.hint, &mut Scratch::new());
        let n = shape.candidates(TOKENS).len();
        for head in 0..2 {
            let ranks = mean_softmax(&scene.true_logits(head), n);
            assert_eq!(selection.rows(head), 20);
            assert!(are_best(&ranks, &candidates_of(&selection, head, &shape)), "recall 1");
        }
    }
}

#[test]
fn a_calibrated_basis_finds_more_of_the_true_rows_than_plain_columns() {
    let shape = Shape { head_dim: 32, ..small() };
    let d = shape.head_dim;
    let mut rng = Rng::new(11);
    // Queries that are strong in a few directions, none of them along a channel.
    let directions = rng.orthogonal(d);
    let mut ask = |tokens: usize| -> Vec<f32> {
        (0..tokens * shape.query_heads)
            .flat_map(|_| {
                let strengths: Vec<f32> = rng
                    .normal(d)
                    .iter()
                    .enumerate()
                    .map(|(at, x)| 3.0 * x * 0.8_f32.powi(at as i32))
                    .collect();
                matmul(&strengths, &directions, 1, d, d)
            })
            .collect()
    };
    let (queries, hint) = (ask(60), ask(1));
    let keys = rng.normal(TOKENS * shape.kv_heads * d);
    let mut builder = SkewBuilder::new(&shape).unwrap();
    (0..2).for_each(|layer| builder.observe(layer, &queries, &keys[..60 * shape.kv_heads * d]));
    let scene = Scene { shape, artifact: Arc::new(builder.finish().unwrap()), keys, hint };
    let found = |options: &str| -> usize {
        let method = scene.method(options);
        let mut store = Store::new(&method, &shape, 1, TOKENS);
        for head in 0..2 {
            let a = method.matrix(1, head).unwrap_or(&[]);
            let mut sums = vec![0.0; d];
            column_sums(a, &HeadRows::queries(&queries, &shape, head), &mut sums);
            store.observe(&method, head, &sums);
        }
        store.append(&method, &scene.keys, 64);
        let chosen = store.select(&method, &scene.hint, &mut Scratch::new());
        let n = shape.candidates(TOKENS).len();
        (0..2)
            .map(|head| {
                let ranks = mean_softmax(&scene.true_logits(head), n);
                let mut best: Vec<usize> = (0..n).collect();
                best.sort_by(|&i, &j| ranks[j].total_cmp(&ranks[i]));
                let chosen = candidates_of(&chosen, head, &shape);
                best[..30].iter().filter(|id| chosen.contains(id)).count()
            })
            .sum()
    };
    let (skewed, plain) = (found("budget=30"), found("budget=30,skew=off"));
    assert!(skewed >= 48 && skewed > plain, "of 60 true rows: skewed {skewed}, plain {plain}");
}

#[test]
fn the_order_of_query_heads_within_a_group_does_not_matter() {
    let scene = scene(small(), 6);
    let mut swapped = Scene { hint: scene.hint.clone(), keys: scene.keys.clone(), ..scene };
    swapped.hint[..16].rotate_left(8);
    for options in ["budget=20", "alpha=2", "budget=40,granularity=page"] {
        assert_eq!(scene_select(&swapped, &scene.hint, options), swapped.select(options));
    }
}

fn scene_select(scene: &Scene, hint: &[f32], options: &str) -> Selection {
    let method = scene.method(options);
    scene.store(&method, 64).select(&method, hint, &mut Scratch::new())
}

#[test]
fn digesting_row_by_row_selects_what_digesting_in_bulk_selects() {
    for dtype in Dtype::ALL {
        let scene = scene(Shape { dtype, ..small() }, 7);
        let method = scene.method("budget=25,partial=50%");
        let [one, many] = [1, 64].map(|chunk| scene.store(&method, chunk));
        let kernels = Kernels::best();
        let (n, stored) = (TOKENS / 32, digest::dtype(dtype));
        for (head, page) in (0..2).flat_map(|head| (0..n).map(move |page| (head, page))) {
            let [one, many] = [&one, &many].map(|store| {
                let bytes = store.page(head, page);
                let mut values = vec![0.0; bytes.len() / stored.bytes()];
                kernels.to_f32(stored, bytes, &mut values);
                values
            });
            assert!(relative_error(&one, &many) < 1e-3, "{dtype}");
        }
    }
}

#[test]
fn pages_are_ranked_by_their_best_row() {
    let scene = scene(small(), 8);
    let selection = scene.select("budget=96,granularity=page,partial=100%");
    let candidates = scene.shape.candidates(TOKENS);
    for head in 0..2 {
        let ranks = mean_softmax(&scene.true_logits(head), candidates.len());
        let best: Vec<f32> = (0..candidates.end.div_ceil(32))
            .map(|page| {
                let rows = (page * 32).max(4)..((page + 1) * 32).min(candidates.end);
                rows.map(|token| ranks[token - 4]).fold(0.0, f32::max)
            })
            .collect();
        let mut chosen: Vec<usize> = selection.tokens(head).map(|token| token as usize / 32).collect();
        chosen.dedup();
        assert_eq!(chosen.len(), 3);
        assert!(are_best(&best, &chosen));
        let rows: usize =
            chosen.iter().map(|page| ((page + 1) * 32).min(candidates.end) - (page * 32).max(4)).sum();
        assert_eq!(selection.rows(head), rows);
    }
}

#[test]
fn a_planted_key_that_the_query_points_at_is_always_selected() {
    for seed in 0..10 {
        let mut scene = scene(small(), seed);
        let token = 4 + (seed as usize * 29) % 288;
        for head in 0..2 {
            for j in 0..8 {
                let query = scene.hint[head * 16 + j] + scene.hint[head * 16 + 8 + j];
                scene.keys[token * 16 + head * 8 + j] = 4.0 * query;
            }
        }
        let selection = scene.select("budget=1%,partial=100%");
        assert!((0..2).all(|head| selection.tokens(head).any(|chosen| chosen as usize == token)));
    }
}

#[test]
fn a_limited_pool_keeps_its_capacity_while_decoding_and_never_gives_back_what_left() {
    for (pool, granularity) in [("60", "row"), ("60", "page"), ("50%", "row")] {
        let scene = scene(small(), 9);
        let method = scene.method(&format!("budget=10,partial=50%,pool={pool},granularity={granularity}"));
        let limits = method.pool.unwrap();
        let mut store = Store::new(&method, &scene.shape, 1, TOKENS);
        let (mut rng, mut scratch) = (Rng::new(4), Scratch::new());
        store.append(&method, &scene.keys[..100 * 16], 100);
        for token in 100..TOKENS {
            store.append(&method, &scene.keys[token * 16..(token + 1) * 16], 1);
            let selection = store.select(&method, &rng.normal(32), &mut scratch);
            for head in 0..2 {
                let victims = &store.victims[head];
                assert!(selection.tokens(head).all(|token| !victims.contains(&token)));
                assert!(selection.rows(head) > 0);
                let alive = store.tokens() - victims.len();
                assert!(
                    alive <= limits.capacity(store.tokens()),
                    "{alive} alive of {} tokens",
                    store.tokens()
                );
                assert!(victims.iter().all(|victim| *victim >= 4));
            }
        }
        let mut distinct = store.victims[0].clone();
        distinct.sort_unstable();
        distinct.dedup();
        assert_eq!(distinct.len(), store.victims[0].len(), "no token leaves twice");
        assert_eq!(store.victims[0].len(), TOKENS - limits.capacity(TOKENS));
    }
}

#[test]
fn statistics_choose_the_columns_and_say_whether_digests_are_void() {
    let scene = scene(small(), 10);
    let method = scene.method("budget=10,partial=50%");
    let mut store = Store::new(&method, &scene.shape, 1, TOKENS);
    assert_eq!(index::columns(store.state(0)).collect::<Vec<_>>(), [0, 1, 2, 3], "strongest in calibration");
    let sums = [0.0, 9.0, 1.0, 8.0, 2.0, 7.0, 3.0, 6.0];
    assert!(store.observe(&method, 0, &sums));
    assert_eq!(index::columns(store.state(0)).collect::<Vec<_>>(), [1, 3, 5, 7]);
    assert!(!store.observe(&method, 0, &sums));
    assert_eq!(index::columns(store.state(1)).collect::<Vec<_>>(), [0, 1, 2, 3], "of the other head nothing");
}

#[test]
fn sizes_follow_from_the_share_of_columns() {
    let shape = Shape { head_dim: 64, dtype: Dtype::F16, ..small() };
    let options = InfinigenSpec { skew: false, ..InfinigenSpec::default() };
    let method = Infinigen::new(options, &shape, &Artifacts::none()).unwrap();
    assert_eq!(method.columns, 19, "⌊0.3 · 64⌋");
    assert_eq!((method.digest_bytes(), method.head_state_bytes()), (19 * 32 * 2, 19 * 2));
    assert_eq!(method.memory_bytes(100), 0);
    let all = InfinigenSpec { partial: Share::new(1.0).unwrap(), ..options };
    assert_eq!(all.columns(64), 64);
    let pool = InfinigenSpec { pool: Some(Budget::rows(12).unwrap()), ..options };
    assert!(
        Infinigen::new(pool, &shape, &Artifacts::none()).unwrap_err().to_string().contains("13 at least")
    );
}
