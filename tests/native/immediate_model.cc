// SPDX-License-Identifier: Apache-2.0
//
// A walk over every state of a small instance of wire.h section 1: immediates, credits that are the window, grants.
//
// Two ranks; each may write to the other. The window has W residues instead of 1024 and a sender C <= W credits, a
// grant is worth Q of them. The network keeps whatever is in flight and may land any of it next, grants included. The
// application may start a transfer of any kind on any chan at any time, or never. A transfer is forgotten only when it
// has wholly landed and so have all before it, so the state space closes although the number of transfers is not
// bounded: when the walk ends, it has seen all there is for these W, C and Q.
//
// In every state: the signal counts exactly the transfers that are wholly there (never early, twice or lost); the
// receive depth holds what is in flight (C pieces and C / Q grants); live transfers have distinct residues; every
// credit is somewhere; and when nothing is in flight any more the sender can post.
//
// Then each rule of the text is broken, one at a time. A broken rule that the walk does not notice fails this test:
// either the rule is not needed or the walk is blind.

#include <array>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <string>
#include <string_view>
#include <type_traits>
#include <vector>

#include "eptransport/wire.h"

namespace {

// What the walk assumes of the real numbers. Code 1 .. 14 count themselves, 15 is counted by its descriptor.
static_assert(EPT_GRANT_QUANTUM < EPT_IMM_WINDOW, "a window that is not larger than the quantum stands still");
static_assert(EPT_IMM_WINDOW == 1u << EPT_IMM_SEQ_BITS, "seq is n mod the window");
static_assert(EPT_IMM_MAX_PIECES + 1 == EPT_IMM_MANY && EPT_IMM_MANY < 16, "four bits of code");
static_assert(EPT_IMM_SEQ_BITS + EPT_IMM_CHAN_BITS + 4 == 32, "EFA carries 32 bits");

// ---- what can be broken

enum class Break {
  none,
  keep_the_completing_credit,  // not a fault: which of its credits a transfer keeps is free
  return_every_credit,         // a transfer keeps none until its prefix passes
  leave_the_entry,             // the entry is not zeroed
  skip_unfinished,             // the prefix moves past transfers that are not finished
  credits_above_window,
  quantum_not_below_credits,
  grant_before_it_is_full,
  grants_take_credits,
  descriptor_takes_no_credit,
  descriptor_is_not_needed,   // the needed number leaves the descriptor out, though it counts as a piece
  begin_before_posted_whole,  // a transfer begins while an earlier one of that peer has pieces to post
  post_out_of_order,          // transfer n + 1 of a chan goes out before n
  last_piece_raises,          // order is trusted: the piece that was posted last raises the signal
  retry_a_piece,              // a piece whose completion was lost is posted again
  reuse_chan_unfenced,        // a chan is given out again while pieces of the old source are in flight
  drop_early,                 // a piece that lands before anyone asked for the chan is dropped
  void_is_not_told,           // a refused piece is forgotten
  void_is_refunded,           // a refused piece gives its credit back at the sender, and the receiver is not told
  void_raises,                // a transfer with a void piece raises its signal
  void_stays,                 // the entry is zeroed but for the mark of a void piece
};

struct Config {
  Break broken = Break::none;
  int window = 3, credits = 3, quantum = 2;
  int chans = 2;
  unsigned kinds = 0x1f;  // of `kKinds`
  bool both_ways = false;
  bool refusals = false;  // the peer may refuse a piece
  const char *about = "";
};

// ---- the state

constexpr int kMaxWindow = 4, kMaxChans = 2, kMaxLive = 7, kMaxStale = 4;

struct Kind {
  int code, data;  // data pieces; code 15 has a descriptor beside them
};
constexpr std::array<Kind, 5> kKinds{{{1, 1}, {2, 2}, {3, 3}, {15, 1}, {15, 4}}};

struct Transfer {  // sender's and network's side: what is posted and has not landed is in flight
  uint8_t kind, posted, landed;
  uint8_t descriptor_posted, descriptor_landed;
  uint8_t refused;    // pieces of which a VOID is in flight instead
  uint8_t has_void;   // a VOID has landed
  uint8_t forgotten;  // void_is_not_told, void_is_refunded: pieces that never land
  int data() const { return kKinds[kind].data; }
  bool many() const { return kKinds[kind].code == 15; }
  bool posted_whole() const { return posted == data() && descriptor_posted == many(); }
  bool landed_whole() const { return landed == data() && descriptor_landed == many(); }
  int whole_in_flight() const { return posted - landed - refused - forgotten; }
  int in_flight() const { return whole_in_flight() + refused + descriptor_posted - descriptor_landed; }
};

struct Entry {  // receiver's side, one a residue
  uint8_t count, needed, kept, finished, has_void;
};

struct Stale {  // an immediate that belongs to no live transfer: only broken rules make one
  uint8_t used, chan, residue, code;
};

struct Chan {
  uint8_t lives;   // transfers from the first that has not wholly landed to the last begun
  uint8_t first;   // its number, mod W
  uint8_t prefix;  // P as the receiver knows it, mod W
  int8_t ahead;    // signal minus the transfers that have wholly landed
  uint8_t known;   // drop_early: someone has asked for it
  Transfer live[kMaxLive];
  Entry table[kMaxWindow];
};

struct Way {          // pieces go one way, grants come back the other
  uint8_t credits;    // that the sender may spend
  uint8_t ungranted;  // returned, not yet a quantum
  uint8_t grants;     // in flight
  uint8_t withheld;   // grants_take_credits: grants that wait for one
  uint8_t mischief;   // broken rules that strike once have struck
  Chan chan[kMaxChans];
  Stale stale[kMaxStale];
};

struct State {
  Way way[2];
};
static_assert(std::has_unique_object_representations_v<State>, "states are compared as bytes");

// ---- one step

class Model {
 public:
  explicit Model(const Config &config) : c_(config) {}

