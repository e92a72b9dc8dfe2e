// SPDX-License-Identifier: Apache-2.0
//
// heartbeat.cc: a rank that falls silent with its links up is told from one that is slow, stands still by its own
// right, or was not looked at. Ranks drive themselves here, in real time; what must not happen is waited for as long as
// it would take, and what must happen for a minute.
#include <chrono>
#include <string>
#include <thread>

#include "engine_world.h"

using namespace world;

namespace {

constexpr uint64_t kDead = 3 * second / 2;

void rest(uint64_t ns) { std::this_thread::sleep_for(std::chrono::nanoseconds(ns)); }

Options self_driven() {
  Options options;
  options.progress = EPT_PROGRESS_AUTO;
  options.dead_ns = kDead;
  return options;
}

// Its operations hang, its link does not break, and it owes nobody an answer.
void silent() {
  Options options = self_driven();
  options.values = {{"adversary", "5"}, {"silent_rank", "1"}, {"silent_after", "40"}};
  World world(3, options);
  world.connect_all();
  Route route(world, 1, 0, 4096), bystander(world, 2, 0, 4096);
  const uint64_t begin = world.info(0, 1).links_ended;
  for (int i = 0; i < 60; i++) {
    const ept_write what = route.write(0, 8);
    const int32_t code = ept_engine_write(world[1], &what, nullptr, &error);
    CHECK(code == EPT_OK || code == EPT_LATER);
  }
  CHECK_EQ(ept_signal_wait(world[0], route.signal, 1000, 60 * second, &error), EPT_E_PEER_LOST);
  CHECK_HAS(error.text, "silent for");
  CHECK_HAS(error.text, "promised a sign of life every 0.300 s");
  CHECK(error.silent_ns >= kDead);
  const ept_peer_info info = world.info(0, 1);
  CHECK_EQ(info.status, EPT_PEER_LOST);
  CHECK_EQ(info.why_code, EPT_E_PEER_LOST);
  CHECK_EQ(info.links_ended, begin + 1);
  CHECK_EQ(world.info(0, 2).status, EPT_PEER_UP);  // it costs only what involves it
  OK(bystander.post(0, 4096));
  OK(ept_signal_wait(world[0], bystander.signal, 1, 60 * second, &error));
}

// Ranks that say nothing but heartbeats stay up, and so does one that promises none and makes no call at all.
void slow_is_not_dead() {
  World world(3, self_driven());
  world.start(2, 0, {}, EPT_PROGRESS_INLINE);
  world.connect_all();
  CHECK_EQ(world.info(0, 1).heartbeat_ns, kDead / 5);
  CHECK_EQ(world.info(0, 2).heartbeat_ns, 0);
  rest(2 * kDead);
  for (uint32_t about : {1u, 2u}) CHECK_EQ(world.info(0, about).status, EPT_PEER_UP);
  CHECK(world.info(0, 1).silent_ns < kDead);
  CHECK(world.info(0, 2).silent_ns > kDead);
  // One that answers nothing isn't filled up with signs of life: each of the two has left it one at most, and what it
  // said before. They had time for five each.
  const int32_t unread = ept_engine_progress(world[2], &error);
  CHECK(unread >= 0 && unread <= 4);
  // The one that stood still was not looking, so it judges nobody by that time.
  for (int i = 0; i < 100; i++) {
    CHECK(ept_engine_progress(world[2], &error) >= 0);
    for (uint32_t about : {0u, 1u}) CHECK_EQ(world.info(2, about).status, EPT_PEER_UP);
    rest(kDead / 100);
  }
}

// News of the membership reach every rank, also one that only hears of it from another.
void news() {
  World world(3, self_driven());
  world.connect_all();
  OK(ept_engine_tell_membership(world[0], 5, &error));
  OK(ept_engine_tell_membership(world[0], 4, &error));  // older: nothing new
  for (uint32_t rank = 0; rank < 3; rank++) {
    uint32_t heard = 0;
    for (int i = 0; i < 6000 && heard != 5; i++) {
      OK(ept_engine_membership(world[rank], &heard, &error));
      rest(second / 100);
    }
    CHECK_EQ(heard, 5);
  }
}

}  // namespace

int main() {
  RUN(silent());
  RUN(slow_is_not_dead());
  RUN(news());
}
