// SPDX-License-Identifier: Apache-2.0
//
// What one 64-byte write with an immediate costs the plugin, on one core: post, IMM at the target, LOCAL_DONE here.
// Prints the median of five runs for some batch sizes, polite and (for comparison) under the adversary. Processor time,
// so that what else runs on the machine counts little.
#include <algorithm>

#include "plugin.h"

using plugin::Group;
using plugin::Options;
using plugin::Rank;
using plugin::Window;

namespace {

const ept_backend &loopback = plugin::built("loopback");

uint64_t cpu_ns() {
  timespec t;
  clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &t);
  return static_cast<uint64_t>(t.tv_sec) * 1'000'000'000 + static_cast<uint64_t>(t.tv_nsec);
}

double ns_per_write(const Options &options, size_t batch, size_t writes) {
  Group group(loopback, 2, options);
  Window window(group[0], group[1], 64 * batch);
  std::vector<ept_op> ops;
  for (uint32_t i = 0; i < batch; ++i) {
    ops.push_back(Rank::write(1, window.source_mem, &window.source[64 * i], window.region, 64 * i, 64, i, i));
  }
  std::vector<ept_event> events(std::max<size_t>(batch, 64));
  double times[5];
  for (double &time : times) {
    const uint64_t start = cpu_ns();
    uint64_t sent = 0, done = 0, arrived = 0;
    while (arrived < writes || done < writes) {
      if (sent < writes && sent == done) {
        size_t posted = 0;
        while (posted < batch) {
          size_t more = 0;
          const int32_t code = loopback.post(group[0].worker, ops.data() + posted, batch - posted, &more);
          CHECK(code >= 0);
          posted += more;
        }
        sent += batch;
      }
      arrived += static_cast<uint64_t>(loopback.poll(group[1].worker, events.data(), events.size()));
      done += static_cast<uint64_t>(loopback.poll(group[0].worker, events.data(), events.size()));
    }
    time = static_cast<double>(cpu_ns() - start) / static_cast<double>(arrived);
  }
  std::sort(times, times + 5);
  return times[2];
}

}  // namespace

int main() {
  for (const size_t batch : {1, 4, 16, 64}) {
    printf("polite     batch %3zu: %6.1f ns a write\n", batch, ns_per_write({}, batch, 1'000'000));
  }
  printf("adversary  batch  16: %6.1f ns a write\n", ns_per_write({{"adversary", "1"}}, 16, 100'000));
  return 0;
}
