/* SPDX-License-Identifier: Apache-2.0
 * What an engine counts (eptransport/metrics.h has the page and its invariants), and who may write which word:
 *   - words of a peer outside `phases`, and phases[TRANSFER]: by who holds the engine's lock, so by `add_alone`
 *   - words of the other phases: by the calls of any lane, so by `add`
 * Every writer is relaxed: nothing is published by these words, and nobody waits for one. */
#pragma once

#include <atomic>
#include <bit>
#include <cstdint>
#include <string>
#include <vector>

#include "eptransport/backend.h"
#include "eptransport/metrics.h"

struct ept_engine;

namespace ept {

class Log;

inline void set(uint64_t &word, uint64_t value) { std::atomic_ref(word).store(value, std::memory_order_relaxed); }
inline uint64_t get(uint64_t &word) { return std::atomic_ref(word).load(std::memory_order_relaxed); }
inline void add(uint64_t &word, uint64_t by) { std::atomic_ref(word).fetch_add(by, std::memory_order_relaxed); }
inline void add_alone(uint64_t &word, uint64_t by) { set(word, get(word) + by); }
inline void raise_to(uint64_t &word, uint64_t value) {
  for (uint64_t seen = get(word); seen < value;) {
    if (std::atomic_ref(word).compare_exchange_weak(seen, value, std::memory_order_relaxed)) return;
  }
}

/* 2^(b-1) < ns <= 2^b. */
inline uint32_t bucket_of(uint64_t ns) {
  const auto bucket = ns <= 1 ? 0u : static_cast<uint32_t>(std::bit_width(ns - 1));
  return bucket < EPT_METRICS_BUCKETS ? bucket : EPT_METRICS_BUCKETS - 1;
}
inline void record(ept_metrics_histogram &histogram, uint64_t ns) {
  add(histogram.count, 1);
  add(histogram.sum_ns, ns);
  add(histogram.buckets[bucket_of(ns)], 1);
  if (get(histogram.max_ns) < ns) raise_to(histogram.max_ns, ns);
}
inline void record_alone(ept_metrics_histogram &histogram, uint64_t ns) {
  add_alone(histogram.count, 1);
  add_alone(histogram.sum_ns, ns);
  add_alone(histogram.buckets[bucket_of(ns)], 1);
  if (get(histogram.max_ns) < ns) set(histogram.max_ns, ns);
}

struct PageTitle {
  uint32_t rank = 0, world = 1, epoch = 0;
  std::string job, backend;
};

/* The page: shared where /dev/shm allows, else this process's alone, which is said once in the log. */
class Metrics {
 public:
  Metrics() = default;
  ~Metrics();
  Metrics(const Metrics &) = delete;
  Metrics &operator=(const Metrics &) = delete;

  /* `folder`: /dev/shm, but in a test. Throws std::bad_alloc. */
  void open(const PageTitle &title, const std::vector<ept_rail> &rails, const char *folder, Log &log);
  bool shared() const { return fd_ >= 0; }
  const std::string &path() const { return path_; }

  ept_metrics_page *page() { return page_; }
  ept_metrics_rail &rail(uint32_t index) { return rails_[index]; }
  ept_metrics_peer &peer(uint32_t rank) { return peers_[rank]; }
  ept_metrics_phase &phase(uint32_t rank, uint32_t phase) { return peers_[rank].phases[phase]; }

 private:
  std::string share(uint64_t bytes, const char *folder);
  std::string publish(const char *folder);

  int fd_ = -1;
  uint64_t bytes_ = 0;
  std::string path_;
  ept_metrics_page *page_ = nullptr;
  ept_metrics_rail *rails_ = nullptr;
  ept_metrics_peer *peers_ = nullptr;
};

/* Removes what dead processes of this user left in `folder`; how many. */
uint32_t sweep_pages(const char *folder);

/* For moe/, which knows an engine by its public API alone. */
Metrics &metrics_of(ept_engine *engine);

}  // namespace ept
