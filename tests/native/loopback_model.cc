// SPDX-License-Identifier: Apache-2.0
//
// Ten thousand random operations between three ranks, beside a model that knows every byte: writes of any length to any
// place, through keys that are good, revoked before, revoked meanwhile, or too short; signals, messages, exports that
// come and go. After each poll every byte of every rank is either what the model says or inside a write under way.
#include <algorithm>
#include <iostream>
#include <map>
#include <random>
#include <set>

#include "plugin.h"

using plugin::Event;
using plugin::Group;
using plugin::Options;
using plugin::Rank;

namespace {

const ept_backend &loopback = plugin::built("loopback");

constexpr uint32_t kWorld = 3;
constexpr size_t kArea = 256 << 10, kSlot = 48 << 10, kSlots = 12;

struct Grant {
  uint32_t from, to;
  uint64_t start, length, key;
  ept_region *region;
  bool revoked = false;
};

struct Operation {
  uint32_t from, to;
  int32_t kind;
  std::string bytes;
  uint64_t start = 0;    // in the target's area
  size_t slot = kSlots;  // of the source; kSlots: none
  size_t grant = 0;
  bool bad = false;  // must be refused
  bool ended = false, arrived = false, failed = false;
};

class Model {
 public:
  Model(const Options &options, uint64_t seed) : group_(loopback, kWorld, options), random_(seed) {
    for (uint32_t rank = 0; rank < kWorld; ++rank) {
      areas_[rank].assign(kArea, 0);
      known_[rank].assign(kArea, 0);
      sources_[rank].assign(kSlot * kSlots, 0xee);
      area_mems_[rank] = group_[rank].enroll(areas_[rank].data(), kArea, EPT_ACCESS_REMOTE_WRITE);
      source_mems_[rank] = group_[rank].enroll(sources_[rank].data(), kSlot * kSlots, EPT_ACCESS_LOCAL);
    }
    for (uint32_t pair = 0; pair < 3 * kWorld * kWorld; ++pair) {
      if (pair % kWorld != pair / kWorld % kWorld) grant(pair % kWorld, pair / kWorld % kWorld);
    }
  }

  void run(uint32_t count) {
    while (operations_.size() < count) {
      const uint64_t what = below(100);
      if (what < 2) {
        Grant &old = grants_[below(grants_.size())];
        if (!old.revoked) {
          CHECK_OK(loopback, loopback.region_revoke(area_mems_[old.to], old.from, old.key));
          old.revoked = true;
          grant(old.from, old.to);
        }
      } else if (what < 60) {
        post();
      } else {
        poll(static_cast<uint32_t>(below(kWorld)));
      }
    }
    for (int i = 0; i < 2000; ++i) poll(static_cast<uint32_t>(i) % kWorld);
    uint64_t good = 0, refused = 0, cut = 0;
    for (const Operation &op : operations_) {
      CHECK(op.ended);
      CHECK_EQ(op.arrived, !op.failed);
      if (op.bad) CHECK(op.failed);
      ++(op.arrived ? good : op.bad ? refused : cut);
    }
    CHECK(good > count / 2);
    CHECK(refused > count / 50);
    CHECK(in_flight_.empty());
    std::cout << "    " << good << " arrived, " << refused << " refused, " << cut << " revoked in flight" << std::endl;
  }

 private:
  uint64_t below(uint64_t bound) { return random_() % bound; }

  void grant(uint32_t from, uint32_t to) {
    Grant grant = {from, to, below(kArea - kSlot), 1 + below(kSlot), 0, nullptr};
    const auto [blob, key] = group_[to].grant(area_mems_[to], from, grant.start, grant.length);
    grant.key = key;
    grant.region = group_[from].import(to, blob);
    grants_.push_back(grant);
  }

  bool under_way(uint32_t to, uint64_t start, uint64_t length) const {
    return std::any_of(in_flight_.begin(), in_flight_.end(), [&](uint32_t n) {
      const Operation &op = operations_[n];
      return op.to == to && op.kind == EPT_OP_WRITE && start < op.start + op.bytes.size() && op.start < start + length;
    });
  }

