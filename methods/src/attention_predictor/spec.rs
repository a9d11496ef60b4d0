//! What a user chooses of `attention-predictor`.

use crate::artifact::{ArtifactKind, Artifacts};
use crate::budget::Budget;
use crate::error::{MethodError, SpecError};
use crate::method::Method;
use crate::options::{OptionWriter, Options};
use crate::shape::Shape;
use crate::spec::Spec;

use super::{AttentionPredictor, NAME};

/// What ranks the blocks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Weights {
    /// The network of the predictor artifact.
    #[default]
    Trained,
    /// The mean over the rows, without a network: what training adds.
    Average,
}

impl Weights {
    const WORDS: &'static [(&'static str, Self)] = &[("trained", Self::Trained), ("average", Self::Average)];
}

/// Steps from one row of full attention to the next, as in the paper.
const CALIBRATE: usize = 5;

/// What a user chooses: `attention-predictor:budget=6%,weights=trained,calibrate=5`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AttentionPredictorSpec {
    /// Rows per KV head.
    pub budget: Budget,
    /// What ranks the blocks.
    pub weights: Weights,
    /// Every so many steps the engine reports a row of full attention; 0: never.
    pub calibrate: usize,
}

impl Default for AttentionPredictorSpec {
    fn default() -> Self {
        let budget = crate::registry::default_budget();
        Self { budget, weights: Weights::default(), calibrate: CALIBRATE }
    }
}

impl AttentionPredictorSpec {
    pub(crate) fn from_options(mut options: Options) -> Result<Self, SpecError> {
        let default = Self::default();
        let spec = Self {
            budget: options.take_budget("budget")?.unwrap_or(default.budget),
            weights: options.take_word("weights", Weights::WORDS)?.unwrap_or_default(),
            calibrate: options
                .take_value("calibrate", "give steps as a whole number, 0 for never", |_| true)?
                .unwrap_or(CALIBRATE),
        };
        options.finish(&["budget", "weights", "calibrate"])?;
        Ok(spec)
    }
}

impl Spec for AttentionPredictorSpec {
    fn name(&self) -> &'static str {
        NAME
    }

    fn write(&self, writer: &mut OptionWriter) {
        writer.option("budget", self.budget);
        writer.word_unless("weights", Weights::WORDS, self.weights, Weights::default());
        writer.option_unless("calibrate", &self.calibrate, &CALIBRATE);
    }

    fn budget(&self) -> Option<Budget> {
        Some(self.budget)
    }

    fn set_budget(&mut self, budget: Budget) {
        self.budget = budget;
    }

    fn artifact(&self) -> Option<ArtifactKind> {
        (self.weights == Weights::Trained).then_some(ArtifactKind::Predictor)
    }

    fn build(&self, shape: &Shape, artifacts: &Artifacts) -> Result<Box<dyn Method>, MethodError> {
        Ok(Box::new(AttentionPredictor::new(*self, shape, artifacts)?))
    }

    fn boxed(&self) -> Box<dyn Spec> {
        Box::new(*self)
    }
}
