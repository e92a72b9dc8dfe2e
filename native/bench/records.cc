// SPDX-License-Identifier: Apache-2.0
// What counting costs: the very functions that the engine and the lanes call, on a page's words, one after the other.
#include <vector>

#include "common.h"
#include "engine/metrics.h"

namespace {

// Peers in turn, as a step goes from one to the next: a page of 64 ranks, some 230 KB, so not all in the nearest cache.
constexpr uint32_t kPeers = 64;

template <class Record>
double cost(uint64_t count, Record &&record) {
  const uint64_t begin = ept::bench::now_ns();
  for (uint64_t i = 0; i < count; i++) record(static_cast<uint32_t>(i % kPeers), i);
  return static_cast<double>(ept::bench::now_ns() - begin) / static_cast<double>(count);
}

}  // namespace

extern "C" int32_t eptb_record_costs(uint64_t count, double *ns) {
  using namespace ept;
  std::vector<ept_metrics_peer> peers(kPeers);
  // transfers.cc, count_posted: a clock call for a batch, which is one operation here.
  ns[0] = cost(count, [&](uint32_t p, uint64_t i) {
    add_alone(peers[p].tx_bytes, bench::now_ns() & 1);
    add_alone(peers[p].tx_operations, i & 1);
    add_alone(peers[p].credits_spent, 1);
  });
  // transfers.cc, operation_ended
  ns[1] = cost(count, [&](uint32_t p, uint64_t i) { record_alone(peers[p].completions, i & 0xffff); });
  // progress.cc, step
  ns[2] = cost(count, [&](uint32_t p, uint64_t i) {
    add_alone(peers[p].rx_operations, 1);
    add_alone(peers[p].rx_bytes, i);
    set(peers[p].last_sign_ns, i);
  });
  // out.cc write, in.cc take: a message sent or taken
  ns[3] = cost(count, [&](uint32_t p, uint64_t i) {
    ept_metrics_phase &phase = peers[p].phases[i / kPeers % 2];
    add(phase.tx_messages, 1);
    add(phase.tx_bytes, i);
    add(phase.tx_rows, 3);
  });
  // in.cc look: when a peer's first chunk is there
  ns[4] = cost(count, [&](uint32_t p, uint64_t i) {
    record(peers[p].phases[i / kPeers % 2].arrivals, bench::now_ns() & 0xffff);
  });
  // wait.cc stand and stood, engine.cc end_wait: two clock calls a look
  ns[5] = cost(count, [&](uint32_t p, uint64_t i) {
    const uint64_t begin = bench::now_ns();
    record(peers[p].phases[i / kPeers % 2].waits, bench::now_ns() - begin);
  });
  return EPT_OK;
}
