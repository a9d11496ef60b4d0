//! The handshake and the control messages: everything that is not on the hot path.
//!
//! Every message starts with [`MAGIC`] and [`VERSION`], so that two sides of
//! different versions can still say so; the rest is one [`ToDaemon`] or [`ToClient`].
//! `Hello` and `Welcome` say each side's [`MINOR`], and a later minor may add fields at their ends, which older ones pass over.
//!
//! ```text
//! client                                daemon
//!   Hello { limits }            ─────►
//!                               ◄─────  Welcome { session, limits } + fds: client→daemon, daemon→client
//!   maps both; Mapped           ─────►
//!                               ◄─────  Sealed            (client→daemon is sealed from here on)
//!   Register { model } (+ fd)   ─────►
//!                               ◄─────  Registered { … }  (+ fds of the slab and the board)
//!   Open, Fork, Reserve, …      ─────►
//!                               ◄─────  Memory { … } + fds, as often as needed; then the answer
//! ```

use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::device::SlabRef;
use crate::graph::GraphSpec;
use crate::layout::Limits;
use crate::wire::SequenceId;
use crate::{MAGIC, MINOR, VERSION};

pub(crate) mod failure;

pub use failure::Failure;

/// Optional abilities, as bits. The daemon answers with those that both have.
pub mod features {
    /// Answers may lie in a device slab.
    pub const SLAB: u64 = 1;
    /// Answers may point into the session's own extents.
    pub const IN_PLACE: u64 = 1 << 1;
    /// Requests may wait for a stream doorbell.
    pub const DOORBELLS: u64 = 1 << 2;
    /// Device memory can be opened by a CUDA driver's classic handles.
    pub const CUDA_HANDLES: u64 = 1 << 3;
    /// Device memory can be imported into a CUDA driver by file descriptor.
    pub const CUDA_DESCRIPTORS: u64 = 1 << 4;
    /// Sessions outlive the daemon that serves them ([`ToDaemon::Keep`](super::ToDaemon::Keep)). Since minor 1.
    pub const KEPT: u64 = 1 << 5;
    /// Completions carry the session's generation ([`Served`](crate::wire::Served)). Since minor 2.
    pub const GENERATION: u64 = 1 << 6;
    /// What every client of this version can do; those of a driver come on top.
    pub const COMMON: u64 = SLAB | IN_PLACE | DOORBELLS;
    /// Both ways to a device's memory.
    pub const CUDA: u64 = CUDA_HANDLES | CUDA_DESCRIPTORS;
}

/// What a client registers: one model.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ModelSpec {
    /// A name for logs and `status`.
    pub name: String,
    /// Fingerprint of the weights, hex; artifacts must carry the same one.
    pub fingerprint: String,
    /// The adapter on top of the weights, in whatever words; rows of different adapters are never shared.
    pub adapter: String,
    /// How keys are rotated, in whatever words; the same goes for them.
    pub rope: String,
    /// Decoder layers.
    pub layers: u32,
    /// Query heads.
    pub query_heads: u32,
    /// KV heads.
    pub kv_heads: u32,
    /// Values of one head's key; of a latent row, all of its values.
    pub head_dim: u32,
    /// 0: a row is a key and a value of `head_dim` values each. Else it is one latent of `head_dim` values, all of which
    /// are the key and the first so many of which are the value (MLA, with one KV head).
    pub latent_values: u32,
    /// Code of the storage format (`Format::code` of the kernels crate; plain types have their `Dtype::code`).
    pub dtype: u8,
    /// Rows per page; 0: the daemon chooses.
    pub page_rows: u32,
    /// First tokens that are always attended and never selected.
    pub sinks: u32,
    /// Most recent tokens, the current one included, that are always attended and never selected.
    pub window: u32,
    /// Layers `0..dense_layers` are never speculated.
    pub dense_layers: u32,
    /// Layers with sliding-window attention: their rows are kept, and never selected from.
    pub sliding_layers: Vec<u32>,
    /// Selection methods, in their string form; sequences name them by index.
    pub methods: Vec<String>,
    /// Bytes of device memory for resident rows, out of what the operator has set aside; 0: as much as the daemon
    /// gives a session by default.
    pub slab_bytes: u64,
    /// Graph mode, if the session wants it; on a GPU only.
    pub graph: Option<GraphSpec>,
    /// Bytes of the artifacts whose memfds come beside this message, one each: at most one of a kind.
    pub artifacts: Vec<u64>,
}

/// How a device gives its answers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Mode {
    /// Runs point into the session's extents; nothing is copied.
    InPlace,
    /// Rows are copied into a slab in host memory.
    Slab,
    /// Rows are copied into a slab in a device's memory, which the client opens through its own driver.
    Device,
}

