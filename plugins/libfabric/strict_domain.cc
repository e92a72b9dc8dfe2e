// SPDX-License-Identifier: Apache-2.0
//
// strict_domain.cc: domain, memory, address vector and event queue of the shim.
#include <netinet/in.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>

#include "strict_objects.h"

namespace libfabric::strict {
namespace {

constexpr size_t kLongestAddress = 256;

int close_domain(fid *object) {
  Domain *domain = as_domain(object);
  if (domain->open > 0) return -FI_EBUSY;
  const int code = fi_close(&domain->real->fid);
  if (code == 0) delete domain;
  return code;
}

// ---- memory
//
// Keys are the shim's, addresses are virtual. A provider whose addresses are offsets lets its user choose 64-bit keys,
// so the key that we choose there carries where the memory begins, and whoever writes with it takes that off again: no
// table, and it works between processes. 47 bits hold an address of user space; 17 are left to tell registrations of
// the same memory apart.
constexpr int kBaseBits = 47;
constexpr uint64_t kBaseMask = (uint64_t{1} << kBaseBits) - 1;

bool is_mapped(const void *buffer, size_t length) {
  if (length == 0) return true;
  const uint64_t page = static_cast<uint64_t>(sysconf(_SC_PAGESIZE));
  const uint64_t begin = reinterpret_cast<uint64_t>(buffer) / page * page;
  const uint64_t end = reinterpret_cast<uint64_t>(buffer) + length;
  std::vector<unsigned char> pages((end - begin + page - 1) / page);
  return mincore(reinterpret_cast<void *>(begin), end - begin, pages.data()) == 0;
}

int close_mr(fid *object) {
  Mr *mr = as<Mr, fid_mr>(object);
  Domain *domain = mr->domain;
  std::lock_guard hold(domain->lock);
  // What still waits in a window would read it: the device says so of each (bad local key).
  for (Ep *ep : domain->endpoints) {
    for (Op *op : ep->window) {
      if (std::find(op->mrs.begin(), op->mrs.end(), mr) == op->mrs.end()) continue;
      domain->shared->refuse(Deed::kMemoryGone, "memory was deregistered while an operation that uses it is under way");
      op->fails = device_error(5);
      op->lands = false;
      op->mrs.clear();
    }
  }
  const int code = fi_close(&mr->real->fid);
  if (code != 0) return code;
  domain->mrs.erase(mr);
  domain->open--;
  delete mr;
  return 0;
}

// A provider whose registrations are an endpoint's (FI_MR_ENDPOINT).
int bind_mr(fid *object, fid *other, uint64_t flags) {
  if (other->fclass != FI_CLASS_EP) return -FI_ENOSYS;
  return fi_mr_bind(as<Mr, fid_mr>(object)->real, &as<Ep, fid_ep>(other)->real->fid, flags);
}

int control_mr(fid *object, int command, void *argument) {
  Mr *mr = as<Mr, fid_mr>(object);
  const int code = fi_control(&mr->real->fid, command, argument);
  mr->key = fi_mr_key(mr->real);
  return code;
}

int regattr(fid *object, const fi_mr_attr *attr, uint64_t flags, fid_mr **out) {
  static fi_ops ops = {sizeof ops, close_mr, bind_mr, control_mr, no_ops, nullptr, nullptr};
  Domain *domain = as_domain(object);
  if (attr->iov_count != 1) return -FI_EINVAL;
  if (flags & FI_RMA_EVENT) return domain->shared->refuse(Deed::kFlags, "memory was registered with FI_RMA_EVENT");
  const iovec &range = *attr->mr_iov;
  if (flags == 0 && attr->iface == FI_HMEM_SYSTEM && !is_mapped(range.iov_base, range.iov_len))
    return domain->shared->refuse(Deed::kUnmapped, "memory that isn't mapped was registered (FI_MR_ALLOCATED)");
  std::lock_guard hold(domain->lock);
  fi_mr_attr real_attr = *attr;
  const bool ours = !(domain->real_mr_mode & FI_MR_PROV_KEY);
  if (ours)
    real_attr.requested_key = ++domain->keys << kBaseBits | (reinterpret_cast<uint64_t>(range.iov_base) & kBaseMask);
  if (!ours && !(domain->real_mr_mode & FI_MR_VIRT_ADDR)) return -FI_ENOSYS;  // such a provider isn't known
  fid_mr *real = nullptr;
  const int code = fi_mr_regattr(domain->real, &real_attr, flags, &real);
  if (code != 0) return code;
  Mr *mr = new Mr{};
  mr->fid = {FI_CLASS_MR, attr->context, &ops};
  mr->mem_desc = mr;
  mr->key = fi_mr_key(real);
  mr->domain = domain;
  mr->real = real;
  mr->base = static_cast<const char *>(range.iov_base);
  mr->length = range.iov_len;
  domain->mrs.insert(mr);
  domain->open++;
  *out = mr;
  return 0;
}

int regv(fid *object, const iovec *iov, size_t count, uint64_t access, uint64_t offset, uint64_t key, uint64_t flags,
         fid_mr **out, void *context) {
  fi_mr_attr attr = {};
  attr.mr_iov = iov;
  attr.iov_count = count;
  attr.access = access;
  attr.offset = offset;
  attr.requested_key = key;
  attr.context = context;
  return regattr(object, &attr, flags, out);
}

int reg(fid *object, const void *buffer, size_t length, uint64_t access, uint64_t offset, uint64_t key, uint64_t flags,
        fid_mr **out, void *context) {
  const iovec iov = {const_cast<void *>(buffer), length};
  return regv(object, &iov, 1, access, offset, key, flags, out, context);
}

// ---- addresses

int close_av(fid *object) {
  Av *av = as<Av, fid_av>(object);
  std::lock_guard hold(av->domain->lock);
  const int code = fi_close(&av->real->fid);
  if (code != 0) return code;
  av->domain->open--;
  delete av;
  return 0;
}

int insert(fid_av *object, const void *addresses, size_t count, fi_addr_t *out, uint64_t flags, void *context) {
  Av *av = static_cast<Av *>(object);
  std::lock_guard hold(av->domain->lock);
  std::vector<fi_addr_t> list(count, FI_ADDR_NOTAVAIL);
  const int code = fi_av_insert(av->real, addresses, count, list.data(), flags, context);
  for (size_t i = 0; i < count; i++) {
    if (out != nullptr) out[i] = list[i];
    char bytes[kLongestAddress];
    size_t length = sizeof bytes;
    if (list[i] == FI_ADDR_NOTAVAIL || fi_av_lookup(av->real, list[i], bytes, &length) != 0) continue;
    const std::string key = address_key(av->domain->address_format, bytes, length);
    av->addresses[list[i]] = key;
    av->known->learn(key);
  }
  return code;
}

int remove(fid_av *object, fi_addr_t *list, size_t count, uint64_t flags) {
  Av *av = static_cast<Av *>(object);
  std::lock_guard hold(av->domain->lock);
  for (size_t i = 0; i < count; i++) {
    const auto found = av->addresses.find(list[i]);
    if (found == av->addresses.end()) continue;
    av->known->forget(found->second);
    av->addresses.erase(found);
  }
  return fi_av_remove(av->real, list, count, flags);
}

int lookup(fid_av *object, fi_addr_t address, void *out, size_t *length) {
  return fi_av_lookup(static_cast<Av *>(object)->real, address, out, length);
}

const char *straddr(fid_av *object, const void *address, char *text, size_t *length) {
  return fi_av_straddr(static_cast<Av *>(object)->real, address, text, length);
}

// ---- events

int close_eq(fid *object) {
  Eq *eq = as<Eq, fid_eq>(object);
  const int code = fi_close(&eq->real->fid);
  if (code == 0) delete eq;
  return code;
}

int eq_control(fid *object, int command, void *argument) {
  return fi_control(&as<Eq, fid_eq>(object)->real->fid, command, argument);
}

ssize_t eq_read(fid_eq *object, uint32_t *event, void *buffer, size_t length, uint64_t flags) {
  Eq *eq = static_cast<Eq *>(object);
  std::lock_guard hold(eq->lock);
  if (!eq->errors.empty()) return -FI_EAVAIL;
  return fi_eq_read(eq->real, event, buffer, length, flags);
}

ssize_t eq_readerr(fid_eq *object, fi_eq_err_entry *entry, uint64_t flags) {
  Eq *eq = static_cast<Eq *>(object);
  std::lock_guard hold(eq->lock);
  if (eq->errors.empty()) return fi_eq_readerr(eq->real, entry, flags);
  *entry = eq->errors.front();
  eq->errors.pop_front();
  return sizeof *entry;
}

const char *eq_strerror(fid_eq *object, int number, const void *data, char *text, size_t length) {
  if (const DeviceError *error = device_error(number)) return error->words;
  return fi_eq_strerror(static_cast<Eq *>(object)->real, number, data, text, length);
}

}  // namespace

uint64_t base_of_key(uint64_t key) { return key & kBaseMask; }

fi_ops_mr memory_table = {sizeof memory_table, reg, regv, regattr};

std::string address_key(uint32_t format, const void *address, size_t length) {
  const char *bytes = static_cast<const char *>(address);
  if (format == FI_ADDR_STR) return std::string(bytes, strnlen(bytes, length));
  // Of a socket's address only family, port and host count; the rest is padding, scope and flow.
  if (length >= sizeof(sockaddr_in) &&
      (format == FI_SOCKADDR_IN || format == FI_SOCKADDR || format == FI_SOCKADDR_IN6)) {
    sockaddr_in four;
    memcpy(&four, address, sizeof four);
    if (four.sin_family == AF_INET) return "4:" + std::string(bytes + 2, 6);
    sockaddr_in6 six;
    if (length >= sizeof six) {
      memcpy(&six, address, sizeof six);
      return "6:" + std::string(bytes + 2, 2) + std::string(reinterpret_cast<const char *>(&six.sin6_addr), 16);
    }
  }
  return std::string(bytes, length);
}

int open_av(fid_domain *object, fi_av_attr *attr, fid_av **out, void *context) {
  static fi_ops ops = {sizeof ops, close_av, no_bind, no_control, no_ops, nullptr, nullptr};
  static fi_ops_av table = {sizeof table, insert, nullptr, nullptr, remove, lookup, straddr, nullptr};
  Domain *domain = static_cast<Domain *>(object);
  if (attr->flags & FI_EVENT) return -FI_ENOSYS;
  std::lock_guard hold(domain->lock);
  fid_av *real = nullptr;
  const int code = fi_av_open(domain->real, attr, &real, nullptr);
  if (code != 0) return code;
  Av *av = new Av{};
  av->fid = {FI_CLASS_AV, context, &ops};
  av->ops = &table;
  av->domain = domain;
  av->real = real;
  av->known = std::make_shared<Known>();
  domain->open++;
  *out = av;
  return 0;
}

int open_eq(Fabric *fabric, fi_eq_attr *attr, fid_eq **out, void *context) {
  static fi_ops ops = {sizeof ops, close_eq, no_bind, eq_control, no_ops, nullptr, nullptr};
  static fi_ops_eq table = {sizeof table, eq_read, eq_readerr, nullptr, nullptr, eq_strerror};
  fid_eq *real = nullptr;
  const int code = fi_eq_open(fabric->real, attr, &real, nullptr);
  if (code != 0) return code;
  Eq *eq = new Eq{};
  eq->fid = {FI_CLASS_EQ, context, &ops};
  eq->ops = &table;
  eq->shared = fabric->shared;
  eq->real = real;
  *out = eq;
  return 0;
}

int open_domain(Fabric *fabric, fi_info *info, fid_domain **out, void *context) {
  static fi_ops ops = {sizeof ops, close_domain, no_bind, no_control, no_ops, nullptr, nullptr};
  static fi_ops_domain table = {sizeof table, open_av, open_cq, open_ep, nullptr, nullptr,
                                nullptr,      nullptr, nullptr, nullptr, nullptr, nullptr};
  fi_info *real_info = fabric->shared->restored(info);
  if (real_info == nullptr) return -FI_EINVAL;
  fid_domain *real = nullptr;
  const int code = fi_domain(fabric->real, real_info, &real, nullptr);
  if (code == 0) {
    Domain *domain = new Domain{};
    domain->fid = {FI_CLASS_DOMAIN, context, &ops};
    domain->ops = &table;
    domain->mr = &memory_table;
    domain->shared = fabric->shared;
    domain->real = real;
    domain->real_mr_mode = real_info->domain_attr->mr_mode;
    domain->address_format = info->addr_format;
    *out = domain;
  }
  fabric->shared->inner->freeinfo(real_info);
  return code;
}

}  // namespace libfabric::strict
