/* SPDX-License-Identifier: Apache-2.0
 *
 * device.cuh: what a kernel may call: put, put_value, wait, flush. One kernel serves peers whose memory is mapped,
 * peers behind a proxy thread and peers that it reaches through a device library (EPT_DEVICE_GPU, NVSHMEM's): how to
 * reach a peer is data (device.h). Below them the command ring, both of its ends.
 *
 * Compiles with NVRTC 12.9, nvcc and, for a CPU, g++: there the same lines run under TSan, and in a model that walks
 * through all interleavings and all values that weak memory allows (tests/native/ring_model.cc). All that touches
 * memory which another thread may touch goes through one small class, `Hardware`; the model brings another one.
 *
 * MEMORY ORDER, all of it. "Happens before" is C++'s and PTX's causality order; a barrier (__syncthreads, __syncwarp)
 * is part of it, so a release by one thread of a team covers what the team wrote before a barrier.
 *
 *  1 A transfer over a MAPPED path. The team's stores of rows -> barrier -> leader's add with release (system scope) of
 *    the peer's signal => the reader's load of it with acquire (system scope) -> barrier -> its team's loads of rows.
 *    Adds are read-modify-writes, so a later add continues the release sequence of an earlier one: who sees count n has
 *    all n transfers, in whatever order their adds came. System scope, since the peer may be another process, GPU or
 *    CPU. Rows are read with ordinary loads: the read-only path (ld.global.nc) is outside this order and may be stale.
 *  2 A transfer over a PROXY path. The team's stores of rows into registered memory -> barrier -> leader's command (5)
 *    => the proxy thread reads the command, then the rows, and posts them; contract 3 carries it to the peer's engine,
 *    which raises the signal (release) in pinned host memory => the reader's acquire, as in 1.
 *  3 Many blocks, one transfer. Each block: stores -> barrier -> leader's count_in (acquire and release, device scope).
 *    Who is told that all others came before has all their stores before its own put, which so covers them.
 *  4 A source reused. The network's reading of the source -> its local completion => the proxy's store of `done` with
 *    release (system) => flush's load with acquire -> stores into the source.
 *  5 A slot of the ring: full. What the team stored -> barrier -> the leader's fence (release, system) -> its stores of
 *    six words, relaxed, in any order (it takes its ticket between) => the consumer's loads of the six, each with
 * acquire -> its reading of rows. The fence covers the rows alone, and waits for them alone. Words need no order among
 * them, since each says whose it is; a word that says "now all others are there" would need a second fence, which waits
 * until the others have crossed PCIe (half a microsecond, docs/decisions.md). 6 A slot of the ring: empty again.
 * Consumer's loads of a command -> its store of `consumed` with release => a producer's load of it with acquire
 * (system) -> that producer's store of `seen` with release (device) => another producer's load of `seen` with acquire
 * (device) -> its stores of a new command into that slot. A producer that looks at `consumed` by itself needs no
 * `seen`.
 *  7 A transfer over a GPU path. The blocks' stores of rows into the symmetric heap -> 3 -> a fence of system scope by
 *    every thread of the block that puts, since a NIC reads beside all of them -> the library's put-with-signal, which
 *    adds one to the signal after the bytes => the reader's acquire, as in 1. What is put is bounded by the protocol
 *    above, and a source is free when that shows that its bytes have arrived: so flush has nothing to wait for.
 *  8 Parts of a message over a GPU path where the library has the peer mapped (`memory`). A put without a signal is
 *    then stores by the team's threads, ordered as any stores of theirs: parts, by many teams -> 3 -> a fence of system
 *    scope by who came last -> its put-with-signal of the header, which no part had => the reader's acquire, as in 1.
 * So no part is waited for, and of the library no more is needed than that its copies are stores. On a network that
 *    would not hold: a put without a signal is ordered with nothing there, and a message is one put.
 *
 * THE RING'S INVARIANTS (arithmetic modulo 2^64, differences as signed numbers; C is the capacity)
 *    seen <= consumed <= next (the consumer's own) <= head <= consumed + C
 *  - head moves by one compare-and-swap a ticket, and only by a producer that has seen head < consumed + C. So a ticket
 *    is taken only when its slot is free already, and who has one never waits: a producer that gives up at its
 *    deadline leaves no hole. (An add of one would be cheaper, and leave a hole.)
 *  - The slot of ticket t is t mod C, and t belongs to round t / C, odd or even. Bit 63 of each of the slot's words is
 *    its round mod 2: before t was pushed all six say the round before, since only the ticket C before wrote there and
 *    it was taken whole; once it is full all six say t's; while its producer stores, some do. The consumer takes it
 * when all six say t's round. So it takes no old command for a new one, nor half of one.
 *  - consumed is published when a quarter of the ring has been consumed, and when the consumer finds nothing. So a full
 *    ring always moves on: its consumer has C to take and publishes on the way.
 *  - One consumer. Two would both take `next`.
 */
