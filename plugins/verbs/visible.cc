// SPDX-License-Identifier: Apache-2.0
#include "visible.h"

#include <algorithm>
#include <cstring>

#include "instance.h"

using namespace verbs;

namespace {

constexpr uint64_t kPause = 50'000'000;  // before another round where a read has failed: a port may be down

RequestId read_of(uint32_t round) { return {UINT16_MAX, 0, Request::kSend, round & RequestId::kLowMask}; }

}  // namespace

int32_t ept_instance::visible(uint32_t rank, uint64_t cookie) {
  if (rank >= params.world)
    return fail(EPT_E_INVALID, "visible", rank, 0, "verbs: rank %u is outside the world of %u", rank, params.world);
  visibility.asked.push_back({cookie, rank});
  if (visibility.covered == 0 && visibility.due_ns == 0) look_into_gpus();
  return EPT_OK;
}

// Begins a round for all that was asked.
void ept_instance::look_into_gpus() {
  visibility.due_ns = 0;
  visibility.covered = visibility.asked.size();
  visibility.reads = 0;
  ++visibility.round;
  std::vector<const ept_mem *> one_of_each;  // GPU
  for (const ept_mem *mem : gpu_memory) {
    const bool known = std::any_of(one_of_each.begin(), one_of_each.end(), [&](const ept_mem *other) {
      return other->memory.cuda_device == mem->memory.cuda_device;
    });
    if (!known && one_of_each.size() < kMostGpus) one_of_each.push_back(mem);
  }
  for (auto &nic : nics) {
    if (!nic->broken.empty()) continue;  // its peers are lost: nothing of it is waited for
    for (const ept_mem *mem : one_of_each) {
      if (!nic->read(reinterpret_cast<uint64_t>(mem->memory.address), mem->readable[nic->number]->rkey,
                     read_of(visibility.round).pack(), *host, settings))
        return look_again(nic.get());
      ++visibility.reads;
    }
  }
  if (visibility.reads == 0) all_visible();
}

void ept_instance::look_again(Nic *nic) {
  nic->reader.reset();
  visibility.covered = visibility.reads = 0;
  ++visibility.round;  // what is under way on other NICs says nothing of the next
  visibility.due_ns = now() + kPause;
}

void ept_instance::read_completed(Nic *nic, const RequestId &id, const ibv_wc &completion) {
  if (visibility.covered == 0 || id.low != read_of(visibility.round).low) return;  // of a round that has ended
  if (completion.status != IBV_WC_SUCCESS) return look_again(nic);
  if (--visibility.reads == 0) all_visible();
}

void ept_instance::all_visible() {
  for (; visibility.covered > 0; --visibility.covered) {
    const Visibility::Asked entry = visibility.asked.front();
    visibility.asked.pop_front();
    events.add(EPT_EVENT_VISIBLE, entry.rank, 0)->cookie = entry.cookie;
  }
  if (!visibility.asked.empty()) look_into_gpus();
}

// ---- a NIC's reads --------------------------------------------------------------------------------------------------

bool Nic::read(uint64_t address, uint32_t key, uint64_t wr_id, const ept_host &host, const Settings &settings) {
  if (!reader && !make_reader(host, settings)) return false;
  ibv_sge range{reinterpret_cast<uint64_t>(seen.bytes.get()), 1, seen.mr->lkey};
  ibv_send_wr request{}, *bad = nullptr;
  request.wr_id = wr_id;
  request.sg_list = &range;
  request.num_sge = 1;
  request.opcode = IBV_WR_RDMA_READ;
  request.send_flags = IBV_SEND_SIGNALED;
  request.wr.rdma.remote_addr = address;
  request.wr.rdma.rkey = key;
  return ibv_post_send(reader.get(), &request, &bad) == 0;
}

// A queue pair that is connected to itself. It takes no receives: reads need none.
bool Nic::make_reader(const ept_host &host, const Settings &settings) {
  if (!seen.mr) {
    seen.bytes.reset(new uint8_t[1]);
    seen.mr = {library, library->reg_mr(pd.get(), seen.bytes.get(), 1, IBV_ACCESS_LOCAL_WRITE)};
    if (!seen.mr) return false;
  }
  ibv_qp_init_attr wanted{};
  wanted.send_cq = wanted.recv_cq = cq.get();
  wanted.qp_type = IBV_QPT_RC;
  wanted.cap = {kMostGpus, 0, 1, 0, 0};
  Qp made(library, library->create_qp(pd.get(), &wanted));
  if (!made) return false;
  uint32_t psn = 0;
  host.random(host.context, &psn, sizeof psn);
  psn &= (1u << 24) - 1;
  ibv_qp_attr attributes{};
  attributes.qp_state = IBV_QPS_INIT;
  attributes.port_num = port.number;
  attributes.qp_access_flags = IBV_ACCESS_REMOTE_READ;
  int status =
      library->modify_qp(made.get(), &attributes, IBV_QP_STATE | IBV_QP_PKEY_INDEX | IBV_QP_PORT | IBV_QP_ACCESS_FLAGS);
  attributes.qp_state = IBV_QPS_RTR;
  attributes.path_mtu = port.mtu;
  attributes.dest_qp_num = made->qp_num;
  attributes.rq_psn = psn;
  attributes.max_dest_rd_atomic = 1;
  attributes.ah_attr = way_to(this->address(), settings);
  if (status == 0)
    status = library->modify_qp(made.get(), &attributes,
                                IBV_QP_STATE | IBV_QP_AV | IBV_QP_PATH_MTU | IBV_QP_DEST_QPN | IBV_QP_RQ_PSN |
                                    IBV_QP_MAX_DEST_RD_ATOMIC | IBV_QP_MIN_RNR_TIMER);
  attributes.qp_state = IBV_QPS_RTS;
  attributes.sq_psn = psn;
  attributes.timeout = static_cast<uint8_t>(settings.timeout);
  attributes.retry_cnt = static_cast<uint8_t>(settings.retries);
  attributes.max_rd_atomic = 1;
  if (status == 0)
    status = library->modify_qp(
        made.get(), &attributes,
        IBV_QP_STATE | IBV_QP_TIMEOUT | IBV_QP_RETRY_CNT | IBV_QP_RNR_RETRY | IBV_QP_SQ_PSN | IBV_QP_MAX_QP_RD_ATOMIC);
  if (status != 0) return false;
  reader = std::move(made);
  return true;
}
