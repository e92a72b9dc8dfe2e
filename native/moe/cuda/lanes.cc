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

constexpr uint32_t kThreads = 512;
// Where a combine's blocks have a multiprocessor each and two tokens or more: they wait for memory, and all threads
// that a multiprocessor takes wait for more of it at a time. With a token a block, what all threads do before it costs
// more.
constexpr uint32_t kWide = 1024, kWideTokens = 2;
// As many ranks may be threads of one process; it is also the most that CUDA has.
constexpr uint32_t kConnections = 32;
// A send's scan and tables in shared memory: what every GPU of sm_80 and later gives a block.
constexpr uint64_t kMostShared = 96 << 10;
constexpr uint64_t kMostWide = 160 << 10;  // a block alone on its multiprocessor, likewise

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
      threads_(config.threads ? config.threads : kThreads),
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
void Lanes::choose_blocks() {
  const uint32_t room = gpu_->room(threads_), sharers = this->sharers();
  blocks_ = config_.blocks ? config_.blocks : room / sharers;
  constexpr uint32_t kEnough = 132;  // more bring nothing: a GPU's memory is busy with as many
  if (!config_.blocks) blocks_ = std::min(blocks_, kEnough);
  wide_ = !config_.threads && uint64_t(blocks_) * sharers <= gpu_->room(kWide);
  if (blocks_ == 0 || uint64_t(blocks_) * sharers > room)
    fail(EPT_E_CONFIG, -1,
         "%u lanes of ranks on this GPU with %u blocks of %u threads each need room for %llu blocks; it has room for "
         "%u: set fewer blocks (EPT_GPU_BLOCKS) or lanes",
         sharers, std::max(blocks_, 1u), threads_, (unsigned long long)std::max(blocks_, 1u) * sharers, room);
}

