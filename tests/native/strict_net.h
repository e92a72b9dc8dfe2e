// SPDX-License-Identifier: Apache-2.0
//
// strict_net.h: ranks over a `Library`, as few lines each as libfabric allows: for tests of what stands between a
// plugin and libfabric. A rank has one endpoint, memory that the others may write to, and a ledger of what it read.
#pragma once

#include <rdma/fabric.h>
#include <rdma/fi_cm.h>
#include <rdma/fi_domain.h>
#include <rdma/fi_endpoint.h>
#include <rdma/fi_eq.h>
#include <rdma/fi_errno.h>
#include <rdma/fi_rma.h>

#include <deque>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "../../plugins/libfabric/library.h"
#include "check.h"

// What every test asks for, as a plugin that knows EFA does; the caller frees it.
inline fi_info *strict_hints(libfabric::Library &library) {
  fi_info *hints = library.dupinfo(nullptr);
  hints->caps = FI_MSG | FI_RMA;
  hints->mode = FI_CONTEXT2;
  hints->ep_attr->type = FI_EP_RDM;
  hints->domain_attr->mr_mode = FI_MR_LOCAL | FI_MR_VIRT_ADDR | FI_MR_ALLOCATED | FI_MR_PROV_KEY;
  hints->domain_attr->cq_data_size = 4;
  hints->domain_attr->data_progress = FI_PROGRESS_MANUAL;
  return hints;
}

struct Failure {
  void *context;
  int error, provider;
  std::string words;
};

struct StrictRank {
  static constexpr size_t kBytes = 1 << 16;

  explicit StrictRank(std::shared_ptr<libfabric::Library> of, size_t queue = 4096, fi_wait_obj wait = FI_WAIT_NONE,
                      bool with_eq = true)
      : library(std::move(of)), memory(kBytes), source(kBytes) {
    fi_info *hints = strict_hints(*library);
    CHECK_EQ(library->getinfo(libfabric::kApi, nullptr, nullptr, 0, hints, &info), 0);
    library->freeinfo(hints);
    CHECK_EQ(library->fabric(info->fabric_attr, &fabric, nullptr), 0);
    fi_eq_attr eq_attr = {};
    CHECK_EQ(fi_eq_open(fabric, &eq_attr, &eq, nullptr), 0);
    CHECK_EQ(fi_domain(fabric, info, &domain, nullptr), 0);
    fi_cq_attr cq_attr = {};
    cq_attr.size = queue;
    cq_attr.format = FI_CQ_FORMAT_DATA;
    cq_attr.wait_obj = wait;
    CHECK_EQ(fi_cq_open(domain, &cq_attr, &cq, nullptr), 0);
    fi_av_attr av_attr = {};
    CHECK_EQ(fi_av_open(domain, &av_attr, &av, nullptr), 0);
    CHECK_EQ(fi_endpoint(domain, info, &ep, nullptr), 0);
    if (with_eq) CHECK_EQ(fi_ep_bind(ep, &eq->fid, 0), 0);
    CHECK_EQ(fi_ep_bind(ep, &cq->fid, FI_TRANSMIT | FI_RECV), 0);
    CHECK_EQ(fi_ep_bind(ep, &av->fid, 0), 0);
    enabled = fi_enable(ep);
    CHECK_EQ(fi_mr_reg(domain, memory.data(), kBytes, FI_REMOTE_WRITE, 0, 0, 0, &memory_mr, nullptr), 0);
    CHECK_EQ(fi_mr_reg(domain, source.data(), kBytes, FI_WRITE | FI_SEND | FI_RECV, 0, 0, 0, &source_mr, nullptr), 0);
  }
  StrictRank(const StrictRank &) = delete;
  StrictRank &operator=(const StrictRank &) = delete;
  ~StrictRank() {
    CHECK_EQ(fi_close(&ep->fid), 0);
    if (source_mr != nullptr) CHECK_EQ(fi_close(&source_mr->fid), 0);
    CHECK_EQ(fi_close(&memory_mr->fid), 0);
    CHECK_EQ(fi_close(&av->fid), 0);
    CHECK_EQ(fi_close(&cq->fid), 0);
    CHECK_EQ(fi_close(&domain->fid), 0);
    CHECK_EQ(fi_close(&eq->fid), 0);
    CHECK_EQ(fi_close(&fabric->fid), 0);
    library->freeinfo(info);
  }

