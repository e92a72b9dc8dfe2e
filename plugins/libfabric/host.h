// SPDX-License-Identifier: Apache-2.0
// What the machine is and has, as far as the providers care.
#pragma once

#include "handshake.h"
#include "settings.h"

namespace libfabric {

// The same for two processes that can share memory: this boot, this mount of /dev/shm, these process numbers.
Nonce this_host(const ept_host &host);

// Whether libfabric may touch GPUs here. `auto` looks for a CUDA context that this process has; it makes none.
bool wants_gpu(const ept_host &host, const Settings &settings);

// Sets what libfabric reads from the environment when it is first asked, unless it is set already. `world`: ranks, 0
// where that isn't known yet.
void prepare_environment(bool gpu, const std::string &provider, uint32_t world);

// Bytes that are free in /dev/shm; 0: there is none.
uint64_t shared_memory_room();

int32_t numa_of(const std::string &pci);  // -1: unknown

}  // namespace libfabric
