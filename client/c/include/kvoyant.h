// Kvoyant: the KV cache of long contexts, kept by a daemon. Interface for C and C++.
//
// Generated from client/c/src by cbindgen (cargo test -p kvoyant-c says when it is old); do not edit. docs/c.md is the tutorial.
//
// Every function returns a kvoyant_status; kvoyant_last_error() has the sentence, of this thread's last call that failed.
//
// Handles are numbers in structs, passed by value. One that was closed, never opened, or belongs to the parent of this process is an error.
// All functions may be called from several threads at once. On one sequence, calls that append, truncate, fork, suspend or close want
// it for themselves: where two threads meet, one is told CONCURRENT, and nothing has happened.
//
// Structs that begin with `size` grow in later versions: set it to sizeof the struct, and leave what you do not need 0. What calls take is
// read before they return. Text is UTF-8. Shapes are written [outer, ..., inner], the last dimension fastest; counts are in values, tokens or
// rows as named, sizes in bytes, times in ns unless a name says otherwise.
//
// The attention over an answer's rows, the sinks and the window is the caller's; rows are at the addresses of runs, row_bytes apart.


#ifndef KVOYANT_H
#define KVOYANT_H

#include <stddef.h>
#include <stdint.h>

// Number of this interface. It is part of the shared library's name and of its symbols' version; a program works with every library of
// its number that is not older than its header.
#define KVOYANT_ABI 0

// In `kvoyant_sequence_fork` and `kvoyant_resume`: the method that it has already.
#define KVOYANT_SAME_METHOD UINT32_MAX

// In `kvoyant_sequence_info`: no token.
#define KVOYANT_NO_TOKEN UINT64_MAX

// What is asked for.
enum kvoyant_ask
#ifdef __cplusplus
  : uint32_t
#endif // __cplusplus
 {
    // The rows of a layer to attend to.
    KVOYANT_ASK_ROWS = 0,
    // An estimate of those that the layer's last answer left out.
    KVOYANT_ASK_REST = 1,
    // That all pages of a layer are in host memory until the answer is released.
    KVOYANT_ASK_PAGES = 2,
};
#ifndef __cplusplus
typedef uint32_t kvoyant_ask;
#endif // __cplusplus

// Counters of a session, since it began.
enum kvoyant_counter
#ifdef __cplusplus
  : uint32_t
#endif // __cplusplus
 {
    // Requests for rows that were answered.
    KVOYANT_COUNTER_SPECULATIONS = 0,
    // Rows selected.
    KVOYANT_COUNTER_ROWS_SELECTED = 1,
    // Of these, found on the device.
    KVOYANT_COUNTER_ROWS_HIT = 2,
    // Of these, read in place.
    KVOYANT_COUNTER_ROWS_IN_PLACE = 3,
    // Bytes copied.
    KVOYANT_COUNTER_BYTES_MOVED = 4,
    // Time in selection and planning, ns.
    KVOYANT_COUNTER_SELECT_NS = 5,
    // Time from plan to the last byte, ns.
    KVOYANT_COUNTER_TRANSFER_NS = 6,
    // Rows appended, all layers and heads together.
    KVOYANT_COUNTER_ROWS_APPENDED = 7,
    // Rows attended by the daemon's CPU.
    KVOYANT_COUNTER_CPU_ROWS = 8,
    // Rows brought to the device ahead of any request.
    KVOYANT_COUNTER_PREFETCHED_ROWS = 9,
    // Bytes copied for them.
    KVOYANT_COUNTER_PREFETCH_BYTES = 10,
    // Rows that answers left out and estimated, all query heads together.
    KVOYANT_COUNTER_ESTIMATED_ROWS = 11,
    // Rows left out because they would have come after their deadline.
    KVOYANT_COUNTER_LATE_ROWS = 12,
    // Pages written to disk.
    KVOYANT_COUNTER_PAGES_WRITTEN = 13,
    // Pages read back from disk.
    KVOYANT_COUNTER_PAGES_READ = 14,
    // Pages that could not be read back whole.
    KVOYANT_COUNTER_PAGES_LOST = 15,
    // Time that answers waited for pages from disk, ns.
    KVOYANT_COUNTER_PAGE_WAIT_NS = 16,
    // Pages on disk alone, now.
    KVOYANT_COUNTER_PAGES_SPILLED = 17,
};
#ifndef __cplusplus
typedef uint32_t kvoyant_counter;
#endif // __cplusplus

