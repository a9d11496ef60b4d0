#include "shim.h"

#include "../../../kernels/cuda/common.cuh"
#include "../../../kernels/cuda/dequantise.cu"

KV_SOURCE(dequantise, KV_ENTRY(dequantise, dequantise, DequantiseParams))
