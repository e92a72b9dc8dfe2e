// SPDX-License-Identifier: Apache-2.0
//
// home.h: where the lanes of a GPU rank stand that a network reads from and writes into.
//
//   device  GPU memory that the backend is shown as a dmabuf, or by its address: rows never cross the host. Where the
//           backend says that it takes such (caps), and a kernel that has seen a signal sees what the network wrote
//           before it: the backend needs no `visible`, which the engine doesn't call, and the GPU orders writes of
//           others for its own kernels.
//   pinned  host memory that kernels store rows into and read them from, over PCIe: for all others, as TCP.
// Signals of such lanes are pinned in both cases: they are counted by the engine, on the host.
#pragma once

#include <memory>
#include <string>

#include "moe/arena.h"
#include "moe/cuda/gpu.h"

namespace ept::moe::cuda {

enum class Home : uint32_t { automatic = 0, device = 1, pinned = 2 };

// A lane's memory on the GPU, registered; NULL: it shall be pinned. *why says, for a log, what was chosen and why.
// Throws where `wish` is device and that can't be.
std::unique_ptr<LaneMemory> device_home(const std::shared_ptr<Gpu> &gpu, ept_engine *engine, Home wish, uint64_t bytes,
                                        std::string *why);

}  // namespace ept::moe::cuda
