// SPDX-License-Identifier: Apache-2.0
#include "cuda/virtual.h"

#include <string>

#include "engine/error.h"

namespace ept::cuda {

namespace {

int32_t refused(ept_error *error) {
  return fail(error, EPT_E_UNSUPPORTED, "gpu_memory", -1,
              "GPU memory can't be shown to other processes by descriptors here: the driver or the GPU has no virtual "
              "memory management with POSIX descriptors (EPT_GPU_SHARE=ipc takes CUDA IPC)");
}

}  // namespace

int32_t VirtualMemory::create(std::shared_ptr<Primary> primary, uint64_t bytes, std::unique_ptr<VirtualMemory> *memory,
                              ept_error *error) {
  if (!primary->has_virtual_memory()) return refused(error);
  const Driver &d = primary->driver();
  Entered entered(*primary);
  AllocationOptions options{};
  options.type = kPinnedAllocation;
  options.handles = kDescriptor;
  options.location = {kOnDevice, primary->device()};
  options.flags.gpu_direct = primary->attribute(kGpuDirectVirtual) != 0;
  size_t granule = 0;
  if (int32_t code = checked(d.cuMemGetAllocationGranularity(&granule, &options, 0), "gpu_memory",
                             "asking for the granule of GPU memory", error)) {
    return code;
  }
  const uint64_t rounded = (bytes + granule - 1) / granule * granule;
  std::unique_ptr<VirtualMemory> made(new VirtualMemory(std::move(primary), rounded));
  const std::string what = "GPU memory of " + std::to_string(rounded) + " bytes";
  if (int32_t code =
          checked(d.cuMemCreate(&made->allocation_, rounded, &options, 0), "gpu_memory", what.c_str(), error))
    return code;
  made->has_ = true;
  if (int32_t code = made->map(error)) return code;
  *memory = std::move(made);
  return EPT_OK;
}

int32_t VirtualMemory::import(std::shared_ptr<Primary> primary, int descriptor, uint64_t bytes,
                              std::unique_ptr<VirtualMemory> *memory, ept_error *error) {
  if (!primary->has_virtual_memory()) return refused(error);
  const Driver &d = primary->driver();
  Entered entered(*primary);
  std::unique_ptr<VirtualMemory> made(new VirtualMemory(std::move(primary), bytes));
  void *const handle = reinterpret_cast<void *>(intptr_t(descriptor));
  if (int32_t code = checked(d.cuMemImportFromShareableHandle(&made->allocation_, handle, kDescriptor), "gpu_memory",
                             "taking a peer's GPU memory by its descriptor", error)) {
    return code;
  }
  made->has_ = true;
  if (int32_t code = made->map(error)) return code;
  *memory = std::move(made);
  return EPT_OK;
}

int32_t VirtualMemory::map(ept_error *error) {
  const Driver &d = primary_->driver();
  const auto want = [&](Result result, const char *what) { return checked(result, "gpu_memory", what, error); };
  if (int32_t code = want(d.cuMemAddressReserve(&address_, bytes_, 0, 0, 0), "reserving addresses for GPU memory"))
    return code;
  if (int32_t code = want(d.cuMemMap(address_, bytes_, 0, allocation_, 0), "mapping GPU memory")) return code;
  mapped_ = true;
  const AccessTo access = {{kOnDevice, primary_->device()}, kReadWrite};
  return want(d.cuMemSetAccess(address_, bytes_, &access, 1), "opening GPU memory to this GPU");
}

VirtualMemory::~VirtualMemory() {
  const Driver &d = primary_->driver();
  Entered entered(*primary_);
  if (mapped_) (void)d.cuMemUnmap(address_, bytes_);
  if (address_) (void)d.cuMemAddressFree(address_, bytes_);
  if (has_) (void)d.cuMemRelease(allocation_);
}

int32_t VirtualMemory::descriptor(int *out, ept_error *error) const {
  Entered entered(*primary_);
  return checked(primary_->driver().cuMemExportToShareableHandle(out, allocation_, kDescriptor, 0), "gpu_memory",
                 "exporting GPU memory to other processes (a descriptor)", error);
}

}  // namespace ept::cuda
