/* SPDX-License-Identifier: Apache-2.0
 * The way out: a write is checked, queued for its peer, cut into pieces, staged within credits, posted, and ended once.
 *
 * Invariant: for each peer, queue -> staged -> plugin keeps the order in which writes were taken, and a transfer's
 * number (seq) is given when it is taken. So transfers of a chan are posted in order, and the first unfinished one is
 * wholly posted before a later one begins, which is what wire.h's proof leans on. */
#include <algorithm>

#include "engine/engine.h"
#include "engine/wait.h"

using namespace ept;

namespace {

/* Writes that may wait in a peer's queue, and the operations that they come to (a paged write has thousands, of 24
 * bytes each): past either a caller is told LATER. Twice the window: room to run ahead. What is taken is taken whole,
 * so memory is bounded by these and the largest call. */
constexpr size_t queued_writes = 2 * EPT_IMM_WINDOW;
constexpr uint64_t queued_operations = 64 * EPT_IMM_WINDOW;
/* Operations handed to a plugin in one post: past 32, batching gains nothing (the plugin's lock is amortised). */
constexpr size_t post_batch = 64;
/* Below it a message takes the first rail: on a stream transport that is the one the other side polls hottest. */
constexpr uint64_t small_bytes = 16 << 10;
/* Failures of unwatched transfers kept for ept_engine_failure. */
constexpr size_t kept_failures = 1024;

uint64_t round_up(uint64_t value, uint64_t to) { return (value + to - 1) / to * to; }

}  // namespace

/* ---- taking ---- */

int32_t ept_engine::check_range(uint32_t peer, const Memory *memory, uint64_t source_offset, const Region *region,
                                uint64_t offset, uint64_t length, const char *operation, ept_error *error) {
  const auto number = static_cast<int32_t>(peer);
  auto ull = [](uint64_t v) { return static_cast<unsigned long long>(v); };
  if (!memory) {
    return fail(error, EPT_E_INVALID, operation, number, "the source is no registered memory (closed already?)");
  }
  if (!region || region->peer != peer) {
    return fail(error, EPT_E_INVALID, operation, number, "the destination is no region of rank %u%s", peer,
                region ? ": it is another rank's" : " (dropped already?)");
  }
  if (region->link != peers[peer].link) {
    return fail(error, EPT_E_PEER_LOST, operation, number,
                "the region was imported over a link to rank %u that has ended; import its new one", peer);
  }
  if (region->revoked) {
    return fail(error, EPT_E_ACCESS, operation, number, "rank %u has taken this region back", peer);
  }
  if (source_offset > memory->desc.length || length > memory->desc.length - source_offset) {
    return fail(error, EPT_E_INVALID, operation, number,
                "source [%llu, %llu + %llu) is not inside memory of %llu bytes", ull(source_offset), ull(source_offset),
                ull(length), ull(memory->desc.length));
  }
  if (!(memory->desc.access & EPT_ACCESS_LOCAL)) {
    return fail(error, EPT_E_ACCESS, operation, number,
                "the source memory was registered without the right to be a source");
  }
  /* The target checks too; here the answer comes at once and names the numbers. */
  if (offset > region->length || length > region->length - offset) {
    return fail(error, EPT_E_ACCESS, operation, number,
                "destination [%llu, %llu + %llu) is not inside the region of %llu bytes of rank %u", ull(offset),
                ull(offset), ull(length), ull(region->length), peer);
  }
  return EPT_OK;
}

int32_t ept_engine::admit(const ept_write &write, const char *operation, Uses &uses, ept_error *error) {
  if (int32_t code = usable_peer(write.peer, operation, error)) return code;
  if (write.length) {
    uses.memory = memories.find(write.source);
    uses.region = regions.find(write.destination);
    if (int32_t code = check_range(write.peer, uses.memory, write.source_offset, uses.region, write.destination_offset,
                                   write.length, operation, error)) {
      return code;
    }
  }
  if (write.signal) {
    uses.signal = remote_signals.find(write.signal);
    if (!uses.signal || uses.signal->peer != write.peer) {
      return fail(error, EPT_E_INVALID, operation, static_cast<int32_t>(write.peer), "the signal is none of rank %u%s",
                  write.peer, uses.signal ? ": it is another rank's" : " (dropped already?)");
    }
    if (uses.signal->link != peers[write.peer].link) {
      return fail(error, EPT_E_PEER_LOST, operation, static_cast<int32_t>(write.peer),
                  "the signal was imported over a link to rank %u that has ended; import its new one", write.peer);
    }
  }
  const Peer &peer = peers[write.peer];
  if (peer.queue.size() < queued_writes && peer.queued < queued_operations) return EPT_OK;
  add_alone(metrics.peer(write.peer).refused, 1);
  return EPT_LATER;
}