/// Where a sequence's page table lies: `[layer][KV head][capacity]` page ids of 32 bits.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct TableRef {
    /// Which of the session's table files.
    pub file: u32,
    /// Offset in bytes.
    pub offset: u64,
    /// Pages that each head's part of the table can hold.
    pub capacity: u32,
}

/// A page table entry without a page.
pub const NO_PAGE: u32 = u32::MAX;

/// A page table entry whose page lies on disk: [fetched](crate::wire::Speculate::fetch) before it can be read.
pub const SPILLED: u32 = u32::MAX - 1;

/// A page table entry whose page could not be read back whole: its tokens have to be computed again.
pub const LOST: u32 = u32::MAX - 2;

/// What a page table entry says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PageWord {
    /// The page with this id.
    Page(u32),
    /// There is none: the sequence is shorter, or a method's pool has dropped it.
    None,
    /// See [`SPILLED`].
    Spilled,
    /// See [`LOST`].
    Lost,
}

impl PageWord {
    /// Reads an entry.
    #[must_use]
    pub fn of(word: u32) -> Self {
        match word {
            NO_PAGE => Self::None,
            SPILLED => Self::Spilled,
            LOST => Self::Lost,
            page => Self::Page(page),
        }
    }

    /// The page, where it can be read.
    #[must_use]
    pub fn page(self) -> Option<u32> {
        match self {
            Self::Page(page) => Some(page),
            Self::None | Self::Spilled | Self::Lost => None,
        }
    }
}

/// Who selects a sequence's rows.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub enum SelectedBy {
    /// The daemon's lane, when it is asked.
    #[default]
    Lane,
    /// The client itself, which reads its rows in place: the daemon keeps no digests of the sequence, and refuses to speculate it.
    Client,
}

/// From a client.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum ToDaemon {
    /// First message.
    Hello {
        /// Abilities of the client.
        features: u64,
        /// A name for logs and `status`.
        name: String,
        /// Ring and table sizes that it wants.
        limits: Limits,
        /// Its [`MINOR`].
        minor: u16,
    },
    /// Both memfds are mapped: seal the one that the client writes.
    Mapped,
    /// Registers the session's model, once.
    Register(ModelSpec),
    /// Opens an empty sequence.
    Open {
        /// Index of its method.
        method: u16,
        /// Tokens to make room for at once.
        tokens: u32,
        /// Who selects its rows.
        by: SelectedBy,
    },
    /// Opens a sequence that begins as a copy of another; pages are shared until one of them writes.
    Fork {
        /// The sequence to copy.
        parent: SequenceId,
        /// Another method, if not the parent's.
        method: Option<u16>,
        /// Who selects its rows.
        by: SelectedBy,
    },
    /// Makes room for rows, so that they can be written.
    Reserve {
        /// Sequences and how many tokens each is to have room for in all.
        sequences: Vec<(SequenceId, u32)>,
    },
    /// Drops every row from this token on.
    Truncate {
        /// Which sequence.
        sequence: SequenceId,
        /// Tokens that stay.
        tokens: u32,
    },
    /// Serves a sequence in graph mode from now on: its residency lies in this slot of the records, its reports come
    /// through the mailbox, and it is not speculated any more. Closing the sequence frees the slot.
    Graph {
        /// Which sequence.
        sequence: SequenceId,
        /// Which slot; one sequence has it at a time.
        slot: u32,
    },
    /// Writes a sequence to an image, which outlives the daemon, and closes it.
    Suspend {
        /// Which sequence.
        sequence: SequenceId,
        /// What the image is called.
        image: String,
        /// Whether it may take the place of another one.
        overwrite: bool,
        /// Whatever helps to tell it from others.
        label: String,
    },
    /// Opens a sequence as an image has it. The image stays.
    Resume {
        /// What the image is called.
        image: String,
        /// Index of its method, if not the one that the image was made by.
        method: Option<u16>,
        /// Who selects its rows.
        by: SelectedBy,
    },
    /// Publishes the full pages of a sequence's first tokens, for other sequences to begin with. The tokens lie in the memfd beside
    /// this message, 32 bits each.
    Publish {
        /// Which sequence.
        sequence: SequenceId,
        /// How many tokens there are.
        tokens: u32,
        /// For every user, and not only this one.
        shared: bool,
    },
    /// Opens a sequence that begins with the longest published prefix of some tokens, which lie in the memfd beside this message.
    Attach {
        /// Index of its method.
        method: u16,
        /// Who selects its rows.
        by: SelectedBy,
        /// How many tokens there are.
        tokens: u32,
    },
    /// The client has closed all device memory that it had opened: the daemon may free it at once instead of waiting
    /// for the client's process to end. Not answered.
    Goodbye,
    /// Closes sequences.
    Close {
        /// Which ones.
        sequences: Vec<SequenceId>,
    },
    /// Asks for what a [`Claim`](Self::Claim) of this session needs, where [`features::KEPT`] is agreed. Since minor 1.
    Keep,
    /// Instead of a hello: goes on with a session whose daemon has ended and has left it to this one. Since minor 1.
    Claim {
        /// Number of the session.
        session: u64,
        /// What [`ToClient::Kept`] gave.
        token: [u64; 2],
        /// Extents that the client has; it keeps them mapped.
        extents: u32,
    },
    /// Instead of a hello: leaves all sessions to the daemon that asks, which must be root's or of the same user, and ends. Since minor 1.
    Takeover,
}

