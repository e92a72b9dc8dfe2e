/* SPDX-License-Identifier: Apache-2.0
 * Membership: how a link to a rank ends, by its death or by a mask, and how another one begins.
 *
 * INVARIANTS
 *  - A link joins two lives: (our epoch, the peer's epoch). The plugin lets there be at most one between the same two,
 *    since an epoch that was fenced is never opened again; so the pair names the link on both sides, without any word
 *    between them. What both send over it says so: keys and streams are made under it, a HELLO names both epochs, every
 *    other message its sender's, a blob both. Here each object of a link carries `peer.link`, the number of links that
 *    have ended. When that number moves on, all of them are stale in one step, and no path follows a stale one: not an
 *    immediate (its chan), a message (its epoch), a region or signal to write to, a wait, nor an operation's end.
 *  - Revocation first. end_link takes back every key that the rank holds before it says or does anything else. So the
 *    order that clause 11 asks for holds whatever happens in between: from the first line on, no byte of it lands. Then
 *    the link's number moves on (no signal of it rises any more), and then the plugin fences it.
 *  - Where no key can be taken back (caps.can_revoke 0) an exported memory moves to `aside` instead, with the life that
 *    may write it, and can't be deregistered until ept_engine_known_dead names that life.
 *  - An ended link is wound up when all its FENCED events have come (one a rail) and the plugin has ended all of its
 *    operations. The first alone gives its chans free: until then an immediate that names one may come, and a chan that
 *    had been given to another by then would raise the wrong signal. It also lets the next link to that rank begin.
 *    What operations hold (memory, regions, the anchor) stays held until the second. A plugin that can't fence a rank
 *    (its memory is mapped there) leaves the link so until ept_engine_known_dead says that the process has ended.
 *  - Whoever waits for a rank remembers its link number, and gives up when it has moved on: a mask and a readmission
 *    that both pass while it sleeps do not leave it waiting for what the old link owed.
 */
#include <sched.h>

#include <algorithm>

#include "engine/engine.h"
#include "engine/wait.h"

using namespace ept;

/* The peer died, left, or broke the protocol. `at_once`: the plugin does not know it, so its operations fail now. */
void ept_engine::lose(Peer &peer, int32_t status, int32_t code, int32_t provider_errno, const char *why, bool at_once) {
  if (peer.ended()) return;
  peer.why_code = code;
  peer.why_errno = provider_errno;
  peer.why = why;
  end_link(peer, status, at_once);
  say(status == EPT_PEER_LOST ? EPT_LOG_WARNING : EPT_LOG_DEBUG, describe(peer));
}

void ept_engine::end_link(Peer &peer, int32_t status, bool at_once) {
  memories.each([&](uint64_t, Memory &memory) {
    const size_t before = memory.exports.size();
    revoke_exports(memory, peer.rank);
    /* Who closed its engine writes no more. */
    if (!caps.can_revoke && memory.exports.size() != before && status != EPT_PEER_LEFT) {
      memory.aside.push_back({peer.rank, peer.epoch});
    }
  });
  if (peer.anchored) plugin->region_revoke(anchor_mem, peer.rank, peer.anchor_key);
  peer.status = status;
  peer.last_end = describe(peer);
  peer.address.clear();
  fail_peer_work(peer, (status == EPT_PEER_MASKED ? peer.last_end : peer.why).c_str(), at_once);
  const EndedLink ended{peer.rank,      peer.link,   peer.epoch, next_nonce++, static_cast<uint32_t>(rails.size()),
                        peer.in_flight, peer.anchor, false};
  const bool opened = peer.opened;
  peer.link++;
  static_cast<Link &>(peer) = Link{};
  if (opened) {
    ended_links.push_back(ended);
    if (plugin->peer_fence(instance, ended.rank, ended.epoch, ended.cookie)) {
      ended_links.back().refused = true;
      ept_error said{};
      said.size = sizeof said;
      plugin->last_error(&said);
      /* Nobody has to end a process that has closed its engine. */
      say(status == EPT_PEER_LEFT ? EPT_LOG_DEBUG : EPT_LOG_WARNING,
          "rank " + std::to_string(peer.rank) + " can't be fenced: " + said.text);
    }
  }
  signals.each([&](uint64_t, Signal &signal) {
    if (signal.source == peer.rank) signal.chan = 0;
  });
  for (auto &[nonce, pending] : quiescing) {
    if (std::erase(pending.asked, peer.rank) && !caps.can_revoke) {
      pending.code = EPT_E_STUCK; /* it may write on: no key of ours stops it */
      pending.text = "the link to rank " + std::to_string(peer.rank) + ", which ended before it answered";
    }
  }
  std::erase_if(answers, [&](const QuiesceAnswer &answer) { return answer.peer == peer.rank; });
  news++;
  notify_owner();
  moved.notify_all();
}

