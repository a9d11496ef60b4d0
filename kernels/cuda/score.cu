// Scores of digests: queries against rows, bounds of pages, distances of binary codes.

struct ScoresParams {
    u64 queries;  // f32 [heads][group][d]
    u64 runs;     // RowRun
    u64 offsets;  // u32 [heads + 1]: first run of each head
    u64 out;      // f32 [heads][group][out_stride]
    u32 dtype, d, group, heads, row_bytes, out_stride, tile_rows, splits;
};
static_assert(sizeof(ScoresParams) == 64, "mirrored in params.rs");

struct QuestParams {
    u64 queries;  // f32 [heads][group][d]
    u64 minmax;   // [heads][stride][2][d]: least and largest value of each channel over a page's keys
    u64 out;      // f32 [heads][group][out_stride]
    u64 lengths;  // u32 [heads]: pages of each head, or 0: `pages` of all
    u32 dtype, d, group, heads, pages, stride, out_stride, tile_rows;
    u32 splits, pad;
};
static_assert(sizeof(QuestParams) == 72, "mirrored in params.rs");

struct HammingParams {
    u64 queries;  // u64 [heads][group][words]
    u64 codes;    // u64 [heads][stride][words]
    u64 out;      // u32 [heads][group][out_stride]
    u64 lengths;  // u32 [heads]: rows of each head, or 0: `rows` of all
    u32 heads, group, words, rows, stride, out_stride;
};
static_assert(sizeof(HammingParams) == 56, "mirrored in params.rs");

// Upper bounds of `HEADS` queries over one staged page, summed in the order of `dot_heads`: of the same values both are equal, and
// rounding keeps order.
template <u32 DTYPE, u32 HEADS>
KV_DEVICE void bound_heads(const float* queries, const u8* minmax, u32 d, float* sums) {
    KV_UNROLL
    for (u32 h = 0; h < HEADS; h++) {
        sums[h] = 0.0f;
    }
    KV_LOOP
    for (u32 j = 0; j < d; j++) {
        float least = stored_value<DTYPE>(minmax, j), largest = stored_value<DTYPE>(minmax, d + j);
        KV_UNROLL
        for (u32 h = 0; h < HEADS; h++) {
            float query = queries[h * d + j];
            sums[h] += query * (query >= 0.0f ? largest : least);
        }
    }
}

// Scores the `n` staged rows as numbers `first` and up. Every thread of the block calls it.
template <u32 DTYPE, u32 G, bool BOUNDS>
KV_DEVICE void score_tile(
    const RowTile& tile, const float* queries, u32 n, u32 d, u64 out, u64 first, u32 out_stride, u32 heads
) {
    const u32 HEADS = G < 4 ? G : 4;
    __syncthreads();
    stage_rows(tile, n);
    __syncthreads();
    KV_LOOP
    for (u32 i = threadIdx.x; i < n * (G / HEADS); i += THREADS) {
        u32 row = i % n, from = i / n * HEADS;
        float sums[HEADS];
        if (BOUNDS) {
            bound_heads<DTYPE, HEADS>(queries + from * d, tile.data + row * tile.stride, d, sums);
        } else {
            dot_heads<DTYPE, HEADS>(queries + from * d, tile.data + row * tile.stride, d, sums);
        }
        KV_UNROLL
        for (u32 h = 0; h < HEADS; h++) {
            if (from + h < heads && first + row < out_stride) {
                at<float>(out)[(u64)(from + h) * out_stride + first + row] = sums[h];
            }
        }
    }
    __syncthreads();
}

