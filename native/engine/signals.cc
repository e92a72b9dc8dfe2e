/* SPDX-License-Identifier: Apache-2.0
 * The way in: immediates become counts (wire.h section 1 has the proof), and credits go back. */
#include <atomic>

#include "engine/engine.h"
#include "engine/news.h"
#include "engine/wait.h"

using namespace ept;

namespace {

struct SignalBlob {
  uint32_t magic;
  uint32_t version;
  uint32_t exporter, epoch;
  uint32_t source, source_epoch; /* the rank that may raise it, and in which life */
  uint32_t chan, reserved;
};
constexpr uint32_t signal_magic = 0x53545045; /* "EPTS" */

/* Chans of transfers, as opposed to chans of grants. */
bool counts(const Chan &chan) { return chan.kind == ChanKind::signal || chan.kind == ChanKind::plain; }

}  // namespace

uint32_t ept_engine::new_chan(ChanKind kind, uint32_t source, uint64_t signal) {
  uint32_t chan;
  if (free_chans.empty()) {
    if (chans.size() >= EPT_IMM_CHANS) return 0;
    chan = static_cast<uint32_t>(chans.size());
    chans.emplace_back();
  } else {
    chan = free_chans.back();
    free_chans.pop_back();
  }
  chans[chan].kind = kind;
  chans[chan].source = source;
  chans[chan].link = peers[source].link;
  chans[chan].signal = signal;
  chans[chan].prefix = 0;
  return chan;
}

/* A chan is given out again only when nothing that names it can come any more: its source's link is fenced. */
void ept_engine::free_chans_of(uint32_t source, uint32_t link) {
  for (uint32_t i = 1; i < chans.size(); i++) {
    if (chans[i].kind != ChanKind::free && chans[i].source == source && chans[i].link == link) {
      chans[i] = Chan{};
      free_chans.push_back(i);
    }
  }
}

/* Where the network says of whom it is, a peer raises its own chans and no other's. */
void ept_engine::on_immediate(const ept_event &event) {
  const uint32_t immediate = event.immediate;
  const uint32_t number = ept_imm_chan(immediate);
  const uint32_t code = ept_imm_code(immediate);
  if (number >= chans.size() || chans[number].kind == ChanKind::free || code == 0 ||
      (event.peer != nobody && chans[number].source != event.peer)) {
    unknown_chans++;
    return;
  }
  Chan &chan = chans[number];
  Peer &peer = peers[chan.source];
  if (chan.link != peer.link || (event.peer != nobody && event.epoch != peer.epoch)) {
    stale++;
    return;
  }
  if (event.peer == nobody) heard(peer); /* a network that doesn't say whose it is: its chan is one peer's alone */
  add_alone(metrics.peer(chan.source).rx_operations, 1);
  add_alone(metrics.peer(chan.source).rx_bytes, event.length);
  peer.consumed_total++;
  switch (chan.kind) {
    case ChanKind::credits:
      /* Never more than the window: it would only overrun its own, but a count may not wrap. */
      peer.credits = std::min(peer.credits + EPT_GRANT_QUANTUM, peer.most_credits);
      add_alone(metrics.peer(chan.source).credits_granted, EPT_GRANT_QUANTUM);
      mark_dirty(peer);
      return;
    case ChanKind::send_credits:
      peer.send_credits = std::min(peer.send_credits + EPT_SEND_QUANTUM, peer.most_send_credits);
      mark_dirty(peer);
      return;
    default:
      break;
  }
  const uint32_t seq = ept_imm_seq(immediate);
  if (code == 1 && seq == chan.prefix && !chan.window) {
    /* Whole, and in order: no window is needed. */
    chan.prefix = (chan.prefix + 1) % EPT_IMM_WINDOW;
    raise(chan);
    give_back(chan.source, 1);
    return;
  }
  piece(chan, seq, code, false, code == EPT_IMM_MANY ? 0 : code);
}

