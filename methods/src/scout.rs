//! `scout`: blocks as Quest chooses them; the CPU attends those that are not on the device (ScoutAttention, DAC'26,
//! arXiv 2603.27138).
//!
//! *Digest and rank.* Quest's ([`crate::quest`]), in blocks of 32 rows: the paper leaves its digest open, and per-channel bounds
//! are its natural reading. *Selection.* The `⌊B/32⌋` best blocks of each KV head, one layer ahead.
//!
//! *What is not resident is not moved.* The daemon attends it in place with the query that it has and answers with the partial
//! `(o, lse)`; the engine merges, `o = Σ_j o_j·e^{lse_j} / Σ_j e^{lse_j}`. Where more than the share `beta` of a selection is
//! missing, or every `every` steps, the missing blocks are fetched as well, for the steps to come. All of that is the daemon's
//! work ([`CpuAttention`]); this module says when.
//!
//! With `query=predicted`, as in the paper, the CPU's part is computed with the query predicted a layer ahead: an approximation
//! even over the chosen rows. With `query=true` selection and CPU wait for the layer's own query, and attention over the
//! selection is exact.

use crate::artifact::Artifacts;
use crate::bounds::PageBounds;
use crate::budget::Budget;
use crate::context::SelectContext;
use crate::error::{MethodError, SpecError};
use crate::method::{Append, DigestKey, HintNorm, Method};
use crate::needs::{CpuAttention, HintSource, Needs};
use crate::options::{OptionWriter, Options};
use crate::registry::Entry;
use crate::scratch::Scratch;
use crate::selection::Selection;
use crate::shape::Shape;
use crate::spec::{MethodSpec, Spec};
use crate::store::Store;

/// The method's name.
pub const NAME: &str = "scout";

pub(crate) const ENTRY: Entry = Entry {
    name: NAME,
    about: "pages by their bounds; the CPU attends those that are not resident",
    parse: |options| Ok(Box::new(ScoutSpec::from_options(options)?)),
};

/// The paper's block.
const PAGE: usize = 32;
/// The paper's β: the CPU's share of a selection above which it is recalled.
const BETA: f32 = 0.12;

const KNOWN: &[&str] = &["budget", "page", "beta", "every", "query", "hint_norm"];

/// Which query selects, and attends on the CPU.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Query {
    /// The one predicted a layer ahead.
    #[default]
    Predicted,
    /// The layer's own.
    True,
}

const QUERY: &[(&str, Query)] = &[("predicted", Query::Predicted), ("true", Query::True)];

/// What a user chooses: `scout:budget=6%,page=32,beta=0.12,every=0,query=predicted,hint_norm=own`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct ScoutSpec {
    /// Rows per KV head.
    pub budget: Budget,
    /// Rows of a block, a divisor of the arena's page.
    pub page: usize,
    /// The share of a selection, in `[0, 1]`, that may be missing before it is recalled.
    pub beta: f32,
    /// Missing rows are also recalled every so many steps; 0: never for that reason.
    pub every: u64,
    /// Which query selects and attends.
    pub query: Query,
    /// How the engine makes the predicted query.
    pub hint_norm: HintNorm,
}

impl Default for ScoutSpec {
    fn default() -> Self {
        Self {
            budget: crate::registry::default_budget(),
            page: PAGE,
            beta: BETA,
            every: 0,
            query: Query::default(),
            hint_norm: HintNorm::default(),
        }
    }
}

impl ScoutSpec {
    pub(crate) fn from_options(mut options: Options) -> Result<Self, SpecError> {
        let default = Self::default();
        let spec = Self {
            budget: options.take_budget("budget")?.unwrap_or(default.budget),
            page: options
                .take_value("page", "give rows of a block, at least 1", |rows| *rows > 0)?
                .unwrap_or(default.page),
            beta: options
                .take_value("beta", "give a share from 0 to 1", |beta| (0.0..=1.0).contains(beta))?
                .unwrap_or(default.beta),
            every: options
                .take_value("every", "give a number of steps, 0 for never", |_| true)?
                .unwrap_or(default.every),
            query: options.take_word("query", QUERY)?.unwrap_or_default(),
            hint_norm: options.take_word("hint_norm", HintNorm::WORDS)?.unwrap_or_default(),
        };
        options.finish(KNOWN)?;
        Ok(spec)
    }
}

