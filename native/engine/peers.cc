/* SPDX-License-Identifier: Apache-2.0
 * Peers: how they are found, greeted, talked to, and how they end. */
#include <algorithm>

#include "engine/engine.h"
#include "engine/wait.h"

using namespace ept;

namespace {

/* What the bootstrap ships: the plugin's address in an envelope that tells a mix-up at once. */
struct AddressBlob {
  uint32_t magic;
  uint32_t version;
  uint32_t rank, epoch;
  char backend[16];
};
constexpr uint32_t address_magic = 0x41545045; /* "EPTA" */

/* Messages that wait for send credits: past it, ept_engine_send makes its caller wait. */
constexpr size_t message_queue = 256;
/* Send credits that only the engine's own messages may use, so that an application that reads none of its messages
 * can't stop a descriptor or an answer. */
constexpr uint32_t own_send_credits = 16;

const char *status_name(int32_t status) {
  switch (status) {
    case EPT_PEER_NEW:
      return "not connected";
    case EPT_PEER_CONNECTING:
      return "still connecting";
    case EPT_PEER_UP:
      return "up";
    case EPT_PEER_LEFT:
      return "gone (it closed)";
    case EPT_PEER_MASKED:
      return "masked";
    default:
      return "lost";
  }
}

}  // namespace

std::string ept_engine::describe(const Peer &peer) {
  char text[512];
  const double silent = static_cast<double>(now_ns() - peer.last_sign) * 1e-9;
  if (peer.status == EPT_PEER_MASKED) {
    std::snprintf(text, sizeof text, "rank %u was masked under epoch %u%s%s", peer.rank, peer.membership,
                  peer.why.empty() ? "" : ": ", peer.why.c_str());
  } else if (peer.why_code) {
    std::snprintf(text, sizeof text, "rank %u is %s: %s", peer.rank, status_name(peer.status), peer.why.c_str());
  } else {
    std::snprintf(text, sizeof text, "rank %u is %s and last gave a sign of life %.3f s ago", peer.rank,
                  status_name(peer.status), silent);
  }
  return text;
}

int32_t ept_engine::usable_peer(uint32_t number, const char *operation, ept_error *error) {
  if (int32_t code = usable(operation, error)) return code;
  if (number >= world || number == rank) {
    return fail(error, EPT_E_INVALID, operation, -1, "rank %u is no peer of rank %u in a world of %u", number, rank,
                world);
  }
  const Peer &peer = peers[number];
  if (peer.status == EPT_PEER_UP) return EPT_OK;
  int32_t code = fail(error, peer.ended() ? EPT_E_PEER_LOST : EPT_E_INVALID, operation, static_cast<int32_t>(number),
                      "%s", describe(peer).c_str());
  if (error) error->provider_errno = peer.why_errno;
  return code;
}

int32_t ept_engine::address(std::vector<uint8_t> &blob, ept_error *error) {
  AddressBlob head{address_magic, EPT_WIRE_VERSION, rank, epoch, {}};
  std::snprintf(head.backend, sizeof head.backend, "%s", plugin_name.c_str());
  blob.resize(sizeof head + 4096);
  size_t length = 4096;
  if (int32_t code = plugin->local_address(instance, blob.data() + sizeof head, &length)) {
    return plugin_error(code, "local_address", -1, error);
  }
  std::memcpy(blob.data(), &head, sizeof head);
  blob.resize(sizeof head + length);
  return EPT_OK;
}

int32_t ept_engine::connect(const void *const *addresses, const size_t *lengths, ept_error *error) {
  for (Peer &peer : peers) {
    if (peer.rank == rank || peer.status != EPT_PEER_NEW) continue;
    const void *address = addresses[peer.rank];
    const size_t length = lengths[peer.rank];
    if (int32_t code = check_address(peer.rank, address, length, peer.epoch, error)) return code;
    peer.address.assign(static_cast<const uint8_t *>(address), static_cast<const uint8_t *>(address) + length);
    if (int32_t code = open_link(peer, error)) return code;
    peer.status = EPT_PEER_CONNECTING;
  }
  return EPT_OK;
}

