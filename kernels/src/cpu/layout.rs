//! Attention over rows of any layout, for one head or many.

use super::score::{check_out, columns};
use super::{Kernels, dispatch};
use crate::layout::RowLayout;
use crate::quantise::Format;
use crate::run::{AttendScratch, Run};

impl Kernels {
    /// Reads a quantised row. Exact; the same on every path.
    ///
    /// # Panics
    /// Unless `row` has the bytes that [`Format::row_bytes`] gives for the values; plain rows may have any number of them.
    pub fn dequantise(self, format: Format, row: &[u8], values: &mut [f32]) {
        if let Format::Plain(dtype) = format {
            return self.to_f32(dtype, row, values);
        }
        let bytes = format.row_bytes(values.len());
        assert_eq!(
            bytes,
            Some(row.len()),
            "dequantise: bytes of a row of {} values as {format}",
            values.len()
        );
        if !values.is_empty() {
            dispatch!(self, dequantise(format, row, values));
        }
    }

    /// [`Kernels::attend`] over rows of any layout: `queries` is `[group][key_values]`, `out` is `[group][value_values]`.
    ///
    /// Rows `[k | v]` of a plain type give what `attend` gives, to the last bit. Quantised rows are dequantised on the way, a chunk at a
    /// time, and give what their values would give in f32 rows; but pairs in [`Format::Int8`] are read where they lie, scores and weights
    /// being multiplied by the scales, and give the same up to rounding. Whatever the layout, nothing depends on how rows are split into
    /// runs.
    ///
    /// # Safety
    /// Every run's rows are readable during the call. Another process may write to them meanwhile: the answer is then that of some
    /// mixture of old and new bytes, and nothing else goes wrong. Which addresses are read follows from the arguments alone, before
    /// anything is read; what is read becomes a number in a sum and is never an address, a length or a branch that decides about one.
    ///
    /// # Panics
    /// When `group` is 0, there are no such rows, or a slice has the wrong length.
    #[allow(clippy::too_many_arguments)]
    pub unsafe fn attend_layout(
        self,
        layout: RowLayout,
        queries: &[f32],
        group: usize,
        scale: f32,
        runs: &[Run],
        scratch: &mut AttendScratch,
        out: &mut [f32],
        lse: &mut [f32],
    ) {
        layout.checked_row_bytes("attend_layout");
        let (keys, values) = (layout.key_values(), layout.value_values());
        assert_eq!(
            columns("attend_layout", queries, group),
            keys,
            "attend_layout: queries are [{group}][{keys}]"
        );
        let fits = out.len() == group * values && lse.len() == group;
        assert!(fits, "attend_layout: out is [{group}][{values}], lse [{group}]");
        if runs.iter().all(|run| run.rows == 0) {
            out.fill(0.0);
            return lse.fill(f32::NEG_INFINITY);
        }
        // Passed on to the caller; the lengths were checked.
        dispatch!(self, unsafe attend_layout(layout, queries, scale, runs, scratch, out, lse));
    }

    /// [`Kernels::attend_layout`] for many heads, one after the other: head i's queries attend over the rows of `runs[i]`.
    ///
    /// `queries` is `[heads][group][key_values]`, `out` is `[heads][group][value_values]`, `lse` is `[heads][group]`, `heads` the number
    /// of lists of runs.
    ///
    /// # Safety
    /// As [`Kernels::attend_layout`], of all runs.
    ///
    /// # Panics
    /// When `group` is 0, there are no such rows, or a slice has the wrong length.
    #[allow(clippy::too_many_arguments)]
    pub unsafe fn attend_heads(
        self,
        layout: RowLayout,
        queries: &[f32],
        group: usize,
        scale: f32,
        runs: &[&[Run]],
        scratch: &mut AttendScratch,
        out: &mut [f32],
        lse: &mut [f32],
    ) {
        let (heads, keys, values) = (runs.len(), layout.key_values(), layout.value_values());
        let fits = group > 0
            && keys > 0
            && queries.len() == heads * group * keys
            && out.len() == heads * group * values
            && lse.len() == heads * group;
        assert!(fits, "attend_heads: queries are [{heads}][{group}][{keys}], out [..][{values}], lse [..]");
        for (i, runs) in runs.iter().enumerate() {
            let queries = &queries[i * group * keys..][..group * keys];
            let out = &mut out[i * group * values..][..group * values];
            // SAFETY: passed on to the caller.
            unsafe {
                self.attend_layout(
                    layout,
                    queries,
                    group,
                    scale,
                    runs,
                    scratch,
                    out,
                    &mut lse[i * group..][..group],
                );
            }
        }
    }

    /// [`Kernels::scores`] of rows of any layout: `queries` is `[group][key_values]`.
    ///
    /// # Safety
    /// As [`Kernels::attend_layout`].
    ///
    /// # Panics
    /// When `group` is 0, there are no such rows, or a slice has the wrong length.
    #[allow(clippy::too_many_arguments)]
    pub unsafe fn scores_layout(
        self,
        layout: RowLayout,
        queries: &[f32],
        group: usize,
        runs: &[Run],
        scratch: &mut AttendScratch,
        out: &mut [f32],
        out_stride: usize,
    ) {
        layout.checked_row_bytes("scores_layout");
        let keys = layout.key_values();
        assert_eq!(
            columns("scores_layout", queries, group),
            keys,
            "scores_layout: queries are [{group}][{keys}]"
        );
        check_out("scores_layout", group, runs.iter().map(|run| run.rows).sum(), out, out_stride);
        // Passed on to the caller; the lengths were checked.
        dispatch!(self, unsafe scores_layout(layout, queries, runs, scratch, out, out_stride));
    }
}
