//! Blocks of one KV head: where they end, what is kept of them, and the tokens that still wait for their end.
//!
//! A block's end is decided once, when as many tokens have come as the decision looks at: so blocks do not depend on how
//! appends were cut.
//!
//! | bytes | what |
//! |---|---|
//! | 0..4 | tokens so far |
//! | 4..8 | blocks that have an end |
//! | 8..12 | where the last of them ends |
//! | 16.. | `[waiting][d]` f32: keys of the tokens since then |
//! | … | `[waiting]` marks of theirs |
//! | … | per block its end (u32) and its digest |
//!
//! The memory may come from an image that somebody else wrote. Numbers are cut, where they are read, to what it can hold; ends of
//! blocks may still go back and forth, for whoever reads them to expect.

use std::ops::Range;

use kvoyant_kernels::{Dtype, Kernels};

use super::spec::{Boundary, Digest, DynsplitSpec, Score};
use crate::needs::mark;
use crate::shape::Shape;
use crate::words;

const HEADER: usize = 16;
const TOKENS: usize = 0;
const BLOCKS: usize = 4;
const END: usize = 8;

fn word(bytes: &[u8], at: usize) -> usize {
    words::get(bytes, at) as usize
}

fn put(bytes: &mut [u8], at: usize, value: usize) {
    words::put(bytes, at, value as u32);
}

/// How blocks are cut and kept.
#[derive(Debug, Clone, Copy)]
pub(super) struct Layout {
    pub(super) options: DynsplitSpec,
    pub(super) d: usize,
    pub(super) dtype: Dtype,
    pub(super) kernels: Kernels,
}

impl Layout {
    pub(super) fn new(options: DynsplitSpec, shape: &Shape) -> Self {
        Self { options, d: shape.head_dim, dtype: shape.dtype, kernels: Kernels::best() }
    }

    /// Tokens that must be there before a block's end is decided.
    pub(super) fn waiting(&self) -> usize {
        match (self.options.boundary, self.options.score) {
            (Boundary::Fixed, _) => self.options.page,
            (Boundary::Dynamic, Score::Marks) => self.options.max,
            // The keys after the last place that the block could end at.
            (Boundary::Dynamic, Score::Keys) => self.options.max + self.options.min,
        }
    }

    /// Fewest tokens of a block.
    pub(super) fn shortest(&self) -> usize {
        match self.options.boundary {
            Boundary::Fixed => self.options.page,
            Boundary::Dynamic => self.options.min,
        }
    }

    /// Values of a digest.
    pub(super) fn values(&self) -> usize {
        match self.options.digest {
            Digest::Bounds => 2 * self.d,
            Digest::Mean => self.d,
        }
    }

    fn record(&self) -> usize {
        4 + self.values() * self.dtype.bytes()
    }

    fn marks(&self) -> usize {
        HEADER + self.waiting() * self.d * 4
    }

    fn records(&self) -> usize {
        self.marks() + self.waiting()
    }

    /// Bytes for up to `max_tokens` tokens, all in the shortest blocks.
    pub(super) fn bytes(&self, max_tokens: usize) -> usize {
        self.records() + max_tokens.div_ceil(self.shortest()) * self.record()
    }

    /// Tokens so far: fewer wait than it takes for the next block's end.
    pub(super) fn tokens(&self, memory: &[u8]) -> usize {
        let end = word(memory, END);
        word(memory, TOKENS).clamp(end, end + self.waiting() - 1)
    }

    /// Blocks that a memory can hold.
    fn places(&self, memory: &[u8]) -> usize {
        memory.len().saturating_sub(self.records()) / self.record()
    }

    /// Blocks that have an end.
    fn closed(&self, memory: &[u8]) -> usize {
        let blocks = word(memory, BLOCKS);
        // Nothing is divided where it is as it should be: every block asks.
        if self.records() + blocks * self.record() <= memory.len() { blocks } else { self.places(memory) }
    }

    /// Blocks so far; the last may have no end yet.
    pub(super) fn blocks(&self, memory: &[u8]) -> usize {
        self.closed(memory) + usize::from(word(memory, END) < self.tokens(memory))
    }

    fn end(&self, memory: &[u8], block: usize) -> usize {
        if block < self.closed(memory) {
            word(memory, self.records() + block * self.record())
        } else {
            self.tokens(memory)
        }
    }

    /// Tokens of a block.
    pub(super) fn block(&self, memory: &[u8], block: usize) -> Range<usize> {
        let start = if block == 0 { 0 } else { self.end(memory, block - 1) };
        start..self.end(memory, block)
    }

    /// The first block that ends after `token`.
    pub(super) fn block_of(&self, memory: &[u8], token: usize) -> usize {
        let (mut low, mut high) = (0, self.blocks(memory));
        while low < high {
            let middle = low.midpoint(high);
            if self.end(memory, middle) <= token { low = middle + 1 } else { high = middle }
        }
        low
    }

