// SPDX-License-Identifier: Apache-2.0
//
// What a rank does about whoever is hostile: nothing that a stranger says or leaves out makes it write, keep, wait or
// die, and the member whose place it stands in still gets in. tcp_handshake.cc has who gets in and who does not.
#include <sys/socket.h>

#include <fstream>

#include "tcp_by_hand.h"
#include "tcp_ranks.h"

namespace {

using plugin::Identity;
using plugin::Rank;
using plugin::Window;
using tcp_by_hand::Caller;
using tcp_by_hand::Listener;
using tcp_by_hand::Membership;
using tcp_by_hand::Socket;
using tcp_by_hand::Turn;
using tcp_ranks::all_up;
using tcp_ranks::backend;
using tcp_ranks::Node;
using tcp_ranks::until;

uint16_t port_of(Node &node) { return tcp_by_hand::address_of(node.rank).endpoints.front().port; }
Turn turn_of(Node &node) {
  return [&node] { node.poll(); };
}
int64_t query(Node &node, const char *feature) {
  int64_t value = 0;
  CHECK_OK(backend(), backend().query(node.rank.instance, feature, &value));
  return value;
}

// The member that everybody here tries to be.
void still_gets_in(Node &a, Node &b) {
  CHECK_EQ(b.count(EPT_EVENT_PEER), 0);
  CHECK_EQ(backend().peer_state(b.rank.instance, a.rank.id.rank), EPT_LATER);
  CHECK_OK(backend(), a.rank.open_peer(b.rank.id.rank, b.rank.id.epoch, b.rank.address()));
  CHECK(until({&a, &b}, [&] { return all_up({&a, &b}); }, 60'000));
  Window window(a.rank, b.rank, 4096);
  window.source.assign(4096, 8);
  CHECK_EQ(
      a.rank.post(Rank::write(b.rank.id.rank, window.source_mem, window.source.data(), window.region, 0, 4096, 5, 1)),
      EPT_OK);
  CHECK(until({&a, &b}, [&] { return a.with_cookie(1) != nullptr && b.count(EPT_EVENT_IMM) == 1; }, 60'000));
  CHECK_EQ(a.with_cookie(1)->kind, EPT_EVENT_LOCAL_DONE);
  CHECK(window.bytes == window.source);
}

// Rank 1 has opened rank 0, which has not dialled yet.
struct Waiting {
  Waiting() { CHECK_OK(backend(), b.rank.open_peer(0, 0, a.rank.address())); }
  Node a{Identity{0, 2}}, b{Identity{1, 2}};
  Membership member;
  tcp::Hello hello = tcp_by_hand::hello_of(0, b.rank.id);
  Caller caller() { return {member, tcp_by_hand::address_of(b.rank), hello}; }
};

// `a` opens `b` at an address where `listener` stands between.
void open_by_way_of(Node &a, Node &b, const Listener &listener) {
  tcp::Address by_way = tcp_by_hand::address_of(b.rank);
  by_way.endpoints.resize(1);
  by_way.endpoints[0].family = 4;
  by_way.endpoints[0].bytes = {127, 0, 0, 1};
  by_way.endpoints[0].port = listener.port();
  const std::vector<uint8_t> blob = tcp::encode(by_way);
  CHECK_OK(backend(), a.rank.open_peer(1, 0, {reinterpret_cast<const char *>(blob.data()), blob.size()}));
}

// Carries a connection on to where it should have gone, and keeps what the dialer said.
class Between {
 public:
  Between(Node &a, Node &b, Listener &listener)
      : a_(a), b_(b), dialer_(listener.accept(turn_of(a))), acceptor_(Socket::dial(port_of(b))) {
    CHECK(dialer_.fd() >= 0);
  }
  bool until(const std::function<bool()> &holds) {
    auto moved = [&] {
      carry(dialer_, acceptor_, &said);
      carry(acceptor_, dialer_, nullptr);
      return holds();
    };
    return tcp_ranks::until({&a_, &b_}, moved, 60'000);
  }
  std::string said;

 private:
  static void carry(Socket &from, Socket &to, std::string *record) {
    char bytes[4096];
    const ssize_t got = recv(from.fd(), bytes, sizeof bytes, 0);
    if (got <= 0) return;
    if (record) record->append(bytes, static_cast<size_t>(got));
    CHECK_EQ(to.say(bytes, static_cast<size_t>(got)), got);
  }
  Node &a_, &b_;
  Socket dialer_, acceptor_;
};

// Everything that a dialer says, cut off after each number of bytes that ends or begins something, by FIN and by RST.
void cut_off_anywhere() {
  Waiting world;
  const Turn turn = turn_of(world.b);
  const size_t hello = sizeof(tcp::Hello), proof = sizeof(tcp::Proof);
  for (bool by_reset : {false, true}) {
    for (size_t bytes :
         {size_t{0}, size_t{1}, sizeof(tcp::MessageHead), hello - 1, hello, hello + 1, hello + proof - 1}) {
      Socket socket = Socket::dial(port_of(world.b));
      Caller caller = world.caller();
      tcp::Proof proven{};
      if (bytes < hello) {
        socket.say(&caller.dialer.hello(), bytes);
      } else {
        CHECK(caller.prove(socket, turn, &proven));
        socket.say(&proven, bytes - hello);
      }
      for (int i = 0; i < 5; ++i) turn();
      if (by_reset)
        socket.reset();
      else
        socket.end();
    }
  }
  CHECK(until({&world.b}, [&] { return query(world.b, "half_open") == 0; }, 60'000));
  still_gets_in(world.a, world.b);
}

// What the acceptor says, cut off likewise: the dialer tries again until the true one answers.
void cut_off_at_the_dialer() {
  Node a(Identity{0, 2}), b(Identity{1, 2}, {{"streams", "1"}});
  Listener listener;
  open_by_way_of(a, b, listener);
  for (size_t bytes :
       {size_t{0}, size_t{1}, sizeof(tcp::Challenge) - 1, sizeof(tcp::Challenge), sizeof(tcp::Challenge) + 9}) {
    Socket socket = listener.accept(turn_of(a));
    CHECK(socket.fd() >= 0);
    tcp::Hello hello;
    CHECK(socket.hear_message(&hello, turn_of(a)));
    Membership stranger("another secret, of nobody");
    tcp::Acceptor acceptor(stranger.credentials, {});
    tcp::Challenge challenge;
    CHECK(acceptor.hello(hello, &challenge));
    std::string said(reinterpret_cast<const char *>(&challenge), sizeof challenge);
    tcp::Answer answer{};
    acceptor.seal(&answer);
    said.append(reinterpret_cast<const char *>(&answer), sizeof answer);
    socket.say(said.data(), bytes);
    for (int i = 0; i < 5; ++i) a.poll();
    if (bytes % 2)
      socket.reset();
    else
      socket.end();
  }
  CHECK_EQ(a.count(EPT_EVENT_PEER), 0);
  CHECK_OK(backend(), b.rank.open_peer(0, 0, a.rank.address()));
  Between between(a, b, listener);
  CHECK(between.until([&] { return all_up({&a, &b}); }));
}

uint64_t test_clock_ns = 0;

// Slow ones: a byte a second. They are gone when their time is up, and nobody waits for them meanwhile.
void slow_loris() {
  test_clock_ns = plugin::now_ns();
  plugin::clock = [] { return test_clock_ns; };
  {
    Node a(Identity{0, 2}), b(Identity{1, 2}, {{"handshake_ms", "5000"}, {"half_open", "64"}});
    Membership member;
    const tcp::Hello hello = tcp_by_hand::hello_of(0, b.rank.id);
    std::vector<Socket> slow;
    for (int i = 0; i < 32; ++i) slow.push_back(Socket::dial(port_of(b)));
    CHECK(until({&b}, [&] { return query(b, "half_open") == 32; }, 60'000));
    Caller caller(member, tcp_by_hand::address_of(b.rank), hello);
    const auto *said = reinterpret_cast<const char *>(&caller.dialer.hello());
    auto second = [&](int which) {
      for (Socket &socket : slow) socket.say(said + which, 1);
      test_clock_ns += 1'000'000'000;
      for (int i = 0; i < 200; ++i) b.poll();  // the clock is looked at now and then
    };
    for (int i = 0; i < 4; ++i) second(i);
    CHECK_EQ(query(b, "half_open"), 32);
    tcp_ranks::open_each_other({&a, &b});
    CHECK(until({&a, &b}, [&] { return all_up({&a, &b}); }, 60'000));  // not delayed: the clock stands still here
    CHECK_EQ(query(b, "half_open"), 32);
    second(4);
    second(5);
    CHECK(until({&b}, [&] { return query(b, "half_open") == 0; }, 60'000));
    for (Socket &socket : slow) CHECK(socket.ends(turn_of(b)));
    CHECK_EQ(backend().peer_state(b.rank.instance, 0), EPT_OK);
  }
  plugin::clock = plugin::now_ns;
}

// All that a real dialer said in a real session, its write included, is said again word for word: to the same rank,
// and to another one. A handshake is worth something on its own connection alone.
void replayed() {
  Node a(Identity{0, 3}), b(Identity{1, 3}, {{"streams", "1"}}), c(Identity{2, 3}, {{"streams", "1"}});
  Listener listener;
  open_by_way_of(a, b, listener);
  CHECK_OK(backend(), b.rank.open_peer(0, 0, a.rank.address()));
  Between between(a, b, listener);
  CHECK(between.until([&] { return all_up({&a, &b}); }));
  Window window(a.rank, b.rank, 64);
  window.source.assign(64, 3);
  CHECK_EQ(a.rank.post(Rank::write(1, window.source_mem, window.source.data(), window.region, 0, 64, 5, 1)), EPT_OK);
  CHECK(between.until([&] { return a.with_cookie(1) != nullptr; }));
  const std::string &recorded = between.said;
  CHECK(recorded.size() >= sizeof(tcp::Hello) + sizeof(tcp::Proof) + sizeof(tcp::FrameHeader) + 64);
  std::fill(window.bytes.begin(), window.bytes.end(), uint8_t{0});

  CHECK_OK(backend(), c.rank.open_peer(0, 0, a.rank.address()));
  const size_t before = b.count(EPT_EVENT_IMM);
  for (Node *target : {&b, &c}) {
    const int64_t strangers = query(*target, "strangers");
    Socket again = Socket::dial(port_of(*target));
    again.say(recorded);
    CHECK(again.ends(turn_of(*target)));
    CHECK_EQ(query(*target, "strangers"), strangers + 1);
  }
  CHECK_EQ(b.count(EPT_EVENT_IMM), before);
  CHECK_EQ(c.count(EPT_EVENT_PEER), 0);
  CHECK_EQ(window.bytes[0], 0);
  CHECK_EQ(backend().peer_state(b.rank.instance, 0), EPT_OK);  // the true connection lives
}

// Frames of a right member, said before anyone has shown that it is one.
void frames_too_early() {
  Waiting world;
  std::vector<uint8_t> bytes(64, 0);
  ept_mem *mem = world.b.rank.enroll(bytes.data(), bytes.size());
  const std::string window = world.b.rank.grant(mem, 0, 0, bytes.size()).first;
  std::string write(reinterpret_cast<const char *>(
                        std::make_unique<tcp::FrameHeader>(tcp_by_hand::write_frame(window, 0, 0, 8, 5)).get()),
                    sizeof(tcp::FrameHeader));
  write += "8 bytes.";
  {
    Socket first = Socket::dial(port_of(world.b));
    first.say(write + write + write);
    CHECK(first.ends(turn_of(world.b)));
  }
  {  // instead of the Proof
    Socket socket = Socket::dial(port_of(world.b));
    Caller caller = world.caller();
    tcp::Proof proof;
    CHECK(caller.prove(socket, turn_of(world.b), &proof));
    socket.say(write + write);
    CHECK(socket.ends(turn_of(world.b)));
  }
  {  // behind a Proof that is wrong
    Socket socket = Socket::dial(port_of(world.b));
    Caller caller = world.caller();
    tcp::Proof proof;
    CHECK(caller.prove(socket, turn_of(world.b), &proof));
    proof.mac[0] ^= 1;
    proof.witness[0] ^= 1;
    socket.say_message(proof);
    socket.say(write);
    CHECK(socket.ends(turn_of(world.b)));
  }
  CHECK_EQ(world.b.count(EPT_EVENT_IMM), 0);
  CHECK(bytes == std::vector<uint8_t>(64, 0));
  still_gets_in(world.a, world.b);
}

// Sizes that no message of ours has, in every field that says one.
void oversized() {
  Waiting world;
  auto refused = [&](auto change) {
    Socket socket = Socket::dial(port_of(world.b));
    Caller caller = world.caller();
    tcp::Hello hello = caller.dialer.hello();
    change(hello);
    socket.say_message(hello);
    CHECK(socket.ends(turn_of(world.b)));
  };
  for (uint16_t bytes : {uint16_t{0}, uint16_t{1}, uint16_t{sizeof(tcp::Hello) + 1}, uint16_t{UINT16_MAX}})
    refused([&](tcp::Hello &hello) { hello.head.bytes = bytes; });
  refused([](tcp::Hello &hello) { hello.head.layout = 1; });
  refused([](tcp::Hello &hello) { hello.head.layout = 77; });
  refused([](tcp::Hello &hello) { hello.head.magic = tcp::kFrameMagic; });
  // From a member: more than this side can hold is cut to what it can, or refused.
  world.hello.limits = tcp::Limits{UINT32_MAX, UINT32_MAX, UINT32_MAX, UINT32_MAX, UINT32_MAX, UINT32_MAX};
  world.hello.streams = UINT32_MAX;
  Socket socket = Socket::dial(port_of(world.b));
  Caller caller = world.caller();
  tcp::Answer answer;
  CHECK(caller.enter(socket, turn_of(world.b), &answer));
  CHECK_EQ(answer.code, EPT_E_MISMATCH);
  const tcp::Limits agreed = tcp::smaller(tcp::Limits{2, 1 << 20, 16384, 512, 1024, 64}, world.hello.limits);
  CHECK_EQ(agreed.max_message, 1 << 20);
  CHECK_EQ(agreed.max_send, 16384);
  CHECK_EQ(agreed.depth, tcp::kMostDepth);
}

// A member with a key that is not one, one of another rank, and one that was taken back, also amid a payload.
void keys() {
  Node b(Identity{1, 3}, {{"streams", "1"}});
  CHECK_OK(backend(), b.rank.open_peer(0, 0, tcp_by_hand::played(0)));
  Membership member;
  Caller caller(member, tcp_by_hand::address_of(b.rank), tcp_by_hand::hello_of(0, b.rank.id));
  Socket socket = Socket::dial(port_of(b));
  const Turn turn = turn_of(b);
  tcp::Answer answer;
  CHECK(caller.enter(socket, turn, &answer));
  std::vector<uint8_t> bytes(1 << 16, 0);
  const std::vector<uint8_t> untouched = bytes;
  ept_mem *mem = b.rank.enroll(bytes.data(), bytes.size());
  const std::string others = b.rank.grant(mem, 2, 0, bytes.size()).first;
  auto [mine, key] = b.rank.grant(mem, 0, 4096, 4096);

  uint64_t number = 0;
  auto say = [&](const std::string &region, auto change, uint32_t length) {
    tcp::FrameHeader header = tcp_by_hand::write_frame(region, number++, 0, length, 5);
    change(header);
    socket.say_message(header);
    socket.say(std::string(length, 'x'));
  };
  auto refused = [&] {
    tcp::FrameHeader told;
    do CHECK(socket.hear_message(&told, turn));
    while (told.type == tcp::FrameType::kAck);
    CHECK_EQ(static_cast<int>(told.type), static_cast<int>(tcp::FrameType::kRefused));
    CHECK_EQ(told.number, number - 1);
    CHECK_EQ(-static_cast<int32_t>(told.immediate), EPT_E_ACCESS);
    CHECK_EQ(b.count(EPT_EVENT_IMM), 0);
    CHECK(bytes == untouched);
  };
  say(mine, [](tcp::FrameHeader &frame) { frame.key[0] ^= 1; }, 64);
  refused();
  say(mine, [](tcp::FrameHeader &frame) { memset(frame.key, 0, sizeof frame.key); }, 64);
  refused();
  say(mine, [](tcp::FrameHeader &frame) { frame.slot = UINT32_MAX; }, 64);
  refused();
  say(others, [](tcp::FrameHeader &) {}, 64);
  refused();
  say(mine, [](tcp::FrameHeader &frame) { frame.offset = 4096 - 63; }, 64);
  refused();
  say(mine, [](tcp::FrameHeader &frame) { frame.offset = UINT64_MAX - 8; }, 64);
  refused();
  say(mine, [](tcp::FrameHeader &) {}, 8192);
  refused();
  {  // taken back when half of it is here
    tcp::FrameHeader header = tcp_by_hand::write_frame(mine, number++, 0, 4096, 5);
    socket.say_message(header);
    for (int i = 0; i < 50; ++i) turn();
    CHECK_OK(backend(), backend().region_revoke(mem, 0, key));
    socket.say(std::string(4096, 'x'));
    refused();
  }
  say(mine, [](tcp::FrameHeader &) {}, 64);
  refused();
  CHECK_EQ(backend().peer_state(b.rank.instance, 0), EPT_OK);
}

uint64_t resident_bytes() {
  std::ifstream statm("/proc/self/statm");
  uint64_t whole = 0, resident = 0;
  statm >> whole >> resident;
  return resident * static_cast<uint64_t>(getpagesize());
}

// Thousands of connections that each say something else that is wrong: what is kept does not grow with their number.
void nothing_grows() {
  Waiting world;
  auto some = [&](uint32_t count) {
    for (uint32_t i = 0; i < count; ++i) {
      Socket socket = Socket::dial(port_of(world.b));
      std::string bytes(i % 300, static_cast<char>(i));
      if (i % 2) {
        tcp::Hello hello = world.caller().dialer.hello();
        hello.rank = i;  // whoever it says to be
        hello.epoch = i * 7;
        bytes.insert(0, reinterpret_cast<const char *>(&hello), sizeof hello);
      }
      socket.say(bytes);
      world.b.poll();
      if (i % 3) socket.reset();
    }
    CHECK(until({&world.b}, [&] { return query(world.b, "half_open") == 0; }, 60'000));
  };
  some(200);
  const uint64_t before = resident_bytes();
  some(2000);
  // A record of 500 bytes kept for each would be 1 MB; sanitizers keep freed memory for a while.
  CHECK(resident_bytes() < before + (64u << 20));
  CHECK_EQ(world.b.count(EPT_EVENT_PEER), 0);
  still_gets_in(world.a, world.b);
}

}  // namespace

int main() {
  tcp_ranks::backend();  // sets the HMAC
  RUN(cut_off_anywhere());
  RUN(cut_off_at_the_dialer());
  RUN(slow_loris());
  RUN(replayed());
  RUN(frames_too_early());
  RUN(oversized());
  RUN(keys());
  RUN(nothing_grows());
}
