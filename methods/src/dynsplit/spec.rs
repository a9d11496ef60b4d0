//! What a user chooses of `dynsplit`.

use crate::artifact::Artifacts;
use crate::budget::Budget;
use crate::error::{MethodError, SpecError};
use crate::method::{HintNorm, Method};
use crate::needs::{HintSource, mark};
use crate::options::{OptionWriter, Options};
use crate::shape::Shape;
use crate::spec::Spec;

use super::{Dynsplit, NAME};

/// Where blocks may end.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Boundary {
    /// At the best candidate within the limits, else at the longest length.
    #[default]
    Dynamic,
    /// Every `page` tokens.
    Fixed,
}

impl Boundary {
    const WORDS: &'static [(&'static str, Self)] = &[("dynamic", Self::Dynamic), ("fixed", Self::Fixed)];
}

/// What makes one candidate better than another.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Score {
    /// How much the keys after it differ from those before it.
    #[default]
    Keys,
    /// How strong its mark is.
    Marks,
}

impl Score {
    const WORDS: &'static [(&'static str, Self)] = &[("keys", Self::Keys), ("marks", Self::Marks)];
}

/// What is kept of a block.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Digest {
    /// Per channel the smallest and the largest key value: Quest's bound.
    #[default]
    Bounds,
    /// The mean key.
    Mean,
}

impl Digest {
    const WORDS: &'static [(&'static str, Self)] = &[("bounds", Self::Bounds), ("mean", Self::Mean)];
}

/// Words of the option `candidates`: the weakest mark that may end a block.
const MARKS: &[(&str, u8)] =
    &[("word", mark::WORD), ("clause", mark::CLAUSE), ("sentence", mark::SENTENCE), ("line", mark::LINE)];

/// The longest block that a user may ask for: the tokens that wait for a decision are kept as f32.
const LONGEST: usize = 1024;

/// What a user chooses: `dynsplit:budget=6%,min=8,max=64,score=keys`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct DynsplitSpec {
    /// Rows per KV head.
    pub budget: Budget,
    /// Where blocks may end.
    pub boundary: Boundary,
    /// Fewest tokens of a block.
    pub min: usize,
    /// Most tokens of a block.
    pub max: usize,
    /// Tokens of a block with fixed boundaries.
    pub page: usize,
    /// What makes one candidate better than another.
    pub score: Score,
    /// The weakest mark that makes a token a candidate.
    pub candidates: u8,
    /// What is kept of a block.
    pub digest: Digest,
    /// Which query selects.
    pub hint: HintSource,
    /// How the engine makes a hint ahead of its layer.
    pub hint_norm: HintNorm,
}

impl Default for DynsplitSpec {
    fn default() -> Self {
        Self {
            budget: crate::registry::default_budget(),
            boundary: Boundary::default(),
            min: 8,
            max: 64,
            page: 16,
            score: Score::default(),
            candidates: mark::CLAUSE,
            digest: Digest::default(),
            hint: HintSource::Ahead,
            hint_norm: HintNorm::default(),
        }
    }
}

impl DynsplitSpec {
    pub(crate) fn from_options(mut options: Options) -> Result<Self, SpecError> {
        let default = Self::default();
        let mut tokens = |key: &str, default: usize| {
            let expected = format!("give tokens of a block, 1 to {LONGEST}");
            let found = options.take_value(key, &expected, |tokens| (1..=LONGEST).contains(tokens))?;
            Ok::<usize, SpecError>(found.unwrap_or(default))
        };
        let (min, max, page) =
            (tokens("min", default.min)?, tokens("max", default.max)?, tokens("page", default.page)?);
        if min > max {
            return Err(SpecError::Conflict {
                first: "min",
                second: "max",
                reason: "the shortest block would be longer than the longest",
            });
        }
        let spec = Self {
            budget: options.take_budget("budget")?.unwrap_or(default.budget),
            boundary: options.take_word("boundary", Boundary::WORDS)?.unwrap_or_default(),
            min,
            max,
            page,
            score: options.take_word("score", Score::WORDS)?.unwrap_or_default(),
            candidates: options.take_word("candidates", MARKS)?.unwrap_or(default.candidates),
            digest: options.take_word("digest", Digest::WORDS)?.unwrap_or_default(),
            hint: options.take_word("hint", HintSource::QUERIES)?.unwrap_or(default.hint),
            hint_norm: options.take_word("hint_norm", HintNorm::WORDS)?.unwrap_or_default(),
        };
        options.finish(&[
            "budget",
            "boundary",
            "min",
            "max",
            "page",
            "score",
            "candidates",
            "digest",
            "hint",
            "hint_norm",
        ])?;
        Ok(spec)
    }
}

impl Spec for DynsplitSpec {
    fn name(&self) -> &'static str {
        NAME
    }

    fn write(&self, writer: &mut OptionWriter) {
        let default = Self::default();
        writer.option("budget", self.budget);
        writer.word_unless("boundary", Boundary::WORDS, self.boundary, default.boundary);
        writer.option_unless("min", &self.min, &default.min);
        writer.option_unless("max", &self.max, &default.max);
        writer.option_unless("page", &self.page, &default.page);
        writer.word_unless("score", Score::WORDS, self.score, default.score);
        writer.word_unless("candidates", MARKS, self.candidates, default.candidates);
        writer.word_unless("digest", Digest::WORDS, self.digest, default.digest);
        writer.word_unless("hint", HintSource::QUERIES, self.hint, default.hint);
        writer.word_unless("hint_norm", HintNorm::WORDS, self.hint_norm, default.hint_norm);
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
        (self.hint == HintSource::Ahead).then_some(self.hint_norm)
    }

    fn build(&self, shape: &Shape, _artifacts: &Artifacts) -> Result<Box<dyn Method>, MethodError> {
        Ok(Box::new(Dynsplit::new(*self, shape)))
    }

    fn boxed(&self) -> Box<dyn Spec> {
        Box::new(*self)
    }
}
