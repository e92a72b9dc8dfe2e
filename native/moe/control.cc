// SPDX-License-Identifier: Apache-2.0
#include "moe/control.h"

#include "engine/why_stuck.h"

#include <algorithm>

namespace ept::moe {

const char *Bytes::take(size_t length) {
  if (length > bytes_.size() - at_)
    fail(EPT_E_VERSION, -1, "a set-up message has %zu bytes and should have %zu more: another version?", bytes_.size(),
         length - (bytes_.size() - at_));
  at_ += length;
  return bytes_.data() + at_ - length;
}

namespace {

// A set-up message is some bytes a lane, slot and expert: kilobytes. Memory for its pieces is taken when the first
// comes, for as many as it says; so what it may say is bounded.
constexpr size_t kMostBytes = 64u << 20;

struct Piece {  // before each piece of a message
  uint32_t index, count;
};

// What still goes to one rank, and what has come from it. Pieces may overtake one another.
struct Talk {
  std::string out;
  uint32_t pieces_out = 0, sent = 0;
  std::vector<std::string> in;
  std::vector<bool> here;  // which of them
  uint32_t got = 0;
  bool begun = false;

  bool done() const { return begun && got == in.size(); }
};

class Talks {
 public:
  Talks(ept_engine *engine, uint32_t rank, const Members &members, uint64_t tag)
      : engine_(engine), rank_(rank), members_(members), tag_(tag) {
    Error error;
    size_t most = 0;
    check(ept_engine_max_message(engine, &most), error);
    if (most <= sizeof(Piece)) fail(EPT_E_LIMIT, -1, "the backend carries messages of %zu bytes only", most);
    room_ = most - sizeof(Piece);
    talks_.resize(members.active.size());
    buffer_.resize(most);
  }

  bool with(uint32_t rank) const { return rank != rank_ && members_.has(rank); }

  void say(uint32_t to, std::string what) {
    Talk &talk = talks_[to];
    talk.out = std::move(what);
    talk.pieces_out = uint32_t(std::max<size_t>(1, (talk.out.size() + room_ - 1) / room_));
  }

  // One piece to each rank that takes one now.
  bool send_some() {
    bool moved = false;
    for (uint32_t r = 0; r < talks_.size(); r++) {
      Talk &talk = talks_[r];
      if (!with(r) || talk.sent == talk.pieces_out) continue;
      const size_t begin = talk.sent * room_, length = std::min(room_, talk.out.size() - begin);
      const Piece piece = {talk.sent, talk.pieces_out};
      memcpy(buffer_.data(), &piece, sizeof piece);
      memcpy(buffer_.data() + sizeof piece, talk.out.data() + begin, length);
      Error error;
      const int32_t code = ept_engine_send(engine_, r, tag_, buffer_.data(), sizeof piece + length, 0, &error);
      if (code == EPT_E_TIMEOUT || code == EPT_LATER) continue;
      check(code, error);
      talk.sent++;
      moved = true;
    }
    return moved;
  }

  bool receive(uint64_t timeout_ns) {
    size_t length = buffer_.size();
    uint32_t from = 0;
    Error error;
    const int32_t code = ept_engine_recv(engine_, UINT32_MAX, tag_, buffer_.data(), &length, &from, timeout_ns, &error);
    if (code == EPT_E_TIMEOUT || code == EPT_LATER) return false;
    check(code, error);
    Piece piece;
    if (length < sizeof piece || from >= talks_.size()) fail(EPT_E_VERSION, int32_t(from), "a set-up message is short");
    memcpy(&piece, buffer_.data(), sizeof piece);
    Talk &talk = talks_[from];
    if (!talk.begun) {
      if (piece.count == 0 || piece.count > kMostBytes / room_)
        fail(EPT_E_VERSION, int32_t(from), "a set-up message of %u pieces; at most %zu are sent", piece.count,
             kMostBytes / room_);
      talk.in.resize(piece.count);
      talk.here.resize(piece.count);
      talk.begun = true;
    }
    if (piece.index >= talk.in.size() || piece.count != talk.in.size() || talk.here[piece.index])
      fail(EPT_E_VERSION, int32_t(from), "piece %u of %u of a set-up message of %zu", piece.index, piece.count,
           talk.in.size());
    talk.here[piece.index] = true;
    talk.in[piece.index].assign(buffer_.data() + sizeof piece, length - sizeof piece);
    talk.got++;
    return true;
  }