/* Is it an address of rank `of` that this engine can talk to? Then the life that it belongs to. */
int32_t ept_engine::check_address(uint32_t of, const void *address, size_t length, uint32_t &its_epoch,
                                  ept_error *error) {
  const auto number = static_cast<int32_t>(of);
  AddressBlob head;
  if (length < sizeof head) {
    return fail(error, EPT_E_INVALID, "connect", number, "the address of rank %u has %zu bytes", of, length);
  }
  std::memcpy(&head, address, sizeof head);
  head.backend[sizeof head.backend - 1] = 0;
  if (head.magic != address_magic || head.rank != of) {
    return fail(error, EPT_E_INVALID, "connect", number, "what stands for the address of rank %u is not one of its",
                of);
  }
  if (head.version != EPT_WIRE_VERSION) {
    return fail(error, EPT_E_VERSION, "connect", number, "rank %u speaks wire version %u, rank %u version %d", of,
                head.version, rank, EPT_WIRE_VERSION);
  }
  if (plugin_name != head.backend) {
    return fail(error, EPT_E_MISMATCH, "connect", number, "rank %u took backend %s, rank %u backend %s", of,
                head.backend, rank, plugin_name.c_str());
  }
  its_epoch = head.epoch;
  return EPT_OK;
}

/* Asks the plugin for a link to the life `peer.epoch` at `peer.address`. */
int32_t ept_engine::open_link(Peer &peer, ept_error *error) {
  const auto number = static_cast<int32_t>(peer.rank);
  const uint8_t *inner = peer.address.data() + sizeof(AddressBlob);
  const size_t inner_length = peer.address.size() - sizeof(AddressBlob);
  ept_reach reach{};
  reach.size = sizeof reach;
  if (int32_t code = plugin->reach(instance, inner, inner_length, &reach)) {
    plugin_error(code, "connect", number, error);
    if (reach.why_not[0]) {
      fail(error, code, "connect", number, "backend %s can't reach rank %u: %s", plugin_name.c_str(), peer.rank,
           reach.why_not);
    }
    return code;
  }
  peer.last_sign = now_ns();
  if (int32_t code = plugin->peer_open(instance, peer.rank, peer.epoch, inner, inner_length)) {
    return plugin_error(code, "connect", number, error);
  }
  peer.opened = peer.lived = true;
  peer.address.clear();
  return EPT_OK;
}

/* First message on a new peer: what it may have in flight to us, and the chans by which its grants come to us. */
void ept_engine::greet(Peer &peer) {
  peer.greeted = true;
  peer.own_credit_chan = new_chan(ChanKind::credits, peer.rank, 0);
  peer.own_send_credit_chan = new_chan(ChanKind::send_credits, peer.rank, 0);
  peer.own_plain_chan = new_chan(ChanKind::plain, peer.rank, 0);
  if (!peer.own_plain_chan) {
    lose(peer, EPT_PEER_LOST, EPT_E_LIMIT, 0, "all chans that an immediate can name are given out");
    return;
  }
  std::vector<uint8_t> body(sizeof(ept_hello) + 4096);
  size_t length = 4096;
  if (int32_t code = plugin->region_export(anchor_mem, peer.rank, 0, anchor.size(), body.data() + sizeof(ept_hello),
                                           &length, &peer.anchor_key)) {
    lose(peer, EPT_PEER_LOST, code, 0, "the anchor region could not be exported to it");
    return;
  }
  peer.anchored = true;
  ept_hello hello{};
  hello.rank = rank;
  hello.rails = static_cast<uint32_t>(rails.size());
  hello.credits = credits;
  hello.send_credits = send_credits;
  hello.credit_chan = peer.own_credit_chan;
  hello.send_credit_chan = peer.own_send_credit_chan;
  hello.plain_chan = peer.own_plain_chan;
  hello.anchor_length = static_cast<uint32_t>(length);
  hello.consumed = peer.consumed_total;
  hello.reader_epoch = peer.epoch;
  /* Who moves only when its application calls promises nothing. */
  hello.heartbeat_us = progress_mode == EPT_PROGRESS_INLINE ? 0 : static_cast<uint32_t>((heartbeat_ns + 999) / 1000);
  std::memcpy(body.data(), &hello, sizeof hello);
  post_message(peer, EPT_MESSAGE_HELLO, 0, body.data(), sizeof hello + length);
}