impl Spec for ScoutSpec {
    fn name(&self) -> &'static str {
        NAME
    }

    fn write(&self, writer: &mut OptionWriter) {
        let default = Self::default();
        writer.option("budget", self.budget);
        writer.option_unless("page", &self.page, &default.page);
        writer.option_unless("beta", &self.beta, &default.beta);
        writer.option_unless("every", &self.every, &default.every);
        writer.word_unless("query", QUERY, self.query, default.query);
        writer.word_unless("hint_norm", HintNorm::WORDS, self.hint_norm, default.hint_norm);
    }

    fn budget(&self) -> Option<Budget> {
        Some(self.budget)
    }

    fn set_budget(&mut self, budget: Budget) {
        self.budget = budget;
    }

    fn hint(&self) -> HintSource {
        match self.query {
            Query::Predicted => HintSource::Ahead,
            Query::True => HintSource::Current,
        }
    }

    fn hint_norm(&self) -> Option<HintNorm> {
        (self.query == Query::Predicted).then_some(self.hint_norm)
    }

    fn build(&self, shape: &Shape, _artifacts: &Artifacts) -> Result<Box<dyn Method>, MethodError> {
        Ok(Box::new(Scout::new(*self, shape)?))
    }

    fn boxed(&self) -> Box<dyn Spec> {
        Box::new(*self)
    }
}

/// Selects the blocks whose bounds are highest, and lets the CPU attend what is missing.
#[derive(Debug)]
pub struct Scout {
    bounds: PageBounds,
    scout: ScoutSpec,
    spec: MethodSpec,
}

impl Scout {
    /// For a model of that shape.
    ///
    /// # Errors
    /// [`MethodError::Unsuitable`] where `page` does not divide the arena's page.
    pub fn new(scout: ScoutSpec, shape: &Shape) -> Result<Self, MethodError> {
        let bounds = PageBounds::new(NAME, scout.page, shape)?;
        Ok(Self { bounds, scout, spec: MethodSpec::new(scout) })
    }
}

impl Method for Scout {
    fn spec(&self) -> &MethodSpec {
        &self.spec
    }

    fn needs(&self) -> Needs {
        Needs {
            hint: self.scout.hint(),
            digest: true,
            cpu_attention: Some(CpuAttention {
                recall_above: self.scout.beta,
                recall_every: self.scout.every,
            }),
            ..Needs::default()
        }
    }

    fn digest_key(&self) -> Option<DigestKey> {
        Some(self.bounds.digest_key())
    }

    fn digest_bytes(&self) -> usize {
        self.bounds.digest_bytes()
    }

    fn on_append(&self, append: &Append<'_>, digest: &mut [u8], _memory: &mut [u8], scratch: &mut Scratch) {
        self.bounds.append(append, digest, scratch);
    }

