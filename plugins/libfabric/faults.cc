// SPDX-License-Identifier: Apache-2.0
// What fails: an operation, something of a rail that names no operation, a whole queue.
//
// INVARIANT. A failure of one operation ends its peer, unless the provider refused that operation and nothing of it
// landed (Fault::refused): what else may have become of it can't be known, and an ERROR of a peer that lives promises
// that there was no IMM.
#include <sys/epoll.h>

#include "instance.h"

using namespace libfabric;

namespace {

constexpr uint32_t kErrorsAtOnce = 32;  // bad entries read in one go

}  // namespace

void ept_instance::failed(Rail *rail, Operation *operation, const Fault &fault) {
  Peer *peer = operation->peer;
  const bool control = operation->kind == Operation::Kind::kControl;
  const std::string what = operation->kind == Operation::Kind::kWrite ? "a write of" : "a message of";
  std::string text = format("%s %llu bytes to rank %u failed on %s: %s", what.c_str(),
                            static_cast<unsigned long long>(operation->length), peer->rank,
                            rail->info->domain_attr->name, fault.text.c_str());
  if (control || peer->state == Peer::State::kEnded || operation->told) {
    if (control && peer->state == Peer::State::kConnecting) peer->last_try = text;
    return completed(rail, operation);
  }
  if (!fault.refused || !traits.revokes) {
    const int32_t code = fault.code == EPT_E_ACCESS || fault.code == EPT_E_CLOSED ? EPT_E_PEER_LOST : fault.code;
    end_peer(peer, code == EPT_E_IO ? EPT_E_PEER_LOST : code, fault.provider_errno,
             format("rank %u is lost: %s", peer->rank, text.c_str()), true);
    return completed(rail, operation);
  }
  tell_error(rail, *operation, fault.code, fault.provider_errno, std::move(text));
  operation->told = true;
  completed(rail, operation);
}

void ept_instance::tell_error(Rail *rail, const Operation &operation, int32_t code, int number, std::string text) {
  ++rail->counters.errors;
  ept_event *event = events.add(EPT_EVENT_ERROR, operation.peer->rank, operation.peer->epoch, std::move(text));
  event->rail = rail->number;
  event->cookie = operation.cookie;
  event->code = code;
  event->provider_errno = number;
}

void ept_instance::read_error(Rail *rail) {
  for (uint32_t i = 0; i < kErrorsAtOnce; ++i) {
    fi_cq_err_entry entry{};
    ssize_t status = fi_cq_readerr(rail->cq.get(), &entry, 0);
    if (status != 1) return;
    Operation *operation = rail->of_context(entry.op_context);
    const Fault fault =
        explain(rail->cq.get(), entry, rail->traits.efa || strict != nullptr, library->strerror(entry.err));
    if (operation == nullptr && entry.err == FI_EOVERRUN) return queue_died(rail, entry.err, fault.text);
    if (operation == nullptr) {
      // At the target of a write that was refused, or of nothing that can be named: no operation of ours is concerned.
      log(EPT_LOG_WARNING, format("libfabric: rank %u: %s: an error that names no operation: %s", params.rank,
                                  rail->info->domain_attr->name, fault.text.c_str()));
      continue;
    }
    if (operation->kind == Operation::Kind::kReceive) {
      rail->to_post.push_back(operation->index);
      continue;
    }
    failed(rail, operation, fault);
  }
}

// What a provider can't put into a completion queue, since it knows no operation for it.
void ept_instance::read_events(Rail *rail) {
  if (!rail->eq) return;
  uint8_t entry[256];
  uint32_t event = 0;
  ssize_t status = fi_eq_read(rail->eq.get(), &event, entry, sizeof entry, 0);
  if (status != -FI_EAVAIL) return;
  fi_eq_err_entry error{};
  if (fi_eq_readerr(rail->eq.get(), &error, 0) < 0) return;
  char buffer[256] = {};
  const char *words = fi_eq_strerror(rail->eq.get(), error.prov_errno, error.err_data, buffer, sizeof buffer);
  rail_broke(rail, error.prov_errno != 0 ? error.prov_errno : error.err,
             format("its event queue says: %s (%d; provider: %s, %d)", library->strerror(error.err), error.err,
                    words != nullptr ? words : "no words", error.prov_errno));
}

// Nobody can say which operations an error of a whole rail concerns: all peers with one under way on it are lost.
void ept_instance::rail_broke(Rail *rail, int number, const std::string &why) {
  log(EPT_LOG_ERROR, format("libfabric: rank %u: rail %u (%s): %s", params.rank, rail->number,
                            rail->info->domain_attr->name, why.c_str()));
  for (Operation &operation : rail->operations) {
    const bool counts = operation.kind == Operation::Kind::kWrite || operation.kind == Operation::Kind::kSend;
    if (!counts || operation.peer->state == Peer::State::kEnded) continue;
    end_peer(operation.peer, EPT_E_PEER_LOST, number,
             format("rank %u is lost: rail %u (%s) failed with operations to it under way: %s", operation.peer->rank,
                    rail->number, rail->info->domain_attr->name, why.c_str()),
             true);
  }
}

// What was in the queue is lost, and nobody can say what it was: an arrival may never have been counted, whoever it was
// from. So every peer is lost that this rail is for, once and at once, and nothing is read from it any more.
void ept_instance::queue_died(Rail *rail, int number, const std::string &why) {
  rail->broken = format("rail %u (%s): its completion queue can't be read any more: %s", rail->number,
                        rail->info->domain_attr->name, why.c_str());
  log(EPT_LOG_ERROR, format("libfabric: rank %u: %s", params.rank, rail->broken.c_str()));
  if (rail->wait_fd >= 0) epoll_ctl(epoll.get(), EPOLL_CTL_DEL, rail->wait_fd, nullptr);  // it may be readable for ever
  for (auto &peer : peers)
    if (peer != nullptr && rail->number < peer->rails)
      end_peer(peer.get(), EPT_E_PEER_LOST, number, format("rank %u is lost: %s", peer->rank, rail->broken.c_str()),
               true);
}
