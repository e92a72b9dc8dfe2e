// SPDX-License-Identifier: Apache-2.0
//
// ring_model.cc: the lines of device.cuh themselves, walked through every interleaving of small scenarios and every
// value that weak memory allows a load to return.
//
// Each thread of a scenario is a fiber that stops before each operation on shared memory. Memory is a history of stores
// a word: a load may return any store that is not older than what its thread knows of that word. A release hands on
// what its thread knows, an acquire that reads it takes that in; a plain access must know of every access before it
// that it conflicts with, or it is a race. States that were seen before are not walked again. What this leaves out: a
// load that returns a store which comes later (no compiler or machine here does that across an acquire), and a failed
// compare-and-swap that returns an old value.
//
// That it can see: each order and each check of device.cuh is taken away in turn (struct Weak), and the walk must then
// find a race, a wrong count, a lost or doubled command, or a standstill.
#include <ucontext.h>

#include <array>
#include <functional>
#include <unordered_set>
#include <vector>

#include "check.h"
#include "eptransport/device.cuh"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif

using namespace ept::device;

namespace {

constexpr size_t kThreads = 3, kWords = 16, kPlain = 12;

// What a thread, or a store that releases, knows: of each word the oldest store it may return, and how many steps of
// each thread have happened before.
struct Knows {
  std::array<uint8_t, kWords> word{};
  std::array<uint16_t, kThreads> steps{};
  void take(const Knows &more) {
    for (size_t i = 0; i < kWords; i++) word[i] = std::max(word[i], more.word[i]);
    for (size_t i = 0; i < kThreads; i++) steps[i] = std::max(steps[i], more.steps[i]);
  }
};

struct Store {
  uint64_t value;
  Knows released;  // empty: relaxed
};

struct Plain {
  const void *at = nullptr;
  int writer = -1;
  uint16_t written = 0;
  std::array<uint16_t, kThreads> read{};
};

struct Fiber {
  ucontext_t context;
  std::vector<char> stack = std::vector<char>(64 << 10);
  bool done = false, resting = false;
  bool fresh = false;   // its loads return what is newest
  bool looked = false;  // it rests although it has seen what is newest
  bool begun = false;   // stands before an operation, no more before its first line
  size_t stores = 0;    // in all, when it went to rest
  Knows knows, fenced;
  // Hashes that are its whole state, with the scenario: of what its loads returned since it rested; of what it kept
  // from before. A thread that rests looks again at everything, as if for the first time.
  uint64_t heard = 0, kept = 0;
};

struct Weak {  // one thing that is taken away
  bool publish = false, take = false, consumed = false, look = false, seen = false, know = false, full = false;
  bool raise = false, wait = false, count_in = false, done = false;
  bool whose = false, half = false;  // pop's looks at the words' rounds: at all of them, at all but the last word's
};

struct Walk {
  using Body = std::function<void(int)>;
  size_t threads;
  Body body;
  std::function<void()> begin, end;
  Weak weak;
  bool apart = true;

  std::array<Fiber, kThreads> fibers;
  ucontext_t main;
  int running = -1;
  std::vector<const void *> words;
  std::vector<std::vector<Store>> history;
  std::array<Plain, kPlain> plain;
  size_t stores = 0;
  std::vector<uint32_t> choices, limits;  // of this execution
  size_t at = 0;
  std::unordered_set<uint64_t> known_states;
  const char *fault = nullptr;
  bool pruned = false;
  uint64_t executions = 0;

  uint32_t choose(uint32_t limit) {
    if (at == choices.size()) choices.push_back(0), limits.push_back(limit);
    CHECK_EQ(limits[at], limit);  // else an execution is not made again as it was
    return choices[at++];
  }

  size_t word(const void *address) {
    for (size_t i = 0; i < words.size(); i++)
      if (words[i] == address) return i;
    CHECK(words.size() < kWords);
    words.push_back(address);
    history.push_back({{*static_cast<const uint64_t *>(address), {}}});
    return words.size() - 1;
  }

