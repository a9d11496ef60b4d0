//! What methods know of a registered model.

use std::fmt;
use std::ops::Range;
use std::str::FromStr;

use kvoyant_kernels::Dtype;

use crate::error::MethodError;

/// 128 bits that tell one model's weights from another's; written as 32 hexadecimal digits.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct Fingerprint(pub [u8; 16]);

impl fmt::Display for Fingerprint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for Fingerprint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Fingerprint({self})")
    }
}

impl FromStr for Fingerprint {
    type Err = MethodError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let bad = || MethodError::ArtifactFormat {
            reason: format!("fingerprint `{text}` is not 32 hexadecimal digits"),
        };
        if text.len() != 32 || !text.bytes().all(|byte| byte.is_ascii_hexdigit()) {
            return Err(bad());
        }
        u128::from_str_radix(text, 16).map(|value| Self(value.to_be_bytes())).map_err(|_| bad())
    }
}

/// Shape of a registered model as methods see it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Shape {
    /// Layers of the model.
    pub layers: usize,
    /// Query heads of a layer, a multiple of `kv_heads`.
    pub query_heads: usize,
    /// KV heads of a layer.
    pub kv_heads: usize,
    /// Values of one key, `d`.
    pub head_dim: usize,
    /// Values of one value, `dv`: as many, but for latent rows, whose first values are the value.
    pub value_dim: usize,
    /// Rows (tokens) of a page, `P`.
    pub page_rows: usize,
    /// First tokens that are always attended, `S`.
    pub sinks: usize,
    /// Newest tokens that are always attended, `W`, the current one among them.
    pub window: usize,
    /// Layers `0..dense_layers` are attended whole and never speculated.
    pub dense_layers: usize,
    /// Storage type of rows.
    pub dtype: Dtype,
    /// Which weights the model has, to tell whether an artifact is its own.
    pub fingerprint: Fingerprint,
}

impl Shape {
    /// Query heads of one KV head, `g`.
    #[must_use]
    pub fn group(&self) -> usize {
        self.query_heads / self.kv_heads
    }

    /// Tokens that a selection may name when the sequence has `tokens` tokens, the current one among them:
    /// `[S, n − W)`, empty while everything is sink or window.
    #[must_use]
    pub fn candidates(&self, tokens: usize) -> Range<usize> {
        self.sinks..tokens.saturating_sub(self.window).max(self.sinks)
    }

    /// Whether the numbers fit together.
    ///
    /// # Errors
    /// [`MethodError::BadShape`] with the numbers that do not.
    pub fn check(&self) -> Result<(), MethodError> {
        let bad = |reason: String| Err(MethodError::BadShape { reason });
        for (name, value) in [
            ("layers", self.layers),
            ("query heads", self.query_heads),
            ("KV heads", self.kv_heads),
            ("head dimension", self.head_dim),
            ("value dimension", self.value_dim),
            ("page rows", self.page_rows),
        ] {
            if value == 0 {
                return bad(format!("it has 0 {name}"));
            }
        }
        if !self.query_heads.is_multiple_of(self.kv_heads) {
            return bad(format!(
                "{} query heads are no multiple of {} KV heads",
                self.query_heads, self.kv_heads
            ));
        }
        if self.window == 0 {
            return bad("a window of 0 would leave out the current token".into());
        }
        for (name, value) in [("head", self.head_dim), ("value", self.value_dim)] {
            if value > usize::from(u16::MAX) {
                return bad(format!("{name} dimension {value} is above {}", u16::MAX));
            }
        }
        Ok(())
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// Two layers, two KV heads with two query heads each, d = 8, P = 32, S = 4, W = 8.
    pub(crate) fn small() -> Shape {
        Shape {
            layers: 2,
            query_heads: 4,
            kv_heads: 2,
            head_dim: 8,
            value_dim: 8,
            page_rows: 32,
            sinks: 4,
            window: 8,
            dense_layers: 0,
            dtype: Dtype::F32,
            fingerprint: Fingerprint([7; 16]),
        }
    }

    #[test]
    fn candidates_leave_out_sinks_and_window() {
        let shape = small();
        assert_eq!(shape.candidates(100), 4..92);
        assert!(shape.candidates(12).is_empty());
        assert!(shape.candidates(3).is_empty());
        assert_eq!(shape.candidates(13), 4..5);
    }

    #[test]
    fn a_shape_that_does_not_fit_together_is_refused_with_its_numbers() {
        let shape = Shape { query_heads: 9, kv_heads: 4, ..small() };
        let message = shape.check().unwrap_err().to_string();
        assert!(message.contains('9') && message.contains('4'), "{message}");
        assert!(Shape { window: 0, ..small() }.check().is_err());
        assert!(Shape { kv_heads: 0, ..small() }.check().is_err());
        assert_eq!(small().check(), Ok(()));
    }

    #[test]
    fn a_fingerprint_reads_back_from_its_digits() {
        let print = Fingerprint([0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 255]);
        assert_eq!(print.to_string().parse(), Ok(print));
        assert!("+123456789abcdef0123456789abcdef".parse::<Fingerprint>().is_err());
    }
}
