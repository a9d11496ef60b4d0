//! `oracle`: the true best rows, the rest dropped: what selection alone can reach, at the price of scoring every key.
//!
//! A row's score is the mean over the group's query heads (and query tokens) of its share of the attention, `e^s / (Σ e^s + F)` with
//! `s = q·k_t/√d` and the keys as they are stored: `Σ` is over the candidates, and `F` is what the query gives to sinks and window, if that
//! is known ([`SelectContext::floors`]) and 0 otherwise. The `B` best rows of each KV head are taken. With `hint=current`, the default, and
//! floors, nothing that picks as many rows per KV head covers more of the group's attention; `ahead` and `previous` show what a perfect
//! digest would make of a predicted query.

use kvoyant_kernels::Kernels;

use crate::artifact::Artifacts;
use crate::budget::Budget;
use crate::context::SelectContext;
use crate::error::{MethodError, SpecError};
use crate::method::{HintNorm, Method};
use crate::needs::{HintSource, Needs};
use crate::options::{OptionWriter, Options};
use crate::registry::{Entry, default_budget};
use crate::scratch::Scratch;
use crate::selection::Selection;
use crate::shape::Shape;
use crate::spec::{MethodSpec, Spec};
use crate::store::Store;

/// The method's name.
pub const NAME: &str = "oracle";

pub(crate) const ENTRY: Entry = Entry {
    name: NAME,
    about: "the true best rows, by every key: what selection alone can reach",
    parse: |options| Ok(Box::new(OracleSpec::from_options(options)?)),
};

/// What a user chooses: `oracle:budget=6%,hint=current`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct OracleSpec {
    /// Rows per KV head.
    pub budget: Budget,
    /// Which query selects.
    pub hint: HintSource,
    /// How the engine makes a hint ahead of its layer.
    pub hint_norm: HintNorm,
}

impl OracleSpec {
    fn from_options(mut options: Options) -> Result<Self, SpecError> {
        let spec = Self {
            budget: options.take_budget("budget")?.unwrap_or(default_budget()),
            hint: options.take_word("hint", HintSource::QUERIES)?.unwrap_or(HintSource::Current),
            hint_norm: options.take_word("hint_norm", HintNorm::WORDS)?.unwrap_or_default(),
        };
        options.finish(&["budget", "hint", "hint_norm"])?;
        Ok(spec)
    }
}

impl Spec for OracleSpec {
    fn name(&self) -> &'static str {
        NAME
    }

    fn write(&self, writer: &mut OptionWriter) {
        writer.option("budget", self.budget);
        writer.word_unless("hint", HintSource::QUERIES, self.hint, HintSource::Current);
        writer.word_unless("hint_norm", HintNorm::WORDS, self.hint_norm, HintNorm::default());
    }

    fn budget(&self) -> Option<Budget> {
        Some(self.budget)
    }

    fn set_budget(&mut self, budget: Budget) {
        self.budget = budget;
    }

    fn hint(&self) -> HintSource {
        self.hint
    }

    fn hint_norm(&self) -> Option<HintNorm> {
        Some(self.hint_norm)
    }

    fn build(&self, shape: &Shape, _artifacts: &Artifacts) -> Result<Box<dyn Method>, MethodError> {
        Ok(Box::new(Oracle::new(*self, shape)))
    }

    fn boxed(&self) -> Box<dyn Spec> {
        Box::new(*self)
    }
}

/// Selects the true best rows.
#[derive(Debug)]
pub struct Oracle {
    shape: Shape,
    options: OracleSpec,
    spec: MethodSpec,
    kernels: Kernels,
}

impl Oracle {
    /// For a model of that shape.
    #[must_use]
    pub fn new(options: OracleSpec, shape: &Shape) -> Self {
        Self { shape: *shape, options, spec: MethodSpec::new(options), kernels: Kernels::best() }
    }
}

impl Method for Oracle {
    fn spec(&self) -> &MethodSpec {
        &self.spec
    }

    fn needs(&self) -> Needs {
        Needs { hint: self.options.hint, rows: true, floors: true, ..Needs::default() }
    }

