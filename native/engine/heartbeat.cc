/* SPDX-License-Identifier: Apache-2.0
 * Heartbeats: a rank that has nothing to say gives a sign of life, and one that gives none is dead.
 *
 * INVARIANTS
 *  - A rank whose network is moved by somebody at all times (a proxy thread stands in while no call waits) promises
 *    in HELLO that a peer hears of it every heartbeat_ns; whatever it sends counts. One that moves only inside its
 *    application's calls (EPT_PROGRESS_INLINE) promises nothing, and is never judged by its silence.
 *  - Heartbeats take no credit, so that no lack of credits is taken for death. What bounds their number instead: who
 *    has sent one since anything last came from the peer sends no second (one more is left for news of the membership:
 *    EPT_FREE_HEARTBEATS). Two ranks that both move answer each other by their own heartbeats, and so go on; one that
 *    stands still leaves at most that many unread.
 *  - A judge reads before it judges: all that had come when it looked (`all_read`) has renewed `last_sign` already. And
 *    it counts no silence that it did not witness: a rank that was away itself (stopped, or starved of its core) for
 *    half of dead_ns or more begins to count anew when it is back, since what its peers sent meanwhile may need more
 *    than one poll to come in, and their heartbeats stopped for want of its own.
 *  - So a peer that is silent is LOST within dead_ns of its last sign, if this rank is there to see it; twice the
 *    peer's own promise if that is longer, since the two may be set up differently.
 *
 * A tick comes twice in heartbeat_ns, and `sent` says only that something was sent between two of them: so a sign of
 * life goes out after at most 1.5 heartbeat_ns, of which dead_ns holds three.
 */
#include <algorithm>

#include "engine/engine.h"

using namespace ept;

void ept_engine::tick(bool all_read) {
  if (now - last_tick > dead_ns / 2) judged_from = now;
  last_tick = now;
  next_tick = world > 1 ? now + std::max<uint64_t>(heartbeat_ns / 2, 1) : forever;
  for (Peer &peer : peers) {
    if (peer.status != EPT_PEER_UP || peer.rank == rank) continue;
    if (peer.sent) {
      peer.sent = false;
      peer.last_sent = now;
    } else if (now - peer.last_sent >= heartbeat_ns && !peer.unanswered) {
      send_heartbeat(peer);
    }
    tell(peer);
    if (!peer.promised_ns) continue;
    const uint64_t bound = std::max(dead_ns, 2 * peer.promised_ns);
    const uint64_t dead_at = std::max(peer.last_sign, judged_from) + bound;
    if (now < dead_at) {
      next_tick = std::min(next_tick, dead_at);
    } else if (all_read) {
      char why[160];
      std::snprintf(why, sizeof why,
                    "silent for %.3f s, though it promised a sign of life every %.3f s (%.3f s of silence is death)",
                    static_cast<double>(now - peer.last_sign) * 1e-9, static_cast<double>(peer.promised_ns) * 1e-9,
                    static_cast<double>(bound) * 1e-9);
      lose(peer, EPT_PEER_LOST, EPT_E_PEER_LOST, 0, why, true);
    }
  }
}

void ept_engine::heard(Peer &peer) {
  peer.last_sign = now;
  peer.unanswered = 0;
}

void ept_engine::send_heartbeat(Peer &peer) {
  const ept_heartbeat heartbeat{membership, 0};
  peer.told = membership;
  peer.unanswered++;
  post_message(peer, EPT_MESSAGE_HEARTBEAT, 0, &heartbeat, sizeof heartbeat);
}

/* News of the membership, if it has not heard them. */
void ept_engine::tell(Peer &peer) {
  if (peer.rank == rank || peer.status != EPT_PEER_UP || peer.told >= membership) return;
  if (peer.unanswered < EPT_FREE_HEARTBEATS) send_heartbeat(peer);
}

void ept_engine::on_heartbeat(Peer &peer, const ept_heartbeat &heartbeat) {
  peer.told = std::max(peer.told, heartbeat.membership);
  if (heartbeat.membership <= membership) return;
  hear_membership(heartbeat.membership);
  next_tick = now; /* pass it on */
}
