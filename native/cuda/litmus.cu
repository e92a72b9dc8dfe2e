// SPDX-License-Identifier: Apache-2.0
//
// litmus.cu: kernels that try device.cuh on a GPU, and tell how long a way takes: tests/gpu/litmus.cc runs them. Each
// writes what it found wrong into `wrong`, the first cause first.
#include "eptransport/device.cuh"

using namespace ept::device;

namespace {

__device__ void report(int32_t *wrong, int32_t code) {
  if (code != EPT_OK) atomicCAS(wrong, EPT_OK, code);
}

__device__ uint32_t word_of(uint32_t pair, uint32_t round, uint32_t i) {
  return pair * 0x9e3779b9u ^ round * 0x85ebca6bu ^ i;
}

}  // namespace

// Blocks in pairs, as ranks that are mapped: even ones put `words` words, odd ones wait, look at every word, and raise
// the writer's signal. Exact counts, and every word of every round.
extern "C" __global__ void litmus_mapped(const ept_path *to_reader, const ept_path *to_writer, uint64_t *arrived,
                                         uint64_t *taken, uint32_t *staging, const uint32_t *windows, uint32_t words,
                                         uint32_t rounds, uint64_t timeout_ns, int32_t *wrong) {
  const uint32_t pair = blockIdx.x / 2;
  const uint64_t deadline = deadline_in(timeout_ns);
  __shared__ int32_t code;
  uint32_t *from = staging + pair * words;
  const uint32_t *window = windows + pair * words;
  for (uint32_t round = 0; round < rounds; round++) {
    if (blockIdx.x % 2 == 0) {
      for (uint32_t i = threadIdx.x; i < words; i += blockDim.x) from[i] = word_of(pair, round, i);
      __syncthreads();
      const Put made = put(Block(), to_reader[pair], from, 0, words * 4ull, 0, deadline);
      if (threadIdx.x == 0) code = made.code ? made.code : wait(&taken[pair], round + 1, deadline).code;
      __syncthreads();
      report(wrong, code);
      if (code) return;
    } else {
      if (threadIdx.x == 0) {
        const Seen seen = wait(&arrived[pair], round + 1, deadline);
        code = seen.code ? seen.code : seen.count == round + 1 ? EPT_OK : EPT_E_INTERNAL;
      }
      __syncthreads();
      report(wrong, code);
      if (code) return;
      for (uint32_t i = threadIdx.x; i < words; i += blockDim.x)
        if (window[i] != word_of(pair, round, i)) report(wrong, EPT_E_MISMATCH);
      __syncthreads();
      put(Block(), to_writer[pair], nullptr, 0, 0, 0, deadline);
    }
  }
}

// All blocks but the last write a part of one row each round and count in; the last of them raises the signal. The last
// block waits, and reads all parts.
extern "C" __global__ void litmus_counted(const ept_path *to_reader, const ept_path *to_writers, uint32_t *counters,
                                          uint64_t *arrived, uint64_t *taken, uint32_t words, uint32_t rounds,
                                          uint64_t timeout_ns, int32_t *wrong) {
  const uint64_t deadline = deadline_in(timeout_ns);
  const uint32_t parts = gridDim.x - 1;
  __shared__ int32_t code;
  for (uint32_t round = 0; round < rounds; round++) {
    auto *row = reinterpret_cast<uint32_t *>(window(*to_reader, 0));
    if (blockIdx.x < parts) {
      for (uint32_t i = threadIdx.x; i < words; i += blockDim.x)
        row[blockIdx.x * words + i] = word_of(blockIdx.x, round, i);
      __syncthreads();
      if (threadIdx.x == 0) {
        code = EPT_OK;
        if (count_in(&counters[round]) == parts - 1) code = put(Thread(), *to_reader, nullptr, 0, 0, 0, deadline).code;
        if (!code) code = wait(taken, round + 1, deadline).code;
      }
      __syncthreads();
      report(wrong, code);
      if (code) return;
    } else {
      if (threadIdx.x == 0) {
        const Seen seen = wait(arrived, round + 1, deadline);
        code = seen.code ? seen.code : seen.count == round + 1 ? EPT_OK : EPT_E_INTERNAL;
      }
      __syncthreads();
      report(wrong, code);
      if (code) return;
      for (uint32_t i = threadIdx.x; i < words * parts; i += blockDim.x)
        if (row[i] != word_of(i / words, round, i % words)) report(wrong, EPT_E_MISMATCH);
      __syncthreads();
      put(Block(), *to_writers, nullptr, 0, 0, 0, deadline);
    }
  }
}

