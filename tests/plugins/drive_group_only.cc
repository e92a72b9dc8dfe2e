// SPDX-License-Identifier: Apache-2.0
//
// Drives the group-only plugin as the engine would: join in rounds, collective memory, the device half, waived rules.
#include <functional>

#include "check.h"
#include "plugin.h"

using plugin::Event;
using plugin::Rank;

namespace {

// One rank's side of a join, round by round.
struct Joining {
  explicit Joining(Rank &rank) : rank(rank) { join.size = sizeof join; }
  int32_t round(const std::vector<std::string> &before) {
    std::vector<const void *> blobs;
    std::vector<size_t> lengths;
    for (const std::string &blob : before) {
      blobs.push_back(blob.data());
      lengths.push_back(blob.size());
    }
    char out[4096];
    join.blobs = before.empty() ? nullptr : blobs.data();
    join.lengths = before.empty() ? nullptr : lengths.data();
    join.out = out;
    join.out_capacity = sizeof out;
    const int32_t code = rank.backend.join(rank.instance, &join);
    if (code == EPT_OK) {
      said.assign(out, join.out_length);
      ++join.round;
    }
    return code;
  }
  Rank &rank;
  ept_join join = {};
  std::string said;
};

struct World {
  explicit World(const ept_backend &backend, uint32_t world) : backend(backend) {
    for (uint32_t rank = 0; rank < world; ++rank) {
      ranks.push_back(std::make_unique<Rank>(backend, plugin::Identity{.rank = rank, .world = world}));
      joining.emplace_back(*ranks.back());
    }
  }
  // Returns how often a round was answered LATER.
  int join() {
    int later = 0;
    std::vector<std::string> before;
    for (bool done = false; !done;) {
      std::vector<std::string> next;
      for (Joining &each : joining) {
        int32_t code;
        while ((code = each.round(before)) == EPT_LATER) ++later;
        CHECK_OK(backend, code);
        next.push_back(each.said);
        done = each.join.done;
      }
      before = next;
    }
    return later;
  }
  void connect() {
    for (auto &rank : ranks) {
      for (auto &other : ranks) {
        if (rank == other) continue;
        CHECK_OK(backend, rank->open_peer(other->id.rank, 0, other->address()));
        CHECK_EQ(rank->expect(EPT_EVENT_PEER).code, EPT_OK);
      }
    }
  }
  Rank &operator[](size_t rank) { return *ranks[rank]; }
  const ept_backend &backend;
  std::vector<std::unique_ptr<Rank>> ranks;
  std::vector<Joining> joining;
};

void it_says_what_it_waives(const ept_backend &backend) {
  World world(backend, 2);
  ept_caps caps = {};
  caps.size = sizeof caps;
  CHECK_OK(backend, backend.caps(world[0].instance, &caps));
  CHECK_EQ(caps.waived, 1u << 9 | 1u << 10 | 1u << 11 | 1u << 12);
  CHECK_HAS(caps.waived_why, "symmetric heap");
  CHECK_EQ(caps.group_only, 1);
  CHECK_EQ(caps.gpu_initiated, 1);
  CHECK_EQ(caps.protection, EPT_PROTECTION_NONE);
}

void nothing_before_join(const ept_backend &backend) {
  World world(backend, 3);
  void *address = nullptr;
  CHECK_EQ(world[0].open_peer(1, 0, world[1].address()), EPT_E_INVALID);
  CHECK_HAS(plugin::error_text(backend), "join has not ended");
  CHECK_EQ(backend.mem_alloc(world[0].instance, 64, EPT_MEMORY_HOST, &address), EPT_E_INVALID);
  CHECK_EQ(world.join(), 3);
  world.connect();
}

void ranks_that_disagree_are_named(const ept_backend &backend) {
  World world(backend, 2);
  for (Joining &each : world.joining) CHECK_OK(backend, each.round({}));
  std::string wrong = world.joining[1].said;
  ++wrong[8];  // the heap's bytes
  CHECK_EQ(world.joining[0].round({world.joining[0].said, wrong}), EPT_E_MISMATCH);
  CHECK_HAS(plugin::error_text(backend), "rank 1 has a heap of 1048577 bytes, rank 0 of 1048576");
}

void allocation_is_symmetric(const ept_backend &backend) {
  World world(backend, 2);
  world.join();
  char *first[2] = {}, *second[2] = {};
  for (size_t rank : {0, 1}) {
    void *address = nullptr;
    CHECK_OK(backend, backend.mem_alloc(world[rank].instance, 100, EPT_MEMORY_HOST, &address));
    first[rank] = static_cast<char *>(address);
    CHECK_OK(backend, backend.mem_alloc(world[rank].instance, 64, EPT_MEMORY_HOST, &address));
    second[rank] = static_cast<char *>(address);
  }
  CHECK_EQ(second[0] - first[0], second[1] - first[1]);
  void *address = nullptr;
  CHECK_OK(backend, backend.mem_alloc(world[0].instance, 10, EPT_MEMORY_HOST, &address));
  CHECK_EQ(backend.mem_alloc(world[1].instance, 11, EPT_MEMORY_HOST, &address), EPT_E_MISMATCH);
  CHECK_OK(backend, backend.mem_free(world[0].instance, first[0]));
  int64_t used = 0;
  CHECK_OK(backend, backend.query(world[0].instance, "heap_used", &used));
  CHECK_EQ(used, 112 + 64 + 16);
  CHECK_EQ(backend.query(world[0].instance, "antigravity", &used), EPT_E_UNSUPPORTED);
  // Memory of any other kind is not this network's.
  char outside[64];
  ept_memory memory = {};
  memory.size = sizeof memory;
  memory.kind = EPT_MEMORY_HOST;
  memory.address = outside;
  memory.length = sizeof outside;
  ept_mem *mem = nullptr;
  CHECK_EQ(backend.mem_register(world[0].instance, &memory, &mem), EPT_E_UNSUPPORTED);
}

// What device.cuh would do with entries of kind GPU: a put into a peer's heap, then its signal.
void kernel_put(const ept_device_entry &peer, const ept_device_entry &region, const ept_device_entry &signal,
                const void *source, size_t length) {
  CHECK_EQ(region.words[0], peer.words[0]);
  CHECK(length <= region.words[2]);
  char *const heap = reinterpret_cast<char *>(peer.words[3]);
  memcpy(heap + region.words[1], source, length);
  __atomic_fetch_add(reinterpret_cast<uint64_t *>(heap + signal.words[1]), 1, __ATOMIC_RELEASE);
}

void kernels_and_hosts_reach_it(const ept_backend &backend) {
  World world(backend, 2);
  world.join();
  world.connect();
  void *address[2] = {};
  ept_mem *mems[2] = {};
  for (size_t rank : {0, 1}) {
    CHECK_OK(backend, backend.mem_alloc(world[rank].instance, 256, EPT_MEMORY_HOST, &address[rank]));
    mems[rank] = world[rank].enroll(address[rank], 256);
  }
  ept_region *region = world[0].import(1, world[1].grant(mems[1], 0, 0, 128).first);
  char blob[4096];
  size_t length = sizeof blob;
  CHECK_OK(backend, backend.signal_export(mems[1], 0, 128, blob, &length));
  ept_region *signal = nullptr;
  CHECK_EQ(backend.region_import(world[0].instance, 1, blob, length, &signal), EPT_E_INVALID);  // not a region's blob
  CHECK_OK(backend, backend.signal_import(world[0].instance, 1, blob, length, &signal));
  const auto *count = reinterpret_cast<uint64_t *>(static_cast<char *>(address[1]) + 128);

  ept_device_entry entries[3] = {};
  for (ept_device_entry &entry : entries) entry.size = sizeof entry;
  CHECK_EQ(backend.device_peer(world[0].instance, 1, &entries[0]), EPT_E_INVALID);
  CHECK_OK(backend, backend.device_open(world[0].instance, 0));
  CHECK_OK(backend, backend.device_peer(world[0].instance, 1, &entries[0]));
  CHECK_OK(backend, backend.device_region(region, &entries[1]));
  CHECK_OK(backend, backend.device_signal(signal, &entries[2]));
  CHECK_EQ(backend.device_signal(region, &entries[2]), EPT_E_INVALID);
  for (const ept_device_entry &entry : entries) {
    CHECK_EQ(entry.kind, EPT_DEVICE_GPU);
    CHECK_EQ(entry.version, EPT_DEVICE_ABI);
  }
  const char payload[] = "from a kernel";
  kernel_put(entries[0], entries[1], entries[2], payload, sizeof payload);
  CHECK_EQ(__atomic_load_n(count, __ATOMIC_ACQUIRE), 1);
  CHECK(!memcmp(address[1], payload, sizeof payload));

  // A signal that the network raises gives no event; an immediate does.
  CHECK_EQ(world[0].post(Rank::signal(1, signal, 0, 5)), EPT_OK);
  CHECK_EQ(__atomic_load_n(count, __ATOMIC_ACQUIRE), 2);
  world[1].expect_nothing(2);
  CHECK_EQ(world[0].post(Rank::write(1, mems[0], address[0], region, 0, 16, 9, 6)), EPT_OK);
  CHECK_EQ(world[1].expect(EPT_EVENT_IMM).immediate, 9);
  world[0].expect(EPT_EVENT_LOCAL_DONE);
  world[0].expect(EPT_EVENT_LOCAL_DONE);

  const void *image = nullptr;
  CHECK_OK(backend, backend.device_image(world[0].instance, &image, &length));
  CHECK(image && length);
  CHECK_OK(backend, backend.device_module(world[0].instance, &length));
  // The waived rules answer, they don't pretend.
  CHECK_EQ(backend.peer_fence(world[0].instance, 1, 0, 1), EPT_E_UNSUPPORTED);
  CHECK_EQ(backend.region_revoke(mems[1], 0, 0), EPT_E_UNSUPPORTED);
  CHECK_OK(backend, backend.quiesce(world[0].worker, 1, EPT_SCOPE_REMOTE, 8));
  const Event stuck = world[0].expect(EPT_EVENT_QUIESCED);
  CHECK_EQ(stuck.code, EPT_E_STUCK);
  CHECK_HAS(stuck.words, "job");
  backend.region_drop(signal);
}

}  // namespace

int main(int, char **arguments) {
  const ept_backend &backend = plugin::load(arguments[1]);
  RUN(it_says_what_it_waives(backend));
  RUN(nothing_before_join(backend));
  RUN(ranks_that_disagree_are_named(backend));
  RUN(allocation_is_symmetric(backend));
  RUN(kernels_and_hosts_reach_it(backend));
  return 0;
}
