// Decodes two sequences in one batch, then one of them again from its prompt: the same tokens. Prints each sequence's tokens in a line.
//
// usage: decode SOCKET [images]       with `images`, sequences and prefixes go through the daemon's store, too
#include "toy.h"

enum { SEQUENCES = 2 };

// One step of several sequences, which are at the same position.
static void step(kvoyant_model model, const kvoyant_sequence *sequences, uint32_t count, uint64_t position,
                 uint32_t *tokens) {
    uint32_t hashes[SEQUENCES] = {2166136261u, 2166136261u};
    float queries[SEQUENCES][QUERY_HEADS * HEAD_DIM];
    for (uint32_t layer = 0; layer < LAYERS; layer++) {
        kvoyant_member members[SEQUENCES];
        memset(members, 0, sizeof members);
        for (uint32_t s = 0; s < count; s++) {
            fill_values(queries[s], QUERY_HEADS * HEAD_DIM, tokens[s], layer, 2);
            write_token(sequences[s], layer, position, tokens[s]);
            members[s].sequence = sequences[s];
            members[s].position = position;
            members[s].query.data = queries[s];
            members[s].query.dtype = KVOYANT_DTYPE_F32;
            members[s].query.dims = 2;
            members[s].query.shape[0] = QUERY_HEADS;
            members[s].query.shape[1] = HEAD_DIM;
        }
        if (layer == 0) {
            for (uint32_t s = 0; s < count; s++)
                hashes[s] = attend_layer(hashes[s], NULL, s, sequences[s], layer, position, queries[s]);
            continue;
        }
        kvoyant_request request = {.size = sizeof request, .ask = KVOYANT_ASK_ROWS, .layer = layer,
                                   .members = members, .members_count = count};
        kvoyant_pending pending;
        kvoyant_ready ready;
        kvoyant_table table = {.size = sizeof table};
        must(kvoyant_speculate(model, &request, &pending), "speculate");
        must(kvoyant_wait(pending, PATIENCE_NS, &ready), "wait");
        must(kvoyant_ready_table(ready, &table), "table");
        for (uint32_t s = 0; s < count; s++)
            hashes[s] = attend_layer(hashes[s], &table, s, sequences[s], layer, position, queries[s]);
        must(kvoyant_ready_release(ready), "release");
    }
    uint64_t ones[SEQUENCES] = {1, 1};
    must(kvoyant_append(model, sequences, ones, count), "append");
    for (uint32_t s = 0; s < count; s++) tokens[s] = hashes[s] % 32000u;
}

static void decode(kvoyant_model model, const kvoyant_sequence *sequences, uint32_t count, const uint32_t *first,
                   uint32_t out[SEQUENCES][STEPS]) {
    uint32_t tokens[SEQUENCES];
    memcpy(tokens, first, count * sizeof *tokens);
    for (uint32_t at = 0; at < STEPS; at++) {
        step(model, sequences, count, PROMPT + at, tokens);
        for (uint32_t s = 0; s < count; s++) out[s][at] = tokens[s];
    }
}

static void print(const uint32_t *tokens) {
    for (int at = 0; at < STEPS; at++) printf("%u%c", tokens[at], at + 1 == STEPS ? '\n' : ' ');
}

static void must_equal(const uint32_t *a, const uint32_t *b, const char *what) {
    if (memcmp(a, b, STEPS * sizeof *a) == 0) return;
    fprintf(stderr, "%s gives other tokens\n", what);
    exit(1);
}