void ept_engine::on_fenced(const ept_event &event) {
  auto ended = std::find_if(ended_links.begin(), ended_links.end(),
                            [&](const EndedLink &link) { return link.cookie == event.cookie; });
  if (ended == ended_links.end() || !ended->fences) return;
  if (--ended->fences == 0) fenced(static_cast<size_t>(ended - ended_links.begin()));
}

/* Nothing of it can come any more. */
void ept_engine::fenced(size_t index) {
  const EndedLink ended = ended_links[index];
  Peer &peer = peers[ended.rank];
  free_chans_of(ended.rank, ended.link);
  wind_up(index);
  if (moved_waiters) moved.notify_all();
  if (peer.status != EPT_PEER_CONNECTING || peer.opened || fencing(peer.rank)) return;
  ept_error error{};
  error.size = sizeof error;
  if (int32_t code = open_link(peer, &error)) lose(peer, EPT_PEER_LOST, code, error.provider_errno, error.text);
}

void ept_engine::wind_up(size_t index) {
  const EndedLink &ended = ended_links[index];
  if (ended.fences || ended.operations) return;
  if (ended.anchor) plugin->region_drop(ended.anchor);
  ended_links.erase(ended_links.begin() + static_cast<ptrdiff_t>(index));
}

bool ept_engine::fencing(uint32_t of) const {
  return std::any_of(ended_links.begin(), ended_links.end(),
                     [&](const EndedLink &link) { return link.fences && (of == nobody || link.rank == of); });
}

void ept_engine::mask(Peer &peer, uint32_t under, const char *why) {
  peer.membership = under;
  peer.why = why ? why : "";
  if (peer.status == EPT_PEER_MASKED) return;
  peer.why_code = EPT_E_PEER_LOST;
  peer.why_errno = 0;
  if (peer.opened) {
    end_link(peer, EPT_PEER_MASKED, true);
  } else {
    peer.status = EPT_PEER_MASKED;
    peer.last_end = describe(peer);
    peer.address.clear();
    news++;
    notify_owner();
    moved.notify_all();
  }
  drop_messages_of(peer.rank);
  say(EPT_LOG_WARNING, peer.last_end);
}

/* What it said over an ended link and nobody has read. */
void ept_engine::drop_messages_of(uint32_t source) {
  for (auto queue = inbox.begin(); queue != inbox.end();) {
    std::erase_if(queue->second, [&](const Received &message) { return message.from == source; });
    queue = queue->second.empty() ? inbox.erase(queue) : std::next(queue);
  }
}