Transfer *ept_engine::new_transfer(uint32_t peer, ept_transfer_id *watched) {
  uint64_t id;
  Transfer *transfer = transfers.add(&id);
  transfer->id = id;
  transfer->peer = peer;
  transfer->watched = watched != nullptr;
  if (watched) *watched = id;
  return transfer;
}

void ept_engine::take(const ept_write &write, const Uses &uses) {
  Work work;
  work.uses = uses;
  work.length = work.piece_bytes = write.length;
  if (write.length) {
    work.source = static_cast<const uint8_t *>(uses.memory->desc.address) + write.source_offset;
    work.offset = write.destination_offset;
    if (write.length > stripe_bytes && rails.size() > 1) {
      const uint64_t ways = std::min<uint64_t>(rails.size(), EPT_IMM_MAX_PIECES);
      work.piece_bytes = round_up((write.length + ways - 1) / ways, 4096);
    }
    if (work.piece_bytes > caps.max_message) work.piece_bytes = caps.max_message;
    if (work.piece_bytes < write.length) work.pieces = (write.length + work.piece_bytes - 1) / work.piece_bytes;
  }
  take(work, peers[write.peer]);
}

/* A work's number is given here, in the order of the peer's queue; what needs no waiting never enters the queue. */
void ept_engine::take(Work &work, Peer &peer) {
  RemoteSignal *signal = work.uses.signal;
  work.chan = signal ? signal->chan : peer.plain_chan;
  work.seq = static_cast<uint32_t>((signal ? signal->next++ : peer.plain_next++) % EPT_IMM_WINDOW);
  work.code = work.pieces <= EPT_IMM_MAX_PIECES ? static_cast<uint32_t>(work.pieces) : EPT_IMM_MANY;
  const auto operations = static_cast<uint32_t>(work.pieces);
  if (signal) signal->pending += operations;
  if (work.uses.memory) work.uses.memory->in_flight += operations;
  if (work.uses.region) work.uses.region->in_flight += operations;
  work.uses.transfer->remaining += operations;
  mark_dirty(peer);
  if (operations == 1 && peer.queue.empty() && peer.credits && peer.staged.size() < post_batch) {
    stage_pieces(peer, work);
  } else {
    add_alone(metrics.peer(peer.rank).held, 1);
    peer.queued += operations;
    peer.queue.push_back(std::move(work));
  }
}

/* ---- staging and posting ---- */

void ept_engine::mark_dirty(Peer &peer) {
  if (peer.dirty) return;
  peer.dirty = true;
  dirty.push_back(peer.rank);
}

void ept_engine::pump_dirty() {
  /* A peer that is marked again while it is pumped (the plugin has no room) waits for the next turn. */
  turn.swap(dirty);
  for (uint32_t number : turn) {
    peers[number].dirty = false;
    pump(peers[number]);
  }
  turn.clear();
  if (!dirty.empty()) wake_sleepers(); /* who armed before it could know that something waits for room */
}

void ept_engine::pump(Peer &peer) {
  /* Looked at in each turn: a post that fails may lose the peer. */
  while (peer.linked && !peer.ended()) {
    if (peer.heard) stage_grants(peer);
    if (!peer.messages.empty()) stage_messages(peer);
    while (peer.heard && peer.credits && !peer.queue.empty() && peer.staged.size() - peer.staged_head < post_batch) {
      Work &work = peer.queue.front();
      if (work.code == EPT_IMM_MANY && !work.described && !stage_descriptor(peer, work)) break;
      const uint64_t before = work.next_piece;
      stage_pieces(peer, work);
      peer.queued -= work.next_piece - before;
      if (work.next_piece == work.pieces) peer.queue.pop_front();
    }
    if (peer.staged_head == peer.staged.size()) return;
    if (!post_staged(peer)) {
      mark_dirty(peer);
      return;
    }
  }
}

