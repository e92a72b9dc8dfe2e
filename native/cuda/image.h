// SPDX-License-Identifier: Apache-2.0
//
// image.h: the GPU kernels that were compiled into this library (src/eptransport/_compile.py), and how they get onto a
// GPU. A Module loads all of its kernels when it is made: a kernel that the driver loads at its first launch waits
// until the GPU is idle, and it never is beside kernels that wait for one another.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "cuda/driver.h"

namespace ept::cuda {

struct Image {
  const char *name;  // of its source, without .cu
  int arch;          // 90: sm_90, or compute_90
  bool ptx;          // compiled further by the driver when it is loaded
  const unsigned char *data;
  size_t size;
};
extern const Image images[];         // ends with a NULL name
extern const char *const no_images;  // NULL, or why there are none and how to get them

// Kernels that were compiled after this library was: a copy of them is looked for as those above, and first. For GPUs
// that are used afterwards.
void add_image(const char *name, int arch, const void *data, size_t size);

// The image of `name` for a GPU of `capability` (90: 9.0): code of its own generation and not newer than it is, else
// PTX. NULL: UNAVAILABLE, with the reason.
const Image *image_for(const char *name, int capability, ept_error *error);

class Module {
 public:
  // With all of `kernels` loaded. UNAVAILABLE: built without kernels, or the GPU is too old. INVALID: no such kernel.
  static int32_t load(std::shared_ptr<Primary> primary, const char *name, const std::vector<std::string> &kernels,
                      std::unique_ptr<Module> *module, ept_error *error);
  // The same of an image that the caller has, for as long as the module lives.
  static int32_t load(std::shared_ptr<Primary> primary, const Image &image, const std::vector<std::string> &kernels,
                      std::unique_ptr<Module> *module, ept_error *error);
  ~Module();
  Module(const Module &) = delete;
  Module &operator=(const Module &) = delete;

  Function kernel(size_t index) const { return functions_[index]; }  // as in `kernels`
  const Primary &primary() const { return *primary_; }
  const Image &image() const { return image_; }
  ModuleHandle handle() const { return handle_; }

  // Blocks of one dimension on the caller's stream; `arguments` as cuLaunchKernel has them. No synchronisation.
  int32_t launch(size_t kernel, unsigned blocks, unsigned threads, unsigned shared, Stream stream, void **arguments,
                 ept_error *error) const;

 private:
  Module(std::shared_ptr<Primary> primary, const Image &image) : primary_(std::move(primary)), image_(image) {}
  std::shared_ptr<Primary> primary_;
  const Image image_;
  ModuleHandle handle_ = nullptr;
  std::vector<Function> functions_;
  std::vector<std::string> names_;
};

}  // namespace ept::cuda
