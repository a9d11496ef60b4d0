//! The one place that knows all methods: their names, specifications and constructors.

use std::fmt;
use std::str::FromStr;

use serde::de::{self, MapAccess, Visitor};

use crate::budget::{Budget, Share};
use crate::error::{MethodError, SpecError};
use crate::full::Full;
use crate::infinigen::{Amount, Infinigen, InfinigenSpec};
use crate::method::{Artifact, ArtifactKind, HintNorm, Method};
use crate::options::{OptionWriter, Options};
use crate::quest::{Quest, QuestSpec};
use crate::random::{Random, RandomSpec};
use crate::shape::Shape;
use crate::window::Window;
use crate::{full, infinigen, quest, random, window};

/// Every method's name.
pub const NAMES: &[&str] = &[full::NAME, infinigen::NAME, quest::NAME, window::NAME, random::NAME];

/// A share that is known to be one.
pub(crate) fn constant_share(share: f64) -> Share {
    Share::new(share).unwrap_or_else(|_| unreachable!("a constant within (0, 1]"))
}

/// The budget of a method whose user names none: 6 % of the sequence.
#[must_use]
pub fn default_budget() -> Budget {
    const SHARE: f64 = 0.06;
    Budget::Share(constant_share(SHARE))
}

/// What a user chooses: a method and its options.
///
/// Its text form is `name` or `name:key=value,key=value`, and reads back as the same specification. In
/// configuration files it is that text, or a table with the key `method` and the options beside it.
#[derive(Debug, Clone, PartialEq)]
pub enum MethodSpec {
    /// Every row.
    Full,
    /// Sinks and window only.
    Window,
    /// Random rows.
    Random(RandomSpec),
    /// Pages by the bounds of their scores.
    Quest(QuestSpec),
    /// Rows by their predicted scores.
    Infinigen(InfinigenSpec),
}

impl MethodSpec {
    /// The method's name.
    #[must_use]
    pub fn name(&self) -> &'static str {
        match self {
            Self::Full => full::NAME,
            Self::Window => window::NAME,
            Self::Random(_) => random::NAME,
            Self::Quest(_) => quest::NAME,
            Self::Infinigen(_) => infinigen::NAME,
        }
    }

    /// The explicit budget, where there is one.
    #[must_use]
    pub fn budget(&self) -> Option<Budget> {
        match self {
            Self::Full | Self::Window => None,
            Self::Random(spec) => Some(spec.budget),
            Self::Quest(spec) => Some(spec.budget),
            Self::Infinigen(InfinigenSpec { amount: Amount::Budget(budget), .. }) => Some(*budget),
            Self::Infinigen(_) => None,
        }
    }

    /// The same method with that budget; methods without one stay as they are.
    #[must_use]
    pub fn with_budget(mut self, budget: Budget) -> Self {
        match &mut self {
            Self::Full | Self::Window => {}
            Self::Random(spec) => spec.budget = budget,
            Self::Quest(spec) => spec.budget = budget,
            // A budget turns the threshold rule off.
            Self::Infinigen(spec) => spec.amount = Amount::Budget(budget),
        }
        self
    }

    /// How the engine makes the hint, where the method wants one.
    #[must_use]
    pub fn hint_norm(&self) -> Option<HintNorm> {
        match self {
            Self::Full | Self::Window | Self::Random(_) => None,
            Self::Quest(spec) => Some(spec.hint_norm),
            Self::Infinigen(spec) => Some(spec.hint_norm),
        }
    }

    /// Which artifact [`build`] wants for it.
    #[must_use]
    pub fn artifact(&self) -> Option<ArtifactKind> {
        match self {
            Self::Infinigen(spec) if spec.skew => Some(ArtifactKind::Skew),
            _ => None,
        }
    }

    fn from_options(options: Options) -> Result<Self, SpecError> {
        match options.method() {
            full::NAME => options.finish(&[]).map(|()| Self::Full),
            window::NAME => options.finish(&[]).map(|()| Self::Window),
            random::NAME => RandomSpec::from_options(options).map(Self::Random),
            quest::NAME => QuestSpec::from_options(options).map(Self::Quest),
            infinigen::NAME => InfinigenSpec::from_options(options).map(Self::Infinigen),
            other => Err(SpecError::UnknownMethod { name: other.into(), known: NAMES.join(", ") }),
        }
    }
}

