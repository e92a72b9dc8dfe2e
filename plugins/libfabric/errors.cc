// SPDX-License-Identifier: Apache-2.0
#include "errors.h"

#include <rdma/fi_errno.h>

#include "device_errors.h"

namespace libfabric {

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
  if (const DeviceError *error = efa ? device_error(entry.prov_errno) : nullptr) {
    fault.code = error->ours;
    fault.refused = error->refused;
    known = error->words;
  }
  fault.text = format("%s%s%s (libfabric: %s, %d; provider: %s, %d)", known != nullptr ? known : "",
                      known != nullptr ? "" : fi_text, "", fi_text, entry.err, words != nullptr ? words : "no words",
                      entry.prov_errno);
  return fault;
}

}  // namespace libfabric
