// SPDX-License-Identifier: Apache-2.0
#include "endpoint.h"

#include <algorithm>
#include <bit>
#include <cstring>

#include "registration.h"

namespace libfabric {
namespace {

// Options that headers of 1.17 do not name yet, as later ones number them; a library that does not know one says so.
constexpr int kOptCudaApiPermitted = 10;
constexpr int kOptSharedMemoryPermitted = 11;
constexpr int kOptMaxRmaSize = 14;
constexpr int kOptEfaEmulatedWrite = FI_OPT_EFA_RNR_RETRY + 2;
// 7 means for ever, which is a silent stall; 6 is some seconds, after which the device says RNR (code 10).
constexpr size_t kRnrRetries = 6;

constexpr uint32_t kMostReceives = 1024;
constexpr uint32_t kLeastReceives = 32;
constexpr uint32_t kSendBuffers = 256;
constexpr uint32_t kGreetings = 8;  // a peer's messages of the handshake, repeats included
constexpr uint32_t kLeastQueue = 512;

int32_t refused(Library &library, const Rail &rail, const char *what, int status) {
  return fail(EPT_E_UNAVAILABLE, "open", -1, -status, "libfabric: %s of provider %s (%s) failed: %s (%d)", what,
              rail.info->fabric_attr->prov_name, rail.info->domain_attr->name, library.strerror(-status), -status);
}

int32_t open_queue(Library &library, const Settings &settings, const Room &room, uint32_t receives, Rail *rail) {
  // The engine keeps two entries in 64 for grants of credits (choose_credits), hence a margin of 1/16.
  const uint64_t others = rail->tx_depth + receives;
  uint64_t wanted = settings.cq_depth != 0 ? settings.cq_depth
                                           : others + uint64_t{room.peers} * (room.credits + room.credits / 16 + 1);
  wanted = std::max<uint64_t>(wanted, others + kLeastQueue);
  fi_cq_attr attributes{};
  attributes.format = FI_CQ_FORMAT_DATA;
  int status = 0;
  // A card's queues are shorter than what many ranks would want: the longest that it makes, and the engine grants
  // fewer credits.
  for (uint64_t size = wanted; size >= others + kLeastQueue / 2; size = size * 3 / 4) {
    attributes.size = size;
    for (fi_wait_obj wait : {FI_WAIT_FD, FI_WAIT_NONE}) {
      attributes.wait_obj = wait;
      status = fi_cq_open(rail->domain.get(), &attributes, rail->cq.out(), nullptr);
      if (status != 0) continue;
      if (wait == FI_WAIT_FD && fi_control(&rail->cq->fid, FI_GETWAIT, &rail->wait_fd) != 0) {
        rail->wait_fd = -1;
        rail->cq.close();
        continue;
      }
      rail->cq_depth = static_cast<uint32_t>(std::min<uint64_t>(size - others, UINT32_MAX));
      return EPT_OK;
    }
  }
  return refused(library, *rail, "opening a completion queue", status);
}

int32_t make_buffers(Library &library, Rail *rail, uint32_t count, uint64_t access, uint64_t key, Buffers *buffers) {
  const size_t bytes = size_t{count} * kMessageBytes;
  buffers->bytes.reset(new uint8_t[bytes]);
  ept_memory memory{};
  memory.kind = EPT_MEMORY_HOST;
  int32_t code = register_range(library, rail, memory, buffers->bytes.get(), bytes, access, key, buffers->mr.out());
  if (code == EPT_OK) buffers->descriptor = fi_mr_desc(buffers->mr.get());
  return code;
}

void set_efa_options(Rail *rail) {
  bool no = false;
  fi_setopt(&rail->ep->fid, FI_OPT_ENDPOINT, kOptSharedMemoryPermitted, &no, sizeof no);
  fi_setopt(&rail->ep->fid, FI_OPT_ENDPOINT, kOptCudaApiPermitted, &no, sizeof no);
  size_t retries = kRnrRetries;
  fi_setopt(&rail->ep->fid, FI_OPT_ENDPOINT, FI_OPT_EFA_RNR_RETRY, &retries, sizeof retries);
}

// `may_choose`: no level of completion was set.
int32_t ask_efa_options(Rail *rail, bool may_choose) {
  size_t most = 0, size = sizeof most;
  if (fi_getopt(&rail->ep->fid, FI_OPT_ENDPOINT, kOptMaxRmaSize, &most, &size) == 0 && size == sizeof most && most > 0)
    rail->max_message = std::min<uint64_t>(rail->max_message, most);
  bool emulated = false;
  size = sizeof emulated;
  if (fi_getopt(&rail->ep->fid, FI_OPT_ENDPOINT, kOptEfaEmulatedWrite, &emulated, &size) == 0 && emulated) {
    // Software writes, libfabric's and not the card's: only delivery tells of a refusal.
    rail->traits.revokes = rail->traits.card_acknowledges = false;
    if (may_choose) rail->write_level = rail->empty_level = FI_DELIVERY_COMPLETE;
  }
  return EPT_OK;
}

}  // namespace

Rail::~Rail() {
  // The endpoint first: its buffers and contexts are the provider's until it is gone.
  ep.close();
  received.mr.close();
  sent.mr.close();
  av.close();
  cq.close();
  eq.close();
  domain.close();
  fabric.close();
}

void Rail::post_receives() {
  while (!to_post.empty()) {
    Operation *operation = &receives[to_post.back()];
    operation->kind = Operation::Kind::kReceive;
    uint8_t *buffer = received.bytes.get() + size_t{operation->index} * kMessageBytes;
    operation->buffer = buffer;
    ssize_t status = fi_recv(ep.get(), buffer, kMessageBytes, received.descriptor, FI_ADDR_UNSPEC, &operation->context);
    if (status != 0) return;  // -FI_EAGAIN: after the next poll; another error shows in the queues
    to_post.pop_back();
  }
}

int32_t open_rail(Library &library, const Settings &settings, const Room &room, Info given, const Traits &traits,
                  Rail *rail) {
  rail->info = std::move(given);
  rail->traits = traits;
  fi_info *info = rail->info.get();
  const int mode = info->domain_attr->mr_mode;
  rail->own_keys = (mode & FI_MR_PROV_KEY) == 0;
  rail->virtual_address = (mode & FI_MR_VIRT_ADDR) != 0;
  rail->hmem = (info->caps & FI_HMEM) != 0;
  rail->imm_takes_receive = (info->mode & FI_RX_CQ_DATA) != 0;
  rail->max_message = std::min<uint64_t>(settings.max_message, info->ep_attr->max_msg_size);
  rail->tx_depth = static_cast<uint32_t>(std::min<size_t>(info->tx_attr->size, 65536));
  if (settings.tx_depth != 0) rail->tx_depth = std::min(rail->tx_depth, settings.tx_depth);
  if (traits.loses_empty_delivery) rail->empty_level = FI_TRANSMIT_COMPLETE;
  const uint64_t incoming = uint64_t{room.peers} * (room.send_credits + kGreetings) +
                            (rail->imm_takes_receive ? uint64_t{room.peers} * room.credits : 0);
  uint32_t receives = static_cast<uint32_t>(std::clamp<uint64_t>(incoming, kLeastReceives, kMostReceives));
  receives = static_cast<uint32_t>(std::min<size_t>(receives, std::max<size_t>(info->rx_attr->size, 1)));

  int status = library.fabric(info->fabric_attr, rail->fabric.out(), nullptr);
  if (status != 0) return refused(library, *rail, "opening the fabric", status);
  fi_eq_attr eq{};
  eq.wait_obj = FI_WAIT_NONE;
  status = fi_eq_open(rail->fabric.get(), &eq, rail->eq.out(), nullptr);
  if (status != 0) return refused(library, *rail, "opening an event queue", status);
  status = fi_domain(rail->fabric.get(), info, rail->domain.out(), nullptr);
  if (status != 0) return refused(library, *rail, "opening the domain", status);
  int32_t code = open_queue(library, settings, room, receives, rail);
  if (code != EPT_OK) return code;
  fi_av_attr av{};
  av.type = FI_AV_TABLE;
  av.count = room.peers + 1;
  status = fi_av_open(rail->domain.get(), &av, rail->av.out(), nullptr);
  if (status != 0) return refused(library, *rail, "opening an address vector", status);
  status = fi_endpoint(rail->domain.get(), info, rail->ep.out(), nullptr);
  if (status != 0) return refused(library, *rail, "opening an endpoint", status);
  // Without one, a provider that can't name the operation of an error ends the process (EFA). Those that have no use
  // for one with an RDM endpoint refuse it.
  status = fi_ep_bind(rail->ep.get(), &rail->eq->fid, 0);
  if (status != 0 && traits.efa) return refused(library, *rail, "binding the event queue", status);
  status = fi_ep_bind(rail->ep.get(), &rail->cq->fid, FI_TRANSMIT | FI_RECV);
  if (status != 0) return refused(library, *rail, "binding the completion queue", status);
  status = fi_ep_bind(rail->ep.get(), &rail->av->fid, 0);
  if (status != 0) return refused(library, *rail, "binding the address vector", status);
  if (traits.efa) set_efa_options(rail);
  status = fi_enable(rail->ep.get());
  if (status != 0) return refused(library, *rail, "enabling the endpoint", status);
  if (traits.efa && (code = ask_efa_options(rail, settings.completion == Completion::kAuto)) != EPT_OK) return code;

  size_t length = 0;
  status = fi_getname(&rail->ep->fid, nullptr, &length);
  rail->address.resize(length);
  if (length > 0) status = fi_getname(&rail->ep->fid, rail->address.data(), &length);
  if (status != 0 || length == 0) return refused(library, *rail, "asking for the endpoint's address", status);
  rail->address.resize(length);

  // Keys of two registrations that no peer gets to know; those of exports are random and 64 bits long.
  code = make_buffers(library, rail, receives, FI_RECV, 1, &rail->received);
  if (code == EPT_OK) code = make_buffers(library, rail, kSendBuffers, FI_SEND | FI_WRITE, 2, &rail->sent);
  if (code != EPT_OK) return code;
  rail->operations.resize(rail->tx_depth);
  for (uint32_t i = rail->tx_depth; i-- > 0;) {
    rail->operations[i].index = i;
    rail->free.push_back(i);
  }
  for (uint32_t i = kSendBuffers; i-- > 0;) rail->free_sends.push_back(i);
  rail->receives.resize(receives);
  for (uint32_t i = 0; i < receives; ++i) {
    rail->receives[i].index = i;
    rail->to_post.push_back(i);
  }
  rail->post_receives();
  return EPT_OK;
}

}  // namespace libfabric
