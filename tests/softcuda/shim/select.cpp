#include "shim.h"

#include "../../../kernels/cuda/common.cuh"
#include "../../../kernels/cuda/select.cu"

KV_SOURCE(select, KV_ENTRY(select, top_k, TopKParams))
