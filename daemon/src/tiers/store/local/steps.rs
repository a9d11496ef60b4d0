//! The steps between which a daemon can die. Tests kill it, or fill the disk, at each of them.

use std::io;

/// A moment in writing, replacing, removing or recovering an image.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Step {
    /// The staging folder is there.
    Staged,
    /// Pages are in their file.
    PagesWritten,
    /// Blobs are in theirs.
    BlobsWritten,
    /// The manifest is in its own.
    ManifestWritten,
    /// All of them are on the disk.
    FilesSynced,
    /// So is the folder's list of them.
    FolderSynced,
    /// The old image has been set aside.
    OldAside,
    /// The new image has its name.
    NewNamed,
    /// The root's list of names is on the disk.
    RootSynced,
    /// The old image, or one that is removed, will never come back.
    Condemned,
    /// One of its files holds zeros.
    FileZeroed,
    /// One of its files is gone.
    FileGone,
    /// Its folder is gone.
    FolderGone,
    /// An old image without a new one is back under its name.
    OldRestored,
    /// What a crash left behind has been dealt with.
    Recovered,
}

impl Step {
    /// All of them.
    #[cfg(test)]
    pub(super) const ALL: [Self; 15] = [
        Self::Staged,
        Self::PagesWritten,
        Self::BlobsWritten,
        Self::ManifestWritten,
        Self::FilesSynced,
        Self::FolderSynced,
        Self::OldAside,
        Self::NewNamed,
        Self::RootSynced,
        Self::Condemned,
        Self::FileZeroed,
        Self::FileGone,
        Self::FolderGone,
        Self::OldRestored,
        Self::Recovered,
    ];
}

/// Says that a step was reached. Outside tests nothing happens.
#[cfg(not(test))]
#[inline]
#[allow(clippy::unnecessary_wraps)]
pub(super) fn reach(_: Step) -> io::Result<()> {
    Ok(())
}

/// Says that a step was reached, and does what a test wants to happen there.
#[cfg(test)]
pub(super) fn reach(step: Step) -> io::Result<()> {
    tests_only::reach(step)
}

#[cfg(test)]
pub(super) mod tests_only {
    use super::*;
    use std::cell::Cell;

    /// What is to happen at a step.
    #[derive(Debug, Clone, Copy, PartialEq, Eq)]
    pub(in super::super) enum Fate {
        /// The process dies where it stands.
        Abort,
        /// The file system is full.
        NoSpace,
    }

    thread_local! {
        static FATE: Cell<Option<(Step, Fate)>> = const { Cell::new(None) };
    }

    /// Sets what happens on this thread.
    pub(in super::super) fn doom(fate: Option<(Step, Fate)>) {
        FATE.set(fate);
    }

    pub(super) fn reach(step: Step) -> io::Result<()> {
        match FATE.get() {
            Some((at, Fate::Abort)) if at == step => std::process::abort(),
            Some((at, Fate::NoSpace)) if at == step => Err(io::Error::from_raw_os_error(28)),
            _ => Ok(()),
        }
    }
}
