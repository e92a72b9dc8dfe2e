/* SPDX-License-Identifier: Apache-2.0
 * The one wait: every call that waits goes through here, so each has a deadline and each can drive the network. */
#pragma once

#include <algorithm>

#include "engine/engine.h"

namespace ept {
/* A sleeping wait wakes that often to look at what no descriptor tells: its interrupts, and a driver that left. */
constexpr uint64_t look_ns = 100'000'000;
}  // namespace ept

/* `about`: who waits for whom, for reports and the wait matrix; NULL where the caller tells that itself.
 * `done` runs under the lock and returns LATER to go on waiting; any other code ends the wait. TIMEOUT when `timeout`
 * passed (the caller writes the sentence). What LATER means is told once in the log after warn_ns. */
template <class Done>
int32_t ept_engine::wait(ept::Hold &hold, uint64_t timeout, Done &&done, ept_error *error, ept::Waiting *about) {
  int32_t code = done();
  if (code != EPT_LATER) {
    /* Who finds what it waits for moved already is there as well, and would have moved it itself. If this didn't count,
     * a proxy that has once begun to would go on, with a sleep and a wake-up for each completion, as long as the caller
     * is slower than the network. As of the last step: a caller that lives on what moved long ago moves nothing. */
    last_drive.store(now, std::memory_order_relaxed);
    return code;
  }
  if (timeout == 0) {
    if (progress_mode != EPT_PROGRESS_THREAD && driver != ept::Driver::caller) {
      if (int32_t moved_on = step(error); moved_on < 0) return moved_on;
      code = done();
    }
    return code == EPT_LATER ? EPT_E_TIMEOUT : code;
  }
  const uint64_t begin = ept::now_ns();
  const uint64_t length = timeout == ept::forever ? timeout_ns : timeout;
  const uint64_t deadline = length > ept::forever - begin ? ept::forever : begin + length;
  uint64_t idle_since = begin, asked = begin;
  bool driving = false, moving = false;
  spins = 0; /* the first turn of a wait looks at the clock */
  if (about) begin_wait(*about, begin);
  while (code == EPT_LATER) {
    if (!driving && progress_mode != EPT_PROGRESS_THREAD && driver != ept::Driver::caller) {
      driver.store(ept::Driver::caller, std::memory_order_relaxed);
      driving = true;
    }
    if (driving) {
      int32_t moved_on = drive_once(hold, idle_since, std::min(deadline, asked + ept::look_ns), error);
      if (moved_on < 0) code = moved_on;
      moving = moved_on > 0; /* then its step has read the clock after that */
      if (moving && moved_waiters) moved.notify_all();
    } else {
      moved_waiters++;
      const uint64_t now = ept::now_ns();
      moved.wait_for(hold, std::chrono::nanoseconds(std::min(ept::look_ns, deadline > now ? deadline - now : 0)));
      moved_waiters--;
    }
    if (code == EPT_LATER) code = done();
    if (code != EPT_LATER) break;
    /* Who drives has had the clock read by its step. One that slept since reads it in its next turn. */
    const uint64_t now = driving ? this->now : ept::now_ns();
    if (now >= deadline) code = EPT_E_TIMEOUT;
    if (interrupted && now >= asked + ept::look_ns) {
      hold.unlock();
      const bool stop = interrupted(interrupted_context) != 0;
      hold.lock();
      asked = now;
      if (stop) code = ept::fail(error, EPT_E_CLOSED, "wait", -1, "the wait of rank %u was interrupted", rank);
    }
    if (now >= asked + ept::look_ns) asked = now;
  }
  const uint64_t end = moving ? this->now : ept::now_ns();
  if (about) end_wait(*about, code, end);
  if (driving) {
    driver.store(ept::Driver::none, std::memory_order_relaxed);
    last_drive.store(end, std::memory_order_relaxed);
    if (moved_waiters) moved.notify_all();
    if (proxy_parked) proxy_turn.notify_one();
  }
  return code;
}
