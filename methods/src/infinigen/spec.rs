//! What a user chooses of `infinigen`.

use crate::artifact::{ArtifactKind, Artifacts};
use crate::budget::{Budget, Share};
use crate::error::{MethodError, SpecError};
use crate::method::{HintNorm, Method};
use crate::needs::HintSource;
use crate::options::{OptionWriter, Options};
use crate::registry::constant_share;
use crate::shape::Shape;
use crate::spec::Spec;

/// The threshold for Llama-2 in the reference's scripts (OPT: 4), in logits after the scaling by `1/√d`.
pub const ALPHA: f32 = 5.0;
/// The reference's cap, a share of the context.
pub const CAP: f64 = 0.2;
/// The share of columns that the paper settles on.
pub const PARTIAL: f64 = 0.3;

/// How many rows each KV head gets.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Amount {
    /// Just so many.
    Budget(Budget),
    /// As many as score above the best one's score minus `alpha`, at most `cap`.
    Threshold {
        /// The distance to the best score, in logits after the scaling by `1/√d`, above 0.
        alpha: f32,
        /// The limit per KV head.
        cap: Budget,
    },
}

/// Over what the counts of the threshold rule are averaged.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Count {
    /// Over all query heads of the request's layer: every KV head gets as many.
    #[default]
    Mean,
    /// Over the query heads of each KV head.
    Head,
}

/// What is selected as one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Granularity {
    /// Single rows, as in the paper.
    #[default]
    Row,
    /// Pages of the arena, by their best row.
    Page,
}

/// From what the columns of the partial index are chosen.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum IndexRule {
    /// `Σ_t |q̃_tj|`, as the reference's offload system has it.
    #[default]
    Query,
    /// `Σ_t |q̃_tj| + |k̃_tj|`.
    Both,
}

const COUNT: &[(&str, Count)] = &[("mean", Count::Mean), ("head", Count::Head)];
const GRANULARITY: &[(&str, Granularity)] = &[("row", Granularity::Row), ("page", Granularity::Page)];
const INDEX: &[(&str, IndexRule)] = &[("query", IndexRule::Query), ("both", IndexRule::Both)];
const SKEW: &[(&str, bool)] = &[("on", true), ("off", false)];
const KNOWN: &[&str] = &[
    "budget",
    "alpha",
    "cap",
    "partial",
    "count",
    "granularity",
    "index",
    "skew",
    "pool",
    "hint",
    "hint_norm",
];

/// What a user chooses: `infinigen:budget=12%,granularity=page` or
/// `infinigen:alpha=5,cap=20%,partial=30%,count=mean,pool=80%`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct InfinigenSpec {
    /// How many rows each KV head gets: `budget`, or else `alpha` and `cap`.
    pub amount: Amount,
    /// The share `r` of the `d` columns that the digest keeps.
    pub partial: Share,
    /// How the counts of the threshold rule are averaged.
    pub count: Count,
    /// Rows or pages.
    pub granularity: Granularity,
    /// How columns are chosen.
    pub index: IndexRule,
    /// Whether keys and queries are turned into the calibrated basis first; off is an ablation.
    pub skew: bool,
    /// Tokens of a sequence that each KV head keeps, where there is a limit.
    pub pool: Option<Budget>,
    /// Which query selects; ahead in the paper.
    pub hint: HintSource,
    /// How the engine makes a hint ahead of its layer.
    pub hint_norm: HintNorm,
}

impl Default for InfinigenSpec {
    /// The threshold rule with the constants of this module.
    fn default() -> Self {
        Self {
            amount: Amount::Threshold { alpha: ALPHA, cap: Budget::Share(constant_share(CAP)) },
            partial: constant_share(PARTIAL),
            count: Count::default(),
            granularity: Granularity::default(),
            index: IndexRule::default(),
            skew: true,
            pool: None,
            hint: HintSource::Ahead,
            hint_norm: HintNorm::default(),
        }
    }
}