// Types of values. Rows are stored in one of them; keys, values, queries and statistics come as the first three.
enum kvoyant_dtype
#ifdef __cplusplus
  : uint32_t
#endif // __cplusplus
 {
    // 32-bit floating point.
    KVOYANT_DTYPE_F32 = 0,
    // 16-bit floating point, IEEE 754.
    KVOYANT_DTYPE_F16 = 1,
    // 16-bit floating point, the upper half of a `F32`.
    KVOYANT_DTYPE_BF16 = 2,
    // 8-bit floating point, e4m3.
    KVOYANT_DTYPE_FP8 = 3,
    // 8-bit integers with one scale per row.
    KVOYANT_DTYPE_INT8 = 4,
    // 4-bit integers with a scale and a zero for each 32 values.
    KVOYANT_DTYPE_INT4_OF32 = 5,
    // 4-bit integers with a scale and a zero for each 64 values.
    KVOYANT_DTYPE_INT4_OF64 = 6,
};
#ifndef __cplusplus
typedef uint32_t kvoyant_dtype;
#endif // __cplusplus

// How the daemon's device answers.
enum kvoyant_mode
#ifdef __cplusplus
  : uint32_t
#endif // __cplusplus
 {
    // Runs point into the session's own memory; nothing is copied.
    KVOYANT_MODE_IN_PLACE = 0,
    // Rows are copied into a slab in host memory.
    KVOYANT_MODE_SLAB = 1,
    // Rows are copied into a GPU's memory: runs have addresses of that device.
    KVOYANT_MODE_DEVICE = 2,
};
#ifndef __cplusplus
typedef uint32_t kvoyant_mode;
#endif // __cplusplus

// How a call ended. `kvoyant_last_error` has the sentence.
typedef enum kvoyant_status {
    // It was done.
    KVOYANT_STATUS_OK = 0,
    // A null pointer, an unknown code, an index, or a text that is no UTF-8.
    KVOYANT_STATUS_ARGUMENT = 1,
    // An array of another shape or length, or too little room for an answer.
    KVOYANT_STATUS_SHAPE = 2,
    // An array of another type.
    KVOYANT_STATUS_DTYPE = 3,
    // A handle that was closed, or never was one.
    KVOYANT_STATUS_HANDLE = 4,
    // A handle of the parent process, used in a child after fork(2).
    KVOYANT_STATUS_FORKED = 5,
    // A sequence that another thread is changing, or using while it was to be changed.
    KVOYANT_STATUS_CONCURRENT = 6,
    // Nobody listens at the socket, or it may not be used.
    KVOYANT_STATUS_CONNECT = 7,
    // The daemon speaks another version of the protocol.
    KVOYANT_STATUS_VERSION = 8,
    // The daemon refused, for a reason that has no code of its own.
    KVOYANT_STATUS_REFUSED = 9,
    // The daemon does not serve this user.
    KVOYANT_STATUS_NOT_ALLOWED = 10,
    // Memory, tables, sequences or sessions are used up.
    KVOYANT_STATUS_BACKPRESSURE = 11,
    // A quota of this user is reached.
    KVOYANT_STATUS_QUOTA = 12,
    // The daemon has gone. The session's own rows can still be read.
    KVOYANT_STATUS_GONE = 13,
    // The answer did not come in time; it was given up.
    KVOYANT_STATUS_DEADLINE = 14,
    // The request was answered without rows.
    KVOYANT_STATUS_NOT_READY = 15,
    // As many answers are held or under way as the session's `ring_slots`.
    KVOYANT_STATUS_BUSY = 16,
    // Positions that the sequence has no room for.
    KVOYANT_STATUS_NO_ROOM = 17,
    // Rows that lie on disk: ask for their layer's pages first (`KVOYANT_ASK_PAGES`).
    KVOYANT_STATUS_SPILLED = 18,
    // Rows that are lost: truncate the sequence there, and compute them again.
    KVOYANT_STATUS_LOST = 19,
    // A GPU that is missing or failed.
    KVOYANT_STATUS_DEVICE = 20,
    // An image that cannot be written or read.
    KVOYANT_STATUS_IMAGE = 21,
    // The daemon broke the protocol.
    KVOYANT_STATUS_PROTOCOL = 22,
    // The operating system refused something.
    KVOYANT_STATUS_SYSTEM = 23,
    // This library failed inside: a defect.
    KVOYANT_STATUS_INTERNAL = 24,
} kvoyant_status;

