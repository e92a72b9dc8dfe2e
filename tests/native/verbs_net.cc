// SPDX-License-Identifier: Apache-2.0
#include "verbs_net.h"

#include <sys/eventfd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <filesystem>
#include <fstream>

namespace verbs_net {

Net *current = nullptr;

namespace {

constexpr uint32_t kTries = 6;
constexpr uint32_t kGrh = 40;

Net *net_of(ibv_context *context) { return *reinterpret_cast<Net **>(context + 1); }
uint32_t nic_of(ibv_context *context) { return static_cast<uint32_t>(context->num_comp_vectors); }
Qp *of(ibv_qp *qp) { return reinterpret_cast<Qp *>(qp); }
Cq *of(ibv_cq *cq) { return reinterpret_cast<Cq *>(cq); }

int post_send(ibv_qp *base, ibv_send_wr *request, ibv_send_wr **bad) {
  Qp *qp = of(base);
  Net *net = net_of(base->context);
  CHECK(base->state == IBV_QPS_RTS || base->state == IBV_QPS_ERR);
  *bad = request;
  if (base->qp_type == IBV_QPT_RC && net->chance(net->faults.refused_post)) return ENOMEM;
  ++net->doorbells;
  for (; request != nullptr; request = request->next) {
    CHECK(qp->posted - qp->freed < qp->cap.max_send_wr);
    CHECK(request->num_sge <= 1);
    ++net->requests;
    Send send;
    send.request = *request;
    send.index = qp->posted++;
    if (request->num_sge == 1) {
      const ibv_sge &range = *request->sg_list;
      send.source = reinterpret_cast<const void *>(range.addr);
      send.length = range.length;
      if ((request->send_flags & IBV_SEND_INLINE) != 0) {
        CHECK(range.length <= qp->cap.max_inline_data);
        const auto *bytes = static_cast<const uint8_t *>(send.source);
        send.bytes.assign(bytes, bytes + range.length);
        send.source = nullptr;
        ++net->inlined;
      } else {
        bool covered = false;
        for (const auto &[key, region] : net->keys)
          covered = covered ||
                    (region->base.lkey == range.lkey && region->nic == qp->nic &&
                     range.addr >= reinterpret_cast<uint64_t>(region->base.addr) &&
                     range.addr + range.length <= reinterpret_cast<uint64_t>(region->base.addr) + region->base.length);
        CHECK(covered);
      }
    }
    qp->unsignalled = (request->send_flags & IBV_SEND_SIGNALED) != 0 ? 0 : qp->unsignalled + 1;
    net->most_unsignalled = std::max(net->most_unsignalled, qp->unsignalled);
    CHECK(qp->unsignalled < qp->cap.max_send_wr);
    if (base->state == IBV_QPS_ERR)
      net->complete(qp, request->wr_id, IBV_WC_WR_FLUSH_ERR, IBV_WC_SEND, true, send.index);
    else
      qp->sends.push_back(std::move(send));
  }
  CHECK_EQ(qp->unsignalled, 0);  // a chain ends with a request that will complete
  return 0;
}

int post_recv(ibv_qp *base, ibv_recv_wr *request, ibv_recv_wr **bad) {
  Qp *qp = of(base);
  CHECK(base->state != IBV_QPS_RESET);
  *bad = request;
  for (; request != nullptr; request = request->next) {
    CHECK(qp->receives.size() < qp->cap.max_recv_wr);
    if (base->state == IBV_QPS_ERR) {
      net_of(base->context)->complete(qp, request->wr_id, IBV_WC_WR_FLUSH_ERR, IBV_WC_RECV, false, 0);
      continue;
    }
    Receive receive{request->wr_id, nullptr, 0};
    if (request->num_sge == 1)
      receive = {request->wr_id, reinterpret_cast<void *>(request->sg_list->addr), request->sg_list->length};
    qp->receives.push_back(receive);
  }
  return 0;
}

int poll_cq(ibv_cq *base, int most, ibv_wc *completions) {
  Cq *cq = of(base);
  cq->net->step();
  int count = 0;
  for (; count < most && !cq->entries.empty(); ++count) {
    const Completion &entry = cq->entries.front();
    completions[count] = entry.wc;
    auto qp = cq->net->qps.find(entry.qpn);
    if (entry.send && qp != cq->net->qps.end()) qp->second->freed = std::max(qp->second->freed, entry.index + 1);
    cq->entries.pop_front();
  }
  return count;
}

int req_notify_cq(ibv_cq *base, int) {
  of(base)->asked = true;
  return 0;
}

class Functions final : public verbs::Library {
 public:
  explicit Functions(Net *net) : net_(net) {}

