// SPDX-License-Identifier: Apache-2.0
//
// pci_machine.h: what Linux shows of the cards of a machine that we haven't got, as files of a folder.
#pragma once

#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <string>
#include <vector>

#include "../../plugins/near.h"
#include "check.h"

namespace pci {

namespace fs = std::filesystem;

class Machine {
 public:
  Machine() {
    char name[] = "/tmp/ept_near_XXXXXX";
    CHECK(mkdtemp(name) != nullptr);
    root_ = name;
  }
  ~Machine() { fs::remove_all(root_); }

  void card(const std::string &path, const std::string &pci, bool gpu, int node) {
    const fs::path at = root_ / "devices" / path / pci;
    put(at / "vendor", gpu ? "0x10de" : "0x1d0f");
    put(at / "class", gpu ? "0x030200" : "0x020000");
    put(at / "numa_node", std::to_string(node));
    fs::create_directories(root_ / "bus/pci/devices");
    fs::create_symlink(at, root_ / "bus/pci/devices" / pci);
    (gpu ? gpus : nics).push_back(pci);
  }
  void node(int number, const std::string &cores) {
    put(root_ / "devices/system/node" / ("node" + std::to_string(number)) / "cpulist", cores);
  }
  std::vector<size_t> near(const std::string &gpu) const { return plugin::nics_near(nics, gpu, root_.string()); }
  std::string sysfs() const { return root_.string(); }
  std::string system() const { return (root_ / "devices/system").string(); }

  std::vector<std::string> nics, gpus;

 private:
  static void put(const fs::path &file, const std::string &text) {
    fs::create_directories(file.parent_path());
    std::ofstream(file) << text << "\n";
  }
  fs::path root_;
};

inline std::string hex(unsigned bus) {
  char text[16];
  snprintf(text, sizeof text, "0000:%02x:00.0", bus & 0xff);
  return text;
}

// Each switch a root port, a bridge and below it its NICs and GPUs, as AWS's instances show theirs.
inline void switches(Machine *machine, unsigned count, unsigned nics, unsigned gpus) {
  for (unsigned s = 0; s < count; ++s) {
    const std::string path = "pci0000:" + std::to_string(10 + s) + "/0000:" + std::to_string(10 + s) + ":01.0";
    unsigned bus = 1 + s * (nics + gpus);
    const int node = s < count / 2 ? 0 : 1;
    for (unsigned i = 0; i < nics; ++i) machine->card(path, hex(bus++), false, node);
    for (unsigned i = 0; i < gpus; ++i) machine->card(path, hex(bus++), true, node);
  }
}

}  // namespace pci
