// SPDX-License-Identifier: Apache-2.0
//
// queue.h: events that wait for a poll.
#pragma once

#include <eptransport/backend.h>

#include <cstddef>
#include <memory>
#include <utility>

namespace loopback {

// An event on its way to poll, with the bytes that it points to, if any.
struct Item {
  ept_event event;
  std::unique_ptr<char[]> owned;
};

// First in, first out, in one array that grows to the longest burst seen and then allocates no more.
class Queue {
 public:
  size_t size() const { return tail_ - head_; }
  bool empty() const { return tail_ == head_; }
  Item &front() { return items_[head_ & mask_]; }
  void pop() { ++head_; }
  Item &push() {
    if (size() == capacity_) grow();
    return items_[tail_++ & mask_];
  }
  void swap(Queue &other) {
    std::swap(items_, other.items_);
    std::swap(capacity_, other.capacity_);
    std::swap(mask_, other.mask_);
    std::swap(head_, other.head_);
    std::swap(tail_, other.tail_);
  }
  template <class Unwanted>
  void remove(Unwanted &&unwanted) {
    size_t kept = head_;
    for (size_t i = head_; i != tail_; ++i) {
      Item &item = items_[i & mask_];
      if (!unwanted(item.event)) {
        if (kept != i) items_[kept & mask_] = std::move(item);
        ++kept;
      }
    }
    tail_ = kept;
  }

 private:
  void grow() {
    const size_t larger = capacity_ ? 2 * capacity_ : 16;
    std::unique_ptr<Item[]> items(new Item[larger]);
    const size_t count = size();
    for (size_t i = 0; i < count; ++i) items[i] = std::move(items_[(head_ + i) & mask_]);
    items_ = std::move(items);
    capacity_ = larger;
    mask_ = larger - 1;
    head_ = 0;
    tail_ = count;
  }
  std::unique_ptr<Item[]> items_;
  size_t capacity_ = 0, mask_ = 0, head_ = 0, tail_ = 0;
};

}  // namespace loopback
