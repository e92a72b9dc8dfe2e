// SPDX-License-Identifier: Apache-2.0
//
// tcp_ledger.h: two ranks with a relay between them, and a ledger of every operation either way. Each event is checked
// as it comes: an IMM once, after its bytes, never of a refused operation; a message once and whole; one LOCAL_DONE or
// ERROR for each that was posted. What an IMM told of is wiped at once, so that bytes which land later, from a
// connection that was given up, show at the end; and so is a source at its LOCAL_DONE, which nobody may read again.
#pragma once

#include <array>
#include <functional>
#include <memory>
#include <vector>

#include "tcp_relay.h"

namespace tcp_ledger {

enum class Kind { kWrite, kSignal, kSend, kRefused };

struct Entry {
  Kind kind;
  uint64_t offset, length;
  uint32_t arrived = 0, ended = 0;
};

// What rank `from` has posted to the other.
struct Way {
  std::unique_ptr<plugin::Window> window;
  ept_region *forged = nullptr;  // a region of the other with a key that it never gave
  std::vector<Entry> entries;    // by number, which is immediate, cookie and what a message begins with
  uint64_t next_offset = 0, arrived = 0, ended = 0;
};

// A clock for the plugins that goes by steps, so that no test depends on how fast a machine is. A step takes some 5 us.
void clock_by_steps(uint64_t step_ns = 50'000);
void tick();

class Pair {
 public:
  explicit Pair(const plugin::Options &options = {}, plugin::Identity identity = {}, uint64_t window_bytes = 1 << 22,
                const plugin::Options &more_of_0 = {});

  // Posts to the other rank. False: LATER, or the window is used up.
  bool post(int from, Kind kind, uint64_t length = 0, uint32_t rail = 0);
  void step();
  void step_without(int rank);  // which stands still
  bool until(const std::function<bool()> &holds, uint64_t limit_ms = 60'000);
  void poll_for(uint64_t ms);
  bool settled() const;  // all that was posted has ended at both sides
  // Everything is as it must be, and stays so for a moment.
  void check();
  ept_rail_counters counted(int rank) const;  // all rails together

  std::unique_ptr<tcp_ranks::Node> node[2];
  std::unique_ptr<tcp_relay::Relay> relay;  // to rank 1; rank 0 dials
  std::array<Way, 2> way;                   // by who posts
  std::vector<plugin::Event> peer_events[2];

 private:
  void take(int rank);
  uint32_t rails_;
};

}  // namespace tcp_ledger
