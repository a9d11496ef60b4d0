//! What a user chooses of `kvoyant`.

use std::fmt;
use std::str::FromStr;

use kvoyant_kernels::CodeBits;

use crate::artifact::{ArtifactKind, Artifacts};
use crate::budget::{Budget, Share};
use crate::error::{MethodError, SpecError};
use crate::hetero::{Weights, parts};
use crate::method::{HintNorm, Method};
use crate::needs::HintSource;
use crate::options::{OptionWriter, Options};
use crate::registry::constant_share;
use crate::shape::Shape;
use crate::spec::Spec;

/// Rows per KV head and selection, unless the user says otherwise: a share of the sequence.
pub const BUDGET: f64 = 0.02;
/// What each KV head gets of the budget at least, however little it attends to.
pub const FLOOR: f64 = 0.1;
/// Rows that an answer's second look corrects for each KV head at most, in shares of the budget.
pub const CORRECT: f64 = 0.5;
/// Most rows of a group of codes.
const GROUP_MAX: usize = 1 << 12;
/// Most rows for one of the budget: rows of 4 bits where 32 are counted.
const MULTIPLE_MAX: usize = 8;

/// How many rows are selected.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Amount {
    /// So many of each KV head in the mean.
    Budget(Budget),
    /// As many as it takes until no query head misses more of its attention than this.
    MissedMass(MissedMass),
}

/// A share of the attention that may be missed: 0 to 1.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct MissedMass(f64);

impl MissedMass {
    /// Its value.
    #[must_use]
    pub fn get(self) -> f64 {
        self.0
    }
}

impl FromStr for MissedMass {
    type Err = ();

    fn from_str(text: &str) -> Result<Self, ()> {
        let value = match text.trim().strip_suffix('%') {
            Some(percent) => percent.trim_end().parse::<f64>().map_err(|_| ())? / 100.0,
            None => text.trim().parse::<f64>().map_err(|_| ())?,
        };
        if (0.0..=1.0).contains(&value) { Ok(Self(value)) } else { Err(()) }
    }
}

impl fmt::Display for MissedMass {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)
    }
}

/// What the budget is divided among.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Scope {
    /// All layers and steps: one threshold of attention, steered so that the mean meets the budget.
    #[default]
    Threshold,
    /// The KV heads of a layer share what they have together.
    Layer,
    /// Every KV head gets as much.
    Head,
}

/// When answers are certified.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Certify {
    /// Every step.
    #[default]
    Every,
    /// Every so many steps.
    EachNth(u32),
    /// Never.
    Off,
}

impl FromStr for Certify {
    type Err = ();

    fn from_str(text: &str) -> Result<Self, ()> {
        match text {
            "every" | "1" => Ok(Self::Every),
            "off" => Ok(Self::Off),
            number => number.parse().ok().filter(|steps: &u32| *steps > 1).map(Self::EachNth).ok_or(()),
        }
    }
}

impl fmt::Display for Certify {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Every => f.write_str("every"),
            Self::EachNth(steps) => write!(f, "{steps}"),
            Self::Off => f.write_str("off"),
        }
    }
}

const SWITCH: &[(&str, bool)] = &[("on", true), ("off", false)];
const LATE: &[(&str, bool)] = &[("wait", true), ("leave", false)];
const SCOPES: &[(&str, Scope)] =
    &[("threshold", Scope::Threshold), ("layer", Scope::Layer), ("head", Scope::Head)];
const BITS: &[(&str, CodeBits)] = &[("4", CodeBits::Four), ("6", CodeBits::Six)];
const KNOWN: &[&str] = &[
    "budget",
    "max_missed_mass",
    "bits",
    "group",
    "scope",
    "floor",
    "multiple",
    "tail",
    "resident",
    "correct",
    "roles",
    "certificate",
    "late",
    "reuse",
    "hint",
    "hint_norm",
];

