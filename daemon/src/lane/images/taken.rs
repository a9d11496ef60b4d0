//! Sequences that an operator suspends while their client lives, and does not know of it.
//!
//! From the moment a sequence is taken, what its client still tells the lane about it is left out: the image is of that moment. Once
//! it is closed, the client's next question about it is answered with "no such sequence", and nothing else of the session ends.

use kvoyant_protocol::control::Failure;
use kvoyant_protocol::wire::SequenceId;

use crate::lane::model::ModelState;

/// A sequence that was taken.
#[derive(Debug)]
pub(crate) struct Taken {
    sequence: SequenceId,
    /// Whether something was left out since.
    missed: bool,
}

impl ModelState {
    /// From now on what is told about an open sequence is left out.
    pub(super) fn take(&mut self, id: SequenceId) -> Result<(), Failure> {
        self.sequence(id)?;
        if !self.taken.iter().any(|taken| taken.sequence == id) {
            self.taken.push(Taken { sequence: id, missed: false });
        }
        Ok(())
    }

    /// Whether what was just told is about a sequence that was taken, and has to be left out.
    pub(crate) fn leaves_out(&mut self, id: SequenceId) -> bool {
        let Some(taken) = self.taken.iter_mut().find(|taken| taken.sequence == id) else { return false };
        taken.missed = true;
        true
    }

    /// Gives a sequence back to its client; true if that can go on with it, for nothing was left out.
    pub(super) fn give_back(&mut self, id: SequenceId) -> bool {
        let Some(at) = self.taken.iter().position(|taken| taken.sequence == id) else { return true };
        // One that has missed something must be closed, and stays taken until its client knows.
        if self.taken[at].missed {
            return false;
        }
        self.taken.swap_remove(at);
        true
    }
}
