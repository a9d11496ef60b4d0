//! `random`: rows drawn at random, the baseline that shows what a budget alone is worth.

use crate::artifact::Artifacts;
use crate::budget::Budget;
use crate::context::SelectContext;
use crate::error::{MethodError, SpecError};
use crate::method::Method;
use crate::needs::Needs;
use crate::options::{OptionWriter, Options};
use crate::registry::Entry;
use crate::scratch::Scratch;
use crate::selection::Selection;
use crate::shape::Shape;
use crate::spec::{MethodSpec, Spec};
use crate::store::Store;

/// The method's name.
pub const NAME: &str = "random";

pub(crate) const ENTRY: Entry = Entry {
    name: NAME,
    about: "random rows",
    parse: |options| Ok(Box::new(RandomSpec::from_options(options)?)),
};

/// What a user chooses: `random:budget=12%,seed=7`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct RandomSpec {
    /// Rows per KV head.
    pub budget: Budget,
    /// Seed of the draw.
    pub seed: u64,
}

impl RandomSpec {
    pub(crate) fn from_options(mut options: Options) -> Result<Self, SpecError> {
        let spec = Self {
            budget: options.take_budget("budget")?.unwrap_or(crate::registry::default_budget()),
            seed: options.take_value("seed", "a whole number", |_| true)?.unwrap_or(0),
        };
        options.finish(&["budget", "seed"])?;
        Ok(spec)
    }
}

impl Spec for RandomSpec {
    fn name(&self) -> &'static str {
        NAME
    }

    fn write(&self, writer: &mut OptionWriter) {
        writer.option("budget", self.budget);
        writer.option_unless("seed", &self.seed, &0);
    }

    fn budget(&self) -> Option<Budget> {
        Some(self.budget)
    }

    fn set_budget(&mut self, budget: Budget) {
        self.budget = budget;
    }

    fn build(&self, shape: &Shape, _artifacts: &Artifacts) -> Result<Box<dyn Method>, MethodError> {
        Ok(Box::new(Random::new(*self, shape)))
    }

    fn boxed(&self) -> Box<dyn Spec> {
        Box::new(*self)
    }
}

/// Draws `B` distinct candidates, anew for every sequence, layer, KV head and step.
#[derive(Debug)]
pub struct Random {
    shape: Shape,
    random: RandomSpec,
    spec: MethodSpec,
}

impl Random {
    /// For a model of that shape.
    #[must_use]
    pub fn new(random: RandomSpec, shape: &Shape) -> Self {
        Self { shape: *shape, random, spec: MethodSpec::new(random) }
    }
}

impl Method for Random {
    fn spec(&self) -> &MethodSpec {
        &self.spec
    }

    fn needs(&self) -> Needs {
        Needs::default()
    }

    fn select(
        &self,
        context: &SelectContext<'_>,
        _store: &mut dyn Store,
        _scratch: &mut Scratch,
        out: &mut Selection,
    ) {
        out.clear();
        let candidates = self.shape.candidates(context.tokens);
        let rows = self.random.budget.rows_of(context.tokens).min(candidates.len());
        for head in context.heads.clone() {
            let mut draw = Draw::new(&[
                self.random.seed,
                context.sequence_seed,
                context.layer as u64,
                head as u64,
                context.step,
            ]);
            // Selection sampling (Knuth, TAOCP 2, 3.4.2, algorithm S): every subset of that size is equally
            // likely, and the tokens come in order.
            let mut wanted = rows;
            for (seen, token) in candidates.clone().enumerate() {
                if wanted == 0 {
                    break;
                }
                if draw.below((candidates.len() - seen) as u64) < wanted as u64 {
                    out.push(token, token + 1);
                    wanted -= 1;
                }
            }
            out.finish_head();
        }
    }
}

/// SplitMix64 (Steele, Lea and Flood, OOPSLA'14): small, seedable, the same on every machine.
#[derive(Debug, Clone)]
pub(crate) struct Draw(u64);

impl Draw {
    pub(crate) fn new(seeds: &[u64]) -> Self {
        let mut draw = Self(0);
        for seed in seeds {
            draw.0 = draw.next() ^ seed;
        }
        draw
    }

    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// A number in `0..bound`; its bias is below `bound / 2^64`.
    pub(crate) fn below(&mut self, bound: u64) -> u64 {
        ((u128::from(self.next()) * u128::from(bound)) >> 64) as u64
    }

    /// Uniform in `[-1, 1)`.
    pub(crate) fn uniform(&mut self) -> f32 {
        (self.next() >> 40) as f32 / (1 << 23) as f32 - 1.0
    }

    /// About normal with variance 1: twelve uniform numbers less six. No function of the platform's is in it.
    pub(crate) fn normal(&mut self) -> f32 {
        const UNIT: f32 = 1.0 / (1 << 24) as f32;
        (0..12).map(|_| (self.next() >> 40) as f32 * UNIT).sum::<f32>() - 6.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::shape::tests::small;
    use crate::store::NoStore;

    fn select(seed: u64, step: u64, tokens: usize) -> Selection {
        let random = RandomSpec { budget: Budget::rows(20).unwrap(), seed };
        let method = Random::new(random, &small());
        let mut out = Selection::new();
        let context =
            SelectContext { sequence_seed: 5, step, ..SelectContext::new(&small(), 1, tokens, &[]) };
        method.select(&context, &mut NoStore, &mut Scratch::new(), &mut out);
        out
    }

    #[test]
    fn the_same_input_draws_the_same_rows_and_another_seed_step_or_head_others() {
        assert_eq!(select(1, 2, 500), select(1, 2, 500));
        assert_ne!(select(1, 2, 500), select(2, 2, 500));
        assert_ne!(select(1, 2, 500), select(1, 3, 500));
        let one = select(1, 2, 500);
        assert_ne!(one.head(0), one.head(1));
    }

    #[test]
    fn exactly_the_budget_is_drawn_from_the_candidates() {
        for tokens in [0, 3, 12, 13, 40, 500] {
            let selection = select(9, tokens as u64, tokens);
            let candidates = small().candidates(tokens);
            for head in 0..2 {
                assert_eq!(selection.rows(head), 20.min(candidates.len()));
                assert!(selection.tokens(head).all(|token| candidates.contains(&(token as usize))));
            }
        }
    }

    #[test]
    fn every_candidate_is_drawn_about_equally_often() {
        let tokens = 112; // 100 candidates, 20 drawn a head
        let mut hits = vec![0_u32; tokens];
        for step in 0..2000 {
            let selection = select(3, step, tokens);
            for head in 0..2 {
                selection.tokens(head).for_each(|token| hits[token as usize] += 1);
            }
        }
        // 4,000 draws with p = 0.2: mean 800, standard deviation 25.3; six of them either side.
        for (token, hits) in hits.iter().enumerate().take(104).skip(4) {
            assert!((648..=952).contains(hits), "token {token} was drawn {hits} times, expected about 800");
        }
    }
}