  State initial() const {
    State s;
    std::memset(&s, 0, sizeof s);
    for (Way &w : s.way) w.credits = static_cast<uint8_t>(c_.credits);
    return s;
  }

  // Calls visit(next state, what happened) for every step that can follow `s`.
  template <class Visit>
  void steps(const State &s, Visit visit) const {
    for (int w = 0; w < (c_.both_ways ? 2 : 1); ++w) {
      begin_transfers(s, w, visit);
      post_pieces(s, w, visit);
      land_pieces(s, w, visit);
      land_stale(s, w, visit);
      mischief(s, w, visit);
    }
    for (int w = 0; w < 2; ++w)
      if (s.way[w].grants) {
        State next = s;
        --next.way[w].grants;
        give(next.way[w].credits, c_.quantum);
        if (broken(Break::grants_take_credits)) ++next.way[1 - w].ungranted, grant(next, 1 - w);
        grant(next, w);
        visit(next, note("way %d: a grant lands", w));
      }
  }

  // What is wrong with `s`, or nothing.
  const char *fault(const State &s) const {
    int moving = 0;
    for (const Way &w : s.way) {
      int pieces = 0, kept = 0;
      for (int i = 0; i < c_.chans; ++i) {
        const Chan &chan = w.chan[i];
        if (chan.ahead > 0) return "a signal is ahead of the transfers that have landed (early or twice)";
        if (chan.ahead < 0) return "a transfer has landed and its signal is lost";
        if (sound() && chan.lives > c_.window) return "two live transfers share a residue";
        if (sound() && chan.first != chan.prefix) return "the prefix is wrong";
        for (int k = 0; k < chan.lives; ++k) pieces += chan.live[k].in_flight();
        for (int r = 0; r < c_.window; ++r) kept += chan.table[r].kept;
      }
      for (const Stale &stale : w.stale) pieces += stale.used;
      const int room = broken(Break::credits_above_window) ? c_.credits : c_.window;
      if (pieces > room) return "more pieces in flight than the receiver has room for";
      if (w.credits > c_.credits) return "the sender has more credits than there are";
      if (w.grants > c_.credits / c_.quantum) return "more grants in flight than the receive reserve holds";
      const int all = w.credits + pieces + kept + w.ungranted + c_.quantum * (w.grants + w.withheld);
      if (sound() && all != c_.credits) return "a credit is lost or made";
      moving += pieces + w.grants;
    }
    if (!moving)
      for (int w = 0; w < (c_.both_ways ? 2 : 1); ++w)
        if (!s.way[w].credits) return "deadlock: nothing is in flight and a sender has no credit";
    return nullptr;
  }

  bool sound() const { return broken(Break::none) || broken(Break::keep_the_completing_credit); }

 private:
  bool broken(Break b) const { return c_.broken == b; }
  static void give(uint8_t &value, int n) { value = static_cast<uint8_t>(value + n); }

  template <class... Args>
  static std::string note(const char *format, Args... args) {
    char text[128];
    std::snprintf(text, sizeof text, format, args...);
    return text;
  }

