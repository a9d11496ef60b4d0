//! Bounds of many pages.

use super::convert::read;
use super::reduce::sum_by;
use crate::cpu::bounds::{Block, FLOOR, LANES, Query8, STRIPE, lane, read_scale};
use crate::dtype::Dtype;

#[allow(clippy::too_many_arguments)]
pub(in crate::cpu) fn page_bounds_many(
    dtype: Dtype,
    queries: &[f32],
    group: usize,
    blocks: &[u8],
    pages: usize,
    out: &mut [f32],
    out_stride: usize,
) {
    let (d, size) = (queries.len() / group, dtype.bytes());
    for (h, query) in queries.chunks_exact(d).enumerate() {
        let out = &mut out[h * out_stride..][..pages];
        for (bound, ends) in out.iter_mut().zip(blocks.chunks_exact(2 * d * size)) {
            let (min, max) = ends.split_at(d * size);
            let end = |j: usize| if query[j] >= 0.0 { max } else { min };
            *bound = sum_by(d, |j| query[j] * read(dtype, &end(j)[j * size..][..size]));
        }
    }
}

pub(in crate::cpu) fn prepare_bounds_i8(query: &[f32], d: usize, to: &mut Query8) {
    to.set(query, d);
}

pub(in crate::cpu) fn page_bounds_i8(
    block: Block,
    queries: &[Query8],
    digests: &[u8],
    pages: usize,
    out: &mut [f32],
    out_stride: usize,
) {
    let stripes = block.stripes * STRIPE;
    for (p, digest) in digests.chunks_exact(digests.len() / pages).enumerate() {
        let (head, codes) = digest[block.at..][..block.bytes()].split_at(block.head());
        let (low, high) = codes.split_at(stripes);
        for (h, query) in queries.iter().enumerate() {
            let mut sums = query.start;
            for j in 0..stripes {
                let end = if query.upper[j] == 0 { low[j] } else { high[j] };
                sums[lane(j)] += i32::from(query.codes[j]) * i32::from(end);
            }
            let mut terms = [0_f32; LANES];
            for (lane, term) in terms.iter_mut().enumerate() {
                *term = sums[lane] as f32 * (read_scale(head, block.scale_of(lane)) * query.step[lane]);
            }
            // Lanes that are half of them apart, until one is left.
            for half in [8, 4, 2, 1] {
                for lane in 0..half {
                    terms[lane] += terms[lane + half];
                }
            }
            let bound = &mut out[h * out_stride + p];
            *bound = terms[0] + if block.channel == 0 { FLOOR } else { *bound };
        }
    }
}
