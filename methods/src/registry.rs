//! The one place that knows all methods: their names, and how their options are read.

use crate::artifact::Artifacts;
use crate::budget::{Budget, Share};
use crate::error::{MethodError, SpecError};
use crate::method::Method;
use crate::options::Options;
use crate::shape::Shape;
use crate::spec::{MethodSpec, Spec};
use crate::{
    attention_predictor, clo, dynsplit, freekv, full, given, hata, hetero, infinigen, kvoyant, louver, mix,
    oracle, quest, random, resv, scout, shadowkv, window,
};

/// A method that a user can name.
#[derive(Debug, Clone, Copy)]
pub struct Entry {
    /// Its name.
    pub name: &'static str,
    /// What it does, in a few words.
    pub about: &'static str,
    /// Reads its options.
    pub(crate) parse: fn(Options) -> Result<Box<dyn Spec>, SpecError>,
}

/// Every method. To add one is to write its module and name it here.
pub const METHODS: &[&Entry] = &[
    &kvoyant::ENTRY,
    &full::ENTRY,
    &quest::ENTRY,
    &infinigen::ENTRY,
    &shadowkv::ENTRY,
    &freekv::ENTRY,
    &hata::ENTRY,
    &clo::ENTRY,
    &attention_predictor::ENTRY,
    &scout::ENTRY,
    &hetero::ENTRY,
    &dynsplit::ENTRY,
    &resv::ENTRY,
    &louver::ENTRY,
    &given::ENTRY,
    &window::ENTRY,
    &random::ENTRY,
    &oracle::ENTRY,
    &mix::ENTRY,
];

/// Every method's name.
pub fn names() -> impl Iterator<Item = &'static str> {
    METHODS.iter().map(|entry| entry.name)
}

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

pub(crate) fn parse(options: Options) -> Result<Box<dyn Spec>, SpecError> {
    match METHODS.iter().find(|entry| entry.name == options.method()) {
        Some(entry) => (entry.parse)(options),
        None => {
            let known: Vec<_> = names().collect();
            Err(SpecError::UnknownMethod { name: options.method().into(), known: known.join(", ") })
        }
    }
}

/// Builds the method that `spec` names, for a model of that shape.
///
/// # Errors
/// A shape that is none, options that do not fit it, or an artifact that is missing or of another model.
pub fn build(
    spec: &MethodSpec,
    shape: &Shape,
    artifacts: &Artifacts,
) -> Result<Box<dyn Method>, MethodError> {
    shape.check()?;
    spec.build(shape, artifacts)
}

#[cfg(test)]
mod every_method;
#[cfg(test)]
mod tests;
