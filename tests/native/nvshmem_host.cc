// SPDX-License-Identifier: Apache-2.0
//
// The host side of the backend nvshmem, over a library that stands in for NVSHMEM's (nvshmem/fake.cc) and tcp beneath:
// what is missing, releases that don't fit, joining and what can fail in it, the symmetric heap, the device half. A
// process is one PE for good, so each part is a process of its own.
#include <dlfcn.h>
#include <sys/wait.h>

#include <functional>

#include "engine/sha256.h"
#include "plugin.h"

using plugin::Options;

namespace {

std::string folder;  // of the plugin with kernels that nobody can run, and of the stand-in
const ept_backend *backend;

int device_count = 2, current = -1;
bool has_driver = true;

void *cuda(void *, const char *name) {
  const std::string symbol = name;
  if (!has_driver) return nullptr;
  const auto of = [](auto *function) {
    void *address = nullptr;
    memcpy(&address, &function, sizeof address);
    return address;
  };
  if (symbol == "cuInit") return of(+[](unsigned) { return 0; });
  if (symbol == "cuDeviceGetCount") return of(+[](int *count) { return *count = device_count, 0; });
  if (symbol == "cuCtxGetDevice") return of(+[](int *device) { return *device = current, current < 0 ? 201 : 0; });
  if (symbol == "cuDeviceGetAttribute")
    return of(+[](int *value, int which, int) { return *value = which == 75 ? 9 : 0, 0; });
  if (symbol == "cuDevicePrimaryCtxRetain") return of(+[](void **context, int) { return *context = &current, 0; });
  if (symbol == "cuCtxPushCurrent_v2") return of(+[](void *) { return 0; });
  if (symbol == "cuCtxPopCurrent_v2") return of(+[](void **) { return 0; });
  return nullptr;
}

Options options(const Options &more = {}) {
  Options all = {{"library", folder + "/nvshmem_fake.so"},
                 {"control", std::string(getenv("EPT_TEST_PLUGINS")) + "/ept_tcp.so"},
                 {"control_options", "streams=1;interface=lo"},
                 {"heap_mib", "1"}};
  for (const auto &[name, value] : more) all[name] = value;
  return all;
}

ept_host host() {
  ept_host its = plugin::host();
  its.cuda = cuda;
  return its;
}

struct Opened {
  explicit Opened(const Options &more = {}, uint32_t rank = 0, uint32_t world = 2)
      : values(*backend, options(more)), its_host(host()) {
    plugin::Identity id;
    id.rank = rank, id.world = world;
    code = plugin::Rank::open(*backend, id, values, its_host, &instance);
    if (code == EPT_OK) CHECK_OK(*backend, backend->worker_open(instance, &worker));
  }
  ~Opened() {
    if (worker) backend->worker_close(worker);
    if (instance) backend->close(instance);
  }
  // Round 0: what this rank says, and the same as if rank 1 had.
  std::vector<std::string> say() {
    char out[4096];
    ept_join join{};
    join.size = sizeof join;
    join.out = out, join.out_capacity = sizeof out;
    code = backend->join(instance, &join);
    if (code != EPT_OK) return {};
    CHECK_EQ(join.done, 0);
    std::string own(out, join.out_length), other = own;
    const uint32_t one = 1;
    memcpy(other.data() + 8, &one, sizeof one);
    return {own, other};
  }
  int32_t hear(const std::vector<std::string> &said) {
    std::vector<const void *> blobs;
    std::vector<size_t> lengths;
    for (const std::string &blob : said) blobs.push_back(blob.data()), lengths.push_back(blob.size());
    ept_join join{};
    join.size = sizeof join;
    join.round = 1;
    join.blobs = blobs.data(), join.lengths = lengths.data();
    do {
      usleep(100);
      code = backend->join(instance, &join);
      turns++;
    } while (code == EPT_LATER && !(gate && turns > 50));
    if (code == EPT_OK) CHECK_EQ(join.done, 1);
    return code;
  }
  void joins() {
    const auto said = say();
    CHECK_OK(*backend, code);
    CHECK_OK(*backend, hear(said));
  }
  plugin::Values values;
  ept_host its_host;
  ept_instance *instance = nullptr;
  ept_worker *worker = nullptr;
  int32_t code = EPT_OK;
  int turns = 0;
  bool gate = false;
};

std::string text() { return plugin::error_text(*backend); }

// In a process of its own, which may die.
void part(const char *name, const std::function<void()> &body) {
  check::running(name);
  fflush(stdout);
  const pid_t child = fork();
  if (child == 0) {
    body();
    fflush(stdout);
    _exit(0);
  }
  int status = 0;
  CHECK_EQ(waitpid(child, &status, 0), child);
  CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 0);
}

