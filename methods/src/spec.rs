//! What a user chooses: a method and its options.

use std::any::Any;
use std::fmt;
use std::str::FromStr;

use serde::de::{self, MapAccess, Visitor};

use crate::artifact::{ArtifactKind, Artifacts};
use crate::budget::Budget;
use crate::error::{MethodError, SpecError};
use crate::method::{HintNorm, Method};
use crate::needs::HintSource;
use crate::options::{OptionWriter, Options};
use crate::registry;
use crate::shape::Shape;

/// One method's options.
pub trait Spec: fmt::Debug + Send + Sync + Any {
    /// The method's name.
    fn name(&self) -> &'static str;

    /// Writes the options that it would be read back from.
    fn write(&self, writer: &mut OptionWriter) {
        let _ = writer;
    }

    /// The explicit budget, where there is one.
    fn budget(&self) -> Option<Budget> {
        None
    }

    /// Sets the budget; methods without one stay as they are.
    fn set_budget(&mut self, budget: Budget) {
        let _ = budget;
    }

    /// Which query it wants.
    fn hint(&self) -> HintSource {
        HintSource::None
    }

    /// How the engine makes a hint ahead of its layer, where the method wants one.
    fn hint_norm(&self) -> Option<HintNorm> {
        None
    }

    /// Which artifact [`Self::build`] wants.
    fn artifact(&self) -> Option<ArtifactKind> {
        None
    }

    /// Every artifact that is wanted: by [`Self::build`], and by the engine for a learned hint.
    fn artifacts(&self) -> Vec<ArtifactKind> {
        let learned = self.hint() == HintSource::Ahead && self.hint_norm() == Some(HintNorm::Learned);
        self.artifact().into_iter().chain(learned.then_some(ArtifactKind::Hint)).collect()
    }

    /// Builds the method for a model of that shape, which has been checked.
    ///
    /// # Errors
    /// Options that do not fit the shape, or an artifact that is missing or of another model.
    fn build(&self, shape: &Shape, artifacts: &Artifacts) -> Result<Box<dyn Method>, MethodError>;

    /// A copy.
    fn boxed(&self) -> Box<dyn Spec>;
}

/// What a user chooses: a method and its options.
///
/// Its text form is `name` or `name:key=value,key=value`, and reads back as the same specification. In
/// configuration files it is that text, or a table with the key `method` and the options beside it.
pub struct MethodSpec(Box<dyn Spec>);

impl MethodSpec {
    /// The specification that these options are.
    #[must_use]
    pub fn new(spec: impl Spec) -> Self {
        Self(Box::new(spec))
    }

    /// The method's name.
    #[must_use]
    pub fn name(&self) -> &'static str {
        self.0.name()
    }

    /// The explicit budget, where there is one.
    #[must_use]
    pub fn budget(&self) -> Option<Budget> {
        self.0.budget()
    }

    /// The same method with that budget; methods without one stay as they are.
    #[must_use]
    pub fn with_budget(mut self, budget: Budget) -> Self {
        self.0.set_budget(budget);
        self
    }

    /// Which query it wants.
    #[must_use]
    pub fn hint(&self) -> HintSource {
        self.0.hint()
    }

    /// How the engine makes the hint, where the method wants one.
    #[must_use]
    pub fn hint_norm(&self) -> Option<HintNorm> {
        self.0.hint_norm()
    }

    /// Which artifact [`crate::build`] wants for it.
    #[must_use]
    pub fn artifact(&self) -> Option<ArtifactKind> {
        self.0.artifact()
    }

    /// Every artifact that is wanted for it: by [`crate::build`] one, of a mix perhaps several; and by the engine for a learned
    /// hint.
    #[must_use]
    pub fn artifacts(&self) -> Vec<ArtifactKind> {
        self.0.artifacts()
    }

    /// The options, if they are of that type.
    #[must_use]
    pub fn options<T: Spec>(&self) -> Option<&T> {
        let any: &dyn Any = &*self.0;
        any.downcast_ref()
    }

    pub(crate) fn build(&self, shape: &Shape, artifacts: &Artifacts) -> Result<Box<dyn Method>, MethodError> {
        self.0.build(shape, artifacts)
    }

    pub(crate) fn from_options(options: Options) -> Result<Self, SpecError> {
        registry::parse(options).map(Self)
    }
}

impl Clone for MethodSpec {
    fn clone(&self) -> Self {
        Self(self.0.boxed())
    }
}

impl fmt::Debug for MethodSpec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// Two are equal if they are written alike.
impl PartialEq for MethodSpec {
    fn eq(&self, other: &Self) -> bool {
        self.to_string() == other.to_string()
    }
}

impl fmt::Display for MethodSpec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut writer = OptionWriter::new(self.name());
        self.0.write(&mut writer);
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
