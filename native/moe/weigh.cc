// SPDX-License-Identifier: Apache-2.0
//
// weigh.cc: how an AllToAll comes to its way to ranks that kernels could put to (crossover.h). Collective, a part of
// Arena::create: between what all ranks have said of themselves and what is made for it.
//
// INVARIANTS
//  - All ranks have the same places, so all of them try both ways, or none does; and they choose by the same figures.
//  - The lanes that are tried are of an arena of their own, which goes before the AllToAll's are made: nothing of it is
//    left but the choice.
//  - A try is launched on every rank before anybody waits for one, and all have ended it before the next: no rank's
//    kernels meet those of another try.
//  - Every wait ends: in a kernel by its deadline, or when a peer is gone; on the host by create's deadline.
#include <algorithm>

#include "moe/arena.h"

namespace ept::moe {

namespace {

constexpr uint32_t kTurns = 3;  // of all ways and lengths; a rank's least counts, since what disturbs only adds
// Longer messages are tried at these: both ways are as fast as they get, and it is bounded how long a try takes.
constexpr uint64_t kMostBytes = 1 << 20, kMostOfAll = 16 << 20;

struct Gone {
  Arena &arena;
  const Deadline &deadline;
  // The second: where a peer died, what was posted to it need not end before create says so.
  ~Gone() {
    try {
      arena.close(std::min<uint64_t>(deadline.remaining(), 1'000'000'000));
    } catch (const Failure &) {  // what it held stays the engine's, until that is closed
    }
  }
};

}  // namespace

void Arena::weigh(std::vector<Place> &places, const Object &object, const Members &with, const Deadline &deadline,
                  Side *side) {
  bool puts = false, measures = false, taken = false, keeps = false;
  for (const Place &a : places) {
    measures = measures || (a.known && a.initiates && a.weighs & Place::kMeasures);
    keeps = keeps || (a.known && a.weighs & Place::kKeepsProxy);
    taken = taken || (a.known && a.lanes != Driver::none);
    for (const Place &b : places) puts = puts || (a.known && b.known && initiates(a, b));
  }
  if (!puts) return;
  const auto through_the_proxy = [&] {
    for (Place &place : places) place.initiates = 0;
  };
  // Lanes that ranks without the library are reached by too are one set for the group, and have their way.
  if (taken && !all_direct(places)) {
    if (keeps) through_the_proxy();
    return;
  }
  if (!measures) return;

  uint64_t lengths[kLengths] = {EPT_MOE_HEADER_BYTES, object.message(EPT_PHASE_DISPATCH),
                                object.message(EPT_PHASE_COMBINE)};
  for (uint64_t &length : lengths) length = align_up(std::min({length, kMostBytes, kMostOfAll / world}), kAlign);
  lengths[0] = EPT_MOE_HEADER_BYTES;
  const uint64_t room = *std::max_element(lengths, lengths + kLengths) * world;
  Arena tried(engine);
  const Gone gone{tried, deadline};
  tried.attempts_ = attempts_, tried.attempts_under_ = attempts_under_;
  begin_attempt(with);  // its exchanges have the last one's tags
  constexpr const char *kWhat = "to measure two ways to its peers";
  MakeMemory elsewhere;  // where the lanes' own will be
  if (side) elsewhere = [&](uint64_t bytes) { return side->lane_memory(tried, bytes); };
  tried.grow({room, kAlign, room, kAlign}, 1, with, deadline, kWhat, elsewhere);

  std::unique_ptr<Trial> trial;
  uint64_t number = 0;
  // One after another on all ranks: each begins the next when all have ended this one well.
  const auto step = [&](auto &&body) {
    Failure failed{Error()};
    Bytes said;
    try {
      if (side) body(said);
    } catch (const Failure &failure) {
      failed = failure;
    }
    const auto all = exchange(
        engine, rank, with, kTagWeigh | tried.attempt() | number++,
        [&](uint32_t) { return status(failed).all() + said.all(); }, deadline, kWhat);
    if (failed.error.code) throw failed;
    std::vector<Bytes> rest;
    throw_theirs(all, rank, with, &rest);
    rest[rank] = said;
    return rest;
  };
  step([&](Bytes &) { trial = side->trial(tried, places, lengths, deadline); });
  for (uint32_t turn = 0; turn < kTurns; turn++)
    for (uint32_t i = 0; i < kLengths; i++)
      for (Way way : {Way::puts, Way::proxy}) {
        step([&](Bytes &) { trial->launch(way, i); });
        step([&](Bytes &) { trial->await(way, i); });
      }
  std::vector<Bytes> said = step([&](Bytes &mine) { mine.put(trial->figures()); });
  std::vector<Figures> figures;
  for (uint32_t r = 0; r < world; r++)
    if (with.has(r) && places[r].on_gpu) figures.push_back(said[r].get<Figures>());
  const Choice choice = choose(figures);
  if (side) side->chose(shown(choice, lengths));
  if (choice.way == Way::proxy) through_the_proxy();
}

}  // namespace ept::moe
