// SPDX-License-Identifier: Apache-2.0
//
// null_info.h: fi_info by hand, for a `Library` that stands on no libfabric.
#pragma once

#include <rdma/fabric.h>
#include <rdma/fi_domain.h>
#include <rdma/fi_endpoint.h>

#include <cstdlib>
#include <cstring>

namespace libfabric::null_info {

template <class T>
T *copy(const T *from) {
  T *to = static_cast<T *>(calloc(1, sizeof(T)));
  if (from != nullptr) *to = *from;
  return to;
}

inline char *copy_text(const char *from) { return from == nullptr ? nullptr : strdup(from); }

inline void *copy_bytes(const void *from, size_t length) {
  if (from == nullptr || length == 0) return nullptr;
  void *to = malloc(length);
  memcpy(to, from, length);
  return to;
}

inline void free_one(fi_info *info) {
  free(info->src_addr);
  free(info->dest_addr);
  free(info->tx_attr);
  free(info->rx_attr);
  free(info->ep_attr);
  if (info->domain_attr != nullptr) free(info->domain_attr->name);
  free(info->domain_attr);
  if (info->fabric_attr != nullptr) {
    free(info->fabric_attr->name);
    free(info->fabric_attr->prov_name);
  }
  free(info->fabric_attr);
  free(info);
}

// One info, not the list behind it; nullptr: an empty one with every part there.
inline fi_info *duplicate(const fi_info *from) {
  fi_info *to = copy(from);
  to->next = nullptr;
  to->nic = nullptr;
  to->tx_attr = copy(from ? from->tx_attr : nullptr);
  to->rx_attr = copy(from ? from->rx_attr : nullptr);
  to->ep_attr = copy(from ? from->ep_attr : nullptr);
  to->domain_attr = copy(from ? from->domain_attr : nullptr);
  to->fabric_attr = copy(from ? from->fabric_attr : nullptr);
  to->ep_attr->auth_key = nullptr;
  to->domain_attr->auth_key = nullptr;
  if (from == nullptr) return to;
  to->src_addr = copy_bytes(from->src_addr, from->src_addrlen);
  to->dest_addr = copy_bytes(from->dest_addr, from->dest_addrlen);
  to->domain_attr->name = copy_text(to->domain_attr->name);
  to->fabric_attr->name = copy_text(to->fabric_attr->name);
  to->fabric_attr->prov_name = copy_text(to->fabric_attr->prov_name);
  return to;
}

}  // namespace libfabric::null_info
