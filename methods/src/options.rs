//! The text form of specifications: `name:key=value,key=value`. A value in parentheses may hold commas, colons and equals signs.

use std::fmt::{Display, Write as _};
use std::str::FromStr;

use crate::budget::{Budget, Share};
use crate::error::SpecError;

/// The options of one specification, taken out one by one by the method that knows them.
#[derive(Debug, Clone)]
pub struct Options {
    method: String,
    pairs: Vec<(String, String)>,
}

impl Options {
    /// Splits `name:key=value,…`.
    ///
    /// # Errors
    /// A piece without `=`, a key given twice, or parentheses that do not close.
    pub fn parse(text: &str) -> Result<Self, SpecError> {
        let (name, rest) = text.trim().split_once(':').unwrap_or((text.trim(), ""));
        let mut options = Self::new(name.trim());
        let mut depth = 0_i32;
        let outside = |letter: char| {
            depth += i32::from(letter == '(') - i32::from(letter == ')');
            letter == ',' && depth == 0
        };
        let pieces: Vec<&str> = rest.split(outside).map(str::trim).collect();
        if depth != 0 {
            return Err(SpecError::NotAnOption { text: rest.into() });
        }
        for piece in pieces.into_iter().filter(|piece| !piece.is_empty()) {
            let (key, value) =
                piece.split_once('=').ok_or_else(|| SpecError::NotAnOption { text: piece.into() })?;
            options.add(key.trim(), value.trim())?;
        }
        Ok(options)
    }

    /// No options of method `method`.
    #[must_use]
    pub fn new(method: &str) -> Self {
        Self { method: method.into(), pairs: Vec::new() }
    }

    /// Adds one option.
    ///
    /// # Errors
    /// The key is there already.
    pub fn add(&mut self, key: &str, value: &str) -> Result<(), SpecError> {
        if self.pairs.iter().any(|(known, _)| known == key) {
            return Err(SpecError::Duplicate { method: self.method.clone(), option: key.into() });
        }
        self.pairs.push((key.into(), value.into()));
        Ok(())
    }

    /// The method's name.
    #[must_use]
    pub fn method(&self) -> &str {
        &self.method
    }

    /// Takes an option out as text.
    pub fn take(&mut self, key: &str) -> Option<String> {
        let at = self.pairs.iter().position(|(known, _)| known == key)?;
        Some(self.pairs.remove(at).1)
    }

    /// Takes all that are left out, as text and in the order in which they were given.
    pub fn take_all(&mut self) -> Vec<(String, String)> {
        std::mem::take(&mut self.pairs)
    }

    /// Takes out a budget.
    ///
    /// # Errors
    /// The text is no budget.
    pub fn take_budget(&mut self, key: &str) -> Result<Option<Budget>, SpecError> {
        self.take(key)
            .map(|text| text.parse().map_err(|source| SpecError::Budget { option: key.into(), source }))
            .transpose()
    }

    /// Takes out a share.
    ///
    /// # Errors
    /// The text is no share in (0, 1].
    pub fn take_share(&mut self, key: &str) -> Result<Option<Share>, SpecError> {
        self.take_value(key, "give a share above 0 % and up to 100 %", |_| true)
    }

    /// Takes out a value that parses and passes `valid`.
    ///
    /// # Errors
    /// It does not; `expected` tells the user what would.
    pub fn take_value<T: FromStr>(
        &mut self,
        key: &str,
        expected: &str,
        valid: impl Fn(&T) -> bool,
    ) -> Result<Option<T>, SpecError> {
        let Some(text) = self.take(key) else { return Ok(None) };
        match text.parse() {
            Ok(value) if valid(&value) => Ok(Some(value)),
            _ => Err(SpecError::BadValue { option: key.into(), value: text, expected: expected.into() }),
        }
    }

    /// Takes out one of a list of words.
    ///
    /// # Errors
    /// Another word.
    pub fn take_word<T: Copy>(&mut self, key: &str, words: &[(&str, T)]) -> Result<Option<T>, SpecError> {
        let Some(text) = self.take(key) else { return Ok(None) };
        words.iter().find(|(word, _)| *word == text).map(|(_, value)| Some(*value)).ok_or_else(|| {
            let list: Vec<&str> = words.iter().map(|(word, _)| *word).collect();
            SpecError::BadValue {
                option: key.into(),
                value: text,
                expected: format!("choose one of {}", list.join(", ")),
            }
        })
    }

    /// Refuses what no one took.
    ///
    /// # Errors
    /// The first option left.
    pub fn finish(self, known: &[&str]) -> Result<(), SpecError> {
        match self.pairs.into_iter().next() {
            None => Ok(()),
            Some((option, _)) => Err(SpecError::UnknownOption {
                method: self.method,
                option,
                known: if known.is_empty() {
                    "it has none".into()
                } else {
                    format!("choose from {}", known.join(", "))
                },
            }),
        }
    }
}

/// Writes `name:key=value,…`.
#[derive(Debug)]
pub struct OptionWriter {
    text: String,
    empty: bool,
}

impl OptionWriter {
    /// A specification of method `name` without options.
    #[must_use]
    pub fn new(name: &str) -> Self {
        Self { text: name.into(), empty: true }
    }

    /// Adds an option.
    pub fn option(&mut self, key: &str, value: impl Display) {
        let separator = if std::mem::take(&mut self.empty) { ':' } else { ',' };
        // Writing to a String cannot fail.
        let _ = write!(self.text, "{separator}{key}={value}");
    }

    /// Adds an option unless it has its default.
    pub fn option_unless<T: Display + PartialEq>(&mut self, key: &str, value: &T, default: &T) {
        if value != default {
            self.option(key, value);
        }
    }

    /// Adds one of a list of words unless it has its default.
    pub fn word_unless<T: Copy + PartialEq>(&mut self, key: &str, words: &[(&str, T)], value: T, default: T) {
        if value != default
            && let Some((word, _)) = words.iter().find(|(_, known)| *known == value)
        {
            self.option(key, word);
        }
    }

    /// The text.
    #[must_use]
    pub fn finish(self) -> String {
        self.text
    }
}
