// SPDX-License-Identifier: Apache-2.0
#include "moe/reports.h"

#include <algorithm>

#include "moe/control.h"
#include "moe/object.h"

namespace ept::moe {

namespace {

// The next message with `tag`; empty where there is none.
std::vector<char> next(ept_engine *engine, uint64_t tag, std::vector<char> &buffer, uint32_t *from) {
  size_t length = buffer.size();
  Error error;
  const int32_t code = ept_engine_recv(engine, UINT32_MAX, tag, buffer.data(), &length, from, 0, &error);
  if (code == EPT_E_TIMEOUT || code == EPT_LATER) return {};
  check(code, error);
  return {buffer.data(), buffer.data() + length};
}

}  // namespace

Heard &Reports::sender(uint32_t rank, uint32_t life) {
  Heard &heard = heard_[rank];
  if (life > heard.life) {
    heard = Heard();
    heard.life = life;
  }
  return heard;
}

bool Reports::hear(ept_engine *engine, uint32_t life) {
  const std::lock_guard<std::mutex> lock(mutex_);
  Error error;
  size_t most = 0;
  check(ept_engine_max_message(engine, &most), error);
  std::vector<char> buffer(most);
  uint32_t from = 0;
  bool heard_one = false;
  for (std::vector<char> bytes; !(bytes = next(engine, kTagReset, buffer, &from)).empty();) {
    Report report;
    if (bytes.size() != sizeof report || from >= heard_.size()) continue;
    memcpy(&report, bytes.data(), sizeof report);
    if (report.lives.to != life || report.lives.from < heard_[from].life || report.lane >= report.lanes ||
        report.lanes > kMaxLanes)
      continue;
    Heard &heard = sender(from, report.lives.from);
    if (report.number <= heard.ended_well || report.number < heard.number) continue;
    if (report.number > heard.number) {
      heard.number = report.number;
      heard.reports.assign(report.lanes, Report{});
      heard.have = 0;
    }
    if (report.lane >= heard.reports.size()) continue;
    heard.have += heard.reports[report.lane].number == 0;
    heard.reports[report.lane] = report;
    heard_one = true;
  }
  for (std::vector<char> bytes; !(bytes = next(engine, kTagClean, buffer, &from)).empty();) {
    Clean clean;
    if (bytes.size() != sizeof clean || from >= heard_.size()) continue;
    memcpy(&clean, bytes.data(), sizeof clean);
    if (clean.lives.to != life || clean.lives.from < heard_[from].life) continue;
    Heard &heard = sender(from, clean.lives.from);
    if (clean.answers < heard.clean.answers) continue;
    heard.clean = clean;
    heard_one = true;
  }
  for (std::vector<char> bytes; !(bytes = next(engine, kTagOffer, buffer, &from)).empty();) {
    Offer offer;
    if (bytes.size() < sizeof offer || from >= heard_.size()) continue;
    memcpy(&offer, bytes.data(), sizeof offer);
    if (offer.lives.to != life || offer.lives.from < heard_[from].life || offer.lane >= offer.lanes ||
        offer.lanes > kMaxLanes)
      continue;
    Heard &heard = sender(from, offer.lives.from);
    if (heard.offers.size() != offer.lanes) heard.offers.assign(offer.lanes, std::string()), heard.offered = 0;
    heard.offered += heard.offers[offer.lane].empty();
    heard.offers[offer.lane].assign(bytes.data() + sizeof offer, bytes.size() - sizeof offer);
    heard_one = true;
  }
  return heard_one;
}

bool Reports::resets(uint32_t rank) const {
  const std::lock_guard<std::mutex> lock(mutex_);
  return heard_[rank].number > heard_[rank].ended_well;
}

}  // namespace ept::moe