#ifndef EPTRANSPORT_DEVICE_CUH
#define EPTRANSPORT_DEVICE_CUH

#include "eptransport/device.h"

#ifdef __CUDACC__
#define EPT_DEVICE __device__ __forceinline__
#define EPT_EITHER __host__ __device__ __forceinline__ /* what the host says of a ring, too */
#else
#include <time.h>

#include <atomic>
#include <cstring>
#include <thread>
#define EPT_DEVICE inline
#define EPT_EITHER inline
#ifndef EPT_SPIN /* what a CPU does between two looks; fibers bring their own */
#define EPT_SPIN() std::this_thread::yield()
#endif
#ifndef EPT_CLOCK_AHEAD /* ns; likewise */
#define EPT_CLOCK_AHEAD() 0
#endif
#ifndef EPT_RELEASES /* before a release of device scope; likewise */
#define EPT_RELEASES()
#endif
#endif

#ifdef EPT_GPU_INITIATED
/* A device library that kernels post through: plugins/nvshmem/nvshmem.cu is NVSHMEM's, and a second set of the same
 * kernels is linked with it; fibers bring their own. `bytes` from `from` to where the peer has what `to` is here, then
 * one more on the peer's `signal`; none where that is NULL. By one thread; by all threads of a block of one dimension.
 */
#ifdef __CUDACC__
#define EPT_LIBRARY extern "C" __device__
#else
#define EPT_LIBRARY
#endif
EPT_LIBRARY void ept_library_put(void *to, const void *from, uint64_t bytes, uint64_t *signal, uint32_t number);
EPT_LIBRARY void ept_library_put_block(void *to, const void *from, uint64_t bytes, uint64_t *signal, uint32_t number);
/* `bytes` without a signal, by all threads of a warp, from any memory that they read, to a peer that the library has
 * mapped. They meet first and last: then it is as if they had stored them at the peer themselves (8). */
EPT_LIBRARY void ept_library_part_warp(void *to, const void *from, uint64_t bytes, uint32_t number);
/* The 8 bytes of `value`, and then the signal. By one thread. */
EPT_LIBRARY void ept_library_value(uint64_t *to, uint64_t value, uint64_t *signal, uint32_t number);
/* Until all that this rank has put has arrived. By one thread, with no other kernel of the rank under way. */
EPT_LIBRARY void ept_library_quiet();
#endif

