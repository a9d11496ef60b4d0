//! Options of `mix`: which method answers for which layers and KV heads.

use std::fmt;
use std::ops::Range;
use std::str::FromStr;

use crate::artifact::{ArtifactKind, Artifacts};
use crate::budget::Budget;
use crate::error::{MethodError, SpecError};
use crate::method::{HintNorm, Method};
use crate::needs::HintSource;
use crate::options::{OptionWriter, Options};
use crate::shape::Shape;
use crate::spec::{MethodSpec, Spec};

/// Numbers of layers or heads: `3`, `2-9`, `10-` or `*` for all.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Span {
    first: usize,
    /// The last one; [`Self::OPEN`] for no end.
    last: usize,
}

impl Span {
    const OPEN: usize = usize::MAX;

    /// All of them.
    pub const ALL: Self = Self { first: 0, last: Self::OPEN };

    /// `first..=last`, or to the end where there is no last one.
    #[must_use]
    pub fn new(first: usize, last: Option<usize>) -> Self {
        Self { first, last: last.unwrap_or(Self::OPEN) }
    }

    /// Those below `count`.
    #[must_use]
    pub fn within(&self, count: usize) -> Range<usize> {
        self.first.min(count)..self.last.saturating_add(1).min(count)
    }

    fn meets(&self, other: &Self) -> bool {
        self.first <= other.last && other.first <= self.last
    }
}

impl fmt::Display for Span {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (self.first, self.last) {
            (0, Self::OPEN) => f.write_str("*"),
            (first, Self::OPEN) => write!(f, "{first}-"),
            (first, last) if first == last => write!(f, "{first}"),
            (first, last) => write!(f, "{first}-{last}"),
        }
    }
}

impl FromStr for Span {
    type Err = ();

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let number = |text: &str| text.trim().parse::<usize>().map_err(|_| ());
        let span = match text.trim().split_once('-') {
            None if text.trim() == "*" => return Ok(Self::ALL),
            None => Self::new(number(text)?, Some(number(text)?)),
            Some((first, "")) => Self::new(number(first)?, None),
            Some((first, last)) => Self::new(number(first)?, Some(number(last)?)),
        };
        if span.first <= span.last { Ok(span) } else { Err(()) }
    }
}

/// Where a part answers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Place {
    /// In these layers, for these KV heads.
    At {
        /// The layers.
        layers: Span,
        /// The KV heads.
        heads: Span,
    },
    /// Wherever no other part does.
    Rest,
}

const REST: &str = "rest";

/// Most parts: each is a method of its own, and all of them may be compared with each other.
const PARTS_MAX: usize = 64;

impl Place {
    fn meets(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::Rest, Self::Rest) => true,
            (Self::At { layers, heads }, Self::At { layers: other_layers, heads: other_heads }) => {
                layers.meets(other_layers) && heads.meets(other_heads)
            }
            _ => false,
        }
    }
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Rest => f.write_str(REST),
            Self::At { layers, heads } if *heads == Span::ALL => write!(f, "{layers}"),
            Self::At { layers, heads } => write!(f, "{layers}/{heads}"),
        }
    }
}

impl FromStr for Place {
    type Err = ();

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        if text == REST {
            return Ok(Self::Rest);
        }
        let (layers, heads) = text.split_once('/').unwrap_or((text, "*"));
        Ok(Self::At { layers: layers.parse()?, heads: heads.parse()? })
    }
}

/// A method and where it answers.
#[derive(Debug, Clone, PartialEq)]
pub struct Part {
    /// Where.
    pub place: Place,
    /// The method.
    pub spec: MethodSpec,
}

impl fmt::Display for Part {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}=({})", self.place, self.spec)
    }
}

/// What a user chooses: `mix:2-9=(quest:budget=6%),10-/0-1=(full),rest=(infinigen:budget=6%)`.
#[derive(Debug, Clone, PartialEq)]
pub struct MixSpec {
    parts: Vec<Part>,
}

