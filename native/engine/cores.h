/* SPDX-License-Identifier: Apache-2.0
 *
 * cores.h: which cores a proxy thread should run on, from where its rails are. A doorbell across the sockets' link
 * costs the poster some 100 ns more a write, and a proxy that wanders between sockets pays it half the time.
 */
#ifndef EPTRANSPORT_ENGINE_CORES_H
#define EPTRANSPORT_ENGINE_CORES_H

#include <cstdint>
#include <string>
#include <vector>

#include "eptransport/backend.h"

namespace ept {

/* The cores of a list as Linux writes it: "0-3,8". What can't be read ends it. */
std::vector<int32_t> cores_of_list(const std::string &list);

/* Those of `allowed` that are on the NUMA nodes of the rails; empty, which is anywhere, where a rail's node isn't
 * known, the machine has one node, or no allowed core is on them. `system` is /sys/devices/system, or a test's. */
std::vector<int32_t> cores_near(const std::vector<ept_rail> &rails, const std::vector<int32_t> &allowed,
                                const std::string &system);

/* What this thread may run on. */
std::vector<int32_t> cores_allowed();

}  // namespace ept

#endif
