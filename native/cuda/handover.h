// SPDX-License-Identifier: Apache-2.0
//
// handover.h: a file descriptor for other processes of this machine, without privileges: a Unix socket in the abstract
// namespace (so nothing is left on a disk, and containers of one network namespace reach it), and SCM_RIGHTS.
//
// WHO GETS IT. A ticket has three random numbers of 128 bits, and reaches members of the group alone, over its engine:
// where to ask, what to say there, and what is said back with the descriptor. Who asks otherwise gets nothing. Who sits
// at that address in our place (once our process is gone, anybody may) doesn't know the answer, so nobody takes a
// descriptor from it. Both sides read one message of a known length, and no more.
#pragma once

#include <stdint.h>

#include <memory>
#include <thread>

#include "eptransport/backend.h"

namespace ept::cuda {

struct HandoverTicket {
  uint8_t where[16], ask[16], answer[16];
};

class Handover {
 public:
  // Gives out `descriptor`, which is its own from here on, until it is destroyed.
  static int32_t open(int descriptor, std::unique_ptr<Handover> *handover, ept_error *error);
  ~Handover();
  Handover(const Handover &) = delete;
  Handover &operator=(const Handover &) = delete;

  const HandoverTicket &ticket() const { return ticket_; }

 private:
  Handover() = default;
  void serve();
  HandoverTicket ticket_{};
  int descriptor_ = -1, listening_ = -1, closing_ = -1;
  std::thread thread_;
};

// The descriptor of a ticket, now the caller's. AUTH: something else answers there. PEER_LOST: nobody does.
int32_t take_over(const HandoverTicket &ticket, uint64_t timeout_ns, int *descriptor, ept_error *error);

}  // namespace ept::cuda
