// SPDX-License-Identifier: Apache-2.0
//
// api.cc: the C API of gpu.h. What is thrown becomes a code and an ept_error.
#include <stdio.h>

#include <algorithm>

#include "cuda/image.h"
#include "moe/cuda/steps.h"
#include "moe/fail.h"
#include "moe/moe.h"

using namespace ept::moe;
using namespace ept::moe::cuda;

// ---- lanes ----

int32_t ept_gpu_lanes_fit(const ept_gpu_lanes *lanes, const ept_moe_config *moe, ept_error *error) {
  return guarded("gpu_lanes_fit", error, [&] { lanes->lanes->fit(Object(*moe)); });
}

int32_t ept_gpu_lanes_reset(ept_gpu_lanes *lanes, uint64_t timeout_ns, ept_error *error) {
  int32_t code = EPT_OK;
  const int32_t failed = guarded("moe_reset", error, [&] { code = lanes->lanes->reset(timeout_ns); });
  return failed ? failed : code;
}

int32_t ept_gpu_lanes_join(ept_arena *arena, const ept_gpu_config *config, const ept_moe_config *moe,
                           const ept_gpu_lanes *known, ept_gpu_lanes **lanes, uint32_t *number, ept_error *error) {
  return guarded("moe_create", error, [&] {
    if (!config || config->size != sizeof *config || !moe) fail(EPT_E_INVALID, -1, "ept_gpu_config is of another size");
    if (config->memory > 2 || config->share > 2)
      fail(EPT_E_INVALID, -1, "ept_gpu_config has memory %u and share %u; each is 0, 1 or 2", config->memory,
           config->share);
    const std::shared_ptr<Lanes> joined = join(
        arena->arena, *config, *moe, known ? known->lanes : nullptr,
        [&](int32_t ordinal) { return driver_gpu(ordinal, arena->arena->engine); }, number);
    *lanes = known && joined == known->lanes ? const_cast<ept_gpu_lanes *>(known) : new ept_gpu_lanes{joined};
  });
}

int32_t ept_gpu_lanes_share_process(const ept_gpu_lanes *lanes) { return lanes->lanes->shares_process(); }

int32_t ept_gpu_lanes_maps(const ept_gpu_lanes *lanes, uint32_t rank) {
  return rank < lanes->lanes->world() && lanes->lanes->maps(rank);
}

uint64_t ept_gpu_message_bytes(const ept_moe_config *moe) {
  uint64_t bytes = 0;
  (void)guarded("moe_create", nullptr, [&] { bytes = Object(*moe).message(EPT_PHASE_DISPATCH); });
  return bytes;
}

int32_t ept_gpu_lanes_initiates(const ept_gpu_lanes *lanes, uint32_t rank) {
  return rank < lanes->lanes->world() && lanes->lanes->initiates(rank);
}

int32_t ept_gpu_lanes_puts(const ept_gpu_lanes *lanes, uint64_t *puts, ept_error *error) {
  return guarded("gpu_lanes_puts", error, [&] { *puts = lanes->lanes->puts(); });
}

int32_t ept_gpu_lanes_over_engine(const ept_gpu_lanes *lanes) { return lanes->lanes->over_engine(); }

void ept_gpu_lanes_watch(ept_gpu_lanes *lanes) {
  (void)guarded("watch", nullptr, [&] { lanes->lanes->watch(); });
}

void ept_gpu_lanes_home(const ept_gpu_lanes *lanes, char *text, size_t capacity) {
  snprintf(text, capacity, "%s", lanes->lanes->home.c_str());
}

void ept_gpu_lanes_way(const ept_gpu_lanes *lanes, char *text, size_t capacity) {
  snprintf(text, capacity, "%s", lanes->lanes->way.c_str());
}

uint32_t ept_gpu_lanes_blocks(const ept_gpu_lanes *lanes) { return lanes->lanes->blocks(); }

uint64_t ept_gpu_lanes_times(ept_gpu_lanes *lanes, uint64_t *times) {
  lanes->lanes->write_times(times);
  return lanes->lanes->lanes() * times_of(lanes->lanes->blocks(), lanes->lanes->world());
}

void ept_gpu_lanes_close(ept_gpu_lanes *lanes) { delete lanes; }

// ---- kernels ----

int32_t ept_gpu_image_add(uint32_t arch, const void *image, uint64_t bytes, ept_error *error) {
  return guarded("image_add", error, [&] { ept::cuda::add_image("moe", int(arch), image, bytes); });
}

int32_t ept_gpu_has_code(uint32_t capability) {
  const ept::cuda::Image *const image = ept::cuda::image_for("moe", int(capability), nullptr);
  return image && !image->ptx;
}

// ---- an AllToAll, and its steps ----

int32_t ept_gpu_moe_create(ept_gpu_lanes *lanes, const ept_moe_config *config, uint32_t number, const void *image,
                           uint64_t image_bytes, ept_gpu_moe **moe, ept_error *error) {
  return guarded("moe_create", error, [&] {
    const std::string held(static_cast<const char *>(image), image ? image_bytes : 0);
    *moe = new ept_gpu_moe{std::make_unique<GpuObject>(lanes->lanes, *config, number, held)};
  });
}