void missing() {
  const auto refused = [](const Options &more, int32_t code, const char *says, const char *mend) {
    plugin::Values values(*backend, options(more));
    const ept_host its = host();
    ept_probe report{};
    report.size = sizeof report;
    report.caps.size = sizeof report.caps;
    CHECK_EQ(backend->probe(&its, values.list.data(), values.list.size(), &report), code);
    CHECK_HAS(report.summary, says);
    CHECK_HAS(report.mend, mend);
    CHECK_EQ(report.caps.waived, 1u << 9 | 1u << 10 | 1u << 11 | 1u << 12);
    CHECK_HAS(report.caps.waived_why, "NVSHMEM ends the process");
    Opened opened(more);
    CHECK_EQ(opened.code < 0, true);
    CHECK_HAS(text(), says);
  };
  refused({{"library", "/nowhere/libnvshmem_host.so.3"}}, EPT_E_UNAVAILABLE, "/nowhere/", "pip install nvidia-nvshmem");
  refused({{"library", "libc.so.6"}}, EPT_E_UNAVAILABLE, "has no nvshmemx_vendor_get_version_info", "pip install");
  refused({{"control", "nvshmem"}}, EPT_E_CONFIG, "it names another backend", "correct that setting");
  refused({{"control", "nonsense"}}, EPT_E_CONFIG, "whose plugin can't be opened", "correct that setting");
  refused({{"control", folder + "/nvshmem_fake.so"}}, EPT_E_CONFIG, "no plugin of ABI", "correct");
  refused({{"control_options", "streams"}}, EPT_E_CONFIG, "name=value", "correct that setting");
  refused({{"control_options", "rails=2"}}, EPT_E_CONFIG, "'rails=2'", "correct that setting");
  has_driver = false;
  refused({}, EPT_E_UNAVAILABLE, "no CUDA driver", "NVIDIA's driver");
}

void releases() {
  const auto with = [](const char *release) {
    setenv("FAKE_NVSHMEM", release, 1);
    Opened opened;
    return opened.code;
  };
  CHECK_EQ(with("3.2.5"), EPT_E_VERSION);  // older than the device library in the kernels
  CHECK_HAS(text(), "is 3.2.5; the kernels are linked with 3.4.5");
  CHECK_EQ(with("4.0.0"), EPT_E_UNAVAILABLE);
  CHECK_HAS(text(), "is NVSHMEM 4.0.0; this plugin speaks with 3.x");
  CHECK_EQ(with("3.8.0"), EPT_OK);
}

void fails(const char *what, const char *says) {
  setenv("FAKE_NVSHMEM", what, 1);
  Opened opened;
  CHECK_OK(*backend, opened.code);
  const auto said = opened.say();
  if (opened.code == EPT_OK) opened.hear(said);
  CHECK_EQ(opened.code, EPT_E_UNAVAILABLE);
  CHECK_HAS(text(), says);
}

// What ranks must have in common is compared before anything starts.
void mismatches() {
  Opened opened;
  const auto said = opened.say();
  const auto with = [&](size_t at, int32_t value, int32_t code, const char *says) {
    auto other = said;
    memcpy(other[1].data() + at, &value, sizeof value);
    CHECK_EQ(opened.hear(other), code);
    CHECK_HAS(text(), says);
  };
  with(0, 1, EPT_E_VERSION, "version");
  with(4, 2, EPT_E_VERSION, "speaks version 2 of the join; this is 1");
  with(20, 5, EPT_E_MISMATCH, "rank 0 has NVSHMEM 3.4.5 and rank 1 has 3.5.5");
  with(32, 3, EPT_E_MISMATCH, "linked with 3.4.5, those of rank 1 with 3.3.5");
  with(40, 5 << 20, EPT_E_MISMATCH, "heap_mib is 1 on rank 0 and 5 on rank 1");
  with(48, 77, EPT_E_MISMATCH, "start all processes anew");
  auto shorter = said;
  shorter[1].pop_back();
  CHECK_EQ(opened.hear(shorter), EPT_E_VERSION);
  CHECK_OK(*backend, opened.hear(said));  // nothing had been started
}

// The start waits for other PEs: no call does.
void late() {
  char gate[] = "/tmp/ept-nvshmem-gate-XXXXXX";
  CHECK(mkdtemp(gate) != nullptr);
  const std::string file = std::string(gate) + "/open";
  setenv("FAKE_NVSHMEM", "waits", 1);
  setenv("FAKE_NVSHMEM_GATE", file.c_str(), 1);
  {
    Opened opened;
    const auto said = opened.say();
    opened.gate = true;
    CHECK_EQ(opened.hear(said), EPT_LATER);
    void *memory = nullptr;
    CHECK_EQ(backend->mem_alloc(opened.instance, 64, EPT_MEMORY_CUDA, &memory), EPT_E_INVALID);
    fclose(fopen(file.c_str(), "w"));
    opened.gate = false;
    CHECK_OK(*backend, opened.hear(said));
  }
  unlink(file.c_str());
  rmdir(gate);
}

