// SPDX-License-Identifier: Apache-2.0
//
// A stand-in for libnvshmem_host.so.3: what the plugin asks of it, and no network. FAKE_NVSHMEM has words with what
// goes wrong (uid, args, init, pe, malloc, module), or the release as "3.4.5"; "waits" holds the start until the file
// that FAKE_NVSHMEM_GATE names is there, as a start waits for the other PEs.
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include <string>

namespace {

// As NVSHMEM's, by offsets: the args of nvshmemx_init_attr_t are at 16, and of those the id's at 8.
struct Uid {
  int version;
  const void *id;
  int rank, ranks;
};

int rank, ranks, starts;

bool says(const char *word) {
  const char *text = getenv("FAKE_NVSHMEM");
  return text != nullptr && strstr(text, word) != nullptr;
}

}  // namespace

extern "C" {

void nvshmemx_vendor_get_version_info(int *major, int *minor, int *patch) {
  *major = 3, *minor = 4, *patch = 5;
  const char *text = getenv("FAKE_NVSHMEM");
  if (text != nullptr && text[0] >= '0' && text[0] <= '9') sscanf(text, "%d.%d.%d", major, minor, patch);
}
int nvshmemx_get_uniqueid(void *id) {
  int version = 0;
  memcpy(&version, id, sizeof version);
  if (version != (1 << 16) + 128 || says("uid")) return 7;
  memset(static_cast<char *>(id) + sizeof version, 0x5a, 124);
  return 0;
}
int nvshmemx_set_attr_uniqueid_args(int its_rank, int its_ranks, const void *id, void *attributes) {
  if (says("args") || static_cast<const char *>(id)[4] != 0x5a) return 8;
  Uid uid{(1 << 16) + 24, id, its_rank, its_ranks};
  memcpy(static_cast<char *>(attributes) + 24, &uid, sizeof uid);
  return 0;
}
int nvshmemx_hostlib_init_attr(unsigned flags, void *attributes) {
  const auto *bytes = static_cast<const char *>(attributes);
  int versions[2];
  memcpy(&versions[0], bytes, sizeof(int));
  memcpy(&versions[1], bytes + 16, sizeof(int));
  Uid uid;
  memcpy(&uid, bytes + 24, sizeof uid);
  if (flags != 8 || versions[0] != (1 << 16) + 144 || versions[1] != (1 << 16) + 128 || says("init")) return 9;
  const char *gate = getenv("FAKE_NVSHMEM_GATE");
  while (says("waits") && access(gate, F_OK) != 0) usleep(1000);
  rank = uid.rank, ranks = uid.ranks;
  starts++;
  return 0;
}
int nvshmemx_cumodule_init(void *module) { return module == nullptr || says("module") ? 10 : 0; }
void *nvshmem_malloc(size_t bytes) { return says("malloc") ? nullptr : aligned_alloc(4096, bytes); }
// PE 1 isn't mapped, as one of another node.
void *nvshmem_ptr(const void *at, int pe) { return pe == 1 ? nullptr : const_cast<void *>(at); }
int nvshmem_my_pe() { return says("pe") ? rank + 1 : rank; }
int nvshmem_n_pes() { return ranks; }
int fake_starts() { return starts; }
}
