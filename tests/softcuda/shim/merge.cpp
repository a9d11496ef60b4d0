#include "shim.h"

#include "../../../kernels/cuda/common.cuh"
#include "../../../kernels/cuda/merge.cu"

KV_SOURCE(merge, KV_ENTRY(merge, lse_merge, MergeParams))
