// SPDX-License-Identifier: Apache-2.0
#include "nic.h"

#include <fcntl.h>
#include <sched.h>

#include <algorithm>
#include <cerrno>
#include <cstring>

#include "../near.h"

namespace verbs {
namespace {

constexpr uint32_t kGrh = 40;  // what stands before the payload of a datagram
constexpr uint32_t kHeardBytes = 1088;
constexpr uint32_t kSaidBytes = 1024;
constexpr uint32_t kLeastHeard = 64, kMostHeard = 1024;
constexpr uint32_t kFreeMessages = 32;  // those that take no credit (heartbeats, greetings), and a probe
constexpr uint8_t kHops = 64;

int32_t refused(const char *device, const char *what, int number) {
  return fail(EPT_E_UNAVAILABLE, "open", -1, number, "verbs: %s on %s failed: %s (errno %d)%s", what, device,
              strerror(number), number,
              number == ENOMEM ? "; raise the limit of locked memory (ulimit -l unlimited)" : "");
}

// bits/s of a port's speed and width, as the InfiniBand specification numbers them.
uint64_t bits_of(uint8_t speed, uint8_t width) {
  static const struct {
    uint8_t code;
    uint32_t megabits;
  } speeds[] = {{1, 2500}, {2, 5000}, {4, 10000}, {8, 10000}, {16, 14000}, {32, 25000}, {64, 50000}, {128, 100000}},
    widths[] = {{1, 1}, {2, 4}, {4, 8}, {8, 12}, {16, 2}};
  uint64_t bits = 0;
  for (const auto &entry : speeds)
    if (entry.code == speed) bits = uint64_t{entry.megabits} * 1'000'000;
  for (const auto &entry : widths)
    if (entry.code == width) return bits * entry.megabits;
  return 0;
}

// Fills `port`, or says why it will not do.
std::string look_at(Library &library, const Settings &settings, ibv_context *context, Port *port) {
  ibv_port_attr attributes{};
  const int status = library.query_port(context, port->number, &attributes);
  if (status != 0) return format("there is no port %u (%s)", port->number, strerror(status));
  if (attributes.state != IBV_PORT_ACTIVE) return "its port is not active (no link)";
  port->ethernet = attributes.link_layer == IBV_LINK_LAYER_ETHERNET;
  port->lid = attributes.lid;
  port->mtu = attributes.active_mtu;
  while (settings.mtu != 0 && bytes_of(port->mtu) > settings.mtu) port->mtu = static_cast<ibv_mtu>(port->mtu - 1);
  if (port->mtu < IBV_MTU_1024)
    return format("its MTU is %u bytes, and 1,024 are needed (on Ethernet, an interface MTU of 1,500 gives that)",
                  bytes_of(port->mtu));
  port->bits_per_s = bits_of(attributes.active_speed, attributes.active_width);
  std::string why;
  const std::vector<Gid> gids = read_gids(library.sysfs(), port->device, port->number);
  const Gid *gid = choose_gid(gids, port->ethernet, own_interfaces(library.sysfs(), port->device), settings, &why);
  if (gid == nullptr) return why;
  port->gid = *gid;
  port->pci = pci_of(library.sysfs(), port->device);
  port->numa = numa_of(library.sysfs(), port->device);
  return "";
}

int to_ready(Library *library, ibv_qp *qp, uint8_t port, uint32_t qkey) {
  ibv_qp_attr attributes{};
  attributes.qp_state = IBV_QPS_INIT;
  attributes.port_num = port;
  attributes.qkey = qkey;
  int status = library->modify_qp(qp, &attributes, IBV_QP_STATE | IBV_QP_PKEY_INDEX | IBV_QP_PORT | IBV_QP_QKEY);
  attributes.qp_state = IBV_QPS_RTR;
  if (status == 0) status = library->modify_qp(qp, &attributes, IBV_QP_STATE);
  attributes.qp_state = IBV_QPS_RTS;
  if (status == 0) status = library->modify_qp(qp, &attributes, IBV_QP_STATE | IBV_QP_SQ_PSN);
  return status;
}

Plan make_plan(const Settings &settings, const Room &room, const ibv_device_attr &most) {
  Plan plan;
  const uint32_t deepest = static_cast<uint32_t>(std::max(most.max_qp_wr, 64));
  plan.depth = std::min(settings.depth, deepest);
  // The engine keeps two entries in 64 for grants of credits (choose_credits), hence a margin of 1/16.
  plan.receives = std::min(room.credits + room.credits / 16 + 1 + kReturn, deepest);
  plan.message_receives = std::min(room.send_credits + kFreeMessages, deepest);
  plan.message_depth = plan.message_receives;
  const uint32_t heard = std::clamp(8 * room.peers, kLeastHeard, kMostHeard);
  const uint64_t fixed = kSaid + heard + kMostGpus + 1;
  const uint64_t apart = uint64_t{plan.message_depth} + plan.message_receives + uint64_t{settings.qps} * plan.depth;
  // A card's queues may be shorter than what many ranks would want: then the engine grants fewer credits.
  const uint64_t limit = static_cast<uint64_t>(std::max(most.max_cqe, 1));
  const uint64_t share = limit > fixed ? (limit - fixed) / room.peers : 0;
  const uint64_t left = share > apart ? (share - apart) / settings.qps : 0;
  plan.receives = static_cast<uint32_t>(std::min<uint64_t>(plan.receives, left));
  if (settings.receives != 0) plan.receives = std::min(plan.receives, settings.receives);
  plan.entries = static_cast<uint32_t>(fixed + room.peers * (apart + uint64_t{settings.qps} * plan.receives));
  plan.inline_bytes = settings.inline_bytes;
  return plan;
}

int32_t make_buffers(Nic *nic, size_t bytes, unsigned access, Buffers *buffers) {
  buffers->bytes.reset(new uint8_t[bytes]);
  buffers->mr = {nic->library, nic->library->reg_mr(nic->pd.get(), buffers->bytes.get(), bytes, access)};
  return buffers->mr ? EPT_OK : refused(nic->port.device.c_str(), "registering memory", errno);
}

}  // namespace

uint32_t bytes_of(ibv_mtu mtu) { return 128u << mtu; }

void nearest_first(std::vector<Port> *ports, const std::string &gpu, const std::string &sysfs) {
  std::vector<std::string> cards, mine;
  for (const Port &port : *ports)
    if (!port.pci.empty() && std::find(cards.begin(), cards.end(), port.pci) == cards.end()) cards.push_back(port.pci);
  for (const size_t card : plugin::nics_near(cards, gpu, sysfs)) mine.push_back(cards[card]);
  unsigned cpu = 0, node = 0;
  const bool known = getcpu(&cpu, &node) == 0;
  auto distance = [&](const Port &port) {
    if (!gpu.empty() && std::find(mine.begin(), mine.end(), port.pci) != mine.end()) return 0;
    return known && port.numa == static_cast<int32_t>(node) ? 1 : 2;
  };
  std::stable_sort(ports->begin(), ports->end(),
                   [&](const Port &one, const Port &other) { return distance(one) < distance(other); });
}

int32_t find_ports(Library &library, const Settings &settings, const std::string &gpu, std::vector<Port> *ports,
                   std::string *mend) {
  std::vector<WantedPort> wanted;
  std::string why;
  *mend =
      "give the NIC a link and an address, or choose by EPT_VERBS_DEVICES, EPT_VERBS_INTERFACE, EPT_VERBS_GID_INDEX";
  if (!parse_devices(settings.devices, &wanted, &why))
    return fail(EPT_E_CONFIG, "open", -1, 0, "verbs: %s", why.c_str());
  if (wanted.size() > kMostNics)
    return fail(EPT_E_CONFIG, "open", -1, 0, "verbs: devices names %zu NICs; %u at most", wanted.size(), kMostNics);
  int count = 0;
  ibv_device **list = library.get_device_list(&count);
  if (list == nullptr || count == 0) {
    const int number = list == nullptr ? errno : 0;
    if (list != nullptr) library.free_device_list(list);
    *mend =
        "this needs an RDMA NIC with its driver loaded (ls /sys/class/infiniband) and, in a container, "
        "--device=/dev/infiniband; or use another backend";
    return fail(EPT_E_UNAVAILABLE, "open", -1, number, "verbs: %s sees no RDMA device%s%s", library.path().c_str(),
                number != 0 ? ": " : "", number != 0 ? strerror(number) : "");
  }
  std::string reasons;
  auto look = [&](const WantedPort &at) {
    Port port;
    port.device = at.device;
    port.number = at.port;
    why = "there is no such device";
    for (int i = 0; i < count; ++i) {
      if (at.device != library.get_device_name(list[i])) continue;
      if (list[i]->transport_type != IBV_TRANSPORT_IB) {
        why = "it has no reliable connections with immediates (an EFA card? EPT_BACKEND=libfabric)";
        break;
      }
      Context context(&library, library.open_device(list[i]));
      if (context)
        why = look_at(library, settings, context.get(), &port);
      else
        why = format("it can't be opened: %s; in a container, it needs --device=/dev/infiniband", strerror(errno));
    }
    if (why.empty())
      ports->push_back(port);
    else
      reasons += (reasons.empty() ? "" : "; ") + at.device + ": " + why;
    return why.empty();
  };
  bool all = true;
  for (const WantedPort &port : wanted) all = look(port) && all;
  if (wanted.empty()) {
    for (int i = 0; i < count; ++i) look({library.get_device_name(list[i]), 1});
    nearest_first(ports, gpu, library.sysfs());
    if (ports->size() > settings.nics) ports->resize(settings.nics);
  }
  library.free_device_list(list);
  if (ports->empty() || !all) return fail(EPT_E_UNAVAILABLE, "open", -1, 0, "verbs: %s", reasons.c_str());
  return EPT_OK;
}

int32_t open_nic(Library *library, const Settings &settings, const Room &room, const Port &port, uint32_t number,
                 uint8_t *send_buffers, const ept_host &host, uint64_t ud_id, Nic *nic) {
  const char *name = port.device.c_str();
  nic->library = library;
  nic->number = number;
  nic->port = port;
  int count = 0;
  ibv_device **list = library->get_device_list(&count);
  for (int i = 0; list != nullptr && i < count && !nic->context; ++i)
    if (port.device == library->get_device_name(list[i])) nic->context = {library, library->open_device(list[i])};
  const int opening = errno;
  if (list != nullptr) library->free_device_list(list);
  if (!nic->context) return refused(name, "opening the device", opening);
  ibv_device_attr most{};
  int status = library->query_device(nic->context.get(), &most);
  if (status != 0) return refused(name, "asking for its limits", status);
  nic->plan = make_plan(settings, room, most);
  const Plan &plan = nic->plan;
  if (plan.receives <= (settings.receives != 0 ? 0 : kReturn))
    return fail(EPT_E_LIMIT, "open", -1, 0,
                "verbs: the completion queues of %s have %d entries at most, too few for %u ranks of %u queue pairs "
                "each; lower EPT_VERBS_QPS or EPT_VERBS_DEPTH",
                name, most.max_cqe, room.peers, settings.qps);
  // Notices and events are never waited for: a call that finds none has to come back.
  fcntl(nic->context->async_fd, F_SETFL, fcntl(nic->context->async_fd, F_GETFL) | O_NONBLOCK);
  nic->pd = {library, library->alloc_pd(nic->context.get())};
  if (!nic->pd) return refused(name, "making a protection domain", errno);
  nic->notices = {library, library->create_comp_channel(nic->context.get())};
  if (!nic->notices) return refused(name, "making a channel for notices", errno);
  fcntl(nic->notices->fd, F_SETFL, fcntl(nic->notices->fd, F_GETFL) | O_NONBLOCK);
  nic->cq = {library, library->create_cq(nic->context.get(), static_cast<int>(plan.entries), nic->notices.get())};
  if (!nic->cq) return refused(name, format("making a completion queue of %u entries", plan.entries).c_str(), errno);
  nic->messages = {library, library->reg_mr(nic->pd.get(), send_buffers, size_t{kSendBuffers} * kMaxSend, 0)};
  if (!nic->messages) return refused(name, "registering memory", errno);
  const uint32_t heard = std::clamp(8 * room.peers, kLeastHeard, kMostHeard);
  int32_t code = make_buffers(nic, size_t{heard} * kHeardBytes, IBV_ACCESS_LOCAL_WRITE, &nic->heard);
  if (code == EPT_OK) code = make_buffers(nic, size_t{kSaid} * kSaidBytes, 0, &nic->said);
  if (code != EPT_OK) return code;
  ibv_qp_init_attr attributes{};
  attributes.send_cq = attributes.recv_cq = nic->cq.get();
  attributes.qp_type = IBV_QPT_UD;
  attributes.cap = {kSaid, heard, 1, 1, 0};
  nic->datagrams = {library, library->create_qp(nic->pd.get(), &attributes)};
  if (!nic->datagrams) return refused(name, "making a datagram queue pair", errno);
  host.random(host.context, &nic->qkey, sizeof nic->qkey);
  nic->qkey &= INT32_MAX;  // the upper half is for privileged ones
  status = to_ready(library, nic->datagrams.get(), port.number, nic->qkey);
  if (status != 0) return refused(name, "readying a datagram queue pair", status);
  nic->hears = heard;
  for (uint32_t i = 0; i < heard; ++i) nic->listen(i, ud_id + i);
  for (uint32_t i = kSaid; i-- > 0;) nic->free_said.push_back(i);
  return EPT_OK;
}

NicAddress Nic::address() const {
  NicAddress own{};
  memcpy(own.gid, port.gid.bytes.raw, sizeof own.gid);
  own.qpn = datagrams->qp_num;
  own.qkey = qkey;
  own.lid = port.lid;
  own.ethernet = port.ethernet;
  own.mtu = static_cast<uint8_t>(port.mtu);
  own.receives = plan.receives;
  return own;
}

ibv_ah_attr Nic::way_to(const NicAddress &peer, const Settings &settings) const {
  ibv_ah_attr way{};
  way.port_num = port.number;
  way.sl = static_cast<uint8_t>(settings.service_level);
  way.dlid = peer.lid;
  // RoCE has no other address; InfiniBand needs one only across subnets, which the first half of a GID names.
  way.is_global = port.ethernet || memcmp(peer.gid, port.gid.bytes.raw, 8) != 0;
  memcpy(way.grh.dgid.raw, peer.gid, sizeof peer.gid);
  way.grh.sgid_index = static_cast<uint8_t>(port.gid.index);
  way.grh.hop_limit = kHops;
  way.grh.traffic_class = static_cast<uint8_t>(settings.traffic_class);
  return way;
}

bool Nic::say(ibv_ah *to, const NicAddress &peer, const Message &message, uint64_t wr_id) {
  if (free_said.empty() || muted || !broken.empty()) return false;
  const uint32_t buffer = free_said.back();
  uint8_t *bytes = said.bytes.get() + size_t{buffer} * kSaidBytes;
  memcpy(bytes, &message, message.size());
  ibv_sge range{reinterpret_cast<uint64_t>(bytes), static_cast<uint32_t>(message.size()), said.mr->lkey};
  ibv_send_wr request{}, *bad = nullptr;
  request.wr_id = wr_id + buffer;
  request.sg_list = &range;
  request.num_sge = 1;
  request.opcode = IBV_WR_SEND;
  request.send_flags = IBV_SEND_SIGNALED;
  request.wr.ud.ah = to;
  request.wr.ud.remote_qpn = peer.qpn;
  request.wr.ud.remote_qkey = peer.qkey;
  if (ibv_post_send(datagrams.get(), &request, &bad) != 0) return false;
  free_said.pop_back();
  return true;
}

void Nic::listen(uint32_t buffer, uint64_t wr_id) {
  ibv_sge range{reinterpret_cast<uint64_t>(heard.bytes.get() + size_t{buffer} * kHeardBytes), kHeardBytes,
                heard.mr->lkey};
  ibv_recv_wr request{wr_id, nullptr, &range, 1}, *bad = nullptr;
  ibv_post_recv(datagrams.get(), &request, &bad);
}

bool Nic::mute() {
  if (muted || !broken.empty()) return false;
  muted = true;
  ibv_qp_attr attributes{};
  attributes.qp_state = IBV_QPS_ERR;
  library->modify_qp(datagrams.get(), &attributes, IBV_QP_STATE);
  return true;
}

bool Nic::unmute() {
  if (!muted || !broken.empty() || free_said.size() != kSaid || not_heard.size() != hears) return true;
  ibv_qp_attr attributes{};
  attributes.qp_state = IBV_QPS_RESET;
  if (library->modify_qp(datagrams.get(), &attributes, IBV_QP_STATE) != 0) return false;
  if (to_ready(library, datagrams.get(), port.number, qkey) != 0) return false;
  muted = false;
  for (const auto &[buffer, wr_id] : not_heard) listen(buffer, wr_id);
  not_heard.clear();
  return true;
}

const uint8_t *Nic::datagram(uint32_t buffer) const { return heard.bytes.get() + size_t{buffer} * kHeardBytes + kGrh; }

bool Nic::take_notices() {
  ibv_cq *queue = nullptr;
  unsigned count = 0;
  while (library->get_cq_event(notices.get(), &queue) == 0) ++count;
  if (count > 0) library->ack_cq_events(cq.get(), count);
  return count > 0;
}

}  // namespace verbs
