// SPDX-License-Identifier: Apache-2.0
// The hot half: post, poll, arm, quiesce. READINESS in instance.h says who is looked at when.
#include <sys/epoll.h>
#include <sys/timerfd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>

#include "instance.h"

using namespace tcp;

namespace {

constexpr size_t kServesAPoll = 8;  // streams
constexpr int kEpollBatch = 32;
constexpr uint32_t kClockEvery = 64;   // polls between two looks at the clock
constexpr uint32_t kColdAfter = 4096;  // fruitless polls of a hot stream
constexpr uint32_t kCrowdFor = 256;    // polls that ask epoll only, after more than kHot streams were active
constexpr uint32_t kAckPolls = 3;      // idle polls before an ACK of its own: what goes back by then carries it
constexpr uint64_t kTick = 10000000;   // on_time at least so often while the caller spins

Peer *peer_of(const Stream *stream) { return const_cast<Peer *>(static_cast<const Peer *>(stream->link())); }

}  // namespace

// ---- post -----------------------------------------------------------------------------------------------------------

int32_t ept_instance::post(const ept_op *ops, size_t count, size_t *posted) {
  int32_t code = EPT_OK;
  size_t done = 0;
  for (; done < count; ++done) {
    const ept_op &op = ops[done];
    Peer *peer = nullptr;
    code = check(op, &peer);
    if (code != EPT_OK) break;
    if (peer->self) {
      code = post_to_self(peer, op);
      if (code != EPT_OK) break;
      continue;
    }
    Stream *stream = peer->streams[op.rail % peer->agreed_streams].get();
    if (stream->full() || (op.kind == EPT_OP_SEND && stream->sends_full())) {
      stream->count_later();
      code = EPT_LATER;
      break;
    }
    try {
      stream->queue(op);
    } catch (const std::bad_alloc &) {
      code = fail(EPT_E_NOMEM, "post", op.peer, 0, "tcp: the machine refused %llu bytes for a SEND",
                  static_cast<unsigned long long>(op.length));
      break;
    }
    if (std::find(touched.begin(), touched.end(), stream) == touched.end()) touched.push_back(stream);
  }
  *posted = done;
  flush_touched();
  return code;
}

void ept_instance::flush_touched() {
  for (Stream *stream : touched) {
    stream->flush();
    if (stream->has_work()) make_ready(stream);
    note_bulk(stream);
    if (hot.size() < kHot && crowded == 0 && !stream->down()) heat(stream);  // an answer is likely
  }
  touched.clear();
}

// Everything that makes an operation refusable before it is queued.
int32_t ept_instance::check(const ept_op &op, Peer **result) {
  auto found = peers.find(op.peer);
  if (found == peers.end()) {
    bool closed = closed_epochs.count(op.peer) != 0;
    return fail(closed ? EPT_E_CLOSED : EPT_E_INVALID, "post", op.peer, 0,
                closed ? "tcp: rank %u was closed" : "tcp: rank %u is not open", op.peer);
  }
  Peer *peer = found->second.get();
  if (peer->state == Peer::State::kConnecting) return EPT_LATER;
  if (peer->state == Peer::State::kEnded)
    return fail(peer->code, "post", op.peer, peer->number_of_system, "tcp: %s", peer->text.c_str());
  if (op.rail >= settings.streams)
    return fail(EPT_E_INVALID, "post", op.peer, 0, "tcp: rail %u, there are %u", op.rail, settings.streams);
  if (op.flags != 0) return fail(EPT_E_INVALID, "post", op.peer, 0, "tcp: flags are %u, must be 0", op.flags);
  if (op.kind == EPT_OP_SEND) {
    if (op.length > peer->limits.max_send)
      return fail(EPT_E_INVALID, "post", op.peer, 0, "tcp: a SEND of %llu bytes is past max_send, %u",
                  static_cast<unsigned long long>(op.length), peer->limits.max_send);
    if (op.length > 0 && op.source == nullptr)
      return fail(EPT_E_INVALID, "post", op.peer, 0, "tcp: a SEND of %llu bytes from no address",
                  static_cast<unsigned long long>(op.length));
    *result = peer;
    return EPT_OK;
  }
  if (op.kind != EPT_OP_WRITE && op.kind != EPT_OP_SIGNAL)
    return fail(op.kind == EPT_OP_READ ? EPT_E_UNSUPPORTED : EPT_E_INVALID, "post", op.peer, 0,
                "tcp: operations of kind %d are not done here", op.kind);
  const ept_region *region = op.region;
  if (region == nullptr || region->rank != op.peer)
    return fail(EPT_E_INVALID, "post", op.peer, 0, "tcp: the region of an operation to rank %u is %s", op.peer,
                region == nullptr ? "missing" : "that of another rank");
  if (region->epoch != peer->epoch)
    return fail(EPT_E_CLOSED, "post", op.peer, 0, "tcp: the region is of epoch %u of rank %u, which is in epoch %u now",
                region->epoch, op.peer, peer->epoch);
  if (op.kind == EPT_OP_WRITE && op.length > 0) {
    if (op.length > peer->limits.max_message)
      return fail(EPT_E_INVALID, "post", op.peer, 0, "tcp: a WRITE of %llu bytes is past max_message, %u",
                  static_cast<unsigned long long>(op.length), peer->limits.max_message);
    const ept_mem *mem = op.source_mem;
    uint64_t from = reinterpret_cast<uint64_t>(op.source);
    uint64_t start = mem == nullptr ? 0 : reinterpret_cast<uint64_t>(mem->address);
    if (mem == nullptr || mem->owner != this || from < start || from - start > mem->length ||
        op.length > mem->length - (from - start))
      return fail(EPT_E_INVALID, "post", op.peer, 0,
                  "tcp: the source of a WRITE of %llu bytes is not inside source_mem",
                  static_cast<unsigned long long>(op.length));
  }
  *result = peer;
  return EPT_OK;
}

