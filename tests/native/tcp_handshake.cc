// SPDX-License-Identifier: Apache-2.0
//
// Who gets in and who does not: secrets, jobs, versions, epochs, addresses, ports; strangers with garbage, silence and
// floods; and what a member may not say after it is in. A raw client speaks the handshake and the frames by hand.
#include <fcntl.h>
#include <sys/socket.h>

#include <algorithm>
#include <fstream>
#include <iostream>
#include <random>

#include "tcp_by_hand.h"
#include "tcp_ranks.h"

namespace {

using plugin::Identity;
using plugin::Options;
using plugin::Rank;
using plugin::Window;
using tcp_by_hand::address_of;
using tcp_by_hand::Caller;
using tcp_by_hand::hello_of;
using tcp_by_hand::Membership;
using tcp_by_hand::played;
using tcp_by_hand::Socket;
using tcp_ranks::all_up;
using tcp_ranks::backend;
using tcp_ranks::meet;
using tcp_ranks::Node;
using tcp_ranks::Pair;
using tcp_ranks::poll_for;
using tcp_ranks::until;

uint16_t port_of(Node &node) { return address_of(node.rank).endpoints.front().port; }

int64_t query(Node &node, const char *feature) {
  int64_t value = 0;
  CHECK_OK(backend(), backend().query(node.rank.instance, feature, &value));
  return value;
}

// A connection made by hand to a rank, which moves while something is awaited from it.
struct Client : Socket {
  explicit Client(Node &node) : Socket(Socket::dial(port_of(node))), turn([&node] { node.poll(); }) {}
  // Without another word.
  bool is_closed() {
    char byte;
    return !hear(&byte, 1, turn) && ends(turn, 1);
  }
  tcp_by_hand::Turn turn;
};

void writes_arrive(Node &a, Node &b) {
  Window window(a.rank, b.rank, 4096);
  window.source.assign(4096, 8);
  for (uint64_t i = 0; i < 8; ++i) {
    ept_op op = Rank::write(b.rank.id.rank, window.source_mem, window.source.data(), window.region, i * 512, 512, 1, i);
    CHECK_EQ(a.rank.post(op), EPT_OK);
  }
  CHECK(until({&a, &b}, [&] { return b.count(EPT_EVENT_IMM) == 8 && a.count(EPT_EVENT_LOCAL_DONE) == 8; }));
  CHECK(window.bytes == window.source);
}

void over(const char *interface) {
  const Options options = {{"interface", interface}};
  Pair pair(options);
  for (const tcp::Endpoint &endpoint : address_of(pair.a->rank).endpoints) CHECK(endpoint.loopback());
  writes_arrive(*pair.a, *pair.b);
  writes_arrive(*pair.b, *pair.a);
}

// Both sides agree on the smaller number of streams; rails past it share what there is.
void unequal_streams() {
  Node a(Identity{0, 2}, {{"streams", "3"}}), b(Identity{1, 2}, {{"streams", "1"}});
  meet({&a, &b});
  Window window(a.rank, b.rank, 64);
  ept_op op = Rank::write(1, window.source_mem, window.source.data(), window.region, 0, 64, 1, 1);
  op.rail = 2;
  CHECK_EQ(a.rank.post(op), EPT_OK);
  CHECK(until({&a, &b}, [&] { return a.with_cookie(1) != nullptr; }));
}

// A rank may dial long before the other opens it, and the other way round.
void late_opening(bool dialer_first) {
  Node a(Identity{0, 2}), b(Identity{1, 2});
  Node &first = dialer_first ? a : b, &second = dialer_first ? b : a;
  CHECK_OK(backend(), first.rank.open_peer(second.rank.id.rank, 0, second.rank.address()));
  poll_for({&a, &b}, 60);
  CHECK_EQ(backend().peer_state(first.rank.instance, second.rank.id.rank), EPT_LATER);
  CHECK(!plugin::error_text(backend()).empty());
  CHECK_EQ(query(b, "half_open"), 0);  // who has shown the secret is not half open
  CHECK_OK(backend(), second.rank.open_peer(first.rank.id.rank, 0, first.rank.address()));
  CHECK(until({&a, &b}, [&] { return all_up({&a, &b}); }));
  writes_arrive(a, b);
}

// Both learn it, each by a PEER event that says what is wrong.
void both_refuse(const Identity &one, const Identity &other, int32_t code, const char *word, bool dialer_first) {
  Identity left = one, right = other;
  left.rank = 0;
  right.rank = 1;
  Node a(left), b(right);
  if (dialer_first) {
    CHECK_OK(backend(), a.rank.open_peer(1, 0, b.rank.address()));
    CHECK(until({&a, &b}, [&] { return a.find(EPT_EVENT_PEER) != nullptr; }));
    CHECK_OK(backend(), b.rank.open_peer(0, 0, a.rank.address()));
  } else {
    tcp_ranks::open_each_other({&a, &b});
  }
  CHECK(until({&a, &b}, [&] { return a.find(EPT_EVENT_PEER) != nullptr && b.find(EPT_EVENT_PEER) != nullptr; }));
  for (Node *node : {&a, &b}) {
    CHECK_EQ(node->count(EPT_EVENT_PEER), 1);
    CHECK_EQ(node->find(EPT_EVENT_PEER)->code, code);
    CHECK_HAS(node->find(EPT_EVENT_PEER)->words, word);
    CHECK_EQ(backend().peer_state(node->rank.instance, 1 - node->rank.id.rank), code);
    size_t posted = 0;
    ept_op op = Rank::message(1 - node->rank.id.rank, "x", 1);
    CHECK_EQ(backend().post(node->rank.worker, &op, 1, &posted), code);
  }
}

void secrets_jobs_versions() {
  Identity right, wrong;
  wrong.secret = "another";
  both_refuse(right, wrong, EPT_E_AUTH, "secret", false);
  both_refuse(wrong, right, EPT_E_AUTH, "secret", true);
  Identity job;
  job.job = "other";
  both_refuse(right, job, EPT_E_MISMATCH, "job", false);
  both_refuse(right, job, EPT_E_MISMATCH, "job", true);

  // A later release dials: it is told which versions there are, and so is the caller here.
  Node b(Identity{1, 2}, {{"streams", "1"}});
  CHECK_OK(backend(), b.rank.open_peer(0, 0, played(0)));
  tcp::Hello hello = hello_of(0, b.rank.id);
  hello.version_low = hello.version_high = 77;
  const Membership membership;
  Caller newer(membership, address_of(b.rank), hello);
  Client client(b);
  tcp::Answer answer;
  CHECK(newer.enter(client, client.turn, &answer));
  CHECK_EQ(answer.code, EPT_E_VERSION);
  CHECK(until({&b}, [&] { return b.find(EPT_EVENT_PEER) != nullptr; }));
  CHECK_EQ(b.find(EPT_EVENT_PEER)->code, EPT_E_VERSION);
  CHECK_HAS(b.find(EPT_EVENT_PEER)->words, "77-77");

  // Blobs of another version, damaged and foreign ones.
  Node a(Identity{0, 2});
  std::string blob = played(1);
  blob[4] = 9;
  CHECK_EQ(a.rank.open_peer(1, 0, blob), EPT_E_VERSION);
  CHECK_EQ(a.rank.open_peer(1, 0, "not an address"), EPT_E_INVALID);
  CHECK_EQ(a.rank.open_peer(1, 0, played(1).substr(0, 80)), EPT_E_INVALID);
  CHECK_EQ(a.rank.open_peer(1, 3, played(1)), EPT_E_INVALID);
  CHECK_EQ(a.rank.open_peer(7, 0, played(7)), EPT_E_INVALID);
  std::string region(48, 'x');
  ept_region *imported = nullptr;
  CHECK_EQ(backend().region_import(a.rank.instance, 1, region.data(), region.size(), &imported), EPT_E_INVALID);
}

// A stranger may say what it likes: the peer that it pretends to be still gets in.
void strangers_change_nothing() {
  Node a(Identity{0, 2}), b(Identity{1, 2});
  CHECK_OK(backend(), b.rank.open_peer(0, 0, a.rank.address()));
  std::mt19937 random(11);
  for (int i = 0; i < 60; ++i) {  // garbage of all lengths
    Client client(b);
    std::string bytes(random() % 400, 0);
    for (char &c : bytes) c = static_cast<char>(random());
    if (i % 3 == 0 && bytes.size() > 8) {  // with the right first words, so that it gets further
      tcp::MessageHead head{tcp::kHandshakeMagic, tcp::kLayout, sizeof(tcp::Hello)};
      memcpy(bytes.data(), &head, sizeof head);
    }
    CHECK_EQ(client.say(bytes), bytes.size());
    b.poll();
  }
  const Membership right, guess("guess");
  const tcp::Hello hello = hello_of(0, b.rank.id);
  const tcp::Address there = address_of(b.rank), another = address_of(a.rank);
  auto proof_of = [](Caller &caller, Client &client) {
    tcp::Proof proof;
    CHECK(caller.prove(client, client.turn, &proof));
    return proof;
  };
  // The secret, but not the address blob: a process of this job's former life. Then neither.
  for (const Membership *membership : {&right, &guess}) {
    Caller stale(*membership, another, hello);
    Client client(b);
    CHECK(client.say_message(proof_of(stale, client)));
    CHECK(client.is_closed());
  }
  {  // The proof of one connection is nothing in another, nor is a handshake said again word for word.
    Caller member(right, there, hello);
    Client once(b), again(b);
    const tcp::Proof proof = proof_of(member, once);
    CHECK(again.say_message(member.dialer.hello()));
    tcp::Challenge challenge;
    CHECK(again.hear_message(&challenge, again.turn));
    CHECK(again.say_message(proof));
    CHECK(again.is_closed());
  }
  {  // A proof with one bit changed.
    Caller member(right, there, hello);
    Client client(b);
    tcp::Proof proof = proof_of(member, client);
    proof.witness[31] ^= 1;
    CHECK(client.say_message(proof));
    CHECK(client.is_closed());
  }
  CHECK(query(b, "strangers") >= 5);
  CHECK_EQ(b.count(EPT_EVENT_PEER), 0);
  CHECK_EQ(backend().peer_state(b.rank.instance, 0), EPT_LATER);
  CHECK_OK(backend(), a.rank.open_peer(1, 0, b.rank.address()));
  CHECK(until({&a, &b}, [&] { return all_up({&a, &b}); }));
  writes_arrive(a, b);
}

// What a proven dialer may not ask for.
void members_out_of_place() {
  Node b(Identity{1, 3, 5}, {{"streams", "1"}});
  CHECK_OK(backend(), b.rank.open_peer(0, 4, played(0, 4)));
  const Membership right;
  const tcp::Address there = address_of(b.rank);
  tcp::Hello first = hello_of(0, b.rank.id);
  first.epoch = 4;
  auto enter = [&](const tcp::Hello &hello, const tcp::ResumePoint &resume, Client &client) {
    Caller member(right, there, hello);
    member.resume = resume;
    tcp::Answer answer;
    CHECK(member.enter(client, client.turn, &answer));
    return answer.code;
  };
  auto asked = [&](auto change) {
    tcp::Hello hello = first;
    tcp::ResumePoint resume{};
    change(hello, resume);
    Client client(b);
    return enter(hello, resume, client);
  };
  CHECK_EQ(asked([](auto &hello, auto &) { hello.rank = 2; }), EPT_E_MISMATCH);  // the higher one does not dial
  CHECK_EQ(asked([](auto &hello, auto &) { hello.rank = 1; }), EPT_E_MISMATCH);  // itself
  CHECK_EQ(asked([](auto &hello, auto &) { hello.world = 4; }), EPT_E_MISMATCH);
  b.events.clear();  // the world differs: that one ended the peer
  CHECK_OK(backend(), b.rank.backend.peer_close(b.rank.instance, 0));
  CHECK_EQ(asked([](auto &, auto &) {}), EPT_E_CLOSED);
  CHECK_OK(backend(), b.rank.open_peer(0, 4, played(0, 4)));
  CHECK_EQ(asked([](auto &hello, auto &) { hello.peer_epoch = 4; }), EPT_E_PEER_LOST);
  CHECK_EQ(asked([](auto &hello, auto &) { hello.epoch = 3; }), EPT_E_PEER_LOST);  // its former life
  CHECK_EQ(asked([](auto &hello, auto &) { hello.streams = 2; }), EPT_E_MISMATCH);
  CHECK_EQ(asked([](auto &hello, auto &) { hello.stream = 1; }), EPT_E_MISMATCH);
  CHECK_EQ(asked([](auto &, auto &resume) { resume.consumed = 9; }), EPT_E_MISMATCH);  // nothing to resume from
  CHECK_EQ(asked([](auto &hello, auto &) { hello.epoch = 6; }), EPT_LATER);            // its next one: not opened yet
  Client one(b), two(b);
  CHECK_EQ(enter(first, {}, one), EPT_OK);
  CHECK_EQ(enter(first, {}, two), EPT_E_INVALID);  // that stream is up
  CHECK_EQ(backend().peer_state(b.rank.instance, 0), EPT_OK);
}

void become_member(Client &client, Node &of) {
  const Membership right;
  Caller caller(right, address_of(of.rank), hello_of(0, of.rank.id));
  tcp::Answer answer;
  CHECK(caller.enter(client, client.turn, &answer));
  CHECK_EQ(answer.code, EPT_OK);
}

// What breaks the protocol after the door ends that peer with a sentence, and nothing else.
void hostile_members() {
  struct Case {
    const char *name, *word;
    std::function<void(tcp::FrameHeader &)> change;
  };
  const Case cases[] = {
      {"magic", "starts a frame", [](tcp::FrameHeader &f) { f.magic ^= 1; }},
      {"type", "type", [](tcp::FrameHeader &f) { f.type = static_cast<tcp::FrameType>(99); }},
      {"flags", "starts a frame", [](tcp::FrameHeader &f) { f.flags = 1; }},
      {"reserved", "starts a frame", [](tcp::FrameHeader &f) { f.reserved2 = 1; }},
      {"length", "payload", [](tcp::FrameHeader &f) { f.length = UINT32_MAX; }},
      {"send length", "payload",
       [](tcp::FrameHeader &f) {
         f.type = tcp::FrameType::kSend;
         f.length = 16385;
       }},
      {"signal with payload", "payload", [](tcp::FrameHeader &f) { f.type = tcp::FrameType::kSignal; }},
      {"ack with payload", "payload", [](tcp::FrameHeader &f) { f.type = tcp::FrameType::kAck; }},
      {"number", "numbers", [](tcp::FrameHeader &f) { f.number = 1; }},
      {"consumed", "consumed", [](tcp::FrameHeader &f) { f.consumed = 1; }},
      {"refusal", "refuses",
       [](tcp::FrameHeader &f) {
         f.type = tcp::FrameType::kRefused;
         f.length = 0;
       }},
  };
  for (const Case &entry : cases) {
    Node b(Identity{1, 2}, {{"streams", "1"}});
    CHECK_OK(backend(), b.rank.open_peer(0, 0, played(0)));
    Client client(b);
    become_member(client, b);
    CHECK(until({&b}, [&] { return b.find(EPT_EVENT_PEER) != nullptr; }));
    b.events.clear();
    tcp::FrameHeader frame = tcp_by_hand::frame(tcp::FrameType::kWrite, 0, 8);
    entry.change(frame);
    CHECK(client.say_message(frame));
    CHECK(until({&b}, [&] { return b.find(EPT_EVENT_PEER) != nullptr; }));
    CHECK_EQ(b.find(EPT_EVENT_PEER)->code, EPT_E_PEER_LOST);
    CHECK_HAS(b.find(EPT_EVENT_PEER)->words, entry.word);
    CHECK(client.is_closed());
  }
  // More in flight than it said: refused operations are remembered until they are told, so their number is bounded.
  Node b(Identity{1, 2}, {{"streams", "1"}, {"sndbuf", "4096"}});
  CHECK_OK(backend(), b.rank.open_peer(0, 0, played(0)));
  Client client(b);
  int small = 4096;
  setsockopt(client.fd(), SOL_SOCKET, SO_RCVBUF, &small, sizeof small);
  become_member(client, b);
  tcp::FrameHeader frame = tcp_by_hand::frame(tcp::FrameType::kSignal);
  bool ended = false;
  for (uint64_t i = 0; i < 1'000'000 && !ended; ++i) {  // never reads what it is told
    frame.number = i;
    while (!ended && client.say(&frame, sizeof frame) == 0) {
      b.poll();
      const plugin::Event *event = b.find(EPT_EVENT_PEER);
      ended = event != nullptr && b.events.back().code == EPT_E_PEER_LOST;
    }
  }
  CHECK(ended);
  CHECK_HAS(b.events.back().words, "in flight");
}

int open_descriptors() {
  int count = 0;
  for (int fd = 0; fd < 4096; ++fd) count += fcntl(fd, F_GETFD) >= 0;
  return count;
}

// A flood of connections that never say who they are: bounded, and a member still gets through.
void flood() {
  Node a(Identity{0, 2}), b(Identity{1, 2}, {{"half_open", "16"}, {"handshake_ms", "300"}});
  const int before = open_descriptors();
  std::vector<std::unique_ptr<Client>> clients;
  for (int i = 0; i < 200; ++i) {
    clients.push_back(std::make_unique<Client>(b));
    b.poll();
    CHECK(query(b, "half_open") <= 16);
  }
  poll_for({&b}, 20);
  CHECK_EQ(query(b, "half_open"), 16);
  CHECK_EQ(open_descriptors() - before, 200 + 16);
  tcp_ranks::open_each_other({&a, &b});
  CHECK(until({&a, &b}, [&] {
    if (clients.size() < 400) clients.push_back(std::make_unique<Client>(b));  // and it goes on meanwhile
    return all_up({&a, &b});
  }));
  writes_arrive(a, b);
  clients.resize(100);
  CHECK(until({&a, &b}, [&] { return query(b, "half_open") == 0; }, 3'000));  // the deadline, or their end
  // Slow ones too: a byte now and then buys no time.
  Client slow(b);
  char byte = 'E';
  bool closed = false;
  const uint64_t start = plugin::now_ns();
  CHECK(until(
      {&b},
      [&] {
        char in;
        closed = slow.say(&byte, 1) == 0 || recv(slow.fd(), &in, 1, 0) == 0;
        timespec nap{0, 5'000'000};
        nanosleep(&nap, nullptr);
        return closed;
      },
      3'000));
  CHECK(plugin::now_ns() - start < 2'000'000'000);
}

void ports_and_interfaces() {
  int32_t code = EPT_OK;
  auto open = [&](const Options &options) {
    Identity identity;
    plugin::Values values(backend(), options);
    ept_host host = plugin::host();
    ept_instance *instance = nullptr;
    code = Rank::open(backend(), identity, values, host, &instance);
    if (code == EPT_OK) backend().close(instance);
    return code;
  };
  // A range with two free ports, found by letting the system choose: others may take what is free, so it looks again.
  uint16_t port = 0;
  for (int i = 0; i < 200 && port == 0; ++i) {
    {
      Node probe{Identity{}};
      port = port_of(probe);
    }
    if (open({{"port_range", std::to_string(port)}}) != EPT_OK ||
        open({{"port_range", std::to_string(port + 1)}}) != EPT_OK)
      port = 0;
  }
  CHECK(port != 0);
  const std::string one = std::to_string(port), two = std::to_string(port) + "-" + std::to_string(port + 1);
  {
    Node first(Identity{0, 2}, {{"port_range", one}});
    CHECK_EQ(port_of(first), port);
    CHECK_EQ(open({{"port_range", one}}), EPT_E_UNAVAILABLE);
    CHECK_HAS(plugin::error_text(backend()), one + "-" + one);
    Node second(Identity{1, 2}, {{"port_range", two}});
    CHECK_EQ(port_of(second), port + 1);
    CHECK_EQ(open({{"port_range", two}}), EPT_E_UNAVAILABLE);
    meet({&first, &second});
    writes_arrive(first, second);
  }
  CHECK_EQ(open({{"port_range", one}}), EPT_OK);  // at once, whatever lingers in TIME_WAIT
  for (const char *range : {"abc", "0", "5-4", "70000", "1-2-3", "-5", "20000-"})
    CHECK_EQ(open({{"port_range", range}}), EPT_E_CONFIG);
  CHECK_EQ(open({{"interface", "127.0.0.0/8"}}), EPT_OK);
  CHECK_EQ(open({{"interface", "lo"}}), EPT_OK);
  for (const char *interface : {"nope0", "203.0.113.7", "203.0.113.0/24", "lo,nope0", "127.0.0.1/40"}) {
    CHECK_EQ(open({{"interface", interface}}), EPT_E_CONFIG);
    CHECK_HAS(plugin::error_text(backend()), "127.0.0.1");  // says what there is
  }
  CHECK_EQ(open({{"depth", "100"}}), EPT_E_CONFIG);
  // A peer on another machine that offers loopback only can't be reached, and reach says why.
  Node a(Identity{0, 2});
  std::string blob = played(1);  // its host number is not ours
  ept_reach reach{};
  reach.size = sizeof reach;
  CHECK_EQ(backend().reach(a.rank.instance, blob.data(), blob.size(), &reach), EPT_E_UNAVAILABLE);
  CHECK_HAS(std::string(reach.why_not), "loopback");
  CHECK_EQ(a.rank.open_peer(1, 0, blob), EPT_E_UNAVAILABLE);
  Node b(Identity{1, 2});
  blob = b.rank.address();
  CHECK_EQ(backend().reach(a.rank.instance, blob.data(), blob.size(), &reach), EPT_OK);
  CHECK(reach.bytes_per_s > 0 && reach.latency_ns > 0);
}

}  // namespace

int main() {
  tcp_ranks::backend();  // sets the HMAC
  RUN(over("127.0.0.1"));
  RUN(over("lo"));
  std::ifstream v6("/proc/net/if_inet6");
  if (v6 && v6.peek() != EOF)
    RUN(over("::1"));
  else
    std::cout << "  no IPv6 on this machine" << std::endl;
  RUN(unequal_streams());
  RUN(late_opening(true));
  RUN(late_opening(false));
  RUN(secrets_jobs_versions());
  RUN(strangers_change_nothing());
  RUN(members_out_of_place());
  RUN(hostile_members());
  RUN(flood());
  RUN(ports_and_interfaces());
}
