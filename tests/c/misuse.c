// Uses the library in every wrong way that it can notice. Prints for each what was wrong, the code and the sentence; ends well if no call went
// well that should not have.
//
// usage: misuse SOCKET DAEMON-PID
#define _POSIX_C_SOURCE 200809L
#include "toy.h"

#include <pthread.h>
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

static int unexpected = 0;

static void wrong(const char *what, kvoyant_status status, kvoyant_status expected) {
    printf("%s|%s|%s\n", what, kvoyant_status_name((uint32_t)status), kvoyant_last_error());
    if (status != expected) {
        fprintf(stderr, "%s: %d, where %d was expected: %s\n", what, (int)status, (int)expected, kvoyant_last_error());
        unexpected = 1;
    }
}

static kvoyant_tensor tensor(const void *data, uint32_t dtype, uint32_t dims, uint64_t a, uint64_t b, uint64_t c) {
    kvoyant_tensor made = {data, dtype, dims, {a, b, c, 0}};
    return made;
}

static kvoyant_status ask(kvoyant_model model, kvoyant_sequence sequence, kvoyant_tensor query, kvoyant_pending *pending) {
    kvoyant_member member = {.sequence = sequence, .position = PROMPT, .query = query};
    kvoyant_request request = {.size = sizeof request, .layer = 1, .members = &member, .members_count = 1};
    return kvoyant_speculate(model, &request, pending);
}

static void closed(kvoyant_model model, kvoyant_sequence sequence, kvoyant_tensor query) {
    kvoyant_sequence gone, none = {0}, made_up = {0x123456789abcull};
    kvoyant_pending pending;
    kvoyant_ready ready;
    kvoyant_table table = {.size = sizeof table};
    uint64_t one = 1;
    must(kvoyant_sequence_open(model, 0, 10, &gone), "open");
    must(kvoyant_sequence_close(gone), "close");
    wrong("close twice", kvoyant_sequence_close(gone), KVOYANT_STATUS_HANDLE);
    wrong("append after close", kvoyant_append(model, &gone, &one, 1), KVOYANT_STATUS_HANDLE);
    wrong("ask after close", ask(model, gone, query, &pending), KVOYANT_STATUS_HANDLE);
    wrong("never opened", kvoyant_sequence_truncate(none, 0), KVOYANT_STATUS_HANDLE);
    wrong("made up", kvoyant_sequence_truncate(made_up, 0), KVOYANT_STATUS_HANDLE);
    kvoyant_sequence of_model = {model.id};
    wrong("a model for a sequence", kvoyant_sequence_truncate(of_model, 0), KVOYANT_STATUS_HANDLE);
    must(ask(model, sequence, query, &pending), "ask");
    must(kvoyant_wait(pending, PATIENCE_NS, &ready), "wait");
    wrong("wait twice", kvoyant_wait(pending, PATIENCE_NS, &(kvoyant_ready){0}), KVOYANT_STATUS_HANDLE);
    must(kvoyant_ready_release(ready), "release");
    wrong("read after release", kvoyant_ready_table(ready, &table), KVOYANT_STATUS_HANDLE);
    must(ask(model, sequence, query, &pending), "ask");
    must(kvoyant_give_up(pending), "give up");
    wrong("wait after giving up", kvoyant_wait(pending, PATIENCE_NS, &ready), KVOYANT_STATUS_HANDLE);
}

