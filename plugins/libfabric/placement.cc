// SPDX-License-Identifier: Apache-2.0
#include "placement.h"

#include <algorithm>
#include <cctype>
#include <cstdio>
#include <cstring>

#include "near.h"

namespace libfabric {
namespace {

template <class Function>
bool take(const ept_host &host, const char *name, Function **function) {
  void *symbol = host.cuda(host.context, name);
  memcpy(function, &symbol, sizeof symbol);
  return symbol != nullptr;
}

// Calls of the CUDA driver: 0 is success, a device is an int.
struct Cuda {
  int (*context_device)(int *) = nullptr;
  int (*device_count)(int *) = nullptr;
  int (*primary_state)(int, unsigned *, int *) = nullptr;
  int (*pci_address)(char *, int, int) = nullptr;

  bool bind(const ept_host &host) {
    return take(host, "cuCtxGetDevice", &context_device) && take(host, "cuDeviceGetCount", &device_count) &&
           take(host, "cuDevicePrimaryCtxGetState", &primary_state) && take(host, "cuDeviceGetPCIBusId", &pci_address);
  }

  // -1: none, or it can't be told which.
  int device() const {
    int current = -1, count = 0, found = -1;
    if (context_device(&current) == 0) return current;
    if (device_count(&count) != 0) return -1;
    for (int device = 0; device < count; ++device) {
      unsigned flags = 0;
      int active = 0;
      if (primary_state(device, &flags, &active) != 0 || active == 0) continue;
      if (found >= 0) return -1;
      found = device;
    }
    return found;
  }
};

}  // namespace

std::string gpu_of(const ept_host &host) {
  Cuda cuda;
  if (host.cuda == nullptr || !cuda.bind(host)) return "";
  char text[32] = {};
  const int device = cuda.device();
  if (device < 0 || cuda.pci_address(text, sizeof text, device) != 0) return "";
  std::string pci = text;
  // The kernel's files have small letters.
  std::transform(pci.begin(), pci.end(), pci.begin(), [](unsigned char c) { return static_cast<char>(tolower(c)); });
  return pci;
}

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
  for (size_t card : nics_near(cards, gpu, sysfs)) mine.push_back(cards[card]);
  const auto far = [&mine](const fi_info *info) {
    return std::find(mine.begin(), mine.end(), pci_of(*info)) == mine.end();
  };
  infos->erase(std::remove_if(infos->begin(), infos->end(), far), infos->end());
}

}  // namespace libfabric
