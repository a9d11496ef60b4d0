//! Options of `louver`.

use crate::artifact::Artifacts;
use crate::budget::Budget;
use crate::error::{MethodError, SpecError};
use crate::method::{HintNorm, Method};
use crate::needs::HintSource;
use crate::options::{OptionWriter, Options};
use crate::spec::Spec;

/// Rows of a group.
const GROUP: usize = 8;
/// Rows of the sample that thresholds come from.
const SAMPLE: usize = 256;

/// A group is a part of a page, and no page has more rows.
const GROUP_MAX: usize = 4096;
/// Every query is scored with the whole sample.
const SAMPLE_MAX: usize = 1 << 16;

const KNOWN: &[&str] = &["tau", "budget", "cap", "group", "sample", "gate", "hint", "hint_norm"];

/// Where each query's threshold comes from. All of them are scores of a sample of the candidates, and inclusive.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Tau {
    /// The score that the budget's share of the sample reaches: about so many rows for each query.
    Budget(Budget),
    /// The sample's largest score: about one row in so many as the sample has.
    SampleMax,
    /// The score below the uppermost of the three widest gaps in the sample's upper half.
    SampleGap,
}

#[derive(Debug, Clone, Copy, PartialEq)]
enum TauWord {
    Budget,
    SampleMax,
    SampleGap,
}

const TAU: &[(&str, TauWord)] =
    &[("budget", TauWord::Budget), ("sample-max", TauWord::SampleMax), ("sample-gap", TauWord::SampleGap)];

/// What a group is left out by.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Gate {
    /// Its upper bound: no row at or above the threshold is lost.
    #[default]
    Sound,
    /// The score of its centre, without a radius: **loses rows**. What the reference's fast path prunes by, kept for comparison.
    Centre,
}

const GATE: &[(&str, Gate)] = &[("sound", Gate::Sound), ("centre", Gate::Centre)];

/// What a user chooses: `louver:budget=6%,cap=12%,group=8,sample=256,hint=current` or `louver:tau=sample-gap`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct LouverSpec {
    /// Where thresholds come from.
    pub tau: Tau,
    /// Rows per KV head beyond which only the best are taken, and the guarantee is lost.
    pub cap: Option<Budget>,
    /// Rows of a group, a divisor of the arena's page.
    pub group: usize,
    /// Rows of the sample.
    pub sample: usize,
    /// What groups are left out by.
    pub gate: Gate,
    /// Which query selects.
    pub hint: HintSource,
    /// How the engine makes a hint ahead of its layer.
    pub hint_norm: HintNorm,
}

impl Default for LouverSpec {
    fn default() -> Self {
        Self {
            tau: Tau::Budget(crate::registry::default_budget()),
            cap: None,
            group: GROUP,
            sample: SAMPLE,
            gate: Gate::default(),
            hint: HintSource::Current,
            hint_norm: HintNorm::default(),
        }
    }
}

impl LouverSpec {
    pub(crate) fn from_options(mut options: Options) -> Result<Self, SpecError> {
        let default = Self::default();
        let budget = options.take_budget("budget")?;
        let tau = match (options.take_word("tau", TAU)?, budget) {
            (None | Some(TauWord::Budget), Some(budget)) => Tau::Budget(budget),
            (None | Some(TauWord::Budget), None) => default.tau,
            (Some(TauWord::SampleMax), None) => Tau::SampleMax,
            (Some(TauWord::SampleGap), None) => Tau::SampleGap,
            (Some(_), Some(_)) => {
                return Err(SpecError::Conflict {
                    first: "budget",
                    second: "tau",
                    reason: "a budget is a threshold of its own; `cap` limits the others",
                });
            }
        };
        let spec = Self {
            tau,
            cap: options.take_budget("cap")?,
            group: options
                .take_value("group", "give a number of rows from 1 to 4096", |rows| {
                    (1..=GROUP_MAX).contains(rows)
                })?
                .unwrap_or(default.group),
            sample: options
                .take_value("sample", "give a number of rows from 1 to 65536", |rows| {
                    (1..=SAMPLE_MAX).contains(rows)
                })?
                .unwrap_or(default.sample),
            gate: options.take_word("gate", GATE)?.unwrap_or_default(),
            hint: options.take_word("hint", HintSource::QUERIES)?.unwrap_or(default.hint),
            hint_norm: options.take_word("hint_norm", HintNorm::WORDS)?.unwrap_or_default(),
        };
        options.finish(KNOWN)?;
        Ok(spec)
    }
}

impl Spec for LouverSpec {
    fn name(&self) -> &'static str {
        super::NAME
    }

    fn write(&self, writer: &mut OptionWriter) {
        let default = Self::default();
        match self.tau {
            Tau::Budget(budget) => writer.option("budget", budget),
            Tau::SampleMax => writer.option("tau", "sample-max"),
            Tau::SampleGap => writer.option("tau", "sample-gap"),
        }
        if let Some(cap) = self.cap {
            writer.option("cap", cap);
        }
        writer.option_unless("group", &self.group, &default.group);
        writer.option_unless("sample", &self.sample, &default.sample);
        writer.word_unless("gate", GATE, self.gate, default.gate);
        writer.word_unless("hint", HintSource::QUERIES, self.hint, default.hint);
        writer.word_unless("hint_norm", HintNorm::WORDS, self.hint_norm, default.hint_norm);
    }

    fn budget(&self) -> Option<Budget> {
        match self.tau {
            Tau::Budget(budget) => Some(budget),
            Tau::SampleMax | Tau::SampleGap => None,
        }
    }

    fn set_budget(&mut self, budget: Budget) {
        self.tau = Tau::Budget(budget);
    }

    fn hint(&self) -> HintSource {
        self.hint
    }

    fn hint_norm(&self) -> Option<HintNorm> {
        (self.hint == HintSource::Ahead).then_some(self.hint_norm)
    }

    fn build(&self, shape: &crate::Shape, _artifacts: &Artifacts) -> Result<Box<dyn Method>, MethodError> {
        Ok(Box::new(super::Louver::new(*self, shape)?))
    }

    fn boxed(&self) -> Box<dyn Spec> {
        Box::new(*self)
    }
}
