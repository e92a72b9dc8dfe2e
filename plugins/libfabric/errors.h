// SPDX-License-Identifier: Apache-2.0
// What went wrong with an operation, from a completion queue's error entry: our code, the device's own, and words.
#pragma once

#include <rdma/fi_eq.h>

#include <string>

#include "common.h"

namespace libfabric {

struct Fault {
  int32_t code = EPT_E_IO;
  int provider_errno = 0;  // the device's number where there is one, else libfabric's
  bool refused = false;    // that operation alone: it changed nothing, and its peer is well
  std::string text;
};

// `efa`: prov_errno is one of EFA's.
Fault explain(fid_cq *cq, const fi_cq_err_entry &entry, bool efa, const char *fi_text);

}  // namespace libfabric
