//! Memory of a block's scores: queries, their products with a group's steps, and the weights that these become.

use std::mem::MaybeUninit;

use super::lanes::LANES;
use crate::codes::DIM_MAX;
use crate::cpu::scalar::codes::query_norm;

/// Queries that share what is read, at most.
pub(super) const HEADS: usize = 4;

/// What some queries are worked on in: side by side, a step of 16 channels after the other, so that the places of all queries of a step
/// are known from one address.
#[repr(C, align(64))]
pub(super) struct Room {
    /// `[steps][HEADS][16]`, filled up with 0 where a query ends.
    queries: [[[f32; LANES]; HEADS]; DIM_MAX / LANES],
    /// So that a value that is read is not where an address looks like one that was just written, to the processor.
    _apart: [[f32; LANES]; 5],
    /// Query times step of each of two groups, just so; 0 from where the queries end, up to a whole stripe.
    products: [[[[f32; LANES]; HEADS]; DIM_MAX / LANES]; 2],
    /// `[stripes][HEADS][2·stripe]` for each, as [`Lanes::weights`](super::lanes::Lanes::weights) leaves them.
    weights: [[i8; 2 * HEADS * DIM_MAX]; 2],
}

/// Where the parts of a room are.
#[derive(Clone, Copy)]
pub(super) struct Places {
    pub(super) queries: *mut f32,
    pub(super) products: *mut f32,
    pub(super) weights: *mut i8,
}

/// From a step's values to the next one's.
pub(super) const STEP: usize = HEADS * LANES;

impl Places {
    /// From one group's products to the other's.
    pub(super) const PRODUCTS: usize = HEADS * DIM_MAX;
    /// From one group's weights to the other's.
    pub(super) const WEIGHTS: usize = 2 * HEADS * DIM_MAX;

    #[inline(always)]
    pub(super) fn new(room: &mut MaybeUninit<Room>) -> Self {
        let room = room.as_mut_ptr();
        // SAFETY: the places are within the room.
        unsafe {
            Self {
                queries: (&raw mut (*room).queries).cast(),
                products: (&raw mut (*room).products).cast(),
                weights: (&raw mut (*room).weights).cast(),
            }
        }
    }
}

/// Puts queries `[heads][d]` into the room, and zeros where nobody else writes; their norms.
///
/// # Safety
/// The places are of a room of the shape.
#[inline(always)]
pub(super) unsafe fn fill(width: usize, queries: &[f32], d: usize, room: Places) -> [f32; HEADS] {
    let mut norms = [0.0; HEADS];
    for (h, query) in queries.chunks_exact(d).enumerate() {
        norms[h] = query_norm(query);
        for (step, values) in query.chunks(LANES).enumerate() {
            // SAFETY: passed on to the caller.
            unsafe {
                let to = room.queries.add(step * STEP + h * LANES);
                to.copy_from_nonoverlapping(values.as_ptr(), values.len());
                to.add(values.len()).write_bytes(0, LANES - values.len());
            }
        }
        for step in width / LANES..(width / LANES).next_multiple_of(4) {
            for products in [room.products, room.products.wrapping_add(Places::PRODUCTS)] {
                // SAFETY: a layout has at most DIM_MAX channels, a whole number of stripes; there are products of two groups.
                unsafe { products.add(step * STEP + h * LANES).write_bytes(0, LANES) };
            }
        }
    }
    norms
}