impl InfinigenSpec {
    /// Columns of the digest for heads of dimension `head_dim`, `d' = ⌊r·d⌋`, at least 1.
    #[must_use]
    pub fn columns(&self, head_dim: usize) -> usize {
        self.partial.of(head_dim)
    }

    pub(crate) fn from_options(mut options: Options) -> Result<Self, SpecError> {
        let default = Self::default();
        let budget = options.take_budget("budget")?;
        let alpha =
            options.take_value("alpha", "give a number above 0, or `inf`", |alpha: &f32| *alpha > 0.0)?;
        let cap = options.take_budget("cap")?;
        let amount = match (budget, alpha, cap) {
            (Some(_), Some(_), _) => {
                return Err(SpecError::Conflict {
                    first: "budget",
                    second: "alpha",
                    reason: "a budget fixes the number of rows, the threshold finds it",
                });
            }
            (Some(_), _, Some(_)) => {
                return Err(SpecError::Conflict {
                    first: "budget",
                    second: "cap",
                    reason: "a cap limits the threshold rule only",
                });
            }
            (Some(budget), None, None) => Amount::Budget(budget),
            (None, alpha, cap) => Amount::Threshold {
                alpha: alpha.unwrap_or(ALPHA),
                cap: cap.unwrap_or(Budget::Share(constant_share(CAP))),
            },
        };
        let spec = Self {
            amount,
            partial: options.take_share("partial")?.unwrap_or(default.partial),
            count: options.take_word("count", COUNT)?.unwrap_or_default(),
            granularity: options.take_word("granularity", GRANULARITY)?.unwrap_or_default(),
            index: options.take_word("index", INDEX)?.unwrap_or_default(),
            skew: options.take_word("skew", SKEW)?.unwrap_or(default.skew),
            pool: options.take_budget("pool")?,
            hint: options.take_word("hint", HintSource::QUERIES)?.unwrap_or(default.hint),
            hint_norm: options.take_word("hint_norm", HintNorm::WORDS)?.unwrap_or_default(),
        };
        options.finish(KNOWN)?;
        Ok(spec)
    }
}

impl Spec for InfinigenSpec {
    fn name(&self) -> &'static str {
        super::NAME
    }

    fn write(&self, writer: &mut OptionWriter) {
        let default = Self::default();
        match self.amount {
            Amount::Budget(budget) => writer.option("budget", budget),
            Amount::Threshold { alpha, cap } => {
                writer.option("alpha", alpha);
                writer.option("cap", cap);
            }
        }
        writer.option_unless("partial", &self.partial, &default.partial);
        writer.word_unless("count", COUNT, self.count, default.count);
        writer.word_unless("granularity", GRANULARITY, self.granularity, default.granularity);
        writer.word_unless("index", INDEX, self.index, default.index);
        writer.word_unless("skew", SKEW, self.skew, default.skew);
        if let Some(pool) = self.pool {
            writer.option("pool", pool);
        }
        writer.word_unless("hint", HintSource::QUERIES, self.hint, default.hint);
        writer.word_unless("hint_norm", HintNorm::WORDS, self.hint_norm, default.hint_norm);
    }

    fn budget(&self) -> Option<Budget> {
        match self.amount {
            Amount::Budget(budget) => Some(budget),
            Amount::Threshold { .. } => None,
        }
    }

    fn set_budget(&mut self, budget: Budget) {
        // A budget turns the threshold rule off.
        self.amount = Amount::Budget(budget);
    }

    fn hint(&self) -> HintSource {
        self.hint
    }

    fn hint_norm(&self) -> Option<HintNorm> {
        Some(self.hint_norm)
    }

    fn artifact(&self) -> Option<ArtifactKind> {
        self.skew.then_some(ArtifactKind::Skew)
    }

    fn build(&self, shape: &Shape, artifacts: &Artifacts) -> Result<Box<dyn Method>, MethodError> {
        Ok(Box::new(super::Infinigen::new(*self, shape, artifacts)?))
    }

    fn boxed(&self) -> Box<dyn Spec> {
        Box::new(*self)
    }
}
