// SPDX-License-Identifier: Apache-2.0
//
// proxy.h: the host end of a command ring: one thread that turns what kernels push into writes of an engine, drives the
// engine while there is work, and tells kernels what has ended. It makes no CUDA call, so it may run beside a capture,
// and the same code is tested with CPU threads in the place of kernels (tests/native/proxy.cc).
//
// INVARIANTS
//  - One thread takes from the ring, posts, and writes `done` and `status`; the tables it reads are guarded by a mutex.
//  - For each peer, commands are posted in the order of their tickets, and `done` moves over a prefix of them: a
//    command ends when its transfer does, or at once where it is refused. So each ticket ends exactly once, also that
//    of a peer that is lost, and every flush returns.
//  - A command leaves the ring only while fewer than `capacity` are held or in flight. So memory is bounded, and a
//    peer that grants no credits fills the ring at last; until then it costs only the commands to itself.
//  - `status` of a peer is set with the first error, before any later command to it is looked at, and stays until
//    reopen: no kernel mistakes a failed put for one that is under way.
//
// THE TURN. A kernel's command, and a signal for a kernel, wait for the end of the turn in which they come in; so a
// turn that finds nothing is as short as can be, and does what must be done now and then in each kLookTurns-th alone.
//  - Every turn: one load from the ring (`end_` is moved by this thread alone, so that takes no lock), and one look at
//    the network. The mutex is taken only where a command has come or is in hand; clock, peers, `stop`, `each` and what
//    is left to publish have their turn every kLookTurns.
//  - It spins until `spin_ns` after the last command *or arrival*, whoever saw that arrive: a rank that only receives
//  has
//    no commands, and where its engine's own thread wakes up for each signal, that is 6 us a signal (decisions.md).
#pragma once

#include <atomic>
#include <deque>
#include <functional>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "eptransport/device.cuh"
#include "eptransport/eptransport.h"

namespace ept::cuda {

// Where the ring stands: host addresses, and the same places as kernels see them. All of it the caller's, zeroed, and
// alive until the Proxy has gone.
struct RingPlace {
  uint32_t capacity = 1024;  // a power of two, 4 or more
  ept_command_slot *slots = nullptr;
  uint64_t *consumed = nullptr;
  ept_device_progress *progress = nullptr;  // [world]
  uint64_t slots_device = 0, consumed_device = 0, progress_device = 0;
  uint64_t ring_device = 0;  // of the ept_ring that header() gives, which the caller copies there before any push

  static uint64_t bytes(uint32_t capacity, uint32_t world) {
    return uint64_t(capacity) * sizeof(ept_command_slot) + 64 + uint64_t(world) * sizeof(ept_device_progress);
  }
  // Everything but the ring's header out of `bytes` of pinned memory.
  static RingPlace in(void *pinned, uint64_t pinned_device, uint64_t ring_device, uint32_t capacity);
};

class Proxy {
 public:
  struct Options {
    uint64_t spin_ns = 5'000'000;  // after the last command or arrival it looks without a pause: five steps of a model
    uint64_t nap_ns = 50'000;      // then it sleeps so long between two looks: the most that a first command waits
    std::vector<int32_t> cpus;     // where the thread may run; empty: anywhere
    uint64_t first = 0;            // ticket; tests
    bool left_ends = true;  // a peer that has left in good order gets a status; its last messages may be on the way
    std::function<void()> each;  // called all the time (THE TURN), with no lock held
  };
  Proxy(ept_engine *engine, const RingPlace &place, Options options);
  Proxy(ept_engine *engine, const RingPlace &place) : Proxy(engine, place, Options()) {}
  // Commands that are in the ring are dropped with status CLOSED; what was posted is waited for, a second at most.
  ~Proxy();
  Proxy(const Proxy &) = delete;
  Proxy &operator=(const Proxy &) = delete;

  // OK, or why the engine refused the memory for values: nothing runs then.
  int32_t start(ept_error *error);
  // The header as the GPU sees it: copy it to place.ring_device.
  const ept_ring &header() const { return header_; }

  // Numbers are the caller's, small and dense; another id for a number that is there replaces it.
  void set_memory(uint32_t number, ept_memory_id id);
  void set_region(uint32_t peer, uint32_t number, ept_region_id id);
  void set_signal(uint32_t peer, uint32_t number, ept_remote_signal_id id);

  // A path to one region of a peer, of the kind PROXY. `source`: where the kernel sees the memory `memory`.
  ept_path path(uint32_t peer, uint32_t memory, uint64_t source, uint64_t source_bytes, uint32_t region,
                uint64_t region_bytes, uint32_t first_signal, uint32_t signals) const;

  // Kernels' waits for the peer end with `code`, and what they push goes on as before.
  void end_waits(uint32_t peer, int32_t code);
  // The peer is back, and its regions and signals are set anew: its status is 0 again.
  void reopen(uint32_t peer);
  // How many puts have raised that signal of the peer since the start.
  uint64_t raised(uint32_t peer, uint32_t number) const;
  // Until every command that was pushed before has ended; false: not by then (CLOCK_MONOTONIC, ns).
  bool quiesce(uint64_t deadline_ns) const;
  // LATER: none yet. Else the first error since the start (of that peer, or any: UINT32_MAX), with its sentence.
  int32_t failure(uint32_t peer, ept_error *error) const;

  struct Counts {
    uint64_t commands = 0, failed = 0, later = 0, naps = 0;
  };
  Counts counts() const;

 private:
  struct Held {
    ept_command command;
    ept_transfer_id transfer = 0;
    uint32_t value = UINT32_MAX;  // slot of the value memory
    bool posted = false, ended = false;
  };
  struct Peer {
    std::deque<Held> held;  // in the order of tickets; [0, posted) are posted
    size_t posted = 0;
    std::vector<ept_region_id> regions;
    std::vector<ept_remote_signal_id> signals;
    std::vector<uint64_t> raised;  // by signal
    int32_t status = 0;
    ept_error why{};
  };
  void run();
  bool take();
  bool post(uint32_t rank);
  bool end(uint32_t rank);
  void look_at_peers();
  void fail_peer(uint32_t rank, const ept_error &why);
  int32_t write(uint32_t rank, Held &held, ept_error *error);

  ept_engine *const engine_;
  const RingPlace place_;
  const Options options_;
  uint32_t world_ = 0, rank_ = 0;
  bool drives_ = false;  // the engine has no thread of its own
  ept_ring header_{};
  mutable std::mutex mutex_;  // all below
  device::RingEnd end_{};
  std::vector<Peer> peers_;
  std::vector<ept_memory_id> memories_;
  std::vector<uint64_t> values_;  // registered: what a value is written from
  std::vector<uint32_t> free_values_;
  ept_memory_id values_id_ = 0;
  uint64_t in_hand_ = 0;  // commands held or posted, all peers
  Counts counts_;
  ept_error first_{};
  std::atomic<bool> stop_{false};
  std::thread thread_;
};

}  // namespace ept::cuda