void ept_gpu_moe_close(ept_gpu_moe *moe) { delete moe; }

void ept_gpu_moe_local_experts(const ept_gpu_moe *moe, int32_t *ids) {
  const Object &object = moe->object->object;
  const auto &held = object.placement.held[object.config.rank];
  std::copy(held.begin(), held.end(), ids);
}

uint64_t ept_gpu_routing_bytes(const ept_gpu_moe *moe, uint64_t tokens) { return routing_bytes(*moe->object, tokens); }

uint64_t ept_gpu_routing_ids(const ept_gpu_moe *moe, uint64_t tokens) { return routing_ids(*moe->object, tokens); }

uint64_t ept_gpu_routing_weights(const ept_gpu_moe *moe, uint64_t tokens) {
  return routing_weights(*moe->object, tokens);
}

int32_t ept_gpu_moe_members(ept_gpu_moe *moe, uint32_t lane, int32_t captures, uint32_t *membership, void *stream,
                            ept_error *error) {
  return guarded("dispatch_send", error, [&] {
    Lanes &lanes = *moe->object->lanes;
    lanes.take_members(lane_awake(*moe->object, lane), captures != 0, stream);
    if (membership) *membership = lanes.members()->epoch;
  });
}

int32_t ept_gpu_moe_refuse_old(ept_gpu_moe *moe, uint32_t lane, uint32_t membership, void *stream, ept_error *error) {
  return guarded("combine_send", error,
                 [&] { moe->object->lanes->refuse_old(lane_awake(*moe->object, lane), membership, stream); });
}

int32_t ept_gpu_moe_dispatch_send(ept_gpu_moe *moe, const ept_dispatch_args *args, void *routing, void *stream,
                                  ept_error *error) {
  return guarded("dispatch_send", error, [&] { dispatch_send(*moe->object, *args, routing, stream); });
}

int32_t ept_gpu_moe_dispatch_wait(ept_gpu_moe *moe, uint32_t lane, uint64_t *arrival, void *stream, ept_error *error) {
  return guarded("dispatch_wait", error, [&] { dispatch_wait(*moe->object, lane, arrival, stream); });
}

int32_t ept_gpu_moe_dispatch_recv(ept_gpu_moe *moe, uint32_t lane, const ept_dispatch_outputs *outputs, void *routing,
                                  uint64_t tokens, int32_t *num_rows, uint64_t ticket, void *stream, ept_error *error) {
  return guarded("dispatch_recv", error,
                 [&] { dispatch_recv(*moe->object, lane, *outputs, routing, tokens, num_rows, ticket, stream); });
}

int32_t ept_gpu_moe_counts(ept_gpu_moe *moe, uint32_t lane, ept_gpu_counts *counts, int32_t *per_expert,
                           ept_error *error) {
  bool there = false;
  const int32_t failed = guarded("counts", error, [&] {
    if (counts->size != sizeof *counts) fail(EPT_E_INVALID, -1, "ept_gpu_counts is of another size");
    there = moe->object->counts(lane_of(*moe->object, lane), counts, per_expert);
  });
  return failed ? failed : there ? EPT_OK : EPT_LATER;
}

uint64_t ept_gpu_late_bytes(const ept_gpu_moe *moe) {
  const ept_moe_config &config = moe->object->object.config;
  return 4ull * config.world * config.max_tokens * config.top_k;
}

int32_t ept_gpu_moe_late_weights(ept_gpu_moe *moe, uint32_t lane, const ept_tensor *weights, void *routing, float *late,
                                 void *stream, ept_error *error) {
  return guarded("combine_send", error, [&] { late_weights(*moe->object, lane, *weights, routing, late, stream); });
}

int32_t ept_gpu_moe_combine_send(ept_gpu_moe *moe, const ept_combine_args *args, void *routing, uint64_t tokens,
                                 float *late, void *stream, ept_error *error) {
  return guarded("combine_send", error, [&] { combine_send(*moe->object, *args, routing, tokens, late, stream); });
}

int32_t ept_gpu_moe_combine_recv(ept_gpu_moe *moe, uint32_t lane, const ept_tensor *y, const ept_tensor *row_weights,
                                 void *routing, void *stream, ept_error *error) {
  return guarded("combine_recv", error, [&] { combine_recv(*moe->object, lane, *y, row_weights, routing, stream); });
}

int32_t ept_gpu_moe_drain(ept_gpu_moe *moe, uint32_t lane, uint32_t phase, void *stream, ept_error *error) {
  return guarded("drain", error, [&] { drain(*moe->object, lane, phase, stream); });
}

int32_t ept_gpu_moe_stats_get(ept_gpu_moe *moe, ept_moe_stats *stats, ept_error *error) {
  return guarded("stats", error, [&] { moe->object->stats(stats); });
}

int32_t ept_gpu_moe_check(ept_gpu_moe *moe, uint32_t lane, ept_error *error) {
  return guarded("moe_check", error, [&] { moe->object->lanes->check(lane_awake(*moe->object, lane)); });
}
