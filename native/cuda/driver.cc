// SPDX-License-Identifier: Apache-2.0
#include "cuda/driver.h"

#include <dlfcn.h>

#include <cstdlib>
#include <mutex>
#include <string>
#include <vector>

#include "engine/error.h"

namespace ept::cuda {

namespace {

const char *library_name() {
  const char *named = std::getenv("EPT_CUDA_LIBRARY");
  return named && *named ? named : "libcuda.so.1";
}

void *library(const char **why = nullptr) {
  static std::string refused;
  static void *const opened = [] {
    void *handle = dlopen(library_name(), RTLD_NOW | RTLD_LOCAL);
    if (!handle) {
      const char *said = dlerror();
      refused = said ? said : "no reason given";
    }
    return handle;
  }();
  if (why) *why = refused.c_str();
  return opened;
}

// The version suffix is part of an entry point's name where CUDA changed its arguments; these are the ones that cuda.h
// of 11.0 to 13 maps the plain names to.
struct Loader {
  std::string missing;
  template <class F>
  void operator()(F &entry, const char *name, bool required = true) {
    entry = reinterpret_cast<F>(symbol(name));
    if (!entry && required && missing.empty()) missing = name;
  }
};

std::string load(Driver &d) {
  Loader get;
  get(d.cuInit, "cuInit");
  get(d.cuDriverGetVersion, "cuDriverGetVersion");
  get(d.cuGetErrorName, "cuGetErrorName");
  get(d.cuGetErrorString, "cuGetErrorString");
  get(d.cuDeviceGet, "cuDeviceGet");
  get(d.cuDeviceGetCount, "cuDeviceGetCount");
  get(d.cuDeviceGetName, "cuDeviceGetName");
  get(d.cuDeviceGetUuid, "cuDeviceGetUuid");
  get(d.cuDeviceGetAttribute, "cuDeviceGetAttribute");
  get(d.cuDevicePrimaryCtxRetain, "cuDevicePrimaryCtxRetain");
  get(d.cuDevicePrimaryCtxRelease, "cuDevicePrimaryCtxRelease_v2");
  get(d.cuCtxPushCurrent, "cuCtxPushCurrent_v2");
  get(d.cuCtxPopCurrent, "cuCtxPopCurrent_v2");
  get(d.cuCtxGetCurrent, "cuCtxGetCurrent");
  get(d.cuCtxSynchronize, "cuCtxSynchronize");
  get(d.cuModuleLoadData, "cuModuleLoadData");
  get(d.cuModuleUnload, "cuModuleUnload");
  get(d.cuModuleGetFunction, "cuModuleGetFunction");
  get(d.cuFuncGetAttribute, "cuFuncGetAttribute");
  get(d.cuFuncSetAttribute, "cuFuncSetAttribute");
  get(d.cuOccupancyMaxActiveBlocksPerMultiprocessor, "cuOccupancyMaxActiveBlocksPerMultiprocessor");
  get(d.cuLaunchKernel, "cuLaunchKernel");
  get(d.cuMemAlloc, "cuMemAlloc_v2");
  get(d.cuMemFree, "cuMemFree_v2");
  get(d.cuMemGetAddressRange, "cuMemGetAddressRange_v2");
  get(d.cuMemGetInfo, "cuMemGetInfo_v2");
  get(d.cuMemHostAlloc, "cuMemHostAlloc");
  get(d.cuMemFreeHost, "cuMemFreeHost");
  get(d.cuMemHostRegister, "cuMemHostRegister_v2");
  get(d.cuMemHostUnregister, "cuMemHostUnregister");
  get(d.cuMemHostGetDevicePointer, "cuMemHostGetDevicePointer_v2");
  get(d.cuMemcpyHtoD, "cuMemcpyHtoD_v2");
  get(d.cuMemcpyDtoH, "cuMemcpyDtoH_v2");
  get(d.cuMemcpyHtoDAsync, "cuMemcpyHtoDAsync_v2");
  get(d.cuMemcpyDtoHAsync, "cuMemcpyDtoHAsync_v2");
  get(d.cuMemcpyDtoDAsync, "cuMemcpyDtoDAsync_v2");
  get(d.cuMemsetD8, "cuMemsetD8_v2");
  get(d.cuMemsetD8Async, "cuMemsetD8Async");
  get(d.cuIpcGetMemHandle, "cuIpcGetMemHandle");
  get(d.cuIpcOpenMemHandle, "cuIpcOpenMemHandle_v2");
  get(d.cuIpcCloseMemHandle, "cuIpcCloseMemHandle");
  get(d.cuStreamCreate, "cuStreamCreate");
  get(d.cuStreamDestroy, "cuStreamDestroy_v2");
  get(d.cuStreamSynchronize, "cuStreamSynchronize");
  get(d.cuStreamQuery, "cuStreamQuery");
  get(d.cuStreamIsCapturing, "cuStreamIsCapturing");
  get(d.cuEventCreate, "cuEventCreate");
  get(d.cuEventDestroy, "cuEventDestroy_v2");
  get(d.cuEventRecord, "cuEventRecord");
  get(d.cuEventSynchronize, "cuEventSynchronize");
  get(d.cuEventElapsedTime, "cuEventElapsedTime");
  get(d.cuFuncLoad, "cuFuncLoad", false);
  get(d.cuMemGetHandleForAddressRange, "cuMemGetHandleForAddressRange", false);
  get(d.cuMemGetAllocationGranularity, "cuMemGetAllocationGranularity", false);
  get(d.cuMemCreate, "cuMemCreate", false);
  get(d.cuMemRelease, "cuMemRelease", false);
  get(d.cuMemAddressReserve, "cuMemAddressReserve", false);
  get(d.cuMemAddressFree, "cuMemAddressFree", false);
  get(d.cuMemMap, "cuMemMap", false);
  get(d.cuMemUnmap, "cuMemUnmap", false);
  get(d.cuMemSetAccess, "cuMemSetAccess", false);
  get(d.cuMemExportToShareableHandle, "cuMemExportToShareableHandle", false);
  get(d.cuMemImportFromShareableHandle, "cuMemImportFromShareableHandle", false);
  return get.missing;
}

struct Opened {
  Driver table{};
  std::string why; /* not empty: unavailable */
  Opened() {
    const char *said = nullptr;
    if (!library(&said)) {
      why = std::string("no NVIDIA driver was found here (") + said +
            "); GPU tensors need one of release 535 or later: install it, or move the tensors to the CPU";
      return;
    }
    const std::string missing = load(table);
    if (!missing.empty()) {
      why = std::string(library_name()) + " has no " + missing + ": GPU tensors need NVIDIA's driver R535 or later";
      return;
    }
    if (const Result result = table.cuInit(0)) {
      const char *name = nullptr;
      table.cuGetErrorName(result, &name);
      why = std::string("the NVIDIA driver does not start (cuInit: ") + (name ? name : std::to_string(result).c_str()) +
            "): see nvidia-smi, and CUDA_VISIBLE_DEVICES";
    }
  }
};

}  // namespace

void *symbol(const char *name) {
  void *from = library();
  return from ? dlsym(from, name) : nullptr;
}

const Driver *driver(ept_error *error) {
  static const Opened opened;
  if (opened.why.empty()) return &opened.table;
  fail(error, EPT_E_UNAVAILABLE, "cuda", -1, "%s", opened.why.c_str());
  return nullptr;
}

int32_t checked(Result result, const char *operation, const char *what, ept_error *error) {
  if (result == kSuccess) return EPT_OK;
  const Driver *d = driver(nullptr);
  const char *name = nullptr, *text = nullptr;
  if (d) {
    d->cuGetErrorName(result, &name);
    d->cuGetErrorString(result, &text);
  }
  const int32_t code = result == kOutOfMemory ? EPT_E_NOMEM : EPT_E_IO;
  fail(error, code, operation, -1, "%s: %s (%s)", what, name ? name : "unknown CUDA error", text ? text : "no text");
  if (error) error->provider_errno = result;
  return code;
}

int32_t Primary::open(int ordinal, std::shared_ptr<Primary> *primary, ept_error *error) {
  const Driver *d = cuda::driver(error);
  if (!d) return EPT_E_UNAVAILABLE;
  int count = 0;
  if (int32_t code = checked(d->cuDeviceGetCount(&count), "cuda", "counting the GPUs", error)) return code;
  if (ordinal < 0 || ordinal >= count) {
    return fail(error, EPT_E_INVALID, "cuda", -1, "there is no CUDA device %d; this process sees %d", ordinal, count);
  }
  static std::mutex mutex;
  static std::vector<std::weak_ptr<Primary>> alive;
  std::lock_guard hold(mutex);
  if (alive.size() < static_cast<size_t>(count)) alive.resize(static_cast<size_t>(count));
  if ((*primary = alive[static_cast<size_t>(ordinal)].lock())) return EPT_OK;
  Device device = 0;
  Context context = nullptr;
  if (int32_t code = checked(d->cuDeviceGet(&device, ordinal), "cuda", "naming the GPU", error)) return code;
  if (int32_t code = checked(d->cuDevicePrimaryCtxRetain(&context, device), "cuda",
                             "retaining the GPU's primary context", error)) {
    return code;
  }
  primary->reset(new Primary(*d, ordinal, device, context));
  alive[static_cast<size_t>(ordinal)] = *primary;
  return EPT_OK;
}

// The driver may be gone already where a process ends with this alive: then it answers with an error, and that is all.
Primary::~Primary() { (void)driver_.cuDevicePrimaryCtxRelease(device_); }

int Primary::attribute(Attribute which) const {
  int value = 0;
  return driver_.cuDeviceGetAttribute(&value, which, device_) == kSuccess ? value : 0;
}

}  // namespace ept::cuda