  fi_addr_t learn(const StrictRank &other) {
    char name[256];
    size_t length = sizeof name;
    CHECK_EQ(fi_getname(&other.ep->fid, name, &length), 0);
    fi_addr_t address = FI_ADDR_NOTAVAIL;
    CHECK_EQ(fi_av_insert(av, name, 1, &address, 0, nullptr), 1);
    return address;
  }
  fi_context2 *context() {
    contexts.emplace_back();
    return &contexts.back();
  }
  uint64_t at(size_t offset) const { return reinterpret_cast<uint64_t>(memory.data()) + offset; }

  // From `source` to the same offset of `to`'s memory.
  ssize_t write(const StrictRank &to, fi_addr_t address, size_t offset, size_t length, uint64_t data,
                fi_context2 *with) {
    return fi_writedata(ep, source.data() + offset, length, fi_mr_desc(source_mr), data, address, to.at(offset),
                        fi_mr_key(to.memory_mr), with);
  }
  ssize_t send(fi_addr_t address, size_t offset, size_t length, fi_context2 *with) {
    return fi_send(ep, source.data() + offset, length, fi_mr_desc(source_mr), address, with);
  }
  ssize_t receive(size_t offset, size_t length, fi_context2 *with) {
    return fi_recv(ep, source.data() + offset, length, fi_mr_desc(source_mr), FI_ADDR_UNSPEC, with);
  }

  // One read of the queue, of at most `most` entries; what it gave is in `read`, in `failures`, and counted.
  ssize_t poll(size_t most = 16) {
    fi_cq_data_entry entries[16];
    const ssize_t count = fi_cq_read(cq, entries, most);
    read.clear();
    if (count == -FI_EAVAIL) {
      fi_cq_err_entry entry = {};
      CHECK_EQ(fi_cq_readerr(cq, &entry, 0), 1);
      const char *words = fi_cq_strerror(cq, entry.prov_errno, entry.err_data, nullptr, 0);
      failures.push_back({entry.op_context, entry.err, entry.prov_errno, words != nullptr ? words : ""});
    }
    for (ssize_t i = 0; i < count; i++) {
      read.push_back(entries[i]);
      if (entries[i].flags & FI_REMOTE_CQ_DATA && entries[i].flags & FI_RMA)
        arrived.push_back(entries[i].data);
      else
        completed[entries[i].op_context]++;
    }
    return count;
  }
  void polls(int times) {
    for (int i = 0; i < times; i++) poll();
  }

  std::shared_ptr<libfabric::Library> library;
  fi_info *info = nullptr;
  fid_fabric *fabric = nullptr;
  fid_domain *domain = nullptr;
  fid_eq *eq = nullptr;
  fid_cq *cq = nullptr;
  fid_av *av = nullptr;
  fid_ep *ep = nullptr;
  int enabled = 0;
  std::vector<unsigned char> memory, source;
  fid_mr *memory_mr = nullptr, *source_mr = nullptr;
  std::deque<fi_context2> contexts;
  std::vector<fi_cq_data_entry> read;  // by the last poll
  std::vector<uint64_t> arrived;       // data of writes, in the order of reading
  std::map<void *, int> completed;     // how often, by context
  std::vector<Failure> failures;
};

// Two that know each other.
struct StrictPair {
  explicit StrictPair(const std::shared_ptr<libfabric::Library> &library, size_t queue = 4096,
                      fi_wait_obj wait = FI_WAIT_NONE)
      : a(library, queue, wait), b(library, queue, wait), to_b(a.learn(b)), to_a(b.learn(a)) {}
  void polls(int times) {
    for (int i = 0; i < times; i++) a.poll(), b.poll();
  }
  StrictRank a, b;
  fi_addr_t to_b, to_a;
};
