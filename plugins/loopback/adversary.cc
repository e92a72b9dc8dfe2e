// SPDX-License-Identifier: Apache-2.0
//
// adversary.cc: the hostile route. schedule.h decides, this carries it out.
#include <algorithm>
#include <string>
#include <utility>
#include <vector>

#include "operation.h"
#include "route.h"
#include "schedule.h"

namespace loopback {

namespace {

// The adversary: an operation is held and lands in steps, each in a poll that the schedule drew, shuffled with what
// else falls on that poll: chunks of its bytes, then its event at the target and its LOCAL_DONE in either order (or
// that one first of all, from a copy of the source). An operation can be refused until its last byte has landed;
// LOCAL_DONE is given only when it no longer can. Writes into memory of role SIGNAL go straight, as their strict order
// demands.
class Adversary final : public Route {
 public:
  explicit Adversary(ept_worker &worker)
      : Route(worker), schedule_(instance_.settings.malice, instance_.rank, instance_.epoch), wheel_(256) {}

  ~Adversary() override {
    for (Flight &flight : flights_) take_back(flight);
  }

  int32_t post(const ept_op *ops, size_t count, size_t *posted) override {
    const size_t taken = schedule_.takes(count);
    while (*posted < taken) {
      const ept_op &op = ops[*posted];
      if (const int32_t code = admit(worker_, op); code != EPT_OK) return code;
      const Verdict verdict = embark(op);
      if (verdict == Verdict::kFull || verdict == Verdict::kConnecting) return EPT_LATER;
      accepted(worker_, op);
      ++*posted;
      ++posted_;
      const Malice &malice = instance_.settings.malice;
      if (malice.lose_rank == instance_.rank && posted_ == malice.lose_after) vanish();
      if (malice.silent_rank == instance_.rank && posted_ >= malice.silent_after) silent_ = true;
    }
    return taken < count ? EPT_LATER : EPT_OK;
  }

  void tick() override {
    std::vector<Step> &bucket = wheel_[++now_ % wheel_.size()];
    std::vector<Step> due;
    due.swap(bucket);
    if (silent_) {
      // Nothing of it moves any more, until a link is down: then what went over it can end.
      due.insert(due.end(), held_.begin(), held_.end());
      held_.clear();
      const auto stays = std::partition(due.begin(), due.end(), [&](const Step &step) { return is_down(step); });
      held_.assign(stays, due.end());
      due.erase(stays, due.end());
    }
    schedule_.shuffle(due);
    for (const Step &step : due) take(step);
    due.clear();
    if (bucket.empty()) bucket.swap(due);  // keeps its room
  }

  bool idle() const override { return flying_ == 0 || silent_; }

  bool settled(uint32_t rank, int32_t scope) const override {
    return std::none_of(flights_.begin(), flights_.end(), [&](const Flight &flight) {
      return flight.steps && (rank == UINT32_MAX || flight.op.peer == rank) &&
             (!flight.told || (scope == EPT_SCOPE_REMOTE && !flight.over));
    });
  }

  void drop(uint32_t rank, int32_t code, const char *why) override {
    for (Flight &flight : flights_) {
      if (flight.steps && flight.op.peer == rank) end(flight, code, why);
    }
  }

  size_t reading(const ept_mem *mem) const override {
    return static_cast<size_t>(std::count_if(flights_.begin(), flights_.end(), [&](const Flight &flight) {
      return flight.steps && !flight.over && !flight.told && !flight.parcel && flight.op.source_mem == mem;
    }));
  }

