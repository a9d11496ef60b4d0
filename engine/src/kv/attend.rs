//! The one place that hands addresses to the attention kernel.
#![allow(unsafe_code)]

use std::cell::RefCell;

use kvoyant_kernels::{AttendScratch, Dtype, Kernels, Run};

thread_local! {
    static SCRATCH: RefCell<(AttendScratch, Vec<f32>)> = RefCell::default();
}

/// Attention of a group of queries `[group][d]` over rows that lie in `runs`, in their order, into `out: [group][d]`.
/// Every run is whole rows `[k(d) | v(d)]`.
pub(super) fn attend(dtype: Dtype, queries: &[f32], d: usize, runs: &[&[u8]], out: &mut [f32]) {
    let row_bytes = 2 * d * dtype.bytes();
    let runs: Vec<Run> = runs.iter().map(|rows| Run::new(rows.as_ptr(), rows.len() / row_bytes)).collect();
    // SAFETY: each run covers the whole rows of a slice that is borrowed for this call: readable, and not written to.
    unsafe { attend_runs(dtype, queries, d, &runs, out) };
}

/// As [`attend`], over rows anywhere in memory.
///
/// # Safety
/// Every run's rows are readable, and nobody writes to them meanwhile.
pub(super) unsafe fn attend_runs(dtype: Dtype, queries: &[f32], d: usize, runs: &[Run], out: &mut [f32]) {
    let group = queries.len() / d;
    SCRATCH.with_borrow_mut(|(scratch, lse)| {
        lse.resize(group, 0.0);
        let scale = 1.0 / (d as f32).sqrt();
        // SAFETY: passed on to the caller.
        unsafe { Kernels::best().attend(dtype, queries, group, d, scale, runs, scratch, out, lse) };
    });
}

/// Softmax weights of a group of queries over rows anywhere in memory: `[group][rows]`.
///
/// # Safety
/// As for [`attend_runs`].
pub(super) unsafe fn weights_of_runs(dtype: Dtype, queries: &[f32], d: usize, runs: &[Run]) -> Vec<f32> {
    let group = queries.len() / d;
    let rows: usize = runs.iter().map(|run| run.rows).sum();
    let mut scores = vec![0.0; group * rows];
    // SAFETY: passed on to the caller.
    unsafe { Kernels::best().scores(dtype, queries, group, d, runs, &mut scores, rows) };
    let scale = 1.0 / (d as f32).sqrt();
    for scores in scores.chunks_exact_mut(rows.max(1)) {
        scores.iter_mut().for_each(|score| *score *= scale);
        Kernels::best().softmax_in_place(scores);
    }
    scores
}
