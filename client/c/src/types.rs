//! The structs and codes of the header. Structs that begin with `size` grow at their ends; no other one changes.
#![allow(non_camel_case_types, reason = "they are named as in C")]
#![allow(missing_debug_implementations, reason = "they hold addresses of the caller's memory")]

use std::ffi::{c_char, c_void};

/// Number of this interface. It is part of the shared library's name and of its symbols' version; a program works with every library of
/// its number that is not older than its header.
pub const KVOYANT_ABI: u32 = 0;

/// In `kvoyant_sequence_fork` and `kvoyant_resume`: the method that it has already.
pub const KVOYANT_SAME_METHOD: u32 = u32::MAX;

/// In `kvoyant_sequence_info`: no token.
pub const KVOYANT_NO_TOKEN: u64 = u64::MAX;

/// How a call ended. `kvoyant_last_error` has the sentence.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum kvoyant_status {
    /// It was done.
    Ok = 0,
    /// A null pointer, an unknown code, an index, or a text that is no UTF-8.
    Argument = 1,
    /// An array of another shape or length, or too little room for an answer.
    Shape = 2,
    /// An array of another type.
    Dtype = 3,
    /// A handle that was closed, or never was one.
    Handle = 4,
    /// A handle of the parent process, used in a child after fork(2).
    Forked = 5,
    /// A sequence that another thread is changing, or using while it was to be changed.
    Concurrent = 6,
    /// Nobody listens at the socket, or it may not be used.
    Connect = 7,
    /// The daemon speaks another version of the protocol.
    Version = 8,
    /// The daemon refused, for a reason that has no code of its own.
    Refused = 9,
    /// The daemon does not serve this user.
    NotAllowed = 10,
    /// Memory, tables, sequences or sessions are used up.
    Backpressure = 11,
    /// A quota of this user is reached.
    Quota = 12,
    /// The daemon has gone. The session's own rows can still be read.
    Gone = 13,
    /// The answer did not come in time; it was given up.
    Deadline = 14,
    /// The request was answered without rows.
    NotReady = 15,
    /// As many answers are held or under way as the session's `ring_slots`.
    Busy = 16,
    /// Positions that the sequence has no room for.
    NoRoom = 17,
    /// Rows that lie on disk: ask for their layer's pages first (`KVOYANT_ASK_PAGES`).
    Spilled = 18,
    /// Rows that are lost: truncate the sequence there, and compute them again.
    Lost = 19,
    /// A GPU that is missing or failed.
    Device = 20,
    /// An image that cannot be written or read.
    Image = 21,
    /// The daemon broke the protocol.
    Protocol = 22,
    /// The operating system refused something.
    System = 23,
    /// This library failed inside: a defect.
    Internal = 24,
}

/// Types of values. Rows are stored in one of them; keys, values, queries and statistics come as the first three.
#[repr(u32)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum kvoyant_dtype {
    /// 32-bit floating point.
    F32 = 0,
    /// 16-bit floating point, IEEE 754.
    F16 = 1,
    /// 16-bit floating point, the upper half of a `F32`.
    Bf16 = 2,
    /// 8-bit floating point, e4m3.
    Fp8 = 3,
    /// 8-bit integers with one scale per row.
    Int8 = 4,
    /// 4-bit integers with a scale and a zero for each 32 values.
    Int4Of32 = 5,
    /// 4-bit integers with a scale and a zero for each 64 values.
    Int4Of64 = 6,
}

/// How the daemon's device answers.
#[repr(u32)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum kvoyant_mode {
    /// Runs point into the session's own memory; nothing is copied.
    InPlace = 0,
    /// Rows are copied into a slab in host memory.
    Slab = 1,
    /// Rows are copied into a GPU's memory: runs have addresses of that device.
    Device = 2,
}