void ept_engine::on_hello(Peer &peer, const uint8_t *body, size_t length) {
  ept_hello hello;
  if (peer.heard || length < sizeof hello) return;
  std::memcpy(&hello, body, sizeof hello);
  if (hello.reader_epoch != epoch) {
    stale++;
    return;
  }
  if (hello.rank != peer.rank || hello.anchor_length != length - sizeof hello || hello.credits > EPT_IMM_WINDOW ||
      hello.credits < 2 * EPT_GRANT_QUANTUM || hello.send_credits > EPT_IMM_CHANS ||
      hello.credit_chan >= EPT_IMM_CHANS || hello.send_credit_chan >= EPT_IMM_CHANS ||
      hello.plain_chan >= EPT_IMM_CHANS) {
    lose(peer, EPT_PEER_LOST, EPT_E_VERSION, 0, "its HELLO makes no sense to this version");
    return;
  }
  if (int32_t code =
          plugin->region_import(instance, peer.rank, body + sizeof hello, hello.anchor_length, &peer.anchor)) {
    peer.anchor = nullptr;
    lose(peer, EPT_PEER_LOST, code, 0, "its anchor region could not be imported");
    return;
  }
  peer.credits = peer.most_credits = hello.credits;
  peer.send_credits = peer.most_send_credits = hello.send_credits;
  peer.credit_chan = hello.credit_chan;
  peer.send_credit_chan = hello.send_credit_chan;
  peer.plain_chan = hello.plain_chan;
  peer.promised_ns = uint64_t{hello.heartbeat_us} * 1000;
  peer.heard = true;
  if (peer.linked && peer.status == EPT_PEER_CONNECTING) peer.status = EPT_PEER_UP;
  mark_dirty(peer);
}

void ept_engine::on_peer(const ept_event &event) {
  if (event.peer >= world || event.peer == rank) return;
  Peer &peer = peers[event.peer];
  if (event.code == EPT_LATER) return;
  if (!peer.opened || event.epoch != peer.epoch) {
    stale++;
    return;
  }
  if (event.code == EPT_OK) {
    peer.linked = true;
    peer.last_sign = peer.last_sent = now_ns();
    if (!peer.greeted) greet(peer);
    if (peer.heard && peer.status == EPT_PEER_CONNECTING) peer.status = EPT_PEER_UP;
    return;
  }
  const bool left = event.code == EPT_E_CLOSED || peer.goodbye;
  lose(peer, left ? EPT_PEER_LEFT : EPT_PEER_LOST, left ? EPT_E_PEER_LOST : event.code, event.provider_errno,
       event.text ? event.text : (left ? "it closed its engine" : ept_code_name(event.code)));
}

/* ---- messages ---- */

void ept_engine::post_message(Peer &peer, uint16_t type, uint64_t tag, const void *body, size_t length) {
  ept_message head{EPT_WIRE_VERSION, type, epoch, tag};
  Message message;
  message.bytes = std::make_unique<std::vector<uint8_t>>(sizeof head + length);
  std::memcpy(message.bytes->data(), &head, sizeof head);
  if (length) std::memcpy(message.bytes->data() + sizeof head, body, length);
  message.free_of_credit = type == EPT_MESSAGE_HELLO || type == EPT_MESSAGE_GOODBYE || type == EPT_MESSAGE_HEARTBEAT;
  message.user = type == EPT_MESSAGE_USER;
  if (message.user) {
    peer.messages.push_back(std::move(message));
  } else {
    /* The engine's own never wait behind an application's: its reader may be slow. */
    auto at = std::find_if(peer.messages.begin(), peer.messages.end(), [](const Message &m) { return m.user; });
    peer.messages.insert(at, std::move(message));
  }
  mark_dirty(peer);
}

