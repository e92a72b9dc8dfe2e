// SPDX-License-Identifier: Apache-2.0
// When is it quiet? Fences: nothing of an epoch lands here any more. Quiesce: nothing of ours is under way.
#include <algorithm>

#include "instance.h"

using namespace libfabric;

namespace {

// What had landed when its key was closed is in the queue by then. The strict shim holds an arrival back for 100 ms.
constexpr uint64_t kFenceNs = 200000000;
// Past a fence's time. The shim's storms of empty reads are four long, and another begins at one read in ten.
constexpr uint8_t kFenceReads = 64;

}  // namespace

int32_t ept_instance::peer_fence(uint32_t rank, uint32_t epoch, uint64_t cookie) {
  if (rank >= params.world)
    return fail(EPT_E_INVALID, "peer_fence", rank, 0, "libfabric: rank %u is outside the world of %u", rank,
                params.world);
  Peer *peer = peers[rank].get();
  if (peer != nullptr && peer->epoch <= epoch)
    end_peer(peer, EPT_E_PEER_LOST, 0, format("epoch %u of rank %u was fenced here", epoch, rank), false);
  uint32_t &fence = fenced_epochs[rank];
  fence = std::max(fence, epoch);
  close_exports_of(rank, epoch);
  if (!traits.revokes)
    return fail(EPT_E_STUCK, "peer_fence", rank, 0,
                "libfabric: over provider %s a payload that is half received goes on landing after its key was closed; "
                "end the process that was rank %u, epoch %u",
                traits.setting.c_str(), rank, epoch);
  fences.push_back({cookie, rank, epoch, all_rails(), now() + kFenceNs});
  return EPT_OK;
}

// When is an epoch fenced? Its keys were closed by peer_fence, so no write of it lands after that, and each one that
// had landed has an arrival; but a read that gives nothing doesn't say that no arrival is on its way from the card
// through the library to the queue, and the engine gives the chans that they name to others as soon as it hears FENCED.
// No provider bounds that way. On a card it takes microseconds, the strict shim makes it a tenth of a second and
// spurious empty reads. So a rail is fenced when kFenceNs have passed and its queue was then found empty kFenceReads
// times; or at once, when it is never read again.
void ept_instance::found_empty(Rail *rail) {
  for (size_t i = 0; i < fences.size();) {
    Fence &fence = fences[i];
    const uint32_t bit = 1u << rail->number;
    const bool waits = (fence.rails & bit) != 0;
    if (waits && fence.due_ns == 0) ++fence.empty_reads[rail->number];
    if (waits && (fence.empty_reads[rail->number] == kFenceReads || !rail->broken.empty())) {
      fence.rails &= ~bit;
      ept_event *event = events.add(EPT_EVENT_FENCED, fence.rank, fence.epoch);
      event->rail = rail->number;
      event->cookie = fence.cookie;
    }
    if (fence.rails == 0)
      fences.erase(fences.begin() + static_cast<ptrdiff_t>(i));
    else
      ++i;
  }
}

int32_t ept_instance::quiesce(uint32_t rank, int32_t scope, uint64_t cookie) {
  if (scope != EPT_SCOPE_LOCAL && scope != EPT_SCOPE_REMOTE)
    return fail(EPT_E_INVALID, "quiesce", rank, 0, "libfabric: scope %d is neither local nor remote", scope);
  quiesces.push_back({cookie, rank, scope, next_serial});
  give_quiesced();
  return EPT_OK;
}

void ept_instance::give_quiesced() {
  for (size_t i = 0; i < quiesces.size();) {
    const Quiesce &entry = quiesces[i];
    bool busy = false;
    const Operation *stuck = nullptr;
    for (const auto &rail : rails) {
      for (const Operation &operation : rail->operations) {
        if (operation.kind != Operation::Kind::kWrite && operation.kind != Operation::Kind::kSend) continue;
        if (operation.serial >= entry.serial) continue;
        if (entry.rank != UINT32_MAX && operation.peer->rank != entry.rank) continue;
        if (operation.told)
          stuck = &operation;  // told, and the provider holds it still
        else
          busy = true;
      }
    }
    if (busy) {
      ++i;
      continue;
    }
    std::string text;
    if (stuck != nullptr)
      text = format(
          "the endpoint of rank %u, which still holds operations to rank %u, epoch %u: its provider has not given them "
          "back",
          params.rank, stuck->peer->rank, stuck->peer->epoch);
    ept_event *event =
        events.add(EPT_EVENT_QUIESCED, entry.rank, stuck != nullptr ? stuck->peer->epoch : 0, std::move(text));
    event->cookie = entry.cookie;
    event->code = stuck != nullptr ? EPT_E_STUCK : EPT_OK;
    quiesces.erase(quiesces.begin() + static_cast<ptrdiff_t>(i));
  }
}
