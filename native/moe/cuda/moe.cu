// SPDX-License-Identifier: Apache-2.0
//
// moe.cu: the kernels of dispatch and combine, one module.
#include "moe/cuda/combine.cuh"
#include "moe/cuda/dispatch_claims.cuh"
#include "moe/cuda/dispatch_recv.cuh"
#include "moe/cuda/dispatch_send.cuh"
#include "moe/cuda/lane_kernels.cuh"
#include "moe/cuda/late_weights.cuh"
#include "moe/cuda/quiet.cuh"
#include "moe/cuda/streamed_combine.cuh"
#include "moe/cuda/streamed_dispatch.cuh"
#include "moe/cuda/streamed_late.cuh"
#include "moe/cuda/trial.cuh"
