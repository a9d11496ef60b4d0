//! Where bytes live: the pinned arena, the files that describe it, and what is resident on a device.
//!
//! | room | what lives there |
//! |---|---|
//! | [`arena`] | extents and refcounted pages of rows |
//! | [`heap`] | regions of daemon-owned files, by offset: page tables, digests, counters |
//! | [`blocks`] | refcounted digest blocks in such regions |
//! | [`residency`] | which rows of which head lie in which slots of a device slab |

pub mod arena;
pub mod blocks;
pub mod heap;
pub mod residency;
