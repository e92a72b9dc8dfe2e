// SPDX-License-Identifier: Apache-2.0
//
// The NVSHMEM backend: kernels post by themselves (IBGDA on ConnectX cards; NVLink, or the same GPU, where peers are
// mapped for NVSHMEM). docs/backends/nvshmem.md has what runs over what. This file: settings, what it would do here,
// and the table, whose host half passes every call on to the network beneath (control.h). device.cc has the device
// half.
#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <filesystem>

#include "../values.h"
#include "images.h"
#include "instance.h"

using namespace nvshmem;

namespace {

constexpr const char *kVersion = "1";

const ept_setting kSettings[] = {
    {sizeof(ept_setting), EPT_SETTING_STRING, "control", "auto", 0, 0,
     "Backend beneath: set-up, resets and masks go over it, and rows to and from ranks on CPUs; a name or a path; "
     "auto: "
     "verbs where there are ConnectX cards, else tcp."},
    {sizeof(ept_setting), EPT_SETTING_STRING, "control_options", "", 0, 0,
     "Settings of that backend, name=value with semicolons between; those given as EPT_<ITS NAME>_* count too."},
    {sizeof(ept_setting), EPT_SETTING_STRING, "interface", "", 0, 0,
     "Network interface that the backend beneath listens on, and NVSHMEM's own bootstrap."},
    {sizeof(ept_setting), EPT_SETTING_STRING, "devices", "", 0, 0, "Network devices, for the backend beneath."},
    {sizeof(ept_setting), EPT_SETTING_STRING, "port_range", "", 0, 0, "Ports, for the backend beneath."},
    {sizeof(ept_setting), EPT_SETTING_STRING, "library", "", 0, 0,
     "libnvshmem_host.so.3; empty: the wheel beside this package, then the system's."},
    {sizeof(ept_setting), EPT_SETTING_INT, "heap_mib", "1024", 1, 1 << 20,
     "MiB of this rank's part of the symmetric heap, where lanes of AllToAlls are; the same on every rank."},
    {sizeof(ept_setting), EPT_SETTING_INT, "device", "-1", -1, 1023,
     "CUDA device of this rank; -1: the calling thread's current one, else LOCAL_RANK's."},
    {sizeof(ept_setting), EPT_SETTING_BOOL, "ibgda", "1", 0, 0,
     "Let kernels post to ConnectX cards by themselves (NVSHMEM_IB_ENABLE_IBGDA), where there are any."},
};
constexpr size_t kSettingCount = sizeof kSettings / sizeof *kSettings;

// One a process (control.h).
std::atomic<const ept_backend *> beneath{nullptr};
const ept_backend &under() { return *beneath.load(std::memory_order_acquire); }

// What failed beneath has left its sentence there.
int32_t passed(int32_t code) {
  if (code >= 0) return code;
  ept_error said{};
  said.size = sizeof said;
  under().last_error(&said);
  return fail(code, said.operation, said.peer, said.provider_errno, "%s", said.text);
}

constexpr const char *kWaivedWhy =
    "NVSHMEM ends the process on a fatal error of a card or a peer (9, 11), and what kernels have put into the "
    "symmetric "
    "heap can't be called back, fenced or refused for one peer (10, 11, 12); what the backend beneath carries keeps "
    "its "
    "own clauses";

void add_caps(ept_caps *caps) {
  caps->group_only = 1;
  caps->gpu_initiated = 1;
  caps->waived |= 1u << 9 | 1u << 10 | 1u << 11 | 1u << 12;
  caps->waived_why = kWaivedWhy;
}

bool has_connectx() {
  std::error_code none;
  for (const auto &entry : std::filesystem::directory_iterator("/sys/class/infiniband", none))
    if (entry.path().filename().string().rfind("mlx5", 0) == 0) return true;
  return false;
}

int32_t read_settings(const ept_value *values, size_t count, Settings *settings) {
  plugin::Values given("nvshmem", kSettings, values, count);
  settings->control = given.text("control");
  if (settings->control == "auto") settings->control = has_connectx() && has_plugin("verbs") ? "verbs" : "tcp";
  settings->control_options = given.text("control_options");
  settings->interface = given.text("interface");
  settings->devices = given.text("devices");
  settings->port_range = given.text("port_range");
  settings->library = given.text("library");
  settings->heap_bytes = static_cast<uint64_t>(given.number("heap_mib")) << 20;
  settings->device = static_cast<int>(given.number("device"));
  settings->ibgda = given.flag("ibgda");
  return given.code();
}

int32_t take_control(const Settings &settings, ControlValues *values, const ept_backend **table) {
  std::string why;
  *table = open_control(settings.control, &why);
  if (*table == nullptr) return fail(EPT_E_CONFIG, "open", -1, 0, "nvshmem: %s", why.c_str());
  why = values->read(
      **table, {{"interface", settings.interface}, {"devices", settings.devices}, {"port_range", settings.port_range}},
      settings.control_options);
  return why.empty() ? EPT_OK : fail(EPT_E_CONFIG, "open", -1, 0, "nvshmem: %s", why.c_str());
}

// All that must be here before anything starts. UNAVAILABLE, and *mend.
int32_t find_pieces(const ept_host *host, const Settings &settings, std::shared_ptr<const Library> *library, Cuda *cuda,
                    std::string *mend) {
  if (no_images != nullptr) {
    *mend = "see docs/backends/nvshmem.md, Building";
    return fail(EPT_E_UNAVAILABLE, "open", -1, 0, "nvshmem: %s", no_images);
  }
  plugin::Refusal refusal;
  *library = open_library(settings.library, &refusal);
  *mend = refusal.mend;
  if (*library == nullptr) return fail(EPT_E_UNAVAILABLE, "open", -1, 0, "nvshmem: %s", refusal.why.c_str());
  // NVSHMEM lets a later host library serve what is linked with an earlier device library of the same major release.
  if ((*library)->major != linked[0] || (*library)->minor < linked[1]) {
    *mend = format("install NVSHMEM %d.%d or a later %d.x, or build this package with the installed one", linked[0],
                   linked[1], linked[0]);
    return fail(EPT_E_VERSION, "open", -1, 0, "nvshmem: %s is %s; the kernels are linked with %d.%d.%d",
                (*library)->path.c_str(), (*library)->release().c_str(), linked[0], linked[1], linked[2]);
  }
  if (!cuda->find(host)) {
    *mend = "install NVIDIA's driver";
    return fail(EPT_E_UNAVAILABLE, "open", -1, 0, "nvshmem: there is no CUDA driver (libcuda.so.1) here");
  }
  return EPT_OK;
}

int32_t nvshmem_probe(const ept_host *host, const ept_value *values, size_t value_count, ept_probe *report) {
  return plugin::guarded("nvshmem", "probe", [&]() -> int32_t {
    report->summary[0] = report->mend[0] = 0;
    Settings settings;
    ControlValues control;
    const ept_backend *table = nullptr;
    std::shared_ptr<const Library> library;
    Cuda cuda{};
    std::string mend = "correct that setting";
    ept_probe its{};
    its.size = sizeof its;
    its.caps.size = sizeof its.caps;
    int32_t code = read_settings(values, value_count, &settings);
    if (code == EPT_OK) code = take_control(settings, &control, &table);
    if (code == EPT_OK) code = table->probe(host, control.view().data(), control.view().size(), &its);
    const uint32_t size = report->caps.size;
    memcpy(&report->caps, &its.caps, std::min<size_t>(size, sizeof its.caps));
    report->caps.size = size;
    add_caps(&report->caps);
    if (code != EPT_OK && its.summary[0] != 0) {
      snprintf(report->summary, sizeof report->summary, "%s, beneath it: %.200s", settings.control.c_str(),
               its.summary);
      snprintf(report->mend, sizeof report->mend, "%.255s", its.mend);
      return EPT_E_UNAVAILABLE;
    }
    if (code == EPT_OK) code = find_pieces(host, settings, &library, &cuda, &mend);
    if (code != EPT_OK) {
      snprintf(report->summary, sizeof report->summary, "%.255s", plugin::last_error().text);
      snprintf(report->mend, sizeof report->mend, "%.255s", mend.c_str());
      return code == EPT_E_CONFIG ? code : EPT_E_UNAVAILABLE;
    }
    snprintf(report->summary, sizeof report->summary, "NVSHMEM %s (%.80s), %s, over %.20s: %.80s",
             library->release().c_str(), library->path.c_str(),
             !has_connectx()  ? "no ConnectX card"
             : settings.ibgda ? "IBGDA"
                              : "IBGDA switched off",
             settings.control.c_str(), its.summary);
    return EPT_OK;
  });
}

int32_t nvshmem_open(const ept_host *host, const ept_open_params *params, ept_instance **result) {
  *result = nullptr;
  return plugin::guarded("nvshmem", "open", [&]() -> int32_t {
    auto instance = std::make_unique<ept_instance>();
    instance->host = host;
    instance->rank = params->rank;
    instance->world = params->world;
    int32_t code = read_settings(params->values, params->value_count, &instance->settings);
    const ept_backend *table = nullptr;
    if (code == EPT_OK) code = take_control(instance->settings, &instance->values, &table);
    std::string mend;
    if (code == EPT_OK) code = find_pieces(host, instance->settings, &instance->library, &instance->cuda, &mend);
    if (code != EPT_OK) return code;
    const ept_backend *before = nullptr;
    if (!beneath.compare_exchange_strong(before, table) && before != table)
      return fail(EPT_E_LIMIT, "open", params->rank, 0,
                  "nvshmem: this process has %s beneath an earlier group, and can't have %s beneath another",
                  before->name, table->name);
    if (instance->settings.ibgda && has_connectx()) setenv("NVSHMEM_IB_ENABLE_IBGDA", "1", 0);
    ept_open_params passed = *params;
    passed.values = instance->values.view().data();
    passed.value_count = instance->values.view().size();
    code = table->open(host, &passed, &instance->beneath);
    if (code != EPT_OK) {
      ept_error said{};
      said.size = sizeof said;
      table->last_error(&said);
      return fail(code, "open", params->rank, said.provider_errno, "%s", said.text);
    }
    *result = instance.release();
    return EPT_OK;
  });
}

void nvshmem_close(ept_instance *instance) {
  under().close(instance->beneath);
  if (instance->claimed) Session::of_process().let_go(instance);
  delete instance;
}

int32_t nvshmem_caps(ept_instance *instance, ept_caps *caps) {
  const int32_t code = passed(under().caps(instance->beneath, caps));
  if (code == EPT_OK) add_caps(caps);
  return code;
}

// ---- memory: the heap's pieces are ours, all else is of the network beneath ----

int32_t mem_register(ept_instance *instance, const ept_memory *memory, ept_mem **mem) {
  if (memory->kind != EPT_MEMORY_CUDA) return passed(under().mem_register(instance->beneath, memory, mem));
  *mem = nullptr;
  return plugin::guarded("nvshmem", "mem_register", [&]() -> int32_t {
    const Session &session = Session::of_process();
    const auto at = static_cast<uint64_t>(static_cast<const char *>(memory->address) - session.base());
    if (!instance->joined || !session.heap()->holds(at, memory->length))
      return fail(EPT_E_UNSUPPORTED, "mem_register", instance->rank, 0,
                  "nvshmem: CUDA memory from outside the symmetric heap: take it from mem_alloc");
    *mem = reinterpret_cast<ept_mem *>(make_piece({instance, at, memory->length, memory->role == EPT_ROLE_SIGNAL}));
    return EPT_OK;
  });
}

int32_t mem_deregister(ept_mem *mem) {
  if (!is_piece(mem)) return passed(under().mem_deregister(mem));
  drop_piece(mem);
  return EPT_OK;
}

int32_t export_piece(const ept_mem *mem, uint64_t offset, uint64_t length, bool signal, void *blob, size_t *size) {
  const auto &piece = *reinterpret_cast<const Piece *>(mem);
  if (offset > piece.length || length > piece.length - offset)
    return fail(EPT_E_INVALID, "region_export", -1, 0, "nvshmem: %llu bytes at %llu of memory of %llu",
                static_cast<unsigned long long>(length), static_cast<unsigned long long>(offset),
                static_cast<unsigned long long>(piece.length));
  PieceBlob said;
  said.rank = piece.instance->rank;
  said.offset = piece.offset + offset;
  said.length = length;
  said.signal = signal;
  if (*size < sizeof said)
    return fail(EPT_E_INVALID, "region_export", -1, 0, "nvshmem: the blob needs %zu bytes, there is room for %zu",
                sizeof said, *size);
  memcpy(blob, &said, sizeof said);
  *size = sizeof said;
  return EPT_OK;
}

int32_t region_export(ept_mem *mem, uint32_t rank, uint64_t offset, uint64_t length, void *blob, size_t *blob_length,
                      uint64_t *key) {
  if (!is_piece(mem)) return passed(under().region_export(mem, rank, offset, length, blob, blob_length, key));
  *key = 0;
  return export_piece(mem, offset, length, false, blob, blob_length);
}

int32_t region_revoke(ept_mem *mem, uint32_t rank, uint64_t key) {
  if (!is_piece(mem)) return passed(under().region_revoke(mem, rank, key));
  return fail(EPT_E_UNSUPPORTED, "region_revoke", rank, 0,
              "nvshmem: access to the symmetric heap can't be taken back from a peer (clause 12 is waived)");
}

int32_t import_piece(ept_instance *instance, uint32_t rank, const void *blob, size_t length, bool signal,
                     ept_region **region) {
  *region = nullptr;
  return plugin::guarded("nvshmem", "region_import", [&]() -> int32_t {
    PieceBlob said;
    if (length != sizeof said)
      return fail(EPT_E_INVALID, "region_import", rank, 0, "nvshmem: a blob of %zu bytes", length);
    memcpy(&said, blob, sizeof said);
    const uint64_t heap = instance->joined ? Session::of_process().heap()->bytes() : 0;
    if (said.magic != PieceBlob::kMagic || said.version != 1 || said.rank != rank || said.offset > heap ||
        said.length > heap - said.offset || said.signal != (signal ? 1u : 0u))
      return fail(EPT_E_INVALID, "region_import", rank, 0, "nvshmem: not a blob of a piece of rank %u's heap", rank);
    *region = reinterpret_cast<ept_region *>(make_piece({instance, said.offset, said.length, signal}));
    return EPT_OK;
  });
}

// A blob of ours is told from one of the network beneath by its length and its first words.
bool is_ours(const void *blob, size_t length) {
  PieceBlob said;
  if (length != sizeof said) return false;
  memcpy(&said, blob, sizeof said);
  return said.magic == PieceBlob::kMagic;
}

int32_t region_import(ept_instance *instance, uint32_t rank, const void *blob, size_t length, ept_region **region) {
  if (is_ours(blob, length)) return import_piece(instance, rank, blob, length, false, region);
  return passed(under().region_import(instance->beneath, rank, blob, length, region));
}
void region_drop(ept_region *region) { is_piece(region) ? drop_piece(region) : under().region_drop(region); }

int32_t signal_export(ept_mem *mem, uint32_t, uint64_t offset, void *blob, size_t *blob_length) {
  if (is_piece(mem)) return export_piece(mem, offset, sizeof(uint64_t), true, blob, blob_length);
  return fail(EPT_E_UNSUPPORTED, "signal_export", -1, 0, "nvshmem: signals of its own are in the symmetric heap alone");
}
int32_t signal_import(ept_instance *instance, uint32_t rank, const void *blob, size_t length, ept_region **region) {
  return import_piece(instance, rank, blob, length, true, region);
}

int32_t entry_of(const ept_region *region, bool signal, ept_device_entry *entry) {
  if (!is_piece(region) || reinterpret_cast<const Piece *>(region)->signal != signal)
    return fail(EPT_E_INVALID, "device_region", -1, 0, "nvshmem: no %s of the symmetric heap",
                signal ? "signal" : "region");
  const auto &piece = *reinterpret_cast<const Piece *>(region);
  const uint32_t size = entry->size;
  *entry = ept_device_entry{};
  entry->size = size;
  entry->kind = EPT_DEVICE_GPU;
  entry->version = EPT_DEVICE_ABI;
  entry->words[0] = reinterpret_cast<uintptr_t>(Session::of_process().base()) + piece.offset;
  entry->words[1] = piece.length;
  return EPT_OK;
}
int32_t device_region(ept_region *region, ept_device_entry *entry) { return entry_of(region, false, entry); }
int32_t device_signal(ept_region *signal, ept_device_entry *entry) { return entry_of(signal, true, entry); }

// ---- the table ----

int32_t post(ept_worker *worker, const ept_op *ops, size_t count, size_t *posted) {
  for (size_t i = 0; i < count; ++i) {
    if (!is_piece(ops[i].source_mem) && !is_piece(ops[i].region)) continue;
    if (i > 0) return passed(under().post(worker, ops, i, posted));  // those before it; it is refused the next time
    *posted = 0;
    return fail(EPT_E_UNSUPPORTED, "post", ops[i].peer, 0,
                "nvshmem: the symmetric heap is written by kernels, and not by the host");
  }
  return passed(under().post(worker, ops, count, posted));
}

void last_error(ept_error *error) {
  const uint32_t size = error->size;
  *error = plugin::last_error();
  error->size = size;
}

// Entries that the network beneath answers, for its instance and for its worker.
template <auto Entry>
struct Beneath;
template <typename... A, int32_t (*ept_backend::*Entry)(ept_instance *, A...)>
struct Beneath<Entry> {
  static int32_t call(ept_instance *instance, A... a) { return passed((under().*Entry)(instance->beneath, a...)); }
};
template <typename... A, int32_t (*ept_backend::*Entry)(ept_worker *, A...)>
struct Beneath<Entry> {
  static int32_t call(ept_worker *worker, A... a) { return passed((under().*Entry)(worker, a...)); }
};
// Those that are methods here.
template <auto Method>
struct Own;
template <typename... A, int32_t (ept_instance::*Method)(A...)>
struct Own<Method> {
  static int32_t call(ept_instance *instance, A... a) {
    return plugin::guarded("nvshmem", "a call", [&] { return (instance->*Method)(a...); });
  }
};

int32_t query(ept_instance *instance, const char *feature, int64_t *value) {
  if (under().query == nullptr) return fail(EPT_E_UNSUPPORTED, "query", -1, 0, "nvshmem: no feature %s", feature);
  return passed(under().query(instance->beneath, feature, value));
}
void worker_close(ept_worker *worker) { under().worker_close(worker); }

}  // namespace

