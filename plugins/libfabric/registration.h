// SPDX-License-Identifier: Apache-2.0
// One registration of memory on one rail: of the host, of a GPU as a dmabuf, of a GPU by its address.
//
// A GPU's memory is registered as a dmabuf where it comes as one and libfabric knows them (FI_MR_DMABUF, 1.20): the
// kernel's own way, without a driver beside NVIDIA's. A provider that can't do it (its kernel, its card) says so, and
// then the same range is registered by its address with the GPU that it is of (FI_HMEM_CUDA), which needs peermem.
// Which of the two was taken makes no difference to keys, bounds or addresses.
#pragma once

#include <rdma/fi_domain.h>

#include "endpoint.h"

namespace libfabric {

// What can be registered by this libfabric, as ept_memory_kind. `gpu`: FI_HMEM was asked for and given.
int32_t memory_kinds(bool gpu, uint32_t version);

// Of [address, address + length), which lies in `memory`. `key`: what to ask for, where keys are ours to draw.
int32_t register_range(Library &library, Rail *rail, const ept_memory &memory, uint8_t *address, uint64_t length,
                       uint64_t access, uint64_t key, fid_mr **mr);

}  // namespace libfabric