void ept_engine::on_descriptor(uint32_t source, const ept_descriptor &descriptor) {
  if (descriptor.chan >= chans.size() || !counts(chans[descriptor.chan]) || chans[descriptor.chan].source != source ||
      chans[descriptor.chan].link != peers[source].link || !descriptor.pieces || descriptor.pieces >= UINT32_MAX) {
    unknown_chans++;
    return;
  }
  peers[source].consumed_total++;
  piece(chans[descriptor.chan], descriptor.seq % EPT_IMM_WINDOW, EPT_IMM_MANY, false, descriptor.pieces + 1);
}

void ept_engine::on_void(uint32_t source, const ept_void &voided) {
  if (voided.chan >= chans.size() || !counts(chans[voided.chan]) || chans[voided.chan].source != source ||
      chans[voided.chan].link != peers[source].link || !voided.code || voided.code > EPT_IMM_MANY) {
    unknown_chans++;
    return;
  }
  peers[source].consumed_total++;
  piece(chans[voided.chan], voided.seq % EPT_IMM_WINDOW, voided.code, true,
        voided.code == EPT_IMM_MANY ? 0 : voided.code);
}

/* One piece of transfer `seq` came. `need`: how many it takes, 0 where this piece does not say. */
void ept_engine::piece(Chan &chan, uint32_t seq, uint32_t code, bool is_void, uint64_t need) {
  if (!chan.window) chan.window = std::make_unique<Chan::Window>();
  Chan::Window &window = *chan.window;
  if (code == 1) {
    finish(chan, seq, !is_void);
    return;
  }
  if (window.got[seq]++ == 0) window.held++;
  window.voided[seq] |= is_void;
  if (need) window.need[seq] = static_cast<uint32_t>(need);
  if (window.need[seq] && window.got[seq] >= window.need[seq]) {
    const bool whole = !window.voided[seq];
    window.got[seq] = window.need[seq] = 0; /* before the prefix may move */
    window.voided[seq] = false;
    window.held--;
    finish(chan, seq, whole);
  } else {
    give_back(chan.source, 1); /* all but the last; that one's credit is kept until the prefix passes */
  }
}

void ept_engine::finish(Chan &chan, uint32_t seq, bool whole) {
  if (whole) raise(chan);
  Chan::Window &window = *chan.window;
  if (!window.finished[seq]) window.held++;
  window.finished[seq] = true;
  uint32_t passed = 0;
  while (window.finished[chan.prefix]) {
    window.finished[chan.prefix] = false;
    chan.prefix = (chan.prefix + 1) % EPT_IMM_WINDOW;
    passed++;
  }
  window.held -= passed;
  if (passed) give_back(chan.source, passed);
  drop_window(chan);
}

/* The window of a chan that raises nothing any more, where it holds nothing. */
void ept_engine::drop_window(Chan &chan) {
  if (chan.kind == ChanKind::signal && chan.window && !chan.window->held && !signals.find(chan.signal)) {
    chan.window.reset();
  }
}

void ept_engine::give_back(uint32_t source, uint32_t count) {
  Peer &peer = peers[source];
  peer.consumed += count;
  if (peer.consumed >= EPT_GRANT_QUANTUM) mark_dirty(peer);
}

void ept_engine::raise(Chan &chan) {
  if (Signal *signal = signals.find(chan.signal)) raise_signal(*signal);
}

/* Release: who reads the count (acquire) reads every byte of the transfers that it counts, since the plugin's copy or
 * the kernel's came before the IMM event. One writer: the thread that holds the lock. */
void ept_engine::raise_signal(Signal &signal) {
  uint64_t value = std::atomic_ref<uint64_t>(*signal.word).fetch_add(1, std::memory_order_release) + 1;
  if (value >= signal.notify_at) {
    signal.notify_at = forever;
    notify_owner();
  }
}

