// llama.cpp with its KV kept in Kvoyant, by the public interfaces of both.
//
// usage: llama_cpp MODEL.gguf SOCKET [PROMPT_FILE [METHOD]]
//
// 1. The prompt's longest prefix that some process has published comes back from the daemon into llama.cpp's cache; only the rest is
//    computed. What was computed is published for others, and for this program's next run.
// 2. While it answers, each layer's true query asks the daemon which rows it would choose, and the program says how much of that layer's
//    attention they have. It cannot do more: llama.cpp has no call that changes what attention reads.
#include <ggml-backend.h>
#include <kvoyant.h>
#include <llama.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "llama_state.h"

enum { ANSWER = 32, BATCH = 512, SINKS = 4, WINDOW = 64, DENSE_LAYERS = 2 };
static const uint64_t PATIENCE_NS = 10000000000;

static void fail(const char *what, const char *why) {
    fprintf(stderr, "%s: %s\n", what, why);
    exit(1);
}

static void must(kvoyant_status status, const char *what) {
    if (status != KVOYANT_STATUS_OK) fail(what, kvoyant_last_error());
}

static void *room(size_t bytes) {
    void *memory = calloc(1, bytes ? bytes : 1);
    if (!memory) fail("memory", "there is not enough");
    return memory;
}

// Everything that the callback of llama.cpp's graph needs.
typedef struct {
    state_shape shape;
    uint32_t query_heads;
    kvoyant_model model;
    kvoyant_sequence sequence;
    // The position that is being decoded; the callback looks on only while `answering`.
    uint64_t position;
    int answering;
    // Keys of the layer whose values come next.
    float *keys;
    // One head's rows of a layer.
    uint16_t *rows;
    size_t rows_bytes;
    // What was measured.
    uint64_t layers_asked, rows_chosen, rows_there;
    double mass;
    const char *failed;
} observer;

static size_t token_values(const observer *o) { return (size_t)o->shape.kv_heads * o->shape.head_dim; }

// Whether a tensor of the graph is the one that is called `name` in some layer, and which.
static int is_named(const struct ggml_tensor *tensor, const char *name, uint32_t *layer) {
    size_t length = strlen(name);
    char *end;
    if (strncmp(tensor->name, name, length) != 0 || tensor->name[length] != '-') return 0;
    unsigned long number = strtoul(tensor->name + length + 1, &end, 10);
    *layer = (uint32_t)number;
    return end != tensor->name + length + 1 && *end == 0;
}

static float dot(const float *query, const uint16_t *key, uint32_t values) {
    float sum = 0, row[1024];
    ggml_fp16_to_fp32_row((const ggml_fp16_t *)key, row, values);
    for (uint32_t i = 0; i < values; i++) sum += query[i] * row[i];
    return sum;
}

// Asks for a layer by its true query, and adds up how much of the attention to the tokens before this one the chosen rows have.
static kvoyant_status ask(observer *o, uint32_t layer, const float *query) {
    uint32_t d = o->shape.head_dim, group = o->query_heads / o->shape.kv_heads;
    kvoyant_member member = {.sequence = o->sequence, .position = o->position,
                             .query = {query, KVOYANT_DTYPE_F32, 2, {o->query_heads, d}}};
    kvoyant_request request = {.size = sizeof request, .layer = layer, .members = &member, .members_count = 1};
    kvoyant_pending pending;
    kvoyant_ready ready;
    kvoyant_table table = {.size = sizeof table};
    kvoyant_status status = kvoyant_speculate(o->model, &request, &pending);
    if (status == KVOYANT_STATUS_OK) status = kvoyant_wait(pending, PATIENCE_NS, &ready);
    if (status != KVOYANT_STATUS_OK) return status;
    status = kvoyant_ready_table(ready, &table);
    char *chosen = room(o->position);
    float *scores = room(o->position * sizeof *scores);
    for (uint32_t head = 0; status == KVOYANT_STATUS_OK && head < o->shape.kv_heads; head++) {
        // Sinks and window are always attended.
        for (uint64_t token = 0; token < o->position; token++) chosen[token] = token < SINKS || token + WINDOW > o->position;
        for (size_t run = table.offsets[head]; run < table.offsets[head + 1]; run++)
            memset(chosen + table.runs[run].token, 1, table.runs[run].count);
        size_t bytes = o->position * 2 * d * sizeof(uint16_t);
        status = kvoyant_sequence_read(o->sequence, layer, head, 0, o->position, o->rows, bytes);
        for (uint32_t q = head * group; status == KVOYANT_STATUS_OK && q < (head + 1) * group; q++) {
            double most = -INFINITY, all = 0, kept = 0;
            for (uint64_t token = 0; token < o->position; token++) {
                scores[token] = dot(query + (size_t)q * d, o->rows + token * 2 * d, d) / sqrtf((float)d);
                most = fmax(most, scores[token]);
            }
            for (uint64_t token = 0; token < o->position; token++) {
                double weight = exp(scores[token] - most);
                all += weight;
                if (chosen[token]) kept += weight;
            }
            o->mass += kept / all / o->query_heads;
        }
        for (uint64_t token = 0; token < o->position; token++) o->rows_chosen += (uint64_t)chosen[token];
        o->rows_there += o->position;
    }
    o->layers_asked++;
    free(chosen);
    free(scores);
    kvoyant_status released = kvoyant_ready_release(ready);
    return status == KVOYANT_STATUS_OK ? released : status;
}

