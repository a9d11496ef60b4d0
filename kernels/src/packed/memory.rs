//! Where packed matrices lie.

use std::sync::Arc;

use bytemuck::{Pod, Zeroable};
use memmap2::{Advice, MmapMut};

use super::{PANEL, PackedMatrix, STEP};

/// A cache line of codes: four bytes for each of 16 rows.
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
#[repr(C, align(64))]
pub(crate) struct Line(pub(crate) [u8; PANEL * STEP]);

impl Line {
    pub(super) const ZEROS: Self = Self([0; PANEL * STEP]);
}

/// Lines of one matrix, or of many.
#[derive(Debug)]
pub(super) enum Memory {
    Own(Vec<Line>),
    /// Whole pages.
    Mapped(MmapMut),
}

impl From<Vec<Line>> for Memory {
    fn from(lines: Vec<Line>) -> Self {
        Self::Own(lines)
    }
}

impl Memory {
    pub(super) fn lines(&self) -> &[Line] {
        match self {
            Self::Own(lines) => lines,
            // A mapping begins with a page; what is left of its last line belongs to nobody.
            Self::Mapped(map) => {
                bytemuck::cast_slice(&map[..map.len() / size_of::<Line>() * size_of::<Line>()])
            }
        }
    }
}

/// Moves matrices into one stretch of memory, for which pages of 2 MiB are asked: a product reads so much, once, that looking up small
/// pages takes a third of its time. Where there is no such memory they stay where they are; what is computed does not change.
pub fn gather<'a>(matrices: impl IntoIterator<Item = &'a mut PackedMatrix>) {
    let matrices: Vec<&mut PackedMatrix> = matrices.into_iter().collect();
    let bytes: usize = matrices.iter().map(|matrix| matrix.bytes()).sum();
    let Ok(mut map) = MmapMut::map_anon(bytes.max(1)) else { return };
    // Advice: a kernel without such pages gives others.
    let _ = map.advise(Advice::HugePage);
    let mut at = 0;
    let places: Vec<usize> = matrices
        .iter()
        .map(|matrix| {
            let own = &matrix.memory.lines()[matrix.at..][..matrix.bytes() / size_of::<Line>()];
            let place = at;
            at += own.len();
            bytemuck::cast_slice_mut::<u8, Line>(&mut map[place * size_of::<Line>()..at * size_of::<Line>()])
                .copy_from_slice(own);
            place
        })
        .collect();
    let memory = Arc::new(Memory::Mapped(map));
    for (matrix, at) in matrices.into_iter().zip(places) {
        (matrix.memory, matrix.at) = (memory.clone(), at);
    }
}
