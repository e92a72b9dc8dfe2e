// SPDX-License-Identifier: Apache-2.0
#include "moe/check.h"

#include <algorithm>

#include "moe/fail.h"
#include "moe/object.h"

namespace ept::moe {

uint64_t element_bytes(int32_t dtype) { return dtype == EPT_DTYPE_F4X2 ? 1 : format_bytes(dtype, 1); }

uint64_t elements(const ept_tensor &tensor) {
  uint64_t n = 1;
  for (int32_t d = 0; d < tensor.ndim; d++) n *= uint64_t(tensor.shape[d]);
  return n;
}

bool present(const ept_tensor &tensor) {
  return tensor.data != nullptr || (tensor.ndim > 0 && tensor.dtype != EPT_DTYPE_NONE && elements(tensor) == 0);
}

std::string shown(const ept_tensor &tensor) {
  std::string text = format_name(tensor.dtype);
  text += " [";
  for (int32_t d = 0; d < std::min(tensor.ndim, 3); d++) text += (d ? ", " : "") + std::to_string(tensor.shape[d]);
  return text + "]";
}

void want(const char *name, const ept_tensor &tensor, std::initializer_list<int32_t> dtypes,
          std::initializer_list<int64_t> shape) {
  std::string expected;
  for (int32_t dtype : dtypes) expected += (expected.empty() ? "" : " or ") + std::string(format_name(dtype));
  expected += expected.empty() ? "[" : " [";
  for (const int64_t *d = shape.begin(); d != shape.end(); d++)
    expected += (d == shape.begin() ? "" : ", ") + (*d == kAny ? std::string("any") : std::to_string(*d));
  expected += "]";
  if (!present(tensor)) fail(EPT_E_INVALID, -1, "%s is missing; %s is expected", name, expected.c_str());
  bool right = tensor.ndim == int32_t(shape.size());
  for (int32_t d = 0; right && d < tensor.ndim; d++)
    right = tensor.shape[d] >= 0 && (shape.begin()[d] == kAny || shape.begin()[d] == tensor.shape[d]);
  if (dtypes.size()) right = right && std::find(dtypes.begin(), dtypes.end(), tensor.dtype) != dtypes.end();
  if (!right) fail(EPT_E_INVALID, -1, "%s is %s; %s is expected", name, shown(tensor).c_str(), expected.c_str());
  if (tensor.device != -1)
    fail(EPT_E_UNSUPPORTED, -1, "%s is on CUDA device %d; this executor takes tensors of the CPU", name, tensor.device);
}

void want_rows(const char *name, const ept_tensor &tensor) {
  if (elements(tensor) == 0) return;
  const auto size = int64_t(element_bytes(tensor.dtype));
  const int32_t last = tensor.ndim - 1;
  if (tensor.shape[last] > 1 && tensor.strides[last] != 1)
    fail(EPT_E_INVALID, -1, "%s has an inner stride of %lld; it must be 1", name, (long long)tensor.strides[last]);
  bool aligned = reinterpret_cast<uintptr_t>(tensor.data) % 16 == 0;
  for (int32_t d = 0; d < last; d++)
    if (tensor.shape[d] > 1) aligned = aligned && size * tensor.strides[d] % 16 == 0;
  if (!aligned)
    fail(EPT_E_INVALID, -1,
         "%s: %s at %p with strides [%lld, %lld, %lld]: every row must start at a multiple of 16 bytes", name,
         shown(tensor).c_str(), tensor.data, (long long)tensor.strides[0],
         (long long)(tensor.ndim > 1 ? tensor.strides[1] : 0), (long long)(tensor.ndim > 2 ? tensor.strides[2] : 0));
}

Rows rows_of(const ept_tensor &tensor, int leading_dims) {
  const auto size = int64_t(element_bytes(tensor.dtype));
  Rows rows;
  rows.data = static_cast<char *>(tensor.data);
  rows.inner = tensor.strides[leading_dims - 1] * size;
  rows.outer = leading_dims == 2 ? tensor.strides[0] * size : 0;
  rows.leading = leading_dims == 2 ? uint64_t(tensor.shape[1]) : 0;
  rows.column = tensor.ndim > leading_dims ? tensor.strides[leading_dims] * size : 0;
  return rows;
}

}  // namespace ept::moe
