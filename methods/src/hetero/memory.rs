//! What a head that chooses remembers: its choice, and the queries that will judge it.
//!
//! | bytes | what |
//! |---|---|
//! | 0..4 | tokens when it chose |
//! | 4..8 | tokens at the last selection |
//! | 8..12 | selections since the last look for drift |
//! | 12..16 | tokens when the last of the waiting queries came; 0: they are not complete |
//! | 16..20 | rows chosen |
//! | 20..24 | whether the choice lasts |
//! | 32.. | `[looks][g][d]` f32: the waiting queries, oldest first |
//! | … | the rows, by falling weight (u32) |

use kvoyant_kernels::{Dtype, Kernels};

use crate::shape::Shape;
use crate::words::{get, put};

const HEADER: usize = 32;
const CHOSEN: usize = 0;
const LAST: usize = 4;
const STEPS: usize = 8;
const QUERY: usize = 12;
const COUNT: usize = 16;
const LASTING: usize = 20;

fn query_values(shape: &Shape) -> usize {
    shape.group() * shape.head_dim
}

/// Bytes for so many queries, and a choice of that many rows.
pub(super) fn bytes(shape: &Shape, looks: usize, rows: usize) -> usize {
    HEADER + 4 * (looks * query_values(shape) + rows)
}

/// One head's memory.
pub(super) struct Memory<'a> {
    bytes: &'a mut [u8],
    /// Of one query.
    values: usize,
    /// Of all that may wait.
    waiting: usize,
}

impl<'a> Memory<'a> {
    pub(super) fn new(bytes: &'a mut [u8], shape: &Shape, looks: usize) -> Self {
        let values = query_values(shape);
        Self { bytes, values, waiting: looks * values }
    }

    fn word(&self, at: usize) -> usize {
        get(self.bytes, at) as usize
    }

    fn set(&mut self, at: usize, value: usize) {
        put(self.bytes, at, value as u32);
    }

    pub(super) fn chosen_tokens(&self) -> usize {
        self.word(CHOSEN)
    }

    pub(super) fn last_tokens(&self) -> usize {
        self.word(LAST)
    }

    pub(super) fn set_last_tokens(&mut self, tokens: usize) {
        self.set(LAST, tokens);
    }

    pub(super) fn is_lasting(&self) -> bool {
        self.word(LASTING) != 0
    }

    pub(super) fn set_lasting(&mut self, lasting: bool) {
        self.set(LASTING, usize::from(lasting));
    }

    /// Selections since the last look for drift, with this one.
    pub(super) fn count_step(&mut self) -> usize {
        self.set(STEPS, self.word(STEPS).saturating_add(1).min(u32::MAX as usize));
        self.word(STEPS)
    }

    /// Tokens when the last of the waiting queries came; 0 while they are not complete.
    pub(super) fn query_tokens(&self) -> usize {
        self.word(QUERY)
    }

    /// Keeps the query of a step as the one with this number.
    pub(super) fn put_query(&mut self, number: usize, queries: &[f32]) {
        let place = &mut self.bytes[HEADER + 4 * number * self.values..][..4 * self.values];
        Kernels::best().from_f32(Dtype::F32, queries, place);
    }

    /// The last query has come, with so many tokens: they wait.
    pub(super) fn wait(&mut self, tokens: usize) {
        self.set(STEPS, 0);
        self.set(QUERY, tokens);
    }

    /// Takes the waiting queries out, oldest first.
    pub(super) fn take_queries(&mut self, out: &mut Vec<f32>) {
        self.set(QUERY, 0);
        out.resize(self.waiting, 0.0);
        Kernels::best().to_f32(Dtype::F32, &self.bytes[HEADER..][..4 * self.waiting], out);
    }

    /// The rows chosen, by falling weight.
    pub(super) fn ids(&self) -> impl Iterator<Item = u32> + '_ {
        let ids = &self.bytes[HEADER + 4 * self.waiting..];
        ids.as_chunks().0.iter().take(self.word(COUNT)).map(|bytes| u32::from_le_bytes(*bytes))
    }

    /// Keeps a choice made at that many tokens; what does not fit is left out.
    pub(super) fn keep(&mut self, tokens: usize, ids: impl Iterator<Item = u32>) {
        self.set(CHOSEN, tokens);
        self.set(QUERY, 0);
        self.set(STEPS, 0);
        let places = self.bytes[HEADER + 4 * self.waiting..].as_chunks_mut::<4>().0;
        let mut count = 0;
        for (place, id) in places.iter_mut().zip(ids) {
            *place = id.to_le_bytes();
            count += 1;
        }
        self.set(COUNT, count);
    }

    /// Forgets a choice, or queries, that were made over more tokens than are left.
    pub(super) fn truncate(&mut self, tokens: usize) {
        if self.chosen_tokens() > tokens {
            self.bytes[..HEADER].fill(0);
        } else if self.query_tokens() > tokens {
            self.set(QUERY, 0);
        }
        self.set(LAST, self.last_tokens().min(tokens));
    }
}
