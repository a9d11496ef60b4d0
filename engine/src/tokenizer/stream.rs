//! Text while it is generated: never half a character.

use super::Tokenizer;
use crate::error::TextError;

/// What a decoder shows for bytes that are no character (yet).
const REPLACEMENT: char = '\u{FFFD}';

/// Tokens that may be the beginning of a character: it has at most four bytes, and a token at least one.
const BEGUN: usize = 3;

/// Most tokens that are held back, where no place is found at which their text can be divided.
const HELD: usize = 8;

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
        let end = self.tokens.len();
        let text = self.text_to(end)?;
        let held = end - self.shown;
        if text.is_empty() {
            // Special tokens have no text, and nothing that follows changes that.
            if held > HELD {
                self.tokens.remove(self.shown);
            }
            return Ok(text);
        }
        if !text.ends_with(REPLACEMENT) || held >= HELD {
            return Ok(self.show(end, text));
        }
        if held > BEGUN {
            // No character that is still to come begins before the last few tokens; one that is there must not be divided.
            for cut in end - BEGUN..end {
                let (settled, rest) = (self.text_to(cut)?, self.tokenizer.decode(&self.tokens[cut..])?);
                if text.strip_prefix(&*settled) == Some(&rest) {
                    return Ok(self.show(cut, settled));
                }
            }
        }
        Ok(String::new())
    }

    /// The text that is still held back, with a mark for what never became a character.
    pub fn finish(self) -> Result<String, TextError> {
        self.text_to(self.tokens.len())
    }

    /// From now on the tokens up to `end` are text.
    fn show(&mut self, end: usize, text: String) -> String {
        self.context = self.shown;
        self.shown = end;
        text
    }

    /// What the tokens up to `end` read beyond what is shown.
    fn text_to(&self, end: usize) -> Result<String, TextError> {
        let shown = self.tokenizer.decode(&self.tokens[self.context..self.shown])?;
        let all = self.tokenizer.decode(&self.tokens[self.context..end])?;
        Ok(all.get(shown.len()..).unwrap_or_default().to_owned())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The text of bytes, each a token of the tiny model's, and how many were decoded together at most.
    fn streamed(bytes: &[u8]) -> (String, usize) {
        let model = crate::synthetic::tiny(1);
        let mut stream = model.tokenizer().stream();
        let (mut text, mut widest) = (String::new(), 0);
        for (at, byte) in bytes.iter().enumerate() {
            text += &stream.push(u32::from(*byte)).unwrap();
            widest = widest.max(stream.tokens.len() - stream.context);
            assert!(at + 1 - stream.shown <= BEGUN, "held back at {at}");
        }
        text += &stream.finish().unwrap();
        (text, widest)
    }

    #[test]
    fn bytes_that_are_no_characters_come_out_as_they_go() {
        let (text, widest) = streamed(&[0x80; 500]);
        assert_eq!(text.chars().count(), 500);
        assert!(widest <= 2 * HELD, "{widest} tokens are decoded together");
    }

    #[test]
    fn characters_come_whole_behind_bytes_that_are_none() {
        for before in 0..10 {
            let mut bytes = vec![0x80; before];
            bytes.extend("😀€é, and on".as_bytes());
            bytes.extend([0xF0, 0x9F, 0x80, 0x80, 0x80, 0xE2]);
            bytes.extend("€".as_bytes());
            let (text, _) = streamed(&bytes);
            assert_eq!(text, String::from_utf8_lossy(&bytes), "{before}");
        }
    }
}
