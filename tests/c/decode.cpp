// Decodes two sequences in two threads of one session, with handles that close themselves. Prints each sequence's tokens in a line.
//
// usage: decode SOCKET
#include "toy.h"

#include <array>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

namespace {

void check(kvoyant_status status) {
    if (status == KVOYANT_STATUS_OK) return;
    throw std::runtime_error(std::string(kvoyant_status_name(static_cast<std::uint32_t>(status))) + ": " + kvoyant_last_error());
}

// A handle that ends with its scope.
template <class Handle, kvoyant_status (*End)(Handle)>
class Owned {
public:
    Owned() : handle{} {}
    explicit Owned(Handle handle) : handle(handle) {}
    Owned(const Owned &) = delete;
    Owned &operator=(const Owned &) = delete;
    ~Owned() {
        if (handle.id != 0) End(handle);
    }
    Handle *out() { return &handle; }
    Handle get() const { return handle; }

private:
    Handle handle;
};

using Model = Owned<kvoyant_model, kvoyant_model_close>;
using Sequence = Owned<kvoyant_sequence, kvoyant_sequence_close>;
using Ready = Owned<kvoyant_ready, kvoyant_ready_release>;

std::vector<std::uint32_t> decode(kvoyant_model model, std::uint32_t seed) {
    Sequence sequence;
    check(kvoyant_sequence_open(model, 0, ROOM, sequence.out()));
    prefill(model, sequence.get(), seed);
    std::vector<std::uint32_t> tokens;
    std::uint32_t token = prompt_token(seed, PROMPT);
    for (std::uint64_t position = PROMPT; tokens.size() < STEPS; position++) {
        std::uint32_t hash = 2166136261u;
        for (std::uint32_t layer = 0; layer < LAYERS; layer++) {
            std::array<float, QUERY_HEADS * HEAD_DIM> queries{};
            fill_values(queries.data(), QUERY_HEADS * HEAD_DIM, token, layer, 2);
            write_token(sequence.get(), layer, position, token);
            if (layer == 0) {
                hash = attend_layer(hash, nullptr, 0, sequence.get(), layer, position, queries.data());
                continue;
            }
            kvoyant_member member{};
            member.sequence = sequence.get();
            member.position = position;
            member.query = kvoyant_tensor{queries.data(), KVOYANT_DTYPE_F32, 2, {QUERY_HEADS, HEAD_DIM, 0, 0}};
            kvoyant_request request{};
            request.size = sizeof request;
            request.layer = layer;
            request.members = &member;
            request.members_count = 1;
            kvoyant_pending pending{};
            check(kvoyant_speculate(model, &request, &pending));
            Ready ready;
            check(kvoyant_wait(pending, PATIENCE_NS, ready.out()));
            kvoyant_table table{};
            table.size = sizeof table;
            check(kvoyant_ready_table(ready.get(), &table));
            hash = attend_layer(hash, &table, 0, sequence.get(), layer, position, queries.data());
        }
        append_one(model, sequence.get(), 1);
        token = hash % 32000u;
        tokens.push_back(token);
    }
    return tokens;
}

}  // namespace

int main(int argc, char **argv) {
    if (argc < 2) return 2;
    Model model(connect_toy(argv[1], "decode.cpp"));
    std::array<std::vector<std::uint32_t>, 2> tokens;
    std::array<std::string, 2> failed;
    std::vector<std::thread> threads;
    for (std::uint32_t seed = 0; seed < 2; seed++) {
        threads.emplace_back([&, seed] {
            try {
                tokens[seed] = decode(model.get(), seed);
            } catch (const std::exception &error) {
                failed[seed] = error.what();
            }
        });
    }
    for (auto &thread : threads) thread.join();
    for (std::size_t seed = 0; seed < 2; seed++) {
        if (!failed[seed].empty()) {
            std::fprintf(stderr, "sequence %zu: %s\n", seed, failed[seed].c_str());
            return 1;
        }
        for (std::size_t at = 0; at < tokens[seed].size(); at++)
            std::printf("%u%c", tokens[seed][at], at + 1 == tokens[seed].size() ? '\n' : ' ');
    }
    return 0;
}