// How to connect. A field that is 0 or null has its default, so that `{ .size = sizeof(kvoyant_options) }` is a good one.
typedef struct kvoyant_options {
    // `sizeof(kvoyant_options)`.
    size_t size;
    // Name for the daemon's logs and status. Default: the program's.
    const char *name;
    // Slots of the request ring, and so answers held or under way at once: a power of two in 2..=256. Default: 16.
    uint32_t ring_slots;
    // Most members of a request, 1..=4096. Default: 64.
    uint32_t batch_max;
    // Most bytes of a request's queries. Default: 1 MiB.
    uint32_t hint_bytes;
    // Most bytes of an answer's block table. Default: 1 MiB.
    uint32_t table_bytes;
    // Most sequences open at once, 1..=65536. Default: 1024.
    uint32_t sequences_max;
    // 0.
    uint32_t reserved;
    // How long a wait polls before it sleeps, in µs. Default: 200 with 8 cores or more, else 10.
    uint64_t spin_us;
    // How long a request waits for answers to be released when all are in use, in ms. Default: 1000.
    uint64_t ticket_timeout_ms;
    // How long to wait for answers to all other calls, in ms. Default: 30000.
    uint64_t control_timeout_ms;
} kvoyant_options;

// Bytes of the caller's.
typedef struct kvoyant_bytes {
    // The first one.
    const void *data;
    // How many.
    size_t bytes;
} kvoyant_bytes;

// A model, as it is registered. Texts that are null are empty.
typedef struct kvoyant_spec {
    // `sizeof(kvoyant_spec)`.
    size_t size;
    // A name for logs and status.
    const char *name;
    // Fingerprint of the weights, 32 hexadecimal digits. Prefixes and images are only shared between equal ones.
    const char *fingerprint;
    // The adapter on top of the weights, in whatever words.
    const char *adapter;
    // How keys are rotated, in whatever words.
    const char *rope;
    // Decoder layers.
    uint32_t layers;
    // Query heads.
    uint32_t query_heads;
    // KV heads.
    uint32_t kv_heads;
    // Values of one head's key; of a latent row, all of its values.
    uint32_t head_dim;
    // 0: a row is a key and a value of `head_dim` values each. Else it is one latent of `head_dim` values, all of which are the key and
    // the first so many of which are the value (MLA, with one KV head).
    uint32_t latent_values;
    // A `kvoyant_dtype`: how rows are stored.
    uint32_t dtype;
    // Rows (tokens) of a page; 0: the daemon chooses.
    uint32_t page_rows;
    // First tokens that the engine always attends to, and that are never selected.
    uint32_t sinks;
    // Most recent tokens, the current one included, that the engine always attends to, and that are never selected.
    uint32_t window;
    // Layers `0..dense_layers` are never asked for: the engine attends to all of their rows.
    uint32_t dense_layers;
    // Layers with sliding-window attention: their rows are kept, and never selected from.
    const uint32_t *sliding_layers;
    // How many.
    size_t sliding_layers_count;
    // Selection methods in text form, such as `kvoyant` or `quest:budget=6%`. Sequences name them by index.
    const char *const *methods;
    // How many, at least 1.
    size_t methods_count;
    // Bytes of device memory for resident rows; 0: what the daemon gives a session.
    uint64_t slab_bytes;
    // What the methods were calibrated to, as safetensors files, at most one of each kind.
    const struct kvoyant_bytes *artifacts;
    // How many.
    size_t artifacts_count;
} kvoyant_spec;

// A session with its model. All zero: none.
typedef struct kvoyant_model {
    // What the library knows it by.
    uint64_t id;
} kvoyant_model;

