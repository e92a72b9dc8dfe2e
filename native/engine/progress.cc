/* SPDX-License-Identifier: Apache-2.0
 * Progress: who drives, when it spins, when it sleeps. A wait's own turns are in wait.h. */
#include <poll.h>
#include <sched.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include <algorithm>

#include "engine/cores.h"
#include "engine/engine.h"
#include "engine/news.h"

using namespace ept;

namespace {

/* A poll takes at most so many events: 64 x 80 bytes stay in L1. */
constexpr size_t event_batch = 64;
/* How long a caller that has just driven may come back before the proxy takes over. Twice a poll's wake-up (50 us)
 * would do for a ping-pong; a MoE step's caller is away for as long as it packs a batch, some 200 us on one core. */
constexpr uint64_t proxy_grace_ns = 500'000;
/* The proxy looks again that soon while callers drive, and that late at most where they wait again and again. A look
 * costs them some 50 us, a timer, an interrupt and a preempted spinner on a virtual machine; 1,000 a second took a
 * twentieth to a tenth of the bandwidth of 1 MiB writes (docs/decisions.md). */
constexpr uint64_t proxy_look_ns = 1'000'000, proxy_late_ns = 4'000'000;
/* A waiting caller of a backend without a descriptor has nothing to be woken by: a nap there is over late, by some 50
 * us and the kernel's timer slack of as much. So it gives way to whoever else wants the core, and looks again, for
 * about as long as a MiB takes to be copied twice; only then it naps. */
constexpr uint64_t yield_ns = 500'000;
constexpr uint32_t look_spins = 8;
/* Gauges and the rails' counters are copied into the page that often at most: some 200 ns a peer and a rail, so a
 * thousandth of a core at 50 of them. */
constexpr uint64_t refresh_ns = 10'000'000;

void relax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#endif
}

}  // namespace

void ept_engine::wake_up(const Descriptor &fd) {
  uint64_t one = 1;
  /* EAGAIN: the counter is full, so the reader is awake already. */
  [[maybe_unused]] ssize_t wrote = write(fd.get(), &one, sizeof one);
}

/* ---- progress ---- */

void ept_engine::wake_sleepers() {
  if (caller_asleep) wake_up(*caller_wake);
  if (proxy_asleep) wake_up(*proxy_wake);
  caller_asleep = proxy_asleep = false;
}

int32_t ept_engine::step(ept_error *error, bool looks) {
  if (!worker) return fail(error, EPT_E_CLOSED, "poll", -1, "the engine of rank %u is closed", rank);
  wake_sleepers(); /* a poll undoes their arm */
  ept_event events[event_batch];
  int32_t count = plugin->poll(worker, events, event_batch);
  if (count < 0) return plugin_error(count, "poll", -1, error);
  if (!count && !looks) return 0;
  now = now_ns(); /* one clock call for the batch */
  if (count) step_ns = now;
  for (int32_t i = 0; i < count; i++) {
    const ept_event &event = events[i];
    switch (event.kind) {
      case EPT_EVENT_LOCAL_DONE:
        operation_ended(event.cookie, EPT_OK, 0, nullptr);
        break;
      case EPT_EVENT_IMM:
        set(metrics.page()->last_progress_ns, now); /* heartbeats are none */
        on_immediate(event);
        break;
      case EPT_EVENT_RECV:
        if (event.peer < world) add_alone(metrics.peer(event.peer).rx_sends, 1);
        on_message(event);
        break;
      case EPT_EVENT_PEER:
        on_peer(event);
        break;
      case EPT_EVENT_FENCED:
        on_fenced(event);
        break;
      case EPT_EVENT_QUIESCED:
        on_quiesced(event);
        break;
      case EPT_EVENT_ERROR:
        operation_ended(event.cookie, event.code, event.provider_errno, event.text);
        break;
      default:
        break;
    }
    if (event.peer < world && (event.kind == EPT_EVENT_IMM || event.kind == EPT_EVENT_RECV)) heard(peers[event.peer]);
  }
  if (count && now - refreshed_ns > refresh_ns) refresh_metrics(now);
  if (now >= next_tick) tick(count < static_cast<int32_t>(event_batch));
  if (!dirty.empty()) pump_dirty();
  if (!answers.empty()) answer_quiesces();
  return count;
}

