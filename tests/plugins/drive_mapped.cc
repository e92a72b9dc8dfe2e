// SPDX-License-Identifier: Apache-2.0
//
// Drives the mapped plugin: pointers into the peer's memory, and signals that the initiator raises by itself.
#include <thread>

#include "check.h"
#include "plugin.h"

using plugin::Event;
using plugin::Group;
using plugin::Rank;
using plugin::Window;

namespace {

void a_pointer_and_an_add(const ept_backend &backend) {
  Group group(backend, 2);
  alignas(8) uint8_t memory[64 * 8 + 8] = {};
  ept_mem *mem = group[1].enroll(memory, sizeof memory);
  ept_region *region = group[0].import(1, group[1].grant(mem, 0, 0, 512).first), *signal = nullptr;
  char blob[4096];
  size_t length = sizeof blob;
  CHECK_EQ(backend.signal_export(mem, 0, 511, blob, &length), EPT_E_INVALID);
  CHECK_OK(backend, backend.signal_export(mem, 0, 512, blob, &length));
  CHECK_OK(backend, backend.signal_import(group[0].instance, 1, blob, length, &signal));

  ept_reach reach = {};
  reach.size = sizeof reach;
  const std::string address = group[1].address();
  CHECK_OK(backend, backend.reach(group[0].instance, address.data(), address.size(), &reach));
  CHECK_EQ(reach.mapped, 1);
  void *mapped = nullptr;
  CHECK_OK(backend, backend.region_map(region, &mapped));
  CHECK_EQ(mapped, static_cast<void *>(memory));

  ept_device_entry entries[3] = {};
  for (ept_device_entry &entry : entries) entry.size = sizeof entry;
  CHECK_OK(backend, backend.device_open(group[0].instance, 0));
  CHECK_OK(backend, backend.device_peer(group[0].instance, 1, &entries[0]));
  CHECK_OK(backend, backend.device_region(region, &entries[1]));
  CHECK_OK(backend, backend.device_signal(signal, &entries[2]));
  for (const ept_device_entry &entry : entries) {
    CHECK_EQ(entry.kind, EPT_DEVICE_MAPPED);
    CHECK_EQ(entry.version, EPT_DEVICE_ABI);
  }
  CHECK_EQ(entries[1].words[1], 512);

  // A kernel over there, a waiter here: no call into the plugin on either side.
  const auto *count = reinterpret_cast<const uint64_t *>(memory + 512);
  std::thread kernel([&] {
    auto *const bytes = reinterpret_cast<uint8_t *>(entries[1].words[0]);
    auto *const raised = reinterpret_cast<uint64_t *>(entries[2].words[0]);
    for (uint8_t n = 0; n < 64; ++n) {
      memset(bytes + 8 * n, n + 1, 8);
      __atomic_fetch_add(raised, 1, __ATOMIC_RELEASE);
    }
  });
  for (uint64_t n = 1; n <= 64; ++n) {
    while (__atomic_load_n(count, __ATOMIC_ACQUIRE) < n) std::this_thread::yield();
    for (size_t i = 0; i < 8; ++i) CHECK_EQ(memory[8 * (n - 1) + i], n);
  }
  kernel.join();
  group[0].expect_nothing(2);
  group[1].expect_nothing(2);

  // The same signal, raised by a post: an add and no event.
  CHECK_EQ(group[0].post(Rank::signal(1, signal, 0, 5)), EPT_OK);
  CHECK_EQ(group[0].expect(EPT_EVENT_LOCAL_DONE).cookie, 5);
  CHECK_EQ(__atomic_load_n(count, __ATOMIC_ACQUIRE), 65);
  group[1].expect_nothing(2);
  backend.region_drop(signal);
}

void a_host_may_post_too(const ept_backend &backend) {
  Group group(backend, 2);
  Window window(group[0], group[1], 64);
  window.source[1] = 3;
  CHECK_EQ(group[0].post(Rank::write(1, window.source_mem, window.source.data(), window.region, 0, 64, 8, 1)), EPT_OK);
  CHECK_EQ(group[1].expect(EPT_EVENT_IMM).immediate, 8);
  CHECK_EQ(window.bytes[1], 3);
  group[0].expect(EPT_EVENT_LOCAL_DONE);
  CHECK_EQ(group[0].post(Rank::write(1, window.source_mem, window.source.data(), window.region, 1, 64, 8, 1)), EPT_OK);
  CHECK_EQ(group[0].expect(EPT_EVENT_ERROR).code, EPT_E_ACCESS);
  group[1].expect_nothing(2);
}

void a_mapping_outlives_its_key(const ept_backend &backend) {
  Group group(backend, 2);
  Window window(group[0], group[1], 64);
  CHECK_EQ(backend.region_revoke(window.mem, 0, window.key), EPT_E_UNSUPPORTED);
  CHECK_EQ(backend.peer_fence(group[1].instance, 0, 0, 1), EPT_E_STUCK);
  CHECK_HAS(plugin::error_text(backend), "end its process");
  ept_caps caps = {};
  caps.size = sizeof caps;
  CHECK_OK(backend, backend.caps(group[0].instance, &caps));
  CHECK_EQ(caps.waived, 1u << 11 | 1u << 12);
  CHECK_HAS(caps.waived_why, "mapped");
  group[1].leave();
  CHECK_EQ(group[0].expect(EPT_EVENT_PEER).code, EPT_E_PEER_LOST);
}

}  // namespace

int main(int, char **arguments) {
  const ept_backend &backend = plugin::load(arguments[1]);
  RUN(a_pointer_and_an_add(backend));
  RUN(a_host_may_post_too(backend));
  RUN(a_mapping_outlives_its_key(backend));
  return 0;
}