static void arrays(kvoyant_model model, kvoyant_sequence sequence, const float *values) {
    kvoyant_tensor good = tensor(values, KVOYANT_DTYPE_F32, 2, KV_HEADS, HEAD_DIM, 0);
    kvoyant_tensor narrow = tensor(values, KVOYANT_DTYPE_F32, 2, KV_HEADS, HEAD_DIM - 1, 0);
    kvoyant_tensor flat = tensor(values, KVOYANT_DTYPE_F32, 1, KV_HEADS * HEAD_DIM, 0, 0);
    kvoyant_tensor many = tensor(values, KVOYANT_DTYPE_F32, 9, KV_HEADS, HEAD_DIM, 0);
    kvoyant_tensor huge = tensor(values, KVOYANT_DTYPE_F32, 3, UINT64_MAX / 2, KV_HEADS, HEAD_DIM);
    kvoyant_tensor bytes = tensor(values, KVOYANT_DTYPE_INT8, 2, KV_HEADS, HEAD_DIM, 0);
    kvoyant_tensor nothing = tensor(NULL, KVOYANT_DTYPE_F32, 2, KV_HEADS, HEAD_DIM, 0);
    kvoyant_tensor askew = tensor((const char *)values + 1, KVOYANT_DTYPE_F32, 2, KV_HEADS, HEAD_DIM, 0);
    wrong("keys too narrow", kvoyant_sequence_write(sequence, 0, PROMPT, &narrow, &good), KVOYANT_STATUS_SHAPE);
    wrong("values flat", kvoyant_sequence_write(sequence, 0, PROMPT, &good, &flat), KVOYANT_STATUS_SHAPE);
    wrong("nine dimensions", kvoyant_sequence_write(sequence, 0, PROMPT, &many, &good), KVOYANT_STATUS_SHAPE);
    wrong("more than memory", kvoyant_sequence_write(sequence, 0, PROMPT, &huge, &huge), KVOYANT_STATUS_SHAPE);
    wrong("keys of bytes", kvoyant_sequence_write(sequence, 0, PROMPT, &bytes, &good), KVOYANT_STATUS_DTYPE);
    wrong("keys null", kvoyant_sequence_write(sequence, 0, PROMPT, NULL, &good), KVOYANT_STATUS_ARGUMENT);
    wrong("data null", kvoyant_sequence_write(sequence, 0, PROMPT, &nothing, &good), KVOYANT_STATUS_ARGUMENT);
    wrong("data askew", kvoyant_sequence_write(sequence, 0, PROMPT, &askew, &good), KVOYANT_STATUS_ARGUMENT);
    wrong("no such layer", kvoyant_sequence_write(sequence, LAYERS, PROMPT, &good, &good), KVOYANT_STATUS_ARGUMENT);
    wrong("no room", kvoyant_sequence_write(sequence, 0, 100000, &good, &good), KVOYANT_STATUS_NO_ROOM);
    kvoyant_tensor rows = tensor(values, KVOYANT_DTYPE_F16, 2, 1, ROW, 0);
    wrong("rows of another type", kvoyant_sequence_write_rows(sequence, 0, 0, PROMPT, &rows), KVOYANT_STATUS_DTYPE);
    rows = tensor(values, KVOYANT_DTYPE_F32, 2, 1, ROW + 1, 0);
    wrong("rows too wide", kvoyant_sequence_write_rows(sequence, 0, 0, PROMPT, &rows), KVOYANT_STATUS_SHAPE);
    float row[ROW];
    wrong("too little room", kvoyant_sequence_read(sequence, 0, 0, 0, 2, row, sizeof row), KVOYANT_STATUS_SHAPE);
    kvoyant_pending pending;
    wrong("query too narrow", ask(model, sequence, good, &pending), KVOYANT_STATUS_SHAPE);
    wrong("query of halves", ask(model, sequence, tensor(values, KVOYANT_DTYPE_F16, 2, QUERY_HEADS, HEAD_DIM, 0), &pending),
          KVOYANT_STATUS_DTYPE);
    uint64_t past = 100000;
    wrong("append past the room", kvoyant_append(model, &sequence, &past, 1), KVOYANT_STATUS_NO_ROOM);
    kvoyant_sequence twice[2] = {sequence, sequence};
    uint64_t counts[2] = {1, 1};
    wrong("append twice at once", kvoyant_append(model, twice, counts, 2), KVOYANT_STATUS_ARGUMENT);
}