int32_t ept_engine::rejoin(Hold &hold, uint32_t next_epoch, ept_error *error) {
  rejoining = true;
  while (sleepers) { /* on a descriptor that is about to go */
    wake_up(*caller_wake);
    wake_up(*proxy_wake);
    hold.unlock();
    sched_yield();
    hold.lock();
  }
  rejoining = false;
  if (closed) return usable("rejoin", error);
  for (Peer &peer : peers) {
    if (peer.rank == rank) continue;
    if (peer.opened) {
      peer.why_code = EPT_E_PEER_LOST;
      peer.why = "rank " + std::to_string(rank) + " began another life";
      end_link(peer, EPT_PEER_LOST, true);
    }
    drop_messages_of(peer.rank);
    const uint32_t link = peer.link;
    const std::string last_end = peer.last_end;
    peer = Peer{};
    peer.rank = static_cast<uint32_t>(&peer - peers.data());
    peer.link = link + 1; /* also for who waits for a link that was not open yet */
    peer.last_end = last_end.empty() ? "rank " + std::to_string(rank) + " began another life" : last_end;
    peer.last_sign = now_ns();
  }
  dirty.clear();
  close_plugin();
  std::vector<uint64_t> held;
  in_flight.each([&](uint64_t cookie, InFlight &) { held.push_back(cookie); });
  for (uint64_t cookie : held) operation_ended(cookie, EPT_E_PEER_LOST, 0, "this rank began another life");
  for (auto &[nonce, pending] : quiescing) pending.plugin_waiting = 0; /* closed: nothing touches the memory */
  answering.clear();
  chans.clear();
  chans.emplace_back();
  free_chans.clear();
  join_round = 0;
  epoch = next_epoch;
  int32_t code = open_plugin(error);
  memories.each([&](uint64_t, Memory &memory) {
    if (code) return;
    code = plugin->mem_register(instance, &memory.desc, &memory.mem);
    if (code) plugin_error(code, "rejoin", -1, error);
  });
  if (code) {
    close_plugin();
    closed = true;
  }
  news++;
  notify_owner();
  moved.notify_all();
  return code;
}

void ept_engine::hear_membership(uint32_t heard) {
  if (heard <= membership) return;
  membership = heard;
  news++;
  notify_owner();
  moved.notify_all();
}

namespace {

int32_t check_peer(ept_engine *engine, uint32_t rank, const char *operation, ept_error *error) {
  if (int32_t code = engine->usable(operation, error)) return code;
  if (rank < engine->world && rank != engine->rank) return EPT_OK;
  return fail(error, EPT_E_INVALID, operation, -1, "rank %u is no peer of rank %u in a world of %u", rank, engine->rank,
              engine->world);
}

}  // namespace

