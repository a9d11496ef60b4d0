//! What is kept of one KV head: its last attention rows, and what of the network's sums stays when a row comes in.
//!
//! Shifted by a row, an image has the same inner rows: of the network's output only the two first and the two last rows feel the
//! edges. So the sum over the inner rows is kept: a new row adds one term per block and takes one away, instead of 64 new ones.
//! The terms are whole numbers, multiples of 2⁻³²: sums of them do not drift, and are the same in whatever order they came.
//!
//! | bytes | what |
//! |---|---|
//! | 0..8 | rows ever |
//! | 8..12 | blocks that a row has covered |
//! | 12..20 | rows when the totals were made, and 20..24 for how many blocks |
//! | 32.. | `[capacity][64]` f16: per block the rows as a ring |
//! | … | `[capacity]` i64: sums over the inner rows |
//! | … | `[capacity]` i64: totals over all rows |
//!
//! The bytes may come from an image that somebody else wrote: whatever they hold, rows and blocks are cut to what can be.

use std::ops::Range;

use kvoyant_kernels::{Dtype, Kernels};

use super::network::{HISTORY, Image, Network};
use crate::words;

const HEADER: usize = 32;
const ROWS: usize = 0;
const COLUMNS: usize = 8;
const SCORED_ROWS: usize = 12;
const SCORED_COLUMNS: usize = 20;

/// No sequence has so many rows; two more are still a number.
const ROWS_MAX: u64 = 1 << 62;

const COLUMN: usize = HISTORY * 2;
const SUM: usize = 8;

/// Rows at either end whose output feels the image's edge: one for each convolution.
const EDGE: u64 = 2;
/// The same for blocks.
const SIDE: usize = 2;

const ONE: f64 = (1_u64 << 32) as f64;

fn fixed(value: f32) -> i64 {
    (f64::from(value) * ONE).round() as i64
}

/// Bytes for `blocks` blocks.
pub(super) fn bytes(blocks: usize) -> usize {
    HEADER + blocks * (COLUMN + 2 * SUM)
}

/// A head's memory, taken apart.
pub(super) struct History<'a> {
    header: &'a mut [u8],
    image: &'a mut [u8],
    sums: &'a mut [u8],
    totals: &'a mut [u8],
    /// The first block of the image.
    first: usize,
    kernels: Kernels,
}

/// Reads a block's ring; blocks beyond the memory hold zeros.
fn column(kernels: Kernels, image: &[u8], at: usize, out: &mut [f32; HISTORY]) {
    match image.get(at * COLUMN..(at + 1) * COLUMN) {
        Some(bytes) => kernels.to_f32(Dtype::F16, bytes, out),
        None => out.fill(0.0),
    }
}

fn add(sums: &mut [u8], at: usize, value: i64) {
    words::put_i64(sums, at * SUM, words::get_i64(sums, at * SUM).wrapping_add(value));
}

impl<'a> History<'a> {
    /// `first` is the first block without a sink.
    pub(super) fn new(memory: &'a mut [u8], first: usize, kernels: Kernels) -> Self {
        let capacity = (memory.len() - HEADER) / (COLUMN + 2 * SUM);
        let (header, rest) = memory.split_at_mut(HEADER);
        let (image, rest) = rest.split_at_mut(capacity * COLUMN);
        let (sums, rest) = rest.split_at_mut(capacity * SUM);
        Self { header, image, sums, totals: &mut rest[..capacity * SUM], first, kernels }
    }

    /// Takes over what `old` holds.
    pub(super) fn copy(&mut self, old: &Self) {
        self.header.copy_from_slice(old.header);
        self.image[..old.image.len()].copy_from_slice(old.image);
        self.sums[..old.sums.len()].copy_from_slice(old.sums);
        self.totals[..old.totals.len()].copy_from_slice(old.totals);
    }

    fn capacity(&self) -> usize {
        self.sums.len() / SUM
    }

    /// Rows ever.
    pub(super) fn rows(&self) -> u64 {
        (words::get_i64(self.header, ROWS) as u64).min(ROWS_MAX)
    }

    /// Blocks that a row has covered.
    pub(super) fn columns(&self) -> usize {
        (words::get(self.header, COLUMNS) as usize).min(self.capacity())
    }

    /// The rows that are still there.
    fn times(&self) -> Range<u64> {
        self.rows().saturating_sub(HISTORY as u64)..self.rows()
    }

    /// Those whose output feels no edge.
    fn inner(&self) -> Range<u64> {
        let times = self.times();
        times.start + EDGE..times.end.saturating_sub(EDGE).max(times.start + EDGE)
    }

    /// Adds `sign · z` of row `time` to the sums of `columns`. The image goes on to the right, with zeros where no row has been.
    fn sum(&mut self, network: &Network, time: u64, columns: Range<usize>, sign: i64) {
        let (kernels, image, sums) = (self.kernels, &*self.image, &mut *self.sums);
        let whole = Image { columns: self.first..usize::MAX, times: 0..u64::MAX };
        network.row(
            &whole,
            time,
            columns,
            |at, out| column(kernels, image, at, out),
            |at, z| {
                add(sums, at, sign.wrapping_mul(fixed(z)));
            },
        );
    }