  // The sender. All transfers to a peer go out one after another, whatever their chan: a transfer begins (its first
  // piece is posted) when the one before it is wholly posted.
  template <class Visit>
  void begin_transfers(const State &s, int w, Visit visit) const {
    if (!broken(Break::begin_before_posted_whole) && !broken(Break::post_out_of_order) && !all_posted(s.way[w])) return;
    for (int i = 0; i < c_.chans; ++i) {
      const Chan &chan = s.way[w].chan[i];
      if (chan.lives == kMaxLive) continue;  // reached by broken rules only; `overflow` tells
      for (unsigned kind = 0; kind < kKinds.size(); ++kind) {
        if (!(c_.kinds >> kind & 1)) continue;
        State next = s;
        Chan &to = next.way[w].chan[i];
        to.live[to.lives++].kind = static_cast<uint8_t>(kind);
        if (broken(Break::post_out_of_order) && all_posted(s.way[w]))
          visit(next, note("way %d: chan %d: a transfer of kind %d is put off", w, i, static_cast<int>(kind)));
        post(next, w, i, to.lives - 1, visit);
      }
    }
  }

  template <class Visit>
  void post_pieces(const State &s, int w, Visit visit) const {
    for (int i = 0; i < c_.chans; ++i)
      for (int k = 0; k < s.way[w].chan[i].lives; ++k)
        if (!s.way[w].chan[i].live[k].posted_whole()) post(s, w, i, k, visit);
  }

  template <class Visit>
  void post(const State &s, int w, int i, int k, Visit visit) const {
    const Transfer &t = s.way[w].chan[i].live[k];
    const bool credit = s.way[w].credits > 0;
    if (credit && t.posted < t.data()) {
      State next = s;
      --next.way[w].credits;
      ++next.way[w].chan[i].live[k].posted;
      visit(next, note("way %d: chan %d: post piece %d of %d of transfer +%d", w, i, t.posted + 1, t.data(), k));
    }
    const bool free = broken(Break::descriptor_takes_no_credit);
    if ((credit || free) && t.many() && !t.descriptor_posted) {
      State next = s;
      if (!free) --next.way[w].credits;
      next.way[w].chan[i].live[k].descriptor_posted = 1;
      visit(next, note("way %d: chan %d: post the descriptor of transfer +%d", w, i, k));
    }
  }

  bool all_posted(const Way &way) const {
    for (int i = 0; i < c_.chans; ++i)
      for (int k = 0; k < way.chan[i].lives; ++k)
        if (!way.chan[i].live[k].posted_whole()) return false;
    return true;
  }

  // The network: any piece in flight may land next.
  template <class Visit>
  void land_pieces(const State &s, int w, Visit visit) const {
    for (int i = 0; i < c_.chans; ++i)
      for (int k = 0; k < s.way[w].chan[i].lives; ++k) {
        const Transfer &t = s.way[w].chan[i].live[k];
        const int residue = (s.way[w].chan[i].first + k) % c_.window;
        if (t.whole_in_flight()) {
          State next = s;
          ++next.way[w].chan[i].live[k].landed;
          arrive(next, w, i, k, residue, kKinds[t.kind].code);
          visit(next, note("way %d: chan %d: a piece of transfer +%d lands", w, i, k));
          if (broken(Break::retry_a_piece) && !s.way[w].mischief) {
            next.way[w].mischief = 1;
            add_stale(next.way[w], i, residue, kKinds[t.kind].code);
            visit(next, note("way %d: chan %d: a piece of transfer +%d lands and is posted again", w, i, k));
          }
          refuse(s, w, i, k, visit);
        }
        if (t.refused) {
          State next = s;
          Transfer &to = next.way[w].chan[i].live[k];
          --to.refused, ++to.landed, to.has_void = 1;
          arrive(next, w, i, k, residue, kKinds[t.kind].code, true);
          visit(next, note("way %d: chan %d: a VOID of transfer +%d lands", w, i, k));
        }
        if (t.descriptor_posted > t.descriptor_landed) {
          State next = s;
          next.way[w].chan[i].live[k].descriptor_landed = 1;
          arrive(next, w, i, k, residue, 0);
          visit(next, note("way %d: chan %d: the descriptor of transfer +%d lands", w, i, k));
        }
      }
  }

