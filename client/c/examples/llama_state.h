// What llama_state_seq_get_data gives and llama_state_seq_set_data takes: the KV of one sequence, as llama.cpp lays it out.
//
// llama.cpp does not promise this layout. It is read with every field checked; one that is not as expected is refused, with a sentence.
#ifndef LLAMA_STATE_H
#define LLAMA_STATE_H

#include <llama.h>
#include <stddef.h>
#include <stdint.h>

// The KV of one sequence of a model whose layers are all alike: F16, keys after RoPE, values not transposed.
typedef struct {
    uint32_t layers, kv_heads, head_dim;
    // What the state begins with, and means nothing to others.
    uint32_t magic;
} state_shape;

// Bytes of a state of so many tokens.
size_t state_bytes(const state_shape *shape, uint32_t tokens);

// Where the keys (`value` 0) or values (1) of a layer lie in it: `[tokens][kv_heads][head_dim]` of F16.
size_t state_rows_at(const state_shape *shape, uint32_t tokens, uint32_t layer, int value);

// Checks a state of so many tokens from position 0 on, and learns `magic`. Null, or what is not as expected.
const char *state_check(state_shape *shape, const uint8_t *state, size_t bytes, uint32_t tokens);

// Writes everything but the rows of a state of so many tokens for sequence 0.
void state_frame(const state_shape *shape, uint8_t *state, uint32_t tokens);

#endif