void Lanes::refuse_wider(const Kernels &kernels) const {
  const uint64_t needed = uint64_t(blocks_) * sharers();
  for (const uint32_t threads : {threads_, wide_ ? kWide : threads_})
    if (kernels.room(threads) < needed)
      fail(EPT_E_UNSUPPORTED, -1,
           "kernels compiled for this shape leave room for %u blocks of %u threads on the GPU; %llu are needed",
           kernels.room(threads), threads, (unsigned long long)needed);
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

// A library that copies does it by all threads of a block, and twice as many have twice as much on the way.
uint32_t Lanes::send_threads(const std::function<uint64_t(uint32_t)> &shared) const {
  bool copies = false;
  for (uint32_t r = 0; r < world_; r++) copies = copies || (initiates(r) && heap_->mapped(r));
  return wide_ && copies && shared(kWide) <= kMostWide ? kWide : threads_;
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
    for (const Peer &peer : peers_) t.initiates |= peer.initiated;
    t.in = in_[l];
    t.paths = paths_[l];
    t.words = words_[l];
    t.done = kept_[l].done;
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
  if (r != rank_) path.progress = uint64_t(reinterpret_cast<uintptr_t>(progress_ + r));
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

// ---- who takes part ----

void Lanes::launch_members(uint32_t lane, const Members &members, uint32_t code, int32_t peer, void *stream) {
  TakeMembers a{};
  if (world_ > TakeMembers::kMost)
    fail(EPT_E_UNSUPPORTED, -1, "masks in a group of %u ranks; kernels know them of at most %u", world_,
         TakeMembers::kMost);
  a.lane = tables_[lane];
  a.membership = members.epoch;
  a.code = code;
  a.peer = peer;
  for (uint32_t r = 0; r < world_; r++)
    if (!members.has(r)) a.out[r / 64] |= 1ull << r % 64;
  gpu_->launch(kKernelTakeMembers, 1, threads_, 0, stream, &a);
  taken_[lane] = members.epoch;
}

void Lanes::take_members(uint32_t lane, bool captures, void *stream) {
  refuse_suspended();
  const std::shared_ptr<const Members> now = arena_->members_of_step();
  if (!whole_) fail(EPT_E_FAULT, -1, "lane %u is faulted: a reset has begun and not ended well", lane);
  if (taken_[lane] == now->epoch) return;
  if (captures)
    fail(EPT_E_FAULT, -1,
         "a graph is captured, and lane %u has not heard of membership %u yet: call check() on the lane's stream "
         "before the capture",
         lane, now->epoch);
  launch_members(lane, *now, 0, -1, stream);
}

void Lanes::refuse_old(uint32_t lane, uint32_t membership, void *stream) {
  const std::shared_ptr<const Members> now = arena_->members();
  if (now->epoch == membership) return;
  // Other ranks may learn of it in another call: only a reset brings all to one place.
  int32_t lost = -1;
  for (uint32_t r = 0; r < world_ && lost < 0; r++)
    if (!now->has(r)) lost = int32_t(r);
  launch_members(lane, *now, uint32_t(lost < 0 ? -EPT_E_FAULT : -EPT_E_PEER_LOST), lost, stream);
  if (lost >= 0)
    fail(EPT_E_PEER_LOST, lost,
         "rank %d was masked since the dispatch (membership %u, now %u): what it had of these tokens is lost; reset, "
         "and dispatch again",
         lost, membership, now->epoch);
  fail(EPT_E_FAULT, -1,
       "the dispatch was under membership %u, which is %u now: reset on every rank, and dispatch again", membership,
       now->epoch);
}

void Lanes::follow() {
  const std::lock_guard<std::mutex> lock(following_);
  const std::shared_ptr<const Members> now = arena_->members();
  for (uint32_t r = 0; r < world_; r++) {
    if (r == rank_) continue;
    const int32_t code = !now->has(r) ? EPT_E_PEER_LOST : arena_->resets(r) ? EPT_E_FAULT : EPT_OK;
    if (code == EPT_OK) continue;
    if (maps(r) || initiates(r))
      std::atomic_ref<int32_t>(progress_[r].status).store(code, std::memory_order_release);
    else if (net_)
      net_->end_waits(r, code);
  }
}

void Lanes::watch() {
  arena_->watch();
  // Held while the engine is asked: a rank that was taken back, and is told so by after_reset, is not lost after it.
  const std::lock_guard<std::mutex> lock(following_);
  for (uint32_t r = 0; r < world_; r++) {
    if (r == rank_ || !(maps(r) || initiates(r))) continue;
    if (ended(info_of(arena_->engine, r).status))
      std::atomic_ref<int32_t>(progress_[r].status).store(EPT_E_PEER_LOST, std::memory_order_release);
  }
}

// ---- reset ----

uint64_t Lanes::step() {
  uint64_t most = 0;
  for (const Kept &kept : kept_) {
    LaneState state;
    gpu_->copy_out(&state, kept.state, sizeof state);
    for (uint64_t sent : state.sent) most = std::max(most, sent);
  }
  return most;
}

std::shared_ptr<void> Lanes::before_reset(const Deadline &deadline) {
  whole_ = false;
  // What kernels have put and that hasn't landed would, later, in slots that begin anew.
  if (heap_) {
    Drain a{tables_[0], 0};
    gpu_->launch(kKernelQuiet, 1, kWarp, 0, nullptr, &a);
    stuck_ = !gpu_->ends(nullptr, deadline.at);
    if (stuck_)
      fail(EPT_E_TIMEOUT, -1,
           "reset: rank %u waited %.3f s for what its kernels have put to arrive, and it hasn't: a card or a peer is "
           "stuck. Reset again; where it stays, end this process, since one rank can't leave the device library",
           rank_, deadline.waited_s());
  }
  if (!net_) return nullptr;
  std::vector<std::array<uint64_t, EPT_PHASES>> next(count_);
  for (uint32_t l = 0; l < count_; l++) {
    LaneState state;
    gpu_->copy_out(&state, kept_[l].state, sizeof state);
    for (uint32_t p = 0; p < EPT_PHASES; p++) next[l][p] = state.sent[p];
  }
  return net_->before_reset(next, deadline);
}

// Since all that are up have come, none of their kernels run: nobody raises a mapped signal before all have met.
void Lanes::after_reset(uint64_t number, uint32_t index, const Deadline &deadline) {
  const uint64_t tag = kTagSideMeet | (number & 0xffffffff) << 16 | (index & 0x7fff) << 1;
  std::vector<std::array<uint64_t, EPT_PHASES>> next(count_, {number, number});
  if (net_) net_->after_reset(next);
  meet(tag, true, deadline);
  begin_at(next);
  {
    const std::lock_guard<std::mutex> lock(following_);
    for (uint32_t r = 0; r < world_; r++)
      if (arena_->members()->has(r))
        std::atomic_ref<int32_t>(progress_[r].status).store(EPT_OK, std::memory_order_release);
  }
  meet(tag | 1, false, deadline);
  whole_ = true;
}

// All that kernels keep, empty and at those generations. Nobody raises a mapped signal meanwhile.
void Lanes::begin_at(const std::vector<std::array<uint64_t, EPT_PHASES>> &next) {
  gpu_->clear(memory_ + signals_at(), bytes() - signals_at());
  gpu_->clear(own_, kept_bytes_);
  memset(told_, 0, sizeof(Told) * count_);
  for (const auto &[memory, bytes] : cleared_) gpu_->clear(memory, bytes);
  const std::shared_ptr<const Members> members = arena_->members();
  for (uint32_t l = 0; l < count_; l++) {
    LaneState state{};
    std::vector<uint64_t> offsets(uint64_t(world_) * kSignals), heard(uint64_t(world_) * EPT_PHASES);
    std::vector<uint8_t> out(uint64_t(world_) * kSets);
    for (uint32_t p = 0; p < EPT_PHASES; p++) {
      state.sent[p] = state.received[p] = next[l][p];
      for (uint32_t r = 0; r < world_; r++) {
        heard[r * EPT_PHASES + p] = next[l][p];
        for (uint32_t slot = 0; slot < EPT_MOE_SLOTS; slot++) {
          const uint64_t first = next[l][p] + ((next[l][p] ^ slot) & 1);  // generation of that slot
          const bool far = !maps(r) && !initiates(r) && net_;
          offsets[r * kSignals + signal_index(p, slot)] = (far ? net_->taken(l, r, p, slot, 0) : 0) - first / 2;
          offsets[r * kSignals + signal_index(p, slot, 1)] = far ? net_->taken(l, r, p, slot, 1) : 0;
        }
        offsets[r * kSignals + grant_index(p)] = !maps(r) && !initiates(r) && net_ ? net_->granted(l, r, p) : 0;
      }
    }
    for (uint32_t set = 0; set < kSets; set++) {
      state.membership[set] = members->epoch;
      for (uint32_t r = 0; r < world_; r++) out[set * world_ + r] = !members->has(r);
    }
    taken_[l] = members->epoch;
    gpu_->copy_in(kept_[l].state, &state, sizeof state);
    gpu_->copy_in(kept_[l].offsets, offsets.data(), offsets.size() * sizeof(uint64_t));
    gpu_->copy_in(kept_[l].heard, heard.data(), heard.size() * sizeof(uint64_t));
    gpu_->copy_in(kept_[l].out, out.data(), out.size());
  }
}

// GPU ranks that are up say where their memory is, which is another one where a rank's process is; and none goes on
// before all are here.
void Lanes::meet(uint64_t tag, bool tell, const Deadline &deadline) {
  Members with = *arena_->members();
  for (uint32_t r = 0; r < world_; r++)
    if (places_[r].known && !places_[r].on_gpu) with.active[r] = 0;
  Bytes mine;
  const std::string blob = exported();
  mine.put(places_[rank_]).put_text(blob.data(), blob.size());
  const auto said = exchange(
      arena_->engine, rank_, with, tag, [&](uint32_t) { return mine.all(); }, deadline, "to reset its GPU's signals");
  if (!tell) return;
  for (uint32_t r = 0; r < world_; r++) {
    if (r == rank_ || !with.has(r)) continue;
    Bytes theirs(said[r]);
    places_[r] = theirs.get<Place>();
    arena_->learn_place(r, places_[r]);
    if (direct(places_[r], places_[rank_]))
      connect(r, theirs.get_text());
    else if (!net_)
      fail(EPT_E_UNSUPPORTED, int32_t(r),
           "rank %u has come back where rank %u can't map its memory, as all ranks of this group do: start it on this "
           "machine, or make a group anew",
           r, rank_);
    for (uint32_t l = 0; l < count_; l++) fill_peer(l, r);
  }
  gpu_->copy_in(own_ + kept_bytes_, image_.data() + kept_bytes_, own_bytes_ - kept_bytes_);
}

void Lanes::fit(const Object &object) const {
  const LaneMap need = lane_map(object.shape);
  if (object.config.world != world_ || object.config.rank != rank_ || object.config.lanes > count_ ||
      need.dispatch_recv > map_.dispatch_recv || need.combine_recv > map_.combine_recv ||
      need.dispatch_send > map_.dispatch_send || need.combine_send > map_.combine_send)
    fail(EPT_E_INVALID, -1, "an AllToAll of %u lanes of %llu bytes doesn't fit %u lanes of %llu", object.config.lanes,
         (unsigned long long)need.bytes(page_bytes()), count_, (unsigned long long)lane_bytes_);
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
  // Beside the rings (shared.h), which are as large for every object.
  const uint64_t tiles = (uint64_t(object.shape.max_tokens) + kWarp - 1) / kWarp;
  const uint64_t shared =
      4 * tiles * world + 8ull * object.config.num_experts + 48ull * world + 8ull * kKept * object.shape.fan() + 64;
  const uint64_t received = 8ull * world * object.local() + 92ull * world + 4ull * world * object.local() +
                            8ull * object.local() + 4ull * world * kept_rows(world) * object.config.top_k + 64;
  // Both halves of a streamed call are one launch; 32 warps know what each of them reads next of each rank.
  const uint64_t together = object.shape.streams() ? shared + received + (64ull + 4 * 32) * world : 0;
  if (shared > kMostShared || received > kMostShared || together > kMostShared)
    fail(EPT_E_UNSUPPORTED, -1,
         "%u tokens, %u experts and %u ranks take %llu bytes of a block's shared memory; the GPU executor has %llu",
         object.shape.max_tokens, object.config.num_experts, world,
         (unsigned long long)std::max({shared, received, together}), (unsigned long long)kMostShared);
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
      if (told.seen == kMembershipField)
        failure(
            "rank %d takes its step under another membership than rank %u: a rank was masked or readmitted between "
            "them. Reset on every rank",
            told.peer, rank_);
      failure("the message of rank %d is not of this step (its %s): every rank must make the same calls in a lane",
              told.peer, fields[std::min<uint64_t>(told.seen, std::size(fields) - 1)]);
      break;
    case kIds:
      failure("topk_ids has %lld; an id is -1 (none) or 0 to %llu. It was sent as -1", (long long)int32_t(told.seen),
              ull(told.expected - 1));
      break;
    case kRoom:  // of the peer that was placed when there was no more room; others' rows may not have been counted
      failure("rank %u received %llu rows or more; the outputs hold %llu. Give larger outputs (max_rows)", rank_,
              ull(told.expected), ull(told.seen));
      break;
    case kRow:
      failure("a row of rank %d is not what its header promised (%llu of %llu)", told.peer, ull(told.seen),
              ull(told.expected));
      break;
    case kLost:
      if (-int32_t(code) == EPT_E_FAULT)
        failure("rank %u waited for rank %d, which has called reset, which abandons this step: reset here too", rank_,
                told.peer);
      failure("rank %u waited for rank %d, which is gone (%s): the signal stands short of %llu", rank_, told.peer,
              ept_code_name(-int32_t(code)), ull(told.expected));
      break;
    case kMembers:
      failure(
          "it sums a dispatch of membership %llu, which is %llu by now: what ranks that were masked had of its "
          "tokens is lost; reset on every rank, and dispatch again",
          ull(told.expected), ull(told.seen));
      break;
    case kCut:
      failure(
          "rank %d cut its message short when %llu of its %llu rows for rank %u were sent: an exception there ended "
          "its call",
          told.peer, ull(told.seen), ull(told.expected), rank_);
      break;
    case kSlot:
      failure("rank %u waited %.1f s for rank %d to have consumed %llu messages; it says %llu", rank_,
              double(config_.timeout_ns) * 1e-9, told.peer, ull(told.expected), ull(told.seen));
      break;
    default:
      failure("the message to rank %d could not be posted (%s)", told.peer, ept_code_name(-int32_t(told.seen)));
  }
}

GpuObject::GpuObject(std::shared_ptr<Lanes> of, const ept_moe_config &config, uint32_t number, const std::string &image)
    : lanes(std::move(of)), object(config), carried(config.lanes), begun(config.lanes) {
  lanes->fit(object);
  // Kernels of a shape are linked with no device library.
  if (!image.empty() && !lanes->opened().heap) {
    kernels = lanes->gpu().load(image.data(), image.size());
    lanes->refuse_wider(*kernels);
  }
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
  sent_.resize(uint64_t(config.lanes) * EPT_PHASES * kTallies);
  table.sent = static_cast<uint64_t *>(lanes->gpu().allocate(sent_.size() * sizeof(uint64_t)));
  table.mirrored = static_cast<uint64_t *>(lanes->gpu().allocate(config.lanes * sizeof(uint64_t)));
  pages_ = static_cast<char *>(lanes->gpu().allocate_pinned(config.lanes * CountsPage::bytes(table.local)));
  table.shape = object.shape;
  if (!streams()) return;
  Carve carve(nullptr);
  cuda::chunk_state(carve, config.world, config.num_experts, object.local());
  chunk_bytes_ = align_up(carve.bytes(), kAlign);
  const uint64_t all = chunk_bytes_ * config.lanes * EPT_PHASES;
  chunks_ = static_cast<char *>(lanes->gpu().allocate(all));
  lanes->keep_clear(chunks_, all);
}

bool GpuObject::counts(uint32_t lane, ept_gpu_counts *to, int32_t *per_expert) const {
  CountsPage &at = *page(lane);
  const auto plain = [](auto &word) { return std::atomic_ref(word).load(std::memory_order_relaxed); };
  for (;;) {  // again where kernels wrote meanwhile: they take longer for two dispatches than this for a copy
    to->epoch = std::atomic_ref(at.epoch).load(std::memory_order_acquire);
    if (to->epoch == 0) return false;
    Counts &from = *at.slot(to->epoch, table.local);
    to->ticket = plain(from.ticket);
    to->rows = plain(from.rows);
    to->fault = -plain(from.fault);
    auto *counts = reinterpret_cast<int32_t *>(&from + 1);
    for (uint32_t e = 0; e < table.local; e++) per_expert[e] = plain(counts[e]);
    std::atomic_thread_fence(std::memory_order_acquire);
    if (plain(at.epoch) == to->epoch) return true;
  }
}

void GpuObject::stats(ept_moe_stats *stats) {
  const std::lock_guard<std::mutex> lock(reading_);
  lanes->gpu().copy_out(sent_.data(), table.sent, sent_.size() * sizeof(uint64_t));
  uint64_t grants = 0;
  for (uint32_t p = 0; p < EPT_PHASES; p++) {
    uint64_t sums[kTallies] = {};
    for (uint32_t i = 0; i < object.config.lanes * kTallies; i++)
      sums[i % kTallies] += sent_[(uint64_t(i / kTallies) * EPT_PHASES + p) * kTallies + i % kTallies];
    stats->generations[p] = sums[kGenerations];
    stats->messages[p] = sums[kMessages];
    stats->bytes[p] = sums[kBytes];
    stats->rows[p] = sums[kRowsSent];
    grants += sums[kGrants];
  }
  stats->grants = grants;
  stats->acks = stats->ack_waits = 0;  // headers tell
}

GpuObject::~GpuObject() {
  if (pages_) lanes->gpu().release_pinned(pages_);
  if (table.mirrored) lanes->gpu().release(table.mirrored);
  if (chunks_) {
    lanes->keep_no_more(chunks_);
    lanes->gpu().release(chunks_);
  }
  if (table.sent) lanes->gpu().release(table.sent);
  if (memory_) lanes->gpu().release(memory_);
}

}  // namespace ept::moe::cuda
