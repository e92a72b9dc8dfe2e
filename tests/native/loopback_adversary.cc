// SPDX-License-Identifier: Apache-2.0
//
// The adversary of loopback: that it is as hostile as it says, that it is the same for the same seed, and that it keeps
// the contract all the same. One thread drives all ranks, so every schedule here can be made again.
#include <algorithm>
#include <map>
#include <numeric>
#include <set>

#include "plugin.h"

using plugin::Event;
using plugin::Group;
using plugin::Options;
using plugin::Rank;
using plugin::Window;

namespace {

const ept_backend &loopback = plugin::built("loopback");
const Options kHostile = {{"adversary", "11"}};

Options hostile(Options more) {
  more.insert(kHostile.begin(), kHostile.end());
  return more;
}

bool all(const uint8_t *bytes, size_t length, uint8_t value) {
  return std::all_of(bytes, bytes + length, [&](uint8_t byte) { return byte == value; });
}

// Posts all by fours, polling between; returns how often it was told so.
uint64_t post_all(Rank &rank, const std::vector<ept_op> &ops, std::vector<Event> *events) {
  uint64_t later = 0;
  for (size_t at = 0; at < ops.size();) {
    size_t posted = 0;
    const size_t count = std::min<size_t>(ops.size() - at, 4);
    const int32_t code = loopback.post(rank.worker, &ops[at], count, &posted);
    if (code < 0) check::failed(__FILE__, __LINE__, plugin::error_text(loopback));
    CHECK_EQ(code == EPT_OK, posted == count);
    at += posted;
    later += code == EPT_LATER;
    const std::vector<Event> more = rank.poll();
    events->insert(events->end(), more.begin(), more.end());
  }
  return later;
}

// Moves on `rank` until nothing of its own is left, one poll at a time; `look` sees every state between.
template <class Look>
void run_out(Rank &rank, std::vector<Event> *events, Look &&look) {
  CHECK_OK(loopback, loopback.quiesce(rank.worker, UINT32_MAX, EPT_SCOPE_REMOTE, 77));
  for (int polls = 0; polls < 10'000; ++polls) {
    for (Event &event : rank.poll()) {
      if (event.kind == EPT_EVENT_QUIESCED && event.cookie == 77) return;
      events->push_back(event);
    }
    look();
  }
  CHECK(!"never quiet");
}

// What a whole run shows: every event of both sides, in order, and the target's bytes after every poll.
std::string trace(const std::string &seed) {
  Group group(loopback, 2, {{"adversary", seed}, {"fail_permille", "50"}}, {.job = "trace" + seed});
  Window window(group[0], group[1], 4096);
  std::iota(window.source.begin(), window.source.end(), 1);
  std::string seen;
  const auto note = [&](const std::vector<Event> &events) {
    for (const Event &event : events) {
      seen += std::to_string(event.kind) + "," + std::to_string(event.immediate) + "," + std::to_string(event.cookie) +
              "," + std::to_string(event.rail) + ";";
    }
    seen += std::to_string(std::count(window.bytes.begin(), window.bytes.end(), 0)) + "\n";
  };
  uint32_t sent = 0;
  for (int poll = 0; poll < 600; ++poll) {
    if (sent < 64) {
      ept_op op =
          Rank::write(1, window.source_mem, &window.source[sent * 64], window.region, sent * 64, 64, sent, sent);
      op.rail = sent % 4;
      const int32_t code = group[0].post(op);
      seen += code == EPT_LATER ? "later " : "taken ";
      sent += code == EPT_OK;
    }
    note(group[0].poll());
    note(group[1].poll());
  }
  return seen;
}

void the_same_seed_gives_the_same_schedule() {
  const std::string first = trace("5");
  CHECK(first == trace("5"));
  CHECK(first != trace("6"));
  CHECK_HAS(first, "later");
}

void bytes_land_in_part_before_their_signal() {
  Group group(loopback, 2, kHostile);
  Window window(group[0], group[1], 1000);
  uint64_t partial = 0, gaps = 0;
  for (uint32_t n = 0; n < 50; ++n) {
    std::fill(window.bytes.begin(), window.bytes.end(), uint8_t{0});
    std::fill(window.source.begin(), window.source.end(), static_cast<uint8_t>(n + 1));
    std::vector<Event> own;
    post_all(group[0], {Rank::write(1, window.source_mem, window.source.data(), window.region, 0, 1000, n, n)}, &own);
    bool arrived = false;
    run_out(group[0], &own, [&] {
      const auto landed = std::count(window.bytes.begin(), window.bytes.end(), static_cast<uint8_t>(n + 1));
      for (const Event &event : group[1].poll()) {
        CHECK_EQ(event.kind, EPT_EVENT_IMM);
        CHECK_EQ(event.immediate, n);
        CHECK_EQ(landed, 1000);  // never early
        arrived = true;
      }
      if (landed && landed < 1000) {
        CHECK(!arrived);
        ++partial;
        const auto end = std::find(window.bytes.rbegin(), window.bytes.rend(), static_cast<uint8_t>(n + 1)).base();
        gaps += std::count(window.bytes.begin(), end, 0) != 0;  // a later part is there and an earlier isn't
      }
    });
    if (!arrived) CHECK_EQ(group[1].expect(EPT_EVENT_IMM).immediate, n);
    CHECK(all(window.bytes.data(), 1000, static_cast<uint8_t>(n + 1)));
    group[1].expect_nothing(3);
  }
  CHECK(partial > 50);
  CHECK(gaps > 20);
}

void operations_overtake_and_interleave() {
  Group group(loopback, 3, hostile({{"later_permille", "300"}}));
  Window zero(group[0], group[2], 64 * 64), one(group[1], group[2], 64 * 64);
  std::vector<Event> own[2];
  std::vector<ept_op> ops[2];
  for (uint32_t n = 0; n < 64; ++n) {
    ops[0].push_back(Rank::write(2, zero.source_mem, &zero.source[64 * n], zero.region, 64 * n, 64, n, n));
    ops[1].push_back(Rank::write(2, one.source_mem, &one.source[64 * n], one.region, 64 * n, 64, n, n));
    ops[0].back().rail = ops[1].back().rail = n % 4;
  }
  std::vector<std::pair<uint32_t, uint32_t>> order;  // source, number
  const auto look = [&] {
    for (const Event &event : group[2].poll()) order.emplace_back(event.peer, event.immediate);
  };
  uint64_t later = post_all(group[0], ops[0], &own[0]);
  later += post_all(group[1], ops[1], &own[1]);
  for (int i = 0; i < 1000; ++i) {
    for (uint32_t rank : {0u, 1u}) {
      for (Event &event : group[rank].poll()) own[rank].push_back(event);
      look();
    }
  }
  CHECK_EQ(order.size(), 128);
  uint64_t overtaken = 0, switches = 0, far = 0;
  for (size_t i = 1; i < order.size(); ++i) switches += order[i].first != order[i - 1].first;
  uint32_t newest[2] = {0, 0};
  for (const auto &[source, number] : order) {
    overtaken += number < newest[source];
    far += number + 16 < newest[source];
    newest[source] = std::max(newest[source], number);
  }
  CHECK(later > 0);
  CHECK(overtaken > 30);  // later ones first
  CHECK(far > 3);         //   and some a whole generation late
  CHECK(switches > 20);   // two sources interleaved
  for (const auto &events : own) CHECK_EQ(events.size(), 64);
}

void local_completion_says_nothing_of_the_target() {
  Group group(loopback, 2, kHostile);
  Window window(group[0], group[1], 256);
  uint64_t before_bytes = 0, before_imm = 0, after_imm = 0;
  for (uint32_t n = 1; n <= 100; ++n) {
    std::fill(window.source.begin(), window.source.end(), static_cast<uint8_t>(n));
    std::vector<Event> own;
    post_all(group[0], {Rank::write(1, window.source_mem, window.source.data(), window.region, 0, 256, n, n)}, &own);
    bool done = false, arrived = false;
    const auto look = [&] {
      for (const Event &event : group[1].poll()) {
        CHECK_EQ(event.kind, EPT_EVENT_IMM);
        CHECK(all(window.bytes.data(), 256, static_cast<uint8_t>(n)));
        arrived = true;
      }
      if (own.empty() || done) return;
      done = true;
      CHECK_EQ(own[0].kind, EPT_EVENT_LOCAL_DONE);
      // The source may be reused: what lands yet is not what we write into it now.
      std::fill(window.source.begin(), window.source.end(), uint8_t{0xee});
      before_bytes += !all(window.bytes.data(), 256, static_cast<uint8_t>(n));
      ++(arrived ? after_imm : before_imm);
    };
    run_out(group[0], &own, look);
    look();
    CHECK(done && arrived);
    CHECK_EQ(own.size(), 1);
  }
  CHECK(before_bytes > 5);
  CHECK(before_imm > 10);
  CHECK(after_imm > 10);
}

void messages_overtake_too() {
  Group group(loopback, 2, kHostile);
  std::vector<std::string> texts;
  std::vector<ept_op> ops;
  for (uint64_t n = 0; n < 50; ++n) texts.push_back("message " + std::to_string(n));
  for (uint64_t n = 0; n < 50; ++n) ops.push_back(Rank::message(1, texts[n], n));
  std::vector<Event> own;
  post_all(group[0], ops, &own);
  std::vector<std::string> got;
  for (std::string &text : texts) text = "overwritten";
  const auto look = [&] {
    for (const Event &event : group[1].poll()) got.push_back(event.bytes);
  };
  run_out(group[0], &own, look);
  look();
  CHECK_EQ(own.size(), 50);
  CHECK_EQ(got.size(), 50);
  CHECK_EQ(std::set<std::string>(got.begin(), got.end()).size(), 50);
  CHECK(!std::is_sorted(got.begin(), got.end()));
  for (const std::string &text : got) CHECK_HAS(text, "message ");
}

void failures_are_told_once_and_signal_nothing() {
  Group group(loopback, 2, hostile({{"fail_permille", "300"}}));
  Window window(group[0], group[1], 64 * 200);
  std::fill(window.source.begin(), window.source.end(), uint8_t{1});
  std::vector<ept_op> ops;
  for (uint32_t n = 0; n < 200; ++n) {
    const size_t length = n % 8 ? 64 : 0;
    ops.push_back(Rank::write(1, window.source_mem, &window.source[64 * n], window.region, 64 * n, length, n, n));
  }
  std::vector<Event> own;
  std::map<uint32_t, int> imms;
  const auto look = [&] {
    for (const Event &event : group[1].poll()) ++imms[event.immediate];
  };
  post_all(group[0], ops, &own);
  run_out(group[0], &own, look);
  look();
  std::map<uint64_t, int> ends;
  uint64_t failed = 0, half = 0;
  for (const Event &event : own) {
    const auto n = static_cast<uint32_t>(event.cookie);
    ++ends[event.cookie];
    CHECK_EQ(imms[n], event.kind == EPT_EVENT_LOCAL_DONE ? 1 : 0);
    if (event.kind != EPT_EVENT_ERROR) continue;
    ++failed;
    CHECK_EQ(event.code, EPT_E_IO);
    CHECK(!event.words.empty());
    half += std::count(&window.bytes[64 * n], &window.bytes[64 * n] + 64, 1) != 0;
  }
  CHECK_EQ(ends.size(), 200);
  for (const auto &[cookie, times] : ends) CHECK_EQ(times, 1);
  CHECK(failed > 30 && failed < 90);
  CHECK(half > 5);  // a failed operation may have landed in part
  uint64_t errors = 0;
  for (uint32_t rail = 0; rail < 4; ++rail) errors += group[0].count(rail).errors;
  CHECK_EQ(errors, failed);
}

void a_revoke_meets_them_in_flight() {
  uint64_t landed = 0, refused = 0;
  for (uint32_t round = 0; round < 40; ++round) {
    Group group(loopback, 2, {{"adversary", std::to_string(round + 1)}}, {.job = "revoke"});
    Window window(group[0], group[1], 64 * 32);
    std::fill(window.source.begin(), window.source.end(), uint8_t{1});
    std::vector<ept_op> ops;
    for (uint32_t n = 0; n < 32; ++n) {
      ops.push_back(Rank::write(1, window.source_mem, &window.source[64 * n], window.region, 64 * n, 64, n, n));
    }
    std::vector<Event> own;
    post_all(group[0], ops, &own);
    for (uint32_t polls = 0; polls < round % 20; ++polls) {
      for (const Event &event : group[0].poll()) own.push_back(event);
    }
    CHECK_OK(loopback, loopback.region_revoke(window.mem, 0, window.key));
    const std::vector<uint8_t> still = window.bytes;
    std::set<uint32_t> imms;
    const auto look = [&] {
      CHECK(window.bytes == still);
      for (const Event &event : group[1].poll()) {
        CHECK(imms.insert(event.immediate).second);
        CHECK(all(&window.bytes[64 * event.immediate], 64, 1));
      }
    };
    run_out(group[0], &own, look);
    look();
    CHECK_EQ(own.size(), 32);
    for (const Event &event : own) {
      const bool whole = event.kind == EPT_EVENT_LOCAL_DONE;
      if (!whole) CHECK_EQ(event.code, EPT_E_ACCESS);
      CHECK_EQ(imms.count(static_cast<uint32_t>(event.cookie)), whole);
      ++(whole ? landed : refused);
    }
  }
  CHECK(landed > 100 && refused > 100);
}

// A write that ends outside its region lands no part of it, not even the parts that lie inside.
void out_of_bounds_lands_no_part() {
  Group group(loopback, 2, hostile({{"later_permille", "0"}}));
  Window window(group[0], group[1], 1000);
  const auto [blob, key] = group[1].grant(window.mem, 0, 0, 999);
  ept_region *region = group[0].import(1, blob);
  std::fill(window.source.begin(), window.source.end(), uint8_t{1});
  for (uint32_t n = 0; n < 50; ++n) {
    CHECK_EQ(group[0].post(Rank::write(1, window.source_mem, window.source.data(), region, 0, 1000, n, n)), EPT_OK);
  }
  std::vector<Event> own;
  run_out(group[0], &own, [&] { CHECK(all(window.bytes.data(), 1000, 0)); });
  CHECK_EQ(own.size(), 50);
  for (const Event &event : own) CHECK_EQ(event.code, EPT_E_ACCESS);
  group[1].expect_nothing(3);
}

// What was landed by a revoke, or by a poll, is not landed a second time over what came after it.
void nothing_lands_twice() {
  Group group(loopback, 2, hostile({{"early_permille", "1000"}, {"later_permille", "0"}}));
  Window window(group[0], group[1], 64);
  const auto [blob, key] = group[1].grant(window.mem, 0, 0, 64);
  ept_region *second = group[0].import(1, blob);
  std::fill(window.source.begin(), window.source.end(), uint8_t{1});
  std::vector<Event> own;
  CHECK_EQ(group[0].post(Rank::write(1, window.source_mem, window.source.data(), window.region, 0, 64, 1, 1)), EPT_OK);
  CHECK_OK(loopback, loopback.region_revoke(window.mem, 0, window.key));
  CHECK(all(window.bytes.data(), 64, 1));
  std::fill(window.bytes.begin(), window.bytes.end(), uint8_t{9});
  run_out(group[0], &own, [] {});
  group[1].expect(EPT_EVENT_IMM);
  CHECK(all(window.bytes.data(), 64, 9));
  CHECK_EQ(group[0].post(Rank::write(1, window.source_mem, window.source.data(), second, 0, 64, 1, 1)), EPT_OK);
  run_out(group[0], &own, [] {});
  group[1].expect(EPT_EVENT_IMM);
  std::fill(window.bytes.begin(), window.bytes.end(), uint8_t{9});
  CHECK_OK(loopback, loopback.region_revoke(window.mem, 0, key));
  CHECK(all(window.bytes.data(), 64, 9));
}

void quiesce_waits_for_what_is_held() {
  Group group(loopback, 2, hostile({{"early_permille", "1000"}, {"later_permille", "0"}}));
  Window window(group[0], group[1], 64);
  uint64_t local_first = 0;
  for (uint32_t n = 0; n < 50; ++n) {
    CHECK_EQ(group[0].post(Rank::write(1, window.source_mem, window.source.data(), window.region, 0, 64, n, 5)),
             EPT_OK);
    CHECK_OK(loopback, loopback.quiesce(group[0].worker, 1, EPT_SCOPE_REMOTE, 2));
    CHECK_OK(loopback, loopback.quiesce(group[0].worker, 1, EPT_SCOPE_LOCAL, 1));
    std::vector<uint64_t> order;
    bool arrived = false;
    while (order.size() < 3) {
      for (const Event &event : group[0].poll()) {
        order.push_back(event.cookie);
        if (event.kind != EPT_EVENT_QUIESCED) continue;
        arrived |= !group[1].poll().empty();
        if (event.cookie == 1) local_first += !arrived;
        if (event.cookie == 2) CHECK(arrived);
      }
    }
    CHECK_EQ(std::find(order.begin(), order.end(), 5) - order.begin(), 0);
    if (!arrived) group[1].expect(EPT_EVENT_IMM);
  }
  CHECK(local_first > 5);
  int descriptor = -1;
  CHECK_EQ(loopback.arm(group[0].worker, &descriptor), EPT_OK);
  CHECK_EQ(group[0].post(Rank::signal(1, window.region, 1, 1)), EPT_OK);
  CHECK_EQ(loopback.arm(group[0].worker, &descriptor), EPT_LATER);  // it needs polls
}

void a_source_in_use_stays_registered() {
  Group group(loopback, 2, hostile({{"early_permille", "0"}, {"later_permille", "0"}}));
  Window window(group[0], group[1], 64);
  CHECK_EQ(group[0].post(Rank::write(1, window.source_mem, window.source.data(), window.region, 0, 64, 1, 1)), EPT_OK);
  CHECK_EQ(group[0].release(window.source_mem), EPT_E_INVALID);
  CHECK_HAS(plugin::error_text(loopback), "1 operations still read from it");
  std::vector<Event> own;
  run_out(group[0], &own, [] {});
  CHECK_OK(loopback, group[0].release(window.source_mem));
}

void closing_a_peer_ends_what_is_held() {
  Group group(loopback, 2, hostile({{"early_permille", "0"}, {"later_permille", "0"}, {"delay", "254"}}));
  Window window(group[0], group[1], 64 * 20);
  for (uint32_t n = 0; n < 20; ++n) {
    CHECK_EQ(group[0].post(Rank::write(1, window.source_mem, window.source.data(), window.region, 64 * n, 64, n, n)),
             EPT_OK);
  }
  CHECK_OK(loopback, loopback.peer_close(group[0].instance, 1));
  const std::vector<uint8_t> still = window.bytes;
  std::set<uint64_t> ended;
  for (const Event &event : group[0].poll()) {
    CHECK_EQ(event.kind, EPT_EVENT_ERROR);
    CHECK_EQ(event.code, EPT_E_CLOSED);
    CHECK(ended.insert(event.cookie).second);
  }
  CHECK_EQ(ended.size(), 20);
  CHECK_OK(loopback, group[0].release(window.source_mem));  // nothing reads it any more
  group[0].expect_nothing(1000);
  CHECK(window.bytes == still);
  CHECK_EQ(group[1].expect(EPT_EVENT_PEER).code, EPT_E_PEER_LOST);
}

void a_rank_disappears() {
  Group group(loopback, 3, hostile({{"lose_rank", "1"}, {"lose_after", "30"}, {"later_permille", "0"}}));
  Window there(group[0], group[1], 64), away(group[1], group[2], 64), aside(group[0], group[2], 64);
  std::map<uint32_t, std::vector<int32_t>> lost;
  uint64_t taken = 0, ended = 0;
  for (uint32_t n = 0; n < 2000; ++n) {
    if (n < 60 &&
        group[1].post(Rank::write(2, away.source_mem, away.source.data(), away.region, 0, 64, n, n)) == EPT_OK)
      ++taken;
    if (n < 60) {
      CHECK_EQ(group[0].post(Rank::write(1, there.source_mem, there.source.data(), there.region, 0, 64, n, n)), EPT_OK);
      CHECK_EQ(group[0].post(Rank::write(2, aside.source_mem, aside.source.data(), aside.region, 0, 64, n, n)), EPT_OK);
    }
    for (uint32_t rank = 0; rank < 3; ++rank) {
      for (const Event &event : group[rank].poll()) {
        if (event.kind == EPT_EVENT_PEER) {
          CHECK_EQ(event.code, EPT_E_PEER_LOST);
          CHECK_HAS(event.words, "rank 1 away after 30 operations");
          lost[rank].push_back(static_cast<int32_t>(event.peer));
        }
        if (event.kind == EPT_EVENT_IMM) CHECK(lost[rank].empty() || event.peer != 1);
        if (rank == 0 && event.peer == 2) CHECK_EQ(event.kind, EPT_EVENT_LOCAL_DONE);  // costs nobody else anything
        if (rank == 1 && (event.kind == EPT_EVENT_LOCAL_DONE || event.kind == EPT_EVENT_ERROR)) ++ended;
        if (event.kind == EPT_EVENT_ERROR) CHECK_EQ(event.code, EPT_E_PEER_LOST);
      }
    }
  }
  CHECK_EQ(taken, ended);
  CHECK(lost[0] == std::vector<int32_t>({1}));
  CHECK(lost[1] == std::vector<int32_t>({0, 2}));
  CHECK(lost[2] == std::vector<int32_t>({1}));
}

// Memory of role SIGNAL: polled words, so the last posted write wins.
void polled_words_keep_their_order() {
  Group group(loopback, 2, hostile({{"later_permille", "0"}}));
  Window window(group[0], group[1], 8, EPT_ROLE_SIGNAL);
  std::vector<uint64_t> values(500);
  std::iota(values.begin(), values.end(), 1);
  ept_mem *mem = group[0].enroll(values.data(), 8 * values.size());
  for (const uint64_t &value : values) {
    CHECK_EQ(group[0].post(Rank::write(1, mem, &value, window.region, 0, 8, 1, 1)), EPT_OK);
    uint64_t word;
    memcpy(&word, window.bytes.data(), 8);
    CHECK_EQ(word, value);
    group[0].poll();
    group[1].poll();
  }
}

}  // namespace

int main() {
  RUN(the_same_seed_gives_the_same_schedule());
  RUN(bytes_land_in_part_before_their_signal());
  RUN(operations_overtake_and_interleave());
  RUN(local_completion_says_nothing_of_the_target());
  RUN(messages_overtake_too());
  RUN(failures_are_told_once_and_signal_nothing());
  RUN(a_revoke_meets_them_in_flight());
  RUN(out_of_bounds_lands_no_part());
  RUN(nothing_lands_twice());
  RUN(quiesce_waits_for_what_is_held());
  RUN(a_source_in_use_stays_registered());
  RUN(closing_a_peer_ends_what_is_held());
  RUN(a_rank_disappears());
  RUN(polled_words_keep_their_order());
  return 0;
}
