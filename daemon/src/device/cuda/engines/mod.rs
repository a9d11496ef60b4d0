//! Ways to bring scattered host memory onto a GPU.

use std::fmt;

use serde::{Deserialize, Serialize};

/// A transfer engine.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum EngineKind {
    /// One copy of the copy engine per run.
    Dma,
    /// The CPU gathers into a pinned buffer, the copy engine moves it as a whole.
    Staged,
    /// A kernel reads mapped host memory.
    Zerocopy,
}

impl EngineKind {
    /// All of them, in the order of tables.
    pub const ALL: [Self; 3] = [Self::Dma, Self::Staged, Self::Zerocopy];

    /// Its lower-case name.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Dma => "dma",
            Self::Staged => "staged",
            Self::Zerocopy => "zerocopy",
        }
    }
}

impl fmt::Display for EngineKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}