/// What is asked for.
#[repr(u32)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum kvoyant_ask {
    /// The rows of a layer to attend to.
    Rows = 0,
    /// An estimate of those that the layer's last answer left out.
    Rest = 1,
    /// That all pages of a layer are in host memory until the answer is released.
    Pages = 2,
}

/// A session with its model. All zero: none.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct kvoyant_model {
    /// What the library knows it by.
    pub id: u64,
}

/// An open sequence. All zero: none.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct kvoyant_sequence {
    /// What the library knows it by.
    pub id: u64,
}

/// A request under way. All zero: none.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct kvoyant_pending {
    /// What the library knows it by.
    pub id: u64,
}

/// An answer. All zero: none.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct kvoyant_ready {
    /// What the library knows it by.
    pub id: u64,
}

/// An array of the caller's: contiguous, the last dimension fastest.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct kvoyant_tensor {
    /// The values, aligned as their type wants. Null, with `dims` 0: there is no array.
    pub data: *const c_void,
    /// A `kvoyant_dtype`.
    pub dtype: u32,
    /// Dimensions, 0 to 4.
    pub dims: u32,
    /// Length of each dimension, in values.
    pub shape: [u64; 4],
}

/// Bytes of the caller's.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct kvoyant_bytes {
    /// The first one.
    pub data: *const c_void,
    /// How many.
    pub bytes: usize,
}

/// How to connect. A field that is 0 or null has its default, so that `{ .size = sizeof(kvoyant_options) }` is a good one.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct kvoyant_options {
    /// `sizeof(kvoyant_options)`.
    pub size: usize,
    /// Name for the daemon's logs and status. Default: the program's.
    pub name: *const c_char,
    /// Slots of the request ring, and so answers held or under way at once: a power of two in 2..=256. Default: 16.
    pub ring_slots: u32,
    /// Most members of a request, 1..=4096. Default: 64.
    pub batch_max: u32,
    /// Most bytes of a request's queries. Default: 1 MiB.
    pub hint_bytes: u32,
    /// Most bytes of an answer's block table. Default: 1 MiB.
    pub table_bytes: u32,
    /// Most sequences open at once, 1..=65536. Default: 1024.
    pub sequences_max: u32,
    /// 0.
    pub reserved: u32,
    /// How long a wait polls before it sleeps, in µs. Default: 200 with 8 cores or more, else 10.
    pub spin_us: u64,
    /// How long a request waits for answers to be released when all are in use, in ms. Default: 1000.
    pub ticket_timeout_ms: u64,
    /// How long to wait for answers to all other calls, in ms. Default: 30000.
    pub control_timeout_ms: u64,
}

/// A model, as it is registered. Texts that are null are empty.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct kvoyant_spec {
    /// `sizeof(kvoyant_spec)`.
    pub size: usize,
    /// A name for logs and status.
    pub name: *const c_char,
    /// Fingerprint of the weights, 32 hexadecimal digits. Prefixes and images are only shared between equal ones.
    pub fingerprint: *const c_char,
    /// The adapter on top of the weights, in whatever words.
    pub adapter: *const c_char,
    /// How keys are rotated, in whatever words.
    pub rope: *const c_char,
    /// Decoder layers.
    pub layers: u32,
    /// Query heads.
    pub query_heads: u32,
    /// KV heads.
    pub kv_heads: u32,
    /// Values of one head's key; of a latent row, all of its values.
    pub head_dim: u32,
    /// 0: a row is a key and a value of `head_dim` values each. Else it is one latent of `head_dim` values, all of which are the key and
    /// the first so many of which are the value (MLA, with one KV head).
    pub latent_values: u32,
    /// A `kvoyant_dtype`: how rows are stored.
    pub dtype: u32,
    /// Rows (tokens) of a page; 0: the daemon chooses.
    pub page_rows: u32,
    /// First tokens that the engine always attends to, and that are never selected.
    pub sinks: u32,
    /// Most recent tokens, the current one included, that the engine always attends to, and that are never selected.
    pub window: u32,
    /// Layers `0..dense_layers` are never asked for: the engine attends to all of their rows.
    pub dense_layers: u32,
    /// Layers with sliding-window attention: their rows are kept, and never selected from.
    pub sliding_layers: *const u32,
    /// How many.
    pub sliding_layers_count: usize,
    /// Selection methods in text form, such as `kvoyant` or `quest:budget=6%`. Sequences name them by index.
    pub methods: *const *const c_char,
    /// How many, at least 1.
    pub methods_count: usize,
    /// Bytes of device memory for resident rows; 0: what the daemon gives a session.
    pub slab_bytes: u64,
    /// What the methods were calibrated to, as safetensors files, at most one of each kind.
    pub artifacts: *const kvoyant_bytes,
    /// How many.
    pub artifacts_count: usize,
}

