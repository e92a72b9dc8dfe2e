// SPDX-License-Identifier: Apache-2.0
#include "near.h"

#include <algorithm>
#include <cctype>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <numeric>

namespace plugin {
namespace {

namespace fs = std::filesystem;

std::string word_of(const fs::path &file) {
  std::ifstream stream(file);
  std::string word;
  stream >> word;
  return word;
}

// The bridges above a card, from the root of its bus down: /sys/devices/pci0000:10/0000:10:01.0/0000:11:00.0/<card>.
std::vector<std::string> bridges_of(const fs::path &devices, const std::string &pci) {
  std::error_code error;
  fs::path real = fs::canonical(devices / pci, error);
  std::vector<std::string> bridges;
  if (error) return bridges;
  for (const fs::path &part : real.parent_path()) {
    const std::string name = part.string();
    if (!bridges.empty() || name.compare(0, 3, "pci") == 0) bridges.push_back(name);
  }
  return bridges;
}

size_t shared(const std::vector<std::string> &a, const std::vector<std::string> &b) {
  size_t most = std::min(a.size(), b.size());
  return static_cast<size_t>(std::mismatch(a.begin(), a.begin() + static_cast<std::ptrdiff_t>(most), b.begin()).first -
                             a.begin());
}

std::vector<size_t> nearest(const std::vector<std::string> &nics, const std::string &gpu, const fs::path &devices) {
  const std::vector<std::string> above = bridges_of(devices, gpu);
  std::vector<size_t> found;
  size_t most = 1;  // fewer than one bridge in common is no neighbour
  for (size_t i = 0; i < nics.size(); ++i) {
    size_t common = shared(above, bridges_of(devices, nics[i]));
    if (common > most) found.clear();
    if (common >= most) found.push_back(i);
    most = std::max(most, common);
  }
  if (!found.empty()) return found;
  const std::string node = word_of(devices / gpu / "numa_node");
  for (size_t i = 0; i < nics.size(); ++i)
    if (!node.empty() && node != "-1" && word_of(devices / nics[i] / "numa_node") == node) found.push_back(i);
  return found;
}

// All NVIDIA cards that compute: those of display class, without the audio device and the bridges of the same vendor.
std::vector<std::string> gpus(const fs::path &devices) {
  std::vector<std::string> found;
  std::error_code error;
  for (const fs::directory_entry &entry : fs::directory_iterator(devices, error))
    if (word_of(entry.path() / "vendor") == "0x10de" && word_of(entry.path() / "class").compare(0, 4, "0x03") == 0)
      found.push_back(entry.path().filename().string());
  std::sort(found.begin(), found.end());
  return found;
}

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

std::vector<size_t> nics_near(const std::vector<std::string> &nics, const std::string &gpu, const std::string &sysfs) {
  const fs::path devices = fs::path(sysfs) / "bus" / "pci" / "devices";
  std::vector<size_t> all(nics.size());
  std::iota(all.begin(), all.end(), size_t{0});
  if (gpu.empty()) return all;
  const std::vector<size_t> mine = nearest(nics, gpu, devices);
  if (mine.empty()) return all;
  // Who else has the same NICs, and which of us am I.
  size_t sharers = 0, place = 0;
  for (const std::string &other : gpus(devices)) {
    if (other == gpu) place = sharers;
    if (other == gpu || nearest(nics, other, devices) == mine) ++sharers;
  }
  if (sharers <= 1) return mine;
  if (mine.size() < sharers) return {mine[place % mine.size()]};
  std::vector<size_t> share;
  for (size_t i = place; i < mine.size(); i += sharers) share.push_back(mine[i]);
  return share;
}

}  // namespace plugin
