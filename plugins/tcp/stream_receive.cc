// SPDX-License-Identifier: Apache-2.0
// Stream, the receiving half: from recv to the events IMM and RECV.
#include <linux/sockios.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <sys/epoll.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <sys/uio.h>

#include <algorithm>
#include <cerrno>
#include <cstring>

#include "stream.h"

namespace tcp {
namespace {

constexpr int kRounds = 4;                  // recv calls of one receive: bounded work
constexpr size_t kDirect = 4096;            // a payload with so much missing is received at its destination
constexpr size_t kReceiveBytes = 1u << 20;  // of one recv

}  // namespace

Stream::Stream(const Link *link, uint32_t rail, Fd fd)
    : Source(Kind::kStream),
      link_(link),
      rail_(rail),
      fd_(std::move(fd)),
      ring_(link->depth),
      buffer_(new uint8_t[kBufferBytes]),
      counters_(link->counters[rail]) {
  // HELLOs of the engine take no credit, so a few come on top.
  max_sends_ = std::max(4u, link->limits.send_credits + 4u);
  if (link->movers == nullptr) return;
  mover_ = link->movers->choose();
  send_job_ = std::make_unique<Job>(this, true);
  receive_job_ = std::make_unique<Job>(this, false);
}

Stream::~Stream() {
  take_back_sending();
  take_back_receiving();
  drop_sources();
}

void Stream::on_epoll(uint32_t epoll_events) {
  if (down_) return;  // said of a connection that has been retired since
  if (epoll_events & (EPOLLIN | EPOLLRDHUP | EPOLLHUP | EPOLLERR)) readable_ = true;
  if (epoll_events & (EPOLLRDHUP | EPOLLHUP | EPOLLERR)) hangup_ = true;
  if (epoll_events & (EPOLLOUT | EPOLLHUP | EPOLLERR)) blocked_ = false;
}

void Stream::receive(plugin::Events *events) {
  if (!receives_away()) parse(events);
  for (int round = 0; round < kRounds && readable_ && !receives_away() && !events->full() && !ended_; ++round) {
    size_t asked = 0;
    ssize_t got = read_some(&asked);
    if (got == 0) break;
    // Less than asked for: the socket is empty, unless its end is behind the bytes.
    if (static_cast<size_t>(got) < asked) readable_ = hangup_;
    parse(events);
  }
  if (untold()) flush();
}

// Bytes read, 0: none. Sets readable_ and the end.
ssize_t Stream::read_some(size_t *asked) {
  iovec parts[2];
  int count = 1;
  bool direct = in_payload_ && (destination_ == nullptr || left_ >= kDirect);
  if (direct) {
    // The buffer is empty here: parse() took all of it for this payload.
    bool held = held_in_poll_ == *link_->poll_number;
    if (!held) begin_ = end_ = 0;
    size_t want = std::min<uint64_t>(left_, destination_ == nullptr ? kSinkBytes : kReceiveBytes);
    parts[0] = iovec{destination_ == nullptr ? link_->sink : destination_, want};
    if (receive_job_ != nullptr && destination_ != nullptr && left_ >= kLong && !read_here_) {
      parts[0].iov_len = left_;
      if (!held) parts[count++] = iovec{buffer_.get(), kBufferBytes};
      give(receive_job_.get(), parts, static_cast<size_t>(count), left_);
      return 0;
    }
    if (want == left_ && !held) parts[count++] = iovec{buffer_.get(), kBufferBytes};
  } else {
    if (!make_room()) return 0;  // the caller looks at it until the next poll; readable_ stays
    parts[0] = iovec{buffer_.get() + end_, kBufferBytes - end_};
  }
  *asked = parts[0].iov_len + (count == 2 ? parts[1].iov_len : 0);
  ssize_t got;
  do {
    got = count == 1 ? recv(fd_.get(), parts[0].iov_base, parts[0].iov_len, MSG_DONTWAIT)
                     : readv(fd_.get(), parts, count);
  } while (got < 0 && errno == EINTR);
  read_here_ = false;
  if (got > 0) {
    if (direct)
      landed(static_cast<uint64_t>(got));
    else
      end_ += static_cast<size_t>(got);
    return got;
  }
  if (told_errno_ != 0) {
    got = -1;
    errno = std::exchange(told_errno_, 0);
  }
  if (got < 0 && (errno == EAGAIN || errno == EWOULDBLOCK)) {
    readable_ = false;
    if (dead_) end(dead_errno_, format("sending to it failed: %s", errno_text(dead_errno_).c_str()));
    return 0;
  }
  if (got < 0) {
    int number = errno;
    end(number, errno_text(number));
  } else if (finished_) {
    end(0, "it left");
  } else if (in_payload_ || begin_ != end_) {
    end(0, format("the connection ended inside a frame, %llu bytes before its end",
                  static_cast<unsigned long long>(in_payload_ ? left_ : sizeof(FrameHeader) - (end_ - begin_))));
  } else if (dead_) {
    end(dead_errno_, format("the connection ended without a goodbye (%s)", errno_text(dead_errno_).c_str()));
  } else {
    end(0, "the connection ended without a goodbye (its process is gone)");
  }
  return 0;
}

// So many bytes of the payload under way, and then of what is behind it in buffer_, which was empty.
void Stream::landed(uint64_t bytes) {
  const uint64_t here = std::min(bytes, left_);
  if (destination_ != nullptr) destination_ += here;
  left_ -= here;
  if (bytes > here) end_ = bytes - here;
}

// Room behind end_. False: there is none, and what is in front was shown to the caller.
bool Stream::make_room() {
  bool held = held_in_poll_ == *link_->poll_number;
  if (held) return end_ < kBufferBytes;
  if (begin_ == end_) {
    begin_ = end_ = 0;
  } else if (kBufferBytes - begin_ < sizeof(FrameHeader) + kMaxSend) {
    memmove(buffer_.get(), buffer_.get() + begin_, end_ - begin_);
    end_ -= begin_;
    begin_ = 0;
  }
  return end_ < kBufferBytes;
}

void Stream::parse(plugin::Events *events) {
  more_ = false;
  while (!ended_) {
    if (events->full()) {
      more_ = in_payload_ ? left_ == 0 || begin_ != end_ : end_ - begin_ >= sizeof(FrameHeader);
      return;
    }
    if (in_payload_) {
      size_t step = std::min<uint64_t>(left_, end_ - begin_);
      if (step > 0) {
        if (destination_ != nullptr) {
          memcpy(destination_, buffer_.get() + begin_, step);
          destination_ += step;
        }
        begin_ += step;
        left_ -= step;
      }
      if (left_ > 0) return;
      end_frame(events);
      continue;
    }
    if (end_ - begin_ < sizeof(FrameHeader)) return;
    FrameHeader header;
    memcpy(&header, buffer_.get() + begin_, sizeof header);
    if (!begin_frame(header, events)) return;
  }
}

// Takes the header at begin_. False: the stream has ended, or the rest of a SEND must come first.
bool Stream::begin_frame(const FrameHeader &header, plugin::Events *events) {
  if (!plausible(header)) return false;
  if (header.type == FrameType::kSend && end_ - begin_ < sizeof header + header.length) return false;
  begin_ += sizeof header;

  if (header.type == FrameType::kRefused) {
    operation(header.number).refused = -static_cast<int32_t>(header.immediate);
  }
  acked_ = header.consumed;
  switch (header.type) {
    case FrameType::kWrite:
    case FrameType::kSignal: {
      uint8_t *destination = nullptr;
      auto verdict = link_->exports->check(header.slot, header.key, link_->rank, link_->epoch, header.offset,
                                           header.length, &destination);
      bool allowed = verdict == Exports::Verdict::kAllowed;
      current_ = header;
      in_payload_ = true;
      destination_ = allowed ? destination : nullptr;
      refusal_ = allowed ? EPT_OK : EPT_E_ACCESS;
      left_ = header.length;
      break;
    }
    case FrameType::kSend: {
      ept_event *event = events->add(EPT_EVENT_RECV, link_->rank, link_->epoch);  // not full: it goes out in this poll
      event->rail = rail_;
      event->data = buffer_.get() + begin_;
      event->length = header.length;
      held_in_poll_ = *link_->poll_number;
      begin_ += header.length;
      ++counters_.rx_sends;
      consumed_one(header.length);
      break;
    }
    case FrameType::kFinish:
      finished_ = true;
      break;
    case FrameType::kAck:
    case FrameType::kRefused:
      break;
  }
  return true;
}

// Everything that a header may not say, whoever says it. Ends the stream.
bool Stream::plausible(const FrameHeader &header) {
  if (header.magic != kFrameMagic || header.flags != 0 || header.reserved != 0 || header.reserved2 != 0) {
    violation("starts a frame with", header.magic, kFrameMagic);
    return false;
  }
  if (finished_) {
    violation("sends after its FINISH a frame of type", static_cast<uint64_t>(header.type), 0);
    return false;
  }
  if (header.consumed < acked_ || header.consumed > may_be_sent()) {
    violation("claims to have consumed operations", header.consumed, may_be_sent());
    return false;
  }
  uint64_t longest = 0;
  bool numbered = false;
  switch (header.type) {
    case FrameType::kWrite:
      longest = link_->limits.max_message;
      numbered = true;
      break;
    case FrameType::kSignal:
      numbered = true;
      break;
    case FrameType::kSend:
      longest = link_->limits.max_send;
      numbered = true;
      break;
    case FrameType::kRefused:
      if (header.number < acked_ || header.number >= header.consumed ||
          -static_cast<int64_t>(header.immediate) < EPT_E_INTERNAL || header.immediate == 0) {
        violation("refuses operation", header.number, header.consumed);
        return false;
      }
      break;
    case FrameType::kAck:
    case FrameType::kFinish:
      break;
    default:
      violation("sends a frame of type", static_cast<uint64_t>(header.type), static_cast<uint64_t>(FrameType::kFinish));
      return false;
  }
  if (header.length > longest) {
    violation("announces a payload of bytes", header.length, longest);
    return false;
  }
  if (numbered && header.number != consumed_) {
    violation("numbers an operation", header.number, consumed_);
    return false;
  }
  if (numbered && header.number - stamped_ >= link_->limits.depth) {
    violation("has more operations in flight than it said", header.number - stamped_, link_->limits.depth);
    return false;
  }
  return true;
}

// The payload of current_ is whole, or was thrown away.
void Stream::end_frame(plugin::Events *events) {
  in_payload_ = false;
  if (refusal_ != EPT_OK) {
    // The peer has at most `depth` in flight, so it has heard of those further back.
    if (current_.number >= link_->limits.depth) forget_refusals(current_.number - link_->limits.depth + 1);
    refusals_.push_back(Refusal{current_.number, refusal_});
  } else {
    ept_event *event = events->add(EPT_EVENT_IMM, link_->rank, link_->epoch);
    event->rail = rail_;
    event->immediate = current_.immediate;
    event->length = current_.length;
    counters_.rx_bytes += current_.length;
    ++counters_.rx_operations;
    ++immediates_;
  }
  consumed_one(current_.length);
}

void Stream::consumed_one(uint64_t bytes) {
  ++consumed_;
  owed_bytes_ += bytes;
  if (consumed_ - stamped_ >= std::min(kAckOperations, std::max(1u, link_->limits.depth / 2)) ||
      owed_bytes_ >= kAckBytes)
    acknowledge();
}

void Stream::revalidate() {
  if (!in_payload_ || refusal_ != EPT_OK) return;
  uint8_t *start = nullptr;
  auto verdict = link_->exports->check(current_.slot, current_.key, link_->rank, link_->epoch, current_.offset,
                                       current_.length, &start);
  if (verdict == Exports::Verdict::kAllowed) return;
  take_back_receiving();
  destination_ = nullptr;
  refusal_ = EPT_E_ACCESS;
}

void Stream::violation(const char *what, uint64_t seen, uint64_t allowed) {
  end(0, format("it broke the protocol: it %s %llu where %llu was due or the limit", what,
                static_cast<unsigned long long>(seen), static_cast<unsigned long long>(allowed)));
  violated_ = true;
}

void Stream::end(int number, std::string text) {
  if (ended_) return;
  ended_ = dead_ = true;
  readable_ = more_ = false;
  end_errno_ = number;
  end_text_ = std::move(text);
}

Pulse Stream::pulse(uint64_t now_ns) {
  Pulse pulse;
  tcp_info info{};
  socklen_t length = sizeof info;
  if (down_ || getsockopt(fd_.get(), IPPROTO_TCP, TCP_INFO, &info, &length) != 0) return pulse;
  int queued_bytes = 0;
  ioctl(fd_.get(), SIOCOUTQ, &queued_bytes);
  const uint64_t sent_away = sends_away() ? send_job_->moved.load(std::memory_order_relaxed) : 0;
  const uint64_t received_away = receives_away() ? receive_job_->moved.load(std::memory_order_relaxed) : 0;
  const uint64_t position[6] = {
      acked_, sent_, sent_offset_ + sent_away, consumed_, left_ - received_away, static_cast<uint64_t>(queued_bytes)};
  if (!in_flight() || memcmp(position, position_, sizeof position) != 0) moved_ns_ = now_ns;
  memcpy(position_, position, sizeof position);
  pulse.stalled_ns = now_ns - moved_ns_;
  if (pulse.stalled_ns > 0)
    pulse.text = format("nothing has moved on it for %llu ms with operations in flight",
                        static_cast<unsigned long long>(pulse.stalled_ns / 1000000));
  // A peer that is alive but does not read answers the probes of its closed window, which clears `probes` (one in a row
  // may be passed over: Linux answers twice a second); one that reads acknowledges, which clears `retransmits`.
  // TCP_USER_TIMEOUT can't tell the first from a dead one.
  if (info.tcpi_retransmits == 0 && info.tcpi_probes < 2) {
    unanswered_since_ns_ = 0;
    return pulse;
  }
  if (unanswered_since_ns_ == 0) unanswered_since_ns_ = now_ns;
  pulse.silent_ns = std::min<uint64_t>(now_ns - unanswered_since_ns_, info.tcpi_last_ack_recv * uint64_t{1000000});
  pulse.text =
      format("its machine has acknowledged nothing for %u ms (%u retransmissions, %u probes without an answer)",
             info.tcpi_last_ack_recv, info.tcpi_retransmits, info.tcpi_probes);
  return pulse;
}

}  // namespace tcp