/// What was registered, and by whom it is served.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct kvoyant_model_info {
    /// `sizeof(kvoyant_model_info)`.
    pub size: usize,
    /// Number of the session, as in `kvoyant status`.
    pub session: u64,
    /// Name of the daemon's device. It stays until the model is closed.
    pub device: *const c_char,
    /// A `kvoyant_mode`.
    pub mode: u32,
    /// A `kvoyant_dtype`: how rows are stored.
    pub dtype: u32,
    /// Decoder layers.
    pub layers: u32,
    /// Query heads.
    pub query_heads: u32,
    /// KV heads.
    pub kv_heads: u32,
    /// Values of a key, and so of a query.
    pub key_values: u32,
    /// Values of a value, and so of an attention output.
    pub value_values: u32,
    /// Rows (tokens) of a page.
    pub page_rows: u32,
    /// Bytes of a row.
    pub row_bytes: u64,
    /// Where in a row the value begins, in bytes; the key begins at 0. Of a latent it is 0.
    pub value_offset: u64,
    /// 1 where pages may leave host memory: then rows that no answer names are there after `KVOYANT_ASK_PAGES` alone.
    pub spills: u32,
    /// 1 where only a share of the session's pages may be in host memory.
    pub scarce: u32,
    /// Version of the protocol that is spoken.
    pub protocol: u32,
    /// Its minor: the smaller one of both sides.
    pub protocol_minor: u32,
}

/// A sequence, as it stands.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct kvoyant_sequence_info {
    /// `sizeof(kvoyant_sequence_info)`.
    pub size: usize,
    /// Tokens appended so far.
    pub tokens: u64,
    /// Tokens that it has room for.
    pub room: u64,
    /// The first token of which some layer's rows are lost, or `KVOYANT_NO_TOKEN`: truncate there, and compute them again.
    pub first_lost: u64,
}

/// Rows of one KV head that follow one another, in memory and in the sequence.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct kvoyant_run {
    /// The first row; each is `row_bytes` long. With `KVOYANT_MODE_DEVICE` an address of the device.
    pub rows: *const c_void,
    /// Position of the first row's token.
    pub token: u64,
    /// How many rows (tokens).
    pub count: u32,
    /// 1 if they lie in the device's slab; 0: in the session's own memory.
    pub in_slab: u32,
}

/// The block table of an answer, which stays until the answer is released.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct kvoyant_table {
    /// `sizeof(kvoyant_table)`.
    pub size: usize,
    /// Runs of all heads, by token within each.
    pub runs: *const kvoyant_run,
    /// How many.
    pub runs_count: usize,
    /// `[members][KV heads]` and one more: where in `runs` each head's begin. Those of member m and KV head h are
    /// `offsets[m * kv_heads + h] .. offsets[m * kv_heads + h + 1]`.
    pub offsets: *const usize,
    /// Members of the batch.
    pub members: u32,
    /// KV heads.
    pub kv_heads: u32,
    /// Bytes of a row.
    pub row_bytes: u64,
}

