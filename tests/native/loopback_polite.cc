// SPDX-License-Identifier: Apache-2.0
//
// Loopback without the adversary, through its table, one thread: each rule of backend.h that a plugin can break alone.
#include <poll.h>
#include <unistd.h>

#include <algorithm>
#include <numeric>

#include "plugin.h"

using plugin::connect;
using plugin::Event;
using plugin::Group;
using plugin::Identity;
using plugin::Options;
using plugin::Rank;
using plugin::Values;
using plugin::Window;

namespace {

const ept_backend &loopback = plugin::built("loopback");

bool all(const std::vector<uint8_t> &bytes, uint8_t value) {
  return std::all_of(bytes.begin(), bytes.end(), [&](uint8_t byte) { return byte == value; });
}

void limits_are_told() {
  ept_probe probe = {};
  probe.size = sizeof probe;
  const Values polite(loopback, {}), hostile(loopback, {{"adversary", "7"}});
  const ept_host host = plugin::host();
  CHECK_OK(loopback, loopback.probe(&host, polite.list.data(), polite.list.size(), &probe));
  CHECK_EQ(probe.caps.protection, EPT_PROTECTION_KEY);
  CHECK_EQ(probe.caps.mapped, 1);
  CHECK_EQ(probe.caps.can_revoke, 1);
  CHECK_EQ(probe.caps.waived, 0);
  CHECK_HAS(probe.summary, "1 rail");
  CHECK_OK(loopback, loopback.probe(&host, hostile.list.data(), hostile.list.size(), &probe));
  CHECK_HAS(probe.summary, "4 rails, adversary with seed 7");

  Rank rank(loopback, {});
  ept_rail rails[4] = {};
  uint32_t count = 0;
  CHECK_OK(loopback, loopback.rails(rank.instance, rails, 4, &count));
  CHECK_EQ(count, 1);
  CHECK(rails[0].max_peers >= 2 && rails[0].max_regions && rails[0].cq_depth >= 1024 && rails[0].tx_depth);

  // A caller with an older, shorter struct gets no byte past its size.
  ept_caps caps;
  memset(&caps, 0xee, sizeof caps);
  caps.size = 16;
  CHECK_OK(loopback, loopback.caps(rank.instance, &caps));
  CHECK_EQ(caps.max_message, 1 << 20);
  CHECK_EQ(caps.max_send, 0xeeeeeeee);
}

void wrong_settings_are_refused() {
  const std::pair<Options, std::string> wrong[] = {
      {{{"rails", "65"}}, "`rails` is \"65\""},
      {{{"rails", "two"}}, "\"two\""},
      {{{"tx_depth", "0"}}, "from 1 to"},
      {{{"nonsense", "1"}}, "no setting `nonsense`"},
  };
  const ept_host host = plugin::host();
  for (const auto &[options, words] : wrong) {
    ept_instance *instance = nullptr;
    CHECK_EQ(Rank::open(loopback, {}, Values(loopback, options), host, &instance), EPT_E_CONFIG);
    CHECK_HAS(plugin::error_text(loopback), words);
  }
}

void identities_are_checked() {
  Rank rank(loopback, {});
  const ept_host host = plugin::host();
  const Values values(loopback, {});
  ept_instance *instance = nullptr;
  Identity same, other_world, outside;
  other_world.rank = 1;
  other_world.world = 3;
  outside.rank = 2;
  CHECK_EQ(Rank::open(loopback, same, values, host, &instance), EPT_E_INVALID);
  CHECK_HAS(plugin::error_text(loopback), "is open in this process");
  CHECK_EQ(Rank::open(loopback, other_world, values, host, &instance), EPT_E_MISMATCH);
  CHECK_HAS(plugin::error_text(loopback), "has 3 ranks, others say 2");
  CHECK_EQ(Rank::open(loopback, outside, values, host, &instance), EPT_E_INVALID);

  Identity spy;
  spy.rank = 1;
  spy.secret = "guess";
  Rank stranger(loopback, spy);
  CHECK_EQ(stranger.open_peer(0, 0, rank.address()), EPT_E_AUTH);
  CHECK_EQ(rank.open_peer(1, 0, stranger.address()), EPT_E_AUTH);
  ept_reach reach = {};
  reach.size = sizeof reach;
  const std::string address = stranger.address();
  CHECK_EQ(loopback.reach(rank.instance, address.data(), address.size(), &reach), EPT_E_AUTH);
  CHECK_HAS(reach.why_not, "secret");
}

void addresses_are_checked() {
  Rank zero(loopback, {}), one(loopback, {.rank = 1});
  std::string address = one.address();
  ept_reach reach = {};
  reach.size = sizeof reach;
  CHECK_OK(loopback, loopback.reach(zero.instance, address.data(), address.size(), &reach));
  CHECK_EQ(reach.mapped, 1);
  CHECK(reach.bytes_per_s && reach.latency_ns && reach.operation_cost_ns);

  CHECK_EQ(zero.open_peer(1, 3, address), EPT_E_INVALID);  // another epoch than the address has
  CHECK_EQ(zero.open_peer(5, 0, address), EPT_E_INVALID);
  CHECK_EQ(zero.open_peer(1, 0, address.substr(1)), EPT_E_VERSION);
  CHECK_EQ(zero.open_peer(1, 0, address + "x"), EPT_E_INVALID);
  CHECK_EQ(zero.open_peer(1, 0, ""), EPT_E_VERSION);
  std::string elsewhere = address;
  ++elsewhere[12];  // the process
  CHECK_EQ(zero.open_peer(1, 0, elsewhere), EPT_E_UNAVAILABLE);
  CHECK_HAS(plugin::error_text(loopback), "another backend");

  one.leave();
  CHECK_EQ(loopback.reach(zero.instance, address.data(), address.size(), &reach), EPT_E_PEER_LOST);
  CHECK_OK(loopback, zero.open_peer(1, 0, address));
  CHECK_EQ(zero.expect(EPT_EVENT_PEER).code, EPT_E_PEER_LOST);
  CHECK_EQ(loopback.peer_state(zero.instance, 1), EPT_E_PEER_LOST);
}

void connecting_takes_both() {
  Rank zero(loopback, {}), one(loopback, {.rank = 1});
  CHECK_EQ(loopback.peer_state(zero.instance, 1), EPT_E_INVALID);
  CHECK_OK(loopback, zero.open_peer(1, 0, one.address()));
  CHECK_EQ(loopback.peer_state(zero.instance, 1), EPT_LATER);
  const std::string text = "early";
  CHECK_EQ(zero.post(Rank::message(1, text, 1)), EPT_LATER);
  zero.expect_nothing();
  CHECK_OK(loopback, one.open_peer(0, 0, zero.address()));
  CHECK_EQ(zero.expect(EPT_EVENT_PEER).code, EPT_OK);
  CHECK_EQ(one.expect(EPT_EVENT_PEER).code, EPT_OK);
  CHECK_EQ(loopback.peer_state(zero.instance, 1), EPT_OK);
  CHECK_EQ(loopback.peer_state(one.instance, 0), EPT_OK);
  CHECK_EQ(zero.open_peer(1, 0, one.address()), EPT_E_INVALID);
  CHECK_EQ(zero.post(Rank::message(1, text, 1)), EPT_OK);
  CHECK_EQ(one.expect(EPT_EVENT_RECV).bytes, text);
}

void a_call_without_answer_ends() {
  Rank zero(loopback, {});
  {
    Rank one(loopback, {.rank = 1});
    CHECK_OK(loopback, zero.open_peer(1, 0, one.address()));
  }
  CHECK_EQ(zero.expect(EPT_EVENT_PEER).code, EPT_E_PEER_LOST);

  Rank one(loopback, {.rank = 1, .epoch = 1});
  CHECK_OK(loopback, zero.open_peer(1, 1, one.address()));
  CHECK_OK(loopback, loopback.peer_close(zero.instance, 1));
  CHECK_OK(loopback, one.open_peer(0, 0, zero.address()));  // nobody calls any more
  one.expect_nothing();
  CHECK_EQ(loopback.peer_state(one.instance, 0), EPT_LATER);
}

void two_jobs_never_meet() {
  Group one(loopback, 2, {}, {.job = "one"}), other(loopback, 2, {}, {.job = "other"});
  CHECK_OK(loopback, loopback.peer_close(one[0].instance, 1));
  CHECK_OK(loopback, one[0].open_peer(1, 0, other[1].address()));  // the address of one who is not here
  CHECK_EQ(one[0].expect(EPT_EVENT_PEER).code, EPT_E_PEER_LOST);
}

void a_write_arrives() {
  Group group(loopback, 2);
  for (const size_t length : {size_t{1}, size_t{64}, size_t{32768}, size_t{32769}, size_t{1} << 20}) {
    Window window(group[0], group[1], length + 2);
    std::iota(window.source.begin(), window.source.end(), 1);
    CHECK_EQ(group[0].post(Rank::write(1, window.source_mem, &window.source[1], window.region, 1, length, 77, 5)),
             EPT_OK);
    const Event imm = group[1].expect(EPT_EVENT_IMM);
    CHECK_EQ(imm.immediate, 77);
    CHECK_EQ(imm.length, length);
    CHECK_EQ(imm.peer, 0);
    CHECK_EQ(window.bytes[0], 0);
    CHECK_EQ(window.bytes[length + 1], 0);
    CHECK(!memcmp(&window.bytes[1], &window.source[1], length));
    const Event done = group[0].expect(EPT_EVENT_LOCAL_DONE);
    CHECK_EQ(done.cookie, 5);
    CHECK_EQ(done.peer, 1);
  }
  group[0].expect_nothing();
  group[1].expect_nothing();
}

void nothing_arrives_too() {
  Group group(loopback, 2);
  Window window(group[0], group[1], 8);
  CHECK_EQ(group[0].post(Rank::write(1, nullptr, nullptr, window.region, 8, 0, 0xffffffff, 0)), EPT_OK);
  CHECK_EQ(group[0].post(Rank::signal(1, window.region, 3, 4)), EPT_OK);
  const Event first = group[1].expect(EPT_EVENT_IMM), second = group[1].expect(EPT_EVENT_IMM);
  CHECK_EQ(first.immediate, 0xffffffff);
  CHECK_EQ(second.immediate, 3);
  CHECK_EQ(first.length + second.length, 0);
  CHECK_EQ(group[0].expect(EPT_EVENT_LOCAL_DONE).cookie, 0);
  CHECK_EQ(group[0].expect(EPT_EVENT_LOCAL_DONE).cookie, 4);
}

void messages_are_copied() {
  Group group(loopback, 2);
  std::string text = "hello";
  CHECK_EQ(group[0].post(Rank::message(1, text, 1)), EPT_OK);
  text = "gone!";
  CHECK_EQ(group[0].post(Rank::message(1, "", 2)), EPT_OK);
  CHECK_EQ(group[0].post(Rank::message(1, std::string(8193, 'x'), 3)), EPT_E_INVALID);
  CHECK_HAS(plugin::error_text(loopback), "max_send");
  const Event first = group[1].expect(EPT_EVENT_RECV), second = group[1].expect(EPT_EVENT_RECV);
  CHECK_EQ(first.bytes, "hello");
  CHECK_EQ(second.length, 0);
  CHECK_EQ(group[0].expect(EPT_EVENT_LOCAL_DONE).cookie, 1);
  CHECK_EQ(group[0].expect(EPT_EVENT_LOCAL_DONE).cookie, 2);
  const ept_rail_counters sent = group[0].count(), received = group[1].count();
  CHECK_EQ(sent.tx_sends, 2);
  CHECK_EQ(sent.tx_operations, 0);
  CHECK_EQ(received.rx_sends, 2);
}

// Posts a write that the target must refuse: an ERROR ACCESS here, nothing there.
void refused(Group &group, Window &window, ept_region *region, uint64_t offset, uint64_t length, const char *words) {
  std::fill(window.source.begin(), window.source.end(), 0xaa);
  CHECK_EQ(group[0].post(Rank::write(1, window.source_mem, window.source.data(), region, offset, length, 9, 42)),
           EPT_OK);
  const Event error = group[0].expect(EPT_EVENT_ERROR);
  CHECK_EQ(error.code, EPT_E_ACCESS);
  CHECK_EQ(error.cookie, 42);
  CHECK_EQ(error.peer, 1);
  CHECK_HAS(error.words, words);
  group[0].expect_nothing(3);
  group[1].expect_nothing(3);
  CHECK(all(window.bytes, 0));
}

void only_the_key_opens() {
  Group group(loopback, 3);
  Window window(group[0], group[1], 256);
  // Every bit of the blob behind its version, rank, role and length matters: slot and key.
  const size_t fixed = window.blob.size() - 16;
  for (size_t bit = 8 * fixed; bit < 8 * window.blob.size(); ++bit) {
    std::string forged = window.blob;
    forged[bit / 8] = static_cast<char>(forged[bit / 8] ^ 1 << bit % 8);
    ept_region *region = group[0].import(1, forged);
    refused(group, window, region, 0, 256, "key");
    group[0].drop(region);
  }
  for (size_t bit = 0; bit < 32; ++bit) {
    std::string forged = window.blob;
    forged[8 + bit / 8] = static_cast<char>(forged[8 + bit / 8] ^ 1 << bit % 8);
    ept_region *region = group[0].import(1, forged);
    refused(group, window, region, 0, 256, "key");
    group[0].drop(region);
  }
  // Another rank's key, whole and valid.
  const auto [blob, key] = group[1].grant(window.mem, 2, 0, 256);
  CHECK(blob != window.blob);
  refused(group, window, group[0].import(1, blob), 0, 256, "key");
  // A signal is no exception.
  CHECK_EQ(group[0].post(Rank::signal(1, group[0].import(1, blob), 1, 2)), EPT_OK);
  CHECK_EQ(group[0].expect(EPT_EVENT_ERROR).code, EPT_E_ACCESS);
  group[1].expect_nothing(3);

  std::string foreign = window.blob;
  foreign[0] = 9;
  ept_region *region = nullptr;
  CHECK_EQ(loopback.region_import(group[0].instance, 1, foreign.data(), foreign.size(), &region), EPT_E_VERSION);
  CHECK_EQ(loopback.region_import(group[0].instance, 1, window.blob.data(), 9, &region), EPT_E_INVALID);
  CHECK_EQ(loopback.region_import(group[0].instance, 2, window.blob.data(), window.blob.size(), &region),
           EPT_E_INVALID);
}

void bounds_hold() {
  Group group(loopback, 2);
  Window window(group[0], group[1], 256);
  const auto [blob, key] = group[1].grant(window.mem, 0, 64, 128);
  ept_region *part = group[0].import(1, blob);
  refused(group, window, part, 0, 129, "outside");
  refused(group, window, part, 128, 1, "outside");
  refused(group, window, part, 129, 0, "outside");
  refused(group, window, part, UINT64_MAX, 1, "outside");
  refused(group, window, part, UINT64_MAX - 63, 64, "outside");
  CHECK_EQ(group[0].post(Rank::write(1, window.source_mem, window.source.data(), part, 64, 64, 1, 1)), EPT_OK);
  group[1].expect(EPT_EVENT_IMM);
  for (size_t i = 0; i < 256; ++i) CHECK_EQ(window.bytes[i], i >= 128 && i < 192 ? 0xaa : 0);
}

void a_revoked_key_opens_nothing() {
  Group group(loopback, 2);
  Window window(group[0], group[1], 64);
  const auto [other_blob, other_key] = group[1].grant(window.mem, 0, 0, 64);
  ept_region *other = group[0].import(1, other_blob);
  CHECK_EQ(loopback.region_revoke(window.mem, 1, window.key), EPT_E_INVALID);  // not that rank's
  CHECK_OK(loopback, loopback.region_revoke(window.mem, 0, window.key));
  CHECK_EQ(loopback.region_revoke(window.mem, 0, window.key), EPT_E_INVALID);
  refused(group, window, window.region, 0, 64, "revoked");
  // The slot is used again; the old key doesn't fit it.
  const auto [next_blob, next_key] = group[1].grant(window.mem, 0, 0, 64);
  CHECK(next_key != window.key);
  refused(group, window, window.region, 0, 64, "key");
  CHECK_OK(loopback, group[1].release(window.mem));  // revokes what is left
  refused(group, window, other, 0, 64, "revoked");
  refused(group, window, group[0].import(1, next_blob), 0, 64, "revoked");
}

void rights_are_needed() {
  Group group(loopback, 2);
  std::vector<uint8_t> bytes(64);
  ept_mem *readable = group[1].enroll(bytes.data(), 64, EPT_ACCESS_LOCAL);
  ept_mem *writable = group[0].enroll(bytes.data(), 64, EPT_ACCESS_REMOTE_WRITE);
  char blob[256];
  size_t length = sizeof blob;
  uint64_t key = 0;
  CHECK_EQ(loopback.region_export(readable, 0, 0, 64, blob, &length, &key), EPT_E_ACCESS);
  CHECK_EQ(loopback.region_export(writable, 1, 60, 5, blob, &length, &key), EPT_E_INVALID);
  length = 3;
  CHECK_EQ(loopback.region_export(writable, 1, 0, 64, blob, &length, &key), EPT_E_LIMIT);
  ept_memory memory = {};
  memory.size = sizeof memory;
  memory.kind = EPT_MEMORY_CUDA;
  memory.address = bytes.data();
  memory.length = 64;
  ept_mem *mem = nullptr;
  CHECK_EQ(loopback.mem_register(group[0].instance, &memory, &mem), EPT_E_UNSUPPORTED);

  Window window(group[0], group[1], 64);
  const auto not_posted = [&](ept_op op, const char *words) {
    CHECK_EQ(group[0].post(op), EPT_E_INVALID);
    CHECK_HAS(plugin::error_text(loopback), words);
  };
  const ept_op good = Rank::write(1, window.source_mem, window.source.data(), window.region, 0, 64, 1, 1);
  ept_op op = good;
  op.source_mem = writable;
  op.source = bytes.data();
  not_posted(op, "may not be read");
  op = good;
  op.source = window.source.data() + 1;
  not_posted(op, "inside its registration");
  op.source = window.source.data() - 1;
  not_posted(op, "inside its registration");
  op = good;
  op.source_mem = nullptr;
  not_posted(op, "not registered");
  op = good;
  op.rail = 1;
  not_posted(op, "rail 1");
  op = good;
  op.peer = 2;
  not_posted(op, "no such peer");
  op = good;
  op.region = nullptr;
  not_posted(op, "region");
  op = good;
  op.kind = EPT_OP_READ;
  not_posted(op, "kind");
  op = good;
  op.size = 8;
  not_posted(op, "size");
  // What stood before a refused operation was taken, what stands behind it not looked at.
  ept_op ops[3] = {good, op, good};
  size_t posted = 0;
  CHECK_EQ(loopback.post(group[0].worker, ops, 3, &posted), EPT_E_INVALID);
  CHECK_EQ(posted, 1);
  group[0].expect(EPT_EVENT_LOCAL_DONE);
  group[0].expect_nothing(3);
  group[1].expect(EPT_EVENT_IMM);
  group[1].expect_nothing(3);
}

void a_full_queue_says_later() {
  Group group(loopback, 2, {{"tx_depth", "8"}, {"rails", "2"}});
  Window window(group[0], group[1], 8);
  std::vector<ept_op> ops;
  for (uint32_t i = 0; i < 12; ++i) ops.push_back(Rank::signal(1, window.region, i, i));
  size_t posted = 0;
  CHECK_EQ(loopback.post(group[0].worker, ops.data(), ops.size(), &posted), EPT_LATER);
  CHECK_EQ(posted, 8);
  ept_op other = Rank::signal(1, window.region, 99, 99);
  CHECK_EQ(group[0].post(other), EPT_LATER);
  other.rail = 1;  // has a queue of its own
  CHECK_EQ(group[0].post(other), EPT_OK);
  CHECK_EQ(group[0].count(0).later, 2);
  for (uint64_t i = 0; i < 8; ++i) CHECK_EQ(group[0].expect(EPT_EVENT_LOCAL_DONE).cookie, i);
  CHECK_EQ(loopback.post(group[0].worker, &ops[8], 4, &posted), EPT_OK);
  uint64_t seen = 0;
  for (int i = 0; i < 13; ++i) seen += group[1].expect(EPT_EVENT_IMM).immediate;
  CHECK_EQ(seen, 66 + 99);
  group[1].expect_nothing();
}

void a_full_inbox_says_later() {
  Group group(loopback, 3, {{"cq_depth", "4"}});
  Window window(group[0], group[1], 8), second(group[2], group[1], 8);
  const ept_op op = Rank::signal(1, window.region, 1, 1);
  for (int i = 0; i < 4; ++i) CHECK_EQ(group[0].post(op), EPT_OK);
  CHECK_EQ(group[0].post(op), EPT_LATER);
  CHECK_EQ(group[2].post(Rank::signal(1, second.region, 1, 1)), EPT_LATER);
  for (int i = 0; i < 4; ++i) group[0].expect(EPT_EVENT_LOCAL_DONE);
  int descriptor = -1;
  CHECK_EQ(loopback.arm(group[0].worker, &descriptor), EPT_OK);
  pollfd sleeper = {descriptor, POLLIN, 0};
  CHECK_EQ(poll(&sleeper, 1, 0), 0);
  CHECK_EQ(group[1].poll().size(), 4);
  CHECK_EQ(poll(&sleeper, 1, 0), 1);                                // there is room again
  CHECK_EQ(loopback.arm(group[2].worker, &descriptor), EPT_LATER);  // who was awake is told by arm
  group[0].expect_nothing(1);
  CHECK_EQ(poll(&sleeper, 1, 0), 0);
  CHECK_EQ(group[0].post(op), EPT_OK);
  group[1].expect(EPT_EVENT_IMM);
}

void arm_sleeps_and_wakes() {
  Group group(loopback, 2);
  Window window(group[0], group[1], 8);
  int descriptor = -1, again = -1;
  const ept_op op = Rank::signal(1, window.region, 1, 1);
  CHECK_EQ(group[0].post(op), EPT_OK);
  CHECK_EQ(loopback.arm(group[0].worker, &descriptor), EPT_LATER);  // its LOCAL_DONE waits
  CHECK_EQ(loopback.arm(group[1].worker, &descriptor), EPT_LATER);  // an IMM waits
  group[1].expect(EPT_EVENT_IMM);
  for (int round = 0; round < 3; ++round) {
    group[0].expect(EPT_EVENT_LOCAL_DONE);
    CHECK_EQ(loopback.arm(group[1].worker, &again), EPT_OK);
    CHECK_EQ(again, descriptor);
    pollfd sleeper = {descriptor, POLLIN, 0};
    CHECK_EQ(poll(&sleeper, 1, 0), 0);
    CHECK_EQ(group[0].post(op), EPT_OK);
    CHECK_EQ(poll(&sleeper, 1, 0), 1);
    group[1].expect(EPT_EVENT_IMM);
    CHECK_EQ(poll(&sleeper, 1, 0), 0);
  }
}

// Another thread posts, or asks for quiet, while the one that drives the worker sleeps.
void own_calls_wake_the_sleeper() {
  Group group(loopback, 2);
  Window window(group[0], group[1], 8);
  int descriptor = -1;
  CHECK_EQ(loopback.arm(group[0].worker, &descriptor), EPT_OK);
  pollfd sleeper = {descriptor, POLLIN, 0};
  CHECK_EQ(group[0].post(Rank::signal(1, window.region, 1, 1)), EPT_OK);
  CHECK_EQ(poll(&sleeper, 1, 0), 1);
  group[0].expect(EPT_EVENT_LOCAL_DONE);
  CHECK_EQ(loopback.arm(group[0].worker, &descriptor), EPT_OK);
  CHECK_EQ(poll(&sleeper, 1, 0), 0);
  CHECK_OK(loopback, loopback.quiesce(group[0].worker, 1, EPT_SCOPE_LOCAL, 1));
  CHECK_EQ(poll(&sleeper, 1, 0), 1);
  group[0].expect(EPT_EVENT_QUIESCED);
}

void poll_fills_what_it_is_given() {
  Group group(loopback, 2);
  Window there(group[0], group[1], 8), back(group[1], group[0], 8);
  for (uint32_t i = 0; i < 20; ++i) {
    CHECK_EQ(group[0].post(Rank::signal(1, there.region, i, i)), EPT_OK);
    CHECK_EQ(group[1].post(Rank::signal(0, back.region, i, i)), EPT_OK);
  }
  size_t own = 0, arrived = 0;
  CHECK_EQ(group[0].poll(0).size(), 0);
  while (own + arrived < 40) {
    const std::vector<Event> events = group[0].poll(8);
    CHECK_EQ(events.size(), 8);
    for (const Event &event : events) ++(event.kind == EPT_EVENT_IMM ? arrived : own);
    if (own + arrived < 32) CHECK_EQ(own, arrived);  // neither starves
  }
  CHECK_EQ(own, 20);
}

void the_dead_are_told() {
  Group group(loopback, 3);
  Window window(group[0], group[1], 8);
  const std::string text = "last words";
  CHECK_EQ(group[1].post(Rank::message(0, text, 1)), EPT_OK);
  group[1].leave();
  CHECK_EQ(group[0].expect(EPT_EVENT_RECV).bytes, text);  // what came before is not lost
  for (size_t rank : {0, 2}) {
    const Event event = group[rank].expect(EPT_EVENT_PEER);
    CHECK_EQ(event.code, EPT_E_PEER_LOST);
    CHECK_EQ(event.peer, 1);
    CHECK_HAS(event.words, "rank 1 is gone");
  }
  CHECK_EQ(loopback.peer_state(group[0].instance, 1), EPT_E_PEER_LOST);
  CHECK_EQ(loopback.peer_state(group[0].instance, 2), EPT_OK);  // costs nobody else anything
  CHECK_EQ(group[0].post(Rank::write(1, window.source_mem, window.source.data(), window.region, 0, 8, 1, 6)), EPT_OK);
  const Event error = group[0].expect(EPT_EVENT_ERROR);
  CHECK_EQ(error.code, EPT_E_PEER_LOST);
  CHECK_EQ(error.cookie, 6);
  CHECK_OK(loopback, loopback.peer_close(group[0].instance, 1));
  group[0].expect_nothing();
  CHECK_EQ(group[0].post(Rank::message(2, text, 1)), EPT_OK);
  CHECK_EQ(group[2].expect(EPT_EVENT_RECV).bytes, text);
}

void closing_a_peer_is_told_to_it() {
  Group group(loopback, 2);
  CHECK_EQ(group[1].post(Rank::message(0, "unread", 1)), EPT_OK);
  CHECK_OK(loopback, loopback.peer_close(group[0].instance, 1));
  group[0].expect_nothing();  // what it had sent goes with it
  CHECK_EQ(group[1].expect(EPT_EVENT_PEER).code, EPT_E_PEER_LOST);
  group[1].expect(EPT_EVENT_LOCAL_DONE);
  CHECK_EQ(loopback.peer_state(group[0].instance, 1), EPT_E_INVALID);
}

void a_fenced_epoch_lands_nothing() {
  Identity identity;
  identity.job = "fence";
  Rank zero(loopback, identity, {{"rails", "2"}});
  identity.rank = 1;
  Rank old(loopback, identity, {{"rails", "2"}});
  connect({&zero, &old});
  Window window(old, zero, 8), back(zero, old, 8);
  for (uint32_t i = 0; i < 5; ++i) {
    ept_op op = Rank::signal(0, window.region, i, i);
    op.rail = i < 3 ? 0 : 1;
    CHECK_EQ(old.post(op), EPT_OK);
    old.expect(EPT_EVENT_LOCAL_DONE);
  }
  CHECK_OK(loopback, loopback.peer_fence(zero.instance, 1, 0, 1234));
  std::fill(window.source.begin(), window.source.end(), 0xaa);
  CHECK_EQ(old.post(Rank::write(0, window.source_mem, window.source.data(), window.region, 0, 8, 1, 1)), EPT_OK);
  for (int i = 0; i < 5; ++i) zero.expect(EPT_EVENT_IMM);  // what had arrived before counts
  for (uint32_t rail = 0; rail < 2; ++rail) {
    const Event fenced = zero.expect(EPT_EVENT_FENCED);
    CHECK_EQ(fenced.rail, rail);
    CHECK_EQ(fenced.immediate, rail ? 2 : 3);
    CHECK_EQ(fenced.cookie, 1234);
    CHECK_EQ(fenced.peer, 1);
  }
  zero.expect_nothing();
  CHECK(all(window.bytes, 0));
  CHECK_HAS(old.expect(EPT_EVENT_PEER).words, "fenced");
  CHECK_EQ(old.expect(EPT_EVENT_ERROR).code, EPT_E_PEER_LOST);
  CHECK_EQ(zero.post(Rank::signal(1, back.region, 1, 1)), EPT_OK);
  CHECK_EQ(zero.expect(EPT_EVENT_ERROR).code, EPT_E_PEER_LOST);
  CHECK_EQ(zero.open_peer(1, 0, old.address()), EPT_E_INVALID);
  CHECK_HAS(plugin::error_text(loopback), "fenced");

  // The rank comes back. Its old life's key is no use to it.
  identity.epoch = 1;
  Rank fresh(loopback, identity, {{"rails", "2"}});
  connect({&zero, &fresh});
  ept_region *stale = fresh.import(0, window.blob);
  std::vector<uint8_t> source(8, 0xaa);
  ept_mem *source_mem = fresh.enroll(source.data(), 8);
  CHECK_EQ(fresh.post(Rank::write(0, source_mem, source.data(), stale, 0, 8, 1, 1)), EPT_OK);
  CHECK_EQ(fresh.expect(EPT_EVENT_ERROR).code, EPT_E_ACCESS);
  CHECK(all(window.bytes, 0));
  const auto [blob, key] = zero.grant(window.mem, 1, 0, 8);
  CHECK_EQ(fresh.post(Rank::write(0, source_mem, source.data(), fresh.import(0, blob), 0, 8, 7, 1)), EPT_OK);
  const Event imm = zero.expect(EPT_EVENT_IMM);
  CHECK_EQ(imm.epoch, 1);
  CHECK(all(window.bytes, 0xaa));
  // Fencing the old epoch again leaves the new one alone; consumed counts begin anew.
  CHECK_OK(loopback, loopback.peer_fence(zero.instance, 1, 0, 1));
  CHECK_EQ(zero.expect(EPT_EVENT_FENCED).immediate, 1);
  CHECK_EQ(zero.expect(EPT_EVENT_FENCED).immediate, 0);
  CHECK_EQ(loopback.peer_state(zero.instance, 1), EPT_OK);
}

void a_mapped_region_is_the_peers_memory() {
  Group group(loopback, 2);
  Window window(group[0], group[1], 64);
  const auto [blob, key] = group[1].grant(window.mem, 0, 16, 8);
  ept_region *part = group[0].import(1, blob);
  void *address = nullptr;
  CHECK_OK(loopback, loopback.region_map(part, &address));
  CHECK_EQ(address, static_cast<void *>(&window.bytes[16]));
  CHECK_OK(loopback, loopback.region_revoke(window.mem, 0, key));
  CHECK_EQ(loopback.region_map(part, &address), EPT_E_ACCESS);

  Group plain(loopback, 2, {{"mapped", "0"}}, {.job = "plain"});
  Window unmapped(plain[0], plain[1], 64);
  CHECK_EQ(loopback.region_map(unmapped.region, &address), EPT_E_UNSUPPORTED);
}

void quiesce_and_counters() {
  Group group(loopback, 2);
  Window window(group[0], group[1], 64);
  CHECK_EQ(group[0].post(Rank::write(1, window.source_mem, window.source.data(), window.region, 0, 64, 1, 1)), EPT_OK);
  CHECK_EQ(group[0].post(Rank::signal(1, window.region, 1, 2)), EPT_OK);
  CHECK_OK(loopback, loopback.quiesce(group[0].worker, UINT32_MAX, EPT_SCOPE_REMOTE, 5));
  CHECK_EQ(loopback.quiesce(group[0].worker, 2, EPT_SCOPE_LOCAL, 5), EPT_E_INVALID);
  group[0].expect(EPT_EVENT_LOCAL_DONE);
  group[0].expect(EPT_EVENT_LOCAL_DONE);
  const Event quiet = group[0].expect(EPT_EVENT_QUIESCED);
  CHECK_EQ(quiet.cookie, 5);
  CHECK_EQ(quiet.code, EPT_OK);
  group[1].expect(EPT_EVENT_IMM);
  group[1].expect(EPT_EVENT_IMM);
  const ept_rail_counters sent = group[0].count(), received = group[1].count();
  CHECK_EQ(sent.tx_operations, 2);
  CHECK_EQ(sent.tx_bytes, 64);
  CHECK_EQ(received.rx_operations, 2);
  CHECK_EQ(received.rx_bytes, 64);
  ept_worker *second = nullptr;
  CHECK_EQ(loopback.worker_open(group[0].instance, &second), EPT_E_LIMIT);
}

void limits_are_named() {
  Group group(loopback, 2, {{"max_regions", "3"}, {"max_message", "16"}});
  Window window(group[0], group[1], 64);
  group[1].grant(window.mem, 0, 0, 1);
  const auto [blob, last] = group[1].grant(window.mem, 0, 0, 1);
  char bytes[256];
  size_t length = sizeof bytes;
  uint64_t key = 0;
  CHECK_EQ(loopback.region_export(window.mem, 0, 0, 1, bytes, &length, &key), EPT_E_LIMIT);
  CHECK_HAS(plugin::error_text(loopback), "max_regions is 3");
  CHECK_OK(loopback, loopback.region_revoke(window.mem, 0, last));
  group[1].grant(window.mem, 0, 0, 1);
  CHECK_EQ(group[0].post(Rank::write(1, window.source_mem, window.source.data(), window.region, 0, 17, 1, 1)),
           EPT_E_INVALID);
  CHECK_HAS(plugin::error_text(loopback), "max_message");
}

void self_is_a_peer() {
  Rank rank(loopback, {});
  CHECK_OK(loopback, rank.open_peer(0, 0, rank.address()));
  CHECK_EQ(rank.expect(EPT_EVENT_PEER).code, EPT_OK);
  Window window(rank, rank, 64);
  window.source[3] = 5;
  CHECK_EQ(rank.post(Rank::write(0, window.source_mem, window.source.data(), window.region, 0, 64, 1, 2)), EPT_OK);
  rank.expect(EPT_EVENT_IMM);
  rank.expect(EPT_EVENT_LOCAL_DONE);
  CHECK_EQ(window.bytes[3], 5);
  CHECK_OK(loopback, loopback.peer_close(rank.instance, 0));
  rank.expect_nothing();
}

// Two hundred and fifty-six ranks, each writes to each.
void a_world_of_256() {
  constexpr uint32_t kWorld = 256;
  Group group(loopback, kWorld, {}, {.job = "world"});
  std::vector<std::vector<uint32_t>> inbox(kWorld, std::vector<uint32_t>(kWorld));
  std::vector<ept_mem *> mems;
  std::vector<uint32_t> source(kWorld);
  for (uint32_t rank = 0; rank < kWorld; ++rank) mems.push_back(group[rank].enroll(inbox[rank].data(), 4 * kWorld));
  for (uint32_t from = 0; from < kWorld; ++from) {
    source[from] = from + 1;
    ept_mem *source_mem = group[from].enroll(&source[from], 4);
    std::vector<ept_op> ops;
    for (uint32_t to = 0; to < kWorld; ++to) {
      if (to == from) continue;
      ept_region *region = group[from].import(to, group[to].grant(mems[to], from, 4 * from, 4).first);
      ops.push_back(Rank::write(to, source_mem, &source[from], region, 0, 4, from, to));
    }
    size_t posted = 0;
    CHECK_OK(loopback, loopback.post(group[from].worker, ops.data(), ops.size(), &posted));
  }
  for (uint32_t to = 0; to < kWorld; ++to) {
    uint32_t imms = 0, dones = 0;
    for (;;) {
      const std::vector<Event> events = group[to].poll();
      if (events.empty()) break;
      for (const Event &event : events) ++(event.kind == EPT_EVENT_IMM ? imms : dones);
    }
    CHECK_EQ(imms, kWorld - 1);
    CHECK_EQ(dones, kWorld - 1);
    for (uint32_t from = 0; from < kWorld; ++from) CHECK_EQ(inbox[to][from], from == to ? 0 : from + 1);
  }
  for (uint32_t rank = 1; rank < kWorld; ++rank) group[rank].leave();
  for (uint32_t rank = 1; rank < kWorld; ++rank) CHECK_EQ(group[0].expect(EPT_EVENT_PEER).code, EPT_E_PEER_LOST);
}

}  // namespace

int main() {
  RUN(limits_are_told());
  RUN(wrong_settings_are_refused());
  RUN(identities_are_checked());
  RUN(addresses_are_checked());
  RUN(connecting_takes_both());
  RUN(a_call_without_answer_ends());
  RUN(two_jobs_never_meet());
  RUN(a_write_arrives());
  RUN(nothing_arrives_too());
  RUN(messages_are_copied());
  RUN(only_the_key_opens());
  RUN(bounds_hold());
  RUN(a_revoked_key_opens_nothing());
  RUN(rights_are_needed());
  RUN(a_full_queue_says_later());
  RUN(a_full_inbox_says_later());
  RUN(arm_sleeps_and_wakes());
  RUN(own_calls_wake_the_sleeper());
  RUN(poll_fills_what_it_is_given());
  RUN(the_dead_are_told());
  RUN(closing_a_peer_is_told_to_it());
  RUN(a_fenced_epoch_lands_nothing());
  RUN(a_mapped_region_is_the_peers_memory());
  RUN(quiesce_and_counters());
  RUN(limits_are_named());
  RUN(self_is_a_peer());
  RUN(a_world_of_256());
  return 0;
}
