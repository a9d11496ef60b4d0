//! Layers that this process reads as a whole, where the daemon may have moved pages to disk.

use std::time::Duration;

use kvoyant_client::{Error, Model, Ready};

use super::{DaemonError, DaemonKv, DaemonSequence};

/// Tokens of a chunk of a prompt where pages may leave memory: those of all layers need room at once.
pub(super) const SPILLING_CHUNK: usize = 64;

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

impl DaemonKv {
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
        for sequence in batch {
            if sequence.inner().take_missed() {
                let error = match sequence.inner().first_lost() {
                    Some(token) => Error::Lost { token },
                    None => Error::Spilled { layer, token: 0 },
                };
                return Err(error.into());
            }
        }
        Ok(())
    }
}
