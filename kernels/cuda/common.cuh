// What every kernel source begins with: types, stored values, and the loop over scattered rows that attention and scores share.
//
// A source is this text and one .cu text, one behind the other, without any #include: NVRTC compiles it as it stands, and a C++
// compiler does through the shim of the tests. Every kernel takes one structure by value, which kernels/src/cuda/params.rs mirrors;
// device addresses in it are 64-bit integers.

#define KV_DEVICE static __device__ __forceinline__
#ifndef KV_SHIM
#define KV_DYNAMIC_SHARED(name) extern __shared__ __align__(16) unsigned char name[]
#define KV_UNROLL _Pragma("unroll")
#define KV_LOOP _Pragma("unroll 1")
// No source uses all of this text.
#pragma nv_diag_suppress 177
#endif

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef signed char i8;
typedef int i32;

// Threads of a block in every kernel that works on rows.
static const u32 THREADS = 128;
static const u32 WARP = 32;
static const u32 WARPS = THREADS / WARP;
static const u32 ALL_LANES = 0xffffffffu;
// Largest head dimension: two values of the output per thread.
static const u32 HEAD_DIM_MAX = 2 * THREADS;
// Query heads that share one loading of the rows; a larger group is split over blocks.
static const u32 GROUP_MAX = 8;

// 16 bytes, loaded and stored at once.
struct __align__(16) Vec16 {
    u32 x[4];
};

template <typename T>
KV_DEVICE T* at(u64 address) {
    return (T*)address;
}

KV_DEVICE float float_of(u32 bits) {
    return __uint_as_float(bits);
}

KV_DEVICE float negative_infinity() {
    return float_of(0xff800000u);
}

KV_DEVICE u32 smaller(u32 a, u32 b) {
    return a < b ? a : b;
}

// A word that another processor writes: loaded once, and nothing after it in program order is loaded before it.
KV_DEVICE u64 load_acquire(u64 address) {
#ifdef __CUDA_ARCH__
    u64 value;
    asm volatile("ld.acquire.sys.global.u64 %0, [%1];" : "=l"(value) : "l"(address) : "memory");
    return value;
#else
    return __atomic_load_n(at<u64>(address), __ATOMIC_ACQUIRE);
#endif
}

// A word that another processor reads: whoever sees it sees all that this thread wrote before.
KV_DEVICE void store_release(u64 address, u64 value) {
#ifdef __CUDA_ARCH__
    asm volatile("st.release.sys.global.u64 [%0], %1;" : : "l"(address), "l"(value) : "memory");
#else
    __atomic_store_n(at<u64>(address), value, __ATOMIC_RELEASE);
#endif
}

// ---- Stored values. The codes are those of kvoyant_kernels::Dtype. ----

enum { F32 = 0, F16 = 1, BF16 = 2 };

KV_DEVICE u32 dtype_bytes(u32 dtype) {
    return dtype == F32 ? 4 : 2;
}

KV_DEVICE float f16_to_f32(u16 half) {
#ifdef __CUDA_ARCH__
    float value;
    asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(half));
    return value;
#else
    // The exponent is 112 too small after the shift; the multiplication mends it, of subnormal values too.
    u32 magnitude = (u32)(half & 0x7fff) << 13;
    u32 sign = (u32)(half & 0x8000) << 16;
    if (magnitude >= 0x7c00u << 13) {
        return float_of(sign | 0x70000000u | magnitude);
    }
    return float_of(sign | __float_as_uint(float_of(magnitude) * float_of(0x77800000u)));
#endif
}

// Rounds to the nearest, ties to even.
KV_DEVICE u16 f32_to_f16(float value) {
#ifdef __CUDA_ARCH__
    u16 half;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(half) : "f"(value));
    return half;
#else
    u32 bits = __float_as_uint(value);
    u16 sign = (u16)((bits >> 16) & 0x8000);
    u32 magnitude = bits & 0x7fffffff;
    if (magnitude > 0x7f800000u) {
        return (u16)(sign | 0x7e00 | ((magnitude >> 13) & 0x3ff));
    }
    if (magnitude >= 0x477ff000u) {
        return (u16)(sign | 0x7c00);
    }
    if (magnitude < 0x38800000u) {
        // Subnormal: adding 0.5 leaves a multiple of 2^-24 in the low bits, rounded by the addition.
        float shifted = float_of(magnitude) + 0.5f;
        return (u16)(sign | (__float_as_uint(shifted) - 0x3f000000u));
    }
    u32 rounded = magnitude - 0x38000000u + 0xfff + ((magnitude >> 13) & 1);
    return (u16)(sign | (rounded >> 13));
