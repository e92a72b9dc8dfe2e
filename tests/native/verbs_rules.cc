// SPDX-License-Identifier: Apache-2.0
//
// The backend verbs over NICs made of functions (verbs_net.h), one rule after the other: which address of which NIC,
// what is asked of it, how many requests, doorbells and completions, and what becomes of peers that die, lie or are
// fenced.
#include <arpa/inet.h>

#include <algorithm>
#include <cstring>

#include "../../native/engine/sha256.h"
#include "../../plugins/verbs/nic.h"
#include "pci_machine.h"
#include "verbs_net.h"

using plugin::Rank;
using plugin::Window;
using verbs_net::Net;

extern "C" const ept_backend ept_backend_v1;

namespace {

uint64_t time_ns = 1'000'000'000;

// Ranks 0 to `world` - 1, connected; polled in turn, since each must hear the others first.
class Group {
 public:
  Group(uint32_t world, const plugin::Options &options = {}) {
    plugin::Identity identity{.world = world};
    for (identity.rank = 0; identity.rank < world; ++identity.rank)
      ranks_.push_back(std::make_unique<Rank>(ept_backend_v1, identity, options));
    for (auto &rank : ranks_)
      for (auto &other : ranks_)
        if (rank != other) CHECK_OK(ept_backend_v1, rank->open_peer(other->id.rank, 0, other->address()));
    for (uint32_t up = 0, polls = 0; up < world * (world - 1); ++polls) {
      CHECK(polls < 1'000'000);
      for (const plugin::Event &event : ranks_[polls % world]->poll()) {
        CHECK_EQ(event.kind, EPT_EVENT_PEER);
        CHECK_EQ(event.code, EPT_OK);
        ++up;
      }
    }
  }
  Rank &operator[](size_t rank) { return *ranks_[rank]; }

