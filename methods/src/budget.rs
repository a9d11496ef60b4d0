//! How many rows per KV head a selection may hold.

use std::fmt;
use std::num::NonZeroUsize;
use std::str::FromStr;

use crate::error::BudgetError;

/// A share in (0, 1], written as `30%` or `0.3`.
#[derive(Debug, Clone, Copy, PartialEq, PartialOrd)]
pub struct Share(f64);

impl Share {
    /// A share from its value.
    ///
    /// # Errors
    /// Zero, negative, above 1 or not a number.
    pub fn new(value: f64) -> Result<Self, BudgetError> {
        if value.is_nan() {
            Err(BudgetError::NotANumber { text: "NaN".into() })
        } else if value <= 0.0 {
            Err(BudgetError::TooSmall { text: value.to_string() })
        } else if value > 1.0 {
            Err(BudgetError::TooLarge { text: percent(value) })
        } else {
            Ok(Self(value))
        }
    }

    /// The share, in (0, 1].
    #[must_use]
    pub fn get(self) -> f64 {
        self.0
    }

    /// `⌊share · count⌋`, at least 1.
    #[must_use]
    pub fn of(self, count: usize) -> usize {
        // 0.29 · 100 is 28.999… in binary: what a user wrote as 29 % of 100 is 29.
        const ROUNDING: f64 = 1e-9;
        ((self.0 * count as f64 + ROUNDING) as usize).max(1)
    }
}

impl FromStr for Share {
    type Err = BudgetError;

    /// Reads `30%` or `0.3`.
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let text = text.trim();
        let number = |number: &str| {
            number.trim_end().parse::<f64>().map_err(|_| BudgetError::NotANumber { text: text.into() })
        };
        let value = match text.strip_suffix('%') {
            Some(percent) => number(percent)? / 100.0,
            None => number(text)?,
        };
        // A user reads the value back as written, not as the share it was turned into.
        Self::new(value).map_err(|error| match error {
            BudgetError::TooSmall { .. } => BudgetError::TooSmall { text: text.into() },
            BudgetError::TooLarge { .. } => BudgetError::TooLarge { text: text.into() },
            BudgetError::NotANumber { .. } => BudgetError::NotANumber { text: text.into() },
        })
    }
}

impl fmt::Display for Share {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&percent(self.0))
    }
}

/// The shortest percentage that reads back as `share`.
fn percent(share: f64) -> String {
    (0..=15)
        .map(|digits| format!("{:.digits$}", share * 100.0))
        .find(|text| text.parse::<f64>().is_ok_and(|value| value / 100.0 == share))
        .map_or_else(|| share.to_string(), |text| text + "%")
}

/// Rows per KV head that a selection may hold, without sinks and window.
///
/// Written as `6%`, `0.06` (both: a share of the sequence's tokens) or `1024` (rows).
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Budget {
    /// A share of the sequence's tokens.
    Share(Share),
    /// That many rows, whatever the sequence's length.
    Rows(NonZeroUsize),
}

impl Budget {
    /// A share of the sequence's tokens, in (0, 1].
    ///
    /// # Errors
    /// As [`Share::new`].
    pub fn share(value: f64) -> Result<Self, BudgetError> {
        Share::new(value).map(Self::Share)
    }

    /// An absolute number of rows.
    ///
    /// # Errors
    /// Zero rows: the method `window` selects nothing.
    pub fn rows(rows: usize) -> Result<Self, BudgetError> {
        NonZeroUsize::new(rows).map(Self::Rows).ok_or_else(|| BudgetError::TooSmall { text: "0".into() })
    }

    /// The budget in rows for a sequence of `tokens` tokens, at least 1.
    #[must_use]
    pub fn rows_of(self, tokens: usize) -> usize {
        match self {
            Self::Share(share) => share.of(tokens),
            Self::Rows(rows) => rows.get(),
        }
    }

    /// The share, where the budget is one.
    #[must_use]
    pub fn as_share(self) -> Option<f64> {
        match self {
            Self::Share(share) => Some(share.get()),
            Self::Rows(_) => None,
        }
    }
}

impl fmt::Display for Budget {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Share(share) => share.fmt(f),
            Self::Rows(rows) => rows.fmt(f),
        }
    }
}

impl FromStr for Budget {
    type Err = BudgetError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text.trim().parse() {
            Ok(rows) => Self::rows(rows),
            Err(_) => text.parse().map(Self::Share),
        }
    }
}

impl serde::Serialize for Budget {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> serde::Deserialize<'de> for Budget {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn percent_decimal_and_rows_are_read() {
        assert_eq!("6%".parse(), Budget::share(0.06));
        assert_eq!("0.06".parse(), Budget::share(0.06));
        assert_eq!(" 1024 ".parse(), Budget::rows(1024));
        assert_eq!("100%".parse(), Budget::share(1.0));
    }

    #[test]
    fn what_is_no_budget_is_refused_with_the_value_as_written() {
        let error = |text: &str| text.parse::<Budget>().unwrap_err();
        assert_eq!(error("0"), BudgetError::TooSmall { text: "0".into() });
        assert_eq!(error("0%"), BudgetError::TooSmall { text: "0%".into() });
        assert_eq!(error("-3%"), BudgetError::TooSmall { text: "-3%".into() });
        assert_eq!(error("101%"), BudgetError::TooLarge { text: "101%".into() });
        assert_eq!(error("1.5"), BudgetError::TooLarge { text: "1.5".into() });
        assert_eq!(error("inf"), BudgetError::TooLarge { text: "inf".into() });
        assert_eq!(error("NaN"), BudgetError::NotANumber { text: "NaN".into() });
        assert_eq!(error("NaN%"), BudgetError::NotANumber { text: "NaN%".into() });
        assert_eq!(error("six"), BudgetError::NotANumber { text: "six".into() });
        assert!(error("101%").to_string().contains("101%"));
    }

    #[test]
    fn a_share_of_a_round_count_is_what_a_reader_computes() {
        for percent in 1..=100_u32 {
            let budget: Budget = format!("{percent}%").parse().unwrap();
            assert_eq!(budget.rows_of(100), percent as usize);
            assert_eq!(budget.rows_of(2000), 20 * percent as usize);
        }
        assert_eq!(Budget::share(0.06).unwrap().rows_of(3), 1, "never nothing");
    }

    proptest! {
        #[test]
        fn display_reads_back_as_the_same_budget(value in 1e-6_f64..=1.0, rows in 1_usize..1_000_000) {
            let share = Budget::share(value).unwrap();
            prop_assert_eq!(share.to_string().parse(), Ok(share));
            let rows = Budget::rows(rows).unwrap();
            prop_assert_eq!(rows.to_string().parse(), Ok(rows));
        }
    }
}