void ept_engine::stage_messages(Peer &peer) {
  while (!peer.messages.empty()) {
    Message &message = peer.messages.front();
    if (!message.free_of_credit) {
      if (peer.send_credits <= (message.user ? own_send_credits : 0)) return;
      peer.send_credits--;
    }
    InFlight *record;
    ept_op &op = stage(peer, EPT_OP_SEND, &record);
    record->bytes = std::move(message.bytes);
    op.source = record->bytes->data();
    op.length = record->bytes->size();
    peer.messages.pop_front();
  }
}

void ept_engine::on_message(const ept_event &event) {
  if (event.peer >= world || event.peer == rank) return;
  Peer &peer = peers[event.peer];
  if (peer.status != EPT_PEER_CONNECTING && peer.status != EPT_PEER_UP) return; /* lost for what it said before */
  ept_message head;
  if (event.length < sizeof head) return;
  std::memcpy(&head, event.data, sizeof head);
  const auto *body = static_cast<const uint8_t *>(event.data) + sizeof head;
  const size_t length = event.length - sizeof head;
  if (head.version != EPT_WIRE_VERSION) return;
  if (!peer.opened || head.epoch != peer.epoch || event.epoch != peer.epoch) {
    stale++;
    return;
  }
  auto as = [&]<class T>(T &into) {
    if (length != sizeof into) return false;
    std::memcpy(&into, body, sizeof into);
    return true;
  };
  switch (head.type) {
    case EPT_MESSAGE_HELLO:
      on_hello(peer, body, length);
      return;
    case EPT_MESSAGE_GOODBYE:
      peer.goodbye = true;
      return;
    case EPT_MESSAGE_USER:
      if (peer.unread >= send_credits) { /* it has no such credits */
        lose(peer, EPT_PEER_LOST, EPT_E_LIMIT, 0, "it sent more messages than it was granted");
        return;
      }
      peer.unread++;
      if (head.tag & EPT_TAG_OURS) news++;
      inbox[head.tag].push_back({event.peer, peer.link, std::vector<uint8_t>(body, body + length)});
      if (moved_waiters) moved.notify_all();
      return;
    case EPT_MESSAGE_HEARTBEAT:
      if (ept_heartbeat in; as(in)) on_heartbeat(peer, in);
      return;
    default:
      break;
  }
  /* The engine's own: consumed at once. */
  peer.consumed_sends++;
  if (peer.consumed_sends >= EPT_SEND_QUANTUM) mark_dirty(peer);
  if (ept_descriptor in; head.type == EPT_MESSAGE_DESCRIPTOR && as(in)) on_descriptor(event.peer, in);
  if (ept_void in; head.type == EPT_MESSAGE_VOID && as(in)) on_void(event.peer, in);
  if (ept_quiesce_message in; head.type == EPT_MESSAGE_QUIESCE && as(in)) on_quiesce(peer, in);
  if (ept_quiesce_message in; head.type == EPT_MESSAGE_QUIESCED && as(in)) {
    if (auto found = quiescing.find(in.nonce); found != quiescing.end()) std::erase(found->second.asked, event.peer);
  }
}

