/* SPDX-License-Identifier: Apache-2.0
 * Life of an engine, and what it says of itself. */
#include "engine/engine.h"

#include <sched.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include <algorithm>

#include "engine/wait.h"

using namespace ept;

namespace {

/* Polling longer than a wake-up costs (some 5 to 50 us on the machines measured) cannot win. */
constexpr uint64_t default_spin_ns = 50'000;
/* Over two and four rails of tcp, cut writes of up to 768 KiB take as long as whole ones or longer, those of 1 MiB and
 * more 0.6 to 0.9 of their time; over shm none gains (docs/decisions.md). Cards with wires of their own may differ. */
constexpr uint64_t default_stripe_bytes = 896 << 10;
/* SENDs that a peer may have in flight to us: set-up sends a handful at a time, a paged write one. */
constexpr uint32_t default_send_credits = 64;
/* And those that take no credit: HELLO, GOODBYE, heartbeats. */
constexpr uint32_t free_messages = 2 + EPT_FREE_HEARTBEATS;
/* So many heartbeats fit into the time after which silence is death: one that is late, or two, is no death yet. */
constexpr uint64_t heartbeats_in_dead = 5;

uint32_t cores() {
  cpu_set_t set;
  CPU_ZERO(&set);
  if (sched_getaffinity(0, sizeof set, &set)) return 1;
  return static_cast<uint32_t>(CPU_COUNT(&set));
}

/* Immediates that one peer may have in flight to us. All peers together, their grants included, fit the shortest
 * completion queue, since all of them may come in by one rail. */
int32_t choose_credits(uint32_t asked, uint32_t world, const std::vector<ept_rail> &rails, uint32_t &credits,
                       ept_error *error) {
  uint32_t shortest = UINT32_MAX;
  for (const ept_rail &rail : rails) shortest = std::min(shortest, rail.cq_depth);
  uint32_t peers = std::max(1u, world - 1);
  uint32_t fits = static_cast<uint32_t>(uint64_t{shortest} / peers * EPT_GRANT_QUANTUM / (EPT_GRANT_QUANTUM + 2));
  credits = std::min(asked ? asked : EPT_IMM_WINDOW, EPT_IMM_WINDOW);
  if (credits > fits) {
    if (asked) {
      return fail(error, EPT_E_LIMIT, "engine_create", -1,
                  "%u credits for each of %u peers do not fit a completion queue of %u entries; %u would", asked, peers,
                  shortest, fits);
    }
    credits = fits;
  }
  if (credits < 2 * EPT_GRANT_QUANTUM) {
    return fail(error, EPT_E_LIMIT, "engine_create", -1,
                "%u credits a peer are too few (%u at least): the completion queue has %u entries for %u peers",
                credits, 2 * EPT_GRANT_QUANTUM, shortest, peers);
  }
  return EPT_OK;
}

}  // namespace

Descriptor::~Descriptor() {
  if (fd_ >= 0) ::close(fd_);
}

int32_t ept_engine::plugin_error(int32_t code, const char *operation, int32_t peer, ept_error *error) {
  ept_error said{};
  said.size = sizeof said;
  plugin->last_error(&said);
  fail(error, code, operation, peer >= 0 ? peer : said.peer, "backend %s: %s", plugin_name.c_str(),
       said.text[0] ? said.text : ept_code_name(code));
  if (error) error->provider_errno = said.provider_errno;
  return code;
}

int32_t ept_engine::usable(const char *operation, ept_error *error) {
  return closed ? fail(error, EPT_E_CLOSED, operation, -1, "the engine of rank %u is closed", rank) : EPT_OK;
}

