// SPDX-License-Identifier: Apache-2.0
// In the place of kernels that link.py makes, which no machine without nvcc has.
#include "../../../plugins/nvshmem/images.h"

namespace nvshmem {
namespace {
constexpr unsigned char kOld[] = {8, 0}, kHopper[] = {9, 0}, kNext[] = {10, 0};
}
const Image images[] = {{80, kOld, 2}, {90, kHopper, 2}, {100, kNext, 2}, {0, nullptr, 0}};
const char *const no_images = nullptr;
const int linked[3] = {3, 4, 5};
}  // namespace nvshmem