  // ---- what a fiber calls ----
  Fiber &self() { return fibers[size_t(running)]; }
  void step() { swapcontext(&self().context, &main); }
  void wrong(const char *what) {
    if (!fault) fault = what;
    swapcontext(&self().context, &main);
  }
  void hear(uint64_t value) { self().heard = (self().heard ^ value) * 0x9e3779b97f4a7c15ull + 1; }
  void keep(uint64_t value) {
    self().kept = (self().kept ^ value) * 0x9e3779b97f4a7c15ull + 1;
    self().heard = self().kept;
  }

  uint64_t load(const void *address, bool acquire) {
    step();
    return load_now(address, acquire, nullptr);
  }
  // `alike`: as old a store as that word's load has returned.
  uint64_t load_now(const void *address, bool acquire, const void *alike) {
    const size_t w = word(address);
    const auto newest = uint32_t(history[w].size() - 1);
    const uint32_t oldest = self().fresh ? newest : self().knows.word[w];
    const uint32_t pick = alike ? self().knows.word[word(alike)] : newest - choose(newest - oldest + 1);
    self().knows.word[w] = uint8_t(pick);
    const Store store = history[w][pick];
    if (acquire) self().knows.take(store.released);
    hear(store.value ^ uint64_t(pick) << 48);
    return store.value;
  }
  void add(size_t w, uint64_t value, bool release, const Knows &before) {
    Store store{value, before};
    self().knows.word[w] = uint8_t(history[w].size());
    if (release) store.released.take(self().knows), self().knows.steps[size_t(running)]++;
    history[w].push_back(store);
    CHECK(history[w].size() < 200);
    stores++;
    for (Fiber &fiber : fibers) fiber.fresh = fiber.looked = false;
  }
  void store(const void *address, uint64_t value, bool release) {
    step();
    add(word(address), value, release, {});
  }
  // What a fence hands on by the relaxed stores after it.
  Knows fence() {
    const Knows before = self().knows;
    self().knows.steps[size_t(running)]++;
    return before;
  }
  void store_fenced(const void *address, uint64_t value, const Knows &at_fence) {
    add(word(address), value, false, at_fence);
  }
  // A read-modify-write continues the release sequence of the store that it replaces.
  template <class Change>
  uint64_t change(const void *address, bool acquire, bool release, Change &&next) {
    step();
    const size_t w = word(address);
    const Store last = history[w].back();
    self().knows.word[w] = uint8_t(history[w].size() - 1);
    if (acquire) self().knows.take(last.released);
    uint64_t value = last.value;
    if (next(value)) add(w, value, release, last.released);
    hear(last.value);
    return last.value;
  }
  void touch(const void *at_, bool write) {
    Plain *p = &plain_of(at_);
    const auto me = size_t(running);
    Knows &knows = self().knows;
    if (p->writer >= 0 && size_t(p->writer) != me && knows.steps[size_t(p->writer)] < p->written)
      wrong("a race: it does not know of the last write");
    if (write) {
      for (size_t t = 0; t < threads; t++)
        if (t != me && knows.steps[t] < p->read[t]) wrong("a race: it overwrites what another may still be reading");
      p->writer = running;
      p->written = knows.steps[me];
    } else {
      p->read[me] = knows.steps[me];
    }
  }
  // Memory of which each word says whose it is needs to be known by nobody that reads it; but who writes it again knows
  // that it was read.
  Plain &plain_of(const void *at_) {
    for (Plain &each : plain) {
      if (each.at && each.at != at_) continue;
      each.at = at_;
      return each;
    }
    CHECK(false);
    return plain[0];
  }
  void took(const void *at_) { plain_of(at_).read[size_t(running)] = self().knows.steps[size_t(running)]; }
  void refill(const void *at_) {
    const Plain &p = plain_of(at_);
    for (size_t t = 0; t < threads; t++)
      if (int(t) != running && self().knows.steps[t] < p.read[t])
        wrong("a race: it overwrites what another may still be reading");
  }
  void rest() {
    self().resting = true;
    self().looked = self().fresh;
    self().fresh = false;
    self().stores = stores;
    self().heard = self().kept;
    step();
    self().resting = false;
  }

