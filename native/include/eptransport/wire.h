/* SPDX-License-Identifier: Apache-2.0
 *
 * wire.h: everything that two ranks must agree on, and the only place that knows it: the 32-bit immediate, the engine's
 * messages, and the header and rows of dispatch and combine. C, C++ and CUDA; no allocation, no I/O. All integers are
 * little-endian as the machines are; a big-endian build is refused below.
 */
#ifndef EPTRANSPORT_WIRE_H
#define EPTRANSPORT_WIRE_H

#include <stdint.h>

#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "eptransport's wire format is little-endian"
#endif

#ifdef __CUDACC__
#define EPT_HD __host__ __device__
#else
#define EPT_HD
#endif

#define EPT_WIRE_VERSION 2

/* ==== 1. The immediate ============================================================================================
 *
 *      31    28 27          18 17                               0
 *     +--------+--------------+----------------------------------+
 *     | code:4 |    seq:10    |             chan:18              |
 *     +--------+--------------+----------------------------------+
 *
 * `chan` names one (source, epoch, signal) at the receiver, which gives it out when it exports the signal and gives it
 * out again only after that source's epoch is fenced. An unknown chan is counted and dropped; so is one of a link that
 * has ended.
 *   code 1       transfer n of the chan, whole, in this one operation
 *   code 2..14   one of `code` pieces of transfer n; seq = n mod 1024
 *   code 15      one of many pieces; how many says a DESCRIPTOR message {chan, seq, pieces}, which counts as a piece
 * too code 0       never sent
 *
 * Receiver, for each chan: counts the pieces of each seq; when a seq has all, zeroes its entry, raises the signal by
 * one (release), and moves the prefix P on over every finished transfer that follows it.
 *
 * Credits are the window. Each immediate and each DESCRIPTOR in flight to a peer holds one of C <= 1024 credits (over
 * all rails together). The receiver gives a credit back when it has consumed the piece, except that every transfer
 * keeps ONE of its credits until the prefix of its chan has passed it. Credits come back in quanta: a grant is a code-1
 * transfer of zero bytes on a chan kept for that, worth EPT_GRANT_QUANTUM, and takes no credit itself.
 *
 * Proof. Let a chan's transfers be numbered n = 0, 1, ... and P its prefix at the receiver.
 *   Window: a transfer with n >= P that has at least one posted piece holds at least one credit that was not given
 * back; there are at most C <= 1024 such. Transfers of a chan are posted in order, so the live n lie in [P, P + 1024):
 * their residues mod 1024 are distinct. A grant tells no more than the receiver did already, so the sender's view of
 * its credits never exceeds the truth. Not early: each piece's immediate comes after that piece's bytes (contract 3),
 * each piece has exactly one, and the signal moves after all `code` (or the descriptor's number, plus the descriptor)
 * of them. Once: the entry is zeroed before P moves, so before the kept credit returns, so before its residue is used
 * again. Not lost: chan exists before the source is told of it; an early piece is counted in its entry whoever waits.
 *   No deadlock: a sender posts a peer's pieces in order, transfer after transfer. The first unfinished transfer of a
 *     peer keeps one credit, its other pieces give theirs back as they land; every later one that was begun is a
 * transfer that is wholly posted but for the last begun. So all credits but one a live transfer return without any
 * action of the application, and the last begun one moves on as soon as one returns. Grants themselves need no credit,
 * and their number in flight is at most C / EPT_GRANT_QUANTUM + 1 a peer, which the receive depth reserves. It takes C
 * > EPT_GRANT_QUANTUM, since up to QUANTUM - 1 returned credits may wait to fill a quantum, and up to a window of
 * finished transfers may wait behind an unfinished one, which needs no further credit once posted whole: the transfer
 * that blocks the prefix is fully posted before any later one of the same peer begins. tests/native/immediate_model.cc
 * walks every state of a small instance of this and shows that each of its rules is needed: without it the walk finds
 * an early, double or lost signal or a deadlock.
 */
#define EPT_IMM_CHAN_BITS 18
#define EPT_IMM_SEQ_BITS 10
#define EPT_IMM_CHANS (1u << EPT_IMM_CHAN_BITS)
#define EPT_IMM_WINDOW (1u << EPT_IMM_SEQ_BITS)
#define EPT_IMM_MAX_PIECES 14u
#define EPT_IMM_MANY 15u
#define EPT_GRANT_QUANTUM 64u /* 1/16 of the window: a grant a 64 immediates keeps grants under 2 % of the traffic */

