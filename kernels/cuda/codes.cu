// Attention over digests in codes: scores of all rows and their margins, and what rows amount to by their weights. Blocks are those of
// kvoyant_kernels::CodeLayout. Scores and margins are the CPU's to the last bit: products and sums are rounded, or fused, as there, in
// the same order.

// How pages are digested.
struct CodeShape {
    u32 d, rows, group;  // values of a key, rows of a page, rows that share an offset and a step
    u32 levels;          // the largest code: 15 or 63
    u32 value_dim;
    u32 block_bytes;
};

struct CodeScoresParams {
    u64 queries;  // f32 [heads][group][d]
    u64 blocks;   // [heads][stride] blocks
    u64 out;      // f32 [heads][group][out_stride]
    u64 margins;  // f32 [heads][group][margin_stride]
    u64 lengths;  // u32 [heads]: pages of each head, or 0: `pages` of all
    CodeShape shape;
    u32 group, heads, pages, stride, out_stride, margin_stride, splits;
    float scale;
};
static_assert(sizeof(CodeScoresParams) == 96, "mirrored in params/codes.rs");

struct CodeRestParams {
    u64 blocks;   // [heads][stride] blocks
    u64 weights;  // f32 [heads][group][weight_stride]
    u64 margins;  // f32 [heads][group][margin_stride]
    u64 sums;     // f64 [splits][heads][group][5]: weight, upper, lower, scatter, spread
    u64 means;    // f32 [splits][heads][group][value_dim]
    u64 lengths;  // u32 [heads]: pages of each head, or 0: `pages` of all
    CodeShape shape;
    u32 group, heads, pages, stride, weight_stride, margin_stride, splits, pad;
};
static_assert(sizeof(CodeRestParams) == 104, "mirrored in params/codes.rs");

// Rows of a tile, and threads that work together: lanes of the CPU's sums.
static const u32 TEAM = 16;
static const u32 TEAMS = THREADS / TEAM;
static_assert(TEAMS == GROUP_MAX, "a team for each query");

// Where the parts of a block are, in bytes.
struct CodeParts {
    u32 width, tile_bytes, group_bytes, groups, span;
    u32 norms, errors, mean_norms, unit, spreads, means;
};

KV_DEVICE CodeParts parts_of(const CodeShape& shape) {
    CodeParts parts;
    parts.width = (shape.d + TEAM - 1) / TEAM * TEAM;
    parts.tile_bytes = (shape.levels == 15 ? 8 : 12) * parts.width;
    parts.group_bytes = 4 * parts.width + shape.group / TEAM * parts.tile_bytes;
    parts.groups = shape.rows / shape.group;
    parts.span = smaller(shape.rows, 32);
    u32 spans = shape.rows / parts.span;
    parts.norms = parts.groups * parts.group_bytes;
    parts.errors = parts.norms + 4 * parts.groups;
    parts.mean_norms = parts.errors + 4 * parts.groups;
    parts.unit = parts.mean_norms + 4 * spans;
    parts.spreads = parts.unit + 4;
    parts.means = parts.spreads + shape.rows;
    return parts;
}

// Over a team, in the order of the CPU's sums.
KV_DEVICE float team_sum(float value) {
    value = __fadd_rn(value, __shfl_xor_sync(ALL_LANES, value, 2));
    value = __fadd_rn(value, __shfl_xor_sync(ALL_LANES, value, 1));
    value = __fadd_rn(value, __shfl_xor_sync(ALL_LANES, value, 8));
    return __fadd_rn(value, __shfl_xor_sync(ALL_LANES, value, 4));
}

KV_DEVICE float team_max(float value) {
    KV_UNROLL
    for (u32 apart = TEAM / 2; apart > 0; apart /= 2) {
        value = fmaxf(value, __shfl_xor_sync(ALL_LANES, value, apart));
    }
    return value;
}

// Adds the products of four codes and four weights, a byte each.
KV_DEVICE i32 dot4(u32 codes, u32 weights, i32 sum) {
#ifdef __CUDA_ARCH__
    return __dp4a((i32)codes, (i32)weights, sum);
#else
    for (u32 i = 0; i < 4; i++) {
        sum += (i8)(codes >> 8 * i) * (i8)(weights >> 8 * i);
    }
    return sum;
#endif
}

