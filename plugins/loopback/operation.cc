// SPDX-License-Identifier: Apache-2.0
//
// operation.cc: the words for an operation that was refused or has failed.
#include "operation.h"

namespace loopback {

const char *verb(int32_t kind) { return kind == EPT_OP_WRITE ? "write" : kind == EPT_OP_SIGNAL ? "signal" : "send"; }

int32_t code_of(Verdict verdict) {
  if (verdict == Verdict::kCopy) return EPT_E_IO;
  return verdict == Verdict::kKey || verdict == Verdict::kBounds ? EPT_E_ACCESS : EPT_E_PEER_LOST;
}

std::string sentence(Verdict verdict, const ept_op &op, const Peer &peer) {
  const std::string what = std::string(verb(op.kind)) + " of " + std::to_string(op.length) + " bytes at offset " +
                           std::to_string(op.offset) + " to rank " + std::to_string(op.peer);
  switch (verdict) {
    case Verdict::kKey:
      return what + ": the key is not one that this rank and epoch may write with, or was revoked";
    case Verdict::kBounds:
      return what + ": it ends outside the region";
    case Verdict::kCopy:
      return what + ": CUDA refuses the copy";
    default:
      return what + ": " + peer.link->why;
  }
}

int32_t refuse(const ept_op &op, const char *why, uint64_t value) {
  return fail(EPT_E_INVALID, verb(op.kind), op.peer, "loopback %s to rank %u: %s %llu", verb(op.kind), op.peer, why,
              static_cast<unsigned long long>(value));
}

void failed(ept_worker &worker, const ept_op &op, uint32_t epoch, int32_t code, const std::string &text) {
  Item &item = done(worker, op, EPT_EVENT_ERROR, epoch);
  item.event.code = code;
  item.owned = copy_of(text.c_str(), text.size() + 1);
  item.event.text = item.owned.get();
  ++worker.counters[op.rail].errors;
}

}  // namespace loopback