// llama.cpp calls this for every tensor of a graph: first to hear whether it is wanted, then with its values.
static bool observe(struct ggml_tensor *tensor, bool asking, void *data) {
    observer *o = data;
    uint32_t layer;
    if (!o->answering || o->failed) return !asking;
    // Queries and keys have their name before RoPE, too.
    int rotated = tensor->op == GGML_OP_ROPE;
    int query = rotated && is_named(tensor, "Qcur", &layer), key = rotated && is_named(tensor, "Kcur", &layer);
    int value = !rotated && is_named(tensor, "Vcur", &layer);
    if (!query && !key && !value) return !asking;
    if (asking) return true;
    size_t values = query ? (size_t)o->query_heads * o->shape.head_dim : token_values(o);
    if (tensor->type != GGML_TYPE_F32 || (size_t)ggml_nelements(tensor) != values || layer >= o->shape.layers) {
        o->failed = "llama.cpp's graph has queries, keys or values of another shape";
        return false;
    }
    float *read = key ? o->keys + layer * token_values(o) : room(values * sizeof *read);
    ggml_backend_tensor_get(tensor, read, 0, values * sizeof *read);
    kvoyant_status status = KVOYANT_STATUS_OK;
    if (query && layer >= DENSE_LAYERS) status = ask(o, layer, read);
    if (value) {
        uint32_t heads = o->shape.kv_heads, d = o->shape.head_dim;
        kvoyant_tensor k = {o->keys + layer * token_values(o), KVOYANT_DTYPE_F32, 2, {heads, d}};
        kvoyant_tensor v = {read, KVOYANT_DTYPE_F32, 2, {heads, d}};
        status = kvoyant_sequence_write(o->sequence, layer, o->position, &k, &v);
    }
    if (!key) free(read);
    if (status != KVOYANT_STATUS_OK) o->failed = kvoyant_last_error();
    return o->failed == NULL;
}

// Rows between llama.cpp's order, `[tokens][KV heads][d]` of keys and of values, and Kvoyant's, a key and its value per head and token.
static void exchange(observer *o, uint8_t *state, uint32_t tokens, uint32_t first, int into_state) {
    uint32_t heads = o->shape.kv_heads, d = o->shape.head_dim;
    size_t half = d * sizeof(uint16_t), count = tokens - first;
    for (uint32_t layer = 0; layer < o->shape.layers; layer++)
        for (uint32_t head = 0; head < heads; head++) {
            if (into_state)
                must(kvoyant_sequence_read(o->sequence, layer, head, first, count, o->rows, count * 2 * half), "read rows");
            for (size_t i = 0; i < count; i++)
                for (int value = 0; value < 2; value++) {
                    uint8_t *theirs = state + state_rows_at(&o->shape, tokens, layer, value) + ((first + i) * heads + head) * half;
                    uint16_t *ours = o->rows + (2 * i + (size_t)value) * d;
                    memcpy(into_state ? (void *)theirs : (void *)ours, into_state ? (void *)ours : (void *)theirs, half);
                }
            if (!into_state) {
                kvoyant_tensor rows = {o->rows, KVOYANT_DTYPE_F16, 2, {count, 2 * d}};
                must(kvoyant_sequence_write_rows(o->sequence, layer, head, first, &rows), "write rows");
            }
        }
}

// The state of llama.cpp's sequence, which has so many tokens.
static uint8_t *state_of(observer *o, struct llama_context *context, uint32_t tokens, size_t *bytes) {
    *bytes = llama_state_seq_get_size(context, 0);
    uint8_t *state = room(*bytes);
    if (llama_state_seq_get_data(context, state, *bytes, 0) != *bytes) fail("llama.cpp", "it gives no state");
    const char *why = state_check(&o->shape, state, *bytes, tokens);
    if (why) fail("this version of llama.cpp, or this model, keeps its KV otherwise", why);
    return state;
}

