// SPDX-License-Identifier: Apache-2.0
//
// stand_in_driver.cc: a libcuda of one "GPU" whose memory is this machine's, for what the library does with memory
// where no GPU is: the loader's EPT_CUDA_LIBRARY names it. Memory is a memfd, so that other processes can map it: by
// IPC, through /proc of who made it; as virtual memory, by a descriptor. It has no kernels, and says so.
//
// STAND_IN_WITHOUT, words: ipc (no handle is given), virtual (no virtual memory), dmabuf, order (writes of NICs are not
// ordered for kernels), copies (every copy is refused).
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <atomic>
#include <map>
#include <mutex>

namespace {

using Pointer = unsigned long long;
constexpr int kOk = 0, kInvalid = 1, kOutOfMemory = 2, kNoBinary = 209, kNotSupported = 801;
constexpr size_t kGranule = 2 << 20;

bool without(const char *what) {
  const char *words = getenv("STAND_IN_WITHOUT");
  return words && strstr(words, what);
}
void *at(Pointer p) { return reinterpret_cast<void *>(uintptr_t(p)); }
Pointer number(const void *p) { return Pointer(reinterpret_cast<uintptr_t>(p)); }

struct Piece {
  size_t bytes;
  int fd;
};
std::mutex lock;
std::map<Pointer, Piece> pieces;          // of cuMemAlloc and IPC
std::map<unsigned long long, Piece> raw;  // allocations of virtual memory
unsigned long long next_raw = 1;
std::atomic<uint64_t> copied{0};
std::atomic<int64_t> alive{0};

struct Handle {  // in CUDA's 64 bytes
  int64_t pid, fd, bytes;
};

int map_new(Pointer *out, size_t bytes, int fd) {
  void *memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
  if (memory == MAP_FAILED) return kOutOfMemory;
  const std::lock_guard hold(lock);
  pieces[number(memory)] = {bytes, fd};
  alive++;
  *out = number(memory);
  return kOk;
}
int unmap(Pointer p) {
  const std::lock_guard hold(lock);
  const auto found = pieces.find(p);
  if (found == pieces.end()) return kInvalid;
  munmap(at(p), found->second.bytes);
  close(found->second.fd);
  pieces.erase(found);
  alive--;
  return kOk;
}
int file(size_t bytes) {
  const int fd = memfd_create("memory of a stand-in", MFD_CLOEXEC);
  if (fd >= 0 && ftruncate(fd, off_t(bytes))) abort();
  return fd;
}
int copy(void *to, const void *from, size_t bytes) {
  if (without("copies")) return 999;
  memcpy(to, from, bytes);
  copied += bytes;
  return kOk;
}

}  // namespace