ept_op &ept_engine::stage(Peer &peer, int32_t kind, InFlight **record) {
  uint64_t cookie;
  *record = in_flight.add(&cookie);
  (*record)->peer = peer.rank;
  (*record)->link = peer.link;
  peer.in_flight++;
  peer.sent = true;
  ept_op &op = peer.staged.emplace_back();
  op.size = sizeof op;
  op.kind = kind;
  op.peer = peer.rank;
  op.cookie = cookie;
  return op;
}

/* Grants take no credit; the receive depth reserves room for them. */
void ept_engine::stage_grants(Peer &peer) {
  auto grant = [&](uint32_t &consumed, uint32_t quantum, uint32_t chan) {
    while (consumed >= quantum) {
      consumed -= quantum;
      InFlight *record;
      ept_op &op = stage(peer, EPT_OP_SIGNAL, &record);
      op.region = peer.anchor;
      op.immediate = ept_imm(1, 0, chan);
    }
  };
  grant(peer.consumed, EPT_GRANT_QUANTUM, peer.credit_chan);
  grant(peer.consumed_sends, EPT_SEND_QUANTUM, peer.send_credit_chan);
}

bool ept_engine::stage_descriptor(Peer &peer, Work &work) {
  if (!peer.send_credits) return false;
  peer.send_credits--;
  peer.credits--; /* it counts as a piece */
  ept_message head{EPT_WIRE_VERSION, EPT_MESSAGE_DESCRIPTOR, epoch, 0};
  ept_descriptor descriptor{work.chan, work.seq, work.pieces};
  auto bytes = std::make_unique<std::vector<uint8_t>>(sizeof head + sizeof descriptor);
  std::memcpy(bytes->data(), &head, sizeof head);
  std::memcpy(bytes->data() + sizeof head, &descriptor, sizeof descriptor);
  InFlight *record;
  ept_op &op = stage(peer, EPT_OP_SEND, &record);
  op.source = bytes->data();
  op.length = bytes->size();
  record->bytes = std::move(bytes);
  work.described = true;
  return true;
}

void ept_engine::stage_pieces(Peer &peer, Work &work) {
  const Uses &uses = work.uses;
  while (peer.credits && work.next_piece < work.pieces && peer.staged.size() - peer.staged_head < post_batch) {
    peer.credits--;
    const uint64_t i = work.next_piece++;
    InFlight *record;
    ept_op &op = stage(peer, EPT_OP_WRITE, &record);
    record->uses = uses;
    record->immediate = op.immediate = ept_imm(work.code, work.seq, work.chan);
    op.source_mem = uses.memory ? uses.memory->mem : nullptr;
    op.region = uses.region ? uses.region->region : peer.anchor;
    if (!work.ranges.empty()) {
      const Work::Range &range = work.ranges[i];
      op.source = work.source + range.source;
      op.offset = range.destination;
      op.length = range.length;
    } else if (work.length) {
      const uint64_t at = i * work.piece_bytes;
      op.source = work.source + at;
      op.offset = work.offset + at;
      op.length = std::min(work.piece_bytes, work.length - at);
    } else {
      op.kind = EPT_OP_SIGNAL;
    }
    if (op.length >= small_bytes || work.pieces > 1) {
      op.rail = peer.next_rail;
      if (++peer.next_rail == rails.size()) peer.next_rail = 0;
    }
  }
}

void ept_engine::count_posted(const Peer &peer, const ept_op *ops, size_t count) {
  if (!count) return;
  ept_metrics_peer &seen = metrics.peer(peer.rank);
  const uint64_t now = now_ns();
  last_post.store(now, std::memory_order_relaxed);
  uint64_t bytes = 0, sends = 0, credited = 0;
  for (size_t i = 0; i < count; i++) {
    InFlight *record = in_flight.find(ops[i].cookie);
    record->posted_ns = now;
    if (record->immediate) credited++;
    if (ops[i].kind == EPT_OP_SEND) {
      sends++;
    } else {
      bytes += ops[i].length;
    }
  }
  add_alone(seen.tx_bytes, bytes);
  add_alone(seen.tx_operations, count - sends);
  if (sends) add_alone(seen.tx_sends, sends);
  add_alone(seen.credits_spent, credited);
}

