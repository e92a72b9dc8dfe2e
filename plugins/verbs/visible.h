// SPDX-License-Identifier: Apache-2.0
// When a GPU can read what has arrived in its memory.
//
// INVARIANT. A NIC's writes into GPU memory and its completion in host memory go two ways, so that a completion was
// seen says nothing of bytes in a GPU. What does say it: a read of that GPU's memory by the same NIC, posted after the
// completion was seen. Over PCIe a read passes no write before it, and its answer comes behind them (PCIe 2.4.1); so
// when the read has completed, all is there that this NIC had written into that GPU before. Hence VISIBLE comes after a
// read on every NIC of a byte of every GPU that has memory here, each posted after `visible` was called.
//
// The reads of one NIC go by a queue pair that is connected to itself, for nothing else. They are made in ROUNDS, one
// at a time: a round answers all that was asked before it began, and none that was asked later. A read that fails (a
// link that is down, memory that was given back meanwhile) ends its round, and another begins for the same questions:
// so a VISIBLE may be late, and is never untrue. Completions of a round that ended so carry its number, and are
// dropped.
#pragma once

#include <cstddef>
#include <cstdint>
#include <deque>

namespace verbs {

constexpr uint32_t kMostGpus = 16;  // reads on a NIC at a time

struct Visibility {
  struct Asked {
    uint64_t cookie;
    uint32_t rank;
  };
  std::deque<Asked> asked;  // oldest first
  size_t covered = 0;       // of them, by the round under way; 0: there is none
  uint32_t round = 0;       // its number
  uint32_t reads = 0;       // of it, that have not completed
  uint64_t due_ns = 0;      // when a round that failed is begun again
};

}  // namespace verbs
