// SPDX-License-Identifier: Apache-2.0
//
// control.h: set-up messages between all ranks, over ept_engine_send and recv. No collective of anyone else's.
#pragma once

#include <functional>
#include <string>
#include <type_traits>
#include <vector>

#include <string.h>

#include "eptransport/wire.h"
#include "moe/fail.h"
#include "moe/members.h"

namespace ept::moe {

constexpr uint64_t kTagConfig = EPT_TAG_OURS | 2ull << 48;  // + Arena::attempt() (+ round)
constexpr uint64_t kTagIdle = EPT_TAG_OURS | 7ull << 48;
constexpr uint64_t kTagMemory = EPT_TAG_OURS | 3ull << 48;
constexpr uint64_t kTagReady = EPT_TAG_OURS | 4ull << 48;
constexpr uint64_t kTagReset = EPT_TAG_OURS | 5ull << 48;
constexpr uint64_t kTagClean = EPT_TAG_OURS | 6ull << 48;
constexpr uint64_t kTagOffer = EPT_TAG_OURS | 8ull << 48;
constexpr uint64_t kTagSide = EPT_TAG_OURS | 9ull << 48;
constexpr uint64_t kTagSideReady = EPT_TAG_OURS | 10ull << 48;
constexpr uint64_t kTagSideMeet = EPT_TAG_OURS | 11ull << 48;  // + how many before
constexpr uint64_t kTagWeigh = EPT_TAG_OURS | 12ull << 48;     // + Arena::attempt() + how many before

// Bytes of a message, appended and read in the same order.
class Bytes {
 public:
  Bytes() = default;
  explicit Bytes(std::string bytes) : bytes_(std::move(bytes)) {}

  template <class T>
  Bytes &put(const T &value) {
    static_assert(std::is_trivially_copyable_v<T>);
    bytes_.append(reinterpret_cast<const char *>(&value), sizeof value);
    return *this;
  }
  Bytes &put_text(const void *data, size_t length) {
    put(uint32_t(length));
    bytes_.append(static_cast<const char *>(data), length);
    return *this;
  }
  template <class T>
  T get() {
    T value;
    memcpy(&value, take(sizeof value), sizeof value);
    return value;
  }
  std::string get_text() {
    const auto length = get<uint32_t>();
    return std::string(take(length), length);
  }
  const std::string &all() const { return bytes_; }

 private:
  const char *take(size_t length);

  std::string bytes_;
  size_t at_ = 0;
};

// Sends `to(rank)` to every other member under `tag` and returns what every other one sent to this one. Messages of any
// length: they are cut up. Throws TIMEOUT or PEER_LOST, naming a rank that said nothing and `what` this is about.
std::vector<std::string> exchange(ept_engine *engine, uint32_t rank, const Members &members, uint64_t tag,
                                  const std::function<std::string(uint32_t)> &to, const Deadline &deadline,
                                  const char *what);

// What a rank says of its own part, before what else is to be said; and the others', of whom one that failed is thrown.
Bytes status(const Failure &failure);
void throw_theirs(const std::vector<std::string> &said, uint32_t rank, const Members &members,
                  std::vector<Bytes> *rest);

}  // namespace ept::moe
