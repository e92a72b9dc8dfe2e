// SPDX-License-Identifier: Apache-2.0
#include "registration.h"

#include <rdma/fi_errno.h>

namespace libfabric {
namespace {

// What headers of 1.17 do not have yet, as 1.20 and later lay it out.
constexpr uint64_t kMrDmabuf = uint64_t{1} << 40;  // FI_MR_DMABUF
constexpr uint32_t kDmabufSince = FI_VERSION(1, 20);

struct Dmabuf {  // struct fi_mr_dmabuf
  int fd;
  uint64_t offset;  // of the range, from what the descriptor begins with
  size_t length;
  void *base;  // the address of what the descriptor begins with
};
static_assert(sizeof(Dmabuf) == 32);

// Later releases have a longer fi_mr_attr. They look at the version that was asked for before they read what it adds;
// zeros are there all the same.
struct Attributes {
  fi_mr_attr now{};
  uint64_t later[8]{};
};

// That this way is not to be had here, rather than that there is no room or the range is wrong.
bool is_no_dmabuf(int status) {
  return status == -FI_EOPNOTSUPP || status == -FI_ENOSYS || status == -FI_EINVAL || status == -FI_EBADFLAGS ||
         status == -FI_EFAULT;
}

int finish(Rail *rail, fid_mr **mr) {
  if ((rail->info->domain_attr->mr_mode & FI_MR_ENDPOINT) == 0) return 0;
  int status = fi_mr_bind(*mr, &rail->ep->fid, 0);
  if (status == 0) status = fi_mr_enable(*mr);
  if (status != 0) fi_close(&(*mr)->fid);
  return status;
}

}  // namespace

int32_t memory_kinds(bool gpu, uint32_t version) {
  int32_t kinds = EPT_MEMORY_HOST | EPT_MEMORY_PINNED | EPT_MEMORY_SHM;
  if (gpu) kinds |= EPT_MEMORY_CUDA;
  if (gpu && version >= kDmabufSince) kinds |= EPT_MEMORY_DMABUF;
  return kinds;
}

int32_t register_range(Library &library, Rail *rail, const ept_memory &memory, uint8_t *address, uint64_t length,
                       uint64_t access, uint64_t key, fid_mr **mr) {
  iovec range{address, length};
  Attributes attributes;
  fi_mr_attr &asked = attributes.now;
  asked.mr_iov = &range;
  asked.iov_count = 1;
  asked.access = access;
  asked.requested_key = key;
  asked.iface = FI_HMEM_SYSTEM;
  const bool dmabuf = memory.kind == EPT_MEMORY_DMABUF;
  if (dmabuf || memory.kind == EPT_MEMORY_CUDA) {
    asked.iface = FI_HMEM_CUDA;
    asked.device.cuda = memory.cuda_device;
  }
  int status = -FI_EOPNOTSUPP;
  if (dmabuf) {
    auto *begin = static_cast<uint8_t *>(memory.address);
    Dmabuf buffer{memory.fd, memory.fd_offset + static_cast<uint64_t>(address - begin), length,
                  begin - memory.fd_offset};
    asked.mr_iov = reinterpret_cast<const iovec *>(&buffer);  // a union, from 1.20 on
    status = fi_mr_regattr(rail->domain.get(), &asked, kMrDmabuf, mr);
    asked.mr_iov = &range;
  }
  if (!dmabuf || is_no_dmabuf(status)) status = fi_mr_regattr(rail->domain.get(), &asked, 0, mr);
  if (status == 0) status = finish(rail, mr);
  if (status != 0) {
    *mr = nullptr;
    const bool room = status == -FI_ENOMEM || status == -FI_EAGAIN || status == -FI_ENOSPC;
    return fail(room ? EPT_E_NOMEM : EPT_E_IO, "mem_register", -1, -status,
                "libfabric: registering %llu bytes at %p with %s failed: %s (%d)%s",
                static_cast<unsigned long long>(length), static_cast<void *>(address), rail->info->domain_attr->name,
                library.strerror(-status), -status,
                room ? "; raise the limit of locked memory (ulimit -l unlimited)" : "");
  }
  return EPT_OK;
}

}  // namespace libfabric
