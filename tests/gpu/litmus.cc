// SPDX-License-Identifier: Apache-2.0
//
// litmus.cc: the device interface on a real GPU: counts exact and bytes in place across blocks, across streams that
// stand for ranks, across processes and through the ring and its proxy; a deadline that ends a wait; what a way there
// and back takes. Needs a GPU, and says so with 77 where there is none.
//
//   gpu_litmus [quick] [PART ...]      quick: few rounds, for compute-sanitizer; no part: all of them
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>

#include "gpu.h"

namespace litmus {
bool quick = false;
}

using namespace litmus;

namespace {

const char *program;

void across_blocks(Gpu &gpu, bool beside_noise) {
  const uint32_t pairs = 32, words = 1000, rounds = quick ? 20 : 20000;
  auto windows = gpu.device(pairs * words * 4), staging = gpu.device(pairs * words * 4);
  auto arrived = gpu.device(pairs * 8), taken = gpu.device(pairs * 8), paths = gpu.device(2 * pairs * sizeof(ept_path));
  std::vector<ept_path> table(2 * pairs);
  for (uint32_t p = 0; p < pairs; p++) {
    table[p] = mapped_path(windows->address() + p * words * 4, words * 4, arrived->address() + p * 8);
    table[pairs + p] = mapped_path(0, 0, taken->address() + p * 8);
  }
  gpu.upload(paths->address(), table.data(), table.size());
  std::unique_ptr<Noise> noise(beside_noise ? new Noise(gpu) : nullptr);
  gpu.launch(mapped, 2 * pairs, 256, paths->address(), paths->address() + pairs * sizeof(ept_path), arrived->address(),
             taken->address(), staging->address(), windows->address(), words, rounds, kTimeout, gpu.wrong->address());
  gpu.right();
  for (uint32_t p = 0; p < pairs; p++) {
    CHECK_EQ(gpu.download<uint64_t>(arrived->address() + p * 8), rounds);
    CHECK_EQ(gpu.download<uint64_t>(taken->address() + p * 8), rounds);
  }
  std::printf("  %u pairs of blocks%s, %u rounds of %u bytes: every count and byte\n", pairs,
              beside_noise ? ", noise" : "", rounds, words * 4);
}

void many_blocks_one_signal(Gpu &gpu, bool beside_noise) {
  const uint32_t parts = 32, words = 512, rounds = quick ? 20 : 10000;
  auto row = gpu.device(parts * words * 4), arrived = gpu.device(8), taken = gpu.device(8);
  auto counters = gpu.device(rounds * 4), paths = gpu.device(2 * sizeof(ept_path));
  const ept_path table[] = {mapped_path(row->address(), parts * words * 4, arrived->address()),
                            mapped_path(0, 0, taken->address())};
  gpu.upload(paths->address(), table, 2);
  std::unique_ptr<Noise> noise(beside_noise ? new Noise(gpu) : nullptr);
  gpu.launch(counted, parts + 1, 256, paths->address(), paths->address() + sizeof(ept_path), counters->address(),
             arrived->address(), taken->address(), words, rounds, kTimeout, gpu.wrong->address());
  gpu.right();
  CHECK_EQ(gpu.download<uint64_t>(arrived->address()), rounds);
  std::printf("  %u blocks, one signal%s, %u rounds: every count and byte\n", parts, beside_noise ? ", noise" : "",
              rounds);
}

void deadline(Gpu &gpu) {
  auto never = gpu.device(8), took = gpu.device(8), answer = gpu.device(4);
  gpu.launch(expires, 1, 1, never->address(), 20'000'000ull, took->address(), answer->address());
  gpu.finish();
  CHECK_EQ(gpu.download<int32_t>(answer->address()), EPT_E_TIMEOUT);
  const auto ns = gpu.download<uint64_t>(took->address());
  CHECK(ns >= 20'000'000);
  // The context lives: another kernel runs.
  across_blocks(gpu, false);
  std::printf("  a deadline of 20 ms ended a wait after %.3f ms\n", double(ns) * 1e-6);
}

// The other process of `across_processes`: maps the blob on its stdin, puts every round, one kernel each.
int child() {
  Gpu gpu;
  std::string blob(static_cast<size_t>(atoi(getenv("LITMUS_BLOB"))), '\0');
  for (size_t got = 0; got < blob.size();) {
    const ssize_t more = read(0, blob.data() + got, blob.size() - got);
    CHECK(more > 0);
    got += static_cast<size_t>(more);
  }
  std::unique_ptr<MappedMemory> memory;
  OK(MappedMemory::open(gpu.primary, blob, &memory, &error));
  CHECK(!memory->same_process());
  const uint32_t words = 5000;
  auto source = gpu.device(words * 4), path = gpu.device(sizeof(ept_path));
  const ept_path to = mapped_path(memory->address() + 64, words * 4, memory->address());
  gpu.upload(path->address(), &to, 1);
  char go;
  for (uint32_t round = 0; read(0, &go, 1) == 1; round++) {
    gpu.launch(put_once, 1, 256, path->address(), source->address(), words, round, kTimeout, gpu.wrong->address());
    gpu.right();
  }
  return 0;
}

void across_processes(Gpu &gpu) {
  const uint32_t words = 5000, rounds = quick ? 2 : 50;
  auto memory = gpu.device(64 + words * 4);
  std::string blob;
  OK(memory->blob(&blob, &error));
  int to_child[2];
  CHECK(pipe(to_child) == 0);
  const pid_t pid = fork();
  CHECK(pid >= 0);
  if (pid == 0) {
    dup2(to_child[0], 0);
    close(to_child[1]);
    setenv("LITMUS_BLOB", std::to_string(blob.size()).c_str(), 1);
    execl(program, program, "child", nullptr);
    _exit(126);
  }
  close(to_child[0]);
  CHECK_EQ(write(to_child[1], blob.data(), blob.size()), blob.size());
  for (uint32_t round = 0; round < rounds; round++) {
    CHECK(write(to_child[1], "g", 1) == 1);
    gpu.launch(look, 1, 256, memory->address(), memory->address() + 64, words, round, kTimeout, gpu.wrong->address());
    gpu.right();
  }
  close(to_child[1]);
  int status = 0;
  CHECK(waitpid(pid, &status, 0) == pid);
  CHECK_EQ(status, 0);
  std::unique_ptr<MappedMemory> own;
  OK(MappedMemory::open(gpu.primary, blob, &own, &error));
  CHECK(own->same_process());
  CHECK_EQ(own->address(), memory->address());
  std::printf("  memory of another process (CUDA IPC), %u rounds: every count and byte\n", rounds);
}

// What a network is given of GPU memory, by what it takes.
void described(Gpu &gpu) {
  auto memory = gpu.device(1 << 20);
  const bool has_dmabuf = gpu.primary->attribute(kDmabufSupported);
  ept_caps caps{};
  const auto describe = [&](uint32_t kinds, Described *out) {
    caps.memory_kinds = kinds;
    return memory->describe(caps, out, &error);
  };
  Described none, address, dmabuf, any;
  CHECK_EQ(describe(EPT_MEMORY_HOST | EPT_MEMORY_PINNED, &none), EPT_E_UNSUPPORTED);
  CHECK_HAS(error.text, "takes no GPU memory");
  CHECK_EQ(home_of(caps), EPT_MEMORY_PINNED);
  OK(describe(EPT_MEMORY_CUDA, &address));
  CHECK_EQ(address.memory.kind, EPT_MEMORY_CUDA);
  CHECK_EQ(reinterpret_cast<uintptr_t>(address.memory.address), memory->address());
  CHECK_EQ(home_of(caps), EPT_MEMORY_CUDA);
  OK(describe(EPT_MEMORY_CUDA | EPT_MEMORY_DMABUF, &any));
  CHECK_EQ(any.memory.kind, has_dmabuf ? EPT_MEMORY_DMABUF : EPT_MEMORY_CUDA);
  const int32_t code = describe(EPT_MEMORY_DMABUF, &dmabuf);
  CHECK_EQ(code, has_dmabuf ? EPT_OK : EPT_E_UNSUPPORTED);
  if (!has_dmabuf) CHECK_HAS(error.text, "this driver gives none");
  if (has_dmabuf) CHECK_EQ(lseek(dmabuf.memory.fd, 0, SEEK_END), memory->bytes());  // a dmabuf tells its length so
  std::printf("  GPU memory for a network: %s\n", has_dmabuf ? "a dmabuf of its length" : "by address, no dmabuf here");
}

void blocks(Gpu &gpu) {
  across_blocks(gpu, false);
  many_blocks_one_signal(gpu, false);
}

void blocks_and_noise(Gpu &gpu) {
  across_blocks(gpu, true);
  many_blocks_one_signal(gpu, true);
}

struct Part {
  const char *name;
  void (*run)(Gpu &);
};
constexpr Part kParts[] = {
    {"blocks", blocks},
    {"noise", blocks_and_noise},
    {"deadline", deadline},
    {"processes", across_processes},
    {"described", described},
    {"ring", through_the_ring},
    {"ring_adversary", through_the_ring_adversary},
    {"peer_ends", peer_ends},
    {"ranks", ranks_exchange},
    {"missing", rank_never_comes},
    {"ways", ways},
};

}  // namespace