namespace ept::device {

/* ==== memory as the machine has it =================================================================================
 */

struct Hardware {
#ifdef __CUDACC__
  static EPT_DEVICE uint64_t acquire_system(const uint64_t *at) {
    uint64_t value;
    asm volatile("ld.acquire.sys.global.u64 %0, [%1];" : "=l"(value) : "l"(at) : "memory");
    return value;
  }
  static EPT_DEVICE int32_t relaxed_system(const int32_t *at) {
    int32_t value;
    asm volatile("ld.relaxed.sys.global.s32 %0, [%1];" : "=r"(value) : "l"(at) : "memory");
    return value;
  }
  static EPT_DEVICE uint64_t acquire_device(const uint64_t *at) {
    uint64_t value;
    asm volatile("ld.acquire.gpu.global.u64 %0, [%1];" : "=l"(value) : "l"(at) : "memory");
    return value;
  }
  static EPT_DEVICE uint64_t relaxed_device(const uint64_t *at) {
    uint64_t value;
    asm volatile("ld.relaxed.gpu.global.u64 %0, [%1];" : "=l"(value) : "l"(at) : "memory");
    return value;
  }
  static EPT_DEVICE void release_system(uint64_t *at, uint64_t value) {
    asm volatile("st.release.sys.global.u64 [%0], %1;" : : "l"(at), "l"(value) : "memory");
  }
  static EPT_DEVICE void release_device(uint64_t *at, uint64_t value) {
    asm volatile("st.release.gpu.global.u64 [%0], %1;" : : "l"(at), "l"(value) : "memory");
  }
  static EPT_DEVICE void add_release_system(uint64_t *at, uint64_t more) {
    asm volatile("red.release.sys.global.add.u64 [%0], %1;" : : "l"(at), "l"(more) : "memory");
  }
  static EPT_DEVICE void add_release_device(uint32_t *at, uint32_t more) {
    asm volatile("red.release.gpu.global.add.u32 [%0], %1;" : : "l"(at), "r"(more) : "memory");
  }
  static EPT_DEVICE uint32_t add_both_device(uint32_t *at, uint32_t more) {
    uint32_t before;
    asm volatile("atom.acq_rel.gpu.global.add.u32 %0, [%1], %2;" : "=r"(before) : "l"(at), "r"(more) : "memory");
    return before;
  }
  /* The value before; the exchange was made if that is `expected`. */
  static EPT_DEVICE uint64_t exchange_device(uint64_t *at, uint64_t expected, uint64_t desired) {
    uint64_t before;
    asm volatile("atom.relaxed.gpu.global.cas.b64 %0, [%1], %2, %3;"
                 : "=l"(before)
                 : "l"(at), "l"(expected), "l"(desired)
                 : "memory");
    return before;
  }
  /* Nanoseconds of the GPU's own clock, the same on all its multiprocessors. Its steps may be a microsecond. */
  static EPT_DEVICE uint64_t now() {
    uint64_t ns;
    asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(ns) : : "memory");
    return ns;
  }
  static EPT_DEVICE void spin() {}
  static EPT_DEVICE void rest() { asm volatile("nanosleep.u32 100;" : : : "memory"); }
#else
  static uint64_t acquire_system(const uint64_t *at) { return ref(at).load(std::memory_order_acquire); }
  static int32_t relaxed_system(const int32_t *at) { return ref(at).load(std::memory_order_relaxed); }
  static uint64_t acquire_device(const uint64_t *at) { return ref(at).load(std::memory_order_acquire); }
  static uint64_t relaxed_device(const uint64_t *at) { return ref(at).load(std::memory_order_relaxed); }
  static void release_system(uint64_t *at, uint64_t value) { ref(at).store(value, std::memory_order_release); }
  static void release_device(uint64_t *at, uint64_t value) { ref(at).store(value, std::memory_order_release); }
  static void add_release_system(uint64_t *at, uint64_t more) { ref(at).fetch_add(more, std::memory_order_release); }
  static void add_release_device(uint32_t *at, uint32_t more) {
    EPT_RELEASES();
    ref(at).fetch_add(more, std::memory_order_release);
  }
  static uint32_t add_both_device(uint32_t *at, uint32_t more) {
    EPT_RELEASES();
    return ref(at).fetch_add(more, std::memory_order_acq_rel);
  }
  static uint64_t exchange_device(uint64_t *at, uint64_t expected, uint64_t desired) {
    ref(at).compare_exchange_strong(expected, desired, std::memory_order_relaxed);
    return expected;
  }
  static uint64_t now() {
    timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return static_cast<uint64_t>(t.tv_sec) * 1000000000 + static_cast<uint64_t>(t.tv_nsec) + EPT_CLOCK_AHEAD();
  }
  static void spin() { EPT_SPIN(); }
  static void rest() { EPT_SPIN(); }

 private:
  template <class T>
  static std::atomic_ref<T> ref(const T *at) {
    return std::atomic_ref<T>(*const_cast<T *>(at)); /* C++20 has none of const; nothing is written by a load */
  }