EPT_HD static inline uint32_t ept_imm(uint32_t code, uint32_t seq, uint32_t chan) {
  return code << 28 | (seq & (EPT_IMM_WINDOW - 1)) << EPT_IMM_CHAN_BITS | chan;
}
EPT_HD static inline uint32_t ept_imm_code(uint32_t imm) { return imm >> 28; }
EPT_HD static inline uint32_t ept_imm_seq(uint32_t imm) { return imm >> EPT_IMM_CHAN_BITS & (EPT_IMM_WINDOW - 1); }
EPT_HD static inline uint32_t ept_imm_chan(uint32_t imm) { return imm & (EPT_IMM_CHANS - 1); }

/* ==== 2. Messages between engines =================================================================================
 * Each SEND starts with this. Messages may overtake one another and any write.
 */
typedef enum ept_message_type {
  EPT_MESSAGE_HELLO = 1,      /* ept_hello: first on a new peer, both ways */
  EPT_MESSAGE_USER = 2,       /* ept_engine_send; tags with the top bit set are dispatch and combine's own */
  EPT_MESSAGE_DESCRIPTOR = 3, /* ept_descriptor */
  EPT_MESSAGE_QUIESCE = 4,    /* ept_quiesce_message: the keys of `region` are revoked, say when you are through */
  EPT_MESSAGE_QUIESCED = 5,   /*   the answer */
  EPT_MESSAGE_GOODBYE = 6,    /* orderly close: what comes after is not a failure */
  EPT_MESSAGE_VOID = 7,       /* ept_void: a piece was refused and will never land */
  EPT_MESSAGE_HEARTBEAT = 8   /* ept_heartbeat: a sign of life; takes no credit, see there */
} ept_message_type;

#define EPT_TAG_OURS 0x8000000000000000ull /* the top bit of a tag */

typedef struct ept_message {
  uint16_t version; /* EPT_WIRE_VERSION */
  uint16_t type;    /* ept_message_type */
  uint32_t epoch;   /* of the sender */
  uint64_t tag;
} ept_message;

typedef struct ept_hello {
  uint32_t rank;
  uint32_t rails;
  uint32_t credits;          /* immediates that the reader may have in flight to the writer, all rails together */
  uint32_t send_credits;     /* SENDs likewise; a HELLO takes none */
  uint32_t credit_chan;      /* chan on which the reader's grants of immediates arrive here, at the writer */
  uint32_t send_credit_chan; /*   and of SENDs; worth EPT_SEND_QUANTUM each */
  uint32_t plain_chan;       /* chan of transfers that raise no signal: they are counted for their credits alone */
  uint32_t anchor_length;    /* bytes of blob behind this struct: the region that zero-length signals name */
  uint64_t consumed;         /* receive state: immediates of this (peer, epoch) consumed so far; 0 on a new peer */
  uint32_t reader_epoch;     /* the life of the reader that this HELLO is for; another life takes no notice of it */
  uint32_t heartbeat_us;     /* the writer gives a sign of life that often; 0: it promises none */
} ept_hello;

/* A sign of life, and the highest epoch of the membership that its sender knows. It takes no credit, so their number is
 * bounded otherwise: who has sent EPT_FREE_HEARTBEATS since anything last came from the reader sends no further one. */
typedef struct ept_heartbeat {
  uint32_t membership;
  uint32_t reserved;
} ept_heartbeat;
#define EPT_FREE_HEARTBEATS 2u

#define EPT_SEND_QUANTUM 4u

typedef struct ept_descriptor {
  uint32_t chan;
  uint32_t seq;
  uint64_t pieces; /* immediates of code 15 that belong to it; the descriptor comes on top */
} ept_descriptor;

/* A piece that failed while its peer lives (a revoked key, say) can't be left out of the count: the prefix, and with it
 * the credits behind it, would stand still. So its sender says that it is void. It counts as a piece, under the credit
 * of the piece that was refused; a transfer with a void piece ends without raising its signal. */
typedef struct ept_void {
  uint32_t chan;
  uint32_t seq;
  uint32_t code; /* of the piece */
  uint32_t reserved;
} ept_void;

typedef struct ept_quiesce_message {
  uint64_t region; /* the exporter's number of the region, ~0: all */
  uint64_t nonce;  /* comes back in QUIESCED */
} ept_quiesce_message;

typedef struct ept_lane_ack {
  uint32_t lane;
  uint32_t reserved;
  uint64_t consumed[2]; /* as in ept_moe_header */
} ept_lane_ack;

