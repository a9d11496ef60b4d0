// Copies runs of bytes; the source may be mapped host memory, which is then read over the link by the kernel itself.

struct GatherRun {
    u64 src, dst, bytes;
};

struct GatherParams {
    u64 runs;   // GatherRun[count]
    u32 count;
    u32 pad;
};
static_assert(sizeof(GatherRun) == 24 && sizeof(GatherParams) == 16, "mirrored in params.rs");

// What a warp copies at once: 8 vectors per lane are on their way before the first is stored.
static const u32 VECTORS = 8;
static const u64 CHUNK = WARP * VECTORS * sizeof(Vec16);
// Runs that a warp copies together when each is at most one vector per lane.
static const u32 TOGETHER = 4;
static const u64 SHORT = WARP * sizeof(Vec16);

KV_DEVICE bool is_aligned(const GatherRun& run, u64 by) {
    return (run.src | run.dst | run.bytes) % by == 0;
}

template <typename T>
KV_DEVICE void copy_units(const GatherRun& run, u64 from, u64 to, u32 lane) {
    for (u64 i = from / sizeof(T) + lane; i < to / sizeof(T); i += WARP) {
        at<T>(run.dst)[i] = at<const T>(run.src)[i];
    }
}

KV_DEVICE void copy_vectors(const GatherRun& run, u64 from, u64 to, u32 lane) {
    Vec16 loaded[VECTORS];
    u64 first = from / sizeof(Vec16) + lane, end = to / sizeof(Vec16);
    KV_UNROLL
    for (u32 i = 0; i < VECTORS; i++) {
        if (first + i * WARP < end) {
            loaded[i] = at<const Vec16>(run.src)[first + i * WARP];
        }
    }
    KV_UNROLL
    for (u32 i = 0; i < VECTORS; i++) {
        if (first + i * WARP < end) {
            at<Vec16>(run.dst)[first + i * WARP] = loaded[i];
        }
    }
}

KV_DEVICE void copy_chunks(const GatherRun& run, u32 lane) {
    for (u64 from = blockIdx.y * CHUNK; from < run.bytes; from += gridDim.y * CHUNK) {
        u64 to = from + CHUNK < run.bytes ? from + CHUNK : run.bytes;
        if (is_aligned(run, 16)) {
            copy_vectors(run, from, to, lane);
        } else if (is_aligned(run, 4)) {
            copy_units<u32>(run, from, to, lane);
        } else {
            copy_units<u8>(run, from, to, lane);
        }
    }
}

// Warps of grid.x take the runs in turn, `TOGETHER` at a time; blocks of grid.y take the chunks of a long run in turn.
extern "C" __global__ void gather_runs(const GatherParams p) {
    u32 lane = threadIdx.x % WARP;
    u32 warps = gridDim.x * (blockDim.x / WARP);
    u32 warp = blockIdx.x * (blockDim.x / WARP) + threadIdx.x / WARP;
    for (u64 first = (u64)warp * TOGETHER; first < p.count; first += (u64)warps * TOGETHER) {
        GatherRun runs[TOGETHER];
        bool together = true;
        KV_UNROLL
        for (u32 i = 0; i < TOGETHER; i++) {
            GatherRun none = {0, 0, 0};
            runs[i] = first + i < p.count ? at<const GatherRun>(p.runs)[first + i] : none;
            together = together && runs[i].bytes <= SHORT && is_aligned(runs[i], 16);
        }
        if (!together) {
            for (u32 i = 0; i < TOGETHER; i++) {
                copy_chunks(runs[i], lane);
            }
        } else if (blockIdx.y == 0) {
            Vec16 loaded[TOGETHER];
            KV_UNROLL
            for (u32 i = 0; i < TOGETHER; i++) {
                if (lane < runs[i].bytes / sizeof(Vec16)) {
                    loaded[i] = at<const Vec16>(runs[i].src)[lane];
                }
            }
            KV_UNROLL
            for (u32 i = 0; i < TOGETHER; i++) {
                if (lane < runs[i].bytes / sizeof(Vec16)) {
                    at<Vec16>(runs[i].dst)[lane] = loaded[i];
                }
            }
        }
    }
}
