// SPDX-License-Identifier: Apache-2.0
//
// machine.h: a GPU of fibers, so that kernels run where there is none: each of a kernel's threads is a fiber, and all
// kernels that were launched run beside one another, on the one thread that calls `run`. Who goes on next is drawn from
// a seed, at each point where threads meet or look again; so orders that a GPU seldom takes are taken, and the same
// ones again. It finds threads of a warp that part before a point where they must meet, blocks whose threads don't all
// come to a barrier, and kernels that wait for each other for ever. Memory that is weaker than a CPU's it doesn't have.
#pragma once

#include <stdint.h>

#include <atomic>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <random>
#include <vector>

#include "context.h"

namespace simt {

constexpr uint32_t kWarp = 32;

struct Dim {
  uint32_t x = 0;
};

// Where threads meet: each brings a value and sees those of all. Two turns of values, since a thread may come to the
// next meeting before another has read from this one; it can't come to the one after.
struct Meeting {
  uint32_t size = 0, arrived = 0;
  uint64_t turn = 0;
  const char *operation = nullptr;
  std::vector<uint64_t> values;
  std::vector<struct Fiber *> waiting;
};

// Bytes that a thread has asked the copy engine for, into shared memory or out of it.
struct Copy {
  char *to;
  const char *from;
  uint32_t bytes;
  uint64_t group;
};

struct BlockState {
  std::vector<Meeting> warps;
  Meeting all;
  bool has_copies = false;  // a GPU has the engine, or not
  std::map<uint64_t *, std::deque<Copy>> arriving;
  std::vector<char> shared;  // with 16 bytes to align by
  char *memory = nullptr;
};

struct Launch;

// Sixteen bytes that a thread has asked for.
struct Fetch {
  char *to;
  const char *from;
  uint64_t group;
};

struct Fiber {
  Dim thread, block, threads, blocks;
  BlockState *state = nullptr;
  Launch *launch = nullptr;
  Context context;
  std::deque<Fetch> fetches;
  uint64_t groups = 0;  // that were ended
  std::deque<Copy> copies;
  uint64_t copy_groups = 0;
};

using Entry = void (*)(const void *argument);

struct Launch {
  Entry entry;
  std::vector<char> argument;
  uint32_t blocks, threads;
  uint64_t shared;
  uint64_t left = 0;  // threads that have not ended
  std::vector<std::unique_ptr<BlockState>> states;
};

class Machine {
 public:
  explicit Machine(uint64_t seed) : random_(seed) {}
  Machine(const Machine &) = delete;
  Machine &operator=(const Machine &) = delete;

  // After what was launched on that stream before.
  void launch(const void *stream, Entry entry, std::vector<char> argument, uint32_t blocks, uint32_t threads,
              uint64_t shared);
  // From now on a block of each launch begins when all others have ended, and this was called. Empty: no more than any.
  void hold(std::function<void()> then) { held_ = std::move(then); }
  // From now on each launch has a copy engine, or none; before, that is drawn.
  void copies(bool has) { copies_ = has; }
  // Called at each step of a fiber.
  void beside(std::function<void()> moves) { beside_ = std::move(moves); }
  // Until all that was launched has ended; one thread at a time. False: not by then (CLOCK_MONOTONIC, ns), and the next
  // call goes on.
  bool run(uint64_t deadline_ns = UINT64_MAX);

 private:
  // A block that begins later than the others of its launch.
  struct Late {
    const Launch *launch;
    uint64_t at;  // step
    std::vector<Fiber *> fibers;
  };
  void begin(const void *stream);
  void begin_late();
  std::function<void()> beside_, held_;
  std::mt19937_64 random_;
  std::optional<bool> copies_;
  uint64_t steps_ = 0;
  std::vector<Late> late_;
  std::map<const void *, std::deque<std::unique_ptr<Launch>>> streams_;
};

// ---- for the thread that runs ----

const Fiber &here();
// ns that the GPU's clock is ahead of the host's: what a test makes something cost, without its being slow.
extern std::atomic<uint64_t> ahead;
// Lets another one go on.
void yield();
// All threads of this warp, or of this block: what they bring.
const uint64_t *meet_warp(const char *operation, uint64_t value);
const uint64_t *meet_block(const char *operation, uint64_t value);
// Copies of 16 bytes that come at the last moment: when the thread waits for their group. Before, there is rubbish.
void fetch(char *to, const char *from);
void end_fetches();
void await_fetches(uint64_t left);
// Copies in likewise come when somebody waits for their barrier; copies out are read, and written, when their thread
// waits for that.
void make_barrier(uint64_t *barrier);
void copy_in(char *to, const char *from, uint32_t bytes, uint64_t *barrier);
void await_copy(uint64_t *barrier, uint32_t parity);
void copy_out(char *to, const char *from, uint32_t bytes);
void end_copies();
void await_copies();
// What this thread's warp has put is told to its block; what this thread knows of, to the GPU (library.h).
void announce();
void release();
[[noreturn]] void misaligned(const void *address);

}  // namespace simt
