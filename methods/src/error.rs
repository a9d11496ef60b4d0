//! What can be wrong with a method, its specification or its artifact.

use crate::shape::Fingerprint;

/// A budget that is none.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum BudgetError {
    /// Zero or less.
    #[error(
        "budget {text} selects nothing: give at least one row or a share above 0 % (or use the method `window`)"
    )]
    TooSmall {
        /// The value as written.
        text: String,
    },
    /// More than everything.
    #[error("budget {text} is more than all tokens: give a share up to 100 %, or rows as a whole number")]
    TooLarge {
        /// The value as written.
        text: String,
    },
    /// Not a number at all.
    #[error("budget `{text}` is no number: write a share (`6%`, `0.06`) or rows (`1024`)")]
    NotANumber {
        /// The value as written.
        text: String,
    },
}

/// A method specification that cannot be read.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SpecError {
    /// No such method.
    #[error("unknown method `{name}`: choose one of {known}")]
    UnknownMethod {
        /// The name given.
        name: String,
        /// The names there are, separated by commas.
        known: String,
    },
    /// The method has no such option.
    #[error("method `{method}` has no option `{option}`: {known}")]
    UnknownOption {
        /// The method.
        method: String,
        /// The option given.
        option: String,
        /// What it has instead.
        known: String,
    },
    /// An option given twice.
    #[error("option `{option}` of method `{method}` is given twice: keep one")]
    Duplicate {
        /// The method.
        method: String,
        /// The option.
        option: String,
    },
    /// Something that is not `key=value`.
    #[error("`{text}` is no option: write `key=value`, separated by commas")]
    NotAnOption {
        /// The piece of text.
        text: String,
    },
    /// A value that the option does not take.
    #[error("option `{option}` cannot be `{value}`: {expected}")]
    BadValue {
        /// The option.
        option: String,
        /// The value given.
        value: String,
        /// What it takes.
        expected: String,
    },
    /// Two options that exclude each other.
    #[error("options `{first}` and `{second}` exclude each other: {reason}")]
    Conflict {
        /// One option.
        first: &'static str,
        /// The other option.
        second: &'static str,
        /// Why.
        reason: &'static str,
    },
    /// Two parts of a mix that exclude each other.
    #[error("parts `{first}` and `{second}` cannot be mixed: {reason}")]
    Parts {
        /// One part.
        first: String,
        /// The other part.
        second: String,
        /// Why.
        reason: &'static str,
    },
    /// A budget that is none.
    #[error("option `{option}`: {source}")]
    Budget {
        /// The option.
        option: String,
        /// What is wrong with it.
        source: BudgetError,
    },
}

/// A method that cannot be built, or an artifact that cannot be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum MethodError {
    /// A shape that no model has.
    #[error("model shape is impossible: {reason}")]
    BadShape {
        /// What does not fit together.
        reason: String,
    },
    /// The method does not fit the model's shape.
    #[error("method `{method}` does not fit this model: {reason}")]
    Unsuitable {
        /// The method.
        method: &'static str,
        /// What does not fit.
        reason: String,
    },
    /// Two parts of a mix that exclude each other.
    #[error("parts `{first}` and `{second}` cannot be mixed: {reason}")]
    Parts {
        /// One part.
        first: String,
        /// The other part.
        second: String,
        /// Why.
        reason: &'static str,
    },
    /// The method needs an artifact and got none.
    #[error("method `{method}` needs {artifact}: calibrate the model first")]
    ArtifactMissing {
        /// The method.
        method: &'static str,
        /// What it needs.
        artifact: &'static str,
    },
    /// The artifact was made for another shape.
    #[error("the artifact is for {found}, the model has {expected}: calibrate again with this model")]
    ArtifactShape {
        /// The model's shape, in words.
        expected: String,
        /// The artifact's shape, in words.
        found: String,
    },
    /// The artifact was made from other weights.
    #[error("the artifact was calibrated on model {found}, this is model {expected}: calibrate again")]
    ArtifactFingerprint {
        /// The model's fingerprint.
        expected: Fingerprint,
        /// The artifact's fingerprint.
        found: Fingerprint,
    },
    /// Calibration data that no matrix can be made from.
    #[error("cannot calibrate layer {layer}, KV head {kv_head}: {reason}")]
    Calibration {
        /// The layer.
        layer: usize,
        /// The KV head.
        kv_head: usize,
        /// Why not.
        reason: String,
    },
    /// Calibration data of a whole layer that nothing can be learnt from.
    #[error("cannot calibrate layer {layer}: {reason}")]
    LayerCalibration {
        /// The layer.
        layer: usize,
        /// Why not.
        reason: String,
    },
    /// Bytes that hold no artifact.
    #[error("cannot read the artifact: {reason}")]
    ArtifactFormat {
        /// What is wrong with it.
        reason: String,
    },
}
