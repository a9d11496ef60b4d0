//! Attention over many rows in pieces.
//!
//! Rows are attended over in pieces of a fixed number, counted in the order of the rows, and the pieces merged in that order: so a long
//! sequence's work can spread over threads, and neither their number nor where runs begin changes the result.

use super::Kernels;
use crate::layout::RowLayout;
use crate::run::{AttendScratch, Run};

/// Rows of a piece: some ten microseconds of work, so that heads that are no multiple of the threads still keep all of them busy.
pub const PIECE_ROWS: usize = 512;

/// The rows of runs in pieces of [`PIECE_ROWS`]; the last has what is left. One piece without runs where there are no rows.
#[must_use]
pub fn pieces(runs: &[Run], row_bytes: usize) -> Vec<Vec<Run>> {
    let (mut pieces, mut piece, mut room) = (Vec::new(), Vec::new(), PIECE_ROWS);
    for run in runs {
        let (mut at, mut left) = (run.rows_ptr, run.rows);
        while left > room {
            piece.push(Run::new(at, room));
            pieces.push(std::mem::take(&mut piece));
            // Only the address of a row that the run has is made, and nothing is read.
            at = at.wrapping_add(room * row_bytes);
            left -= room;
            room = PIECE_ROWS;
        }
        if left > 0 {
            piece.push(Run::new(at, left));
            room -= left;
        }
    }
    if !piece.is_empty() || pieces.is_empty() {
        pieces.push(piece);
    }
    pieces
}

impl Kernels {
    /// Attention of a group of queries `[group][key_values]`, scores scaled by `1/√key_values`, over the rows of all runs in their order, piece
    /// by piece on the calling thread: `out` is `[group][value_values]`, `lse` is `[group]`.
    ///
    /// # Safety
    /// Every run's rows are readable and nobody writes to them meanwhile.
    ///
    /// # Panics
    /// When a slice has the wrong length, or there are no such rows.
    pub unsafe fn attend_in_pieces(
        self,
        layout: RowLayout,
        queries: &[f32],
        runs: &[Run],
        scratch: &mut AttendScratch,
        (out, lse): (&mut [f32], &mut [f32]),
    ) {
        let d = layout.key_values();
        let (group, scale) = (queries.len() / d, 1.0 / (d as f32).sqrt());
        let mut attend = |runs: &[Run], out: &mut [f32], lse: &mut [f32]| {
            // SAFETY: passed on to the caller.
            unsafe { self.attend_layout(layout, queries, group, scale, runs, scratch, out, lse) };
        };
        if runs.iter().map(|run| run.rows).sum::<usize>() <= PIECE_ROWS {
            return attend(runs, out, lse);
        }
        let (mut other, mut other_lse) = (vec![0.0; out.len()], vec![0.0; lse.len()]);
        for (i, piece) in pieces(runs, layout.row_bytes().unwrap_or(1)).iter().enumerate() {
            if i == 0 {
                attend(piece, out, lse);
            } else {
                attend(piece, &mut other, &mut other_lse);
                self.merge(out, lse, &other, &other_lse);
            }
        }
    }
}
