// SPDX-License-Identifier: Apache-2.0
//
// check.h: what a caller's tensor must be, and the sentence that says what it is instead.
#pragma once

#include <initializer_list>
#include <string>

#include "eptransport/eptransport.h"

namespace ept::moe {

// An empty tensor may have no address and is still there.
bool present(const ept_tensor &tensor);
// F4X2 tensors count pairs: an element is a byte.
uint64_t element_bytes(int32_t dtype);
uint64_t elements(const ept_tensor &tensor);
// "bfloat16 [128, 7168]"
std::string shown(const ept_tensor &tensor);

constexpr int64_t kAny = -1;

// On this machine's memory, of one of the formats (empty: any), with these dimensions.
void want(const char *name, const ept_tensor &tensor, std::initializer_list<int32_t> dtypes,
          std::initializer_list<int64_t> shape);
// Rows that vector loads can take: unit inner stride, every row 16-byte aligned.
void want_rows(const char *name, const ept_tensor &tensor);

// A tensor by flattened leading dimensions: row i of [N, ..] or i = e * N + j of [E, N, ..]. Strides in bytes.
struct Rows {
  char *data = nullptr;
  int64_t outer = 0, inner = 0, column = 0;
  uint64_t leading = 0;  // N where there are two leading dimensions, else 0
  char *at(uint64_t row) const {
    return leading ? data + int64_t(row / leading) * outer + int64_t(row % leading) * inner
                   : data + int64_t(row) * inner;
  }
  explicit operator bool() const { return data != nullptr; }
};
// `leading_dims`: 1 or 2; the dimension after them, if any, is the column.
Rows rows_of(const ept_tensor &tensor, int leading_dims);

}  // namespace ept::moe
