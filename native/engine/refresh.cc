/* SPDX-License-Identifier: Apache-2.0
 * What the page takes over from time to time rather than when it happens: gauges, and the rails' own counters. */
#include "engine/engine.h"

using namespace ept;

/* Under the lock. */
void ept_engine::refresh_metrics(uint64_t now) {
  ept_metrics_page *page = metrics.page();
  /* Another life of the rank may find more rails than the page was laid out for. */
  for (uint32_t i = 0; i < rails.size() && i < page->rails; i++) {
    ept_rail_counters counters{};
    counters.size = sizeof counters;
    if (!worker || plugin->counters(worker, i, &counters)) continue;
    ept_metrics_rail &rail = metrics.rail(i);
    set(rail.tx_bytes, counters.tx_bytes);
    set(rail.tx_operations, counters.tx_operations);
    set(rail.rx_bytes, counters.rx_bytes);
    set(rail.rx_operations, counters.rx_operations);
    set(rail.tx_sends, counters.tx_sends);
    set(rail.rx_sends, counters.rx_sends);
    set(rail.later, counters.later);
    set(rail.errors, counters.errors);
    set(rail.reconnects, counters.reconnects);
    set(rail.replayed, counters.replayed);
  }
  for (const Peer &peer : peers) {
    if (peer.rank == rank) continue;
    ept_metrics_peer &seen = metrics.peer(peer.rank);
    set(seen.status, static_cast<uint64_t>(peer.status));
    set(seen.epoch, peer.epoch);
    set(seen.credits, peer.credits);
    set(seen.queued, peer.queued + peer.messages.size());
    set(seen.in_flight, peer.in_flight);
    set(seen.last_sign_ns, peer.last_sign);
  }
  set(page->registered_bytes, registered_bytes);
  set(page->regions, exported_regions);
  set(page->signals, signals.used());
  set(page->credits, credits);
  set(page->unknown_chans, unknown_chans);
  set(page->updated_ns, now);
  refreshed_ns = now;
}

Metrics &ept::metrics_of(ept_engine *engine) { return engine->metrics; }
Spans *ept::spans_of(ept_engine *engine) { return engine->spans.get(); }

extern "C" {

int32_t ept_engine_metrics(ept_engine *engine, const ept_metrics_page **page, ept_error *error) {
  return guarded(error, "engine_metrics", [&]() -> int32_t {
    Hold hold(engine->lock);
    engine->refresh_metrics(now_ns());
    *page = engine->metrics.page();
    return EPT_OK;
  });
}

int32_t ept_signal_phase(ept_engine *engine, ept_signal_id id, uint32_t phase, ept_error *error) {
  return guarded(error, "signal_phase", [&]() -> int32_t {
    Hold hold(engine->lock);
    Signal *signal = engine->signals.find(id);
    if (!signal || phase >= EPT_METRICS_PHASES) {
      return fail(error, EPT_E_INVALID, "signal_phase", -1, "no such signal, or phase %u of %d", phase,
                  EPT_METRICS_PHASES);
    }
    signal->phase = phase;
    return EPT_OK;
  });
}

int32_t ept_engine_trace(ept_engine *engine, size_t capacity, ept_error *error) {
  return guarded(error, "engine_trace", [&]() -> int32_t {
    Hold hold(engine->lock);
    if (engine->spans) return fail(error, EPT_E_INVALID, "engine_trace", -1, "a trace is being taken already");
    engine->spans = std::make_unique<Spans>(capacity);
    return EPT_OK;
  });
}

int32_t ept_engine_spans(ept_engine *engine, ept_span *spans, size_t *count, uint64_t *lost, ept_error *error) {
  return guarded(error, "engine_spans", [&]() -> int32_t {
    if (!engine->spans) return fail(error, EPT_E_INVALID, "engine_spans", -1, "no trace is being taken");
    *count = engine->spans->take(spans, *count, *lost);
    return EPT_OK;
  });
}

uint32_t ept_metrics_sweep(void) { return sweep_pages("/dev/shm"); }

}  // extern "C"