extern "C" {
extern __attribute__((visibility("default"))) const ept_backend ept_backend_v1;
const ept_backend ept_backend_v1 = {
    .size = sizeof(ept_backend),
    .abi = EPT_BACKEND_ABI,
    .name = "nvshmem",
    .version = kVersion,
    .settings = kSettings,
    .setting_count = kSettingCount,
    .probe = nvshmem_probe,
    .open = nvshmem_open,
    .close = nvshmem_close,
    .caps = nvshmem_caps,
    .rails = Beneath<&ept_backend::rails>::call,
    .local_address = Beneath<&ept_backend::local_address>::call,
    .reach = Beneath<&ept_backend::reach>::call,
    .join = Own<&ept_instance::join>::call,
    .peer_open = Beneath<&ept_backend::peer_open>::call,
    .peer_state = Beneath<&ept_backend::peer_state>::call,
    .peer_close = Beneath<&ept_backend::peer_close>::call,
    .peer_fence = Beneath<&ept_backend::peer_fence>::call,
    .worker_open = Beneath<&ept_backend::worker_open>::call,
    .worker_close = worker_close,
    .mem_alloc = Own<&ept_instance::mem_alloc>::call,
    .mem_free = Own<&ept_instance::mem_free>::call,
    .mem_register = mem_register,
    .mem_deregister = mem_deregister,
    .region_export = region_export,
    .region_revoke = region_revoke,
    .region_import = region_import,
    .region_drop = region_drop,
    .region_map = nullptr,
    .signal_export = signal_export,
    .signal_import = signal_import,
    .post = post,
    .poll = Beneath<&ept_backend::poll>::call,
    .arm = Beneath<&ept_backend::arm>::call,
    .visible = nullptr,  // caps.needs_visible is not set for host memory by any network that may be beneath
    .quiesce = Beneath<&ept_backend::quiesce>::call,
    .device_open = Own<&ept_instance::device_open>::call,
    .device_peer = Own<&ept_instance::device_peer>::call,
    .device_region = device_region,
    .device_signal = device_signal,
    .device_image = Own<&ept_instance::device_image>::call,
    .device_module = Own<&ept_instance::device_module>::call,
    .query = query,
    .counters = Beneath<&ept_backend::counters>::call,
    .last_error = last_error,
};
}