int32_t ept::wait_signal_or_news(ept_engine *engine, ept_signal_id id, uint64_t target, uint64_t timeout,
                                 uint64_t *news, ept_error *error) {
  return guarded(error, "signal_wait", [&]() -> int32_t {
    Hold hold(engine->lock);
    Signal *signal = engine->signals.find(id);
    if (!signal) return fail(error, EPT_E_INVALID, "signal_wait", -1, "no such signal (destroyed already?)");
    const Peer &peer = engine->peers[signal->source];
    const uint64_t begin = now_ns();
    const uint32_t link = peer.link;
    uint64_t seen = 0;
    bool warned = false, told = false;
    const Awaited awaited{signal->source, signal->phase, id, target, 0};
    Waiting about{"signal_wait", signal->label.c_str(), &awaited, 1};
    signal->waiters++;
    int32_t code = engine->wait(
        hold, timeout,
        [&]() -> int32_t {
          seen = std::atomic_ref<uint64_t>(*signal->word).load(std::memory_order_acquire);
          if (seen >= target) return EPT_OK;
          if (engine->closed) return EPT_E_CLOSED;
          if (peer.ended() || peer.link != link) return EPT_E_PEER_LOST;
          if (news && *news != engine->news) {
            *news = engine->news;
            told = true;
            return EPT_E_TIMEOUT;
          }
          if (!warned && engine->now > begin + engine->warn_ns) { /* some step looks at the clock once a second */
            warned = true;
            char line[512];
            std::snprintf(line, sizeof line,
                          "rank %u has waited %.1f s for rank %u in '%s': count %llu expected, %llu seen, %s",
                          engine->rank, static_cast<double>(now_ns() - begin) * 1e-9, signal->source,
                          signal->label.c_str(), static_cast<unsigned long long>(target),
                          static_cast<unsigned long long>(seen), engine->describe(peer).c_str());
            engine->say(EPT_LOG_WARNING, line);
          }
          return EPT_LATER;
        },
        error, signal->phase == EPT_METRICS_TRANSFER ? &about : nullptr);
    signal->waiters--;
    if (told) return EPT_LATER;
    if (code != EPT_E_TIMEOUT && code != EPT_E_PEER_LOST && code != EPT_E_CLOSED) return code;
    const uint64_t silent = now_ns() - peer.last_sign;
    fail(error, code, "signal_wait", static_cast<int32_t>(signal->source),
         "rank %u waited %.3f s for rank %u in '%s': count %llu expected, %llu seen; %s", engine->rank,
         static_cast<double>(now_ns() - begin) * 1e-9, signal->source, signal->label.c_str(),
         static_cast<unsigned long long>(target), static_cast<unsigned long long>(seen),
         code == EPT_E_CLOSED ? "the engine was closed meanwhile"
         : peer.link != link  ? peer.last_end.c_str()
                              : engine->describe(peer).c_str());
    if (error) {
      error->expected = target;
      error->seen = seen;
      error->silent_ns = silent;
      error->provider_errno = peer.why_errno;
    }
    return code;
  });
}

