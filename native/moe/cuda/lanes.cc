// SPDX-License-Identifier: Apache-2.0
#include "moe/cuda/lanes.h"

#include <string.h>

#include <algorithm>

#include "moe/cuda/shared.h"
#include "moe/fail.h"

namespace ept::moe::cuda {

namespace {

struct Blob {
  uint32_t magic, world, lanes, rank;
  uint64_t process, base, bytes, lane_bytes;
  uint64_t heap_offset;  // of the memory in the rank's part of the heap; ~0: it isn't there
  char gpu[16];
  // what Gpu::share tells follows
};
constexpr uint32_t kMagic = 0x48545045;  // "EPTH"

// Where a combine's blocks have a multiprocessor each and two tokens or more: they wait for memory, and all threads
// that a multiprocessor takes wait for more of it at a time. With a token a block, what all threads do before it costs
// more.
constexpr uint32_t kWide = 1024, kWideTokens = 2;
// Shares that MPS gives processes overlap: of so many multiprocessors, two may be taken by others' blocks, and a rank
// waits for the two that begin late, or that go where another of its blocks is. Of 32, 30 blocks take 46.0 us for a
// dispatch and 51.1 for a combine, 32 take 53.2 and 65.6 (4 ranks on an H200); of 16, 14 brought nothing that is sure.
constexpr uint32_t kLargeShare = 32, kOverlap = 2;
// As many ranks may be threads of one process; it is also the most that CUDA has.
constexpr uint32_t kConnections = 32;
// A send's scan and tables in shared memory: what every GPU of sm_80 and later gives a block.
constexpr uint64_t kMostShared = 96 << 10;

}  // namespace

namespace {

uint32_t lanes_of(const Arena &arena, const ept_moe_config &moe, bool directly) {
  return directly ? moe.lanes : uint32_t(arena.lanes.size());
}
bool needs_heap(const std::vector<Place> &places) {
  for (const Place &a : places)
    for (const Place &b : places)
      if (a.known && b.known && initiates(a, b)) return true;
  return false;
}
constexpr uint64_t kNotInHeap = ~0ull;

// The most shared memory that a block of that object's kernels takes beside its ring and places, which are as large for
// every object.
uint64_t besides(const Object &object) {
  const ept_moe_config &config = object.config;
  const auto bytes = [](auto make) {
    Carve carve(nullptr);
    make(carve);
    return carve.bytes();
  };
  const auto send = [&](Carve &carve) { send_shared(carve, 0, config.world, config.num_experts, config.max_tokens); };
  const auto receive = [&](Carve &carve) { recv_shared(carve, 0, config.world, object.local()); };
  const auto combine = [&](Carve &carve) { combine_shared(carve, 0, config.world); };
  if (!object.shape.streams()) return std::max({bytes(send), bytes(receive), bytes(combine)});
  // Both halves of a streamed call are one launch, in which each warp knows its next row of each rank, and to each.
  const auto chunks = [&](Carve &carve) {
    out_shared(carve, config.world);
    in_shared(carve, kWide, config.world);
    in_shared(carve, kWide, config.world);
  };
  return bytes([&](Carve &carve) { send(carve), receive(carve), chunks(carve); });
}

}  // namespace

Lanes::Lanes(Opened opened, const ept_gpu_config &config, const ept_moe_config &moe, std::shared_ptr<Arena> arena,
             std::vector<Place> places)
    : gpu_(std::move(opened.gpu)),
      offered_(std::move(opened.heap)),
      heap_(needs_heap(places) ? offered_ : nullptr),
      config_(config),
      world_(arena->world),
      rank_(arena->rank),
      count_(lanes_of(*arena, moe, all_direct(places))),
      map_(all_direct(places) ? lane_map(Object(moe).shape) : arena->map),
      lane_bytes_(heap_ ? map_.bytes(page_bytes()) : align_up(map_.exported(), page_bytes())),
      threads_(config.threads ? config.threads : kBlockThreads),
      besides_(besides(Object(moe))),
      peers_(world_),
      kept_(count_),
      taken_(count_),
      arena_(std::move(arena)),
      places_(std::move(places)) {
  if (threads_ % kWarp || threads_ < 2 * kWarp || threads_ > 1024)
    fail(EPT_E_INVALID, -1, "threads is %u; a block has a multiple of %u of them, from %u to 1024", threads_, kWarp,
         2 * kWarp);
  try {
    allocate();
    told_ = static_cast<Told *>(gpu_->allocate_pinned(sizeof(Told) * count_));
    progress_ = static_cast<ept_device_progress *>(gpu_->allocate_pinned(sizeof(ept_device_progress) * world_));
    bool calls = false;
    for (uint32_t r = 0; r < world_; r++) {
      peers_[r].same_gpu = same_gpu(places_[r], places_[rank_]);
      peers_[r].same_process = places_[r].on_gpu && places_[r].process == config_.process;
      calls = calls || (places_[r].known && !places_[r].on_gpu);
    }
    if (!all_direct(places_)) net_ = std::make_unique<Net>(gpu_, *arena_, calls);
  } catch (...) {
    give_back();
    throw;
  }
  arena_->list(this);
}

// Zeroed.
void Lanes::allocate() {
  memory_ = heap_ ? heap_->allocate(bytes())
                  : static_cast<char *>(gpu_->allocate_shared(bytes(), ept::cuda::Sharing(config_.share)));
  if (heap_) gpu_->clear(memory_, bytes());
}

Lanes::~Lanes() {
  arena_->unlist(this);
  give_back();
}

void Lanes::give_back() {
  // What a kernel still uses stays: the driver would wait for that one here.
  if (stuck_ && !gpu_->ends(nullptr, now_ns())) return (void)net_.release();
  net_.reset();
  for (const Peer &peer : peers_)
    if (peer.opened) gpu_->close(peer.opened);
  if (own_) gpu_->release(own_);
  if (memory_) heap_ ? heap_->release(memory_) : gpu_->release(memory_);
  if (told_) gpu_->release_pinned(told_);
  if (progress_) gpu_->release_pinned(progress_);
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
  blob.heap_offset = heap_ ? uint64_t(memory_ - heap_->base()) : kNotInHeap;
  const std::string gpu = gpu_->identity(), handle = heap_ ? std::string() : gpu_->share(memory_);
  memcpy(blob.gpu, gpu.data(), std::min(gpu.size(), sizeof blob.gpu));
  return std::string(reinterpret_cast<const char *>(&blob), sizeof blob) + handle;
}

void Lanes::connect(uint32_t rank, const std::string &given) {
  Blob blob{};
  if (given.size() < sizeof blob)
    fail(EPT_E_MISMATCH, int32_t(rank), "rank %u's lanes come in %zu bytes; at least %zu are known", rank, given.size(),
         sizeof blob);
  memcpy(&blob, given.data(), sizeof blob);
  if (blob.magic != kMagic || rank >= world_ || blob.rank != rank)
    fail(EPT_E_MISMATCH, int32_t(rank), "rank %u's lanes are not what this version writes", rank);
  if (blob.world != world_ || blob.lanes != count_ || blob.lane_bytes != lane_bytes_ || blob.bytes != bytes())
    fail(EPT_E_MISMATCH, int32_t(rank),
         "rank %u has %u lanes of %llu bytes for %u ranks; rank %u has %u of %llu for %u", rank, blob.lanes,
         (unsigned long long)blob.lane_bytes, blob.world, rank_, count_, (unsigned long long)lane_bytes_, world_);
  Peer &peer = peers_[rank];
  if (peer.blob == given) return;
  if (peer.opened) gpu_->close(peer.opened);  // of an earlier life of that rank
  peer.opened = nullptr;
  const std::string here = gpu_->identity();
  peer.same_gpu = memcmp(here.data(), blob.gpu, std::min(here.size(), sizeof blob.gpu)) == 0;
  peer.same_process = blob.process == config_.process;
  if (rank == rank_) {
    peer.base = memory_;
  } else if (heap_) {
    const uint64_t here_at = uint64_t(memory_ - heap_->base());
    if (blob.heap_offset != here_at)
      fail(EPT_E_MISMATCH, int32_t(rank),
           "the lanes of rank %u are at %llu of the symmetric heap, and at %llu on rank %u: the AllToAlls of a group "
           "are "
           "made and closed in one order on every rank",
           rank, (unsigned long long)blob.heap_offset, (unsigned long long)here_at, rank_);
    // The heap's memory is no CUDA allocation that IPC could map, so it says itself where a peer's part is.
    char *part = ept::moe::maps(places_[rank], places_[rank_]) ? heap_->mapped(rank) : nullptr;
    peer.initiated = !part;
    peer.base = part ? part + here_at : nullptr;
  } else if (peer.same_process) {
    if (!peer.same_gpu)
      fail(EPT_E_UNSUPPORTED, int32_t(rank),
           "ranks %u and %u are threads of one process on two GPUs, which is not supported yet: run a process for each "
           "GPU (torchrun)",
           rank_, rank);
    peer.base = reinterpret_cast<char *>(uintptr_t(blob.base));
  } else {
    peer.opened = gpu_->open(given.substr(sizeof blob));
    peer.base = static_cast<char *>(peer.opened);
  }
  peer.blob = given;
}

// INVARIANT: of all kernels that wait for peers, every one is on the GPU at the same time, or the one that is waited
// for might not find a place there. A lane has at most one kernel under way, so that is ranks of this GPU x lanes x
// blocks. Where MPS gives each process a share, and there are shares for all of them, it is ranks of this process.
// (Then all processes of the GPU have a share, or none has: who has none counts all ranks, on the whole GPU.)
uint32_t Lanes::sharers() const {
  uint32_t here = 0, own = 0;
  for (const Peer &peer : peers_) {
    here += peer.same_gpu;
    own += peer.same_gpu && peer.same_process;
  }
  const uint32_t processes = own ? (here + own - 1) / own : here;
  return (processes <= gpu_->shares() ? own : here) * count_;
}
uint64_t Lanes::shared(uint32_t threads) const { return least_shared(threads, besides_); }

void Lanes::choose_blocks() {
  const uint32_t room = gpu_->room(threads_, shared(threads_)), sharers = this->sharers();
  blocks_ = config_.blocks ? config_.blocks : room / sharers;
  if (!config_.blocks) blocks_ = std::min(blocks_, kEnoughBlocks);
  const uint32_t alone = gpu_->room(kWide, shared(kWide));  // a block has a multiprocessor
  if (!config_.blocks && gpu_->shares() > 1 && alone)
    blocks_ = std::min(blocks_, std::max(1u, (alone - (alone < kLargeShare ? 0 : kOverlap)) / sharers));
  wide_ = !config_.threads && uint64_t(blocks_) * sharers <= alone;
  if (blocks_ == 0 || uint64_t(blocks_) * sharers > room)
    fail(EPT_E_CONFIG, -1,
         "%u lanes of ranks on this GPU with %u blocks of %u threads each need room for %llu blocks; it has room for "
         "%u: set fewer blocks (EPT_GPU_BLOCKS) or lanes",
         sharers, std::max(blocks_, 1u), threads_, (unsigned long long)std::max(blocks_, 1u) * sharers, room);
}

void Lanes::refuse_wider(const Kernels &kernels) const {
  const uint64_t needed = uint64_t(blocks_) * sharers();
  for (const uint32_t threads : {threads_, wide_ ? kWide : threads_})
    if (kernels.room(threads, shared(threads)) < needed)
      fail(EPT_E_UNSUPPORTED, -1,
           "kernels compiled for this shape leave room for %u blocks of %u threads on the GPU; %llu are needed",
           kernels.room(threads, shared(threads)), threads, (unsigned long long)needed);
}

// Once to know how many bytes, and once more to know where.
void Lanes::lay(char *begin) {
  Carve carve(begin);
  for (Kept &kept : kept_) {
    kept.tickets = carve.take<uint64_t>(uint64_t(world_) * kSignals);
    kept.offsets = carve.take<uint64_t>(uint64_t(world_) * kSignals);
    kept.heard = carve.take<uint64_t>(uint64_t(world_) * EPT_PHASES);
    kept.lands = carve.take<uint64_t>(uint64_t(world_) * EPT_PHASES * EPT_MOE_SLOTS);
    kept.state = carve.take<LaneState>(1);
    kept.done = carve.take<uint32_t>(world_);
    kept.claimed = carve.take<uint32_t>(uint64_t(world_) * 2);
    kept.out = carve.take<uint8_t>(uint64_t(world_) * kSets);
  }
  no_words_ = carve.take<uint64_t>(kSignals);
  kept_bytes_ = carve.bytes();
  paths_.resize(count_), words_.resize(count_), in_.resize(count_);
  for (uint32_t l = 0; l < count_; l++) {
    paths_[l] = carve.take<ept_path>(world_);
    words_[l] = carve.take<uint64_t *>(world_);
    in_[l] = carve.take<char *>(world_);
  }
  own_bytes_ = carve.bytes();
}

uint32_t Lanes::combine_threads(uint64_t tokens) const {
  return wide_ && tokens >= uint64_t(blocks_) * kWideTokens ? kWide : threads_;
}

void Lanes::start() {
  for (uint32_t r = 0; r < world_; r++)
    if (places_[r].known == 1 && (r == rank_ || direct(places_[r], places_[rank_])) && !maps(r) && !initiates(r))
      fail(EPT_E_INVALID, int32_t(r), "rank %u's lanes are not connected", r);
  ranks_here_ = 0;
  for (const Peer &peer : peers_) ranks_here_ += peer.same_process;
  if (ranks_here_ > 1 && gpu_->connections() < kConnections)
    fail(EPT_E_CONFIG, -1,
         "%u ranks of this group are threads of one process on a GPU, and CUDA_DEVICE_MAX_CONNECTIONS is %u here: set "
         "it "
         "to %u before CUDA starts, or their kernels wait behind one another for ever",
         ranks_here_, gpu_->connections(), kConnections);
  choose_blocks();
  lay(nullptr);
  own_ = static_cast<char *>(gpu_->allocate(own_bytes_));
  lay(own_);

  tables_.assign(count_, LaneTable{});
  image_.assign(own_bytes_, 0);
  for (uint32_t l = 0; l < count_; l++) {
    LaneTable &t = tables_[l];
    t.world = world_;
    t.rank = rank_;
    t.lane = l;
    t.map = map_;
    t.timeout_ns = config_.timeout_ns;
    t.epoch = arena_->epoch;
    if (net_) t.acks = net_->acks(l);
    t.proxied = net_ != nullptr;
    for (uint32_t r = 0; r < world_; r++)
      if (initiates(r)) t.initiates |= heap_->mapped(r) ? kNear : kFar;
    t.in = in_[l];
    t.paths = paths_[l];
    t.words = words_[l];
    t.done = kept_[l].done;
    t.claimed = kept_[l].claimed;
    t.tickets = kept_[l].tickets;
    t.offsets = kept_[l].offsets;
    t.heard = kept_[l].heard;
    t.lands = kept_[l].lands;
    t.out = kept_[l].out;
    t.state = kept_[l].state;
    t.told = told_ + l;
    t.group_fault = config_.group_fault;
    for (uint32_t r = 0; r < world_; r++) fill_peer(l, r);
  }
  gpu_->copy_in(own_ + kept_bytes_, image_.data() + kept_bytes_, own_bytes_ - kept_bytes_);
  begin_at({count_, {0, 0}});
  follow();
}

// How kernels of a lane reach a rank, and where its messages come.
void Lanes::fill_peer(uint32_t l, uint32_t r) {
  const auto signals = [&](char *base, uint32_t source) {
    return base + signals_at() + (uint64_t(l) * world_ + source) * kSignals * sizeof(uint64_t);
  };
  ept_path &path = in_image(paths_[l])[r];
  path = ept_path{};
  if (!maps(r) && !initiates(r) && net_) {
    path = net_->path(l, r);
    in_image(words_[l])[r] = net_->words(l, r);
    in_image(in_[l])[r] = net_->memory(l);
    return;
  }
  in_image(words_[l])[r] = reinterpret_cast<uint64_t *>(signals(memory_, r));
  in_image(in_[l])[r] = memory_ + l * lane_bytes_;
  if (initiates(r)) {
    const auto number = [](const char *at) { return uint64_t(reinterpret_cast<uintptr_t>(at)); };
    path.kind = EPT_DEVICE_GPU;
    path.peer = r;
    path.number = heap_->number(r);
    path.memory = heap_->mapped(r) != nullptr;
    path.source = path.window = number(memory_ + l * lane_bytes_);
    path.source_bytes = lane_bytes_;
    path.window_bytes = map_.exported();
    path.signals = number(signals(memory_, rank_));
    path.signal_count = kSignals;
    path.progress = uint64_t(reinterpret_cast<uintptr_t>(progress_ + r));
    return;
  }
  if (!maps(r)) return;  // it takes no part yet
  path.kind = r == rank_ ? EPT_DEVICE_NONE : EPT_DEVICE_MAPPED;
  path.peer = r;
  path.window = uint64_t(reinterpret_cast<uintptr_t>(peers_[r].base + l * lane_bytes_));
  path.window_bytes = map_.exported();
  path.signals = uint64_t(reinterpret_cast<uintptr_t>(signals(peers_[r].base, rank_)));
  path.signal_count = kSignals;
  if (r == rank_) return;
  path.progress = uint64_t(reinterpret_cast<uintptr_t>(progress_ + r));
  path.memory = peers_[r].same_gpu;
  tables_[l].lists |= path.memory;
}

uint64_t Lanes::puts() const {
  uint64_t sum = 0;
  std::vector<uint64_t> counts(uint64_t(world_) * kSignals);
  for (const Kept &kept : kept_) {
    gpu_->copy_out(counts.data(), kept.tickets, counts.size() * sizeof(uint64_t));
    for (uint32_t r = 0; r < world_; r++)
      for (uint32_t s = 0; s < kSignals && initiates(r); s++) sum += counts[r * kSignals + s];
  }
  return sum;
}

void Lanes::write_times(uint64_t *times) {
  for (uint32_t l = 0; l < count_; l++) tables_[l].times = times ? times + l * times_of(blocks_, world_) : nullptr;
}

void Lanes::keep_no_more(const void *memory) {
  std::erase_if(cleared_, [&](const auto &each) { return each.first == memory; });
}

void Lanes::fit(const Object &object) const {
  const LaneMap need = lane_map(object.shape);
  if (object.config.world != world_ || object.config.rank != rank_ || object.config.lanes > count_ ||
      need.dispatch_recv > map_.dispatch_recv || need.combine_recv > map_.combine_recv ||
      need.dispatch_send > map_.dispatch_send || need.combine_send > map_.combine_send)
    fail(EPT_E_INVALID, -1, "an AllToAll of %u lanes of %llu bytes doesn't fit %u lanes of %llu", object.config.lanes,
         (unsigned long long)need.bytes(page_bytes()), count_, (unsigned long long)lane_bytes_);
  if (least_shared(threads_, besides(object)) > shared(threads_))
    fail(EPT_E_INVALID, -1,
         "an AllToAll whose kernels take %llu bytes of a block's shared memory doesn't fit lanes that were made for "
         "%llu",
         (unsigned long long)least_shared(threads_, besides(object)), (unsigned long long)shared(threads_));
  if (object.shape.streams() && opened().heap)
    fail(EPT_E_UNSUPPORTED, -1,
         "with a buffer_bytes of %llu, calls of more than %u tokens would be streamed, which kernels that post by "
         "themselves can't do yet: leave buffer_bytes away, or make max_tokens %u",
         (unsigned long long)object.config.buffer_bytes, object.shape.chunk_tokens, object.shape.chunk_tokens);
  refuse(object);
}

void Lanes::refuse(const Object &object) {
  const uint32_t world = object.config.world;
  if (object.config.num_experts > 65535 || world > 65535)
    fail(EPT_E_UNSUPPORTED, -1, "%u experts on %u ranks; the GPU executor numbers at most 65535 of each",
         object.config.num_experts, world);
  const uint64_t shared = besides(object);
  if (shared > kMostShared)
    fail(EPT_E_UNSUPPORTED, -1,
         "%u tokens, %u experts and %u ranks take %llu bytes of a block's shared memory; the GPU executor has %llu",
         object.shape.max_tokens, object.config.num_experts, world, (unsigned long long)shared,
         (unsigned long long)kMostShared);
}

}  // namespace ept::moe::cuda