  void post() {
    const auto number = static_cast<uint32_t>(operations_.size());
    Operation op;
    do op.grant = below(grants_.size());
    while (grants_[op.grant].revoked && below(100));  // few try a key that they know is dead
    const Grant &grant = grants_[op.grant];
    op.from = grant.from;
    op.to = grant.to;
    op.kind = below(10) ? EPT_OP_WRITE : below(2) ? EPT_OP_SIGNAL : EPT_OP_SEND;
    op.bad = grant.revoked && op.kind != EPT_OP_SEND;
    Rank &rank = group_[op.from];
    ept_op raw = Rank::signal(op.to, grant.region, number, number);
    raw.kind = op.kind;
    if (op.kind == EPT_OP_SEND) {
      op.bytes = std::string(reinterpret_cast<const char *>(&number), sizeof number) + std::string(below(200), 'x');
      raw.source = op.bytes.data();
      raw.length = op.bytes.size();
    } else if (op.kind == EPT_OP_WRITE) {
      const uint64_t longest = below(3) ? 128 : below(20) ? 4096 : kSlot;
      uint64_t length = below(std::min(longest, grant.length) + 1);
      uint64_t offset = below(grant.length - length + 1);
      if (!below(12)) {  // one byte too far at least
        offset = below(2) ? grant.length - length + 1 : UINT64_MAX - below(length + 1);
        op.bad = true;
      }
      if (!op.bad && under_way(op.to, grant.start + offset, length)) return;
      size_t slot = 0;
      while (slot < kSlots && busy_[op.from].count(slot)) ++slot;
      if (slot == kSlots) return;
      op.bytes.resize(length);
      for (char &byte : op.bytes) byte = static_cast<char>(random_());
      if (length) {
        op.slot = slot;
        std::copy(op.bytes.begin(), op.bytes.end(), sources_[op.from].begin() + static_cast<ptrdiff_t>(slot * kSlot));
      }
      op.start = op.bad ? kArea : grant.start + offset;
      raw.source_mem = source_mems_[op.from];
      raw.source = &sources_[op.from][slot * kSlot];
      raw.offset = offset;
      raw.length = length;
    }
    const int32_t code = rank.post(raw);
    if (code == EPT_LATER) return;
    CHECK_OK(loopback, code);
    if (op.slot < kSlots) busy_[op.from].insert(op.slot);
    operations_.push_back(std::move(op));
    in_flight_.insert(number);
  }

  void poll(uint32_t self) {
    for (const Event &event : group_[self].poll(1 + below(16))) {
      if (event.kind == EPT_EVENT_IMM || event.kind == EPT_EVENT_RECV) {
        uint32_t number = event.immediate;
        if (event.kind == EPT_EVENT_RECV) memcpy(&number, event.bytes.data(), sizeof number);
        Operation &op = operations_.at(number);
        CHECK_EQ(op.to, self);
        CHECK_EQ(op.from, event.peer);
        CHECK(!op.arrived && !op.bad);
        CHECK_EQ(event.length, op.bytes.size());
        op.arrived = true;
        if (op.kind == EPT_OP_SEND) CHECK(event.bytes == op.bytes);
        if (op.kind == EPT_OP_WRITE) {
          std::copy(op.bytes.begin(), op.bytes.end(), known_[self].begin() + static_cast<ptrdiff_t>(op.start));
        }
        if (op.ended) in_flight_.erase(number);
        continue;
      }
      CHECK(event.kind == EPT_EVENT_LOCAL_DONE || event.kind == EPT_EVENT_ERROR);
      const auto number = static_cast<uint32_t>(event.cookie);
      Operation &op = operations_.at(number);
      CHECK_EQ(op.from, self);
      CHECK(!op.ended);
      op.ended = true;
      op.failed = event.kind == EPT_EVENT_ERROR;
      if (op.failed) {
        CHECK_EQ(event.code, EPT_E_ACCESS);
        CHECK(op.bad || grants_[op.grant].revoked);
        CHECK(!op.arrived);
        if (!op.bad && op.kind == EPT_OP_WRITE) partly(op);
      }
      if (op.slot < kSlots) {
        std::fill_n(sources_[self].begin() + static_cast<ptrdiff_t>(op.slot * kSlot), op.bytes.size(), uint8_t{0xee});
        busy_[self].erase(op.slot);
      }
      if (op.failed || op.arrived) in_flight_.erase(number);
    }
    check_bytes(static_cast<uint32_t>(below(kWorld)));
  }

  // A write that was refused halfway: each byte is the old one or the new one.
  void partly(const Operation &op) {
    for (size_t i = 0; i < op.bytes.size(); ++i) {
      uint8_t &known = known_[op.to][op.start + i];
      const uint8_t now = areas_[op.to][op.start + i];
      CHECK(now == known || now == static_cast<uint8_t>(op.bytes[i]));
      known = now;
    }
  }

  void check_bytes(uint32_t rank) {
    std::vector<std::pair<uint64_t, uint64_t>> open;
    for (const uint32_t number : in_flight_) {
      const Operation &op = operations_[number];
      if (op.to == rank && op.kind == EPT_OP_WRITE && !op.bad) open.emplace_back(op.start, op.start + op.bytes.size());
    }
    std::sort(open.begin(), open.end());
    uint64_t at = 0;
    open.emplace_back(kArea, kArea);
    for (const auto &[start, end] : open) {
      if (start > at) CHECK(!memcmp(&areas_[rank][at], &known_[rank][at], start - at));
      at = std::max(at, end);
    }
  }

  Group group_;
  std::mt19937_64 random_;
  std::vector<uint8_t> areas_[kWorld], known_[kWorld], sources_[kWorld];
  ept_mem *area_mems_[kWorld], *source_mems_[kWorld];
  std::vector<Grant> grants_;
  std::vector<Operation> operations_;
  std::set<uint32_t> in_flight_;
  std::set<size_t> busy_[kWorld];
};

}  // namespace

int main() {
  RUN(Model({}, 1).run(10'000));
  RUN(Model({{"tx_depth", "4"}, {"cq_depth", "16"}}, 2).run(10'000));
  RUN(Model({{"adversary", "3"}}, 3).run(10'000));
  RUN(Model({{"adversary", "4"}, {"delay", "60"}, {"chunks", "40"}, {"early_permille", "900"}}, 4).run(10'000));
  return 0;
}
