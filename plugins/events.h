// SPDX-License-Identifier: Apache-2.0
//
// events.h: what a plugin tells at its next poll. An event goes straight into the caller's array while there is room
// and nothing older waits, else into a queue; so events come out in the order in which they were added, whether they
// were found by the poll itself or by another call; and in a poll
// nothing waits unless the array is full. What they point to lives until the poll after.
#pragma once

#include <cstdint>
#include <deque>
#include <string>
#include <vector>

#include "plugin.h"

namespace plugin {

class Events {
 public:
  size_t waiting() const { return waiting_.size(); }
  bool full() const { return count_ == capacity_; }  // in a poll: the caller's array
  size_t room() const { return capacity_ - count_; }
  size_t count() const { return count_; }  // that the caller has by now

  // A poll begins: what the last one showed is gone, and what waited goes out.
  void begin(ept_event *events, size_t capacity) {
    if (!texts_.empty()) texts_.clear();
    if (!shown_.empty()) shown_.clear();
    events_ = events;
    capacity_ = capacity;
    count_ = 0;
    give();
  }
  // It ends: what was added while others waited goes out, as far as there is room. Returns how many the caller has.
  int32_t end() {
    give();
    const size_t count = count_;
    events_ = nullptr;
    capacity_ = count_ = 0;
    return static_cast<int32_t>(count);
  }

  // Of `peer` and its `epoch`; the caller fills in the rest before it adds another. Every completion comes by here, so
  // this one moves no text about.
  ept_event *add(int32_t kind, uint32_t peer, uint32_t epoch) {
    ept_event *event = nullptr;
    if (waiting_.empty() && !full())
      event = &events_[count_++];
    else
      event = &waiting_.emplace_back().event;
    *event = ept_event{};
    event->size = sizeof *event;
    event->kind = kind;
    event->peer = peer;
    event->epoch = epoch;
    return event;
  }
  ept_event *add(int32_t kind, uint32_t peer, uint32_t epoch, std::string text, std::vector<uint8_t> data = {}) {
    const bool straight = waiting_.empty() && !full();
    ept_event *event = add(kind, peer, epoch);
    if (straight) {
      show(event, std::move(text), std::move(data));
    } else {
      waiting_.back().text = std::move(text);
      waiting_.back().data = std::move(data);
    }
    return event;
  }

 private:
  struct Waiting {
    ept_event event;
    std::string text;
    std::vector<uint8_t> data;
  };

  void show(ept_event *event, std::string text, std::vector<uint8_t> data) {
    if (!text.empty()) {
      texts_.push_back(std::move(text));
      event->text = texts_.back().c_str();
    }
    if (!data.empty()) {
      shown_.push_back(std::move(data));
      event->data = shown_.back().data();
    }
  }
  void give() {
    while (!waiting_.empty() && !full()) {
      Waiting &entry = waiting_.front();
      ept_event *event = &events_[count_++];
      *event = entry.event;
      show(event, std::move(entry.text), std::move(entry.data));
      waiting_.pop_front();
    }
  }

  ept_event *events_ = nullptr;
  size_t capacity_ = 0, count_ = 0;
  std::deque<Waiting> waiting_;
  std::deque<std::string> texts_;
  std::deque<std::vector<uint8_t>> shown_;
};

}  // namespace plugin
