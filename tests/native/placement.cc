// SPDX-License-Identifier: Apache-2.0
//
// Which GPU a rank uses, as a driver made of functions tells it, and which of libfabric's entries are left for it on a
// machine made of files.
#include "../../plugins/libfabric/placement.h"

#include <memory>
#include <set>

#include "pci_machine.h"

namespace {

using namespace pci;

constexpr int kNotInitialised = 3, kNoContext = 201;  // as cuda.h numbers them

// A driver of two GPUs.
struct Driver {
  bool here = true, initialised = true;
  int current = -1;
  bool primary[2] = {};
} driver;

int context_device(int *device) {
  if (!driver.initialised) return kNotInitialised;
  *device = driver.current;
  return driver.current < 0 ? kNoContext : 0;
}
int device_count(int *count) {
  *count = 2;
  return driver.initialised ? 0 : kNotInitialised;
}
int primary_state(int device, unsigned *, int *active) {
  *active = driver.primary[device];
  return 0;
}
int pci_address(char *text, int length, int device) {
  snprintf(text, static_cast<size_t>(length), "0000:%X:00.0", 0xCA + device);
  return 0;
}

void *symbol(void *, const char *name) {
  if (!driver.here) return nullptr;
  if (strcmp(name, "cuCtxGetDevice") == 0) return reinterpret_cast<void *>(&context_device);
  if (strcmp(name, "cuDeviceGetCount") == 0) return reinterpret_cast<void *>(&device_count);
  if (strcmp(name, "cuDevicePrimaryCtxGetState") == 0) return reinterpret_cast<void *>(&primary_state);
  if (strcmp(name, "cuDeviceGetPCIBusId") == 0) return reinterpret_cast<void *>(&pci_address);
  return nullptr;
}

std::string gpu(const Driver &state) {
  driver = state;
  ept_host host{};
  host.size = sizeof host;
  host.cuda = symbol;
  return plugin::gpu_of(host);
}

void the_gpu_is_the_one_in_use() {
  check::running("the GPU");
  CHECK_EQ(gpu({true, true, 0, {}}), std::string("0000:ca:00.0"));
  CHECK_EQ(gpu({true, true, 1, {true, true}}), std::string("0000:cb:00.0"));
  // Not current in the thread that opens, but the only one that this process uses.
  CHECK_EQ(gpu({true, true, -1, {false, true}}), std::string("0000:cb:00.0"));
  CHECK_EQ(gpu({true, true, -1, {true, true}}), std::string());
  CHECK_EQ(gpu({true, true, -1, {}}), std::string());
  CHECK_EQ(gpu({true, false, -1, {}}), std::string());
  CHECK_EQ(gpu({false, true, 0, {}}), std::string());
  CHECK_EQ(plugin::gpu_of(ept_host{}), std::string());
}

// An entry of fi_getinfo; `card` is empty for one that is no card.
struct Entry {
  explicit Entry(const std::string &card) {
    info.nic = &nic;
    nic.bus_attr = &bus;
    bus.bus_type = card.empty() ? FI_BUS_UNKNOWN : FI_BUS_PCI;
    unsigned domain = 0, at = 0, device = 0, function = 0;
    if (!card.empty()) CHECK_EQ(sscanf(card.c_str(), "%x:%x:%x.%x", &domain, &at, &device, &function), 4);
    bus.attr.pci.domain_id = static_cast<uint16_t>(domain);
    bus.attr.pci.bus_id = static_cast<uint8_t>(at);
    bus.attr.pci.device_id = static_cast<uint8_t>(device);
    bus.attr.pci.function_id = static_cast<uint8_t>(function);
  }
  Entry(const Entry &) = delete;
  Entry &operator=(const Entry &) = delete;
  fi_info info{};
  fid_nic nic{};
  fi_bus_attr bus{};
};

struct Offer {
  explicit Offer(const std::vector<std::string> &cards) {
    for (const std::string &card : cards) entries.push_back(std::make_unique<Entry>(card));
  }
  // Indices into `entries` of what is left.
  std::vector<size_t> near(const std::string &gpu, const std::string &sysfs) const {
    std::vector<fi_info *> infos;
    for (const auto &entry : entries) infos.push_back(&entry->info);
    libfabric::keep_near(&infos, gpu, sysfs);
    std::vector<size_t> left;
    for (const fi_info *info : infos)
      for (size_t i = 0; i < entries.size(); ++i)
        if (&entries[i]->info == info) left.push_back(i);
    CHECK_EQ(left.size(), infos.size());
    return left;
  }
  std::vector<std::unique_ptr<Entry>> entries;
};

void eight_ranks_of_a_p5_take_all_its_nics() {
  check::running("p5");
  Machine machine;
  switches(&machine, 8, 4, 1);
  const Offer offer(machine.nics);
  std::set<size_t> taken;
  for (const std::string &gpu : machine.gpus) {
    const std::vector<size_t> mine = offer.near(gpu, machine.sysfs());
    CHECK_EQ(mine.size(), size_t{4});
    CHECK(mine == machine.near(gpu));
    taken.insert(mine.begin(), mine.end());
  }
  CHECK_EQ(taken.size(), size_t{32});
}

void entries_of_one_card_stay_together() {
  check::running("offered twice");
  Machine machine;
  switches(&machine, 1, 2, 2);
  std::vector<std::string> twice = machine.nics;  // an entry a card, and again
  twice.insert(twice.end(), machine.nics.begin(), machine.nics.end());
  const Offer offer(twice);
  CHECK(offer.near(machine.gpus[0], machine.sysfs()) == (std::vector<size_t>{0, 2}));
  CHECK(offer.near(machine.gpus[1], machine.sysfs()) == (std::vector<size_t>{1, 3}));
}

void what_is_not_known_leaves_all() {
  check::running("unknown");
  Machine machine;
  switches(&machine, 2, 2, 1);
  CHECK_EQ(Offer(machine.nics).near("", machine.sysfs()).size(), size_t{4});
  CHECK_EQ(Offer(machine.nics).near(machine.gpus[0], "/no/such/folder").size(), size_t{4});
  std::vector<std::string> mixed = machine.nics;
  mixed.push_back("");
  CHECK_EQ(Offer(mixed).near(machine.gpus[0], machine.sysfs()).size(), size_t{5});
  const Offer bare({""});
  bare.entries[0]->info.nic = nullptr;
  CHECK_EQ(bare.near(machine.gpus[0], machine.sysfs()).size(), size_t{1});
}

}  // namespace

int main() {
  the_gpu_is_the_one_in_use();
  eight_ranks_of_a_p5_take_all_its_nics();
  entries_of_one_card_stay_together();
  what_is_not_known_leaves_all();
  return 0;
}
