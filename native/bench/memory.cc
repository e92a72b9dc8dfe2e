// SPDX-License-Identifier: Apache-2.0
// Bare loops over memory: the barrier between ranks, the speed of the cores, and the floor of loopback.
#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <cstring>
#include <vector>

#include "common.h"

namespace ept::bench {
namespace {

thread_local char last_error[1200] = "";

}  // namespace

int32_t fail(int32_t code, const char *format, ...) {
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(last_error, sizeof last_error, format, arguments);
  va_end(arguments);
  return code;
}

int32_t fail(const ept_error &error) { return fail(error.code, "%s", error.text); }

}  // namespace ept::bench

using namespace ept::bench;

extern "C" {

const char *eptb_last_error(void) { return last_error; }

// words[0] counts who has come, words[1] is the number of the round. Whoever comes last takes the count back to zero
// before it moves the round on (release), and nobody counts for the next round before seeing that (acquire): so the
// count is never raised for two rounds at once.
int32_t eptb_barrier(uint32_t *words, uint32_t parties, uint64_t timeout_ns) {
  std::atomic_ref<uint32_t> come(words[0]), round(words[1]), broken(words[2]);
  const uint32_t mine = round.load(std::memory_order_acquire);
  if (come.fetch_add(1, std::memory_order_acq_rel) + 1 == parties) {
    come.store(0, std::memory_order_relaxed);
    round.store(mine + 1, std::memory_order_release);
    syscall(SYS_futex, words + 1, FUTEX_WAKE, INT32_MAX, nullptr, nullptr, 0);
    return EPT_OK;
  }
  Deadline deadline(timeout_ns);
  while (round.load(std::memory_order_acquire) == mine) {
    if (broken.load(std::memory_order_acquire) != 0) return fail(EPT_E_CLOSED, "barrier: another rank has failed");
    const uint64_t left = deadline.left_ns();
    if (left == 0)
      return fail(EPT_E_TIMEOUT, "barrier: %u of %u ranks came in %.0f s", come.load(std::memory_order_relaxed),
                  parties, static_cast<double>(timeout_ns) / 1e9);
    const timespec wait = {static_cast<time_t>(left / 1'000'000'000u), static_cast<long>(left % 1'000'000'000u)};
    syscall(SYS_futex, words + 1, FUTEX_WAIT, mine, &wait, nullptr, 0);
  }
  if (broken.load(std::memory_order_acquire) != 0) return fail(EPT_E_CLOSED, "barrier: another rank has failed");
  return EPT_OK;
}

// Moves the round too, or a wait that began after the look at `broken` would sleep.
int32_t eptb_barrier_break(uint32_t *words) {
  std::atomic_ref<uint32_t>(words[2]).store(1, std::memory_order_release);
  std::atomic_ref<uint32_t>(words[1]).fetch_add(1, std::memory_order_release);
  syscall(SYS_futex, words + 1, FUTEX_WAKE, INT32_MAX, nullptr, nullptr, 0);
  return EPT_OK;
}

int32_t eptb_atomics_pingpong(uint64_t *shared, uint32_t side, uint32_t iterations, double *samples,
                              uint64_t timeout_ns) {
  std::atomic_ref<uint64_t> mine(shared[side * 8]), theirs(shared[(1 - side) * 8]);
  const uint64_t start = mine.load(std::memory_order_relaxed);
  Deadline deadline(timeout_ns);
  for (uint32_t i = 1; i <= iterations; ++i) {
    const uint64_t before = now_ns();
    if (side == 0) mine.store(start + i, std::memory_order_release);
    while (theirs.load(std::memory_order_acquire) < start + i) {
      if (deadline.passed())
        return fail(EPT_E_TIMEOUT, "shared memory ping-pong: the other side stopped at turn %u", i);
      relax();
    }
    if (side == 1) mine.store(start + i, std::memory_order_release);
    if (side == 0) samples[i - 1] = static_cast<double>(now_ns() - before) / 2;
  }
  return EPT_OK;
}

int32_t eptb_copy_rate(uint64_t bytes, uint64_t count, uint32_t ring, double *seconds) {
  std::vector<uint8_t> source(bytes * ring), destination(bytes * ring);
  for (size_t i = 0; i < source.size(); ++i) source[i] = static_cast<uint8_t>(i * 131 + 7);
  std::atomic<uint64_t> signal{0};
  const uint64_t before = now_ns();
  for (uint64_t i = 0; i < count; ++i) {
    const uint64_t offset = i % ring * bytes;
    std::memcpy(destination.data() + offset, source.data() + offset, bytes);
    signal.fetch_add(1, std::memory_order_release);
  }
  *seconds = static_cast<double>(now_ns() - before) / 1e9;
  if (signal.load(std::memory_order_acquire) != count) return fail(EPT_E_INTERNAL, "copy rate: the count is wrong");
  return EPT_OK;
}

int32_t eptb_copy_ranges(uint8_t *destination, const uint8_t *source, const uint64_t *lengths, uint32_t count) {
  uint64_t offset = 0;
  for (uint32_t i = 0; i < count; ++i) {
    std::memcpy(destination + offset, source + offset, lengths[i]);
    offset += (lengths[i] + 63) / 64 * 64;
  }
  return EPT_OK;
}

}  // extern "C"