int32_t ept_engine::open(const ept_engine_config &config, ept_error *error) {
  plugin = config.plugin->table;
  plugin_name = plugin->name;
  job = config.job ? config.job : "";
  rank = config.rank, world = config.world, epoch = config.epoch;
  if (config.secret_length) secret.assign(config.secret, config.secret + config.secret_length);
  progress_mode = config.progress;
  timeout_ns = config.timeout_ns ? config.timeout_ns : 300'000'000'000;
  warn_ns = config.warn_ns ? config.warn_ns : 10'000'000'000;
  dead_ns = config.dead_ns ? config.dead_ns : 5'000'000'000;
  heartbeat_ns = config.heartbeat_ns ? config.heartbeat_ns : std::max<uint64_t>(dead_ns / heartbeats_in_dead, 1);
  stripe_bytes = config.stripe_bytes ? config.stripe_bytes : default_stripe_bytes;
  max_regions = config.max_regions ? config.max_regions : 65'536;
  max_signals = config.max_signals ? std::min(config.max_signals, EPT_IMM_CHANS - 1) : EPT_IMM_CHANS - 1;
  spin_ns = config.spin_ns != forever ? config.spin_ns : cores() > 1 ? default_spin_ns : 0;
  interrupted = config.interrupted, interrupted_context = config.interrupted_context;
  if (config.proxy_cpu_count) proxy_cpus.assign(config.proxy_cpus, config.proxy_cpus + config.proxy_cpu_count);
  send_credits = default_send_credits;
  asked_credits = config.credits;
  if (int32_t code = values.check(*config.plugin, config.values, config.value_count, error)) return code;

  if (int32_t code = open_plugin(error)) return code;
  caller_wake = std::make_unique<Descriptor>(eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC));
  proxy_wake = std::make_unique<Descriptor>(eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC));
  notify = std::make_unique<Descriptor>(eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC));
  if (caller_wake->get() < 0 || proxy_wake->get() < 0 || notify->get() < 0) {
    return fail(error, EPT_E_NOMEM, "open", -1,
                "the system gives no more file descriptors (eventfd: %s); raise ulimit -n", std::strerror(errno));
  }
  metrics.open({rank, world, epoch, job, plugin_name}, rails, "/dev/shm", host.log);
  chans.emplace_back();
  peers = std::vector<Peer>(world);
  for (uint32_t i = 0; i < world; i++) {
    Peer &peer = peers[i];
    peer.rank = i;
    peer.last_sign = now_ns();
  }
  peers[rank].status = EPT_PEER_UP;
  if (progress_mode != EPT_PROGRESS_INLINE) proxy = std::thread([this] { run_proxy(); });
  return EPT_OK;
}

/* The plugin's side of an engine: its instance, worker and anchor. Again for each life of the rank. */
int32_t ept_engine::open_plugin(ept_error *error) {
  ept_open_params params{};
  params.size = sizeof params;
  params.rank = rank, params.world = world, params.epoch = epoch;
  params.job = job.c_str();
  params.secret = secret.data(), params.secret_length = secret.size();
  params.values = values.view().data(), params.value_count = values.view().size();
  params.dead_ns = dead_ns;
  params.credits = asked_credits ? asked_credits : EPT_IMM_WINDOW;
  params.send_credits = send_credits + free_messages;
  if (int32_t code = plugin->open(host.table(), &params, &instance)) {
    instance = nullptr;
    return plugin_error(code, "open", -1, error);
  }
  int64_t value = 0;
  asks_bulk = plugin->query && plugin->query(instance, "bulk", &value) == EPT_OK;
  caps.size = sizeof caps;
  if (int32_t code = plugin->caps(instance, &caps)) return plugin_error(code, "caps", -1, error);
  if (caps.immediate_bits < 32 || !caps.max_send || !caps.max_message) {
    return fail(
        error, EPT_E_UNSUPPORTED, "open", -1,
        "backend %s offers %u bits of immediate, messages of %u bytes and writes of %llu bytes: an engine needs "
        "32 bits, and both",
        plugin_name.c_str(), caps.immediate_bits, caps.max_send, static_cast<unsigned long long>(caps.max_message));
  }
  uint32_t count = 0;
  rails.resize(64);
  for (ept_rail &rail : rails) rail.size = sizeof rail;
  if (int32_t code = plugin->rails(instance, rails.data(), 64, &count)) return plugin_error(code, "rails", -1, error);
  rails.resize(std::min(count, 64u));
  if (rails.empty()) return fail(error, EPT_E_UNAVAILABLE, "open", -1, "backend %s has no rail", plugin_name.c_str());
  if (int32_t code = choose_credits(asked_credits, world, rails, credits, error)) return code;
  if (int32_t code = plugin->worker_open(instance, &worker)) {
    worker = nullptr;
    return plugin_error(code, "worker_open", -1, error);
  }
  anchor.resize(64);
  ept_memory desc{sizeof desc,
                  EPT_MEMORY_HOST,
                  anchor.data(),
                  anchor.size(),
                  0,
                  -1,
                  0,
                  EPT_ROLE_DATA,
                  EPT_ACCESS_LOCAL | EPT_ACCESS_REMOTE_WRITE};
  if (int32_t code = plugin->mem_register(instance, &desc, &anchor_mem)) {
    anchor_mem = nullptr;
    return plugin_error(code, "mem_register", -1, error);
  }
  return EPT_OK;
}

