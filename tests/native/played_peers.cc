// SPDX-License-Identifier: Apache-2.0
//
// played_peers.cc: what an engine takes from a peer whose every word the test says itself, over the network of the fuzz
// targets: a HELLO that is for another life, and the silence of a time in which the engine did not look.
#include <chrono>
#include <cstring>
#include <string>
#include <thread>

#include "../fuzz/wire.h"
#include "check.h"
#include "eptransport/wire.h"

namespace {

constexpr uint64_t kDead = 400'000'000;

template <class T>
std::string text_of(const T &value) {
  return {reinterpret_cast<const char *>(&value), sizeof value};
}

// Rank 0, in its life `epoch`; rank 1 is played, in its life 0.
struct Rig {
  ept_engine *engine = nullptr;
  wire::Error error;

  explicit Rig(uint32_t epoch) {
    ept_engine_config config{};
    config.size = sizeof config;
    config.world = 2;
    config.epoch = epoch;
    config.job = "";
    config.secret = reinterpret_cast<const uint8_t *>("secret"), config.secret_length = 6;
    config.plugin = wire::plugin();
    config.progress = EPT_PROGRESS_INLINE;
    config.dead_ns = kDead;
    CHECK_EQ(ept_engine_create(&config, &engine, &error), EPT_OK);
    const std::string blobs[] = {wire::address_of(0, epoch), wire::address_of(1, 0)};
    const void *addresses[] = {blobs[0].data(), blobs[1].data()};
    const size_t lengths[] = {blobs[0].size(), blobs[1].size()};
    CHECK_EQ(ept_engine_connect(engine, addresses, lengths, &error), EPT_OK);
    wire::say_peer(0, 1, EPT_OK);
  }
  ~Rig() { ept_engine_close(engine, 0, nullptr); }
  Rig(const Rig &) = delete;
  Rig &operator=(const Rig &) = delete;

  void hello(uint32_t reader_epoch) const {
    const std::string anchor = wire::region_of(1, 64);
    ept_hello said{};
    said.rank = 1;
    said.rails = 1;
    said.credits = 256;
    said.send_credits = 64;
    said.credit_chan = 1, said.send_credit_chan = 2, said.plain_chan = 3;
    said.anchor_length = static_cast<uint32_t>(anchor.size());
    said.reader_epoch = reader_epoch;
    said.heartbeat_us = kDead / 5 / 1000;
    const ept_message head{EPT_WIRE_VERSION, EPT_MESSAGE_HELLO, 0, 0};
    wire::say_message(0, 1, text_of(head) + text_of(said) + anchor);
  }
  int32_t status() {
    CHECK(ept_engine_progress(engine, &error) >= 0);
    ept_peer_info info{};
    info.size = sizeof info;
    CHECK_EQ(ept_engine_peer(engine, 1, &info, &error), EPT_OK);
    return info.status;
  }
};

// A greeting that was on its way when its reader began another life names chans and a region for the life before.
void hello_of_another_life() {
  for (const uint32_t epoch : {0u, 1u, 5u}) {
    Rig rig(epoch);
    for (const uint32_t other : {epoch + 1, epoch - 1}) {
      rig.hello(other);
      CHECK_EQ(rig.status(), EPT_PEER_CONNECTING);
    }
    rig.hello(epoch);
    CHECK_EQ(rig.status(), EPT_PEER_UP);
  }
}

// Who was away itself (stopped, or starved of its core) takes nothing for silence that it did not witness, though its
// first look finds nothing: what came meanwhile may need more than one. What it does witness it tells from then on.
void the_judge_was_away() {
  Rig rig(0);
  rig.hello(0);
  CHECK_EQ(rig.status(), EPT_PEER_UP);
  std::this_thread::sleep_for(std::chrono::nanoseconds(2 * kDead));
  CHECK_EQ(rig.status(), EPT_PEER_UP);
  const auto limit = std::chrono::steady_clock::now() + std::chrono::minutes(1);
  while (rig.status() == EPT_PEER_UP) {
    CHECK(std::chrono::steady_clock::now() < limit);
    std::this_thread::sleep_for(std::chrono::nanoseconds(kDead / 100));
  }
  CHECK_EQ(rig.status(), EPT_PEER_LOST);
}

// A network may not say whose an immediate is (libfabric's doesn't). It is a sign of life of the one peer that its chan
// is for, and an answer to it: who gets nothing but such from a peer goes on telling it that it lives.
void immediates_of_nobody_are_signs_of_life() {
  Rig rig(0);
  rig.hello(0);
  CHECK_EQ(rig.status(), EPT_PEER_UP);
  uint64_t said = 0;
  wire::tamper([&](uint32_t from, uint32_t to, char *bytes, size_t length) {
    ept_message head{};
    if (length >= sizeof head) std::memcpy(&head, bytes, sizeof head);
    said += from == 0 && to == 1 && head.version == EPT_WIRE_VERSION && head.type == EPT_MESSAGE_HEARTBEAT;
  });
  const auto begin = std::chrono::steady_clock::now();
  uint32_t number = 0;
  while (said < 3 || std::chrono::steady_clock::now() - begin < std::chrono::nanoseconds(2 * kDead)) {
    CHECK(std::chrono::steady_clock::now() - begin < std::chrono::minutes(1));
    // One in order on each of the first chans, of which one is the played peer's for transfers without a signal.
    for (uint32_t chan = 0; chan < 4; chan++)
      wire::say_immediate(0, UINT32_MAX, ept_imm(1, number % EPT_IMM_WINDOW, chan));
    number++;
    CHECK_EQ(rig.status(), EPT_PEER_UP);
    std::this_thread::sleep_for(std::chrono::nanoseconds(kDead / 100));
  }
  wire::tamper(nullptr);
}

}  // namespace

int main() {
  RUN(hello_of_another_life());
  RUN(the_judge_was_away());
  RUN(immediates_of_nobody_are_signs_of_life());
}
