// SPDX-License-Identifier: Apache-2.0
//
// The device half: joining, the heap's pieces, where kernels find a peer, the kernels themselves.
#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <unordered_map>

#include "images.h"
#include "instance.h"

using namespace nvshmem;

namespace {

constexpr int kMajor = 75, kMinor = 76;  // CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_

std::mutex pieces_lock;
std::unordered_map<const void *, std::unique_ptr<Piece>> pieces;
std::atomic<size_t> piece_count{0};  // mostly none is asked for

int32_t unavailable(const ept_instance *instance, const char *operation, const std::string &why) {
  return fail(EPT_E_UNAVAILABLE, operation, instance->rank, 0, "nvshmem: %s", why.c_str());
}

int64_t environment(const char *name) {
  const char *text = getenv(name);
  return text != nullptr && *text != 0 ? strtoll(text, nullptr, 10) : -1;
}

}  // namespace

bool nvshmem::is_piece(const void *object) {
  if (piece_count.load(std::memory_order_relaxed) == 0) return false;
  const std::lock_guard<std::mutex> lock(pieces_lock);
  return pieces.count(object) == 1;
}
Piece *nvshmem::make_piece(const Piece &piece) {
  auto made = std::make_unique<Piece>(piece);
  Piece *const at = made.get();
  const std::lock_guard<std::mutex> lock(pieces_lock);
  pieces[at] = std::move(made);
  piece_count = pieces.size();
  return at;
}
void nvshmem::drop_piece(const void *object) {
  const std::lock_guard<std::mutex> lock(pieces_lock);
  pieces.erase(object);
  piece_count = pieces.size();
}

// ---- joining ----

int32_t ept_instance::join(ept_join *join) {
  join->out_length = 0;
  join->done = 0;
  if (joined) {
    join->done = 1;
    return EPT_OK;
  }
  return join->round == 0 ? first_round(join) : second_round(join);
}

int32_t ept_instance::first_round(ept_join *join) {
  Session &session = Session::of_process();
  if (!session.claim(this))
    return fail(
        EPT_E_LIMIT, "join", rank, 0,
        "nvshmem: this process is a PE of another group that is open; close that one first, or run a process for "
        "each rank");
  claimed = true;
  Hello hello;
  hello.rank = rank;
  const int32_t release[] = {library->major, library->minor, library->patch};
  std::copy(release, release + 3, hello.library);
  std::copy(linked, linked + 3, hello.linked);
  hello.heap_bytes = settings.heap_bytes;
  hello.token = session.token();
  if (rank == 0 && hello.token == 0) {
    if (!settings.interface.empty()) setenv("NVSHMEM_BOOTSTRAP_UID_SOCK_IFNAME", settings.interface.c_str(), 0);
    hello.id.version = versioned<UniqueId>();
    if (const int code = library->get_uniqueid(&hello.id); code != 0)
      return unavailable(this, "join", format("nvshmemx_get_uniqueid answers %d", code));
  }
  if (join->out_capacity < sizeof hello)
    return fail(EPT_E_INVALID, "join", rank, 0, "nvshmem: %zu bytes for a blob of %zu", join->out_capacity,
                sizeof hello);
  memcpy(join->out, &hello, sizeof hello);
  join->out_length = sizeof hello;
  return EPT_OK;
}