/// What a user chooses: `kvoyant:budget=2%` or `kvoyant:max_missed_mass=0.01,bits=6,group=128`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct KvoyantSpec {
    /// How many rows: `budget` or `max_missed_mass`.
    pub amount: Amount,
    /// Bits of a key's codes.
    pub bits: CodeBits,
    /// Rows that share a channel's offset and step; `None`: those of a block.
    pub group: Option<usize>,
    /// What the budget is divided among.
    pub scope: Scope,
    /// What each KV head gets of the budget at least; 0 with `floor=0`.
    pub floor: f64,
    /// How heads' parts of the budget follow from their roles, which an artifact has; `None`: all are alike.
    pub roles: Option<Weights>,
    /// Rows selected for each of the budget: 2 where rows are stored in half the bytes.
    pub multiple: usize,
    /// Whether the rows left out are estimated.
    pub tail: bool,
    /// Whether all rows that are resident are attended.
    pub resident: bool,
    /// Where a query known ahead selects: rows, as a share of the budget, that the true query may add at most.
    pub correct: f64,
    /// When answers are certified.
    pub certificate: Certify,
    /// Whether rows that would come after an answer's deadline are waited for; else they are left to the estimate.
    pub waits: bool,
    /// From which cosine between a head's queries and those that it last selected by what is resident is enough.
    pub reuse: Option<f64>,
    /// Which query selects.
    pub hint: HintSource,
    /// How the engine makes a hint ahead of its layer.
    pub hint_norm: HintNorm,
}

impl Default for KvoyantSpec {
    fn default() -> Self {
        Self {
            amount: Amount::Budget(Budget::Share(constant_share(BUDGET))),
            bits: CodeBits::Six,
            group: None,
            scope: Scope::default(),
            floor: FLOOR,
            roles: None,
            multiple: 1,
            tail: true,
            resident: true,
            correct: CORRECT,
            certificate: Certify::default(),
            waits: true,
            reuse: None,
            hint: HintSource::Current,
            hint_norm: HintNorm::default(),
        }
    }
}

impl KvoyantSpec {
    /// Rows of each KV head in the mean, of a sequence of `tokens` tokens; 1 where the amount is no budget.
    pub(super) fn rows_of(&self, tokens: usize) -> usize {
        match self.amount {
            Amount::Budget(budget) => budget.rows_of(tokens).saturating_mul(self.multiple),
            Amount::MissedMass(_) => 1,
        }
    }

    /// Whether a step's answers are certified.
    pub(super) fn certifies(&self, step: u64) -> bool {
        match self.certificate {
            Certify::Every => true,
            Certify::EachNth(steps) => step.is_multiple_of(u64::from(steps)),
            Certify::Off => false,
        }
    }

    pub(crate) fn from_options(mut options: Options) -> Result<Self, SpecError> {
        let default = Self::default();
        let budget = options.take_budget("budget")?;
        let missed = options.take_value("max_missed_mass", "give a share from 0 to 1", |_| true)?;
        let amount = match (budget, missed) {
            (Some(_), Some(_)) => {
                return Err(SpecError::Conflict {
                    first: "budget",
                    second: "max_missed_mass",
                    reason: "a budget fixes the number of rows, a bound on what is missed finds it",
                });
            }
            (Some(budget), None) => Amount::Budget(budget),
            (None, Some(missed)) => Amount::MissedMass(missed),
            (None, None) => default.amount,
        };
        let share = |options: &mut Options, key: &str| -> Result<Option<f64>, SpecError> {
            let missed = options.take_value::<MissedMass>(key, "give a share from 0 to 1", |_| true)?;
            Ok(missed.map(MissedMass::get))
        };
        let group = options.take_value("group", "give a multiple of 16 rows", |group: &usize| {
            (16..=GROUP_MAX).contains(group) && group.is_multiple_of(16)
        })?;
        let multiple = options.take_value("multiple", "give a number from 1 to 8", |multiple: &usize| {
            (1..=MULTIPLE_MAX).contains(multiple)
        })?;
        let spec = Self {
            amount,
            bits: options.take_word("bits", BITS)?.unwrap_or(default.bits),
            group,
            scope: options.take_word("scope", SCOPES)?.unwrap_or_default(),
            floor: share(&mut options, "floor")?.unwrap_or(default.floor),
            roles: options.take_value(
                "roles",
                "write `stability`, `equal`, or four numbers above 0 for anchor/satellite/volatile/pivot",
                Weights::is_valid,
            )?,
            multiple: multiple.unwrap_or(default.multiple),
            tail: options.take_word("tail", SWITCH)?.unwrap_or(default.tail),
            resident: options.take_word("resident", SWITCH)?.unwrap_or(default.resident),
            correct: share(&mut options, "correct")?.unwrap_or(default.correct),
            certificate: options
                .take_value("certificate", "give every, off, or a number of steps", |_: &Certify| true)?
                .unwrap_or_default(),
            waits: options.take_word("late", LATE)?.unwrap_or(default.waits),
            reuse: share(&mut options, "reuse")?,
            hint: options.take_word("hint", HintSource::QUERIES)?.unwrap_or(default.hint),
            hint_norm: options.take_word("hint_norm", HintNorm::WORDS)?.unwrap_or_default(),
        };
        options.finish(KNOWN)?;
        // With rows chosen ahead the second look makes good what was left out.
        let promises = matches!(spec.amount, Amount::MissedMass(_)) && spec.hint == HintSource::Current;
        for (second, leaves) in [("late", !spec.waits), ("reuse", spec.reuse.is_some())] {
            if promises && leaves {
                return Err(SpecError::Conflict {
                    first: "max_missed_mass",
                    second,
                    reason: "rows that are left out may weigh more than may be missed; with hint=ahead they are attended later",
                });
            }
        }
        let divides = match (spec.amount, spec.scope) {
            (Amount::MissedMass(_), _) => {
                Err(("max_missed_mass", "what a head may miss says how many rows it gets"))
            }
            (_, Scope::Layer) => Err(("scope", "rows of all heads of a layer compete by their shares alone")),
            _ => Ok(()),
        };
        match divides {
            Err((first, reason)) if spec.roles.is_some() => {
                Err(SpecError::Conflict { first, second: "roles", reason })
            }
            _ => Ok(spec),
        }
    }
}

