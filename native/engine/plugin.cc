/* SPDX-License-Identifier: Apache-2.0 */
#include "engine/plugin.h"

#include <dlfcn.h>
#include <link.h>

#include <algorithm>
#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <map>
#include <memory>
#include <mutex>

#include "engine/error.h"
#include "engine/host.h"

using namespace ept;

namespace {

/* Plugins are never closed: their threads and thread-locals would outlive the code. */
std::mutex plugins_mutex;
std::map<std::string, std::unique_ptr<ept_plugin>> &plugins() {
  static auto *all = new std::map<std::string, std::unique_ptr<ept_plugin>>;
  return *all;
}

Host &probing_host() {
  static auto *host = new Host;
  return *host;
}

/* Every entry that ABI 1 does not mark optional must be there; the name of the first that is not, or NULL. */
const char *missing_entry(const ept_backend &t) {
  struct {
    const char *name;
    bool there;
  } required[] = {
      {"name", t.name != nullptr},
      {"version", t.version != nullptr},
      {"probe", t.probe != nullptr},
      {"open", t.open != nullptr},
      {"close", t.close != nullptr},
      {"caps", t.caps != nullptr},
      {"rails", t.rails != nullptr},
      {"local_address", t.local_address != nullptr},
      {"reach", t.reach != nullptr},
      {"peer_open", t.peer_open != nullptr},
      {"peer_state", t.peer_state != nullptr},
      {"peer_close", t.peer_close != nullptr},
      {"peer_fence", t.peer_fence != nullptr},
      {"worker_open", t.worker_open != nullptr},
      {"worker_close", t.worker_close != nullptr},
      {"mem_register", t.mem_register != nullptr},
      {"mem_deregister", t.mem_deregister != nullptr},
      {"region_export", t.region_export != nullptr},
      {"region_revoke", t.region_revoke != nullptr},
      {"region_import", t.region_import != nullptr},
      {"region_drop", t.region_drop != nullptr},
      {"post", t.post != nullptr},
      {"poll", t.poll != nullptr},
      {"arm", t.arm != nullptr},
      {"quiesce", t.quiesce != nullptr},
      {"counters", t.counters != nullptr},
      {"last_error", t.last_error != nullptr},
  };
  for (const auto &entry : required) {
    if (!entry.there) return entry.name;
  }
  return nullptr;
}

/* The loader maps a truncated library without a word, and the process dies of SIGBUS at the first page that isn't
 * there. So: does the file reach as far as its own segments say? Anything that is no ELF file is left to the loader to
 * refuse. */
bool truncated(const char *path) {
  std::ifstream file(path, std::ios::binary | std::ios::ate);
  const auto length = static_cast<uint64_t>(std::max<std::streamoff>(file.tellg(), 0));
  ElfW(Ehdr) header;
  file.seekg(0);
  if (!file.read(reinterpret_cast<char *>(&header), sizeof header)) return false;
  if (std::memcmp(header.e_ident, ELFMAG, SELFMAG) != 0 || header.e_phentsize != sizeof(ElfW(Phdr))) return false;
  for (unsigned i = 0; i < header.e_phnum; i++) {
    ElfW(Phdr) segment;
    file.seekg(static_cast<std::streamoff>(header.e_phoff + i * sizeof segment));
    if (!file.read(reinterpret_cast<char *>(&segment), sizeof segment)) return true;
    if (segment.p_type == PT_LOAD && segment.p_offset + segment.p_filesz > length) return true;
  }
  return false;
}

int32_t load(const char *path, std::unique_ptr<ept_plugin> &plugin, ept_error *error) {
  if (truncated(path)) {
    return fail(error, EPT_E_INVALID, "plugin_open", -1,
                "%s is shorter than its own headers say: a copy that broke off?", path);
  }
  void *library = dlopen(path, RTLD_NOW | RTLD_LOCAL);
  if (!library) {
    return fail(error, EPT_E_INVALID, "plugin_open", -1, "%s can't be loaded as a plugin: %s", path, dlerror());
  }
  const auto *table = static_cast<const ept_backend *>(dlsym(library, "ept_backend_v1"));
  if (!table) {
    dlclose(library);
    return fail(error, EPT_E_VERSION, "plugin_open", -1,
                "%s has no symbol ept_backend_v1, the table of ABI 1 that this engine serves: it is no eptransport "
                "plugin, or one for another version",
                path);
  }
  if (table->abi != EPT_BACKEND_ABI || table->size < sizeof(ept_backend)) {
    uint32_t abi = table->abi, size = table->size;
    dlclose(library);
    return fail(error, EPT_E_VERSION, "plugin_open", -1,
                "%s speaks plugin ABI %u with a table of %u bytes; this engine serves ABI %d with %zu bytes: build the "
                "plugin against this release's backend.h",
                path, abi, size, EPT_BACKEND_ABI, sizeof(ept_backend));
  }
  if (const char *name = missing_entry(*table)) {
    dlclose(library);
    return fail(error, EPT_E_INVALID, "plugin_open", -1, "%s leaves the entry `%s` empty, which ABI 1 requires", path,
                name);
  }
  plugin = std::make_unique<ept_plugin>(ept_plugin{path, table});
  return EPT_OK;
}

const ept_setting *find(const ept_plugin &plugin, const char *name) {
  for (size_t i = 0; i < plugin.table->setting_count; i++) {
    if (std::strcmp(plugin.table->settings[i].name, name) == 0) return &plugin.table->settings[i];
  }
  return nullptr;
}

int32_t check_value(const ept_plugin &plugin, const ept_setting &setting, const char *text, ept_error *error) {
  auto refuse = [&](const char *wanted) {
    return fail(error, EPT_E_CONFIG, "settings", -1, "setting %s of backend %s is '%s', which is not %s (%s)",
                setting.name, plugin.table->name, text, wanted, setting.doc);
  };
  switch (setting.type) {
    case EPT_SETTING_BOOL:
      return std::strcmp(text, "0") == 0 || std::strcmp(text, "1") == 0 ? EPT_OK : refuse("0 or 1");
    case EPT_SETTING_INT: {
      char *end = nullptr;
      errno = 0;
      long long value = std::strtoll(text, &end, 10);
      if (!*text || *end || errno) return refuse("a whole number");
      if (value < setting.min || value > setting.max) {
        std::string bounds = "between " + std::to_string(setting.min) + " and " + std::to_string(setting.max);
        return refuse(bounds.c_str());
      }
      return EPT_OK;
    }
    default:
      return EPT_OK;
  }
}

}  // namespace

