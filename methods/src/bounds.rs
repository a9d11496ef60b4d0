//! Bounds of pages per channel: the digest of `quest`, and of the methods that choose pages as it does.
//!
//! A digest block holds `[P/page][2][d]` values, in the storage type of the rows or in 8 bits (rounded outwards): per page and channel
//! the smallest and the largest key value. `ub = Σ_j max(q_j·min_j, q_j·max_j)/√d` is at least every score of the page, for keys as stored. A page's
//! rank is the mean over the group's queries of the softmax of their bounds.

use kvoyant_kernels::Kernels;

use crate::budget::Budget;
use crate::context::SelectContext;
use crate::error::MethodError;
use crate::method::{Append, DigestKey};
use crate::pages;
use crate::scratch::Scratch;
use crate::selection::Selection;
use crate::shape::Shape;
use crate::store::Store;

/// How bounds are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Digest {
    /// In the storage type of the rows.
    #[default]
    Plain,
    /// In 8 bits, rounded outwards: about half of f16.
    Int8,
}

impl Digest {
    pub(crate) const WORDS: &'static [(&'static str, Self)] = &[("plain", Self::Plain), ("int8", Self::Int8)];
}

/// Digests of pages of `page` rows, which may be smaller than the arena's, and the selection by them.
#[derive(Debug, Clone, Copy)]
pub(crate) struct PageBounds {
    pub(crate) shape: Shape,
    pub(crate) page: usize,
    pub(crate) digest: Digest,
    pub(crate) kernels: Kernels,
}

impl PageBounds {
    /// Bounds of pages of `page` rows, for `method`.
    ///
    /// # Errors
    /// [`MethodError::Unsuitable`] where `page` does not divide the arena's page.
    pub(crate) fn new(method: &'static str, page: usize, shape: &Shape) -> Result<Self, MethodError> {
        if page == 0 || !shape.page_rows.is_multiple_of(page) {
            return Err(MethodError::Unsuitable {
                method,
                reason: format!(
                    "its pages of {page} rows do not divide the arena's of {}; set `page` to a divisor",
                    shape.page_rows
                ),
            });
        }
        Ok(Self { shape: *shape, page, digest: Digest::Plain, kernels: Kernels::best() })
    }

    /// The same bounds, stored like that.
    pub(crate) fn stored(self, digest: Digest) -> Self {
        Self { digest, ..self }
    }

    /// One key for all methods that read these digests: they share them.
    pub(crate) fn digest_key(&self) -> DigestKey {
        let parameters = [self.page as u64, u64::from(self.shape.dtype.code()), self.digest as u64, 0];
        DigestKey { method: "quest", parameters }
    }

    /// Bytes of one page's `[2][d]`.
    pub(crate) fn page_bytes(&self) -> usize {
        match self.digest {
            Digest::Plain => 2 * self.shape.head_dim * self.shape.dtype.bytes(),
            Digest::Int8 => Kernels::bounds_i8_bytes(self.shape.head_dim),
        }
    }

    /// Reads the bounds of one page, `[2][d]`.
    pub(crate) fn read(&self, block: &[u8], minmax: &mut [f32]) {
        match self.digest {
            Digest::Plain => self.kernels.to_f32(self.shape.dtype, block, minmax),
            Digest::Int8 => self.kernels.decode_bounds_i8(block, minmax),
        }
    }

    fn write(&self, minmax: &mut [f32], block: &mut [u8]) {
        match self.digest {
            // Rounding to the storage type keeps order, so the rounded extremes are the extremes of the rounded keys.
            Digest::Plain => self.kernels.from_f32(self.shape.dtype, minmax, block),
            Digest::Int8 => self.kernels.encode_bounds_i8(minmax, block),
        }
    }

    /// Bytes of a block.
    pub(crate) fn digest_bytes(&self) -> usize {
        self.shape.page_rows / self.page * self.page_bytes()
    }

    /// Widens the bounds by new rows of one page of the arena.
    pub(crate) fn append(&self, append: &Append<'_>, digest: &mut [u8], scratch: &mut Scratch) {
        let minmax = &mut scratch.matrix;
        // Keys come as they are stored: the bound has to hold for keys as attention will read them.
        let d = self.shape.head_dim;
        minmax.resize(2 * d, 0.0);

        let mut row = append.first_row;
        let end = row + append.keys.len() / d;
        let mut rest = append.keys;
        while row < end {
            let page = row / self.page;
            let count = ((page + 1) * self.page).min(end) - row;
            let (keys, later) = rest.split_at(count * d);
            let block = &mut digest[page * self.page_bytes()..][..self.page_bytes()];
            if row.is_multiple_of(self.page) {
                minmax[..d].fill(f32::INFINITY);
                minmax[d..].fill(f32::NEG_INFINITY);
            } else {
                self.read(block, minmax);
            }
            self.kernels.min_max_update(keys, d, minmax);
            self.write(minmax, block);
            row += count;
            rest = later;
        }
    }

    /// Fills `scratch.group` with the rank of each of `covering`'s pages, for one KV head.
    pub(crate) fn rank(
        &self,
        context: &SelectContext<'_>,
        store: &dyn Store,
        kv_head: usize,
        covering: std::ops::Range<usize>,
        scratch: &mut Scratch,
    ) {
        let Scratch { block: gathered, scores, group, .. } = scratch;
        let (d, g, count) = (self.shape.head_dim, context.group(&self.shape), covering.len());
        let (per_block, bytes) = (self.shape.page_rows / self.page, self.page_bytes());
        scores.resize(g * count, 0.0);
        let queries = context.group_queries(&self.shape, kv_head, gathered);
        let mut at = 0;
        while at < count {
            let page = covering.start + at;
            let (block, skipped) = (page / per_block, page % per_block);
            let blocks = store.stretch(kv_head, block, covering.end.div_ceil(per_block) - block);
            let many = (blocks.len() / bytes - skipped).min(count - at);
            let blocks = &blocks[skipped * bytes..][..many * bytes];
            let (kernels, dtype, out) = (self.kernels, self.shape.dtype, &mut scores[at..]);
            match self.digest {
                Digest::Plain => kernels.page_bounds_many(dtype, queries, g, blocks, many, out, count),
                Digest::Int8 => kernels.page_bounds_i8(queries, g, blocks, many, out, count),
            }
            at += many;
        }
        group.clear();
        group.resize(count, 0.0);
        for bounds in scores.chunks_exact(count.max(1)) {
            self.kernels.softmax_add(bounds, 1.0 / (d as f32).sqrt(), group);
        }
    }

    /// The `⌊budget/page⌋` best pages of each KV head, at least one, clipped to the candidates.
    pub(crate) fn select(
        &self,
        context: &SelectContext<'_>,
        budget: Budget,
        store: &dyn Store,
        scratch: &mut Scratch,
        out: &mut Selection,
    ) {
        out.clear();
        let candidates = self.shape.candidates(context.tokens);
        let covering = pages::covering(&candidates, self.page);
        let wanted = match covering.len() {
            0 => 0,
            _ => pages::affordable(budget.rows_of(context.tokens), self.page, &candidates),
        };
        for head in context.heads.clone() {
            if wanted == covering.len() {
                // Nothing to choose where everything is wanted.
                out.push(candidates.start, candidates.end);
            } else {
                self.rank(context, store, head, covering.clone(), scratch);
                let Scratch { group, ids, top, .. } = &mut *scratch;
                let push = |first, end| out.push(first, end);
                pages::push_best(self.kernels, group, wanted, self.page, &candidates, top, ids, push);
            }
            out.finish_head();
        }
    }
}