 public:
#endif
  /* All that this thread knows is there for who sees a word that it fills a slot with afterwards (5). */
  static EPT_DEVICE void fence() {
#ifdef __CUDACC__
    asm volatile("fence.acq_rel.sys;" : : : "memory");
#endif
  }
  static EPT_DEVICE void fill(ept_command_slot *slot, const uint64_t (&words)[EPT_SLOT_WORDS]) {
#ifdef __CUDACC__
    for (int i = 0; i < EPT_SLOT_WORDS; i += 2) {
      asm volatile("st.relaxed.sys.global.v2.u64 [%0], {%1, %2};"
                   :
                   : "l"(&slot->words[i]), "l"(words[i]), "l"(words[i + 1])
                   : "memory");
    }
#else
    /* For `fence`, which TSan doesn't know. */
    for (int i = 0; i < EPT_SLOT_WORDS; i++) ref(&slot->words[i]).store(words[i], std::memory_order_release);
#endif
  }
  /* Who took a slot's words has read them (6): for the model. */
  static EPT_DEVICE void taken(const ept_command_slot *) {}
};

/* Words of a command in a slot, but for bit 63. */
EPT_DEVICE void pack(const ept_command &c, uint64_t (&words)[EPT_SLOT_WORDS]) {
  words[0] = uint64_t(c.kind & 0x7fffffffu) << 32 | c.peer;
  words[1] = uint64_t(c.region & 0x7fffffffu) << 32 | c.memory;
  words[2] = (c.source >> 63) << 34 | (c.destination >> 63) << 33 | (c.bytes >> 63) << 32 | c.signal;
  words[3] = c.source;
  words[4] = c.destination;
  words[5] = c.bytes;
}
EPT_DEVICE void unpack(const uint64_t (&words)[EPT_SLOT_WORDS], ept_command &c) {
  constexpr uint64_t low = ~(uint64_t(1) << 63);
  c.kind = uint32_t(words[0] >> 32) & 0x7fffffffu;
  c.peer = uint32_t(words[0]);
  c.region = uint32_t(words[1] >> 32) & 0x7fffffffu;
  c.memory = uint32_t(words[1]);
  c.signal = uint32_t(words[2]);
  c.source = (words[3] & low) | (words[2] >> 34 & 1) << 63;
  c.destination = (words[4] & low) | (words[2] >> 33 & 1) << 63;
  c.bytes = (words[5] & low) | (words[2] >> 32 & 1) << 63;
  c.reserved = 0;
}
/* Bit 63 of the words of a ticket's slot. */
EPT_EITHER uint64_t round_of(uint64_t ticket, uint64_t capacity) { return ticket & capacity ? uint64_t(1) << 63 : 0; }

EPT_DEVICE bool reached(uint64_t count, uint64_t target) { return static_cast<int64_t>(count - target) >= 0; }
template <class T>
EPT_DEVICE T *address(uint64_t number) {
  return reinterpret_cast<T *>(static_cast<uintptr_t>(number));
}

/* ==== who does it together =========================================================================================
 */

struct Thread {
  static constexpr bool is_block = false;
  EPT_DEVICE uint32_t rank() const { return 0; }
  EPT_DEVICE uint32_t size() const { return 1; }
  EPT_DEVICE void meet() const {}
};
#ifdef __CUDACC__
struct Warp { /* all 32 threads of it */
  static constexpr bool is_block = false;
  EPT_DEVICE uint32_t rank() const { return threadIdx.x % 32; }
  EPT_DEVICE uint32_t size() const { return 32; }
  EPT_DEVICE void meet() const { __syncwarp(); }
};
struct Block { /* of one dimension */
  static constexpr bool is_block = true;
  EPT_DEVICE uint32_t rank() const { return threadIdx.x; }
  EPT_DEVICE uint32_t size() const { return blockDim.x; }
  EPT_DEVICE void meet() const { __syncthreads(); }
};
#endif

/* ==== waiting ======================================================================================================
 */

/* A point on the clock of `Hardware::now`, in ns. */
EPT_DEVICE uint64_t deadline_in(uint64_t ns) { return Hardware::now() + ns; }

struct Seen {
  int32_t code; /* EPT_OK; EPT_E_TIMEOUT; or what `stop` held */
  uint64_t count;
  EPT_DEVICE bool came() const { return code == EPT_OK; }
};

/* How many looks at the signal pass between two at the clock and at `stop`, which may be a way over PCIe. 32 looks take
 * some 20 to 40 us: so much later than it could a wait learns that its peer has ended. */
constexpr uint32_t looks_between = 32;

/* Until the count at `signal` is at least `target` (counts wrap: until it is not behind it), or `deadline`, or `stop`
 * (may be NULL) holds something else than 0: a peer's status, a lane's fault. One thread calls; after a barrier its
 * team reads what the signal promised. Whoever is told TIMEOUT sets its fault word: nothing traps here. */
