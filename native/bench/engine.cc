// SPDX-License-Identifier: Apache-2.0
// The same exchanges as in sockets.cc, through eptransport.h. Set-up goes by ept_engine_send, so that a loop needs
// nothing but an engine that is connected.
#include <array>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <vector>

#include "common.h"

namespace ept::bench {
namespace {

constexpr size_t kBlob = 4096;

ept_error empty_error() {
  ept_error error{};
  error.size = sizeof error;
  return error;
}

// Memory of this rank, a signal that the peer raises, and the peer's counterpart of both. Closing is in the order of
// opening turned round; the caller sees to it that nothing is in flight then.
class End {
 public:
  End(ept_engine *engine, uint32_t peer) : engine_(engine), peer_(peer) {}
  ~End() {
    if (remote_signal_ != 0) ept_signal_drop(engine_, remote_signal_, nullptr);
    if (region_ != 0) ept_region_drop(engine_, region_, nullptr);
    if (signal_ != 0) ept_signal_destroy(engine_, signal_, nullptr);
    if (memory_ != 0) ept_memory_deregister(engine_, memory_, nullptr);
  }
  End(const End &) = delete;
  End &operator=(const End &) = delete;

  // [0, length) is what the peer writes into, [length, 2 length) what is written from.
  int32_t open(uint64_t length, ept_error *error) {
    length_ = length;
    const uint64_t bytes = (2 * length + 4095) / 4096 * 4096;
    buffer_.reset(static_cast<uint8_t *>(std::aligned_alloc(4096, bytes)));
    if (!buffer_) return fail(EPT_E_NOMEM, "%llu bytes refused", static_cast<unsigned long long>(bytes));
    for (uint64_t i = 0; i < bytes; ++i) buffer_[i] = i < length ? 0xee : static_cast<uint8_t>(i * 131 + 7);
    ept_memory memory{};
    memory.size = sizeof memory;
    memory.kind = EPT_MEMORY_HOST;
    memory.address = buffer_.get();
    memory.length = bytes;
    memory.fd = -1;
    memory.role = EPT_ROLE_DATA;
    memory.access = EPT_ACCESS_LOCAL | EPT_ACCESS_REMOTE_WRITE;
    if (const int32_t code = ept_memory_register(engine_, &memory, &memory_, error); code != EPT_OK) return code;
    return ept_signal_create(engine_, peer_, "bench", nullptr, &signal_, error);
  }

  struct Card {
    uint32_t region_length, signal_length;
    uint8_t region[kBlob], signal[kBlob];
  };

  int32_t card(Card *card, ept_error *error) {
    size_t region = kBlob, signal = kBlob;
    int32_t code = ept_region_export(engine_, memory_, peer_, 0, length_, card->region, &region, error);
    if (code == EPT_OK) code = ept_signal_export(engine_, signal_, card->signal, &signal, error);
    card->region_length = static_cast<uint32_t>(region);
    card->signal_length = static_cast<uint32_t>(signal);
    return code;
  }

  int32_t take(const Card &card, ept_error *error) {
    const int32_t code = ept_region_import(engine_, peer_, card.region, card.region_length, &region_, error);
    if (code != EPT_OK) return code;
    return ept_signal_import(engine_, peer_, card.signal, card.signal_length, &remote_signal_, error);
  }

  // Card out and card in by messages; a blob a message, for a message may be short.
  int32_t meet(uint64_t tag, uint64_t timeout_ns, ept_error *error) {
    auto mine = std::make_unique<Card>(), theirs = std::make_unique<Card>();
    if (const int32_t code = card(mine.get(), error); code != EPT_OK) return code;
    int32_t code = ept_engine_send(engine_, peer_, tag, mine->region, mine->region_length, timeout_ns, error);
    if (code == EPT_OK)
      code = ept_engine_send(engine_, peer_, tag + 1, mine->signal, mine->signal_length, timeout_ns, error);
    if (code != EPT_OK) return code;
    size_t region = kBlob, signal = kBlob;
    uint32_t from = 0;
    code = ept_engine_recv(engine_, peer_, tag, theirs->region, &region, &from, timeout_ns, error);
    if (code == EPT_OK)
      code = ept_engine_recv(engine_, peer_, tag + 1, theirs->signal, &signal, &from, timeout_ns, error);
    if (code != EPT_OK) return code;
    theirs->region_length = static_cast<uint32_t>(region);
    theirs->signal_length = static_cast<uint32_t>(signal);
    return take(*theirs, error);
  }

  // Until both sides have nothing more to say: memory may go when the peer is through with it.
  int32_t part(uint64_t tag, uint64_t timeout_ns, ept_error *error) {
    uint8_t byte = 1;
    size_t length = 1;
    uint32_t from = 0;
    int32_t code = ept_engine_send(engine_, peer_, tag + 2, &byte, 1, timeout_ns, error);
    if (code == EPT_OK) code = ept_engine_recv(engine_, peer_, tag + 2, &byte, &length, &from, timeout_ns, error);
    return code;
  }