  // ---- the walk ----
  static void enter(int index);
  bool may_run(size_t t) const {
    const Fiber &f = fibers[t];
    return !f.done && (!f.resting || f.fresh || stores > f.stores);
  }
  uint64_t state() const {
    uint64_t h = 14695981039346656037ull;
    const auto mix = [&](uint64_t v) { h = (h ^ v) * 1099511628211ull, h ^= h >> 29; };
    const auto mix_all = [&](const Knows &k) {
      for (uint8_t v : k.word) mix(v);
      for (uint16_t v : k.steps) mix(v);
    };
    for (size_t t = 0; t < threads; t++) {
      const Fiber &f = fibers[t];
      mix(f.heard), mix(f.begun), mix(f.done), mix(f.resting), mix(f.fresh), mix(f.looked),
          mix(f.resting && stores > f.stores), mix(f.kept);
      mix_all(f.knows), mix_all(f.fenced);
    }
    for (const auto &of : history) {
      mix(of.size());
      for (const Store &s : of) mix(s.value), mix_all(s.released);
    }
    for (const Plain &p : plain) {
      mix(reinterpret_cast<uintptr_t>(p.at)), mix(uint64_t(p.writer)), mix(p.written);
      for (uint16_t r : p.read) mix(r);
    }
    return h;
  }

  void execute() {
    words.clear();
    history.clear();
    plain = {};
    stores = 0;
    at = 0;
    pruned = false;
    begin();
    for (size_t t = 0; t < threads; t++) {
      Fiber &f = fibers[t];
      f.done = f.resting = f.fresh = f.looked = f.begun = false;
      f.stores = 0, f.heard = f.kept = 0, f.knows = f.fenced = {};
      f.knows.steps[t] = 1;
#if defined(__SANITIZE_ADDRESS__)
      __asan_unpoison_memory_region(f.stack.data(), f.stack.size());
#endif
      getcontext(&f.context);
      f.context.uc_stack.ss_sp = f.stack.data();
      f.context.uc_stack.ss_size = f.stack.size();
      f.context.uc_link = &main;
      makecontext(&f.context, reinterpret_cast<void (*)()>(&Walk::enter), 1, int(t));
    }
    while (!fault) {
      std::array<size_t, kThreads> ready{};
      uint32_t count = 0;
      bool alive = false;
      for (size_t t = 0; t < threads; t++) {
        alive |= !fibers[t].done;
        if (may_run(t)) ready[count++] = t;
      }
      if (!alive) {
        end();
        return;
      }
      if (!count) {  // all rest: whoever has not seen what is newest looks again
        for (size_t t = 0; t < threads; t++) {
          if (fibers[t].done || fibers[t].looked) continue;
          fibers[t].fresh = true;
          ready[count++] = t;
        }
        if (!count) {
          fault = "a standstill";
          return;
        }
      }
      if (at >= choices.size() && !known_states.insert(state()).second) {
        pruned = true;
        return;
      }
      running = int(ready[choose(count)]);
      fibers[size_t(running)].begun = true;
      swapcontext(&main, &fibers[size_t(running)].context);
    }
  }