static const float WEIGHT_MAX = 16256.0f;
static const float WEIGHT_OFF = 0.52f;
static const float PRODUCT_MIN = 1e-30f;
static const float SQUARES_MIN = 1.17549435e-38f;
static const float FLOAT_MAX = 3.40282347e38f;
static const float EPSILON = 1.1920929e-7f;
static const float BASE_MAX = 1.5e38f;
static const float UNIT_MAX = 1e28f;
static const float MARGIN_MAX = 36.0f;

// A query as one group's codes see it.
struct GroupQuery {
    float base, unit, margin;
};

// The same for every thread of a team, which leaves the weights of its channels: hi, then lo, a byte each. `group` is where the group
// begins in the block.
KV_DEVICE GroupQuery group_query(
    const CodeScoresParams& p, const CodeParts& parts, const float* query, float query_norm, u64 group, float offset_norm, float error,
    u8* weights
) {
    u32 lane = threadIdx.x % TEAM, d = p.shape.d;
    const u16 *offsets = at<const u16>(group), *steps = offsets + parts.width;
    float base = 0.0f, squares = 0.0f, largest = 0.0f;
    KV_LOOP
    for (u32 j = lane; j < parts.width; j += TEAM) {
        float q = j < d ? query[j] : 0.0f;
        float product = __fmul_rn(q, f16_to_f32(steps[j]));
        base = fmaf(q, f16_to_f32(offsets[j]), base);
        squares = fmaf(product, product, squares);
        largest = fmaxf(fabsf(product), largest);
    }
    base = __fmul_rn(team_sum(base), p.scale);
    float norm = sqrtf(__fadd_rn(team_sum(squares), SQUARES_MIN));
    largest = team_max(largest);
    bool usable = largest >= PRODUCT_MIN && largest <= FLOAT_MAX;
    float unit = usable ? __fmul_rn(largest, 1.0f / WEIGHT_MAX) : 0.0f;
    float inverse = usable ? WEIGHT_MAX / largest : 0.0f;
    float off = usable ? __fmul_rn(unit, WEIGHT_OFF) : largest;
    KV_LOOP
    for (u32 j = lane; j < parts.width; j += TEAM) {
        float product = __fmul_rn(j < d ? query[j] : 0.0f, f16_to_f32(steps[j]));
        // A NaN, which no number is near, becomes the least weight.
        float steps_of = __fmul_rn(product, inverse);
        i32 weight = steps_of == steps_of ? (i32)rintf(steps_of) : -16384;
        weights[j] = (u8)(weight >> 7);
        weights[parts.width + j] = (u8)(weight & 127);
    }
    float width = (float)parts.width, levels = (float)p.shape.levels;
    float of_base = __fmul_rn(EPSILON, __fadd_rn(__fmul_rn(width, 1.0f / 16.0f), 8.0f));
    float of_codes = __fmul_rn(__fmul_rn(EPSILON * 4.0f, levels), sqrtf(width));
    float sum = __fmul_rn(norm, __fadd_rn(error, of_codes));
    sum = __fadd_rn(sum, __fmul_rn(__fmul_rn(query_norm, of_base), offset_norm));
    sum = __fadd_rn(sum, __fmul_rn(off, __fmul_rn(levels, width)));
    float margin = __fmul_rn(sum, __fmul_rn(p.scale, 1.0f + 1e-5f));
    GroupQuery of;
    of.base = base >= -BASE_MAX ? fminf(base, BASE_MAX) : -BASE_MAX;
    of.unit = fminf(__fmul_rn(unit, p.scale), UNIT_MAX);
    of.margin = margin < MARGIN_MAX ? margin : -negative_infinity();
    return of;
}

