// SPDX-License-Identifier: Apache-2.0
#include "host.h"

#include <sys/stat.h>
#include <sys/statvfs.h>

#include <algorithm>
#include <climits>
#include <cstdlib>
#include <cstring>
#include <fstream>

namespace libfabric {

Nonce this_host(const ept_host &host) {
  std::string text;
  std::ifstream boot("/proc/sys/kernel/random/boot_id");
  std::getline(boot, text);
  char space[PATH_MAX];
  ssize_t length = readlink("/proc/self/ns/pid", space, sizeof space);
  if (length > 0) text.append(space, static_cast<size_t>(length));
  struct stat shm{};
  if (stat("/dev/shm", &shm) == 0) text += format(" %llu", static_cast<unsigned long long>(shm.st_dev));
  static const char key[] = "eptransport libfabric host";
  Nonce id{};
  host.hmac_sha256(host.context, key, sizeof key - 1, text.data(), text.size(), id.data());
  return id;
}

bool wants_gpu(const ept_host &host, const Settings &settings) {
  if (settings.gpu != "auto") return settings.gpu == "1";
  using Count = int (*)(int *);
  using State = int (*)(int, unsigned *, int *);
  Count count_of = nullptr;
  State state_of = nullptr;
  void *symbol = host.cuda(host.context, "cuDeviceGetCount");
  memcpy(&count_of, &symbol, sizeof symbol);
  symbol = host.cuda(host.context, "cuDevicePrimaryCtxGetState");
  memcpy(&state_of, &symbol, sizeof symbol);
  int devices = 0;
  // Neither call makes a context; before cuInit both say "not initialised", and then nobody uses a GPU yet.
  if (count_of == nullptr || state_of == nullptr || count_of(&devices) != 0) return false;
  for (int device = 0; device < devices; ++device) {
    unsigned flags = 0;
    int active = 0;
    if (state_of(device, &flags, &active) == 0 && active != 0) return true;
  }
  return false;
}

namespace {

// rxm makes one completion queue of a card for as many connections as FI_UNIVERSE_SIZE says ranks, 256 if it says
// nothing: more would overrun it, and soft-RoCE has none so long (32,767 entries; fi_enable says Invalid argument).
// Twice: two ranks that connect to each other at once have two connections for a while. A probe comes before the world
// is known, but what starts ranks says it; and a process may open a larger one later, hence the least.
void prepare_layered_verbs(uint32_t world) {
  constexpr unsigned long kLeast = 16;
  const char *started = getenv("WORLD_SIZE");
  unsigned long ranks = world;
  if (started != nullptr) ranks = std::max(ranks, strtoul(started, nullptr, 10));
  setenv("FI_UNIVERSE_SIZE", std::to_string(std::max(2 * ranks, kLeast)).c_str(), 0);
  // With the cache, two registrations of a range have one key, which outlives both: nothing would be taken back.
  setenv("FI_MR_CACHE_MAX_COUNT", "0", 0);
}

}  // namespace

void prepare_environment(bool gpu, const std::string &provider, uint32_t world) {
  // Omni-Path's libraries put handlers of their own on SIGSEGV and its kin when they are loaded, and write a *.btr file
  // into the working directory on a crash that is not theirs. They are no network of ours unless asked for.
  setenv("IPATH_NO_BACKTRACE", "1", 0);
  setenv("HFI_NO_BACKTRACE", "1", 0);
  if (provider.compare(0, 3, "psm") != 0 && provider.compare(0, 3, "opx") != 0)
    setenv("FI_PROVIDER", "^psm,psm2,psm3,opx", 0);
  // libfabric makes a CUDA context of its own on GPU 0 (some 600 MiB) when it initialises memory kinds.
  if (!gpu) setenv("FI_HMEM", "system", 0);
  // EFA between two processes of a machine goes by libfabric's shared memory otherwise, whose GPU path has hung.
  setenv("FI_EFA_ENABLE_SHM_TRANSFER", "0", 0);
  // The fabric efa caches registrations (efa-direct doesn't): peers would share a key, and fi_close would leave it
  // valid.
  setenv("FI_EFA_MR_CACHE_ENABLE", "0", 0);
  if (provider.compare(0, 5, "verbs") == 0) prepare_layered_verbs(world);
}

uint64_t shared_memory_room() {
  struct statvfs room{};
  return statvfs("/dev/shm", &room) == 0 ? uint64_t{room.f_bavail} * room.f_frsize : 0;
}

int32_t numa_of(const std::string &pci) {
  std::ifstream file("/sys/bus/pci/devices/" + pci + "/numa_node");
  int32_t node = -1;
  file >> node;
  return file ? node : -1;
}

}  // namespace libfabric