template <class M = Hardware>
EPT_DEVICE Seen wait(const uint64_t *signal, uint64_t target, uint64_t deadline, const int32_t *stop = nullptr) {
  for (uint32_t look = 1;; look++) {
    const uint64_t count = M::acquire_system(signal);
    if (reached(count, target)) return {EPT_OK, count};
    M::spin();
    if (look % looks_between) continue;
    const int32_t stopped = stop ? M::relaxed_system(stop) : EPT_OK;
    if (stopped != EPT_OK) return {stopped, count};
    if (reached(M::now(), deadline)) return {EPT_E_TIMEOUT, count};
  }
}

/* The status of a path's peer, to stop a wait for it. */
EPT_DEVICE const int32_t *status(const ept_path &path) {
  return path.progress ? &address<ept_device_progress>(path.progress)->status : nullptr;
}

/* Counts `more` in, says the count before: with each of n blocks counting itself in after a barrier, the one that is
 * told n - 1 has all they wrote (3). */
template <class M = Hardware>
EPT_DEVICE uint32_t count_in(uint32_t *counter, uint32_t more = 1) {
  return M::add_both_device(counter, more);
}

/* ==== the ring: producers ==========================================================================================
 */

struct Put {
  int32_t code;    /* EPT_OK; ACCESS: outside window or source; TIMEOUT: the ring stayed full; or the peer's status */
  uint64_t ticket; /* for flush */
};

/* One command into the ring of `path`. Any threads of any blocks, side by side. */
template <class M = Hardware>
EPT_DEVICE Put push(const ept_path &path, const ept_command &command, uint64_t deadline) {
  auto *ring = address<ept_ring>(path.ring);
  const uint64_t capacity = uint64_t(ring->mask) + 1;
  uint64_t head = M::relaxed_device(&ring->head);
  M::fence(); /* here, so that it waits beside that look and not after the ticket is taken */
  while (true) {
    if (reached(head, M::acquire_device(&ring->seen) + capacity)) { /* full, as far as is known here */
      const uint64_t consumed = M::acquire_system(address<uint64_t>(ring->consumed));
      if (reached(head, consumed + capacity)) {
        const int32_t *stop = status(path);
        const int32_t stopped = stop ? M::relaxed_system(stop) : EPT_OK;
        if (stopped != EPT_OK) return {stopped, 0};
        if (reached(M::now(), deadline)) return {EPT_E_TIMEOUT, 0};
        M::rest();
        head = M::relaxed_device(&ring->head);
        continue;
      }
      /* May overtake a newer one; it is true all the same, and only makes somebody look again. */
      M::release_device(&ring->seen, consumed);
    }
    const uint64_t before = M::exchange_device(&ring->head, head, head + 1);
    if (before == head) break;
    head = before;
  }
  uint64_t words[EPT_SLOT_WORDS];
  pack(command, words);
  for (auto &word : words) word = (word & ~(uint64_t(1) << 63)) | round_of(head, capacity);
  M::fill(address<ept_command_slot>(ring->slots) + (head & ring->mask), words);
  return {EPT_OK, head};
}

/* ==== the ring: its consumer, on the host ==========================================================================
 */

struct RingEnd {
  const ept_command_slot *slots; /* as the host sees them */
  uint64_t *consumed;
  uint64_t capacity;
  uint64_t next = 0, published = 0; /* tickets */
};

template <class M>
EPT_DEVICE void publish(RingEnd &ring) {
  if (ring.published == ring.next) return;
  M::release_system(ring.consumed, ring.next);
  ring.published = ring.next;
}

/* Has the next command come, as far as one look can tell? Then pop. */
template <class M = Hardware>
EPT_DEVICE bool ready(const RingEnd &ring) {
  const ept_command_slot *slot = ring.slots + (ring.next & (ring.capacity - 1));
  return M::acquire_system(&slot->words[EPT_SLOT_WORDS - 1]) >> 63 == round_of(ring.next, ring.capacity) >> 63;
}

