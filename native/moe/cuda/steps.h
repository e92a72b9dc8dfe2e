// SPDX-License-Identifier: Apache-2.0
//
// steps.h: the halves of a step: arguments are checked, and kernels launched; none waits for one. All throw Failure.
#pragma once

#include "eptransport/gpu.h"
#include "moe/cuda/lanes.h"

namespace ept::moe::cuda {

uint32_t lane_of(const GpuObject &moe, uint32_t lane);
// For a call that launches, or asks what launches did.
uint32_t lane_awake(const GpuObject &moe, uint32_t lane);

void dispatch_send(GpuObject &moe, const ept_dispatch_args &args, void *routing, void *stream);
void dispatch_wait(GpuObject &moe, uint32_t lane, uint64_t *arrival, void *stream);
void dispatch_recv(GpuObject &moe, uint32_t lane, const ept_dispatch_outputs &o, void *routing, uint64_t tokens,
                   int32_t *num_rows, uint64_t ticket, void *stream);
void late_weights(GpuObject &moe, uint32_t lane, const ept_tensor &weights, void *routing, float *late, void *stream);
void combine_send(GpuObject &moe, const ept_combine_args &args, void *routing, uint64_t tokens, float *late,
                  void *stream);
void combine_recv(GpuObject &moe, uint32_t lane, const ept_tensor &y, const ept_tensor *row_weights, void *routing,
                  void *stream);
// What is there of the phase's open generation is thrown away when it comes.
void drain(GpuObject &moe, uint32_t lane, uint32_t phase, void *stream);

// Of a dispatch of so many tokens, and where the ids and the weights are in it.
uint64_t routing_bytes(const GpuObject &moe, uint64_t tokens);
uint64_t routing_ids(const GpuObject &moe, uint64_t tokens);
uint64_t routing_weights(const GpuObject &moe, uint64_t tokens);

}  // namespace ept::moe::cuda
