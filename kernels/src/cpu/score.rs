//! Scores of digests, and the digests themselves.

use super::{Kernels, dispatch};
use crate::dtype::Dtype;

impl Kernels {
    /// Scores every token of a dim-major digest block against a group of queries:
    /// `out[h * out_stride + t] = Σ_j queries[h][j] · block[j][t]`.
    ///
    /// `queries` is `[group][dims]`, `block` is `[dims][tokens]` in `dtype` at any alignment (longer is fine), `out` has `tokens`
    /// scores per query, one query every `out_stride` values. Fastest where `tokens` is a multiple of 16.
    ///
    /// # Panics
    /// When `group` is 0 or does not divide `queries`, or a slice is too short.
    #[allow(clippy::too_many_arguments)]
    pub fn score_columns(
        self,
        dtype: Dtype,
        queries: &[f32],
        group: usize,
        block: &[u8],
        tokens: usize,
        out: &mut [f32],
        out_stride: usize,
    ) {
        let dims = columns("score_columns", queries, group);
        check_block("score_columns", block, dims, tokens, dtype);
        check_out("score_columns", group, tokens, out, out_stride);
        if dims == 0 {
            (0..group).for_each(|h| out[h * out_stride..][..tokens].fill(0.0));
        } else if tokens > 0 {
            dispatch!(self, score_columns(dtype, queries, group, block, tokens, out, out_stride));
        }
    }

    /// Quest's upper bounds of a page (Tang et al., ICML 2024): `out[h] = Σ_j max(q_j·min_j, q_j·max_j)`, unscaled.
    ///
    /// `queries` is `[group][d]`, `minmax` is `[2][d]`: the minima of each channel over the page's keys, then the maxima.
    ///
    /// The bound holds in floating point, not only on paper: it is summed in the order of [`Kernels::dot`] and [`Kernels::scores`]
    /// with one factor per channel that is no smaller than the key's, and rounding keeps order. So `out[h] >= dot(q_h, k)` exactly,
    /// for every finite q and every k within `minmax`, when both are computed by the same path; a page of one row gives equality.
    /// Take the minima and maxima from the keys *as stored* (after rounding to f16, say). Against scores summed in another order
    /// ([`Kernels::score_columns`], another path) it holds up to their rounding, about `d · 2⁻²⁴ · Σ_j |q_j·k_j|`.
    ///
    /// # Panics
    /// When `group` is 0 or does not divide `queries`, or `minmax` or `out` have the wrong length.
    pub fn page_bounds(self, queries: &[f32], group: usize, minmax: &[f32], out: &mut [f32]) {
        let d = columns("page_bounds", queries, group);
        assert_eq!(minmax.len(), 2 * d, "page_bounds: minmax is [2][{d}]");
        assert_eq!(out.len(), group, "page_bounds: one bound per query");
        if d == 0 {
            return out.fill(0.0);
        }
        dispatch!(self, page_bounds(queries, group, minmax, out));
    }

    /// Widens `minmax` (`[2][d]`: minima, then maxima) to cover `rows` (`[n][d]`). Start from `+inf` and `-inf`. NaNs are passed over.
    ///
    /// # Panics
    /// When `d` is 0 or does not divide `rows`, or `minmax` is not `[2][d]`.
    pub fn min_max_update(self, rows: &[f32], d: usize, minmax: &mut [f32]) {
        assert!(
            d > 0 && rows.len().is_multiple_of(d),
            "min_max_update: {} values in rows of {d}",
            rows.len()
        );
        assert_eq!(minmax.len(), 2 * d, "min_max_update: minmax is [2][{d}]");
        dispatch!(self, min_max_update(rows, d, minmax));
    }

    /// `out = x · a`: `x` is `[d_in]`, `a` is `[d_in][d_out]`, `out` is `[d_out]`.
    ///
    /// # Panics
    /// Unless `a.len() == x.len() * out.len()`.
    pub fn project(self, x: &[f32], a: &[f32], out: &mut [f32]) {
        assert_eq!(a.len(), x.len() * out.len(), "project: a is [{}][{}]", x.len(), out.len());
        if out.is_empty() || x.is_empty() {
            return out.fill(0.0);
        }
        dispatch!(self, project(x, a, out));
    }

    /// Projects `rows` (`[n][d_in]`) by `a` (`[d_in][d_out]`) and writes them as columns `first .. first + n` of the dim-major digest
    /// block `[d_out][tokens]` in `dtype`. Other columns are not touched.
    ///
    /// # Panics
    /// When `d_out` is 0 or does not divide `a`, `d_in` is 0 or does not divide `rows`, the columns are outside the block, or the
    /// block is too short.
    #[allow(clippy::too_many_arguments)]
    pub fn project_columns(
        self,
        rows: &[f32],
        a: &[f32],
        d_out: usize,
        dtype: Dtype,
        block: &mut [u8],
        tokens: usize,
        first: usize,
    ) {
        assert!(
            d_out > 0 && !a.is_empty() && a.len().is_multiple_of(d_out),
            "project_columns: a of {} by {d_out}",
            a.len()
        );
        let d_in = a.len() / d_out;
        assert!(rows.len().is_multiple_of(d_in), "project_columns: {} values in rows of {d_in}", rows.len());
        let n = rows.len() / d_in;
        assert!(first <= tokens && n <= tokens - first, "project_columns: columns {first} + {n} of {tokens}");
        check_block("project_columns", block, d_out, tokens, dtype);
        dispatch!(self, project_columns(rows, a, d_out, dtype, block, tokens, first));
    }
}

/// The columns of a `[group][columns]` matrix.
pub(super) fn columns<T>(what: &str, matrix: &[T], group: usize) -> usize {
    assert!(
        group > 0 && matrix.len().is_multiple_of(group),
        "{what}: {} values for a group of {group}",
        matrix.len()
    );
    matrix.len() / group
}

/// That a block holds `[dims][tokens]` values.
fn check_block(what: &str, block: &[u8], dims: usize, tokens: usize, dtype: Dtype) {
    let needed = dims.checked_mul(tokens).and_then(|values| values.checked_mul(dtype.bytes()));
    let fits = needed.is_some_and(|needed| needed <= block.len());
    assert!(fits, "{what}: block of {} bytes for [{dims}][{tokens}] values of {dtype}", block.len());
}

/// That `out` has room for `n` values per query.
pub(super) fn check_out<T>(what: &str, group: usize, n: usize, out: &[T], stride: usize) {
    assert!(group == 1 || stride >= n, "{what}: a stride of {stride} for {n} scores");
    let needed = (group - 1).checked_mul(stride).and_then(|before| before.checked_add(n));
    let fits = needed.is_some_and(|needed| needed <= out.len());
    assert!(fits, "{what}: {} places for [{group}][{n}] scores, {stride} apart", out.len());
}
