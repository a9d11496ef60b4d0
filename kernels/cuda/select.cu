// The k largest scores of every head, exactly: of equal ones the lower id, NaN as -inf, -0 as 0.

struct TopKParams {
    u64 scores;   // f32 [heads][stride]
    u64 lengths;  // u32 [heads]: scores of each head, or 0: `n` of all
    u64 ids;      // u32 [heads][ids_stride]: ascending
    u64 counts;   // u32 [heads]: how many ids
    u32 heads, n, stride, k, ids_stride, pad;
};
static_assert(sizeof(TopKParams) == 56, "mirrored in params.rs");

static const u32 SELECT_THREADS = 256;
static const u32 SELECT_WARPS = SELECT_THREADS / WARP;
static const u32 DIGITS = 256;

// Orders as the score does.
KV_DEVICE u32 score_key(float score) {
    u32 bits = __float_as_uint(score);
    if ((bits & 0x7fffffff) > 0x7f800000u) {
        bits = 0xff800000u;
    } else if (bits == 0x80000000u) {
        bits = 0;
    }
    return bits >> 31 ? ~bits : bits | 0x80000000u;
}

// Finds the largest digit whose bin, with all above it, holds `wanted` keys: one warp. Leaves it and the keys above it.
KV_DEVICE void find_digit(const u32* bins, u32 wanted, u32* found) {
    const u32 PER_LANE = DIGITS / WARP;
    u32 lane = threadIdx.x;
    // Lane 0 has the largest digits.
    u32 highest = DIGITS - 1 - lane * PER_LANE, sum = 0;
    for (u32 i = 0; i < PER_LANE; i++) {
        sum += bins[highest - i];
    }
    u32 above = warp_sum_before(sum);
    if (above < wanted && above + sum >= wanted) {
        u32 digit = highest;
        while (above + bins[digit] < wanted) {
            above += bins[digit--];
        }
        found[0] = digit;
        found[1] = above;
    }
}

// One block per head.
extern "C" __global__ void top_k(const TopKParams p) {
    KV_DYNAMIC_SHARED(shared);
    u32* bins = (u32*)shared;       // [DIGITS]
    u32* found = bins + DIGITS;     // [2]
    u64* counted = (u64*)(found + 2);  // [SELECT_WARPS]
    u32 head = blockIdx.x;
    const float* scores = at<const float>(p.scores) + (u64)head * p.stride;
    u32* ids = at<u32>(p.ids) + (u64)head * p.ids_stride;
    u32 n = smaller(p.lengths == 0 ? p.n : at<const u32>(p.lengths)[head], p.stride);
    u32 k = smaller(smaller(p.k, p.ids_stride), n);
    if (threadIdx.x == 0) {
        at<u32>(p.counts)[head] = k;
    }
    if (k == n) {
        for (u32 i = threadIdx.x; i < n; i += SELECT_THREADS) {
            ids[i] = i;
        }
        return;
    }
    if (k == 0) {
        return;
    }
    // Digit by digit from the top: the k-th largest key, and how many of those equal to it are taken.
    u32 prefix = 0, known = 0, equal_taken = k;
    for (i32 shift = 24; shift >= 0; shift -= 8) {
        for (u32 i = threadIdx.x; i < DIGITS; i += SELECT_THREADS) {
            bins[i] = 0;
        }
        __syncthreads();
        for (u32 i = threadIdx.x; i < n; i += SELECT_THREADS) {
            u32 key = score_key(scores[i]);
            if ((key & known) == prefix) {
                atomicAdd(&bins[key >> shift & (DIGITS - 1)], 1u);
            }
        }
        __syncthreads();
        if (threadIdx.x < WARP) {
            find_digit(bins, equal_taken, found);
        }
        __syncthreads();
        prefix |= found[0] << shift;
        known |= (DIGITS - 1) << shift;
        equal_taken -= found[1];
        __syncthreads();
    }
    // Each warp has a range of its own, so that ids come out in order.
    u32 lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    u32 per_warp = (n + SELECT_WARPS * WARP - 1) / (SELECT_WARPS * WARP) * WARP;
    u32 begin = smaller(warp * per_warp, n), end = smaller(begin + per_warp, n);
    u64 count = 0;
    for (u32 i = begin + lane; i < end; i += WARP) {
        u32 key = score_key(scores[i]);
        count += key > prefix ? 1ull << 32 : key == prefix;
    }
    count = warp_sum(count);
    if (lane == 0) {
        counted[warp] = count;
    }
    __syncthreads();
    u64 before = 0;
    for (u32 i = 0; i < warp; i++) {
        before += counted[i];
    }
    u32 above = (u32)(before >> 32), equal = (u32)before;
    u32 lower = (1u << lane) - 1;
    for (u32 first = begin; first < end; first += WARP) {
        u32 i = first + lane;
        u32 key = i < end ? score_key(scores[i]) : 0;
        u32 is_above = __ballot_sync(ALL_LANES, i < end && key > prefix);
        u32 is_equal = __ballot_sync(ALL_LANES, i < end && key == prefix);
        u32 equal_before = equal + __popc(is_equal & lower);
        bool taken = (is_above >> lane & 1) || ((is_equal >> lane & 1) && equal_before < equal_taken);
        if (taken) {
            ids[above + __popc(is_above & lower) + smaller(equal_before, equal_taken)] = i;
        }
        above += __popc(is_above);
        equal += __popc(is_equal);
    }
}