int32_t ept_instance::second_round(ept_join *join) {
  Session &session = Session::of_process();
  std::string why;
  if (round == 0) {
    Hello first, own;
    for (uint32_t r = 0; r < world; ++r) {
      Hello its;
      if (join->lengths[r] != sizeof its)
        return fail(EPT_E_VERSION, "join", r, 0, "nvshmem: rank %u says %zu bytes; this version's are %zu", r,
                    join->lengths[r], sizeof its);
      memcpy(&its, join->blobs[r], sizeof its);
      if (its.magic != Hello::kMagic || its.version != own.version || its.rank != r)
        return fail(EPT_E_VERSION, "join", r, 0, "nvshmem: rank %u speaks version %u of the join; this is %u", r,
                    its.version, own.version);
      if (r == 0) first = its;
      if (memcmp(its.library, first.library, sizeof its.library) != 0)
        return fail(EPT_E_MISMATCH, "join", r, 0, "nvshmem: rank 0 has NVSHMEM %d.%d.%d and rank %u has %d.%d.%d",
                    first.library[0], first.library[1], first.library[2], r, its.library[0], its.library[1],
                    its.library[2]);
      if (memcmp(its.linked, first.linked, sizeof its.linked) != 0)
        return fail(EPT_E_MISMATCH, "join", r, 0,
                    "nvshmem: the kernels of rank 0 are linked with %d.%d.%d, those of rank %u with %d.%d.%d",
                    first.linked[0], first.linked[1], first.linked[2], r, its.linked[0], its.linked[1], its.linked[2]);
      if (its.heap_bytes != first.heap_bytes)
        return fail(EPT_E_MISMATCH, "join", r, 0,
                    "nvshmem: heap_mib is %llu on rank 0 and %llu on rank %u; it must be the same",
                    static_cast<unsigned long long>(first.heap_bytes >> 20),
                    static_cast<unsigned long long>(its.heap_bytes >> 20), r);
      if (its.token != first.token)
        return fail(EPT_E_MISMATCH, "join", r, 0,
                    "nvshmem: ranks 0 and %u are not of one earlier group, whose NVSHMEM one of them still has: a "
                    "process is one PE for good, so start all processes anew",
                    r);
    }
    if (first.token == 0) {
      Session::Plan plan{library, cuda, rank, world, -1, settings.heap_bytes, first.id};
      if (const int32_t code = choose_device(&plan.device); code != EPT_OK) return code;
      session.start(plan);
    } else if (session.plan().rank != rank || session.plan().ranks != world ||
               session.plan().heap_bytes != settings.heap_bytes) {
      return fail(
          EPT_E_MISMATCH, "join", rank, 0,
          "nvshmem: this process is PE %u of %u with a heap of %llu MiB since an earlier group, and can't become "
          "another: start the processes anew",
          session.plan().rank, session.plan().ranks, static_cast<unsigned long long>(session.plan().heap_bytes >> 20));
    }
    round = 1;
  }
  const int32_t code = session.poll(&why);
  if (code == EPT_LATER) return code;
  if (code != EPT_OK) return unavailable(this, "join", why);
  joined = true;
  join->done = 1;
  return EPT_OK;
}

// The device of this rank, before anybody has named one: NVSHMEM takes it for good.
int32_t ept_instance::choose_device(int *chosen) {
  int count = 0;
  if (const int code = cuda.init(0); code != 0 || cuda.device_count(&count) != 0 || count == 0)
    return unavailable(this, "join", format("there is no CUDA device here (%d)", code));
  int current = -1;
  if (settings.device >= 0)
    *chosen = settings.device;
  else if (cuda.context_device(&current) == 0)
    *chosen = current;
  else if (const int64_t local = environment("LOCAL_RANK"); local >= 0)
    *chosen = static_cast<int>(local % count);
  else
    *chosen = static_cast<int>(rank) % count;
  if (*chosen >= count)
    return fail(EPT_E_CONFIG, "join", rank, 0, "nvshmem: EPT_NVSHMEM_DEVICE is %d; there are %d", *chosen, count);
  return EPT_OK;
}

// ---- the heap ----

int32_t ept_instance::mem_alloc(uint64_t length, int32_t kind, void **address) {
  *address = nullptr;
  if (!joined) return fail(EPT_E_INVALID, "mem_alloc", rank, 0, "nvshmem: join has not ended");
  if (kind != EPT_MEMORY_CUDA)
    return fail(EPT_E_UNSUPPORTED, "mem_alloc", rank, 0, "nvshmem: the heap is CUDA memory, not of kind %d", kind);
  const Session &session = Session::of_process();
  const uint64_t at = session.heap()->take(length);
  if (at == Heap::kNone)
    return fail(EPT_E_NOMEM, "mem_alloc", rank, 0,
                "nvshmem: %llu MiB more don't fit the symmetric heap of %llu MiB, of which %llu are taken: set "
                "EPT_NVSHMEM_HEAP_MIB to %llu or more on every rank",
                static_cast<unsigned long long>((length >> 20) + 1),
                static_cast<unsigned long long>(session.heap()->bytes() >> 20),
                static_cast<unsigned long long>(session.heap()->used() >> 20),
                static_cast<unsigned long long>(((session.heap()->used() + length) >> 20) + 2));
  *address = session.base() + at;
  return EPT_OK;
}

