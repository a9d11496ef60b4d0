//! Where bytes live: the pinned arena, the files that describe it, and what is resident on a device.
//!
//! | room | what lives there |
//! |---|---|
//! | [`pool`] | extents: made ahead of time and on demand, given to sessions, taken back |
//! | [`extent`], [`pin`] | what an extent is made of, and how it is kept where it is |
//! | [`cgroup`], [`host_memory`] | how much memory may be had, and of which kind |
//! | [`budget`] | what all sessions may have together |
//! | [`arena`] | refcounted pages of rows in a session's extents |
//! | [`heap`] | regions of daemon-owned files, by offset: page tables, digests, counters |
//! | [`blocks`] | refcounted digest blocks in such regions |
//! | [`prefix`] | which published prefix a prompt begins with |
//! | [`store`] | images of sequences and prefixes that outlive the daemon, on disk or far away |
//! | [`shared`] | pages of published prefixes, which belong to no session |
//! | [`residency`] | which rows of which head lie in which slots of a device slab |
//! | [`nvme`] | pages on disk: slots, checksums, I/O by deadline |

pub mod arena;
pub mod blocks;
pub mod budget;
pub mod cgroup;
pub mod extent;
pub mod heap;
pub mod host_memory;
pub mod nvme;
pub mod pin;
pub mod pool;
pub mod prefix;
pub mod purse;
pub mod residency;
pub mod shared;
pub mod store;