// This rank's own memory needs no socket, but the same checks.
int32_t ept_instance::post_to_self(Peer *peer, const ept_op &op) {
  ept_rail_counters &counts = counters[op.rail];
  if (events.waiting() >= 2 * settings.depth) {
    ++counts.later;
    return EPT_LATER;
  }
  auto add = [&](int32_t kind, std::string text = {}, std::vector<uint8_t> data = {}) {
    ept_event *event = events.add(kind, peer->rank, peer->epoch, std::move(text), std::move(data));
    event->rail = op.rail;
    event->length = op.length;
    return event;
  };
  auto add_done = [&] { add(EPT_EVENT_LOCAL_DONE)->cookie = op.cookie; };
  if (op.kind == EPT_OP_SEND) {
    ++counts.tx_sends;
    ++counts.rx_sends;
    const uint8_t *bytes = static_cast<const uint8_t *>(op.source);
    add(EPT_EVENT_RECV, {}, std::vector<uint8_t>(bytes, bytes + op.length));
    add_done();
    return EPT_OK;
  }
  uint64_t length = op.kind == EPT_OP_WRITE ? op.length : 0;
  ++counts.tx_operations;
  counts.tx_bytes += length;
  uint8_t *destination = nullptr;
  auto verdict = exports.check(op.region->slot, op.region->key, peer->rank, peer->epoch,
                               op.kind == EPT_OP_WRITE ? op.offset : 0, length, &destination);
  if (verdict != Exports::Verdict::kAllowed) {
    ++counts.errors;
    ept_event *refused =
        add(EPT_EVENT_ERROR,
            format("rank %u refused an operation of its own of %llu bytes at offset %llu: the key is unknown or "
                   "revoked, or the range leaves the region",
                   peer->rank, static_cast<unsigned long long>(length), static_cast<unsigned long long>(op.offset)));
    refused->cookie = op.cookie;
    refused->code = EPT_E_ACCESS;
    return EPT_OK;
  }
  if (length > 0) memmove(destination, op.source, length);
  ++counts.rx_operations;
  counts.rx_bytes += length;
  ept_event *arrived = add(EPT_EVENT_IMM);
  arrived->immediate = op.immediate;
  arrived->length = length;
  add_done();
  return EPT_OK;
}

// ---- poll -----------------------------------------------------------------------------------------------------------

int32_t ept_instance::poll(ept_event *shown, size_t capacity) {
  ++poll_number;
  if (!dead_sources.empty()) dead_sources.clear();
  events.begin(shown, capacity);

  if (!ended.empty()) give_ended();
  if (movers != nullptr) take_moved();
  if (!ready.empty()) serve_ready();
  const bool spun = events.count() == 0 && spin();
  if ((events.count() == 0 && !spun) || ++since_epoll >= kEpollEvery) {
    since_epoll = 0;
    if (crowded > 0) --crowded;
    int32_t code = ask_epoll();
    if (code != EPT_OK) return code;
    if (!ready.empty()) serve_ready();
  }
  if (!owing.empty() && events.count() == 0) pay_owing(false);
  if (++since_clock >= kClockEvery) {
    since_clock = 0;
    uint64_t time = now();
    if (time >= tick_due_ns) {
      on_time(time);
      uint64_t next = next_deadline(time);
      tick_due_ns = next != 0 && next < time + kTick ? next : time + kTick;
    }
  }
  if (!ended.empty()) give_ended();
  if (!quiesces.empty()) give_quiesced();
  return events.end();
}

