/* SPDX-License-Identifier: Apache-2.0
 * Memory here, regions there, and quiescence: when may memory be used for something else? */
#include "engine/engine.h"
#include "engine/wait.h"

using namespace ept;

namespace {

/* What region_export gives: the plugin's blob in an envelope. Opaque to all but ept_region_import. */
struct RegionBlob {
  uint32_t magic;
  uint16_t version;
  uint16_t reader; /* low bits of the rank it is for: a mix-up is told, not found by its damage */
  uint32_t exporter, epoch;
  uint64_t memory, length;
  uint32_t plugin_length, reader_epoch;
};
constexpr uint32_t region_magic = 0x52545045; /* "EPTR" */
static_assert(sizeof(RegionBlob) == 40);

bool inside(uint64_t offset, uint64_t length, uint64_t whole) { return offset <= whole && length <= whole - offset; }

}  // namespace

/* nobody: of all ranks. From here on nothing that carries the keys changes the memory. */
void ept_engine::revoke_exports(Memory &memory, uint32_t of) {
  std::erase_if(memory.exports, [&](const Memory::Export &given) {
    if (of != nobody && given.rank != of) return false;
    plugin->region_revoke(memory.mem, given.rank, given.key);
    exported_regions--;
    return true;
  });
}

/* Peers asked whether this rank is through with a region of theirs: yes, when none of its operations names it and the
 * plugin says that they can change nothing there any more. */
/* Answers wait for operations of ours and for send credits of the peer's, so it could make us keep any number. */
void ept_engine::on_quiesce(Peer &peer, const ept_quiesce_message &asked) {
  constexpr size_t most = 1024; /* one a thread over there that waits for quiescence, many times over */
  size_t kept = peer.messages.size();
  for (const QuiesceAnswer &answer : answers) kept += answer.peer == peer.rank;
  for (const auto &[cookie, answer] : answering) kept += answer.peer == peer.rank;
  if (kept >= most) {
    lose(peer, EPT_PEER_LOST, EPT_E_LIMIT, 0, "it asks for quiescence and does not take the answers");
    return;
  }
  answers.push_back({peer.rank, peer.link, asked.region, asked.nonce});
}

void ept_engine::answer_quiesces() {
  for (QuiesceAnswer &answer : answers) {
    if (answer.asked) continue;
    uint64_t busy = 0;
    regions.each([&](uint64_t, Region &region) {
      if (region.peer != answer.peer || region.link != answer.link ||
          (answer.memory != ~0ull && region.exporter_memory != answer.memory))
        return;
      region.revoked = true;
      busy += region.in_flight;
    });
    if (busy) continue;
    answer.asked = true;
    uint64_t cookie = next_nonce++;
    answering[cookie] = answer;
    if (plugin->quiesce(worker, answer.peer, EPT_SCOPE_REMOTE, cookie)) {
      answering.erase(cookie); /* no answer: the other side's deadline or our death tells */
      say(EPT_LOG_WARNING, "rank " + std::to_string(answer.peer) + " asked for quiescence, which the backend refused");
    }
  }
  std::erase_if(answers, [](const QuiesceAnswer &answer) { return answer.asked; });
}

void ept_engine::on_quiesced(const ept_event &event) {
  if (auto found = answering.find(event.cookie); found != answering.end()) {
    Peer &peer = peers[found->second.peer];
    ept_quiesce_message message{found->second.memory, found->second.nonce};
    if (event.code == EPT_OK && peer.status == EPT_PEER_UP && peer.link == found->second.link) {
      post_message(peer, EPT_MESSAGE_QUIESCED, 0, &message, sizeof message);
    }
    answering.erase(found);
    return;
  }
  if (auto found = quiescing.find(event.cookie); found != quiescing.end()) {
    if (event.code != EPT_OK) {
      found->second.code = event.code;
      found->second.text = event.text ? event.text : "the backend does not say what";
    }
    if (found->second.plugin_waiting) found->second.plugin_waiting--;
  }
}