/* True: all staged operations were taken. */
bool ept_engine::post_staged(Peer &peer) {
  while (peer.staged_head < peer.staged.size()) {
    size_t posted = 0;
    const ept_op *ops = peer.staged.data() + peer.staged_head;
    if (peer.had_no_room) add_alone(metrics.peer(peer.rank).retries, 1);
    peer.had_no_room = false;
    int32_t code = plugin->post(worker, ops, peer.staged.size() - peer.staged_head, &posted);
    count_posted(peer, ops, posted);
    peer.staged_head += posted;
    if (code == EPT_LATER) {
      add_alone(metrics.peer(peer.rank).later, 1);
      peer.had_no_room = true;
      return false;
    }
    if (code < 0 && peer.staged_head < peer.staged.size()) {
      ept_error said{};
      said.size = sizeof said;
      plugin->last_error(&said);
      const uint64_t cookie = peer.staged[peer.staged_head++].cookie;
      operation_ended(cookie, code, said.provider_errno, said.text);
    }
  }
  peer.staged.clear();
  peer.staged_head = 0;
  return true;
}

/* ---- ending ---- */

void ept_engine::operation_ended(uint64_t cookie, int32_t code, int32_t provider_errno, const char *text) {
  InFlight *found = in_flight.find(cookie);
  if (!found) {
    if (code)
      say(EPT_LOG_ERROR, std::string("an error that no operation owns: ") + (text ? text : ept_code_name(code)));
    return;
  }
  Peer &peer = peers[found->peer];
  const uint32_t link = found->link;
  const Uses uses = found->uses;
  const uint32_t immediate = found->immediate;
  ept_metrics_peer &seen = metrics.peer(peer.rank);
  if (code == EPT_OK) {
    record_alone(seen.completions, step_ns > found->posted_ns ? step_ns - found->posted_ns : 0);
  } else {
    add_alone(seen.failed, 1);
  }
  const bool message = found->bytes != nullptr;
  in_flight.remove(cookie);
  if (link == peer.link) {
    peer.in_flight--;
  } else {
    for (size_t i = 0; i < ended_links.size(); i++) {
      if (ended_links[i].rank != peer.rank || ended_links[i].link != link) continue;
      ended_links[i].operations--;
      wind_up(i);
      break;
    }
  }
  if (code && link == peer.link && peer.status == EPT_PEER_UP) {
    if (immediate) {
      ept_void gone{ept_imm_chan(immediate), ept_imm_seq(immediate), ept_imm_code(immediate), 0};
      post_message(peer, EPT_MESSAGE_VOID, 0, &gone, sizeof gone);
    } else {
      /* A message or a grant that fails while the peer is up would leave both sides with another count of credits. */
      lose(peer, EPT_PEER_LOST, code, provider_errno,
           (std::string(message ? "a message" : "a grant") + " to it failed: " + (text ? text : ept_code_name(code)))
               .c_str());
    }
  }
  let_go(uses, 1, peer.rank, code, provider_errno, text);
}

/* `operations` of a transfer to `peer` have ended. */
void ept_engine::let_go(const Uses &uses, uint64_t operations, uint32_t peer, int32_t code, int32_t provider_errno,
                        const char *text) {
  const auto count = static_cast<uint32_t>(operations);
  if (uses.memory) uses.memory->in_flight -= count;
  if (uses.region) uses.region->in_flight -= count;
  if (uses.signal) uses.signal->pending -= count;
  if (uses.transfer) end_transfer(*uses.transfer, operations, peer, code, provider_errno, text);
}

void ept_engine::end_transfer(Transfer &transfer, uint64_t operations, uint32_t peer, int32_t code,
                              int32_t provider_errno, const char *text) {
  if (code && !transfer.failure) {
    transfer.failure =
        std::make_unique<Failure>(Failure{code, provider_errno, peer, text ? text : ept_code_name(code)});
  }
  transfer.remaining -= operations;
  if (transfer.remaining) return;
  if (transfer.notify) notify_owner();
  if (transfer.watched) return;
  if (transfer.failure) {
    const Failure &why = *transfer.failure;
    ept_error failure{};
    failure.size = sizeof failure;
    fail(&failure, why.code, "write", static_cast<int32_t>(why.peer), "a write of rank %u to rank %u failed: %s", rank,
         why.peer, why.text.c_str());
    failure.provider_errno = why.provider_errno;
    if (failures.size() == kept_failures) failures.pop_front();
    failures.push_back(failure);
  }
  transfers.remove(transfer.id);
}