  // The first fault, or NULL when all has been walked.
  const char *all() {
    while (true) {
      executions++;
      execute();
      if (fault) return fault;
      while (!choices.empty() && choices.back() + 1 >= limits.back()) choices.pop_back(), limits.pop_back();
      if (choices.empty()) return nullptr;
      choices.back()++;
    }
  }
};

Walk *walk;

void Walk::enter(int index) {
  walk->body(index);
  walk->self().done = true;
}

// The memory of the model, with device.cuh's own names.
struct Model {
  static uint64_t acquire_system(const uint64_t *at) {
    const Weak &w = walk->weak;
    if (!in_slots(at)) return walk->load(at, !(at == consumed_word ? w.look : w.wait));
    const int i = in_slot(at);
    if (i == EPT_SLOT_WORDS - 1) walk->step();
    const int first = walk->apart ? EPT_SLOT_WORDS - 2 : EPT_SLOT_WORDS - 1;
    const uint64_t value = walk->load_now(at, !w.take, i < first ? at + (first - i) : nullptr);
    if (!(w.whose || (w.half && i < EPT_SLOT_WORDS - 1))) return value;
    return (value & ~(uint64_t(1) << 63)) | round_of(end->next, end->capacity);  // taken without a look at its bit
  }
  static int32_t relaxed_system(const int32_t *) { return 0; }
  static uint64_t acquire_device(const uint64_t *at) {
    if (walk->weak.full) return walk->load(at, true) + 64;  // never full
    return walk->load(at, !walk->weak.know);
  }
  static uint64_t relaxed_device(const uint64_t *at) { return walk->load(at, false); }
  static void release_system(uint64_t *at, uint64_t value) {
    walk->store(at, value, !(at == done_word ? walk->weak.done : walk->weak.consumed));
  }
  static void release_device(uint64_t *at, uint64_t value) { walk->store(at, value, !walk->weak.seen); }
  static void add_release_system(uint64_t *at, uint64_t more) {
    walk->change(at, false, !walk->weak.raise, [&](uint64_t &v) { return v += more, true; });
  }
  static uint32_t add_both_device(uint32_t *at, uint32_t more) {
    const bool order = !walk->weak.count_in;
    return uint32_t(walk->change(at, order, order, [&](uint64_t &v) { return v += more, true; }));
  }
  static uint64_t exchange_device(uint64_t *at, uint64_t expected, uint64_t desired) {
    return walk->change(at, false, false, [&](uint64_t &v) { return v == expected && (v = desired, true); });
  }
  static uint64_t now() { return 0; }
  static void spin() { walk->rest(); }
  static void rest() { walk->rest(); }
  static void fence() { walk->self().fenced = walk->weak.publish ? Knows{} : walk->fence(); }
  // Who fills a slot knows that it was taken. That is more than its words need on a machine that makes no load wait for
  // a later store. Six stores, and six loads, are one step each: since a load may return an old value, that shows all
  // that stores one by one would. To keep the walk short all words but the one that pop looks at first are seen alike,
  // as old as one another (`apart`), and in the scenario of two slots that one too.
  static void fill(ept_command_slot *slot, const uint64_t (&words)[EPT_SLOT_WORDS]) {
    walk->step();
    walk->refill(slot);
    for (int i = 0; i < EPT_SLOT_WORDS; i++) walk->store_fenced(&slot->words[i], words[i], walk->self().fenced);
  }
  static void taken(const ept_command_slot *slot) { walk->took(slot); }