extern "C" {

int32_t ept_signal_create(ept_engine *engine, uint32_t source, const char *label, const ept_memory *home,
                          ept_signal_id *id, ept_error *error) {
  return guarded(error, "signal_create", [&]() -> int32_t {
    Hold hold(engine->lock);
    if (int32_t code = engine->usable("signal_create", error)) return code;
    if (source >= engine->world) {
      return fail(error, EPT_E_INVALID, "signal_create", -1, "source %u is no rank of a world of %u", source,
                  engine->world);
    }
    if (engine->signals.used() >= engine->max_signals) {
      return fail(error, EPT_E_LIMIT, "signal_create", static_cast<int32_t>(source),
                  "%u signals exist, which is max_signals", engine->max_signals);
    }
    if (home) {
      if (home->kind != EPT_MEMORY_HOST && home->kind != EPT_MEMORY_PINNED && home->kind != EPT_MEMORY_SHM) {
        return fail(
            error, EPT_E_UNSUPPORTED, "signal_create", static_cast<int32_t>(source),
            "a signal's home must be memory that this CPU can read (kind %d is not); backend %s brings no other",
            home->kind, engine->plugin_name.c_str());
      }
      if (!home->address || home->length < 8 || reinterpret_cast<uintptr_t>(home->address) % 8) {
        return fail(error, EPT_E_INVALID, "signal_create", static_cast<int32_t>(source),
                    "a signal's home takes 8 bytes, 8-aligned: %p of %llu bytes is not", home->address,
                    static_cast<unsigned long long>(home->length));
      }
    }
    Signal &signal = *engine->signals.add(id);
    signal.source = source;
    signal.label = label ? label : "";
    if (home) {
      signal.word = static_cast<uint64_t *>(home->address);
    } else {
      signal.own = std::make_unique<uint64_t>(0);
      signal.word = signal.own.get();
    }
    return EPT_OK;
  });
}

int32_t ept_signal_destroy(ept_engine *engine, ept_signal_id id, ept_error *error) {
  return guarded(error, "signal_destroy", [&]() -> int32_t {
    Hold hold(engine->lock);
    Signal *signal = engine->signals.find(id);
    if (!signal) return fail(error, EPT_E_INVALID, "signal_destroy", -1, "no such signal (destroyed already?)");
    if (signal->waiters) {
      return fail(error, EPT_E_INVALID, "signal_destroy", static_cast<int32_t>(signal->source),
                  "%u threads wait for signal '%s'", signal->waiters, signal->label.c_str());
    }
    /* Its chan goes on counting, and giving credits back, for a source that does not know yet. */
    const uint32_t chan = signal->chan;
    engine->signals.remove(id);
    if (chan) engine->drop_window(engine->chans[chan]);
    return EPT_OK;
  });
}

int32_t ept_signal_export(ept_engine *engine, ept_signal_id id, void *blob, size_t *length, ept_error *error) {
  return guarded(error, "signal_export", [&]() -> int32_t {
    Hold hold(engine->lock);
    Signal *signal = engine->signals.find(id);
    if (!signal) return fail(error, EPT_E_INVALID, "signal_export", -1, "no such signal (destroyed already?)");
    if (int32_t code = engine->usable_peer(signal->source, "signal_export", error)) return code;
    const size_t capacity = *length;
    *length = sizeof(SignalBlob);
    if (!blob || capacity < sizeof(SignalBlob)) {
      return fail(error, EPT_E_INVALID, "signal_export", -1, "a blob of %zu bytes does not fit %zu", sizeof(SignalBlob),
                  capacity);
    }
    if (!signal->chan) {
      signal->chan = engine->new_chan(ChanKind::signal, signal->source, id);
      if (!signal->chan) {
        return fail(error, EPT_E_LIMIT, "signal_export", static_cast<int32_t>(signal->source),
                    "all %u chans that an immediate can name are given out", EPT_IMM_CHANS - 1);
      }
    }
    SignalBlob out{signal_magic,   EPT_WIRE_VERSION,
                   engine->rank,   engine->epoch,
                   signal->source, engine->peers[signal->source].epoch,
                   signal->chan,   0};
    std::memcpy(blob, &out, sizeof out);
    return EPT_OK;
  });
}

int32_t ept_signal_import(ept_engine *engine, uint32_t rank, const void *blob, size_t length, ept_remote_signal_id *id,
                          ept_error *error) {
  return guarded(error, "signal_import", [&]() -> int32_t {
    Hold hold(engine->lock);
    if (int32_t code = engine->usable_peer(rank, "signal_import", error)) return code;
    const auto peer = static_cast<int32_t>(rank);
    SignalBlob in;
    if (length != sizeof in) {
      return fail(error, EPT_E_INVALID, "signal_import", peer, "a signal blob has %zu bytes, not %zu", sizeof in,
                  length);
    }
    std::memcpy(&in, blob, sizeof in);
    if (in.magic != signal_magic) return fail(error, EPT_E_INVALID, "signal_import", peer, "this is no signal blob");
    if (in.version != EPT_WIRE_VERSION) {
      return fail(error, EPT_E_VERSION, "signal_import", peer, "the blob speaks wire version %u, this engine %d",
                  in.version, EPT_WIRE_VERSION);
    }
    if (in.exporter != rank || in.source != engine->rank) {
      return fail(error, EPT_E_INVALID, "signal_import", peer,
                  "this signal of rank %u is raised by rank %u; it was imported by rank %u from rank %u", in.exporter,
                  in.source, engine->rank, rank);
    }
    if (in.epoch != engine->peers[rank].epoch || in.source_epoch != engine->epoch) {
      return fail(error, EPT_E_PEER_LOST, "signal_import", peer,
                  "this signal was exported by epoch %u of rank %u for epoch %u of rank %u, and the link is between "
                  "epochs %u and %u: it is stale, ask for a new one",
                  in.epoch, rank, in.source_epoch, engine->rank, engine->peers[rank].epoch, engine->epoch);
    }
    RemoteSignal &signal = *engine->remote_signals.add(id);
    signal.peer = rank;
    signal.link = engine->peers[rank].link;
    signal.chan = in.chan;
    return EPT_OK;
  });
}

int32_t ept_signal_drop(ept_engine *engine, ept_remote_signal_id id, ept_error *error) {
  return guarded(error, "signal_drop", [&]() -> int32_t {
    Hold hold(engine->lock);
    const RemoteSignal *signal = engine->remote_signals.find(id);
    if (!signal) return fail(error, EPT_E_INVALID, "signal_drop", -1, "no such signal (dropped already?)");
    if (signal->pending) {
      return fail(error, EPT_E_INVALID, "signal_drop", static_cast<int32_t>(signal->peer),
                  "%u operations that raise this signal are under way; wait for them first", signal->pending);
    }
    engine->remote_signals.remove(id);
    return EPT_OK;
  });
}

int32_t ept_signal_value(ept_engine *engine, ept_signal_id id, uint64_t *value, ept_error *error) {
  Hold hold(engine->lock);
  Signal *signal = engine->signals.find(id);
  if (!signal) return fail(error, EPT_E_INVALID, "signal_value", -1, "no such signal (destroyed already?)");
  *value = std::atomic_ref<uint64_t>(*signal->word).load(std::memory_order_acquire);
  return EPT_OK;
}

int32_t ept_signal_raise(ept_engine *engine, ept_signal_id id, ept_error *error) {
  Hold hold(engine->lock);
  Signal *signal = engine->signals.find(id);
  if (!signal) return fail(error, EPT_E_INVALID, "signal_raise", -1, "no such signal (destroyed already?)");
  if (signal->source != engine->rank) {
    return fail(error, EPT_E_INVALID, "signal_raise", static_cast<int32_t>(signal->source),
                "signal '%s' is raised by rank %u alone (one class of writer)", signal->label.c_str(), signal->source);
  }
  engine->raise_signal(*signal);
  if (engine->moved_waiters) engine->moved.notify_all();
  return EPT_OK;
}

int32_t ept_signal_wait(ept_engine *engine, ept_signal_id id, uint64_t target, uint64_t timeout, ept_error *error) {
  return wait_signal_or_news(engine, id, target, timeout, nullptr, error);
}

int32_t ept_signal_notify(ept_engine *engine, ept_signal_id id, uint64_t target, ept_error *error) {
  Hold hold(engine->lock);
  Signal *signal = engine->signals.find(id);
  if (!signal) return fail(error, EPT_E_INVALID, "signal_notify", -1, "no such signal (destroyed already?)");
  signal->notify_at = std::min(signal->notify_at, target);
  if (std::atomic_ref<uint64_t>(*signal->word).load(std::memory_order_acquire) >= target) {
    signal->notify_at = forever;
    engine->notify_owner();
  }
  return EPT_OK;
}

}  // extern "C"
