// SPDX-License-Identifier: Apache-2.0
// One rail to a peer: operations go in, frames go out; frames come in, bytes land where they belong and events come
// out. See frame.h for what is on the wire. It goes over one authenticated connection at a time; when that breaks the
// stream is `down` until it gets another, and goes on where it was (resume.h).
//
// SENDING. A ring of `depth` operations with four counters that only go up:
//
//     completed <= acked <= sent <= queued <= completed + depth
//       LOCAL_DONE   consumed    handed to    accepted
//       was given    over there  the kernel   by post
//
// While a mover sends, `acked` may be past `sent`; LOCAL_DONE then waits for both (mover.h).
//
// Payload is sent from where it lies, several frames a call. Short frames that aren't operations (REFUSED, ACK, FINISH)
// wait in `control_` and go at the next boundary between frames, before any operation whose header is not begun: only
// then are headers stamped with `consumed`, which keeps the promise of frame.h about REFUSED.
//
// RECEIVING. Headers and short payloads come through one buffer, so that a small write costs one recv. When a header
// has been checked, what the buffer holds of a long payload is copied and the rest is received at its destination,
// together with the next header if that is there already. A refused payload goes to a sink. Parsing stops where the
// caller's event array is full: then TCP itself holds the peer back, and nothing is ever queued here.
#pragma once

#include <algorithm>
#include <deque>
#include <memory>
#include <string>
#include <vector>

#include "../events.h"
#include "frame.h"
#include "handshake.h"
#include "memory.h"
#include "mover.h"
#include "resume.h"

namespace tcp {

// What the streams of one peer share.
struct Link {
  const Exports *exports = nullptr;
  const uint64_t *poll_number = nullptr;  // which poll is running
  uint8_t *sink = nullptr;                // kSinkBytes, written and never read
  Movers *movers = nullptr;               // nullptr: the engine's thread moves all bytes
  ept_rail_counters *counters = nullptr;  // [rails]
  uint32_t rank = 0, epoch = 0;           // of the peer
  std::string where;                      // its address, for sentences
  uint32_t depth = 0;                     // of our ring: a power of two
  Limits limits{};                        // agreed; depth and credits are the peer's
};

constexpr size_t kSinkBytes = 65536;
constexpr size_t kBufferBytes = 32768;
constexpr uint32_t kMaxMessage = 64u << 20;  // 16 ms of a fast loopback: what a short message may have to wait behind
constexpr uint32_t kMaxSend = 16384;         // with its header well inside kBufferBytes

// What the kernel says of a connection, and for how long (0: not so).
struct Pulse {
  uint64_t silent_ns = 0;   // it has sent and sent again, and the other kernel has not answered
  uint64_t stalled_ns = 0;  // operations are in flight, and not a byte moves either way
  std::string text;         // of the worse
};

class Stream : public Source {
 public:
  Stream(const Link *link, uint32_t rail, Fd fd);
  ~Stream();

  // ---- sending ----
  bool full() const { return queued_ - completed_ == ring_.size(); }
  bool sends_full() const { return sends_in_flight_ >= max_sends_; }
  void queue(const ept_op &op);  // checked by the caller; not full
  void flush();                  // sends what the socket takes, a bounded amount
  void acknowledge();            // sends an ACK if one is owed
  bool owes() const { return consumed_ != stamped_ && !down_; }
  void finish();  // says FINISH if that can be said, and that no more will come

  // ---- receiving ----
  void receive(plugin::Events *events);  // reads and parses, a bounded amount
  void revalidate();  // exports were removed: payload under way into one goes to the sink from now on

  // ---- completion ----
  void complete(plugin::Events *events);  // LOCAL_DONE and ERROR of what was acknowledged
  void abandon(plugin::Events *events, int32_t code, int number, const char *text);  // ERROR for the rest
  bool drained() const { return completed_ == queued_; }
  bool completing() const { return completed_ < std::min(acked_, sent_); }
  uint64_t queued() const { return queued_; }
  uint64_t completed() const { return completed_; }
  bool unsent() const { return !finishing_ && sent_ != queued_; }
  bool in_flight() const { return acked_ != queued_; }
  void drop_sources();  // nothing is sent any more, nor again

  // ---- long payloads, moved by a thread of mover.h: stream_jobs.cc ----
  void job_done(Job *job);  // of this stream, and back

  // ---- resuming: stream_resume.cc ----
  bool down() const { return down_; }  // without a connection
  void retire();                       // gives its connection up for good
  ResumePoint resume_point() const { return {consumed_, acked_}; }
  // Whether the other side can be where it says it is. What is wrong stands in `why`.
  bool plausible(const ResumePoint &theirs, std::string *why);
  void attach(Fd fd, const ResumePoint &theirs);  // goes on over a new connection

  // ---- state ----
  const Link *link() const { return link_; }
  uint32_t rail() const { return rail_; }
  void on_epoll(uint32_t epoll_events);
  bool has_work() const {
    return more_ || (readable_ && !receives_away()) || completing() ||
           (!blocked_ && !dead_ && !sends_away() && (unsent() || control_waits()));
  }
  void expect_input() { readable_ = !down_; }  // look at the socket though epoll has not said so
  bool in_bulk() const { return in_payload_ && left_ >= kBulk; }
  // Much is under way: who spins on this stream only slows it down.
  bool bulk() const { return !down_ && (in_bulk() || ((blocked_ || sends_away()) && unsent())); }
  bool ended() const { return ended_; }  // nothing more will be read from this connection
  bool broke_protocol() const { return violated_; }
  bool orderly() const { return finished_; }
  int end_errno() const { return end_errno_; }
  const std::string &end_text() const { return end_text_; }
  void end(int number, std::string text);
  Pulse pulse(uint64_t now_ns);  // since when is known as well as it is asked often
  int fd() const { return fd_.get(); }
  Fd take_fd() { return std::move(fd_); }
  uint64_t immediates() const { return immediates_; }
  void count_later() { ++counters_.later; }