  ept_write write(uint64_t offset, uint64_t length) const {
    ept_write write{};
    write.size = sizeof write;
    write.peer = peer_;
    write.source = length == 0 ? 0 : memory_;
    write.source_offset = length == 0 ? 0 : length_ + offset;
    write.destination = length == 0 ? 0 : region_;
    write.destination_offset = offset;
    write.length = length;
    write.signal = remote_signal_;
    return write;
  }

  // Posts, and where the answer is LATER lets the network move and posts again.
  int32_t post(const ept_write &write, ept_transfer_id *transfer, Deadline &deadline, ept_error *error) {
    for (;;) {
      const int32_t code = ept_engine_write(engine_, &write, transfer, error);
      if (code != EPT_LATER) return code;
      if (const int32_t moved = ept_engine_progress(engine_, error); moved < 0) return moved;
      if (deadline.passed()) return fail(EPT_E_TIMEOUT, "write: only LATER for %s", "the whole timeout");
    }
  }

  int32_t wait(uint64_t target, uint64_t timeout_ns, ept_error *error) {
    return ept_signal_wait(engine_, signal_, target, timeout_ns, error);
  }
  int32_t value(uint64_t *value, ept_error *error) { return ept_signal_value(engine_, signal_, value, error); }

  uint8_t *landing() { return buffer_.get(); }
  uint8_t *source() { return buffer_.get() + length_; }
  // The fill of open's second half, as the peer made it.
  uint8_t expected(uint64_t offset) const { return static_cast<uint8_t>((length_ + offset) * 131 + 7); }

 private:
  struct Free {
    void operator()(uint8_t *p) const { std::free(p); }
  };
  ept_engine *engine_;
  uint32_t peer_;
  uint64_t length_ = 0;
  std::unique_ptr<uint8_t[], Free> buffer_;
  ept_memory_id memory_ = 0;
  ept_signal_id signal_ = 0;
  ept_region_id region_ = 0;
  ept_remote_signal_id remote_signal_ = 0;
};

// `risen`: how often this side's signal has been raised before. The same of stream.
int32_t pingpong(ept_engine *engine, End &end, uint32_t side, uint64_t bytes, uint32_t iterations, uint64_t risen,
                 double *samples, uint64_t timeout_ns, ept_error *error) {
  const ept_write write = end.write(0, bytes);
  Deadline deadline(timeout_ns);
  ept_transfer_id last = 0;
  for (uint32_t i = 0; i < iterations; ++i) {
    const uint64_t before = now_ns();
    const auto mark = static_cast<uint8_t>(i + 1);
    // The source is free only when it is this side's turn: then the peer has written since, so it has all of the write
    // of the turn before, which until then may still be read from here. No turn tells that of the last write.
    auto post = [&] {
      end.source()[0] = mark;
      return end.post(write, side == 1 && i + 1 == iterations ? &last : nullptr, deadline, error);
    };
    int32_t code = EPT_OK;
    if (side == 0) code = post();
    if (code == EPT_OK) code = end.wait(risen + i + 1, timeout_ns, error);
    if (code == EPT_OK && end.landing()[0] != mark)
      return fail(EPT_E_INTERNAL, "ping-pong: the signal of turn %u rose before its bytes were there", i);
    if (code == EPT_OK && side == 1) code = post();
    if (code != EPT_OK) return code;
    if (side == 0) samples[i] = static_cast<double>(now_ns() - before) / 2;
  }
  return last == 0 ? EPT_OK : ept_transfer_wait(engine, last, timeout_ns, error);
}

int32_t stream(ept_engine *engine, End &end, uint32_t side, uint64_t bytes, uint32_t count, uint32_t ring,
               uint64_t risen, double *seconds, uint64_t timeout_ns, ept_error *error) {
  Deadline deadline(timeout_ns);
  std::vector<ept_transfer_id> transfers(ring);
  const uint64_t before = now_ns();
  int32_t code = EPT_OK;
  if (side == 0) {
    for (uint32_t i = 0; i < count; ++i) {
      if (i >= ring) code = ept_transfer_wait(engine, transfers[i % ring], timeout_ns, error);
      if (code == EPT_OK) code = end.post(end.write(i % ring * bytes, bytes), &transfers[i % ring], deadline, error);
      if (code != EPT_OK) return code;
    }
    for (uint32_t i = 0; i < ring && i < count; ++i)
      if (code = ept_transfer_wait(engine, transfers[i], timeout_ns, error); code != EPT_OK) return code;
    code = end.wait(risen + 1, timeout_ns, error);
  } else {
    code = end.wait(risen + count, timeout_ns, error);
    if (code == EPT_OK) code = end.post(end.write(0, 0), nullptr, deadline, error);
  }
  *seconds = static_cast<double>(now_ns() - before) / 1e9;
  if (code == EPT_OK && side == 1)
    for (uint64_t i = 0; i < bytes * (count < ring ? count : ring); i += 61)
      if (end.landing()[i] != end.expected(i))
        return fail(EPT_E_INTERNAL, "stream: byte %llu is wrong", static_cast<unsigned long long>(i));
  return code;
}

int32_t ended(int32_t code, const ept_error &error) {
  return code == EPT_OK || error.code == EPT_OK ? code : fail(error);
}

}  // namespace
}  // namespace ept::bench

