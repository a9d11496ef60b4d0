//! Keys and values of rows as methods see them, read out of a session's pages.

use kvoyant_kernels::RowLayout;
use kvoyant_kernels::quantise::Format;
use kvoyant_protocol::memory::MemoryError;

use crate::tiers::arena::SessionArena;

/// Reads the values of `count` consecutive rows out of a page, as f32 `[count][values of a row]`.
pub(super) fn read_values(
    arena: &SessionArena,
    layout: RowLayout,
    locator: u32,
    count: usize,
    rows: &mut Vec<u8>,
    values: &mut Vec<f32>,
) -> Result<(), MemoryError> {
    let geometry = arena.geometry();
    let (extent, offset) = geometry.locate(locator);
    values.resize(count * layout.value_values(), 0.0);
    rows.clear();
    rows.resize(count * geometry.row_bytes, 0);
    arena.memory(extent).read(offset, rows)?;
    layout.decode_values(rows, values);
    Ok(())
}

/// Reads the keys of `count` consecutive rows out of a page, as f32 `[count][head dim]`.
pub(super) fn read_keys(
    arena: &SessionArena,
    layout: RowLayout,
    locator: u32,
    count: usize,
    rows: &mut Vec<u8>,
    keys: &mut Vec<f32>,
) -> Result<(), MemoryError> {
    let geometry = arena.geometry();
    let (extent, offset) = geometry.locate(locator);
    keys.clear();
    keys.resize(count * layout.key_values(), 0.0);
    rows.clear();
    if let RowLayout::KeyValue { format: Format::Plain(dtype), .. } = layout {
        let key_bytes = geometry.row_bytes / 2;
        rows.resize(count * key_bytes, 0);
        for (row, key) in rows.chunks_exact_mut(key_bytes).enumerate() {
            arena.memory(extent).read(offset + row * geometry.row_bytes, key)?;
        }
        kvoyant_kernels::Kernels::best().to_f32(dtype, rows, keys);
        return Ok(());
    }
    rows.resize(count * geometry.row_bytes, 0);
    arena.memory(extent).read(offset, rows)?;
    layout.decode_keys(rows, keys);
    Ok(())
}