static void pointers(kvoyant_model model, const char *socket) {
    kvoyant_model other;
    kvoyant_sequence sequence;
    kvoyant_options options = {.size = 3};
    struct {
        kvoyant_options known;
        uint64_t later;
    } newer = {{.size = sizeof newer}, 1};
    kvoyant_spec empty = {.size = sizeof empty};
    static const char *const methods[] = {"clairvoyance"};
    kvoyant_spec spec = {.size = sizeof spec, .fingerprint = "0123456789abcdef0123456789abcdef", .layers = 1, .query_heads = 1, .kv_heads = 1, .head_dim = 32,
                         .window = 1, .methods = methods, .methods_count = 1};
    wrong("nowhere to put it", kvoyant_sequence_open(model, 0, 1, NULL), KVOYANT_STATUS_ARGUMENT);
    wrong("no such method", kvoyant_sequence_open(model, 7, 1, &sequence), KVOYANT_STATUS_ARGUMENT);
    wrong("no socket", kvoyant_connect(NULL, NULL, &spec, &other), KVOYANT_STATUS_ARGUMENT);
    wrong("no spec", kvoyant_connect(socket, NULL, NULL, &other), KVOYANT_STATUS_ARGUMENT);
    wrong("size not set", kvoyant_connect(socket, &options, &spec, &other), KVOYANT_STATUS_ARGUMENT);
    wrong("a newer header", kvoyant_connect(socket, &newer.known, &spec, &other), KVOYANT_STATUS_ARGUMENT);
    wrong("nobody there", kvoyant_connect("/nowhere/kvoyantd.sock", NULL, &spec, &other), KVOYANT_STATUS_CONNECT);
    wrong("an empty model", kvoyant_connect(socket, NULL, &empty, &other), KVOYANT_STATUS_REFUSED);
    wrong("an unknown method", kvoyant_connect(socket, NULL, &spec, &other), KVOYANT_STATUS_REFUSED);
    spec.dtype = 77;
    wrong("an unknown dtype", kvoyant_connect(socket, NULL, &spec, &other), KVOYANT_STATUS_DTYPE);
    must(kvoyant_connect(socket, NULL, &(kvoyant_spec){.size = sizeof spec, .fingerprint = "0123456789abcdef0123456789abcdef", .layers = 1, .query_heads = 1, .kv_heads = 1,
                                                       .head_dim = 32, .window = 1,
                                                       .methods = (const char *const[]){"full"}, .methods_count = 1},
                         &other), "connect");
    must(kvoyant_sequence_open(other, 0, 1, &sequence), "open");
    uint64_t one = 1;
    wrong("another model's sequence", kvoyant_append(model, &sequence, &one, 1), KVOYANT_STATUS_ARGUMENT);
    must(kvoyant_model_close(other), "close");
    wrong("a sequence of a closed model", kvoyant_sequence_truncate(sequence, 0), KVOYANT_STATUS_HANDLE);
}

// Requests that a daemon would take for an attack, and end the session for.
static void requests(kvoyant_model model, kvoyant_sequence sequence, kvoyant_tensor query) {
    kvoyant_pending pending;
    kvoyant_member members[2] = {{.sequence = sequence, .position = PROMPT, .query = query},
                                 {.sequence = sequence, .position = PROMPT}};
    kvoyant_request request = {.size = sizeof request, .layer = 0, .members = members, .members_count = 1};
    wrong("a dense layer", kvoyant_speculate(model, &request, &pending), KVOYANT_STATUS_ARGUMENT);
    request.layer = 1, request.members_count = 2;
    wrong("a member without a query", kvoyant_speculate(model, &request, &pending), KVOYANT_STATUS_ARGUMENT);
    request.members = &members[1], request.members_count = 1;
    wrong("no query at all", kvoyant_speculate(model, &request, &pending), KVOYANT_STATUS_ARGUMENT);
    request.ask = KVOYANT_ASK_REST;
    wrong("a rest without a query", kvoyant_speculate(model, &request, &pending), KVOYANT_STATUS_ARGUMENT);
    float weights[KV_HEADS * PROMPT] = {0};
    kvoyant_tensor rows = tensor(weights, KVOYANT_DTYPE_F32, 2, KV_HEADS, PROMPT, 0);
    wrong("attention for who learns from none", kvoyant_sequence_feedback(sequence, 1, PROMPT, 0, &rows), KVOYANT_STATUS_ARGUMENT);
    wrong("attention of a dense layer", kvoyant_sequence_feedback(sequence, 0, PROMPT, 0, &rows), KVOYANT_STATUS_ARGUMENT);
    uint8_t marks[2] = {1, 200};
    wrong("no such mark", kvoyant_sequence_mark(sequence, PROMPT, marks + 1, 1), KVOYANT_STATUS_SHAPE);
    wrong("a mark too late", kvoyant_sequence_mark(sequence, 0, marks, 1), KVOYANT_STATUS_SHAPE);
}