using namespace ept::bench;

struct eptb_pair {
  eptb_pair(ept_engine *opened, uint32_t peer, uint32_t which, uint64_t most, uint64_t set_up)
      : engine(opened), side(which), bytes(most), tag(set_up), end(opened, peer) {}
  int32_t too_small(uint64_t asked) const {
    return fail(EPT_E_INVALID, "%llu bytes do not fit the pair's %llu", static_cast<unsigned long long>(asked),
                static_cast<unsigned long long>(bytes));
  }

  ept_engine *engine;
  uint32_t side;
  uint64_t bytes, tag;
  uint64_t risen = 0;  // how often the signal of this side has been raised
  End end;
};

extern "C" {

int32_t eptb_pair_open(ept_engine *engine, uint32_t peer, uint32_t side, uint64_t bytes, uint64_t tag,
                       uint64_t timeout_ns, eptb_pair **pair) {
  ept_error error = empty_error();
  auto made = std::make_unique<eptb_pair>(engine, peer, side, bytes, tag);
  int32_t code = made->end.open(bytes, &error);
  if (code == EPT_OK) code = made->end.meet(tag, timeout_ns, &error);
  if (code == EPT_OK) *pair = made.release();
  return ended(code, error);
}

int32_t eptb_pair_pingpong(eptb_pair *pair, uint64_t bytes, uint32_t iterations, double *samples, uint64_t timeout_ns) {
  if (bytes > pair->bytes) return pair->too_small(bytes);
  ept_error error = empty_error();
  const int32_t code =
      pingpong(pair->engine, pair->end, pair->side, bytes, iterations, pair->risen, samples, timeout_ns, &error);
  pair->risen += iterations;
  pair->end.source()[0] = pair->end.expected(0);
  return ended(code, error);
}

int32_t eptb_pair_stream(eptb_pair *pair, uint64_t bytes, uint32_t count, uint32_t ring, double *seconds,
                         uint64_t timeout_ns) {
  if (bytes * ring > pair->bytes) return pair->too_small(bytes * ring);
  ept_error error = empty_error();
  const int32_t code =
      stream(pair->engine, pair->end, pair->side, bytes, count, ring, pair->risen, seconds, timeout_ns, &error);
  pair->risen += pair->side == 0 ? 1 : count;
  return ended(code, error);
}

int32_t eptb_pair_close(eptb_pair *pair, uint64_t timeout_ns) {
  const std::unique_ptr<eptb_pair> owner(pair);
  ept_error error = empty_error();
  return ended(owner->end.part(owner->tag, timeout_ns, &error), error);
}

int32_t eptb_engine_rate(ept_engine *from, uint32_t from_rank, ept_engine *to, uint32_t to_rank, uint64_t bytes,
                         uint64_t count, uint32_t batch, double *seconds, uint64_t timeout_ns) {
  constexpr uint64_t kSlots = 64;
  ept_error error = empty_error();
  End sender(from, to_rank), receiver(to, from_rank);
  auto card = std::make_unique<End::Card>();
  int32_t code = sender.open(bytes * kSlots, &error);
  if (code == EPT_OK) code = receiver.open(bytes * kSlots, &error);
  if (code == EPT_OK) code = receiver.card(card.get(), &error);
  if (code == EPT_OK) code = sender.take(*card, &error);
  if (code != EPT_OK) return fail(error);

  std::vector<ept_write> writes(batch);
  for (uint32_t i = 0; i < batch; ++i) writes[i] = sender.write(i % kSlots * bytes, bytes);
  Deadline deadline(timeout_ns);
  const uint64_t before = now_ns();
  uint64_t posted = 0, landed = 0;
  while (landed < count) {
    if (posted < count) {
      const uint64_t some = count - posted < batch ? count - posted : batch;
      code = some == 1 ? ept_engine_write(from, writes.data(), nullptr, &error)
                       : ept_engine_scatter(from, writes.data(), some, nullptr, &error);
      if (code == EPT_OK) {
        posted += some;
        // Enough in one go to be worth a visit at the receiver, little enough to stay in the cache.
        if (posted % 256 >= batch && posted < count) continue;
      } else if (code != EPT_LATER) {
        return fail(error);
      }
    }
    if (code = ept_engine_progress(to, &error); code < 0) return fail(error);
    if (code = ept_engine_progress(from, &error); code < 0) return fail(error);
    if (code = receiver.value(&landed, &error); code != EPT_OK) return fail(error);
    if (deadline.passed())
      return fail(EPT_E_TIMEOUT, "rate: %llu of %llu writes landed", static_cast<unsigned long long>(landed),
                  static_cast<unsigned long long>(count));
  }
  *seconds = static_cast<double>(now_ns() - before) / 1e9;
  const uint64_t filled = bytes * (batch < kSlots ? batch : kSlots);
  for (uint64_t i = 0; i < filled; ++i)
    if (receiver.landing()[i] != receiver.expected(i))
      return fail(EPT_E_INTERNAL, "rate: byte %llu is wrong", static_cast<unsigned long long>(i));
  return EPT_OK;
}

}  // extern "C"