/* One turn of the thread that drives: a step; if it brought nothing, spin on or sleep, until `until` at most. */
int32_t ept_engine::drive_once(Hold &hold, uint64_t &idle_since, uint64_t until, ept_error *error) {
  /* A turn of a spin that brings nothing is as short as can be: what comes in meanwhile waits for its end. So the clock
   * is read in each eighth one alone (18 ns of some 60, docs/decisions.md). */
  const bool looks = spins == 0;
  int32_t count = step(error, looks);
  const uint32_t turn = std::exchange(spins, 0);
  if (count < 0) return count;
  if (count > 0) {
    idle_since = 0;
    return count;
  }
  if (!looks && !lock.wanted()) {
    spins = (turn + 1) % look_spins;
    relax();
    return 0;
  }
  if (idle_since == 0) idle_since = now;
  bool spin = now - idle_since < spin_ns;
  if (spin && asks_bulk) {
    int64_t value = 0;
    if (plugin->query(instance, "bulk", &value) == EPT_OK && value) spin = false;
  }
  if (spin && !lock.wanted()) {
    spins = 1;
    relax(); /* with the lock: whoever comes for it says so, and gets it at the next turn */
    return 0;
  }
  const bool gives_way = !caps.wait_descriptor || (slept_short && !asks_bulk);
  if (spin || (driver == Driver::caller && gives_way && now - idle_since < yield_ns)) {
    hold.unlock();
    sched_yield();
    hold.lock();
    return 0;
  }
  if (now - refreshed_ns > refresh_ns) refresh_metrics(now);
  sleep(hold, until);
  return 0;
}

/* Sleeps on the plugin's descriptor and on `wake`, without the lock; at most a second, so that a waiting thread looks
 * at its deadline and its peers. */
