//! From files to a [`Model`].

mod assemble;
mod folder;
mod gguf_header;
mod gguf_model;
mod gguf_tensors;
mod names;
mod safetensors_files;

use std::fmt::Write as _;
use std::io::Read;
use std::path::Path;
use std::sync::Arc;

use sha2::{Digest, Sha256};

pub(crate) use assemble::{Parts, TensorSource, assemble};
pub(crate) use gguf_tensors::interleaved_order;
pub(crate) use names::{LayerTensor, TensorName};

use crate::error::LoadError;
use crate::model::Model;
use crate::weights::WeightsMode;

/// First bytes of a GGUF file.
const GGUF_MAGIC: [u8; 4] = *b"GGUF";

/// Bytes that a checksum reads at a time.
const CHECKSUM_BLOCK_BYTES: usize = 1 << 20;

/// How a model is loaded.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct LoadOptions {
    /// How linear layers are stored.
    pub weights: WeightsMode,
    /// SHA-256 that a GGUF file must have, in hex; ignored for folders.
    pub sha256: Option<String>,
}

impl Model {
    /// Loads a GGUF file (architecture `llama` or `qwen2`) or a Hugging Face folder (Llama, Mistral, Qwen2).
    ///
    /// # Errors
    /// Every [`LoadError`]: each names the file, tensor or key that is wrong, and what to do.
    pub fn load(path: &Path, options: &LoadOptions) -> Result<Arc<Self>, LoadError> {
        let metadata = std::fs::metadata(path).map_err(|source| match source.kind() {
            std::io::ErrorKind::NotFound => LoadError::Missing { path: path.into() },
            _ => LoadError::Io { path: path.into(), source },
        })?;
        if metadata.is_dir() {
            return folder::load(path, options).map(Self::shared);
        }
        let mut magic = Vec::new();
        std::fs::File::open(path)
            .and_then(|file| file.take(GGUF_MAGIC.len() as u64).read_to_end(&mut magic))
            .map_err(|source| LoadError::Io { path: path.into(), source })?;
        if magic != GGUF_MAGIC {
            let reason = "its first bytes are not GGUF".to_owned();
            return Err(LoadError::NotAModel { path: path.into(), reason });
        }
        if let Some(expected) = &options.sha256 {
            let found = sha256_file(path)?;
            if !found.eq_ignore_ascii_case(expected) {
                return Err(LoadError::Checksum { path: path.into(), expected: expected.clone(), found });
            }
        }
        gguf_model::load(path, options).map(Self::shared)
    }
}

/// SHA-256 of a file, in lower-case hex.
///
/// # Errors
/// [`LoadError::Io`] when it cannot be read.
pub fn sha256_file(path: &Path) -> Result<String, LoadError> {
    let io = |source| LoadError::Io { path: path.into(), source };
    let mut file = std::fs::File::open(path).map_err(io)?;
    let mut hash = Sha256::new();
    let mut block = vec![0; CHECKSUM_BLOCK_BYTES];
    loop {
        let read = file.read(&mut block).map_err(io)?;
        if read == 0 {
            break;
        }
        hash.update(&block[..read]);
    }
    Ok(hash.finalize().iter().fold(String::new(), |mut hex, byte| {
        write!(hex, "{byte:02x}").expect("writing to a string does not fail");
        hex
    }))
}