/// What a block of file descriptors is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum MemoryKind {
    /// Extents of the arena, [`EXTENT_BYTES`](crate::EXTENT_BYTES) each: map for reading and writing.
    Extents,
    /// Page tables: map for reading.
    Tables,
    /// Extents like [`Self::Extents`], numbered with them, that the client can only read: published prefixes.
    Shared,
}

/// From the daemon.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum ToClient {
    /// Answer to `Hello`, with two file descriptors.
    Welcome {
        /// Abilities that both have.
        features: u64,
        /// Number of the session.
        session: u64,
        /// Changes with every start of the daemon.
        boot_id: u64,
        /// The limits as accepted.
        limits: Limits,
        /// The daemon's [`MINOR`].
        minor: u16,
    },
    /// Answer to `Mapped`.
    Sealed,
    /// Answer to `Register`; file descriptors of the slab's memory are beside it where it has any, and behind them, in
    /// graph mode, that of the mailbox.
    Registered {
        /// Name of the device.
        device: String,
        /// How it answers.
        mode: Mode,
        /// Rows per page.
        page_rows: u32,
        /// The session's slab.
        slab: SlabRef,
        /// Whether pages may leave host memory: then rows outside sinks and window are fetched before the client reads them itself.
        spills: bool,
        /// Whether they do so as soon as there is more than a share of them, and not only when memory is used up: then room is better
        /// asked for in small pieces.
        scarce: bool,
    },
    /// New memory: consecutive extents or table files, one descriptor each. Comes before the answer that uses it.
    Memory {
        /// What they are.
        kind: MemoryKind,
        /// Index of the first one.
        first: u32,
        /// Bytes of each.
        bytes: u64,
    },
    /// Answer to `Open` and `Fork`.
    Opened {
        /// Handle of the sequence.
        sequence: SequenceId,
        /// Its page table.
        table: TableRef,
        /// Tokens that it has room for.
        room: u32,
    },
    /// Answer to `Publish`.
    Published {
        /// Tokens that can be attached to now.
        tokens: u32,
        /// How many of them had been published before.
        known: u32,
    },
    /// Answer to `Resume` and `Attach`.
    Resumed {
        /// Handle of the sequence.
        sequence: SequenceId,
        /// Its page table.
        table: TableRef,
        /// Tokens that it has room for.
        room: u32,
        /// Tokens that it has.
        tokens: u32,
        /// Index of its method.
        method: u16,
    },
    /// Answer to `Reserve`: page tables in the order asked, since growing may have moved them.
    Reserved {
        /// Page table and room in tokens of each sequence.
        tables: Vec<(TableRef, u32)>,
    },
    /// Answer to `Truncate`, `Graph`, `Suspend` and `Close`.
    Done,
    /// Anything that could not be done. Unless it is [`Failure::Protocol`], the session goes on.
    Failed(Failure),
    /// Answer to `Keep`.
    Kept {
        /// Proves that a claim is its client's.
        token: [u64; 2],
        /// How long the next daemon waits for the claim, in seconds.
        seconds: u32,
    },
    /// Answer to `Claim`, with two file descriptors as in `Welcome`, and that of the slab where it has one. `Mapped` and `Sealed` follow as
    /// there, then all table files and those extents that the client lacks, then `Done`, and then, if it is `answered`, the answer to the
    /// last control message that was done.
    Claimed {
        /// That of the new daemon.
        boot_id: u64,
        /// Requests of the ring that have been done, since the session began: what the client has asked for since it asks for again.
        requests: u64,
        /// Ticket of the last speculation among them.
        tickets: u64,
        /// Control messages that have been done, since the registration.
        controls: u64,
        /// Whether an answer to the last of them follows.
        answered: bool,
        /// The session's slab, made anew.
        slab: SlabRef,
    },
    /// Answer to `Takeover`, as often as needed: file descriptors, and what they are called. The daemon has ended once its socket is closed.
    Handed {
        /// One for each descriptor.
        names: Vec<String>,
    },
}

