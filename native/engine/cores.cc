/* SPDX-License-Identifier: Apache-2.0 */
#include "engine/cores.h"

#include <sched.h>

#include <algorithm>
#include <cstdlib>
#include <fstream>
#include <set>

namespace ept {

std::vector<int32_t> cores_of_list(const std::string &list) {
  std::vector<int32_t> cores;
  const char *at = list.c_str();
  while (*at >= '0' && *at <= '9') {
    char *end = nullptr;
    long first = strtol(at, &end, 10), last = first;
    if (*end == '-') last = strtol(end + 1, &end, 10);
    for (long core = first; core <= last && core < CPU_SETSIZE; core++) cores.push_back(static_cast<int32_t>(core));
    at = *end == ',' ? end + 1 : end;
  }
  return cores;
}

std::vector<int32_t> cores_near(const std::vector<ept_rail> &rails, const std::vector<int32_t> &allowed,
                                const std::string &system) {
  if (!std::ifstream(system + "/node/node1/cpulist")) return {};
  std::set<int32_t> near;
  for (const ept_rail &rail : rails) {
    if (rail.numa < 0) return {};
    std::ifstream file(system + "/node/node" + std::to_string(rail.numa) + "/cpulist");
    std::string list;
    std::getline(file, list);
    for (int32_t core : cores_of_list(list)) near.insert(core);
  }
  std::vector<int32_t> chosen;
  std::copy_if(allowed.begin(), allowed.end(), std::back_inserter(chosen),
               [&near](int32_t core) { return near.count(core) != 0; });
  return chosen;
}

std::vector<int32_t> cores_allowed() {
  cpu_set_t set;
  CPU_ZERO(&set);
  std::vector<int32_t> cores;
  if (sched_getaffinity(0, sizeof set, &set)) return cores;
  for (int32_t core = 0; core < CPU_SETSIZE; core++)
    if (CPU_ISSET(core, &set)) cores.push_back(core);
  return cores;
}

}  // namespace ept
