// SPDX-License-Identifier: Apache-2.0
//
// straight.cc: the polite route.
#include "operation.h"
#include "route.h"

namespace loopback {

namespace {

// Polite: everything lands inside post. One lock of the target a run of operations to it.
class Straight final : public Route {
 public:
  using Route::Route;

  int32_t post(const ept_op *ops, size_t count, size_t *posted) override {
    int32_t code = EPT_OK;
    while (*posted < count && (code = admit(worker_, ops[*posted])) == EPT_OK) {
      const uint32_t rank = ops[*posted].peer;
      const Peer &peer = instance_.peers[rank];
      __builtin_prefetch(&peer.port->room, 1);  // the second of the lines that the lock and `arrived` lie in
      std::unique_lock hold(peer.port->lock);
      do {
        const ept_op &op = ops[*posted];
        const Verdict verdict = carry(instance_.port, peer, hold, op);
        if (verdict == Verdict::kFull || verdict == Verdict::kConnecting) return EPT_LATER;
        accepted(worker_, op);
        conclude(worker_, op, peer, verdict);
      } while (++*posted < count && ops[*posted].peer == rank && (code = admit(worker_, ops[*posted])) == EPT_OK);
    }
    return code;
  }
};

}  // namespace

std::unique_ptr<Route> make_straight(ept_worker &worker) { return std::make_unique<Straight>(worker); }

}  // namespace loopback
