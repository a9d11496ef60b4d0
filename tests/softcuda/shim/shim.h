// What a C++ compiler needs to take a CUDA source for its own: the keywords, the built-in variables and the intrinsics that
// kernels/cuda/*.cu use. Threads of a block are fibers of one OS thread, so barriers and warp collectives work as on a device.
#pragma once

#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#define KV_SHIM 1
#define KV_UNROLL
#define KV_LOOP
#define KV_DYNAMIC_SHARED(name) unsigned char* name = kv_self->block->shared

#define __global__ __attribute__((visibility("hidden")))
#define __device__
#define __host__
#define __constant__ static
// Blocks of one OS thread run one after the other.
#define __shared__ static thread_local
#define __forceinline__ inline __attribute__((always_inline))
#define __noinline__ __attribute__((noinline))
#define __align__(bytes) __attribute__((aligned(bytes)))
#define __launch_bounds__(...)

struct kv_dim3 {
    uint32_t x, y, z;
};

struct kv_block {
    kv_dim3 grid, size, index;
    unsigned char* shared;
};

struct kv_warp;

enum kv_state : uint32_t { KV_FRESH, KV_READY, KV_AT_WARP, KV_AT_BLOCK, KV_DONE };

// A thread of a block.
struct kv_fiber {
    kv_dim3 thread;
    kv_state state;
    // Which round of its warp's or block's barrier it waits for the end of.
    uint32_t round;
    uint32_t lane;
    kv_warp* warp;
    kv_block* block;
    void* stack_pointer;
    unsigned char* stack;
};

// The running thread. Initial-exec, because it is read all the time; 8 bytes fit into what the loader keeps free for that.
extern __thread kv_fiber* kv_self __attribute__((tls_model("initial-exec"), visibility("hidden")));

// Waits for the block's other threads.
void kv_sync_block();
// Leaves a word and waits for those of the warp's other lanes that have not ended; the words lie at the result, by lane. Only whole
// warps may do this: the masks that kernels give are full.
const uint64_t* kv_exchange(uint32_t mask, uint64_t word);
// Lanes of the calling warp that have not ended.
uint32_t kv_live_lanes();

#define threadIdx (kv_self->thread)
#define blockIdx (kv_self->block->index)
#define blockDim (kv_self->block->size)
#define gridDim (kv_self->block->grid)

static inline void __syncthreads() {
    kv_sync_block();
}

static inline void __syncwarp(uint32_t mask = 0xffffffffu) {
    kv_exchange(mask, 0);
}

template <typename T>
static inline T kv_shuffle(uint32_t mask, T value, uint32_t from) {
    static_assert(sizeof(T) <= 8, "a shuffle moves 8 bytes at most");
    uint64_t word = 0;
    memcpy(&word, &value, sizeof(T));
    const uint64_t* words = kv_exchange(mask, word);
    if (from < 32) {
        memcpy(&value, &words[from], sizeof(T));
    }
    return value;
}

template <typename T>
static inline T __shfl_sync(uint32_t mask, T value, uint32_t lane) {
    return kv_shuffle(mask, value, lane % 32);
}

template <typename T>
static inline T __shfl_xor_sync(uint32_t mask, T value, uint32_t bits) {
    return kv_shuffle(mask, value, kv_self->lane ^ bits);
}

template <typename T>
static inline T __shfl_up_sync(uint32_t mask, T value, uint32_t apart) {
    uint32_t lane = kv_self->lane;
    return kv_shuffle(mask, value, lane >= apart ? lane - apart : lane);
}

template <typename T>
static inline T __shfl_down_sync(uint32_t mask, T value, uint32_t apart) {
    uint32_t lane = kv_self->lane;
    return kv_shuffle(mask, value, lane + apart < 32 ? lane + apart : lane);
}

static inline uint32_t __ballot_sync(uint32_t mask, int vote) {
    uint32_t lanes = mask & kv_live_lanes();
    const uint64_t* words = kv_exchange(mask, vote != 0);
    uint32_t ballot = 0;
    for (uint32_t lane = 0; lane < 32; lane++) {
        ballot |= (lanes >> lane & 1) && words[lane] ? 1u << lane : 0;
    }
    return ballot;
}

static inline int __any_sync(uint32_t mask, int vote) {
    return __ballot_sync(mask, vote) != 0;
}

static inline int __all_sync(uint32_t mask, int vote) {
    return __ballot_sync(mask, !vote) == 0;
}

template <typename T>
static inline T atomicAdd(T* word, T value) {
    return __atomic_fetch_add(word, value, __ATOMIC_RELAXED);
}

template <typename T>
static inline T atomicOr(T* word, T value) {
    return __atomic_fetch_or(word, value, __ATOMIC_RELAXED);
}

template <typename T>
static inline T atomicCAS(T* word, T expected, T value) {
    __atomic_compare_exchange_n(word, &expected, value, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED);
    return expected;
}

template <typename T>
static inline T atomicMax(T* word, T value) {
    T seen = __atomic_load_n(word, __ATOMIC_RELAXED);
    while (seen < value && !__atomic_compare_exchange_n(word, &seen, value, true, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
    }
    return seen;
}

static inline void __threadfence() {
    __atomic_thread_fence(__ATOMIC_SEQ_CST);
}

static inline void __threadfence_system() {
    __atomic_thread_fence(__ATOMIC_SEQ_CST);
}

static inline float __uint_as_float(uint32_t bits) {
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

static inline uint32_t __float_as_uint(float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    return bits;
}

static inline int __popc(uint32_t bits) {
    return __builtin_popcount(bits);
}

static inline int __popcll(uint64_t bits) {
    return __builtin_popcountll(bits);
}

template <typename T>
static inline T __ldg(const T* address) {
    return *address;
}

// Never contracted to a fused multiply-add: the build turns that off.
static inline float __fmul_rn(float a, float b) {
    return a * b;
}

static inline float __fadd_rn(float a, float b) {
    return a + b;
}

template <typename T>
static inline T min(T a, T b) {
    return b < a ? b : a;
}

template <typename T>
static inline T max(T a, T b) {
    return a < b ? b : a;
}

// A kernel as softcuda sees it.
struct kv_entry {
    const char* source;
    const char* name;
    size_t params_bytes;
};

// A kernel and how to call it for one thread.
struct kv_kernel {
    kv_entry entry;
    void (*call)(const void* params);
};

struct kv_source {
    const kv_kernel* kernels;
    size_t count;
};

// For the end of a source's .cpp: KV_SOURCE(name, KV_ENTRY(name, kernel, Params), ...).
#define KV_ENTRY(source, kernel, Params) \
    { {#source, #kernel, sizeof(Params)}, [](const void* params) { kernel(*(const Params*)params); } }
#define KV_SOURCE(source, ...)                                        \
    static const kv_kernel kernels_of_##source[] = {__VA_ARGS__};     \
    extern const kv_source kv_source_##source;                        \
    const kv_source kv_source_##source = {                            \
        kernels_of_##source, sizeof(kernels_of_##source) / sizeof(kernels_of_##source[0])};