  static bool in_slots(const uint64_t *at) {
    const auto *byte = reinterpret_cast<const char *>(at);
    return byte >= reinterpret_cast<const char *>(slots) && byte < reinterpret_cast<const char *>(slots + 8);
  }
  static int in_slot(const uint64_t *at) {
    return int((at - slots[0].words) % ptrdiff_t(sizeof(ept_command_slot) / 8));
  }
  static ept_command_slot slots[8];
  static const uint64_t *consumed_word, *done_word;
  static const RingEnd *end;
};
ept_command_slot Model::slots[8];
const uint64_t *Model::consumed_word, *Model::done_word;
const RingEnd *Model::end;

// ---- scenarios ----

struct RingState {
  ept_ring ring;
  ept_path path;
  uint64_t consumed;
  RingEnd end;
  std::array<uint32_t, 8> got;
  std::array<char, 8> rows;  // one a command: what the team stored before its push
  uint32_t count;
};

// Of command n; each field tells n, so that a command made of two is seen.
ept_command command_of(uint64_t n) {
  ept_command c{};
  c.kind = 1, c.peer = uint32_t(n), c.memory = uint32_t(n + 1), c.region = uint32_t(n + 2), c.signal = uint32_t(n + 3);
  c.source = n, c.destination = ~n, c.bytes = uint64_t(1) << 63 | n;
  return c;
}
bool is_command_of(uint64_t n, const ept_command &c) {
  const ept_command w = command_of(n);
  return c.kind == w.kind && c.peer == w.peer && c.memory == w.memory && c.region == w.region && c.signal == w.signal &&
         c.source == w.source && c.destination == w.destination && c.bytes == w.bytes;
}

constexpr uint64_t kNever = 1ull << 62;

// `producers` push `total` commands, `each` by all but the last, into a ring of `capacity` whose first ticket is
// `first`; one thread pops them all.
const char *ring(uint64_t capacity, uint32_t producers, uint32_t each, uint32_t total, uint64_t first, Weak weak,
                 uint64_t *executions) {
  static RingState s;
  Walk w;
  w.threads = producers + 1;
  w.weak = weak;
  w.apart = capacity == 1;
  w.begin = [&] {
    s = {};
    s.ring.slots = reinterpret_cast<uintptr_t>(Model::slots);
    s.ring.consumed = reinterpret_cast<uintptr_t>(&s.consumed);
    s.ring.mask = uint32_t(capacity - 1);
    s.end = begin_ring(s.ring, Model::slots, &s.consumed, first);
    Model::end = &s.end;
    s.path.kind = EPT_DEVICE_PROXY;
    s.path.ring = reinterpret_cast<uintptr_t>(&s.ring);
    Model::consumed_word = &s.consumed;
  };
  w.body = [&](int me) {
    if (uint32_t(me) < producers) {
      for (uint32_t i = 0; i < each && uint32_t(me) * each + i < total; i++) {
        const uint64_t n = uint64_t(me) * each + i;
        walk->touch(&s.rows[n], true);
        const Put put = push<Model>(s.path, command_of(n), kNever);
        if (put.code != EPT_OK) walk->wrong("a push failed");
        walk->keep(i + 1);
      }
      return;
    }
    while (s.count < total) {
      ept_command command;
      if (!pop<Model>(s.end, command)) {
        Model::rest();
        continue;
      }
      if (command.ticket != first + s.count) walk->wrong("another ticket than the next");
      s.count++;
      walk->keep(command.source);
      if (command.source >= total || s.got[command.source]++) walk->wrong("a command twice, or one that nobody pushed");
      if (!is_command_of(command.source, command)) walk->wrong("a command made of two");
      walk->touch(&s.rows[command.source], false);
      for (uint64_t i = 0; i < command.source % each; i++) {
        if (!s.got[command.source - i - 1]) walk->wrong("a producer's commands out of order");
      }
    }
  };
  w.end = [&] {
    for (uint32_t i = 0; i < total; i++)
      if (s.got[i] != 1) w.fault = "a command is lost";
  };
  walk = &w;
  const char *found = w.all();
  if (executions) *executions = w.executions;
  return found;
}

// Two threads each write a row and raise the signal; the third waits for both.
const char *mapped(Weak weak, uint64_t *executions) {
  static uint64_t signal, rows[2];
  static ept_path path;
  Walk w;
  w.threads = 3;
  w.weak = weak;
  w.begin = [&] {
    signal = 0;
    path = {};
    path.kind = EPT_DEVICE_MAPPED;
    path.signals = reinterpret_cast<uintptr_t>(&signal);
    path.signal_count = 1;
    Model::consumed_word = nullptr;
  };
  w.body = [&](int me) {
    if (me < 2) {
      walk->touch(&rows[me], true);
      if (put<Model>(Thread(), path, nullptr, 0, 0, 0, kNever).code != EPT_OK) walk->wrong("a put failed");
      return;
    }
    const Seen seen = wait<Model>(&signal, 2, kNever);
    if (!seen.came() || seen.count != 2) walk->wrong("a wrong count");
    walk->touch(&rows[0], false);
    walk->touch(&rows[1], false);
  };
  w.end = [] {};
  walk = &w;
  const char *found = w.all();
  if (executions) *executions = w.executions;
  return found;
}

// Two blocks each write a row and count themselves in; the last raises the signal for both.
const char *blocks(Weak weak, uint64_t *executions) {
  static uint64_t signal, rows[2], counter;
  static ept_path path;
  Walk w;
  w.threads = 3;
  w.weak = weak;
  w.begin = [&] {
    signal = counter = 0;
    path = {};
    path.kind = EPT_DEVICE_MAPPED;
    path.signals = reinterpret_cast<uintptr_t>(&signal);
    path.signal_count = 1;
    Model::consumed_word = nullptr;
  };
  w.body = [&](int me) {
    if (me < 2) {
      walk->touch(&rows[me], true);
      if (count_in<Model>(reinterpret_cast<uint32_t *>(&counter)) == 1)
        put<Model>(Thread(), path, nullptr, 0, 0, 0, kNever);
      return;
    }
    if (!wait<Model>(&signal, 1, kNever).came()) walk->wrong("no signal");
    walk->touch(&rows[0], false);
    walk->touch(&rows[1], false);
  };
  w.end = [] {};
  walk = &w;
  const char *found = w.all();
  if (executions) *executions = w.executions;
  return found;
}

// The network reads a source, the proxy says done; flush, then the source is written again.
const char *reuse(Weak weak) {
  static uint64_t row;
  static ept_device_progress progress;
  static ept_path path;
  Walk w;
  w.threads = 2;
  w.weak = weak;
  w.begin = [&] {
    progress = {};
    path = {};
    path.kind = EPT_DEVICE_PROXY;
    path.progress = reinterpret_cast<uintptr_t>(&progress);
    Model::consumed_word = nullptr;
    Model::done_word = &progress.done;
  };
  w.body = [&](int me) {
    if (me == 0) {
      walk->step();
      walk->touch(&row, false);
      Model::release_system(&progress.done, 1);
      return;
    }
    if (!flush<Model>(path, 0, kNever).came()) walk->wrong("no flush");
    walk->touch(&row, true);
  };
  w.end = [] {};
  walk = &w;
  return w.all();
}

void say(const char *name, const char *found, uint64_t executions) {
  std::printf("%-28s %8llu executions: %s\n", name, static_cast<unsigned long long>(executions),
              found ? found : "right");
}

[[maybe_unused]] void as_it_stands() {
  uint64_t n = 0;
  const uint64_t near_end = UINT64_MAX - 1;  // tickets pass 2^64
  const struct {
    const char *name;
    uint64_t capacity;
    uint32_t producers, each, total;
    uint64_t first;
  } rings[] = {{"one slot, two producers", 1, 2, 1, 2, 0},
               {"one slot, over 2^64", 1, 1, 3, 3, near_end},
               {"one slot, over 2^32", 1, 1, 3, 3, 0xffffffffull},
               {"two slots, two producers", 2, 2, 2, 3, near_end}};
  for (const auto &r : rings) {
    const char *found = ring(r.capacity, r.producers, r.each, r.total, r.first, {}, &n);
    say(r.name, found, n);
    CHECK(!found);
  }
  const char *found = mapped({}, &n);
  say("mapped", found, n);
  CHECK(!found);
  found = blocks({}, &n);
  say("count_in", found, n);
  CHECK(!found);
  CHECK(!reuse({}));
}

// Without any one of its orders or checks it is wrong, and the walk sees it.
[[maybe_unused]] void each_is_needed() {
  Weak w;
  const auto ring_needs = [&](const char *name, bool Weak::*what) {
    w = {};
    w.*what = true;
    uint64_t n = 0;
    const char *found = ring(1, 2, 1, 2, 0, w, &n);
    if (!found) found = ring(1, 2, 2, 4, 0, w, &n);
    say(name, found, n);
    CHECK(found);
  };
  ring_needs("without publish's release", &Weak::publish);
  ring_needs("without pop's acquire", &Weak::take);
  ring_needs("without consumed's release", &Weak::consumed);
  ring_needs("without a look's acquire", &Weak::look);
  ring_needs("without the test for full", &Weak::full);
  ring_needs("without seen's release", &Weak::seen);
  ring_needs("without seen's acquire", &Weak::know);
  ring_needs("without whose a word is", &Weak::whose);
  ring_needs("with one word for all six", &Weak::half);
  w = {}, w.raise = true;
  CHECK(mapped(w, nullptr));
  w = {}, w.wait = true;
  CHECK(mapped(w, nullptr));
  w = {}, w.count_in = true;
  CHECK(blocks(w, nullptr));
  w = {}, w.done = true;
  CHECK(reuse(w));
  w = {}, w.wait = true;
  CHECK(reuse(w));
}

}  // namespace

int main() {
  RUN(as_it_stands());
  RUN(each_is_needed());
  return 0;
}
