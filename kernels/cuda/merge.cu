// Puts partial attentions over disjoint rows together by their log-sums.

struct MergeParams {
    u64 out;        // f32 [heads][d]; may be one of the parts
    u64 lse;        // f32 [heads]; likewise
    u64 first_out;  // f32 [heads][d]: a part that lies apart, or 0
    u64 first_lse;  // f32 [heads]
    u64 parts_out;  // f32 [parts][heads][d]
    u64 parts_lse;  // f32 [parts][heads]
    u32 parts, heads, d, pad;
};
static_assert(sizeof(MergeParams) == 64, "mirrored in params.rs");

// Part 0 is the one that lies apart, if there is one.
KV_DEVICE float part_lse(const MergeParams& p, u32 part, u32 head) {
    if (p.first_out != 0) {
        if (part == 0) {
            return at<const float>(p.first_lse)[head];
        }
        part--;
    }
    return at<const float>(p.parts_lse)[(u64)part * p.heads + head];
}

KV_DEVICE float part_value(const MergeParams& p, u32 part, u32 head, u32 j) {
    if (p.first_out != 0) {
        if (part == 0) {
            return at<const float>(p.first_out)[(u64)head * p.d + j];
        }
        part--;
    }
    return at<const float>(p.parts_out)[((u64)part * p.heads + head) * p.d + j];
}

// One block per head.
extern "C" __global__ void lse_merge(const MergeParams p) {
    u32 head = blockIdx.x;
    u32 parts = p.parts + (p.first_out != 0);
    float top = negative_infinity(), sum = 0.0f;
    for (u32 i = 0; i < parts; i++) {
        top = fmaxf(top, part_lse(p, i, head));
    }
    bool empty = top == negative_infinity();
    for (u32 i = 0; i < parts; i++) {
        sum += empty ? 0.0f : expf(part_lse(p, i, head) - top);
    }
    for (u32 j = threadIdx.x; j < p.d; j += THREADS) {
        float value = 0.0f;
        for (u32 i = 0; i < parts; i++) {
            float weight = empty ? 0.0f : expf(part_lse(p, i, head) - top);
            // A part that covers nothing may hold anything.
            value += weight == 0.0f ? 0.0f : part_value(p, i, head, j) * (weight / sum);
        }
        at<float>(p.out)[(u64)head * p.d + j] = value;
    }
    // Everyone has read the parts' log-sums, which this may overwrite.
    __syncthreads();
    if (threadIdx.x == 0) {
        at<float>(p.lse)[head] = empty ? negative_infinity() : top + logf(sum);
    }
}