  // For the lists of instance.h.
  bool in_ready = false, in_owing = false, in_bulk_count = false;
  uint32_t misses = 0;  // polls in a row that found nothing on it while it was hot
  uint32_t owing_polls = 0;

 private:
  static constexpr uint64_t kBulk = 65536;
  static constexpr uint32_t kAckOperations = 64;   // explicit ACK at the latest after so many
  static constexpr uint64_t kAckBytes = 1u << 20;  //   or so many bytes
  static constexpr size_t kControlFrames = 16;

  struct Operation {
    FrameHeader header;
    const uint8_t *payload;
    uint64_t cookie;
    ept_mem *mem;                     // until it is complete: it may have to be sent again
    std::unique_ptr<uint8_t[]> copy;  // of a SEND
    int32_t refused;                  // ept_code, OK: not
  };
  struct Refusal {
    uint64_t number;
    int32_t code;
  };
  bool untold() const { return told_ < refusals_.size(); }
  void forget_refusals(uint64_t below);

  Operation &operation(uint64_t number) { return ring_[number & (ring_.size() - 1)]; }
  bool control_waits() const { return control_begin_ != control_end_ || untold() || ack_due_ || finish_due_; }
  bool send_short();
  void sending_failed(int number);
  void fill_control();
  void put_control(FrameType type, uint64_t number, int32_t code);
  void advance(size_t bytes, bool control_follows);
  bool sends_away() const { return send_job_ != nullptr && send_job_->out; }
  bool receives_away() const { return receive_job_ != nullptr && receive_job_->out; }
  // Operations below it may be acknowledged: what a mover has sent is heard over there before it says so here.
  uint64_t may_be_sent() const { return sends_away() ? send_job_end_ : sent_; }
  void give(Job *job, const iovec *parts, size_t count, size_t least);
  void take_back_sending();
  void take_back_receiving();
  void landed(uint64_t bytes);

  void drop_source(Operation &entry);
  void complete_one(Operation &done, ept_event *event);

  void parse(plugin::Events *events);
  bool begin_frame(const FrameHeader &header, plugin::Events *events);
  bool plausible(const FrameHeader &header);
  void end_frame(plugin::Events *events);
  void consumed_one(uint64_t bytes);
  ssize_t read_some(size_t *asked);
  bool make_room();
  void violation(const char *what, uint64_t seen, uint64_t allowed);

  const Link *link_;
  const uint32_t rail_;
  Fd fd_;

  std::vector<Operation> ring_;
  uint64_t completed_ = 0, acked_ = 0, sent_ = 0, queued_ = 0;
  size_t sent_offset_ = 0;  // bytes of frame `sent_` that the kernel has
  uint32_t sends_in_flight_ = 0, max_sends_ = 0;
  bool blocked_ = false;    // the socket is full; epoll will tell
  bool finishing_ = false;  // nothing new is begun
  bool dead_ = false;       // the socket takes nothing any more
  int dead_errno_ = 0;

  std::deque<Refusal> refusals_;  // that the peer may not have heard of; bounded by its depth
  size_t told_ = 0;               // of them, sent on this connection
  bool ack_due_ = false, finish_due_ = false;
  FrameHeader control_[kControlFrames];
  size_t control_begin_ = 0, control_end_ = 0;  // bytes

  std::unique_ptr<uint8_t[]> buffer_;
  size_t begin_ = 0, end_ = 0;  // what is not parsed yet
  uint64_t held_in_poll_ = 0;   // the buffer was shown to the caller in that poll, 0: never
  FrameHeader current_{};       // whose payload is under way
  bool in_payload_ = false;
  uint8_t *destination_ = nullptr;  // nullptr: the sink
  uint64_t left_ = 0;
  int32_t refusal_ = EPT_OK;
  uint64_t consumed_ = 0;  // operations of the peer, in their order
  uint64_t stamped_ = 0;   // the highest `consumed` that went into a header
  uint64_t owed_bytes_ = 0;

  bool readable_ = true, hangup_ = false, more_ = false;
  bool finished_ = false, ended_ = false, violated_ = false, down_ = false;
  int end_errno_ = 0;
  std::string end_text_;
  int told_errno_ = 0;      // to a mover, which the system says once: for the next read to take up
  bool read_here_ = false;  // the next read is no mover's

  uint32_t mover_ = 0;
  std::unique_ptr<Job> send_job_, receive_job_;  // where there are movers
  uint64_t send_job_end_ = 0;                    // behind the last operation of send_job_

  uint64_t unanswered_since_ns_ = 0, moved_ns_ = 0;
  uint64_t position_[6] = {};  // of both directions when pulse() looked last
  uint64_t immediates_ = 0;
  ept_rail_counters &counters_;  // of the rail, over all peers
};

}  // namespace tcp
