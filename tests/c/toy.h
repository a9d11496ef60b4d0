// A decoder that is only arithmetic: tokens depend on every bit of every row that attention reads. Its twin in Rust is in tests/tests/engines/c.rs.
// Products and sums are rounded one by one and in order (-ffp-contract=off), so that both give the same bits.
#ifndef TOY_H
#define TOY_H

#include <kvoyant.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum {
    LAYERS = 3, QUERY_HEADS = 4, KV_HEADS = 2, HEAD_DIM = 32, ROW = 2 * HEAD_DIM,
    SINKS = 4, WINDOW = 16, PROMPT = 300, STEPS = 24, ROOM = 512, RUNS = 64
};

#define PATIENCE_NS 30000000000ull

// Ends the program with the library's sentence if a call fails.
static inline void must(kvoyant_status status, const char *what) {
    if (status == KVOYANT_STATUS_OK) return;
    fprintf(stderr, "%s: %s: %s\n", what, kvoyant_status_name((uint32_t)status), kvoyant_last_error());
    exit(1);
}

static inline uint32_t mix(uint32_t x) {
    x ^= x >> 16;
    x *= 2246822519u;
    x ^= x >> 13;
    x *= 3266489917u;
    return x ^ (x >> 16);
}

// A value between -1 and 1. `kind` is 0 for keys, 1 for values, 2 for queries.
static inline float value_of(uint32_t token, uint32_t layer, uint32_t kind, uint32_t at) {
    uint32_t bits = mix(token * 8191u + layer * 131u + kind * 17u + mix(at));
    return (float)((int32_t)(bits & 0xffffu) - 32768) / 32768.0f;
}

static inline uint32_t prompt_token(uint32_t seed, uint32_t at) { return mix(seed * 7919u + at) % 32000u; }

static inline void fill_values(float *out, uint32_t count, uint32_t token, uint32_t layer, uint32_t kind) {
    for (uint32_t at = 0; at < count; at++) out[at] = value_of(token, layer, kind, at);
}

// K and V of one token and layer, written to their place.
static inline void write_token(kvoyant_sequence sequence, uint32_t layer, uint64_t position, uint32_t token) {
    float keys[KV_HEADS * HEAD_DIM], values[KV_HEADS * HEAD_DIM];
    fill_values(keys, KV_HEADS * HEAD_DIM, token, layer, 0);
    fill_values(values, KV_HEADS * HEAD_DIM, token, layer, 1);
    kvoyant_tensor k = {keys, KVOYANT_DTYPE_F32, 2, {KV_HEADS, HEAD_DIM, 0, 0}};
    kvoyant_tensor v = {values, KVOYANT_DTYPE_F32, 2, {KV_HEADS, HEAD_DIM, 0, 0}};
    must(kvoyant_sequence_write(sequence, layer, position, &k, &v), "write");
}

static inline void append_one(kvoyant_model model, kvoyant_sequence sequence, uint64_t count) {
    must(kvoyant_append(model, &sequence, &count, 1), "append");
}

static inline void prefill(kvoyant_model model, kvoyant_sequence sequence, uint32_t seed) {
    for (uint32_t layer = 0; layer < LAYERS; layer++)
        for (uint32_t at = 0; at < PROMPT; at++) write_token(sequence, layer, at, prompt_token(seed, at));
    append_one(model, sequence, PROMPT);
}

// What one query head has attended so far.
typedef struct {
    float weight;
    float out[HEAD_DIM];
} attended;

static inline void attend_run(attended *a, const float *query, kvoyant_run run) {
    const float *rows = (const float *)run.rows;
    for (uint32_t row = 0; row < run.count; row++) {
        const float *key = rows + (size_t)row * ROW;
        float score = 0.0f;
        for (int j = 0; j < HEAD_DIM; j++) score += query[j] * key[j];
        float weight = 0.01f + score * score;
        a->weight += weight;
        for (int j = 0; j < HEAD_DIM; j++) a->out[j] += weight * key[HEAD_DIM + j];
    }
}

static inline void attend_local(attended *a, const float *query, kvoyant_sequence sequence, uint32_t layer,
                         uint32_t kv_head, uint64_t first, uint64_t end) {
    kvoyant_run runs[RUNS];
    size_t found = 0;
    must(kvoyant_sequence_local_runs(sequence, layer, kv_head, first, end - first, runs, RUNS, &found), "local runs");
    for (size_t run = 0; run < found; run++) attend_run(a, query, runs[run]);
}

// Attends one layer for one member and takes the result into the hash. `table` is null where the layer is read whole.
static inline uint32_t attend_layer(uint32_t hash, const kvoyant_table *table, uint32_t member, kvoyant_sequence sequence,
                             uint32_t layer, uint64_t position, const float *queries) {
    for (uint32_t head = 0; head < QUERY_HEADS; head++) {
        uint32_t kv_head = head / (QUERY_HEADS / KV_HEADS);
        const float *query = queries + head * HEAD_DIM;
        attended a;
        memset(&a, 0, sizeof a);
        if (table == NULL) {
            attend_local(&a, query, sequence, layer, kv_head, 0, position + 1);
        } else {
            size_t at = (size_t)member * table->kv_heads + kv_head;
            attend_local(&a, query, sequence, layer, kv_head, 0, SINKS);
            for (size_t run = table->offsets[at]; run < table->offsets[at + 1]; run++)
                attend_run(&a, query, table->runs[run]);
            attend_local(&a, query, sequence, layer, kv_head, position + 1 - WINDOW, position + 1);
        }
        for (int j = 0; j < HEAD_DIM; j++) {
            float out = a.out[j] / a.weight;
            uint32_t bits;
            memcpy(&bits, &out, sizeof bits);
            hash = (hash ^ bits) * 16777619u;
        }
    }
    return hash;
}

static inline kvoyant_model connect_toy(const char *socket, const char *name) {
    static const char *const methods[] = {"quest:budget=25%", "full"};
    kvoyant_options options;
    memset(&options, 0, sizeof options);
    options.size = sizeof options;
    options.name = name;
    kvoyant_spec spec;
    memset(&spec, 0, sizeof spec);
    spec.size = sizeof spec;
    spec.name = "toy";
    spec.fingerprint = "0123456789abcdef0123456789abcdef";
    spec.layers = LAYERS;
    spec.query_heads = QUERY_HEADS;
    spec.kv_heads = KV_HEADS;
    spec.head_dim = HEAD_DIM;
    spec.dtype = KVOYANT_DTYPE_F32;
    spec.sinks = SINKS;
    spec.window = WINDOW;
    spec.dense_layers = 1;
    spec.methods = methods;
    spec.methods_count = 2;
    kvoyant_model model;
    must(kvoyant_connect(socket, &options, &spec, &model), "connect");
    return model;
}

#endif