  // The peer refuses a piece: it changes nothing there, and its sender learns so and sends a VOID under the same
  // credit.
  template <class Visit>
  void refuse(const State &s, int w, int i, int k, Visit visit) const {
    if (!c_.refusals) return;
    State next = s;
    Transfer &t = next.way[w].chan[i].live[k];
    if (broken(Break::void_is_refunded)) ++next.way[w].credits;
    ++(broken(Break::void_is_not_told) || broken(Break::void_is_refunded) ? t.forgotten : t.refused);
    visit(next, note("way %d: chan %d: a piece of transfer +%d is refused", w, i, k));
  }

  // Lands a piece of a live transfer, and forgets the transfers that have wholly landed and whose forerunners have.
  void arrive(State &s, int w, int i, int k, int residue, int code, bool is_void = false) const {
    Chan &chan = s.way[w].chan[i];
    const Transfer t = chan.live[k];
    if (t.landed_whole() && !t.has_void) --chan.ahead;
    const bool last = t.posted_whole() && (code == 0 || t.landed == t.data());
    receive(s, w, i, residue, code, kKinds[t.kind].data, last, is_void);
    int done = 0;
    while (done < chan.lives && chan.live[done].landed_whole()) ++done;
    if (!done) return;
    std::memmove(chan.live, chan.live + done, sizeof(Transfer) * (kMaxLive - done));
    std::memset(chan.live + kMaxLive - done, 0, sizeof(Transfer) * done);
    chan.lives = static_cast<uint8_t>(chan.lives - done);
    chan.first = static_cast<uint8_t>((chan.first + done) % c_.window);
  }

  // The receiver, as the text has it. `code` 0 stands for a DESCRIPTOR that says `pieces`.
  void receive(State &s, int w, int i, int residue, int code, int pieces, bool last, bool is_void) const {
    Way &way = s.way[w];
    Chan &chan = way.chan[i];
    Entry &entry = chan.table[residue];
    if (broken(Break::drop_early) && !chan.known) {
      ++way.ungranted;
      return grant(s, w);
    }
    const bool free = code == 0 && broken(Break::descriptor_takes_no_credit);
    ++entry.count;
    if (is_void) entry.has_void = 1;
    if (code == 0) entry.needed = static_cast<uint8_t>(pieces + !broken(Break::descriptor_is_not_needed));
    if (code > 0 && code < 15) entry.needed = static_cast<uint8_t>(code);
    const bool complete = broken(Break::last_piece_raises) ? last : entry.needed && entry.count == entry.needed;

    const bool keep = broken(Break::return_every_credit)          ? false
                      : broken(Break::keep_the_completing_credit) ? complete
                                                                  : !entry.kept;
    if (!free) {
      if (keep)
        entry.kept = 1;
      else
        ++way.ungranted;
    }
    if (complete) {
      if (!broken(Break::leave_the_entry)) entry.count = entry.needed = 0;
      if (!entry.has_void || broken(Break::void_raises)) ++chan.ahead;
      if (!broken(Break::void_stays)) entry.has_void = 0;
      entry.finished = 1;
      const int stop = (residue + 1) % c_.window;
      while (broken(Break::skip_unfinished) ? chan.prefix != stop || entry.finished
                                            : chan.table[chan.prefix].finished) {
        Entry &passed = chan.table[chan.prefix];
        give(way.ungranted, passed.kept);
        passed.kept = passed.finished = 0;
        chan.prefix = static_cast<uint8_t>((chan.prefix + 1) % c_.window);
      }
    }
    grant(s, w);
  }

  // Returned credits leave in quanta.
  void grant(State &s, int w) const {
    Way &way = s.way[w];
    const int enough = broken(Break::grant_before_it_is_full) ? c_.quantum - 1 : c_.quantum;
    while (way.ungranted >= enough) {
      way.ungranted = static_cast<uint8_t>(way.ungranted > c_.quantum ? way.ungranted - c_.quantum : 0);
      ++way.withheld;
    }
    Way &back = s.way[1 - w];
    while (way.withheld && (!broken(Break::grants_take_credits) || back.credits)) {
      if (broken(Break::grants_take_credits)) --back.credits;
      --way.withheld;
      ++way.grants;
    }
  }

  // ---- what only broken rules do

  static void add_stale(Way &way, int chan, int residue, int code) {
    for (Stale &stale : way.stale)
      if (!stale.used) {
        stale = Stale{1, static_cast<uint8_t>(chan), static_cast<uint8_t>(residue), static_cast<uint8_t>(code)};
        return;
      }
  }

