//! Options of `resv`.

use crate::artifact::Artifacts;
use crate::budget::{Budget, Share};
use crate::error::{MethodError, SpecError};
use crate::method::{HintNorm, Method};
use crate::needs::HintSource;
use crate::options::{OptionWriter, Options};
use crate::registry::constant_share;
use crate::spec::Spec;

/// The paper's share of the weighted score sum.
const RATIO: f64 = 0.3;
/// The paper's Hamming distance, below which a key joins a cluster.
const DISTANCE: u32 = 7;
/// Tokens after which a cluster that gets none is closed.
const RECENT: usize = 1024;
/// Most of them: every new key is compared with the cluster of each.
const RECENT_MAX: usize = 4096;
/// Clusters for each token, at most.
const CLUSTERS: f64 = 0.25;

const KNOWN: &[&str] =
    &["budget", "ratio", "score", "distance", "recent", "clusters", "seed", "hint", "hint_norm"];

/// What a cluster counts for in the sum whose share is to be reached.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Score {
    /// `exp(q·c̄/√d − max)·size`: attention mass, always positive.
    #[default]
    Softmax,
    /// `q·c̄·size`, as the paper's equations are written. Where scores are negative the rule ends at the first cluster, or never.
    Raw,
}

const SCORE: &[(&str, Score)] = &[("softmax", Score::Softmax), ("raw", Score::Raw)];

/// What a user chooses: `resv:ratio=30%,budget=6%,distance=7,recent=1024,clusters=25%,hint=ahead`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct ResvSpec {
    /// Rows per KV head at most, where there is a limit.
    pub budget: Option<Budget>,
    /// The share of the weighted sum that the clusters taken have to exceed.
    pub ratio: Share,
    /// What is summed.
    pub score: Score,
    /// Hamming distance of 32-bit hashes below which a key joins a cluster, 1 to 33.
    pub distance: u32,
    /// A key joins only clusters that got one of the last so many tokens.
    pub recent: usize,
    /// Clusters per token, at most.
    pub clusters: Share,
    /// Seed of the hyperplanes.
    pub seed: u64,
    /// Which query selects.
    pub hint: HintSource,
    /// How the engine makes a hint ahead of its layer.
    pub hint_norm: HintNorm,
}

impl Default for ResvSpec {
    fn default() -> Self {
        Self {
            budget: None,
            ratio: constant_share(RATIO),
            score: Score::default(),
            distance: DISTANCE,
            recent: RECENT,
            clusters: constant_share(CLUSTERS),
            seed: 0,
            hint: HintSource::Ahead,
            hint_norm: HintNorm::default(),
        }
    }
}

impl ResvSpec {
    pub(crate) fn from_options(mut options: Options) -> Result<Self, SpecError> {
        let default = Self::default();
        let distance = |distance: &u32| (1..=33).contains(distance);
        let spec = Self {
            budget: options.take_budget("budget")?,
            ratio: options.take_share("ratio")?.unwrap_or(default.ratio),
            score: options.take_word("score", SCORE)?.unwrap_or_default(),
            distance: options
                .take_value("distance", "give a Hamming distance from 1 to 33", distance)?
                .unwrap_or(default.distance),
            recent: options
                .take_value("recent", "give a number of tokens from 1 to 4096", |tokens| {
                    (1..=RECENT_MAX).contains(tokens)
                })?
                .unwrap_or(default.recent),
            clusters: options.take_share("clusters")?.unwrap_or(default.clusters),
            seed: options.take_value("seed", "give a whole number", |_| true)?.unwrap_or(default.seed),
            hint: options.take_word("hint", HintSource::QUERIES)?.unwrap_or(default.hint),
            hint_norm: options.take_word("hint_norm", HintNorm::WORDS)?.unwrap_or_default(),
        };
        options.finish(KNOWN)?;
        Ok(spec)
    }
}

impl Spec for ResvSpec {
    fn name(&self) -> &'static str {
        super::NAME
    }

    fn write(&self, writer: &mut OptionWriter) {
        let default = Self::default();
        if let Some(budget) = self.budget {
            writer.option("budget", budget);
        }
        writer.option_unless("ratio", &self.ratio, &default.ratio);
        writer.word_unless("score", SCORE, self.score, default.score);
        writer.option_unless("distance", &self.distance, &default.distance);
        writer.option_unless("recent", &self.recent, &default.recent);
        writer.option_unless("clusters", &self.clusters, &default.clusters);
        writer.option_unless("seed", &self.seed, &default.seed);
        writer.word_unless("hint", HintSource::QUERIES, self.hint, default.hint);
        writer.word_unless("hint_norm", HintNorm::WORDS, self.hint_norm, default.hint_norm);
    }

    fn budget(&self) -> Option<Budget> {
        self.budget
    }

    fn set_budget(&mut self, budget: Budget) {
        self.budget = Some(budget);
    }

    fn hint(&self) -> HintSource {
        self.hint
    }

    fn hint_norm(&self) -> Option<HintNorm> {
        (self.hint == HintSource::Ahead).then_some(self.hint_norm)
    }

    fn build(&self, shape: &crate::Shape, _artifacts: &Artifacts) -> Result<Box<dyn Method>, MethodError> {
        Ok(Box::new(super::Resv::new(*self, shape)))
    }

    fn boxed(&self) -> Box<dyn Spec> {
        Box::new(*self)
    }
}
