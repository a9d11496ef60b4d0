//! One compiled copy of every kernel per instruction set: functions for whose whole body the compiler may use the instructions.

use std::ops::Range;

use crate::codes::CodeLayout;
use crate::cpu::bounds::{Block, Query8};
use crate::cpu::codes::{CodeOut, CodeScan, CodeSums, CodeTaken, CodeWeighing, CodeWeights};
use crate::dtype::Dtype;
use crate::layout::RowLayout;
use crate::packed::{PackedMatrix, QuantisedRows};
use crate::quantise::Format;
use crate::run::{AttendScratch, CopyRun, Run, TopKScratch};

macro_rules! path {
    ($module:ident, $features:literal, $simd:path, { $($own:item)* }) => {
        /// Calling one of these is unsafe outside functions with the same features: the machine must have them.
        pub(in crate::cpu) mod $module {
            use super::*;
            use crate::cpu::simd as kernels;

            $($own)*

            /// The proof, for functions that run with the features on.
            #[inline]
            #[target_feature(enable = $features)]
            fn simd() -> $simd {
                // SAFETY: this function's own features say that the instructions are there.
                unsafe { <$simd>::new() }
            }

            path!(@functions $features
                convert::to_f32(dtype: Dtype, src: &[u8], dst: &mut [f32]);
                convert::from_f32(dtype: Dtype, src: &[f32], dst: &mut [u8]);
                score::score_columns(
                    dtype: Dtype, queries: &[f32], group: usize, block: &[u8], tokens: usize, out: &mut [f32], out_stride: usize,
                );
                score::page_bounds(queries: &[f32], group: usize, minmax: &[f32], out: &mut [f32]);
                bounds::page_bounds_many(
                    dtype: Dtype, queries: &[f32], group: usize, blocks: &[u8], pages: usize, out: &mut [f32], out_stride: usize,
                );
                bounds_i8::prepare_bounds_i8(query: &[f32], d: usize, to: &mut Query8);
                packed::quantise_rows(x: &[f32], columns: usize, to: &mut QuantisedRows);
                dequantise::dequantise(format: Format, row: &[u8], values: &mut [f32]);
                score::min_max_update(rows: &[f32], d: usize, minmax: &mut [f32]);
                score::project(x: &[f32], a: &[f32], out: &mut [f32]);
                score::project_columns(
                    rows: &[f32], a: &[f32], d_out: usize, dtype: Dtype, block: &mut [u8], tokens: usize, first: usize,
                );
                elementwise::softmax_add(scores: &[f32], scale: f32, acc: &mut [f32]);
                elementwise::softmax_in_place(values: &mut [f32]);
                elementwise::rms_norm(x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]);
                elementwise::silu_mul(gate: &mut [f32], up: &[f32]);
                elementwise::rope_halves(x: &mut [f32], d: usize, cos: &[f32], sin: &[f32]);
                elementwise::add(acc: &mut [f32], x: &[f32]);
                elementwise::axpy(acc: &mut [f32], a: f32, x: &[f32]);
                elementwise::mix_rows(rows: &[f32], stride: usize, factors: &[f32], out: &mut [f32]);
                hash::sign_bits(projected: &[f32], out: &mut [u8]);
                attend::merge(o: &mut [f32], lse: &mut [f32], other_o: &[f32], other_lse: &[f32]);
                code_rest::indices_above(values: &[f32], threshold: f32, ids: &mut Vec<u32>);
                code_rest::code_rest(
                    layout: &CodeLayout, blocks: &[u8], of: &CodeWeights<'_>, sums: &mut [CodeSums], means: &mut [f32],
                );
                code_rest::code_rest_below(
                    layout: &CodeLayout, blocks: &[u8], of: &CodeWeights<'_>, taken: &mut CodeTaken<'_>, sums: &mut [CodeSums],
                    means: &mut [f32],
                );
                top_k::top_k(scores: &[f32], k: usize, scratch: &mut TopKScratch, out: &mut Vec<u32>);
            );
            path!(@values $features
                reduce::dot(a: &[f32], b: &[f32]) -> f32;
                reduce::max(values: &[f32]) -> f32;
                reduce::count_above(values: &[f32], threshold: f32) -> usize;
                reduce::exp_sum(values: &[f32], max: f32) -> f32;
                reduce::exp_in_place(values: &mut [f32], max: f32) -> f32;
            );

            /// # Safety
            /// As [`Kernels::scores`](crate::Kernels::scores).
            #[target_feature(enable = $features)]
            pub(in crate::cpu) unsafe fn scores(
                dtype: Dtype, queries: &[f32], d: usize, runs: &[Run], out: &mut [f32], out_stride: usize,
            ) {
                // SAFETY: passed on to the caller.
                unsafe { kernels::attend::scores(simd(), dtype, queries, d, runs, out, out_stride) }
            }

            /// # Safety
            /// As [`Kernels::attend`](crate::Kernels::attend).
            #[target_feature(enable = $features)]
            #[allow(clippy::too_many_arguments)]
            pub(in crate::cpu) unsafe fn attend(
                dtype: Dtype, queries: &[f32], d: usize, scale: f32, runs: &[Run], scratch: &mut AttendScratch,
                out: &mut [f32], lse: &mut [f32],
            ) {
                // SAFETY: passed on to the caller.
                unsafe { kernels::attend::attend(simd(), dtype, queries, d, scale, runs, scratch, out, lse) }
            }

            /// # Safety
            /// As [`Kernels::scores_layout`](crate::Kernels::scores_layout).
            #[target_feature(enable = $features)]
            pub(in crate::cpu) unsafe fn scores_layout(
                layout: RowLayout, queries: &[f32], runs: &[Run], scratch: &mut AttendScratch, out: &mut [f32], out_stride: usize,
            ) {
                // SAFETY: passed on to the caller.
                unsafe { kernels::layout::scores_layout(simd(), layout, queries, runs, scratch, out, out_stride) }
            }

            /// # Safety
            /// As [`Kernels::attend_layout`](crate::Kernels::attend_layout).
            #[target_feature(enable = $features)]
            pub(in crate::cpu) unsafe fn attend_layout(
                layout: RowLayout, queries: &[f32], scale: f32, runs: &[Run], scratch: &mut AttendScratch, out: &mut [f32],
                lse: &mut [f32],
            ) {
                // SAFETY: passed on to the caller.
                unsafe { kernels::layout::attend_layout(simd(), layout, queries, scale, runs, scratch, out, lse) }
            }

            /// # Safety
            /// As [`Kernels::copy_runs`](crate::Kernels::copy_runs).
            #[target_feature(enable = $features)]
            pub(in crate::cpu) unsafe fn copy_runs(runs: &[CopyRun]) {
                // SAFETY: passed on to the caller.
                unsafe { kernels::copy::copy_runs(simd(), runs) }
            }
        }
    };
    (@functions $features:literal $($room:ident::$name:ident($($argument:ident: $type:ty),* $(,)?);)*) => {$(
        #[target_feature(enable = $features)]
        #[allow(clippy::too_many_arguments)]
        pub(in crate::cpu) fn $name($($argument: $type),*) {
            kernels::$room::$name(simd(), $($argument),*);
        }
    )*};
    (@values $features:literal $($room:ident::$name:ident($($argument:ident: $type:ty),*) -> $value:ty;)*) => {$(
        #[target_feature(enable = $features)]
        pub(in crate::cpu) fn $name($($argument: $type),*) -> $value {
            kernels::$room::$name(simd(), $($argument),*)
        }
    )*};
}