void ept_engine::sleep(Hold &hold, uint64_t until) {
  if (rejoining || !worker) {
    /* Who rejoins waits for the lock, which a proxy that only came back from here would hold for ever. */
    hold.unlock();
    timespec nap{0, 50'000};
    nanosleep(&nap, nullptr);
    hold.lock();
    return;
  }
  int32_t fd = -1;
  int32_t code = plugin->arm(worker, &fd);
  if (code == EPT_LATER) {
    /* Nothing to sleep on yet; but a plugin that goes on saying so must not keep the lock from everyone else. */
    hold.unlock();
    sched_yield();
    hold.lock();
    return;
  }
  const uint64_t began = now = now_ns();
  until = std::min(until, next_tick);
  /* Operations that the plugin had no room for are offered again soon, whatever the descriptor says. */
  if (!dirty.empty()) until = std::min(until, now + 1'000'000);
  uint64_t left = until > now ? until - now : 0;
  if (code != EPT_OK || fd < 0) {
    /* This backend can't be slept on: look again every 50 us. */
    hold.unlock();
    timespec nap{0, static_cast<long>(std::min<uint64_t>(left, 50'000))};
    nanosleep(&nap, nullptr);
    hold.lock();
    return;
  }
  const bool is_proxy = driver == Driver::proxy;
  bool &asleep = is_proxy ? proxy_asleep : caller_asleep;
  const int wake_fd = (is_proxy ? proxy_wake : caller_wake)->get();
  asleep = true;
  sleepers++;
  hold.unlock();
  pollfd fds[2] = {{fd, POLLIN, 0}, {wake_fd, POLLIN, 0}};
  timespec limit{static_cast<time_t>(left / 1'000'000'000), static_cast<long>(left % 1'000'000'000)};
  ppoll(fds, 2, until == forever ? nullptr : &limit, nullptr);
  const bool brought = fds[0].revents != 0 && now_ns() - began < yield_ns;
  if (fds[1].revents) {
    uint64_t count;
    [[maybe_unused]] ssize_t got = read(wake_fd, &count, sizeof count);
  }
  hold.lock();
  sleepers--;
  asleep = false;
  slept_short = brought;
}

bool ept_engine::callers_drive() const {
  if (driver.load(std::memory_order_relaxed) == Driver::caller) return true;
  const uint64_t last = last_drive.load(std::memory_order_relaxed);
  if (progress_mode != EPT_PROGRESS_AUTO || !last) return false;
  const uint64_t time = now_ns(), post = last_post.load(std::memory_order_relaxed);
  if (time < last + proxy_grace_ns) return true;
  return time < post + proxy_grace_ns && time < last + proxy_late_ns;
}

/* The proxy's looks at whether callers still drive; false: one waits so long that the proxy may as well park, and be
 * told at the end of that wait. Where waits are short, being told would cost each of them a system call.
 *
 * Without the lock: a caller that drives holds it all the time, and would have to hand it over, and get it back, for
 * each look. So what is seen here is a hint, and is looked at again under the lock before anything is done about it. */
bool ept_engine::watch_callers(Hold &hold) {
  const int wake_fd = proxy_wake->get();
  bool woken = false, parks = false;
  uint64_t seen = last_drive, pause = proxy_look_ns;
  hold.unlock();
  while (!woken && !parks && callers_drive()) {
    pollfd fd{wake_fd, POLLIN, 0};
    timespec limit{0, static_cast<long>(pause)};
    ppoll(&fd, 1, &limit, nullptr);
    if (fd.revents) {
      uint64_t count;
      [[maybe_unused]] ssize_t got = read(wake_fd, &count, sizeof count);
      woken = true; /* by who wants it to stop */
    }
    const uint64_t last = last_drive.load(std::memory_order_relaxed);
    parks = last == seen && driver.load(std::memory_order_relaxed) == Driver::caller;
    if (last != seen) pause = std::min(2 * pause, proxy_late_ns);
    seen = last;
  }
  hold.lock();
  return !parks || woken || driver != Driver::caller;
}

void ept_engine::run_proxy() {
  const std::vector<int32_t> cpus =
      proxy_cpus.empty() ? cores_near(rails, cores_allowed(), "/sys/devices/system") : proxy_cpus;
  if (!cpus.empty()) {
    cpu_set_t set;
    CPU_ZERO(&set);
    for (int32_t cpu : cpus) CPU_SET(cpu, &set);
    if (sched_setaffinity(0, sizeof set, &set)) {
      say(EPT_LOG_WARNING,
          std::string("the proxy thread can't be pinned where proxy_cpus says: ") + std::strerror(errno));
    }
  }
  Hold hold(lock);
  uint64_t idle_since = 0;
  while (!stopping) {
    if (!worker) { /* a rejoin failed: nothing to move any more */
      proxy_turn.wait(hold);
      continue;
    }
    if (callers_drive()) {
      if (watch_callers(hold)) continue;
      proxy_parked = true;
      proxy_turn.wait(hold, [&] { return stopping || driver != Driver::caller; });
      proxy_parked = false;
      continue;
    }
    ept_error error{};
    error.size = sizeof error;
    driver = Driver::proxy;
    int32_t count;
    if (progress_mode == EPT_PROGRESS_AUTO) {
      /* Nobody waits, so nobody is in a hurry: sleep as soon as there is nothing to do. */
      count = step(&error);
      if (count == 0) {
        if (step_ns >= refreshed_ns) refresh_metrics(now_ns()); /* nobody may come for a long time */
        sleep(hold, forever);
      }
    } else {
      /* What is not in the page yet goes there soon, though nobody may come for a long time. */
      const bool stale = step_ns >= refreshed_ns;
      count = drive_once(hold, idle_since, stale ? now + 2 * refresh_ns : forever, &error);
    }
    if (driver == Driver::proxy) driver = Driver::none;
    if (count < 0) {
      say(EPT_LOG_ERROR, std::string("the proxy thread can't make progress: ") + error.text);
      proxy_turn.wait_for(hold, std::chrono::seconds(1));
    }
    if (count > 0) {
      if (moved_waiters) moved.notify_all();
      hold.unlock(); /* let callers in between two batches */
      hold.lock();
    }
  }
}

int32_t ept::drive(ept_engine *engine, bool looks, ept_error *error) {
  return guarded(error, "drive", [&]() -> int32_t {
    Hold hold(engine->lock);
    if (int32_t code = engine->usable("drive", error)) return code;
    if (engine->driver == Driver::caller) return 0; /* who waits drives already */
    const int32_t count = engine->step(error, looks);
    if (engine->progress_mode == EPT_PROGRESS_AUTO) engine->last_drive.store(engine->now, std::memory_order_relaxed);
    if (count > 0 && engine->moved_waiters) engine->moved.notify_all();
    return count;
  });
}

uint64_t ept::last_arrival(ept_engine *engine) { return get(engine->metrics.page()->last_progress_ns); }

extern "C" {

int32_t ept_engine_progress(ept_engine *engine, ept_error *error) {
  return guarded(error, "engine_progress", [&]() -> int32_t {
    Hold hold(engine->lock);
    if (int32_t code = engine->usable("engine_progress", error)) return code;
    int32_t count = engine->step(error);
    if (count > 0 && engine->moved_waiters) engine->moved.notify_all();
    return count;
  });
}

}  // extern "C"
