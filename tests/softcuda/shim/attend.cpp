#include "shim.h"

#include "../../../kernels/cuda/common.cuh"
#include "../../../kernels/cuda/attend.cu"

KV_SOURCE(attend, KV_ENTRY(attend, attend, AttendParams))
