//! The specification: every kernel in plain Rust. It runs where no SIMD path exists, and the SIMD paths are compared with it.

mod attend;
mod bounds;
pub(super) mod codes;
mod convert;
mod dequantise;
mod elementwise;
mod hash;
mod packed;
mod reduce;
pub(super) mod score;
mod top_k;

#[cfg(target_arch = "x86_64")]
pub(super) use attend::merge_weights;
pub(super) use attend::{attend, attend_layout, merge, scores, scores_layout};
pub(super) use bounds::{page_bounds_i8, page_bounds_many, prepare_bounds_i8};
pub(super) use codes::{code_rest, code_rest_below, code_scores, code_weights, exp_in_place, indices_above};
pub(super) use convert::{from_f32, to_f32};
pub(super) use dequantise::dequantise;
pub(super) use elementwise::{
    add, axpy, mix_rows, rms_norm, rope_halves, silu_mul, softmax_add, softmax_in_place,
};
pub(super) use hash::{hamming, hamming_sum, sign_bits};
pub(super) use packed::{multiply_packed, quantise_rows};
pub(super) use reduce::{count_above, dot, exp_sum, max};
pub(super) use score::{min_max_update, page_bounds, project, project_columns, score_columns};
pub(super) use top_k::top_k;

use crate::run::CopyRun;

/// Copies run by run.
///
/// # Safety
/// As [`Kernels::copy_runs`](crate::Kernels::copy_runs).
pub(super) unsafe fn copy_runs(runs: &[CopyRun]) {
    for run in runs {
        // SAFETY: the caller promises readable sources and writable destinations that do not overlap.
        unsafe { std::ptr::copy_nonoverlapping(run.src, run.dst, run.bytes) };
    }
}