// What was registered, and by whom it is served.
typedef struct kvoyant_model_info {
    // `sizeof(kvoyant_model_info)`.
    size_t size;
    // Number of the session, as in `kvoyant status`.
    uint64_t session;
    // Name of the daemon's device. It stays until the model is closed.
    const char *device;
    // A `kvoyant_mode`.
    uint32_t mode;
    // A `kvoyant_dtype`: how rows are stored.
    uint32_t dtype;
    // Decoder layers.
    uint32_t layers;
    // Query heads.
    uint32_t query_heads;
    // KV heads.
    uint32_t kv_heads;
    // Values of a key, and so of a query.
    uint32_t key_values;
    // Values of a value, and so of an attention output.
    uint32_t value_values;
    // Rows (tokens) of a page.
    uint32_t page_rows;
    // Bytes of a row.
    uint64_t row_bytes;
    // Where in a row the value begins, in bytes; the key begins at 0. Of a latent it is 0.
    uint64_t value_offset;
    // 1 where pages may leave host memory: then rows that no answer names are there after `KVOYANT_ASK_PAGES` alone.
    uint32_t spills;
    // 1 where only a share of the session's pages may be in host memory.
    uint32_t scarce;
    // Version of the protocol that is spoken.
    uint32_t protocol;
    // Its minor: the smaller one of both sides.
    uint32_t protocol_minor;
} kvoyant_model_info;

// An open sequence. All zero: none.
typedef struct kvoyant_sequence {
    // What the library knows it by.
    uint64_t id;
} kvoyant_sequence;

// A sequence, as it stands.
typedef struct kvoyant_sequence_info {
    // `sizeof(kvoyant_sequence_info)`.
    size_t size;
    // Tokens appended so far.
    uint64_t tokens;
    // Tokens that it has room for.
    uint64_t room;
    // The first token of which some layer's rows are lost, or `KVOYANT_NO_TOKEN`: truncate there, and compute them again.
    uint64_t first_lost;
} kvoyant_sequence_info;

// An array of the caller's: contiguous, the last dimension fastest.
typedef struct kvoyant_tensor {
    // The values, aligned as their type wants. Null, with `dims` 0: there is no array.
    const void *data;
    // A `kvoyant_dtype`.
    uint32_t dtype;
    // Dimensions, 0 to 4.
    uint32_t dims;
    // Length of each dimension, in values.
    uint64_t shape[4];
} kvoyant_tensor;

// Rows of one KV head that follow one another, in memory and in the sequence.
typedef struct kvoyant_run {
    // The first row; each is `row_bytes` long. With `KVOYANT_MODE_DEVICE` an address of the device.
    const void *rows;
    // Position of the first row's token.
    uint64_t token;
    // How many rows (tokens).
    uint32_t count;
    // 1 if they lie in the device's slab; 0: in the session's own memory.
    uint32_t in_slab;
} kvoyant_run;

// One member of a batch.
typedef struct kvoyant_member {
    // Its sequence.
    struct kvoyant_sequence sequence;
    // Position of the token that is being computed: so many rows precede it. Of a block, that of its first token.
    uint64_t position;
    // What its method selects by: queries of the layer after RoPE, not scaled, all finite. F32 `[query heads, key_values]`, of a block
    // `[queries, query heads, key_values]`. No array where the method wants none.
    struct kvoyant_tensor query;
    // What the queries give to rows that are attended anyway: log-sum-exps of their scaled scores. F32 `[query heads]`, of a block
    // `[queries, query heads]`; of all members or of none.
    struct kvoyant_tensor floors;
    // Instead of a query, tokens that the caller chose: for each KV head how many, then so many. Null: none.
    const uint32_t *ids;
    // Words of `ids`.
    size_t ids_count;
} kvoyant_member;

// One request, for one layer of a whole batch. Members join and leave from one to the next.
typedef struct kvoyant_request {
    // `sizeof(kvoyant_request)`.
    size_t size;
    // A `kvoyant_ask`.
    uint32_t ask;
    // The layer.
    uint32_t layer;
    // The batch.
    const struct kvoyant_member *members;
    // How many, 1 to the session's `batch_max`.
    size_t members_count;
    // Query tokens of each member, up to 65536; 0 means 1. For rows only.
    uint32_t queries;
    // 0.
    uint32_t reserved;
    // In how many ns the rows are wanted: methods that leave late rows out go by it. 0: whenever they are ready. Not of a block.
    uint64_t within_ns;
} kvoyant_request;

// A request under way. All zero: none.
typedef struct kvoyant_pending {
    // What the library knows it by.
    uint64_t id;
} kvoyant_pending;

// An answer. All zero: none.
typedef struct kvoyant_ready {
    // What the library knows it by.
    uint64_t id;
} kvoyant_ready;