  template <class Visit>
  void land_stale(const State &s, int w, Visit visit) const {
    for (int k = 0; k < kMaxStale; ++k) {
      const Stale stale = s.way[w].stale[k];
      if (!stale.used) continue;
      State next = s;
      next.way[w].stale[k] = Stale{};
      receive(next, w, stale.chan, stale.residue, stale.code, 0, false, false);
      visit(next, note("way %d: chan %d: an old piece of residue %d lands", w, stale.chan, stale.residue));
    }
  }

  template <class Visit>
  void mischief(const State &s, int w, Visit visit) const {
    if (broken(Break::drop_early))
      for (int i = 0; i < c_.chans; ++i)
        if (!s.way[w].chan[i].known) {
          State next = s;
          next.way[w].chan[i].known = 1;
          visit(next, note("way %d: chan %d: the application waits", w, i));
        }
    if (broken(Break::reuse_chan_unfenced) && !s.way[w].mischief) {
      State next = s;
      next.way[w] = initial().way[w];
      next.way[w].mischief = 1;
      for (int i = 0; i < c_.chans; ++i)
        for (int k = 0; k < s.way[w].chan[i].lives; ++k) {
          const Transfer &t = s.way[w].chan[i].live[k];
          for (int n = t.landed; n < t.posted; ++n)
            add_stale(next.way[w], i, (s.way[w].chan[i].first + k) % c_.window, kKinds[t.kind].code);
        }
      visit(next, note("way %d: its chans are given out again", w));
    }
  }

  Config c_;
};

// ---- the walk

// Breadth first, so that a counterexample is a shortest one. States are found by an open hash table of their numbers.
class Walk {
 public:
  struct Result {
    const char *fault = nullptr;
    size_t states = 0;
    std::vector<std::string> story;
  };

  Walk(const Config &config, size_t limit) : model_(config), limit_(limit) {}

  Result run() {
    slots_.assign(1 << 12, 0);
    Result result;
    add(model_.initial(), 0);
    for (size_t at = 0; at < states_.size() && !result.fault; ++at) {
      const State from = states_[at];
      model_.steps(from, [&](const State &next, const std::string &what) {
        if (result.fault || !add(next, at)) return;
        if ((result.fault = model_.fault(next))) result.story = story(what);
      });
      if (states_.size() > limit_) break;
    }
    result.states = states_.size();
    if (!result.fault && states_.size() > limit_) result.fault = "the walk did not end";
    return result;
  }

 private:
  static uint64_t hash(const State &s) {
    uint64_t h = 0x9e3779b97f4a7c15ull;
    static_assert(sizeof(State) % 2 == 0);
    const unsigned char *bytes = reinterpret_cast<const unsigned char *>(&s);
    size_t i = 0;
    for (; i + 8 <= sizeof s; i += 8) {
      uint64_t word;
      std::memcpy(&word, bytes + i, 8);
      h = (h ^ word) * 0xff51afd7ed558ccdull;
      h ^= h >> 32;
    }
    for (; i < sizeof s; ++i) h = (h ^ bytes[i]) * 0x100000001b3ull;
    return h ^ h >> 29;
  }

  bool add(const State &s, size_t parent) {
    if (2 * states_.size() > slots_.size()) grow();
    uint32_t *slot = find(s);
    if (*slot) return false;
    states_.push_back(s);
    parents_.push_back(static_cast<uint32_t>(parent));
    *slot = static_cast<uint32_t>(states_.size());
    return true;
  }

  uint32_t *find(const State &s) {
    for (size_t at = hash(s);; ++at) {
      uint32_t *slot = &slots_[at & (slots_.size() - 1)];
      if (!*slot || std::memcmp(&states_[*slot - 1], &s, sizeof s) == 0) return slot;
    }
  }

  void grow() {
    slots_.assign(slots_.size() * 4, 0);
    for (size_t i = 0; i < states_.size(); ++i) *find(states_[i]) = static_cast<uint32_t>(i + 1);
  }

  // The way to the last state found: each step is made again to learn its name.
  std::vector<std::string> story(const std::string &last) {
    std::vector<std::string> lines{last};
    for (size_t at = parents_.back(); at != 0; at = parents_[at])
      model_.steps(states_[parents_[at]], [&, found = false](const State &next, const std::string &what) mutable {
        if (found || std::memcmp(&next, &states_[at], sizeof next) != 0) return;
        found = true;
        lines.insert(lines.begin(), what);
      });
    return lines;
  }

  Model model_;
  size_t limit_;
  std::vector<State> states_;
  std::vector<uint32_t> parents_;
  std::vector<uint32_t> slots_;
};

}  // namespace