/* What was taken for the peer and is not with the plugin yet ends here. What the plugin has ends with the plugin's own
 * word for it, or now (`at_once`); then only what it holds stays held until that word comes. */
void ept_engine::fail_peer_work(Peer &peer, const char *why, bool at_once) {
  std::vector<ept_op> staged(peer.staged.begin() + static_cast<ptrdiff_t>(peer.staged_head), peer.staged.end());
  peer.staged.clear();
  peer.staged_head = 0;
  for (const ept_op &op : staged) operation_ended(op.cookie, peer.why_code, peer.why_errno, why);
  std::deque<Work> queue;
  queue.swap(peer.queue);
  for (const Work &work : queue) {
    let_go(work.uses, work.pieces - work.next_piece, peer.rank, peer.why_code, peer.why_errno, why);
  }
  peer.queued = 0;
  peer.messages.clear();
  if (!at_once) return;
  in_flight.each([&](uint64_t, InFlight &operation) {
    if (operation.peer != peer.rank || operation.link != peer.link || !operation.uses.transfer) return;
    end_transfer(*operation.uses.transfer, 1, peer.rank, peer.why_code, peer.why_errno, why);
    operation.uses.transfer = nullptr;
  });
}

/* ---- the C API ---- */

extern "C" {

int32_t ept_engine_write(ept_engine *engine, const ept_write *write, ept_transfer_id *transfer, ept_error *error) {
  return guarded(error, "write", [&]() -> int32_t {
    Hold hold(engine->lock);
    Uses uses;
    if (int32_t code = engine->admit(*write, "write", uses, error)) return code;
    uses.transfer = engine->new_transfer(write->peer, transfer);
    engine->take(*write, uses);
    engine->pump_dirty();
    return EPT_OK;
  });
}

int32_t ept_engine_scatter(ept_engine *engine, const ept_write *writes, size_t count, ept_transfer_id *transfer,
                           ept_error *error) {
  return guarded(error, "write", [&]() -> int32_t {
    Hold hold(engine->lock);
    if (!count) return fail(error, EPT_E_INVALID, "scatter", -1, "no writes");
    engine->admitted.assign(count, Uses{});
    for (size_t i = 0; i < count; i++) {
      if (int32_t code = engine->admit(writes[i], "scatter", engine->admitted[i], error)) {
        return code;
      }
    }
    Transfer *made = engine->new_transfer(writes[0].peer, transfer);
    for (size_t i = 0; i < count; i++) {
      engine->admitted[i].transfer = made;
      engine->take(writes[i], engine->admitted[i]);
    }
    engine->pump_dirty();
    return EPT_OK;
  });
}

int32_t ept_engine_write_paged(ept_engine *engine, const ept_paged_write *write, ept_transfer_id *transfer,
                               ept_error *error) {
  return guarded(error, "write_paged", [&]() -> int32_t {
    Hold hold(engine->lock);
    ept_write whole{};
    whole.size = sizeof whole;
    whole.peer = write->peer;
    whole.signal = write->signal;
    Uses uses;
    if (int32_t code = engine->admit(whole, "write_paged", uses, error)) return code;
    uses.memory = engine->memories.find(write->source);
    uses.region = engine->regions.find(write->destination);
    if (write->pages && !write->page_bytes) {
      return fail(error, EPT_E_INVALID, "write_paged", static_cast<int32_t>(write->peer), "pages of 0 bytes");
    }
    const uint64_t source_stride = write->source_stride ? write->source_stride : write->page_bytes;
    const uint64_t destination_stride = write->destination_stride ? write->destination_stride : write->page_bytes;
    Work work;
    for (size_t i = 0; i < write->pages; i++) {
      uint64_t from, to, step;
      if (__builtin_mul_overflow(uint64_t{write->source_pages[i]}, source_stride, &step) ||
          __builtin_add_overflow(step, write->source_offset, &from) ||
          __builtin_mul_overflow(uint64_t{write->destination_pages[i]}, destination_stride, &step) ||
          __builtin_add_overflow(step, write->destination_offset, &to)) {
        return fail(error, EPT_E_INVALID, "write_paged", static_cast<int32_t>(write->peer),
                    "page %zu (source %u, destination %u) lies past 2^64", i, write->source_pages[i],
                    write->destination_pages[i]);
      }
      if (int32_t code = engine->check_range(write->peer, uses.memory, from, uses.region, to, write->page_bytes,
                                             "write_paged", error)) {
        return code;
      }
      /* Neighbours on both sides go as one operation. */
      if (!work.ranges.empty()) {
        Work::Range &last = work.ranges.back();
        if (last.source + last.length == from && last.destination + last.length == to &&
            last.length + write->page_bytes <= engine->caps.max_message) {
          last.length += write->page_bytes;
          continue;
        }
      }
      for (uint64_t at = 0; at < write->page_bytes; at += engine->caps.max_message) {
        work.ranges.push_back({from + at, to + at, std::min(write->page_bytes - at, engine->caps.max_message)});
      }
    }
    if (work.ranges.empty()) uses.memory = nullptr, uses.region = nullptr;
    uses.transfer = engine->new_transfer(write->peer, transfer);
    if (work.ranges.empty()) {
      engine->take(whole, uses);
    } else {
      work.uses = uses;
      work.source = static_cast<const uint8_t *>(uses.memory->desc.address);
      work.pieces = work.ranges.size();
      engine->take(work, engine->peers[write->peer]);
    }
    engine->pump_dirty();
    return EPT_OK;
  });
}

int32_t ept_transfer_wait(ept_engine *engine, ept_transfer_id id, uint64_t timeout, ept_error *error) {
  return guarded(error, "transfer_wait", [&]() -> int32_t {
    Hold hold(engine->lock);
    if (!engine->transfers.find(id)) {
      return fail(error, EPT_E_INVALID, "transfer_wait", -1, "no such transfer (its end was told already?)");
    }
    const uint64_t begin = now_ns();
    bool ended = false;
    const Awaited awaited{engine->transfers.find(id)->peer};
    Waiting about{"transfer_wait", "a write's local completion", &awaited, 1};
    int32_t code = engine->wait(
        hold, timeout,
        [&]() -> int32_t {
          const Transfer *transfer = engine->transfers.find(id);
          if (!transfer) return EPT_E_INVALID;
          ended = transfer->remaining == 0;
          if (!ended) return EPT_LATER;
          return transfer->failure ? transfer->failure->code : EPT_OK;
        },
        error, &about);
    Transfer *transfer = engine->transfers.find(id);
    if (!transfer) return fail(error, EPT_E_INVALID, "transfer_wait", -1, "another thread took this transfer's end");
    const auto number = static_cast<int32_t>(transfer->peer);
    if (!ended) {
      if (code != EPT_E_TIMEOUT) return code;
      const Peer &peer = engine->peers[transfer->peer];
      fail(error, code, "transfer_wait", number,
           "rank %u waited %.3f s for a write to rank %u: %llu operations are not complete, %zu writes wait for "
           "credits; %s",
           engine->rank, static_cast<double>(now_ns() - begin) * 1e-9, peer.rank,
           static_cast<unsigned long long>(transfer->remaining), peer.queue.size(), engine->describe(peer).c_str());
      if (error) error->silent_ns = now_ns() - peer.last_sign;
      return code;
    }
    if (transfer->failure) {
      const Failure &why = *transfer->failure;
      fail(error, code, "write", static_cast<int32_t>(why.peer), "a write of rank %u to rank %u failed: %s",
           engine->rank, why.peer, why.text.c_str());
      if (error) error->provider_errno = why.provider_errno;
    }
    engine->transfers.remove(id);
    return code;
  });
}

int32_t ept_transfer_notify(ept_engine *engine, ept_transfer_id id, ept_error *error) {
  Hold hold(engine->lock);
  Transfer *transfer = engine->transfers.find(id);
  if (!transfer)
    return fail(error, EPT_E_INVALID, "transfer_notify", -1, "no such transfer (its end was told already?)");
  transfer->notify = true;
  if (transfer->remaining == 0) engine->notify_owner();
  return EPT_OK;
}

int32_t ept_engine_failure(ept_engine *engine, ept_error *error) {
  Hold hold(engine->lock);
  if (engine->failures.empty()) return EPT_LATER;
  if (error) *error = engine->failures.front();
  engine->failures.pop_front();
  return EPT_OK;
}

}  // extern "C"
