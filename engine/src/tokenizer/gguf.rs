//! Tokenizers from a GGUF file's metadata, rebuilt with the tokenizer library's own parts.

use std::path::Path;

use tokenizers::decoders::byte_fallback::ByteFallback;
use tokenizers::decoders::fuse::Fuse;
use tokenizers::decoders::sequence::Sequence as DecoderSequence;
use tokenizers::decoders::strip::Strip;
use tokenizers::models::bpe::BPE;
use tokenizers::normalizers::replace::Replace;
use tokenizers::normalizers::{NFC, NormalizerWrapper, Prepend, Sequence as NormalizerSequence};
use tokenizers::pre_tokenizers::PreTokenizerWrapper;
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::pre_tokenizers::digits::Digits;
use tokenizers::pre_tokenizers::sequence::Sequence as PreTokenizerSequence;
use tokenizers::pre_tokenizers::split::{Split, SplitPattern};
use tokenizers::{AddedToken, SplitDelimiterBehavior};

use super::Tokenizer;
use crate::error::LoadError;

/// Where words end in Llama 3; `{1,3}` is how many digits stay together.
const LLAMA3_WORDS: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
/// Where words end in Qwen2: as Llama 3, but every digit on its own.
const QWEN2_WORDS: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
/// What SentencePiece writes for a space.
const SPACE_MARK: &str = "▁";

/// `tokenizer.ggml.token_type` of an unknown, a control and a user-defined token.
const TYPE_UNKNOWN: u32 = 2;
const TYPE_CONTROL: u32 = 3;
const TYPE_USER: u32 = 4;

/// Tokens that end an answer whenever a vocabulary has them as control tokens: many files name only one end.
const END_NAMES: [&str; 6] =
    ["<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<|end_of_text|>", "<|endoftext|>", "</s>"];

/// `tokenizer.ggml.*` of a file.
#[derive(Debug, Default)]
pub(crate) struct VocabularySpec {
    /// `model`: gpt2 or llama.
    pub(crate) model: String,
    /// `pre`: how text is cut into words.
    pub(crate) pre: Option<String>,
    pub(crate) tokens: Vec<String>,
    /// `token_type`, empty or one per token.
    pub(crate) types: Vec<u32>,
    /// Empty or one per token.
    pub(crate) scores: Vec<f32>,
    /// Pairs with a space between, best first.
    pub(crate) merges: Vec<String>,
    pub(crate) begin: Option<u32>,
    pub(crate) end: Option<u32>,
    pub(crate) end_of_turn: Option<u32>,
    pub(crate) unknown: Option<u32>,
    pub(crate) add_begin: Option<bool>,
    pub(crate) add_space_prefix: Option<bool>,
}

/// The longest token's text, in bytes.
const TOKEN_BYTES_MAX: usize = 4096;

impl VocabularySpec {
    /// Builds the tokenizer.
    pub(crate) fn build(self, path: &Path) -> Result<Tokenizer, LoadError> {
        let failed =
            |error: tokenizers::Error| LoadError::Tokenizer { path: path.into(), reason: error.to_string() };
        let special: Vec<u32> =
            [self.begin, self.end, self.end_of_turn, self.unknown].into_iter().flatten().collect();
        // Merges are looked for at every character of every token.
        if let Some((id, token)) =
            self.tokens.iter().enumerate().find(|(_, token)| token.len() > TOKEN_BYTES_MAX)
        {
            let reason = format!(
                "token {id} has {} bytes, and the longest that is read has {TOKEN_BYTES_MAX}",
                token.len()
            );
            return Err(LoadError::Tokenizer { path: path.into(), reason });
        }
        if let Some(id) = special.iter().find(|&&id| id as usize >= self.tokens.len()) {
            let reason = format!("special token {id} is not among its {} tokens", self.tokens.len());
            return Err(LoadError::Tokenizer { path: path.into(), reason });
        }
        let (mut inner, begin_by_default) = match self.model.as_str() {
            "gpt2" => (self.byte_level(path)?, self.pre.as_deref() == Some("llama-bpe")),
            "llama" => (self.sentence_piece().map_err(failed)?, true),
            other => return Err(LoadError::UnsupportedTokenizer { kind: other.to_owned() }),
        };
        let mut added = Vec::new();
        for ((id, token), kind) in (0u32..).zip(&self.tokens).zip(&self.types) {
            let is_special = matches!(*kind, TYPE_UNKNOWN | TYPE_CONTROL) || special.contains(&id);
            if is_special || *kind == TYPE_USER {
                added.push(AddedToken::from(token.clone(), is_special).normalized(false));
            }
        }
        inner.add_tokens(added).map_err(failed)?;
        let named = (0u32..)
            .zip(self.tokens.iter().zip(&self.types))
            .filter(|(_, (token, kind))| **kind == TYPE_CONTROL && END_NAMES.contains(&token.as_str()))
            .map(|(id, _)| id);
        let ends = self.end.into_iter().chain(self.end_of_turn).chain(named).collect();
        Ok(Tokenizer::new(inner, self.begin, ends, self.add_begin.unwrap_or(begin_by_default)))
    }

    fn vocabulary(&self) -> impl Iterator<Item = (String, u32)> {
        self.tokens.iter().cloned().zip(0u32..)
    }