// Every thread of every block pushes `each` puts through its rank's ring: 4 bytes of its own, and the signal. The last
// ticket of each thread is flushed.
extern "C" __global__ void litmus_ring(const ept_path *path, uint32_t *source, uint32_t each, uint64_t timeout_ns,
                                       int32_t *wrong) {
  const uint64_t deadline = deadline_in(timeout_ns);
  const uint32_t me = blockIdx.x * blockDim.x + threadIdx.x;
  Put made{EPT_OK, 0};
  for (uint32_t i = 0; i < each; i++) {
    const uint32_t at = me * each + i;
    source[at] = word_of(1, me, i);
    made = put(Thread(), *path, &source[at], at * 4ull, 4, 0, deadline);
    report(wrong, made.code);
    if (made.code) return;
  }
  report(wrong, flush(*path, made.ticket, deadline).code);
}

// One thread: `rounds` ways there and back; ns of each in `times`. A bare flag in pinned memory that a CPU thread
// echoes, and a signal through the ring and the proxy.
extern "C" __global__ void litmus_flag(uint64_t *there, const uint64_t *back, uint32_t rounds, uint64_t timeout_ns,
                                       uint64_t *times, int32_t *wrong) {
  const uint64_t deadline = deadline_in(timeout_ns);
  const uint64_t begin = Hardware::now();
  for (uint32_t i = 0; i < rounds; i++) {
    Hardware::release_system(there, i + 1);
    const Seen seen = wait(back, i + 1, deadline);
    report(wrong, seen.code);
    if (!seen.came()) return;
  }
  *times = Hardware::now() - begin;
}

extern "C" __global__ void litmus_signal(const ept_path *at, const uint64_t *back, uint32_t rounds, uint64_t timeout_ns,
                                         uint64_t *times, int32_t *wrong) {
  const ept_path path = *at;  // in registers: a wait empties the L1, so each look at it there would go to the L2
  const uint64_t deadline = deadline_in(timeout_ns);
  const uint64_t base = Hardware::acquire_system(back), begin = Hardware::now();
  for (uint32_t i = 0; i < rounds; i++) {
    const Put made = put(Thread(), path, nullptr, 0, 0, 0, deadline);
    const Seen seen = wait(back, base + i + 1, deadline, status(path));
    report(wrong, made.code ? made.code : seen.code);
    if (made.code || !seen.came()) return;
  }
  *times = Hardware::now() - begin;
}

// Waits for what never comes: the answer, and how long it took.
extern "C" __global__ void litmus_expires(const uint64_t *never, uint64_t timeout_ns, uint64_t *took, int32_t *answer) {
  const uint64_t begin = Hardware::now();
  *answer = wait(never, 1, begin + timeout_ns).code;
  *took = Hardware::now() - begin;
}

// Two processes: one puts `words` words of this round into the other's memory, the other looks.
extern "C" __global__ void litmus_put(const ept_path *path, uint32_t *source, uint32_t words, uint32_t round,
                                      uint64_t timeout_ns, int32_t *wrong) {
  for (uint32_t i = threadIdx.x; i < words; i += blockDim.x) source[i] = word_of(5, round, i);
  __syncthreads();
  const Put made = put(Block(), *path, source, 0, words * 4ull, 0, deadline_in(timeout_ns));
  if (threadIdx.x == 0) report(wrong, made.code);
}

