//! What a user chooses of `clo`.

use std::fmt;
use std::str::FromStr;

use crate::artifact::{ArtifactKind, Artifacts};
use crate::budget::Budget;
use crate::error::{MethodError, SpecError};
use crate::hata::HashOptions;
use crate::method::{HintNorm, Method};
use crate::needs::HintSource;
use crate::options::{OptionWriter, Options};
use crate::registry::default_budget;
use crate::shape::Shape;
use crate::spec::Spec;

/// The threshold in the authors' earlier code; the paper's is not published.
pub const TAU: f64 = 0.8;
/// The threshold of important heads: ours, since the paper's is not published.
pub const IMPORTANT_TAU: f64 = 0.9;

/// A KV head of a layer, written `layer.head`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Head {
    /// The layer.
    pub layer: usize,
    /// The KV head.
    pub kv_head: usize,
}

impl fmt::Display for Head {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.layer, self.kv_head)
    }
}

/// KV heads, written `layer.head+layer.head`.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
struct Heads(Vec<Head>);

impl fmt::Display for Heads {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().enumerate().try_for_each(|(at, head)| {
            let separator = if at == 0 { "" } else { "+" };
            write!(f, "{separator}{head}")
        })
    }
}

impl FromStr for Heads {
    type Err = ();

    fn from_str(text: &str) -> Result<Self, ()> {
        let head = |text: &str| {
            let (layer, kv_head) = text.trim().split_once('.')?;
            Some(Head { layer: layer.parse().ok()?, kv_head: kv_head.parse().ok()? })
        };
        text.split('+').map(head).collect::<Option<_>>().map(Self).ok_or(())
    }
}

/// What a user chooses: `clo:budget=6%,tau=0.8,important=3.0+5.2,important_tau=0.9`, and `hata`'s options.
#[derive(Debug, Clone, PartialEq)]
pub struct CloSpec {
    /// Rows per KV head.
    pub budget: Budget,
    /// The least likeness of a hit. Above 1 every step is a miss; at −1 only the first.
    pub tau: f64,
    /// Heads with a threshold of their own.
    pub important: Vec<Head>,
    /// Their threshold.
    pub important_tau: f64,
    /// How rows are hashed and scored.
    pub hash: HashOptions,
    /// Which query is compared, and selects.
    pub hint: HintSource,
    /// How the engine makes a hint ahead of its layer.
    pub hint_norm: HintNorm,
}

impl Default for CloSpec {
    fn default() -> Self {
        Self {
            budget: default_budget(),
            tau: TAU,
            important: Vec::new(),
            important_tau: IMPORTANT_TAU,
            hash: HashOptions::default(),
            hint: HintSource::Ahead,
            hint_norm: HintNorm::default(),
        }
    }
}

impl CloSpec {
    /// The threshold of a KV head.
    pub(super) fn tau_of(&self, layer: usize, kv_head: usize) -> f64 {
        let important = self.important.contains(&Head { layer, kv_head });
        if important { self.important_tau } else { self.tau }
    }

    pub(crate) fn from_options(mut options: Options) -> Result<Self, SpecError> {
        let default = Self::default();
        let tau = |options: &mut Options, key| {
            options
                .take_value(key, "give a cosine, or a number above 1 for never", |tau: &f64| tau.is_finite())
        };
        let important = "give heads as layer.head, separated by +";
        let spec = Self {
            budget: options.take_budget("budget")?.unwrap_or(default.budget),
            tau: tau(&mut options, "tau")?.unwrap_or(default.tau),
            important: options.take_value::<Heads>("important", important, |_| true)?.unwrap_or_default().0,
            important_tau: tau(&mut options, "important_tau")?.unwrap_or(default.important_tau),
            hash: HashOptions::take(&mut options)?,
            hint: options.take_word("hint", HintSource::QUERIES)?.unwrap_or(default.hint),
            hint_norm: options.take_word("hint_norm", HintNorm::WORDS)?.unwrap_or_default(),
        };
        let [weights, bits, seed, norm] = HashOptions::KNOWN;
        options.finish(&[
            "budget",
            "tau",
            "important",
            "important_tau",
            weights,
            bits,
            seed,
            norm,
            "hint",
            "hint_norm",
        ])?;
        Ok(spec)
    }
}

impl Spec for CloSpec {
    fn name(&self) -> &'static str {
        super::NAME
    }

    fn write(&self, writer: &mut OptionWriter) {
        let default = Self::default();
        writer.option("budget", self.budget);
        writer.option_unless("tau", &self.tau, &default.tau);
        writer.option_unless("important", &Heads(self.important.clone()), &Heads::default());
        writer.option_unless("important_tau", &self.important_tau, &default.important_tau);
        self.hash.write(writer);
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
        Some(self.hint_norm)
    }

    fn artifact(&self) -> Option<ArtifactKind> {
        self.hash.artifact()
    }

    fn build(&self, shape: &Shape, artifacts: &Artifacts) -> Result<Box<dyn Method>, MethodError> {
        Ok(Box::new(super::Clo::new(self.clone(), shape, artifacts)?))
    }

    fn boxed(&self) -> Box<dyn Spec> {
        Box::new(self.clone())
    }
}