// The block table of an answer, which stays until the answer is released.
typedef struct kvoyant_table {
    // `sizeof(kvoyant_table)`.
    size_t size;
    // Runs of all heads, by token within each.
    const struct kvoyant_run *runs;
    // How many.
    size_t runs_count;
    // `[members][KV heads]` and one more: where in `runs` each head's begin. Those of member m and KV head h are
    // `offsets[m * kv_heads + h] .. offsets[m * kv_heads + h + 1]`.
    const size_t *offsets;
    // Members of the batch.
    uint32_t members;
    // KV heads.
    uint32_t kv_heads;
    // Bytes of a row.
    uint64_t row_bytes;
} kvoyant_table;

// What the daemon says of an answer.
typedef struct kvoyant_answer {
    // `sizeof(kvoyant_answer)`.
    size_t size;
    // Number of the request.
    uint64_t ticket;
    // The layer.
    uint32_t layer;
    // Members of the batch.
    uint32_t members;
    // Rows selected, all members and KV heads together.
    uint32_t rows_selected;
    // Of these, on the device already.
    uint32_t rows_hit;
    // Of these, read in the session's own memory.
    uint32_t rows_in_place;
    // Rows that the members' heads keep on the device in this layer.
    uint32_t rows_resident;
    // Bytes copied for it.
    uint64_t bytes_moved;
    // From its arrival until its selection began, in ns.
    uint64_t queue_ns;
    // Selection and planning, in ns.
    uint64_t select_ns;
    // From the plan until the last byte had arrived, in ns.
    uint64_t transfer_ns;
    // Which start of the daemon answered.
    uint64_t boot_id;
    // How many daemons had served the session before that one: where it differs from an earlier answer's, the daemon was restarted or
    // replaced in between, and the session went on.
    uint64_t generation;
} kvoyant_answer;

// What the daemon's CPU has attended for a member: the softmax over those rows alone, which are in no run. Merge it by `lse`.
typedef struct kvoyant_partial {
    // `sizeof(kvoyant_partial)`.
    size_t size;
    // Rows, all KV heads together. 0: there is none, and nothing to merge.
    uint64_t rows;
    // `[query heads][value_values]`. It stays until the answer is released.
    const float *out;
    // `[query heads]`: logarithm of the sum of the exponentials of the scaled scores; -inf where no row was attended.
    const float *lse;
} kvoyant_partial;

// What one query head left out, relative to `exp(max)`.
typedef struct kvoyant_rest {
    // What weights are relative to; -inf where nothing was left out.
    float max;
    // Sum of the estimated weights: with it the mean is to be merged; 0: nothing is.
    float weight;
    // At least the sum of the true weights; +inf where it is not known.
    float upper;
    // At most that sum.
    float lower;
    // At least the sum of what weights may have changed, times the norms of their means.
    float scatter;
    // At least the sum of true weights times the distances of values from their means.
    float spread;
    // Rows (tokens) left out.
    uint32_t rows;
    // 0.
    uint32_t reserved;
} kvoyant_rest;

