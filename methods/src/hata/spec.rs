//! What a user chooses of `hata`, and of methods that select by its codes.

use crate::artifact::{ArtifactKind, Artifacts};
use crate::budget::Budget;
use crate::error::{MethodError, SpecError};
use crate::method::{HintNorm, Method};
use crate::needs::HintSource;
use crate::options::{OptionWriter, Options};
use crate::registry::default_budget;
use crate::shape::Shape;
use crate::spec::Spec;

/// Where the hash weights come from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Weights {
    /// From the model's hash artifact.
    Trained,
    /// Drawn from a normal distribution.
    Random {
        /// Bits of a code.
        bits: usize,
        /// Seed of the draw.
        seed: u64,
    },
}

/// Bits of a code in the reference's scripts.
pub const BITS: usize = 128;
/// Most bits of random codes: more than a key of 128 channels has in f16.
pub const BITS_MAX: usize = 2048;

const WEIGHTS: &[(&str, bool)] = &[("trained", true), ("random", false)];
const NORM: &[(&str, bool)] = &[("on", true), ("off", false)];

/// How rows are hashed and scored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct HashOptions {
    /// Where the hash weights come from.
    pub weights: Weights,
    /// Whether a row's score is scaled by its key's norm.
    pub norm: bool,
}

impl Default for HashOptions {
    fn default() -> Self {
        Self { weights: Weights::Trained, norm: true }
    }
}

impl HashOptions {
    /// Its options' names.
    pub(crate) const KNOWN: [&'static str; 4] = ["weights", "bits", "seed", "norm"];

    pub(crate) fn take(options: &mut Options) -> Result<Self, SpecError> {
        let trained = options.take_word("weights", WEIGHTS)?.unwrap_or(true);
        let bits = options.take_value("bits", "give bits of a code, from 1 to 2048", |bits| {
            (1..=BITS_MAX).contains(bits)
        })?;
        let seed = options.take_value("seed", "a whole number", |_| true)?;
        let weights = match (trained, bits, seed) {
            (true, None, None) => Weights::Trained,
            (true, Some(_), _) => return Err(conflict("bits")),
            (true, None, Some(_)) => return Err(conflict("seed")),
            (false, bits, seed) => {
                Weights::Random { bits: bits.unwrap_or(BITS), seed: seed.unwrap_or_default() }
            }
        };
        Ok(Self { weights, norm: options.take_word("norm", NORM)?.unwrap_or(true) })
    }

    pub(crate) fn write(self, writer: &mut OptionWriter) {
        if let Weights::Random { bits, seed } = self.weights {
            writer.option("weights", "random");
            writer.option_unless("bits", &bits, &BITS);
            writer.option_unless("seed", &seed, &0);
        }
        writer.word_unless("norm", NORM, self.norm, true);
    }

    /// Which artifact it wants.
    pub(crate) fn artifact(self) -> Option<ArtifactKind> {
        (self.weights == Weights::Trained).then_some(ArtifactKind::Hash)
    }
}

fn conflict(second: &'static str) -> SpecError {
    SpecError::Conflict {
        first: "weights",
        second,
        reason: "trained weights come with their bits; set `weights=random` to choose",
    }
}

/// What a user chooses: `hata:budget=6%,weights=trained,norm=on,hint=current`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct HataSpec {
    /// Rows per KV head.
    pub budget: Budget,
    /// How rows are hashed and scored.
    pub hash: HashOptions,
    /// Which query selects.
    pub hint: HintSource,
    /// How the engine makes a hint ahead of its layer.
    pub hint_norm: HintNorm,
}

impl Default for HataSpec {
    fn default() -> Self {
        Self {
            budget: default_budget(),
            hash: HashOptions::default(),
            hint: HintSource::Current,
            hint_norm: HintNorm::default(),
        }
    }
}

impl HataSpec {
    pub(crate) fn from_options(mut options: Options) -> Result<Self, SpecError> {
        let default = Self::default();
        let spec = Self {
            budget: options.take_budget("budget")?.unwrap_or(default.budget),
            hash: HashOptions::take(&mut options)?,
            hint: options.take_word("hint", HintSource::QUERIES)?.unwrap_or(default.hint),
            hint_norm: options.take_word("hint_norm", HintNorm::WORDS)?.unwrap_or_default(),
        };
        let [weights, bits, seed, norm] = HashOptions::KNOWN;
        options.finish(&["budget", weights, bits, seed, norm, "hint", "hint_norm"])?;
        Ok(spec)
    }
}

impl Spec for HataSpec {
    fn name(&self) -> &'static str {
        super::NAME
    }

    fn write(&self, writer: &mut OptionWriter) {
        writer.option("budget", self.budget);
        self.hash.write(writer);
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

    fn artifact(&self) -> Option<ArtifactKind> {
        self.hash.artifact()
    }

    fn build(&self, shape: &Shape, artifacts: &Artifacts) -> Result<Box<dyn Method>, MethodError> {
        Ok(Box::new(super::Hata::new(*self, shape, artifacts)?))
    }

    fn boxed(&self) -> Box<dyn Spec> {
        Box::new(*self)
    }
}
