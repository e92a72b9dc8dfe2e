// SPDX-License-Identifier: Apache-2.0
// When an endpoint of provider shm may be closed: when no other one of this process is open.
//
// Two endpoints of one process see each other's memory at the address where the other has mapped it, and go on looking
// there while they work on what came from it. Closing one unmaps that under the other, whose next poll ends the
// process. So a closed instance leaves its rails here, unpolled, and the last one to close takes all of them down. A
// process that has one rank, as ranks have in service, closes at once.
#pragma once

#include <memory>
#include <vector>

#include "endpoint.h"

namespace libfabric {

void shm_opened();  // [any thread] an instance over shm has come to be
void shm_closed(std::vector<std::unique_ptr<Rail>> rails);

}  // namespace libfabric
