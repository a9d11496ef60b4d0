// Runs a grid: block after block, the threads of a block as fibers that give way at barriers only.
#include "shim.h"

#include <pthread.h>
#include <stdlib.h>
#include <sys/mman.h>

#include "fiber.h"

static const uint32_t LANES = 32;
static const uint32_t THREADS_MAX = 1024;
static const size_t SHARED_MAX = 227 << 10;
static const size_t STACK_BYTES = 256 << 10;
// At a stack's far end; whoever overwrites it went too deep.
static const uint64_t CANARY = 0x6b766f79616e7421;

enum { OK = 0, NO_SUCH_KERNEL = 1, BAD_GEOMETRY = 2, STUCK = 3, STACK_OVERFLOW = 4, OUT_OF_MEMORY = 5, PARTIAL_WARP = 6 };

__thread kv_fiber* kv_self;

struct kv_warp {
    uint32_t live, arrived, round;
    // Of this round and the last one: a lane may be one collective ahead, never two.
    uint64_t words[2][LANES];
};

// What an OS thread keeps between launches.
struct Machine {
    kv_fiber fibers[THREADS_MAX];
    kv_warp warps[THREADS_MAX / LANES];
    kv_block block;
    uint32_t threads, done, arrived, round;
    const kv_kernel* kernel;
    const void* params;
    void* stack_pointer;
    uint32_t ended;
    bool overflow, partial;
    unsigned char* stacks[THREADS_MAX];
    uint32_t free_stacks, all_stacks;
    unsigned char* shared;
};

static __thread Machine* machine __attribute__((tls_model("initial-exec")));
static pthread_once_t once = PTHREAD_ONCE_INIT;
static pthread_key_t key;

static void drop_machine(void* kept) {
    Machine* m = (Machine*)kept;
    for (uint32_t i = 0; i < m->free_stacks; i++) {
        munmap(m->stacks[i], STACK_BYTES);
    }
    free(m->shared);
    free(m);
}

static void make_key() {
    pthread_key_create(&key, drop_machine);
}

static Machine* this_machine() {
    if (machine == nullptr) {
        pthread_once(&once, make_key);
        Machine* m = (Machine*)calloc(1, sizeof(Machine));
        if (m == nullptr || posix_memalign((void**)&m->shared, 128, SHARED_MAX) != 0) {
            free(m);
            return nullptr;
        }
        pthread_setspecific(key, m);
        machine = m;
    }
    return machine;
}

static bool is_runnable(const kv_fiber& fiber) {
    switch (fiber.state) {
        case KV_FRESH:
        case KV_READY:
            return true;
        case KV_AT_WARP:
            return fiber.warp->round != fiber.round;
        case KV_AT_BLOCK:
            return machine->round != fiber.round;
        default:
            return false;
    }
}

// The next thread that can go on, from `from` around the block; null when there is none.
static kv_fiber* next_runnable(uint32_t from, uint32_t first, uint32_t count, bool fresh) {
    for (uint32_t i = 0; i < count; i++) {
        uint32_t index = first + (from - first + i) % count;
        kv_fiber* fiber = &machine->fibers[index];
        if (is_runnable(*fiber) && (fresh || fiber->state != KV_FRESH)) {
            return fiber;
        }
    }
    return nullptr;
}

static void end_rounds(kv_warp* warp) {
    if (warp->arrived > 0 && warp->arrived == (uint32_t)__builtin_popcount(warp->live)) {
        warp->arrived = 0;
        warp->round++;
    }
    if (machine->arrived > 0 && machine->arrived == machine->threads - machine->done) {
        machine->arrived = 0;
        machine->round++;
    }
}

static void fiber_main() {
    machine->kernel->call(machine->params);
    kv_fiber* self = kv_self;
    self->state = KV_DONE;
    self->warp->live &= ~(1u << self->lane);
    machine->done++;
    end_rounds(self->warp);
    uint64_t canary;
    memcpy(&canary, self->stack, 8);
    machine->overflow |= canary != CANARY;
    machine->ended = (uint32_t)(self - machine->fibers);
    // The scheduler hands this stack to the next thread: without barriers a whole grid runs on one.
    kv_switch(&self->stack_pointer, machine->stack_pointer);
    __builtin_unreachable();
}

// Lets others run until this thread can go on: first those of its own warp, which it most likely waits for.
static void give_way(kv_fiber* self) {
    uint32_t index = (uint32_t)(self - machine->fibers);
    uint32_t first = index - self->lane;
    uint32_t lanes = machine->threads - first < LANES ? machine->threads - first : LANES;
    while (!is_runnable(*self)) {
        kv_fiber* next = next_runnable(first + (index - first + 1) % lanes, first, lanes, false);
        if (next == nullptr) {
            machine->ended = index;
            kv_switch(&self->stack_pointer, machine->stack_pointer);
        } else {
            kv_self = next;
            kv_switch(&self->stack_pointer, next->stack_pointer);
        }
    }
    self->state = KV_READY;
}

void kv_sync_block() {
    kv_fiber* self = kv_self;
    self->round = machine->round;
    self->state = KV_AT_BLOCK;
    machine->arrived++;
    end_rounds(self->warp);
    give_way(self);
}

uint32_t kv_live_lanes() {
    return kv_self->warp->live;
}

