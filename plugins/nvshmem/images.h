// SPDX-License-Identifier: Apache-2.0
//
// images.h: the kernels of dispatch and combine, linked with NVSHMEM's device library when this plugin was built
// (link.py).
#pragma once

#include <cstddef>

namespace nvshmem {

struct Image {
  int arch;  // 90: runs on compute capability 9.x from 9.0 on
  const unsigned char *data;
  size_t size;
};
extern const Image images[];         // ends with a NULL data
extern const char *const no_images;  // NULL, or why there are none and how to get them
extern const int linked[3];          // the release of the device library: major, minor, patch

}  // namespace nvshmem