  ibv_device **get_device_list(int *count) override {
    devices_.resize(net_->nics);
    auto **list = new ibv_device *[net_->nics + 1];
    for (uint32_t i = 0; i < net_->nics; ++i) {
      snprintf(devices_[i].name, sizeof devices_[i].name, "fake%u", i);
      devices_[i].transport_type = IBV_TRANSPORT_IB;
      list[i] = &devices_[i];
    }
    *count = static_cast<int>(net_->nics);
    return list;
  }
  void free_device_list(ibv_device **list) override { delete[] list; }
  const char *get_device_name(ibv_device *device) override { return device->name; }
  ibv_context *open_device(ibv_device *device) override {
    auto *bytes = new uint8_t[sizeof(ibv_context) + sizeof(Net *)]();
    auto *context = reinterpret_cast<ibv_context *>(bytes);
    memcpy(context + 1, &net_, sizeof net_);
    context->num_comp_vectors = static_cast<int>(device - devices_.data());
    context->async_fd = eventfd(0, EFD_CLOEXEC);
    context->ops.post_send = post_send;
    context->ops.post_recv = post_recv;
    context->ops.poll_cq = poll_cq;
    context->ops.req_notify_cq = req_notify_cq;
    net_->contexts.insert(context);
    return context;
  }
  int close_device(ibv_context *context) override {
    net_->contexts.erase(context);
    net_->events.erase(context);
    close(context->async_fd);
    delete[] reinterpret_cast<uint8_t *>(context);
    return 0;
  }
  int query_device(ibv_context *, ibv_device_attr *attributes) override {
    *attributes = {};
    attributes->max_qp_wr = net_->max_wr;
    attributes->max_cqe = net_->max_cqe;
    return 0;
  }
  int query_port(ibv_context *context, uint8_t port, ibv_port_attr *attributes) override {
    *attributes = {};
    if (port != 1) return EINVAL;
    attributes->state = net_->down_ports.count(nic_of(context)) != 0 ? IBV_PORT_DOWN : IBV_PORT_ACTIVE;
    attributes->active_mtu = IBV_MTU_4096;
    attributes->link_layer = IBV_LINK_LAYER_ETHERNET;
    return 0;
  }
  ibv_pd *alloc_pd(ibv_context *context) override { return new ibv_pd{context, 0}; }
  int dealloc_pd(ibv_pd *pd) override {
    delete pd;
    return 0;
  }
  ibv_mr *reg_mr(ibv_pd *pd, void *address, size_t length, unsigned access) override {
    auto *region = new Region;
    region->base.context = pd->context;
    region->base.addr = address;
    region->base.length = length;
    region->base.lkey = region->base.rkey = net_->next_number++;
    region->nic = nic_of(pd->context);
    region->access = access;
    if ((access & IBV_ACCESS_RELAXED_ORDERING) != 0) ++net_->relaxed;
    net_->keys[region->base.rkey] = region;
    return &region->base;
  }
  ibv_mr *reg_dmabuf_mr(ibv_pd *, uint64_t, size_t, uint64_t, int, unsigned) override {
    errno = EOPNOTSUPP;
    return nullptr;
  }
  int dereg_mr(ibv_mr *mr) override {
    net_->keys.erase(mr->rkey);
    delete reinterpret_cast<Region *>(mr);
    return 0;
  }
  ibv_comp_channel *create_comp_channel(ibv_context *context) override {
    return new ibv_comp_channel{context, eventfd(0, EFD_CLOEXEC), 0};
  }
  int destroy_comp_channel(ibv_comp_channel *channel) override {
    close(channel->fd);
    delete channel;
    return 0;
  }
  ibv_cq *create_cq(ibv_context *context, int entries, ibv_comp_channel *channel) override {
    auto *cq = new Cq;
    cq->base.context = context;
    cq->net = net_;
    cq->room = static_cast<size_t>(entries);
    cq->channel = channel;
    return &cq->base;
  }
  int destroy_cq(ibv_cq *cq) override {
    delete of(cq);
    return 0;
  }
  int get_cq_event(ibv_comp_channel *channel, ibv_cq **) override {
    uint64_t count = 0;
    return read(channel->fd, &count, sizeof count) == sizeof count ? 0 : -1;
  }
  void ack_cq_events(ibv_cq *, unsigned) override {}
  ibv_qp *create_qp(ibv_pd *pd, ibv_qp_init_attr *attributes) override {
    if (attributes->cap.max_inline_data > net_->max_inline) {
      errno = EINVAL;
      return nullptr;
    }
    auto *qp = new Qp;
    qp->base.context = pd->context;
    qp->base.qp_type = attributes->qp_type;
    qp->base.qp_num = net_->next_number++;
    qp->base.state = IBV_QPS_RESET;
    qp->cap = attributes->cap;
    qp->cq = of(attributes->send_cq);
    qp->nic = nic_of(pd->context);
    CHECK(attributes->recv_cq == attributes->send_cq);
    net_->qps[qp->base.qp_num] = qp;
    return &qp->base;
  }
  int modify_qp(ibv_qp *base, ibv_qp_attr *attributes, int mask) override {
    Qp *qp = of(base);
    const bool ud = base->qp_type == IBV_QPT_UD;
    switch (attributes->qp_state) {
      case IBV_QPS_INIT:
        CHECK(base->state == IBV_QPS_RESET);
        CHECK_EQ(mask, IBV_QP_STATE | IBV_QP_PKEY_INDEX | IBV_QP_PORT | (ud ? IBV_QP_QKEY : IBV_QP_ACCESS_FLAGS));
        CHECK_EQ(attributes->port_num, 1);
        qp->qkey = attributes->qkey;
        break;
      case IBV_QPS_RTR:
        CHECK(base->state == IBV_QPS_INIT);
        if (ud) break;
        CHECK_EQ(mask, IBV_QP_STATE | IBV_QP_AV | IBV_QP_PATH_MTU | IBV_QP_DEST_QPN | IBV_QP_RQ_PSN |
                           IBV_QP_MAX_DEST_RD_ATOMIC | IBV_QP_MIN_RNR_TIMER);
        CHECK_EQ(attributes->path_mtu, IBV_MTU_4096);
        CHECK(attributes->ah_attr.is_global);
        CHECK(attributes->rq_psn < 1u << 24);
        CHECK(qp->receives.size() == qp->cap.max_recv_wr);  // before the other side can send
        qp->peer = attributes->dest_qp_num;
        qp->first_expected = attributes->rq_psn;
        break;
      case IBV_QPS_RTS:
        CHECK(base->state == IBV_QPS_RTR);
        if (ud) break;
        CHECK_EQ(mask, IBV_QP_STATE | IBV_QP_TIMEOUT | IBV_QP_RETRY_CNT | IBV_QP_RNR_RETRY | IBV_QP_SQ_PSN |
                           IBV_QP_MAX_QP_RD_ATOMIC);
        CHECK(attributes->sq_psn < 1u << 24);
        qp->first_sent = attributes->sq_psn;
        break;
      case IBV_QPS_ERR:
        CHECK(base->state != IBV_QPS_RESET);
        net_->fail(qp);
        break;
      case IBV_QPS_RESET:
        if (net_->faults.refused_reset) return ENOMEM;
        CHECK(ud && base->state == IBV_QPS_ERR && qp->receives.empty() && qp->sends.empty());
        break;
      default:
        CHECK(!"a state that the plugin never asks for");
    }
    base->state = attributes->qp_state;
    return 0;
  }
  int destroy_qp(ibv_qp *base) override {
    Qp *qp = of(base);
    // Some NICs clean the completion queue of what is of it, others leave it there.
    if (net_->chance(500)) std::erase_if(qp->cq->entries, [&](const auto &it) { return it.qpn == base->qp_num; });
    net_->qps.erase(base->qp_num);
    delete qp;
    return 0;
  }
  ibv_ah *create_ah(ibv_pd *pd, ibv_ah_attr *) override { return new ibv_ah{pd->context, pd, 0}; }
  int destroy_ah(ibv_ah *ah) override {
    delete ah;
    return 0;
  }
  int get_async_event(ibv_context *context, ibv_async_event *event) override {
    auto &events = net_->events[context];
    if (events.empty()) return -1;
    *event = events.front();
    events.pop_front();
    return 0;
  }
  void ack_async_event(ibv_async_event *) override {}
  const char *wc_status_str(ibv_wc_status) override { return "a status"; }
  bool has_dmabuf() override { return false; }
  bool has_relaxed_ordering() override { return true; }
  const std::string &path() override { return path_; }
  const std::string &sysfs() override { return net_->folder; }