/* ==== 3. Dispatch and combine =====================================================================================
 *
 * A message of a phase from rank s to rank r is one write: a header, then `rows` rows, packed, all of `row_bytes`.
 *
 *   dispatch message                                         combine message
 *   +--------------------------------------------+           +-----------------------------------+
 *   | ept_moe_header, 128 bytes                  |           | ept_moe_header, 128 bytes         |
 *   | uint32 counts[local experts of r], to 64 B |           +-----------------------------------+
 *   +--------------------------------------------+           | row 0: the sum for the token that |
 *   | row 0                                      |           |  was dispatch row 0 of r's        |
 *   | row 1 ...                                  |           |  message from the reader          |
 *   +--------------------------------------------+           | row 1 ...                         |
 *                                                            +-----------------------------------+
 *   dispatch row: a token that has at least one expert at r, in the order of tokens; once, however many
 *   +-----------------+-----------------+--------+--------+----------------+----------------+---------------+
 *   | payload, to 16 B| scales, to 16 B | token  | flags  | expert[top_k]  | ordinal[top_k] | weight[top_k] | to 16 B
 *   | opaque bytes    | opaque bytes    | uint32 | uint32 | int32, -1: not | uint32         | float32       |
 *   |                 |                 |        |        |  at r          |                |               |
 *   +-----------------+-----------------+--------+--------+----------------+----------------+---------------+
 *   combine row:
 *   +-----------------+--------------------------------------------+
 *   | payload, to 16 B| float32 row_weights[top_k], to 16 B        |  the second only if FLAG_ROW_WEIGHTS
 *   +-----------------+--------------------------------------------+
 *   weights message (FLAG_LATE_WEIGHTS, phase dispatch): a header without counts, then row j is float32 weight[top_k]
 * of dispatch row j, to 16 B.
 *
 * `expert` is the local number at r, and stands at the place k that it had in topk_ids; so a repeated id, a -1 and
 * row_weights all keep their place. `ordinal` says how many pairs (row, k) of this message stand before this one that
 * are for the same expert, by row and then by k (0 where there is none). So a row's places in a group of its expert
 * follow from the counts of the headers and from itself, whatever other rows say.
 *
 * LISTED. Between ranks that map each other's memory (those of one GPU; so it never goes over a network) a dispatch
 * message with that flag has no rows. After the counts stands a list, uint32_t token[rows]: row j of the message is row
 * token[j] of the source's own: in the source's lane, in the region of its message to itself, as far behind the
 * beginning as the longest header of any rank. There a row stands once, for all ranks that read it: `expert` has the
 * rank above its 16 bits of the local number, -1 where none is; `ordinal` counts in the message to that rank. It stands
 * until the slot is used again, which is when all have read it. The list of the message to the rank itself is nobody
 * else's business.
 *
 * GENERATIONS. A lane numbers its messages of each phase: generation g = 0, 1, ...; every rank makes the same calls, so
 * g is the same everywhere. Generation g uses slot g mod 2. A slot has two ring positions (0 and 1); a message that
 * fits the region is one chunk in position 0, taking the whole slot. A longer one is cut into chunks c = 0, 1, ...,
 * chunk c in position c mod 2, each half the slot; chunk c >= 2 is posted after the reader granted chunk c - 2. Each
 * (source, phase, lane, slot, position) has its own signal, raised once a chunk, and each chunk of one position is
 * posted only after the one before it there was consumed: so the count of a signal always says which chunk came.
 * Each chunk has a header (and, in a dispatch, the counts of the whole message). The reader grants every chunk that it
 * has consumed but the one with LAST: a zero-byte transfer that raises the sender's signal for (reader, phase, lane).
 * Grants are one count for all generations of a phase. LAST before total_rows: the sender has abandoned its call.
 *
 * FLOW. `consumed[phase]` says: the sender of this header has consumed, from every rank, all messages of generations
 * below that number. A source writes generation g of a phase into a peer's slot when it knows consumed[phase] >= g - 1
 * of that peer. In plain dispatch-combine pairs it always knows: combine g was sent after dispatch g was consumed, and
 * dispatch g + 1 after combine g.
 */
#define EPT_MOE_MAX_TOP_K 32u
#define EPT_MOE_SLOTS 2u
#define EPT_MOE_POSITIONS 2u /* of a slot; see GENERATIONS */
#define EPT_MOE_HEADER_BYTES 128u
#define EPT_MOE_MAGIC 0x4d545045u /* "EPTM" */

typedef enum ept_moe_phase { EPT_PHASE_DISPATCH = 0, EPT_PHASE_COMBINE = 1, EPT_PHASES = 2 } ept_moe_phase;

typedef enum ept_moe_flag {
  EPT_MOE_LAST = 1,         /* the last chunk of this message */
  EPT_MOE_LATE_WEIGHTS = 2, /* phase dispatch: weights only */
  EPT_MOE_ROW_WEIGHTS = 4,  /* combine rows carry row_weights */
  EPT_MOE_NO_WEIGHTS = 8,   /* dispatch without topk_weights: they come at combine, or are 1 */
  EPT_MOE_LISTED = 16       /* dispatch, between ranks that map each other's memory: see LISTED */
} ept_moe_flag;

