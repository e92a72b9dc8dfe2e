// SPDX-License-Identifier: Apache-2.0
//
// Drives the minimal plugin: what any backend must do, and no more.
#include "check.h"
#include "plugin.h"

using plugin::Event;
using plugin::Group;
using plugin::Rank;
using plugin::Window;

namespace {

void a_write_arrives(const ept_backend &backend) {
  Group group(backend, 2);
  Window window(group[0], group[1], 64);
  window.source[5] = 7;
  CHECK_EQ(group[0].post(Rank::write(1, window.source_mem, window.source.data(), window.region, 0, 64, 3, 4)), EPT_OK);
  const Event imm = group[1].expect(EPT_EVENT_IMM);
  CHECK_EQ(imm.immediate, 3);
  CHECK_EQ(imm.length, 64);
  CHECK_EQ(window.bytes[5], 7);
  CHECK_EQ(group[0].expect(EPT_EVENT_LOCAL_DONE).cookie, 4);
  CHECK_EQ(group[1].post(Rank::message(0, "hello", 5)), EPT_OK);
  CHECK_EQ(group[0].expect(EPT_EVENT_RECV).bytes, "hello");
  CHECK_OK(backend, backend.quiesce(group[1].worker, 0, EPT_SCOPE_REMOTE, 6));
  group[1].expect(EPT_EVENT_LOCAL_DONE);
  CHECK_EQ(group[1].expect(EPT_EVENT_QUIESCED).code, EPT_OK);
  CHECK_EQ(group[1].count().rx_bytes, 64);
  int32_t descriptor = 0;
  CHECK_EQ(backend.arm(group[0].worker, &descriptor), EPT_OK);
  CHECK_EQ(descriptor, -1);  // can't sleep
}

void only_the_key_opens(const ept_backend &backend) {
  Group group(backend, 2);
  Window window(group[0], group[1], 64);
  const auto refused = [&](ept_region *region, uint64_t offset, uint64_t length) {
    window.source.assign(64, 1);
    CHECK_EQ(group[0].post(Rank::write(1, window.source_mem, window.source.data(), region, offset, length, 1, 2)),
             EPT_OK);
    CHECK_EQ(group[0].expect(EPT_EVENT_ERROR).code, EPT_E_ACCESS);
    group[1].expect_nothing(2);
    CHECK(window.bytes == std::vector<uint8_t>(64));
  };
  std::string forged = window.blob;
  forged.back() = static_cast<char>(forged.back() ^ 1);
  refused(group[0].import(1, forged), 0, 64);
  refused(window.region, 1, 64);
  refused(window.region, UINT64_MAX, 2);
  CHECK_OK(backend, backend.region_revoke(window.mem, 0, window.key));
  refused(window.region, 0, 64);
}

void a_full_queue_says_later(const ept_backend &backend) {
  Group group(backend, 2);
  Window window(group[0], group[1], 8);
  uint32_t taken = 0;
  while (group[0].post(Rank::signal(1, window.region, taken, taken)) == EPT_OK) ++taken;
  CHECK_EQ(taken, 512);
  for (uint32_t n = 0; n < taken; ++n) CHECK_EQ(group[0].expect(EPT_EVENT_LOCAL_DONE).cookie, n);
  CHECK_EQ(group[0].post(Rank::signal(1, window.region, taken, taken)), EPT_OK);
  for (uint32_t n = 0; n <= taken; ++n) CHECK_EQ(group[1].expect(EPT_EVENT_IMM).immediate, n);
}

void the_dead_are_told(const ept_backend &backend) {
  Group group(backend, 3);
  Window window(group[0], group[1], 8);
  group[1].leave();
  for (const size_t rank : {0, 2}) CHECK_EQ(group[rank].expect(EPT_EVENT_PEER).code, EPT_E_PEER_LOST);
  CHECK_EQ(group[0].post(Rank::signal(1, window.region, 1, 2)), EPT_OK);
  CHECK_EQ(group[0].expect(EPT_EVENT_ERROR).code, EPT_E_PEER_LOST);
  CHECK_EQ(backend.peer_state(group[0].instance, 2), EPT_OK);
  CHECK_OK(backend, backend.peer_fence(group[0].instance, 1, 0, 9));
  CHECK_EQ(group[0].expect(EPT_EVENT_FENCED).cookie, 9);
}

}  // namespace

int main(int, char **arguments) {
  const ept_backend &backend = plugin::load(arguments[1]);
  RUN(a_write_arrives(backend));
  RUN(only_the_key_opens(backend));
  RUN(a_full_queue_says_later(backend));
  RUN(the_dead_are_told(backend));
  return 0;
}
