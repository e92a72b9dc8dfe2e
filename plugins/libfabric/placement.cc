// SPDX-License-Identifier: Apache-2.0
#include "placement.h"

#include <algorithm>
#include <cstdio>

#include "../near.h"

namespace libfabric {
std::string pci_of(const fi_info &info) {
  if (info.nic == nullptr || info.nic->bus_attr == nullptr || info.nic->bus_attr->bus_type != FI_BUS_PCI) return "";
  const fi_pci_attr &pci = info.nic->bus_attr->attr.pci;
  char text[32];
  snprintf(text, sizeof text, "%04x:%02x:%02x.%x", pci.domain_id, pci.bus_id, pci.device_id, pci.function_id);
  return text;
}

void keep_near(std::vector<fi_info *> *infos, const std::string &gpu, const std::string &sysfs) {
  // A card that is offered twice is one card.
  std::vector<std::string> cards;
  for (const fi_info *info : *infos) {
    const std::string pci = pci_of(*info);
    if (pci.empty()) return;
    if (std::find(cards.begin(), cards.end(), pci) == cards.end()) cards.push_back(pci);
  }
  std::vector<std::string> mine;
  for (size_t card : plugin::nics_near(cards, gpu, sysfs)) mine.push_back(cards[card]);
  const auto far = [&mine](const fi_info *info) {
    return std::find(mine.begin(), mine.end(), pci_of(*info)) == mine.end();
  };
  infos->erase(std::remove_if(infos->begin(), infos->end(), far), infos->end());
}

}  // namespace libfabric
