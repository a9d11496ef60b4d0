//! What a Kvoyant client and the daemon say to each other, and the memory they say it in.
//!
//! | room | what lives there |
//! |---|---|
//! | [`memory`] | memfds, seals and mappings; the only place that touches memory a peer can write |
//! | [`futex`] | sleeping on a word of such memory, and waking who sleeps |
//! | [`ring`] | single-producer single-consumer rings of 64-byte descriptors |
//! | [`layout`] | where everything lies in a session's two memfds |
//! | [`wire`] | descriptors, batch tables and block tables, and their checked forms |
//! | [`device`] | memory of a GPU: how it travels, what lies where in a session's board |
//! | [`graph`] | graph mode: residency records and the mailbox of reports |
//! | [`control`] | the handshake and the control messages |
//! | [`quota`] | what one user may have of a daemon that many share |
//! | [`packet`] | `SOCK_SEQPACKET` sockets and file-descriptor passing |
//!
//! A session has two memfds, each written by one side only: *client → daemon* holds the request ring, batch
//! tables, hints and doorbells; *daemon → client* holds the completion ring, the timeline word, statistics and
//! block tables. A side's ring indices lie in the memfd that it writes, so the other maps them read-only.

pub mod control;
pub mod device;
pub mod faults;
pub mod futex;
pub mod graph;
pub mod inherited;
pub mod layout;
pub mod memory;
pub mod packet;
pub mod quota;
pub mod ring;
#[cfg(loom)]
pub mod simulated;
pub mod wire;

/// First eight bytes of every handshake message: `KVOYANT` and a zero.
pub const MAGIC: u64 = u64::from_le_bytes(*b"KVOYANT\0");

/// Version of everything in this crate. Both sides must have the same one.
pub const VERSION: u32 = 6;

/// How often something was added within this [`VERSION`]: the two sides speak the smaller of their minors ([`control::agreed`]).
pub const MINOR: u16 = 2;

/// Bytes of one extent of the arena: a memfd of its own.
pub const EXTENT_BYTES: usize = 64 << 20;
