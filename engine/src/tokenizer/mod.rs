//! Text to tokens and back.

mod gguf;
mod marks;
mod stream;

use std::path::Path;

pub(crate) use gguf::VocabularySpec;
pub use stream::TextStream;

use crate::error::{LoadError, TextError};

/// A model's tokenizer with the tokens that begin and end a text.
#[derive(Debug, Clone)]
pub struct Tokenizer {
    inner: tokenizers::Tokenizer,
    begin: Option<u32>,
    /// Every token that ends an answer.
    ends: Vec<u32>,
    /// `begin` is put before a text by us, not by `inner`.
    prepend_begin: bool,
}

impl Tokenizer {
    pub(crate) fn new(
        inner: tokenizers::Tokenizer,
        begin: Option<u32>,
        mut ends: Vec<u32>,
        prepend_begin: bool,
    ) -> Self {
        ends.sort_unstable();
        ends.dedup();
        Self { inner, begin, ends, prepend_begin }
    }

    /// Reads a tokenizer.json; begin and end tokens are known by name or id from the folder's other files.
    pub(crate) fn from_json(
        path: &Path,
        begin: Option<&str>,
        end: Option<&str>,
        mut ends: Vec<u32>,
    ) -> Result<Self, LoadError> {
        let bytes = std::fs::read(path).map_err(|source| match source.kind() {
            std::io::ErrorKind::NotFound => {
                LoadError::TokenizerMissing { path: path.parent().unwrap_or(path).into() }
            }
            _ => LoadError::Io { path: path.into(), source },
        })?;
        let inner = tokenizers::Tokenizer::from_bytes(bytes)
            .map_err(|error| LoadError::Tokenizer { path: path.into(), reason: error.to_string() })?;
        let begin = begin.and_then(|token| inner.token_to_id(token));
        ends.extend(end.and_then(|token| inner.token_to_id(token)));
        Ok(Self::new(inner, begin, ends, false))
    }

    /// Tokens of a text; with `add_special` also those that the model wants around a text (such as its begin token). Special tokens
    /// that are written out in the text are recognised either way.
    pub fn encode(&self, text: &str, add_special: bool) -> Result<Vec<u32>, TextError> {
        let encoding =
            self.inner.encode(text, add_special).map_err(|error| TextError::Tokenizer(error.to_string()))?;
        let begin = self.begin.filter(|_| add_special && self.prepend_begin);
        Ok(begin.into_iter().chain(encoding.get_ids().iter().copied()).collect())
    }

    /// Text of tokens, without special ones.
    pub fn decode(&self, tokens: &[u32]) -> Result<String, TextError> {
        self.inner.decode(tokens, true).map_err(|error| TextError::Tokenizer(error.to_string()))
    }

    /// Text of one token after another, as they come.
    pub fn stream(&self) -> TextStream<'_> {
        TextStream::new(self)
    }

    /// The token that begins a text, if the model has one.
    pub fn begin(&self) -> Option<u32> {
        self.begin
    }

    /// The tokens that end an answer, sorted.
    pub fn ends(&self) -> &[u32] {
        &self.ends
    }

    /// Whether `token` ends an answer.
    pub fn is_end(&self, token: u32) -> bool {
        self.ends.binary_search(&token).is_ok()
    }

    /// The id of a token as it is written in the vocabulary.
    pub fn id(&self, token: &str) -> Option<u32> {
        self.inner.token_to_id(token)
    }

    /// A token as it is written in the vocabulary.
    pub fn token(&self, id: u32) -> Option<String> {
        self.inner.id_to_token(id)
    }

    /// Tokens, added ones included.
    pub fn vocabulary(&self) -> usize {
        self.inner.get_vocab_size(true)
    }

    /// The tokenizer library's own object.
    pub fn inner(&self) -> &tokenizers::Tokenizer {
        &self.inner
    }
}
