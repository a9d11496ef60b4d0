//! The partial index: which columns of the skewed basis a sequence's digest keeps.
//!
//! State of a KV head: the chosen columns as little-endian `u16`, rising.

/// Bytes of a column's id.
pub(crate) const COLUMN_BYTES: usize = size_of::<u16>();

/// The state before any statistics: the first columns, which the calibration text found strongest.
pub(crate) fn init(state: &mut [u8]) {
    write(state, 0..(state.len() / COLUMN_BYTES) as u16);
}

/// Keeps the columns with the largest sums (of equal ones the first); true where the state changed.
///
/// # Panics
/// Where `state` holds more columns than there are sums.
pub(crate) fn choose(sums: &[f32], state: &mut [u8]) -> bool {
    let mut order: Vec<u16> = (0..sums.len() as u16).collect();
    order.sort_by(|&i, &j| sums[usize::from(j)].total_cmp(&sums[usize::from(i)]));
    let chosen = &mut order[..state.len() / COLUMN_BYTES];
    chosen.sort_unstable();
    let changed = !columns(state).eq(chosen.iter().map(|&column| usize::from(column)));
    write(state, chosen.iter().copied());
    changed
}

/// The chosen columns, rising.
pub(crate) fn columns(state: &[u8]) -> impl Iterator<Item = usize> + Clone + '_ {
    state.as_chunks().0.iter().map(|bytes| usize::from(u16::from_le_bytes(*bytes)))
}

fn write(state: &mut [u8], columns: impl Iterator<Item = u16>) {
    for (bytes, column) in state.as_chunks_mut().0.iter_mut().zip(columns) {
        *bytes = column.to_le_bytes();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_columns_with_the_largest_sums_are_kept_in_rising_order() {
        let mut state = [0; 6];
        init(&mut state);
        assert_eq!(columns(&state).collect::<Vec<_>>(), [0, 1, 2]);
        assert!(choose(&[1.0, 5.0, 0.0, 7.0, 5.0, 5.0], &mut state));
        assert_eq!(columns(&state).collect::<Vec<_>>(), [1, 3, 4], "of equal sums the first");
        assert!(!choose(&[1.0, 5.0, 0.0, 7.0, 5.0, 5.0], &mut state), "nothing changed");
    }
}