void ept_instance::take_moved() {
  while (Job *job = movers->take_done()) {
    job->stream->job_done(job);
    make_ready(job->stream);  // of a peer that is up: who ends one takes the jobs back
  }
}

void ept_instance::serve_ready() {
  serving.swap(ready);
  size_t served = 0;
  for (Stream *stream : serving) {
    if (peer_of(stream)->state != Peer::State::kUp) continue;  // ended by one before it; forget() has cleared its flag
    if (served == kServesAPoll || events.full()) {
      ready.push_back(stream);
      continue;
    }
    ++served;
    stream->in_ready = false;
    serve(stream);
  }
  serving.clear();
}

void ept_instance::serve(Stream *stream) {
  stream->complete(&events);
  stream->flush();
  stream->receive(&events);
  after_receive(stream);
}

void ept_instance::after_receive(Stream *stream) {
  if (stream->completing()) stream->complete(&events);
  if (stream->ended() && !stream->down()) {
    // Acknowledgements may still wait for room in `events`; they are given before the peer's end is told.
    streams_may_have_ended(peer_of(stream));
    if (peer_of(stream)->state != Peer::State::kUp) return;
  }
  if (stream->owes()) make_owing(stream);
  if (stream->has_work()) make_ready(stream);
  note_bulk(stream);
}

void ept_instance::note_bulk(Stream *stream) {
  bool bulk = stream->bulk();
  if (bulk == stream->in_bulk_count) return;
  stream->in_bulk_count = bulk;
  bulk_streams.store(bulk_streams.load(std::memory_order_relaxed) + (bulk ? 1 : -1), std::memory_order_relaxed);
}

// Reads the hot streams without asking whether there is anything. False: there was none to read.
bool ept_instance::spin() {
  bool spun = false;
  for (size_t i = 0; i < hot.size() && !events.full(); ++i) {
    Stream *stream = hot[i];
    if (stream->in_ready || stream->bulk()) continue;
    spun = true;
    size_t before = events.count();
    stream->expect_input();
    stream->receive(&events);
    bool found = events.count() != before;
    after_receive(stream);
    if (i >= hot.size() || hot[i] != stream) return true;  // it ended
    stream->misses = found ? 0 : stream->misses + 1;
    if (stream->misses > kColdAfter) {
      hot.erase(hot.begin() + static_cast<ptrdiff_t>(i));
      return true;
    }
  }
  return spun;
}

int32_t ept_instance::ask_epoll() {
  epoll_event woken[kEpollBatch];
  int count = epoll_wait(epoll.get(), woken, kEpollBatch, 0);
  if (count < 0) {
    if (errno == EINTR) return EPT_OK;
    return fail(EPT_E_IO, "poll", -1, errno, "tcp: epoll_wait failed: %s", errno_text(errno).c_str());
  }
  for (int i = 0; i < count; ++i) {
    Source *source = static_cast<Source *>(woken[i].data.ptr);
    switch (source->kind) {
      case Source::Kind::kStream: {
        Stream *stream = static_cast<Stream *>(source);
        stream->on_epoll(woken[i].events);
        if (stream->down()) break;
        if (peer_of(stream)->state != Peer::State::kUp) break;
        if ((woken[i].events & EPOLLIN) != 0 && !heat(stream)) {
          crowded = kCrowdFor;
          hot.clear();
        }
        if (stream->has_work()) make_ready(stream);
        break;
      }
      case Source::Kind::kListener:
        on_listener(static_cast<Listener *>(source));
        break;
      case Source::Kind::kAccepted:
        on_accepted(static_cast<Accepted *>(source));
        break;
      case Source::Kind::kDial:
        on_dial(static_cast<Dial *>(source));
        break;
      case Source::Kind::kLingering:
        on_lingering(static_cast<Lingering *>(source));
        break;
      case Source::Kind::kMovers:
        take_moved();
        break;
      case Source::Kind::kTimer:
        timer_set_ns = 0;
        on_time(now());
        break;
    }
  }
  return EPT_OK;
}

// True: `stream` is hot. False: others are, and they are in use.
bool ept_instance::heat(Stream *stream) {
  if (crowded > 0) {
    if (std::find(hot.begin(), hot.end(), stream) == hot.end()) crowded = std::min(kCrowdFor, crowded + 2);
    return true;
  }
  for (Stream *other : hot) {
    if (other != stream) continue;
    stream->misses = 0;
    return true;
  }
  if (hot.size() < kHot) {
    stream->misses = 0;
    hot.push_back(stream);
    return true;
  }
  for (Stream *&other : hot) {
    if (other->misses <= 2 * kEpollEvery) continue;
    stream->misses = 0;
    other = stream;
    return true;
  }
  return false;
}

