//! The one place that hands addresses to the attention kernel.
#![allow(unsafe_code)]

use std::cell::RefCell;

use kvoyant_kernels::{AttendScratch, Dtype, Kernels, Run};

/// Attention of a group of queries `[group][d]` over rows that lie in `runs`, in their order, into `out: [group][d]`.
/// Every run is whole rows `[k(d) | v(d)]`.
pub(super) fn attend(dtype: Dtype, queries: &[f32], d: usize, runs: &[&[u8]], out: &mut [f32]) {
    thread_local! {
        static SCRATCH: RefCell<(AttendScratch, Vec<f32>)> = RefCell::default();
    }
    let row_bytes = 2 * d * dtype.bytes();
    let runs: Vec<Run> = runs.iter().map(|rows| Run::new(rows.as_ptr(), rows.len() / row_bytes)).collect();
    let group = queries.len() / d;
    SCRATCH.with_borrow_mut(|(scratch, lse)| {
        lse.resize(group, 0.0);
        // SAFETY: each run covers the whole rows of a slice that is borrowed for this call: readable, and not written to.
        unsafe {
            let scale = 1.0 / (d as f32).sqrt();
            Kernels::best().attend(dtype, queries, group, d, scale, &runs, scratch, out, lse);
        }
    });
}