int main(int count, char **arguments) {
  program = arguments[0];
  std::vector<std::string> names(arguments + 1, arguments + count);
  const bool child_mode = names == std::vector<std::string>{"child"};
  if (!names.empty() && names[0] == "quick") quick = true, names.erase(names.begin());
  for (const std::string &name : names) {
    const auto is = [&](const Part &part) { return name == part.name; };
    if (!child_mode && std::none_of(std::begin(kParts), std::end(kParts), is)) {
      std::printf("no part of the name '%s'\n", name.c_str());
      return 2;
    }
  }
  // Read when the driver starts: with fewer, streams share a queue, and a rank's kernel waits behind another's.
  setenv("CUDA_DEVICE_MAX_CONNECTIONS", "32", 1);
  signal(SIGPIPE, SIG_IGN);
  std::shared_ptr<Primary> primary;
  if (no_images || Primary::open(0, &primary, &error) != EPT_OK) {
    std::printf("skipped: %s\n", no_images ? no_images : error.text);
    return 77;
  }
  if (child_mode) return child();
  Gpu gpu;
  char name[64] = "";
  int version = 0;
  primary->driver().cuDeviceGetName(name, sizeof name, primary->device());
  primary->driver().cuDriverGetVersion(&version);
  std::printf("%s, driver for CUDA %d.%d, image %s_%d\n", name, version / 1000, version % 1000 / 10,
              gpu.module->image().ptx ? "compute" : "sm", gpu.module->image().arch);
  for (const Part &part : kParts) {
    if (!names.empty() && std::find(names.begin(), names.end(), part.name) == names.end()) continue;
    check::running(part.name);
    part.run(gpu);
  }
  return 0;
}
