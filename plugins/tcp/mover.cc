// SPDX-License-Identifier: Apache-2.0
#include "mover.h"

#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <sys/eventfd.h>
#include <sys/socket.h>

#include <algorithm>
#include <cerrno>
#include <system_error>

namespace tcp {
namespace {

// Sockets that a mover sleeps on at a time, its own descriptor beside them. Where more jobs wait than that, all are
// tried each millisecond.
constexpr size_t kPolled = 256;

// Bytes of one call: the kernel locks a socket for the length of it, which is what a post to that socket, and whoever
// takes a job back, may have to wait for. 0.2 ms of copying; without it a call goes on for as long as bytes come in, up
// to the 64 MiB of a message.
constexpr size_t kCallBytes = 1u << 20;

enum class Moved { kSome, kNothing, kThrough };

void push(std::atomic<Job *> &list, Job *job) {
  job->next = list.load(std::memory_order_relaxed);
  while (!list.compare_exchange_weak(job->next, job, std::memory_order_release, std::memory_order_relaxed)) {}
}

void write_one(const Fd &event) {
  const uint64_t one = 1;
  // Can't fail but by a count of 2^64, and then it is readable as it should be.
  [[maybe_unused]] ssize_t written = write(event.get(), &one, sizeof one);
}

// One system call for `job`.
Moved move(Job *job) {
  if (job->wanted_back.load(std::memory_order_acquire)) return Moved::kThrough;
  msghdr message{};
  message.msg_iov = job->parts + job->first;
  size_t asked = 0, cut = 0;
  while (asked < kCallBytes && job->first + message.msg_iovlen < job->count)
    asked += job->parts[job->first + message.msg_iovlen++].iov_len;
  if (asked > kCallBytes) cut = asked - kCallBytes;
  iovec &last = message.msg_iov[message.msg_iovlen - 1];
  last.iov_len -= cut;
  const ssize_t moved =
      job->sends ? sendmsg(job->fd, &message, MSG_NOSIGNAL | MSG_DONTWAIT) : recvmsg(job->fd, &message, MSG_DONTWAIT);
  last.iov_len += cut;
  if (moved < 0) {
    if (errno == EINTR) return Moved::kSome;
    if (errno == EAGAIN || errno == EWOULDBLOCK) return Moved::kNothing;
    job->error = errno;
    return Moved::kThrough;
  }
  if (moved == 0) return Moved::kThrough;  // its end, which the stream's own thread will read again
  const uint64_t all = job->moved.load(std::memory_order_relaxed) + static_cast<uint64_t>(moved);
  job->moved.store(all, std::memory_order_relaxed);
  if (all >= job->least) return Moved::kThrough;
  for (size_t left = static_cast<size_t>(moved); left > 0;) {
    iovec &part = job->parts[job->first];
    const size_t step = std::min(left, part.iov_len);
    part.iov_base = static_cast<uint8_t *>(part.iov_base) + step;
    part.iov_len -= step;
    left -= step;
    if (part.iov_len == 0) ++job->first;
  }
  return Moved::kSome;
}

}  // namespace

// Measured with four cores a rank: six movers were faster than four in 15 rounds of 15, and eight than six in 11, by
// less (docs/decisions.md). Where there are fewer cores they would take those of the engines and of the ranks' own
// work.
uint32_t threads_for(uint32_t cores, uint32_t ranks) { return cores / std::max(1u, ranks) >= 4 ? 6 : 0; }

Movers::Movers(uint32_t count, const cpu_set_t &cores) : cores_(cores), told_(eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC)) {
  if (!told_) throw std::system_error(errno, std::generic_category(), "eventfd");
  // No signal of the process is handled on these threads.
  sigset_t all, before;
  sigfillset(&all);
  pthread_sigmask(SIG_SETMASK, &all, &before);
  try {
    for (uint32_t i = 0; i < count; ++i) {
      movers_.push_back(std::make_unique<Mover>());
      Mover &mover = *movers_.back();
      mover.wake.reset(eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC));
      if (!mover.wake) throw std::system_error(errno, std::generic_category(), "eventfd");
      mover.thread = std::thread([this, &mover] { run(mover); });
    }
  } catch (...) {
    pthread_sigmask(SIG_SETMASK, &before, nullptr);
    stop_all();
    throw;
  }
  pthread_sigmask(SIG_SETMASK, &before, nullptr);
}

Movers::~Movers() { stop_all(); }

void Movers::stop_all() {
  for (auto &mover : movers_) {
    mover->stop.store(true, std::memory_order_release);
    if (mover->wake) wake(*mover);
    if (mover->thread.joinable()) mover->thread.join();
  }
}

void Movers::wake(Mover &mover) { write_one(mover.wake); }

// ---- the engine's thread --------------------------------------------------------------------------------------------

void Movers::give(Job *job, uint32_t mover) {
  job->moved.store(0, std::memory_order_relaxed);
  job->wanted_back.store(false, std::memory_order_relaxed);
  job->error = 0;
  job->first = 0;
  job->mover = mover;
  job->out = true;
  push(movers_[mover]->given, job);
  wake(*movers_[mover]);
}

void Movers::collect() {
  Job *job = done_.exchange(nullptr, std::memory_order_acquire);
  while (job != nullptr) {
    Job *next = job->next;
    job->next = back_;
    back_ = job;
    job = next;
  }
}

Job *Movers::take_done() {
  if (done_.load(std::memory_order_relaxed) != nullptr) collect();
  Job *job = back_;
  if (job == nullptr) return nullptr;
  back_ = job->next;
  job->out = false;
  return job;
}

void Movers::take_back(Job *job) {
  job->wanted_back.store(true, std::memory_order_release);
  wake(*movers_[job->mover]);
  for (;; std::this_thread::yield()) {
    collect();
    // Others may have come back too. They stay out until they are taken, each with what it has to say.
    for (Job **at = &back_; *at != nullptr; at = &(*at)->next) {
      if (*at != job) continue;
      *at = job->next;
      job->out = false;
      return;
    }
  }
}

// ---- a mover --------------------------------------------------------------------------------------------------------

void Movers::run(Mover &mover) {
  pthread_setname_np(pthread_self(), "ept-tcp-mover");
  sched_setaffinity(0, sizeof cores_, &cores_);  // those of the thread that opened the backend; else as it is
  Job *jobs = nullptr;
  for (;;) {
    for (Job *job = mover.given.exchange(nullptr, std::memory_order_acquire); job != nullptr;) {
      Job *next = job->next;
      job->next = jobs;
      jobs = job;
      job = next;
    }
    if (jobs == nullptr && mover.stop.load(std::memory_order_acquire)) return;
    pollfd polled[kPolled];
    polled[0] = {mover.wake.get(), POLLIN, 0};
    size_t waiting = 0;
    bool some = false;
    for (Job **at = &jobs; *at != nullptr;) {
      Job *job = *at;
      const Moved moved = move(job);
      some = some || moved != Moved::kNothing;
      if (moved == Moved::kThrough) {
        *at = job->next;
        push(done_, job);
        write_one(told_);
        continue;
      }
      if (moved == Moved::kNothing && ++waiting < kPolled)
        polled[waiting] = {job->fd, static_cast<short>(job->sends ? POLLOUT : POLLIN), 0};
      at = &job->next;
    }
    if (some) continue;
    poll(polled, std::min(waiting + 1, kPolled), waiting < kPolled ? -1 : 1);
    if (polled[0].revents != 0) {
      uint64_t count = 0;
      [[maybe_unused]] ssize_t got = read(mover.wake.get(), &count, sizeof count);
    }
  }
}

}  // namespace tcp