impl fmt::Display for MethodSpec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut writer = OptionWriter::new(self.name());
        match self {
            Self::Full | Self::Window => {}
            Self::Random(spec) => spec.write(&mut writer),
            Self::Quest(spec) => spec.write(&mut writer),
            Self::Infinigen(spec) => spec.write(&mut writer),
        }
        f.write_str(&writer.finish())
    }
}

impl FromStr for MethodSpec {
    type Err = SpecError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        Self::from_options(Options::parse(text)?)
    }
}

impl serde::Serialize for MethodSpec {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> serde::Deserialize<'de> for MethodSpec {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(SpecVisitor)
    }
}

struct SpecVisitor;

impl<'de> Visitor<'de> for SpecVisitor {
    type Value = MethodSpec;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a method such as \"quest:budget=6%\", or a table with the key `method` and its options")
    }

    fn visit_str<E: de::Error>(self, text: &str) -> Result<Self::Value, E> {
        text.parse().map_err(E::custom)
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
        let mut method = None;
        let mut pairs = Vec::new();
        while let Some((key, Scalar(value))) = map.next_entry::<String, Scalar>()? {
            if key == "method" {
                method = Some(value);
            } else {
                pairs.push((key, value));
            }
        }
        let method = method.ok_or_else(|| de::Error::missing_field("method"))?;
        let mut options = Options::new(&method);
        for (key, value) in pairs {
            options.add(&key, &value).map_err(de::Error::custom)?;
        }
        MethodSpec::from_options(options).map_err(de::Error::custom)
    }
}

/// An option's value in a table: text, a number or a truth value.
struct Scalar(String);

impl<'de> serde::Deserialize<'de> for Scalar {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct ScalarVisitor;
        impl Visitor<'_> for ScalarVisitor {
            type Value = Scalar;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("text, a number or a truth value")
            }
            fn visit_bool<E: de::Error>(self, value: bool) -> Result<Scalar, E> {
                Ok(Scalar(if value { "on" } else { "off" }.into()))
            }
            fn visit_str<E: de::Error>(self, value: &str) -> Result<Scalar, E> {
                Ok(Scalar(value.into()))
            }
            fn visit_u64<E: de::Error>(self, value: u64) -> Result<Scalar, E> {
                Ok(Scalar(value.to_string()))
            }
            fn visit_i64<E: de::Error>(self, value: i64) -> Result<Scalar, E> {
                Ok(Scalar(value.to_string()))
            }
            fn visit_f64<E: de::Error>(self, value: f64) -> Result<Scalar, E> {
                Ok(Scalar(value.to_string()))
            }
        }
        deserializer.deserialize_any(ScalarVisitor)
    }
}

/// Builds the method that `spec` names, for a model of that shape.
///
/// # Errors
/// A shape that is none, options that do not fit it, or an artifact that is missing or of another model.
pub fn build(
    spec: &MethodSpec,
    shape: &Shape,
    artifact: Option<&Artifact>,
) -> Result<Box<dyn Method>, MethodError> {
    shape.check()?;
    Ok(match spec {
        MethodSpec::Full => Box::new(Full::new(shape)),
        MethodSpec::Window => Box::new(Window::new(shape)),
        MethodSpec::Random(random) => Box::new(Random::new(*random, shape)),
        MethodSpec::Quest(quest) => Box::new(Quest::new(*quest, shape)?),
        MethodSpec::Infinigen(infinigen) => {
            let skew = artifact.map(|Artifact::Skew(skew)| skew);
            Box::new(Infinigen::new(*infinigen, shape, skew)?)
        }
    })
}

#[cfg(test)]
mod tests;