    /// A block's digest as f32, `[values]`; of the open one it is made from the waiting keys, through `keys`.
    pub(super) fn digest(&self, memory: &[u8], block: usize, keys: &mut Vec<f32>, digest: &mut [f32]) {
        if block < self.closed(memory) {
            let at = self.records() + block * self.record() + 4;
            self.kernels.to_f32(self.dtype, &memory[at..at + self.record() - 4], digest);
        } else {
            let tokens = self.tokens(memory) - word(memory, END);
            self.waiting_keys(memory, tokens, keys);
            self.summarise(keys, digest);
            // As it would be stored, so that a block's score does not change when it gets its end.
            for value in digest {
                let mut stored = [0; 4];
                let stored = &mut stored[..self.dtype.bytes()];
                self.kernels.from_f32(self.dtype, std::slice::from_ref(value), stored);
                self.kernels.to_f32(self.dtype, stored, std::slice::from_mut(value));
            }
        }
    }

    fn waiting_keys(&self, memory: &[u8], tokens: usize, keys: &mut Vec<f32>) {
        keys.resize(tokens * self.d, 0.0);
        self.kernels.to_f32(Dtype::F32, &memory[HEADER..][..tokens * self.d * 4], keys);
    }

    fn summarise(&self, keys: &[f32], digest: &mut [f32]) {
        match self.options.digest {
            Digest::Bounds => {
                let (least, most) = digest.split_at_mut(self.d);
                least.fill(f32::INFINITY);
                most.fill(f32::NEG_INFINITY);
                self.kernels.min_max_update(keys, self.d, digest);
            }
            Digest::Mean => mean(keys, self.d, digest),
        }
    }

    /// Takes in the next tokens; those that are known already are passed over.
    pub(super) fn append(
        &self,
        first: usize,
        keys: &[f32],
        marks: &[u8],
        memory: &mut [u8],
        buffer: &mut Vec<f32>,
        digest: &mut Vec<f32>,
    ) {
        let known = self.tokens(memory).saturating_sub(first);
        for (row, key) in keys.chunks_exact(self.d).enumerate().skip(known) {
            let tokens = first + row;
            let at = tokens.checked_sub(word(memory, END)).filter(|at| *at < self.waiting());
            // Another sequence's memory: nothing more can be known of this one's blocks.
            let Some(at) = at else { return };
            self.kernels.from_f32(Dtype::F32, key, &mut memory[HEADER + at * self.d * 4..][..self.d * 4]);
            memory[self.marks() + at] = marks.get(row).copied().unwrap_or(mark::NONE);
            put(memory, TOKENS, tokens + 1);
            if at + 1 == self.waiting() {
                self.close(memory, buffer, digest);
            }
        }
    }

    /// Decides where the block under way ends, and lets go of its tokens.
    fn close(&self, memory: &mut [u8], keys: &mut Vec<f32>, digest: &mut Vec<f32>) {
        let waiting = self.waiting();
        self.waiting_keys(memory, waiting, keys);
        let length = self.length(keys, &memory[self.marks()..self.records()]);
        digest.resize(self.values(), 0.0);
        self.summarise(&keys[..length * self.d], digest);
        let (block, end) = (self.closed(memory), word(memory, END) + length);
        if block < self.places(memory) {
            let record = &mut memory[self.records() + block * self.record()..][..self.record()];
            put(record, 0, end);
            self.kernels.from_f32(self.dtype, digest, &mut record[4..]);
            put(memory, BLOCKS, block + 1);
        }
        put(memory, END, end);
        let (marks, records) = (self.marks(), self.records());
        memory.copy_within(HEADER + length * self.d * 4..marks, HEADER);
        memory.copy_within(marks + length..records, marks);
    }

    /// The best length of a block that begins with these keys.
    fn length(&self, keys: &[f32], marks: &[u8]) -> usize {
        let DynsplitSpec { boundary, min, max, page, score, candidates, .. } = self.options;
        if boundary == Boundary::Fixed {
            return page;
        }
        let (mut best, mut best_score) = (max, f32::NEG_INFINITY);
        for length in min..=max {
            let mark = marks[length - 1];
            if mark < candidates {
                continue;
            }
            let score = match score {
                Score::Marks => f32::from(mark),
                Score::Keys => {
                    let around = &keys[(length - min) * self.d..(length + min) * self.d];
                    let (before, after) = around.split_at(min * self.d);
                    1.0 - self.cosine_of_sums(before, after)
                }
            };
            // Of equal ones the last: fewer blocks.
            if score >= best_score {
                (best, best_score) = (length, score);
            }
        }
        best
    }

    /// Cosine of the mean keys; 1 where one of them has no direction.
    fn cosine_of_sums(&self, before: &[f32], after: &[f32]) -> f32 {
        let (mut dot, mut square, mut other) = (0.0_f64, 0.0_f64, 0.0_f64);
        for channel in 0..self.d {
            let sum =
                |keys: &[f32]| keys[channel..].iter().step_by(self.d).map(|x| f64::from(*x)).sum::<f64>();
            let (a, b) = (sum(before), sum(after));
            dot += a * b;
            square += a * a;
            other += b * b;
        }
        let cosine = dot / (square * other).sqrt();
        if cosine.is_finite() { cosine as f32 } else { 1.0 }
    }
}

/// Mean of `keys` `[n][d]`.
fn mean(keys: &[f32], d: usize, out: &mut [f32]) {
    let rows = (keys.len() / d).max(1) as f32;
    out.fill(0.0);
    for key in keys.chunks_exact(d) {
        out.iter_mut().zip(key).for_each(|(sum, x)| *sum += x / rows);
    }
}