 private:
  struct Flight {
    ept_op op = {};
    ept_region region = {};           // the caller may drop its own while we fly
    Peer peer;                        // as it was when the operation was posted
    std::unique_ptr<char[]> message;  // of a SEND
    std::shared_ptr<Parcel> parcel;   // the bytes, where LOCAL_DONE comes before them
    uint32_t steps = 0;               // in the wheel; 0: the slot is free
    uint32_t chunks = 0;              //   of these, chunks
    bool told = false;                // LOCAL_DONE or ERROR was given
    bool over = false;                // nothing of it will touch the target any more
    bool fails = false;
    bool sure = false;  // can't be refused any more: all landed, or LOCAL_DONE is on its way
  };
  enum class What { kChunk, kAnnounce, kLocalDone };
  struct Step {
    uint32_t flight;
    What what;
    uint64_t offset, length;
  };

  bool is_down(const Step &step) {
    const Peer &peer = flights_[step.flight].peer;
    std::lock_guard hold(peer.port->lock);
    return peer.link->state == LinkState::kDown;
  }

  Verdict embark(const ept_op &op) {
    const Peer &peer = instance_.peers[op.peer];
    std::unique_lock hold(peer.port->lock);
    if (op.kind == EPT_OP_WRITE && op.region->role == EPT_ROLE_SIGNAL) {
      const Verdict verdict = carry(instance_.port, peer, hold, op);
      if (verdict != Verdict::kFull && verdict != Verdict::kConnecting) conclude(worker_, op, peer, verdict);
      return verdict;
    }
    const Verdict verdict = op.kind == EPT_OP_SEND ? check_link(*peer.link)
                                                   : check(*instance_.port, peer, *op.region, op.offset, op.length);
    if (verdict == Verdict::kConnecting) return verdict;

    const uint32_t slot = free_slot();
    Flight &flight = flights_[slot];
    flight.op = op;
    if (op.region) flight.region = *op.region;
    flight.op.region = nullptr;
    flight.peer = peer;
    flight.fails = schedule_.fails() && op.kind == EPT_OP_WRITE;  // a lost message or grant would cost the peer
    bool early = schedule_.early() && !flight.fails && verdict == Verdict::kLanded;
    const uint64_t bytes = op.kind == EPT_OP_WRITE ? op.length : 0;
    if (op.kind == EPT_OP_SEND) flight.message = copy_of(op.source, op.length);
    if (early && bytes) {
      uint8_t *const destination = peer.port->exports[op.region->slot].base + op.offset;
      std::unique_ptr<char[]> held(new char[bytes]);
      if (move(held.get(), op.source, bytes)) {
        flight.parcel =
            std::make_shared<Parcel>(Parcel{peer.link, op.region->slot, destination, std::move(held), bytes, false});
        flight.op.source = flight.parcel->bytes.get();
        peer.port->parcels.push_back(flight.parcel);
      } else {
        early = false, flight.fails = true;
      }
    }
    flight.sure = early;
    for (const auto &[offset, length] : schedule_.cut(bytes)) {
      ++flight.chunks;
      plan(slot, What::kChunk, offset, length);
    }
    if (!flight.chunks) plan(slot, What::kAnnounce);
    if (early) plan(slot, What::kLocalDone);
    ++flying_;
    return Verdict::kLanded;
  }

  uint32_t free_slot() {
    if (unused_.empty()) {
      flights_.emplace_back();
      return static_cast<uint32_t>(flights_.size() - 1);
    }
    const uint32_t slot = unused_.back();
    unused_.pop_back();
    return slot;
  }

  void plan(uint32_t slot, What what, uint64_t offset = 0, uint64_t length = 0) {
    ++flights_[slot].steps;
    wheel_[(now_ + 1 + schedule_.delay()) % wheel_.size()].push_back({slot, what, offset, length});
  }

  void take(const Step &step) {
    Flight &flight = flights_[step.flight];
    switch (step.what) {
      case What::kChunk:
        --flight.chunks;
        if (!flight.over) land_chunk(step);
        break;
      case What::kAnnounce:
        if (!flight.over) arrive(step.flight);
        break;
      case What::kLocalDone:
        if (!flight.told) {
          flight.told = true;
          done(worker_, flight.op, EPT_EVENT_LOCAL_DONE, flight.peer.epoch);
        }
        break;
    }
    if (--flight.steps == 0) {
      take_back(flight);
      flight = Flight();
      unused_.push_back(step.flight);
      --flying_;
    }
  }

