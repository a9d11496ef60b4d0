//! Names of images: they become names of folders, objects and keys, so they are checked once and for all.

use std::fmt;
use std::str::FromStr;

use thiserror::Error;

/// Most characters of an id.
pub const ID_MAX: usize = 128;

/// The name of an image: 1 to [`ID_MAX`] of `A-Z a-z 0-9 . _ -`, the first of which is no dot.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ImageId(String);

/// Why a text is no id.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum IdError {
    /// There must be something.
    #[error(
        "the id of an image is empty; give it 1 to {ID_MAX} of A-Z, a-z, 0-9, dot, underscore and hyphen"
    )]
    Empty,
    /// Folders and keys have limits.
    #[error("the id of an image has {characters} characters and may have {ID_MAX}")]
    TooLong {
        /// How many it has.
        characters: usize,
    },
    /// Names with a leading dot are the store's own.
    #[error("the id of an image begins with a dot, and such names are the store's own")]
    LeadingDot,
    /// What could mean something to a file system or a server.
    #[error("the id of an image has {found:?} at {at}; take A-Z, a-z, 0-9, dot, underscore and hyphen")]
    Character {
        /// What is there.
        found: char,
        /// Where, in characters.
        at: usize,
    },
}

impl ImageId {
    /// The text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for ImageId {
    type Err = IdError;

    fn from_str(text: &str) -> Result<Self, IdError> {
        if text.is_empty() {
            return Err(IdError::Empty);
        }
        let good = |character: char| character.is_ascii_alphanumeric() || "._-".contains(character);
        if let Some((at, found)) = text.chars().enumerate().find(|(_, character)| !good(*character)) {
            return Err(IdError::Character { found, at });
        }
        if text.len() > ID_MAX {
            return Err(IdError::TooLong { characters: text.len() });
        }
        if text.starts_with('.') {
            return Err(IdError::LeadingDot);
        }
        Ok(Self(text.to_owned()))
    }
}

impl fmt::Display for ImageId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_could_lead_out_of_a_folder_is_no_id() {
        let parse = |text: &str| text.parse::<ImageId>();
        assert_eq!(parse("chat-7.A_b").unwrap().as_str(), "chat-7.A_b");
        assert_eq!(parse(""), Err(IdError::Empty));
        assert_eq!(parse(".hidden"), Err(IdError::LeadingDot));
        assert_eq!(parse(".."), Err(IdError::LeadingDot));
        assert_eq!(parse("a/b"), Err(IdError::Character { found: '/', at: 1 }));
        assert_eq!(parse("a\0"), Err(IdError::Character { found: '\0', at: 1 }));
        assert_eq!(parse("é"), Err(IdError::Character { found: 'é', at: 0 }));
        assert!(parse(&"a".repeat(ID_MAX)).is_ok());
        assert_eq!(parse(&"a".repeat(129)), Err(IdError::TooLong { characters: 129 }));
    }
}
