//! What a KV head keeps: its label and the selection that the label made.
//!
//! `[kept u32] [ranges u32] [label: g·d f32] [ranges: first u32, count u32]`, little-endian. `kept` is 0 where there is nothing yet.
//! The memory may lie where others can write: whatever it holds, a selection from it is sorted and within the candidates.

use std::ops::Range;

use crate::selection::{Selection, TokenRange};
use crate::words;

const HEAD: usize = 8;
const RANGE: usize = 8;
const VALUE: usize = 4;

/// Where the parts are.
#[derive(Debug, Clone, Copy)]
pub(super) struct Layout {
    pub(super) group: usize,
    pub(super) head_dim: usize,
}

impl Layout {
    fn ranges_at(self) -> usize {
        HEAD + self.group * self.head_dim * VALUE
    }

    /// Bytes for selections of up to `rows` of `tokens` tokens.
    pub(super) fn bytes(self, rows: usize, tokens: usize) -> usize {
        // Ranges are not adjacent; one is enough for all.
        self.ranges_at() + rows.min(tokens.div_ceil(2)).max(1) * RANGE
    }

    /// Mean over the queries (`[queries · g][d]`) of their cosine with the label of their head; nothing where there is no label, or
    /// where a vector has no direction.
    pub(super) fn likeness(self, memory: &[u8], queries: &[f32]) -> Option<f64> {
        let label = memory.get(HEAD..self.ranges_at())?.as_chunks::<VALUE>().0;
        if words::get(memory, 0) == 0 {
            return None;
        }
        let mut sum = 0.0;
        for (at, query) in queries.chunks_exact(self.head_dim).enumerate() {
            let label = &label[at % self.group * self.head_dim..][..self.head_dim];
            let (mut dot, mut q2, mut l2) = (0.0_f64, 0.0_f64, 0.0_f64);
            for (query, label) in query.iter().zip(label) {
                let (query, label) = (f64::from(*query), f64::from(f32::from_le_bytes(*label)));
                dot += query * label;
                q2 += query * query;
                l2 += label * label;
            }
            // Rounding may leave a cosine a hair outside.
            sum += (dot / (q2.sqrt() * l2.sqrt())).clamp(-1.0, 1.0);
        }
        let mean = sum / (queries.len() / self.head_dim) as f64;
        mean.is_finite().then_some(mean)
    }

    /// Pushes what was kept and is still a candidate.
    pub(super) fn push(self, memory: &[u8], candidates: &Range<usize>, out: &mut Selection) {
        let Some(ranges) = memory.get(self.ranges_at()..) else { return };
        let mut from = candidates.start;
        for range in ranges.chunks_exact(RANGE).take(words::get(memory, 4) as usize) {
            let first = words::get(range, 0) as usize;
            let end = first.saturating_add(words::get(range, VALUE) as usize).min(candidates.end);
            let first = first.max(from);
            out.push(first, end);
            from = from.max(end);
        }
    }

    /// Keeps a selection and the label (`[g][d]`) that made it. One that has no room is not kept, and is made anew next time.
    pub(super) fn keep(self, label: &[f32], ranges: &[TokenRange], memory: &mut [u8]) {
        let at = self.ranges_at();
        if memory.len() < at + ranges.len() * RANGE {
            return memory.fill(0);
        }
        words::put(memory, 0, 1);
        words::put(memory, 4, ranges.len() as u32);
        for (bytes, value) in memory[HEAD..at].as_chunks_mut::<VALUE>().0.iter_mut().zip(label) {
            *bytes = value.to_le_bytes();
        }
        for (bytes, range) in memory[at..].chunks_exact_mut(RANGE).zip(ranges) {
            words::put(bytes, 0, range.first);
            words::put(bytes, VALUE, range.count);
        }
    }

    /// Forgets a selection of rows that are gone: what comes at their positions is something else.
    pub(super) fn truncate(self, tokens: usize, memory: &mut [u8]) {
        let Some(ranges) = memory.get(self.ranges_at()..) else { return };
        let ends = ranges
            .chunks_exact(RANGE)
            .take(words::get(memory, 4) as usize)
            .map(|range| u64::from(words::get(range, 0)) + u64::from(words::get(range, VALUE)));
        if ends.max().is_some_and(|end| end > tokens as u64) {
            memory.fill(0);
        }
    }
}