  void land_chunk(const Step &step) {
    Flight &flight = flights_[step.flight];
    if (flight.fails && !flight.chunks) return end(flight, EPT_E_IO, "the adversary failed it");
    std::unique_lock hold(flight.peer.port->lock);
    const bool landed = flight.parcel && flight.parcel->landed;
    Verdict verdict = landed ? check_link(*flight.peer.link)  // all of it is checked before any part lands
                             : check(*instance_.port, flight.peer, flight.region, flight.op.offset, flight.op.length);
    if (!landed && verdict == Verdict::kLanded) {
      verdict = land(*instance_.port, flight.peer, hold, flight.region, flight.op.offset + step.offset,
                     static_cast<const char *>(flight.op.source) + step.offset, step.length);
    }
    const bool through = !flight.chunks || verdict != Verdict::kLanded;
    if (through && flight.parcel) std::erase(flight.peer.port->parcels, flight.parcel);
    hold.unlock();
    if (verdict != Verdict::kLanded) return refused(flight, verdict);
    if (flight.chunks) return;
    plan(step.flight, What::kAnnounce);
    if (!flight.sure) plan(step.flight, What::kLocalDone);
    flight.sure = true;
  }

  void arrive(uint32_t slot) {
    Flight &flight = flights_[slot];
    if (flight.fails) return end(flight, EPT_E_IO, "the adversary failed it");
    Port &target = *flight.peer.port;
    std::unique_lock hold(target.lock);
    const Verdict verdict = flight.sure || flight.op.kind == EPT_OP_SEND
                                ? check_link(*flight.peer.link)
                                : check(*instance_.port, flight.peer, flight.region, flight.op.offset, 0);
    if (verdict != Verdict::kLanded) {
      hold.unlock();
      return refused(flight, verdict);
    }
    if (target.full()) return plan(slot, What::kAnnounce);
    announce(*instance_.port, target, flight.op, std::move(flight.message));
    flight.over = true;
    if (!flight.sure) plan(slot, What::kLocalDone);
  }

  void take_back(Flight &flight) {
    if (!flight.parcel) return;
    std::lock_guard hold(flight.peer.port->lock);
    std::erase(flight.peer.port->parcels, flight.parcel);
  }

  void refused(Flight &flight, Verdict verdict) {
    end(flight, code_of(verdict), sentence(verdict, flight.op, flight.peer));
  }

  // The rest of its steps do nothing. Where LOCAL_DONE was given, only the peer's loss can bring us here, and its PEER
  // event tells of that.
  void end(Flight &flight, int32_t code, const std::string &why) {
    if (flight.over) return;
    flight.over = true;
    if (flight.told) return;
    flight.told = true;
    failed(worker_, flight.op, flight.peer.epoch, code, why);
  }

  // As if this rank's cable had been pulled: everybody loses it, and it loses everybody.
  void vanish() {
    std::lock_guard hold(the_switch().lock);
    const std::string why = "the adversary took rank " + std::to_string(instance_.rank) + " away after " +
                            std::to_string(posted_) + " operations";
    for (Peer &peer : instance_.peers) sever(*instance_.job, *instance_.port, peer, true, why);
  }

  Schedule schedule_;
  std::vector<std::vector<Step>> wheel_;
  std::vector<Flight> flights_;
  std::vector<uint32_t> unused_;
  std::vector<Step> held_;  // once it is silent
  bool silent_ = false;
  uint64_t now_ = 0, flying_ = 0, posted_ = 0;
};

}  // namespace

std::unique_ptr<Route> make_adversary(ept_worker &worker) { return std::make_unique<Adversary>(worker); }

}  // namespace loopback