impl Spec for KvoyantSpec {
    fn name(&self) -> &'static str {
        super::NAME
    }

    fn write(&self, writer: &mut OptionWriter) {
        let default = Self::default();
        match self.amount {
            Amount::Budget(budget) => writer.option("budget", budget),
            Amount::MissedMass(missed) => writer.option("max_missed_mass", missed),
        }
        writer.word_unless("bits", BITS, self.bits, default.bits);
        if let Some(group) = self.group {
            writer.option("group", group);
        }
        writer.word_unless("scope", SCOPES, self.scope, default.scope);
        writer.option_unless("floor", &self.floor, &default.floor);
        if let Some(roles) = self.roles {
            writer.option("roles", roles);
        }
        writer.option_unless("multiple", &self.multiple, &default.multiple);
        writer.word_unless("tail", SWITCH, self.tail, default.tail);
        writer.word_unless("resident", SWITCH, self.resident, default.resident);
        writer.option_unless("correct", &self.correct, &default.correct);
        writer.option_unless("certificate", &self.certificate, &default.certificate);
        writer.word_unless("late", LATE, self.waits, default.waits);
        if let Some(cosine) = self.reuse {
            writer.option("reuse", cosine);
        }
        writer.word_unless("hint", HintSource::QUERIES, self.hint, default.hint);
        writer.word_unless("hint_norm", HintNorm::WORDS, self.hint_norm, default.hint_norm);
    }

    fn budget(&self) -> Option<Budget> {
        match self.amount {
            Amount::Budget(budget) => Some(budget),
            Amount::MissedMass(_) => None,
        }
    }

    fn set_budget(&mut self, budget: Budget) {
        self.amount = Amount::Budget(budget);
    }

    fn hint(&self) -> HintSource {
        self.hint
    }

    fn hint_norm(&self) -> Option<HintNorm> {
        Some(self.hint_norm)
    }

    fn artifact(&self) -> Option<ArtifactKind> {
        self.roles.map(|_| ArtifactKind::Roles)
    }

    fn build(&self, shape: &Shape, artifacts: &Artifacts) -> Result<Box<dyn Method>, MethodError> {
        let method = super::Kvoyant::new(*self, shape)?;
        Ok(Box::new(match self.roles {
            Some(weights) => {
                let artifact = artifacts.tensors(super::NAME, ArtifactKind::Roles, shape)?;
                method.with_parts(parts(artifact, shape, weights)?)
            }
            None => method,
        }))
    }

    fn boxed(&self) -> Box<dyn Spec> {
        Box::new(*self)
    }
}

/// `share` of a budget in rows, rounded.
pub(super) fn part_of(budget: usize, share: f64) -> usize {
    (budget as f64 * share).round() as usize
}

/// A share of all rows is all of them.
pub(super) fn is_everything(budget: Budget, tokens: usize, candidates: usize) -> bool {
    budget.rows_of(tokens) >= candidates || budget.as_share() == Share::new(1.0).ok().map(Share::get)
}