extern "C" __global__ void litmus_look(const uint64_t *arrived, const uint32_t *window, uint32_t words, uint32_t round,
                                       uint64_t timeout_ns, int32_t *wrong) {
  __shared__ Seen seen;
  if (threadIdx.x == 0) seen = wait(arrived, round + 1, deadline_in(timeout_ns));
  __syncthreads();
  if (threadIdx.x == 0) report(wrong, seen.code ? seen.code : seen.count == round + 1 ? EPT_OK : EPT_E_INTERNAL);
  if (!seen.came()) return;
  for (uint32_t i = threadIdx.x; i < words; i += blockDim.x)
    if (window[i] != word_of(5, round, i)) report(wrong, EPT_E_MISMATCH);
}

// One rank of `world`, a block a peer: `words` words of each round go to every peer, mapped or through the ring as its
// path says, and what comes from it is looked at word by word. Windows and sources have two halves, for even rounds and
// odd ones: a peer that sends round n + 2 has seen this rank's n + 1, which followed the look at n. A half of a source
// is used again after the flush of what was put from it. Starts with round `first`, so that a rank may be many
// launches.
extern "C" __global__ void litmus_exchange(const ept_path *paths, const uint64_t *const *arrived,
                                           const uint32_t *const *windows, uint32_t *sources, uint32_t me,
                                           uint32_t words, uint32_t first, uint32_t rounds, uint64_t timeout_ns,
                                           int32_t *wrong) {
  const uint32_t peer = blockIdx.x, world = gridDim.x;
  if (peer == me) return;
  const uint64_t deadline = deadline_in(timeout_ns);
  __shared__ int32_t code;
  uint64_t tickets[2];
  for (uint32_t round = first; round < first + rounds; round++) {
    const uint32_t half = round % 2 * words;
    uint32_t *source = sources + peer * 2 * words + half;
    if (threadIdx.x == 0) code = round < first + 2 ? EPT_OK : flush(paths[peer], tickets[round % 2], deadline).code;
    __syncthreads();
    if (code) break;
    for (uint32_t i = threadIdx.x; i < words; i += blockDim.x) source[i] = word_of(me * world + peer, round, i);
    __syncthreads();
    const Put made = put(Block(), paths[peer], source, half * 4ull, words * 4ull, round % 2, deadline);
    tickets[round % 2] = made.ticket;
    if (threadIdx.x == 0) {
      const uint64_t count = round / 2 + 1;
      const Seen seen = wait(&arrived[peer][round % 2], count, deadline, status(paths[peer]));
      const bool exact = seen.count == count;
      code = made.code ? made.code : seen.code ? seen.code : exact ? EPT_OK : EPT_E_INTERNAL;
    }
    __syncthreads();
    if (code) break;
    for (uint32_t i = threadIdx.x; i < words; i += blockDim.x)
      if (windows[peer][half + i] != word_of(peer * world + me, round, i)) report(wrong, EPT_E_MISMATCH);
    __syncthreads();
  }
  if (threadIdx.x > 0) return;
  // The next launch uses both halves again.
  for (uint32_t i = 0; i < 2 && !code; i++) code = flush(paths[peer], tickets[i], deadline).code;
  report(wrong, code);
}

// Keeps the memory system busy until `stop` (pinned) is set, beside a litmus: stores all over `memory` and adds to a
// few hot words of it, so that what is not ordered comes out of order.
extern "C" __global__ void litmus_noise(uint32_t *memory, uint64_t words, const uint64_t *stop, uint64_t timeout_ns) {
  const uint64_t deadline = deadline_in(timeout_ns);
  uint64_t at = (blockIdx.x * blockDim.x + threadIdx.x) * 0x9e3779b97f4a7c15ull;
  while (!Hardware::acquire_system(stop) && !reached(Hardware::now(), deadline)) {
    for (uint32_t i = 0; i < 64; i++) {
      at = at * 6364136223846793005ull + 1442695040888963407ull;
      memory[(at >> 20) % words] = static_cast<uint32_t>(at);
    }
    atomicAdd(&memory[at >> 32 & 0xff], 1u);
  }
}