const uint64_t* kv_exchange(uint32_t mask, uint64_t word) {
    kv_fiber* self = kv_self;
    kv_warp* warp = self->warp;
    if (mask != ~0u) {
        machine->partial = true;
    }
    const uint32_t round = warp->round;
    warp->words[round & 1][self->lane] = word;
    self->round = round;
    self->state = KV_AT_WARP;
    warp->arrived++;
    end_rounds(warp);
    give_way(self);
    return warp->words[round & 1];
}

static bool give_stack(kv_fiber* fiber) {
    if (machine->free_stacks == 0) {
        void* stack = mmap(
            nullptr, STACK_BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (stack == MAP_FAILED) {
            return false;
        }
        machine->stacks[machine->free_stacks++] = (unsigned char*)stack;
    }
    fiber->stack = machine->stacks[--machine->free_stacks];
    memcpy(fiber->stack, &CANARY, 8);
    fiber->stack_pointer = kv_new_stack(fiber->stack, STACK_BYTES, fiber_main);
    fiber->state = KV_READY;
    return true;
}

static int run_block() {
    Machine* m = machine;
    uint32_t index = 0;
    for (uint32_t z = 0; z < m->block.size.z; z++) {
        for (uint32_t y = 0; y < m->block.size.y; y++) {
            for (uint32_t x = 0; x < m->block.size.x; x++, index++) {
                kv_warp* warp = &m->warps[index / LANES];
                if (index % LANES == 0) {
                    warp->live = warp->arrived = warp->round = 0;
                }
                warp->live |= 1u << index % LANES;
                m->fibers[index] = {{x, y, z}, KV_FRESH, 0, index % LANES, warp, &m->block, nullptr, nullptr};
            }
        }
    }
    m->done = m->arrived = m->round = m->ended = 0;
    int result = OK;
    while (m->done < m->threads) {
        kv_fiber* next = next_runnable((m->ended + 1) % m->threads, 0, m->threads, true);
        if (next == nullptr) {
            result = STUCK;
            break;
        }
        if (next->state == KV_FRESH && !give_stack(next)) {
            result = OUT_OF_MEMORY;
            break;
        }
        kv_self = next;
        kv_switch(&m->stack_pointer, next->stack_pointer);
        kv_fiber* ended = &m->fibers[m->ended];
        if (ended->state == KV_DONE && ended->stack != nullptr) {
            m->stacks[m->free_stacks++] = ended->stack;
            ended->stack = nullptr;
        }
    }
    // Of threads that are given up only the stacks are left.
    for (uint32_t i = 0; i < m->threads; i++) {
        if (m->fibers[i].stack != nullptr) {
            m->stacks[m->free_stacks++] = m->fibers[i].stack;
        }
    }
    return m->overflow ? STACK_OVERFLOW : m->partial ? PARTIAL_WARP : result;
}

#define KV_SOURCES(each) each(attend) each(codes) each(dequantise) each(gather) each(merge) each(residency) each(score) each(select)

#define KV_DECLARE(name) extern const kv_source kv_source_##name;
KV_SOURCES(KV_DECLARE)

#define KV_ADDRESS(name) &kv_source_##name,
static const kv_source* const sources[] = {KV_SOURCES(KV_ADDRESS)};

static const size_t ENTRIES_MAX = 64;
static kv_entry entries[ENTRIES_MAX];
static const kv_kernel* kernels[ENTRIES_MAX];
static size_t entry_count;
static pthread_once_t listed = PTHREAD_ONCE_INIT;

static void list_entries() {
    for (const kv_source* source : sources) {
        for (size_t i = 0; i < source->count && entry_count < ENTRIES_MAX; i++) {
            kernels[entry_count] = &source->kernels[i];
            entries[entry_count++] = source->kernels[i].entry;
        }
    }
}

extern "C" __attribute__((visibility("hidden"))) const kv_entry* kv_shim_entries(size_t* count) {
    pthread_once(&listed, list_entries);
    *count = entry_count;
    return entries;
}

extern "C" __attribute__((visibility("hidden"))) int kv_shim_run(
    size_t index, const void* params, const uint32_t grid[3], const uint32_t block[3], size_t shared_bytes) {
    pthread_once(&listed, list_entries);
    if (index >= entry_count) {
        return NO_SUCH_KERNEL;
    }
    uint64_t threads = (uint64_t)block[0] * block[1] * block[2];
    bool fits = block[0] <= THREADS_MAX && block[1] <= THREADS_MAX && block[2] <= 64 && threads <= THREADS_MAX;
    if (threads == 0 || !fits || shared_bytes > SHARED_MAX || grid[0] == 0 || grid[1] == 0 || grid[2] == 0) {
        return BAD_GEOMETRY;
    }
    Machine* m = this_machine();
    if (m == nullptr) {
        return OUT_OF_MEMORY;
    }
    m->kernel = kernels[index];
    m->params = params;
    m->threads = (uint32_t)threads;
    m->overflow = m->partial = false;
    m->block.grid = {grid[0], grid[1], grid[2]};
    m->block.size = {block[0], block[1], block[2]};
    m->block.shared = m->shared;
    int result = OK;
    for (uint32_t z = 0; z < grid[2] && result == OK; z++) {
        for (uint32_t y = 0; y < grid[1] && result == OK; y++) {
            for (uint32_t x = 0; x < grid[0] && result == OK; x++) {
                m->block.index = {x, y, z};
                // All ones are NaN: a value that was never written shows.
                memset(m->shared, 0xff, shared_bytes);
                result = run_block();
            }
        }
    }
    kv_self = nullptr;
    return result;
}
