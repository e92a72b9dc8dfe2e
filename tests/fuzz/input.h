// SPDX-License-Identifier: Apache-2.0
//
// input.h: a fuzzed input, read from the front. Past its end it gives zeros, so that every input is a whole one.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <type_traits>

namespace fuzz {

class Input {
 public:
  Input(const uint8_t *bytes, size_t length) : at_(bytes), left_(length) {}

  bool empty() const { return left_ == 0; }
  size_t left() const { return left_; }

  template <class T>
  T take() {
    static_assert(std::is_trivially_copyable_v<T>);
    T value{};
    const size_t step = std::min(left_, sizeof value);
    if (step) memcpy(&value, at_, step);
    at_ += step;
    left_ -= step;
    return value;
  }
  // At most `most` bytes.
  std::string text(size_t most) {
    const size_t step = std::min(left_, most);
    std::string bytes(reinterpret_cast<const char *>(at_), step);
    at_ += step;
    left_ -= step;
    return bytes;
  }
  std::string rest() { return text(left_); }

 private:
  const uint8_t *at_;
  size_t left_;
};

}  // namespace fuzz

// An invariant of a target. Unlike a failed CHECK it aborts, which is what libFuzzer keeps the input of.
#define HOLDS(condition)                                                      \
  do {                                                                        \
    if (!(condition)) {                                                       \
      fprintf(stderr, "%s:%d: not so: %s\n", __FILE__, __LINE__, #condition); \
      abort();                                                                \
    }                                                                         \
  } while (0)

// What a target is: this one function. libFuzzer calls it, or driver.cc.
extern "C" int LLVMFuzzerTestOneInput(const uint8_t *bytes, size_t length);
