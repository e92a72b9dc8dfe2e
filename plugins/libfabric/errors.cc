// SPDX-License-Identifier: Apache-2.0
#include "errors.h"

#include <rdma/fi_errno.h>

namespace libfabric {
namespace {

struct DeviceError {
  int number;
  int32_t code;
  bool refused;
  const char *text;
};

// EFA's completion statuses, as its driver numbers them.
const DeviceError kDeviceErrors[] = {
    {1, EPT_E_CLOSED, false, "the endpoint was closed while it was under way"},
    {2, EPT_E_IO, false, "internal error of the local queue pair"},
    {3, EPT_E_IO, false, "the local card does not know this operation"},
    {4, EPT_E_IO, false, "the address handle of the peer is not valid here"},
    {5, EPT_E_IO, true, "the local key of the source is not valid: the memory was deregistered"},
    {6, EPT_E_IO, true, "the length is not one that the local card takes"},
    {7, EPT_E_ACCESS, true, "the target refused the address or the key: unknown, revoked, or past the region's end"},
    {8, EPT_E_PEER_LOST, false, "the target aborted the operation: its queue pair was reset"},
    {9, EPT_E_PEER_LOST, false, "the target has no such queue pair any more: its process ended or began anew"},
    {10, EPT_E_IO, false, "the target had no receive posted for too long (RNR)"},
    {11, EPT_E_IO, true, "the target took the length for wrong"},
    {12, EPT_E_IO, false, "the target answered with a bad status"},
    {13, EPT_E_PEER_LOST, false, "the target does not respond: dead, or a security group keeps traffic from it"},
    {14, EPT_E_PEER_LOST, false, "the target does not hold this rank in its address vector"},
    {15, EPT_E_PEER_LOST, false, "the target was never reached: no route, or a security group keeps traffic from it"},
    {18, EPT_E_IO, false, "the target's card lacks a feature that this operation needs"},
};

}  // namespace

Fault explain(fid_cq *cq, const fi_cq_err_entry &entry, bool efa, const char *fi_text) {
  Fault fault;
  fault.provider_errno = entry.prov_errno != 0 ? entry.prov_errno : entry.err;
  char buffer[256] = {};
  const char *words = fi_cq_strerror(cq, entry.prov_errno, entry.err_data, buffer, sizeof buffer);
  const char *known = nullptr;
  switch (entry.err) {
    case FI_EACCES:
    case FI_EINVAL:  // what util_mr and EFA say of a key that they do not know
    case FI_EKEYREJECTED:
    case FI_ENOKEY:
    case FI_EPERM:
      fault.code = EPT_E_ACCESS;
      fault.refused = true;
      break;
    case FI_ECONNREFUSED:
    case FI_ECONNRESET:
    case FI_ECONNABORTED:
    case FI_ENOTCONN:
    case FI_EHOSTUNREACH:
    case FI_ENETUNREACH:
    case FI_EHOSTDOWN:
    case FI_ESHUTDOWN:
    case FI_ETIMEDOUT:
      fault.code = EPT_E_PEER_LOST;
      break;
    case FI_ECANCELED:
      fault.code = EPT_E_CLOSED;
      break;
    default:
      break;
  }
  if (efa)
    for (const DeviceError &error : kDeviceErrors)
      if (error.number == entry.prov_errno) {
        fault.code = error.code;
        fault.refused = error.refused;
        known = error.text;
      }
  fault.text = format("%s%s%s (libfabric: %s, %d; provider: %s, %d)", known != nullptr ? known : "",
                      known != nullptr ? "" : fi_text, "", fi_text, entry.err, words != nullptr ? words : "no words",
                      entry.prov_errno);
  return fault;
}

}  // namespace libfabric
