// SPDX-License-Identifier: Apache-2.0
//
// broken: another plugin, broken on purpose in one way, to show that `eptransport conformance` sees it. It opens the
// plugin that the setting `under` names and passes every call on, but for what the setting `fault` changes. A fault
// holds for the whole process: a run tests one.
//
//   fault                 clause  what it does
//   last_byte_missing        1    a write leaves its last byte out
//   lost_in_a_crowd          2    among many operations under way, the payload of one is not sent
//   signal_before_data       3    the immediate goes first, the bytes follow
//   double_count             3    now and then an immediate is told twice
//   early_lost               4    of the immediates that came while nobody looked, only the first few are told
//   nothing_for_nothing      5    an operation without bytes is done, and never seen at the target
//   done_too_soon            6    LOCAL_DONE comes before the source was read
//   blocks_when_full         7    a full queue makes post wait
//   blocks_when_idle         8    poll waits for something to happen
//   error_swallowed          9    what was refused is told as done
//   lands_late              10    writes are done, quiet and revoked while they are still on their way
//   lands_after_fence       11    a fence is told as done and does nothing, and a revoked key goes on working
//   fences_nothing          11    a fence is told as done and does nothing
//   revokes_nothing         12    a revoked key goes on working
//   no_bounds               12    a region can be written past its end
//   regions_mixed_up        13    past a hundred of a memory to a rank, regions are those of earlier ones
//   crashes                        the first write ends the process
//   never_returns                  the first write is never taken, and never refused
#include <dlfcn.h>
#include <eptransport/backend.h>
#include <time.h>

#include <cstdlib>
#include <cstring>
#include <deque>
#include <map>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

