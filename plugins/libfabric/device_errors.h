// SPDX-License-Identifier: Apache-2.0
//
// device_errors.h: what an EFA device says of a failed operation: the code that its completion carries (prov_errno),
// libfabric's number for it, and what it means. Codes from the driver's efa_io_comp_status, numbers as the provider
// translates them; the words are ours.
#pragma once

#include <rdma/fi_errno.h>

#include <array>
#include <cstdlib>
#include <cstring>
#include <string>

namespace libfabric {

struct DeviceError {
  int code;
  int number;  // FI_...
  const char *name;
  // Could the operation have happened all the same? Then only the answer was lost.
  bool may_have_landed;
  const char *words;
};

inline constexpr std::array<DeviceError, 15> kDeviceErrors = {{
    {1, FI_ECANCELED, "flushed", false, "the queue pair was destroyed before the operation was sent"},
    {2, FI_EINVAL, "internal", false, "the local queue pair is in an internal error"},
    {3, FI_EINVAL, "unsupported", false, "the device has no such operation"},
    {4, FI_EINVAL, "bad_handle", false, "the local address handle of the peer isn't valid"},
    {5, FI_EINVAL, "bad_lkey", false, "the local key isn't valid, or doesn't cover the source"},
    {6, FI_EMSGSIZE, "too_long", false, "the message is too long for the device"},
    {7, FI_EINVAL, "bad_address", false, "the remote key isn't registered, or doesn't cover the destination"},
    {8, FI_ECONNABORTED, "abort", true, "the remote side reset the connection"},
    {9, FI_ENOTCONN, "bad_qpn", false, "the remote queue pair is gone or in error"},
    {10, FI_ENORX, "rnr", false, "the receiver isn't ready: no receive is posted there"},
    {11, FI_EMSGSIZE, "receive_too_short", false, "the receive that is posted there is too short"},
    {12, FI_EREMOTEIO, "bad_status", true, "the responder gave a status that the device doesn't know"},
    {13, FI_ECONNABORTED, "unresponsive", true, "the remote side no longer answers"},
    {14, FI_ENOTCONN, "unknown_peer", false, "the remote side has no address handle of ours (its address vector)"},
    {15, FI_EHOSTUNREACH, "unreachable", true, "the remote side has never answered (security groups, subnet)"},
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
