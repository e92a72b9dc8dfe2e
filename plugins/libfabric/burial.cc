// SPDX-License-Identifier: Apache-2.0
#include "burial.h"

#include <mutex>
#include <utility>

namespace libfabric {
namespace {

struct Ground {
  std::mutex lock;
  size_t open = 0;
  std::vector<std::unique_ptr<Rail>> rails;
};

// Never destroyed: at exit libfabric may be gone before it.
Ground &ground() {
  static auto *one = new Ground;
  return *one;
}

}  // namespace

void shm_opened() {
  std::lock_guard hold(ground().lock);
  ++ground().open;
}

void shm_closed(std::vector<std::unique_ptr<Rail>> rails) {
  std::lock_guard hold(ground().lock);
  for (auto &rail : rails) ground().rails.push_back(std::move(rail));
  if (--ground().open == 0) ground().rails.clear();
}

}  // namespace libfabric
