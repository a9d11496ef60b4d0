//! What a lane says of its open sequences when an operator asks.

use kvoyant_protocol::control::PageWord;
use kvoyant_protocol::wire::SequenceId;

use crate::lane::model::ModelState;

/// Entries of page tables that a lane looks at for one list: one or two milliseconds. Sequences beyond are listed without their pages.
const LOOKS_MAX: usize = 1 << 22;

/// An open sequence, as its lane knows it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct OpenSequence {
    /// Its session.
    pub session: u64,
    /// Its handle.
    pub sequence: SequenceId,
    /// Its method's specification.
    pub method: String,
    /// Tokens that every layer has.
    pub tokens: u64,
    /// Pages in host memory, and on disk alone; what forks share counts for each. `None` where counting would have taken too long.
    pub pages: Option<[u64; 2]>,
}

/// How many more entries of page tables may be looked at.
#[derive(Debug)]
pub(super) struct Looks(usize);

impl Default for Looks {
    fn default() -> Self {
        Self(LOOKS_MAX)
    }
}

impl ModelState {
    /// Adds a session's open sequences to a list.
    pub(super) fn list(&self, session: u64, looks: &mut Looks, list: &mut Vec<OpenSequence>) {
        for id in self.open_handles() {
            let Ok(sequence) = self.sequence(id) else { continue };
            list.push(OpenSequence {
                session,
                sequence: id,
                method: self.methods[sequence.method].spec().to_string(),
                tokens: sequence.tokens() as u64,
                pages: self.count(id, looks),
            });
        }
    }

    fn count(&self, id: SequenceId, looks: &mut Looks) -> Option<[u64; 2]> {
        let sequence = self.sequence(id).ok()?;
        looks.0 = looks.0.checked_sub(self.heads() * sequence.pages)?;
        let table = self.tables.get(sequence.table);
        let mut counts = [0, 0];
        for head in table.chunks_exact((sequence.capacity * 4).max(4)) {
            for word in head.chunks_exact(4).take(sequence.pages) {
                match PageWord::of(u32::from_le_bytes([word[0], word[1], word[2], word[3]])) {
                    PageWord::Page(_) => counts[0] += 1,
                    PageWord::Spilled => counts[1] += 1,
                    PageWord::None | PageWord::Lost => {}
                }
            }
        }
        Some(counts)
    }
}
