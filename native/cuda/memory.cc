// SPDX-License-Identifier: Apache-2.0
#include "cuda/memory.h"

#include <sys/random.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cstring>
#include <mutex>

#include "engine/boot.h"
#include "engine/error.h"

namespace ept::cuda {

namespace {

constexpr uint64_t kGranule = 2 << 20;
constexpr uint32_t kMagic = 0x4d475045;  // "EPGM"
constexpr uint32_t kVersion = 2;
// A peer answers from a thread that waits for nothing else; a machine whose cores are all busy takes its time.
constexpr uint64_t kAnswers = 60'000'000'000;

struct Blob {
  uint32_t magic, version;
  char boot[40];        // of the machine's kernel: IPC handles mean nothing elsewhere
  uint64_t process[2];  // drawn when the process first needs it; a pid may be another's by now
  uint64_t address, bytes;
  uint32_t sharing, reserved;  // ipc or descriptors
  uint64_t offset;             // IPC: of the memory in the allocation that the handle names
  IpcHandle handle;
  HandoverTicket ticket;
};

std::array<char, 40> boot() {
  std::array<char, 40> id{};
  boot_id().copy(id.data(), id.size() - 1);  // empty: all processes are taken for the same machine's
  return id;
}

// A forked child draws its own.
struct Process {
  uint64_t id[2];
  pid_t pid;
};
Process draw() {
  Process drawn{{0, 0}, getpid()};
  if (getrandom(drawn.id, sizeof drawn.id, 0) != sizeof drawn.id) drawn.id[0] = uint64_t(drawn.pid);
  return drawn;
}
Process this_process() {
  static std::mutex mutex;
  std::lock_guard hold(mutex);
  static Process drawn = draw();
  if (drawn.pid != getpid()) drawn = draw();
  return drawn;
}

std::string size_of(const char *what, uint64_t bytes) {
  return std::string(what) + " of " + std::to_string(bytes) + " bytes";
}

}  // namespace

int32_t home_of(const ept_caps &caps) {
  return caps.memory_kinds & (EPT_MEMORY_CUDA | EPT_MEMORY_DMABUF) ? EPT_MEMORY_CUDA : EPT_MEMORY_PINNED;
}

Described::~Described() {
  if (memory.kind == EPT_MEMORY_DMABUF && memory.fd >= 0) close(memory.fd);
}

int32_t DeviceMemory::allocate(std::shared_ptr<Primary> primary, uint64_t bytes, std::unique_ptr<DeviceMemory> *memory,
                               ept_error *error, Sharing sharing) {
  const Driver &d = primary->driver();
  Entered entered(*primary);
  const uint64_t rounded = (std::max<uint64_t>(bytes, 1) + kGranule - 1) / kGranule * kGranule;
  if (sharing != Sharing::descriptors) {
    Pointer address = 0;
    if (int32_t code =
            checked(d.cuMemAlloc(&address, rounded), "gpu_memory", size_of("GPU memory", rounded).c_str(), error)) {
      return code;
    }
    std::unique_ptr<DeviceMemory> made(new DeviceMemory(primary, address, rounded));
    IpcHandle handle;
    const bool shows =
        sharing == Sharing::ipc || !primary->has_virtual_memory() || d.cuIpcGetMemHandle(&handle, address) == kSuccess;
    if (shows) {
      if (int32_t code = made->zero(error)) return code;
      *memory = std::move(made);
      return EPT_OK;
    }
  }
  std::unique_ptr<VirtualMemory> of;
  if (int32_t code = VirtualMemory::create(primary, rounded, &of, error)) return code;
  std::unique_ptr<DeviceMemory> made(new DeviceMemory(primary, of->address(), of->bytes()));
  made->virtual_ = std::move(of);
  if (int32_t code = made->zero(error)) return code;
  *memory = std::move(made);
  return EPT_OK;
}

// On a stream of its own: waiting for the whole context would wait for kernels of other ranks of this process, which
// may wait for this one.
int32_t DeviceMemory::zero(ept_error *error) const {
  const Driver &d = primary_->driver();
  Stream stream = nullptr;
  Result zeroed = d.cuStreamCreate(&stream, kStreamNonBlocking);
  if (zeroed == kSuccess) {
    zeroed = d.cuMemsetD8Async(address_, 0, bytes_, stream);
    if (zeroed == kSuccess) zeroed = d.cuStreamSynchronize(stream);
    (void)d.cuStreamDestroy(stream);
  }
  return checked(zeroed, "gpu_memory", "zeroing GPU memory", error);
}

DeviceMemory::~DeviceMemory() {
  if (virtual_) return;
  Entered entered(*primary_);
  (void)primary_->driver().cuMemFree(address_);
}

int32_t DeviceMemory::blob(std::string *out, ept_error *error) {
  const Driver &d = primary_->driver();
  Entered entered(*primary_);
  Blob blob{};
  blob.magic = kMagic;
  blob.version = kVersion;
  std::memcpy(blob.boot, boot().data(), sizeof blob.boot);
  const Process here = this_process();
  std::memcpy(blob.process, here.id, sizeof blob.process);
  blob.address = address_;
  blob.bytes = bytes_;
  blob.sharing = uint32_t(sharing());
  if (virtual_) {
    if (!handover_) {
      int descriptor = -1;
      if (int32_t code = virtual_->descriptor(&descriptor, error)) return code;
      if (int32_t code = Handover::open(descriptor, &handover_, error)) return code;
    }
    blob.ticket = handover_->ticket();
  } else {
    Pointer base = 0;
    size_t whole = 0;
    if (int32_t code = checked(d.cuMemGetAddressRange(&base, &whole, address_), "gpu_memory",
                               "finding the allocation of GPU memory", error)) {
      return code;
    }
    blob.offset = address_ - base;
    if (int32_t code = checked(d.cuIpcGetMemHandle(&blob.handle, address_), "gpu_memory",
                               "exporting GPU memory to other processes (CUDA IPC; EPT_GPU_SHARE=descriptors takes "
                               "another way)",
                               error)) {
      return code;
    }
  }
  out->assign(reinterpret_cast<const char *>(&blob), sizeof blob);
  return EPT_OK;
}

int32_t DeviceMemory::describe(const ept_caps &caps, Described *out, ept_error *error) const {
  const Driver &d = primary_->driver();
  const bool has_dmabuf = d.cuMemGetHandleForAddressRange && primary_->attribute(kDmabufSupported);
  out->memory = {};
  out->memory.size = sizeof out->memory;
  out->memory.address = reinterpret_cast<void *>(address_);
  out->memory.length = bytes_;
  out->memory.cuda_device = primary_->ordinal();
  out->memory.fd = -1;
  out->memory.role = EPT_ROLE_DATA;
  out->memory.access = EPT_ACCESS_LOCAL | EPT_ACCESS_REMOTE_WRITE;
  if (caps.memory_kinds & EPT_MEMORY_DMABUF && has_dmabuf) {
    Entered entered(*primary_);
    int fd = -1;
    if (int32_t code = checked(d.cuMemGetHandleForAddressRange(&fd, address_, bytes_, kHandleDmabuf, 0), "gpu_memory",
                               "showing GPU memory to a NIC as a dmabuf", error)) {
      return code;
    }
    out->memory.kind = EPT_MEMORY_DMABUF;
    out->memory.fd = fd;
    return EPT_OK;
  }
  if (caps.memory_kinds & EPT_MEMORY_CUDA) {
    out->memory.kind = EPT_MEMORY_CUDA;
    return EPT_OK;
  }
  if (caps.memory_kinds & EPT_MEMORY_DMABUF) {
    return fail(error, EPT_E_UNSUPPORTED, "gpu_memory", -1,
                "the backend takes GPU memory as a dmabuf, and this driver gives none (it takes Linux 5.12, a driver "
                "of R515 with open kernel modules or later): rows go through pinned host memory instead");
  }
  return fail(error, EPT_E_UNSUPPORTED, "gpu_memory", -1,
              "the backend takes no GPU memory (kinds of mask %u): rows go through pinned host memory",
              caps.memory_kinds);
}

int32_t MappedMemory::open(std::shared_ptr<Primary> primary, const std::string &text,
                           std::unique_ptr<MappedMemory> *memory, ept_error *error) {
  Blob blob;
  if (text.size() != sizeof blob) {
    return fail(error, EPT_E_INVALID, "gpu_memory", -1, "a blob of GPU memory has %zu bytes, not %zu", sizeof blob,
                text.size());
  }
  std::memcpy(&blob, text.data(), sizeof blob);
  if (blob.magic != kMagic) return fail(error, EPT_E_INVALID, "gpu_memory", -1, "this is no blob of GPU memory");
  if (blob.version != kVersion) {
    return fail(error, EPT_E_VERSION, "gpu_memory", -1, "the blob is of version %u, this library reads %u",
                blob.version, kVersion);
  }
  if (std::memcmp(blob.boot, boot().data(), sizeof blob.boot) != 0) {
    return fail(error, EPT_E_UNSUPPORTED, "gpu_memory", -1,
                "the GPU memory is of another machine: it can be reached through a network only");
  }
  std::unique_ptr<MappedMemory> made(new MappedMemory);
  made->primary_ = std::move(primary);
  made->bytes_ = blob.bytes;
  const Process here = this_process();
  if (std::memcmp(blob.process, here.id, sizeof blob.process) == 0) {
    made->address_ = blob.address;
  } else if (blob.sharing == uint32_t(Sharing::descriptors)) {
    int descriptor = -1;
    if (int32_t code = take_over(blob.ticket, kAnswers, &descriptor, error)) return code;
    const int32_t code = VirtualMemory::import(made->primary_, descriptor, blob.bytes, &made->virtual_, error);
    close(descriptor);
    if (code) return code;
    made->address_ = made->virtual_->address();
  } else {
    Entered entered(*made->primary_);
    if (int32_t code = checked(
            made->primary_->driver().cuIpcOpenMemHandle(&made->opened_, blob.handle, kIpcLazyPeerAccess), "gpu_memory",
            "mapping a peer's GPU memory (CUDA IPC; EPT_GPU_SHARE=descriptors on all ranks takes another way)",
            error)) {
      return code;
    }
    made->address_ = made->opened_ + blob.offset;
  }
  *memory = std::move(made);
  return EPT_OK;
}

MappedMemory::~MappedMemory() {
  if (!opened_) return;
  Entered entered(*primary_);
  (void)primary_->driver().cuIpcCloseMemHandle(opened_);
}

int32_t PinnedMemory::allocate(std::shared_ptr<Primary> primary, uint64_t bytes, std::unique_ptr<PinnedMemory> *memory,
                               ept_error *error) {
  const Driver &d = primary->driver();
  Entered entered(*primary);
  void *host = nullptr;
  if (int32_t code = checked(d.cuMemHostAlloc(&host, bytes, kHostPortable | kHostMapped), "pinned_memory",
                             size_of("pinned host memory", bytes).c_str(), error)) {
    return code;
  }
  Pointer address = 0;
  if (int32_t code = checked(d.cuMemHostGetDevicePointer(&address, host, 0), "pinned_memory",
                             "showing pinned memory to the GPU", error)) {
    (void)d.cuMemFreeHost(host);
    return code;
  }
  std::memset(host, 0, bytes);
  memory->reset(new PinnedMemory(std::move(primary), host, address, bytes));
  return EPT_OK;
}

PinnedMemory::~PinnedMemory() {
  Entered entered(*primary_);
  (void)primary_->driver().cuMemFreeHost(host_);
}

int32_t PinnedRange::pin(std::shared_ptr<Primary> primary, void *host, uint64_t bytes,
                         std::unique_ptr<PinnedRange> *range, ept_error *error) {
  const Driver &d = primary->driver();
  Entered entered(*primary);
  if (int32_t code = checked(d.cuMemHostRegister(host, bytes, kHostPortable | kHostMapped), "pinned_memory",
                             (size_of("pinning host memory", bytes) + " (see ulimit -l)").c_str(), error)) {
    return code;
  }
  Pointer address = 0;
  if (int32_t code = checked(d.cuMemHostGetDevicePointer(&address, host, 0), "pinned_memory",
                             "showing pinned memory to the GPU", error)) {
    (void)d.cuMemHostUnregister(host);
    return code;
  }
  range->reset(new PinnedRange(std::move(primary), host, address));
  return EPT_OK;
}

PinnedRange::~PinnedRange() {
  Entered entered(*primary_);
  (void)primary_->driver().cuMemHostUnregister(host_);
}

}  // namespace ept::cuda