int main(int argc, char **argv) {
    if (argc < 2) return 2;
    kvoyant_model model = connect_toy(argv[1], "decode.c");
    kvoyant_model_info info = {.size = sizeof info};
    must(kvoyant_model_describe(model, &info), "describe");
    if (info.row_bytes != ROW * sizeof(float) || info.value_offset != HEAD_DIM * sizeof(float)) return 3;

    kvoyant_sequence sequences[SEQUENCES];
    uint32_t first[SEQUENCES], tokens[SEQUENCES][STEPS], again[SEQUENCES][STEPS];
    for (uint32_t s = 0; s < SEQUENCES; s++) {
        must(kvoyant_sequence_open(model, 0, ROOM, &sequences[s]), "open");
        prefill(model, sequences[s], s);
        first[s] = prompt_token(s, PROMPT);
    }
    decode(model, sequences, SEQUENCES, first, tokens);
    for (uint32_t s = 0; s < SEQUENCES; s++) print(tokens[s]);

    // A copy that is cut back to the prompt goes the same way, and so does the original, cut back itself.
    kvoyant_sequence copy;
    uint64_t room = ROOM;
    must(kvoyant_sequence_fork(sequences[0], KVOYANT_SAME_METHOD, &copy), "fork");
    must(kvoyant_sequence_truncate(copy, PROMPT), "truncate");
    must(kvoyant_reserve(model, &copy, &room, 1), "reserve");
    decode(model, &copy, 1, &first[0], again);
    must_equal(tokens[0], again[0], "a fork");
    must(kvoyant_sequence_truncate(sequences[1], PROMPT), "truncate");
    must(kvoyant_reserve(model, &sequences[1], &room, 1), "reserve");
    decode(model, &sequences[1], 1, &first[1], again);
    must_equal(tokens[1], again[0], "a truncated sequence");

    // A row, as it was written.
    float row[ROW];
    must(kvoyant_sequence_read(copy, 1, 1, 7, 1, row, sizeof row), "read");
    if (row[3] != value_of(prompt_token(0, 7), 1, 0, HEAD_DIM + 3)) return 4;
    kvoyant_sequence_info stands = {.size = sizeof stands};
    must(kvoyant_sequence_describe(copy, &stands), "describe");
    if (stands.tokens != PROMPT + STEPS || stands.room < stands.tokens || stands.first_lost != KVOYANT_NO_TOKEN) return 5;
    uint64_t answered = 0;
    must(kvoyant_model_counter(model, KVOYANT_COUNTER_SPECULATIONS, &answered), "counter");
    if (answered != 3 * STEPS * (LAYERS - 1)) return 6;

    if (argc > 2 && strcmp(argv[2], "images") == 0) {
        must(kvoyant_sequence_truncate(copy, PROMPT), "truncate");
        uint32_t text[PROMPT + 1];
        for (uint32_t at = 0; at <= PROMPT; at++) text[at] = prompt_token(0, at);
        uint64_t attachable = 0;
        must(kvoyant_publish(copy, text, PROMPT, 0, &attachable), "publish");
        must(kvoyant_sequence_suspend(copy, "toy", 1, "of decode.c"), "suspend");
        must(kvoyant_resume(model, "toy", KVOYANT_SAME_METHOD, &copy), "resume");
        must(kvoyant_reserve(model, &copy, &room, 1), "reserve");
        decode(model, &copy, 1, &first[0], again);
        must_equal(tokens[0], again[0], "a resumed sequence");
        kvoyant_sequence attached;
        must(kvoyant_attach(model, 0, text, PROMPT + 1, &attached), "attach");
        must(kvoyant_sequence_describe(attached, &stands), "describe");
        if (stands.tokens != attachable || attachable == 0 || attachable > PROMPT) return 7;
        must(kvoyant_reserve(model, &attached, &room, 1), "reserve");
        for (uint32_t layer = 0; layer < LAYERS; layer++)
            for (uint64_t at = attachable; at < PROMPT; at++) write_token(attached, layer, at, text[at]);
        append_one(model, attached, PROMPT - attachable);
        decode(model, &attached, 1, &first[0], again);
        must_equal(tokens[0], again[0], "an attached sequence");
    }
    must(kvoyant_sequence_close(sequences[0]), "close");
    must(kvoyant_model_close(model), "close");
    return 0;
}
