// SPDX-License-Identifier: Apache-2.0
//
// driver.h: CUDA's driver as this library uses it: opened at run time, declared here by ourselves (no header of CUDA's
// is needed to build), no cudart. Opening it makes no call and no context; a process that never shows a CUDA tensor
// never comes to driver().
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>

#include "eptransport/backend.h"

namespace ept::cuda {

// An entry point of libcuda.so.1, or of the library that EPT_CUDA_LIBRARY names (tests put a stand-in there). NULL:
// there is no driver, or it has no such entry. Makes no call and no context.
void *symbol(const char *name);

// As in cuda.h.
using Result = int;
using Device = int;
using Pointer = unsigned long long;  // CUdeviceptr
using Context = struct ContextOf *;
using ModuleHandle = struct ModuleOf *;
using Function = struct FunctionOf *;
using Stream = struct StreamOf *;
using Event = struct EventOf *;
struct IpcHandle {
  char bytes[64];
};
constexpr Result kSuccess = 0, kOutOfMemory = 2, kNoDevice = 100, kNotFound = 500, kNoBinary = 209, kNotReady = 600;

enum Attribute : int {  // CUdevice_attribute, those in use
  kMaxThreadsPerBlock = 1,
  kMultiprocessors = 16,
  kComputeMajor = 75,
  kComputeMinor = 76,
  kCanUseHostPointer = 91,  // of registered host memory: its device address is the host's
  kMaxSharedPerBlock = 97,  // with opt-in
  kHostPageTables = 100,    // it reaches the host over C2C (Grace), which what NICs write may not come by
  kGpuDirectVirtual = 110,  // NICs reach virtual memory too
  kWritesOrdering = 118,    // of GPUDirect RDMA: below kOwnerOrdering, kernels may see old bytes behind a signal
  kDmabufSupported = 124,
  kVirtualMemory = 102,
  kFileDescriptorHandles = 103,
};
enum FunctionAttribute : int { kFunctionRegisters = 4, kFunctionLocalBytes = 3, kMaxDynamicShared = 8 };
constexpr unsigned kHostPortable = 1, kHostMapped = 2;  // cuMemHostAlloc, cuMemHostRegister
constexpr unsigned kIpcLazyPeerAccess = 1;              // cuIpcOpenMemHandle
constexpr int kHandleDmabuf = 1;                        // cuMemGetHandleForAddressRange: the handle is an int
constexpr int kOwnerOrdering = 100;                     // CU_GPU_DIRECT_RDMA_WRITES_ORDERING_OWNER
constexpr int kPinnedAllocation = 1, kOnDevice = 1, kDescriptor = 1, kReadWrite = 3;  // of virtual memory
using Allocation = unsigned long long;                                                // CUmemGenericAllocationHandle
struct Location {                                                                     // CUmemLocation
  int type, id;
};
struct AllocationOptions {  // CUmemAllocationProp
  int type, handles;
  Location location;
  void *windows;
  struct {
    unsigned char compression, gpu_direct;
    unsigned short usage;
    unsigned char reserved[4];
  } flags;
};
static_assert(sizeof(AllocationOptions) == 32);
struct AccessTo {  // CUmemAccessDesc
  Location location;
  int flags;
};
constexpr unsigned kEventDisableTiming = 2, kStreamNonBlocking = 1;

// The table: one function pointer an entry, named as in cuda.h; where the driver's symbol has a version, driver.cc
// says.
struct Driver {
  Result (*cuInit)(unsigned flags);
  Result (*cuDriverGetVersion)(int *version);
  Result (*cuGetErrorName)(Result, const char **);
  Result (*cuGetErrorString)(Result, const char **);
  Result (*cuDeviceGet)(Device *, int ordinal);
  Result (*cuDeviceGetCount)(int *);
  Result (*cuDeviceGetName)(char *, int length, Device);
  Result (*cuDeviceGetUuid)(void *uuid16, Device);
  Result (*cuDeviceGetAttribute)(int *, int attribute, Device);
  Result (*cuDevicePrimaryCtxRetain)(Context *, Device);
  Result (*cuDevicePrimaryCtxRelease)(Device);
  Result (*cuCtxPushCurrent)(Context);
  Result (*cuCtxPopCurrent)(Context *);
  Result (*cuCtxGetCurrent)(Context *);
  Result (*cuCtxSynchronize)();
  Result (*cuModuleLoadData)(ModuleHandle *, const void *image);
  Result (*cuModuleUnload)(ModuleHandle);
  Result (*cuModuleGetFunction)(Function *, ModuleHandle, const char *name);
  Result (*cuFuncGetAttribute)(int *, int attribute, Function);
  Result (*cuFuncSetAttribute)(Function, int attribute, int value);
  Result (*cuOccupancyMaxActiveBlocksPerMultiprocessor)(int *blocks, Function, int threads, size_t shared);
  Result (*cuLaunchKernel)(Function, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz,
                           unsigned shared, Stream, void **arguments, void **extra);
  Result (*cuMemAlloc)(Pointer *, size_t);
  Result (*cuMemFree)(Pointer);
  Result (*cuMemGetAddressRange)(Pointer *base, size_t *bytes, Pointer);
  Result (*cuMemGetInfo)(size_t *free, size_t *total);
  Result (*cuMemHostAlloc)(void **, size_t, unsigned flags);
  Result (*cuMemFreeHost)(void *);
  Result (*cuMemHostRegister)(void *, size_t, unsigned flags);
  Result (*cuMemHostUnregister)(void *);
  Result (*cuMemHostGetDevicePointer)(Pointer *, void *, unsigned flags);
  Result (*cuMemcpyHtoD)(Pointer, const void *, size_t);
  Result (*cuMemcpyDtoH)(void *, Pointer, size_t);
  Result (*cuMemcpyHtoDAsync)(Pointer, const void *, size_t, Stream);
  Result (*cuMemcpyDtoHAsync)(void *, Pointer, size_t, Stream);
  Result (*cuMemcpyDtoDAsync)(Pointer, Pointer, size_t, Stream);
  Result (*cuMemsetD8)(Pointer, unsigned char, size_t);
  Result (*cuMemsetD8Async)(Pointer, unsigned char, size_t, Stream);
  Result (*cuIpcGetMemHandle)(IpcHandle *, Pointer);
  Result (*cuIpcOpenMemHandle)(Pointer *, IpcHandle, unsigned flags);
  Result (*cuIpcCloseMemHandle)(Pointer);
  Result (*cuStreamCreate)(Stream *, unsigned flags);
  Result (*cuStreamDestroy)(Stream);
  Result (*cuStreamSynchronize)(Stream);
  Result (*cuStreamQuery)(Stream);
  Result (*cuStreamIsCapturing)(Stream, int *status);
  Result (*cuEventCreate)(Event *, unsigned flags);
  Result (*cuEventDestroy)(Event);
  Result (*cuEventRecord)(Event, Stream);
  Result (*cuEventSynchronize)(Event);
  Result (*cuEventElapsedTime)(float *ms, Event begin, Event end);
  // NULL where the driver is too old for them.
  Result (*cuFuncLoad)(Function);
  Result (*cuMemGetHandleForAddressRange)(void *handle, Pointer, size_t, int type, unsigned long long flags);
  // Virtual memory (CUDA 10.2 and later); asked for by has_virtual_memory.
  Result (*cuMemGetAllocationGranularity)(size_t *, const AllocationOptions *, int option);
  Result (*cuMemCreate)(Allocation *, size_t, const AllocationOptions *, unsigned long long flags);
  Result (*cuMemRelease)(Allocation);
  Result (*cuMemAddressReserve)(Pointer *, size_t bytes, size_t alignment, Pointer where, unsigned long long flags);
  Result (*cuMemAddressFree)(Pointer, size_t);
  Result (*cuMemMap)(Pointer, size_t, size_t offset, Allocation, unsigned long long flags);
  Result (*cuMemUnmap)(Pointer, size_t);
  Result (*cuMemSetAccess)(Pointer, size_t, const AccessTo *, size_t count);
  Result (*cuMemExportToShareableHandle)(void *handle, Allocation, int type, unsigned long long flags);
  Result (*cuMemImportFromShareableHandle)(Allocation *, void *handle, int type);
};

// The driver, initialised. NULL: UNAVAILABLE, and `error` says what is missing and how to get it.
const Driver *driver(ept_error *error);

// OK, or an error whose sentence has CUDA's name for it: "what: CUDA_ERROR_... (its text)". Out of memory is NOMEM.
int32_t checked(Result result, const char *operation, const char *what, ept_error *error);

// A device's primary context, retained: the one that torch uses. One object a device and process is alive at a time.
class Primary {
 public:
  // INVALID: no such device.
  static int32_t open(int ordinal, std::shared_ptr<Primary> *primary, ept_error *error);
  ~Primary();
  Primary(const Primary &) = delete;
  Primary &operator=(const Primary &) = delete;

