#include "shim.h"

#include "../../../kernels/cuda/common.cuh"
#include "../../../kernels/cuda/gather.cu"

KV_SOURCE(gather, KV_ENTRY(gather, gather_runs, GatherParams))