extern "C" {

int32_t ept_engine_connect(ept_engine *engine, const void *const *addresses, const size_t *lengths, ept_error *error) {
  return guarded(error, "connect", [&]() -> int32_t {
    Hold hold(engine->lock);
    if (int32_t code = engine->usable("connect", error)) return code;
    if (engine->caps.group_only && !engine->joined) {
      return fail(error, EPT_E_INVALID, "connect", -1, "backend %s connects a whole group: run ept_engine_join first",
                  engine->plugin_name.c_str());
    }
    return engine->connect(addresses, lengths, error);
  });
}

int32_t ept_engine_wait_connected(ept_engine *engine, uint64_t timeout, ept_error *error) {
  return guarded(error, "wait_connected", [&]() -> int32_t {
    Hold hold(engine->lock);
    const Peer *failed = nullptr;
    Waiting about{"wait_connected", "until every peer is up"};
    int32_t code = engine->wait(
        hold, timeout,
        [&]() -> int32_t {
          bool all = true;
          for (const Peer &peer : engine->peers) {
            if (peer.ended()) {
              failed = &peer;
              return peer.why_code;
            }
            all = all && peer.status == EPT_PEER_UP;
          }
          return all ? EPT_OK : EPT_LATER;
        },
        error, &about);
    if (failed) {
      fail(error, code, "wait_connected", static_cast<int32_t>(failed->rank), "%s", engine->describe(*failed).c_str());
      if (error) error->provider_errno = failed->why_errno;
    } else if (code == EPT_E_TIMEOUT) {
      std::string who;
      int32_t first = -1;
      for (const Peer &peer : engine->peers) {
        if (peer.status == EPT_PEER_UP) continue;
        if (first < 0) first = static_cast<int32_t>(peer.rank);
        who += " " + std::to_string(peer.rank);
      }
      fail(error, code, "wait_connected", first, "rank %u: no connection in %.1f s with rank(s)%s", engine->rank,
           static_cast<double>(timeout == forever ? engine->timeout_ns : timeout) * 1e-9, who.c_str());
    }
    return code;
  });
}

int32_t ept_engine_peer(ept_engine *engine, uint32_t rank, ept_peer_info *info, ept_error *error) {
  Hold hold(engine->lock);
  if (rank >= engine->world) return fail(error, EPT_E_INVALID, "peer", -1, "rank %u of %u", rank, engine->world);
  const Peer &peer = engine->peers[rank];
  const uint32_t size = info->size;
  std::memset(info, 0, sizeof *info);
  info->size = size;
  info->rank = rank;
  info->status = peer.status;
  info->epoch = peer.epoch;
  info->credits = peer.credits;
  info->queued = static_cast<uint32_t>(peer.queue.size() + peer.messages.size());
  info->in_flight = peer.in_flight;
  info->silent_ns = now_ns() - peer.last_sign;
  info->why_code = peer.why_code;
  info->why_errno = peer.why_errno;
  std::snprintf(info->why, sizeof info->why, "%s", peer.why.c_str());
  info->membership = peer.status == EPT_PEER_MASKED ? peer.membership : 0;
  info->links_ended = peer.link;
  info->heartbeat_ns = peer.promised_ns;
  engine->memories.each([&](uint64_t, const Memory &memory) {
    if (std::any_of(memory.aside.begin(), memory.aside.end(), [&](const auto &life) { return life.rank == rank; })) {
      info->set_aside += memory.desc.length;
    }
  });
  return EPT_OK;
}

int32_t ept_engine_max_message(ept_engine *engine, size_t *bytes) {
  /* HELLO carries a blob of up to 4 KiB and is the longest of our own. */
  *bytes = engine->caps.max_send > sizeof(ept_message) ? engine->caps.max_send - sizeof(ept_message) : 0;
  return EPT_OK;
}

int32_t ept_engine_send(ept_engine *engine, uint32_t rank, uint64_t tag, const void *data, size_t length,
                        uint64_t timeout, ept_error *error) {
  return guarded(error, "send", [&]() -> int32_t {
    Hold hold(engine->lock);
    if (int32_t code = engine->usable_peer(rank, "send", error)) return code;
    const auto number = static_cast<int32_t>(rank);
    size_t most = 0;
    ept_engine_max_message(engine, &most);
    if (length > most) {
      return fail(error, EPT_E_LIMIT, "send", number, "a message of %zu bytes; backend %s carries %zu", length,
                  engine->plugin_name.c_str(), most);
    }
    Peer &peer = engine->peers[rank];
    const uint32_t link = peer.link;
    const Awaited awaited{rank};
    Waiting about{"send", "room for a message", &awaited, 1};
    int32_t code = engine->wait(
        hold, timeout,
        [&]() -> int32_t {
          if (peer.status != EPT_PEER_UP || peer.link != link) return EPT_E_PEER_LOST;
          return peer.messages.size() < message_queue ? EPT_OK : EPT_LATER;
        },
        error, &about);
    if (code == EPT_E_PEER_LOST) return fail(error, code, "send", number, "%s", peer.last_end.c_str());
    if (code == EPT_E_TIMEOUT) {
      return fail(error, code, "send", number, "rank %u holds %zu messages for rank %u, which reads none; %s",
                  engine->rank, peer.messages.size(), rank, engine->describe(peer).c_str());
    }
    if (code) return code;
    engine->post_message(peer, EPT_MESSAGE_USER, tag, data, length);
    engine->pump_dirty();
    return EPT_OK;
  });
}

int32_t ept_engine_recv(ept_engine *engine, uint32_t from, uint64_t tag, void *data, size_t *length, uint32_t *sender,
                        uint64_t timeout, ept_error *error) {
  return guarded(error, "recv", [&]() -> int32_t {
    Hold hold(engine->lock);
    if (int32_t code = engine->usable("recv", error)) return code;
    if (from != nobody && (from >= engine->world || from == engine->rank)) {
      return fail(error, EPT_E_INVALID, "recv", -1, "rank %u is no peer of rank %u in a world of %u", from,
                  engine->rank, engine->world);
    }
    Received taken{};
    size_t capacity = *length;
    const uint32_t link = from == nobody ? 0 : engine->peers[from].link;
    const Awaited awaited{from};
    char what[48];
    std::snprintf(what, sizeof what, "a message with tag %llx", static_cast<unsigned long long>(tag));
    Waiting about{"recv", what, &awaited, 1};
    const bool ours = tag & EPT_TAG_OURS; /* who asks for those tells what it waits for */
    int32_t code = engine->wait(
        hold, timeout,
        [&]() -> int32_t {
          if (auto found = engine->inbox.find(tag); found != engine->inbox.end()) {
            auto &queue = found->second;
            auto at = std::find_if(queue.begin(), queue.end(),
                                   [&](const Received &m) { return from == nobody || m.from == from; });
            if (at != queue.end()) {
              *length = at->data.size();
              if (sender) *sender = at->from;
              if (at->data.size() > capacity) return EPT_E_LIMIT;
              taken = std::move(*at);
              queue.erase(at);
              if (queue.empty()) engine->inbox.erase(found);
              return EPT_OK;
            }
          }
          if (engine->closed) return EPT_E_CLOSED;
          if (from != nobody) {
            const Peer &peer = engine->peers[from];
            if (peer.ended() || peer.link != link) return EPT_E_PEER_LOST;
          }
          return EPT_LATER;
        },
        error, ours ? nullptr : &about);
    const auto number = from == nobody ? -1 : static_cast<int32_t>(from);
    if (code == EPT_E_LIMIT) {
      return fail(error, code, "recv", number, "the message has %zu bytes and does not fit %zu", *length, capacity);
    }
    if (code == EPT_E_PEER_LOST || (code == EPT_E_TIMEOUT && from != nobody)) {
      const Peer &peer = engine->peers[from];
      fail(error, code, "recv", number, "rank %u waits for a message of rank %u with tag %llx; %s", engine->rank, from,
           static_cast<unsigned long long>(tag), (peer.link != link ? peer.last_end : engine->describe(peer)).c_str());
      if (error) error->silent_ns = now_ns() - engine->peers[from].last_sign;
      return code;
    }
    if (code == EPT_E_TIMEOUT || code == EPT_E_CLOSED) {
      return fail(error, code, "recv", -1, "rank %u waits for a message of any rank with tag %llx%s", engine->rank,
                  static_cast<unsigned long long>(tag), code == EPT_E_CLOSED ? "; the engine was closed" : "");
    }
    if (code) return code;
    if (!taken.data.empty()) std::memcpy(data, taken.data.data(), taken.data.size());
    Peer &peer = engine->peers[taken.from];
    if (taken.link != peer.link) return EPT_OK; /* of a link that has ended: nothing to give back */
    peer.unread--;
    if (++peer.consumed_sends >= EPT_SEND_QUANTUM && peer.status == EPT_PEER_UP) {
      engine->mark_dirty(peer);
      engine->pump_dirty();
    }
    return EPT_OK;
  });
}

}  // extern "C"
