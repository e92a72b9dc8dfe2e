// SPDX-License-Identifier: Apache-2.0
//
// route.h: how an operation travels from post to its target: straight, or by the adversary's schedule.
#pragma once

#include <memory>

#include "instance.h"

namespace loopback {

// How operations get from post to their target.
class Route {
 public:
  explicit Route(ept_worker &worker) : worker_(worker), instance_(*worker.instance) {}
  virtual ~Route() = default;
  virtual int32_t post(const ept_op *ops, size_t count, size_t *posted) = 0;
  // Moves on what is held here, once a poll.
  virtual void tick() {}
  virtual bool idle() const { return true; }
  // Has all that was posted to `rank` (UINT32_MAX: all) come to its end?
  virtual bool settled(uint32_t /*rank*/, int32_t /*scope*/) const { return true; }
  // Ends what is held for a peer that is being closed or fenced.
  virtual void drop(uint32_t /*rank*/, int32_t /*code*/, const char * /*why*/) {}
  virtual size_t reading(const ept_mem * /*mem*/) const { return 0; }

 protected:
  ept_worker &worker_;
  ept_instance &instance_;
};

std::unique_ptr<Route> make_straight(ept_worker &worker);   // straight.cc
std::unique_ptr<Route> make_adversary(ept_worker &worker);  // adversary.cc

}  // namespace loopback
