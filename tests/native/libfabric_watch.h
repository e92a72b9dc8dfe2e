// SPDX-License-Identifier: Apache-2.0
//
// libfabric_watch.h: the null network with a watcher in front: it offers what a test wants a card to offer, notes what
// the backend asks of it, and refuses or holds back what it is told to.
#pragma once

#include <rdma/fi_domain.h>
#include <rdma/fi_endpoint.h>
#include <rdma/fi_ext.h>
#include <rdma/fi_rma.h>

#include <map>
#include <memory>
#include <string>
#include <vector>

#include "../../plugins/libfabric/library.h"

namespace watch {

// A registration as it was asked for. `dmabuf`: by FI_MR_DMABUF, with what struct fi_mr_dmabuf said.
struct Registration {
  uint64_t flags, access;
  fi_hmem_iface iface;
  int device;
  void *address;
  uint64_t length;
  bool dmabuf;
  int fd;
  uint64_t offset;
  void *base;
};

// A write, send or receive as it was posted.
struct Posted {
  const void *buffer;
  uint64_t length;
  bool descriptor;  // that of a live registration which covers the buffer
  uint64_t flags;   // of a writemsg; 0: writedata
};

struct Card {
  // What it offers.
  uint32_t version = FI_VERSION(2, 5);
  std::string provider = "null", fabric = "null";
  uint64_t caps = FI_MSG | FI_RMA, mode = 0;
  int mr_mode = FI_MR_LOCAL | FI_MR_VIRT_ADDR | FI_MR_ALLOCATED | FI_MR_PROV_KEY;
  bool gpu = false;           // has FI_HMEM where that is asked for
  uint64_t most_rma = 0;      // FI_OPT_MAX_RMA_SIZE
  bool emulates = false;      // FI_OPT_EFA_EMULATED_WRITE
  int dmabuf_answer = 0;      // to FI_MR_DMABUF: 0 or -FI_E...
  int address_answer = 0;     // to a GPU's address
  bool holds_writes = false;  // their completions wait until this is over

  // What was asked of it.
  std::vector<uint64_t> asked_caps, asked_modes;
  std::vector<Registration> registrations;
  std::vector<Posted> writes, sends, receives;
  std::map<int, uint64_t> options;  // setopt before fi_enable
  bool set_late = false;            // one came after it
};

// A library that has this one card. What is open looks at the card of the last call: one at a time.
std::shared_ptr<libfabric::Library> make(Card *card);

}  // namespace watch
