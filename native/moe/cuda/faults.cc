// SPDX-License-Identifier: Apache-2.0
//
// faults.cc: the sentence of what a kernel told when it gave a lane up.
#include <stdio.h>

#include <algorithm>

#include "moe/cuda/lanes.h"
#include "moe/fail.h"

namespace ept::moe::cuda {

void Lanes::check(uint32_t lane) const {
  const Told &told = told_[lane];
  const uint64_t code = __atomic_load_n(&told.code, __ATOMIC_ACQUIRE);
  if (!code) return;
  static const char *const halves[] = {"dispatch_send", "dispatch_recv", "combine_send", "combine_recv"};
  static const char *const fields[] = {"",
                                       "magic or version",
                                       "membership",
                                       "phase, source or lane",
                                       "generation",
                                       "AllToAll",
                                       "kind of message",
                                       "row bytes or top_k",
                                       "rows",
                                       "format",
                                       "counts",
                                       "combine region",
                                       "rows of its combine",
                                       "list of rows in memory that isn't mapped"};
  const char *half = told.half < kHalves ? halves[told.half] : "a kernel";
  const auto ull = [](uint64_t v) { return (unsigned long long)v; };
  const auto failure = [&](const char *format, auto... values) {
    char text[600];
    snprintf(text, sizeof text, format, values...);
    fail(EPT_E_FAULT, told.peer, "lane %u is faulted, reset it; the first cause was %s in %s %llu: %s", lane,
         ept_code_name(-int32_t(code)), half, ull(told.generation), text);
  };
  switch (told.what) {
    case kLate:
      failure("rank %u waited %.1f s for rank %d, whose signal stands at %llu of %llu", rank_,
              double(config_.timeout_ns) * 1e-9, told.peer, ull(told.seen), ull(told.expected));
      break;
    case kHeader:
      if (told.seen == kMembershipField)
        failure(
            "rank %d takes its step under another membership than rank %u: a rank was masked or readmitted between "
            "them. Reset on every rank",
            told.peer, rank_);
      failure("the message of rank %d is not of this step (its %s): every rank must make the same calls in a lane",
              told.peer, fields[std::min<uint64_t>(told.seen, std::size(fields) - 1)]);
      break;
    case kIds:
      failure("topk_ids has %lld; an id is -1 (none) or 0 to %llu. It was sent as -1", (long long)int32_t(told.seen),
              ull(told.expected - 1));
      break;
    case kRoom:  // of the peer that was placed when there was no more room; others' rows may not have been counted
      failure("rank %u received %llu rows or more; the outputs hold %llu. Give larger outputs (max_rows)", rank_,
              ull(told.expected), ull(told.seen));
      break;
    case kRow:
      failure("a row of rank %d is not what its header promised (%llu of %llu)", told.peer, ull(told.seen),
              ull(told.expected));
      break;
    case kLost:
      if (-int32_t(code) == EPT_E_FAULT)
        failure("rank %u waited for rank %d, which has called reset, which abandons this step: reset here too", rank_,
                told.peer);
      failure("rank %u waited for rank %d, which is gone (%s): the signal stands short of %llu", rank_, told.peer,
              ept_code_name(-int32_t(code)), ull(told.expected));
      break;
    case kMembers:
      failure(
          "it sums a dispatch of membership %llu, which is %llu by now: what ranks that were masked had of its "
          "tokens is lost; reset on every rank, and dispatch again",
          ull(told.expected), ull(told.seen));
      break;
    case kCut:
      failure(
          "rank %d cut its message short when %llu of its %llu rows for rank %u were sent: an exception there ended "
          "its call",
          told.peer, ull(told.seen), ull(told.expected), rank_);
      break;
    case kSlot:
      failure("rank %u waited %.1f s for rank %d to have consumed %llu messages; it says %llu", rank_,
              double(config_.timeout_ns) * 1e-9, told.peer, ull(told.expected), ull(told.seen));
      break;
    default:
      failure("the message to rank %d could not be posted (%s)", told.peer, ept_code_name(-int32_t(told.seen)));
  }
}

}  // namespace ept::moe::cuda
