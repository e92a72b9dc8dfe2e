// SPDX-License-Identifier: Apache-2.0
//
// placement.h: of what a provider offers, what is near the GPU that this rank uses. ../near.h has the rule; here is
// what it is asked with: the cards behind libfabric's entries.
#pragma once

#include <rdma/fabric.h>

#include <string>
#include <vector>

namespace libfabric {

// The PCI address of the card behind an entry; empty where it is no card.
std::string pci_of(const fi_info &info);

// Keeps the entries whose cards are this GPU's share, in their order. All of them where the GPU is unknown or one of
// the entries is no card. `sysfs` is /sys, or a test's.
void keep_near(std::vector<fi_info *> *infos, const std::string &gpu, const std::string &sysfs);

}  // namespace libfabric