/* After it the plugin has no thread and touches no memory. Handles of memory stay, without a registration. */
void ept_engine::close_plugin() {
  if (!instance) return;
  for (Peer &peer : peers) {
    if (peer.anchor) plugin->region_drop(peer.anchor);
    peer.anchor = nullptr;
  }
  for (EndedLink &link : ended_links) {
    if (link.anchor) plugin->region_drop(link.anchor);
  }
  ended_links.clear();
  regions.each([&](uint64_t, Region &region) {
    if (region.region) plugin->region_drop(region.region);
    region.region = nullptr;
  });
  for (Peer &peer : peers) {
    if (peer.opened) plugin->peer_close(instance, peer.rank);
    peer.opened = false;
  }
  auto deregister = [&](ept_mem *&mem) {
    if (mem && plugin->mem_deregister(mem) == EPT_OK) mem = nullptr;
  };
  auto deregister_all = [&] {
    memories.each([&](uint64_t, Memory &memory) { deregister(memory.mem); });
    deregister(anchor_mem);
  };
  deregister_all();
  if (worker) plugin->worker_close(worker);
  deregister_all(); /* what an operation of the worker read from until now */
  memories.each([&](uint64_t, Memory &memory) { memory.mem = nullptr; });
  plugin->close(instance);
  anchor_mem = nullptr, worker = nullptr, instance = nullptr;
}

ept_engine::~ept_engine() {
  if (proxy.joinable()) {
    {
      Hold hold(lock);
      stopping = true;
      proxy_turn.notify_all();
    }
    wake_up(*proxy_wake);
    proxy.join();
  }
  close_plugin();
}

/* ---- the C API ---- */