void ept_instance::make_ready(Stream *stream) {
  if (stream->in_ready) return;
  stream->in_ready = true;
  ready.push_back(stream);
}

void ept_instance::make_owing(Stream *stream) {
  if (stream->in_owing) return;
  stream->in_owing = true;
  stream->owing_polls = 0;
  owing.push_back(stream);
}

// Sends the ACKs that nothing else has carried: those that waited for long enough, or all.
void ept_instance::pay_owing(bool all) {
  for (size_t i = 0; i < owing.size();) {
    Stream *stream = owing[i];
    if (stream->owes() && !all && ++stream->owing_polls < kAckPolls) {
      ++i;
      continue;
    }
    stream->acknowledge();
    stream->in_owing = false;
    owing[i] = owing.back();
    owing.pop_back();
    if (stream->has_work()) make_ready(stream);
  }
}

void ept_instance::forget(Stream *stream) {
  auto remove = [&](std::vector<Stream *> &list) {
    list.erase(std::remove(list.begin(), list.end(), stream), list.end());
  };
  remove(ready);
  remove(owing);
  remove(hot);
  if (stream->in_bulk_count)
    bulk_streams.store(bulk_streams.load(std::memory_order_relaxed) - 1, std::memory_order_relaxed);
  stream->in_ready = stream->in_owing = stream->in_bulk_count = false;
}

// ---- arm ------------------------------------------------------------------------------------------------------------

int32_t ept_instance::arm(int32_t *descriptor) {
  *descriptor = epoll.get();
  if (!owing.empty()) pay_owing(true);
  if (events.waiting() == 0 && ended.empty() && ready.empty()) {
    // Takes what epoll has collected while streams were read without it, so that only news will wake the caller.
    int32_t code = ask_epoll();
    if (code != EPT_OK) return code;
  }
  if (events.waiting() > 0 || !ended.empty() || !ready.empty()) return EPT_LATER;
  uint64_t time = now();
  uint64_t next = next_deadline(time);
  if (next != timer_set_ns) {
    plugin::set_timer(timer, next, time);
    timer_set_ns = next;
  }
  return EPT_OK;
}

// ---- quiesce --------------------------------------------------------------------------------------------------------

int32_t ept_instance::quiesce(uint32_t rank, int32_t scope, uint64_t cookie) {
  if (scope != EPT_SCOPE_LOCAL && scope != EPT_SCOPE_REMOTE)
    return fail(EPT_E_INVALID, "quiesce", rank, 0, "tcp: scope %d is neither local nor remote", scope);
  Quiesce entry{cookie, rank, scope, {}};
  auto add = [&](const Peer &peer) {
    if (rank != UINT32_MAX && peer.rank != rank) return;
    for (const auto &stream : peer.streams)
      if (stream != nullptr && !stream->drained())
        entry.untils.push_back({peer.number, stream->rail(), stream->queued()});
  };
  for (const auto &peer : peers) add(*peer.second);
  for (const auto &peer : leaving) add(*peer);
  quiesces.push_back(std::move(entry));
  give_quiesced();  // perhaps at once: arm must know of the event
  return EPT_OK;
}

void ept_instance::give_quiesced() {
  auto find = [&](uint64_t number) -> const Peer * {
    for (const auto &peer : peers)
      if (peer.second->number == number) return peer.second.get();
    for (const auto &peer : leaving)
      if (peer->number == number) return peer.get();
    return nullptr;
  };
  for (size_t i = 0; i < quiesces.size();) {
    Quiesce &entry = quiesces[i];
    bool through = std::all_of(entry.untils.begin(), entry.untils.end(), [&](const Quiesce::Until &until) {
      const Peer *peer = find(until.peer);
      return peer == nullptr || peer->streams[until.stream]->completed() >= until.operations;
    });
    if (!through) {
      ++i;
      continue;
    }
    // What was acknowledged can't change the target any more. What was cut off may still be read over there.
    const Peer *unclear = nullptr;
    if (entry.scope == EPT_SCOPE_REMOTE)
      for (const auto &peer : peers)
        if ((entry.rank == UINT32_MAX || peer.first == entry.rank) && peer.second->unclear) unclear = peer.second.get();
    std::string text;
    if (unclear != nullptr)
      text = format(
          "rank %u ended with operations under way that may still land there; close it, and let it fence epoch %u of "
          "rank %u",
          unclear->rank, params.epoch, params.rank);
    ept_event *event =
        events.add(EPT_EVENT_QUIESCED, entry.rank, unclear != nullptr ? unclear->epoch : 0, std::move(text));
    event->cookie = entry.cookie;
    event->code = unclear != nullptr ? EPT_E_STUCK : EPT_OK;
    quiesces.erase(quiesces.begin() + static_cast<ptrdiff_t>(i));
  }
}
