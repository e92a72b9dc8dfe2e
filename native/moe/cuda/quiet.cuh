// SPDX-License-Identifier: Apache-2.0
//
// quiet.cuh: all that this rank's kernels have put themselves has arrived: before a reset, when peers begin anew with
// memory where it would land. The stores and the commands of other paths need none: the end of a kernel and the proxy
// see to those.
#pragma once

#include "moe/cuda/protocol.cuh"

EPT_KERNEL moe_quiet(EPT_ARGUMENT(ept::moe::cuda::Drain) args) {
  using namespace ept::moe::cuda;
  if (!args.lane.initiates || threadIdx.x != 0 || blockIdx.x != 0) return;
#ifdef EPT_GPU_INITIATED
  ept_library_quiet();
#endif
}
