#include "shim.h"

#include "../../../kernels/cuda/common.cuh"
#include "../../../kernels/cuda/codes.cu"

KV_SOURCE(codes,
    KV_ENTRY(codes, code_scores, CodeScoresParams),
    KV_ENTRY(codes, code_rest, CodeRestParams))
