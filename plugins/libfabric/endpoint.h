// SPDX-License-Identifier: Apache-2.0
// One rail: an endpoint with its domain, completion queue, event queue and address vector, the contexts of what is in
// flight on it, and the buffers of its messages.
//
// INVARIANTS
//  - Every operation given to libfabric carries a context of `operations`, which is as long as the rail is deep. No
//    context, no operation: so what is in flight is bounded by tx_depth, whatever the provider would take. A context
//    goes back when the provider gives its completion or its error, and not before, not even when the engine was told
//    meanwhile that the operation failed (its peer ended): until then the provider may write into it.
//  - Receives have contexts and buffers of their own, all posted from open to close: what one holds is copied out
//  before
//    it is posted again.
//  - The completion queue has room for every context, every receive and the immediates that `cq_depth` tells the
//    engine of; it grants no more credits than that to all peers together. So nobody can overrun it.
#pragma once

#include <rdma/fi_cm.h>
#include <rdma/fi_domain.h>
#include <rdma/fi_endpoint.h>
#include <rdma/fi_eq.h>
#include <rdma/fi_ext.h>
#include <rdma/fi_rma.h>

#include <memory>
#include <vector>

#include "handshake.h"
#include "providers.h"

struct ept_mem;

namespace libfabric {

struct Peer;

// Of one SEND with its head: below 8 KiB, the least that a provider promises (efa-direct: a packet).
constexpr uint32_t kMessageBytes = 8000;
constexpr uint32_t kMaxSend = kMessageBytes - sizeof(MessageHead);

struct Operation {
  fi_context2 context;  // first: libfabric gives it back
  enum class Kind : uint8_t { kFree, kWrite, kSend, kControl, kReceive } kind = Kind::kFree;
  bool told = false;       // its ERROR has been given; only the provider still holds it
  uint32_t index = 0;      // in `operations`, or of the receive
  Peer *peer = nullptr;    // kWrite, kSend, kControl
  ept_mem *mem = nullptr;  // kWrite with a source
  uint8_t *buffer = nullptr;
  uint64_t cookie = 0;
  uint64_t length = 0;
  uint64_t serial = 0;  // of the instance, rising: for quiesce
};

// Memory for messages, registered where the provider wants that.
struct Buffers {
  std::unique_ptr<uint8_t[]> bytes;
  Owned<fid_mr> mr;
  void *descriptor = nullptr;
};

struct Rail {
  Rail() = default;
  Rail(const Rail &) = delete;
  Rail &operator=(const Rail &) = delete;

  uint32_t number = 0;
  Info info;
  Traits traits{};
  // In the order of their making; closed in the other one.
  Owned<fid_fabric> fabric;
  Owned<fid_domain> domain;
  Owned<fid_eq> eq;
  Owned<fid_cq> cq;
  Owned<fid_av> av;
  Buffers received, sent;
  Owned<fid_ep> ep;
  std::vector<uint8_t> address;
  int wait_fd = -1;              // the completion queue's, owned by it
  bool own_keys = false;         // we draw the keys of memory regions
  bool virtual_address = false;  // a remote address is the target's, not an offset
  bool hmem = false;
  // FI_..._COMPLETE, asked for with each write with and without payload; 0: what the endpoint was opened with.
  uint64_t write_level = 0, empty_level = 0;
  bool imm_takes_receive = false;  // FI_RX_CQ_DATA: an immediate uses up a posted receive
  uint64_t max_message = 0;
  uint32_t cq_depth = 0, tx_depth = 0;
  std::string broken;  // why nothing can be posted any more; empty: it can

  std::vector<Operation> operations;
  std::vector<uint32_t> free;
  std::vector<Operation> receives;
  std::vector<uint32_t> free_sends;  // buffers in `sent`
  std::vector<uint32_t> to_post;     // receives that are not posted
  ept_rail_counters counters{};

  ~Rail();

  Operation *take(Operation::Kind kind, Peer *peer) {
    if (free.empty()) return nullptr;
    Operation *operation = &operations[free.back()];
    free.pop_back();
    operation->kind = kind;
    operation->peer = peer;
    operation->told = false;
    operation->mem = nullptr;
    operation->buffer = nullptr;
    return operation;
  }
  void give_back(Operation *operation) {
    if (operation->buffer != nullptr)
      free_sends.push_back(static_cast<uint32_t>((operation->buffer - sent.bytes.get()) / kMessageBytes));
    operation->buffer = nullptr;
    operation->mem = nullptr;  // what is free reads from nothing: abandon counts
    operation->kind = Operation::Kind::kFree;
    free.push_back(operation->index);
  }
  // What libfabric gave back; nullptr: none of ours.
  Operation *of_context(void *context) {
    auto *operation = static_cast<Operation *>(context);
    auto within = [&](std::vector<Operation> &all) {
      return !all.empty() && operation >= all.data() && operation < all.data() + all.size();
    };
    return within(operations) || within(receives) ? operation : nullptr;
  }
  void post_receives();
};

struct Room {
  uint32_t peers;         // ranks but this one, 1 at least
  uint32_t credits;       // immediates of each in flight to us
  uint32_t send_credits;  // messages likewise
};

int32_t open_rail(Library &library, const Settings &settings, const Room &room, Info info, const Traits &traits,
                  Rail *rail);

}  // namespace libfabric