namespace {

const ept_backend *under = nullptr;
std::string fault;  // one a process: set by every open, to the same
thread_local std::string t_missing;

bool is(const char *name) { return fault == name; }
void pause_ms(long ms) {
  const timespec time = {ms / 1000, ms % 1000 * 1000000};
  nanosleep(&time, nullptr);
}

// The immediate of the bytes that follow their signal; the receiver doesn't tell it. No engine uses it: it is the last
// piece of the last transfer of the last chan.
constexpr uint32_t kHidden = 0xffffffff;
constexpr uint32_t kHeldPolls = 3;  // enough for a check to look in between
constexpr uint32_t kLatePolls = 100;
constexpr size_t kCrowd = 16, kToldAtOnce = 4, kRegions = 100;
constexpr uint64_t kHiddenCookie = 0xb40c'e4b4'0ce4'b40cull;

// What a worker keeps for a fault.
struct Tricks {
  struct Held {
    ept_op op;
    uint32_t polls;
  };
  std::deque<Held> held;          // operations that wait for a later poll
  std::vector<ept_event> extras;  // events of our own
  size_t under_way = 0;
  uint64_t immediates = 0, crowded = 0;
  uint64_t last_event_ns = 0;
};
std::map<ept_worker *, Tricks> tricks;  // one a worker, made by worker_open; a worker is one caller's at a time
std::map<ept_instance *, ept_worker *> workers;
std::mutex tricks_lock;  // of the maps, not of what is in them

Tricks &tricks_of(ept_worker *worker) {
  const std::lock_guard<std::mutex> lock(tricks_lock);
  return tricks[worker];
}

uint64_t now_ns() {
  timespec time;
  clock_gettime(CLOCK_MONOTONIC, &time);
  return uint64_t(time.tv_sec) * 1000000000 + uint64_t(time.tv_nsec);
}

const char *text_of(const ept_value *values, size_t count, const char *name) {
  for (size_t i = 0; i < count; i++)
    if (strcmp(values[i].name, name) == 0) return values[i].text;
  return "";
}

bool find_under(const ept_value *values, size_t count) {
  if (under) return true;
  const char *path = text_of(values, count, "under");
  void *library = dlopen(path, RTLD_NOW | RTLD_LOCAL);
  if (library) under = static_cast<const ept_backend *>(dlsym(library, "ept_backend_v1"));
  if (!under) t_missing = std::string("the plugin to break, setting `under`, is ") + (*path ? path : "not given");
  return under != nullptr;
}

std::vector<ept_value> defaults() {
  std::vector<ept_value> values;
  for (size_t i = 0; i < under->setting_count; i++)
    values.push_back({under->settings[i].name, under->settings[i].value});
  return values;
}

// ---- set-up: passed on ----

int32_t probe(const ept_host *host, const ept_value *values, size_t count, ept_probe *report) {
  if (!find_under(values, count)) {
    const uint32_t size = report->size;
    memset(report, 0, size);
    report->size = size;
    strncpy(report->summary, t_missing.c_str(), sizeof report->summary - 1);
    strncpy(report->mend, "--option under=FILE", sizeof report->mend - 1);
    return EPT_E_UNAVAILABLE;
  }
  const std::vector<ept_value> theirs = defaults();
  return under->probe(host, theirs.data(), theirs.size(), report);
}

int32_t open(const ept_host *host, const ept_open_params *params, ept_instance **instance) {
  if (!find_under(params->values, params->value_count)) return EPT_E_UNAVAILABLE;
  fault = text_of(params->values, params->value_count, "fault");
  static std::vector<ept_value> theirs = defaults();  // lives as long as any instance
  ept_open_params passed = *params;
  passed.values = theirs.data();
  passed.value_count = theirs.size();
  return under->open(host, &passed, instance);
}

void close(ept_instance *instance) { under->close(instance); }
int32_t caps(ept_instance *instance, ept_caps *caps) { return under->caps(instance, caps); }
int32_t rails(ept_instance *instance, ept_rail *rails, uint32_t capacity, uint32_t *count) {
  return under->rails(instance, rails, capacity, count);
}
int32_t local_address(ept_instance *instance, void *blob, size_t *length) {
  return under->local_address(instance, blob, length);
}
int32_t reach(ept_instance *instance, const void *address, size_t length, ept_reach *reach) {
  return under->reach(instance, address, length, reach);
}
int32_t peer_open(ept_instance *instance, uint32_t rank, uint32_t epoch, const void *address, size_t length) {
  return under->peer_open(instance, rank, epoch, address, length);
}
int32_t peer_state(ept_instance *instance, uint32_t rank) { return under->peer_state(instance, rank); }
int32_t peer_close(ept_instance *instance, uint32_t rank) { return under->peer_close(instance, rank); }
int32_t peer_fence(ept_instance *instance, uint32_t rank, uint32_t epoch, uint64_t cookie) {
  if (!is("lands_after_fence") && !is("fences_nothing")) return under->peer_fence(instance, rank, epoch, cookie);
  ept_worker *worker;
  {
    const std::lock_guard<std::mutex> lock(tricks_lock);
    worker = workers.at(instance);
  }
  uint32_t count = 0;
  ept_rail none;
  if (const int32_t code = under->rails(instance, &none, 0, &count); code != EPT_OK) return code;
  for (uint32_t rail = 0; rail < count; rail++) {
    ept_event event = {};
    event.size = sizeof event;
    event.kind = EPT_EVENT_FENCED;
    event.peer = rank;
    event.epoch = epoch;
    event.rail = rail;
    event.cookie = cookie;
    tricks_of(worker).extras.push_back(event);
  }
  return EPT_OK;
}
int32_t worker_open(ept_instance *instance, ept_worker **worker) {
  const int32_t code = under->worker_open(instance, worker);
  if (code != EPT_OK) return code;
  tricks_of(*worker).last_event_ns = now_ns();
  const std::lock_guard<std::mutex> lock(tricks_lock);
  workers[instance] = *worker;
  return code;
}
void worker_close(ept_worker *worker) {
  {
    const std::lock_guard<std::mutex> lock(tricks_lock);
    tricks.erase(worker);
    std::erase_if(workers, [&](const auto &entry) { return entry.second == worker; });
  }
  under->worker_close(worker);
}

// ---- memory ----

int32_t mem_register(ept_instance *instance, const ept_memory *memory, ept_mem **mem) {
  return under->mem_register(instance, memory, mem);
}
int32_t mem_deregister(ept_mem *mem) { return under->mem_deregister(mem); }

int32_t region_export(ept_mem *mem, uint32_t rank, uint64_t offset, uint64_t length, void *blob, size_t *blob_length,
                      uint64_t *key) {
  if (is("no_bounds")) {  // a few bytes more, where the memory has them
    const size_t room = *blob_length;
    if (under->region_export(mem, rank, offset, length + 64, blob, blob_length, key) == EPT_OK) return EPT_OK;
    *blob_length = room;
  }
  const int32_t code = under->region_export(mem, rank, offset, length, blob, blob_length, key);
  if (code != EPT_OK || !is("regions_mixed_up")) return code;
  static std::mutex lock;
  static std::map<std::pair<ept_mem *, uint32_t>, std::vector<std::string>> all;
  static size_t exported = 0;
  const std::lock_guard<std::mutex> held(lock);
  std::vector<std::string> &earlier = all[{mem, rank}];
  const std::string own(static_cast<char *>(blob), *blob_length);
  if (earlier.size() < kRegions) {
    earlier.push_back(own);
  } else if (const std::string &other = earlier[++exported % kRegions]; other.size() == own.size()) {
    memcpy(blob, other.data(), other.size());
  }
  return EPT_OK;
}
int32_t region_revoke(ept_mem *mem, uint32_t rank, uint64_t key) {
  return is("revokes_nothing") || is("lands_late") || is("lands_after_fence") ? EPT_OK
                                                                              : under->region_revoke(mem, rank, key);
}
int32_t region_import(ept_instance *instance, uint32_t rank, const void *blob, size_t length, ept_region **region) {
  return under->region_import(instance, rank, blob, length, region);
}
void region_drop(ept_region *region) { under->region_drop(region); }

// ---- operations ----

ept_event done(const ept_op &op) {
  ept_event event = {};
  event.size = sizeof event;
  event.kind = EPT_EVENT_LOCAL_DONE;
  event.peer = op.peer;
  event.rail = op.rail;
  event.cookie = op.cookie;
  event.length = op.length;
  return event;
}

// What the plugin below gets for `op`; false: nothing, it is dealt with.
bool tamper(Tricks &own, ept_op *op) {
  const bool write = op->kind == EPT_OP_WRITE && op->length > 0;
  if (write && is("crashes")) abort();
  while (write && is("never_returns")) pause_ms(1000);
  if (is("last_byte_missing") && write && op->length > 1) {
    op->length--;
  } else if (is("lost_in_a_crowd") && write && own.under_way > kCrowd && ++own.crowded % 8 == 0) {
    op->length = 0;
  } else if (is("signal_before_data") && write && op->length >= 4096) {
    ept_op bytes = *op;
    bytes.immediate = kHidden;
    own.held.push_back({bytes, kHeldPolls});
    op->kind = EPT_OP_SIGNAL;
    op->length = 0;
    op->cookie = kHiddenCookie;
  } else if (is("nothing_for_nothing") && !write && op->kind != EPT_OP_SEND) {
    own.extras.push_back(done(*op));
    return false;
  } else if ((is("done_too_soon") || is("lands_late")) && write) {
    own.extras.push_back(done(*op));
    own.held.push_back({*op, is("lands_late") ? kLatePolls : kHeldPolls});
    own.held.back().op.cookie = kHiddenCookie;
    return false;
  }
  return true;
}

int32_t post(ept_worker *worker, const ept_op *ops, size_t count, size_t *posted) {
  Tricks &own = tricks_of(worker);
  *posted = 0;
  for (; *posted < count; ++*posted) {
    ept_op op = ops[*posted];
    const size_t held = own.held.size(), extras = own.extras.size();
    size_t taken = 1;
    int32_t code = EPT_OK;
    if (tamper(own, &op)) code = under->post(worker, &op, 1, &taken);
    if (code == EPT_LATER && is("blocks_when_full")) pause_ms(1200);
    if (code != EPT_OK) {  // the engine posts it again, or never
      own.held.resize(held);
      own.extras.resize(extras);
      return code;
    }
    own.under_way++;
  }
  return EPT_OK;
}

void post_held(ept_worker *worker, Tricks &own) {
  while (!own.held.empty()) {
    if (own.held.front().polls > 0) {
      own.held.front().polls--;
      return;
    }
    size_t taken = 0;
    if (under->post(worker, &own.held.front().op, 1, &taken) == EPT_LATER) return;
    own.held.pop_front();
  }
}

int32_t poll(ept_worker *worker, ept_event *events, size_t capacity) {
  Tricks &own = tricks_of(worker);
  post_held(worker, own);
  if (!own.extras.empty()) {
    size_t given = 0;
    for (; given < own.extras.size() && given < capacity; given++) events[given] = own.extras[given];
    own.extras.erase(own.extras.begin(), own.extras.begin() + long(given));
    return int32_t(given);
  }
  std::vector<ept_event> seen(capacity > 1 ? capacity / 2 : 1);  // room for what is told twice
  const int32_t found = under->poll(worker, seen.data(), seen.size());
  if (found < 0) return found;
  size_t told = 0, at_once = 0;
  for (int32_t i = 0; i < found; i++) {
    ept_event event = seen[size_t(i)];
    const bool immediate = event.kind == EPT_EVENT_IMM;
    if (event.kind == EPT_EVENT_LOCAL_DONE || event.kind == EPT_EVENT_ERROR) own.under_way -= own.under_way > 0;
    if (event.cookie == kHiddenCookie && !immediate) continue;
    if (immediate && event.immediate == kHidden) continue;
    if (immediate && is("early_lost") && ++at_once > kToldAtOnce) continue;
    const bool refused = event.kind == EPT_EVENT_ERROR && event.code == EPT_E_ACCESS;
    if (refused && is("error_swallowed")) event.kind = EPT_EVENT_LOCAL_DONE, event.code = EPT_OK;
    events[told++] = event;
    const bool twice = immediate && is("double_count") && ++own.immediates % 29 == 0;
    if (twice && told < capacity) events[told++] = event;
  }
  if (told > 0) own.last_event_ns = now_ns();
  // Connecting takes less; then a wait that finds nothing is held up.
  if (is("blocks_when_idle") && told == 0 && now_ns() - own.last_event_ns > 100'000'000) pause_ms(5000);
  return int32_t(told);
}

int32_t arm(ept_worker *worker, int32_t *descriptor) {
  const Tricks &own = tricks_of(worker);
  if (!own.held.empty() || !own.extras.empty()) return EPT_LATER;
  return under->arm(worker, descriptor);
}
int32_t quiesce(ept_worker *worker, uint32_t rank, int32_t scope, uint64_t cookie) {
  if (is("lands_late")) {
    ept_event event = {};
    event.size = sizeof event;
    event.kind = EPT_EVENT_QUIESCED;
    event.peer = rank;
    event.cookie = cookie;
    tricks_of(worker).extras.push_back(event);
    return EPT_OK;
  }
  return under->quiesce(worker, rank, scope, cookie);
}
int32_t query(ept_instance *instance, const char *feature, int64_t *value) {
  return under->query ? under->query(instance, feature, value) : EPT_E_UNSUPPORTED;
}
int32_t counters(ept_worker *worker, uint32_t rail, ept_rail_counters *counters) {
  return under->counters(worker, rail, counters);
}
void last_error(ept_error *error) {
  if (under) return under->last_error(error);
  const uint32_t size = error->size;
  memset(error, 0, size);
  error->size = size;
  error->code = EPT_E_UNAVAILABLE;
  error->peer = -1;
  strncpy(error->text, t_missing.c_str(), sizeof error->text - 1);
}

constexpr ept_setting kSettings[] = {
    {sizeof(ept_setting), EPT_SETTING_STRING, "under", "", 0, 0, "the file of the plugin that is broken"},
    {sizeof(ept_setting), EPT_SETTING_STRING, "fault", "", 0, 0, "in which way; empty: in none"},
};

constexpr ept_backend table() {
  ept_backend backend = {};
  backend.size = sizeof backend;
  backend.abi = EPT_BACKEND_ABI;
  backend.name = "broken";
  backend.version = "1";
  backend.settings = kSettings;
  backend.setting_count = 2;
  backend.probe = probe;
  backend.open = open;
  backend.close = close;
  backend.caps = caps;
  backend.rails = rails;
  backend.local_address = local_address;
  backend.reach = reach;
  backend.peer_open = peer_open;
  backend.peer_state = peer_state;
  backend.peer_close = peer_close;
  backend.peer_fence = peer_fence;
  backend.worker_open = worker_open;
  backend.worker_close = worker_close;
  backend.mem_register = mem_register;
  backend.mem_deregister = mem_deregister;
  backend.region_export = region_export;
  backend.region_revoke = region_revoke;
  backend.region_import = region_import;
  backend.region_drop = region_drop;
  backend.post = post;
  backend.poll = poll;
  backend.arm = arm;
  backend.quiesce = quiesce;
  backend.query = query;
  backend.counters = counters;
  backend.last_error = last_error;
  return backend;
}

}  // namespace

extern "C" {
extern __attribute__((visibility("default"))) const ept_backend ept_backend_v1;
const ept_backend ept_backend_v1 = table();
}