template <u32 DTYPE, u32 G>
KV_DEVICE void score_runs(const ScoresParams& p, u32 head, u32 chunk, u32 heads) {
    KV_DYNAMIC_SHARED(shared);
    RowTile tile;
    float* queries = (float*)carve_tile(tile, shared, p.tile_rows, p.d * dtype_bytes(DTYPE));
    u64 first_head = (u64)head * p.group + chunk * GROUP_MAX;
    load_queries<G>(queries, p.queries + first_head * p.d * 4, heads, p.d);
    u64 out = p.out + first_head * p.out_stride * 4;
    u32 from = at<const u32>(p.offsets)[head], to = at<const u32>(p.offsets)[head + 1];
    u32 tiles = 0;
    u64 rows = 0;
    KV_LOOP
    for (u32 i = from; i < to; i += THREADS) {
        RowRun run = {0, 0, 0};
        if (i + threadIdx.x < to) {
            run = at<const RowRun>(p.runs)[i + threadIdx.x];
        }
        u32 total = place_runs(tile, run);
        KV_LOOP
        for (u32 first = 0; first < total; first += tile.rows) {
            if (tiles++ % p.splits == blockIdx.z) {
                u32 n = smaller(tile.rows, total - first);
                if (threadIdx.x < n) {
                    tile.addresses[threadIdx.x] = placed_row(tile, first + threadIdx.x, p.row_bytes);
                }
                score_tile<DTYPE, G, false>(tile, queries, n, p.d, out, rows + first, p.out_stride, heads);
            }
        }
        rows += total;
        __syncthreads();
    }
}

// A block for each (head, up to GROUP_MAX of its queries) in grid.x and each split in grid.z.
extern "C" __global__ void partial_scores(const ScoresParams p) {
    u32 chunks = (p.group + GROUP_MAX - 1) / GROUP_MAX;
    u32 head = blockIdx.x / chunks, chunk = blockIdx.x % chunks;
    u32 heads = smaller(p.group - chunk * GROUP_MAX, GROUP_MAX);
    KV_FOR_SHAPE(score_runs, p.dtype, heads, p, head, chunk, heads);
}

template <u32 DTYPE, u32 G>
KV_DEVICE void bound_pages(const QuestParams& p, u32 head, u32 chunk, u32 heads) {
    KV_DYNAMIC_SHARED(shared);
    RowTile tile;
    u32 page_bytes = 2 * p.d * dtype_bytes(DTYPE);
    float* queries = (float*)carve_tile(tile, shared, p.tile_rows, page_bytes);
    u64 first_head = (u64)head * p.group + chunk * GROUP_MAX;
    load_queries<G>(queries, p.queries + first_head * p.d * 4, heads, p.d);
    u64 out = p.out + first_head * p.out_stride * 4;
    u64 minmax = p.minmax + (u64)head * p.stride * page_bytes;
    u32 pages = smaller(p.lengths == 0 ? p.pages : at<const u32>(p.lengths)[head], p.stride);
    KV_LOOP
    for (u32 first = blockIdx.z * tile.rows; first < pages; first += p.splits * tile.rows) {
        u32 n = smaller(tile.rows, pages - first);
        if (threadIdx.x < n) {
            tile.addresses[threadIdx.x] = minmax + (u64)(first + threadIdx.x) * page_bytes;
        }
        score_tile<DTYPE, G, true>(tile, queries, n, p.d, out, first, p.out_stride, heads);
    }
}

// Blocks as in `partial_scores`.
extern "C" __global__ void quest_bounds(const QuestParams p) {
    u32 chunks = (p.group + GROUP_MAX - 1) / GROUP_MAX;
    u32 head = blockIdx.x / chunks, chunk = blockIdx.x % chunks;
    u32 heads = smaller(p.group - chunk * GROUP_MAX, GROUP_MAX);
    KV_FOR_SHAPE(bound_pages, p.dtype, heads, p, head, chunk, heads);
}

// Threads of grid.x take the rows in turn; grid.y has the heads.
extern "C" __global__ void hamming(const HammingParams p) {
    u32 head = blockIdx.y;
    u32 rows = smaller(p.lengths == 0 ? p.rows : at<const u32>(p.lengths)[head], p.stride);
    rows = smaller(rows, p.out_stride);
    const u64* queries = at<const u64>(p.queries) + (u64)head * p.group * p.words;
    u32* out = at<u32>(p.out) + (u64)head * p.group * p.out_stride;
    for (u32 row = blockIdx.x * THREADS + threadIdx.x; row < rows; row += gridDim.x * THREADS) {
        const u64* code = at<const u64>(p.codes) + ((u64)head * p.stride + row) * p.words;
        for (u32 query = 0; query < p.group; query++) {
            u32 distance = 0;
            for (u32 word = 0; word < p.words; word++) {
                distance += __popcll(code[word] ^ queries[query * p.words + word]);
            }
            out[(u64)query * p.out_stride + row] = distance;
        }
    }
}