static void *truncate_it(void *sequence) {
    // The daemon stands still, so that this call does, too, once it is not told itself that the other thread is reading.
    kvoyant_status status;
    do {
        status = kvoyant_sequence_truncate(*(kvoyant_sequence *)sequence, PROMPT);
    } while (status == KVOYANT_STATUS_CONCURRENT);
    must(status, "truncate");
    return NULL;
}

static void threads(kvoyant_model model, kvoyant_sequence sequence, pid_t daemon) {
    pthread_t other;
    float row[ROW];
    kvoyant_status status;
    if (kill(daemon, SIGSTOP) != 0 || pthread_create(&other, NULL, truncate_it, &sequence) != 0) exit(1);
    do {
        status = kvoyant_sequence_read(sequence, 0, 0, 0, 1, row, sizeof row);
    } while (status == KVOYANT_STATUS_OK);
    wrong("two threads, one truncates", status, KVOYANT_STATUS_CONCURRENT);
    uint64_t one = 1;
    wrong("two threads, both change", kvoyant_append(model, &sequence, &one, 1), KVOYANT_STATUS_CONCURRENT);
    wrong("two threads, one closes", kvoyant_sequence_close(sequence), KVOYANT_STATUS_CONCURRENT);
    if (kill(daemon, SIGCONT) != 0 || pthread_join(other, NULL) != 0) exit(1);
    must(kvoyant_sequence_read(sequence, 0, 0, 0, 1, row, sizeof row), "afterwards");
}

static void child(kvoyant_model model, kvoyant_sequence sequence, const char *socket) {
    fflush(stdout);
    pid_t pid = fork();
    if (pid == 0) {
        kvoyant_sequence opened;
        uint64_t one = 1;
        wrong("a parent's model in a child", kvoyant_sequence_open(model, 0, 1, &opened), KVOYANT_STATUS_FORKED);
        wrong("a parent's sequence in a child", kvoyant_append(model, &sequence, &one, 1), KVOYANT_STATUS_FORKED);
        wrong("a parent's model closed in a child", kvoyant_model_close(model), KVOYANT_STATUS_FORKED);
        // A session of its own is what a child may have.
        kvoyant_model own = connect_toy(socket, "a child");
        must(kvoyant_sequence_open(own, 0, PROMPT, &opened), "open in the child");
        prefill(own, opened, 5);
        must(kvoyant_model_close(own), "close in the child");
        fflush(stdout);
        _exit(unexpected);
    }
    int status = 0;
    if (pid < 0 || waitpid(pid, &status, 0) != pid || !WIFEXITED(status) || WEXITSTATUS(status) != 0) {
        fprintf(stderr, "the child ended with %#x\n", (unsigned)status);
        unexpected = 1;
    }
}

int main(int argc, char **argv) {
    if (argc < 3) return 2;
    kvoyant_model model = connect_toy(argv[1], "misuse.c");
    kvoyant_sequence sequence;
    float values[QUERY_HEADS * HEAD_DIM + 1];
    fill_values(values, QUERY_HEADS * HEAD_DIM, 1, 1, 2);
    kvoyant_tensor query = tensor(values, KVOYANT_DTYPE_F32, 2, QUERY_HEADS, HEAD_DIM, 0);
    must(kvoyant_sequence_open(model, 0, PROMPT + 1, &sequence), "open");
    prefill(model, sequence, 3);
    closed(model, sequence, query);
    arrays(model, sequence, values);
    requests(model, sequence, query);
    pointers(model, argv[1]);
    threads(model, sequence, (pid_t)atoi(argv[2]));
    child(model, sequence, argv[1]);
    // After all that the session is as it was.
    kvoyant_pending pending;
    kvoyant_ready ready;
    must(ask(model, sequence, query, &pending), "ask");
    must(kvoyant_wait(pending, PATIENCE_NS, &ready), "wait");
    must(kvoyant_model_close(model), "close");
    wrong("an answer of a closed model", kvoyant_ready_release(ready), KVOYANT_STATUS_HANDLE);
    return unexpected;
}