extern "C" {

int32_t ept_memory_register(ept_engine *engine, const ept_memory *desc, ept_memory_id *id, ept_error *error) {
  return guarded(error, "memory_register", [&]() -> int32_t {
    Hold hold(engine->lock);
    if (int32_t code = engine->usable("memory_register", error)) return code;
    if (!desc->length || !desc->address) {
      return fail(error, EPT_E_INVALID, "memory_register", -1, "memory at %p of %llu bytes", desc->address,
                  static_cast<unsigned long long>(desc->length));
    }
    if (!(engine->caps.memory_kinds & static_cast<uint32_t>(desc->kind))) {
      return fail(error, EPT_E_UNSUPPORTED, "memory_register", -1,
                  "backend %s takes no memory of kind %d (it takes the kinds of mask %u)", engine->plugin_name.c_str(),
                  desc->kind, engine->caps.memory_kinds);
    }
    ept_mem *mem = nullptr;
    if (int32_t code = engine->plugin->mem_register(engine->instance, desc, &mem)) {
      return engine->plugin_error(code, "memory_register", -1, error);
    }
    Memory &memory = *engine->memories.add(id);
    memory.desc = *desc;
    memory.mem = mem;
    engine->registered_bytes += desc->length;
    return EPT_OK;
  });
}

int32_t ept_memory_deregister(ept_engine *engine, ept_memory_id id, ept_error *error) {
  return guarded(error, "memory_deregister", [&]() -> int32_t {
    Hold hold(engine->lock);
    Memory *memory = engine->memories.find(id);
    if (!memory) return fail(error, EPT_E_INVALID, "memory_deregister", -1, "no such memory (closed already?)");
    if (memory->in_flight) {
      return fail(error, EPT_E_INVALID, "memory_deregister", -1,
                  "%u transfers still read from this memory; wait for them, or quiesce", memory->in_flight);
    }
    if (!memory->aside.empty()) {
      const Memory::Aside &writer = memory->aside.front();
      return fail(error, EPT_E_STUCK, "memory_deregister", static_cast<int32_t>(writer.rank),
                  "rank %u, epoch %u, may write this memory still: backend %s can't revoke its key. The memory is set "
                  "aside until that process is known dead (ept_engine_known_dead)",
                  writer.rank, writer.epoch, engine->plugin_name.c_str());
    }
    engine->revoke_exports(*memory, nobody);
    if (int32_t code = engine->plugin->mem_deregister(memory->mem)) {
      return engine->plugin_error(code, "memory_deregister", -1, error);
    }
    engine->registered_bytes -= memory->desc.length;
    engine->memories.remove(id);
    return EPT_OK;
  });
}

int32_t ept_region_export(ept_engine *engine, ept_memory_id id, uint32_t rank, uint64_t offset, uint64_t length,
                          void *blob, size_t *blob_length, ept_error *error) {
  return guarded(error, "region_export", [&]() -> int32_t {
    Hold hold(engine->lock);
    if (int32_t code = engine->usable_peer(rank, "region_export", error)) return code;
    Memory *memory = engine->memories.find(id);
    if (!memory) return fail(error, EPT_E_INVALID, "region_export", -1, "no such memory (closed already?)");
    if (!inside(offset, length, memory->desc.length)) {
      return fail(error, EPT_E_INVALID, "region_export", static_cast<int32_t>(rank),
                  "[%llu, %llu + %llu) is not inside memory of %llu bytes", static_cast<unsigned long long>(offset),
                  static_cast<unsigned long long>(offset), static_cast<unsigned long long>(length),
                  static_cast<unsigned long long>(memory->desc.length));
    }
    if (!(memory->desc.access & EPT_ACCESS_REMOTE_WRITE)) {
      return fail(error, EPT_E_ACCESS, "region_export", static_cast<int32_t>(rank),
                  "this memory was registered without the right to be written by others");
    }
    if (engine->exported_regions >= engine->max_regions) {
      return fail(error, EPT_E_LIMIT, "region_export", static_cast<int32_t>(rank),
                  "%u regions are exported, which is max_regions", engine->max_regions);
    }
    uint8_t space[4096 + sizeof(RegionBlob)];
    size_t plugin_length = 4096;
    uint64_t key = 0;
    if (int32_t code = engine->plugin->region_export(memory->mem, rank, offset, length, space + sizeof(RegionBlob),
                                                     &plugin_length, &key)) {
      return engine->plugin_error(code, "region_export", static_cast<int32_t>(rank), error);
    }
    RegionBlob head{region_magic,
                    EPT_WIRE_VERSION,
                    static_cast<uint16_t>(rank),
                    engine->rank,
                    engine->epoch,
                    id,
                    length,
                    static_cast<uint32_t>(plugin_length),
                    engine->peers[rank].epoch};
    std::memcpy(space, &head, sizeof head);
    size_t size = sizeof head + plugin_length, capacity = *blob_length;
    *blob_length = size;
    if (!blob || capacity < size) {
      engine->plugin->region_revoke(memory->mem, rank, key);
      return fail(error, EPT_E_INVALID, "region_export", static_cast<int32_t>(rank),
                  "a blob of %zu bytes does not fit %zu", size, capacity);
    }
    std::memcpy(blob, space, size);
    memory->exports.push_back({rank, key});
    engine->exported_regions++;
    return EPT_OK;
  });
}

int32_t ept_region_revoke(ept_engine *engine, ept_memory_id id, uint32_t rank, ept_error *error) {
  return guarded(error, "region_revoke", [&]() -> int32_t {
    Hold hold(engine->lock);
    Memory *memory = engine->memories.find(id);
    if (!memory) return fail(error, EPT_E_INVALID, "region_revoke", -1, "no such memory (closed already?)");
    if (!engine->caps.can_revoke) {
      return fail(error, EPT_E_UNSUPPORTED, "region_revoke", static_cast<int32_t>(rank), "backend %s can't revoke keys",
                  engine->plugin_name.c_str());
    }
    engine->revoke_exports(*memory, rank);
    return EPT_OK;
  });
}

int32_t ept_region_import(ept_engine *engine, uint32_t rank, const void *blob, size_t length, ept_region_id *id,
                          ept_error *error) {
  return guarded(error, "region_import", [&]() -> int32_t {
    Hold hold(engine->lock);
    if (int32_t code = engine->usable_peer(rank, "region_import", error)) return code;
    const auto peer = static_cast<int32_t>(rank);
    RegionBlob head;
    if (length < sizeof head) {
      return fail(error, EPT_E_INVALID, "region_import", peer, "a region blob of %zu bytes is too short", length);
    }
    std::memcpy(&head, blob, sizeof head);
    if (head.magic != region_magic) return fail(error, EPT_E_INVALID, "region_import", peer, "this is no region blob");
    if (head.version != EPT_WIRE_VERSION) {
      return fail(error, EPT_E_VERSION, "region_import", peer, "the blob speaks wire version %u, this engine %d",
                  head.version, EPT_WIRE_VERSION);
    }
    if (head.exporter != rank || head.reader != static_cast<uint16_t>(engine->rank)) {
      return fail(error, EPT_E_INVALID, "region_import", peer,
                  "this region was exported by rank %u for rank %u, and imported by rank %u from rank %u",
                  head.exporter, head.reader, engine->rank, rank);
    }
    if (head.epoch != engine->peers[rank].epoch || head.reader_epoch != engine->epoch) {
      return fail(error, EPT_E_PEER_LOST, "region_import", peer,
                  "this region was exported by epoch %u of rank %u for epoch %u of rank %u, and the link is between "
                  "epochs %u and %u: it is stale, ask for a new one",
                  head.epoch, rank, head.reader_epoch, engine->rank, engine->peers[rank].epoch, engine->epoch);
    }
    if (head.plugin_length != length - sizeof head) {
      return fail(error, EPT_E_INVALID, "region_import", peer, "the blob is cut: %zu bytes of %zu", length,
                  sizeof head + head.plugin_length);
    }
    if (engine->regions.used() >= engine->max_regions) {
      return fail(error, EPT_E_LIMIT, "region_import", peer, "%u regions are imported, which is max_regions",
                  engine->max_regions);
    }
    ept_region *region = nullptr;
    if (int32_t code = engine->plugin->region_import(
            engine->instance, rank, static_cast<const uint8_t *>(blob) + sizeof head, head.plugin_length, &region)) {
      return engine->plugin_error(code, "region_import", peer, error);
    }
    Region &made = *engine->regions.add(id);
    made.peer = rank;
    made.link = engine->peers[rank].link;
    made.region = region;
    made.length = head.length;
    made.exporter_memory = head.memory;
    return EPT_OK;
  });
}

int32_t ept_region_length(ept_engine *engine, ept_region_id id, uint64_t *length, ept_error *error) {
  Hold hold(engine->lock);
  const Region *region = engine->regions.find(id);
  if (!region) return fail(error, EPT_E_INVALID, "region_length", -1, "no such region (dropped already?)");
  *length = region->length;
  return EPT_OK;
}

int32_t ept_region_drop(ept_engine *engine, ept_region_id id, ept_error *error) {
  return guarded(error, "region_drop", [&]() -> int32_t {
    Hold hold(engine->lock);
    Region *region = engine->regions.find(id);
    if (!region) return fail(error, EPT_E_INVALID, "region_drop", -1, "no such region (dropped already?)");
    if (region->in_flight) {
      return fail(error, EPT_E_INVALID, "region_drop", static_cast<int32_t>(region->peer),
                  "%u operations to this region are under way; wait for them first", region->in_flight);
    }
    if (region->region) engine->plugin->region_drop(region->region);
    engine->regions.remove(id);
    return EPT_OK;
  });
}

int32_t ept_engine_quiesce(ept_engine *engine, ept_memory_id id, int32_t scope, uint64_t timeout, ept_error *error) {
  return guarded(error, "quiesce", [&]() -> int32_t {
    Hold hold(engine->lock);
    if (int32_t code = engine->usable("quiesce", error)) return code;
    Memory *memory = id ? engine->memories.find(id) : nullptr;
    if (id && !memory) return fail(error, EPT_E_INVALID, "quiesce", -1, "no such memory (closed already?)");
    const uint64_t begin = now_ns();
    const uint64_t limit = timeout == forever ? engine->timeout_ns : timeout;
    auto left = [&] {
      uint64_t gone = now_ns() - begin;
      return gone < limit ? limit - gone : 0;
    };
    /* 1. what this rank posted */
    uint64_t busy = 0;
    Waiting about{"quiesce", scope == EPT_SCOPE_REMOTE ? "here and at the peers" : "here"};
    int32_t code = engine->wait(
        hold, limit,
        [&]() -> int32_t {
          busy = 0;
          if (id) {
            if (const Memory *m = engine->memories.find(id)) busy = m->in_flight;
          } else {
            busy = engine->in_flight.used();
            for (const Peer &peer : engine->peers) busy += peer.queue.size() + peer.messages.size();
          }
          return busy ? EPT_LATER : EPT_OK;
        },
        error, &about);
    if (code == EPT_E_TIMEOUT) {
      return fail(error, code, "quiesce", -1, "rank %u: %llu operations are still under way after %.1f s", engine->rank,
                  static_cast<unsigned long long>(busy), static_cast<double>(limit) * 1e-9);
    }
    if (code) return code;
    /* 2. the plugin's word for it, and for REMOTE that of every peer that holds a key */
    const uint64_t nonce = engine->next_nonce++;
    PendingQuiesce &pending = engine->quiescing[nonce];
    auto ask_plugin = [&](uint32_t of) {
      if (code == EPT_OK) code = engine->plugin->quiesce(engine->worker, of, scope, nonce);
      if (code == EPT_OK) pending.plugin_waiting++;
    };
    if (scope == EPT_SCOPE_LOCAL) {
      ask_plugin(nobody);
    } else {
      /* Of who is up. What may still happen at a rank that is gone is not about our memory; that nothing of it lands
       * here is its fence's to say. */
      for (const Peer &peer : engine->peers) {
        if (peer.status == EPT_PEER_UP && peer.rank != engine->rank) ask_plugin(peer.rank);
      }
    }
    if (code < 0) {
      engine->quiescing.erase(nonce);
      return engine->plugin_error(code, "quiesce", -1, error);
    }
    if (scope == EPT_SCOPE_REMOTE) {
      std::vector<bool> holds(engine->world);
      auto revoke = [&](uint64_t, Memory &m) {
        for (const auto &given : m.exports) holds[given.rank] = true;
        engine->revoke_exports(m, nobody);
      };
      if (memory) {
        revoke(id, *memory);
      } else {
        engine->memories.each(revoke);
      }
      ept_quiesce_message message{id ? id : ~0ull, nonce};
      for (Peer &peer : engine->peers) {
        if (peer.rank == engine->rank || !holds[peer.rank]) continue;
        if (peer.status == EPT_PEER_UP) {
          engine->post_message(peer, EPT_MESSAGE_QUIESCE, 0, &message, sizeof message);
          pending.asked.push_back(peer.rank);
        }
      }
      engine->memories.each([&](uint64_t number, const Memory &m) {
        if ((id && number != id) || m.aside.empty()) return;
        pending.code = EPT_E_STUCK;
        pending.text = "the process that was rank " + std::to_string(m.aside.front().rank) + ", epoch " +
                       std::to_string(m.aside.front().epoch) + ", which may write on";
      });
    }
    code = engine->wait(
        hold, left(),
        [&]() -> int32_t {
          const PendingQuiesce &p = engine->quiescing[nonce];
          if (p.code) return p.code;
          if (p.plugin_waiting || !p.asked.empty()) return EPT_LATER;
          /* Who died or was masked is fenced, so that nothing of that life can land any more. */
          return scope == EPT_SCOPE_REMOTE && engine->fencing(nobody) ? EPT_LATER : EPT_OK;
        },
        error, &about);
    const PendingQuiesce ended = engine->quiescing[nonce];
    engine->quiescing.erase(nonce);
    if (code == EPT_E_STUCK) {
      return fail(error, code, "quiesce", -1, "rank %u: the memory can't be shown quiet; tear down %s", engine->rank,
                  ended.text.empty() ? "the link to the peer that died" : ended.text.c_str());
    }
    if (code == EPT_E_TIMEOUT) {
      std::string who;
      for (uint32_t rank : ended.asked) who += " rank " + std::to_string(rank);
      if (ended.plugin_waiting) who += " backend " + engine->plugin_name;
      return fail(error, code, "quiesce", ended.asked.empty() ? -1 : static_cast<int32_t>(ended.asked[0]),
                  "rank %u asked for quiescence; in %.1f s no answer came from:%s", engine->rank,
                  static_cast<double>(limit) * 1e-9, who.c_str());
    }
    return code;
  });
}

}  // extern "C"
