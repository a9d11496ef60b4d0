//! Attention over scattered rows, and the merge of partial answers.

use super::score::{check_out, columns};
use super::{Kernels, dispatch};
use crate::dtype::Dtype;
use crate::run::{AttendScratch, Run};

impl Kernels {
    /// Attention of a group of queries over the rows of all runs, in their order:
    /// `out[h] = Σ_t softmax_t(scale · q_h·k_t) · v_t`, `lse[h] = ln Σ_t exp(scale · q_h·k_t)`.
    ///
    /// `queries` and `out` are `[group][d]`, `lse` is `[group]`; rows are `[k(d) | v(d)]` in `dtype`. Without rows, or where every
    /// score is `-inf`, `out` is 0 and `lse` is `-inf`. `scale` is finite.
    ///
    /// The result depends on the rows and their order alone, to the last bit: not on how they are split into runs, nor on where they
    /// lie. Each row's score is a sum in a fixed order of its own, and everything across rows goes by the row's place in the sequence.
    ///
    /// # Safety
    /// Every run's rows are readable and nobody writes to them meanwhile.
    ///
    /// # Panics
    /// When `group` or `d` is 0, or a slice has the wrong length.
    #[allow(clippy::too_many_arguments)]
    pub unsafe fn attend(
        self,
        dtype: Dtype,
        queries: &[f32],
        group: usize,
        d: usize,
        scale: f32,
        runs: &[Run],
        scratch: &mut AttendScratch,
        out: &mut [f32],
        lse: &mut [f32],
    ) {
        assert!(d > 0 && columns("attend", queries, group) == d, "attend: queries are [{group}][{d}]");
        assert!(out.len() == group * d && lse.len() == group, "attend: out is [{group}][{d}], lse [{group}]");
        if runs.iter().all(|run| run.rows == 0) {
            out.fill(0.0);
            return lse.fill(f32::NEG_INFINITY);
        }
        // Passed on to the caller; the lengths were checked.
        dispatch!(self, unsafe attend(dtype, queries, d, scale, runs, scratch, out, lse));
    }

    /// Raw dot products of a group of queries with the keys of all rows, in their order: `out[h * out_stride + t] = q_h·k_t`.
    ///
    /// Shapes as in [`Kernels::attend`]; `out` has one score per row for each query, one query every `out_stride` values.
    ///
    /// # Safety
    /// Every run's rows are readable and nobody writes to them meanwhile.
    ///
    /// # Panics
    /// When `group` or `d` is 0, or a slice has the wrong length.
    #[allow(clippy::too_many_arguments)]
    pub unsafe fn scores(
        self,
        dtype: Dtype,
        queries: &[f32],
        group: usize,
        d: usize,
        runs: &[Run],
        out: &mut [f32],
        out_stride: usize,
    ) {
        assert!(d > 0 && columns("scores", queries, group) == d, "scores: queries are [{group}][{d}]");
        check_out("scores", group, runs.iter().map(|run| run.rows).sum(), out, out_stride);
        // Passed on to the caller; the lengths were checked.
        dispatch!(self, unsafe scores(dtype, queries, d, runs, out, out_stride));
    }

    /// Merges a second partial attention into the first: `o ← (o·e^lse + o₂·e^lse₂) / (e^lse + e^lse₂)`, and `lse` of the union.
    ///
    /// `o` and `other_o` are `[heads][d]`, `lse` and `other_lse` `[heads]`. A part that covers nothing (`lse = -inf`) adds nothing.
    ///
    /// # Panics
    /// When the lengths do not fit.
    pub fn merge(self, o: &mut [f32], lse: &mut [f32], other_o: &[f32], other_lse: &[f32]) {
        assert!(o.len() == other_o.len() && lse.len() == other_lse.len(), "merge: two parts of one shape");
        if lse.is_empty() {
            return assert!(o.is_empty(), "merge: values without heads");
        }
        assert!(o.len().is_multiple_of(lse.len()), "merge: {} values of {} heads", o.len(), lse.len());
        dispatch!(self, merge(o, lse, other_o, other_lse));
    }
}
