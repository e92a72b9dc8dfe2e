// SPDX-License-Identifier: Apache-2.0
//
// device_errors.h: what an EFA device says of a failed operation: the code that its completion carries (prov_errno),
// libfabric's number for it, what it means to the engine, and words. Codes from the driver's efa_io_comp_status,
// numbers as the provider translates them; the words are ours. The one table: errors.cc tells errors by it, the strict
// shim makes them by it.
#pragma once

#include <rdma/fi_errno.h>

#include <array>
#include <cstdlib>
#include <cstring>
#include <string>

#include "eptransport/backend.h"

namespace libfabric {

struct DeviceError {
  int code;
  int number;    // FI_...
  int32_t ours;  // EPT_E_...
  const char *name;
  // That operation alone: it changed nothing, and its peer is well.
  bool refused;
  // Could the operation have happened all the same? Then only the answer was lost.
  bool may_have_landed;
  const char *words;
};

inline constexpr std::array<DeviceError, 16> kDeviceErrors = {{
    {1, FI_ECANCELED, EPT_E_CLOSED, "flushed", false, false, "the endpoint was closed before it was sent"},
    {2, FI_EINVAL, EPT_E_IO, "internal", false, false, "the local queue pair is in an internal error"},
    {3, FI_EINVAL, EPT_E_IO, "unsupported", false, false, "the local card has no such operation"},
    {4, FI_EINVAL, EPT_E_IO, "bad_handle", false, false, "the address handle of the peer isn't valid here"},
    {5, FI_EINVAL, EPT_E_IO, "bad_lkey", true, false, "the local key isn't valid, or doesn't cover the source"},
    {6, FI_EMSGSIZE, EPT_E_IO, "too_long", true, false, "it is too long for the local card"},
    {7, FI_EINVAL, EPT_E_ACCESS, "bad_address", true, false,
     "the target refused the key or the address: unknown, revoked, or past the region's end"},
    {8, FI_ECONNABORTED, EPT_E_PEER_LOST, "abort", false, true, "the target reset its queue pair"},
    {9, FI_ENOTCONN, EPT_E_PEER_LOST, "bad_qpn", false, false,
     "the target has no such queue pair any more: its process ended or began anew"},
    {10, FI_ENORX, EPT_E_IO, "rnr", false, false, "the target had no receive posted for too long (RNR)"},
    {11, FI_EMSGSIZE, EPT_E_IO, "receive_too_short", true, false, "the receive that is posted there is too short"},
    {12, FI_EREMOTEIO, EPT_E_IO, "bad_status", false, true, "the target answered with a status that isn't known here"},
    {13, FI_ECONNABORTED, EPT_E_PEER_LOST, "unresponsive", false, true,
     "the target no longer answers: dead, or a security group keeps traffic from it"},
    {14, FI_ENOTCONN, EPT_E_PEER_LOST, "unknown_peer", false, false,
     "the target doesn't hold this rank in its address vector"},
    {15, FI_EHOSTUNREACH, EPT_E_PEER_LOST, "unreachable", false, true,
     "the target has never answered: no route, or a security group keeps traffic from it"},
    {18, FI_EINVAL, EPT_E_IO, "feature_mismatch", false, false,
     "the target's card lacks a feature that this operation needs"},
}};

inline const DeviceError *device_error(int code) {
  for (const DeviceError &error : kDeviceErrors) {
    if (error.code == code) return &error;
  }
  return nullptr;
}

// By name or by number.
inline const DeviceError *device_error(const std::string &name) {
  for (const DeviceError &error : kDeviceErrors) {
    if (name == error.name) return &error;
  }
  return device_error(atoi(name.c_str()));
}

}  // namespace libfabric