#endif
}

KV_DEVICE float bf16_to_f32(u16 bits) {
    return float_of((u32)bits << 16);
}

// Rounds to the nearest, ties to even; a NaN stays one.
KV_DEVICE u16 f32_to_bf16(float value) {
    u32 bits = __float_as_uint(value);
    if ((bits & 0x7fffffff) > 0x7f800000u) {
        return (u16)(bits >> 16 | 0x40);
    }
    return (u16)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

// 1 sign bit, 4 of exponent (bias 7), 3 of mantissa; no infinities, 0x7f and 0xff are NaN. Exact.
KV_DEVICE float fp8_e4m3_to_f32(u8 code) {
    if ((code & 0x7f) == 0x7f) {
        return float_of((u32)(code & 0x80) << 24 | 0x7fc00000u);
    }
    return f16_to_f32((u16)((code & 0x80) << 8 | (code & 0x7f) << 7)) * 256.0f;
}

// Values of one 16-byte vector: 4 of f32, 8 of the others.
template <u32 DTYPE>
struct Stored {
    static const u32 BYTES = DTYPE == F32 ? 4 : 2;
    static const u32 LANES = 16 / BYTES;
};

template <u32 DTYPE>
KV_DEVICE void unpack(const Vec16& packed, float* values) {
    KV_UNROLL
    for (u32 i = 0; i < 4; i++) {
        u32 word = packed.x[i];
        if (DTYPE == F32) {
            values[i] = float_of(word);
        } else if (DTYPE == F16) {
            values[2 * i] = f16_to_f32((u16)word);
            values[2 * i + 1] = f16_to_f32((u16)(word >> 16));
        } else {
            values[2 * i] = float_of(word << 16);
            values[2 * i + 1] = float_of(word & 0xffff0000u);
        }
    }
}

template <u32 DTYPE>
KV_DEVICE float stored_value(const u8* values, u32 index) {
    if (DTYPE == F32) {
        return ((const float*)values)[index];
    }
    u16 bits = ((const u16*)values)[index];
    return DTYPE == F16 ? f16_to_f32(bits) : bf16_to_f32(bits);
}

KV_DEVICE float load_value(u32 dtype, u64 address, u64 index) {
    if (dtype == F32) {
        return at<const float>(address)[index];
    }
    u16 bits = at<const u16>(address)[index];
    return dtype == F16 ? f16_to_f32(bits) : bf16_to_f32(bits);
}

KV_DEVICE void store_value(u32 dtype, u64 address, u64 index, float value) {
    if (dtype == F32) {
        at<float>(address)[index] = value;
    } else {
        at<u16>(address)[index] = dtype == F16 ? f32_to_f16(value) : f32_to_bf16(value);
    }
}

// ---- Within a warp and a block. ----

KV_DEVICE float warp_max(float value) {
    KV_UNROLL
    for (u32 apart = WARP / 2; apart > 0; apart /= 2) {
        value = fmaxf(value, __shfl_xor_sync(ALL_LANES, value, apart));
    }
    return value;
}

template <typename T>
KV_DEVICE T warp_sum(T value) {
    KV_UNROLL
    for (u32 apart = WARP / 2; apart > 0; apart /= 2) {
        value += __shfl_xor_sync(ALL_LANES, value, apart);
    }
    return value;
}

// Sum of the values of all lanes before this one.
KV_DEVICE u32 warp_sum_before(u32 value) {
    u32 lane = threadIdx.x % WARP, sum = value;
    KV_UNROLL
    for (u32 apart = 1; apart < WARP; apart *= 2) {
        u32 before = __shfl_up_sync(ALL_LANES, sum, apart);
        sum += lane >= apart ? before : 0;
    }
    return sum - value;
}

// ---- Runs of rows. ----

// `rows` rows one behind the other in memory.
struct RowRun {
    u64 address;
    u32 rows;
    u32 pad;
};
static_assert(sizeof(RowRun) == 16, "mirrored in params.rs");

// How the rows of a kernel are staged in shared memory, and where everything lies in it.
struct RowTile {
    // Rows of a tile, at most; bytes of a row that are staged, and bytes from one to the next.
    u32 rows, bytes, stride;
    u64* addresses;  // [rows]
    u64* bases;      // [THREADS]
    u32* ends;       // [THREADS]: rows of this run and all before it
    u32* sums;       // [WARPS]
    u8* data;        // [rows][stride]
};

// An odd number of 16-byte vectors: threads that read one row each then meet no bank twice.
KV_DEVICE u32 tile_stride(u32 bytes) {
    return ((bytes + 15) / 16 | 1) * 16;
}

KV_DEVICE u8* carve_tile(RowTile& tile, u8* shared, u32 rows, u32 bytes) {
    tile.rows = rows;
    tile.bytes = bytes;
    tile.stride = tile_stride(bytes);
    tile.data = shared;
    shared += rows * tile.stride;
    tile.bases = (u64*)shared;
    shared += THREADS * 8;
    tile.ends = (u32*)shared;
    shared += THREADS * 4;
    tile.sums = (u32*)shared;
    shared += WARPS * 4;
    tile.addresses = (u64*)shared;
    return shared + (rows * 8 + 15) / 16 * 16;
}

// Takes one run from each thread; gives the rows of all. Every thread of the block calls it.
KV_DEVICE u32 place_runs(const RowTile& tile, RowRun run) {
    u32 lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    u32 sum = warp_sum_before(run.rows) + run.rows;
    if (lane == WARP - 1) {
        tile.sums[warp] = sum;
    }
    __syncthreads();
    u32 total = 0;
    for (u32 i = 0; i < WARPS; i++) {
        sum += i < warp ? tile.sums[i] : 0;
        total += tile.sums[i];
    }
    tile.bases[threadIdx.x] = run.address;
    tile.ends[threadIdx.x] = sum;
    __syncthreads();
    return total;
}

// Address of a row among those that `place_runs` placed.
KV_DEVICE u64 placed_row(const RowTile& tile, u32 row, u32 row_bytes) {
    u32 low = 0, high = THREADS - 1;
    KV_LOOP
    while (low < high) {
        u32 middle = (low + high) / 2;
        if (tile.ends[middle] > row) {
            high = middle;
        } else {
            low = middle + 1;
        }
    }
    u32 first = low == 0 ? 0 : tile.ends[low - 1];
    return tile.bases[low] + (u64)(row - first) * row_bytes;
}

// Copies the first `tile.bytes` bytes of `n` rows into shared memory. Every thread of the block calls it.
KV_DEVICE void stage_rows(const RowTile& tile, u32 n) {
    const u32 AT_ONCE = 4;
    u32 vectors = tile.bytes / 16;
    u32 total = n * vectors;
    KV_LOOP
    for (u32 first = threadIdx.x; first < total; first += AT_ONCE * THREADS) {
        Vec16 loaded[AT_ONCE];
        KV_UNROLL
        for (u32 i = 0; i < AT_ONCE; i++) {
            u32 index = first + i * THREADS;
            if (index < total) {
                u64 address = tile.addresses[index / vectors] + index % vectors * 16;
                if (address % 16 == 0) {
                    loaded[i] = *at<const Vec16>(address);
                } else {
                    for (u32 j = 0; j < 4; j++) {
                        const u16* halves = at<const u16>(address) + 2 * j;
                        loaded[i].x[j] = halves[0] | (u32)halves[1] << 16;
                    }
                }
            }
        }
        KV_UNROLL
        for (u32 i = 0; i < AT_ONCE; i++) {
            u32 index = first + i * THREADS;
            if (index < total) {
                *(Vec16*)(tile.data + index / vectors * tile.stride + index % vectors * 16) = loaded[i];
            }
        }
    }
    // What is left of each row behind its last whole vector.
    u32 rest = (tile.bytes - vectors * 16) / 2;
    KV_LOOP
    for (u32 i = threadIdx.x; i < n * rest; i += THREADS) {
        u32 row = i / rest, offset = vectors * 16 + i % rest * 2;
        *(u16*)(tile.data + row * tile.stride + offset) = *at<const u16>(tile.addresses[row] + offset);
    }
}

// Dot products of `HEADS` queries in shared memory with one staged key.
template <u32 DTYPE, u32 HEADS>
KV_DEVICE void dot_heads(const float* queries, const u8* key, u32 d, float* sums) {
    const u32 LANES = Stored<DTYPE>::LANES;
    KV_UNROLL
    for (u32 h = 0; h < HEADS; h++) {
        sums[h] = 0.0f;
    }
    u32 whole = d / LANES * LANES;
    KV_LOOP
    for (u32 j = 0; j < whole; j += LANES) {
        float values[LANES];
        unpack<DTYPE>(*(const Vec16*)(key + j * Stored<DTYPE>::BYTES), values);
        KV_UNROLL
        for (u32 h = 0; h < HEADS; h++) {
            const float* query = queries + h * d + j;
            KV_UNROLL
            for (u32 i = 0; i < LANES; i++) {
                sums[h] += query[i] * values[i];
            }
        }
    }
    KV_LOOP
    for (u32 j = whole; j < d; j++) {
        float value = stored_value<DTYPE>(key, j);
        KV_UNROLL
        for (u32 h = 0; h < HEADS; h++) {
            sums[h] += queries[h * d + j] * value;
        }
    }
}

// Queries of `heads` heads in shared memory; those of others up to `G` are zero, and nobody looks at what comes of them.
template <u32 G>
KV_DEVICE void load_queries(float* loaded, u64 queries, u32 heads, u32 d) {
    KV_LOOP
    for (u32 i = threadIdx.x; i < G * d; i += THREADS) {
        loaded[i] = i < heads * d ? at<const float>(queries)[i] : 0.0f;
    }
}

// What can go wrong with a run of rows: bits of a word that is never cleared by a kernel.
enum { FAILED_STATUS = 1, FAILED_RANGE = 2 };

KV_DEVICE void fail(u64 failed, u32 how) {
    if (failed != 0) {
        atomicOr(at<u32>(failed), how);
    }
}

// ---- Attention of up to `G` queries over rows, tile by tile, with a running softmax. ----

template <u32 G>
struct Softmax {
    float* queries;  // [G][d]
    float* scores;   // [G][tile rows]: scores, then weights
    float* top;      // [G]: largest score so far
    float* sum;      // [G]: of exp(score - top)
    float* keep;     // [G]: what the last tile left of everything before it
    float values[G][2];  // of dimensions threadIdx.x and threadIdx.x + THREADS
};

template <u32 G>
KV_DEVICE void begin_softmax(Softmax<G>& state, u8* shared, const RowTile& tile, u64 queries, u32 heads, u32 d) {
    state.queries = (float*)shared;
    state.scores = state.queries + G * d;
    state.top = state.scores + G * tile.rows;
    state.sum = state.top + G;
    state.keep = state.sum + G;
    load_queries<G>(state.queries, queries, heads, d);
    if (threadIdx.x < G) {
        state.top[threadIdx.x] = negative_infinity();
        state.sum[threadIdx.x] = 0.0f;
    }
    KV_UNROLL
    for (u32 h = 0; h < G; h++) {
        state.values[h][0] = state.values[h][1] = 0.0f;
    }
}

// Attends over the `n` rows whose addresses are in the tile. Every thread calls it; ends with a barrier.
template <u32 DTYPE, u32 G>
KV_DEVICE void attend_tile(Softmax<G>& state, const RowTile& tile, u32 n, u32 d, float scale) {
    const u32 HEADS = G < 4 ? G : 4;
    __syncthreads();
    stage_rows(tile, n);
    __syncthreads();
    KV_LOOP
    for (u32 i = threadIdx.x; i < n * (G / HEADS); i += THREADS) {
        u32 row = i % n, first = i / n * HEADS;
        float sums[HEADS];
        dot_heads<DTYPE, HEADS>(state.queries + first * d, tile.data + row * tile.stride, d, sums);
        KV_UNROLL
        for (u32 h = 0; h < HEADS; h++) {
            state.scores[(first + h) * tile.rows + row] = sums[h] * scale;
        }
    }
    __syncthreads();
    u32 lane = threadIdx.x % WARP;
    KV_LOOP
    for (u32 h = threadIdx.x / WARP; h < G; h += WARPS) {
        float* scores = state.scores + h * tile.rows;
        float before = state.top[h], top = before;
        KV_LOOP
        for (u32 i = lane; i < n; i += WARP) {
            top = fmaxf(top, scores[i]);
        }
        top = warp_max(top);
        // Where every score is -inf there is nothing to weigh.
        float shift = top == negative_infinity() ? 0.0f : top;
        float sum = 0.0f;
        KV_LOOP
        for (u32 i = lane; i < n; i += WARP) {
            float weight = expf(scores[i] - shift);
            scores[i] = weight;
            sum += weight;
        }
        sum = warp_sum(sum);
        if (lane == 0) {
            float keep = expf(before - shift);
            state.top[h] = top;
            state.sum[h] = state.sum[h] * keep + sum;
            state.keep[h] = keep;
        }
    }
    __syncthreads();
    KV_UNROLL
    for (u32 part = 0; part < 2; part++) {
        u32 j = threadIdx.x + part * THREADS;
        if (j < d) {
            KV_UNROLL
            for (u32 h = 0; h < G; h++) {
                state.values[h][part] *= state.keep[h];
            }
            KV_LOOP
            for (u32 row = 0; row < n; row++) {
                float value = stored_value<DTYPE>(tile.data + row * tile.stride, d + j);
                KV_UNROLL
                for (u32 h = 0; h < G; h++) {
                    state.values[h][part] += state.scores[h * tile.rows + row] * value;
                }
            }
        }
    }
    __syncthreads();
}

// Writes `[heads][d]` values and `[heads]` log-sums; without rows 0 and -inf.
template <u32 G>
KV_DEVICE void end_softmax(const Softmax<G>& state, u64 out, u64 lse, u32 heads, u32 d) {
    __syncthreads();
    KV_UNROLL
    for (u32 h = 0; h < G; h++) {
        if (h < heads) {
            float sum = state.sum[h];
            float inverse = sum == 0.0f ? 0.0f : 1.0f / sum;
            KV_UNROLL
            for (u32 part = 0; part < 2; part++) {
                u32 j = threadIdx.x + part * THREADS;
                if (j < d) {
                    at<float>(out)[h * d + j] = state.values[h][part] * inverse;
                }
            }
            if (threadIdx.x == 0) {
                at<float>(lse)[h] = sum == 0.0f ? negative_infinity() : state.top[h] + logf(sum);
            }
        }
    }
}

// Which tiles this block takes when several share one head's rows.
struct Share {
    u32 next, mine, parts;
};

// Attends over one run per thread, as far as they are this block's share. Every thread of the block calls it.
template <u32 DTYPE, u32 G>
KV_DEVICE void attend_placed(
    Softmax<G>& state, const RowTile& tile, Share& share, RowRun run, u32 row_bytes, u32 d, float scale
) {
    u32 total = place_runs(tile, run);
    KV_LOOP
    for (u32 first = 0; first < total; first += tile.rows) {
        if (share.next++ % share.parts == share.mine) {
            u32 n = smaller(tile.rows, total - first);
            if (threadIdx.x < n) {
                tile.addresses[threadIdx.x] = placed_row(tile, first + threadIdx.x, row_bytes);
            }
            attend_tile<DTYPE, G>(state, tile, n, d, scale);
        }
    }
    __syncthreads();
}

// Calls `body<DTYPE, G>(arguments...)` for a storage type and a number of query heads.
#define KV_FOR_GROUP(body, dtype, heads, ...)      \
    do {                                           \
        if ((heads) <= 1) {                        \
            body<dtype, 1>(__VA_ARGS__);           \
        } else if ((heads) <= 2) {                 \
            body<dtype, 2>(__VA_ARGS__);           \
        } else if ((heads) <= 4) {                 \
            body<dtype, 4>(__VA_ARGS__);           \
        } else {                                   \
            body<dtype, GROUP_MAX>(__VA_ARGS__);   \
        }                                          \
    } while (0)
#define KV_FOR_SHAPE(body, dtype, heads, ...)              \
    do {                                                   \
        if ((dtype) == F32) {                              \
            KV_FOR_GROUP(body, F32, heads, __VA_ARGS__);   \
        } else if ((dtype) == F16) {                       \
            KV_FOR_GROUP(body, F16, heads, __VA_ARGS__);   \
        } else {                                           \
            KV_FOR_GROUP(body, BF16, heads, __VA_ARGS__);  \
        }                                                  \
    } while (0)
