// SPDX-License-Identifier: Apache-2.0
//
// crossover.h: which way messages go to ranks that kernels could put to by themselves: so, or through the proxy thread,
// over the backend beneath. Measured when an AllToAll is made (weigh.cc), at the lengths that it sends; this file is
// the rule, by itself.
#pragma once

#include <stdint.h>
#include <stdio.h>

#include <algorithm>
#include <string>
#include <vector>

namespace ept::moe {

enum class Way : uint32_t { puts = 0, proxy = 1 };
constexpr uint32_t kWays = 2;

// What is tried: a message of a header alone, and those of a dispatch and a combine of max_tokens tokens with balanced
// routing. The first one is for who reads the figures: what a way takes before bytes count.
constexpr uint32_t kLengths = 3;

// Of one rank, on the wire: ns that each way took from the begin of its sends until all messages of the others were
// in, by length. 0: it measured nothing, since it is on a CPU, or kernels put to nobody from there.
struct Figures {
  uint64_t took[kWays][kLengths] = {};
};

struct Choice {
  Way way = Way::puts;
  Figures slowest;  // of each, that of the slowest rank: a step takes as long as that
};

// The same for the same figures, in any order of ranks: so all ranks that have exchanged theirs choose alike. The way
// whose dispatch and combine together take less; puts where they take the same.
inline Choice choose(const std::vector<Figures> &ranks) {
  Choice choice;
  uint64_t sums[kWays] = {};
  for (uint32_t w = 0; w < kWays; w++)
    for (uint32_t i = 0; i < kLengths; i++) {
      for (const Figures &its : ranks) choice.slowest.took[w][i] = std::max(choice.slowest.took[w][i], its.took[w][i]);
      if (i > 0) sums[w] += choice.slowest.took[w][i];
    }
  choice.way = sums[uint32_t(Way::proxy)] < sums[uint32_t(Way::puts)] ? Way::proxy : Way::puts;
  return choice;
}

// For a log.
inline std::string shown(const Choice &choice, const uint64_t (&lengths)[kLengths]) {
  std::string text = choice.way == Way::puts ? "put by kernels" : "through the proxy";
  text += ", by what was measured, the slowest rank, put and through the proxy:";
  for (uint32_t i = 0; i < kLengths; i++) {
    char one[128];
    snprintf(one, sizeof one, "%s %llu bytes %.1f and %.1f us", i ? "," : "",
             static_cast<unsigned long long>(lengths[i]), double(choice.slowest.took[0][i]) * 1e-3,
             double(choice.slowest.took[1][i]) * 1e-3);
    text += one;
  }
  return text;
}

}  // namespace ept::moe
