// SPDX-License-Identifier: Apache-2.0
//
// opening.h: another project's library, opened at run time, so that a plugin loads on any machine and says what is
// missing there.
#pragma once

#include <dlfcn.h>
#include <link.h>

#include <algorithm>
#include <fstream>
#include <string>
#include <vector>

namespace plugin {

// What was asked for and what came of it, for the sentence that a user needs.
struct Refusal {
  std::string why;   // "libfabric.so.1 is not here: ..." with every place that was looked at
  std::string mend;  // "apt-get install libfabric1, ... or EPT_LIBFABRIC_LIBRARY=/path/libfabric.so.1"
};

// Gives `take` the handle of each of `places` (files, or names for the dynamic linker's own search; none where empty)
// until one suits: it returns an empty string, or what that library lacks. False: none did, and `why` says it of each.
//
// What was opened stays mapped for the life of the process: such libraries start threads and leave handlers behind,
// which must not outlive their code.
template <class Take>
bool open_first(const std::vector<std::string> &places, std::string *why, Take &&take) {
  for (const std::string &place : places) {
    if (place.empty()) continue;
    std::string reason;
    void *handle = dlopen(place.c_str(), RTLD_NOW | RTLD_LOCAL | RTLD_NODELETE);
    if (handle == nullptr) {
      const char *text = dlerror();
      reason = text != nullptr ? text : place + " can't be opened";
    } else {
      reason = take(handle);
      if (reason.empty()) return true;
      dlclose(handle);
      reason = place + " " + reason;
    }
    *why += (why->empty() ? "" : "; ") + reason;
  }
  return false;
}

// The file that the dynamic linker mapped; empty where it doesn't say.
inline std::string file_of(void *handle) {
  link_map *map = nullptr;
  return dlinfo(handle, RTLD_DI_LINKMAP, &map) == 0 && map != nullptr ? map->l_name : "";
}

// The files of that name (libfabric.so.1), or of that and a further version (libfabric.so.1.20.0), which this process
// has mapped: another copy beside one of these would see no devices, or not what the program has set up.
inline std::vector<std::string> mapped_files(const std::string &name) {
  std::vector<std::string> files;
  std::ifstream maps("/proc/self/maps");
  for (std::string line; std::getline(maps, line);) {
    const size_t slash = line.find('/');
    if (slash == std::string::npos) continue;
    const std::string file = line.substr(slash), last = file.substr(file.rfind('/') + 1);
    if (last != name && last.compare(0, name.size() + 1, name + ".") != 0) continue;
    if (std::find(files.begin(), files.end(), file) == files.end()) files.push_back(file);
  }
  return files;
}

// A file of a wheel, which lies in the folder that holds this package: .../`file` beside .../eptransport/plugins. Empty
// where this plugin does not know where it is itself.
inline std::string beside_the_package(const std::string &file) {
  Dl_info own{};
  if (dladdr(reinterpret_cast<void *>(&mapped_files), &own) == 0 || own.dli_fname == nullptr) return "";
  std::string folder = own.dli_fname;
  for (int up = 0; up < 3; ++up) {
    const size_t slash = folder.rfind('/');
    if (slash == std::string::npos) return "";
    folder.resize(slash);
  }
  return folder + "/" + file;
}

}  // namespace plugin