 private:
  std::vector<std::unique_ptr<Rank>> ranks_;
};

// ---- which NIC ------------------------------------------------------------------------------------------------------

// On a machine of 8 GPUs with a NIC each under their switches, all on one NUMA node: each rank's first NIC is its GPU's
// own, whatever the order in which libibverbs lists them; the others stand behind it. Two ports of one card are one.
void nics_near_a_gpu() {
  pci::Machine machine;
  pci::switches(&machine, 8, 1, 1);
  std::vector<verbs::Port> listed;
  for (size_t i = 0; i < machine.nics.size(); ++i)
    for (uint8_t number : {1, 2}) {
      listed.emplace_back();
      listed.back().device = "mlx5_" + std::to_string(i);
      listed.back().number = number;
      listed.back().pci = machine.nics[i];
    }
  std::rotate(listed.begin(), listed.begin() + 6, listed.end());
  for (size_t gpu = 0; gpu < machine.gpus.size(); ++gpu) {
    std::vector<verbs::Port> ports = listed;
    verbs::nearest_first(&ports, machine.gpus[gpu], machine.sysfs());
    CHECK_EQ(ports.size(), listed.size());
    for (size_t i = 0; i < 2; ++i) {
      CHECK_EQ(ports[i].device, "mlx5_" + std::to_string(gpu));
      CHECK_EQ(ports[i].number, i + 1);
    }
  }
  // Without a GPU, or where the files tell nothing of it, they stay as they are.
  for (const char *unknown : {"", "0000:99:00.0"}) {
    std::vector<verbs::Port> ports = listed;
    verbs::nearest_first(&ports, unknown, machine.sysfs());
    for (size_t i = 0; i < ports.size(); ++i) CHECK_EQ(ports[i].device, listed[i].device);
  }
}

// ---- which address --------------------------------------------------------------------------------------------------

verbs::Gid gid(uint32_t index, const char *address, const char *type, const char *interface) {
  verbs::Gid made;
  made.index = index;
  CHECK_EQ(inet_pton(AF_INET6, address, made.bytes.raw), 1);
  made.type = type;
  made.interface = interface;
  return made;
}

int chosen(const std::vector<verbs::Gid> &gids, verbs::Settings settings = {}, bool ethernet = true,
           const std::vector<std::string> &own = {"eth0"}) {
  std::string why;
  const verbs::Gid *best = verbs::choose_gid(gids, ethernet, own, settings, &why);
  CHECK(best != nullptr || !why.empty());
  return best == nullptr ? -1 : static_cast<int>(best->index);
}

void gids() {
  // As a ConnectX-7 port has them, with a VLAN on top, in the order of the driver.
  const std::vector<verbs::Gid> port = {gid(0, "fe80::e42:a1ff:fe00:1", "IB/RoCE v1", "eth0"),
                                        gid(1, "fe80::e42:a1ff:fe00:1", "RoCE v2", "eth0"),
                                        gid(2, "2001:db8::7", "RoCE v2", "eth0"),
                                        gid(3, "::ffff:10.7.0.9", "RoCE v2", "eth0.7"),
                                        gid(4, "::ffff:10.0.0.9", "IB/RoCE v1", "eth0"),
                                        gid(5, "::ffff:10.0.0.9", "RoCE v2", "eth0"),
                                        gid(6, "::ffff:169.254.3.4", "RoCE v2", "eth0")};
  CHECK_EQ(chosen(port), 5);
  verbs::Settings settings;
  settings.interface = "eth0.7";
  CHECK_EQ(chosen(port, settings), 3);
  settings.interface = "eth1";
  CHECK_EQ(chosen(port, settings), -1);
  settings = {};
  settings.gid_index = 4;
  CHECK_EQ(chosen(port, settings), 4);
  settings.gid_index = 9;
  CHECK_EQ(chosen(port, settings), -1);
  CHECK_EQ(chosen({port[0], port[1], port[2], port[6]}),
           2);  // no IPv4: a global address before what one made up itself
  CHECK_EQ(chosen({port[0], port[1], port[6]}), 1);
  CHECK_EQ(chosen({port[0], port[4]}), -1);  // v1 passes no router
  CHECK_EQ(chosen({}), -1);
  CHECK_EQ(chosen({port[3], port[5]}, {}, true, {}), 3);                  // whose interface is unknown: the first
  CHECK_EQ(chosen({gid(0, "fe80::1", "IB/RoCE v1", "")}, {}, false), 0);  // InfiniBand
  std::vector<verbs::WantedPort> ports;
  std::string why;
  CHECK(verbs::parse_devices("mlx5_0,mlx5_3:2", &ports, &why));
  CHECK(ports.size() == 2 && ports[1].device == "mlx5_3" && ports[1].port == 2 && ports[0].port == 1);
  for (const char *wrong : {"mlx5_0:", "mlx5_0:x", "mlx5_0:0", "mlx5_0:256"})
    CHECK(!verbs::parse_devices(wrong, &ports, &why));
}

void what_is_missing() {
  Net net(1, 1);
  net.down_ports.insert(0);
  const plugin::Values values(ept_backend_v1, {});
  const ept_host host = plugin::host();
  ept_probe report{};
  report.size = sizeof report;
  report.caps.size = sizeof report.caps;
  CHECK_EQ(ept_backend_v1.probe(&host, values.list.data(), values.list.size(), &report), EPT_E_UNAVAILABLE);
  CHECK(strstr(report.summary, "not active") != nullptr);
  net.down_ports.clear();
  CHECK_EQ(ept_backend_v1.probe(&host, values.list.data(), values.list.size(), &report), EPT_OK);
  CHECK(strstr(report.summary, "GID 1 ::ffff:10.77.0.1") != nullptr);
  ept_instance *instance = nullptr;
  net.max_cqe = 300;
  CHECK_EQ(Rank::open(ept_backend_v1, {}, values, host, &instance), EPT_E_LIMIT);
}

// ---- what is asked of a NIC -----------------------------------------------------------------------------------------

void requests() {
  Net net(2, 1);
  net.faults.lazy = 0;
  Group group(2, {{"inline", "64"}});
  Window data(group[0], group[1], 4096);
  const uint64_t relaxed = net.relaxed;
  CHECK(relaxed > 0);
  Window words(group[0], group[1], 64, EPT_ROLE_SIGNAL);
  CHECK_EQ(net.relaxed, relaxed);  // polled words land in strict order
  // Thirty-two writes in a call: one doorbell, one completion for all.
  std::vector<ept_op> ops;
  for (uint32_t i = 0; i < 32; ++i) {
    data.source[i * 128] = static_cast<uint8_t>(i + 1);
    ops.push_back(
        Rank::write(1, data.source_mem, &data.source[i * 128], data.region, i * 128, i % 2 == 0 ? 64 : 65, i, i));
  }
  const uint64_t doorbells = net.doorbells, sent = net.requests, inlined = net.inlined;
  size_t posted = 0;
  CHECK_EQ(ept_backend_v1.post(group[0].worker, ops.data(), ops.size(), &posted), EPT_OK);
  CHECK_EQ(posted, 32);
  CHECK_EQ(net.doorbells, doorbells + 1);
  CHECK_EQ(net.requests, sent + 32);
  CHECK_EQ(net.inlined, inlined + 16);
  CHECK_EQ(net.most_unsignalled, 31);
  for (uint32_t i = 0; i < 32; ++i) CHECK_EQ(group[1].expect(EPT_EVENT_IMM).immediate, i);
  for (uint32_t i = 0; i < 32; ++i) CHECK_EQ(group[0].expect(EPT_EVENT_LOCAL_DONE).cookie, i);
  for (uint32_t i = 0; i < 32; ++i) CHECK_EQ(data.bytes[i * 128], i + 1);
  // A full queue is an answer, and nothing is lost by it.
  uint64_t taken = 0;
  while (group[0].post(Rank::signal(1, data.region, 7, taken)) == EPT_OK) ++taken;
  CHECK_EQ(taken, 256);
  for (uint64_t i = 0; i < taken; ++i) CHECK_EQ(group[1].expect(EPT_EVENT_IMM).immediate, 7);
  for (uint64_t i = 0; i < taken; ++i) CHECK_EQ(group[0].expect(EPT_EVENT_LOCAL_DONE).cookie, i);
  CHECK_EQ(net.rnr, 0);
  CHECK_EQ(net.breaks, 0);
  CHECK_EQ(group[0].count().tx_operations, 32 + taken);
}

// As many immediates as were granted, and nobody looks: there is a receive for each.
void receives() {
  Net net(3, 1);
  net.faults.lazy = 0;
  Group group(2, {{"depth", "2048"}});
  Window window(group[0], group[1], 64);
  uint64_t taken = 0;
  for (; taken < group[0].id.credits; ++taken)
    CHECK_OK(ept_backend_v1, group[0].post(Rank::signal(1, window.region, 1, taken)));
  for (uint64_t i = 0; i < taken; ++i) group[0].expect(EPT_EVENT_LOCAL_DONE);
  CHECK_EQ(net.rnr, 0);
  for (uint64_t i = 0; i < taken; ++i) group[1].expect(EPT_EVENT_IMM);
}

// ---- peers ----------------------------------------------------------------------------------------------------------

void another_secret() {
  Net net(4, 1);
  plugin::Identity id;
  Rank one(ept_backend_v1, id);
  id.rank = 1;
  id.secret = "another";
  Rank two(ept_backend_v1, id);
  CHECK_OK(ept_backend_v1, one.open_peer(1, 0, two.address()));
  CHECK_OK(ept_backend_v1, two.open_peer(0, 0, one.address()));
  int told = 0;
  for (int i = 0; i < 10'000 && told < 2; ++i) {
    time_ns += 50'000;
    for (Rank *rank : {&one, &two})
      for (const plugin::Event &event : rank->poll()) {
        CHECK_EQ(event.kind, EPT_EVENT_PEER);
        CHECK_EQ(event.code, EPT_E_AUTH);
        ++told;
      }
  }
  CHECK_EQ(told, 2);
}

// A rank dies amid others: only what is for it fails, in time, and once.
void a_dead_peer() {
  Net net(5, 1);
  auto group = std::make_unique<Group>(3);
  Rank &own = (*group)[0];
  Window dead(own, (*group)[1], 64), well(own, (*group)[2], 64);
  for (auto &[number, qp] : net.qps) CHECK(qp->base.qp_type == IBV_QPT_UD || qp->base.state == IBV_QPS_RTS);
  (*group)[1].leave();
  for (uint32_t i = 0; i < 4; ++i) CHECK_OK(ept_backend_v1, own.post(Rank::signal(1, dead.region, i, 100 + i)));
  int failed = 0, lost = 0, done = 0, arrived = 0;
  const uint64_t start = time_ns;
  for (int i = 0; i < 400'000 && failed < 4; ++i) {
    time_ns += 50'000;
    if (i % 64 == 0 && i < 640) CHECK_OK(ept_backend_v1, own.post(Rank::signal(2, well.region, 9, 9)));
    for (const plugin::Event &event : own.poll()) {
      if (event.kind == EPT_EVENT_PEER && event.code < 0) ++lost;
      if (event.kind == EPT_EVENT_ERROR) {
        CHECK_EQ(lost, 1);
        CHECK_EQ(event.peer, 1);
        ++failed;
      }
      if (event.kind == EPT_EVENT_LOCAL_DONE) ++done;
    }
    for (const plugin::Event &event : (*group)[2].poll()) arrived += event.kind == EPT_EVENT_IMM;
  }
  CHECK_EQ(failed, 4);
  CHECK_EQ(lost, 1);
  CHECK_EQ(done, 10);
  CHECK_EQ(arrived, 10);
  CHECK(time_ns - start < own.id.dead_ns + 1'000'000'000);
}

// A completion says nothing of bytes in a GPU: they are there when `visible` says so, over each of two NICs, and though
// reads fail. What was asked before is answered once, and none is answered for what came later.
void gpu_memory() {
  Net net(9, 2);
  Group group(2, {{"nics", "2"}});
  constexpr size_t kBytes = 4096;
  std::vector<uint8_t> source(kBytes, 1), gpu(kBytes);
  net.gpus.insert({gpu.data(), gpu.data() + kBytes});
  ept_mem *from = group[0].enroll(source.data(), kBytes, EPT_ACCESS_LOCAL), *to = nullptr;
  ept_memory memory{};
  memory.size = sizeof memory;
  memory.address = gpu.data();
  memory.length = kBytes;
  memory.kind = EPT_MEMORY_CUDA;
  memory.cuda_device = 0;
  memory.fd = -1;
  memory.role = EPT_ROLE_DATA;
  memory.access = EPT_ACCESS_LOCAL | EPT_ACCESS_REMOTE_WRITE;
  CHECK_OK(ept_backend_v1, ept_backend_v1.mem_register(group[1].instance, &memory, &to));
  const auto [blob, key] = group[1].grant(to, 0, 0, kBytes);
  ept_region *region = group[0].import(1, blob);
  uint64_t cookie = 0;
  for (uint32_t turn = 1; turn <= 40; ++turn) {
    memset(source.data(), static_cast<int>(turn), kBytes);
    for (uint32_t rail = 0; rail < 2; ++rail) {
      ept_op op = Rank::write(1, from, source.data() + rail * 64, region, rail * 64, 64, rail, rail);
      op.rail = rail;
      CHECK_OK(ept_backend_v1, group[0].post(op));
    }
    for (uint32_t came = 0; came < 2;) {
      time_ns += 50'000;
      static_cast<void>(group[0].poll());
      for (const plugin::Event &event : group[1].poll()) came += event.kind == EPT_EVENT_IMM;
    }
    CHECK(gpu[0] != turn && gpu[64] != turn);  // else this test shows nothing
    net.faults.lost_request = turn % 4 == 0 ? 500 : 0;
    const uint64_t first = cookie + 1;
    for (int asked = 0; asked < 3; ++asked)
      CHECK_OK(ept_backend_v1, ept_backend_v1.visible(group[1].worker, 0, ++cookie));
    for (uint64_t next = first; next <= cookie;) {
      time_ns += 1'000'000;
      for (const plugin::Event &event : group[1].poll()) {
        CHECK_EQ(event.kind, EPT_EVENT_VISIBLE);
        CHECK_EQ(event.cookie, next++);
        CHECK(gpu[0] == turn && gpu[64] == turn);
      }
    }
    net.faults.lost_request = 0;
    for (int i = 0; i < 100; ++i) static_cast<void>(group[0].poll());
  }
  CHECK(net.reads >= 40 * 2);
  CHECK_OK(ept_backend_v1, ept_backend_v1.region_revoke(to, 0, key));
  CHECK_OK(ept_backend_v1, ept_backend_v1.mem_deregister(to));
  // Without GPU memory there is nothing to wait for.
  CHECK_OK(ept_backend_v1, ept_backend_v1.visible(group[1].worker, 0, 7));
  CHECK_EQ(group[1].expect(EPT_EVENT_VISIBLE).cookie, 7);
}

// After FENCED nothing of that epoch lands, and what was consumed is told; the next life of the peer is taken. Who was
// fenced hears of it long before it would take the other side for dead, though the first word of it is lost.
void a_fence() {
  Net net(6, 2);
  Group group(2, {{"nics", "2"}});
  Window window(group[0], group[1], 64);
  for (uint32_t i = 0; i < 3; ++i) CHECK_OK(ept_backend_v1, group[0].post(Rank::signal(1, window.region, i, i)));
  for (uint32_t i = 0; i < 3; ++i) group[1].expect(EPT_EVENT_IMM);
  CHECK_OK(ept_backend_v1, ept_backend_v1.peer_fence(group[1].instance, 0, 0, 77));
  window.source[0] = 1;
  CHECK_OK(ept_backend_v1,
           group[0].post(Rank::write(1, window.source_mem, window.source.data(), window.region, 0, 8, 5, 5)));
  net.faults.lost_datagram = 1000;
  uint32_t rails = 0, consumed = 0, told = 0;
  const uint64_t start = time_ns;
  for (int i = 0; i < 10'000; ++i) {
    time_ns += 50'000;
    if (i == 100) net.faults.lost_datagram = 0;
    for (const plugin::Event &event : group[0].poll()) {
      if (event.kind != EPT_EVENT_PEER || event.code == EPT_LATER) continue;
      CHECK_EQ(event.code, EPT_E_PEER_LOST);
      CHECK(time_ns - start < group[0].id.dead_ns / 2);
      ++told;
    }
    for (const plugin::Event &event : group[1].poll()) {
      CHECK_EQ(event.kind, EPT_EVENT_FENCED);
      CHECK_EQ(event.cookie, 77);
      ++rails;
      consumed += event.immediate;
    }
  }
  CHECK_EQ(told, 1);
  CHECK_EQ(rails, 2);
  CHECK(consumed >= 3);  // and what found out whether the way is whole
  CHECK_EQ(window.bytes[0], 0);
  CHECK_EQ(group[1].open_peer(0, 0, group[0].address()), EPT_E_PEER_LOST);
}

// Nobody can say what was consumed by a queue that failed: its peers are lost, and told so once.
void a_failed_queue() {
  Net net(7, 1);
  Group group(3);
  Window window(group[0], group[1], 64);
  CHECK_OK(ept_backend_v1, group[0].post(Rank::signal(1, window.region, 1, 1)));
  for (ibv_context *context : {*net.contexts.begin()}) {
    ibv_async_event event{};
    event.event_type = IBV_EVENT_CQ_ERR;
    net.events[context].push_back(event);
  }
  int lost = 0;
  for (int i = 0; i < 1000; ++i) {
    time_ns += 50'000;
    for (size_t rank = 0; rank < 3; ++rank)
      for (const plugin::Event &event : group[rank].poll()) lost += event.kind == EPT_EVENT_PEER && event.code < 0;
  }
  CHECK(lost >= 2);
}

// Who can say nothing any more, and so make no channel anew, says so at once, and not when its peers seem dead.
void a_mute_nic() {
  Net net(9, 1);
  Group group(2);
  Window window(group[0], group[1], 64);
  net.faults.failed_datagram = 1000;
  net.faults.refused_reset = true;
  for (auto &[number, qp] : net.qps)
    if (qp->base.qp_type == IBV_QPT_RC) net.fail(qp);
  int lost = 0;
  const uint64_t start = time_ns;
  for (int i = 0; i < 10'000; ++i) {
    time_ns += 50'000;
    for (size_t rank = 0; rank < 2; ++rank)
      for (const plugin::Event &event : group[rank].poll()) {
        if (event.kind != EPT_EVENT_PEER || event.code == EPT_LATER) continue;
        CHECK_EQ(event.code, EPT_E_PEER_LOST);
        CHECK(time_ns - start < group[0].id.dead_ns / 2);
        ++lost;
      }
  }
  CHECK_EQ(lost, 2);
}

// What a stranger says changes nothing but a counter: each byte of a true message flipped.
void strangers() {
  Net net(8, 1);
  Group group(2);
  int64_t before = 0, after = 0;
  CHECK_OK(ept_backend_v1, ept_backend_v1.query(group[0].instance, "strangers", &before));
  uint32_t target = 0;
  for (auto &[number, qp] : net.qps)
    if (qp->base.qp_type == IBV_QPT_UD) target = target == 0 ? number : target;
  verbs_net::Qp *qp = net.qps.at(target);
  for (int i = 0; i < 200; ++i) {
    if (qp->receives.empty()) static_cast<void>(group[0].poll());
    const verbs_net::Receive receive = qp->receives.front();
    qp->receives.pop_front();
    auto *bytes = static_cast<uint8_t *>(receive.bytes) + 40;
    // What came there last, if anything did, with a bit turned: or noise.
    bytes[net.random() % 300] ^= static_cast<uint8_t>(1u << net.random() % 8);
    net.complete(qp, receive.wr_id, IBV_WC_SUCCESS, IBV_WC_RECV, false, 0);
    qp->cq->entries.back().wc.byte_len = 40 + static_cast<uint32_t>(i % 3 == 0 ? net.random() % 1024 : 192);
    group[0].expect_nothing(4);
  }
  CHECK_OK(ept_backend_v1, ept_backend_v1.query(group[0].instance, "strangers", &after));
  CHECK(after > before);
  Window window(group[0], group[1], 64);
  CHECK_OK(ept_backend_v1, group[0].post(Rank::signal(1, window.region, 3, 3)));
  CHECK_EQ(group[1].expect(EPT_EVENT_IMM).immediate, 3);
}

}  // namespace

int main() {
  plugin::hmac = [](void *, const void *key, size_t key_length, const void *data, size_t length, uint8_t *mac) {
    ept::hmac_sha256(key, key_length, data, length, mac);
  };
  plugin::log_level = EPT_LOG_ERROR;
  plugin::clock = [] { return time_ns += 1000; };
  nics_near_a_gpu();
  gids();
  what_is_missing();
  requests();
  receives();
  another_secret();
  a_dead_peer();
  gpu_memory();
  a_fence();
  a_failed_queue();
  a_mute_nic();
  strangers();
  return 0;
}
