// SPDX-License-Identifier: Apache-2.0
//
// membership.cc: a mask stops a rank at once and for good, and costs nobody else; a rank that was masked or has died
// comes back under another epoch, and nothing of the one before does anything any more.
#include <algorithm>
#include <string>
#include <thread>
#include <vector>

#include "engine_world.h"

using namespace world;

namespace {

constexpr size_t kBytes = 1 << 20;

int32_t end_of(World &world, uint32_t rank, ept_transfer_id transfer) {
  int32_t code = EPT_E_TIMEOUT;
  world.until("the transfer ends",
              [&] { return (code = ept_transfer_wait(world[rank], transfer, 0, &error)) != EPT_E_TIMEOUT; });
  return code;
}

// The falsely masked rank goes on writing, and by its own account all is well until it is told no.
void masked_rank_goes_on_writing(const Options &options) {
  World world(3, options);
  world.connect_all();
  Route hostile(world, 1, 0, kBytes), bystander(world, 2, 0, kBytes), to_bystander(world, 0, 2, kBytes);
  uint64_t posted = 0;
  for (; posted < 200; posted++) OK(hostile.post(posted * 4096, 4096));
  world.turns(3);  // some have landed, some are on their way

  world.mask(0, 1, 7, "a test masks it");
  const std::vector<uint8_t> bytes = hostile.target;
  const uint64_t count = hostile.count();
  std::vector<ept_transfer_id> refused;
  for (int i = 0; i < 50; i++, posted++) {
    ept_transfer_id transfer = 0;
    const int32_t code = hostile.post(posted * 4096, 4096, &transfer);
    CHECK(code == EPT_OK || code == EPT_E_PEER_LOST);  // it may know by now
    if (code == EPT_OK) refused.push_back(transfer);
    OK(bystander.post(static_cast<uint64_t>(i) * 4096, 4096));
    OK(to_bystander.post(static_cast<uint64_t>(i) * 4096, 4096));
  }
  for (const ept_transfer_id transfer : refused) CHECK(end_of(world, 1, transfer) < 0);
  bystander.until_count(50);
  to_bystander.until_count(50);
  world.until("the masked rank knows", [&] { return world.info(1, 0).status != EPT_PEER_UP; });
  world.turns(2000);
  CHECK_EQ(hostile.count(), count);
  CHECK(hostile.target == bytes);
  CHECK_EQ(hostile.post(0, 4096), EPT_E_PEER_LOST);
  CHECK(std::equal(bystander.source.begin(), bystander.source.begin() + 50 * 4096, bystander.target.begin()));

  const ept_peer_info info = world.info(0, 1);
  CHECK_EQ(info.status, EPT_PEER_MASKED);
  CHECK_EQ(info.membership, 7);
  CHECK_HAS(info.why, "a test masks it");
  CHECK_EQ(world.info(0, 2).status, EPT_PEER_UP);
  CHECK_EQ(world.info(2, 1).status, EPT_PEER_UP);  // rank 2 has masked nobody
}

// Its queued and posted transfers fail at once, without a turn, and say why; the memory is free when the backend is.
void transfers_under_way_fail(const Options &options) {
  World world(2, options);
  world.connect_all();
  Route route(world, 0, 1, kBytes);
  std::vector<ept_transfer_id> transfers(1500);  // more than the credits: some are queued, some posted
  for (size_t i = 0; i < transfers.size(); i++) {
    const ept_write what = route.write((i % 200) * 4096, 4096);
    OK(ept_engine_write(world[0], &what, &transfers[i], &error));
  }
  world.mask(0, 1, 9, "it is slow");
  size_t failed = 0;
  for (const ept_transfer_id transfer : transfers) {
    const int32_t code = ept_transfer_wait(world[0], transfer, 0, &error);
    CHECK(code == EPT_OK || code == EPT_E_PEER_LOST);
    if (code == EPT_OK) continue;
    failed++;
    CHECK_EQ(error.peer, 1);
    CHECK_HAS(error.text, "rank 1 was masked under epoch 9: it is slow");
  }
  CHECK(failed > 400);
  world.until("the memory is let go",
              [&] { return ept_memory_deregister(world[0], route.source_memory, &error) == EPT_OK; });
  const ept_write what = route.write(0, 8);
  CHECK_EQ(ept_engine_write(world[0], &what, nullptr, &error), EPT_E_PEER_LOST);
  CHECK_HAS(error.text, "rank 1 was masked under epoch 9: it is slow");
  world.mask(0, 1, 10, "still");  // idempotent; the newer reason is kept
  CHECK_EQ(world.info(0, 1).membership, 10);
}

// Whoever waits for the masked rank hears of it, in whatever it waits.
void waits_end(const Options &options) {
  Options self_driven = options;
  self_driven.progress = EPT_PROGRESS_AUTO;
  World world(3, self_driven);
  world.connect_all();
  Route route(world, 1, 0, 4096);
  int32_t codes[3] = {};
  std::string words[2];
  std::thread signal([&] {
    ept_error own{};
    own.size = sizeof own;
    codes[0] = ept_signal_wait(world[0], route.signal, 1, 60 * second, &own);
    words[0] = own.text;
  });
  std::thread message([&] {
    ept_error own{};
    own.size = sizeof own;
    uint8_t into[8];
    size_t length = sizeof into;
    codes[1] = ept_engine_recv(world[0], 1, 5, into, &length, nullptr, 60 * second, &own);
    words[1] = own.text;
  });
  std::this_thread::sleep_for(std::chrono::milliseconds(50));
  world.mask(0, 1, 3, "why not");
  signal.join();
  message.join();
  for (int i = 0; i < 2; i++) {
    CHECK_EQ(codes[i], EPT_E_PEER_LOST);
    CHECK_HAS(words[i], "rank 1 was masked under epoch 3: why not");
  }
  CHECK_EQ(ept_engine_wait_peer(world[0], 1, 60 * second, &error), EPT_E_PEER_LOST);
  CHECK_EQ(ept_engine_mask(world[0], 0, 1, nullptr, &error), EPT_E_INVALID);
  CHECK_EQ(ept_engine_mask(world[0], 3, 1, nullptr, &error), EPT_E_INVALID);
}

// A quiesce that asks a rank which takes no part ends when that rank is masked.
void quiesce_ends(const Options &options) {
  World world(2, options);
  world.connect_all();
  Route route(world, 1, 0, 4096);
  CHECK_EQ(ept_engine_quiesce(world[0], route.target_memory, EPT_SCOPE_REMOTE, 0, &error), EPT_E_TIMEOUT);
  world.mask(0, 1);
  OK(ept_engine_quiesce(world[0], route.target_memory, EPT_SCOPE_REMOTE, 60 * second, &error));
}

// What the old life gave out is stale on both sides, and says so; counts go on from where they stood.
void check_new_link(World &world, Route &in, Route &out, uint64_t in_before, uint64_t out_before) {
  CHECK_EQ(in.count(), in_before);
  CHECK_EQ(out.count(), out_before);
  const ept_region_id old_region = out.region;
  const ept_remote_signal_id old_signal = out.remote;
  in.open();
  out.open();
  for (int i = 0; i < 300; i++) {
    OK(in.post(static_cast<uint64_t>(i) * 1024, 1024));
    OK(out.post(static_cast<uint64_t>(i) * 1024, 1024));
  }
  in.until_count(in_before + 300);
  out.until_count(out_before + 300);
  CHECK(std::equal(in.source.begin(), in.source.begin() + 300 * 1024, in.target.begin()));
  CHECK(std::equal(out.source.begin(), out.source.begin() + 300 * 1024, out.target.begin()));
  ept_write stale = out.write(0, 8);
  stale.destination = old_region;
  CHECK_EQ(ept_engine_write(world[out.from], &stale, nullptr, &error), EPT_E_PEER_LOST);
  CHECK_HAS(error.text, "has ended");
  stale = out.write(0, 0);
  stale.signal = old_signal;
  CHECK_EQ(ept_engine_write(world[out.from], &stale, nullptr, &error), EPT_E_PEER_LOST);
}

// A process dies, and another one comes for it.
void restarted(const Options &options) {
  World world(3, options);
  world.connect_all();
  Route in(world, 1, 0, kBytes), out(world, 0, 1, kBytes), other(world, 2, 0, kBytes);
  for (int i = 0; i < 100; i++) OK(in.post(static_cast<uint64_t>(i) * 1024, 1024));
  in.until_count(100);
  uint8_t blob[4200];
  size_t length = sizeof blob;
  OK(ept_region_export(world[0], in.target_memory, 1, 0, 64, blob, &length, &error));
  world.stop(1);
  world.mask(0, 1);
  world.mask(2, 1);
  world.start(1, 4);
  in.register_source();
  out.register_target();
  world.link(0, 1);
  world.link(2, 1);
  CHECK_EQ(world.info(0, 1).epoch, 4);
  ept_region_id old = 0;
  CHECK_EQ(ept_region_import(world[1], 0, blob, length, &old, &error), EPT_E_PEER_LOST);  // for the life before
  check_new_link(world, in, out, 100, 0);
  OK(other.post(0, kBytes));
  other.until_count(1);
  CHECK(world.readmit(0, 1) == EPT_E_INVALID);  // it is up
}

// The masked process goes on in another life of its own, with the memory and signals that it has.
void rejoined(const Options &options) {
  World world(3, options);
  world.connect_all();
  Route in(world, 1, 0, kBytes), out(world, 0, 1, kBytes), other(world, 2, 0, kBytes);
  for (int i = 0; i < 500; i++) {
    OK(in.post(static_cast<uint64_t>(i) * 1024, 1024));
    OK(out.post(static_cast<uint64_t>(i) * 1024, 1024));
  }
  world.turns(3);
  world.mask(0, 1);
  world.mask(2, 1);
  const uint64_t in_count = in.count();
  const std::vector<uint8_t> in_bytes = in.target;
  CHECK_EQ(world.readmit(0, 1), EPT_E_INVALID);  // that life is over here
  CHECK_HAS(error.text, "epoch 0 of rank 1 is over");
  world.rejoin(1, 1);
  const uint64_t out_count = out.count();
  CHECK_EQ(ept_engine_rejoin(world[1], 1, &error), EPT_E_INVALID);
  world.link(0, 1);  // at once: what is left of the old life may still be on its way
  world.link(2, 1);
  world.turns(1000);
  CHECK(in.target == in_bytes);
  check_new_link(world, in, out, in_count, out_count);
  OK(other.post(0, kBytes));
  other.until_count(1);
}

// Where no key can be revoked a masked rank writes on. So its memory is set aside: its bytes change, nothing counts
// them, and nobody gets that memory for something else until the process is known dead.
void set_aside() {
  Options options;
  options.values = {{"revocable", "0"}};
  World world(2, options);
  world.connect_all();
  Route route(world, 1, 0, kBytes);
  OK(route.post(0, 1024));
  route.until_count(1);
  world.mask(0, 1);
  OK(route.post(1024, 1024));
  world.turns(100);
  CHECK(std::equal(route.source.begin(), route.source.begin() + 2048, route.target.begin()));  // it can, and it does
  CHECK_EQ(route.count(), 1);
  CHECK_EQ(world.info(0, 1).set_aside, kBytes);
  CHECK_EQ(ept_memory_deregister(world[0], route.target_memory, &error), EPT_E_STUCK);
  CHECK_HAS(error.text, "rank 1, epoch 0, may write this memory still");
  CHECK_EQ(ept_engine_quiesce(world[0], route.target_memory, EPT_SCOPE_REMOTE, second, &error), EPT_E_STUCK);
  CHECK_HAS(error.text, "rank 1");

  world.stop(1);
  world.start(1, 1);
  OK(world.readmit(0, 1));  // waits for the end of the life before
  OK(world.readmit(1, 0));
  world.turns(100);
  CHECK_EQ(world.info(0, 1).status, EPT_PEER_CONNECTING);
  OK(ept_engine_known_dead(world[0], 1, 0, &error));
  world.until("the next life is up", [&] { return world.info(0, 1).status == EPT_PEER_UP; });
  CHECK_EQ(world.info(0, 1).set_aside, 0);
  OK(ept_memory_deregister(world[0], route.target_memory, &error));
}

void all(const Options &options) {
  RUN(masked_rank_goes_on_writing(options));
  RUN(transfers_under_way_fail(options));
  RUN(waits_end(options));
  RUN(quiesce_ends(options));
  RUN(restarted(options));
  RUN(rejoined(options));
  // A rejoin takes the backend from under a proxy that sleeps on its descriptor.
  Options self_driven = options;
  self_driven.progress = EPT_PROGRESS_AUTO;
  RUN(rejoined(self_driven));
}

}  // namespace

int main() {
  RUN(set_aside());
  Options options;
  std::puts("loopback");
  all(options);
  for (const char *seed : {"1", "2", "3"}) {
    std::printf("loopback, adversary %s\n", seed);
    options.values = {{"adversary", seed}, {"delay", "100"}};
    all(options);
  }
  std::puts("tcp");
  options = {};
  options.backend = "tcp";
  all(options);
}
