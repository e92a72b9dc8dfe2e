// SPDX-License-Identifier: Apache-2.0
//
// What one 64-byte write costs the backend libfabric's own code, on one core: post and LOCAL_DONE, over a provider that
// takes every write and moves nothing (null.h), whose own calls are in the figure. Prints the median of five runs for
// some batch sizes. Processor time, so that what else runs on the machine counts little.
#include <algorithm>

#include "../../native/engine/sha256.h"
#include "../../plugins/libfabric/null.h"
#include "plugin.h"

using plugin::Rank;
using plugin::Window;

extern "C" const ept_backend ept_backend_v1;

namespace libfabric {
// In place of library.cc: whatever library is asked for.
std::shared_ptr<Library> open_library(const std::string &, plugin::Refusal *) { return make_null(); }
std::string mapped_libraries() { return ""; }
}  // namespace libfabric

namespace {

uint64_t cpu_ns() {
  timespec t;
  clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &t);
  return static_cast<uint64_t>(t.tv_sec) * 1'000'000'000 + static_cast<uint64_t>(t.tv_nsec);
}

double ns_per_write(size_t batch, size_t writes) {
  const plugin::Options options = {{"provider", "null"}, {"unproven", "1"}};
  Rank from(ept_backend_v1, {.rank = 0}, options), to(ept_backend_v1, {.rank = 1}, options);
  CHECK_OK(ept_backend_v1, from.open_peer(1, 0, to.address()));
  CHECK_OK(ept_backend_v1, to.open_peer(0, 0, from.address()));
  // Each may have to hear the other's greeting first, so they are polled in turn.
  for (bool up[] = {false, false}; !up[0] || !up[1];) {
    up[0] |= !from.poll().empty();
    up[1] |= !to.poll().empty();
  }
  Window window(from, to, 64 * batch);
  std::vector<ept_op> ops;
  for (uint32_t i = 0; i < batch; ++i)
    ops.push_back(Rank::write(1, window.source_mem, &window.source[64 * i], window.region, 64 * i, 64, i, i));
  std::vector<ept_event> events(std::max<size_t>(batch, 64));
  for (ept_event &event : events) event.size = sizeof event;
  double times[5];
  for (double &time : times) {
    const uint64_t start = cpu_ns();
    uint64_t done = 0;
    while (done < writes) {
      size_t posted = 0;
      CHECK(ept_backend_v1.post(from.worker, ops.data(), batch, &posted) == EPT_OK);
      CHECK(posted == batch);
      for (size_t back = 0; back < batch;) {
        const int32_t count = ept_backend_v1.poll(from.worker, events.data(), events.size());
        CHECK(count >= 0);
        back += static_cast<size_t>(count);
        done += static_cast<uint64_t>(count);
      }
    }
    time = static_cast<double>(cpu_ns() - start) / static_cast<double>(done);
  }
  std::sort(times, times + 5);
  return times[2];
}

}  // namespace

int main() {
  plugin::hmac = [](void *, const void *key, size_t key_length, const void *data, size_t length, uint8_t *mac) {
    ept::hmac_sha256(key, key_length, data, length, mac);
  };
  for (const size_t batch : {1, 4, 16, 64})
    printf("batch %3zu: %6.1f ns a write\n", batch, ns_per_write(batch, 300'000));
  return 0;
}
