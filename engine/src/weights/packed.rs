//! Products with quantised matrices, spread over threads.
//!
//! The loop is ours because candle's own waits for a second thread at every product, and that thread may have lost its core to the
//! process that keeps the cache.

use std::ops::Range;

use kvoyant_kernels::Kernels;
use kvoyant_kernels::packed::{PANEL, PackedMatrix, QuantisedRows};
use rayon::prelude::*;

/// Tasks for each thread, so that one that was held up leaves work to others.
const TASKS_PER_THREAD: usize = 6;

/// Least weight bytes of a task: about two microseconds of reading, where to hand a task over takes one.
const TASK_BYTES: usize = 24 << 10;

/// Some panels of a matrix, and where their results go.
struct Task<'a> {
    matrix: &'a PackedMatrix,
    panels: Range<usize>,
    /// `[rows of the panels][rows of x]`.
    out: &'a mut [f32],
}

/// `outs[i][t] = W_i x[t]` for matrices of the same columns: `x` is `[rows][columns]`, each out `[rows][rows of the matrix]`.
///
/// Every value is computed by one task, in one order: how many threads there are changes nothing.
pub(super) fn products(mut products: Vec<(&PackedMatrix, &mut [f32])>, x: &[f32], rows: usize) {
    let Some(columns) = products.first().map(|(matrix, _)| matrix.columns()) else { return };
    let mut x8 = QuantisedRows::default();
    Kernels::best().quantise_rows(x, columns, &mut x8);
    let bytes: usize = products.iter().map(|(matrix, _)| matrix.bytes()).sum();
    let task_bytes = TASK_BYTES.max(bytes / (TASKS_PER_THREAD * rayon::current_num_threads()));
    if rows == 1 {
        let outs = products.iter_mut().map(|(matrix, out)| (*matrix, &mut **out));
        return run(outs, &x8, task_bytes);
    }
    // A weight is read once for all rows, so results come by output first.
    let mut by_output: Vec<Vec<f32>> = products.iter().map(|(_, out)| vec![0.0; out.len()]).collect();
    run(
        products.iter().map(|(matrix, _)| *matrix).zip(by_output.iter_mut().map(Vec::as_mut_slice)),
        &x8,
        task_bytes,
    );
    for ((matrix, out), by_output) in products.iter_mut().zip(&by_output) {
        for (row, out) in out.chunks_exact_mut(matrix.rows()).enumerate() {
            out.iter_mut().zip(by_output.chunks_exact(rows)).for_each(|(out, results)| *out = results[row]);
        }
    }
}

/// Cuts products into tasks of about so many weight bytes, and runs them.
fn run<'a>(
    products: impl Iterator<Item = (&'a PackedMatrix, &'a mut [f32])>,
    x: &QuantisedRows,
    task_bytes: usize,
) {
    let mut tasks = Vec::new();
    for (matrix, out) in products {
        let panels = (task_bytes * matrix.panels() / matrix.bytes().max(1)).max(1);
        for (task, out) in out.chunks_mut(panels * PANEL * x.rows()).enumerate() {
            let first = task * panels;
            tasks.push(Task { matrix, panels: first..(first + panels).min(matrix.panels()), out });
        }
    }
    let kernels = Kernels::best();
    let one = |task: Task<'_>| kernels.multiply_packed(task.matrix, task.panels, x, task.out);
    if tasks.len() == 1 || rayon::current_num_threads() == 1 {
        tasks.into_iter().for_each(one);
    } else {
        tasks.into_par_iter().for_each(one);
    }
}
