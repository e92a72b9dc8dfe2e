// SPDX-License-Identifier: Apache-2.0
// How a stream outlives its connections, and why nothing is lost, counted twice or counted early.
//
// A STREAM is two sequences of numbered operations (frame.h), one each way; a CONNECTION carries a stretch of them. A
// stream has one connection at a time, or none (it is `down`). Connections of a stream are numbered by who dials
// (`generation`, higher with every try), and the acceptor takes none that is not past the last one it took.
//
//   1. RETIRE BEFORE YOU SPEAK. A side first retires its old connection: it is reset, what is in the read buffer and
//   not
//      parsed is thrown away, and no byte of it is ever read again. Only then it says how many operations of the other
//      side it has consumed on this stream (`consumed`): the dialer in its Proof, the acceptor in its Answer. So that
//      number is final, whatever still travels on the old connection; bytes that come late meet a closed socket.
//   2. CONSUMED IS WHOLE OR NOT AT ALL. `consumed` goes up with the event (IMM, RECV, a refusal) and with nothing else.
//   A
//      frame that came in half was not consumed: its bytes at the destination are overwritten by the replay, and no
//      event has told of them.
//   3. REPLAY FROM THERE. The other side sends from operation `consumed` on. Each operation before it has had its
//   event;
//      none from it on has, or ever will by the old connection (1). So each has exactly one event, after its bytes: not
//      lost, not twice, not early. A connection that breaks before the Answer arrives changes nothing: `consumed` is a
//      count on the stream, not on the connection, so the next handshake says the same or more.
//   4. SOURCES STAY. An operation may be sent again until it is acknowledged, so its source is held from post to
//      LOCAL_DONE, and memory that it lies in can't be deregistered before.
//   5. REFUSALS ARE TOLD AGAIN. An operation below `consumed` counts as done unless its REFUSED frame came first, and
//   such
//      frames are lost with a connection. So the handshake never acknowledges: it only says where to send from.
//      Acknowledgement comes by frames, behind the REFUSED frames of all refusals that the other side may not know:
//      those from its `acknowledged` on. They are remembered until the other side must know them: it has `depth`
//      operations in flight at most, so operation n says that it has heard of all up to n - depth.
//
// What a side believes of the other is checked: `consumed` between what was acknowledged and what was sent, and
// `acknowledged` not past what was consumed. Anything else ends the peer.
#pragma once

#include <cstdint>

namespace tcp {

// What one side of a stream says of it when it is connected again. Zeros on the first connection.
struct ResumePoint {
  uint64_t consumed = 0;      // operations of the other side that this side has consumed
  uint64_t acknowledged = 0;  // operations of its own that this side knows to be consumed
};

}  // namespace tcp
