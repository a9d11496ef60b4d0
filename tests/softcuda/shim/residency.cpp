#include "shim.h"

#include "../../../kernels/cuda/common.cuh"
#include "../../../kernels/cuda/residency.cu"

KV_SOURCE(residency,
    KV_ENTRY(residency, resolve_attend, ResolveParams),
    KV_ENTRY(residency, report, ReportParams))