  const Driver &driver() const { return driver_; }
  int ordinal() const { return ordinal_; }
  Device device() const { return device_; }
  Context context() const { return context_; }
  int attribute(Attribute which) const;  // 0 where the driver doesn't know it
  // Memory of it can be given to other processes as a descriptor.
  bool has_virtual_memory() const {
    return driver_.cuMemCreate && driver_.cuMemImportFromShareableHandle && attribute(kVirtualMemory) &&
           attribute(kFileDescriptorHandles);
  }
  int capability() const { return attribute(kComputeMajor) * 10 + attribute(kComputeMinor); }

 private:
  Primary(const Driver &driver, int ordinal, Device device, Context context)
      : driver_(driver), ordinal_(ordinal), device_(device), context_(context) {}
  const Driver &driver_;
  const int ordinal_;
  const Device device_;
  const Context context_;
};

// Makes a primary context current for the calling thread while it lives. Allowed during a capture.
class Entered {
 public:
  explicit Entered(const Primary &primary) : driver_(primary.driver()) {
    entered_ = driver_.cuCtxPushCurrent(primary.context()) == kSuccess;
  }
  ~Entered() {
    Context context;
    if (entered_) (void)driver_.cuCtxPopCurrent(&context);
  }
  Entered(const Entered &) = delete;
  Entered &operator=(const Entered &) = delete;

 private:
  const Driver &driver_;
  bool entered_;
};

}  // namespace ept::cuda
