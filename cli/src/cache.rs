//! The user's cache folder: models and calibration artifacts, which can all be made again.

use std::io;
use std::path::PathBuf;

/// The cache folder cannot be found or made.
#[derive(Debug, thiserror::Error)]
pub(crate) enum CacheError {
    /// Neither variable names a folder.
    #[error("no cache folder: neither XDG_CACHE_HOME nor HOME names an absolute folder; set one of them")]
    NoHome,
    /// The folder cannot be made.
    #[error("the cache folder {} cannot be made: {error}; set XDG_CACHE_HOME to one that can be written", .folder.display())]
    Make {
        /// Which one.
        folder: PathBuf,
        /// Why not.
        error: io::Error,
    },
}

/// `$XDG_CACHE_HOME/kvoyant/<room>`, or the same under `~/.cache`; made if it is not there.
///
/// # Errors
/// If there is no home, or the folder cannot be made.
pub(crate) fn folder(room: &str) -> Result<PathBuf, CacheError> {
    // The XDG specification: a relative path there is to be ignored.
    let absolute = |name| std::env::var_os(name).map(PathBuf::from).filter(|p| p.is_absolute());
    let base = absolute("XDG_CACHE_HOME")
        .or_else(|| absolute("HOME").map(|home| home.join(".cache")))
        .ok_or(CacheError::NoHome)?;
    let folder = base.join("kvoyant").join(room);
    match std::fs::create_dir_all(&folder) {
        Ok(()) => Ok(folder),
        Err(error) => Err(CacheError::Make { folder, error }),
    }
}