    fn sum_inner(&mut self, network: &Network, columns: Range<usize>) {
        for time in self.inner() {
            self.sum(network, time, columns.clone(), 1);
        }
    }

    /// A new row: the largest weight of every block.
    pub(super) fn push(&mut self, blocks: &[f32], network: Option<&Network>) {
        let blocks = &blocks[..blocks.len().min(self.capacity())];
        let (known, now) = (self.columns(), self.rows());
        let inner = self.inner();
        if let Some(network) = network
            && now >= HISTORY as u64
        {
            self.sum(network, inner.start, self.first..known, -1);
        }
        let slot = (now % HISTORY as u64) as usize;
        let mut stored = [0; 2 * HISTORY];
        for (at, values) in blocks.chunks(HISTORY).enumerate() {
            let stored = &mut stored[..2 * values.len()];
            self.kernels.from_f32(Dtype::F16, values, stored);
            for (place, value) in stored.chunks_exact(2).enumerate() {
                self.image[(at * HISTORY + place) * COLUMN + 2 * slot..][..2].copy_from_slice(value);
            }
        }
        for at in blocks.len()..known {
            self.image[at * COLUMN + 2 * slot..][..2].fill(0);
        }
        let columns = known.max(blocks.len());
        words::put_i64(self.header, ROWS, (now + 1) as i64);
        words::put(self.header, COLUMNS, columns as u32);
        if let Some(network) = network {
            if self.inner().end > inner.end.max(self.inner().start) {
                self.sum(network, inner.end, self.first..known, 1);
            }
            // The rows before hold zeros in blocks that are new.
            self.sum_inner(network, self.first.max(known)..columns);
        }
    }

    /// Forgets the blocks that are not wholly within the first `whole` ones.
    pub(super) fn truncate(&mut self, whole: usize, network: Option<&Network>) {
        let known = self.columns();
        if whole >= known {
            return;
        }
        self.image[whole * COLUMN..known * COLUMN].fill(0);
        words::put(self.header, COLUMNS, whole as u32);
        words::put(self.header, SCORED_COLUMNS, 0);
        // Those beside the cut have looked at what is gone.
        let from = whole.saturating_sub(SIDE).max(self.first);
        self.sums[whole.min(from) * SUM..known * SUM].fill(0);
        if let Some(network) = network {
            self.sum_inner(network, from..whole);
        }
    }

    /// The network's scores of the blocks from the first to `end`, which rows have covered. They are kept until the next row.
    pub(super) fn predict(&mut self, network: &Network, end: usize, out: &mut Vec<f32>) {
        let image = Image { columns: self.first..end, times: self.times() };
        let kept = words::get_i64(self.header, SCORED_ROWS) as u64 == self.rows()
            && words::get(self.header, SCORED_COLUMNS) as usize == end;
        if !kept {
            let inner = self.inner();
            let (kernels, history, totals) = (self.kernels, &*self.image, &mut *self.totals);
            let side = end.saturating_sub(SIDE).max(self.first);
            totals[self.first * SUM..side * SUM].copy_from_slice(&self.sums[self.first * SUM..side * SUM]);
            totals[side * SUM..end * SUM].fill(0);
            for time in image.times.clone() {
                let columns = if inner.contains(&time) { side..end } else { self.first..end };
                network.row(
                    &image,
                    time,
                    columns,
                    |at, out| column(kernels, history, at, out),
                    |at, z| {
                        add(totals, at, fixed(z));
                    },
                );
            }
            words::put_i64(self.header, SCORED_ROWS, self.rows() as i64);
            words::put(self.header, SCORED_COLUMNS, end as u32);
        }
        let rows = (image.times.end - image.times.start).max(1) as f64;
        out.clear();
        out.extend(
            image.columns.map(|at| {
                network.bias() + (words::get_i64(self.totals, at * SUM) as f64 / ONE / rows) as f32
            }),
        );
    }

    /// The mean over time of the blocks from the first to `end`.
    pub(super) fn average(&self, end: usize, out: &mut Vec<f32>) {
        let rows = self.times().count().max(1) as f32;
        let mut ring = [0.0; HISTORY];
        out.clear();
        for at in self.first..end {
            column(self.kernels, self.image, at, &mut ring);
            // Summed in the order of time, so that equal rows give equal means wherever the ring begins.
            let sum: f32 = self.times().map(|time| ring[(time % HISTORY as u64) as usize]).sum();
            out.push(sum / rows);
        }
    }

    /// What `weights` see as the image `[rows][first..end]`, oldest row first.
    #[cfg(test)]
    pub(super) fn image(&self, end: usize) -> Vec<f32> {
        let mut ring = [0.0; HISTORY];
        let mut out = Vec::new();
        for time in self.times() {
            for at in self.first..end {
                column(self.kernels, self.image, at, &mut ring);
                out.push(ring[(time % HISTORY as u64) as usize]);
            }
        }
        out
    }
}
