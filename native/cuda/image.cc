// SPDX-License-Identifier: Apache-2.0
#include "cuda/image.h"

#include <cstring>
#include <deque>
#include <mutex>

#include "engine/error.h"

namespace ept::cuda {

namespace {

// Added at run time; none goes before the process does, and none moves.
struct Added {
  std::mutex lock;
  std::deque<std::pair<std::string, std::string>> bytes;  // name, image
  std::deque<Image> images;
};
Added &added() {
  static Added *const all = new Added;
  return *all;
}

std::vector<const Image *> all_images() {
  std::vector<const Image *> all;
  const std::lock_guard<std::mutex> hold(added().lock);
  for (const Image &image : added().images) all.push_back(&image);
  for (const Image *image = images; image->name; image++) all.push_back(image);
  return all;
}

}  // namespace

void add_image(const char *name, int arch, const void *data, size_t size) {
  Added &all = added();
  const std::lock_guard<std::mutex> hold(all.lock);
  const auto &[its_name, its_bytes] = all.bytes.emplace_back(name, std::string(static_cast<const char *>(data), size));
  all.images.push_back(
      {its_name.c_str(), arch, false, reinterpret_cast<const unsigned char *>(its_bytes.data()), size});
}

const Image *image_for(const char *name, int capability, ept_error *error) {
  const Image *best = nullptr;
  const std::vector<const Image *> all = all_images();
  bool known = false;
  for (const Image *image : all) {
    if (std::strcmp(image->name, name) != 0) continue;
    known = true;
    // Machine code runs on its own generation alone, and there on what is not older; PTX on whatever is not older.
    const bool runs = image->arch <= capability && (image->ptx || image->arch / 10 == capability / 10);
    if (runs && (!best || (best->ptx && !image->ptx) || (best->ptx == image->ptx && best->arch < image->arch))) {
      best = image;
    }
  }
  if (!best && no_images) {
    fail(error, EPT_E_UNAVAILABLE, "cuda", -1, "%s", no_images);
    return nullptr;
  }
  if (!best) {
    fail(error, known ? EPT_E_UNAVAILABLE : EPT_E_INVALID, "cuda", -1,
         known ? "no kernels of '%s' run on a GPU of compute capability %d.%d: it takes 8.0 (A100) or later"
               : "this library has no kernels of the name '%s' (capability %d.%d)",
         name, capability / 10, capability % 10);
  }
  return best;
}

int32_t Module::load(std::shared_ptr<Primary> primary, const char *name, const std::vector<std::string> &kernels,
                     std::unique_ptr<Module> *module, ept_error *error) {
  const Image *image = image_for(name, primary->capability(), error);
  if (!image) return no_images ? EPT_E_UNAVAILABLE : error ? error->code : EPT_E_UNAVAILABLE;
  return load(std::move(primary), *image, kernels, module, error);
}

int32_t Module::load(std::shared_ptr<Primary> primary, const Image &image, const std::vector<std::string> &kernels,
                     std::unique_ptr<Module> *module, ept_error *error) {
  const char *const name = image.name;
  const Driver &d = primary->driver();
  Entered entered(*primary);
  std::unique_ptr<Module> made(new Module(std::move(primary), image));
  const std::string what = std::string("loading the kernels of '") + name + "' for " +
                           (image.ptx ? "compute_" : "sm_") + std::to_string(image.arch);
  if (int32_t code = checked(d.cuModuleLoadData(&made->handle_, image.data), "cuda", what.c_str(), error)) return code;
  for (const std::string &kernel : kernels) {
    Function function = nullptr;
    const Result result = d.cuModuleGetFunction(&function, made->handle_, kernel.c_str());
    if (result == kNotFound) {
      return fail(error, EPT_E_INVALID, "cuda", -1, "the kernels of '%s' have none of the name '%s'", name,
                  kernel.c_str());
    }
    if (int32_t code = checked(result, "cuda", (what + ", kernel " + kernel).c_str(), error)) return code;
    // Under lazy loading the module may hold no code yet; asking for what only the code knows brings it in, and
    // cuFuncLoad, where the driver has it (12.4), says so plainly.
    int registers = 0;
    Result loaded = d.cuFuncGetAttribute(&registers, kFunctionRegisters, function);
    if (loaded == kSuccess && d.cuFuncLoad) loaded = d.cuFuncLoad(function);
    if (int32_t code = checked(loaded, "cuda", (what + ", kernel " + kernel).c_str(), error)) return code;
    made->functions_.push_back(function);
    made->names_.push_back(kernel);
  }
  *module = std::move(made);
  return EPT_OK;
}

Module::~Module() {
  if (!handle_) return;
  Entered entered(*primary_);
  (void)primary_->driver().cuModuleUnload(handle_);
}

int32_t Module::launch(size_t kernel, unsigned blocks, unsigned threads, unsigned shared, Stream stream,
                       void **arguments, ept_error *error) const {
  Entered entered(*primary_);
  const Result result = primary_->driver().cuLaunchKernel(functions_[kernel], blocks, 1, 1, threads, 1, 1, shared,
                                                          stream, arguments, nullptr);
  if (result == kSuccess) return EPT_OK;
  return checked(result, "launch", names_[kernel].c_str(), error);
}

}  // namespace ept::cuda