 private:
  Net *net_;
  std::string path_ = "functions";
  std::vector<ibv_device> devices_;
};

void put(const std::string &file, const std::string &text) {
  std::filesystem::create_directories(std::filesystem::path(file).parent_path());
  std::ofstream(file) << text << "\n";
}

}  // namespace

Net::Net(uint64_t seed, uint32_t count) : random(seed), nics(count) {
  char pattern[] = "/tmp/verbs_net_XXXXXX";
  CHECK(mkdtemp(pattern) != nullptr);
  folder = pattern;
  for (uint32_t i = 0; i < nics; ++i) {
    const std::string port = folder + "/class/infiniband/fake" + std::to_string(i) + "/ports/1";
    char gid[64];
    snprintf(gid, sizeof gid, "0000:0000:0000:0000:0000:ffff:0a4d:00%02x", i + 1);
    put(port + "/gids/0", "fe80:0000:0000:0000:0000:00ff:fe00:0001");
    put(port + "/gid_attrs/types/0", "RoCE v2");
    put(port + "/gids/1", gid);
    put(port + "/gid_attrs/types/1", "RoCE v2");
  }
  current = this;
}

Net::~Net() {
  std::filesystem::remove_all(folder);
  current = nullptr;
}

std::shared_ptr<verbs::Library> Net::library() { return std::make_shared<Functions>(this); }

void Net::complete(Qp *qp, uint64_t wr_id, ibv_wc_status status, ibv_wc_opcode opcode, bool send, uint64_t index) {
  Completion entry;
  entry.wc.wr_id = wr_id;
  entry.wc.status = status;
  // A NIC says nothing else of what failed.
  if (status == IBV_WC_SUCCESS) entry.wc.opcode = opcode;
  entry.wc.qp_num = entry.qpn = qp->base.qp_num;
  entry.send = send;
  entry.index = index;
  qp->cq->entries.push_back(entry);
  CHECK(qp->cq->entries.size() <= qp->cq->room);
  if (!qp->cq->asked) return;
  qp->cq->asked = false;
  const uint64_t one = 1;
  CHECK(write(qp->cq->channel->fd, &one, sizeof one) == sizeof one);
}

// Into ERR: all that is posted and not executed is flushed.
void Net::fail(Qp *qp) {
  qp->base.state = IBV_QPS_ERR;
  for (const Receive &receive : qp->receives) complete(qp, receive.wr_id, IBV_WC_WR_FLUSH_ERR, IBV_WC_RECV, false, 0);
  qp->receives.clear();
  for (const Send &send : qp->sends)
    complete(qp, send.request.wr_id, IBV_WC_WR_FLUSH_ERR, IBV_WC_SEND, true, send.index);
  qp->sends.clear();
}

void Net::step() {
  if (qps.empty() || chance(faults.lazy)) return;
  for (int i = 0; i < 8; ++i) {
    auto chosen = qps.begin();
    std::advance(chosen, static_cast<ptrdiff_t>(random() % qps.size()));
    Qp *qp = chosen->second;
    if (qp->base.state != IBV_QPS_RTS || qp->sends.empty()) continue;
    if (qp->base.qp_type == IBV_QPT_UD)
      move_datagram(qp);
    else
      move(qp);
  }
}

void Net::move_datagram(Qp *qp) {
  const Send send = std::move(qp->sends.front());
  qp->sends.pop_front();
  if (chance(faults.failed_datagram)) {
    ++failed_datagrams;
    complete(qp, send.request.wr_id, IBV_WC_LOC_QP_OP_ERR, IBV_WC_SEND, true, send.index);
    return fail(qp);
  }
  complete(qp, send.request.wr_id, IBV_WC_SUCCESS, IBV_WC_SEND, true, send.index);
  const auto found = qps.find(send.request.wr.ud.remote_qpn);
  if (found == qps.end() || dead_paths.count(qp->nic) != 0 || chance(faults.lost_datagram)) return;
  Qp *target = found->second;
  if (target->qkey != send.request.wr.ud.remote_qkey) return;
  for (int i = chance(faults.twice) ? 2 : 1; i > 0 && !target->receives.empty(); --i) {
    const Receive receive = target->receives.front();
    target->receives.pop_front();
    CHECK(receive.length >= kGrh + send.length);
    memcpy(static_cast<uint8_t *>(receive.bytes) + kGrh, send.source, send.length);
    complete(target, receive.wr_id, IBV_WC_SUCCESS, IBV_WC_RECV, false, 0);
    target->cq->entries.back().wc.byte_len = kGrh + send.length;
  }
}

// One request of a reliable connection: executed over there and acknowledged, or not.
void Net::move(Qp *qp) {
  Send &send = qp->sends.front();
  auto broke = [&](ibv_wc_status status) {
    ++breaks;
    const uint64_t wr_id = send.request.wr_id, index = send.index;
    qp->sends.pop_front();
    complete(qp, wr_id, status, IBV_WC_SEND, true, index);
    fail(qp);
  };
  const auto found = qps.find(qp->peer);
  Qp *target = found == qps.end() ? nullptr : found->second;
  const bool listens = target != nullptr && target->peer == qp->base.qp_num &&
                       (target->base.state == IBV_QPS_RTR || target->base.state == IBV_QPS_RTS);
  if (!listens || dead_paths.count(qp->nic) != 0) {
    if (++qp->tries > kTries) broke(IBV_WC_RETRY_EXC_ERR);
    return;
  }
  CHECK_EQ(target->first_expected, qp->first_sent);
  if (send.request.opcode == IBV_WR_RDMA_READ) return move_read(qp, target);
  if (target->receives.empty()) {
    ++rnr;
    CHECK(faults.rnr);
    if (++qp->tries > kTries) broke(IBV_WC_RNR_RETRY_EXC_ERR);
    return;
  }
  qp->tries = 0;
  const bool write = send.request.opcode == IBV_WR_RDMA_WRITE_WITH_IMM;
  const auto *bytes = send.bytes.empty() ? static_cast<const uint8_t *>(send.source) : send.bytes.data();
  if (write && send.length > 0) {
    const uint64_t to = send.request.wr.rdma.remote_addr;
    const auto key = keys.find(send.request.wr.rdma.rkey);
    const Region *region = key == keys.end() ? nullptr : key->second;
    const bool allowed = region != nullptr && region->nic == target->nic &&
                         region->base.context == target->base.context &&
                         (region->access & IBV_ACCESS_REMOTE_WRITE) != 0 &&
                         to >= reinterpret_cast<uint64_t>(region->base.addr) && to + send.length >= to &&
                         to + send.length <= reinterpret_cast<uint64_t>(region->base.addr) + region->base.length;
    if (!allowed) {
      fail(target);
      return broke(IBV_WC_REM_ACCESS_ERR);
    }
    const bool lost = chance(faults.lost_request);
    const uint32_t length = lost ? send.length / 2 : send.length;
    if (in_gpu(reinterpret_cast<void *>(to)))
      on_the_way.push_back({qp->nic, reinterpret_cast<uint8_t *>(to), {bytes, bytes + length}});
    else
      memcpy(reinterpret_cast<void *>(to), bytes, length);
    if (lost) return broke(IBV_WC_RETRY_EXC_ERR);
  } else if (chance(faults.lost_request)) {
    return broke(IBV_WC_RETRY_EXC_ERR);
  }
  const Receive receive = target->receives.front();
  target->receives.pop_front();
  if (!write && send.length > 0) {
    CHECK(receive.length >= send.length);
    memcpy(receive.bytes, bytes, send.length);
  }
  ++executed;
  complete(target, receive.wr_id, IBV_WC_SUCCESS, write ? IBV_WC_RECV_RDMA_WITH_IMM : IBV_WC_RECV, false, 0);
  ibv_wc &arrival = target->cq->entries.back().wc;
  arrival.byte_len = send.length;
  arrival.imm_data = send.request.imm_data;
  if (send.request.opcode != IBV_WR_SEND) arrival.wc_flags = IBV_WC_WITH_IMM;
  if (chance(faults.lost_answer)) return broke(IBV_WC_RETRY_EXC_ERR);
  if ((send.request.send_flags & IBV_SEND_SIGNALED) != 0)
    complete(qp, send.request.wr_id, IBV_WC_SUCCESS, write ? IBV_WC_RDMA_WRITE : IBV_WC_SEND, true, send.index);
  qp->sends.pop_front();
}

bool Net::in_gpu(const void *address) const {
  return std::any_of(gpus.begin(), gpus.end(),
                     [&](const auto &gpu) { return address >= gpu.first && address < gpu.second; });
}

// Of a byte of this NIC's own process. Pushes what the NIC has written into that GPU before.
void Net::move_read(Qp *qp, Qp *target) {
  const Send &send = qp->sends.front();
  const auto *from = reinterpret_cast<const uint8_t *>(send.request.wr.rdma.remote_addr);
  const auto key = keys.find(send.request.wr.rdma.rkey);
  const bool allowed = key != keys.end() && key->second->base.context == target->base.context &&
                       (key->second->access & IBV_ACCESS_REMOTE_READ) != 0 && from >= key->second->base.addr &&
                       from + send.length <= static_cast<uint8_t *>(key->second->base.addr) + key->second->base.length;
  const uint64_t wr_id = send.request.wr_id, index = send.index;
  if (!allowed || chance(faults.lost_request)) {
    ++breaks;
    qp->sends.pop_front();
    complete(qp, wr_id, allowed ? IBV_WC_RETRY_EXC_ERR : IBV_WC_REM_ACCESS_ERR, IBV_WC_SEND, true, index);
    return fail(qp);
  }
  CHECK(in_gpu(from));
  ++reads;
  std::erase_if(on_the_way, [&](const Posted &write) {
    if (write.nic != qp->nic) return false;
    memcpy(write.to, write.bytes.data(), write.bytes.size());
    return true;
  });
  memcpy(const_cast<void *>(send.source), from, send.length);
  complete(qp, wr_id, IBV_WC_SUCCESS, IBV_WC_RDMA_READ, true, index);
  qp->sends.pop_front();
}

void Net::set_path(uint32_t nic, bool whole) {
  if (whole)
    dead_paths.erase(nic);
  else
    dead_paths.insert(nic);
}

void Net::set_port(uint32_t nic, bool active) {
  if (active)
    down_ports.erase(nic);
  else
    down_ports.insert(nic);
  set_path(nic, active);
  tell(nic, active ? IBV_EVENT_PORT_ACTIVE : IBV_EVENT_PORT_ERR);
}

void Net::tell(uint32_t nic, ibv_event_type type) {
  for (ibv_context *context : contexts) {
    if (nic_of(context) != nic) continue;
    ibv_async_event event{};
    event.event_type = type;
    event.element.port_num = 1;
    events[context].push_back(event);
  }
}

}  // namespace verbs_net

namespace verbs {
// In place of library.cc: whatever library is asked for.
std::shared_ptr<Library> open_library(const std::string &, plugin::Refusal *) { return verbs_net::current->library(); }
}  // namespace verbs