    fn select(
        &self,
        context: &SelectContext<'_>,
        _store: &mut dyn Store,
        scratch: &mut Scratch,
        out: &mut Selection,
    ) {
        out.clear();
        let Scratch { block, scores, factors, group, ids, top, .. } = scratch;
        let candidates = self.shape.candidates(context.tokens);
        let (n, g) = (candidates.len(), context.group(&self.shape));
        let wanted = self.options.budget.rows_of(context.tokens).min(n);
        let scale = 1.0 / (self.shape.head_dim as f32).sqrt();
        for head in context.heads.clone() {
            if wanted == n {
                out.push(candidates.start, candidates.end);
                out.finish_head();
                continue;
            }
            scores.clear();
            scores.resize(g * n, 0.0);
            let queries = context.group_queries(&self.shape, head, block);
            context.rows.scores(head, candidates.clone(), queries, scores);
            factors.clear();
            for (query, scores) in scores.chunks_exact_mut(n).enumerate() {
                scores.iter_mut().for_each(|score| *score *= scale);
                let floor = context.floor(&self.shape, head, query).unwrap_or(f32::NEG_INFINITY);
                let largest = self.kernels.max(scores).max(floor);
                if largest == f32::NEG_INFINITY {
                    scores.fill(0.0);
                    factors.push(0.0);
                    continue;
                }
                let sum = self.kernels.exp_in_place(scores, largest) + (floor - largest).exp();
                factors.push(1.0 / sum);
            }
            group.clear();
            group.resize(n, 0.0);
            self.kernels.mix_rows(scores, n, factors, group);
            self.kernels.top_k(group, wanted, top, ids);
            for token in ids.iter().map(|id| candidates.start + *id as usize) {
                out.push(token, token + 1);
            }
            out.finish_head();
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::replay::Replay;
    use crate::shape::tests::small;
    use crate::testing::{Rng, are_best, logits, mean_softmax};

    fn oracle(budget: usize) -> Oracle {
        let hint = HintSource::Current;
        let hint_norm = HintNorm::Own;
        Oracle::new(OracleSpec { budget: Budget::rows(budget).unwrap(), hint, hint_norm }, &small())
    }

    fn select(budget: usize, keys: &[f32], hint: &[f32], floors: &[f32]) -> Selection {
        let method = oracle(budget);
        let mut replay = Replay::new(&method, &small(), 0, 8);
        replay.append(&method, keys, 50);
        let context = SelectContext { floors, ..SelectContext::new(&small(), 0, replay.tokens(), hint) };
        replay.select_with(&method, &context, &mut Scratch::new())
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(48))]

        #[test]
        fn the_rows_with_most_attention_are_taken_whatever_the_keys(
            tokens in 1_usize..200, budget in 1_usize..40, kind in 0_usize..4, floored: bool, seed: u64,
        ) {
            let shape = small();
            let mut rng = Rng::new(seed);
            let mut keys = rng.normal(tokens * 16);
            match kind {
                0 => {}
                1 => keys.fill(0.0),
                2 => keys.iter_mut().step_by(16).for_each(|value| *value *= 30.0),
                _ => keys.fill(0.5),
            }
            let hint = rng.normal(32);
            let candidates = shape.candidates(tokens);
            let all = |head| logits(&shape, &hint, &keys, head);
            // What each query gives to all that is attended anyway.
            let beside = |row: &[f32]| {
                let rows = row.iter().enumerate().filter(|(t, _)| !candidates.contains(t));
                rows.map(|(_, score)| f64::from(*score).exp()).sum::<f64>().ln() as f32
            };
            let floors: Vec<f32> = (0..2).flat_map(|head| all(head).chunks(tokens).map(beside).collect::<Vec<_>>()).collect();
            let selection = select(budget, &keys, &hint, if floored { &floors } else { &[] });
            for head in 0..2 {
                prop_assert_eq!(selection.rows(head), budget.min(candidates.len()));
                let n = candidates.len();
                if n == 0 {
                    continue;
                }
                let all = all(head);
                let seen = if floored { 0..tokens } else { candidates.clone() };
                let scores: Vec<f32> = all.chunks(tokens).flat_map(|row| row[seen.clone()].to_vec()).collect();
                let shares = mean_softmax(&scores, seen.len());
                let shares = &shares[candidates.start - seen.start..][..n];
                let chosen: Vec<usize> =
                    selection.tokens(head).map(|token| token as usize - candidates.start).collect();
                prop_assert!(are_best(shares, &chosen));
            }
        }
    }

    #[test]
    fn a_planted_row_is_found_by_both_query_heads_of_its_group() {
        let mut rng = Rng::new(3);
        let (mut keys, hint) = (rng.normal(300 * 16), rng.normal(32));
        // Row 150 of KV head 1 points where its second query head looks.
        for j in 0..8 {
            keys[150 * 16 + 8 + j] = hint[24 + j] * 20.0;
        }
        let selection = select(1, &keys, &hint, &[]);
        assert_eq!(selection.tokens(1).collect::<Vec<_>>(), [150]);
    }

    #[test]
    fn a_query_that_looks_at_sinks_and_window_has_little_to_say() {
        let mut rng = Rng::new(4);
        let (mut keys, mut hint) = (rng.normal(100 * 16), rng.normal(32));
        keys.iter_mut().for_each(|value| *value *= 0.1);
        // The two query heads of KV head 0 look at one row each, the first a little harder.
        hint[..16].fill(0.0);
        (hint[0], hint[8 + 1]) = (8_f32.sqrt(), 8_f32.sqrt());
        (keys[40 * 16], keys[60 * 16 + 1]) = (9.0, 8.5);
        let first = |floors: &[f32]| select(1, &keys, &hint, floors).tokens(0).collect::<Vec<_>>();
        assert_eq!(first(&[]), [40]);
        assert_eq!(first(&[9.0, -9.0, 0.0, 0.0]), [60], "half of what the first gives is given elsewhere");
        assert_eq!(first(&[f32::NEG_INFINITY; 4]), [40]);
    }
}
