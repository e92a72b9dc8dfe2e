// SPDX-License-Identifier: Apache-2.0
#include "moe/links.h"

namespace ept::moe {

void make_signals(ept_engine *engine, Lane &lane, uint32_t source) {
  Link &link = lane.links[source];
  Error error;
  for (uint32_t p = 0; p < EPT_PHASES; p++) {
    const std::string phase = p == EPT_PHASE_DISPATCH ? "dispatch" : "combine";
    const std::string data = phase + " of lane " + std::to_string(lane.index);
    const std::string grants = "grants of " + data;
    // Our own waits tell more than the engine's could (wait.cc), and the phases have the same numbers.
    const auto create = [&](const std::string &label, uint64_t *word, ept_signal_id *id) {
      *word = 0;  // a link that is made anew finds the counts of the one before
      ept_memory home{};
      home.size = sizeof home;
      home.kind = EPT_MEMORY_HOST;
      home.address = word;
      home.length = sizeof *word;
      check(ept_signal_create(engine, source, label.c_str(), &home, id, &error), error);
      check(ept_signal_phase(engine, *id, p, &error), error);
    };
    for (uint32_t i = 0; i < 4; i++)
      create(data, lane.words.arrived(source, p, i / 2, i % 2), &link.arrived[p][i / 2][i % 2]);
    create(grants, lane.words.granted(source, p), &link.granted[p]);
  }
}

namespace {

constexpr size_t kBlob = 4096;  // the longest that a backend gives out, and the engine's envelope around it

void put_signal(ept_engine *engine, ept_signal_id id, Bytes &bytes) {
  char blob[kBlob];
  size_t length = sizeof blob;
  Error error;
  check(ept_signal_export(engine, id, blob, &length, &error), error);
  bytes.put_text(blob, length);
}

ept_remote_signal_id get_signal(ept_engine *engine, uint32_t rank, Bytes &bytes) {
  const std::string blob = bytes.get_text();
  ept_remote_signal_id id = 0;
  Error error;
  check(ept_signal_import(engine, rank, blob.data(), blob.size(), &id, &error), error);
  return id;
}

}  // namespace

void give_signals(ept_engine *engine, const Link &link, Bytes &bytes) {
  for (uint32_t p = 0; p < EPT_PHASES; p++) {
    for (uint32_t i = 0; i < 4; i++) put_signal(engine, link.arrived[p][i / 2][i % 2], bytes);
    put_signal(engine, link.granted[p], bytes);
  }
}

void give_region(ept_engine *engine, ept_memory_id memory, uint32_t to, uint64_t length, Bytes &bytes) {
  char blob[kBlob];
  size_t size = sizeof blob;
  Error error;
  check(ept_region_export(engine, memory, to, 0, length, blob, &size, &error), error);
  bytes.put_text(blob, size);
}

void take_signals(ept_engine *engine, uint32_t from, Link &link, Bytes &bytes) {
  for (uint32_t p = 0; p < EPT_PHASES; p++) {
    for (uint32_t i = 0; i < 4; i++) link.raise[p][i / 2][i % 2] = get_signal(engine, from, bytes);
    link.grant[p] = get_signal(engine, from, bytes);
  }
}

ept_region_id take_region(ept_engine *engine, uint32_t from, Bytes &bytes) {
  const std::string blob = bytes.get_text();
  ept_region_id id = 0;
  Error error;
  check(ept_region_import(engine, from, blob.data(), blob.size(), &id, &error), error);
  return id;
}

void release(ept_engine *engine, Link &link) {
  Error error;
  if (link.region) ept_region_drop(engine, link.region, &error);
  for (uint32_t p = 0; p < EPT_PHASES; p++) {
    if (link.grant[p]) ept_signal_drop(engine, link.grant[p], &error);
    if (link.granted[p]) ept_signal_destroy(engine, link.granted[p], &error);
    for (uint32_t i = 0; i < 4; i++) {
      if (link.raise[p][i / 2][i % 2]) ept_signal_drop(engine, link.raise[p][i / 2][i % 2], &error);
      if (link.arrived[p][i / 2][i % 2]) ept_signal_destroy(engine, link.arrived[p][i / 2][i % 2], &error);
    }
  }
  link = Link();
}

}  // namespace ept::moe
