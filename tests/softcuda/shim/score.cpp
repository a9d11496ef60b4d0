#include "shim.h"

#include "../../../kernels/cuda/common.cuh"
#include "../../../kernels/cuda/score.cu"

KV_SOURCE(score,
    KV_ENTRY(score, partial_scores, ScoresParams),
    KV_ENTRY(score, quest_bounds, QuestParams),
    KV_ENTRY(score, hamming, HammingParams))