    /// Byte-level BPE as in GPT-2, cut into words by `pre`.
    fn byte_level(&self, path: &Path) -> Result<tokenizers::Tokenizer, LoadError> {
        let failed =
            |error: tokenizers::Error| LoadError::Tokenizer { path: path.into(), reason: error.to_string() };
        let bytes_only = || PreTokenizerWrapper::from(ByteLevel::new(false, true, false));
        let gpt2_words = || PreTokenizerWrapper::from(ByteLevel::new(false, true, true));
        let split = |pattern: &str| -> Result<PreTokenizerWrapper, LoadError> {
            let pattern = SplitPattern::Regex(pattern.to_owned());
            Ok(Split::new(pattern, SplitDelimiterBehavior::Isolated, false).map_err(failed)?.into())
        };
        let (steps, ignore_merges, nfc) = match self.pre.as_deref() {
            None | Some("default" | "gpt-2" | "gpt2") => (vec![gpt2_words()], false, false),
            Some("smollm") => (vec![Digits::new(true).into(), gpt2_words()], false, false),
            Some("llama-bpe" | "llama3" | "llama-v3") => {
                (vec![split(LLAMA3_WORDS)?, bytes_only()], true, false)
            }
            Some("qwen2") => (vec![split(QWEN2_WORDS)?, bytes_only()], false, true),
            Some(other) => {
                return Err(LoadError::UnsupportedTokenizer {
                    kind: format!("gpt2 with pre-tokenizer {other}"),
                });
            }
        };
        let merges = self.merges.iter().map(|merge| {
            // A token may begin with a space's stand-in but never holds a space itself.
            merge.split_once(' ').map(|(a, b)| (a.to_owned(), b.to_owned())).ok_or_else(|| {
                LoadError::Tokenizer { path: path.into(), reason: format!("merge {merge:?} is not a pair") }
            })
        });
        let bpe = BPE::builder()
            .vocab_and_merges(
                self.vocabulary()
                    .collect::<std::collections::HashMap<_, _>>()
                    .into_iter()
                    .collect::<tokenizers::models::bpe::Vocab>(),
                merges.collect::<Result<_, _>>()?,
            )
            .ignore_merges(ignore_merges)
            .build()
            .map_err(failed)?;
        let mut inner = tokenizers::Tokenizer::new(bpe);
        if nfc {
            inner.with_normalizer(Some(NFC)).map_err(failed)?;
        }
        inner.with_pre_tokenizer(Some(PreTokenizerSequence::new(steps)));
        inner.with_decoder(Some(ByteLevel::new(false, true, true)));
        Ok(inner)
    }

    /// SentencePiece's BPE: the best-scored pair of neighbours joins first, so every way to split a token into two others is a merge of
    /// the token's own score.
    fn sentence_piece(&self) -> Result<tokenizers::Tokenizer, tokenizers::Error> {
        let ids: std::collections::HashMap<&str, u32> =
            self.tokens.iter().map(String::as_str).zip(0u32..).collect();
        let mut merges = Vec::new();
        for (id, token) in (0u32..).zip(&self.tokens) {
            let score = self.scores.get(id as usize).copied().unwrap_or(-(id as f32));
            for (at, _) in token.char_indices().skip(1) {
                let (left, right) = token.split_at(at);
                if let (Some(&l), Some(&r)) = (ids.get(left), ids.get(right)) {
                    merges.push((score, l, r, left, right));
                }
            }
        }
        merges.sort_by(|a, b| b.0.total_cmp(&a.0).then((a.1, a.2).cmp(&(b.1, b.2))));
        let merges =
            merges.into_iter().map(|(.., left, right)| (left.to_owned(), right.to_owned())).collect();
        let mut builder = BPE::builder()
            .vocab_and_merges(self.vocabulary().collect::<tokenizers::models::bpe::Vocab>(), merges)
            .byte_fallback(true)
            .fuse_unk(true);
        if let Some(unknown) = self.unknown {
            builder = builder.unk_token(self.tokens[unknown as usize].clone());
        }
        let mut inner = tokenizers::Tokenizer::new(builder.build()?);
        let space_prefix = self.add_space_prefix.unwrap_or(true);
        let mut normalizers: Vec<NormalizerWrapper> = Vec::new();
        if space_prefix {
            normalizers.push(Prepend::new(SPACE_MARK.to_owned()).into());
        }
        normalizers.push(Replace::new(" ", SPACE_MARK)?.into());
        inner.with_normalizer(Some(NormalizerSequence::new(normalizers)))?;
        let mut decoders =
            vec![Replace::new(SPACE_MARK, " ")?.into(), ByteFallback::new().into(), Fuse::new().into()];
        if space_prefix {
            decoders.push(Strip::new(' ', 1, 0).into());
        }
        inner.with_decoder(Some(DecoderSequence::new(decoders)));
        Ok(inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(tokens: Vec<String>) -> Result<Tokenizer, LoadError> {
        VocabularySpec {
            model: "llama".into(),
            pre: None,
            types: Vec::new(),
            scores: vec![0.0; tokens.len()],
            tokens,
            merges: Vec::new(),
            begin: None,
            end: None,
            end_of_turn: None,
            unknown: Some(0),
            add_begin: None,
            add_space_prefix: None,
        }
        .build(Path::new("model.gguf"))
    }

    #[test]
    fn a_token_that_would_take_hours_to_be_taken_apart_is_refused() {
        let tokens = |longest: usize| vec!["<unk>".into(), "a".into(), "b".into(), "a".repeat(longest)];
        assert!(of(tokens(TOKEN_BYTES_MAX)).is_ok());
        let error = of(tokens(1 << 20)).unwrap_err().to_string();
        assert!(error.contains("token 3 has 1048576 bytes"), "{error}");
    }
}
