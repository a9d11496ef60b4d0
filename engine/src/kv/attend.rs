//! The one place that hands addresses to the attention kernel.
#![allow(unsafe_code)]

use std::cell::RefCell;

use kvoyant_kernels::{AttendScratch, Kernels, RowLayout, Run};

thread_local! {
    static SCRATCH: RefCell<AttendScratch> = RefCell::default();
}

/// Attention of a group of queries `[group][d]` over rows that lie in `runs`, in their order, into `out: [group][d]` with
/// the log-sum-exp of each query's scores. Every run is whole rows.
pub(super) fn attend(layout: RowLayout, queries: &[f32], runs: &[&[u8]], out: &mut [f32], lse: &mut [f32]) {
    let row_bytes = layout.row_bytes().unwrap_or(1);
    let runs: Vec<Run> = runs.iter().map(|rows| Run::new(rows.as_ptr(), rows.len() / row_bytes)).collect();
    // SAFETY: each run covers the whole rows of a slice that is borrowed for this call: readable, and not written to.
    unsafe { attend_runs(layout, queries, &runs, out, lse) };
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
