//! What a user chooses of `hetero`.

use crate::artifact::{ArtifactKind, Artifacts};
use crate::budget::Budget;
use crate::error::{MethodError, SpecError};
use crate::method::{HintNorm, Method};
use crate::needs::HintSource;
use crate::options::{OptionWriter, Options};
use crate::shape::Shape;
use crate::spec::Spec;

use super::roles::Weights;
use super::{Hetero, NAME};

/// Each head keeps so many queries.
const LOOKS_MAX: usize = 64;

/// Where roles come from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Roles {
    /// The roles artifact.
    #[default]
    Calibrated,
    /// Every head is volatile and for itself.
    None,
}

impl Roles {
    const WORDS: &'static [(&'static str, Self)] = &[("calibrated", Self::Calibrated), ("none", Self::None)];
}

/// What a user chooses: `hetero:budget=6%,roles=calibrated,every=5,drift=0.5`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct HeteroSpec {
    /// Rows per KV head, on average over a layer.
    pub budget: Budget,
    /// Where roles come from.
    pub roles: Roles,
    /// How a layer's budget is shared.
    pub weights: Weights,
    /// Steps from one look for drift to the next; 0: none.
    pub every: usize,
    /// Queries that a look takes, those of the last steps: by most of them it is decided.
    pub looks: usize,
    /// A choice is made anew when less than this share of it is still among the best.
    pub drift: f32,
    /// Which query chooses.
    pub hint: HintSource,
    /// How the engine makes a hint ahead of its layer.
    pub hint_norm: HintNorm,
}

impl Default for HeteroSpec {
    fn default() -> Self {
        Self {
            budget: crate::registry::default_budget(),
            roles: Roles::default(),
            weights: Weights::default(),
            every: 5,
            looks: 5,
            drift: 0.5,
            hint: HintSource::Ahead,
            hint_norm: HintNorm::default(),
        }
    }
}

impl HeteroSpec {
    pub(crate) fn from_options(mut options: Options) -> Result<Self, SpecError> {
        let default = Self::default();
        let spec = Self {
            budget: options.take_budget("budget")?.unwrap_or(default.budget),
            roles: options.take_word("roles", Roles::WORDS)?.unwrap_or_default(),
            weights: options
                .take_value(
                    "weights",
                    "write `stability`, `equal`, or four numbers above 0 for anchor/satellite/volatile/pivot",
                    Weights::is_valid,
                )?
                .unwrap_or_default(),
            every: options
                .take_value("every", "give steps as a whole number, 0 for never", |_| true)?
                .unwrap_or(default.every),
            looks: options
                .take_value("looks", "give queries as a whole number from 1 to 64", |looks| {
                    (1..=LOOKS_MAX).contains(looks)
                })?
                .unwrap_or(default.looks),
            drift: options
                .take_value("drift", "give a share from 0 to 1", |share| (0.0..=1.0).contains(share))?
                .unwrap_or(default.drift),
            hint: options.take_word("hint", HintSource::QUERIES)?.unwrap_or(default.hint),
            hint_norm: options.take_word("hint_norm", HintNorm::WORDS)?.unwrap_or_default(),
        };
        options.finish(&["budget", "roles", "weights", "every", "looks", "drift", "hint", "hint_norm"])?;
        Ok(spec)
    }
}

impl Spec for HeteroSpec {
    fn name(&self) -> &'static str {
        NAME
    }

    fn write(&self, writer: &mut OptionWriter) {
        let default = Self::default();
        writer.option("budget", self.budget);
        writer.word_unless("roles", Roles::WORDS, self.roles, default.roles);
        writer.option_unless("weights", &self.weights, &default.weights);
        writer.option_unless("every", &self.every, &default.every);
        writer.option_unless("looks", &self.looks, &default.looks);
        writer.option_unless("drift", &self.drift, &default.drift);
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

    fn artifact(&self) -> Option<ArtifactKind> {
        (self.roles == Roles::Calibrated).then_some(ArtifactKind::Roles)
    }

    fn build(&self, shape: &Shape, artifacts: &Artifacts) -> Result<Box<dyn Method>, MethodError> {
        Ok(Box::new(Hetero::new(*self, shape, artifacts)?))
    }

    fn boxed(&self) -> Box<dyn Spec> {
        Box::new(*self)
    }
}