static void decode(struct llama_context *context, int32_t *tokens, uint32_t count) {
    for (uint32_t first = 0; first < count; first += BATCH) {
        uint32_t some = count - first < BATCH ? count - first : BATCH;
        if (llama_decode(context, llama_batch_get_one(tokens + first, (int32_t)some)) != 0) fail("llama.cpp", "it cannot decode");
    }
}

// Brings the first `tokens` tokens of the sequence into llama.cpp's cache, and looks whether they are there as they were.
static void restore(observer *o, struct llama_context *context, int32_t *prompt, uint32_t tokens) {
    // A state of one token says what a state begins with.
    size_t bytes;
    decode(context, prompt, 1);
    free(state_of(o, context, 1, &bytes));
    llama_memory_clear(llama_get_memory(context), true);

    size_t wanted = state_bytes(&o->shape, tokens);
    uint8_t *state = room(wanted);
    state_frame(&o->shape, state, tokens);
    exchange(o, state, tokens, 0, 1);
    if (llama_state_seq_set_data(context, state, wanted, 0) == 0) fail("llama.cpp", "it does not take the state back");
    uint8_t *now = state_of(o, context, tokens, &bytes);
    if (memcmp(now, state, wanted) != 0) fail("llama.cpp", "what it has is not what it was given");
    free(now);
    free(state);
}

static int32_t next(struct llama_context *context, const struct llama_vocab *vocab) {
    const float *logits = llama_get_logits_ith(context, -1);
    int32_t best = 0;
    for (int32_t token = 1; token < llama_vocab_n_tokens(vocab); token++)
        if (logits[token] > logits[best]) best = token;
    return best;
}

static char *text_of(const char *path) {
    FILE *file = fopen(path, "rb");
    if (!file || fseek(file, 0, SEEK_END) != 0) fail(path, "it cannot be read");
    long bytes = ftell(file);
    rewind(file);
    char *text = room((size_t)bytes + 1);
    if (bytes < 0 || fread(text, 1, (size_t)bytes, file) != (size_t)bytes) fail(path, "it cannot be read");
    fclose(file);
    return text;
}

// 32 digits that are this file's: prefixes are shared between equal ones alone. They tell files apart, and prove nothing.
static void fingerprint(const char *path, char digits[33]) {
    uint64_t a = 14695981039346656037u, b = 1099511628211u, word = 0;
    FILE *file = fopen(path, "rb");
    if (!file) fail(path, "it cannot be read");
    while (fread(&word, 1, sizeof word, file) > 0) {
        a = (a ^ word) * 1099511628211u;
        b = (b + word) * 6364136223846793005u + (b >> 29);
        word = 0;
    }
    fclose(file);
    snprintf(digits, 33, "%016llx%016llx", (unsigned long long)a, (unsigned long long)b);
}

static void quiet(enum ggml_log_level level, const char *text, void *data) {
    (void)data;
    if (level == GGML_LOG_LEVEL_ERROR) fputs(text, stderr);
}