// `Σ weight·code` of a row of a tile.
KV_DEVICE i32 whole_sum(const CodeShape& shape, u32 width, u64 tile, u32 row, const u8* weights) {
    const u32 *hi = (const u32*)weights, *lo = hi + width / 4;
    const u32 *low = at<const u32>(tile) + row, *high = low + 2 * width;
    i32 hi_sum = 0, lo_sum = 0;
    KV_LOOP
    for (u32 i = 0; i < width / 16; i++) {
        u32 codes[4], line[2] = {low[32 * i], low[32 * i + 16]};
        KV_UNROLL
        for (u32 four = 0; four < 4; four++) {
            codes[four] = line[four / 2] >> four % 2 * 4 & 0x0f0f0f0fu;
        }
        if (shape.levels > 15) {
            u32 bits = high[16 * i];
            KV_UNROLL
            for (u32 four = 0; four < 4; four++) {
                codes[four] |= (bits >> 2 * four & 0x03030303u) << 4;
            }
        }
        KV_UNROLL
        for (u32 four = 0; four < 4; four++) {
            hi_sum = dot4(codes[four], hi[4 * i + four], hi_sum);
            lo_sum = dot4(codes[four], lo[4 * i + four], lo_sum);
        }
    }
    return hi_sum * 128 + lo_sum;
}

// A block for each (head, up to GROUP_MAX of its queries) in grid.x and each split in grid.z. A team takes a group of rows after the
// other.
extern "C" __global__ void code_scores(const CodeScoresParams p) {
    KV_DYNAMIC_SHARED(shared);
    u32 chunks = (p.group + GROUP_MAX - 1) / GROUP_MAX;
    u32 head = blockIdx.x / chunks, chunk = blockIdx.x % chunks;
    u32 heads = smaller(p.group - chunk * GROUP_MAX, GROUP_MAX);
    u32 lane = threadIdx.x % TEAM, team = threadIdx.x / TEAM;
    CodeParts parts = parts_of(p.shape);
    float* norms = (float*)shared;
    u8* weights = shared + GROUP_MAX * 4 + team * 2 * parts.width;
    u64 first_head = (u64)head * p.group + chunk * GROUP_MAX;
    const float* queries = at<const float>(p.queries) + first_head * p.shape.d;
    float squares = 0.0f;
    KV_LOOP
    for (u32 j = lane; j < p.shape.d; j += TEAM) {
        float q = team < heads ? queries[team * p.shape.d + j] : 0.0f;
        squares = fmaf(q, q, squares);
    }
    squares = team_sum(squares);
    if (lane == 0) {
        norms[team] = __fmul_rn(sqrtf(__fadd_rn(squares, SQUARES_MIN)), 1.0f + 1e-5f);
    }
    __syncthreads();
    u32 pages = smaller(p.lengths == 0 ? p.pages : at<const u32>(p.lengths)[head], p.stride);
    u32 count = pages * parts.groups;
    KV_LOOP
    for (u32 first = blockIdx.z * TEAMS; first < count; first += p.splits * TEAMS) {
        // Teams that have none left go along with the last one, for the others of their warp.
        bool mine = first + team < count;
        u32 number = mine ? first + team : count - 1;
        u32 page = number / parts.groups, g = number % parts.groups;
        u64 block = p.blocks + ((u64)head * p.stride + page) * p.shape.block_bytes;
        u64 group = block + g * parts.group_bytes;
        float offset_norm = at<const float>(block + parts.norms)[g], error = at<const float>(block + parts.errors)[g];
        KV_LOOP
        for (u32 h = 0; h < heads; h++) {
            GroupQuery query = group_query(p, parts, queries + h * p.shape.d, norms[h], group, offset_norm, error, weights);
            __syncwarp();
            if (mine && lane == 0 && number < p.margin_stride) {
                at<float>(p.margins)[(first_head + h) * p.margin_stride + number] = query.margin;
            }
            u32 row = page * p.shape.rows + g * p.shape.group + lane;
            KV_LOOP
            for (u32 tile = 0; tile < p.shape.group / TEAM; tile++, row += TEAM) {
                u64 codes = group + 4 * parts.width + tile * parts.tile_bytes;
                i32 sum = whole_sum(p.shape, parts.width, codes, lane, weights);
                if (mine && row < p.out_stride) {
                    at<float>(p.out)[(first_head + h) * p.out_stride + row] = fmaf(query.unit, (float)sum, query.base);
                }
            }
            __syncwarp();
        }
    }
}

