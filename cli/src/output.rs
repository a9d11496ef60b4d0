//! Whether a result can be written, asked before hours are spent on it.

use std::fs::OpenOptions;
use std::io;
use std::path::Path;

/// A file that is replaced whole or not at all.
///
/// # Errors
/// Why it could not be.
pub(crate) fn check_replaced(path: &Path) -> io::Result<()> {
    if path.is_dir() {
        return Err(io::ErrorKind::IsADirectory.into());
    }
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
    check_folder(folder)
}

/// A file that is written where it is.
///
/// # Errors
/// Why it could not be.
pub(crate) fn check_written(path: &Path) -> io::Result<()> {
    match std::fs::metadata(path) {
        // What is written to a pipe or a device cannot be tried.
        Ok(there) if !there.is_file() && !there.is_dir() => Ok(()),
        Ok(_) => OpenOptions::new().append(true).open(path).map(drop),
        Err(_) => check_replaced(path),
    }
}

/// A folder in which files are made.
///
/// # Errors
/// Why they could not be.
pub(crate) fn check_folder(folder: &Path) -> io::Result<()> {
    tempfile::tempfile_in(folder).map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_cannot_be_written_is_known_and_nothing_is_left_behind() {
        let home = tempfile::tempdir().unwrap();
        let below = |name: &str| home.path().join(name);
        for check in [check_replaced, check_written] {
            check(&below("new")).unwrap();
            check(&below("none/new")).unwrap_err();
            check(home.path()).unwrap_err();
        }
        check_written(Path::new("/dev/null")).unwrap();
        assert_eq!(std::fs::read_dir(home.path()).unwrap().count(), 0);
        std::fs::write(below("old"), "kept").unwrap();
        check_written(&below("old")).unwrap();
        assert_eq!(std::fs::read_to_string(below("old")).unwrap(), "kept");
    }
}
