// SPDX-License-Identifier: Apache-2.0
// Threads that move bytes (EPT_TCP_THREADS), for machines with more cores than one a rank: an engine's one thread is in
// the kernel for most of its time, copying payload.
//
// WHO OWNS WHAT. All state of a stream stays with the engine's thread: rings, frames, counters, events. A mover knows
// nothing but its jobs. A JOB is a stretch of bytes of one direction of one connection, with the places where they lie;
// only long payloads become one (kLong), all else the engine's thread sends and receives itself. From `give` until it
// is back, by `take_done` or `take_back`, a job is its mover's: that direction of the socket, the places, and the
// memory that they name, which the engine's thread leaves alone. Before and after, the mover has no pointer to it. Each
// of the two hand-overs is one atomic exchange of a list, so what either side wrote before it the other sees behind it.
// No lock is held in a system call, for there is none.
//
// WHY THE CONTRACT HOLDS (backend.h). What a mover received has its IMM event only from the engine's thread, after the
// job is back (3). What it sent is done only when the job is back too, though the peer may have acknowledged it before
// (6, 9): so no source or ring entry is used again that a mover may still read. Whatever must not find bytes moving (a
// mask, a fence, a revoked key, a broken or retired connection, a close, a suspended rank) takes the job back first:
// `take_back` returns when the mover has let it go, which is after the system call that it may be in; those never
// block, so nothing waits for a peer (7, 8). What was moved by then is known to the byte, and the stream goes on from
// there, or is resumed (resume.h), as if its own thread had been interrupted (10, 11, 12). A job that waits for its
// socket keeps no other from moving (11).
#pragma once

#include <sched.h>
#include <sys/uio.h>

#include <atomic>
#include <memory>
#include <thread>
#include <vector>

#include "common.h"

namespace tcp {

class Stream;

constexpr size_t kLong = 65536;  // a payload with so much missing is worth a hand-over: 20 us of copying and more

struct Job {
  static constexpr size_t kMostParts = 132;  // of one batch of frames (stream_send.cc)

  Job(Stream *owner, bool is_send) : stream(owner), sends(is_send) {}
  Stream *const stream;
  const bool sends;

  // What the engine's thread sets before it gives the job.
  int fd = -1;
  iovec parts[kMostParts];
  size_t count = 0;
  uint64_t least = 0;  // done after so many bytes; what else there is room for may come with them

  // What the mover has made of it.
  std::atomic<uint64_t> moved = 0;  // while it is out this may be asked too
  int error = 0;                    // what the system said to the call after those bytes; 0: nothing, or its end came

  // What the hand-over takes.
  bool out = false;    // given, and not taken again
  uint32_t mover = 0;  // whose it is then
  std::atomic<bool> wanted_back = false;
  size_t first = 0;  // of `parts`: those before it are through
  Job *next = nullptr;
};

// How many movers a rank gets by default, where `ranks` of one host share `cores`.
uint32_t threads_for(uint32_t cores, uint32_t ranks);

class Movers {
 public:
  // Starts `count` threads on `cores`. Throws what std::thread does where the machine has none left.
  Movers(uint32_t count, const cpu_set_t &cores);
  ~Movers();  // no job is out

  uint32_t count() const { return static_cast<uint32_t>(movers_.size()); }
  // One mover moves both directions of a stream: the kernel locks a socket for the length of a call.
  uint32_t choose() { return next_++ % count(); }

  void give(Job *job, uint32_t mover);
  void take_back(Job *job);
  Job *take_done();  // one that is through, nullptr: none
  // For an edge-triggered epoll: told behind each job that take_done has to give.
  int descriptor() const { return told_.get(); }

 private:
  struct Mover {
    std::atomic<Job *> given = nullptr;
    std::atomic<bool> stop = false;
    Fd wake;
    std::thread thread;
  };
  void run(Mover &mover);
  void wake(Mover &mover);
  void stop_all();
  void collect();

  cpu_set_t cores_;
  Fd told_;
  std::vector<std::unique_ptr<Mover>> movers_;
  std::atomic<Job *> done_ = nullptr;
  Job *back_ = nullptr;  // of those, seen by the engine's thread and not taken yet
  uint32_t next_ = 0;
};

}  // namespace tcp
