#include "llama_state.h"

#include <string.h>

// magic, sequence, streams, cells
enum { HEAD = 16 };
// position, sequences, sequence
enum { CELL = 12 };
// transposed, layers
enum { MIDDLE = 8 };
// type, bytes of a row
enum { LAYER = 12 };

static uint64_t row(const state_shape *shape) { return (uint64_t)shape->kv_heads * shape->head_dim * sizeof(uint16_t); }

static size_t layers_at(uint32_t tokens) { return HEAD + (size_t)CELL * tokens + MIDDLE; }

size_t state_bytes(const state_shape *shape, uint32_t tokens) {
    return layers_at(tokens) + 2 * (size_t)shape->layers * (LAYER + row(shape) * tokens);
}

size_t state_rows_at(const state_shape *shape, uint32_t tokens, uint32_t layer, int value) {
    size_t before = (value ? shape->layers : 0) + (size_t)layer;
    return layers_at(tokens) + before * (LAYER + row(shape) * tokens) + LAYER;
}

static uint32_t word(const uint8_t *at) {
    uint32_t value;
    memcpy(&value, at, sizeof value);
    return value;
}

const char *state_check(state_shape *shape, const uint8_t *state, size_t bytes, uint32_t tokens) {
    if (bytes != state_bytes(shape, tokens)) return "another size: its cells, layers or rows are of another kind";
    shape->magic = word(state);
    if (word(state + 8) != 1) return "more than one stream: set kv_unified";
    if (word(state + 12) != tokens) return "another number of cells";
    for (uint32_t token = 0; token < tokens; token++) {
        const uint8_t *cell = state + HEAD + (size_t)CELL * token;
        if (word(cell) != token || word(cell + 4) != 1) return "cells in another order, or of several sequences";
    }
    const uint8_t *middle = state + layers_at(tokens) - MIDDLE;
    if (word(middle) != 0) return "transposed values: enable flash attention";
    if (word(middle + 4) != shape->layers) return "another number of layers";
    for (uint32_t i = 0; i < 2 * shape->layers; i++) {
        const uint8_t *layer = state + state_rows_at(shape, tokens, i % shape->layers, i >= shape->layers) - LAYER;
        uint64_t bytes_of_row;
        memcpy(&bytes_of_row, layer + 4, sizeof bytes_of_row);
        if (word(layer) != GGML_TYPE_F16 || bytes_of_row != row(shape)) return "rows of another type or size: use F16";
    }
    return NULL;
}

static uint8_t *put(uint8_t *at, uint32_t value) {
    memcpy(at, &value, sizeof value);
    return at + sizeof value;
}

void state_frame(const state_shape *shape, uint8_t *state, uint32_t tokens) {
    uint8_t *at = put(put(put(put(state, shape->magic), 0), 1), tokens);
    for (uint32_t token = 0; token < tokens; token++) at = put(put(put(at, token), 1), 0);
    put(put(at, 0), shape->layers);
    for (uint32_t i = 0; i < 2 * shape->layers; i++) {
        uint8_t *layer = state + state_rows_at(shape, tokens, i % shape->layers, i >= shape->layers) - LAYER;
        uint64_t bytes_of_row = row(shape);
        memcpy(put(layer, GGML_TYPE_F16), &bytes_of_row, sizeof bytes_of_row);
    }
}