int main(int argc, char **argv) {
  const bool stories = argc > 1 && std::string_view(argv[1]) == "--stories";
  constexpr size_t kLimit = 4'000'000;
  constexpr unsigned kOne = 1, kTwo = 2, kThree = 4, kShortMany = 8, kLongMany = 16, kAll = 31;
  int failed = 0;

  const Config holds[] = {
      {Break::none, 3, 3, 2, 2, kAll, false, false, "window 3, credits 3, every kind, two chans"},
      {Break::none, 4, 3, 2, 2, kAll, false, false, "window 4, credits 3, every kind, two chans"},
      {Break::none, 4, 4, 2, 2, kAll, false, false, "window 4, credits 4, every kind, two chans"},
      {Break::none, 4, 4, 3, 2, kOne | kTwo | kLongMany, false, false, "window 4, credits 4, quantum 3, two chans"},
      {Break::none, 3, 3, 2, 1, kOne | kTwo, true, false, "both ways at once"},
      {Break::none, 3, 3, 2, 2, kAll, false, true, "the peer may refuse any piece"},
      {Break::keep_the_completing_credit, 3, 3, 2, 2, kAll, false, false,
       "the completing piece's credit is the one kept"},
  };
  for (const Config &config : holds) {
    const Walk::Result r = Walk(config, kLimit).run();
    std::printf("%-6s %9zu states   %s%s%s\n", r.fault ? "FAIL" : "holds", r.states, config.about, r.fault ? ": " : "",
                r.fault ? r.fault : "");
    for (const std::string &line : r.story) std::printf("         %s\n", line.c_str());
    failed += r.fault != nullptr;
  }

  const Config breaks[] = {
      {Break::return_every_credit, 3, 3, 2, 1, kAll, false, false, "a transfer keeps no credit"},
      {Break::leave_the_entry, 3, 3, 2, 1, kAll, false, false, "the entry is not zeroed"},
      {Break::skip_unfinished, 3, 3, 2, 1, kAll, false, false, "the prefix moves past unfinished transfers"},
      {Break::credits_above_window, 3, 4, 2, 1, kAll, false, false, "more credits than the window"},
      {Break::quantum_not_below_credits, 3, 3, 3, 1, kAll, false, false, "credits not above the quantum"},
      {Break::grant_before_it_is_full, 3, 3, 2, 1, kAll, false, false, "a grant leaves before its quantum is full"},
      {Break::grants_take_credits, 3, 3, 2, 1, kOne, true, false, "grants take credits"},
      {Break::descriptor_takes_no_credit, 3, 3, 2, 1, kAll, false, false, "a descriptor takes no credit"},
      {Break::descriptor_is_not_needed, 3, 3, 2, 1, kAll, false, false, "the needed number leaves the descriptor out"},
      {Break::begin_before_posted_whole, 3, 3, 2, 2, kAll, false, false,
       "a transfer begins before the last is posted whole"},
      {Break::post_out_of_order, 3, 3, 2, 1, kAll, false, false, "transfers of a chan are posted out of order"},
      {Break::last_piece_raises, 3, 3, 2, 1, kAll, false, false, "the piece posted last raises the signal"},
      {Break::retry_a_piece, 3, 3, 2, 1, kAll, false, false, "a failed piece is posted again"},
      {Break::reuse_chan_unfenced, 3, 3, 2, 1, kOne | kThree | kShortMany, false, false,
       "a chan is reused without a fence"},
      {Break::drop_early, 3, 3, 2, 1, kAll, false, false, "what lands before anyone waits is dropped"},
      {Break::void_is_not_told, 3, 3, 2, 1, kAll, false, true, "a refused piece is forgotten"},
      {Break::void_is_refunded, 3, 3, 2, 1, kAll, false, true,
       "a refused piece gives its credit back and tells nobody"},
      {Break::void_raises, 3, 3, 2, 1, kAll, false, true, "a transfer with a void piece raises its signal"},
      {Break::void_stays, 3, 3, 2, 1, kAll, false, true, "the mark of a void piece is not zeroed"},
  };
  for (const Config &config : breaks) {
    const Walk::Result r = Walk(config, kLimit).run();
    const bool found = !r.story.empty();
    std::printf("%-6s %9zu states   %s: %s\n", found ? "found" : "MISSED", r.states, config.about,
                found ? (std::string(r.fault) + " after " + std::to_string(r.story.size()) + " steps").c_str()
                      : "the walk sees no difference");
    if (stories)
      for (const std::string &line : r.story) std::printf("         %s\n", line.c_str());
    failed += !found;
  }
  return failed ? 1 : 0;
}