/* The next command and its ticket; false: there is none now. */
template <class M = Hardware>
EPT_DEVICE bool pop(RingEnd &ring, ept_command &command) {
  const ept_command_slot *slot = ring.slots + (ring.next & (ring.capacity - 1));
  uint64_t words[EPT_SLOT_WORDS];
  for (int i = EPT_SLOT_WORDS; i-- > 0;) { /* the last one first: once it has come the others are mostly there */
    words[i] = M::acquire_system(&slot->words[i]);
    if ((words[i] ^ round_of(ring.next, ring.capacity)) >> 63) {
      publish<M>(ring);
      return false;
    }
  }
  M::taken(slot);
  unpack(words, command);
  command.ticket = ring.next++;
  if (ring.next - ring.published >= ring.capacity / 4) publish<M>(ring);
  return true;
}

/* Before anybody pushes: `ring` (its first line set), slots and `consumed` as the first ticket is `first`. */
inline RingEnd begin_ring(ept_ring &ring, ept_command_slot *slots, uint64_t *consumed, uint64_t first = 0) {
  const uint64_t capacity = uint64_t(ring.mask) + 1;
  for (uint64_t i = 0; i < capacity; i++)
    for (auto &word : slots[(first + i) & ring.mask].words) word = round_of(first + i - capacity, capacity);
  ring.head = ring.seen = *consumed = first;
  return {slots, consumed, capacity, first, first};
}

/* ==== transfers ====================================================================================================
 */

/* Where rows for the peer may be stored directly, before a put of no bytes: MAPPED. NULL: not there, put them. */
EPT_DEVICE char *window(const ept_path &path, uint64_t offset) {
  return path.kind == EPT_DEVICE_MAPPED ? address<char>(path.window + offset) : nullptr;
}

EPT_DEVICE bool inside(uint64_t offset, uint64_t bytes, uint64_t of) { return offset <= of && bytes <= of - offset; }

/* By 16 bytes where both sides allow, four of them in flight a thread. */
template <class Team>
EPT_DEVICE void copy(Team team, char *to, const char *from, uint64_t bytes) {
#ifdef __CUDACC__
  uint64_t done = 0;
  if (!((reinterpret_cast<uintptr_t>(to) | reinterpret_cast<uintptr_t>(from)) % 16)) {
    auto *t = reinterpret_cast<uint4 *>(to);
    auto *f = reinterpret_cast<const uint4 *>(from);
    const uint64_t words = bytes / 16, size = team.size();
    uint64_t i = team.rank();
    for (; i + 3 * size < words; i += 4 * size) {
      const uint4 a = f[i], b = f[i + size], c = f[i + 2 * size], d = f[i + 3 * size];
      t[i] = a, t[i + size] = b, t[i + 2 * size] = c, t[i + 3 * size] = d;
    }
    for (; i < words; i += size) t[i] = f[i];
    done = words * 16;
  }
  for (uint64_t i = done + team.rank(); i < bytes; i += team.size()) to[i] = from[i];
#else
  (void)team;
  if (bytes) std::memcpy(to, from, bytes);
#endif
}

/* Adds one to a signal of the peer that is mapped, with release. */
template <class M = Hardware>
EPT_DEVICE void raise(const ept_path &path, uint32_t signal) {
  if (signal != EPT_NO_SIGNAL) M::add_release_system(address<uint64_t>(path.signals) + signal, 1);
}

EPT_DEVICE int32_t refused(const ept_path &path, uint64_t destination, uint64_t bytes, uint32_t signal) {
#ifdef EPT_GPU_INITIATED
  const bool has_way = path.kind != EPT_DEVICE_NONE;
#else
  const bool has_way = path.kind == EPT_DEVICE_MAPPED || path.kind == EPT_DEVICE_PROXY;
#endif
  if (!has_way) return EPT_E_UNSUPPORTED;
  if (!inside(destination, bytes, path.window_bytes)) return EPT_E_ACCESS;
  return signal == EPT_NO_SIGNAL || signal < path.signal_count ? EPT_OK : EPT_E_INVALID;
}

EPT_DEVICE ept_command command_of(const ept_path &path, uint32_t kind, uint64_t source, uint64_t destination,
                                  uint64_t bytes, uint32_t signal) {
  ept_command command;
  command.kind = kind;
  command.peer = path.peer;
  command.memory = path.memory;
  command.region = path.region;
  command.source = source;
  command.destination = destination;
  command.bytes = bytes;
  command.signal = signal == EPT_NO_SIGNAL ? signal : static_cast<uint32_t>(path.signals) + signal;
  return command;
}