int32_t ept_instance::mem_free(void *address) {
  const Session &session = Session::of_process();
  if (joined && session.heap()->give_back(static_cast<uint64_t>(static_cast<char *>(address) - session.base())))
    return EPT_OK;
  return fail(EPT_E_INVALID, "mem_free", rank, 0, "nvshmem: %p is no piece of the heap", address);
}

// ---- kernels ----

int32_t ept_instance::device_open(int32_t cuda_device) {
  if (!joined) return fail(EPT_E_INVALID, "device_open", rank, 0, "nvshmem: join has not ended");
  const int its = Session::of_process().plan().device;
  if (cuda_device != its)
    return fail(
        EPT_E_CONFIG, "device_open", rank, 0,
        "nvshmem: its heap is on CUDA device %d, and kernels would run on %d: call torch.cuda.set_device before the "
        "group is made, or give EPT_NVSHMEM_DEVICE=%d",
        its, cuda_device, cuda_device);
  device = cuda_device;
  return EPT_OK;
}

int32_t ept_instance::device_peer(uint32_t peer, ept_device_entry *entry) {
  if (device < 0) return fail(EPT_E_INVALID, "device_peer", rank, 0, "nvshmem: device_open comes first");
  if (peer >= world) return fail(EPT_E_INVALID, "device_peer", peer, 0, "nvshmem: rank %u of %u", peer, world);
  const Session &session = Session::of_process();
  const uint32_t size = entry->size;
  *entry = ept_device_entry{};
  entry->size = size;
  entry->kind = EPT_DEVICE_GPU;
  entry->version = EPT_DEVICE_ABI;
  entry->words[0] = peer;  // the PE: ranks are PEs
  entry->words[1] = reinterpret_cast<uintptr_t>(session.base());
  entry->words[2] = session.heap()->bytes();
  entry->words[3] = reinterpret_cast<uintptr_t>(library->ptr(session.base(), static_cast<int>(peer)));
  return EPT_OK;
}

int32_t ept_instance::device_image(const void **image, size_t *length) {
  *image = nullptr;
  *length = 0;
  if (device < 0) return fail(EPT_E_INVALID, "device_image", rank, 0, "nvshmem: device_open comes first");
  if (no_images != nullptr) return unavailable(this, "device_image", no_images);
  int major = 0, minor = 0;
  if (cuda.attribute(&major, kMajor, device) != 0 || cuda.attribute(&minor, kMinor, device) != 0)
    return unavailable(this, "device_image", "the driver doesn't tell the device's compute capability");
  const Image *best = nullptr;
  for (const Image *each = images; each->data != nullptr; ++each)
    if (each->arch / 10 == major && each->arch % 10 <= minor && (best == nullptr || best->arch < each->arch))
      best = each;
  if (best == nullptr)
    return unavailable(this, "device_image",
                       format("no kernels were linked for compute capability %d.%d: build with "
                              "-Dnvshmem_archs=%d",
                              major, minor, major * 10 + minor));
  *image = best->data;
  *length = best->size;
  return EPT_OK;
}

int32_t ept_instance::device_module(void *cuda_module) {
  if (device < 0) return fail(EPT_E_INVALID, "device_module", rank, 0, "nvshmem: device_open comes first");
  if (const int code = library->cumodule_init(cuda_module); code != 0)
    return unavailable(this, "device_module",
                       format("nvshmemx_cumodule_init answers %d: the kernels are linked with NVSHMEM %d.%d.%d, the "
                              "library is %s",
                              code, linked[0], linked[1], linked[2], library->release().c_str()));
  return EPT_OK;
}
