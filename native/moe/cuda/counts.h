// SPDX-License-Identifier: Apache-2.0
//
// counts.h: a dispatch's counts for the host, in pinned memory that the last block of a dispatch_recv writes when it
// was asked to. One a lane of an AllToAll, which the caller may look at while kernels run.
//
// INVARIANT. Epochs count what was mirrored there, from 1; epoch e stands in slot e % 2 and is published by a release
// of `epoch` behind it. Kernels of a lane never run beside each other, so e + 2, which goes to the same slot, is begun
// after e + 1 was published. So who loads e (acquire), copies slot e % 2, and then, behind an acquire fence, still
// finds e, has an untouched copy; who finds a later one begins again.
#pragma once

#include "moe/cuda/args.h"

namespace ept::moe::cuda {

struct Counts {
  uint64_t ticket;  // of the launch: a captured one has the same in every replay
  int32_t rows;     // as num_rows
  int32_t fault;    // ept_code as a positive number: then rows and counts are 0
  // int32_t [local experts] follow
};
struct CountsPage {
  uint64_t epoch;  // 0: nothing yet
  uint64_t reserved;
  // two slots follow

  static EPT_HD uint64_t slot_bytes(uint32_t local) { return align_up(sizeof(Counts) + 4ull * local, 16); }
  static EPT_HD uint64_t bytes(uint32_t local) {
    return align_up(sizeof(CountsPage) + 2 * slot_bytes(local), 64);  // a cache line belongs to one lane
  }
  EPT_HD Counts *slot(uint64_t of, uint32_t local) {
    return reinterpret_cast<Counts *>(reinterpret_cast<char *>(this + 1) + (of & 1) * slot_bytes(local));
  }
};

}  // namespace ept::moe::cuda
