//! Layers that this process reads as a whole, where the daemon may have moved pages to disk.

use std::time::Duration;

use kvoyant_client::{Error, Model, Ready, Stat};

use super::{DaemonError, DaemonKv, DaemonSequence};

/// Tokens of a chunk of a prompt where host memory is scarce: those of all layers need room at once.
pub(super) const SCARCE_CHUNK: usize = 64;

/// Has all pages of a layer of these sequences' first tokens in memory for as long as what it returns lives; nothing where they are in any
/// case.
pub(super) fn lease_of(
    model: &Model,
    deadline: Duration,
    layer: usize,
    sequences: &[(&DaemonSequence, usize)],
) -> Result<Option<Ready>, DaemonError> {
    if !model.spills() {
        return Ok(None);
    }
    let wanted: Vec<_> = sequences
        .iter()
        .map(|(sequence, tokens)| (sequence.inner(), (*tokens).min(sequence.tokens())))
        .filter(|(_, tokens)| *tokens > 0)
        .collect();
    if wanted.is_empty() {
        return Ok(None);
    }
    Ok(Some(model.fetch(layer, &wanted)?.wait(deadline)?))
}

/// Where a session's pages have been, in the daemon's words.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Paged {
    /// Most bytes of KV that were in host memory at a time.
    pub peak_bytes: u64,
    /// Most bytes of KV that there were at a time, in host memory or on disk.
    pub most_bytes: u64,
    /// Bytes written to disk.
    pub written_bytes: u64,
    /// Bytes read back.
    pub read_bytes: u64,
    /// Pages that could not be read back whole.
    pub lost_pages: u64,
}

impl DaemonKv {
    /// Where the session's pages have been, if they could leave host memory.
    #[must_use]
    pub fn paged(&self) -> Option<Paged> {
        let page_bytes = (self.model.page_rows() * self.shape.row_bytes()) as u64;
        let bytes = |stat| self.model.stat(stat) * page_bytes;
        self.model.spills().then(|| Paged {
            peak_bytes: bytes(Stat::PagesPeak),
            most_bytes: bytes(Stat::PagesMost),
            written_bytes: bytes(Stat::PagesWritten),
            read_bytes: bytes(Stat::PagesRead),
            lost_pages: self.model.stat(Stat::PagesLost),
        })
    }

    /// See [`lease_of`].
    pub(super) fn lease(
        &self,
        layer: usize,
        sequences: &[(&DaemonSequence, usize)],
    ) -> Result<Option<Ready>, DaemonError> {
        lease_of(&self.model, self.options.deadline, layer, sequences)
    }

    /// Refuses what was attended without rows that it was to have.
    pub(super) fn check_missed(&self, layer: usize, batch: &[&DaemonSequence]) -> Result<(), DaemonError> {
        // Of all of them, so that none is told in its next step.
        let missed: Vec<_> = batch.iter().filter(|sequence| sequence.inner().take_missed()).collect();
        match missed.first().map(|sequence| sequence.inner().first_lost()) {
            None => Ok(()),
            Some(Some(token)) => Err(Error::Lost { token }.into()),
            Some(None) => Err(Error::Spilled { layer, token: 0 }.into()),
        }
    }
}
