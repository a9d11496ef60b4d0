// Rows of any storage format to f32, f16 or bf16. The formats are those of kvoyant_kernels::quantise.

struct DequantiseParams {
    u64 src;         // rows, `src_stride` bytes apart
    u64 dst;         // rows of `n` values, `dst_stride` bytes apart
    u64 src_stride, dst_stride;
    u32 rows;
    u32 n;           // values of a row, a multiple of 4, of INT4 of `group` too
    u32 format;
    u32 group;       // of INT4: values that share a scale
    u32 dtype;       // of dst
    u32 pad;
};
static_assert(sizeof(DequantiseParams) == 56, "mirrored in params.rs");

// Codes 0 to 2 are those of a storage type.
enum { FP8_E4M3 = 3, INT8 = 4, INT4 = 5 };

// A product and a sum, each rounded: as the CPU does it.
KV_DEVICE float dequantised(const DequantiseParams& p, u64 row, u32 j) {
    switch (p.format) {
        case FP8_E4M3:
            return fp8_e4m3_to_f32(at<const u8>(row)[j]);
        case INT8:
            return __fmul_rn((float)at<const i8>(row)[j], *at<const float>(row + p.n));
        case INT4: {
            const u16* group = at<const u16>(row + p.n / 2) + j / p.group * 2;
            u32 code = at<const u8>(row)[j / 2] >> (j % 2 * 4) & 15;
            return __fadd_rn(__fmul_rn((float)code, f16_to_f32(group[0])), f16_to_f32(group[1]));
        }
        default:
            return load_value(p.format, row, j);
    }
}

// Threads of grid.x take the values of a row in turn; blocks of grid.y take the rows.
extern "C" __global__ void dequantise(const DequantiseParams p) {
    for (u64 row = blockIdx.y; row < p.rows; row += gridDim.y) {
        u64 src = p.src + row * p.src_stride, dst = p.dst + row * p.dst_stride;
        for (u32 j = blockIdx.x * THREADS + threadIdx.x; j < p.n; j += gridDim.x * THREADS) {
            store_value(p.dtype, dst, j, dequantised(p, src, j));
        }
    }
}