/// What the daemon says of an answer.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct kvoyant_answer {
    /// `sizeof(kvoyant_answer)`.
    pub size: usize,
    /// Number of the request.
    pub ticket: u64,
    /// The layer.
    pub layer: u32,
    /// Members of the batch.
    pub members: u32,
    /// Rows selected, all members and KV heads together.
    pub rows_selected: u32,
    /// Of these, on the device already.
    pub rows_hit: u32,
    /// Of these, read in the session's own memory.
    pub rows_in_place: u32,
    /// Rows that the members' heads keep on the device in this layer.
    pub rows_resident: u32,
    /// Bytes copied for it.
    pub bytes_moved: u64,
    /// From its arrival until its selection began, in ns.
    pub queue_ns: u64,
    /// Selection and planning, in ns.
    pub select_ns: u64,
    /// From the plan until the last byte had arrived, in ns.
    pub transfer_ns: u64,
    /// Which start of the daemon answered.
    pub boot_id: u64,
    /// How many daemons had served the session before that one: where it differs from an earlier answer's, the daemon was restarted or
    /// replaced in between, and the session went on.
    pub generation: u64,
}

/// What the daemon's CPU has attended for a member: the softmax over those rows alone, which are in no run. Merge it by `lse`.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct kvoyant_partial {
    /// `sizeof(kvoyant_partial)`.
    pub size: usize,
    /// Rows, all KV heads together. 0: there is none, and nothing to merge.
    pub rows: u64,
    /// `[query heads][value_values]`. It stays until the answer is released.
    pub out: *const f32,
    /// `[query heads]`: logarithm of the sum of the exponentials of the scaled scores; -inf where no row was attended.
    pub lse: *const f32,
}

/// What one query head left out, relative to `exp(max)`.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct kvoyant_rest {
    /// What weights are relative to; -inf where nothing was left out.
    pub max: f32,
    /// Sum of the estimated weights: with it the mean is to be merged; 0: nothing is.
    pub weight: f32,
    /// At least the sum of the true weights; +inf where it is not known.
    pub upper: f32,
    /// At most that sum.
    pub lower: f32,
    /// At least the sum of what weights may have changed, times the norms of their means.
    pub scatter: f32,
    /// At least the sum of true weights times the distances of values from their means.
    pub spread: f32,
    /// Rows (tokens) left out.
    pub rows: u32,
    /// 0.
    pub reserved: u32,
}

/// One member of a batch.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct kvoyant_member {
    /// Its sequence.
    pub sequence: kvoyant_sequence,
    /// Position of the token that is being computed: so many rows precede it. Of a block, that of its first token.
    pub position: u64,
    /// What its method selects by: queries of the layer after RoPE, not scaled, all finite. F32 `[query heads, key_values]`, of a block
    /// `[queries, query heads, key_values]`. No array where the method wants none.
    pub query: kvoyant_tensor,
    /// What the queries give to rows that are attended anyway: log-sum-exps of their scaled scores. F32 `[query heads]`, of a block
    /// `[queries, query heads]`; of all members or of none.
    pub floors: kvoyant_tensor,
    /// Instead of a query, tokens that the caller chose: for each KV head how many, then so many. Null: none.
    pub ids: *const u32,
    /// Words of `ids`.
    pub ids_count: usize,
}

/// One request, for one layer of a whole batch. Members join and leave from one to the next.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct kvoyant_request {
    /// `sizeof(kvoyant_request)`.
    pub size: usize,
    /// A `kvoyant_ask`.
    pub ask: u32,
    /// The layer.
    pub layer: u32,
    /// The batch.
    pub members: *const kvoyant_member,
    /// How many, 1 to the session's `batch_max`.
    pub members_count: usize,
    /// Query tokens of each member, up to 65536; 0 means 1. For rows only.
    pub queries: u32,
    /// 0.
    pub reserved: u32,
    /// In how many ns the rows are wanted: methods that leave late rows out go by it. 0: whenever they are ready. Not of a block.
    pub within_ns: u64,
}
