// SPDX-License-Identifier: Apache-2.0
//
// Connections break, each in a way of its own, and every operation still arrives once, whole, and is told of once: cut
// at every interesting byte, seen on one side alone, stalled while others go on, late bytes of an old connection,
// refusals whose answer was lost, handshakes that break too. And what can't be mended is told as a lost peer, with the
// reason.
#include <signal.h>

#include <iostream>

#include "tcp_by_hand.h"
#include "tcp_ledger.h"

namespace {

using plugin::Identity;
using plugin::Options;
using tcp_ledger::Kind;
using tcp_ledger::Pair;
using tcp_ranks::backend;
using tcp_relay::kFar;
using tcp_relay::kNear;
using tcp_relay::Link;

const Options kOne = {{"streams", "1"}};

Identity patient(uint64_t dead_ns) {
  Identity identity;
  identity.dead_ns = dead_ns;
  return identity;
}

enum class Break { kReset, kFinish, kResetNear, kResetFar, kFinishFar };

void break_it(Link &link, Break how) {
  if (how == Break::kReset) link.reset();
  if (how == Break::kResetNear) link.reset(kNear), link.stall();
  if (how == Break::kResetFar) link.reset(kFar), link.stall();
  if (how == Break::kFinish) link.finish(kNear), link.finish(kFar);
  if (how == Break::kFinishFar) link.finish(kFar);
}

// A handful of every kind: 0 and 5 long enough to be received in place, 1 a frame in one piece.
void post_some(Pair &pair, int from) {
  for (uint64_t length : {uint64_t{5000}, uint64_t{100}, uint64_t{0}}) CHECK(pair.post(from, Kind::kWrite, length));
  CHECK(pair.post(from, Kind::kSignal));
  CHECK(pair.post(from, Kind::kRefused, 300));
  CHECK(pair.post(from, Kind::kSend, 70));
  CHECK(pair.post(from, Kind::kRefused, 6000));
  CHECK(pair.post(from, Kind::kWrite, 40'000));
  CHECK(pair.post(from, Kind::kSend, 0));
}

// What rank `from` says ends after `bytes` more, then the connection breaks.
void cut_after(int from, uint64_t bytes, Break how) {
  Pair pair(kOne, patient(60'000'000'000), 1 << 17);
  Link &link = *pair.relay->links.at(0);
  const int side = from == 0 ? kNear : kFar;
  link.limit[side] = link.passed[side] + bytes;
  post_some(pair, 0);
  post_some(pair, 1);
  CHECK(pair.until([&] { return link.at_limit(side); }));
  for (int i = 0; i < 20; ++i) pair.step();
  break_it(link, how);
  pair.check();
  CHECK(pair.counted(0).reconnects >= 1);
  CHECK(pair.counted(1).reconnects >= 1);
  CHECK_EQ(pair.peer_events[from].back().code, EPT_OK);
}

// Between frames, amid headers and amid payloads; with one rank's words lost behind that place the other's are cut
// between frame and acknowledgement.
void cut_everywhere(Break how) {
  const uint64_t frames[] = {64 + 5000, 64 + 100, 64, 64, 64 + 300, 64 + 74, 64 + 6000, 64 + 40'000, 64 + 4};
  std::vector<uint64_t> places = {0, 1};
  uint64_t begin = 0;
  for (uint64_t frame : frames) {
    for (uint64_t at : {uint64_t{32}, uint64_t{63}, uint64_t{64}, uint64_t{65}, frame - 1, frame})
      if (at <= frame) places.push_back(begin + at);
    begin += frame;
  }
  for (uint64_t place : places)
    for (int from : {0, 1}) cut_after(from, place, how);
}

// All of it lands over there, and no word of that comes back.
void acknowledgement_lost(int from) {
  Pair pair(kOne, patient(60'000'000'000));
  Link &link = *pair.relay->links.at(0);
  const int back = from == 0 ? kFar : kNear;
  link.stalled[back] = true;
  for (int i = 0; i < 20; ++i) CHECK(pair.post(from, i % 3 == 1 ? Kind::kRefused : Kind::kWrite, 64));
  CHECK(pair.until([&] { return pair.way[from].arrived == 13; }));
  for (int i = 0; i < 50; ++i) pair.step();
  CHECK_EQ(pair.way[from].ended, 0);
  link.reset();
  pair.check();
  CHECK_EQ(pair.counted(from).replayed, 0);  // nothing was missing but the answer
  CHECK_EQ(pair.counted(from).errors, 7);
}

// One side's end is gone and the other has not noticed; nothing is in flight, so nothing would tell it.
void half_open(Break how) {
  Pair pair(kOne, patient(60'000'000'000));
  CHECK(pair.post(0, Kind::kWrite, 100));
  CHECK(pair.until([&] { return pair.settled(); }));
  break_it(*pair.relay->links.at(0), how);
  CHECK(pair.until([&] { return pair.counted(0).reconnects == 1 && pair.counted(1).reconnects == 1; }));
  post_some(pair, 0);
  post_some(pair, 1);
  pair.check();
}

// A knock names the connection that was lost: one for the present connection breaks it, one that comes late does not.
void knocks() {
  Pair pair(kOne, patient(60'000'000'000));
  auto knock = [&](uint32_t generation) {
    const tcp_by_hand::Membership membership;
    plugin::Rank &a = pair.node[0]->rank;
    const tcp::Address address = tcp_by_hand::address_of(a);
    tcp::Hello hello = tcp_by_hand::hello_of(1, a.id);
    hello.purpose = tcp::Purpose::kKnock;
    hello.generation = generation;
    tcp_by_hand::Socket socket = tcp_by_hand::Socket::dial(address.endpoints.front().port);
    tcp::Answer answer{};
    CHECK(tcp_by_hand::Caller(membership, address, hello).enter(socket, [&] { pair.step(); }, &answer));
    CHECK_EQ(answer.code, EPT_OK);
    CHECK(socket.ends([&] { pair.step(); }));
  };
  knock(0);
  for (int i = 0; i < 500; ++i) pair.step();
  CHECK_EQ(pair.counted(0).reconnects, 0);
  knock(1);
  CHECK(pair.until([&] { return pair.counted(0).reconnects == 1; }));
  knock(1);
  for (int i = 0; i < 500; ++i) pair.step();
  CHECK_EQ(pair.counted(0).reconnects, 1);
  post_some(pair, 0);
  post_some(pair, 1);
  pair.check();
}

// One stream stands still, the other goes on: it alone is made again, and what it held back comes too late to matter.
void one_stalls(int from, bool both_ways) {
  Pair pair({{"streams", "2"}}, patient(4'000'000'000));
  Link &link = *pair.relay->of(0);
  if (both_ways)
    link.stall();
  else
    link.stalled[from == 0 ? kNear : kFar] = true;
  for (int i = 0; i < 10; ++i) CHECK(pair.post(from, Kind::kWrite, 700, 0));
  for (int i = 0; i < 10; ++i) CHECK(pair.post(from, Kind::kWrite, 700, 1));
  CHECK(pair.until([&] { return pair.way[from].arrived == 10; }));  // of the other stream
  CHECK_EQ(pair.counted(from).reconnects, 0);
  CHECK(pair.until([&] { return pair.settled(); }));
  CHECK_EQ(pair.counted(from).reconnects, 1);
  CHECK_EQ(pair.node[from]->rank.count(1).reconnects, 0);
  CHECK(pair.counted(from).replayed >= 10);
  link.stall(false);
  pair.check();
}

// Stopped, not broken: the other process answers nothing, its kernel does. It is waited for, and nothing is made again
// before it answers.
void stands_still() {
  Pair pair(kOne, patient(400'000'000));
  for (int i = 0; i < 10; ++i) CHECK(pair.post(0, Kind::kWrite, 700));
  for (int i = 0; i < 30'000; ++i) pair.step_without(1);  // 1.5 s of its clock
  CHECK_EQ(pair.way[0].ended, 0);
  CHECK(pair.peer_events[0].empty());
  pair.check();
}

// Nothing lands from an old connection once another is there, whenever its bytes come.
void late_bytes() {
  Pair pair(kOne, patient(60'000'000'000));
  Link &link = *pair.relay->links.at(0);
  link.limit[kNear] = link.passed[kNear] + 64 + 1000;  // the first payload is half received
  for (int i = 0; i < 5; ++i) CHECK(pair.post(0, Kind::kWrite, 20'000));
  CHECK(pair.until([&] { return link.at_limit(kNear) && link.held[kNear].size() > 90'000; }));
  link.stall();
  link.reset(kNear);
  CHECK(pair.until([&] { return pair.settled(); }));
  link.limit[kNear] = UINT64_MAX;
  link.stall(false);
  pair.check();
}

// The same for who dials: what comes on its old connection between its Proof and the Answer is nothing any more.
void late_bytes_for_the_dialer() {
  Pair pair(kOne, patient(4'000'000'000));
  Link &link = *pair.relay->links.at(0);
  link.stalled[kFar] = true;
  for (int i = 0; i < 5; ++i) CHECK(pair.post(0, Kind::kWrite, 2000));  // so that it has something to miss
  for (int i = 0; i < 5; ++i) CHECK(pair.post(1, Kind::kWrite, 2000));
  for (int i = 0; i < 20; ++i) pair.step();
  // The other one stands still meanwhile, else it would be in doubt too, and knock.
  while (pair.relay->links.size() < 2) pair.step_without(1);
  Link &second = *pair.relay->links.at(1);
  second.limit[kFar] = sizeof(tcp::Challenge);
  CHECK(pair.until([&] { return second.passed[kNear] == sizeof(tcp::Hello) + sizeof(tcp::Proof); }));
  link.stall(false);
  for (int i = 0; i < 500; ++i) pair.step();
  second.limit[kFar] = UINT64_MAX;
  pair.check();
  CHECK_EQ(pair.counted(0).reconnects, 1);
}

// The first try to connect again is held up on the way, the second gets through; then the first one's proof comes.
void late_handshake() {
  Pair pair(kOne, patient(60'000'000'000), 1 << 22, {{"handshake_ms", "150"}});  // the other waits longer
  CHECK(pair.post(0, Kind::kWrite, 100));
  CHECK(pair.until([&] { return pair.settled(); }));
  Link &first = *pair.relay->links.at(0);
  first.reset();
  CHECK(pair.until([&] { return pair.relay->links.size() == 2; }));
  Link &second = *pair.relay->links.at(1);
  second.limit[kNear] = sizeof(tcp::Hello);  // its proof is held
  CHECK(pair.until([&] { return second.held[kNear].size() == sizeof(tcp::Proof); }));
  CHECK(pair.until([&] { return pair.counted(1).reconnects == 1; }));
  CHECK(pair.relay->links.size() >= 3);
  for (int i = 0; i < 20; ++i) CHECK(pair.post(1, Kind::kWrite, 100));
  CHECK(pair.until([&] { return pair.settled(); }));
  second.limit[kNear] = UINT64_MAX;
  pair.poll_for(50);
  post_some(pair, 0);
  pair.check();
  CHECK_EQ(pair.counted(1).reconnects, 1);  // it changed nothing
}

// The answer is lost: one side thinks the stream is up again, the other does not.
void answer_lost() {
  Pair pair(kOne, patient(60'000'000'000));
  post_some(pair, 0);
  post_some(pair, 1);
  pair.relay->links.at(0)->reset();
  CHECK(pair.until([&] { return pair.relay->links.size() == 2; }));
  Link &second = *pair.relay->links.at(1);
  second.limit[kFar] = sizeof(tcp::Challenge) + 100;
  CHECK(pair.until([&] { return pair.counted(1).reconnects == 1; }));
  CHECK_EQ(pair.counted(0).reconnects, 0);
  second.reset();
  pair.check();
  CHECK_EQ(pair.counted(0).reconnects, 1);
  CHECK_EQ(pair.counted(1).reconnects, 2);
}

// Again and again, faster than it settles.
void flaps() {
  Pair pair({{"streams", "2"}}, patient(60'000'000'000), 1 << 24);
  uint64_t posted = 0, cuts = 0;
  for (int step = 1; pair.counted(0).reconnects < 8; ++step) {
    const int from = step % 2;
    if (step % 8 < 2 && pair.post(from, posted % 7 == 0 ? Kind::kSend : Kind::kWrite, 1 + posted % 3000,
                                  static_cast<uint32_t>(posted / 2 % 2)))
      ++posted;
    if (Link *link = pair.relay->of(static_cast<uint32_t>(cuts % 2)); step % 300 == 0 && link != nullptr) {
      link->reset();
      ++cuts;
    }
    pair.step();
  }
  pair.check();
  std::cout << "    " << posted << " operations, " << pair.counted(0).reconnects << " connections more, "
            << pair.counted(0).replayed + pair.counted(1).replayed << " operations sent again" << std::endl;
}

// Memory that may have to be sent again can't be taken away, and can when it is acknowledged.
void sources_stay() {
  Pair pair(kOne, patient(60'000'000'000));
  pair.relay->links.at(0)->stalled[kFar] = true;
  CHECK(pair.post(0, Kind::kWrite, 64));
  CHECK(pair.until([&] { return pair.way[0].arrived == 1; }));
  CHECK_EQ(backend().mem_deregister(pair.way[0].window->source_mem), EPT_E_INVALID);
  pair.relay->links.at(0)->reset();
  pair.check();
  CHECK_EQ(pair.node[0]->rank.release(pair.way[0].window->source_mem), EPT_OK);
}

// While a stream is down posting goes on until the queue is full, and quiesce waits for it.
void down_for_a_while() {
  Pair pair({{"streams", "1"}, {"depth", "16"}}, patient(60'000'000'000));
  pair.relay->close_door();
  pair.relay->links.at(0)->reset(kNear);
  CHECK(pair.until([&] { return !pair.peer_events[0].empty(); }));
  CHECK_EQ(pair.peer_events[0].front().code, EPT_LATER);
  CHECK_HAS(pair.peer_events[0].front().words, "broke");
  int taken = 0;
  while (pair.post(0, Kind::kWrite, 50)) ++taken;
  CHECK_EQ(taken, 16);
  CHECK_EQ(backend().peer_state(pair.node[0]->rank.instance, 1), EPT_OK);
  pair.relay->open_door();
  pair.check();
  CHECK_EQ(pair.peer_events[0].back().code, EPT_OK);
}

// A member that claims what can't be ends itself: more consumed than was sent, less than it had acknowledged, or news
// of operations that it never had an answer to.
void false_claims() {
  struct Claim {
    tcp::ResumePoint resume;
    int32_t code;
  };
  for (const Claim &claim : {Claim{{3, 0}, EPT_OK}, Claim{{2, 0}, EPT_OK}, Claim{{4, 0}, EPT_E_MISMATCH},
                             Claim{{UINT64_MAX, 0}, EPT_E_MISMATCH}, Claim{{1, 0}, EPT_E_MISMATCH},
                             Claim{{3, 1}, EPT_E_MISMATCH}, Claim{{3, UINT64_MAX}, EPT_E_MISMATCH}}) {
    Identity identity;
    identity.rank = 1;
    tcp_ranks::Node b(identity, kOne);
    auto turn = [&] {
      tcp_ledger::tick();
      b.poll();
    };
    CHECK_OK(backend(), b.rank.open_peer(0, 0, tcp_by_hand::played(0)));
    const tcp_by_hand::Membership membership;
    const tcp::Address address = tcp_by_hand::address_of(b.rank);
    tcp::Hello hello = tcp_by_hand::hello_of(0, b.rank.id);
    hello.generation = 1;
    tcp_by_hand::Socket first = tcp_by_hand::Socket::dial(address.endpoints.front().port);
    tcp::Answer answer{};
    CHECK(tcp_by_hand::Caller(membership, address, hello).enter(first, turn, &answer));
    CHECK_EQ(answer.code, EPT_OK);
    CHECK(tcp_ranks::until({&b}, [&] { return b.count(EPT_EVENT_PEER) == 1; }));
    for (uint64_t i = 0; i < 3; ++i) CHECK_EQ(b.rank.post(plugin::Rank::message(0, "x", i)), EPT_OK);
    tcp::FrameHeader ack = tcp_by_hand::frame(tcp::FrameType::kAck);
    ack.consumed = 2;
    CHECK(first.say_message(ack));
    CHECK(tcp_ranks::until({&b}, [&] { return b.count(EPT_EVENT_LOCAL_DONE) == 2; }));
    hello.generation = 2;
    tcp_by_hand::Socket second = tcp_by_hand::Socket::dial(address.endpoints.front().port);
    tcp_by_hand::Caller again(membership, address, hello);
    again.resume = claim.resume;
    CHECK(again.enter(second, turn, &answer));
    CHECK_EQ(answer.code, claim.code);
    if (claim.code == EPT_OK) {
      CHECK(b.peer_ended() == nullptr);
    } else {
      CHECK(tcp_ranks::until({&b}, [&] { return b.peer_ended() != nullptr; }));
      CHECK_EQ(b.peer_ended()->code, EPT_E_PEER_LOST);
      CHECK_HAS(b.peer_ended()->words, "broke the protocol");
    }
  }
}

// And so does one that claims it in its answer.
void false_answers(const tcp::ResumePoint &claim) {
  tcp_by_hand::Listener listener;
  const tcp_by_hand::Membership membership;
  tcp_ranks::Node a(Identity{}, kOne);
  auto turn = [&] {
    tcp_ledger::tick();
    a.poll();
  };
  tcp::Address there = tcp_by_hand::address_of(a.rank);  // of this machine
  there.rank = 1;
  there.endpoints.resize(1);
  there.endpoints[0].family = 4;
  there.endpoints[0].port = listener.port();
  there.endpoints[0].bytes = {127, 0, 0, 1};
  const std::vector<uint8_t> blob = tcp::encode(there);
  CHECK_OK(backend(), a.rank.open_peer(1, 0, {reinterpret_cast<const char *>(blob.data()), blob.size()}));
  auto answer_with = [&](const tcp::ResumePoint &resume) {
    tcp_by_hand::Socket socket = listener.accept(turn);
    tcp::Acceptor acceptor(membership.credentials, there.nonce);
    tcp::Hello hello;
    tcp::Challenge challenge;
    tcp::Proof proof;
    CHECK(socket.hear_message(&hello, turn));
    CHECK(acceptor.hello(hello, &challenge));
    CHECK(socket.say_message(challenge));
    CHECK(socket.hear_message(&proof, turn));
    CHECK(acceptor.proof(proof) == tcp::Trust::kProven);
    tcp::Answer answer{};
    answer.rank = 1;
    answer.version = tcp::kVersionHigh;
    answer.limits = hello.limits;
    answer.resume = resume;
    acceptor.seal(&answer);
    CHECK(socket.say_message(answer));
    return socket;
  };
  tcp_by_hand::Socket first = answer_with({});
  CHECK(tcp_ranks::until({&a}, [&] { return a.count(EPT_EVENT_PEER) == 1; }));
  CHECK_EQ(a.find(EPT_EVENT_PEER)->code, EPT_OK);
  CHECK_EQ(a.rank.post(plugin::Rank::message(1, "x", 1)), EPT_OK);
  first.end();
  tcp_by_hand::Socket second = answer_with(claim);
  CHECK(tcp_ranks::until({&a}, [&] {
    tcp_ledger::tick();
    return a.peer_ended() != nullptr;
  }));
  CHECK_EQ(a.peer_ended()->code, EPT_E_MISMATCH);
  CHECK_HAS(a.peer_ended()->words, "stream 0");
}

// Why a peer was lost is kept: what broke, and what came of the tries to mend it.
void lost(Break how, bool refuses, const char *word) {
  Pair pair({{"streams", "2"}}, patient(1'000'000'000));
  for (int i = 0; i < 5; ++i) CHECK(pair.post(0, Kind::kWrite, 700));
  CHECK(pair.until([&] { return pair.settled(); }));
  if (refuses)
    pair.relay->close_door();
  else
    pair.relay->deaf = true;
  for (auto &link : pair.relay->links) break_it(*link, how);
  CHECK(pair.until([&] { return !pair.peer_events[0].empty() && pair.peer_events[0].back().code < 0; }));
  const plugin::Event &event = pair.peer_events[0].back();
  CHECK_EQ(event.code, EPT_E_PEER_LOST);
  CHECK_HAS(event.words, "rank 1 at 127.0.0.1:");
  CHECK_HAS(event.words, word);
  CHECK_HAS(event.words, refuses ? "nobody listens" : "could not be connected again within 1 s");
}

}  // namespace

int main() {
  signal(SIGPIPE, SIG_IGN);
  plugin::log_level = EPT_LOG_WARNING;
  tcp_ledger::clock_by_steps();
  backend();
  RUN(cut_everywhere(Break::kReset));
  RUN(cut_everywhere(Break::kFinishFar));
  RUN(cut_after(0, 64 + 2000, Break::kFinish));
  RUN(cut_after(1, 64 + 2000, Break::kFinish));
  RUN(acknowledgement_lost(0));
  RUN(acknowledgement_lost(1));
  RUN(half_open(Break::kResetNear));
  RUN(half_open(Break::kResetFar));
  RUN(knocks());
  RUN(one_stalls(0, true));
  RUN(one_stalls(0, false));
  RUN(one_stalls(1, true));
  RUN(one_stalls(1, false));
  RUN(stands_still());
  RUN(late_bytes());
  RUN(late_bytes_for_the_dialer());
  RUN(late_handshake());
  RUN(answer_lost());
  RUN(flaps());
  RUN(sources_stay());
  RUN(down_for_a_while());
  RUN(false_claims());
  RUN(false_answers({2, 0}));
  RUN(false_answers({1, 1}));
  RUN(lost(Break::kReset, true, "reset"));
  RUN(lost(Break::kFinish, false, "without a goodbye"));
}