impl MixSpec {
    /// A mix of these parts, in any order.
    ///
    /// # Errors
    /// None at all, a mix in a mix, two parts for one layer and KV head, or parts that want different hints.
    pub fn new(mut parts: Vec<Part>) -> Result<Self, SpecError> {
        parts.sort_by_key(|part| part.place);
        if parts.is_empty() {
            return Err(SpecError::BadValue {
                option: REST.into(),
                value: String::new(),
                expected: "give at least one part, as in `mix:2-9=(quest),rest=(full)`".into(),
            });
        }
        if parts.len() > PARTS_MAX {
            return Err(SpecError::BadValue {
                option: parts[PARTS_MAX].place.to_string(),
                value: parts[PARTS_MAX].spec.to_string(),
                expected: format!("give at most {PARTS_MAX} parts"),
            });
        }
        for (at, part) in parts.iter().enumerate() {
            if part.spec.name() == super::NAME {
                return Err(SpecError::BadValue {
                    option: part.place.to_string(),
                    value: part.spec.to_string(),
                    expected: "name a method that is no mix itself".into(),
                });
            }
            for other in &parts[..at] {
                let conflict = if part.place.meets(&other.place) {
                    Some("both answer for a layer and KV head")
                } else if part
                    .spec
                    .hint_norm()
                    .is_some_and(|norm| other.spec.hint_norm().is_some_and(|other| other != norm))
                {
                    Some("their hints are made with different norms")
                } else {
                    None
                };
                if let Some(reason) = conflict {
                    return Err(SpecError::Parts {
                        first: other.to_string(),
                        second: part.to_string(),
                        reason,
                    });
                }
            }
        }
        Ok(Self { parts })
    }

    /// The parts, in order of their places.
    #[must_use]
    pub fn parts(&self) -> &[Part] {
        &self.parts
    }

    pub(crate) fn from_options(mut options: Options) -> Result<Self, SpecError> {
        let pairs = options.take_all();
        let parts = pairs.into_iter().map(|(key, value)| {
            let place = key.parse().map_err(|()| SpecError::BadValue {
                option: key.clone(),
                value: value.clone(),
                expected: "name layers and KV heads, as in `2-9`, `10-/0-1`, `*/3` or `rest`".into(),
            })?;
            let text = value.strip_prefix('(').and_then(|text| text.strip_suffix(')')).unwrap_or(&value);
            Ok(Part { place, spec: text.parse()? })
        });
        Self::new(parts.collect::<Result<_, SpecError>>()?)
    }
}

impl Spec for MixSpec {
    fn name(&self) -> &'static str {
        super::NAME
    }

    fn write(&self, writer: &mut OptionWriter) {
        for part in &self.parts {
            writer.option(&part.place.to_string(), format_args!("({})", part.spec));
        }
    }

    /// The parts' budget, where those that have one have the same.
    fn budget(&self) -> Option<Budget> {
        let mut budgets = self.parts.iter().filter_map(|part| part.spec.budget());
        let first = budgets.next()?;
        budgets.all(|budget| budget == first).then_some(first)
    }

    fn set_budget(&mut self, budget: Budget) {
        for part in &mut self.parts {
            part.spec = part.spec.clone().with_budget(budget);
        }
    }

    fn hint(&self) -> HintSource {
        let mut hints = self.parts.iter().map(|part| part.spec.hint());
        hints.find(|hint| *hint != HintSource::None).unwrap_or_default()
    }

    fn hint_norm(&self) -> Option<HintNorm> {
        self.parts.iter().find_map(|part| part.spec.hint_norm())
    }

    /// The first that a part wants; it may want others beside it.
    fn artifact(&self) -> Option<ArtifactKind> {
        self.parts.iter().find_map(|part| part.spec.artifact())
    }

    fn artifacts(&self) -> Vec<ArtifactKind> {
        self.parts.iter().flat_map(|part| part.spec.artifacts()).collect()
    }

    fn build(&self, shape: &Shape, artifacts: &Artifacts) -> Result<Box<dyn Method>, MethodError> {
        Ok(Box::new(super::Mix::new(self.clone(), shape, artifacts)?))
    }

    fn boxed(&self) -> Box<dyn Spec> {
        Box::new(self.clone())
    }
}
