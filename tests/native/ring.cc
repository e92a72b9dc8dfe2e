// SPDX-License-Identifier: Apache-2.0
//
// ring.cc: the command ring and the waits of device.cuh with real threads, so that TSan sees them: many producers,
// wraps of tickets at 2^32 and 2^64, a full ring, deadlines. ring_model.cc has the orders that this machine does not
// make.
#include <array>
#include <atomic>
#include <memory>
#include <thread>
#include <vector>

#include "check.h"
#include "eptransport/device.cuh"

using namespace ept::device;

namespace {

struct Ring {
  explicit Ring(uint64_t capacity, uint64_t first = 0) : slots(capacity) {
    ring.slots = reinterpret_cast<uintptr_t>(slots.data());
    ring.consumed = reinterpret_cast<uintptr_t>(&consumed);
    ring.mask = uint32_t(capacity - 1);
    end = begin_ring(ring, slots.data(), &consumed, first);
    progress.done = first;
    path.kind = EPT_DEVICE_PROXY;
    path.ring = reinterpret_cast<uintptr_t>(&ring);
    path.progress = reinterpret_cast<uintptr_t>(&progress);
    path.source = reinterpret_cast<uintptr_t>(rows.data());
    path.source_bytes = path.window_bytes = sizeof rows;
    path.signals = 100;
    path.signal_count = 2;
  }
  std::vector<ept_command_slot> slots;
  ept_ring ring{};
  uint64_t consumed = 0;
  RingEnd end{};
  ept_device_progress progress{};
  ept_path path{};
  std::array<char, 256> rows{};
};

uint64_t generous() { return deadline_in(120'000'000'000ull); }
uint64_t soon() { return deadline_in(1'000'000); }

// Each producer's commands come once, in its order, and each takes its row along: a row is written plainly before its
// push, and read after its pop.
void many_producers(uint64_t capacity, uint64_t first) {
  constexpr uint32_t kProducers = 4, kEach = 3000;
  Ring r(capacity, first);
  std::vector<uint64_t> rows(kProducers * kEach);
  std::vector<std::thread> threads;
  for (uint32_t p = 0; p < kProducers; p++)
    threads.emplace_back([&, p] {
      for (uint32_t i = 0; i < kEach; i++) {
        rows[p * kEach + i] = (uint64_t(p) << 32 | i) * 7 + 1;
        ept_command command{};
        command.peer = p;
        command.source = i;
        command.bytes = ~uint64_t(i);
        const Put put = push(r.path, command, generous());
        CHECK_EQ(put.code, EPT_OK);
      }
    });
  std::array<uint32_t, kProducers> next{};
  for (uint64_t t = 0; t < uint64_t(kProducers) * kEach;) {
    ept_command command;
    if (!pop(r.end, command)) {
      std::this_thread::yield();
      continue;
    }
    CHECK_EQ(command.ticket, first + t++);
    CHECK(command.peer < kProducers);
    CHECK_EQ(command.source, next[command.peer]++);
    CHECK_EQ(command.bytes, ~command.source);
    const uint64_t row = uint64_t(command.peer) << 32 | command.source;
    CHECK_EQ(rows[command.peer * kEach + command.source], row * 7 + 1);
  }
  for (auto &thread : threads) thread.join();
  ept_command none;
  CHECK(!pop(r.end, none));
  CHECK_EQ(r.consumed, r.ring.head);
  CHECK_EQ(r.ring.head, first + uint64_t(kProducers) * kEach);
}

void full(uint64_t first) {
  Ring r(8, first);
  ept_command command{};
  for (uint64_t i = 0; i < 8; i++) {
    command.source = i;
    const Put put = push(r.path, command, soon());
    CHECK_EQ(put.code, EPT_OK);
    CHECK_EQ(put.ticket, first + i);
  }
  // A full ring waits until its deadline, and no ticket is lost by that.
  CHECK_EQ(push(r.path, command, soon()).code, EPT_E_TIMEOUT);
  CHECK_EQ(push(r.path, command, 0).code, EPT_E_TIMEOUT);
  CHECK_EQ(r.ring.head, first + 8);
  // Or until its peer has ended.
  r.progress.status = EPT_E_PEER_LOST;
  CHECK_EQ(push(r.path, command, generous()).code, EPT_E_PEER_LOST);
  r.progress.status = 0;
  // Lazily: one command consumed is not told yet, a quarter is.
  ept_command got;
  CHECK(pop(r.end, got));
  CHECK_EQ(got.source, 0);
  CHECK_EQ(r.consumed, first);
  CHECK_EQ(push(r.path, command, soon()).code, EPT_E_TIMEOUT);
  CHECK(pop(r.end, got));
  CHECK_EQ(r.consumed, first + 2);
  command.source = 8;
  CHECK_EQ(push(r.path, command, soon()).code, EPT_OK);
  for (uint64_t i = 2; i < 9; i++) {
    CHECK(pop(r.end, got));
    CHECK_EQ(got.source, i);
    CHECK_EQ(got.ticket, first + i);
  }
  CHECK(!pop(r.end, got));
  CHECK_EQ(r.consumed, first + 9);  // told, since there was nothing
}

// Every bit of a command comes out as it went in, in even rounds and odd ones: a slot's words keep a bit for
// themselves.
void every_bit() {
  Ring r(4);
  const auto through = [&](const ept_command &in) {
    const Put put = push(r.path, in, soon());
    CHECK_EQ(put.code, EPT_OK);
    ept_command out;
    CHECK(ready(r.end));
    CHECK(pop(r.end, out));
    CHECK(!ready(r.end));
    CHECK_EQ(out.ticket, put.ticket);
    CHECK_EQ(out.kind, in.kind);
    CHECK_EQ(out.peer, in.peer);
    CHECK_EQ(out.memory, in.memory);
    CHECK_EQ(out.region, in.region);
    CHECK_EQ(out.source, in.source);
    CHECK_EQ(out.destination, in.destination);
    CHECK_EQ(out.bytes, in.bytes);
    CHECK_EQ(out.signal, in.signal);
  };
  for (int turn = 0; turn < 9; turn++) {  // another slot and round each
    ept_command in{};
    through(in);
    for (int bit = 0; bit < 64; bit++) {
      const uint64_t one = uint64_t(1) << bit;
      in = {};
      in.source = one;
      through(in);
      in = {};
      in.destination = one;
      through(in);
      in = {};
      in.bytes = one;
      through(in);
      in = {};
      in.peer = uint32_t(one), in.memory = uint32_t(one >> 32);
      through(in);
      in = {};
      in.signal = uint32_t(one), in.region = uint32_t(one) & 0x7fffffffu, in.kind = uint32_t(one >> 32) & 3;
      through(in);
    }
    in.kind = EPT_COMMAND_VALUE, in.region = 0x7fffffffu;
    in.peer = in.memory = in.signal = UINT32_MAX;
    in.source = in.destination = in.bytes = UINT64_MAX;
    through(in);
  }
}

// What put makes of its arguments, and what it refuses: then nothing is written and nothing raised.
void puts() {
  Ring r(8);
  ept_command got;
  Put put = ept::device::put(Thread(), r.path, r.rows.data() + 16, 32, 64, 1, soon());
  CHECK_EQ(put.code, EPT_OK);
  CHECK(pop(r.end, got));
  CHECK_EQ(got.kind, EPT_COMMAND_PUT);
  CHECK_EQ(got.source, 16);
  CHECK_EQ(got.destination, 32);
  CHECK_EQ(got.bytes, 64);
  CHECK_EQ(got.signal, 101);
  CHECK_EQ(put_value(r.path, 77, 8, EPT_NO_SIGNAL, soon()).code, EPT_OK);
  CHECK(pop(r.end, got));
  CHECK_EQ(got.kind, EPT_COMMAND_VALUE);
  CHECK_EQ(got.source, 77);
  CHECK_EQ(got.signal, EPT_NO_SIGNAL);

  const auto refused = [&](const void *source, uint64_t destination, uint64_t bytes, uint32_t signal) {
    return ept::device::put(Thread(), r.path, source, destination, bytes, signal, soon()).code;
  };
  CHECK_EQ(refused(r.rows.data(), 200, 57, 0), EPT_E_ACCESS);
  CHECK_EQ(refused(r.rows.data(), UINT64_MAX, 2, 0), EPT_E_ACCESS);
  CHECK_EQ(refused(r.rows.data() + 200, 0, 57, 0), EPT_E_ACCESS);
  CHECK_EQ(refused(r.rows.data() - 1, 0, 2, 0), EPT_E_ACCESS);
  CHECK_EQ(refused(r.rows.data(), 0, 1, 2), EPT_E_INVALID);
  CHECK_EQ(put_value(r.path, 1, 12, 0, soon()).code, EPT_E_INVALID);
  r.path.kind = EPT_DEVICE_NONE;
  CHECK_EQ(refused(r.rows.data(), 0, 1, 0), EPT_E_UNSUPPORTED);
  r.path.kind = EPT_DEVICE_GPU;
  CHECK_EQ(refused(r.rows.data(), 0, 1, 0), EPT_E_UNSUPPORTED);
  CHECK(!pop(r.end, got));
}

// Mapped: rows, then the count; several writers of one word, counts that wrap.
void mapped(uint64_t first) {
  constexpr uint32_t kWriters = 3, kRounds = 2000;
  std::array<std::array<char, 64>, kWriters> target{};
  std::array<uint64_t, kWriters> signals{}, acks{};
  signals.fill(first);
  acks.fill(first);
  std::vector<std::thread> threads;
  for (uint32_t w = 0; w < kWriters; w++)
    threads.emplace_back([&, w] {
      ept_path path{};
      path.kind = EPT_DEVICE_MAPPED;
      path.window = reinterpret_cast<uintptr_t>(target[w].data());
      path.window_bytes = 64;
      path.signals = reinterpret_cast<uintptr_t>(&signals[w]);
      path.signal_count = 1;
      std::array<char, 64> row;
      for (uint32_t i = 0; i < kRounds; i++) {
        row.fill(char(i));
        CHECK(window(path, 8) == target[w].data() + 8);
        CHECK_EQ(put(Thread(), path, row.data(), 0, 56, EPT_NO_SIGNAL, 0).code, EPT_OK);
        CHECK_EQ(put_value(path, i, 56, 0, 0).code, EPT_OK);
        CHECK(wait(&acks[w], first + i + 1, generous()).came());
      }
    });
  for (uint32_t i = 0; i < kRounds; i++)
    for (uint32_t w = 0; w < kWriters; w++) {
      const Seen seen = wait(&signals[w], first + i + 1, generous());
      CHECK(seen.came());
      CHECK_EQ(seen.count, first + i + 1);
      for (size_t b = 0; b < 56; b++) CHECK(target[w][b] == char(i));
      uint64_t value;
      std::memcpy(&value, target[w].data() + 56, 8);
      CHECK_EQ(value, i);
      Hardware::add_release_system(&acks[w], 1);
    }
  for (auto &thread : threads) thread.join();
}

void waits_end() {
  uint64_t signal = 4;
  CHECK_EQ(wait(&signal, 5, soon()).code, EPT_E_TIMEOUT);
  CHECK_EQ(wait(&signal, 5, soon()).count, 4);
  CHECK_EQ(wait(&signal, 5, 0).code, EPT_E_TIMEOUT);
  CHECK(wait(&signal, 4, 0).came());
  CHECK(wait(&signal, 3, 0).came());
  CHECK(wait(&signal, UINT64_MAX, 0).came());  // behind it, by wrapping
  int32_t stop = EPT_E_PEER_LOST;
  CHECK_EQ(wait(&signal, 5, generous(), &stop).code, EPT_E_PEER_LOST);
  stop = 0;
  std::thread later([&] { std::atomic_ref<int32_t>(stop).store(EPT_E_CLOSED); });
  CHECK_EQ(wait(&signal, 5, generous(), &stop).code, EPT_E_CLOSED);
  later.join();
}

void flushes() {
  Ring r(8, UINT64_MAX);
  const Put put = ept::device::put(Thread(), r.path, r.rows.data(), 0, 8, 0, soon());
  CHECK_EQ(put.ticket, UINT64_MAX);
  CHECK_EQ(flush(r.path, put.ticket, soon()).code, EPT_E_TIMEOUT);
  std::thread proxy([&] {
    ept_command command;
    while (!pop(r.end, command)) std::this_thread::yield();
    r.rows[0] = char(r.rows[0] + 1);  // the network's last touch
    Hardware::release_system(&r.progress.done, command.ticket + 1);
  });
  CHECK(flush(r.path, put.ticket, generous()).came());
  r.rows[0] = 5;
  proxy.join();
  r.path.kind = EPT_DEVICE_MAPPED;
  CHECK(flush(r.path, 99, 0).came());
}

}  // namespace

int main() {
  RUN(many_producers(4, 0));
  RUN(many_producers(64, 0xffffffffull - 5000));
  RUN(many_producers(16, UINT64_MAX - 6000));
  for (uint64_t first : {uint64_t(0), uint64_t(0xfffffffc), UINT64_MAX - 3, UINT64_MAX}) RUN(full(first));
  RUN(every_bit());
  RUN(puts());
  RUN(mapped(0));
  RUN(mapped(UINT64_MAX - 1000));
  RUN(waits_end());
  RUN(flushes());
  return 0;
}