#ifdef __cplusplus
extern "C" {
#endif // __cplusplus

// The sentence of the last call of this thread that failed, in UTF-8; empty if none has. It stays until this thread's next call that
// fails. Never null.
const char *kvoyant_last_error(void);

// A code's name, such as `KVOYANT_STATUS_SHAPE`. Never null.
const char *kvoyant_status_name(uint32_t status);

// Connects to a daemon and registers a model: one session. Several threads may use it at once.
//
// `socket` is the daemon's control socket, such as `/run/kvoyant/kvoyantd.sock`; `options` may be null. `model` is all zero unless this
// succeeds. What is pointed to is copied.
//
// Errors: `CONNECT`, `VERSION`, `NOT_ALLOWED`; `REFUSED` with what does not fit of the model or its methods.
enum kvoyant_status kvoyant_connect(const char *socket,
                                    const struct kvoyant_options *options,
                                    const struct kvoyant_spec *spec,
                                    struct kvoyant_model *model);

// What was registered, and by whom it is served. Set `info->size` before.
enum kvoyant_status kvoyant_model_describe(struct kvoyant_model model,
                                           struct kvoyant_model_info *info);

// A counter of the session, as the daemon publishes it: a `kvoyant_counter`. Costs a read of shared memory.
enum kvoyant_status kvoyant_model_counter(struct kvoyant_model model,
                                          uint32_t counter,
                                          uint64_t *value);

// Ends the session. Its sequences are closed, its requests given up and its answers released: their handles are stale, and what they
// pointed to is gone. What a call that is under way in another thread opens stays open: let there be none.
enum kvoyant_status kvoyant_model_close(struct kvoyant_model model);

// Version of this library, such as `0.1.0`. Never null.
const char *kvoyant_version(void);

// The `KVOYANT_ABI` that this library was built with.
uint32_t kvoyant_abi(void);

// Opens an empty sequence with room for so many tokens. `method` is an index into the registered methods. `sequence` is all zero unless
// this succeeds.
//
// Errors: `BACKPRESSURE` with what is needed, what is free, and what would free enough; `QUOTA`.
enum kvoyant_status kvoyant_sequence_open(struct kvoyant_model model,
                                          uint32_t method,
                                          uint64_t tokens,
                                          struct kvoyant_sequence *sequence);

// Opens a copy of a sequence, with another method or, by `KVOYANT_SAME_METHOD`, its own. Pages are shared until one of the two writes, so
// both must reserve before they do. `copy` is all zero unless this succeeds.
enum kvoyant_status kvoyant_sequence_fork(struct kvoyant_sequence sequence,
                                          uint32_t method,
                                          struct kvoyant_sequence *copy);

// Gives sequences of one model room for so many tokens each, in one call: all of them or none (of more than 1024, so many at a time). Room never shrinks by this.
//
// `sequences` and `tokens` are `[count]`. Errors: `BACKPRESSURE`, `QUOTA`.
enum kvoyant_status kvoyant_reserve(struct kvoyant_model model,
                                    const struct kvoyant_sequence *sequences,
                                    const uint64_t *tokens,
                                    size_t count);

// How a sequence stands. Set `info->size` before.
enum kvoyant_status kvoyant_sequence_describe(struct kvoyant_sequence sequence,
                                              struct kvoyant_sequence_info *info);

// Drops every row from token `tokens` on: rejected drafts, or rows that are lost. Runs that point there are not to be read any more. The
// sequence has room for `tokens` afterwards: reserve before more are written.
enum kvoyant_status kvoyant_sequence_truncate(struct kvoyant_sequence sequence,
                                              uint64_t tokens);

// Closes a sequence: its handle is stale from then on, whether this succeeds or not, unless it says `CONCURRENT`. Answers that name its
// rows are to be released before.
enum kvoyant_status kvoyant_sequence_close(struct kvoyant_sequence sequence);

// Writes keys and values of one layer from token `position` on, straight into the session's pages, in the format that the model stores.
// They count once they are appended.
//
// `keys` is `[KV heads, key_values]` of one token, or `[tokens, KV heads, key_values]`, after RoPE; `values` the same with `value_values`. F32,
// F16 or BF16. Of latents, `values` is null. Errors: `SHAPE`, `DTYPE`, `NO_ROOM`: reserve first.
enum kvoyant_status kvoyant_sequence_write(struct kvoyant_sequence sequence,
                                           uint32_t layer,
                                           uint64_t position,
                                           const struct kvoyant_tensor *keys,
                                           const struct kvoyant_tensor *values);

// Writes rows of one layer and KV head from token `position` on, as they are stored: of keys and values each row is a key and then a value.
//
// `rows` is `[tokens, values of a row]` in the model's own dtype; values of a row are `key_values + value_values`, of a latent
// `key_values`. It has `tokens * row_bytes` bytes, whatever the dtype. Errors: `SHAPE`, `DTYPE`, `NO_ROOM`.
enum kvoyant_status kvoyant_sequence_write_rows(struct kvoyant_sequence sequence,
                                                uint32_t layer,
                                                uint32_t kv_head,
                                                uint64_t position,
                                                const struct kvoyant_tensor *rows);

// Says that the next rows of every layer have been written: `counts[i]` tokens of `sequences[i]`. All are of one model, and none comes twice.
//
// Both are `[count]`. Errors: `NO_ROOM`; `CONCURRENT` if another thread is inside a call on one of them.
enum kvoyant_status kvoyant_append(struct kvoyant_model model,
                                   const struct kvoyant_sequence *sequences,
                                   const uint64_t *counts,
                                   size_t count);

// Copies rows out of the session's own memory, as they are stored: `rows` is `[count]` rows, `bytes` must be `count * row_bytes`.
//
// Errors: `NO_ROOM` where the sequence has no rows; `SPILLED` and `LOST` where they are not in host memory.
enum kvoyant_status kvoyant_sequence_read(struct kvoyant_sequence sequence,
                                          uint32_t layer,
                                          uint32_t kv_head,
                                          uint64_t first_token,
                                          uint64_t count,
                                          void *rows,
                                          size_t bytes);

// Where the rows of tokens lie in the session's own memory: sinks and window, dense and sliding layers, and everything when the daemon is
// late. Rows that are not there, because a method has dropped them or they lie on disk, are in no run
// (`kvoyant_sequence_take_missed`).
//
// `runs` is room for `capacity` runs, in rising order of tokens; `found` is how many there are. Errors: `SHAPE` if they do not fit: a run for
// each page, `count / page_rows + 2`, always does. The addresses are good until the sequence is truncated, suspended or closed, or reserved
// after a fork, which moves what both share; where the model `spills`, those of rows beyond sinks and window only while an answer to
// `KVOYANT_ASK_PAGES` is held.
enum kvoyant_status kvoyant_sequence_local_runs(struct kvoyant_sequence sequence,
                                                uint32_t layer,
                                                uint32_t kv_head,
                                                uint64_t first_token,
                                                uint64_t count,
                                                struct kvoyant_run *runs,
                                                size_t capacity,
                                                size_t *found);

// Whether rows were left out of local runs, since this was last asked, that are not gone for good: `missed` is 1 then. What was attended
// without them is not what was asked for: ask for their layer's pages (`KVOYANT_ASK_PAGES`), and again.
enum kvoyant_status kvoyant_sequence_take_missed(struct kvoyant_sequence sequence,
                                                 uint32_t *missed);

// Sends the statistics of a prompt's queries for one layer; methods say what they want there. `sums` is F32 `[KV heads, key_values]`.
enum kvoyant_status kvoyant_sequence_observe(struct kvoyant_sequence sequence,
                                             uint32_t layer,
                                             const struct kvoyant_tensor *sums);

// Sends an attention row of each KV head over the first `tokens` tokens: F32 `[KV heads, blocks]`, the largest weight of each block of
// tokens and of the group's query heads, within 0 and 1. `full` other than 0: of attention over all tokens, and not only over those attended.
// Errors: `SHAPE` of other blocks than the sequence's method asks for; `ARGUMENT` if that learns from no attention, of a layer that is
// attended whole, and of a weight that is none.
enum kvoyant_status kvoyant_sequence_feedback(struct kvoyant_sequence sequence,
                                              uint32_t layer,
                                              uint64_t tokens,
                                              uint32_t full,
                                              const struct kvoyant_tensor *rows);

// Marks the text of tokens that have room and have not been appended yet: `marks` is `[count]` bytes, from `first_token` on: what ends after
// each token. 0: nothing; 1: a word; 2: a part of a sentence, at a comma, colon, semicolon or bracket; 3: a sentence; 4: a line or a
// paragraph. Errors: `NO_ROOM`; `SHAPE` of another mark, and of tokens that have been appended.
enum kvoyant_status kvoyant_sequence_mark(struct kvoyant_sequence sequence,
                                          uint64_t first_token,
                                          const uint8_t *marks,
                                          size_t count);

// Asks for a layer of a whole batch, while an earlier layer runs. What is pointed to is copied before this returns. `pending` is all zero
// unless it succeeds; it ends with `kvoyant_wait` or `kvoyant_give_up`.
//
// Errors: `SHAPE`, `DTYPE`; `ARGUMENT` of a layer that is attended whole (`dense_layers`, `sliding_layers`), and of a member without what
// its method selects by; `BUSY` if as many answers are held or under way as the session has `ring_slots`. Nothing has been asked then, and
// the session goes on.
enum kvoyant_status kvoyant_speculate(struct kvoyant_model model,
                                      const struct kvoyant_request *request,
                                      struct kvoyant_pending *pending);

// Waits for an answer. Whatever this returns, the request is over and its handle stale: an answer that does not come within `timeout_ns`
// nanoseconds is given up, so that the caller goes on without it, or asks again. `ready` is all zero unless this succeeds; release it with
// `kvoyant_ready_release`.
//
// Errors: `DEADLINE`; `GONE` within 50 ms or so of the daemon's end; `NOT_READY`, `LOST` or `QUOTA` with the daemon's reason.
enum kvoyant_status kvoyant_wait(struct kvoyant_pending pending,
                                 uint64_t timeout_ns,
                                 struct kvoyant_ready *ready);

// Gives a request up: nobody waits for its answer.
enum kvoyant_status kvoyant_give_up(struct kvoyant_pending pending);

// The block table: for each member and KV head, where the rows lie that are to be attended. Set `table->size` before. What it points to
// stays until the answer is released; rows may change once their sequence is truncated or closed.
enum kvoyant_status kvoyant_ready_table(struct kvoyant_ready ready,
                                        struct kvoyant_table *table);

// Copies the rows of one member's KV head out, by token, as they are stored: `[rows]` rows of `row_bytes`. `written` is how many bytes that
// is; with `bytes` 0 that alone is said. Works wherever rows lie.
//
// Errors: `SHAPE` if they do not fit into `bytes`.
enum kvoyant_status kvoyant_ready_copy(struct kvoyant_ready ready,
                                       uint32_t member,
                                       uint32_t kv_head,
                                       void *rows,
                                       size_t bytes,
                                       size_t *written);

// What the daemon says of an answer. Set `answer->size` before.
enum kvoyant_status kvoyant_ready_describe(struct kvoyant_ready ready,
                                           struct kvoyant_answer *answer);

// What the daemon's CPU has attended for a member; `partial->rows` is 0 if nothing. Set `partial->size` before.
enum kvoyant_status kvoyant_ready_partial(struct kvoyant_ready ready,
                                          uint32_t member,
                                          struct kvoyant_partial *partial);

// What is known of the rows that were left out for a member, if its method estimates them: `known` is 1 then, else 0 and nothing is
// written.
//
// `sums` is `[query heads]`; `means` is `[query heads, value_values]`, the estimated mean value of what each query head left out; either may
// be null, which is not written. Errors: `SHAPE` if `heads` is not the model's query heads.
enum kvoyant_status kvoyant_ready_rest(struct kvoyant_ready ready,
                                       uint32_t member,
                                       uint32_t heads,
                                       struct kvoyant_rest *sums,
                                       float *means,
                                       uint32_t *known);

// Releases an answer: its slots may be used for others, and what it pointed to is not to be read any more.
enum kvoyant_status kvoyant_ready_release(struct kvoyant_ready ready);

// Writes a sequence to an image that outlives the daemon, and closes it. `label` helps to tell it from others in lists, and may be null;
// `overwrite` other than 0: it may take the place of another image of that name.
//
// Errors: `IMAGE` if the daemon keeps none, has one of that name, or cannot write it. The sequence is still open then.
enum kvoyant_status kvoyant_sequence_suspend(struct kvoyant_sequence sequence,
                                             const char *image,
                                             uint32_t overwrite,
                                             const char *label);

// Opens a sequence as an image has it; the image stays. `method` is an index into the registered methods, or `KVOYANT_SAME_METHOD`: that
// of the image. `sequence` is all zero unless this succeeds.
//
// Errors: `IMAGE` if there is none, or it is damaged, or of another model.
enum kvoyant_status kvoyant_resume(struct kvoyant_model model,
                                   const char *image,
                                   uint32_t method,
                                   struct kvoyant_sequence *sequence);

// Publishes the full pages of a sequence's first tokens, for other sequences of this user, or of every user if `shared` is not 0, to begin
// with. `tokens` is `[count]`: the token ids that the sequence was made of. `attachable` is how many tokens can be attached to now; it may be
// null.
enum kvoyant_status kvoyant_publish(struct kvoyant_sequence sequence,
                                    const uint32_t *tokens,
                                    size_t count,
                                    uint32_t shared,
                                    uint64_t *attachable);

// Opens a sequence that begins with the longest published prefix of these tokens, `[count]`; how long that is, `kvoyant_sequence_describe`
// says. At least one token is left over, so that there is something to compute. `sequence` is all zero unless this succeeds.
enum kvoyant_status kvoyant_attach(struct kvoyant_model model,
                                   uint32_t method,
                                   const uint32_t *tokens,
                                   size_t count,
                                   struct kvoyant_sequence *sequence);

#ifdef __cplusplus
}  // extern "C"
#endif  // __cplusplus

#endif  /* KVOYANT_H */
