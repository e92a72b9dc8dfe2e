// SPDX-License-Identifier: Apache-2.0
//
// near.h: which NICs a rank should use, from where they sit beside its GPU. A p5 has 32 NICs and 8 GPUs, four of the
// first under the PCIe switch of each of the second: bytes that take another switch's NIC cross the processors, at a
// fraction of the rate, and on a link that all ranks share.
//
// INVARIANT. Ranks whose GPUs share a set of nearest NICs deal it out among them: no NIC is left idle, none is taken by
// two ranks while there are as many NICs as GPUs, and each rank finds its share by itself, from the files alone.
#pragma once

#include <cstddef>
#include <string>
#include <vector>

#include "eptransport/backend.h"

namespace plugin {

// The PCI address (0000:53:00.0) of the GPU whose context is current in this thread, or else of the one GPU of which
// this process has a primary context. Empty: no driver, no context (none is made), or several and none is current.
std::string gpu_of(const ept_host &host);

// Indices into `nics` (PCI addresses as 0000:5a:00.0), ascending: those to use for the GPU at `gpu`. Nearest is who
// shares most bridges with it; where none shares any, those of its NUMA node; where that isn't known either, all.
// `sysfs` is /sys, or a test's. All where `gpu` is empty.
std::vector<size_t> nics_near(const std::vector<std::string> &nics, const std::string &gpu, const std::string &sysfs);

}  // namespace plugin
