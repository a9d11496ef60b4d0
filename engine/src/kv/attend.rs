//! The one place that hands addresses to the attention kernel: in pieces of a fixed number of rows, so that neither threads nor where
//! runs begin change the result ([decision 24](../../../docs/decisions/0024-attention-in-pieces.md)).
#![allow(unsafe_code)]

use std::cell::RefCell;

use kvoyant_kernels::{AttendScratch, Kernels, RowLayout, Run, pieces};
use rayon::prelude::*;

/// Rows of all heads below which they are attended on the calling thread: waking another one costs more than it saves.
const PARALLEL_ROWS: usize = 1024;

thread_local! {
    static SCRATCH: RefCell<AttendScratch> = RefCell::default();
}

/// Attention of some heads, each a group of queries over rows of its own: head i's over the rows in `runs[i]`, in their order. `queries`
/// and `out` are `[heads][group][d]`. Every run is whole rows.
pub(super) fn attend_heads(
    layout: RowLayout,
    group: usize,
    queries: &[f32],
    runs: &[Vec<&[u8]>],
    out: &mut [f32],
) {
    let row_bytes = layout.row_bytes().unwrap_or(1);
    let values = group * layout.key_values();
    let runs: Vec<Vec<Run>> = runs.iter().map(|runs| addresses(runs, row_bytes)).collect();
    let rows: usize = runs.iter().flatten().map(|run| run.rows).sum();
    let heads = queries.chunks_exact(values).zip(out.chunks_exact_mut(values)).zip(&runs);
    if rows < PARALLEL_ROWS {
        for ((queries, out), runs) in heads {
            // SAFETY: each run covers the whole rows of a slice that is borrowed for this call: readable, and not written to.
            unsafe { attend_runs(layout, queries, runs, out, &mut vec![0.0; group]) };
        }
        return;
    }
    let cut: Vec<Vec<Vec<Run>>> = runs.iter().map(|runs| pieces(runs, row_bytes)).collect();
    let tasks: Vec<(&[f32], &[Run])> = queries
        .chunks_exact(values)
        .zip(&cut)
        .flat_map(|(queries, pieces)| pieces.iter().map(move |piece| (queries, piece.as_slice())))
        .collect();
    let parts: Vec<(Vec<f32>, Vec<f32>)> = tasks
        .into_par_iter()
        .map(|(queries, piece)| {
            let mut part = (vec![0.0; values], vec![0.0; group]);
            // SAFETY: as above.
            unsafe { attend_piece(layout, queries, piece, &mut part.0, &mut part.1) };
            part
        })
        .collect();
    let mut parts = parts.into_iter();
    for (out, pieces) in out.chunks_exact_mut(values).zip(&cut) {
        let mut own = parts.by_ref().take(pieces.len());
        let Some((first, mut lse)) = own.next() else { continue };
        out.copy_from_slice(&first);
        own.for_each(|(other, other_lse)| Kernels::best().merge(out, &mut lse, &other, &other_lse));
    }
}

/// Attention of a group of queries `[group][d]` over rows that lie in `runs`, in their order, into `out: [group][d]` with the
/// log-sum-exp of each query's scores, on the calling thread. Every run is whole rows.
pub(super) fn attend(layout: RowLayout, queries: &[f32], runs: &[&[u8]], out: &mut [f32], lse: &mut [f32]) {
    let runs = addresses(runs, layout.row_bytes().unwrap_or(1));
    // SAFETY: each run covers the whole rows of a slice that is borrowed for this call: readable, and not written to.
    unsafe { attend_runs(layout, queries, &runs, out, lse) };
}

fn addresses(runs: &[&[u8]], row_bytes: usize) -> Vec<Run> {
    runs.iter().map(|rows| Run::new(rows.as_ptr(), rows.len() / row_bytes)).collect()
}

/// As [`attend`], over rows anywhere in memory.
///
/// # Safety
/// Every run's rows are readable, and nobody writes to them meanwhile.
pub(super) unsafe fn attend_runs(
    layout: RowLayout,
    queries: &[f32],
    runs: &[Run],
    out: &mut [f32],
    lse: &mut [f32],
) {
    SCRATCH.with_borrow_mut(|scratch| {
        // SAFETY: passed on to the caller.
        unsafe { Kernels::best().attend_in_pieces(layout, queries, runs, scratch, (out, lse)) };
    });
}

/// # Safety
/// As for [`attend_runs`].
unsafe fn attend_piece(layout: RowLayout, queries: &[f32], runs: &[Run], out: &mut [f32], lse: &mut [f32]) {
    let d = layout.key_values();
    SCRATCH.with_borrow_mut(|scratch| {
        let (group, scale) = (queries.len() / d, 1.0 / (d as f32).sqrt());
        // SAFETY: passed on to the caller.
        unsafe { Kernels::best().attend_layout(layout, queries, group, scale, runs, scratch, out, lse) };
    });
}