// Another group of this process while it is open, and after it.
void groups() {
  void *fake = dlopen((folder + "/nvshmem_fake.so").c_str(), RTLD_NOW);
  auto *starts = reinterpret_cast<int (*)()>(dlsym(fake, "fake_starts"));
  {
    Opened first;
    first.joins();
    Opened second;
    (void)second.say();
    CHECK_EQ(second.code, EPT_E_LIMIT);
    CHECK_HAS(text(), "a PE of another group that is open");
  }
  {
    Opened later;
    later.joins();
    void *memory = nullptr;
    CHECK_OK(*backend, backend->mem_alloc(later.instance, 1 << 20, EPT_MEMORY_CUDA, &memory));
  }
  CHECK_EQ(starts(), 1);
  Opened larger(Options{{"heap_mib", "2"}});
  const auto said = larger.say();
  CHECK_EQ(larger.hear(said), EPT_E_MISMATCH);
  CHECK_HAS(text(), "with a heap of 1 MiB since an earlier group");
}

void heap() {
  Opened opened;
  void *memory[4] = {};
  CHECK_EQ(backend->mem_alloc(opened.instance, 64, EPT_MEMORY_CUDA, memory), EPT_E_INVALID);
  opened.joins();
  const auto take = [&](uint64_t bytes, void **at) {
    return backend->mem_alloc(opened.instance, bytes, EPT_MEMORY_CUDA, at);
  };
  CHECK_EQ(backend->mem_alloc(opened.instance, 64, EPT_MEMORY_HOST, memory), EPT_E_UNSUPPORTED);
  CHECK_OK(*backend, take(5000, &memory[0]));
  CHECK_OK(*backend, take(1, &memory[1]));
  CHECK_OK(*backend, take(4096, &memory[2]));
  const auto at = [&](int i) { return static_cast<char *>(memory[i]) - static_cast<char *>(memory[0]); };
  CHECK_EQ(at(1), 8192);
  CHECK_EQ(at(2), 12288);
  CHECK_OK(*backend, backend->mem_free(opened.instance, memory[1]));
  CHECK_EQ(backend->mem_free(opened.instance, memory[1]), EPT_E_INVALID);
  CHECK_OK(*backend, take(8192, &memory[3]));  // doesn't fit the gap
  CHECK_EQ(at(3), 16384);
  CHECK_OK(*backend, take(10, &memory[1]));  // does
  CHECK_EQ(at(1), 8192);
  CHECK_EQ(take(1 << 20, &memory[3]), EPT_E_NOMEM);
  CHECK_HAS(text(), "set EPT_NVSHMEM_HEAP_MIB to 3 or more");
  CHECK_EQ(take(~0ull - 5, &memory[3]), EPT_E_NOMEM);
  CHECK_EQ(take(0, &memory[3]), EPT_E_NOMEM);
}