  // A rank that has not said all, or UINT32_MAX.
  uint32_t silent() const {
    for (uint32_t r = 0; r < talks_.size(); r++)
      if (with(r) && !talks_[r].done()) return r;
    return UINT32_MAX;
  }
  // Pieces that each rank which has not said all still owes.
  std::vector<Awaited> awaited() const {
    std::vector<Awaited> all;
    for (uint32_t r = 0; r < talks_.size(); r++)
      if (with(r) && !talks_[r].done())
        all.push_back({r, EPT_METRICS_TRANSFER, 0, std::max<uint64_t>(1, talks_[r].in.size()), talks_[r].got});
    return all;
  }
  bool all_sent() const {
    for (uint32_t r = 0; r < talks_.size(); r++)
      if (with(r) && talks_[r].sent < talks_[r].pieces_out) return false;
    return true;
  }
  void find_lost(const char *what) const {
    for (uint32_t r = 0; r < talks_.size(); r++) {
      if (!with(r) || talks_[r].done()) continue;
      const ept_peer_info info = info_of(engine_, r);
      if (ended(info.status))
        fail(EPT_E_PEER_LOST, int32_t(r), "rank %u waits for rank %u, %s: it is gone (%s)", rank_, r, what, info.why);
    }
  }

  std::vector<std::string> results() {
    std::vector<std::string> all(talks_.size());
    for (uint32_t r = 0; r < talks_.size(); r++)
      for (auto &part : talks_[r].in) all[r] += part;
    return all;
  }

 private:
  ept_engine *engine_;
  uint32_t rank_;
  const Members members_;
  uint64_t tag_;
  size_t room_ = 0;
  std::vector<Talk> talks_;
  std::vector<char> buffer_;
};

}  // namespace

std::vector<std::string> exchange(ept_engine *engine, uint32_t rank, const Members &members, uint64_t tag,
                                  const std::function<std::string(uint32_t)> &to, const Deadline &deadline,
                                  const char *what) {
  Talks talks(engine, rank, members, tag);
  for (uint32_t r = 0; r < members.active.size(); r++)
    if (talks.with(r)) talks.say(r, to(r));
  Published waiting(engine);
  // Sending and receiving take turns: if all only sent first, all could wait for room in all inboxes.
  while (talks.silent() != UINT32_MAX || !talks.all_sent()) {
    const bool sent = talks.send_some();
    bool moved = sent;
    while (talks.receive(0)) moved = true;
    if (moved) continue;
    talks.find_lost(what);
    waiting.say("set-up", what, talks.awaited(), deadline.start);
    const uint64_t left = deadline.remaining();
    if (left == 0) {
      waiting.expired();
      const uint32_t silent = talks.silent();
      fail(EPT_E_TIMEOUT, silent == UINT32_MAX ? -1 : int32_t(silent),
           "rank %u waited %.1f s for rank %d, %s: every rank must make this call", rank, deadline.waited_s(),
           int32_t(silent), what);
    }
    // Longer than the engine's 100 ms of asking for interrupts; shorter while something still waits to go out.
    talks.receive(std::min<uint64_t>(left, talks.all_sent() ? 120'000'000 : 1'000'000));
  }
  return talks.results();
}

Bytes status(const Failure &failure) {
  Bytes bytes;
  bytes.put(failure.error.code).put_text(failure.error.text, strlen(failure.error.text));
  return bytes;
}

void throw_theirs(const std::vector<std::string> &said, uint32_t rank, const Members &members,
                  std::vector<Bytes> *rest) {
  rest->clear();
  for (uint32_t r = 0; r < said.size(); r++) {
    rest->emplace_back(said[r]);
    if (r == rank || !members.has(r)) continue;
    const auto code = (*rest)[r].get<int32_t>();
    const std::string text = (*rest)[r].get_text();
    if (code != EPT_OK) fail(code, int32_t(r), "rank %u could not take part: %s", r, text.c_str());
  }
}

}  // namespace ept::moe
