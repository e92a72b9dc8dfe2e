// SPDX-License-Identifier: Apache-2.0
// Stream, from one connection to the next; resume.h says why this is right.
#include <sys/socket.h>

#include "stream.h"

namespace tcp {

void Stream::retire() {
  if (down_) return;
  take_back_sending();
  take_back_receiving();
  // What the kernel still holds shall not go out, and the other side shall notice if it can be reached at all.
  struct linger at_once = {1, 0};
  setsockopt(fd_.get(), SOL_SOCKET, SO_LINGER, &at_once, sizeof at_once);
  fd_.reset();
  down_ = ended_ = true;
  // Sending: everything from acked_ on may have to go again; from where, the other side will say.
  blocked_ = true;
  dead_ = false;
  control_begin_ = control_end_ = 0;
  ack_due_ = finish_due_ = false;
  // Receiving: a frame that is not whole was never there. What the caller may still look at stays until the next poll
  // (make_room), so the buffer is emptied but not rewound.
  in_payload_ = false;
  destination_ = nullptr;
  left_ = 0;
  refusal_ = EPT_OK;
  begin_ = end_;
  more_ = readable_ = hangup_ = false;
  told_errno_ = 0;
  read_here_ = false;
}

bool Stream::plausible(const ResumePoint &theirs, std::string *why) {
  take_back_sending();  // who dialled again has given the old connection up: what was sent on it must be known now
  if (theirs.consumed >= acked_ && theirs.consumed <= sent_ && theirs.acknowledged <= consumed_) return true;
  *why = format(
      "it wants stream %u from operation %llu on, of which %llu to %llu are possible, and has heard of %llu of "
      "its own where %llu were consumed",
      rail_, static_cast<unsigned long long>(theirs.consumed), static_cast<unsigned long long>(acked_),
      static_cast<unsigned long long>(sent_), static_cast<unsigned long long>(theirs.acknowledged),
      static_cast<unsigned long long>(consumed_));
  return false;
}

void Stream::attach(Fd fd, const ResumePoint &theirs) {
  fd_ = std::move(fd);
  down_ = ended_ = dead_ = blocked_ = false;
  readable_ = true;
  counters_.replayed += sent_ - theirs.consumed + (sent_offset_ > 0 ? 1 : 0);
  ++counters_.reconnects;
  sent_ = theirs.consumed;
  sent_offset_ = 0;
  forget_refusals(theirs.acknowledged);
  told_ = 0;
  stamped_ = theirs.acknowledged;
  owed_bytes_ = 0;
  // The handshake acknowledges nothing, and perhaps nothing else will go back.
  ack_due_ = owes();
  unanswered_since_ns_ = 0;
  position_[0] = UINT64_MAX;  // pulse() sees a move
}

void Stream::forget_refusals(uint64_t below) {
  while (!refusals_.empty() && refusals_.front().number < below && told_ > 0) {
    refusals_.pop_front();
    --told_;
  }
}

}  // namespace tcp
