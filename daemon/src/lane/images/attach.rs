//! A sequence that begins with a published prefix: its first pages are somebody else's, and only read.

use std::sync::Arc;

use kvoyant_protocol::control::Failure;
use kvoyant_protocol::wire::SequenceId;

use crate::lane::model::ModelState;
use crate::prefixes::Attachment;

/// What a new sequence attaches to.
#[derive(Debug)]
pub struct Attach {
    /// Which sequence; it is empty.
    pub sequence: SequenceId,
    /// The prefix. It stays where it is for as long as a sequence holds on to this.
    pub prefix: Arc<Attachment>,
}

impl ModelState {
    pub(super) fn attach(&mut self, attach: &Attach) -> Result<(), Failure> {
        let Attach { sequence: id, prefix } = attach;
        let (rows, heads) = (self.shape.page_rows, self.heads());
        let blocks = prefix.blocks();
        let sequence = self.sequence(*id)?;
        if sequence.pages > 0 || blocks.iter().any(|block| block.pages().len() != heads) {
            return Err(Failure::Internal(format!(
                "sequence {id} cannot attach to a prefix of another shape"
            )));
        }
        self.check_tables(self.tables_of([sequence.method], blocks.len()))?;
        self.grow_table(*id, blocks.len())?;
        let sequence = self.sequence(*id)?;
        let (table, capacity) = (sequence.table, sequence.capacity);
        for (index, block) in blocks.iter().enumerate() {
            for (head, page) in block.pages().iter().enumerate() {
                let word = self.arena.add_foreign(page.extent()) + page.index();
                self.arena.attach(word);
                self.tables.set_word(table, head * capacity + index, word);
            }
        }
        let tokens = blocks.len() * rows;
        let layers = self.shape.layers;
        let sequence = self.sequence_mut(*id)?;
        sequence.pages = blocks.len();
        sequence.room = tokens;
        sequence.lens = vec![tokens as u32; layers];
        sequence.prefix = Some(Arc::clone(prefix));
        (0..layers).for_each(|layer| self.falls_behind(*id, layer));
        self.record(*id);
        Ok(())
    }
}