typedef struct ept_moe_header {
  uint32_t magic;   /* EPT_MOE_MAGIC */
  uint16_t version; /* EPT_WIRE_VERSION */
  uint16_t phase;
  uint32_t source; /* rank */
  uint32_t lane;
  uint64_t generation;
  uint32_t chunk;
  uint32_t flags;      /* ept_moe_flag */
  uint32_t rows;       /* in this chunk */
  uint32_t total_rows; /* in the whole message */
  uint32_t row_bytes;
  uint32_t payload_bytes; /* of a row, not padded */
  uint32_t scale_bytes;   /* of a row, not padded */
  uint32_t top_k;
  uint64_t consumed[2];      /* indexed by phase; see FLOW */
  uint64_t combine_offset;   /* dispatch: where in the sender's combine slot the reader's combine message goes */
  uint64_t combine_capacity; /* dispatch: bytes there, header included */
  uint32_t epoch;            /* of the sender */
  uint32_t payload_format;   /* ept_dtype of the payload; opaque to the wire */
  uint32_t scale_format;     /* ept_dtype of the scales; 0: none */
  uint32_t object;           /* number of the AllToAll; ranks that call out of step are told so */
  uint32_t membership; /* epoch of the membership that the step was begun under; the same at its reader, or reset */
  uint32_t reserved[5];
} ept_moe_header;

EPT_HD static inline uint64_t ept_align(uint64_t bytes, uint64_t to) { return (bytes + to - 1) / to * to; }

/* Offsets inside a dispatch row. */
EPT_HD static inline uint64_t ept_row_scales(uint64_t payload) { return ept_align(payload, 16); }
EPT_HD static inline uint64_t ept_row_token(uint64_t payload, uint64_t scales) {
  return ept_row_scales(payload) + ept_align(scales, 16);
}
EPT_HD static inline uint64_t ept_row_experts(uint64_t payload, uint64_t scales) {
  return ept_row_token(payload, scales) + 8;
}
EPT_HD static inline uint64_t ept_row_ordinals(uint64_t payload, uint64_t scales, uint32_t top_k) {
  return ept_row_experts(payload, scales) + 4ull * top_k;
}
EPT_HD static inline uint64_t ept_row_weights(uint64_t payload, uint64_t scales, uint32_t top_k) {
  return ept_row_ordinals(payload, scales, top_k) + 4ull * top_k;
}
EPT_HD static inline uint64_t ept_row_bytes(uint64_t payload, uint64_t scales, uint32_t top_k) {
  return ept_align(ept_row_weights(payload, scales, top_k) + 4ull * top_k, 16);
}
/* Combine rows; `row_weights` is 0 or 1. */
EPT_HD static inline uint64_t ept_combine_row_bytes(uint64_t payload, uint32_t top_k, int row_weights) {
  return ept_align(payload, 16) + (row_weights ? ept_align(4ull * top_k, 16) : 0);
}
EPT_HD static inline uint64_t ept_late_weights_row_bytes(uint32_t top_k) { return ept_align(4ull * top_k, 16); }
/* Header with counts. */
EPT_HD static inline uint64_t ept_dispatch_header_bytes(uint32_t local_experts) {
  return EPT_MOE_HEADER_BYTES + ept_align(4ull * local_experts, 64);
}

/* NUMBERS. The CPU and the GPU executor give the same bits:
 *   quantise  a block of 128 elements (the last may be shorter): amax = max |x| in fp32;
 *             fp32 scales   scale = max(amax, epsilon) / 448                 (IEEE division)
 *             UE8M0 scales  scale = 2^ceil(log2(max(amax, epsilon) / 448)), stored as its exponent byte
 *             q = e4m3(x / scale): IEEE division, round to nearest even, saturating at +-448; NaN stays NaN;
 *             amax takes no notice of a NaN, and an infinite one gives an infinite scale (UE8M0: byte 255)
 *   expert rank, for one row: acc = 0; for k = 0 .. top_k - 1 with an expert here: acc = fma(weight[k], out[k], acc)
 *             in fp32, then rounded once to combine_dtype
 *   source, for one token: acc = 0; for r = 0 .. world - 1 that sent a row for it: acc = acc + row[r] in fp32, then
 *             rounded once to dtype
 * No contraction but the fma written here (-ffp-contract=off). */
#define EPT_FP8_BLOCK 128u
#define EPT_E4M3_MAX 448.0f

#ifdef __cplusplus
static_assert(sizeof(ept_message) == 16 && sizeof(ept_hello) == 48 && sizeof(ept_descriptor) == 16, "wire layout");
static_assert(sizeof(ept_moe_header) == EPT_MOE_HEADER_BYTES, "wire layout");
#endif

#endif
