// SPDX-License-Identifier: Apache-2.0
//
// strict_presence.h: an endpoint as the other endpoints of this process see it: whom it knows, whether it has receives,
// whether it is polled or asleep. The one thing that domains share, so it has locks of its own, taken last and held
// shortly.
#pragma once

#include <algorithm>
#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <string>

namespace libfabric::strict {

// The addresses in an address vector, and those that were.
class Known {
 public:
  void learn(const std::string &address) {
    std::lock_guard hold(lock_);
    addresses_.insert(address);
    ever_.insert(address);
  }
  void forget(const std::string &address) {
    std::lock_guard hold(lock_);
    const auto found = addresses_.find(address);
    if (found != addresses_.end()) addresses_.erase(found);
  }
  bool has(const std::string &address) const {
    std::lock_guard hold(lock_);
    return addresses_.count(address) > 0;
  }
  bool had(const std::string &address) const {
    std::lock_guard hold(lock_);
    return ever_.count(address) > 0;
  }

 private:
  mutable std::mutex lock_;
  std::multiset<std::string> addresses_;
  std::set<std::string> ever_;
};

class Presence {
 public:
  explicit Presence(std::shared_ptr<Known> known) : known_(std::move(known)) {}

  bool knows(const std::string &address) const { return known_->has(address); }
  bool knew(const std::string &address) const { return known_->had(address); }

  void post_receive() {
    std::lock_guard hold(lock_);
    posted_++;
  }
  // A sender of this process takes one of the receives. Senders of other processes take theirs unseen, so what has
  // completed counts where it is more.
  bool take_receive() {
    std::lock_guard hold(lock_);
    if (posted_ <= std::max(taken_, completed_)) return false;
    taken_++;
    return true;
  }
  void give_receive_back() {
    std::lock_guard hold(lock_);
    taken_--;
  }
  void complete_receive() {
    std::lock_guard hold(lock_);
    completed_++;
  }
  void poll() {
    std::lock_guard hold(lock_);
    polls_++;
    asleep_ = false;
  }
  // It may wait on its descriptor from now on: the next thing that lands wakes it.
  void sleep() {
    std::lock_guard hold(lock_);
    asleep_ = true;
  }
  uint64_t polls() const {
    std::lock_guard hold(lock_);
    return polls_;
  }
  // Does something land that was posted when it had been polled so often?
  bool moves(uint64_t polls) const {
    std::lock_guard hold(lock_);
    return asleep_ || polls_ > polls;
  }

 private:
  const std::shared_ptr<Known> known_;
  mutable std::mutex lock_;
  uint64_t posted_ = 0, taken_ = 0, completed_ = 0, polls_ = 0;
  bool asleep_ = false;
};

// Who is at an address? Nobody of this process: nullptr. `gone`: somebody was, and has closed.
class Registry {
 public:
  static Registry &get() {
    static Registry *registry = new Registry;  // never destroyed: endpoints of static objects may outlive it
    return *registry;
  }
  void enter(const std::string &address, std::shared_ptr<Presence> presence) {
    std::lock_guard hold(lock_);
    present_[address] = std::move(presence);
    gone_.erase(address);
  }
  void leave(const std::string &address) {
    std::lock_guard hold(lock_);
    present_.erase(address);
    gone_.insert(address);
  }
  std::shared_ptr<Presence> find(const std::string &address, bool *gone) const {
    std::lock_guard hold(lock_);
    const auto found = present_.find(address);
    *gone = found == present_.end() && gone_.count(address) > 0;
    return found == present_.end() ? nullptr : found->second;
  }

 private:
  mutable std::mutex lock_;
  std::map<std::string, std::shared_ptr<Presence>> present_;
  std::set<std::string> gone_;
};

}  // namespace libfabric::strict
