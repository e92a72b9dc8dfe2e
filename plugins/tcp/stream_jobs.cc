// SPDX-License-Identifier: Apache-2.0
// Stream, where a mover moves its long payloads: how a job goes out and what is made of it when it is back. mover.h
// says why this is right.
#include <algorithm>

#include "stream.h"

namespace tcp {

void Stream::give(Job *job, const iovec *parts, size_t count, size_t least) {
  job->fd = fd_.get();
  std::copy_n(parts, count, job->parts);
  job->count = count;
  job->least = least;
  link_->movers->give(job, mover_);
}

void Stream::job_done(Job *job) {
  const uint64_t moved = job->moved.load(std::memory_order_relaxed);
  if (job->sends) {
    advance(moved, true);
    if (job->error != 0) sending_failed(job->error);
  } else {
    landed(moved);
    readable_ = true;  // whether there is more is for a read to say
    if (moved >= job->least) return;
    read_here_ = true;  // and what cut this short: no mover can say that the connection has ended
    if (job->error != 0) told_errno_ = job->error;
  }
}

void Stream::take_back_sending() {
  if (!sends_away()) return;
  link_->movers->take_back(send_job_.get());
  job_done(send_job_.get());
}

void Stream::take_back_receiving() {
  if (!receives_away()) return;
  link_->movers->take_back(receive_job_.get());
  job_done(receive_job_.get());
}

}  // namespace tcp