// `e^m` and a little more, for `e^m − 1` not to be too small.
static const float UP = 1.0f + 5e-7f;

// Blocks as in `code_scores`. A team takes a query, and goes through the pages of its split.
extern "C" __global__ void code_rest(const CodeRestParams p) {
    KV_DYNAMIC_SHARED(shared);
    u32 chunks = (p.group + GROUP_MAX - 1) / GROUP_MAX;
    u32 head = blockIdx.x / chunks, chunk = blockIdx.x % chunks;
    u32 heads = smaller(p.group - chunk * GROUP_MAX, GROUP_MAX);
    u32 lane = threadIdx.x % TEAM, team = threadIdx.x / TEAM;
    bool mine = team < heads;
    CodeParts parts = parts_of(p.shape);
    u32 dv = p.shape.value_dim, cell = smaller(parts.span, p.shape.group);
    float* mean = (float*)shared + team * dv;
    KV_LOOP
    for (u32 j = lane; j < dv; j += TEAM) {
        mean[j] = 0.0f;
    }
    u64 query = (u64)head * p.group + chunk * GROUP_MAX + team;
    const float* weights = at<const float>(p.weights) + query * p.weight_stride;
    const float* margins = at<const float>(p.margins) + query * p.margin_stride;
    double sums[5] = {0.0, 0.0, 0.0, 0.0, 0.0};
    u32 pages = smaller(p.lengths == 0 ? p.pages : at<const u32>(p.lengths)[head], p.stride);
    KV_LOOP
    for (u32 page = blockIdx.z; page < pages; page += p.splits) {
        u64 block = p.blocks + ((u64)head * p.stride + page) * p.shape.block_bytes;
        float unit = *at<const float>(block + parts.unit);
        KV_LOOP
        for (u32 first = 0; first < p.shape.rows; first += parts.span) {
            float norm = at<const float>(block + parts.mean_norms)[first / parts.span], of_span = 0.0f;
            KV_LOOP
            for (u32 row = first; row < first + parts.span; row += cell) {
                float whole = 0.0f, apart = 0.0f;
                KV_LOOP
                for (u32 i = row + lane; i < row + cell; i += TEAM) {
                    u32 number = page * p.shape.rows + i;
                    float weight = mine && number < p.weight_stride ? weights[number] : 0.0f;
                    whole += weight;
                    apart += weight * (float)at<const u8>(block + parts.spreads)[i];
                }
                whole = team_sum(whole);
                apart = team_sum(apart);
                of_span += whole;
                u32 group = page * parts.groups + row / p.shape.group;
                if (lane == 0 && whole > 0.0f) {
                    float margin = group < p.margin_stride ? margins[group] : -negative_infinity();
                    float up = expf(margin);
                    sums[0] += whole;
                    sums[1] += (double)whole * up;
                    sums[2] += (double)whole * expf(-margin);
                    // What is not there is not more for a margin that is not known.
                    sums[3] += norm > 0.0f ? (double)whole * norm * fmaf(up, UP, -1.0f) : 0.0;
                    sums[4] += apart > 0.0f ? (double)apart * unit * up : 0.0;
                }
            }
            if (of_span > 0.0f) {
                const u16* stored = at<const u16>(block + parts.means) + first / parts.span * dv;
                KV_LOOP
                for (u32 j = lane; j < dv; j += TEAM) {
                    mean[j] = fmaf(of_span, f16_to_f32(stored[j]), mean[j]);
                }
            }
        }
    }
    if (mine) {
        u64 part = (u64)blockIdx.z * p.heads * p.group + query;
        if (lane == 0) {
            for (u32 i = 0; i < 5; i++) {
                at<double>(p.sums)[part * 5 + i] = sums[i];
            }
        }
        KV_LOOP
        for (u32 j = lane; j < dv; j += TEAM) {
            at<float>(p.means)[part * dv + j] = mean[j];
        }
    }
}
