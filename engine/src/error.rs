//! Everything that can go wrong, with the values that explain it.

use std::path::PathBuf;

/// Why a model could not be loaded.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LoadError {
    /// Nothing is at the path.
    #[error("there is no model at {}: name a GGUF file or a folder with config.json", path.display())]
    Missing {
        /// What was asked for.
        path: PathBuf,
    },
    /// The path is neither a GGUF file nor a checkpoint folder.
    #[error("{} is not a model ({reason}): name a GGUF file or a Hugging Face checkpoint folder", path.display())]
    NotAModel {
        /// What was asked for.
        path: PathBuf,
        /// What was seen there.
        reason: String,
    },
    /// The operating system refused to read.
    #[error("cannot read {}: {source}; check the file's permissions", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// The system's answer.
        source: std::io::Error,
    },
    /// A file that belongs to the checkpoint is not there.
    #[error("{} is missing (named by {named_by}): download the checkpoint again", path.display())]
    MissingFile {
        /// The absent file.
        path: PathBuf,
        /// What names it.
        named_by: String,
    },
    /// A file ends before what its header promises.
    #[error("{} is truncated: {needed} bytes are needed and {found} are there; download it again", path.display())]
    Truncated {
        /// The file.
        path: PathBuf,
        /// Bytes that the header promises.
        needed: u64,
        /// Bytes that the file has.
        found: u64,
    },
    /// A file does not follow its own format.
    #[error("{} is malformed: {reason}; download it again", path.display())]
    Malformed {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// The file's SHA-256 is not the expected one.
    #[error("{} has SHA-256 {found}, expected {expected}: delete it and download it again", path.display())]
    Checksum {
        /// The file.
        path: PathBuf,
        /// The sum that was asked for, in hex.
        expected: String,
        /// The file's own sum, in hex.
        found: String,
    },
    /// A tensor that the architecture needs is in none of the files.
    #[error("tensor {tensor} is missing from {}: the checkpoint is incomplete or of another architecture", path.display())]
    MissingTensor {
        /// The tensor's name in the file's own naming.
        tensor: String,
        /// File or folder.
        path: PathBuf,
    },
    /// A tensor's shape is not what the configuration implies.
    #[error(
        "tensor {tensor} has shape {found:?}, but the configuration asks for {expected:?}: file and configuration do not belong together"
    )]
    WrongShape {
        /// The tensor's name in the file's own naming.
        tensor: String,
        /// Shape by the configuration, outermost first.
        expected: Vec<usize>,
        /// Shape in the file, outermost first.
        found: Vec<usize>,
    },
    /// A safetensors dtype that is not a float.
    #[error(
        "tensor {tensor} is stored as {dtype}: only F64, F32, F16 and BF16 are supported, so convert the checkpoint"
    )]
    UnknownDtype {
        /// The tensor.
        tensor: String,
        /// The dtype's name.
        dtype: String,
    },
    /// A GGML type that this build cannot read.
    #[error(
        "tensor {tensor} has GGML type {id}, which is not supported: use a file in F32, F16, BF16, Q4_0 … Q8_0 or Q2_K … Q6_K"
    )]
    UnknownGgmlType {
        /// The tensor.
        tensor: String,
        /// The type's number in the file.
        id: u32,
    },
    /// An architecture that is not implemented.
    #[error("architecture {name} is not supported: use a Llama, Mistral or Qwen2 model (GGUF: llama, qwen2)")]
    UnknownArchitecture {
        /// What the file calls itself.
        name: String,
    },
    /// A configuration value that is not implemented.
    #[error("{key} = {value} is not supported: {supported}")]
    UnsupportedConfig {
        /// The key, in the file's own naming.
        key: String,
        /// Its value.
        value: String,
        /// What would be.
        supported: String,
    },
    /// A key that cannot be guessed.
    #[error("{key} is missing from {}: the file is incomplete", path.display())]
    MissingKey {
        /// The key, in the file's own naming.
        key: String,
        /// The file.
        path: PathBuf,
    },
    /// There are weights, but no tokenizer.
    #[error("no tokenizer in {}: put the model's tokenizer.json beside config.json", path.display())]
    TokenizerMissing {
        /// The folder or file.
        path: PathBuf,
    },
    /// A tokenizer kind that is not implemented.
    #[error(
        "tokenizer {kind} is not supported: use a file with tokenizer gpt2 or llama, or a folder with tokenizer.json"
    )]
    UnsupportedTokenizer {
        /// The kind by the file's own naming.
        kind: String,
    },
    /// The tokenizer's data contradicts itself.
    #[error("the tokenizer in {} cannot be built: {reason}", path.display())]
    Tokenizer {
        /// The file.
        path: PathBuf,
        /// What the tokenizer library says.
        reason: String,
    },
    /// The chat template does not parse.
    #[error("the chat template cannot be parsed: {reason}; run without it (raw prompt)")]
    ChatTemplate {
        /// The template engine's words.
        reason: String,
    },
}

/// Why text could not be turned into tokens or back.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TextError {
    /// The tokenizer refused.
    #[error("the tokenizer failed: {0}")]
    Tokenizer(String),
    /// The template refused, for instance through `raise_exception`.
    #[error("the chat template failed: {0}")]
    Template(String),
}

/// Why a prefill or a step failed; `E` is the backend's own error.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ForwardError<E: std::error::Error + 'static> {
    /// The sequence would be longer than the model's positions.
    #[error("{tokens} tokens do not fit the model's context of {context}: shorten the text")]
    ContextExceeded {
        /// Tokens that the sequence would have.
        tokens: usize,
        /// Positions that the model has.
        context: usize,
    },
    /// A token id that the embedding does not have.
    #[error("token {token} is not in the vocabulary of {vocabulary}")]
    TokenOutOfVocabulary {
        /// The id.
        token: u32,
        /// Rows of the embedding.
        vocabulary: usize,
    },
    /// A step needs exactly one token per sequence, a prefill at least one.
    #[error("{tokens} tokens were given for {sequences} sequences")]
    BatchMismatch {
        /// Sequences in the batch.
        sequences: usize,
        /// Tokens that came with them.
        tokens: usize,
    },
    /// The caller's progress callback asked to stop.
    #[error("stopped after {done} of {total} prompt tokens")]
    Interrupted {
        /// Tokens that are in the cache.
        done: usize,
        /// Tokens that were to be.
        total: usize,
    },
    /// The place where K and V live failed.
    #[error(transparent)]
    Backend(#[from] E),
}