/// Scores of a group of queries over rows anywhere in memory, scaled by `1/√d`: `[group][rows]`.
///
/// # Safety
/// As for [`attend_runs`].
pub(super) unsafe fn scores_of_runs(layout: RowLayout, queries: &[f32], runs: &[Run]) -> Vec<f32> {
    let d = layout.key_values();
    let group = queries.len() / d;
    let rows: usize = runs.iter().map(|run| run.rows).sum();
    let mut scores = vec![0.0; group * rows];
    if rows > 0 {
        SCRATCH.with_borrow_mut(|scratch| {
            let kernels = Kernels::best();
            // SAFETY: passed on to the caller.
            unsafe { kernels.scores_layout(layout, queries, group, runs, scratch, &mut scores, rows) }
        });
    }
    let scale = 1.0 / (d as f32).sqrt();
    scores.iter_mut().for_each(|score| *score *= scale);
    scores
}

#[cfg(test)]
mod tests {
    use super::*;
    use kvoyant_kernels::quantise::Format;
    use kvoyant_kernels::{Dtype, PIECE_ROWS, SplitMix64};

    const D: usize = 64;
    const GROUP: usize = 3;
    const LAYOUT: RowLayout = RowLayout::KeyValue { d: D, format: Format::Plain(Dtype::F32) };
    const ROW_BYTES: usize = 2 * D * size_of::<f32>();

    fn normal(random: &mut SplitMix64, n: usize) -> Vec<f32> {
        (0..n).map(|_| random.normal()).collect()
    }

    /// Cuts rows after each of these numbers.
    fn cut<'a>(rows: &'a [u8], at: &[usize]) -> Vec<&'a [u8]> {
        let ends = at.iter().copied().chain([rows.len() / ROW_BYTES]);
        let mut from = 0;
        ends.map(|to| &rows[std::mem::replace(&mut from, to) * ROW_BYTES..to * ROW_BYTES]).collect()
    }

    #[test]
    fn neither_threads_nor_runs_change_attention_and_it_is_that_over_all_rows() {
        let mut random = SplitMix64::new(5);
        for rows in [1, PIECE_ROWS - 1, PIECE_ROWS, PIECE_ROWS + 1, 3 * PIECE_ROWS + 100] {
            let heads: Vec<Vec<f32>> = (0..2).map(|_| normal(&mut random, rows * 2 * D)).collect();
            let queries = normal(&mut random, 2 * GROUP * D);
            let bytes: Vec<&[u8]> = heads.iter().map(|head| bytemuck::cast_slice(head)).collect();
            let attend = |cuts: &[usize], threads| {
                let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
                let runs: Vec<_> = bytes.iter().map(|rows| cut(rows, cuts)).collect();
                let mut out = vec![f32::NAN; queries.len()];
                pool.install(|| attend_heads(LAYOUT, GROUP, &queries, &runs, &mut out));
                out
            };
            let whole = attend(&[], 1);
            for threads in [1, 2, 3] {
                assert_eq!(attend(&[], threads), whole, "{rows} rows on {threads} threads");
                assert_eq!(attend(&[rows / 3, rows / 2, rows / 2], threads), whole, "{rows} rows in runs");
            }
            for (h, bytes) in bytes.iter().enumerate() {
                let queries = &queries[h * GROUP * D..][..GROUP * D];
                let (mut out, mut lse) = ([f32::NAN; GROUP * D], [f32::NAN; GROUP]);
                let run = [Run::new(bytes.as_ptr(), rows)];
                // SAFETY: the rows live as long as the test.
                unsafe { attend_runs(LAYOUT, queries, &run, &mut out, &mut lse) };
                assert_eq!(out, whole[h * GROUP * D..][..GROUP * D], "alone, {rows} rows");
                // SAFETY: as above.
                unsafe { attend_piece(LAYOUT, queries, &run, &mut out, &mut lse) };
                let worst = out.iter().zip(&whole[h * GROUP * D..]).map(|(a, b)| (a - b).abs());
                assert!(worst.fold(0.0, f32::max) < 1e-5, "in one piece, {rows} rows");
            }
        }
    }

    #[test]
    fn no_rows_give_no_attention() {
        let mut out = [f32::NAN; GROUP * D];
        attend_heads(LAYOUT, GROUP, &[1.0; GROUP * D], &[Vec::new()], &mut out);
        assert_eq!(out, [0.0; GROUP * D]);
    }
}