path!(avx2, "avx2,fma,f16c,popcnt", kernels::avx2::Avx2, {
    pub(in crate::cpu) use kernels::bounds_i8::halves::page_bounds_i8;
    pub(in crate::cpu) use kernels::codes::pairs::{code_scores, code_weights};
    pub(in crate::cpu) use kernels::hash::bytes::{hamming, hamming_sum};
    pub(in crate::cpu) use kernels::packed::halves::multiply_packed;
});
path!(avx512, "avx2,fma,f16c,popcnt,avx512f,avx512bw,avx512vl,avx512dq", kernels::avx512::Avx512, {
    /// As the path says.
    #[target_feature(enable = "avx2,popcnt,avx512f")]
    pub(in crate::cpu) fn hamming(
        queries: &[u64],
        group: usize,
        codes: &[u8],
        out: &mut [u32],
        out_stride: usize,
    ) {
        if is_x86_feature_detected!("avx512vpopcntdq") {
            // SAFETY: the instruction was just found.
            unsafe { kernels::hash::words::hamming(queries, group, codes, out, out_stride) }
        } else {
            kernels::hash::bytes::hamming(queries, group, codes, out, out_stride);
        }
    }

    /// As the path says.
    #[target_feature(enable = "avx2,popcnt,avx512f")]
    pub(in crate::cpu) fn hamming_sum(queries: &[u64], group: usize, codes: &[u8], out: &mut [u32]) {
        if is_x86_feature_detected!("avx512vpopcntdq") {
            // SAFETY: the instruction was just found.
            unsafe { kernels::hash::words::hamming_sum(queries, group, codes, out) }
        } else {
            kernels::hash::bytes::hamming_sum(queries, group, codes, out);
        }
    }

    /// As the path says.
    #[target_feature(enable = "avx2,avx512f,avx512bw,avx512dq")]
    pub(in crate::cpu) fn page_bounds_i8(
        block: Block,
        queries: &[Query8],
        digests: &[u8],
        pages: usize,
        out: &mut [f32],
        out_stride: usize,
    ) {
        if is_x86_feature_detected!("avx512vnni") {
            // SAFETY: the instruction was just found.
            unsafe {
                kernels::bounds_i8::vnni::page_bounds_i8(block, queries, digests, pages, out, out_stride);
            }
        } else {
            kernels::bounds_i8::halves::page_bounds_i8(block, queries, digests, pages, out, out_stride);
        }
    }

    /// As the path says.
    #[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq")]
    pub(in crate::cpu) fn code_scores(scan: &CodeScan<'_>, out: &mut CodeOut<'_>) {
        if is_x86_feature_detected!("avx512vnni") {
            // SAFETY: the instruction was just found.
            unsafe { kernels::codes::vnni::code_scores(scan, out) };
        } else {
            kernels::codes::words::code_scores(scan, out);
        }
    }

    /// As the path says.
    #[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq")]
    pub(in crate::cpu) fn code_weights(
        scan: &CodeScan<'_>,
        weighing: &mut CodeWeighing<'_>,
        out: &mut CodeOut<'_>,
    ) {
        if is_x86_feature_detected!("avx512vnni") {
            // SAFETY: the instruction was just found.
            unsafe { kernels::codes::vnni::code_weights(scan, weighing, out) };
        } else {
            kernels::codes::words::code_weights(scan, weighing, out);
        }
    }

    /// As the path says.
    #[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw")]
    pub(in crate::cpu) fn multiply_packed(
        matrix: &PackedMatrix,
        panels: Range<usize>,
        x: &QuantisedRows,
        out: &mut [f32],
    ) {
        if is_x86_feature_detected!("avx512vnni") {
            // SAFETY: the instruction was just found.
            unsafe { kernels::packed::vnni::multiply_packed(matrix, panels, x, out) }
        } else {
            kernels::packed::halves::multiply_packed(matrix, panels, x, out);
        }
    }
});
