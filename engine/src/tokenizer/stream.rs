//! Text while it is generated: never half a character.

use super::Tokenizer;
use crate::error::TextError;

/// What a decoder shows for bytes that are no character (yet).
const REPLACEMENT: char = '\u{FFFD}';

/// Turns tokens into text one by one. A token may end amid a character, and how a token reads may depend on the one before it, so text
/// comes out only as far as later tokens cannot change it.
#[derive(Debug)]
pub struct TextStream<'a> {
    tokenizer: &'a Tokenizer,
    tokens: Vec<u32>,
    /// Tokens from here on are decoded together, as context of the next.
    context: usize,
    /// Tokens up to here are already text.
    shown: usize,
}

impl<'a> TextStream<'a> {
    pub(super) fn new(tokenizer: &'a Tokenizer) -> Self {
        Self { tokenizer, tokens: Vec::new(), context: 0, shown: 0 }
    }

    /// Takes a token and returns the text that it completes, often empty.
    pub fn push(&mut self, token: u32) -> Result<String, TextError> {
        self.tokens.push(token);
        let text = self.pending()?;
        if text.is_empty() || text.ends_with(REPLACEMENT) {
            return Ok(String::new());
        }
        self.context = self.shown;
        self.shown = self.tokens.len();
        Ok(text)
    }

    /// The text that is still held back, with a mark for what never became a character.
    pub fn finish(self) -> Result<String, TextError> {
        self.pending()
    }

    /// What all tokens read beyond what is shown.
    fn pending(&self) -> Result<String, TextError> {
        let shown = self.tokenizer.decode(&self.tokens[self.context..self.shown])?;
        let all = self.tokenizer.decode(&self.tokens[self.context..])?;
        Ok(all.get(shown.len()..).unwrap_or_default().to_owned())
    }
}
