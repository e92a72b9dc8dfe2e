/* SPDX-License-Identifier: Apache-2.0
 * The report: every wait, every peer's queues, every rail, and when the network last moved. */
#include "engine/why_stuck.h"

#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>

#include "engine/engine.h"

using namespace ept;

namespace {

/* Of the wait of this thread that ran into its deadline last. */
thread_local std::string expired_wait;

const char *phase_name(uint32_t phase) {
  static const char *const names[EPT_METRICS_PHASES] = {"dispatch", "combine", "late weights", "transfer"};
  return phase < EPT_METRICS_PHASES ? names[phase] : "?";
}

__attribute__((format(printf, 2, 3))) void line(std::string &to, const char *format, ...) {
  char text[1024];
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(text, sizeof text, format, arguments);
  va_end(arguments);
  to += text;
  to += '\n';
}

int32_t thread_number() {
  static thread_local const auto number = static_cast<int32_t>(syscall(SYS_gettid));
  return number;
}

double seconds(uint64_t since, uint64_t now) { return now > since ? static_cast<double>(now - since) * 1e-9 : 0; }
unsigned long long ull(uint64_t value) { return value; }

}  // namespace

void ept_engine::describe_wait(const Waiting &wait, uint64_t now, std::string &to) {
  line(to, "  %s%s%s, thread %d, for %.3f s", wait.operation, wait.what[0] ? ": " : "", wait.what, wait.thread,
       seconds(wait.since_ns, now));
  for (size_t i = 0; i < wait.count; i++) {
    const Awaited &one = wait.awaited[i];
    uint64_t seen = one.seen;
    if (Signal *signal = signals.find(one.signal)) {
      seen = std::atomic_ref<uint64_t>(*signal->word).load(std::memory_order_acquire);
    }
    const std::string how = one.peer < world ? describe(peers[one.peer]) : "any rank would do";
    const std::string who = one.peer < world ? "rank " + std::to_string(one.peer) : "any rank";
    line(to, "    for %s in %s: count %llu expected, %llu seen; %s", who.c_str(), phase_name(one.phase),
         ull(one.expected), ull(seen), how.c_str());
  }
}

std::string ept_engine::why_stuck(const std::string &first) {
  const uint64_t now = now_ns();
  std::string text;
  line(text, "why_stuck: rank %u of %u, job %s, backend %s, pid %d", rank, world, job.c_str(), plugin_name.c_str(),
       static_cast<int>(getpid()));
  if (!first.empty()) text += "the wait that expired:\n" + first;
  line(text, "pending waits: %zu", waiting.size());
  for (const Waiting *wait : waiting) describe_wait(*wait, now, text);
  line(text, "peers:");
  for (const Peer &peer : peers) {
    if (peer.rank == rank) continue;
    line(text,
         "  %s; epoch %u, %u credits, %zu writes queued (%llu operations), %zu messages queued, %zu operations staged, "
         "%llu in flight, %u messages of it unread",
         describe(peer).c_str(), peer.epoch, peer.credits, peer.queue.size(), ull(peer.queued), peer.messages.size(),
         peer.staged.size() - peer.staged_head, ull(peer.in_flight), peer.unread);
  }
  refresh_metrics(now);
  line(text, "rails:");
  for (uint32_t i = 0; i < rails.size() && i < metrics.page()->rails; i++) {
    ept_metrics_rail &rail = metrics.rail(i);
    line(text, "  %s: %llu bytes out, %llu in, %llu times no room, %llu errors, %llu reconnects", rail.name,
         ull(get(rail.tx_bytes)), ull(get(rail.rx_bytes)), ull(get(rail.later)), ull(get(rail.errors)),
         ull(get(rail.reconnects)));
  }
  const uint64_t last = get(metrics.page()->last_progress_ns);
  if (last) {
    line(text, "last progress: %.3f s ago", seconds(last, now));
  } else {
    line(text, "last progress: never");
  }
  return text;
}

void ept_engine::keep_expired(const Waiting &wait) {
  expired_wait.clear();
  describe_wait(wait, now_ns(), expired_wait);
  add_alone(metrics.page()->stuck_reports, 1);
}

void ept_engine::begin_wait(Waiting &wait, uint64_t now) {
  wait.since_ns = now;
  wait.thread = thread_number();
  waiting.push_back(&wait);
}

void ept_engine::end_wait(const Waiting &wait, int32_t code, uint64_t now) {
  std::erase(waiting, &wait);
  for (size_t i = 0; i < wait.count; i++) {
    const Awaited &one = wait.awaited[i];
    if (one.peer < world) record_alone(metrics.phase(one.peer, one.phase).waits, now - wait.since_ns);
  }
  if (code == EPT_E_TIMEOUT) keep_expired(wait);
}

namespace ept {

void Published::say(const char *operation, std::string what, std::vector<Awaited> awaited, uint64_t since_ns) {
  Hold hold(engine_->lock);
  mark(false);
  what_ = std::move(what);
  awaited_ = std::move(awaited);
  waiting_ = {operation, what_.c_str(), awaited_.data(), awaited_.size(), since_ns, thread_number()};
  mark(true);
  if (!standing_) engine_->waiting.push_back(&waiting_);
  standing_ = true;
}

void Published::take_back() {
  if (!standing_) return;
  Hold hold(engine_->lock);
  mark(false);
  std::erase(engine_->waiting, &waiting_);
  standing_ = false;
}

void Published::expired() {
  if (!standing_) return;
  Hold hold(engine_->lock);
  engine_->keep_expired(waiting_);
}

/* The same in the page, for who looks on. */
void Published::mark(bool now) {
  for (const Awaited &one : awaited_) {
    if (one.peer >= engine_->world) continue;
    ept_metrics_phase &phase = engine_->metrics.phase(one.peer, one.phase);
    set(phase.waiting_expected, now ? one.expected : 0);
    set(phase.waiting_seen, now ? one.seen : 0);
    set(phase.waiting_since_ns, now ? waiting_.since_ns : 0);
  }
}

}  // namespace ept

extern "C" {

int32_t ept_engine_why_stuck(ept_engine *engine, int32_t expired, char *text, size_t *length, ept_error *error) {
  return guarded(error, "why_stuck", [&]() -> int32_t {
    if (expired && expired_wait.empty()) return EPT_LATER;
    std::string report;
    {
      Hold hold(engine->lock);
      report = engine->why_stuck(expired ? expired_wait : std::string());
    }
    const size_t capacity = *length;
    *length = report.size() + 1;
    if (!text || capacity < *length) return EPT_E_LIMIT;
    if (expired) expired_wait.clear();
    std::memcpy(text, report.c_str(), *length);
    return EPT_OK;
  });
}

}  // extern "C"