/// A control message that cannot be read.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum ControlError {
    /// Not a Kvoyant message.
    #[error("the peer does not speak Kvoyant's protocol")]
    NotKvoyant,
    /// Another version.
    #[error("the peer speaks version {theirs} of the protocol and this side version {VERSION}")]
    OtherVersion {
        /// Version of the peer.
        theirs: u32,
    },
    /// The body does not parse.
    #[error("a control message of {bytes} bytes is malformed")]
    Malformed {
        /// Its length.
        bytes: usize,
    },
}

/// A message of either direction.
pub trait Message {
    /// Whether its sender is of a later minor, which may have added fields at its end.
    fn may_grow(&self) -> bool;
}

impl Message for ToDaemon {
    fn may_grow(&self) -> bool {
        matches!(self, Self::Hello { minor, .. } if *minor > MINOR)
    }
}

impl Message for ToClient {
    fn may_grow(&self) -> bool {
        matches!(self, Self::Welcome { minor, .. } if *minor > MINOR)
    }
}

/// The minor that this side speaks with a peer of another one: neither side says what only a later one knows.
#[must_use]
pub fn agreed(theirs: u16) -> u16 {
    theirs.min(MINOR)
}

/// Puts magic and version before a message.
#[must_use]
pub fn encode<T: Serialize>(message: &T) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(64);
    bytes.extend_from_slice(&MAGIC.to_le_bytes());
    bytes.extend_from_slice(&VERSION.to_le_bytes());
    postcard::to_extend(message, bytes)
        .unwrap_or_else(|error| unreachable!("plain data always serialises: {error}"))
}

/// Checks magic and version and parses the message. Nothing may follow it, unless it [may grow](Message::may_grow).
pub fn decode<'a, T: Deserialize<'a> + Message>(bytes: &'a [u8]) -> Result<T, ControlError> {
    let Some((header, body)) = bytes.split_at_checked(12) else {
        return Err(ControlError::NotKvoyant);
    };
    let (magic, version) = header.split_at(8);
    if magic != MAGIC.to_le_bytes() {
        return Err(ControlError::NotKvoyant);
    }
    let theirs = version.try_into().map_or(0, u32::from_le_bytes);
    if theirs != VERSION {
        return Err(ControlError::OtherVersion { theirs });
    }
    match postcard::take_from_bytes::<T>(body) {
        Ok((message, rest)) if rest.is_empty() || message.may_grow() => Ok(message),
        _ => Err(ControlError::Malformed { bytes: bytes.len() }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_message_survives_the_trip_and_nothing_may_follow_it() {
        let close = ToDaemon::Close { sequences: vec![SequenceId { slot: 3, generation: 1 }] };
        let mut bytes = encode(&close);
        assert_eq!(decode::<ToDaemon>(&bytes), Ok(close));
        bytes.push(0);
        assert!(matches!(decode::<ToDaemon>(&bytes), Err(ControlError::Malformed { .. })));
    }

    #[test]
    fn the_greetings_of_a_later_minor_are_read_as_far_as_they_are_known() {
        let limits = Limits::default();
        let hello = ToDaemon::Hello { features: 3, name: "engine".into(), limits, minor: MINOR + 1 };
        let welcome = ToClient::Welcome { features: 3, session: 1, boot_id: 2, limits, minor: MINOR + 1 };
        let [to_daemon, to_client] = [encode(&hello), encode(&welcome)].map(|mut bytes| {
            bytes.extend([7, 8, 9]);
            bytes
        });
        assert_eq!(decode::<ToDaemon>(&to_daemon), Ok(hello));
        assert_eq!(decode::<ToClient>(&to_client), Ok(welcome));
        let mut same = encode(&ToDaemon::Hello { features: 3, name: "engine".into(), limits, minor: MINOR });
        same.push(0);
        assert!(matches!(decode::<ToDaemon>(&same), Err(ControlError::Malformed { .. })));
        assert_eq!((agreed(MINOR + 1), agreed(MINOR)), (MINOR, MINOR));
    }

    #[test]
    fn a_mismatch_says_both_versions() {
        let mut bytes = encode(&ToDaemon::Mapped);
        bytes[8] = 9;
        let error = decode::<ToDaemon>(&bytes).unwrap_err();
        let said = format!("the peer speaks version 9 of the protocol and this side version {VERSION}");
        assert_eq!(error.to_string(), said);
        bytes[0] = 0;
        assert_eq!(decode::<ToDaemon>(&bytes), Err(ControlError::NotKvoyant));
        assert_eq!(decode::<ToDaemon>(b"GET /"), Err(ControlError::NotKvoyant));
    }

    proptest! {
        #[test]
        fn any_bytes_decode_to_a_message_or_an_error(mut bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = decode::<ToDaemon>(&bytes);
            let mut framed = encode(&ToDaemon::Mapped);
            framed.truncate(12);
            framed.append(&mut bytes);
            let _ = decode::<ToDaemon>(&framed);
        }
    }
}