int32_t Values::check(const ept_plugin &plugin, const ept_value *given, size_t count, ept_error *error) {
  text_.clear();
  view_.clear();
  for (size_t i = 0; i < plugin.table->setting_count; i++) {
    text_.emplace_back(plugin.table->settings[i].name, plugin.table->settings[i].value);
  }
  for (size_t i = 0; i < count; i++) {
    const ept_setting *setting = find(plugin, given[i].name);
    if (!setting) {
      std::string known;
      for (size_t k = 0; k < plugin.table->setting_count; k++) {
        known += (k ? ", " : "") + std::string(plugin.table->settings[k].name);
      }
      return fail(error, EPT_E_CONFIG, "settings", -1, "backend %s has no setting '%s'; it has: %s", plugin.table->name,
                  given[i].name, known.c_str());
    }
    if (int32_t code = check_value(plugin, *setting, given[i].text, error)) return code;
    text_[static_cast<size_t>(setting - plugin.table->settings)].second = given[i].text;
  }
  for (const auto &[name, value] : text_) view_.push_back({name.c_str(), value.c_str()});
  return EPT_OK;
}

extern "C" {

int32_t ept_plugin_open(const char *path, const ept_plugin **plugin, ept_error *error) {
  return guarded(error, "plugin_open", [&]() -> int32_t {
    std::lock_guard hold(plugins_mutex);
    auto &kept = plugins()[path];
    if (!kept) {
      if (int32_t code = load(path, kept, error)) {
        plugins().erase(path);
        return code;
      }
    }
    *plugin = kept.get();
    return EPT_OK;
  });
}

const char *ept_plugin_name(const ept_plugin *plugin) { return plugin->table->name; }
const char *ept_plugin_version(const ept_plugin *plugin) { return plugin->table->version; }
uint32_t ept_plugin_setting_count(const ept_plugin *plugin) {
  return static_cast<uint32_t>(plugin->table->setting_count);
}
const ept_setting *ept_plugin_setting(const ept_plugin *plugin, uint32_t index) {
  return index < plugin->table->setting_count ? &plugin->table->settings[index] : nullptr;
}

int32_t ept_plugin_probe(const ept_plugin *plugin, const ept_value *given, size_t count, ept_probe *probe,
                         ept_error *error) {
  return guarded(error, "probe", [&]() -> int32_t {
    Values values;
    if (int32_t code = values.check(*plugin, given, count, error)) return code;
    std::memset(probe, 0, sizeof *probe);
    probe->size = sizeof *probe;
    int32_t code = plugin->table->probe(probing_host().table(), values.view().data(), values.view().size(), probe);
    if (code < 0) {
      return fail(error, code, "probe", -1, "backend %s can't run here: %s%s%s", plugin->table->name, probe->summary,
                  probe->mend[0] ? "; " : "", probe->mend);
    }
    return code;
  });
}

const char *ept_version(void) { return "0.1.0"; }

const char *ept_code_name(int32_t code) {
  static const char *const names[] = {
      "EPT_OK",       "EPT_E_INVALID", "EPT_E_CONFIG",   "EPT_E_UNAVAILABLE", "EPT_E_UNSUPPORTED",
      "EPT_E_LIMIT",  "EPT_E_NOMEM",   "EPT_E_IO",       "EPT_E_TIMEOUT",     "EPT_E_PEER_LOST",
      "EPT_E_ACCESS", "EPT_E_AUTH",    "EPT_E_VERSION",  "EPT_E_MISMATCH",    "EPT_E_CLOSED",
      "EPT_E_STUCK",  "EPT_E_FAULT",   "EPT_E_CAPACITY", "EPT_E_INTERNAL",    "EPT_E_SUSPENDED"};
  if (code == EPT_LATER) return "EPT_LATER";
  if (code > 0 || code < EPT_E_SUSPENDED) return "unknown code";
  return names[-code];
}

}  // extern "C"
