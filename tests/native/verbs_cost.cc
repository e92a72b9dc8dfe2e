// SPDX-License-Identifier: Apache-2.0
//
// What one 64-byte write costs the backend verbs' own code, on one core: post and LOCAL_DONE, over a provider that
// takes every request and moves nothing. Beside it, in turn, a bare loop that does the same by libibverbs' calls alone:
// the same chains of requests with one doorbell and one signalled request each, and the completion queue polled. What
// the backend takes above that loop is its own. Processor time, so that what else runs on the machine counts little.
//
// The two ranks meet over verbs_net.h, then the table of each context is exchanged for the null provider's.
#include <algorithm>
#include <deque>

#include "../../native/engine/sha256.h"
#include "verbs_net.h"

using plugin::Rank;
using plugin::Window;

extern "C" const ept_backend ept_backend_v1;

namespace {

uint64_t cpu_ns() {
  timespec t;
  clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &t);
  return static_cast<uint64_t>(t.tv_sec) * 1'000'000'000 + static_cast<uint64_t>(t.tv_nsec);
}

// ---- the null provider: a ring of the wr_ids that will complete -----------------------------------------------------

constexpr uint32_t kRing = 1024;
uint64_t ring[kRing];
uint32_t head = 0, tail = 0;
uint64_t taken = 0;  // requests; so that none is optimised away

int null_post_send(ibv_qp *, ibv_send_wr *request, ibv_send_wr **) {
  for (; request != nullptr; request = request->next) {
    taken += request->num_sge > 0 ? request->sg_list->length : 1;
    if ((request->send_flags & IBV_SEND_SIGNALED) != 0) ring[tail++ % kRing] = request->wr_id;
  }
  return 0;
}

int null_poll_cq(ibv_cq *, int most, ibv_wc *completions) {
  int count = 0;
  for (; count < most && head != tail; ++count) {
    completions[count].wr_id = ring[head++ % kRing];
    completions[count].status = IBV_WC_SUCCESS;
    completions[count].opcode = IBV_WC_RDMA_WRITE;
    completions[count].wc_flags = 0;
  }
  return count;
}

int null_post_recv(ibv_qp *, ibv_recv_wr *, ibv_recv_wr **) { return 0; }

// ---- the two sides --------------------------------------------------------------------------------------------------

struct Pair {
  Pair() : from(ept_backend_v1, {.rank = 0}, {}), to(ept_backend_v1, {.rank = 1}, {}) {
    CHECK_OK(ept_backend_v1, from.open_peer(1, 0, to.address()));
    CHECK_OK(ept_backend_v1, to.open_peer(0, 0, from.address()));
    for (bool up[] = {false, false}; !up[0] || !up[1];) {
      up[0] |= !from.poll().empty();
      up[1] |= !to.poll().empty();
    }
  }
  Rank from, to;
};

class Backend {
 public:
  Backend(Pair *pair, Window *window, size_t batch) : pair_(pair), events_(std::max<size_t>(batch, 64)) {
    for (uint32_t i = 0; i < batch; ++i)
      ops_.push_back(Rank::write(1, window->source_mem, &window->source[64 * i], window->region, 64 * i, 64, i, i));
    for (ept_event &event : events_) event.size = sizeof event;
  }
  size_t round() {
    size_t posted = 0, back = 0;
    CHECK(ept_backend_v1.post(pair_->from.worker, ops_.data(), ops_.size(), &posted) == EPT_OK);
    CHECK(posted == ops_.size());
    while (back < posted) {
      const int32_t count = ept_backend_v1.poll(pair_->from.worker, events_.data(), events_.size());
      CHECK(count >= 0);
      back += static_cast<size_t>(count);
    }
    return back;
  }

 private:
  Pair *pair_;
  std::vector<ept_op> ops_;
  std::vector<ept_event> events_;
};

// As whoever writes to libibverbs for this one purpose would: the requests stand ready, and only what changes is set.
class Bare {
 public:
  Bare(verbs_net::Qp *qp, Window *window, size_t batch)
      : qp_(&qp->base), cq_(&qp->cq->base), window_(window), requests_(batch), ranges_(batch) {
    for (size_t i = 0; i < batch; ++i) {
      requests_[i] = {};
      requests_[i].sg_list = &ranges_[i];
      requests_[i].num_sge = 1;
      requests_[i].opcode = IBV_WR_RDMA_WRITE_WITH_IMM;
      requests_[i].send_flags = IBV_SEND_INLINE;
      if (i + 1 == batch) requests_[i].send_flags |= IBV_SEND_SIGNALED;
      requests_[i].next = i + 1 == batch ? nullptr : &requests_[i + 1];
    }
  }
  size_t round() {
    for (size_t i = 0; i < requests_.size(); ++i) {
      ranges_[i] = {reinterpret_cast<uint64_t>(&window_->source[64 * i]), 64, 7};
      requests_[i].wr_id = i;
      requests_[i].imm_data = static_cast<uint32_t>(i);
      requests_[i].wr.rdma = {64 * i, 7};
    }
    ibv_send_wr *bad = nullptr;
    CHECK(ibv_post_send(qp_, requests_.data(), &bad) == 0);
    ibv_wc completions[32];
    while (ibv_poll_cq(cq_, 32, completions) == 0) {}
    return requests_.size();
  }

 private:
  ibv_qp *qp_;
  ibv_cq *cq_;
  Window *window_;
  std::vector<ibv_send_wr> requests_;
  std::vector<ibv_sge> ranges_;
};

template <typename Side>
double ns_per_write(Side *side) {
  constexpr size_t kWrites = 200'000;
  const uint64_t start = cpu_ns();
  size_t done = 0;
  while (done < kWrites) done += side->round();
  return static_cast<double>(cpu_ns() - start) / static_cast<double>(done);
}

double median(std::vector<double> values) {
  std::sort(values.begin(), values.end());
  return values[values.size() / 2];
}

}  // namespace

int main() {
  plugin::hmac = [](void *, const void *key, size_t key_length, const void *data, size_t length, uint8_t *mac) {
    ept::hmac_sha256(key, key_length, data, length, mac);
  };
  verbs_net::Net net(1);
  Pair pair;
  Window window(pair.from, pair.to, 64 * 64);
  // No NIC moves from here on, so that the figure is of nothing but these two.
  for (ibv_context *context : net.contexts) {
    context->ops.post_send = null_post_send;
    context->ops.poll_cq = null_poll_cq;
    context->ops.post_recv = null_post_recv;
  }
  verbs_net::Qp *data = nullptr;
  for (auto &[number, qp] : net.qps)
    if (qp->base.qp_type == IBV_QPT_RC && data == nullptr) data = qp;
  CHECK(data != nullptr);
  for (const size_t batch : {1, 4, 16, 64}) {
    Backend backend(&pair, &window, batch);
    Bare bare(data, &window, batch);
    std::vector<double> ours, theirs;
    for (int run = 0; run < 7; ++run) {
      ours.push_back(ns_per_write(&backend));
      theirs.push_back(ns_per_write(&bare));
    }
    printf("batch %3zu: %6.1f ns a write, of which the bare loop takes %5.1f: %6.1f are the backend's own\n", batch,
           median(ours), median(theirs), median(ours) - median(theirs));
  }
  // Closing reads what was never posted to these NICs; they are gone with the process.
  fflush(stdout);
  _exit(taken > 0 ? 0 : 1);
}
