//! The prompt, from the command line to tokens that fit.

use std::io::{self, Read};
use std::path::{Path, PathBuf};

use kvoyant_engine::{Message, Model, TextError};

use crate::args::RunArgs;

/// Why there is no prompt.
#[derive(Debug, thiserror::Error)]
pub(crate) enum PromptError {
    /// The file cannot be read.
    #[error("the prompt {} cannot be read: {error}", .path.display())]
    Read {
        /// Which file.
        path: PathBuf,
        /// Why not.
        error: io::Error,
    },
    /// There is nothing in it.
    #[error("the prompt is empty: give it with --prompt TEXT or --file FILE")]
    Empty,
    /// The model has no place for it.
    #[error(
        "the prompt has {tokens} tokens and the model's context is {context}: shorten it to fewer than {context} tokens"
    )]
    TooLong {
        /// What it has.
        tokens: usize,
        /// What the model takes, answer included.
        context: usize,
    },
    /// The tokenizer or the chat template refused.
    #[error(transparent)]
    Text(#[from] TextError),
}

/// The prompt as the user gave it.
///
/// # Errors
/// If it cannot be read, or is empty.
pub(crate) fn text(args: &RunArgs) -> Result<String, PromptError> {
    let text = match (&args.prompt, &args.file) {
        (Some(text), _) => text.clone(),
        (None, Some(path)) => read(path).map_err(|error| PromptError::Read { path: path.clone(), error })?,
        // The command line asks for one of the two.
        (None, None) => String::new(),
    };
    if text.trim().is_empty() { Err(PromptError::Empty) } else { Ok(text) }
}

/// The prompt's tokens, in the model's chat template unless `raw`.
///
/// # Errors
/// If they leave no room for a single token of answer.
pub(crate) fn tokens(text: String, raw: bool, model: &Model) -> Result<Vec<u32>, PromptError> {
    let tokens = match model.chat_template().filter(|_| !raw) {
        Some(template) => model.tokenizer().encode(&template.render(&[Message::user(text)], true)?, false)?,
        None => model.tokenizer().encode(&text, true)?,
    };
    let context = model.config().context_tokens;
    if tokens.len() >= context {
        return Err(PromptError::TooLong { tokens: tokens.len(), context });
    }
    Ok(tokens)
}

fn read(path: &Path) -> io::Result<String> {
    if path == Path::new("-") {
        let mut text = String::new();
        io::stdin().read_to_string(&mut text)?;
        return Ok(text);
    }
    std::fs::read_to_string(path)
}
