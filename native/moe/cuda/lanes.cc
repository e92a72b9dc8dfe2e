// SPDX-License-Identifier: Apache-2.0
#include "moe/cuda/lanes.h"

#include <string.h>

#include <algorithm>

#include "moe/fail.h"

namespace ept::moe::cuda {

namespace {

struct Blob {
  uint32_t magic, world, lanes, rank;
  uint64_t process, base, bytes, lane_bytes;
  char gpu[16];
  char handle[64];
};
constexpr uint32_t kMagic = 0x47545045;  // "EPTG"

constexpr uint32_t kThreads = 512;
// As many ranks may be threads of one process; it is also the most that CUDA has.
constexpr uint32_t kConnections = 32;
// A send's scan and tables in shared memory: what every GPU of sm_80 and later gives a block.
constexpr uint64_t kMostShared = 96 << 10;

}  // namespace

Lanes::Lanes(std::shared_ptr<Gpu> gpu, const ept_gpu_config &config, uint32_t world, uint32_t rank, uint32_t count,
             const LaneMap &map)
    : gpu_(std::move(gpu)),
      config_(config),
      world_(world),
      rank_(rank),
      count_(count),
      map_(map),
      lane_bytes_(align_up(map.exported(), page_bytes())),
      threads_(config.threads ? config.threads : kThreads),
      peers_(world),
      kept_(count) {
  if (threads_ % kWarp || threads_ < 2 * kWarp || threads_ > 1024)
    fail(EPT_E_INVALID, -1, "threads is %u; a block has a multiple of %u of them, from %u to 1024", threads_, kWarp,
         2 * kWarp);
  memory_ = static_cast<char *>(gpu_->allocate(bytes()));
  told_ = static_cast<Told *>(gpu_->allocate_pinned(sizeof(Told) * count_));
}

Lanes::Lanes(std::shared_ptr<Gpu> gpu, const ept_gpu_config &config, const ept_moe_config &moe)
    : Lanes(std::move(gpu), config, moe.world, moe.rank, moe.lanes, lane_map(Object(moe).shape)) {}

Lanes::Lanes(std::shared_ptr<Gpu> gpu, const ept_gpu_config &config, std::shared_ptr<Arena> arena,
             std::vector<Place> places)
    : Lanes(std::move(gpu), config, arena->world, arena->rank, uint32_t(arena->lanes.size()), arena->map) {
  arena_ = std::move(arena);
  places_ = std::move(places);
  bool calls = false;
  for (uint32_t r = 0; r < world_; r++) {
    peers_[r].same_gpu = same_gpu(places_[r], places_[rank_]);
    peers_[r].same_process = places_[r].on_gpu && places_[r].process == config_.process;
    calls = calls || !places_[r].on_gpu;
  }
  net_ = std::make_unique<Net>(gpu_, *arena_, calls);
}

Lanes::~Lanes() {
  net_.reset();
  for (const Peer &peer : peers_)
    if (peer.opened) gpu_->close(peer.opened);
  if (own_) gpu_->release(own_);
  if (memory_) gpu_->release(memory_);
  if (told_) gpu_->release_pinned(told_);
}

std::string Lanes::exported() const {
  Blob blob{};
  blob.magic = kMagic;
  blob.world = world_;
  blob.lanes = count_;
  blob.rank = rank_;
  blob.process = config_.process;
  blob.base = uint64_t(reinterpret_cast<uintptr_t>(memory_));
  blob.bytes = bytes();
  blob.lane_bytes = lane_bytes_;
  const std::string gpu = gpu_->identity(), handle = gpu_->share(memory_);
  memcpy(blob.gpu, gpu.data(), std::min(gpu.size(), sizeof blob.gpu));
  memcpy(blob.handle, handle.data(), std::min(handle.size(), sizeof blob.handle));
  return std::string(reinterpret_cast<const char *>(&blob), sizeof blob);
}

void Lanes::connect(uint32_t rank, const std::string &given) {
  Blob blob{};
  if (given.size() != sizeof blob)
    fail(EPT_E_MISMATCH, int32_t(rank), "rank %u's lanes come in %zu bytes; %zu are known", rank, given.size(),
         sizeof blob);
  memcpy(&blob, given.data(), sizeof blob);
  if (blob.magic != kMagic || rank >= world_ || blob.rank != rank)
    fail(EPT_E_MISMATCH, int32_t(rank), "rank %u's lanes are not what this version writes", rank);
  if (blob.world != world_ || blob.lanes != count_ || blob.lane_bytes != lane_bytes_ || blob.bytes != bytes())
    fail(EPT_E_MISMATCH, int32_t(rank),
         "rank %u has %u lanes of %llu bytes for %u ranks; rank %u has %u of %llu for %u", rank, blob.lanes,
         (unsigned long long)blob.lane_bytes, blob.world, rank_, count_, (unsigned long long)lane_bytes_, world_);
  Peer &peer = peers_[rank];
  const std::string here = gpu_->identity();
  peer.same_gpu = memcmp(here.data(), blob.gpu, std::min(here.size(), sizeof blob.gpu)) == 0;
  peer.same_process = blob.process == config_.process;
  if (rank == rank_) {
    peer.base = memory_;
  } else if (peer.same_process) {
    if (!peer.same_gpu)
      fail(EPT_E_UNSUPPORTED, int32_t(rank),
           "ranks %u and %u are threads of one process on two GPUs, which is not supported yet: run a process for each "
           "GPU (torchrun)",
           rank_, rank);
    peer.base = reinterpret_cast<char *>(uintptr_t(blob.base));
  } else {
    peer.opened = gpu_->open(std::string(blob.handle, sizeof blob.handle));
    peer.base = static_cast<char *>(peer.opened);
  }
  peer.known = true;
}

// INVARIANT: of all kernels that wait for peers, every one is on the GPU at the same time, or the one that is waited
// for might not find a place there. A lane has at most one kernel under way, so that is ranks of this GPU x lanes x
// blocks.
void Lanes::choose_blocks() {
  uint32_t ranks = 0;
  for (const Peer &peer : peers_) ranks += peer.same_gpu;
  const uint32_t room = gpu_->room(threads_), sharers = ranks * count_;
  blocks_ = config_.blocks ? config_.blocks : room / sharers;
  constexpr uint32_t kEnough = 132;  // more bring nothing: a GPU's memory is busy with as many
  if (!config_.blocks) blocks_ = std::min(blocks_, kEnough);
  if (blocks_ == 0 || uint64_t(blocks_) * sharers > room)
    fail(EPT_E_CONFIG, -1,
         "%u ranks of this GPU with %u lanes and %u blocks of %u threads each need room for %llu blocks; it has room "
         "for "
         "%u: set fewer blocks (EPT_GPU_BLOCKS) or lanes",
         ranks, count_, std::max(blocks_, 1u), threads_, (unsigned long long)std::max(blocks_, 1u) * sharers, room);
}

void Lanes::start() {
  for (uint32_t r = 0; r < world_; r++)
    if (!peers_[r].known) fail(EPT_E_INVALID, int32_t(r), "rank %u's lanes are not connected", r);
  ranks_here_ = 0;
  for (const Peer &peer : peers_) ranks_here_ += peer.same_process;
  if (ranks_here_ > 1 && gpu_->connections() < kConnections)
    fail(EPT_E_CONFIG, -1,
         "%u ranks of this group are threads of one process on a GPU, and CUDA_DEVICE_MAX_CONNECTIONS is %u here: set "
         "it "
         "to %u before CUDA starts, or their kernels wait behind one another for ever",
         ranks_here_, gpu_->connections(), kConnections);
  choose_blocks();
  // Two passes over the same parts: how many bytes, and where.
  std::vector<ept_path *> paths(count_);
  std::vector<uint64_t **> words(count_);
  std::vector<char **> in(count_);
  const auto lay = [&](char *begin) {
    Carve carve(begin);
    for (uint32_t l = 0; l < count_; l++) {
      kept_[l].tickets = carve.take<uint64_t>(uint64_t(world_) * kSignals);
      kept_[l].offsets = carve.take<uint64_t>(uint64_t(world_) * kSignals);
      kept_[l].heard = carve.take<uint64_t>(uint64_t(world_) * EPT_PHASES);
      kept_[l].lands = carve.take<uint64_t>(uint64_t(world_) * EPT_PHASES * EPT_MOE_SLOTS);
      kept_[l].state = carve.take<LaneState>(1);
      kept_[l].done = carve.take<uint32_t>(world_);
    }
    kept_bytes_ = carve.bytes();
    for (uint32_t l = 0; l < count_; l++) {
      paths[l] = carve.take<ept_path>(world_);
      words[l] = carve.take<uint64_t *>(world_);
      in[l] = carve.take<char *>(world_);
    }
    own_bytes_ = carve.bytes();
  };
  lay(nullptr);
  own_ = static_cast<char *>(gpu_->allocate(own_bytes_));
  lay(own_);

  tables_.assign(count_, LaneTable{});
  std::vector<char> image(own_bytes_, 0);
  const auto in_image = [&](auto *at) {
    return reinterpret_cast<std::remove_reference_t<decltype(*at)> *>(image.data() +
                                                                      (reinterpret_cast<char *>(at) - own_));
  };
  for (uint32_t l = 0; l < count_; l++) {
    LaneTable &t = tables_[l];
    t.world = world_;
    t.rank = rank_;
    t.lane = l;
    t.map = map_;
    t.timeout_ns = config_.timeout_ns;
    if (arena_) {
      t.epoch = arena_->epoch;
      in_image(kept_[l].state)->membership = arena_->members()->epoch;
      t.acks = net_->acks(l);
      t.staging = net_->memory(l);
    }
    t.in = in[l];
    t.paths = paths[l];
    t.words = words[l];
    t.done = kept_[l].done;
    t.tickets = kept_[l].tickets;
    t.offsets = kept_[l].offsets;
    t.heard = kept_[l].heard;
    t.lands = kept_[l].lands;
    t.state = kept_[l].state;
    t.told = told_ + l;
    t.group_fault = config_.group_fault;
    for (uint32_t r = 0; r < world_; r++) {
      const auto signals = [&](char *base, uint32_t source) {
        return base + signals_at() + (uint64_t(l) * world_ + source) * kSignals * sizeof(uint64_t);
      };
      ept_path &path = in_image(paths[l])[r];
      if (!maps(r)) {
        path = net_->path(l, r);
        in_image(words[l])[r] = net_->words(l, r);
        in_image(in[l])[r] = net_->memory(l);
        continue;
      }
      path.kind = r == rank_ ? EPT_DEVICE_NONE : EPT_DEVICE_MAPPED;
      path.peer = r;
      path.window = uint64_t(reinterpret_cast<uintptr_t>(peers_[r].base + l * lane_bytes_));
      path.window_bytes = map_.exported();
      path.signals = uint64_t(reinterpret_cast<uintptr_t>(signals(peers_[r].base, rank_)));
      path.signal_count = kSignals;
      in_image(words[l])[r] = reinterpret_cast<uint64_t *>(signals(memory_, r));
      in_image(in[l])[r] = memory_ + l * lane_bytes_;
    }
  }
  gpu_->copy_in(own_, image.data(), own_bytes_);
}

void Lanes::write_times(uint64_t *times) {
  for (uint32_t l = 0; l < count_; l++) tables_[l].times = times ? times + l * times_of(blocks_, world_) : nullptr;
}

int32_t Lanes::reset(uint64_t timeout_ns) {
  std::vector<std::array<uint64_t, EPT_PHASES>> next(count_);
  if (net_) {
    const Deadline deadline(timeout_ns == UINT64_MAX ? config_.timeout_ns : timeout_ns);
    for (uint32_t l = 0; l < count_; l++) {
      LaneState state;
      gpu_->copy_out(&state, kept_[l].state, sizeof state);
      for (uint32_t p = 0; p < EPT_PHASES; p++) next[l][p] = state.sent[p];
    }
    if (const int32_t code = net_->reset(next, deadline.remaining()); code != EPT_OK) return code;
    begin_at(next);
    meet(deadline);
  } else {
    begin_at(next);
  }
  return EPT_OK;
}

// All that kernels keep, empty and at those generations. Nobody raises a mapped signal meanwhile.
void Lanes::begin_at(const std::vector<std::array<uint64_t, EPT_PHASES>> &next) {
  gpu_->clear(memory_ + signals_at(), bytes() - signals_at());
  gpu_->clear(own_, kept_bytes_);
  memset(told_, 0, sizeof(Told) * count_);
  if (!net_) return;
  for (uint32_t l = 0; l < count_; l++) {
    LaneState state{};
    std::vector<uint64_t> offsets(uint64_t(world_) * kSignals), heard(uint64_t(world_) * EPT_PHASES);
    for (uint32_t p = 0; p < EPT_PHASES; p++) {
      state.sent[p] = state.received[p] = next[l][p];
      for (uint32_t r = 0; r < world_; r++) {
        heard[r * EPT_PHASES + p] = next[l][p];
        for (uint32_t slot = 0; slot < EPT_MOE_SLOTS; slot++) {
          const uint64_t first = next[l][p] + ((next[l][p] ^ slot) & 1);  // generation of that slot
          offsets[r * kSignals + signal_index(p, slot)] = (maps(r) ? 0 : net_->taken(l, r, p, slot)) - first / 2;
        }
      }
    }
    state.membership = arena_->members()->epoch;
    gpu_->copy_in(kept_[l].state, &state, sizeof state);
    gpu_->copy_in(kept_[l].offsets, offsets.data(), offsets.size() * sizeof(uint64_t));
    gpu_->copy_in(kept_[l].heard, heard.data(), heard.size() * sizeof(uint64_t));
  }
}

// GPU ranks some of which map each other's signals: all have cleared theirs.
void Lanes::meet(const Deadline &deadline) {
  Members with;
  bool any = false;
  for (const Place &a : places_) {
    with.active.push_back(a.on_gpu != 0);
    for (const Place &b : places_) any = any || (&a != &b && ept::moe::maps(a, b));
  }
  meetings_++;
  if (any)
    exchange(
        arena_->engine, rank_, with, kTagSideMeet | meetings_, [](uint32_t) { return std::string(); }, deadline,
        "to reset its GPU's signals");
}

void Lanes::fit(const Object &object) const {
  const LaneMap need = lane_map(object.shape);
  if (object.config.world != world_ || object.config.rank != rank_ || object.config.lanes > count_ ||
      need.dispatch_recv > map_.dispatch_recv || need.combine_recv > map_.combine_recv ||
      need.dispatch_send > map_.dispatch_send || need.combine_send > map_.combine_send)
    fail(EPT_E_INVALID, -1, "an AllToAll of %u lanes of %llu bytes doesn't fit %u lanes of %llu", object.config.lanes,
         (unsigned long long)need.bytes(page_bytes()), count_, (unsigned long long)lane_bytes_);
  refuse(object);
}

void Lanes::refuse(const Object &object) {
  const uint32_t world = object.config.world;
  if (object.shape.streams())
    fail(EPT_E_UNSUPPORTED, -1,
         "with a buffer_bytes of %llu, calls of more than %u tokens would be streamed, which the GPU executor can't do "
         "yet: leave buffer_bytes away, or make max_tokens %u",
         (unsigned long long)object.config.buffer_bytes, object.shape.chunk_tokens, object.shape.chunk_tokens);
  if (object.config.num_experts > 65535 || world > 65535)
    fail(EPT_E_UNSUPPORTED, -1, "%u experts on %u ranks; the GPU executor numbers at most 65535 of each",
         object.config.num_experts, world);
  // Beside the rings (shared.h), which are as large for every object.
  const uint64_t tiles = (uint64_t(object.shape.max_tokens) + kWarp - 1) / kWarp;
  const uint64_t shared = 4 * tiles * world + 8ull * object.config.num_experts + 48ull * world + 64;
  const uint64_t received =
      8ull * world * object.local() + 80ull * world + 4ull * world * object.local() + 8ull * object.local() + 64;
  if (shared > kMostShared || received > kMostShared)
    fail(EPT_E_UNSUPPORTED, -1,
         "%u tokens, %u experts and %u ranks take %llu bytes of a block's shared memory; the GPU executor has %llu",
         object.shape.max_tokens, object.config.num_experts, world, (unsigned long long)std::max(shared, received),
         (unsigned long long)kMostShared);
}

void Lanes::check(uint32_t lane) const {
  const Told &told = told_[lane];
  const uint64_t code = __atomic_load_n(&told.code, __ATOMIC_ACQUIRE);
  if (!code) return;
  static const char *const halves[] = {"dispatch_send", "dispatch_recv", "combine_send", "combine_recv"};
  static const char *const fields[] = {"",
                                       "magic or version",
                                       "membership",
                                       "phase, source or lane",
                                       "generation",
                                       "AllToAll",
                                       "kind of message",
                                       "row bytes or top_k",
                                       "rows",
                                       "format",
                                       "counts",
                                       "combine region",
                                       "rows of its combine"};
  const char *half = told.half < kHalves ? halves[told.half] : "a kernel";
  const auto ull = [](uint64_t v) { return (unsigned long long)v; };
  const auto failure = [&](const char *format, auto... values) {
    char text[600];
    snprintf(text, sizeof text, format, values...);
    fail(EPT_E_FAULT, told.peer, "lane %u is faulted, reset it; the first cause was %s in %s %llu: %s", lane,
         ept_code_name(-int32_t(code)), half, ull(told.generation), text);
  };
  switch (told.what) {
    case kLate:
      failure("rank %u waited %.1f s for rank %d, whose signal stands at %llu of %llu", rank_,
              double(config_.timeout_ns) * 1e-9, told.peer, ull(told.seen), ull(told.expected));
      break;
    case kHeader:
      failure("the message of rank %d is not of this step (its %s): every rank must make the same calls in a lane",
              told.peer, fields[std::min<uint64_t>(told.seen, std::size(fields) - 1)]);
      break;
    case kIds:
      failure("topk_ids has %lld; an id is -1 (none) or 0 to %llu. It was sent as -1", (long long)int32_t(told.seen),
              ull(told.expected - 1));
      break;
    case kRoom:
      failure("rank %u received %llu rows; the outputs hold %llu. Give larger outputs (max_rows)", rank_,
              ull(told.expected), ull(told.seen));
      break;
    case kRow:
      failure("a row of rank %d is not what its header promised (%llu of %llu)", told.peer, ull(told.seen),
              ull(told.expected));
      break;
    case kLost:
      failure("rank %u waited for rank %d, which is gone (%s): the signal stands short of %llu", rank_, told.peer,
              ept_code_name(-int32_t(code)), ull(told.expected));
      break;
    case kSlot:
      failure("rank %u waited %.1f s for rank %d to have consumed %llu messages; it says %llu", rank_,
              double(config_.timeout_ns) * 1e-9, told.peer, ull(told.expected), ull(told.seen));
      break;
    default:
      failure("the message to rank %d could not be posted (%s)", told.peer, ept_code_name(-int32_t(told.seen)));
  }
}

GpuObject::GpuObject(std::shared_ptr<Lanes> of, const ept_moe_config &config, uint32_t number)
    : lanes(std::move(of)), object(config), carried(config.lanes) {
  lanes->fit(object);
  object.number = number;
  std::vector<uint32_t> tables;
  for (uint32_t e = 0; e < config.num_experts; e++)
    tables.push_back(object.placement.rank[e] << 16 | object.placement.local[e]);
  tables.insert(tables.end(), object.placement.first.begin(), object.placement.first.end());
  memory_ = static_cast<uint32_t *>(lanes->gpu().allocate(4 * tables.size()));
  lanes->gpu().copy_in(memory_, tables.data(), 4 * tables.size());
  table.number = number;
  table.experts = config.num_experts;
  table.local = object.local();
  table.top_k = config.top_k;
  table.hidden = config.hidden;
  table.max_tokens = config.max_tokens;
  table.alignment = object.config.alignment;
  table.returned_format = uint32_t(object.config.combine_dtype);
  table.payload = object.payload();
  table.returned = object.returned();
  table.where = memory_;
  table.first = memory_ + config.num_experts;
  table.shape = object.shape;
}

GpuObject::~GpuObject() {
  if (memory_) lanes->gpu().release(memory_);
}

}  // namespace ept::moe::cuda
