// SPDX-License-Identifier: Apache-2.0
#include "library.h"

#include <stdlib.h>
#include <string.h>

#include <algorithm>
#include <atomic>

#include "../check.h"
#include "machine.h"

namespace simt {

constexpr uint64_t kAlign = 256, kPiece = 48, kLazy = 256;

Library *library;

class Part final : public ept::moe::cuda::Heap {
 public:
  Part(Library &library, uint32_t rank) : library_(library), rank_(rank), base_(library.parts_[library.number(rank)]) {}
  char *allocate(uint64_t bytes) override {
    char *here = base_ + used_;
    used_ += (bytes + kAlign - 1) / kAlign * kAlign;
    if (used_ > library_.bytes_) check::failed(__FILE__, __LINE__, "the heap of fibers is too small");
    return here;
  }
  void release(char *) override {}
  char *base() const override { return base_; }
  uint32_t number(uint32_t rank) const override { return library_.number(rank); }
  char *mapped(uint32_t rank) const override {
    return !library_.maps || library_.maps(rank_, rank) ? library_.parts_[library_.number(rank)] : nullptr;
  }

 private:
  Library &library_;
  const uint32_t rank_;
  char *const base_;
  uint64_t used_ = 0;
};

Library::Library(uint32_t ranks, uint64_t bytes, uint64_t seed) : bytes_(bytes), random_(seed) {
  for (uint32_t r = 0; r < ranks; r++) {
    parts_.push_back(static_cast<char *>(aligned_alloc(4096, bytes)));
    memset(parts_.back(), 0xcd, bytes);  // as on a GPU, nobody has zeroed it
  }
  library = this;
}
Library::~Library() {
  library = nullptr;
  for (char *part : parts_) free(part);
}

std::shared_ptr<ept::moe::cuda::Heap> Library::heap(uint32_t rank) { return std::make_shared<Part>(*this, rank); }

// An address here names that place of another rank's part. Of whose part it is, says where it lies.
char *Library::there(const void *here, uint32_t number) const {
  const char *at = static_cast<const char *>(here);
  for (char *part : parts_)
    if (at >= part && at < part + bytes_) return parts_[number] + (at - part);
  check::failed(__FILE__, __LINE__, "a put outside the symmetric heap");
}

void Library::put(const void *to, const void *from, uint64_t bytes, const uint64_t *signal, uint32_t number) {
  const std::lock_guard<std::mutex> lock(mutex_);
  Put put{there(to, number), static_cast<const char *>(from), bytes, nullptr, {}, {}};
  if (signal) put.signal = reinterpret_cast<uint64_t *>(there(signal, number));
  (void)there(from, 0);
  for (uint64_t at = 0; at < bytes; at += kPiece) put.pieces.push_back(at);
  std::shuffle(put.pieces.begin(), put.pieces.end(), random_);
  under_way_.push_back(std::move(put));
  ahead += costs;
  puts_++;
}

void Library::part(const void *to, const void *from, uint64_t bytes, uint32_t number) {
  const std::lock_guard<std::mutex> lock(mutex_);
  Put put{there(to, number), nullptr, bytes, nullptr, {}, {}};
  put.stored.assign(static_cast<const char *>(from), static_cast<const char *>(from) + bytes);
  put.from = put.stored.data();
  put.block = here().state;
  put.warp = here().thread.x / kWarp;
  for (uint64_t at = 0; at < bytes; at += kPiece) put.pieces.push_back(at);
  std::shuffle(put.pieces.begin(), put.pieces.end(), random_);
  under_way_.push_back(std::move(put));
  ahead += costs;
  parts_put_++;
}

void Library::announce() {
  const std::lock_guard<std::mutex> lock(mutex_);
  for (Put &put : under_way_)
    put.announced = put.announced || (put.block == here().state && put.warp == here().thread.x / kWarp);
}

void Library::release() {
  const std::lock_guard<std::mutex> lock(mutex_);
  for (size_t at = 0; at < under_way_.size();) {
    const Put &put = under_way_[at];
    const bool known = put.block == here().state && (put.announced || put.warp == here().thread.x / kWarp);
    known ? move_one(at) : void(at++);  // the last one takes the place of one that has landed
  }
}

void Library::move_one(size_t at) {
  Put &put = under_way_[at];
  for (uint64_t n = 1 + random_() % 16; n && !put.pieces.empty(); n--) {
    const uint64_t piece = put.pieces.back();
    put.pieces.pop_back();
    memcpy(put.to + piece, put.from + piece, std::min(kPiece, put.bytes - piece));
  }
  if (!put.pieces.empty()) return;
  if (put.signal) std::atomic_ref<uint64_t>(*put.signal).fetch_add(1, std::memory_order_release);
  if (at + 1 < under_way_.size()) under_way_[at] = std::move(under_way_.back());
  under_way_.pop_back();
}

void Library::move() {
  if (held_ || under_way_.empty() || random_() % 8) return;
  const std::lock_guard<std::mutex> lock(mutex_);
  if (under_way_.empty()) return;
  const size_t at = random_() % under_way_.size();
  // Parts are the latest: who reads them before they are released finds other bytes.
  if (!under_way_[at].block || random_() % kLazy == 0) move_one(at);
}

void Library::quiet() {
  const std::lock_guard<std::mutex> lock(mutex_);
  late_ += under_way_.size();
  while (!under_way_.empty()) move_one(random_() % under_way_.size());
}

}  // namespace simt

void simt::announce() {
  if (library) library->announce();
}
void simt::release() {
  if (library) library->release();
}

// As device.cuh declares them.
void ept_library_put(void *to, const void *from, uint64_t bytes, uint64_t *signal, uint32_t number) {
  simt::library->put(to, from, bytes, signal, number);
}
void ept_library_put_block(void *to, const void *from, uint64_t bytes, uint64_t *signal, uint32_t number) {
  const uint64_t *same = simt::meet_block("library_put", bytes);
  for (uint32_t i = 0; i < simt::here().threads.x; i++)
    if (same[i] != bytes) check::failed(__FILE__, __LINE__, "threads of a block put different bytes together");
  if (simt::here().thread.x == 0) simt::library->put(to, from, bytes, signal, number);
}
void ept_library_part_warp(void *to, const void *from, uint64_t bytes, uint32_t number) {
  const uint64_t *same = simt::meet_warp("library_part", bytes);
  for (uint32_t i = 0; i < simt::kWarp; i++)
    if (same[i] != bytes) check::failed(__FILE__, __LINE__, "threads of a warp put different parts together");
  if (simt::here().thread.x % simt::kWarp == 0) simt::library->part(to, from, bytes, number);
  (void)simt::meet_warp("library_part_end", bytes);
}
void ept_library_value(uint64_t *to, uint64_t value, uint64_t *signal, uint32_t number) {
  (void)to, (void)value, (void)signal, (void)number;
  check::failed(__FILE__, __LINE__, "no kernel puts a value");
}
void ept_library_quiet() {
  while (simt::library->stuck()) simt::yield();
  simt::library->quiet();
}
