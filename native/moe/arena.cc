// SPDX-License-Identifier: Apache-2.0
//
// arena.cc: life of an arena, and how ranks agree on a new AllToAll. grow.cc has its memory, reset.cc the recovery.
#include "moe/arena.h"

#include <sched.h>
#include <stdio.h>
#include <sys/mman.h>

#include <algorithm>

#include "engine/boot.h"
#include "moe/links.h"

namespace ept::moe {

LaneMemory::LaneMemory(ept_engine *engine, uint64_t bytes) : engine_(engine), bytes_(bytes) {
  void *at = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (at == MAP_FAILED)
    fail(EPT_E_NOMEM, -1, "a lane needs %llu bytes, which the machine refuses: set buffer_bytes or fewer max_tokens",
         (unsigned long long)bytes);
  // Rows of 14 KB from all over a region of hundreds of MB: with small pages each costs four walks of the page table,
  // and prefetchers stop at every page's end. Where the kernel won't, small pages work too.
  (void)madvise(at, bytes, MADV_HUGEPAGE);
  base_ = static_cast<char *>(at);
  ept_memory memory{};
  memory.size = sizeof memory;
  memory.kind = EPT_MEMORY_HOST;
  memory.address = at;
  memory.length = bytes;
  memory.fd = -1;
  memory.role = EPT_ROLE_DATA;
  memory.access = EPT_ACCESS_LOCAL | EPT_ACCESS_REMOTE_WRITE;
  Error error;
  const int32_t code = ept_memory_register(engine, &memory, &id_, &error);
  if (code < 0) munmap(base_, bytes_);
  check(code, error);
}

LaneMemory::LaneMemory(ept_engine *engine, const ept_memory &described, std::shared_ptr<void> owned)
    : engine_(engine),
      owned_(std::move(owned)),
      base_(static_cast<char *>(described.address)),
      bytes_(described.length) {
  Error error;
  check(ept_memory_register(engine, &described, &id_, &error), error);
}

LaneMemory::~LaneMemory() {
  Error error;
  // Where the engine still reads from it, the pages must stay: they leak rather than change under a NIC.
  if (ept_memory_deregister(engine_, id_, &error) != EPT_OK) {
    if (owned_) new std::shared_ptr<void>(std::move(owned_));
  } else if (!owned_) {
    munmap(base_, bytes_);
  }
}

Arena::Arena(ept_engine *of) : engine(of), metrics(metrics_of(of)), spans(spans_of(of)) {
  Error error;
  ept_engine_info info{};
  info.size = sizeof info;
  check(ept_engine_info_get(engine, &info, &error), error);
  rank = info.rank;
  world = info.world;
  epoch = info.epoch;
  timeout_ns = info.timeout_ns;
  reports_.begin(world);
  auto all = std::make_shared<Members>();
  all->active.assign(world, 1);
  members_ = std::move(all);
  returned_.assign(world, 0);
  places_.resize(world);
}

Arena::~Arena() = default;

void Arena::begin_attempt(const Members &with) {
  if (with.epoch != attempts_under_) attempts_ = 0, attempts_under_ = with.epoch;
  attempts_++;
}

std::shared_ptr<Object> Arena::create(const ept_moe_config &config, std::vector<Lane *> &its_lanes, Side *side) {
  std::lock_guard<std::mutex> lock(collective_);
  if (closed_) fail(EPT_E_CLOSED, -1, "the arena was closed");
  refuse_suspended();
  const Deadline deadline(timeout_ns);
  Members with;
  if (expected_) {  // the others have it already
    with.active.assign(world, 0);
    with.active[rank] = 1;
  } else {
    with = *members_of_step();
  }
  begin_attempt(with);
  std::vector<Place> places(world);
  if (expected_) {
    const std::lock_guard<std::mutex> lock_places(members_mutex_);
    places = places_;
  }
  std::shared_ptr<Object> object = agree(config, with, deadline, side, places);
  if (!expected_) weigh(places, *object, with, deadline, side);  // one that comes back is alone here
  for (uint32_t r = 0; r < world; r++)
    if (places[r].known) learn_place(r, places[r]);
  const LaneMap needs = lane_map(object->shape);
  const LaneMap larger = {
      at_least(map.dispatch_recv, needs.dispatch_recv), at_least(map.combine_recv, needs.combine_recv),
      at_least(map.dispatch_send, needs.dispatch_send), at_least(map.combine_send, needs.combine_send)};
  const auto count = uint32_t(std::max<size_t>(lanes.size(), object->config.lanes));
  const bool grows = count > lanes.size() || larger.bytes(1) != map.bytes(1);
  if (all_direct(places)) {
    if (lanes.empty()) grow({kAlign, kAlign, kAlign, kAlign}, 1, with, deadline, "to make a lane for resets", nullptr);
    bring_sides(places, with, deadline, side);
    object->number = ++objects_;
    if (expected_) expected_--;
    return object;
  }
  refuse_drivers(places, with, grows);
  MakeMemory elsewhere;
  if (side) elsewhere = [&](uint64_t bytes) { return side->lane_memory(*this, bytes); };
  if (grows) grow(larger, count, with, deadline, "to enlarge the arena", elsewhere);
  bring_sides(places, with, deadline, side);
  driver_ = side ? Driver::kernels : Driver::calls;
  object->number = ++objects_;
  if (expected_) expected_--;
  pool.grow(object->threads);
  for (uint32_t i = 0; i < object->config.lanes; i++) its_lanes.push_back(lanes[i].get());
  return object;
}

namespace {

// Ranks that share cores share them out: the boot and the cores that this process may run on.
std::string host_name() {
  cpu_set_t cores;
  CPU_ZERO(&cores);
  sched_getaffinity(0, sizeof cores, &cores);
  return boot_id().append(reinterpret_cast<const char *>(&cores), sizeof cores);
}

unsigned cores_here() {
  cpu_set_t cores;
  CPU_ZERO(&cores);
  return sched_getaffinity(0, sizeof cores, &cores) == 0 ? unsigned(std::max(1, CPU_COUNT(&cores))) : 1;
}

struct Field {
  const char *name;
  double value;  // exact for what stands here
};

std::vector<Field> fields(const ept_moe_config &c) {
  return {{"world", double(c.world)},
          {"num_experts", double(c.num_experts)},
          {"top_k", double(c.top_k)},
          {"hidden", double(c.hidden)},
          {"max_tokens", double(c.max_tokens)},
          {"lanes", double(c.lanes)},
          {"dtype", double(c.dtype)},
          {"dispatch_dtype", double(c.dispatch_dtype)},
          {"combine_dtype", double(c.combine_dtype)},
          {"scale_format", double(c.scale_format)},
          {"scale_epsilon", double(c.scale_epsilon)},
          {"caller_scale_bytes", double(c.caller_scale_bytes)},
          {"alignment", double(c.alignment)},
          {"buffer_bytes", double(c.buffer_bytes)}};
}

std::string shown(const Field &field) {
  char text[64];
  const std::string name = field.name;
  if (name == "dtype" || name == "dispatch_dtype" || name == "combine_dtype") return format_name(int32_t(field.value));
  snprintf(text, sizeof text, name == "scale_epsilon" ? "%g" : "%.0f", field.value);
  return text;
}

Bytes describe(const Object &object) {
  Bytes bytes;
  for (const Field &field : fields(object.config)) bytes.put(field.value);
  bytes.put_text(object.placement.rank.data(), object.placement.rank.size() * sizeof(uint32_t));
  return bytes;
}

void compare(const Object &mine, uint32_t rank, uint32_t peer, Bytes &theirs) {
  for (const Field &field : fields(mine.config)) {
    const Field other = {field.name, theirs.get<double>()};
    if (other.value != field.value)
      fail(EPT_E_MISMATCH, int32_t(peer), "%s is %s on rank %u and %s on rank %u; it must be the same on every rank",
           field.name, shown(field).c_str(), rank, shown(other).c_str(), peer);
  }
  const std::string placement = theirs.get_text();
  for (size_t e = 0; e < mine.placement.rank.size(); e++) {
    uint32_t other = 0;
    if ((e + 1) * sizeof other <= placement.size()) memcpy(&other, placement.data() + e * sizeof other, sizeof other);
    if (other != mine.placement.rank[e])
      fail(EPT_E_MISMATCH, int32_t(peer),
           "placement[%zu] is %u on rank %u and %u on rank %u; it must be the same on "
           "every rank",
           e, mine.placement.rank[e], rank, other, peer);
  }
}

}  // namespace

// Every rank tells every other its config, or why it refuses the one it was given, so that all fail alike.
std::shared_ptr<Object> Arena::agree(const ept_moe_config &config, const Members &with, const Deadline &deadline,
                                     Side *side, std::vector<Place> &places) {
  std::shared_ptr<Object> object;
  Failure refused{Error()};
  try {
    if (config.size == sizeof config && (config.world != world || config.rank != rank))
      fail(EPT_E_INVALID, -1, "the config is for rank %u of %u; the engine is rank %u of %u", config.rank, config.world,
           rank, world);
    object = std::make_shared<Object>(config);
    if (side) places[rank] = side->place();
    places[rank].known = 1;
    places[rank].lanes = driver_;
  } catch (const Failure &failure) {
    refused = failure;
    object.reset();
  }
  const std::string host = host_name();
  Bytes mine;
  mine.put(refused.error.code).put_text(refused.error.text, strlen(refused.error.text));
  mine.put_text(host.data(), host.size());
  mine.put(places[rank]);
  if (object) {
    const Bytes described = describe(*object);
    mine.put_text(described.all().data(), described.all().size());
  }
  const auto said = exchange(
      engine, rank, with, kTagConfig | attempt(), [&](uint32_t) { return mine.all(); }, deadline,
      "to create an AllToAll");
  if (!object) throw refused;
  unsigned sharing = 1;
  for (uint32_t r = 0; r < world; r++) {
    if (r == rank || !with.has(r)) continue;
    Bytes theirs(said[r]);
    const auto code = theirs.get<int32_t>();
    const std::string text = theirs.get_text();
    if (code != EPT_OK) fail(EPT_E_MISMATCH, int32_t(r), "rank %u refuses its config: %s", r, text.c_str());
    sharing += theirs.get_text() == host;
    places[r] = theirs.get<Place>();
    Bytes described(theirs.get_text());
    compare(*object, rank, r, described);
  }
  object->threads = config.threads ? config.threads : std::max(1u, cores_here() / sharing);
  return object;
}

// All ranks see the same places, so all of them refuse, or none does.
void Arena::refuse_drivers(const std::vector<Place> &places, const Members &with, bool larger) const {
  for (uint32_t r = 0; r < world; r++) {
    const Place &place = places[r];
    if (!with.has(r) || place.lanes == Driver::none) continue;
    const Driver now = place.on_gpu ? Driver::kernels : Driver::calls;
    if (place.lanes != now)
      fail(EPT_E_UNSUPPORTED, int32_t(r),
           "rank %u has an AllToAll on the %s in this group, and now one on the %s, of which one talks through the "
           "backend: make a group for each",
           r, now == Driver::calls ? "GPU" : "CPU", now == Driver::calls ? "CPU" : "GPU");
    if (larger && place.lanes == Driver::kernels)
      fail(EPT_E_UNSUPPORTED, int32_t(r),
           "this AllToAll needs more lanes, or larger ones, than those that the GPU of rank %u uses with the backend, "
           "which can't grow: make the largest AllToAll of the group first",
           r);
  }
}

void Arena::bring_sides(const std::vector<Place> &places, const Members &with, const Deadline &deadline, Side *side) {
  bool any = false;
  for (const Place &place : places) any = any || place.on_gpu;
  if (!any) return;
  const auto attempted = [](Failure &failed, auto &&body) {
    try {
      body();
    } catch (const Failure &failure) {
      failed = failure;
    }
  };
  Failure failed{Error()};
  std::string offer;
  if (side) attempted(failed, [&] { offer = side->offer(*this, places); });
  const auto offered = exchange(
      engine, rank, with, kTagSide | attempt(),
      [&](uint32_t) { return status(failed).put_text(offer.data(), offer.size()).all(); }, deadline,
      "to bring its GPU's memory");
  if (failed.error.code) throw failed;
  std::vector<Bytes> rest;
  throw_theirs(offered, rank, with, &rest);
  std::vector<std::string> offers(world);
  for (uint32_t r = 0; r < world; r++)
    if (r != rank && with.has(r)) offers[r] = rest[r].get_text();
  offers[rank] = offer;
  if (side) attempted(failed, [&] { side->accept(offers); });
  const auto ready = exchange(
      engine, rank, with, kTagSideReady | attempt(), [&](uint32_t) { return status(failed).all(); }, deadline,
      "to map its peers' memory");
  if (failed.error.code) throw failed;
  throw_theirs(ready, rank, with, &rest);
}

void Arena::close(uint64_t timeout) {
  std::lock_guard<std::mutex> lock(collective_);
  if (closed_) return;
  const Deadline deadline(timeout);
  Holds holds;
  for (auto &lane : lanes) holds.push_back(std::make_unique<Lane::Held>(*lane, deadline, "arena_close"));
  closed_ = true;
  Error error;
  for (auto &lane : lanes)
    for (Link &link : lane->links) {
      for (auto &slots : link.in_flight)
        for (auto &places : slots)
          for (ept_transfer_id &transfer : places)
            if (transfer) ept_transfer_wait(engine, transfer, deadline.remaining(), &error);
      release(engine, link);
    }
  memories_.clear();
}

}  // namespace ept::moe
