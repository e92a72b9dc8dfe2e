// SPDX-License-Identifier: Apache-2.0
//
// land.h: what happens at the target: the check of key, bounds and link, the copy, the event. All of it is done by the
// initiator's thread under the target's lock. It is the path that every operation takes, and so it is all in this
// header: each route is compiled with the whole of it in sight.
#pragma once

#include <algorithm>
#include <cstring>

#include "gpu.h"
#include "instance.h"

namespace loopback {

// Copies up to here are shorter than what a second round trip to the lock costs other posters: 32 KiB take 0.6 us.
constexpr uint64_t kCopyUnderLock = 32 << 10;

enum class Verdict { kLanded, kFull, kConnecting, kLost, kKey, kBounds, kCopy };

// Waits until no long copy into the export of `slot` is under way; new ones don't begin, for the link is down or the
// key revoked.
inline void drain(Port &port, std::unique_lock<std::mutex> &hold, uint32_t slot) {
  port.unpinned.wait(hold, [&] { return port.exports[slot].pins == 0; });
}

inline Verdict check_link(const Link &link) {
  switch (link.state) {
    case LinkState::kUp:
      return Verdict::kLanded;
    case LinkState::kConnecting:
      return Verdict::kConnecting;
    case LinkState::kDown:
      break;
  }
  return Verdict::kLost;
}

// Rule 12. With the target's lock held.
inline Verdict check(const Port &own, const Peer &peer, const ept_region &region, uint64_t offset, uint64_t length) {
  if (const Verdict verdict = check_link(*peer.link); verdict != Verdict::kLanded) return verdict;
  if (region.slot >= peer.port->exports.size()) return Verdict::kKey;
  const Export &entry = peer.port->exports[region.slot];
  if (!entry.valid || entry.key.differs(region.key) || entry.rank != own.rank || entry.epoch != own.epoch) {
    return Verdict::kKey;
  }
  return offset > entry.length || length > entry.length - offset ? Verdict::kBounds : Verdict::kLanded;
}

// Checks, then copies. `hold` is the target's lock.
inline Verdict land(const Port &own, const Peer &peer, std::unique_lock<std::mutex> &hold, const ept_region &region,
                    uint64_t offset, const void *source, uint64_t length) {
  const Verdict verdict = check(own, peer, region, offset, length);
  if (verdict != Verdict::kLanded || length == 0) return verdict;
  Port &target = *peer.port;
  uint8_t *const destination = target.exports[region.slot].base + offset;
  if (length <= kCopyUnderLock) {
    return move(destination, source, length) ? verdict : Verdict::kCopy;
  }
  ++target.exports[region.slot].pins;
  hold.unlock();
  const bool moved = move(destination, source, length);
  hold.lock();
  if (--target.exports[region.slot].pins == 0) target.unpinned.notify_all();
  return moved ? check_link(*peer.link) : Verdict::kCopy;
}

// The event at the target, after all bytes of the operation. With its lock held, and room there.
inline void announce(const Port &own, Port &target, const ept_op &op, std::unique_ptr<char[]> message) {
  Item &item = target.arrive();
  ept_event &event = item.event;
  event.size = sizeof event;
  event.kind = op.kind == EPT_OP_SEND ? EPT_EVENT_RECV : EPT_EVENT_IMM;
  event.peer = own.rank;
  event.epoch = own.epoch;
  event.rail = op.rail < target.rails ? op.rail : op.rail % target.rails;
  event.immediate = op.immediate;
  event.cookie = 0;
  event.length = op.kind == EPT_OP_SIGNAL ? 0 : op.length;
  event.data = message.get();
  event.code = EPT_OK;
  event.provider_errno = 0;
  event.text = nullptr;
  item.owned = std::move(message);
  if (op.kind != EPT_OP_SEND) ++target.consumed[size_t{own.rank} * target.rails + event.rail];
  target.ring();
}

inline std::unique_ptr<char[]> copy_of(const void *source, uint64_t length) {
  std::unique_ptr<char[]> bytes(new char[length + 1]);
  if (length) memcpy(bytes.get(), source, length);
  return bytes;
}

// A whole operation at once. With the target's lock held.
inline Verdict carry(const std::shared_ptr<Port> &own, const Peer &peer, std::unique_lock<std::mutex> &hold,
                     const ept_op &op) {
  Verdict verdict = check_link(*peer.link);
  if (verdict != Verdict::kLanded) return verdict;
  Port &target = *peer.port;
  if (target.full()) {
    if (std::find(target.starved.begin(), target.starved.end(), own) == target.starved.end()) {
      target.starved.push_back(own);
    }
    return Verdict::kFull;
  }
  if (op.kind == EPT_OP_SEND) {
    announce(*own, target, op, copy_of(op.source, op.length));
    return verdict;
  }
  verdict = land(*own, peer, hold, *op.region, op.offset, op.source, op.kind == EPT_OP_SIGNAL ? 0 : op.length);
  if (verdict == Verdict::kLanded) announce(*own, target, op, nullptr);
  return verdict;
}

}  // namespace loopback