#ifdef EPT_GPU_INITIATED
EPT_DEVICE uint64_t *signal_word(const ept_path &path, uint32_t signal) {
  return signal == EPT_NO_SIGNAL ? nullptr : address<uint64_t>(path.signals) + signal;
}

/* 7: one put-with-signal of the library. */
template <class Team>
EPT_DEVICE void library_put(Team team, const ept_path &path, const void *source, uint64_t destination, uint64_t bytes,
                            uint32_t signal) {
  char *to = address<char>(path.window + destination);
  uint64_t *word = signal_word(path, signal);
#ifdef __CUDACC__
  __threadfence_system();
#endif
  team.meet();
  if constexpr (Team::is_block)
    ept_library_put_block(to, source, bytes, word, path.number);
  else if (team.rank() == 0)
    ept_library_put(to, source, bytes, word, path.number);
}
#endif

/* `bytes` from `source` to `destination` in the peer's region; then one more on its `signal` (an index, or
 * EPT_NO_SIGNAL). The whole team calls, with the same arguments; rank 0's answer counts. Waits for nothing but a full
 * ring, until `deadline`. Nothing is written, and nothing raised, where the answer is an error. `bytes` 0: the signal
 * alone, for all that the team has stored before. */
template <class M = Hardware, class Team>
EPT_DEVICE Put put(Team team, const ept_path &path, const void *source, uint64_t destination, uint64_t bytes,
                   uint32_t signal, uint64_t deadline) {
  const int32_t code = refused(path, destination, bytes, signal);
  if (code != EPT_OK) return {code, 0};
  if (path.kind == EPT_DEVICE_MAPPED) {
    copy(team, window(path, destination), static_cast<const char *>(source), bytes);
    team.meet();
    if (team.rank() == 0) raise<M>(path, signal);
    return {EPT_OK, 0};
  }
  const uint64_t offset = bytes ? reinterpret_cast<uintptr_t>(source) - path.source : 0;
  if (!inside(offset, bytes, path.source_bytes)) return {EPT_E_ACCESS, 0};
#ifdef EPT_GPU_INITIATED
  if (path.kind == EPT_DEVICE_GPU) {
    library_put(team, path, source, destination, bytes, signal);
    return {EPT_OK, 0};
  }
#endif
  team.meet();
  if (team.rank() != 0) return {EPT_OK, 0};
  return push<M>(path, command_of(path, EPT_COMMAND_PUT, offset, destination, bytes, signal), deadline);
}

/* The 8 bytes of `value` to `destination`, a multiple of 8, then the signal. One thread. */
template <class M = Hardware>
EPT_DEVICE Put put_value(const ept_path &path, uint64_t value, uint64_t destination, uint32_t signal,
                         uint64_t deadline) {
  const int32_t code = refused(path, destination, 8, signal);
  if (code != EPT_OK) return {code, 0};
  if (destination % 8) return {EPT_E_INVALID, 0};
#ifdef EPT_GPU_INITIATED
  if (path.kind == EPT_DEVICE_GPU) {
    ept_library_value(address<uint64_t>(path.window + destination), value, signal_word(path, signal), path.number);
    return {EPT_OK, 0};
  }
#endif
  if (path.kind == EPT_DEVICE_MAPPED) {
    *address<uint64_t>(path.window + destination) = value;
    raise<M>(path, signal);
    return {EPT_OK, 0};
  }
  return push<M>(path, command_of(path, EPT_COMMAND_VALUE, value, destination, 8, signal), deadline);
}

/* Until the source of that put may be reused: over a MAPPED path it may be already; over a GPU path the protocol of the
 * kernels tells (7). One thread. */
template <class M = Hardware>
EPT_DEVICE Seen flush(const ept_path &path, uint64_t ticket, uint64_t deadline) {
  if (path.kind != EPT_DEVICE_PROXY) return {EPT_OK, 0};
  const auto *peer = address<ept_device_progress>(path.progress);
  /* No look at the status: a peer that is lost ends its commands too, and only then may their source be reused. */
  return wait<M>(&peer->done, ticket + 1, deadline);
}

}  // namespace ept::device

#endif