    fn select(
        &self,
        context: &SelectContext<'_>,
        store: &mut dyn Store,
        scratch: &mut Scratch,
        out: &mut Selection,
    ) {
        self.bounds.select(context, self.scout.budget, store, scratch, out);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::build;
    use crate::shape::tests::small;
    use crate::testing::{Rng, Store, logits};
    use kvoyant_kernels::Kernels;
    use proptest::prelude::*;

    fn method(text: &str) -> Box<dyn Method> {
        build(&text.parse().unwrap(), &small(), &Artifacts::none()).unwrap()
    }

    #[test]
    fn it_chooses_the_blocks_that_quest_chooses_and_shares_its_digests() {
        let (scout, quest) = (method("scout:budget=64"), method("quest:budget=64,page=32"));
        assert_eq!(scout.digest_key(), quest.digest_key());
        let mut rng = Rng::new(5);
        let (keys, hint) = (rng.normal(400 * 16), rng.normal(32));
        let [one, two] = [&scout, &quest].map(|method| {
            let mut store = Store::new(&**method, &small(), 0, 400);
            store.append(&**method, &keys, 50);
            store.select(&**method, &hint, &mut Scratch::new())
        });
        assert_eq!(one, two);
        assert!((33..=64).contains(&one.rows(0)), "two blocks, clipped to the candidates");
    }

    #[test]
    fn its_needs_follow_its_options() {
        let needs = method("scout").needs();
        assert_eq!(needs.hint, HintSource::Ahead);
        assert_eq!(needs.cpu_attention, Some(CpuAttention { recall_above: 0.12, recall_every: 0 }));
        let other = method("scout:beta=0.5,every=8,query=true");
        assert_eq!(other.needs().hint, HintSource::Current);
        assert_eq!(other.needs().cpu_attention, Some(CpuAttention { recall_above: 0.5, recall_every: 8 }));
        assert_eq!(other.spec().hint_norm(), None, "a true query needs no norm to be predicted with");
        assert!("scout:beta=2".parse::<MethodSpec>().unwrap_err().to_string().contains("from 0 to 1"));
        assert!("scout:beta=NaN".parse::<MethodSpec>().is_err());
    }

    /// Attention of one query over `tokens`, `(o, lse)`, in f64.
    fn attend(scores: &[f32], values: &[f32], d: usize, tokens: &[usize]) -> (Vec<f64>, f64) {
        let max = tokens.iter().map(|token| f64::from(scores[*token])).fold(f64::NEG_INFINITY, f64::max);
        let mut o = vec![0.0; d];
        let mut sum = 0.0;
        for token in tokens {
            let weight = (f64::from(scores[*token]) - max).exp();
            sum += weight;
            o.iter_mut().zip(&values[token * d..]).for_each(|(o, v)| *o += weight * f64::from(*v));
        }
        if sum > 0.0 {
            o.iter_mut().for_each(|o| *o /= sum);
        }
        (o, if sum > 0.0 { max + sum.ln() } else { f64::NEG_INFINITY })
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(96))]

        /// Any split between device and CPU, an empty side and scores far apart among them.
        #[test]
        fn partials_of_any_split_merge_to_attention_over_the_selection(
            seed: u64,
            split in prop::collection::vec(any::<bool>(), 12),
            side in prop::option::weighted(0.2, any::<bool>()),
            scale in prop::sample::select(vec![0.0_f32, 1.0, 40.0]),
        ) {
            let (shape, scout) = (small(), method("scout:budget=64"));
            let mut rng = Rng::new(seed);
            let (keys, hint, values) = (rng.normal(300 * 16), rng.normal(32), rng.normal(300 * 8));
            let mut store = Store::new(&*scout, &shape, 0, 300);
            store.append(&*scout, &keys, 64);
            let selection = store.select(&*scout, &hint, &mut Scratch::new());
            let scores: Vec<f32> = logits(&shape, &hint, &keys, 0)[..300].iter().map(|s| s * scale).collect();
            let chosen: Vec<usize> = selection.tokens(0).map(|token| token as usize).collect();
            let resident = |token: &usize| side.unwrap_or(split[token / 32]);
            let (hit, miss): (Vec<usize>, Vec<usize>) = chosen.iter().partition(|token| resident(token));
            let single = |(o, lse): (Vec<f64>, f64)| {
                (o.into_iter().map(|o| o as f32).collect::<Vec<f32>>(), lse as f32)
            };
            let (mut o, lse) = single(attend(&scores, &values, 8, &hit));
            let (cpu, cpu_lse) = single(attend(&scores, &values, 8, &miss));
            let mut lse = [lse];
            Kernels::best().merge(&mut o, &mut lse, &cpu, &[cpu_lse]);
            let (whole, _) = attend(&scores, &values, 8, &chosen);
            let norm = whole.iter().map(|o| o * o).sum::<f64>().sqrt();
            let error = o.iter().zip(&whole).map(|(o, w)| (f64::from(*o) - w).powi(2)).sum::<f64>().sqrt();
            prop_assert!(error <= 1e-5 * norm, "error {error} of {norm}");
        }
    }
}
