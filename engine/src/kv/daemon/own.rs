//! A sequence without its daemon: rows that it has in the session's extents, which stay mapped, and from there on rows of this process's own.

use std::ops::Range;

use kvoyant_client::{Error, Sequence};
use kvoyant_kernels::Run;

use super::super::KvShape;
use super::super::rows::HeadRows;

/// What the daemon cannot give room to any more.
#[derive(Debug)]
pub(super) struct Own {
    /// Rows before this position are read and written in the session's extents, those from it on here.
    base: usize,
    /// `[layers][Hkv]`.
    heads: Vec<HeadRows>,
    /// Rows from this position on could not be read when the daemon went, and have to be computed again.
    lost: Option<usize>,
}

impl Own {
    /// Of a sequence with so many committed tokens. Where the daemon moves pages of so many rows to disk, it may do so
    /// under a reader's eyes once it runs again: then all that can be read is copied here at once.
    pub(super) fn of(
        sequence: &Sequence,
        shape: &KvShape,
        tokens: usize,
        spilled_page_rows: Option<usize>,
    ) -> Self {
        let mut heads = vec![HeadRows::default(); shape.layers * shape.kv_heads];
        let room = sequence.room();
        let Some(page_rows) = spilled_page_rows else { return Self { base: room, heads, lost: None } };
        let (mut readable, row_bytes) = (room, shape.row_bytes());
        for (at, head) in heads.iter_mut().enumerate() {
            let (layer, kv_head) = (at / shape.kv_heads, at % shape.kv_heads);
            for first in (0..room).step_by(page_rows.max(1)) {
                let page = first..(first + page_rows).min(room);
                if first >= readable {
                    break;
                }
                let rows = head.grow(page.len() * row_bytes);
                if sequence.read_rows(layer, kv_head, page, rows).is_err() {
                    readable = first;
                }
            }
        }
        heads.iter_mut().for_each(|head| head.truncate(readable * row_bytes));
        Self { base: 0, heads, lost: (readable < tokens).then_some(readable) }
    }

    /// The first committed token that has to be computed again.
    pub(super) fn lost(&self) -> Option<usize> {
        self.lost
    }

    /// Drops all rows from this position on.
    pub(super) fn truncate(&mut self, tokens: usize, row_bytes: usize) {
        self.lost = self.lost.filter(|lost| *lost < tokens);
        // What was appended to the extents is not written to again.
        self.base = self.base.min(tokens);
        let bytes = (tokens - self.base) * row_bytes;
        self.heads.iter_mut().for_each(|head| head.truncate(bytes));
    }

    /// Writes rows of one head from `position` on, which follow those that are there.
    pub(super) fn write(
        &mut self,
        sequence: &Sequence,
        (layer, kv_head, kv_heads): (usize, usize, usize),
        position: usize,
        rows: &[u8],
        row_bytes: usize,
    ) -> Result<(), Error> {
        let in_extents = (self.base.saturating_sub(position) * row_bytes).min(rows.len());
        let (there, here) = rows.split_at(in_extents);
        if !there.is_empty() {
            sequence.write_rows(layer, kv_head, position, there)?;
        }
        if !here.is_empty() {
            let head = &mut self.heads[layer * kv_heads + kv_head];
            head.truncate(position.saturating_sub(self.base) * row_bytes);
            head.grow(here.len()).copy_from_slice(here);
        }
        Ok(())
    }

    /// The rows of these tokens, in order. They stay as they are until the sequence is written to.
    pub(super) fn runs(
        &self,
        sequence: &Sequence,
        (layer, kv_head, kv_heads): (usize, usize, usize),
        tokens: Range<usize>,
        row_bytes: usize,
        runs: &mut Vec<Run>,
    ) {
        let there = tokens.start..tokens.end.min(self.base);
        if !there.is_empty() {
            sequence.local_runs(layer, kv_head, there, runs);
        }
        let bytes = |token: usize| token.saturating_sub(self.base) * row_bytes;
        let here = self.heads[layer * kv_heads + kv_head].stretches(bytes(tokens.start)..bytes(tokens.end));
        runs.extend(here.into_iter().map(|rows| Run::new(rows.as_ptr(), rows.len() / row_bytes)));
    }

    /// Copies the rows of these tokens out.
    ///
    /// # Errors
    /// [`Error::NoRoom`] where a method has dropped rows.
    pub(super) fn read(
        &self,
        sequence: &Sequence,
        (layer, kv_head, kv_heads): (usize, usize, usize),
        tokens: Range<usize>,
        row_bytes: usize,
        rows: &mut [u8],
    ) -> Result<(), Error> {
        let there = tokens.start..tokens.end.min(self.base).max(tokens.start);
        let (before, behind) = rows.split_at_mut(there.len() * row_bytes);
        sequence.read_rows(layer, kv_head, there, before)?;
        let bytes = |token: usize| token.saturating_sub(self.base) * row_bytes;
        let here = self.heads[layer * kv_heads + kv_head].stretches(bytes(tokens.start)..bytes(tokens.end));
        if here.iter().map(|rows| rows.len()).sum::<usize>() != behind.len() {
            return Err(Error::Lost { token: self.lost.unwrap_or(tokens.start) });
        }
        let mut at = 0;
        for stretch in here {
            behind[at..at + stretch.len()].copy_from_slice(stretch);
            at += stretch.len();
        }
        Ok(())
    }
}