extern "C" {
#define API __attribute__((visibility("default")))
// What tests ask: bytes copied so far, and allocations and mappings that nobody gave back.
API uint64_t stand_in_copied() { return copied; }
API int64_t stand_in_alive() { return alive; }

API int cuInit(unsigned) { return kOk; }
API int cuDriverGetVersion(int *v) { return *v = 12090, kOk; }
API int cuGetErrorName(int, const char **name) { return *name = "STAND_IN_ERROR", kOk; }
API int cuGetErrorString(int, const char **text) { return *text = "of a stand-in", kOk; }
API int cuDeviceGet(int *d, int) { return *d = 0, kOk; }
API int cuDeviceGetCount(int *n) { return *n = 1, kOk; }
API int cuDeviceGetName(char *name, int n, int) { return snprintf(name, size_t(n), "a stand-in"), kOk; }
API int cuDeviceGetUuid(void *id, int) { return memcpy(id, "stand-in of GPU", 16), kOk; }
API int cuDeviceGetAttribute(int *value, int which, int) {
  *value = 0;
  if (which == 75) *value = 9;
  if (which == 102 || which == 103) *value = !without("virtual");
  if (which == 118) *value = without("order") ? 0 : 100;
  if (which == 124) *value = !without("dmabuf");
  return kOk;
}
API int cuDevicePrimaryCtxRetain(void **c, int) { return *c = &pieces, kOk; }
API int cuDevicePrimaryCtxRelease_v2(int) { return kOk; }
API int cuCtxPushCurrent_v2(void *) { return kOk; }
API int cuCtxPopCurrent_v2(void **) { return kOk; }
API int cuCtxGetCurrent(void **c) { return *c = &pieces, kOk; }
API int cuCtxSynchronize() { return kOk; }
API int cuThreadExchangeStreamCaptureMode(int *mode) { return *mode = 0, kOk; }
API int cuModuleLoadData(void **, const void *) { return kNoBinary; }
API int cuModuleUnload(void *) { return kInvalid; }
API int cuModuleGetFunction(void **, void *, const char *) { return kInvalid; }
API int cuFuncGetAttribute(int *, int, void *) { return kInvalid; }
API int cuFuncSetAttribute(void *, int, int) { return kInvalid; }
API int cuOccupancyMaxActiveBlocksPerMultiprocessor(int *, void *, int, size_t) { return kInvalid; }
API int cuLaunchKernel(void *, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, void *, void **,
                       void **) {
  return kInvalid;
}
API int cuMemAlloc_v2(Pointer *p, size_t bytes) { return map_new(p, bytes, file(bytes)); }
API int cuMemFree_v2(Pointer p) { return unmap(p); }
API int cuMemGetAddressRange_v2(Pointer *base, size_t *bytes, Pointer p) {
  const std::lock_guard hold(lock);
  auto found = pieces.upper_bound(p);
  if (found == pieces.begin()) return kInvalid;
  --found;
  *base = found->first, *bytes = found->second.bytes;
  return kOk;
}
API int cuMemGetInfo_v2(size_t *a, size_t *b) { return *a = *b = 1 << 30, kOk; }
API int cuMemHostAlloc(void **p, size_t bytes, unsigned) {
  *p = aligned_alloc(4096, (bytes + 4095) / 4096 * 4096);
  if (*p) alive++;
  return *p ? kOk : kOutOfMemory;
}
API int cuMemFreeHost(void *p) { return free(p), alive--, kOk; }
API int cuMemHostRegister_v2(void *, size_t, unsigned) { return kOk; }
API int cuMemHostUnregister(void *) { return kOk; }
API int cuMemHostGetDevicePointer_v2(Pointer *to, void *from, unsigned) { return *to = number(from), kOk; }
API int cuMemcpyHtoD_v2(Pointer to, const void *from, size_t n) { return copy(at(to), from, n); }
API int cuMemcpyDtoH_v2(void *to, Pointer from, size_t n) { return copy(to, at(from), n); }
API int cuMemcpyHtoDAsync_v2(Pointer to, const void *from, size_t n, void *) { return copy(at(to), from, n); }
API int cuMemcpyDtoHAsync_v2(void *to, Pointer from, size_t n, void *) { return copy(to, at(from), n); }
API int cuMemcpyDtoDAsync_v2(Pointer to, Pointer from, size_t n, void *) { return copy(at(to), at(from), n); }
API int cuMemsetD8_v2(Pointer p, unsigned char v, size_t n) { return memset(at(p), v, n), kOk; }
API int cuMemsetD8Async(Pointer p, unsigned char v, size_t n, void *) { return memset(at(p), v, n), kOk; }
API int cuIpcGetMemHandle(char *out, Pointer p) {
  if (without("ipc")) return kNotSupported;
  const std::lock_guard hold(lock);
  const auto found = pieces.find(p);
  if (found == pieces.end()) return kInvalid;  // virtual memory, say
  const Handle handle = {getpid(), found->second.fd, int64_t(found->second.bytes)};
  memset(out, 0, 64);
  memcpy(out, &handle, sizeof handle);
  return kOk;
}
struct IpcHandle {
  char bytes[64];
};
API int cuIpcOpenMemHandle_v2(Pointer *p, IpcHandle given, unsigned) {
  Handle handle;
  memcpy(&handle, given.bytes, sizeof handle);
  char path[64];
  snprintf(path, sizeof path, "/proc/%lld/fd/%lld", static_cast<long long>(handle.pid),
           static_cast<long long>(handle.fd));
  const int fd = open(path, O_RDWR | O_CLOEXEC);
  return fd < 0 ? kInvalid : map_new(p, size_t(handle.bytes), fd);
}
API int cuIpcCloseMemHandle(Pointer p) { return unmap(p); }
API int cuStreamCreate(void **s, unsigned) { return *s = &raw, kOk; }
API int cuStreamDestroy_v2(void *) { return kOk; }
API int cuStreamSynchronize(void *) { return kOk; }
API int cuStreamQuery(void *) { return kOk; }
API int cuStreamIsCapturing(void *, int *status) { return *status = 0, kOk; }
API int cuEventCreate(void **e, unsigned) { return *e = &raw, kOk; }
API int cuEventDestroy_v2(void *) { return kOk; }
API int cuEventRecord(void *, void *) { return kOk; }
API int cuEventSynchronize(void *) { return kOk; }
API int cuEventElapsedTime(float *ms, void *, void *) { return *ms = 0, kOk; }
API int cuMemGetHandleForAddressRange(int *fd, Pointer p, size_t, int, unsigned long long) {
  Pointer base = 0;
  size_t bytes = 0;
  if (cuMemGetAddressRange_v2(&base, &bytes, p)) return kInvalid;
  const std::lock_guard hold(lock);
  *fd = fcntl(pieces[base].fd, F_DUPFD_CLOEXEC, 0);
  return kOk;
}
// Virtual memory.
API int cuMemGetAllocationGranularity(size_t *out, const void *, int) { return *out = kGranule, kOk; }
API int cuMemCreate(unsigned long long *out, size_t bytes, const int *options, unsigned long long) {
  if (options[0] != 1 || options[1] != 1 || options[2] != 1 || bytes % kGranule) return kInvalid;
  const std::lock_guard hold(lock);
  raw[ *out = next_raw++] = {bytes, file(bytes)};
  alive++;
  return kOk;
}
API int cuMemRelease(unsigned long long handle) {
  const std::lock_guard hold(lock);
  close(raw.at(handle).fd);
  raw.erase(handle);
  alive--;
  return kOk;
}
API int cuMemAddressReserve(Pointer *out, size_t bytes, size_t, Pointer, unsigned long long) {
  void *p = mmap(nullptr, bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (p == MAP_FAILED) return kOutOfMemory;
  alive++;
  return *out = number(p), kOk;
}
API int cuMemAddressFree(Pointer p, size_t bytes) { return munmap(at(p), bytes), alive--, kOk; }
API int cuMemMap(Pointer p, size_t bytes, size_t, unsigned long long handle, unsigned long long) {
  const std::lock_guard hold(lock);
  if (raw.at(handle).bytes != bytes) return kInvalid;
  // No access until it is set.
  return mmap(at(p), bytes, PROT_NONE, MAP_SHARED | MAP_FIXED, raw.at(handle).fd, 0) == MAP_FAILED ? kOutOfMemory : kOk;
}
API int cuMemUnmap(Pointer p, size_t bytes) {
  mmap(at(p), bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED, -1, 0);
  return kOk;
}
API int cuMemSetAccess(Pointer p, size_t bytes, const int *access, size_t count) {
  if (count != 1 || access[0] != 1 || access[2] != 3) return kInvalid;
  return mprotect(at(p), bytes, PROT_READ | PROT_WRITE) ? kInvalid : kOk;
}
API int cuMemExportToShareableHandle(int *fd, unsigned long long handle, int type, unsigned long long) {
  if (type != 1) return kInvalid;
  const std::lock_guard hold(lock);
  *fd = fcntl(raw.at(handle).fd, F_DUPFD_CLOEXEC, 0);
  return kOk;
}
API int cuMemImportFromShareableHandle(unsigned long long *out, void *given, int type) {
  struct stat about{};
  const int fd = fcntl(int(reinterpret_cast<intptr_t>(given)), F_DUPFD_CLOEXEC, 0);
  if (type != 1 || fd < 0 || fstat(fd, &about) || about.st_size == 0) {
    if (fd >= 0) close(fd);
    return kInvalid;
  }
  const std::lock_guard hold(lock);
  raw[ *out = next_raw++] = {size_t(about.st_size), fd};
  alive++;
  return kOk;
}
}
