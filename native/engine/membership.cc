/* SPDX-License-Identifier: Apache-2.0
 * Membership: a rank is masked, opened again, or begins another life. */
#include "engine/engine.h"

using namespace ept;

namespace {

int32_t not_yet(const char *operation, ept_error *error) {
  return fail(error, EPT_E_UNSUPPORTED, operation, -1, "%s comes with the next commit", operation);
}

}  // namespace

extern "C" {

int32_t ept_engine_mask(ept_engine *, uint32_t, uint32_t, const char *, ept_error *error) {
  return not_yet("mask", error);
}

int32_t ept_engine_known_dead(ept_engine *, uint32_t, uint32_t, ept_error *error) {
  return not_yet("known_dead", error);
}

int32_t ept_engine_readmit(ept_engine *, uint32_t, uint32_t, const void *, size_t, ept_error *error) {
  return not_yet("readmit", error);
}

int32_t ept_engine_wait_peer(ept_engine *, uint32_t, uint64_t, ept_error *error) { return not_yet("wait_peer", error); }

int32_t ept_engine_rejoin(ept_engine *, uint32_t, ept_error *error) { return not_yet("rejoin", error); }

int32_t ept_engine_tell_membership(ept_engine *, uint32_t, ept_error *error) {
  return not_yet("tell_membership", error);
}

int32_t ept_engine_membership(ept_engine *, uint32_t *, ept_error *error) { return not_yet("membership", error); }

}  // extern "C"
