// SPDX-License-Identifier: Apache-2.0
#include "machine.h"

#include <string.h>
#include <time.h>

#include <string>

#include "../check.h"

namespace simt {

namespace {

constexpr size_t kStack = 64 << 10;
constexpr uint64_t kLate = 1 << 17;   // steps that a block may begin later than others, more than most kernels have
constexpr uint32_t kAsked = 1 << 20;  // turns in which a warp's first thread asks for a copy

uint64_t now_ns() {
  timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return uint64_t(t.tv_sec) * 1'000'000'000 + uint64_t(t.tv_nsec);
}

Fiber *running;
Context scheduler;
std::vector<Fiber *> runnable;
std::vector<std::unique_ptr<Fiber>> all_fibers, idle;

std::string where() {
  return "thread " + std::to_string(running->thread.x) + " of block " + std::to_string(running->block.x);
}

void leave() { running->context.switch_to(scheduler); }

void enter() {
  Context::entered(scheduler);
  Launch &launch = *running->launch;
  launch.entry(launch.argument.data());
  if (!running->copies.empty())
    check::failed(__FILE__, __LINE__, where() + " ends before what it copies out is written");
  launch.left--;
  running->launch = nullptr;
  leave();
}

const uint64_t *meet(Meeting &meeting, uint32_t index, const char *operation, uint64_t value) {
  uint64_t *values = meeting.values.data() + (meeting.turn & 1) * meeting.size;
  values[index] = value;
  if (meeting.arrived == 0)
    meeting.operation = operation;
  else if (strcmp(meeting.operation, operation) != 0)
    check::failed(__FILE__, __LINE__, where() + " is at " + operation + ", others at " + meeting.operation);
  if (++meeting.arrived == meeting.size) {
    meeting.arrived = 0;
    meeting.turn++;
    for (Fiber *fiber : meeting.waiting) runnable.push_back(fiber);
    meeting.waiting.clear();
    runnable.push_back(running);
  } else {
    meeting.waiting.push_back(running);
  }
  leave();
  return values;
}

void check_run(const char *to, const char *from, uint32_t bytes) {
  if (reinterpret_cast<uintptr_t>(to) % 16) misaligned(to);
  if (reinterpret_cast<uintptr_t>(from) % 16) misaligned(from);
  if (bytes % 16 || !bytes) check::failed(__FILE__, __LINE__, where() + " copies " + std::to_string(bytes) + " bytes");
}

void prepare(Meeting &meeting, uint32_t size) {
  meeting.size = size;
  meeting.values.resize(size_t(size) * 2);
}

}  // namespace

std::atomic<uint64_t> ahead;

const Fiber &here() { return *running; }

void yield() {
  runnable.push_back(running);
  leave();
}

const uint64_t *meet_warp(const char *operation, uint64_t value) {
  const uint32_t thread = running->thread.x;
  return meet(running->state->warps[thread / kWarp], thread % kWarp, operation, value);
}

const uint64_t *meet_block(const char *operation, uint64_t value) {
  return meet(running->state->all, running->thread.x, operation, value);
}

void fetch(char *to, const char *from) {
  memset(to, 0xab, 16);
  running->fetches.push_back({to, from, running->groups});
}
void end_fetches() { running->groups++; }
void await_fetches(uint64_t left) {
  auto &fetches = running->fetches;
  for (; !fetches.empty() && fetches.front().group + left < running->groups; fetches.pop_front())
    memcpy(fetches.front().to, fetches.front().from, 16);
}

// The word counts phases that are over.
void make_barrier(uint64_t *barrier) {
  *barrier = 0;
  running->state->arriving[barrier].clear();
}
void copy_in(char *to, const char *from, uint32_t bytes, uint64_t *barrier) {
  check_run(to, from, bytes);
  const auto arriving = running->state->arriving.find(barrier);
  if (arriving == running->state->arriving.end())
    check::failed(__FILE__, __LINE__, where() + " copies by a barrier that nobody has made");
  memset(to, 0xab, bytes);
  arriving->second.push_back({to, from, bytes, 0});
}
void await_copy(uint64_t *barrier, uint32_t parity) {
  auto &arriving = running->state->arriving[barrier];
  for (uint32_t turns = 0; *barrier % 2 == parity && arriving.empty(); turns++) {
    if (turns == kAsked) check::failed(__FILE__, __LINE__, where() + " waits for a copy that nobody asks for");
    yield();  // to who asks for it
  }
  if (*barrier % 2 != parity) return;
  memcpy(arriving.front().to, arriving.front().from, arriving.front().bytes);
  arriving.pop_front();
  ++*barrier;
}
void copy_out(char *to, const char *from, uint32_t bytes) {
  check_run(to, from, bytes);
  running->copies.push_back({to, from, bytes, running->copy_groups});
}
void end_copies() { running->copy_groups++; }
void await_copies() {
  auto &copies = running->copies;
  for (; !copies.empty() && copies.front().group < running->copy_groups; copies.pop_front())
    memcpy(copies.front().to, copies.front().from, copies.front().bytes);
}

void misaligned(const void *address) {
  check::failed(__FILE__, __LINE__, where() + " reads or writes 16 bytes at " + check::show_pointer(address));
}

void Machine::launch(const void *stream, Entry entry, std::vector<char> argument, uint32_t blocks, uint32_t threads,
                     uint64_t shared) {
  auto made = std::make_unique<Launch>();
  made->entry = entry;
  made->argument = std::move(argument);
  made->blocks = blocks;
  made->threads = threads;
  made->shared = shared;
  streams_[stream].push_back(std::move(made));
}

void Machine::begin(const void *stream) {
  Launch &launch = *streams_[stream].front();
  const bool has_copies = copies_.value_or(random_() % 2);
  // Another kernel has the multiprocessor that a block is to begin on.
  const bool waits = launch.blocks > 1 && (held_ || random_() % 4 == 0);
  const uint32_t late = waits ? uint32_t(random_() % launch.blocks) : launch.blocks;
  if (waits) late_.push_back({&launch, held_ ? UINT64_MAX : steps_ + random_() % kLate, {}});
  for (uint32_t b = 0; b < launch.blocks; b++) {
    launch.states.push_back(std::make_unique<BlockState>());
    BlockState &state = *launch.states.back();
    state.warps.resize(launch.threads / kWarp);
    for (Meeting &warp : state.warps) prepare(warp, kWarp);
    prepare(state.all, launch.threads);
    state.has_copies = has_copies;
    state.shared.assign(launch.shared + 16, char(0xab));  // as on a GPU, nobody has zeroed it
    state.memory = state.shared.data() + (16 - reinterpret_cast<uintptr_t>(state.shared.data()) % 16) % 16;
    for (uint32_t t = 0; t < launch.threads; t++) {
      if (idle.empty()) idle.push_back(std::make_unique<Fiber>());
      Fiber *fiber = idle.back().get();
      all_fibers.push_back(std::move(idle.back()));
      idle.pop_back();
      fiber->thread.x = t;
      fiber->block.x = b;
      fiber->threads.x = launch.threads;
      fiber->blocks.x = launch.blocks;
      fiber->state = &state;
      fiber->launch = &launch;
      fiber->fetches.clear();
      fiber->groups = 0;
      fiber->copies.clear();
      fiber->copy_groups = 0;
      fiber->context.prepare(enter, kStack);
      (b == late ? late_.back().fibers : runnable).push_back(fiber);
      launch.left++;
    }
  }
}

// When its time has come, or it is the last of its launch, or nothing else can go on.
void Machine::begin_late() {
  std::erase_if(late_, [&](const Late &block) {
    const bool alone = block.launch->left == block.launch->threads;
    if (steps_ < block.at && !alone && !runnable.empty()) return false;
    if (alone && held_) held_();
    runnable.insert(runnable.end(), block.fibers.begin(), block.fibers.end());
    return true;
  });
}

bool Machine::run(uint64_t deadline_ns) {
  for (auto &[stream, queue] : streams_)
    if (!queue.empty() && queue.front()->states.empty()) begin(stream);
  for (; !runnable.empty() || !late_.empty(); steps_++) {
    if (deadline_ns != UINT64_MAX && steps_ % 1024 == 0 && now_ns() >= deadline_ns) return false;
    if (steps_ % 64 == 0 || runnable.empty()) begin_late();
    if (beside_) beside_();
    const size_t at = random_() % runnable.size();
    running = runnable[at];
    runnable[at] = runnable.back();
    runnable.pop_back();
    scheduler.switch_to(running->context);
    if (running->launch) continue;
    // It has ended; where it was the last of its launch, the next one of the stream begins.
    for (auto &[stream, queue] : streams_) {
      if (queue.empty() || queue.front()->left != 0 || queue.front()->states.empty()) continue;
      queue.pop_front();
      if (!queue.empty()) begin(stream);
    }
  }
  for (auto &[stream, queue] : streams_)
    if (!queue.empty()) check::failed(__FILE__, __LINE__, "threads wait at a meeting to which some will never come");
  for (auto &fiber : all_fibers) idle.push_back(std::move(fiber));
  all_fibers.clear();
  return true;
}

}  // namespace simt