extern "C" {

int32_t ept_engine_mask(ept_engine *engine, uint32_t rank, uint32_t membership, const char *why, ept_error *error) {
  return guarded(error, "mask", [&]() -> int32_t {
    Hold hold(engine->lock);
    if (int32_t code = check_peer(engine, rank, "mask", error)) return code;
    engine->mask(engine->peers[rank], membership, why);
    return EPT_OK;
  });
}

int32_t ept_engine_known_dead(ept_engine *engine, uint32_t rank, uint32_t epoch, ept_error *error) {
  return guarded(error, "known_dead", [&]() -> int32_t {
    Hold hold(engine->lock);
    if (int32_t code = check_peer(engine, rank, "known_dead", error)) return code;
    engine->memories.each([&](uint64_t, Memory &memory) {
      std::erase_if(memory.aside, [&](const Memory::Aside &life) { return life.rank == rank && life.epoch <= epoch; });
    });
    for (size_t i = engine->ended_links.size(); i-- > 0;) {
      EndedLink &link = engine->ended_links[i];
      if (link.rank != rank || link.epoch > epoch || !link.refused || !link.fences) continue;
      link.fences = 0;
      engine->fenced(i);
    }
    return EPT_OK;
  });
}

int32_t ept_engine_readmit(ept_engine *engine, uint32_t rank, uint32_t epoch, const void *address, size_t length,
                           ept_error *error) {
  return guarded(error, "readmit", [&]() -> int32_t {
    Hold hold(engine->lock);
    if (int32_t code = check_peer(engine, rank, "readmit", error)) return code;
    const auto number = static_cast<int32_t>(rank);
    if (engine->caps.group_only) {
      return fail(error, EPT_E_UNSUPPORTED, "readmit", number,
                  "backend %s connects a whole group, and no single rank of it again", engine->plugin_name.c_str());
    }
    Peer &peer = engine->peers[rank];
    if (peer.status == EPT_PEER_CONNECTING || peer.status == EPT_PEER_UP) {
      return fail(error, EPT_E_INVALID, "readmit", number, "%s; mask it first", engine->describe(peer).c_str());
    }
    uint32_t its_epoch = 0;
    if (int32_t code = engine->check_address(rank, address, length, its_epoch, error)) return code;
    if (its_epoch != epoch) {
      return fail(error, EPT_E_INVALID, "readmit", number, "the address is of epoch %u of rank %u, not of epoch %u",
                  its_epoch, rank, epoch);
    }
    if (peer.lived && epoch <= peer.epoch) {
      return fail(
          error, EPT_E_INVALID, "readmit", number,
          "epoch %u of rank %u is over here; it comes back under an epoch higher than %u (ept_engine_rejoin, or "
          "a new process)",
          epoch, rank, peer.epoch);
    }
    engine->drop_messages_of(rank);
    peer.address.assign(static_cast<const uint8_t *>(address), static_cast<const uint8_t *>(address) + length);
    peer.epoch = epoch;
    peer.why_code = EPT_OK, peer.why_errno = 0;
    peer.why.clear();
    peer.status = EPT_PEER_CONNECTING;
    peer.last_sign = now_ns();
    if (engine->fencing(rank)) return EPT_OK; /* on_fenced opens it */
    ept_error said{};
    said.size = sizeof said;
    if (int32_t code = engine->open_link(peer, &said)) {
      engine->lose(peer, EPT_PEER_LOST, code, said.provider_errno, said.text);
      fail(error, code, "readmit", number, "%s", said.text);
      if (error) error->provider_errno = said.provider_errno;
      return code;
    }
    return EPT_OK;
  });
}

int32_t ept_engine_wait_peer(ept_engine *engine, uint32_t rank, uint64_t timeout, ept_error *error) {
  return guarded(error, "wait_peer", [&]() -> int32_t {
    Hold hold(engine->lock);
    if (int32_t code = check_peer(engine, rank, "wait_peer", error)) return code;
    const Peer &peer = engine->peers[rank];
    const uint64_t begin = now_ns();
    const Awaited awaited{rank};
    Waiting about{"wait_peer", "until it is up", &awaited, 1};
    int32_t code = engine->wait(
        hold, timeout,
        [&]() -> int32_t {
          if (engine->closed) return EPT_E_CLOSED;
          if (peer.ended()) return EPT_E_PEER_LOST;
          return peer.status == EPT_PEER_UP ? EPT_OK : EPT_LATER;
        },
        error, &about);
    if (code != EPT_E_TIMEOUT && code != EPT_E_PEER_LOST && code != EPT_E_CLOSED) return code;
    fail(error, code, "wait_peer", static_cast<int32_t>(rank), "rank %u waited %.3f s for a link to rank %u; %s",
         engine->rank, static_cast<double>(now_ns() - begin) * 1e-9, rank,
         code == EPT_E_CLOSED ? "the engine was closed meanwhile" : engine->describe(peer).c_str());
    if (error) error->provider_errno = peer.why_errno;
    return code;
  });
}

int32_t ept_engine_rejoin(ept_engine *engine, uint32_t epoch, ept_error *error) {
  return guarded(error, "rejoin", [&]() -> int32_t {
    Hold hold(engine->lock);
    if (int32_t code = engine->usable("rejoin", error)) return code;
    if (engine->caps.group_only) {
      return fail(error, EPT_E_UNSUPPORTED, "rejoin", -1, "backend %s connects a whole group, and no single rank again",
                  engine->plugin_name.c_str());
    }
    if (engine->rejoining) {
      return fail(error, EPT_E_INVALID, "rejoin", -1, "another thread of rank %u is at it", engine->rank);
    }
    if (epoch <= engine->epoch) {
      return fail(error, EPT_E_INVALID, "rejoin", -1, "rank %u lives in epoch %u; its next is higher, and %u is not",
                  engine->rank, engine->epoch, epoch);
    }
    return engine->rejoin(hold, epoch, error);
  });
}

int32_t ept_engine_tell_membership(ept_engine *engine, uint32_t epoch, ept_error *error) {
  return guarded(error, "tell_membership", [&]() -> int32_t {
    Hold hold(engine->lock);
    if (int32_t code = engine->usable("tell_membership", error)) return code;
    engine->hear_membership(epoch);
    for (Peer &peer : engine->peers) engine->tell(peer);
    engine->pump_dirty();
    return EPT_OK;
  });
}

int32_t ept_engine_membership(ept_engine *engine, uint32_t *epoch, ept_error *) {
  Hold hold(engine->lock);
  *epoch = engine->membership;
  return EPT_OK;
}

}  // extern "C"