extern "C" {

int32_t ept_engine_create(const ept_engine_config *config, ept_engine **engine, ept_error *error) {
  return guarded(error, "engine_create", [&]() -> int32_t {
    *engine = nullptr;
    if (config->size < sizeof *config || !config->plugin) {
      return fail(error, EPT_E_INVALID, "engine_create", -1, "the config has %u bytes (%zu expected) or no plugin",
                  config->size, sizeof *config);
    }
    if (!config->world || config->rank >= config->world) {
      return fail(error, EPT_E_INVALID, "engine_create", -1, "rank %u of a world of %u", config->rank, config->world);
    }
    if (config->progress < EPT_PROGRESS_AUTO || config->progress > EPT_PROGRESS_INLINE) {
      return fail(error, EPT_E_INVALID, "engine_create", -1, "progress %d is not auto, thread or inline",
                  config->progress);
    }
    auto made = std::make_unique<ept_engine>();
    if (int32_t code = made->open(*config, error)) return code;
    *engine = made.release();
    return EPT_OK;
  });
}

int32_t ept_engine_close(ept_engine *engine, uint64_t timeout, ept_error *error) {
  if (!engine) return EPT_OK;
  int32_t code = guarded(error, "engine_close", [&]() -> int32_t {
    Hold hold(engine->lock);
    for (Peer &peer : engine->peers) {
      if (peer.rank != engine->rank && peer.status == EPT_PEER_UP) {
        engine->post_message(peer, EPT_MESSAGE_GOODBYE, 0, nullptr, 0);
      }
    }
    engine->pump_dirty();
    Waiting about{"engine_close", "until what is in flight has arrived"};
    int32_t waited = engine->wait(
        hold, timeout,
        [&]() -> int32_t {
          for (Peer &peer : engine->peers) {
            if (peer.status != EPT_PEER_UP || peer.rank == engine->rank) continue;
            if (peer.in_flight || !peer.queue.empty() || !peer.messages.empty()) return EPT_LATER;
          }
          return EPT_OK;
        },
        error, &about);
    if (waited == EPT_OK && engine->worker) {
      /* What is complete here may still be on its way (LOCAL_DONE says nothing of the target): see it there. */
      const uint64_t nonce = engine->next_nonce++;
      engine->quiescing[nonce].plugin_waiting = 1;
      if (engine->plugin->quiesce(engine->worker, nobody, EPT_SCOPE_REMOTE, nonce) == EPT_OK) {
        waited = engine->wait(
            hold, timeout, [&] { return engine->quiescing[nonce].plugin_waiting ? EPT_LATER : EPT_OK; }, error, &about);
      }
      engine->quiescing.erase(nonce);
    }
    engine->closed = true;
    engine->moved.notify_all();
    engine->notify_owner();
    if (waited == EPT_E_TIMEOUT) {
      std::string who;
      for (Peer &peer : engine->peers) {
        if (peer.in_flight || peer.status == EPT_PEER_UP) who += " " + std::to_string(peer.rank);
      }
      return fail(error, EPT_E_TIMEOUT, "engine_close", -1,
                  "rank %u closed while operations to rank(s)%s were still under way", engine->rank, who.c_str());
    }
    return waited;
  });
  delete engine;
  return code;
}

int32_t ept_engine_address(ept_engine *engine, void *blob, size_t *length, ept_error *error) {
  return guarded(error, "engine_address", [&]() -> int32_t {
    Hold hold(engine->lock);
    std::vector<uint8_t> whole;
    if (int32_t code = engine->address(whole, error)) return code;
    size_t capacity = *length;
    *length = whole.size();
    if (!blob) return EPT_OK;
    if (capacity < whole.size()) {
      return fail(error, EPT_E_INVALID, "engine_address", -1, "an address of %zu bytes does not fit %zu", whole.size(),
                  capacity);
    }
    std::memcpy(blob, whole.data(), whole.size());
    return EPT_OK;
  });
}

int32_t ept_engine_join(ept_engine *engine, const void *const *blobs, const size_t *lengths, void *out,
                        size_t out_capacity, size_t *out_length, ept_error *error) {
  return guarded(error, "engine_join", [&]() -> int32_t {
    Hold hold(engine->lock);
    *out_length = 0;
    if (!engine->plugin->join || engine->joined) return EPT_OK;
    ept_join join{};
    join.size = sizeof join;
    join.round = engine->join_round;
    join.blobs = blobs, join.lengths = lengths;
    join.out = out, join.out_capacity = out_capacity;
    int32_t code = engine->plugin->join(engine->instance, &join);
    const uint64_t begin = now_ns();
    while (code == EPT_LATER && now_ns() - begin < engine->timeout_ns) {
      hold.unlock();
      timespec nap{0, 100'000};
      nanosleep(&nap, nullptr);
      hold.lock();
      code = engine->plugin->join(engine->instance, &join);
    }
    if (code == EPT_LATER) {
      return fail(error, EPT_E_TIMEOUT, "join", -1,
                  "rank %u: round %u of the collective join of backend %s did not end", engine->rank, join.round,
                  engine->plugin_name.c_str());
    }
    if (code) return engine->plugin_error(code, "join", -1, error);
    engine->join_round++;
    *out_length = join.out_length;
    engine->joined = join.done;
    return join.done ? EPT_OK : EPT_LATER;
  });
}

int32_t ept_engine_info_get(ept_engine *engine, ept_engine_info *info, ept_error *error) {
  return guarded(error, "engine_info", [&]() -> int32_t {
    Hold hold(engine->lock);
    uint32_t size = info->size;
    std::memset(info, 0, sizeof *info);
    info->size = size;
    info->rails = static_cast<uint32_t>(engine->rails.size());
    info->caps = engine->caps;
    info->credits = engine->credits;
    info->proxy_threads = engine->progress_mode == EPT_PROGRESS_INLINE ? 0 : 1;
    info->spin_ns = engine->spin_ns;
    info->registered_bytes = engine->registered_bytes;
    info->regions = engine->exported_regions;
    info->signals = engine->signals.used();
    info->unknown_chans = engine->unknown_chans;
    info->timeout_ns = engine->timeout_ns;
    info->dead_ns = engine->dead_ns;
    info->heartbeat_ns = engine->heartbeat_ns;
    info->membership = engine->membership;
    info->stale = engine->stale;
    info->rank = engine->rank;
    info->world = engine->world;
    info->epoch = engine->epoch;
    return EPT_OK;
  });
}

int32_t ept_engine_rail(ept_engine *engine, uint32_t index, ept_rail *rail, ept_rail_counters *counters,
                        ept_error *error) {
  return guarded(error, "engine_rail", [&]() -> int32_t {
    Hold hold(engine->lock);
    if (index >= engine->rails.size()) {
      return fail(error, EPT_E_INVALID, "engine_rail", -1, "rail %u of %zu", index, engine->rails.size());
    }
    if (rail) *rail = engine->rails[index];
    if (counters) {
      counters->size = sizeof *counters;
      if (int32_t code = engine->plugin->counters(engine->worker, index, counters)) {
        return engine->plugin_error(code, "counters", -1, error);
      }
    }
    return EPT_OK;
  });
}

int32_t ept_engine_log(ept_engine *engine, int32_t *level, char *text, size_t capacity) {
  std::string line;
  if (!engine->host.log.next(*level, line)) return EPT_LATER;
  std::snprintf(text, capacity, "%s", line.c_str());
  return EPT_OK;
}

int32_t ept_engine_notify_fd(ept_engine *engine, int32_t *fd, ept_error *) {
  *fd = engine->notify->get();
  return EPT_OK;
}

int32_t ept_engine_notified(ept_engine *engine, ept_error *) {
  uint64_t count;
  return read(engine->notify->get(), &count, sizeof count) == sizeof count ? EPT_OK : EPT_LATER;
}

}  // extern "C"