int main(int argc, char **argv) {
    if (argc < 3) {
        fprintf(stderr, "usage: llama_cpp MODEL.gguf SOCKET [PROMPT_FILE [METHOD]]\n");
        return 2;
    }
    char *text = argc > 3 ? text_of(argv[3]) : "The lighthouse keeper wrote in his book that";
    llama_log_set(quiet, NULL);
    llama_backend_init();
    struct llama_model_params of_model = llama_model_default_params();
    // Layouts of weights that depend on the processor: AMX kernels fail in some virtual machines.
    of_model.use_extra_bufts = false;
    struct llama_model *model = llama_model_load_from_file(argv[1], of_model);
    if (!model) fail(argv[1], "llama.cpp cannot load it");
    const struct llama_vocab *vocab = llama_model_get_vocab(model);

    int32_t most = (int32_t)strlen(text) + 8;
    int32_t *prompt = room(((size_t)most + ANSWER) * sizeof *prompt);
    int32_t count = llama_tokenize(vocab, text, (int32_t)strlen(text), prompt, most, true, false);
    if (count < 1) fail("the prompt", "it has no tokens");
    uint32_t tokens = (uint32_t)count;

    observer o = {.shape = {.layers = (uint32_t)llama_model_n_layer(model), .kv_heads = (uint32_t)llama_model_n_head_kv(model)},
                  .query_heads = (uint32_t)llama_model_n_head(model)};
    o.shape.head_dim = (uint32_t)llama_model_n_embd(model) / o.query_heads;
    if (o.shape.head_dim > 1024) fail("the model", "its heads are larger than this example reads");
    o.keys = room(o.shape.layers * token_values(&o) * sizeof *o.keys);
    o.rows_bytes = (tokens + ANSWER) * 2 * (size_t)o.shape.head_dim * sizeof *o.rows;
    o.rows = room(o.rows_bytes);

    struct llama_context_params of_context = llama_context_default_params();
    of_context.n_ctx = tokens + ANSWER;
    of_context.n_batch = BATCH;
    of_context.n_seq_max = 1;
    // Values of a token lie together only with it.
    of_context.flash_attn_type = LLAMA_FLASH_ATTN_TYPE_ENABLED;
    of_context.type_k = of_context.type_v = GGML_TYPE_F16;
    of_context.cb_eval = observe;
    of_context.cb_eval_user_data = &o;
    struct llama_context *context = llama_init_from_model(model, of_context);
    if (!context) fail(argv[1], "llama.cpp gives no context for it");

    char digits[33];
    fingerprint(argv[1], digits);
    const char *methods[] = {argc > 4 ? argv[4] : "quest:budget=12%,hint=current"};
    kvoyant_spec spec = {.size = sizeof spec, .name = "llama.cpp", .fingerprint = digits, .rope = "llama.cpp",
                         .layers = o.shape.layers, .query_heads = o.query_heads, .kv_heads = o.shape.kv_heads,
                         .head_dim = o.shape.head_dim, .dtype = KVOYANT_DTYPE_F16, .sinks = SINKS, .window = WINDOW,
                         .dense_layers = DENSE_LAYERS, .methods = methods, .methods_count = 1};
    must(kvoyant_connect(argv[2], NULL, &spec, &o.model), "connect");

    // What is there already.
    must(kvoyant_attach(o.model, 0, (const uint32_t *)prompt, tokens, &o.sequence), "attach");
    kvoyant_sequence_info info = {.size = sizeof info};
    must(kvoyant_sequence_describe(o.sequence, &info), "describe");
    uint32_t kept = (uint32_t)info.tokens;
    if (kept) restore(&o, context, prompt, kept);
    printf("%u of the prompt's %u tokens came from the daemon\n", kept, tokens);

    // The rest is computed, kept and published.
    decode(context, prompt + kept, tokens - kept);
    uint64_t room_for = tokens + ANSWER, fresh = tokens - kept, attachable;
    must(kvoyant_reserve(o.model, &o.sequence, &room_for, 1), "reserve");
    size_t bytes;
    uint8_t *state = state_of(&o, context, tokens, &bytes);
    exchange(&o, state, tokens, kept, 0);
    free(state);
    must(kvoyant_append(o.model, &o.sequence, &fresh, 1), "append");
    must(kvoyant_publish(o.sequence, (const uint32_t *)prompt, tokens, 0, &attachable), "publish");
    printf("%llu tokens are published\n", (unsigned long long)attachable);

    // The answer, with somebody who looks on.
    o.answering = 1;
    printf("tokens:");
    for (o.position = tokens; o.position < tokens + ANSWER; o.position++) {
        int32_t token = next(context, vocab);
        prompt[o.position] = token;
        printf(" %d", token);
        if (llama_vocab_is_eog(vocab, token)) break;
        decode(context, &token, 1);
        if (o.failed) fail("looking on", o.failed);
        uint64_t one = 1;
        must(kvoyant_append(o.model, &o.sequence, &one, 1), "append");
    }
    char piece[256];
    printf("\nanswer:");
    for (uint64_t at = tokens; at < o.position; at++) {
        int32_t length = llama_token_to_piece(vocab, prompt[at], piece, sizeof piece, 0, false);
        printf("%.*s", length > 0 ? length : 0, piece);
    }
    if (o.layers_asked)
        printf("\n%s: %.1f %% of the rows, sinks and window among them, would have %.1f %% of the attention, over %llu layers\n", methods[0],
               100.0 * (double)o.rows_chosen / (double)o.rows_there, 100 * o.mass / (double)o.layers_asked,
               (unsigned long long)o.layers_asked);

    must(kvoyant_model_close(o.model), "close");
    llama_free(context);
    llama_model_free(model);
    free(o.keys);
    free(o.rows);
    free(prompt);
    if (argc > 3) free(text);
    return 0;
}
