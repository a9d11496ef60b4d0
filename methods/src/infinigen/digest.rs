//! The digest: keys of a page in the chosen columns of the skewed basis, `[d'][P]`, a column after the other.

use kvoyant_kernels::Dtype;

use super::index;

/// Storage type of a digest whose rows are stored in `rows`: half precision is 0.05 % of a score, and what
/// rows of 16 bits hold fits its range.
pub(crate) fn dtype(rows: Dtype) -> Dtype {
    match rows {
        Dtype::F32 => Dtype::F32,
        Dtype::F16 | Dtype::Bf16 => Dtype::F16,
    }
}

/// `A[:, columns]` as `[d][d']`, the columns being those of `state`; `a` is `[d][d]`, or `None` for the identity.
pub(crate) fn gather(a: Option<&[f32]>, d: usize, state: &[u8], out: &mut Vec<f32>) {
    let columns = state.len() / index::COLUMN_BYTES;
    // Every place is written below.
    out.resize(d * columns, 0.0);
    for (i, out) in out.chunks_exact_mut(columns).enumerate() {
        let chosen = out.iter_mut().zip(index::columns(state));
        match a {
            Some(a) => {
                let row = &a[i * d..(i + 1) * d];
                // A state that lies may name a column that is not there.
                chosen.for_each(|(value, column)| *value = row.get(column).copied().unwrap_or(0.0));
            }
            None => chosen.for_each(|(value, column)| *value = f32::from(u8::from(column == i))),
        }
    }
}