void device_half() {
  current = 1;
  Opened opened;
  ept_device_entry entry{};
  entry.size = sizeof entry;
  CHECK_EQ(backend->device_open(opened.instance, 1), EPT_E_INVALID);
  opened.joins();
  ept_caps caps{};
  caps.size = sizeof caps;
  CHECK_OK(*backend, backend->caps(opened.instance, &caps));
  CHECK(caps.gpu_initiated && caps.group_only && caps.max_message > 0);
  CHECK_EQ(backend->device_peer(opened.instance, 1, &entry), EPT_E_INVALID);
  CHECK_EQ(backend->device_open(opened.instance, 0), EPT_E_CONFIG);  // the context's was 1 when it joined
  CHECK_HAS(text(), "EPT_NVSHMEM_DEVICE=0");
  CHECK_OK(*backend, backend->device_open(opened.instance, 1));
  CHECK_EQ(backend->device_peer(opened.instance, 2, &entry), EPT_E_INVALID);
  CHECK_OK(*backend, backend->device_peer(opened.instance, 1, &entry));
  CHECK_EQ(entry.kind, EPT_DEVICE_GPU);
  CHECK_EQ(entry.words[0], 1);
  CHECK_EQ(entry.words[2], 1 << 20);
  CHECK_EQ(entry.words[3], 0);
  CHECK_OK(*backend, backend->device_peer(opened.instance, 0, &entry));
  CHECK_EQ(entry.words[3], entry.words[1]);
  const void *image = nullptr;
  size_t length = 0;
  CHECK_OK(*backend, backend->device_image(opened.instance, &image, &length));
  CHECK_EQ(static_cast<const unsigned char *>(image)[0], 9);
  CHECK_EQ(length, 2);
  CHECK_OK(*backend, backend->device_module(opened.instance, &length));
  CHECK_EQ(backend->device_module(opened.instance, nullptr), EPT_E_UNAVAILABLE);
  CHECK_HAS(text(), "linked with NVSHMEM 3.4.5, the library is 3.4.5");

  // Regions and signals of the heap are the same places of every rank's part.
  void *memory = nullptr;
  CHECK_OK(*backend, backend->mem_alloc(opened.instance, 4096, EPT_MEMORY_CUDA, &memory));
  ept_memory described{sizeof described, EPT_MEMORY_CUDA, memory, 4096, 1, -1, 0, EPT_ROLE_DATA, EPT_ACCESS_LOCAL};
  ept_mem *mem = nullptr;
  CHECK_OK(*backend, backend->mem_register(opened.instance, &described, &mem));
  char blob[4096];
  size_t size = sizeof blob;
  uint64_t key = 0;
  CHECK_EQ(backend->region_export(mem, 1, 4000, 97, blob, &size, &key), EPT_E_INVALID);
  CHECK_OK(*backend, backend->region_export(mem, 1, 512, 1024, blob, &size, &key));
  ept_region *region = nullptr, *signal = nullptr;
  CHECK_EQ(backend->region_import(opened.instance, 1, blob, size, &region), EPT_E_INVALID);  // rank 0's
  CHECK_OK(*backend, backend->region_import(opened.instance, 0, blob, size, &region));
  CHECK_OK(*backend, backend->device_region(region, &entry));
  CHECK_EQ(entry.words[0], reinterpret_cast<uintptr_t>(memory) + 512);
  CHECK_EQ(entry.words[1], 1024);
  CHECK_EQ(backend->device_signal(region, &entry), EPT_E_INVALID);
  size = sizeof blob;
  CHECK_OK(*backend, backend->signal_export(mem, 1, 64, blob, &size));
  CHECK_OK(*backend, backend->signal_import(opened.instance, 0, blob, size, &signal));
  CHECK_OK(*backend, backend->device_signal(signal, &entry));
  CHECK_EQ(entry.words[0], reinterpret_cast<uintptr_t>(memory) + 64);
  CHECK_EQ(backend->region_revoke(mem, 1, key), EPT_E_UNSUPPORTED);
  const ept_op op = plugin::Rank::write(1, mem, memory, region, 0, 8, 1, 1);
  size_t posted = 7;
  CHECK_EQ(backend->post(opened.worker, &op, 1, &posted), EPT_E_UNSUPPORTED);
  CHECK_EQ(posted, 0);
  backend->region_drop(region);
  backend->region_drop(signal);
  CHECK_OK(*backend, backend->mem_deregister(mem));
  char outside[64];
  described.address = outside, described.length = sizeof outside;
  CHECK_EQ(backend->mem_register(opened.instance, &described, &mem), EPT_E_UNSUPPORTED);
}

void devices() {
  Opened opened(Options{{"device", "2"}});
  const auto said = opened.say();
  CHECK_EQ(opened.hear(said), EPT_E_CONFIG);
  CHECK_HAS(text(), "EPT_NVSHMEM_DEVICE is 2; there are 2");
  device_count = 0;
  CHECK_EQ(opened.hear(said), EPT_E_UNAVAILABLE);
  CHECK_HAS(text(), "no CUDA device here");
}

// As torchrun numbers the processes of a machine.
void local_rank() {
  setenv("LOCAL_RANK", "3", 1);
  Opened opened;
  opened.joins();
  CHECK_EQ(backend->device_open(opened.instance, 0), EPT_E_CONFIG);
  CHECK_OK(*backend, backend->device_open(opened.instance, 1));
}

}  // namespace

int main() {
  plugin::hmac = [](void *, const void *key, size_t key_length, const void *data, size_t length, uint8_t *mac) {
    ept::hmac_sha256(key, key_length, data, length, mac);
  };
  folder = std::string(getenv("EPT_TEST_PLUGINS")) + "/../tests/native";
  backend = &plugin::load(folder + "/nvshmem_plugin.so");
  part("what is missing", missing);
  part("releases", releases);
  part("no unique id", [] { fails("uid", "nvshmemx_get_uniqueid answers 7"); });
  part("a start that fails", [] { fails("init", "nvshmemx_hostlib_init_attr answers 9"); });
  part("arguments that fail", [] { fails("args", "nvshmemx_set_attr_uniqueid_args answers 8"); });
  part("another number", [] { fails("pe", "made rank 0 of 2 PE 1 of 2"); });
  part("no heap", [] { fails("malloc", "no heap of 1 MiB"); });
  part("what ranks must have in common", mismatches);
  part("a start that waits", late);
  part("groups of one process", groups);
  part("the heap", heap);
  part("the device half", device_half);
  part("devices", devices);
  part("the rank of a machine", local_rank);
  return 0;
}
